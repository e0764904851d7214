"""A run that goes on with other processes, workers and accumulation: every position of the global order is still seen exactly once."""

from __future__ import annotations

import io
import os
import runpy
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from t2i_experts.shards.buckets import Buckets
from t2i_experts.shards.reader import ShardReader
from t2i_experts.shards.writer import ShardWriter
from t2i_experts.training.task import DiffusionTask

TRAIN = """
import os, sys
from t2i_experts.cli.app import main
from t2i_experts.training.task import DiffusionTask

losses = DiffusionTask.losses

def watched(task, denoiser, batch):
    with open(config + ".seen." + os.environ.get("RANK", "alone"), "a") as file:
        file.writelines(f"{position} {key}\\n" for position, key in zip(batch.positions, batch.keys, strict=True))
    return losses(task, denoiser, batch)

DiffusionTask.losses = watched
overrides, *configs = sys.argv[1:]
for config in configs:
    try:
        main(["train", config, *overrides.split(), "--quiet"])
    except SystemExit as exit:
        if exit.code:
            raise
"""
"""`t2i-experts train` with some overrides for each config in turn, which notes the position and the key of every sample of each step."""


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """40 pictures: 20 square ones, 10 wide and 10 high ones."""
    with ShardWriter(tmp_path / "pictures", samples_per_shard=16) as writer:
        for i in range(40):
            data = io.BytesIO()
            Image.new("RGB", [(16, 16), (20, 12), (16, 16), (12, 20)][i % 4], (i, 2 * i, 3 * i)).save(data, "PNG")
            writer.write(f"{i:04d}", data.getvalue(), "png", [f"a red cube {i}"], {})
    return tmp_path / "pictures"


def seen(config: Path, rank: str) -> list[tuple[int, str]]:
    lines = (line.split() for line in Path(f"{config}.seen.{rank}").read_text().splitlines())
    return [(int(position), key) for position, key in lines]


def test_every_position_once_after_a_change_of_ranks_and_workers(
    write_config: Callable[[str], Path], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process, two workers and accumulation 2 up to image 24; then two processes with a worker each up to 80. With buckets, too."""
    squares, buckets = write_config("squares"), write_config("buckets")
    buckets.write_text(buckets.read_text().replace("  size: 16\n", "  size: 16\n  buckets: [[16, 16], [20, 12], [12, 20]]\n"))
    script = tmp_path / "watched.py"
    script.write_text(TRAIN)
    always = (
        f"data.train=[{pictures}] training.preview.every_images=0 training.validation.every_images=0 training.checkpoint_every_images=80"
    )

    first = f"{always} training.images=24 data.workers=2 training.accumulation=2"
    with monkeypatch.context() as patch:
        patch.setattr(DiffusionTask, "losses", DiffusionTask.losses)  # which the script replaces
        patch.setattr(sys, "argv", ["watched.py", first, str(squares), str(buckets)])
        runpy.run_path(str(script))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    then = [f"{always} training.images=80 data.workers=1", squares, buckets]
    two = subprocess.run([*command, *then], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=120)
    assert two.returncode == 0, two.stderr.decode()
    assert two.stderr.count(b"going on from") == 2

    for config, reader in (
        (squares, ShardReader([pictures], size=16, seed=0)),
        (buckets, ShardReader([pictures], size=16, seed=0, buckets=Buckets(((16, 16), (20, 12), (12, 20)), 8))),
    ):
        alone, rank0, rank1 = (seen(config, rank) for rank in ("alone", "0", "1"))
        assert [position for position, _ in alone] == list(range(24))
        assert len(rank0) == len(rank1) == 28
        everyone = sorted(alone + rank0 + rank1)
        assert everyone == [(position, reader.raw(reader.order[position]).key) for position in range(80)]
        if config == squares:
            epochs = [Counter(key for _, key in everyone[at : at + 40]) for at in (0, 40)]
            assert all(set(epoch.values()) == {1} and len(epoch) == 40 for epoch in epochs)
