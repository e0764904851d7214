"""One holder at a time, whatever the others did before they ended."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from t2i_experts.training import claims
from t2i_experts.training.claims import STALE_AFTER, Claim, HeldClaim, living_claim, take_claim


def held(path: Path) -> HeldClaim:
    taken = take_claim(path)
    assert isinstance(taken, HeldClaim)
    return taken


def rewrite(path: Path, **changed: object) -> None:
    """Makes a claim that of another process."""
    facts: dict[str, Any] = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"token": "another"} | changed))


def age(path: Path, seconds: float) -> None:
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def test_a_claim_is_ours_until_it_is_given_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.claim"
    mine = held(path)
    assert not mine.inherited and living_claim(path) == mine.claim
    other = take_claim(path)
    assert isinstance(other, Claim) and other == mine.claim and str(other).startswith(f"process {os.getpid()} on ")
    mine.release()
    assert not list(path.parent.iterdir()) and living_claim(path) is None
    assert not held(path).inherited


@pytest.mark.parametrize("changed", [{"pid": "ended"}, {"started": "1"}], ids=["the process has ended", "its pid is another one's now"])
def test_the_claim_of_a_process_that_has_ended_here_is_taken_over_at_once(tmp_path: Path, changed: Mapping[str, str]) -> None:
    path = tmp_path / "a.claim"
    lost = held(path)
    ended = subprocess.Popen([sys.executable, "-S", "-c", ""])
    ended.wait()
    rewrite(path, **(changed if "started" in changed else {"pid": ended.pid}))
    assert living_claim(path) is None
    mine = held(path)
    assert mine.inherited and living_claim(path) == mine.claim and list(tmp_path.iterdir()) == [path]
    lost.release()
    assert living_claim(path) == mine.claim, "what one has lost one cannot give back"


def test_a_process_that_has_ended_and_was_not_waited_for_is_no_living_one(tmp_path: Path) -> None:
    path = tmp_path / "a.claim"
    held(path)
    process = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    rewrite(path, pid=process.pid, started=claims._started(process.pid))
    assert living_claim(path) is not None
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert living_claim(path) is None
    process.communicate()


def test_a_claim_from_elsewhere_lives_as_long_as_it_is_touched(tmp_path: Path) -> None:
    path = tmp_path / "a.claim"
    held(path)
    rewrite(path, host="far", place="far away", pid=1)
    assert str(take_claim(path)) == "process 1 on far"
    age(path, STALE_AFTER - 5)
    assert isinstance(take_claim(path), Claim)
    age(path, 10)
    assert living_claim(path) is None and held(path).inherited


def test_its_holder_touches_it_and_notices_when_it_was_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.claim"
    mine = held(path)
    age(path, 100)
    before = path.stat().st_mtime
    assert mine.touch() and path.stat().st_mtime == before, "not every time"
    monkeypatch.setattr(claims, "TOUCH_EVERY", 0.0)
    assert mine.touch() and path.stat().st_mtime > before + 90
    rewrite(path)
    assert not mine.touch()
    path.unlink()
    assert not mine.touch()


def test_a_disk_that_does_not_answer_takes_no_claim_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has lost its claim kills what it trains."""
    monkeypatch.setattr(claims, "TOUCH_EVERY", 0.0)
    mine = held(tmp_path / "a.claim")

    def fail(*_: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    for owner, name in ((Path, "read_bytes"), (os, "utime")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            assert mine.touch()
    assert living_claim(mine.path) == mine.claim


def test_a_claim_that_is_just_being_written_is_anothers(tmp_path: Path) -> None:
    path = tmp_path / "a.claim"
    path.touch()
    assert isinstance(take_claim(path), Claim) and living_claim(path) is not None
    age(path, STALE_AFTER + 1)
    assert held(path).inherited


def test_who_is_killed_while_taking_over_blocks_it_for_a_while_only(tmp_path: Path) -> None:
    path, takeover = tmp_path / "a.claim", tmp_path / "a.claim.takeover"
    held(path)
    rewrite(path, place="far away")
    age(path, STALE_AFTER + 1)
    takeover.touch()
    assert isinstance(take_claim(path), Claim)
    age(takeover, STALE_AFTER + 1)
    assert held(path).inherited


def _take(path: Path, start: Any, won: Any, end: Any) -> None:
    start.wait()
    if isinstance(take_claim(path), HeldClaim):
        with won.get_lock():
            won.value += 1
    end.wait()


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_at_once_one_wins(tmp_path: Path, stale: bool) -> None:
    context = multiprocessing.get_context("fork")
    for attempt in range(8):
        path = tmp_path / f"{attempt}.claim"
        if stale:
            held(path)
            rewrite(path, started="1")
        start, end, won = context.Barrier(6), context.Barrier(6), context.Value("i", 0)
        processes = [context.Process(target=_take, args=(path, start, won, end)) for _ in range(6)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(20)
        assert won.value == 1
