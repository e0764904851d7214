"""Whole runs: they learn, they log, and they go on after a kill as if nothing had been."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from t2i_experts.cli.app import main
from t2i_experts.config import load_config
from t2i_experts.training.checkpoints import checkpoints
from t2i_experts.training.divergence import TrainingDiverged
from t2i_experts.training.trainer import Trainer, train

WriteConfig = Callable[[str], Path]
FILES = ("network.safetensors", "ema.safetensors", "optimizer.safetensors")


def log(root: Path, kind: str) -> list[dict[str, object]]:
    return [event for line in (root / "log.jsonl").read_text().splitlines() if (event := json.loads(line))["event"] == kind]


def same_bits(first: Path, second: Path) -> bool:
    return all((first / name).read_bytes() == (second / name).read_bytes() for name in FILES)


def test_a_run_from_shards_to_model_folder(write_config: WriteConfig, tmp_path: Path) -> None:
    model = train(load_config(write_config("run"), ["training.images=320", "training.keep_checkpoints=2"]), progress=False)
    root = tmp_path / "run"
    assert model == root / "model"
    assert [path.name for path in checkpoints(root)][-2:] == ["000000000304", "000000000320"]  # and the best, if it is another
    losses = [float(str(event["loss"])) for event in log(root, "train")]
    assert len(losses) == 20
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    validation = log(root, "validation")
    assert len(validation) == 10
    assert [len(event["bins"]) for event in validation] == [2] * 10  # type: ignore[arg-type]
    assert (root / "previews" / "000000000320.png").is_file()


KILLED = """
import os, signal
from t2i_experts.training import task
losses, calls = task.DiffusionTask.losses, 0
def dying(self, denoiser, batch):
    global calls
    calls += 1
    if calls == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return losses(self, denoiser, batch)
task.DiffusionTask.losses = dying
from t2i_experts.cli.app import main
main({argv!r})
"""


def test_killed_in_mid_accumulation_and_resumed_by_the_same_command(
    write_config: WriteConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With two workers and accumulation 2, a run killed between the two halves of a step ends in the bits of one that was not."""
    overrides = ["training.accumulation=2", "data.workers=2", "training.keep_checkpoints=1"]
    train(load_config(write_config("unbroken"), overrides), progress=False)
    argv = ["train", str(write_config("broken")), *overrides, "--quiet"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", KILLED.format(call=10, argv=argv)], env=environment, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert [path.name for path in checkpoints(tmp_path / "broken")] == ["000000000032"]
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert not exit.value.code
    assert "going on from" in capsys.readouterr().err
    assert same_bits(checkpoints(tmp_path / "unbroken")[-1], checkpoints(tmp_path / "broken")[-1])
    for kind in ("train", "validation"):
        unbroken, broken = ([(e["images_seen"], e["loss"]) for e in log(tmp_path / name, kind)] for name in ("unbroken", "broken"))
        assert unbroken == broken


SIGNALLED = """
import os, signal
from t2i_experts.training import task
losses, calls = task.DiffusionTask.losses, 0
def telling(self, denoiser, batch):
    global calls
    calls += 1
    if calls == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return losses(self, denoiser, batch)
task.DiffusionTask.losses = telling
from t2i_experts.cli.app import main
main({argv!r})
"""


def test_two_processes_that_stop_and_go_on_equal_one_with_accumulation(write_config: WriteConfig, tmp_path: Path) -> None:
    """A signal to one of them stops both after the same step. Same global order, same noise: only the order of summation may differ."""
    train(load_config(write_config("one"), ["training.accumulation=2"]), progress=False)
    argv = ["train", str(write_config("two")), "training.checkpoint_every_images=64", "--quiet"]
    (tmp_path / "signalled.py").write_text(SIGNALLED.format(argv=argv))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for program, last in (([str(tmp_path / "signalled.py")], "000000000024"), (["-m", "t2i_experts", *argv], "000000000064")):
        two = subprocess.run([*launch, *program], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=180)
        assert two.returncode == 0, two.stderr.decode()
        assert checkpoints(tmp_path / "two")[-1].name == last
    assert b"going on from" in two.stderr
    first, second = (load_file(checkpoints(tmp_path / name)[-1] / "network.safetensors") for name in ("one", "two"))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=1e-4, rtol=1e-3, msg=name)
    for one, both in zip(log(tmp_path / "one", "validation"), log(tmp_path / "two", "validation"), strict=True):
        assert both["loss"] == pytest.approx(one["loss"], rel=1e-3)


def test_divergence_names_the_sample_and_keeps_the_last_good_checkpoint(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(load_config(write_config("run")), progress=False)
    losses, poisoned = trainer.task.losses, []

    def poison(denoiser, batch):  # type: ignore[no-untyped-def]
        result, sigma = losses(denoiser, batch)
        if batch.positions[0] != 16:
            return result, sigma
        poisoned.append(batch.keys[3])
        return result * torch.tensor([1, 1, 1, float("nan"), 1, 1, 1, 1]), sigma

    monkeypatch.setattr(trainer.task, "losses", poison)
    with pytest.raises(TrainingDiverged, match=rf"first in the batch with {'(.*)'}\. The same") as caught:
        trainer.run()
    assert f"with {poisoned[0]}." in str(caught.value)
    assert log(tmp_path / "run", "diverged")[0]["keys"] == poisoned
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["000000000016"]
    weights = load_file(checkpoints(tmp_path / "run")[0] / "network.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_a_gradient_that_overflows_blames_its_own_batch(write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loss is finite; the next batch, whose loss is not, is innocent."""
    trainer = Trainer(load_config(write_config("run")), progress=False)
    losses, guilty = trainer.task.losses, []

    def explode(denoiser, batch):  # type: ignore[no-untyped-def]
        result, sigma = losses(denoiser, batch)
        if batch.positions[0] != 16:
            return result, sigma
        guilty.extend(batch.keys)
        return result + (result - result.detach()) * float("inf"), sigma

    monkeypatch.setattr(trainer.task, "losses", explode)
    with pytest.raises(TrainingDiverged) as caught:
        trainer.run()
    assert all(key in str(caught.value) for key in guilty)


def test_an_existing_run_goes_on_only_with_its_own_config(write_config: WriteConfig) -> None:
    config = write_config("run")
    train(load_config(config, ["training.images=16"]), progress=False)
    with pytest.raises(ValueError, match=r"learning_rate: 0\.01 -> 0\.02"):
        Trainer(load_config(config, ["training.optimizer.learning_rate=0.02"]), progress=False)
    longer = Trainer(load_config(config, ["training.images=24", "data.workers=1", "training.accumulation=2"]), progress=False)
    assert longer.state.images_seen == 16
    longer.run()
    assert longer.state.images_seen == 24


def test_a_limit_on_minutes_stops_with_a_checkpoint(write_config: WriteConfig, tmp_path: Path) -> None:
    train(load_config(write_config("run"), ["training.max_minutes=1.0e-6", "training.checkpoint_every_images=64"]), progress=False)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["000000000008"]


def test_batch_must_divide(write_config: WriteConfig) -> None:
    with pytest.raises(ValueError, match="multiple of"):
        Trainer(load_config(write_config("run"), ["training.batch_size=9", "training.accumulation=2"]), progress=False)


def test_a_model_folder_that_a_kill_left_out_is_made_up_for(write_config: WriteConfig, tmp_path: Path) -> None:
    config = load_config(write_config("run"), ["training.images=16"])
    train(config, progress=False)
    shutil.rmtree(tmp_path / "run" / "model")
    assert (train(config, progress=False) / "model_index.json").is_file()


def test_other_encoder_weights_are_refused(write_config: WriteConfig, tmp_path: Path, t5_folder: Path) -> None:
    other = tmp_path / "t5"
    shutil.copytree(t5_folder, other)
    overrides = ["training.images=16", f"stage.encoders.t5.model={other}"]
    train(load_config(write_config("run"), overrides), progress=False)
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="other weights of the encoders t5"):
        Trainer(load_config(write_config("run"), overrides), progress=False)


HOLDER = """
import sys
from pathlib import Path
from t2i_experts.training.checkpoints import lock_run
lock = lock_run(Path(sys.argv[1]))
print("taken", flush=True)
sys.stdin.read()
"""


def test_one_run_at_a_time_in_a_folder(write_config: WriteConfig, tmp_path: Path) -> None:
    config = load_config(write_config("run"))
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"taken\n"
    with pytest.raises(ValueError, match=f"another process is training there .process {holder.pid}"):
        Trainer(config, progress=False)
    holder.kill()
    holder.wait()
    Trainer(config, progress=False)


def test_an_output_that_is_a_file_is_refused(write_config: WriteConfig, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match="cannot be used"):
        Trainer(load_config(write_config("run")), progress=False)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [("ACCELERATE_MIXED_PRECISION", "fp16", "mixed precision"), ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "accumulation steps")],
)
def test_the_launcher_cannot_change_the_run(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=message):
        Trainer(load_config(write_config("run")), progress=False)
