"""Two processes of a run: one is late, wherever in a step, or is gone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from t2i_experts.config import load_config
from t2i_experts.training.task import Batch
from t2i_experts.training.trainer import Trainer, train
from tests.training.test_stalls import ALWAYS, names, wait_for

WriteConfig = Callable[[str], Path]


def _train_as(rank: int, port: int, config: str, overrides: list[str], end: Path) -> None:
    """Trains as `torchrun` starts it, in a process forked from one that has everything imported, and leaves in a file how that ended."""
    from accelerate.state import AcceleratorState

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    AcceleratorState._reset_state(True)
    said = "finished"
    try:
        train(load_config(config, overrides), progress=False)
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
    end.with_name(f"{end.name}{rank}").write_text(said)
    os._exit(0)


def start_two(config: Path, overrides: Sequence[str], end: Path) -> list[BaseProcess]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    arguments = (port, str(config), [*ALWAYS, *overrides], end)
    both = [context.Process(target=_train_as, args=(rank, *arguments)) for rank in range(2)]
    for process in both:
        process.start()
    return both


@pytest.mark.parametrize("late", [2, 3])
def test_one_may_be_late_with_any_micro_batch(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: int
) -> None:
    """The other must not be waiting for it elsewhere meanwhile: in the second step's first forward pass DDP rebuilds its buckets."""
    batches = Trainer._batches

    def delayed(self: Trainer, give_up: Any) -> Iterator[Batch]:
        for number, batch in enumerate(batches(self, give_up)):
            if number == late and self.rank == 1:
                assert not any(give_up() for _ in range(3))
            yield batch

    monkeypatch.setattr(Trainer, "_batches", delayed)
    both = start_two(write_config("run"), ["training.accumulation=2", "training.images=24"], tmp_path / "end")
    try:
        for rank in range(2):
            wait_for(tmp_path / f"end{rank}")
            both[rank].join(5)
            assert (tmp_path / f"end{rank}").read_text() == "finished"
    finally:
        for process in both:
            process.kill()
    assert names(tmp_path / "run") == ["000000000024"]


@pytest.mark.parametrize(
    ("interrupted", "said"),
    [(False, "ProcessLost: another process of this run has ended; its message says why"), (True, "KeyboardInterrupt: ")],
)
def test_one_that_waits_for_another_that_ends_says_so(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: bool, said: str
) -> None:
    """Not in the network library's words; and after Ctrl-C nothing but that."""
    batches = Trainer._batches

    def stalled(self: Trainer, give_up: Any) -> Iterator[Batch]:
        for number, batch in enumerate(batches(self, give_up)):
            if number == 1 and self.rank == 1:
                (tmp_path / "stalled").touch()
                time.sleep(60)
            yield batch

    monkeypatch.setattr(Trainer, "_batches", stalled)
    both = start_two(write_config("run"), [], tmp_path / "end")
    try:
        wait_for(tmp_path / "stalled")
        time.sleep(0.5)  # until the first waits
        if interrupted:
            os.kill(both[0].pid or 0, signal.SIGINT)
            time.sleep(0.2)
        both[1].kill()
        both[0].join(10)
        assert (tmp_path / "end0").read_text() == said
    finally:
        for process in both:
            process.kill()
