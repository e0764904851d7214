"""Runs of experts that are to be merged (`training.decouple`), from the config to the model folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from t2i_experts.cascade.model_folder import WEIGHTS, load_model, read_provenance
from t2i_experts.cascade.stage import build_network
from t2i_experts.config import RunConfig, load_config
from t2i_experts.diffusion.loss import EDMLoss
from t2i_experts.diffusion.precond import EDMPrecond
from t2i_experts.experts.interval import NoiseInterval
from t2i_experts.nn.layers import ResidualBlock
from t2i_experts.training.checkpoints import checkpoints, read_facts
from t2i_experts.training.measure import measure_training
from t2i_experts.training.memory import estimate_training
from t2i_experts.training.posthoc import save_reconstruction
from t2i_experts.training.report import write_report
from t2i_experts.training.trainer import Trainer, train

Fine = Callable[..., RunConfig]
SHORT = ["training.images=16", "training.preview.every_images=0", "training.validation.every_images=0"]
LOW = "stage.noise.quantiles=[0, 1/2]"
CONSISTENT = "training.decouple.consistency=1"
PROJECTED = "training.decouple.projections=true"
PAPERS = "stage.network.projections=true"
ALL = [CONSISTENT, "training.decouple.everywhere=0.3", PROJECTED, PAPERS, LOW]


@pytest.fixture
def parent(trained: Path, tmp_path: Path) -> Path:
    """A model folder that may be changed."""
    shutil.copytree(trained / "model", tmp_path / "parent")
    return tmp_path / "parent"


@pytest.fixture
def fine(write_config: Callable[[str], Path], parent: Path) -> Fine:
    """fine(name, *overrides): the config of a short run that begins with the parent's weights."""

    def config(name: str, *overrides: str) -> RunConfig:
        return load_config(write_config(name), [*SHORT, f"training.initial={parent}", *overrides])

    return config


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "base64" / WEIGHTS)


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def distance(trainer: Trainer, model: Path) -> float:
    """Squared, between what the run's network and a model denoise, on a batch of the run's."""
    (stage,) = load_model(model).stages.values()
    answers: list[Tensor] = []

    def keep(x: Tensor, sigma: Tensor, conditioning: object) -> Tensor:
        answers.extend(one(x, sigma, conditioning) for one in (trainer.network.eval(), stage.denoiser))  # type: ignore[arg-type]
        return answers[0]

    with torch.no_grad():
        trainer.task.objective = EDMLoss()
        trainer.task.losses(keep, next(trainer._batches()))
    return float((answers[0] - answers[1]).square().mean())


def test_the_parent_holds_the_run_near_it(fine: Fine, parent: Path) -> None:
    """At the same learning rate: with a large weight the function stays the parent's, and without it goes away from it."""
    gently = ("warmup_images=64", "schedule=linear", "beta1=0.5", "beta2=0.9", "learning_rate=0.003")
    rate = ["training.images=96", "training.checkpoint_every_images=96", *(f"training.optimizer.{said}" for said in gently)]
    far, near = (Trainer(fine(f"run{weight}", f"training.decouple.consistency={weight}", *rate), progress=False) for weight in (0, 30))
    assert far.parent is None and near.parent is not None
    for trainer in (far, near):
        trainer.run()
    assert 0 < distance(near, parent) < 0.15 * distance(far, parent)
    stays = {name: parameter.grad for name, parameter in near.parent.named_parameters()}
    assert not near.parent.training and set(stays.values()) == {None} and equal(near.parent.state_dict(), tensors(parent))


def test_noise_is_drawn_from_beyond_the_own_in_training_alone(fine: Fine) -> None:
    trainer = Trainer(fine("run", LOW, "training.decouple.everywhere=0.5"), progress=False)
    batches, own = trainer._batches(), NoiseInterval.node(1, 0)
    with torch.no_grad():
        sigma = torch.cat([trainer.task.losses(trainer.network, next(batches))[1] for _ in range(16)])
    assert 0.6 < float(own.contains(sigma).double().mean()) < 0.9, "three quarters of 128"
    assert trainer.task.interval == own and trainer.task.loss == EDMLoss(), "those of validation"


def test_folded_weights_answer_as_those_that_were_trained(fine: Fine, parent: Path, tmp_path: Path) -> None:
    trainer = Trainer(fine("run", PROJECTED, "training.optimizer.learning_rate=0.003"), progress=False)
    assert distance(trainer, parent) == 0, "the identity at first"
    trainer.run()
    saved = tmp_path / "run" / "model"
    assert tensors(saved).keys() == tensors(parent).keys(), "an ordinary network"
    matrices = [tensor for name, tensor in trainer.ema.network.state_dict().items() if name.endswith("matrix")]
    assert matrices and all((matrix - torch.eye(len(matrix))).abs().max() > 1e-4 for matrix in matrices)
    trainer.network.load_state_dict(trainer.ema.network.state_dict())
    assert distance(trainer, saved) < 1e-12 < distance(trainer, parent)
    newest = checkpoints(tmp_path / "run")[-1]
    assert any(name.endswith("matrix") for name in load_file(newest / "network.safetensors"))
    assert read_facts(newest)["model"] == load_model(saved).fingerprint, "what a child that begins with it remembers"
    assert read_provenance(saved)["decouple"]["projections"] is True


def test_snapshots_are_folded(fine: Fine, tmp_path: Path) -> None:
    train(fine("run", PROJECTED, "training.ema.kind=power", "training.ema.snapshot_every_images=8"), progress=False)
    save_reconstruction(tmp_path / "run", tmp_path / "out", 0.05)
    assert equal(tensors(tmp_path / "out"), tensors(tmp_path / "run" / "model")), "the width that is tracked"


def test_the_papers_projections_stay_and_the_folder_says_so(fine: Fine, parent: Path, tmp_path: Path) -> None:
    trainer = Trainer(fine("run", PAPERS), progress=False)
    assert distance(trainer, parent) == 0, "added to the parent's weights as the identity"
    trainer.run()
    saved = load_model(tmp_path / "run" / "model").stages["base64"]
    assert saved.config.network.projections and isinstance(saved.denoiser, EDMPrecond)
    more = tensors(tmp_path / "run" / "model").keys() - tensors(parent).keys()
    assert len(more) == 5 and all(name.endswith(".projection.weight") for name in more)
    trainer.network.load_state_dict(trainer.ema.network.state_dict())
    assert distance(trainer, tmp_path / "run" / "model") == 0
    child = Trainer(fine("child", PAPERS, f"training.initial={tmp_path / 'run' / 'model'}"), progress=False)
    assert distance(child, tmp_path / "run" / "model") == 0, "and go on in a child"


@pytest.mark.parametrize("more", [ALL, [*ALL[:2], LOW, "training.ema.kind=power"]], ids=["all", "without projections"])
def test_a_run_that_was_cut_goes_on_bit_for_bit(fine: Fine, tmp_path: Path, more: list[str]) -> None:
    train(fine("unbroken", *more), progress=False)
    train(fine("run", *more, "training.images=8"), progress=False)
    train(fine("run", *more), progress=False)
    ours, theirs = (checkpoints(tmp_path / name)[-1] for name in ("run", "unbroken"))
    for name in ("network", "ema", "optimizer"):
        assert equal(load_file(ours / f"{name}.safetensors"), load_file(theirs / f"{name}.safetensors"))
    assert equal(tensors(tmp_path / "run" / "model"), tensors(tmp_path / "unbroken" / "model"))
    write_report(tmp_path / "run")
    assert "| for merging | 1 times the squared distance" in (tmp_path / "run" / "report.md").read_text()


def test_off_it_is_the_run_without_it(fine: Fine, tmp_path: Path) -> None:
    off = ["training.decouple.consistency=0", "training.decouple.everywhere=0", "training.decouple.projections=false"]
    trainer = Trainer(fine("run", LOW, *off), progress=False)
    assert trainer.parent is None and trainer.task.objective is trainer.task.loss and trainer.task.draws is trainer.task.interval
    trainer.run()
    assert "decouple" not in read_provenance(tmp_path / "run" / "model")


def test_the_parent_is_needed_to_the_end(fine: Fine, parent: Path) -> None:
    config = fine("run", CONSISTENT)
    train(fine("run", CONSISTENT, "training.images=8"), progress=False)
    path = parent / "base64" / WEIGHTS
    weights = load_file(path)
    save_file({name: tensor + 1 for name, tensor in weights.items()}, path)
    with pytest.raises(ValueError, match=r"training\.initial='.*parent' holds the weights \w{16} now, and the run in .* began with \w{16}"):
        Trainer(config, progress=False)
    moved = parent.rename(parent.with_name("moved"))
    with pytest.raises(ValueError, match=r"training\.initial='.*parent': no such folder.*; training\.decouple\.consistency=1 needs it"):
        Trainer(config, progress=False)
    save_file(weights, moved / "base64" / WEIGHTS)
    Trainer(fine("run", CONSISTENT, f"training.initial={moved}"), progress=False).run()
    with pytest.raises(ValueError, match=r"another config.*\n  training\.decouple\.consistency: 1\.0 -> 2\.0"):
        Trainer(fine("run", "training.decouple.consistency=2", f"training.initial={moved}"), progress=False)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["training.initial=null", CONSISTENT], r"decouple\.consistency=1\.0 needs training\.initial, .* say it in experts\.overrides"),
        (["training.decouple.everywhere=0.3"], r"decouple\.everywhere=0\.3 would be ignored: without stage\.noise\.quantiles"),
        ([LOW, "training.decouple.everywhere=1.5"], r"decouple\.everywhere=1\.5 must lie in \[0, 1\]"),
        (["training.decouple.consistency=-1"], r"decouple\.consistency=-1\.0 must be finite and not negative"),
    ],
)
def test_what_cannot_be_is_refused_by_name(fine: Fine, overrides: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fine("run", *overrides)


def test_a_parent_that_is_used_to_other_inputs_is_refused(fine: Fine) -> None:
    with pytest.raises(ValueError, match=r"^training\.initial='.*': it was trained with sigma_data 0\.5, .*no meaning"):
        Trainer(fine("run", CONSISTENT, "stage.noise.sigma_data=0.4"), progress=False)


def test_memory_counts_the_parent_and_what_projections_take(fine: Fine) -> None:
    plain, near, both = (fine("run", "training.batch_size=4", *more) for more in ([], [CONSISTENT], [CONSISTENT, PROJECTED]))
    estimates = [estimate_training(config) for config in (plain, near, both)]
    assert [estimate.parent for estimate in estimates] == [0, estimates[0].weights, estimates[0].weights]
    assert estimates[1].activations < 1.02 * estimates[0].activations, "nothing is remembered of what the parent computes"
    matrices = sum(4 * block.conv_out.out_channels**2 for block in build_network(plain.stage).modules() if isinstance(block, ResidualBlock))
    assert estimates[2].weights == estimates[0].weights + matrices and estimates[2].parameters == estimates[0].parameters + matrices // 4
    assert measure_training(both).images_per_second > 0
