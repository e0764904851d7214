"""Networks that take turns on a device draw what they draw when all are there, within the budget, the next one let in beforehand."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from t2i_experts.cascade.expert_folders import ExpertState, Leaf
from t2i_experts.cascade.graphs import GraphedDenoiser
from t2i_experts.cascade.model_folder import load_model, save_ensemble
from t2i_experts.cascade.pipeline import CascadePipeline
from t2i_experts.cascade.residency import Budget, Guest, Residency, Visitor, encoder_modules, weight_bytes
from t2i_experts.cascade.stage import build_network
from t2i_experts.config import ResolutionSpec
from t2i_experts.experts.ensemble import ExpertEnsemble
from t2i_experts.experts.interval import NoiseInterval

CPU = torch.device("cpu")
NAMES = ["low", "middle", "high"]
PROMPTS = ["a red cube", "two green apples"]


class Recorded(Guest):
    """A guest of so many bytes that notes what happens to it."""

    def __init__(self, name: str, size: int, log: list[str]) -> None:
        super().__init__([nn.ParameterList([nn.Parameter(torch.zeros(size, dtype=torch.uint8), requires_grad=False)])], CPU)
        self.name, self.log = name, log

    def arrive(self, stream: torch.cuda.Stream | None) -> None:
        super().arrive(stream)
        self.log.append(f"+{self.name}")

    def leave(self) -> None:
        super().leave()
        if hasattr(self, "log"):
            self.log.append(f"-{self.name}")


def guests(log: list[str], **sizes: int) -> dict[str, Recorded]:
    return {name: Recorded(name, size, log) for name, size in sizes.items()}


def test_the_next_one_comes_beforehand_and_encoders_leave_first() -> None:
    log: list[str] = []
    e, h, m, low = guests(log, e=5, h=4, m=4, l=4).values()
    residency = Residency([e, h, m, low], CPU, budget=9)
    told = []
    for guest in (e, h, h, h, m, m, low, e, h):
        log.clear()
        residency.enter(guest)
        told.append(" ".join(log))
        assert guest in residency.here and sum(one.bytes for one in residency.here) <= 9
    assert told == ["+e +h", "-e +m", "", "", "-h +l", "", "-m +e", "-l +h", "-e +m"]


def test_what_is_needed_last_leaves_first() -> None:
    log: list[str] = []
    e, h, m, low = guests(log, e=5, h=4, m=4, l=4).values()
    residency = Residency([e, h, m, low], CPU, budget=13)
    for guest in (e, h, m, low, e):
        residency.enter(guest)
    assert log == ["+e", "+h", "+m", "-h", "+l", "-l", "+h"]


def test_all_that_fits_stays() -> None:
    log: list[str] = []
    found = guests(log, e=5, h=4, m=4, l=4)
    residency = Residency(list(found.values()), CPU, budget=17)
    for _ in range(3):
        for guest in found.values():
            residency.enter(guest)
    assert log == ["+e", "+h", "+m", "+l"]


def test_one_that_is_too_large_for_two_is_alone() -> None:
    log: list[str] = []
    e, h, m = guests(log, e=5, h=8, m=8).values()
    residency = Residency([e, h, m], CPU, budget=9)
    for guest in (e, h, m, e):
        residency.enter(guest)
        assert residency.here == [guest]
    huge = Residency([e, h], CPU, budget=1)
    huge.enter(h)
    assert huge.here == [h], "it must compute somewhere"


def test_an_expert_that_comes_twice_in_a_picture_and_one_that_is_passed_over() -> None:
    log: list[str] = []
    e, root, high = guests(log, e=1, r=4, x=4).values()
    residency = Residency([e, root, high, root], CPU, budget=8)
    for guest in (e, root, high, root, e):
        residency.enter(guest)
    assert log == ["+e", "+r", "-e", "+x", "-x", "+e"], "root is needed again soonest, and stays"
    log.clear()
    a, b, c = guests(log, a=1, b=1, c=1).values()
    residency = Residency([a, b, c], CPU, budget=2)
    for guest in (a, c, a):
        residency.enter(guest)
        assert guest in residency.here and len(residency.here) <= 2


def test_weights_come_and_go_and_shared_ones_count_once() -> None:
    shared = nn.Linear(4, 4).requires_grad_(False)
    before = shared.weight.clone()
    guest = Guest([nn.Sequential(shared), shared], CPU)
    assert guest.bytes == weight_bytes([shared, shared]) == 4 * (16 + 4)
    home = shared.weight.data_ptr()
    guest.arrive(None)
    assert shared.weight.data_ptr() != home and torch.equal(shared.weight, before)
    guest.leave()
    assert shared.weight.data_ptr() == home and torch.equal(shared.weight, before)


@pytest.fixture(scope="module")
def three(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ensemble of three networks of two sizes."""
    model = load_model(model_folder)
    stage = model.stages["base64"]
    network = stage.config.network
    large = replace(stage.config, network=replace(network, resolutions=[ResolutionSpec(16, 1), ResolutionSpec(16, 2, True, True)]))
    intervals = [NoiseInterval(a, b) for a, b in pairwise([Fraction(0), Fraction(1, 4), Fraction(7, 8), Fraction(1)])]
    experts = {}
    for i, (name, interval) in enumerate(zip(NAMES, intervals, strict=True)):
        torch.manual_seed(i)
        config = (stage.config, large, stage.config)[i]
        weights = build_network(config)
        for parameter in weights.parameters():
            nn.init.normal_(parameter, std=0.3)
        noise = replace(config.noise, quantiles=[str(interval.u_lo), str(interval.u_hi)])
        experts[name] = ExpertState(replace(config, noise=noise), weights.state_dict())
    leaves = [Leaf(name, interval, name) for name, interval in zip(NAMES, intervals, strict=True)]
    folder = tmp_path_factory.mktemp("residency") / "model"
    save_ensemble(folder, stage.config, stage.sampling, leaves, experts, model.conditioner)
    return folder


def sizes(folder: Path) -> tuple[int, list[int]]:
    """Bytes of the encoders, and of the networks."""
    model = load_model(folder)
    ensemble = model.stages["base64"].denoiser
    networks = list(ensemble.networks) if isinstance(ensemble, ExpertEnsemble) else [ensemble]
    return weight_bytes(encoder_modules(model.conditioner)), [weight_bytes([one]) for one in networks if isinstance(one, nn.Module)]


def lose(guest: Guest) -> None:
    """At home weights can be computed with, too, if the device is the CPU; not so here."""
    for tensor, home in zip(guest._tensors, guest._home, strict=True):
        tensor.data = torch.full_like(home, math.nan) if home.is_floating_point() else home


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("is_tight", [False, True])
def test_pictures_are_the_same(three: Path, is_tight: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if device == "cpu":
        monkeypatch.setattr(Guest, "leave", lose)
    encoders, networks = sizes(three)
    memory = max(encoders, *networks) + (0 if is_tight else min(networks))
    whole = CascadePipeline.from_pretrained(three, device=device, dtype=torch.float32)
    turns = CascadePipeline.from_pretrained(three, device=device, dtype=torch.float32, memory=memory)
    ensemble = turns.base.denoiser
    assert isinstance(ensemble, ExpertEnsemble) and all(isinstance(one, Visitor) for one in ensemble.networks)
    for sampler in ("heun", "dpmpp_2m"):
        settings = whole.settings(sampler=sampler, steps=6)
        for negative in ("", "dogs"):
            pictures = [one(PROMPTS, negative=negative, sampling=settings) for one in (whole, turns)]
            torch.testing.assert_close(*pictures, atol=0 if device == "cpu" else 1, rtol=0)
    assert whole.model.fingerprint == turns.model.fingerprint


def test_a_single_network_takes_turns_with_its_encoders(model_folder: Path) -> None:
    encoders, (network,) = sizes(model_folder)
    whole, turns = (
        CascadePipeline.from_pretrained(model_folder, device="cpu", dtype=torch.float32, memory=memory)
        for memory in (encoders + network, encoders + network - 1)
    )
    assert isinstance(turns.base.denoiser, Visitor) and not isinstance(whole.base.denoiser, Visitor)
    assert torch.equal(whole(PROMPTS), turns(PROMPTS))
    assert turns.model.conditioner.names == whole.model.conditioner.names


def test_without_a_bound_all_are_there(three: Path) -> None:
    budget = Budget(CPU, None)
    assert budget.networks_on(load_model(three).conditioner, 10**18) == CPU and budget.exceeded is None
    pipeline = CascadePipeline.from_pretrained(three, device="cpu")
    assert isinstance(pipeline.base.denoiser, ExpertEnsemble)
    assert not any(isinstance(one, Visitor | GraphedDenoiser) for one in pipeline.base.denoiser.networks)
