"""What metrics see instead of pictures: features of a frozen network, by name, with a record of how they were made.

A number is comparable with another only if network, weights, resizing and scaling are the same, so every extractor says all of that in
its `record`. Plugins add extractors of the kind `features` to the registry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from t2i_experts.conditioning.clip import CLIPImageEncoder, Towers
from t2i_experts.conditioning.frozen import fingerprint, freeze, frozen_forward
from t2i_experts.config import EncoderConfig
from t2i_experts.evaluation import inception, squeezenet
from t2i_experts.evaluation.inception import InceptionFID
from t2i_experts.evaluation.resize import resize_bilinear, resize_clean, resize_tf1
from t2i_experts.evaluation.squeezenet import SqueezeNet
from t2i_experts.evaluation.weights import load_weights
from t2i_experts.registry import registry

PUBLIC_INCEPTION = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"


@dataclass(frozen=True)
class FeatureOptions:
    """What the user chose; None leaves the choice to the extractor, which raises ValueError for an option that it does not have.

    protocol: how pixels are resized and scaled, by name. resize: another filter than the protocol's. weights: where the weights are, or
    the tag of public ones. model: which network, where an extractor has several.
    """

    protocol: str | None = None
    resize: str | None = None
    weights: str | None = None
    model: str | None = None

    def only(self, features: str, *allowed: str) -> None:
        """Raises ValueError for an option that was given but is not allowed."""
        for name in ("protocol", "resize", "weights", "model"):
            value = getattr(self, name)
            if value is not None and name not in allowed:
                has = f"it has {', '.join(f'--{option}' for option in allowed)}" if allowed else "it has no options"
                raise ValueError(f"--{name}={value!r} does not apply to --features {features}; {has}")


class FeatureExtractor(Protocol):
    """A frozen network on its device.

    dimension: of a feature. record: what makes the features what they are, as JSON's plain values: the weights' sha256 among them, and
    `name`, what a Frechet distance of these features is called.
    """

    dimension: int
    record: Mapping[str, Any]

    def prepare(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8, RGB, on any device, to what `encode` takes, of one shape whatever H and W are, on the same device."""
        ...

    def encode(self, prepared: Tensor) -> Tensor:
        """What `prepare` gave for B images to (B, dimension) float32 on the network's device."""
        ...


def load_features(name: str, options: FeatureOptions, device: torch.device | str) -> FeatureExtractor:
    """The extractor of that name: `load(options, device)` of the registry's part. Raises ValueError for what the user got wrong."""
    extractor: FeatureExtractor = registry.get("features", name).load(options, torch.device(device))
    return extractor


class InceptionFeatures:
    """The 2048 features of FID. Protocols: `pytorch-fid`, the most cited; `tf1`, that of the original code and of torch-fidelity.

    With `resize="clean"`, tf1's scaling follows clean-fid's filter.
    """

    dimension = 2048

    def __init__(self, network: InceptionFID, record: Mapping[str, Any], prepare: Callable[[Tensor], Tensor]) -> None:
        self.network = network
        self.record = record
        self._prepare = prepare

    @classmethod
    def load(cls, options: FeatureOptions, device: torch.device) -> InceptionFeatures:
        """Reads `options.weights`, or downloads the public weights. Raises ValueError for wrong options or weights."""
        options.only("inception", "protocol", "resize", "weights")
        if options.resize not in (None, "clean"):
            raise ValueError(f"--resize={options.resize!r} is unknown; allowed: clean, or none for the protocol's own")
        protocol = options.protocol or ("tf1" if options.resize else "pytorch-fid")
        if protocol not in _PROTOCOLS:
            raise ValueError(f"--protocol={protocol!r} is unknown; allowed: {', '.join(_PROTOCOLS)}")
        if options.resize and protocol != "tf1":
            raise ValueError(f"--resize clean does not go with --protocol {protocol}: clean-fid's numbers have the scaling of tf1")
        weights = load_weights(options.weights or PUBLIC_INCEPTION)
        network = InceptionFID()
        weights.into(network, "FID's Inception network")
        record = {
            "name": "clean-FID" if options.resize else "FID",
            "features": "inception",
            "dimension": cls.dimension,
            "protocol": protocol,
            "resize": options.resize or _RESIZES[protocol],
            "size": inception.SIZE,
            "weights": weights.source,
            "sha256": weights.sha256,
        }
        return cls(freeze(network, device, torch.float32), record, _clean_tf1 if options.resize else _PROTOCOLS[protocol])

    def prepare(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 to (B, 3, 299, 299) float32."""
        return self._prepare(checked(images).float())

    def encode(self, prepared: Tensor) -> Tensor:
        """(B, 3, 299, 299) to (B, 2048)."""
        return _encoded(self.network, prepared)


def _pytorch_fid(images: Tensor) -> Tensor:
    return 2 * resize_bilinear(images / 255, inception.SIZE) - 1


def _tf1(images: Tensor) -> Tensor:
    return (resize_tf1(images, inception.SIZE) - 128) / 128


def _clean_tf1(images: Tensor) -> Tensor:
    return (resize_clean(images, inception.SIZE) - 128) / 128


_PROTOCOLS: dict[str, Callable[[Tensor], Tensor]] = {"pytorch-fid": _pytorch_fid, "tf1": _tf1}
_RESIZES = {"pytorch-fid": "bilinear between centres", "tf1": "bilinear between corners"}


class SqueezeNetFeatures:
    """The 512 features of SqueezeNet 1.0 from a local file; see `squeezenet.py` for what they are good for."""

    dimension = 512

    def __init__(self, network: SqueezeNet, record: Mapping[str, Any]) -> None:
        self.network = network
        self.record = record

    @classmethod
    def load(cls, options: FeatureOptions, device: torch.device) -> SqueezeNetFeatures:
        """Reads `options.weights`. Raises ValueError if there are none, and for wrong ones."""
        options.only("squeezenet", "weights")
        if options.weights is None:
            raise ValueError("--features squeezenet needs --weights FILE, such as an .npz of SqueezeNet 1.0 with Caffe's preprocessing")
        weights = load_weights(options.weights)
        network = SqueezeNet()
        weights.into(network, "SqueezeNet 1.0")
        record = {
            "name": "SqueezeNet-FD",
            "features": "squeezenet",
            "dimension": cls.dimension,
            "resize": "clean",
            "size": squeezenet.SIZE,
            "weights": weights.source,
            "sha256": weights.sha256,
        }
        return cls(freeze(network, device, torch.float32), record)

    def prepare(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 to (B, 3, 227, 227) float32, BGR minus Caffe's means."""
        resized = resize_clean(checked(images).float(), squeezenet.SIZE)
        return resized.flip(1) - resized.new_tensor([104.0, 117.0, 123.0]).view(3, 1, 1)

    def encode(self, prepared: Tensor) -> Tensor:
        """(B, 3, 227, 227) to (B, 512)."""
        return _encoded(self.network, prepared)


def open_towers(model: str, weights: str | None) -> Towers:
    """Both towers of an open_clip network, on the CPU: an architecture with `weights`, the tag of public ones or a file; or a local
    open_clip folder, an `hf-hub:` id or `embedded:clip`, which bring theirs. Raises ValueError if it is not to be had.
    """
    try:
        return Towers.load(EncoderConfig("clip_image", model, weights), None, None)
    except ValueError as error:
        said = str(error).replace("`pretrained`", "`weights`").replace("pretrained=", "weights=")  # a config's word for the same
        raise ValueError(f"model={model!r} with weights={weights!r}: {said}") from error


class OpenCLIPFeatures:
    """The image embedding of a CLIP, not normalised, as CLIP-FID has it (Kynkaanniemi et al., arXiv 2203.06026).

    `options.model` and `options.weights` name the network as in `open_towers`.
    """

    def __init__(self, towers: Towers, options: FeatureOptions, device: torch.device | str) -> None:
        self.encoder = encoder = CLIPImageEncoder(towers)
        freeze(encoder.model, device, torch.float32)
        self.dimension = encoder.width
        self.record = {
            "name": "CLIP-FID",
            "features": "open_clip",
            "dimension": encoder.width,
            "model": options.model,
            "resize": encoder.resizing,
            "size": encoder.size,
            "weights": options.weights,
            "sha256": fingerprint(encoder.model),
        }

    @classmethod
    def load(cls, options: FeatureOptions, device: torch.device) -> OpenCLIPFeatures:
        """Loads `options.model`. Raises ValueError if it is not given or not to be had."""
        options.only("open_clip", "model", "weights")
        if options.model is None:
            raise ValueError(
                "--features open_clip needs --model: embedded:clip, a folder, hf-hub:ID, or an architecture with --weights TAG"
            )
        return cls(open_towers(options.model, options.weights), options, device)

    def prepare(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 to the tower's normalised (B, 3, size, size) float32."""
        return self.encoder.preprocess(checked(images) / 127.5 - 1)

    def encode(self, prepared: Tensor) -> Tensor:
        """What `prepare` gave to (B, dimension)."""
        return _encoded(self.encoder.model, prepared)


def checked(images: Tensor) -> Tensor:
    """The images themselves. Raises ValueError for what is not (B, 3, H, W) uint8."""
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        raise ValueError(f"images of shape {tuple(images.shape)}, {images.dtype} must be (B, 3, H, W), uint8")
    return images


def _encoded(network: nn.Module, prepared: Tensor) -> Tensor:
    device = next(network.parameters()).device
    with frozen_forward(device), exact_convolutions():
        features: Tensor = network(prepared.to(device))
    return features.float()


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Float32 that is float32: TF32, cuDNN's default, would move features by 1e-3."""
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        yield
