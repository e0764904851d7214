"""Runs whose streams stall: they hear a signal or the clock all the same, on one process and on several, and go on if the stream does."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from t2i_experts.config import load_config
from t2i_experts.shards import stream
from t2i_experts.training.checkpoints import checkpoints
from t2i_experts.training.trainer import Trainer, train

WriteConfig = Callable[[str], Path]

ALWAYS = [
    "training.validation.every_images=0",
    "training.preview.every_images=0",
    "training.checkpoint_every_images=64",
    "training.log_every_images=64",
]


@pytest.fixture(autouse=True)
def _small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a stream would give nothing before it stalls."""
    monkeypatch.setattr(stream, "BUFFER_SAMPLES", 2)


def names(root: Path) -> list[str]:
    return [path.name for path in checkpoints(root)]


def wait_for(path: Path, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.02)


def test_a_signal_ends_a_run_that_waits_for_its_stream(write_config: WriteConfig, tmp_path: Path, shards: Path) -> None:
    """With a checkpoint of where it stands. Without workers, too, and in the midst of the micro-batches of a step."""
    stalled, root = tmp_path / "stalled", tmp_path / "run"
    urls = f"data.train=['pipe:cat {shards}/train/00000.tar; touch {stalled}; sleep 60']"  # 14 samples, three and a half batches of 4
    overrides = [*ALWAYS, urls, "data.workers=0", "training.accumulation=2"]
    trainer = Trainer(load_config(write_config("run"), overrides), progress=False)
    told: list[float] = []

    def tell() -> None:
        wait_for(root / "log.jsonl")
        wait_for(stalled)
        time.sleep(0.5)
        told.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=tell)
    thread.start()
    trainer.run()
    thread.join()
    assert time.monotonic() - told[0] < 10
    assert trainer.stopped_by is signal.SIGTERM and not multiprocessing.active_children()
    assert names(root) == ["000000000008"] and (root / "model" / "model_index.json").is_file()
    log = [json.loads(line) for line in (root / "log.jsonl").read_text().splitlines()]
    assert [event["images_seen"] for event in log if event["event"] == "train"] == [8]


def test_a_run_that_never_gets_data_stops_when_its_time_is_over(
    write_config: WriteConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the beginning, too; where there is a checkpoint already, it stays as it is."""
    config = load_config(write_config("run"), [*ALWAYS, "data.train=['pipe:sleep 60']", "training.max_minutes=1e-9"])
    written = []
    for resumed in (False, True):
        trainer = Trainer(config, progress=False)
        assert (trainer.resumed_from is not None) == resumed
        trainer.run()
        assert trainer.state.images_seen == 0 and names(tmp_path / "run") == ["000000000000"]
        written.append((tmp_path / "run/checkpoints/000000000000/state.json").stat())
    assert written[0] == written[1]
    assert not multiprocessing.active_children()


def _one_of_two(rank: int, port: int, config: str, overrides: list[str]) -> None:
    """Trains as `torchrun` starts it, in a process forked from one that has everything imported."""
    from accelerate.state import AcceleratorState

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    AcceleratorState._reset_state(True)
    train(load_config(config, overrides), progress=False)
    os._exit(0)


def test_of_two_processes_one_waits_and_the_other_is_told(write_config: WriteConfig, tmp_path: Path, shards: Path) -> None:
    """The second gets its data late, for which the first waits, and then no more; a signal to the first stops both after the same step."""
    stalled, root = tmp_path / "stalled", tmp_path / "run"
    tar = f"{shards}/train/00000.tar"  # 16 samples, in batches of 4
    stalling = f"if test $RANK = 1; then sleep 1.5; cat {tar}; touch {stalled}; sleep 60; else cat {tar}; fi"
    overrides = [*ALWAYS, f"data.train=['pipe:{stalling}','pipe:{stalling} ']", "data.workers=1"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    arguments = (port, str(write_config("run")), overrides)
    both = [context.Process(target=_one_of_two, args=(rank, *arguments)) for rank in range(2)]
    for process in both:
        process.start()
    try:
        wait_for(stalled)
        time.sleep(1.0)  # for the steps before it, and until both wait
        os.kill(both[0].pid or 0, signal.SIGTERM)
        started = time.monotonic()
        for process in both:
            process.join(20)
        assert [process.exitcode for process in both] == [0, 0]
        assert time.monotonic() - started < 10
    finally:
        for process in both:
            process.kill()
    assert names(root) == ["000000000024"]
