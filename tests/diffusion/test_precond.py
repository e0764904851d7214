"""EDM preconditioning and loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from t2i_experts.diffusion.loss import EDMLoss
from t2i_experts.diffusion.precond import EDMPrecond
from t2i_experts.types import Conditioning, Embedding

NONE = Conditioning({"t5": Embedding(torch.zeros(4, 1, 2), torch.ones(4, 1, dtype=torch.bool))})


class Recorder(nn.Module):
    """A network that answers with a fixed output and remembers what it was given."""

    def __init__(self, output: Tensor | float = 0.0) -> None:
        super().__init__()
        self.output = output
        self.projections = 0

    def project(self, embeddings: object) -> dict[str, Tensor]:
        self.projections += 1
        return {"rows": torch.arange(4)}

    def forward(self, x: Tensor, c_noise: Tensor, projected: dict[str, Tensor]) -> Tensor:
        self.x, self.c_noise, self.projected = x, c_noise, projected
        return torch.zeros_like(x) + self.output


@pytest.mark.parametrize("sigma", [0.002, 0.5, 80.0])
def test_input_and_target_have_unit_variance(sigma: float) -> None:
    """The purpose of the coefficients (EDM appendix B.6), on Gaussian data of standard deviation sigma_data."""
    torch.manual_seed(0)
    y = 0.5 * torch.randn(4, 3, 128, 128, dtype=torch.float64)
    x = y + sigma * torch.randn_like(y)
    network = Recorder()
    skip = EDMPrecond(network)(x, torch.tensor(sigma, dtype=torch.float64), NONE)
    assert float(network.x.std()) == pytest.approx(1, abs=0.01)
    c_out = sigma * 0.5 / math.hypot(sigma, 0.5)
    assert float(((y - skip) / c_out).std()) == pytest.approx(1, abs=0.01)
    torch.testing.assert_close(network.c_noise, torch.full((4,), math.log(sigma) / 4), check_dtype=False)


def test_scalar_and_batched_sigma_agree() -> None:
    network, x = Recorder(torch.randn(4, 3, 8, 8)), torch.randn(4, 3, 8, 8)
    denoiser = EDMPrecond(network)
    one = denoiser(x, torch.tensor(1.7, dtype=torch.float64), NONE)
    assert one.dtype == torch.float32
    torch.testing.assert_close(denoiser(x, torch.full((4,), 1.7), NONE), one)


def test_no_noise_gives_the_image_back() -> None:
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(EDMPrecond(Recorder(1.0))(x, torch.tensor(1e-6), NONE), x, atol=1e-5, rtol=0)


def test_prepared_conditioning_is_not_projected_again() -> None:
    network, x = Recorder(), torch.randn(4, 3, 8, 8)
    denoiser = EDMPrecond(network)
    prepared = denoiser.prepare(denoiser.prepare(NONE))
    denoiser(x, torch.tensor(1.0), prepared)
    assert network.projections == 1
    assert network.projected["rows"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("sigma", [0.01, 0.5, 20.0])
def test_loss_of_an_untrained_network_is_one_at_every_noise_level(sigma: float) -> None:
    """F = 0 leaves a target of unit variance, and lambda cancels c_out^2, so every level starts with loss 1 (on data of sigma_data)."""
    torch.manual_seed(0)
    y = 0.5 * torch.randn(4, 3, 96, 96)
    losses = EDMLoss()(EDMPrecond(Recorder()), y, torch.full((4,), sigma), torch.randn_like(y), NONE)
    assert losses.shape == (4,)
    assert losses.tolist() == pytest.approx([1.0] * 4, abs=0.03)


def test_loss_is_zero_for_a_perfect_denoiser_and_per_image() -> None:
    y = torch.randn(4, 3, 8, 8)
    off = y.clone()
    off[2] += 0.1
    losses = EDMLoss()(lambda x, sigma, conditioning: off, y, torch.ones(4), torch.randn_like(y), NONE)
    assert losses[[0, 1, 3]].tolist() == [0, 0, 0]
    assert float(losses[2]) == pytest.approx(0.01 * 1.25 / 0.25, rel=1e-4)


class Choosy(nn.Module):
    """A network that is called in a context of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: list[torch.device] = []
        self.layer = nn.Conv2d(3, 3, 1)

    def project(self, embeddings: object) -> dict[str, Tensor]:
        return {"rows": torch.arange(4)}

    @contextmanager
    def kernels(self, device: torch.device) -> Iterator[None]:
        self.devices.append(device)
        with sdpa_kernel(SDPBackend.MATH):
            yield

    def forward(self, x: Tensor, c_noise: Tensor, projected: dict[str, Tensor]) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_networks_kernels_are_chosen_outside_of_what_is_compiled(compiled: bool) -> None:
    network, graphs, chosen = Choosy(), list[torch.fx.GraphModule](), list[bool]()
    network.layer.register_forward_hook(lambda *_: chosen.append(not torch.backends.cuda.flash_sdp_enabled()))

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)

        def run(*inputs: Tensor) -> object:
            chosen.append(not torch.backends.cuda.flash_sdp_enabled())
            return graph(*inputs)

        return run

    denoiser = EDMPrecond(network)
    if compiled:
        network.layer._forward_hooks.clear()
        denoiser.compile(backend=backend, fullgraph=True)
    enabled = torch.backends.cuda.flash_sdp_enabled()
    for _ in range(2):
        denoiser(torch.randn(4, 3, 2, 2), torch.ones(4), NONE)
    assert network.devices == [torch.device("cpu")] * 2
    assert chosen == [True] * 2, "the context is entered"
    assert torch.backends.cuda.flash_sdp_enabled() == enabled, "and left"
    assert len(graphs) == compiled
    assert not any("sdpa" in str(node.target) for graph in graphs for node in graph.graph.nodes)
