"""What a config must keep to that speaks of experts: parts of p(sigma), the run of one expert, and the tree of all."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction

from t2i_experts.config.schema import BlendConfig, DecoupleConfig, ExpertsConfig, RatioConfig, RunConfig


def read_quantiles(quantiles: Sequence[str], where: str) -> tuple[Fraction, Fraction]:
    """The ends of a part of p(sigma), 0 and 1 for an empty list. Raises ValueError that names `where` unless 0 <= u_lo < u_hi <= 1."""
    if not quantiles:
        return Fraction(0), Fraction(1)
    try:
        u_lo, u_hi = map(Fraction, quantiles)
        if not 0 <= u_lo < u_hi <= 1:
            raise ValueError
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{where}={list(quantiles)} must be two numbers or fractions such as 511/512 with 0 <= u_lo < u_hi <= 1") from None
    return u_lo, u_hi


def whole(quantiles: Sequence[str]) -> bool:
    """Whether these quantiles (see `read_quantiles`) are all of p(sigma)."""
    return read_quantiles(quantiles, "quantiles") == (Fraction(0), Fraction(1))


def check_expert(config: RunConfig) -> None:
    """What a run needs, and may not have, for being that of an expert alone."""
    preview, quantiles = config.training.preview, config.stage.noise.quantiles
    if whole(quantiles):
        if preview.around is not None:
            why = "without stage.noise.quantiles the network answers for all noise"
            raise ValueError(f"training.preview.around={preview.around!r} would be ignored: {why}")
        return
    if config.experts.leaves:
        raise ValueError(f"stage.noise.quantiles={quantiles}: the root of experts.leaves={config.experts.leaves} needs all noise, []")
    if preview.every_images and preview.around is None and config.training.initial is None:
        raise ValueError(
            f"training.preview.every_images={preview.every_images}: a network of stage.noise.quantiles={quantiles} draws no picture alone; "
            "name a model for all other noise in training.preview.around or training.initial, or set it to 0"
        )


def check_decouple(config: RunConfig) -> None:
    """What training as DeMe's needs of a run, that of one expert: a parent, and noise that is not its own."""
    decouple, key = config.training.decouple, "training.decouple"
    if not 0 <= decouple.everywhere <= 1:
        raise ValueError(f"{key}.everywhere={decouple.everywhere} must lie in [0, 1]; 0 draws the run's own noise alone")
    if decouple.consistency and config.training.initial is None:
        raise ValueError(
            f"{key}.consistency={decouple.consistency} needs training.initial, the model to stay near to; the nodes of a tree have one: "
            "for them, say it in experts.overrides"
        )
    if decouple.everywhere and whole(config.stage.noise.quantiles):
        raise ValueError(
            f"{key}.everywhere={decouple.everywhere} would be ignored: without stage.noise.quantiles all noise is the run's own; for the "
            "nodes of a tree, say it in experts.overrides"
        )
    if decouple.projections and config.stage.network.backbone != "unet":
        raise ValueError(f"{key}.projections=true is the unet's; the backbone {config.stage.network.backbone!r} has none")
    if decouple.projections and config.training.rank:
        raise ValueError(f"{key}.projections=true trains whole matrices, which training.rank={config.training.rank} keeps as they are")


def check_ratio(ratio: RatioConfig, where: str) -> None:
    """Raises ValueError, naming the field after `where`, for a ratio that cannot be."""
    if not ratio.steepness > 0:
        raise ValueError(f"{where}.steepness={ratio.steepness} must be positive; inf is the hard split")
    try:
        if not 0 < Fraction(ratio.middle) < 1:
            raise ValueError
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{where}.middle={ratio.middle} must be a quantile between 0 and 1, a number or a fraction such as 1/2") from None
    if ratio.kind == "learned" and ratio.steepness == math.inf:
        raise ValueError(f"{where}.steepness=inf: a learned ratio must begin at a finite one, for the hard split passes no gradients on")


def check_blend(config: RunConfig) -> None:
    """What a run that trains a blend needs, and may not have."""
    blend, key = config.training.blend, "training.blend"
    check_ratio(blend.ratio, f"{key}.ratio")
    if (blend.high is None) != (blend.low is None) or (blend.high is None and blend != BlendConfig()):
        raise ValueError(f"{key}.high={blend.high!r}, {key}.low={blend.low!r}: a blend needs both, the models with which it begins")
    if blend.high is None:
        return
    others = {
        "training.initial": config.training.initial,
        "training.decouple": None if config.training.decouple == DecoupleConfig() else "set",
        "training.ema.snapshot_every_images": config.training.ema.snapshot_every_images or None,
        "stage.noise.quantiles": None if whole(config.stage.noise.quantiles) else config.stage.noise.quantiles,
        "experts.leaves": config.experts.leaves or None,
    }
    for name, value in others.items():
        if value is not None:
            raise ValueError(f"{name}={value} does not go with {key}, which trains two networks over all noise from its own models")


def require_experts(config: RunConfig) -> None:
    """Raises ValueError for a config without a tree of experts."""
    if not config.experts.leaves:
        raise ValueError("experts.leaves=[] names no experts: nothing grows out of this config's network; `t2i-experts train` trains it")


_NODE_NAME = re.compile(r"E\^[0-9]+_[0-9]+|[A-Za-z0-9_-]+")
_OVERRIDABLE = ("training.", "data.", "stage.network.")
_NOT_OVERRIDABLE = {
    "training.images": "say experts.images, or experts.nodes.NAME.images",
    "training.initial": "a node begins with its parent's weights",
}


def check_node_name(name: str, where: str) -> None:
    """Raises ValueError for a name that cannot be a node's, which is a folder's too."""
    if not _NODE_NAME.fullmatch(name):
        raise ValueError(f"{where}: a node's name must be E^level_index, or letters, digits, '_' and '-'; received {name!r}")


def _check_overrides(overrides: Sequence[str], where: str) -> None:
    """What can be said of them without building the config of the node's run."""
    for text in overrides:
        key, equals, _ = text.partition("=")
        if not equals:
            raise ValueError(f"{where}: {text!r} is not of the form key=value")
        if key in _NOT_OVERRIDABLE:
            raise ValueError(f"{where}: {text!r} cannot be said here: {_NOT_OVERRIDABLE[key]}")
        if not key.startswith(_OVERRIDABLE):
            allowed = ", ".join(f"{name}NAME" for name in _OVERRIDABLE)
            raise ValueError(f"{where}: {text!r} is not of a node's own, but of the whole tree; allowed: {allowed}")


def check_experts(experts: ExpertsConfig) -> None:
    """What can be said of a tree without its intervals; `TreePlan` holds the rest."""
    if not experts.leaves:
        for key in ("images", "overrides", "nodes"):
            if value := getattr(experts, key):
                raise ValueError(f"experts.{key}={value} would be ignored: experts.leaves is empty, so there are no experts")
        return
    if experts.images < 1:
        raise ValueError(f"experts.images={experts.images} must be positive: missing mandatory value where experts.leaves names experts")
    for key, name in [*(("leaves", leaf) for leaf in experts.leaves), *(("nodes", node) for node in experts.nodes)]:
        check_node_name(name, f"experts.{key}")
    _check_overrides(experts.overrides, "experts.overrides")
    for name, node in experts.nodes.items():
        if node.images is not None and node.images < 1:
            raise ValueError(f"experts.nodes.{name}.images={node.images} must be positive; null means experts.images")
        read_quantiles(node.quantiles, f"experts.nodes.{name}.quantiles")
        _check_overrides(node.overrides, f"experts.nodes.{name}.overrides")
