"""Model folders with experts: they come back as they were, draw what their networks draw, explain themselves, and say what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from t2i_experts.cascade.expert_folders import ExpertState, Leaf
from t2i_experts.cascade.graphs import GraphedDenoiser
from t2i_experts.cascade.model_folder import INDEX, load_model, read_configs, save_ensemble
from t2i_experts.cascade.pipeline import CascadePipeline
from t2i_experts.cascade.stage import build_network
from t2i_experts.cascade.weights import WEIGHTS
from t2i_experts.config import ExpertSamplingConfig, ResolutionSpec, SamplingConfig, StageConfig
from t2i_experts.diffusion.precond import EDMPrecond
from t2i_experts.experts.ensemble import ExpertEnsemble
from t2i_experts.experts.interval import NoiseInterval
from t2i_experts.registry import registry

EDGES = [Fraction(u) for u in ("0", "1/8", "511/512", "1")]
INTERVALS = [NoiseInterval(a, b) for a, b in pairwise(EDGES)]
NAMES = ["E^3_0", "complement", "E^9_511"]
PROMPTS = ["a red cube", "two green apples"]


def leaves(*experts: str) -> list[Leaf]:
    return [Leaf(name, interval, expert) for name, interval, expert in zip(NAMES, INTERVALS, experts or NAMES, strict=True)]


def state(config: StageConfig, weights: Mapping[str, torch.Tensor], interval: NoiseInterval | None = None) -> ExpertState:
    quantiles = [] if interval is None else [str(interval.u_lo), str(interval.u_hi)]
    return ExpertState(replace(config, noise=replace(config.noise, quantiles=quantiles)), weights)


def random_state(config: StageConfig, interval: NoiseInterval, seed: int) -> ExpertState:
    torch.manual_seed(seed)
    network = build_network(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return state(config, network.state_dict(), interval)


def write(folder: Path, root: Path, experts: Mapping[str, ExpertState], *answers: str, sampling: SamplingConfig | None = None) -> Path:
    model = load_model(root)
    stage = model.stages["base64"]
    provenance = {"images_seen": 7, "experts": {name: {"images_seen": 1} for name in experts}}
    settings = sampling or stage.sampling
    save_ensemble(folder, stage.config, settings, leaves(*answers), experts, model.conditioner, provenance=provenance)
    return folder


def root_state(root: Path) -> tuple[StageConfig, dict[str, torch.Tensor]]:
    return read_configs(root)[0], load_file(root / "base64" / WEIGHTS)


@pytest.fixture(scope="module")
def copies(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three experts, all of them the root's network."""
    config, weights = root_state(model_folder)
    experts = {name: state(config, weights, interval) for name, interval in zip(NAMES, INTERVALS, strict=True)}
    return write(tmp_path_factory.mktemp("copies") / "model", model_folder, experts)


@pytest.fixture(scope="module")
def different(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three experts that differ, one of them in size."""
    config, _ = root_state(model_folder)
    large = replace(config, network=replace(config.network, resolutions=[ResolutionSpec(16, 1), ResolutionSpec(16, 2, True, True)]))
    shapes = (config, large, config)
    experts = {name: random_state(shapes[i], interval, i) for i, (name, interval) in enumerate(zip(NAMES, INTERVALS, strict=True))}
    return write(tmp_path_factory.mktemp("different") / "model", model_folder, experts)


def test_experts_that_are_the_root_draw_the_roots_pictures_bit_for_bit(model_folder: Path, copies: Path) -> None:
    root, ensemble = (CascadePipeline.from_pretrained(folder, device="cpu", dtype=torch.float32) for folder in (model_folder, copies))
    assert isinstance(ensemble.base.denoiser, ExpertEnsemble) and len(ensemble.base.denoiser.networks) == 3
    for sampler in registry.names("sampler"):
        for guidance in (1.0, 3.0):
            settings = root.settings(sampler=sampler, steps=7, guidance=guidance)
            pictures = [one(PROMPTS, negative="dogs" if guidance > 1 else "", sampling=settings) for one in (root, ensemble)]
            assert torch.equal(*pictures), sampler
    assert pictures[0].float().std() > 1 and not torch.equal(*pictures[0]), "there is something to compare"


def test_every_expert_draws_its_own_part_of_the_path(different: Path) -> None:
    pipeline = CascadePipeline.from_pretrained(different, device="cpu", dtype=torch.float32)
    ensemble = pipeline.base.denoiser
    assert isinstance(ensemble, ExpertEnsemble)
    networks = dict(zip(NAMES, ensemble.networks, strict=True))
    text = pipeline.model.conditioner(PROMPTS)
    x = torch.randn(2, *pipeline.base.noise_shape)
    for name, interval in zip(NAMES, INTERVALS, strict=True):
        sigma = torch.tensor(min(interval.sigma_hi, 80.0), dtype=torch.float64)
        assert torch.equal(ensemble(x, sigma, ensemble.prepare(text)), networks[name](x, sigma, text))
    whole = pipeline(PROMPTS)
    for name in NAMES:
        network = networks[name]
        assert isinstance(network, EDMPrecond)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(1.05)
        changed = pipeline(PROMPTS)
        assert not torch.equal(changed, whole), f"{name} has no say"
        whole = changed


def test_round_trip(different: Path, tmp_path: Path) -> None:
    first = load_model(different)
    stage = first.stages["base64"]
    ensemble = stage.denoiser
    assert isinstance(ensemble, ExpertEnsemble)
    assert stage.leaves == dict(zip(NAMES, INTERVALS, strict=True)) and [i for i, _ in ensemble.experts] == INTERVALS
    assert first.provenance["experts"] == {name: {"images_seen": 1} for name in NAMES}
    config, sampling, read = read_configs(different)
    assert (config, sampling, list(read)) == (stage.config, stage.sampling, leaves())
    experts = {}
    for name, network in zip(NAMES, ensemble.networks, strict=True):
        tree = json.loads((different / f"base64/experts/{name}/config.json").read_text())
        sizes = [ResolutionSpec(**spec) for spec in tree["network"]["resolutions"]]
        own = replace(config, network=replace(config.network, resolutions=sizes), noise=replace(config.noise, **tree["noise"]))
        assert isinstance(network, EDMPrecond)
        experts[name] = ExpertState(own, network.state_dict())
    save_ensemble(tmp_path / "again", config, sampling, read, experts, first.conditioner, provenance=first.provenance)
    files = sorted(path.relative_to(different) for path in different.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*") if path.is_file())
    assert all((different / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files), "the same bytes"
    assert load_model(tmp_path / "again").fingerprint == first.fingerprint


def test_the_folder_explains_itself(copies: Path) -> None:
    tree = json.loads((copies / "base64/config.json").read_text())
    assert tree["experts"] == [
        {"leaf": "E^3_0", "quantiles": ["0", "1/8"], "expert": "E^3_0"},
        {"leaf": "complement", "quantiles": ["1/8", "511/512"], "expert": "complement"},
        {"leaf": "E^9_511", "quantiles": ["511/512", "1"], "expert": "E^9_511"},
    ]
    own = copies / "base64/experts/complement"
    config = json.loads((own / "config.json").read_text())
    assert config["noise"]["quantiles"] == ["1/8", "511/512"] and config["_class_name"] == "UNet"
    assert {name: encoder["model"] for name, encoder in config["encoders"].items()} == {
        name: encoder["model"] for name, encoder in tree["encoders"].items()
    }
    with safe_open(own / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt", "node": "complement", "quantiles": "1/8 to 511/512"}
    assert not (copies / "base64" / WEIGHTS).exists()


def test_headers_have_one_order(copies: Path, model_folder: Path, tmp_path: Path) -> None:
    """safetensors writes several facts in any order."""
    config, weights = root_state(model_folder)
    experts = {name: state(config, weights, interval) for name, interval in zip(NAMES, INTERVALS, strict=True)}
    for i in range(4):
        again = write(tmp_path / str(i), model_folder, experts)
        for name in NAMES:
            file = Path("base64/experts", name, WEIGHTS)
            assert (again / file).read_bytes() == (copies / file).read_bytes()
    header = (copies / file).read_bytes()[8:200].decode()
    assert header.startswith('{"__metadata__":{"format":"pt","node":"E^9_511","quantiles":"511/512 to 1"}')


def test_an_ancestor_that_stands_in_is_there_once(model_folder: Path, tmp_path: Path) -> None:
    config, weights = root_state(model_folder)
    experts = {"root": state(config, weights), "E^9_511": random_state(config, INTERVALS[2], 3)}
    folder = write(tmp_path / "model", model_folder, experts, "root", "root", "E^9_511")
    assert sorted(path.name for path in (folder / "base64/experts").iterdir()) == ["E^9_511", "root"]
    ensemble = load_model(folder).stages["base64"].denoiser
    assert isinstance(ensemble, ExpertEnsemble) and len(ensemble.networks) == 2
    alone = write(tmp_path / "alone", model_folder, {"root": experts["root"]}, "root", "root", "root")
    pictures = [CascadePipeline.from_pretrained(one, device="cpu", dtype=torch.float32)(PROMPTS) for one in (alone, model_folder)]
    assert torch.equal(*pictures)


def test_the_fingerprint_is_of_all_weights_and_of_who_answers(copies: Path, model_folder: Path, tmp_path: Path) -> None:
    config, weights = root_state(model_folder)
    found = {load_model(copies).fingerprint, load_model(model_folder).fingerprint}
    other = {name: tensor + (name == sorted(weights)[0]) for name, tensor in weights.items()}
    for i in range(3):
        states = [state(config, other if i == j else weights, interval) for j, interval in enumerate(INTERVALS)]
        found.add(load_model(write(tmp_path / str(i), model_folder, dict(zip(NAMES, states, strict=True)))).fingerprint)
    assert len(found) == 5


def test_settings_of_experts(model_folder: Path, different: Path, tmp_path: Path) -> None:
    pipeline = CascadePipeline.from_pretrained(different, device="cpu", dtype=torch.float32)
    seen: list[tuple[int, int]] = []
    own = {"E^9_511": ExpertSamplingConfig(7.0, 3), "E^3_0": ExpertSamplingConfig(guidance=1.0)}
    settings = pipeline.settings(experts=own)
    found = pipeline(PROMPTS, sampling=settings, progress=lambda done, steps, denoised: seen.append((done, steps)))
    assert seen == [(i + 1, len(seen)) for i in range(len(seen))] and len(seen) == pipeline.base.steps(settings) == 5
    assert not torch.equal(found, pipeline(PROMPTS))
    shutil.copytree(different, tmp_path / "stored")
    index = json.loads((different / INDEX).read_text())
    index["sampling"]["base64"]["experts"] = {"E^9_511": {"guidance": 7.0, "steps": 3}, "E^3_0": {"guidance": 1.0}}
    (tmp_path / "stored" / INDEX).write_text(json.dumps(index))
    stored = CascadePipeline.from_pretrained(tmp_path / "stored", device="cpu", dtype=torch.float32)
    assert stored.base.sampling == settings and torch.equal(found, stored(PROMPTS))
    assert stored.settings(guidance=2.0, steps=5) == pipeline.settings(guidance=2.0, steps=5), "said for all"
    one_more = stored.settings(experts={"E^9_511": ExpertSamplingConfig(steps=2), "complement": ExpertSamplingConfig(2.0)})
    assert one_more.experts == {
        "E^9_511": ExpertSamplingConfig(7.0, 2),
        "E^3_0": ExpertSamplingConfig(1.0),
        "complement": ExpertSamplingConfig(2.0),
    }
    with pytest.raises(ValueError, match=r"E\^2_0: this model has no such expert; its experts: E\^3_0, complement, E\^9_511"):
        pipeline.settings(experts={"E^2_0": ExpertSamplingConfig(2.0)})


def test_compiled_networks_are_those_of_the_ensemble(different: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []
    monkeypatch.setattr(EDMPrecond, "compile", lambda self, **options: compiled.append(self))
    ensemble = CascadePipeline.from_pretrained(different, device="cpu", compile=True).base.denoiser
    assert isinstance(ensemble, ExpertEnsemble) and compiled == list(ensemble.networks)


def test_experts_of_one_shape_share_compiled_code(copies: Path) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    pipeline = CascadePipeline.from_pretrained(copies, device="cpu", dtype=torch.float32)
    ensemble = pipeline.base.denoiser
    assert isinstance(ensemble, ExpertEnsemble)
    for network in ensemble.networks:
        assert isinstance(network, EDMPrecond)
        network.compile(dynamic=False, backend="eager")
    counters.clear()
    before = counters["stats"]["unique_graphs"]
    pipeline(PROMPTS, sampling=pipeline.settings(steps=7, guidance=3.0))
    assert counters["stats"]["unique_graphs"] - before == 1
    torch._dynamo.reset()


def damage(folder: Path, name: str, **changes: object) -> None:
    """Changes values of a JSON file; None takes one out."""
    tree = {**json.loads((folder / name).read_text()), **changes}
    (folder / name).write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))


def swap(folder: Path) -> None:
    """The weights of two experts."""
    low, high = (folder / "base64/experts" / name / WEIGHTS for name in ("E^3_0", "E^9_511"))
    data = low.read_bytes()
    low.write_bytes(high.read_bytes())
    high.write_bytes(data)


def entry(leaf: str, lo: str, hi: str, expert: str | None = None) -> dict[str, object]:
    return {"leaf": leaf, "quantiles": [lo, hi], "expert": expert or leaf}


LOW, MIDDLE, HIGH = (entry(name, str(i.u_lo), str(i.u_hi)) for name, i in zip(NAMES, INTERVALS, strict=True))
STAGE = "base64/config.json"
OWN = "base64/experts/E^3_0/config.json"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: shutil.rmtree(f / "base64/experts/E^3_0"), r"experts/E\^3_0/config\.json is missing"),
        (lambda f: (f / "base64/experts/E^3_0" / WEIGHTS).unlink(), r"weights not found: .*E\^3_0"),
        (lambda f: damage(f, STAGE, experts=[]), r"base64/config\.json: experts=\[\] must be a list of experts"),
        (lambda f: damage(f, STAGE, experts=[LOW, "x", HIGH]), r"experts\[1\]='x' must be an object"),
        (lambda f: damage(f, STAGE, experts=[LOW, {**MIDDLE, "who": 1}, HIGH]), r"experts\[1\].* must be an object with leaf, quant"),
        (lambda f: damage(f, STAGE, experts=[LOW, HIGH]), r"config\.json: no expert answers for .* quantiles 1/8 to 511/512"),
        (lambda f: damage(f, STAGE, experts=[LOW, MIDDLE, MIDDLE, HIGH]), "names a leaf twice"),
        (lambda f: damage(f, STAGE, experts=[LOW, MIDDLE, entry("a", "1/8", "1/4"), HIGH]), "two experts answer for"),
        (lambda f: damage(f, STAGE, experts=[LOW, entry("complement", "1/8", "x"), HIGH]), r"experts\[1\]\.quantiles=\['1/8', 'x'\] must"),
        (lambda f: damage(f, STAGE, experts=[LOW, entry("complement", "1/8", "1/0"), HIGH]), r"\['1/8', '1/0'\] must be two fractions"),
        (
            lambda f: damage(f, STAGE, experts=[LOW, entry("complement", "1/8", "511/512", "../.."), HIGH]),
            r"experts\[1\]\.expert: a node's",
        ),
        (lambda f: damage(f, OWN, noise={"quantiles": ["0", "1/4"]}), rf"E\^3_0/{WEIGHTS}: its header says quantiles '0 to 1/8'"),
        (lambda f: damage(f, OWN, noise={"quantiles": ["1/4", "1/8"]}), r"E\^3_0/config\.json: noise\.quantiles=\['1/4', '1/8'\] must"),
        (lambda f: damage(f, OWN, noise={"std": 1.3, "quantiles": ["0", "1/8"]}), r"E\^3_0/config\.json: .*noise\.std: 1\.2 -> 1\.3"),
        (lambda f: damage(f, OWN, size=32), r"E\^3_0/config\.json: the expert E\^3_0 is no expert of this stage.*size: 16 -> 32"),
        (swap, rf"E\^3_0/{WEIGHTS}: its header says node 'E\^9_511', where config.json and its folder say 'E\^3_0'"),
        (lambda f: damage(f, INDEX, sampling={"base64": {"experts": {"E^2_0": {"steps": 3}}}}), r"base64\.experts\.E\^2_0: this model has"),
        (lambda f: damage(f, INDEX, sampling={"base64": {"experts": {"E^3_0": {"steps": 0}}}}), r"base64\.experts\.E\^3_0\.steps=0"),
    ],
)
def test_a_folder_that_contradicts_itself(copies: Path, tmp_path: Path, spoil: object, message: str) -> None:
    shutil.copytree(copies, tmp_path / "spoilt")
    spoil(tmp_path / "spoilt")  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "spoilt")


def test_a_file_without_facts_is_no_experts(copies: Path, tmp_path: Path) -> None:
    shutil.copytree(copies, tmp_path / "model")
    path = tmp_path / "model/base64/experts/complement" / WEIGHTS
    save_file(load_file(path), path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="its header says node None"):
        load_model(tmp_path / "model")


def test_what_does_not_belong_together_is_not_written(model_folder: Path, tmp_path: Path) -> None:
    config, weights = root_state(model_folder)
    good = {name: state(config, weights, interval) for name, interval in zip(NAMES, INTERVALS, strict=True)}
    other_noise = state(replace(config, noise=replace(config.noise, mean=-1.0)), weights, INTERVALS[0])
    wider = replace(config, encoders={**config.encoders, "t5": replace(config.encoders["t5"], width=32)})
    for experts, sampling, message in (
        ({**good, "E^3_0": other_noise}, None, r"E\^3_0 is no expert of this stage.*noise\.mean: -1\.2 -> -1\.0"),
        ({**good, "E^3_0": state(wider, weights)}, None, r"E\^3_0 is no expert of this stage.*encoders\.t5\.width: 16 -> 32"),
        ({name: good[name] for name in NAMES[:2]}, None, r"no weights of the expert E\^9_511; there are those of E\^3_0, complement"),
        ({**good, "E^2_0": good["E^3_0"]}, None, r"experts that answer for no noise: E\^2_0"),
        (good, SamplingConfig(experts={"E^2_0": ExpertSamplingConfig(2.0)}), r"sampling\.experts\.E\^2_0: this model has no such expert"),
    ):
        with pytest.raises(ValueError, match=message):
            write(tmp_path / "model", model_folder, experts, sampling=sampling)
    assert not list(tmp_path.iterdir()), "nothing is left"
    drop_alone = replace(config, encoders={name: replace(encoder, drop=0.5) for name, encoder in config.encoders.items()})
    write(tmp_path / "model", model_folder, {**good, "E^3_0": state(drop_alone, weights, INTERVALS[0])})
    load_model(tmp_path / "model")


@pytest.mark.gpu
def test_graphs_of_experts_share_their_memory_and_agree(copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    pipeline = CascadePipeline.from_pretrained(copies, device="cuda", dtype=torch.float32)
    ensemble = pipeline.base.denoiser
    assert isinstance(ensemble, ExpertEnsemble)
    graphed = ensemble.networks
    assert all(isinstance(network, GraphedDenoiser) for network in graphed) and len(graphed) == 3
    settings = pipeline.settings(steps=7, guidance=3.0, experts={"E^3_0": ExpertSamplingConfig(guidance=1.0)})
    pictures = [pipeline(PROMPTS, sampling=settings) for _ in range(2)]
    torch.testing.assert_close(*pictures, atol=1, rtol=0)
    plain = CascadePipeline.from_pretrained(copies, device="cuda", dtype=torch.float32)
    plain_ensemble = plain.base.denoiser
    assert isinstance(plain_ensemble, ExpertEnsemble)
    eager = plain_ensemble.map(lambda network: network.denoiser)  # type: ignore[attr-defined]
    stage = replace(plain.base, denoiser=eager)
    expected = CascadePipeline(replace(plain.model, stages={"base64": stage}), plain.device, plain.dtype)(PROMPTS, sampling=settings)
    torch.testing.assert_close(pictures[0], expected, atol=1, rtol=0)
    assert all(len(network._graphs) == 1 and None not in network._graphs.values() for network in graphed)  # type: ignore[attr-defined]
    assert len({id(network._memory) for network in graphed}) == 1  # type: ignore[attr-defined]
