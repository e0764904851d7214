"""The folder of a run as other programs see it: its checkpoints and their facts, who trains there, and whether a config is that of the run.

Nothing here reads weights or needs torch; `state` writes checkpoints and goes on from them.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from t2i_experts.config import RunConfig, differences, from_plain, to_plain
from t2i_experts.shards.format import write_atomically


@dataclass(frozen=True)
class Validation:
    """A validation loss. of: what it was measured on; losses of different ones cannot be compared."""

    loss: float
    of: str


def remove_checkpoint(folder: Path) -> None:
    """Takes a checkpoint away; if that is cut short, what is left no longer has a number for a name."""
    doomed = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def checkpoints(root: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(path for path in (root / "checkpoints").glob("[0-9]*") if path.is_dir())


def best_checkpoint(root: Path) -> Path | None:
    """The checkpoint with the lowest validation loss, the older of two equal ones; None if no checkpoint was validated.

    Of those that were measured on the same as the newest: other losses cannot be compared.
    """
    facts = [(read_facts(folder).get("validation"), folder) for folder in checkpoints(root)]
    measured = [(Validation(**validation), folder) for validation, folder in facts if validation]
    return min(((v.loss, folder) for v, folder in measured if v.of == measured[-1][0].of), default=(None, None))[1]


def prepare_roll_back(root: Path) -> None:
    """Removes the checkpoints that were saved, at a stop, when the loss had just risen too high."""
    for folder in reversed(checkpoints(root)):
        if not (read_facts(folder).get("watch") or {}).get("high"):
            break
        remove_checkpoint(folder)


def record_roll_back(folder: Path, rollbacks: int) -> None:
    """Writes into the checkpoint that a run goes back to how often it has done so, which a later start must know."""
    facts = {**read_facts(folder), "rollbacks": rollbacks}
    write_atomically(folder / "state.json", [json.dumps(facts, indent=2).encode() + b"\n"])


def read_facts(folder: Path) -> dict[str, Any]:
    """A checkpoint's state.json. Raises ValueError if it cannot be read, or is another one."""
    try:
        facts = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if not (isinstance(facts, dict) and {"images_seen", "config"} <= facts.keys()):
            raise ValueError("state.json does not hold images_seen and config")
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the checkpoint {folder}: {error}") from error
    return facts


_LOCK_ATTEMPTS = 5
_LOCK_AGAIN_AFTER = 0.1
"""Seconds: `lock_owner` of another process may have the lock for a moment, to see whether it is free."""


def lock_run(root: Path) -> IO[str]:
    """Makes the output folder of a run and takes it for this process, until the file that is returned is closed or the process ends.

    Raises ValueError if it cannot be a folder, if its disk knows no locks, or if another process has it.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / ".lock").open("a", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"output={str(root)!r} cannot be used: {error}") from error
    for attempt in reversed(range(_LOCK_ATTEMPTS)):
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, this lock is not inherited by loader workers
            break
        except (BlockingIOError, PermissionError):  # either, by system
            if attempt:
                time.sleep(_LOCK_AGAIN_AFTER)
                continue
            owner = (root / ".lock").read_text(encoding="utf-8").strip()
            lock.close()
            raise ValueError(f"output={str(root)!r}: another process is training there ({owner or 'unknown'})") from None
        except OSError as error:
            lock.close()
            raise ValueError(f"output={str(root)!r} cannot be locked ({error}): choose one on a file system with POSIX locks") from error
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    return lock


def lock_owner(root: Path) -> str | None:
    """The process that trains in the output folder of a run, in words; None if there is none."""
    try:
        lock = (root / ".lock").open("r+", encoding="utf-8")
    except OSError:
        return None
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it is closed
        except (BlockingIOError, PermissionError):
            return lock.read().strip() or "an unknown process"
        except OSError:  # no locks there, as `lock_run` will say
            return None
    return None


MAY_CHANGE = (
    "output",
    "data",
    "sampling",
    "experts",
    "training.images",
    "training.accumulation",
    "training.compile",
    "training.gradient_checkpointing",
    "training.device",
    "training.ema.snapshot_every_images",
    "training.max_minutes",
    "training.rollbacks",
    "training.divergence_factor",
    "training.checkpoint_every_images",
    "training.keep_checkpoints",
    "training.log_every_images",
    "training.preview",
    "training.trackers",
    "training.validation",
)
"""Config values, or groups of them, that may differ when a run goes on. Hashes guard the content of the shards and encoders."""


def refuse_changed_config(folder: Path, config: RunConfig) -> None:
    """Raises ValueError with the differences if a checkpoint was made under another config; what it did not know counts as default.

    Where the initial weights lie may change; `check_initial` sees that they are the same.
    """
    old = to_plain(from_plain(RunConfig, read_facts(folder)["config"]))
    moved = None not in (old["training"]["initial"], config.training.initial)
    changes = []
    for line in differences(old, to_plain(config)):
        key = line.split(":")[0]
        if key == "training.initial" and moved:
            continue
        if not any(key == name or key.startswith(f"{name}.") for name in MAY_CHANGE):
            changes.append(line)
    if changes:
        raise ValueError(
            f"{folder.parent.parent} holds a run with another config; go on with its own, or choose another output. Changed:\n  "
            + "\n  ".join(changes)
        )
