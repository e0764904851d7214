"""The U-Net: shapes, conditioning, and what must not matter."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._functorch._aot_autograd.autograd_cache import check_cacheable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from t2i_experts.config import ResolutionSpec, load_config
from t2i_experts.diffusion.precond import EDMPrecond
from t2i_experts.nn import unet as unet_module
from t2i_experts.nn.unet import UNet
from t2i_experts.types import Conditioning, Embedding

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
    null = Conditioning({name: Embedding.null(1, 4, *ENCODERS[name])})
    other = given | Conditioning.cat([null, Conditioning({name: given[name]}).rows(1, 2)]).embeddings
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


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_noise_too_low_for_bfloat16_is_seen(unet: UNet, weights: torch.dtype) -> None:
    """Two inputs that bfloat16 cannot tell apart: at low sigma the noise is what they differ in."""
    x = torch.full((1, 3, 16, 16), 1.5) + 2e-3
    y = x + 1e-3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    assert torch.equal(x.bfloat16(), y.bfloat16())
    network = copy.deepcopy(unet).to(weights)
    with torch.no_grad():
        nn.init.normal_(network.conv_in.weight, std=2.0)
        network.conv_in.weight -= network.conv_in.weight.mean((1, 2, 3), keepdim=True)  # what remains after rounding is the difference
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        first, second = run(network, x, embeddings(1)), run(network, y, embeddings(1))
    assert first.dtype == torch.bfloat16
    assert not torch.equal(first, second)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_compiles_as_one_graph_under_autocast(patch_size: int) -> None:
    torch.manual_seed(0)
    specs = [ResolutionSpec(8, 1), ResolutionSpec(8, 1, True, True)]
    network = UNet(specs, ENCODERS, patch_size=patch_size, embedding_channels=8, context_channels=8, head_channels=8)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    denoiser = EDMPrecond(network)
    compiled = torch.compile(denoiser, backend="aot_eager", fullgraph=True)
    x, sigma, conditioning = torch.randn(2, 3, 8, 8), torch.tensor([0.002, 3.0]), Conditioning(embeddings(2))
    # With gradients once: their graph takes four times as long to trace, and patches only fold what goes in and comes out.
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(patch_size == 1):
        torch.testing.assert_close(compiled(x, sigma, conditioning), denoiser(x, sigma, conditioning), atol=2e-2, rtol=2e-2)


def test_its_compiled_graph_can_be_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch keeps no graph with a context manager or an autograd function of ours in it, and traces for half a minute at every start."""
    monkeypatch.setattr(unet_module, "fastest_kernels", lambda device: sdpa_kernel(SDPBackend.MATH))
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    denoiser = EDMPrecond(checkpointed(0))
    denoiser.compile(backend=backend, fullgraph=True)
    loss_and_gradients(denoiser)
    (graph,) = graphs
    check_cacheable(graph)


def test_channels_in_and_out_are_the_callers() -> None:
    network = UNet([ResolutionSpec(8, 1)], ENCODERS, in_channels=7, out_channels=4, embedding_channels=8, context_channels=8)
    assert run(network, torch.randn(2, 7, 8, 8), embeddings(2)).shape == (2, 4, 8, 8)


def test_patches_fold_space_into_channels() -> None:
    """A network with patches is one without them on folded images: the same weights, the folding outside."""
    specs = [ResolutionSpec(8, 1), ResolutionSpec(8, 1, False, True)]
    arguments = {"embedding_channels": 8, "context_channels": 8, "head_channels": 8}
    patched = UNet(specs, ENCODERS, patch_size=2, **arguments)
    plain = UNet(specs, ENCODERS, in_channels=12, out_channels=12, **arguments)
    for parameter in patched.parameters():
        nn.init.normal_(parameter, std=0.1)
    plain.load_state_dict(patched.state_dict())
    x = torch.randn(2, 3, 16, 8)
    expected = F.pixel_shuffle(run(plain, F.pixel_unshuffle(x, 2), embeddings(2)), 2)
    out = run(patched, x, embeddings(2))
    assert out.shape == x.shape
    torch.testing.assert_close(out, expected)
    sides: list[int] = []
    patched.down[0].register_forward_pre_hook(lambda module, given: sides.append(given[0].shape[2]))
    run(patched, x, embeddings(2))
    assert sides == [4], "the first resolution has half the image's side"


def test_without_patches_nothing_is_folded(unet: UNet) -> None:
    assert unet.conv_in.weight.shape == (16, 3, 3, 3)
    assert unet.conv_out.weight.shape == (3, 16, 3, 3)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(unet._first_convolution(x, torch.float32), unet.conv_in(x.permute(0, 2, 3, 1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_first_convolution_sees_its_input_unrounded(unet: UNet, dtype: torch.dtype) -> None:
    """A kernel that takes the difference of neighbours sees noise of 0.4 % on a grey image, which rounding the image would hide."""
    first = copy.deepcopy(unet)
    nn.init.zeros_(first.conv_in.weight)
    nn.init.zeros_(first.conv_in.bias)
    first.conv_in.weight.data[0, 0, 1] = torch.tensor([-1.0, 1.0, 0.0])
    x = 1 + 0.004 * torch.randn(2, 3, 16, 16)
    seen = first._first_convolution(x, dtype)[:, :, 1:, 0].float()
    torch.testing.assert_close(seen, x[:, 0].diff(dim=-1), atol=2e-5, rtol=0.01)


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


SPECS = [ResolutionSpec(16, 1), ResolutionSpec(24, 1, False, True), ResolutionSpec(32, 1, True, True)]


def checkpointed(resolutions: int, dropout: float = 0.0, specs: list[ResolutionSpec] = SPECS) -> UNet:
    """Always the same weights."""
    torch.manual_seed(0)
    network = UNet(
        specs,
        ENCODERS,
        embedding_channels=16,
        context_channels=12,
        head_channels=8,
        dropout=dropout,
        checkpointed_resolutions=resolutions,
    )
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network


def loss_and_gradients(network: nn.Module) -> list[torch.Tensor]:
    torch.manual_seed(1)
    x, sigma = torch.randn(2, 3, 16, 16), torch.tensor([0.1, 2.0])
    loss = network(x, sigma, Conditioning(embeddings(2))).square().mean()
    loss.backward()
    gradients = [parameter.grad for parameter in network.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return [loss.detach(), *(gradient.clone() for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_no_bit(dropout: float) -> None:
    expected = loss_and_gradients(EDMPrecond(checkpointed(0, dropout)))
    for resolutions in (1, 2, 3):
        actual = loss_and_gradients(EDMPrecond(checkpointed(resolutions, dropout)))
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)), resolutions


def test_checkpointing_remembers_less_and_most_of_it_at_the_finest_resolution() -> None:
    def remembered(resolutions: int) -> int:
        """Bytes of the tensors that a forward pass saves for the backward pass, each once."""
        network, saved = EDMPrecond(checkpointed(resolutions, dropout=0.1)), {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address comes twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            network(torch.randn(2, 3, 32, 32), torch.ones(2), Conditioning(embeddings(2)))
        return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())

    none, one, two, three = (remembered(resolutions) for resolutions in range(4))
    assert none > one > two > three
    assert none - one > one - two > two - three
    assert three < 0.4 * none


def test_checkpointing_under_data_parallelism() -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(EDMPrecond(checkpointed(3, 0.3)), gradient_as_bucket_view=True)
        actual = loss_and_gradients(parallel)
    finally:
        torch.distributed.destroy_process_group()
    expected = loss_and_gradients(EDMPrecond(checkpointed(0, 0.3)))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_checkpointing_compiles_as_one_graph() -> None:
    specs = [ResolutionSpec(8, 1, False, True)]
    expected = loss_and_gradients(EDMPrecond(checkpointed(0, 0.3, specs)))
    network = EDMPrecond(checkpointed(1, 0.3, specs))
    network.compile(backend="aot_eager", fullgraph=True)
    for a, b in zip(loss_and_gradients(network), expected, strict=True):
        torch.testing.assert_close(a, b)
