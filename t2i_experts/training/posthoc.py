"""Post-hoc EMA (Karras et al. 2024, section 3.2): snapshots of power-function averages, and networks of other widths made of them.

    RUN/snapshots/000000128000-0.05.safetensors     images seen, sigma_rel

Float32: in bfloat16, the rounding of each would be multiplied by its coefficient, and these reach 15 for narrow widths.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from t2i_experts.cascade.model_folder import INDEX, load_model, save_model
from t2i_experts.cascade.new_folder import flush
from t2i_experts.experts.lowrank_training import plain_state
from t2i_experts.experts.projections import fold
from t2i_experts.training.power_ema import PowerFunctionEMA, Profile, posthoc_coefficients


def write_snapshots(root: Path, images_seen: int, ema: PowerFunctionEMA) -> None:
    """Stores every average as it is now; a file with a number for a name is whole."""
    folder = root / "snapshots"
    folder.mkdir(exist_ok=True)
    for sigma_rel, network in zip(ema.sigma_rels, ema.networks, strict=True):
        path = folder / f"{images_seen:012d}-{sigma_rel}.safetensors"
        temporary = path.with_name(f".{path.name}.tmp")
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in plain_state(network.state_dict()).items()}, temporary)
        flush(temporary)
        temporary.rename(path)
    flush(folder)


def snapshots(root: Path) -> dict[Profile, Path]:
    """The snapshots of a run, oldest first."""
    found = {}
    for path in sorted((root / "snapshots").glob("[0-9]*.safetensors")):
        images_seen, _, sigma_rel = path.stem.partition("-")
        found[Profile(int(images_seen), float(sigma_rel))] = path
    return found


def drop_later_snapshots(root: Path, images_seen: int) -> None:
    """Removes what a run stored after the checkpoint that it goes on from; it will come to these times again."""
    for profile, path in snapshots(root).items():
        if profile.images_seen > images_seen:
            path.unlink()


@dataclass(frozen=True)
class Reconstruction:
    """weights: of a network, float32, averaged with `profile`, but for a relative distance `profile_error`, from `snapshots` of them, and
    then folded if they were trained with projections."""

    weights: Mapping[str, Tensor]
    profile: Profile
    profile_error: float
    snapshots: int

    def facts(self) -> dict[str, Any]:
        """All but the weights, as plain values."""
        return {
            "sigma_rel": self.profile.sigma_rel,
            "images_seen": self.profile.images_seen,
            "profile_error": self.profile_error,
            "snapshots": self.snapshots,
        }


def reconstruct(root: Path, sigma_rel: float, images_seen: int | None = None) -> Reconstruction:
    """The average of width `sigma_rel` after `images_seen` images (the newest snapshot's if None), out of the snapshots up to then.

    Raises ValueError for a width out of range, a run without snapshots, a time that has none, and files that cannot be read.
    """
    found = snapshots(root)
    if not found:
        raise ValueError(f"{root} holds no snapshots; train with training.ema.kind=power and training.ema.snapshot_every_images=N")
    times = sorted({profile.images_seen for profile in found})
    target = Profile(times[-1] if images_seen is None else images_seen, sigma_rel)
    if target.images_seen not in times:
        raise ValueError(f"images_seen={images_seen}: {root} has no snapshot of that time; allowed: {', '.join(map(str, times))}")
    tracked = [profile for profile in found if profile.images_seen <= target.images_seen]
    coefficients, error = posthoc_coefficients(tracked, target)
    total: dict[str, Tensor] = {}
    used = 0
    for profile, coefficient in zip(tracked, coefficients.tolist(), strict=True):
        if coefficient == 0:
            continue
        used += 1
        weights = _read(found[profile])
        if total and {name: t.shape for name, t in weights.items()} != {name: t.shape for name, t in total.items()}:
            raise ValueError(f"{found[profile]} is of another network than the snapshots before it")
        for name, tensor in weights.items():
            part = tensor.double() * coefficient
            total[name] = total[name].add_(part) if name in total else part
    return Reconstruction(fold({name: tensor.float() for name, tensor in total.items()}), target, error, used)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}); remove it to do without") from error


def save_reconstruction(root: Path, out: Path, sigma_rel: float, images_seen: int | None = None) -> Reconstruction:
    """Writes the run's model folder with the reconstructed weights to `out`, which must not exist yet.

    Raises ValueError as `reconstruct` does, and if `out` exists or the run has no model folder that the weights fit.
    """
    if out.exists():
        raise ValueError(f"out={str(out)!r} exists already; choose a new folder")
    result = reconstruct(root, sigma_rel, images_seen)
    model = load_model(root / "model")
    (stage,) = model.stages.values()
    denoiser = stage.denoiser
    assert isinstance(denoiser, torch.nn.Module)
    if {name: t.shape for name, t in denoiser.state_dict().items()} != {name: t.shape for name, t in result.weights.items()}:
        raise ValueError(f"the snapshots in {root} are of another network than its model folder")
    provenance = json.loads((root / "model" / INDEX).read_text(encoding="utf-8"))["provenance"]
    facts = result.facts()
    provenance |= {"images_seen": facts.pop("images_seen"), "ema": {"kind": "power", **facts}}
    save_model(out, stage.config, stage.sampling, result.weights, model.conditioner, codec=stage.codec, provenance=provenance)
    return result
