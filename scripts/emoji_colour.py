"""Colour of emoji art in OKLab (Ottosson 2020): which colour an object has, and the same object in another one.

Recolouring keeps the structure of lightness: black outlines and white highlights stay, shading stays shading. A mostly chromatic
object turns only the hues of its own dominant hue, so the leaf of a blue apple stays green; a grey or many-coloured one is tinted
as a whole. What comes out is measured, and a colour that would not clearly dominate is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]

_SRGB_TO_LINEAR = np.array([v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in np.arange(256) / 255], np.float32)
_LINEAR_TO_SRGB_STEPS = 4096
_LINEAR_TO_SRGB = np.array(
    [round(255 * (12.92 * v if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055)) for v in np.linspace(0, 1, _LINEAR_TO_SRGB_STEPS) ** 2],
    np.uint8,
)
_RGB_TO_LMS = np.array(
    [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566], [0.0883024619, 0.2817188376, 0.6299787005]],
    np.float32,
)
_LMS_TO_LAB = np.array(
    [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099], [0.0259040371, 0.7827717662, -0.8086757660]],
    np.float32,
)
_LMS_TO_RGB = np.linalg.inv(_RGB_TO_LMS.astype(np.float64)).astype(np.float32)
_LAB_TO_LMS = np.linalg.inv(_LMS_TO_LAB.astype(np.float64)).astype(np.float32)


@dataclass(frozen=True)
class Target:
    """A named object colour in OKLCh.

    lightness: in [0, 1]; chroma; hue: degrees. pull: how far the object's own lightness is drawn towards `lightness`, in [0, 1]:
    little for red, which is red when light or dark, much for brown, which is orange unless it is dark.
    """

    lightness: float
    chroma: float
    hue: float
    pull: float


COLOURS: Mapping[str, Target] = {
    "red": Target(0.58, 0.22, 27, 0.75),
    "orange": Target(0.73, 0.17, 57, 0.85),
    "yellow": Target(0.88, 0.175, 99, 0.92),
    "green": Target(0.65, 0.19, 143, 0.7),
    "light blue": Target(0.82, 0.10, 222, 0.9),
    "blue": Target(0.53, 0.20, 261, 0.75),
    "purple": Target(0.52, 0.21, 304, 0.75),
    "pink": Target(0.79, 0.15, 353, 0.85),
    "brown": Target(0.45, 0.085, 52, 0.9),
    "black": Target(0.25, 0.0, 0, 0.9),
    "white": Target(0.95, 0.0, 0, 0.9),
    "gray": Target(0.62, 0.0, 0, 0.85),
}
"""What a recoloured object may be called."""

_MAIN_HUE_DEGREES = (38.0, 62.0)  # hues this near the dominant one turn with it wholly; those beyond the second, not at all
_GREY_CHROMA = 0.035
_TURNED_SHARE = 0.6  # of the opaque pixels; below it the object is tinted as a whole
_NAMED_SHARE = 0.68  # of the opaque pixels; from here on an object's own colour is named
_NAMED_SHARE_ALONE = 0.45  # or from here on, if no other colour but black, gray and white has more than
_RIVAL_SHARE = 0.18
_NAMED_DISTANCE = 0.19  # OKLab; a pixel further from the colour than that, or further in hue, might be called something else
_NAMED_HUE = np.deg2rad(20)
_CONVINCING_SHARE = 0.40  # of the opaque pixels that are the colour by themselves: from here on a recolouring is kept,
_CONVINCING_FAMILY = 0.62  # if as many at least have its hue, light and dark ones included
_CONVINCING_GREY = 0.50  # the same for black, gray and white, which have no hue


@dataclass(frozen=True)
class Palette:
    """What recolouring needs to know of one picture, measured once on a small copy.

    hue: dominant, radians; turned: whether only hues near it turn; lightness, chroma: means of what turns, OKLCh.
    own: the name of the picture's own colour, or None if it has no single one. mean: (3,) OKLab mean of the opaque pixels.
    targets: the colours, by name, into which it can be turned convincingly.
    """

    hue: float
    turned: bool
    lightness: float
    chroma: float
    own: str | None
    mean: tuple[float, float, float]
    targets: tuple[str, ...] = ()


def oklab(rgb: NDArray[np.uint8]) -> Array:
    """rgb: (..., 3) uint8 sRGB -> (..., 3) float32: L in [0, 1], a, b."""
    return np.cbrt(_SRGB_TO_LINEAR[rgb] @ _RGB_TO_LMS.T) @ _LMS_TO_LAB.T


def srgb(lab: Array) -> NDArray[np.uint8]:
    """lab: (..., 3) OKLab -> (..., 3) uint8 sRGB; what lies outside the gamut is clipped."""
    linear = np.clip((lab @ _LAB_TO_LMS.T) ** 3 @ _LMS_TO_RGB.T, 0, 1)
    return _LINEAR_TO_SRGB[np.rint(np.sqrt(linear) * (_LINEAR_TO_SRGB_STEPS - 1)).astype(np.int32)]


def unpremultiply(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """rgba: (..., 4) premultiplied uint8 -> (..., 3) uint8 straight colour; black where alpha is 0."""
    alpha = np.maximum(rgba[..., 3:].astype(np.float32), 1)
    return np.minimum(rgba[..., :3] * (255 / alpha) + 0.5, 255).astype(np.uint8)


def recolour(rgba: NDArray[np.uint8], palette: Palette, colour: str) -> NDArray[np.uint8]:
    """The picture in `colour`, a key of COLOURS. rgba: (H, W, 4) premultiplied uint8; returns the same with the same alpha."""
    visible = rgba[..., 3] > 0
    pixels = rgba[visible]
    turned = _turn(oklab(unpremultiply(pixels)), palette, COLOURS[colour])
    alpha = pixels[:, 3:].astype(np.float32)
    out = np.zeros_like(rgba)
    out[visible] = np.concatenate([(srgb(turned) * (alpha / 255) + 0.5).astype(np.uint8), pixels[:, 3:]], axis=1)
    return out


def measure(rgba: NDArray[np.uint8]) -> Palette:
    """The palette of a small picture. rgba: (H, W, 4) premultiplied uint8."""
    pixels = rgba[rgba[..., 3] >= 200]
    if not len(pixels):  # nothing but thin strokes
        pixels = rgba[rgba[..., 3] > 0]
    lab = oklab(unpremultiply(pixels))
    chroma, hue = np.hypot(lab[:, 1], lab[:, 2]), np.arctan2(lab[:, 2], lab[:, 1])
    bins, _ = np.histogram(hue, bins=36, range=(-np.pi, np.pi), weights=chroma * (chroma > _GREY_CHROMA))
    peak = (int(np.argmax(bins + 0.7 * (np.roll(bins, 1) + np.roll(bins, -1)))) + 0.5) * 2 * np.pi / 36 - np.pi
    near = (np.abs(_wrap(hue - peak)) < np.deg2rad(30)) & (chroma > _GREY_CHROMA)
    dominant = float(np.arctan2(np.sum(lab[near, 2]), np.sum(lab[near, 1]))) if near.any() else 0.0
    weight = _main_weight(chroma, hue, dominant)
    turned = float(weight.mean()) >= _TURNED_SHARE
    if not turned:
        weight = np.ones_like(weight)
    called = _called(lab)
    own = max(COLOURS, key=lambda name: float(called[name].mean()))
    target = COLOURS[own]
    if target.chroma:
        alike = np.linalg.norm(lab - target_lab(own), axis=1) < _NAMED_DISTANCE
        alike &= (np.abs(_wrap(hue - np.deg2rad(target.hue))) < _NAMED_HUE) & (chroma > 0.6 * target.chroma)
    else:
        alike = chroma < 0.02
    sure = float((called[own] & alike).mean())
    rival = max(float(pixels.mean()) for name, pixels in called.items() if name != own and COLOURS[name].chroma > 0)
    named = sure >= _NAMED_SHARE or (bool(target.chroma) and sure >= _NAMED_SHARE_ALONE and rival <= _RIVAL_SHARE)
    lightness, chroma_mean = float(np.average(lab[:, 0], weights=weight)), float(np.average(chroma, weights=weight))
    mean = lab.mean(axis=0)
    palette = Palette(dominant, turned, lightness, chroma_mean, own if named else None, (float(mean[0]), float(mean[1]), float(mean[2])))
    targets = tuple(name for name in COLOURS if name != own and _convincing(lab, palette, name))
    return replace(palette, targets=targets)


def target_lab(colour: str) -> Array:
    """(3,) OKLab of a named colour."""
    target = COLOURS[colour]
    angle = np.deg2rad(target.hue)
    return np.array([target.lightness, target.chroma * np.cos(angle), target.chroma * np.sin(angle)], np.float32)


def _wrap(angle: Array) -> Array:
    return (angle + np.pi) % (2 * np.pi) - np.pi


def _main_weight(chroma: Array, hue: Array, dominant: float) -> Array:
    """How much each pixel belongs to the dominant hue, in [0, 1]."""
    near, far = _MAIN_HUE_DEGREES
    by_hue = np.clip((far - np.rad2deg(np.abs(_wrap(hue - dominant)))) / (far - near), 0, 1)
    return by_hue * np.clip((chroma - 0.015) / 0.03, 0, 1)


def _turn(lab: Array, palette: Palette, target: Target) -> Array:
    """lab: (N, 3) of the picture -> (N, 3) of the picture turned into the target."""
    lightness, a, b = lab[:, 0], lab[:, 1], lab[:, 2]
    chroma, hue = np.hypot(a, b), np.arctan2(b, a)
    # Lightness: a broken line through (0, 0), (the object's mean, its new mean) and (1, 1), no steeper than shading may look.
    centre = palette.lightness
    new_centre = centre + target.pull * (target.lightness - centre)
    below = min(new_centre / max(centre, 1e-3), 1.6)
    above = min((1 - new_centre) / max(1 - centre, 1e-3), 1.6)
    offset = lightness - centre
    new_lightness = np.clip(new_centre + np.where(offset < 0, below, above) * offset, 0, 1)
    # Chroma: full at the target's lightness, falling to none at black and at white, as paint and light do.
    edge = np.where(new_lightness < target.lightness, new_lightness / target.lightness, (1 - new_lightness) / (1 - target.lightness))
    new_chroma = target.chroma * np.clip(1.35 * edge, 0, 1)
    spread = 0.0
    if palette.turned:
        new_chroma = new_chroma * np.clip(0.7 + 0.3 * chroma / max(palette.chroma, 1e-3), 0, 1.15)
        spread = 0.25
    new_hue = np.deg2rad(target.hue) + spread * _wrap(hue - palette.hue) * (chroma > _GREY_CHROMA)
    new = np.stack([new_lightness, new_chroma * np.cos(new_hue), new_chroma * np.sin(new_hue)], axis=1).astype(np.float32)
    if not palette.turned:
        return new
    weight = _main_weight(chroma, hue, palette.hue)[:, None]
    return (lab + weight * (new - lab)).astype(np.float32)


def _called(lab: Array) -> dict[str, NDArray[np.bool_]]:
    """lab: (N, 3) -> for each of COLOURS, (N,) whether people would call the pixel so; an unsure one is called nothing."""
    lightness, chroma = lab[:, 0], np.hypot(lab[:, 1], lab[:, 2])
    hue = np.rad2deg(np.arctan2(lab[:, 2], lab[:, 1])) % 360
    grey = chroma < _GREY_CHROMA
    coloured = ~grey & (lightness > 0.2)
    brown = coloured & (hue > 25) & (hue < 95) & (lightness < 0.6) & (chroma < 0.125)
    pink = coloured & (((hue > 325) | (hue < 18)) & (lightness > 0.6) | (hue < 35) & (lightness > 0.72))
    light_blue = coloured & (hue > 190) & (hue < 262) & (lightness > 0.7)
    rest = coloured & ~brown & ~pink & ~light_blue
    return {
        "red": rest & ((hue < 42) | (hue > 350)),
        "orange": rest & (hue >= 45) & (hue < 74) & (chroma > 0.12),
        "yellow": rest & (hue >= 82) & (hue < 112) & (lightness > 0.68),
        "green": rest & (hue >= 118) & (hue < 172),
        "light blue": light_blue,
        "blue": rest & (hue >= 235) & (hue < 288),
        "purple": rest & (hue >= 288) & (hue < 340),
        "pink": pink,
        "brown": brown,
        "black": (lightness < 0.36) & (chroma < 0.06),
        "white": grey & (lightness > 0.87),
        "gray": grey & (lightness > 0.42) & (lightness < 0.84),
    }


def _convincing(lab: Array, palette: Palette, colour: str) -> bool:
    """Whether the named colour clearly dominates the picture turned into it."""
    turned = oklab(srgb(_turn(lab, palette, COLOURS[colour])))
    shares = {name: float(pixels.mean()) for name, pixels in _called(turned).items()}
    if shares[colour] < max(shares.values()):
        return False
    target = COLOURS[colour]
    if not target.chroma:
        return shares[colour] >= _CONVINCING_GREY
    hue = np.arctan2(turned[:, 2], turned[:, 1])
    family = (np.abs(_wrap(hue - np.deg2rad(target.hue))) < np.deg2rad(30)) & (np.hypot(turned[:, 1], turned[:, 2]) > 0.04)
    return shares[colour] >= _CONVINCING_SHARE and float(family.mean()) >= _CONVINCING_FAMILY
