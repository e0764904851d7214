"""The judge: a convolutional detector that says what a picture of an emoji scene shows, apart from all that draws or conditions pictures.

"Objects as Points" (Zhou et al., arXiv 1904.07850): in each cell of a grid, how likely it holds the centre of an object, and that object's
box, name, style and colour; beside it, the background. Plain residual convolutions, dilated so that a cell sees the whole picture: no
attention, no U-Net, no text. `scripts/train_judge.py` trains it on scenes of another seed than a generator's.

A judge's folder holds judge.json (its words, its size, how certain it must be of an object, its accuracy on real scenes) and
judge.safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d

from t2i_experts.conditioning.frozen import EMBEDDED, freeze, local_folder

SIZE = 64
"""Side in pixels of the pictures that a judge sees; others are resized."""
CELL = 4
"""Side of a cell in pixels."""
GRID = SIZE // CELL
MOST_OBJECTS = 10
NAMES = 5
CONFIG, WEIGHTS = "judge.json", "judge.safetensors"

_DILATIONS = (1, 2, 4)
_UNIT = 16.0  # pixels: boxes' sides are logarithms in this unit, so that they lie around zero
_SAME = 0.5  # of two objects with a larger intersection over union, the less certain one is none
_BATCH = 256


@dataclass(frozen=True)
class JudgeConfig:
    """A judge's words and size. An object may also have no single colour, a class of its own after `colours`.

    threshold: how certain a judge must be of an object, from 0 to 1.
    """

    objects: tuple[str, ...]
    styles: tuple[str, ...]
    colours: tuple[str, ...]
    backgrounds: tuple[str, ...]
    background_kinds: tuple[str, ...] = ("plain", "vertical", "radial")
    channels: int = 128
    blocks: int = 6
    threshold: float = 0.3


@dataclass(frozen=True)
class Cells:
    """What the network says: logits, except for `boxes`.

    objects: (B, G, G), whether the centre of an object lies in the cell. boxes: (B, G, G, 4), see `encode_boxes`. names: (B, G, G, N).
    styles: (B, G, G, S). colours: (B, G, G, C + 1). kinds: (B, K), of the background; ends: (B, 2, W), its two colours.
    """

    objects: Tensor
    boxes: Tensor
    names: Tensor
    styles: Tensor
    colours: Tensor
    kinds: Tensor
    ends: Tensor


class _Block(nn.Module):
    """x + two 3x3 convolutions, the first of them dilated."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.first = _convolution(channels, channels, dilation=dilation)
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.second(self.first(x)))


class JudgeNetwork(nn.Module):
    """(B, 3, 64, 64) float in [-1, 1] -> `Cells`."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        channels = config.channels
        self.parts = (1, 4, len(config.objects), len(config.styles), len(config.colours) + 1)
        self.background_parts = (len(config.background_kinds), len(config.backgrounds))
        self.stem = nn.Sequential(_convolution(3, channels // 2, stride=2), _convolution(channels // 2, channels, stride=2))
        self.body = nn.Sequential(*(_Block(channels, _DILATIONS[i % len(_DILATIONS)]) for i in range(config.blocks)))
        heads = nn.Conv2d(2 * channels, sum(self.parts), 1)
        assert heads.bias is not None
        nn.init.constant_(heads.bias[:1], -2.2)  # few cells hold a centre: begin with a tenth (arXiv 1708.02002)
        self.cell = nn.Sequential(nn.Conv2d(channels, 2 * channels, 1), nn.ReLU(), heads)
        kinds, colours = self.background_parts
        self.background = nn.Sequential(nn.AvgPool2d(GRID // 4), nn.Flatten(), nn.Linear(16 * channels, kinds + 2 * colours))

    def forward(self, x: Tensor) -> Cells:
        x = self.body(self.stem(x))
        objects, boxes, names, styles, colours = self.cell(x).permute(0, 2, 3, 1).split(self.parts, dim=-1)
        kinds, colours_behind = self.background_parts
        behind = self.background(x)
        return Cells(
            objects.squeeze(-1), boxes, names, styles, colours, behind[:, :kinds], behind[:, kinds:].view(len(x), 2, colours_behind)
        )


def _convolution(inputs: int, outputs: int, *, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


def encode_boxes(boxes: Tensor, cells: Tensor) -> Tensor:
    """boxes: (..., 4) pixels x0, y0, x1, y1; cells: (..., 2) row and column of the cell that speaks of each -> (..., 4).

    That is the centre, in cells from the middle of the cell, x first, and the logarithms of width and height in units of 16 px.
    """
    centre = (boxes[..., :2] + boxes[..., 2:]) / (2 * CELL) - (cells.flip(-1) + 0.5)
    return torch.cat([centre, ((boxes[..., 2:] - boxes[..., :2]).clamp_min(1) / _UNIT).log()], dim=-1)


def decode_boxes(encoded: Tensor, cells: Tensor) -> Tensor:
    """The inverse of `encode_boxes`."""
    centre = (encoded[..., :2] + cells.flip(-1) + 0.5) * CELL
    half = encoded[..., 2:].clamp(-4, 4).exp() * _UNIT / 2
    return torch.cat([centre - half, centre + half], dim=-1)


@dataclass(frozen=True)
class Found:
    """An object that the judge finds. names: the five likeliest, best first; colour: None if it is not one colour.

    box: x0, y0, x1, y1 in units of the picture's side. certainty: that there is an object, from 0 to 1. styles: the likelihood of each.
    """

    names: tuple[str, ...]
    colour: str | None
    box: tuple[float, float, float, float]
    certainty: float
    styles: tuple[float, ...]

    @property
    def name(self) -> str:
        """The likeliest name."""
        return self.names[0]


@dataclass(frozen=True)
class Reading:
    """What the judge sees in a picture. objects: the most certain one first. style: of all of them; None if there is none.

    background: its kind and colours, ("plain", "blue") or ("vertical", "blue", "pink").
    """

    objects: tuple[Found, ...]
    style: str | None
    background: tuple[str, ...]

    def called(self, name: str) -> tuple[Found, ...]:
        """The objects of a name."""
        return tuple(found for found in self.objects if found.name == name)


@dataclass(frozen=True)
class Judge:
    """A trained network with its words. accuracy: what `scripts/train_judge.py` measured on real scenes. fingerprint: of its two files.

    scenes: the dataset hashes of the shards that it was trained on.
    """

    config: JudgeConfig
    network: JudgeNetwork
    accuracy: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    scenes: frozenset[str] = frozenset()

    def check_independent(self, provenance: Mapping[str, Any]) -> None:
        """Raises ValueError if a model's provenance, or an expert's in it, names shards of this judge's own training, which the model may
        repeat."""
        hashes = {one.get("dataset_hash") for one in (provenance, *provenance.get("experts", {}).values())}
        if shared := sorted(hashes & set(self.scenes)):
            raise ValueError(
                f"judge: it was trained on the very scenes that the model was trained on (dataset hash {shared[0]}); "
                "train it on scenes of another seed, as scripts/judge.sh does"
            )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[Reading]:
        """What each picture shows; images: (B, 3, H, W) uint8 of any size."""
        return [reading for batch in images.split(_BATCH) for reading in self._read(batch)]

    def _read(self, images: Tensor) -> list[Reading]:
        device = next(self.network.parameters()).device
        cells = self.network(prepare(images.to(device)))
        certainty = cells.objects.float().sigmoid()
        peaks = certainty * (certainty == max_pool2d(certainty[:, None], 3, stride=1, padding=1)[:, 0])
        best, places = peaks.flatten(1).topk(MOST_OBJECTS, dim=1)  # (B, M)
        rows = torch.arange(len(images), device=device)[:, None]

        def at(values: Tensor) -> Tensor:
            return values.flatten(1, 2)[rows, places].float()

        boxes = decode_boxes(at(cells.boxes), torch.stack([places // GRID, places % GRID], dim=-1)) / SIZE
        names, colours = at(cells.names).topk(min(NAMES, len(self.config.objects)), dim=-1).indices, at(cells.colours).argmax(dim=-1)
        found = [best, boxes, names, colours, at(cells.styles).softmax(dim=-1)]
        behind = [cells.kinds.argmax(dim=-1), cells.ends.argmax(dim=-1)]
        return [self._reading(*one) for one in zip(*(values.tolist() for values in found + behind), strict=True)]

    def _reading(
        self,
        certainties: list[float],
        boxes: list[Any],
        names: list[list[int]],
        colours: list[int],
        styles: list[list[float]],
        kind: int,
        ends: list[int],
    ) -> Reading:
        """The words for the numbers of one picture."""
        words = self.config
        objects: list[Found] = []
        for certainty, box, name, colour, style in zip(certainties, boxes, names, colours, styles, strict=True):
            if certainty >= words.threshold and all(overlap(box, other.box) <= _SAME for other in objects):
                called = tuple(words.objects[i] for i in name)
                objects.append(Found(called, (*words.colours, None)[colour], tuple(box), certainty, tuple(style)))
        totals = [sum(found.styles[i] for found in objects) for i in range(len(words.styles))]
        background = (words.background_kinds[kind], *(words.backgrounds[end] for end in ends))
        return Reading(
            tuple(objects),
            words.styles[totals.index(max(totals))] if objects else None,
            background[:2] if background[0] == "plain" else background,
        )


def prepare(images: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 -> (B, 3, 64, 64) float in [-1, 1]."""
    x = images.float() / 127.5 - 1
    if x.shape[-2:] != (SIZE, SIZE):
        x = interpolate(x, (SIZE, SIZE), mode="bicubic", antialias=True).clamp(-1, 1)
    return x


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes x0, y0, x1, y1."""
    width, height = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return width * height / max(areas - width * height, 1e-9)


def save_judge(judge: Judge, folder: Path, dtype: torch.dtype = torch.bfloat16, training: Mapping[str, Any] | None = None) -> None:
    """Writes the judge's folder; weights in `dtype`. training: how it was trained, of which `shards` holds hashes by folder."""
    folder.mkdir(parents=True, exist_ok=True)
    state = judge.network.state_dict()
    save_file(
        {
            name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
            for name, tensor in state.items()
        },
        folder / WEIGHTS,
    )
    facts = {"config": asdict(judge.config), "accuracy": judge.accuracy, "training": training or {}}
    (folder / CONFIG).write_text(json.dumps(facts, ensure_ascii=False) + "\n", encoding="utf-8")


def load_judge(name: str, device: torch.device | str = "cpu") -> Judge:
    """A judge's folder, or `embedded:judge` for one that ships with this package; in float32.

    Raises ValueError if there is none, or it is not whole.
    """
    folder: Path | None = None
    with suppress(ValueError):  # which would tell of encoders
        folder = local_folder(name, None)
    if folder is None or not (folder / CONFIG).is_file():
        missing = "does not ship with this package" if name.startswith(EMBEDDED) else f"is no folder with {CONFIG}"
        raise ValueError(f"judge={name!r} {missing}; allowed: a folder that scripts/judge.sh has made")
    try:
        facts = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        known = {one.name for one in fields(JudgeConfig)}
        words: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in facts["config"].items() if key in known}
        config = JudgeConfig(**words)
        network = JudgeNetwork(config)
        state = load_file(folder / WEIGHTS)
        network.load_state_dict({key: value.float() if value.is_floating_point() else value for key, value in state.items()})
    except (OSError, KeyError, TypeError, json.JSONDecodeError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"judge={name!r}: {folder} is not whole: {error}") from error
    fingerprint = sha256((folder / CONFIG).read_bytes() + (folder / WEIGHTS).read_bytes()).hexdigest()[:16]
    scenes = frozenset(facts.get("training", {}).get("shards", {}).values())
    return Judge(config, freeze(network, device, torch.float32), facts.get("accuracy", {}), fingerprint, scenes)
