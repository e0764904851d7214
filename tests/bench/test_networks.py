"""The two networks that are compared are of one size, and what is said of their errors is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from t2i_experts.bench.baseline import diffusers_network
from t2i_experts.bench.error import exact_float32, relative_rms
from t2i_experts.bench.floor import flops
from t2i_experts.bench.network import ENCODERS, SIZES, TEXT_TOKENS, captions, own_network, stage_of
from t2i_experts.cascade.stage import build_network
from t2i_experts.training.allocations import materialized
from t2i_experts.types import Conditioning, Embedding

CPU = torch.device("cpu")
SIZE = SIZES["100m"]


@pytest.fixture(scope="module")
def networks() -> tuple[nn.Module, Any]:
    """This project's, and diffusers', without memory for their weights."""
    with torch.device("meta"):
        return build_network(stage_of(SIZE)), diffusers_network(SIZE, torch.device("meta"))


def test_both_networks_take_the_same_operations(networks: tuple[nn.Module, Any]) -> None:
    own, baseline = networks
    with FakeTensorMode():
        materialized(own)
        materialized(baseline)
        image, text = torch.zeros(1, 3, 64, 64), Conditioning({name: fake_embedding(name) for name in ENCODERS})
        ours = flops(lambda: own(image, torch.ones(1), text))
        theirs = flops(lambda: baseline(image, torch.ones(1), torch.zeros(1, TEXT_TOKENS, SIZE.text_channels)))
    assert theirs == pytest.approx(ours, rel=0.05)
    assert 6e10 < ours < 9e10
    for network in networks:
        assert 9e7 < sum(parameter.numel() for parameter in network.parameters()) < 1.4e8


def fake_embedding(name: str) -> Embedding:
    encoder = ENCODERS[name]
    return Embedding.null(1, encoder.max_tokens, encoder.width, encoder.pooled_width)


def test_both_networks_attend_alike(networks: tuple[nn.Module, Any]) -> None:
    """At the same resolutions, with as many heads."""
    network = stage_of(SIZE).network
    attending = [spec for spec in network.resolutions if spec.self_attention and spec.cross_attention]
    assert [spec.channels for spec in attending] == [256, 384, 512]
    heads = {(module.to_q.in_features, module.heads) for module in networks[1].modules() if hasattr(module, "to_q")}
    assert heads == {(spec.channels, spec.channels // network.head_channels) for spec in attending}


def test_no_branch_of_the_network_is_idle() -> None:
    network = own_network(SIZES["tiny"], CPU)
    assert all(parameter.any() for parameter in network.parameters())
    again = own_network(SIZES["tiny"], CPU)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
    lengths = {name: embedding.mask.sum(1).tolist() for name, embedding in captions(3, CPU).embeddings.items()}
    assert lengths == {"t5": [24] * 3, "clip_text": [24] * 3, "clip_image": [1] * 3}


def test_errors_are_relative_to_all_values() -> None:
    references = [torch.tensor([3.0, 0.0]), torch.tensor([4.0])]
    found = [torch.tensor([3.0, 0.3]), torch.tensor([4.4])]
    assert relative_rms(found, references) == pytest.approx(0.5 / 5)
    before = torch.backends.cudnn.allow_tf32
    with exact_float32():
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before
