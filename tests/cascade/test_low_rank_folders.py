"""Low-rank experts in model folders: they come back as networks, or share one, and draw the pictures of the whole experts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from t2i_experts.cascade.expert_folders import ExpertState, bytes_of_experts, digest_of_experts, read_experts
from t2i_experts.cascade.expert_weights import LOW_RANK
from t2i_experts.cascade.model_folder import load_model, read_configs, save_ensemble
from t2i_experts.cascade.one_network import SharedNetwork, SharingExpert
from t2i_experts.cascade.pipeline import CascadePipeline
from t2i_experts.cascade.residency import encoder_modules, weight_bytes
from t2i_experts.cascade.weights import WEIGHTS, cast, read_weights
from t2i_experts.config import ResolutionSpec
from t2i_experts.diffusion.precond import EDMPrecond
from t2i_experts.experts.ensemble import ExpertEnsemble
from t2i_experts.experts.lowrank import Decomposition, LowRankDifference, restore
from t2i_experts.experts.lowrank_file import load_difference, save_difference
from t2i_experts.experts.states import State, fingerprint
from tests.cascade.test_expert_folders import INTERVALS, NAMES, PROMPTS, leaves, random_state, root_state, state

CPU = {"device": "cpu", "dtype": torch.float32}


def experts_near(root: State) -> dict[str, dict[str, Tensor]]:
    """Three networks that have moved a little from a root; one layer of the first has not."""
    generator = torch.Generator().manual_seed(0)
    experts = {name: {key: t + 0.1 * torch.randn(t.shape, generator=generator) for key, t in root.items()} for name in NAMES}
    experts[NAMES[0]]["network.conv_in.weight"] = root["network.conv_in.weight"].clone()
    return experts


def write(folder: Path, model_folder: Path, weights: Mapping[str, State | LowRankDifference], root: State, **more: object) -> Path:
    model, (config, _) = load_model(model_folder), root_state(model_folder)
    experts = {name: state(config, {}, interval) for name, interval in zip(NAMES, INTERVALS, strict=True)}
    stored = {name: replace(experts[name], weights=weights[name]) for name in NAMES}
    sampling = model.stages["base64"].sampling
    save_ensemble(folder, config, sampling, leaves(), stored, model.conditioner, root=root, **more)  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="module")
def root(model_folder: Path) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in root_state(model_folder)[1].items()}


@pytest.fixture(scope="module")
def cut(root: State) -> dict[str, Decomposition]:
    return {name: Decomposition(root, expert) for name, expert in experts_near(root).items()}


@pytest.fixture(scope="module")
def low_rank(model_folder: Path, tmp_path_factory: pytest.TempPathFactory, root: State, cut: Mapping[str, Decomposition]) -> Path:
    """The first expert at full rank, the second whole, the third at rank 2."""
    differences = {NAMES[0]: cut[NAMES[0]].at_rank(1000), NAMES[1]: experts_near(root)[NAMES[1]], NAMES[2]: cut[NAMES[2]].at_rank(2)}
    return write(tmp_path_factory.mktemp("low_rank") / "model", model_folder, differences, root)


def test_full_rank_draws_the_pictures_of_the_whole_experts(
    model_folder: Path, root: State, cut: Mapping[str, Decomposition], tmp_path: Path
) -> None:
    whole = write(tmp_path / "whole", model_folder, experts_near(root), root)
    full = write(tmp_path / "full", model_folder, {name: one.at_rank(one.largest_rank) for name, one in cut.items()}, root)
    assert not list(full.rglob(f"experts/*/{WEIGHTS}")) and len(list(full.rglob(LOW_RANK))) == 3
    pictures = [CascadePipeline.from_pretrained(folder, **CPU)(PROMPTS) for folder in (model_folder, whole, full)]  # type: ignore[arg-type]
    assert torch.equal(pictures[1], pictures[2]) and not torch.equal(pictures[0], pictures[1])


def test_whole_and_low_rank_experts_stand_side_by_side(low_rank: Path, root: State, cut: Mapping[str, Decomposition]) -> None:
    ensemble = load_model(low_rank).stages["base64"].denoiser
    assert isinstance(ensemble, ExpertEnsemble)
    whole = experts_near(root)
    expected = (whole[NAMES[0]], whole[NAMES[1]], restore(root, cut[NAMES[2]].at_rank(2)))
    for network, wanted in zip(ensemble.networks, expected, strict=True):
        assert isinstance(network, EDMPrecond)
        found = network.state_dict()
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not torch.equal(found["network.conv_in.weight"], whole[NAMES[2]]["network.conv_in.weight"])


def test_the_folder_explains_itself_and_is_the_same_bytes_each_time(
    low_rank: Path, model_folder: Path, root: State, tmp_path: Path
) -> None:
    difference, about = load_difference(low_rank / "base64/experts/E^9_511" / LOW_RANK)
    assert about == {"node": "E^9_511", "quantiles": "511/512 to 1"} and difference.root == fingerprint(root)
    assert difference.root == load_model(model_folder).fingerprint, "the root's model folder has this fingerprint"
    with safe_open(low_rank / "base64" / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    model, (config, sampling, found) = load_model(low_rank), read_configs(low_rank)
    experts, own_root = read_experts(low_rank / "base64", config, found)
    save_ensemble(tmp_path / "again", config, sampling, found, experts, model.conditioner, provenance=model.provenance, root=own_root)
    files = sorted(path.relative_to(low_rank) for path in low_rank.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*") if path.is_file())
    assert all((low_rank / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files)


def test_the_fingerprint_is_of_root_and_differences(low_rank: Path, model_folder: Path, root: State, tmp_path: Path) -> None:
    found = load_model(low_rank).fingerprint
    assert digest_of_experts(low_rank / "base64", read_configs(low_rank)[2])[:16] == found
    experts = read_experts(low_rank / "base64", *(read_configs(low_rank)[i] for i in (0, 2)))[0]
    weights = {name: expert.weights for name, expert in experts.items()}
    last = weights[NAMES[2]]
    assert isinstance(last, LowRankDifference)
    key = next(iter(last.whole))
    weights[NAMES[2]] = replace(last, whole={**last.whole, key: last.whole[key] + 1})
    assert load_model(write(tmp_path / "model", model_folder, weights, root)).fingerprint != found


def test_a_root_in_bfloat16_loses_no_small_differences(model_folder: Path, root: State, tmp_path: Path) -> None:
    """Experts a thousandth away: in the root's own type, most of their weights would be the root's."""
    stored = cast(root, torch.bfloat16)
    expert = {name: tensor.float() + 1e-3 * torch.ones(()) for name, tensor in stored.items()}
    decomposition = Decomposition(stored, expert, torch.bfloat16)
    differences = dict.fromkeys(NAMES, decomposition.at_rank(1))
    folder = write(tmp_path / "model", model_folder, differences, root, dtype=torch.bfloat16)
    assert {t.dtype for t in read_weights(folder / "base64" / WEIGHTS).values() if t.is_floating_point()} == {torch.bfloat16}
    ensemble = load_model(folder).stages["base64"].denoiser
    assert isinstance(ensemble, ExpertEnsemble) and isinstance(ensemble.networks[0], EDMPrecond)
    found = ensemble.networks[0].state_dict()
    for name in differences[NAMES[0]].factors:
        torch.testing.assert_close(found[name] - stored[name].float(), expert[name] - stored[name].float(), rtol=0.02, atol=1e-5)
    with pytest.raises(ValueError, match=rf"E\^3_0/{LOW_RANK}: the difference was taken from the root"):
        write(tmp_path / "other", model_folder, differences, root)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_that_share_a_network_draw_the_same_pictures(low_rank: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: list[object] = []
    become = SharedNetwork.become

    def noted(self: SharedNetwork, difference: LowRankDifference) -> None:
        changes.extend([difference] if difference is not self._worn else [])
        become(self, difference)

    monkeypatch.setattr(SharedNetwork, "become", noted)
    whole, sharing = (CascadePipeline.from_pretrained(low_rank, device="cpu", dtype=dtype, one_network=one) for one in (False, True))
    ensemble = sharing.base.denoiser
    assert isinstance(ensemble, ExpertEnsemble)
    low, _, high = ensemble.networks
    assert isinstance(low, SharingExpert) and isinstance(high, SharingExpert) and low.shared is high.shared
    settings = whole.settings(sampler="heun", steps=6)
    for prompts, negative in ((PROMPTS, ""), (PROMPTS[::-1], "dogs"), (PROMPTS, "")):
        changes.clear()
        assert torch.equal(*(one(prompts, negative=negative, sampling=settings) for one in (whole, sharing)))
        assert len(changes) == 2, "once for each expert of a picture"
    assert whole.model.fingerprint == sharing.model.fingerprint


def test_one_network_and_its_differences_are_what_is_resident(low_rank: Path, model_folder: Path) -> None:
    found = read_configs(low_rank)[2]
    network = weight_bytes([one for one in [load_model(model_folder).stages["base64"].denoiser] if isinstance(one, EDMPrecond)])
    differences = sum(load_difference(path)[0].bytes for path in low_rank.rglob(LOW_RANK))
    assert bytes_of_experts(low_rank / "base64", found, torch.float32) == 3 * network
    assert bytes_of_experts(low_rank / "base64", found, torch.float32, one_network=True) == 2 * network + differences
    encoders = weight_bytes(encoder_modules(load_model(low_rank).conditioner))
    enough = encoders + 2 * network + differences
    CascadePipeline.from_pretrained(low_rank, device="cpu", memory=enough, one_network=True)
    with pytest.raises(ValueError, match=rf"need more than {enough - 1:,} bytes, and one_network=True cannot take turns"):
        CascadePipeline.from_pretrained(low_rank, device="cpu", memory=enough - 1, one_network=True)
    with pytest.raises(ValueError, match="one_network=True needs low-rank experts"):
        CascadePipeline.from_pretrained(model_folder, device="cpu", one_network=True)
    turns, whole = (CascadePipeline.from_pretrained(low_rank, **CPU, memory=one) for one in (encoders + 2 * network, None))  # type: ignore[arg-type]
    assert torch.equal(turns(PROMPTS), whole(PROMPTS)), "restored experts take turns as any others"


def test_what_contradicts_itself_is_refused_by_name(low_rank: Path, model_folder: Path, root: State, tmp_path: Path) -> None:
    def spoilt(name: str) -> Path:
        return Path(shutil.copytree(low_rank, tmp_path / name)) / "base64"

    high = f"experts/E^9_511/{LOW_RANK}"
    folder = spoilt("other root")
    shutil.copy(low_rank / "base64/experts/complement" / WEIGHTS, folder / WEIGHTS)
    with pytest.raises(ValueError, match=rf"E\^3_0/{LOW_RANK}: the difference was taken from the root {fingerprint(root)}, and these"):
        load_model(folder.parent)
    folder = spoilt("no root")
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=rf"weights not found: .*base64/{WEIGHTS}"):
        load_model(folder.parent)
    folder = spoilt("exchanged")
    shutil.copy(folder / high, folder / "experts/E^3_0" / LOW_RANK)
    with pytest.raises(ValueError, match=rf"E\^3_0/{LOW_RANK}: its header says node 'E\^9_511', where config.json and its folder say"):
        load_model(folder.parent)
    folder = spoilt("other quantiles")
    config = json.loads((folder / "experts/E^9_511/config.json").read_text())
    config["noise"]["quantiles"] = ["1/2", "1"]
    (folder / "experts/E^9_511/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"E\^9_511/{LOW_RANK}: its header says quantiles '511/512 to 1'"):
        CascadePipeline.from_pretrained(folder.parent, device="cpu", one_network=True)
    folder = spoilt("both")
    shutil.copy(folder / WEIGHTS, folder / "experts/E^3_0")
    with pytest.raises(ValueError, match="holds both"):
        load_model(folder.parent)
    folder = spoilt("other tensors")
    difference, about = load_difference(folder / high)
    save_difference(folder / high, replace(difference, whole={"network.conv_in.weight": torch.zeros(3)}), about)
    with pytest.raises(ValueError, match=r"has network\.conv_in\.weight of \(3,\), and the root \("):
        load_model(folder.parent)


def test_an_expert_of_another_network_cannot_be_low_rank(model_folder: Path, root: State, cut: Mapping[str, Decomposition]) -> None:
    config, _ = root_state(model_folder)
    large = replace(config, network=replace(config.network, resolutions=[ResolutionSpec(16, 1), ResolutionSpec(16, 1, True, True)]))
    experts = {name: random_state(large, interval, 0) for name, interval in zip(NAMES, INTERVALS, strict=True)}
    experts[NAMES[0]] = ExpertState(experts[NAMES[0]].config, cut[NAMES[0]].at_rank(1))
    model = load_model(model_folder)
    stage = model.stages["base64"]
    for given in (None, root):
        with pytest.raises(ValueError, match=r"the low-rank expert E\^3_0 needs a root"):
            save_ensemble(model_folder.parent / "no", stage.config, stage.sampling, leaves(), experts, model.conditioner, root=given)


def test_compiled_code_reads_the_weights_of_each_expert(low_rank: Path) -> None:
    torch._dynamo.reset()
    whole, sharing = (CascadePipeline.from_pretrained(low_rank, **CPU, one_network=one) for one in (False, True))  # type: ignore[arg-type]
    ensemble = sharing.base.denoiser
    assert isinstance(ensemble, ExpertEnsemble) and isinstance(ensemble.networks[0], SharingExpert)
    ensemble.networks[0].shared.network.compile(backend="eager", dynamic=False)
    assert torch.equal(whole(PROMPTS), sharing(PROMPTS))
    torch._dynamo.reset()


@pytest.mark.gpu
def test_graphs_read_the_weights_of_each_expert(low_rank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for dtype in (torch.float32, torch.bfloat16):
        whole, sharing = (CascadePipeline.from_pretrained(low_rank, device="cuda", dtype=dtype, one_network=one) for one in (False, True))
        for _ in range(2):
            assert torch.equal(whole(PROMPTS), sharing(PROMPTS))
