"""Features are those of the packages that people publish numbers with, at every size; and wrong weights are told in one line."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_fid.inception
import torch
from cleanfid.resize import build_resizer
from safetensors.torch import save_file
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from t2i_experts.evaluation.features import FeatureExtractor, FeatureOptions, load_features
from t2i_experts.evaluation.frechet import gaussian_distance
from t2i_experts.evaluation.resize import resize_clean
from t2i_experts.evaluation.squeezenet import SqueezeNet
from t2i_experts.evaluation.statistics import FeatureStatistics, Gaussian

SIZES = [(64, 64), (256, 256), (299, 299), (512, 400)]


def pictures(height: int, width: int, count: int = 2) -> Tensor:
    """Smooth, with sharp edges and noise on them."""
    generator = torch.Generator().manual_seed(height)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    edges = torch.nn.functional.interpolate((coarse > 0.6).float(), (height, width))
    noise = torch.rand(count, 3, height, width, generator=generator)
    return (255 * (0.6 * smooth + 0.3 * edges + 0.2 * noise - 0.05)).clamp(0, 255).to(torch.uint8)


def gaussian(features: list[Tensor]) -> Gaussian:
    statistics = FeatureStatistics(features[0].shape[1])
    for batch in features:
        statistics.add(batch)
    return statistics.gaussian()


def as_pytorch_fid(weights: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Tensor], Tensor]:
    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: torch.load(weights))
    network = pytorch_fid.inception.InceptionV3().eval()
    return lambda images: network(images / 255)[0].flatten(1)


def as_torch_fidelity(weights: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Tensor], Tensor]:
    network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(weights))
    return lambda images: network(images)[0]


def as_clean_fid(weights: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Tensor], Tensor]:
    """Its own resizing and scaling, and then the network, which it has as TorchScript only."""
    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: torch.load(weights))
    network, resize = pytorch_fid.inception.InceptionV3(resize_input=False, normalize_input=False).eval(), build_resizer("clean")

    def features(images: Tensor) -> Tensor:
        resized = np.stack([resize(image.permute(1, 2, 0).numpy()) for image in images])
        return network((torch.from_numpy(resized).permute(0, 3, 1, 2) - 128) / 128)[0].flatten(1)

    return features


@pytest.mark.parametrize(
    ("protocol", "resize", "reference"),
    [("pytorch-fid", None, as_pytorch_fid), ("tf1", None, as_torch_fidelity), (None, "clean", as_clean_fid)],
)
def test_features_and_distances_are_those_of_the_published_packages(
    inception_weights: Path, monkeypatch: pytest.MonkeyPatch, protocol: str | None, resize: str | None, reference: Any
) -> None:
    ours = load_features("inception", FeatureOptions(protocol, resize, str(inception_weights)), "cpu")
    theirs = reference(inception_weights, monkeypatch)
    sets: tuple[list[Tensor], list[Tensor]] = ([], [])
    for height, width in SIZES:
        images = pictures(height, width)
        found, expected = ours.encode(ours.prepare(images)), theirs(images)
        assert found.shape == (2, 2048) and found.dtype == torch.float32
        assert expected.std() > 0.1
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        sets[0].append(found)
        sets[1].append(expected)
    distances = [gaussian_distance(gaussian(features[:2]), gaussian(features[2:])) for features in sets]
    assert distances[0] == pytest.approx(distances[1], rel=1e-4)


def test_the_protocols_differ_where_pictures_are_resized() -> None:
    from t2i_experts.evaluation.features import _clean_tf1, _pytorch_fid, _tf1

    for size, alike in ((64, False), (299, True)):
        images = pictures(size, size).float()
        ways = [way(images) for way in (_pytorch_fid, _tf1, _clean_tf1)]
        assert all(way.shape == (2, 3, 299, 299) and way.abs().max() < 1.00001 for way in ways)
        assert bool((ways[0] - ways[1]).abs().max() < 0.01) == alike
        assert bool((ways[2] - ways[1]).abs().max() < 0.01) == alike


@pytest.mark.parametrize("size", SIZES)
def test_the_clean_filter_is_clean_fids_to_the_last_digits(size: tuple[int, int]) -> None:
    images = pictures(*size)
    expected = build_resizer("clean")(images[0].permute(1, 2, 0).numpy())
    torch.testing.assert_close(resize_clean(images.float(), 299)[0].permute(1, 2, 0), torch.from_numpy(expected), rtol=0, atol=1e-4)


def test_the_record_says_what_the_features_are(inception_weights: Path) -> None:
    record = load_features("inception", FeatureOptions(weights=str(inception_weights)), "cpu").record
    assert record == {
        "name": "FID",
        "features": "inception",
        "dimension": 2048,
        "protocol": "pytorch-fid",
        "resize": "bilinear between centres",
        "size": 299,
        "weights": str(inception_weights),
        "sha256": hashlib.sha256(inception_weights.read_bytes()).hexdigest(),
    }


def test_weights_of_every_format_are_read_and_other_networks_refused(inception_weights: Path, tmp_path: Path) -> None:
    """On SqueezeNet, which is small."""
    torch.manual_seed(0)
    tensors = SqueezeNet().state_dict()
    torch.save(tensors, tmp_path / "a.pth")
    save_file(tensors, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", **{name: value.numpy() for name, value in tensors.items()})  # type: ignore[arg-type]
    images = pictures(64, 80)
    found = [_features(load_features("squeezenet", FeatureOptions(weights=str(path)), "cpu"), images) for path in tmp_path.iterdir()]
    assert len(found) == 3 and found[0].shape == (2, 512) and found[0].std() > 0
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])

    def refused(name: str, weights: Path | str, said: str) -> None:
        with pytest.raises(ValueError, match=said) as caught:
            load_features(name, FeatureOptions(weights=str(weights)), "cpu")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500 and str(weights) in str(caught.value)

    refused("squeezenet", inception_weights, "are not those of SqueezeNet 1.0: of its 52 tensors, 52 missing .*, 566 unknown")
    refused("inception", tmp_path / "a.pth", "are not those of FID's Inception network: of its 566 tensors")
    torch.save({**tensors, "conv1.weight": torch.zeros(96, 3, 3, 3)}, tmp_path / "a.pth")
    refused("squeezenet", tmp_path / "a.pth", r"1 of another shape \(conv1.weight: \(96, 3, 3, 3\), not \(96, 3, 7, 7\)\)")
    torch.save([1, 2], tmp_path / "a.pth")
    refused("squeezenet", tmp_path / "a.pth", "no state dict")
    (tmp_path / "a.pth").write_bytes(pickle.dumps(Path("x")))
    refused("squeezenet", tmp_path / "a.pth", "no file of tensors alone")
    torch.save({"path": Path("x")}, tmp_path / "a.pth")
    refused("squeezenet", tmp_path / "a.pth", "no file of tensors alone")
    for name in ("a.safetensors", "a.npz"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:1000])
        refused("squeezenet", tmp_path / name, "cannot be read")
    refused("squeezenet", tmp_path / "b.pth", "no such file")
    refused("squeezenet", tmp_path, "is a folder; name the file")
    refused("squeezenet", "a.h5", "no such file")
    refused("squeezenet", "owner/repo/a.pth", "not to be had from the hub")
    refused("squeezenet", "http://127.0.0.1:9/a.pth", "cannot be downloaded")


def test_what_goes_in_is_checked_and_devices_do_not_matter(tmp_path: Path) -> None:
    torch.save(SqueezeNet().state_dict(), tmp_path / "a.pth")
    extractor = load_features("squeezenet", FeatureOptions(weights=str(tmp_path / "a.pth")), "cpu")
    for images in (pictures(8, 8).float(), pictures(8, 8)[0], pictures(8, 8)[:, :1]):
        with pytest.raises(ValueError, match=r"must be \(B, 3, H, W\), uint8"):
            extractor.prepare(images)
    prepared = extractor.prepare(torch.tensor([3, 5, 7], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 20, 30))
    torch.testing.assert_close(prepared[0, :, 9, 9], torch.tensor([7 - 104.0, 5 - 117.0, 3 - 123.0]))


def test_a_clips_image_tower(clip_folder: Path) -> None:
    extractor = load_features("open_clip", FeatureOptions(model=str(clip_folder)), "cpu")
    images = pictures(50, 40)
    found = _features(extractor, images)
    assert found.shape == (2, extractor.dimension) == (2, 12) and not torch.allclose(found.norm(dim=1), torch.ones(2))
    assert extractor.record["sha256"] and extractor.record["size"] == 32
    embedded = load_features("open_clip", FeatureOptions(model="embedded:clip"), "cpu")
    assert _features(embedded, images).shape == (2, embedded.dimension)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("incepton", FeatureOptions(), "unknown features 'incepton'; did you mean 'inception'?"),
        ("inception", FeatureOptions(protocol="tf2"), "--protocol='tf2' is unknown; allowed: pytorch-fid, tf1"),
        ("inception", FeatureOptions(resize="lanczos"), "--resize='lanczos' is unknown; allowed: clean"),
        ("inception", FeatureOptions(resize="clean", protocol="pytorch-fid"), "--resize clean does not go with --protocol pytorch-fid"),
        ("inception", FeatureOptions(model="x"), "--model='x' does not apply to --features inception; it has --protocol"),
        ("squeezenet", FeatureOptions(), "needs --weights"),
        ("squeezenet", FeatureOptions(resize="clean"), "does not apply to --features squeezenet; it has --weights"),
        ("open_clip", FeatureOptions(), "needs --model"),
        ("open_clip", FeatureOptions(model="embedded:clap"), "embedded:clap"),
    ],
)
def test_wrong_options_are_named(name: str, options: FeatureOptions, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_features(name, options, "cpu")
    assert said in str(caught.value)


def _features(extractor: FeatureExtractor, images: Tensor) -> Tensor:
    return extractor.encode(extractor.prepare(images))
