"""The U-Net: shapes, conditioning, and what must not matter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from t2i_experts.config import ResolutionSpec, load_config
from t2i_experts.nn.unet import UNet
from t2i_experts.types import Embedding

ENCODERS = {"t5": (6, 0), "clip_text": (4, 5)}


def embeddings(batch: int, length: int = 4) -> dict[str, Embedding]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: Embedding(
            torch.randn(batch, length, width, generator=generator),
            torch.ones(batch, length, dtype=torch.bool),
            torch.randn(batch, pooled, generator=generator) if pooled else None,
        )
        for name, (width, pooled) in ENCODERS.items()
    }


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    specs = [ResolutionSpec(16, 2), ResolutionSpec(24, 1, False, True), ResolutionSpec(32, 1, True, True)]
    network = UNet(specs, ENCODERS, embedding_channels=16, context_channels=12, head_channels=8)
    for parameter in network.parameters():
        if parameter.abs().max() == 0:
            nn.init.normal_(parameter, std=0.05)
    return network.to(memory_format=torch.channels_last).eval()


def run(network: UNet, x: torch.Tensor, given: dict[str, Embedding]) -> torch.Tensor:
    with torch.no_grad():
        return network(x, torch.linspace(-1, 1, len(x)), network.project(given))


def test_fresh_network_gives_zero() -> None:
    network = UNet([ResolutionSpec(16, 1)], ENCODERS, embedding_channels=8, context_channels=8)
    assert run(network, torch.randn(1, 3, 8, 8), embeddings(1)).abs().max() == 0


@pytest.mark.parametrize("shape", [(16, 16), (8, 24)])
def test_output_is_image_sized(unet: UNet, shape: tuple[int, int]) -> None:
    assert run(unet, torch.randn(2, 3, *shape), embeddings(2)).shape == (2, 3, *shape)


def test_rows_do_not_see_each_other(unet: UNet) -> None:
    x, given = torch.randn(3, 3, 16, 16), embeddings(3)
    alone = unet(x[1:2], torch.zeros(1), {k: v[1:2] for k, v in unet.project(given).items()})
    together = unet(x, torch.zeros(3), unet.project(given))
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-4)


def test_padding_is_never_attended(unet: UNet) -> None:
    """Longer padding, and anything written into it, changes nothing."""
    x, given = torch.randn(2, 3, 16, 16), embeddings(2)
    padded = {
        name: Embedding(
            torch.cat([e.tokens, 100 * torch.randn(2, 3, e.tokens.shape[2])], dim=1),
            torch.cat([e.mask, torch.zeros(2, 3, dtype=torch.bool)], dim=1),
            e.pooled,
        )
        for name, e in given.items()
    }
    torch.testing.assert_close(run(unet, x, padded), run(unet, x, given), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", list(ENCODERS))
def test_every_encoder_is_heard(unet: UNet, name: str) -> None:
    x, given = torch.randn(2, 3, 16, 16), embeddings(2)
    other = dict(given) | {name: given[name].dropped(torch.tensor([True, False]))}
    first, second = run(unet, x, given), run(unet, x, other)
    assert not torch.allclose(first[0], second[0], atol=1e-4)
    torch.testing.assert_close(first[1], second[1], atol=1e-5, rtol=1e-4)


def test_pooled_vector_and_noise_level_are_heard(unet: UNet) -> None:
    x, given = torch.randn(1, 3, 16, 16), embeddings(1)
    e = given["clip_text"]
    other = given | {"clip_text": Embedding(e.tokens, e.mask, -e.pooled)}
    assert not torch.allclose(run(unet, x, given), run(unet, x, other), atol=1e-4)
    projected = unet.project(given)
    assert not torch.allclose(unet(x, torch.tensor([-1.0]), projected), unet(x, torch.tensor([0.5]), projected), atol=1e-4)


def test_memory_format_does_not_matter(unet: UNet) -> None:
    x = torch.randn(2, 3, 16, 16)
    expected = run(unet, x, embeddings(2))
    torch.testing.assert_close(run(unet, x.contiguous(memory_format=torch.channels_last), embeddings(2)), expected, atol=1e-5, rtol=1e-4)


def test_bfloat16_autocast_stays_close(unet: UNet) -> None:
    x = torch.randn(2, 3, 16, 16)
    expected = run(unet, x, embeddings(2))
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(unet, x, embeddings(2)).float()
    assert float((actual - expected).norm() / expected.norm()) < 0.03


def test_gradients_reach_every_parameter(unet: UNet) -> None:
    unet.zero_grad()
    unet(torch.randn(2, 3, 16, 16), torch.zeros(2), unet.project(embeddings(2))).square().mean().backward()
    missing = [name for name, parameter in unet.named_parameters() if parameter.grad is None or not parameter.grad.abs().sum() > 0]
    assert not missing


def test_wrong_encoders_are_refused(unet: UNet) -> None:
    with pytest.raises(ValueError, match="trained with"):
        unet.project({"t5": embeddings(1)["t5"]})


@pytest.mark.parametrize(("config", "millions"), [("emoji/base64.yaml", (8.0, 9.2)), ("ediffi/base64.yaml", (690, 1100))])
def test_sizes_of_shipped_networks(config: str, millions: tuple[float, float], pytestconfig: pytest.Config) -> None:
    stage = load_config(pytestconfig.rootpath / "configs" / config).stage
    with torch.device("meta"):
        network = UNet(
            stage.network.resolutions,
            {name: (e.width, e.pooled_width) for name, e in stage.encoders.items()},
            embedding_channels=stage.network.embedding_channels,
            context_channels=stage.network.context_channels,
            head_channels=stage.network.head_channels,
        )
    assert millions[0] < sum(p.numel() for p in network.parameters()) / 1e6 < millions[1]
