"""Long work in parts of some hundred pictures: each is written whole or not at all, by whichever process made it, and made only once.

Where a part begins does not depend on processes or batches, so a run that goes on with others of these makes the same parts.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2i_experts.evaluation.records import differences, in_words, read_json, write_json

SIZE = 256
"""Pictures in a part: what a kill may cost each process."""

MADE_BY = "made_by.json"


def check_work(folder: Path, ending: str, told: Path, decided: Mapping[str, Any]) -> None:
    """Raises ValueError, which names the fields, if a folder holds files of that ending that something else decided, as `told` says."""
    there = read_json(told)
    if there is None and any(folder.glob(f"*{ending}")):
        raise ValueError(f"{folder} holds {ending} files, and no {told.name} says what made them; choose another folder")
    found = [] if there is None else differences(there, decided)
    if found:
        raise ValueError(f"{folder} holds parts of other work: {in_words(found)}; choose another folder, or delete this one")


def open_work(folder: Path, ending: str, told: Path, decided: Mapping[str, Any]) -> None:
    """Writes into the file `told` what decides the folder's files. Raises ValueError as `check_work`."""
    check_work(folder, ending, told, decided)
    if not told.exists():
        write_json(told, decided)


@dataclass(frozen=True)
class Parts:
    """The parts of `count` pictures in a folder. made_by: what decides them, as JSON's plain values."""

    folder: Path
    count: int
    made_by: Mapping[str, Any]

    @property
    def ranges(self) -> list[range]:
        """The pictures of each part, by their indices."""
        return [range(start, min(start + SIZE, self.count)) for start in range(0, self.count, SIZE)]

    def decided(self) -> dict[str, Any]:
        """All that decides the parts, as JSON's plain values."""
        return {**self.made_by, "count": self.count, "pictures in a part": SIZE}

    def check(self) -> None:
        """Raises ValueError, which names the fields, if the folder holds parts that something else decided."""
        check_work(self.folder, ".npz", self.folder / MADE_BY, self.decided())

    def open(self) -> None:
        """Makes the folder and says in it what decides the parts; only one process may. Raises ValueError as `check`."""
        open_work(self.folder, ".npz", self.folder / MADE_BY, self.decided())
        for left in self.folder.glob(".*.partial"):  # of a process that was killed
            left.unlink(missing_ok=True)

    def missing(self) -> list[range]:
        """The parts that are still to be made."""
        return [indices for indices in self.ranges if not self._path(indices).is_file()]

    def write(self, indices: range, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Keeps what is known of the pictures of a part: of each array, a row a picture."""
        assert all(len(array) == len(indices) for array in arrays.values())
        path = self._path(indices)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        with open(partial, "wb") as file:
            np.savez(file, **dict(arrays))  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)

    def read(self, indices: range) -> dict[str, NDArray[Any]]:
        """What `write` kept. Raises ValueError for a part that is missing or damaged."""
        path = self._path(indices)
        try:
            with np.load(path, allow_pickle=False) as found:
                arrays = {name: found[name] for name in found.files}
        except FileNotFoundError:
            raise ValueError(f"{path} is missing; all processes must share the folder") from None
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} cannot be read ({error}); delete it, and the same command makes it again") from error
        if not arrays or any(len(array) != len(indices) for array in arrays.values()):
            raise ValueError(f"{path} does not hold {len(indices)} pictures; delete it, and the same command makes it again")
        return arrays

    def _path(self, indices: range) -> Path:
        return self.folder / f"{indices.start:06d}.npz"
