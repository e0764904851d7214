from __future__ import annotations

import pytest
import torch
from torch import Tensor

from t2i_experts.diffusion.guidance import ClassifierFreeGuidance
from t2i_experts.diffusion.thresholding import DynamicThresholding, dynamic_thresholding
from t2i_experts.types import Conditioning, Embedding

NULL = Conditioning({"text": Embedding(torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.bool))})


def by_quantile(denoised: Tensor, percentile: float) -> Tensor:
    """Imagen's definition, word for word, where torch.quantile can do it."""
    s = torch.stack([torch.quantile(image.abs().flatten(), percentile).clamp(min=1) for image in denoised])
    s = s.reshape(-1, *[1] * (denoised.ndim - 1))
    return torch.maximum(torch.minimum(denoised, s), -s) / s


@pytest.mark.parametrize("percentile", [0.001, 0.3, 0.5, 0.9, 0.995, 0.99999])
@pytest.mark.parametrize("shape", [(3, 3, 16, 16), (2, 1, 7, 5), (4, 2), (2, 1)])
def test_equals_the_definition_by_torch_quantile(shape: tuple[int, ...], percentile: float) -> None:
    denoised = 4 * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(dynamic_thresholding(denoised, percentile), by_quantile(denoised, percentile), rtol=1e-13, atol=0)
    single = denoised.float()
    torch.testing.assert_close(dynamic_thresholding(single, percentile), by_quantile(single, percentile), rtol=1e-4, atol=1e-6)


def test_images_within_range_are_untouched_and_others_end_in_range() -> None:
    inside = torch.rand(2, 3, 8, 8) * 2 - 1
    assert torch.equal(dynamic_thresholding(inside, 0.995), inside)
    spike = inside.clone()
    spike[0, 0, 0, 0] = 9.0  # above the percentile, which stays below 1: merely clipped
    assert torch.equal(dynamic_thresholding(spike, 0.9), spike.clamp(-1, 1))
    assert dynamic_thresholding(100 * torch.randn(2, 3, 8, 8), 0.9).abs().max() == 1


def test_each_image_has_its_own_threshold_in_any_memory_format() -> None:
    denoised = torch.randn(3, 3, 8, 8) * torch.tensor([0.5, 2.0, 50.0])[:, None, None, None]
    together = dynamic_thresholding(denoised, 0.97)
    assert torch.equal(together, torch.cat([dynamic_thresholding(image[None], 0.97) for image in denoised]))
    assert torch.equal(together, dynamic_thresholding(denoised.to(memory_format=torch.channels_last), 0.97))


def test_more_elements_than_older_versions_of_torch_quantile_take() -> None:
    n = 2**24 + 2**20
    ramp = torch.arange(n, dtype=torch.float32).div_(n - 1).mul_(4).reshape(1, 1, 2**12, -1)
    result = dynamic_thresholding(ramp, 0.995)
    assert result.max() == 1
    torch.testing.assert_close(result[0, 0, 2**11, 0].item(), ramp[0, 0, 2**11, 0].item() / (4 * 0.995), rtol=1e-6, atol=0)


def test_a_number_that_is_not_one_stays_visible() -> None:
    denoised = torch.zeros(2, 1, 4, 4)
    denoised[1, 0, 0, 0] = torch.nan
    result = dynamic_thresholding(denoised, 0.9)
    assert result[0].isfinite().all() and result[1].isnan().any()


def test_around_guidance_it_thresholds_the_guided_estimate_and_passes_preparation_on() -> None:
    class Model:
        def prepare(self, conditioning: Conditioning) -> Conditioning:
            return Conditioning(conditioning.embeddings, {"sum": conditioning.embeddings["text"].tokens.sum((1, 2))})

        def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
            return x + conditioning.projected["sum"][:, None, None, None]

    prompt = Conditioning({"text": Embedding(torch.ones(2, 1, 1), torch.ones(2, 1, dtype=torch.bool))})
    guided = ClassifierFreeGuidance(Model(), NULL, 3.0)
    thresholded = DynamicThresholding(guided, 0.9)
    x, sigma = torch.randn(2, 3, 4, 4), torch.tensor(1.0, dtype=torch.float64)
    prepared = thresholded.prepare(prompt)
    assert prepared.batch == 4
    assert torch.equal(thresholded(x, sigma, prepared), dynamic_thresholding(guided(x, sigma, prepared), 0.9))
    assert thresholded(x, sigma, prepared).abs().max() == 1


@pytest.mark.parametrize("percentile", [0.0, 1.0, 99.5, -0.1, float("nan")])
def test_bad_percentiles_are_refused(percentile: float) -> None:
    with pytest.raises(ValueError, match="percentile"):
        dynamic_thresholding(torch.zeros(1, 1), percentile)
    with pytest.raises(ValueError, match="percentile"):
        DynamicThresholding(lambda x, sigma, conditioning: x, percentile)
