"""Mean and covariance of features, gathered batch by batch in float64, on any number of processes, and kept in files.

A batch is merged by the update of Chan, Golub and LeVeque (1979), which adds up deviations from means and so loses nothing to features
that lie far from zero. The covariance is the unbiased one, divided by count - 1, as in numpy.cov and every published FID.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Gaussian:
    """A normal distribution on the CPU, which is all that a Frechet distance sees of a set of features.

    mean: (D,) float64. covariance: (D, D) float64. count: images that it was made from, None if that is not known.
    factor: (D, N) float64 with covariance = factor factor^T, where there are no more images than dimensions.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None = None
    factor: Tensor | None = None

    @staticmethod
    def checked(mean: Tensor, covariance: Tensor, what: str, count: int | None = None) -> Gaussian:
        """What was given, in float64 on the CPU. Raises ValueError, which begins with `what`, for what is no mean and covariance."""
        if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                f"{what}: mean of shape {tuple(mean.shape)} and covariance of shape {tuple(covariance.shape)} must be (D,) and (D, D)"
            )
        mean, covariance = mean.detach().to("cpu", torch.float64), covariance.detach().to("cpu", torch.float64)
        for name, values in (("mean", mean), ("covariance", covariance)):
            if not values.sum().isfinite():
                raise ValueError(f"{what}: its {name} holds NaN or infinity")
        difference = covariance - covariance.T  # the one temporary copy: with several, these checks would cost as much as eigenvalues
        low, high = difference.aminmax()
        if max(-low, high) > 1e-5 * covariance.diagonal().abs().max():
            raise ValueError(f"{what}: its covariance is not symmetric")
        return Gaussian(mean, difference.mul_(-0.5).add_(covariance), count)


class FeatureStatistics:
    """Count, mean and scatter of the features seen so far. As long as these are no more than D, they themselves are kept as well.

    device: where sums are made, in float64; the device of the features is the fastest where it knows float64 (MPS does not).
    """

    def __init__(self, dimension: int, device: torch.device | str = "cpu") -> None:
        self.dimension = dimension
        self.count = 0
        self.mean = torch.zeros(dimension, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(dimension, dimension, dtype=torch.float64, device=device)
        self._rows: list[Tensor] | None = []

    def add(self, features: Tensor, names: Sequence[str] | None = None) -> None:
        """features: (B, D), one row an image. Raises ValueError for another shape, and for NaN or infinity, which names the image.

        names: of the images; None calls them by their numbers.
        """
        if features.ndim != 2 or features.shape[1] != self.dimension:
            raise ValueError(f"features of shape {tuple(features.shape)} where (B, {self.dimension}) was expected")
        wrong = (~features.isfinite().all(1)).nonzero()
        if len(wrong):
            first = int(wrong[0])
            image = f"image {self.count + first} (counted from 0)" if names is None else names[first]
            more = f" (and those of {len(wrong) - 1} others beside it)" if len(wrong) > 1 else ""
            raise ValueError(f"the features of {image} hold NaN or infinity{more}")
        if not len(features):
            return
        rows = features.detach().to(self.mean.device, torch.float64)
        mean = rows.mean(0)
        centred = rows - mean
        self._scatter.addmm_(centred.T, centred)
        self._join(len(rows), mean)
        if self._rows is not None:
            self._rows = [*self._rows, rows] if self.count <= self.dimension else None

    def merge(self, other: FeatureStatistics) -> None:
        """Takes in other images' statistics. Raises ValueError for another dimension."""
        if other.dimension != self.dimension:
            raise ValueError(f"features of {other.dimension} dimensions cannot be merged with features of {self.dimension}")
        if not other.count:
            return
        self._scatter += other._scatter.to(self._scatter.device)
        self._join(other.count, other.mean.to(self.mean.device))
        rows = None if self._rows is None or other._rows is None else [*self._rows, *(r.to(self.mean.device) for r in other._rows)]
        self._rows = rows if self.count <= self.dimension else None

    def over_processes(self) -> FeatureStatistics:
        """The statistics of the images of all processes, the same in each; of this one where torch.distributed has not been started."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self
        whole = FeatureStatistics(self.dimension, "cpu" if torch.distributed.get_backend() == "gloo" else self.mean.device)
        own = self.mean.to(whole.mean.device)
        counted = torch.cat([own.new_tensor([self.count]), self.count * own])
        torch.distributed.all_reduce(counted)
        whole.count = round(float(counted[0]))
        whole.mean = counted[1:] / max(whole.count, 1)
        deviation = own - whole.mean
        whole._scatter = self._scatter.to(own.device).addr(deviation, deviation, alpha=self.count)
        torch.distributed.all_reduce(whole._scatter)
        whole._rows = [rows.to(own.device) for rows in self._everyones_rows()] if whole.count <= self.dimension else None
        return whole

    def gaussian(self) -> Gaussian:
        """Mean and covariance. Raises ValueError for less than two images."""
        if self.count < 2:
            raise ValueError(f"{self.count} images have no covariance: at least 2 are needed")
        factor = None
        if self._rows is not None:
            factor = ((torch.cat(self._rows) - self.mean) / (self.count - 1) ** 0.5).T.cpu()
        return Gaussian(self.mean.cpu(), (self._scatter / (self.count - 1)).cpu(), self.count, factor)

    def _everyones_rows(self) -> list[Tensor]:
        """The features of all processes, by rank, where there are few; on the CPU."""
        assert self._rows is not None
        found: list[list[Tensor]] = [[] for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(found, [rows.cpu() for rows in self._rows])
        return [rows for some in found for rows in some]

    def _join(self, count: int, mean: Tensor) -> None:
        """Takes in the mean of some more images, whose scatter about that mean has been added already."""
        total = self.count + count
        difference = mean - self.mean
        self._scatter.addr_(difference, difference, alpha=self.count * count / total)
        self.mean += difference * (count / total)
        self.count = total


def checked_pair(first: Tensor, second: Tensor) -> None:
    """Raises ValueError for two sets of features that cannot be compared: they must be finite, (N, D) and (M, D)."""
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(f"features of shapes {tuple(first.shape)} and {tuple(second.shape)} must be (N, D) and (M, D)")
    for name, features in (("first", first), ("second", second)):
        wrong = (~features.isfinite().all(1)).nonzero()
        if len(wrong):
            raise ValueError(f"the features of image {int(wrong[0])} (counted from 0) of the {name} set hold NaN or infinity")


def save_statistics(path: Path, gaussian: Gaussian, protocol: str | None = None) -> None:
    """Writes pytorch-fid's .npz: `mu` and `sigma`; also `count`, and `protocol`, the JSON of how the features were made.

    Raises ValueError if the file cannot be written or its name does not end in .npz.
    """
    if path.suffix != ".npz":
        raise ValueError(f"statistics file {path} must end in .npz")
    arrays: dict[str, Any] = {"mu": gaussian.mean.numpy(), "sigma": gaussian.covariance.numpy()}
    if gaussian.count is not None:
        arrays["count"] = np.int64(gaussian.count)
    if protocol is not None:
        arrays["protocol"] = np.array(protocol)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            np.savez(file, **arrays)
        os.replace(partial, path)
    except OSError as error:
        raise ValueError(f"statistics file {path} cannot be written: {error.strerror or error}") from error


def load_statistics(path: Path) -> tuple[Gaussian, str | None]:
    """Reads pytorch-fid's .npz, and what `save_statistics` adds to it: (statistics, protocol or None). Never unpickles anything.

    Raises ValueError for a file that is not there, is no such file, or holds what cannot be a mean and a covariance.
    """
    try:
        with np.load(path, allow_pickle=False) as found:
            if not isinstance(found, np.lib.npyio.NpzFile):
                raise ValueError("it is no .npz archive")
            missing = [name for name in ("mu", "sigma") if name not in found]
            if missing:
                raise ValueError(f"it lacks {' and '.join(missing)}; its arrays are: {', '.join(found.files) or 'none'}")
            mean, covariance = (torch.from_numpy(np.asarray(found[name], dtype=np.float64)) for name in ("mu", "sigma"))
            count = int(found["count"]) if "count" in found else None
            protocol = str(found["protocol"]) if "protocol" in found else None
    except FileNotFoundError:
        raise ValueError(f"statistics file not found: {path}") from None
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"statistics file {path} cannot be read: {error}") from error
    return Gaussian.checked(mean, covariance, f"statistics file {path}", count), protocol
