"""A tree of real runs, killed in its root and in a child, and the same tree that nobody has disturbed.

Kills at random moments, of three that train one tree together, are in test_growing.py, with stand-ins for the processes that train.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from t2i_experts.config import load_config
from t2i_experts.experts.runs import NodeRun, node_runs, write_configs
from t2i_experts.training.checkpoints import checkpoints
from t2i_experts.training.nodes import State, tree_status
from t2i_experts.training.trainer import train

TREE = [
    "experts={leaves: [E^1_0, E^1_1], images: 48}",
    "experts.overrides=[training.optimizer.warmup_images=16, training.preview.every_images=48]",
    "training.checkpoint_every_images=8",
    "training.log_every_images=8",
]


def bits(run: NodeRun) -> dict[str, bytes]:
    """The last checkpoint's files and the model's weights."""
    newest = checkpoints(run.output)[-1]
    files = [newest / f"{name}.safetensors" for name in ("network", "ema", "optimizer")]
    files += [run.model / "base64" / "diffusion_pytorch_model.safetensors", *sorted(run.output.glob("previews/*.png"))]
    return {str(file.relative_to(run.output)): file.read_bytes() for file in files}


def command(config: Path, log: Path) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "t2i_experts", "experts", "train", str(config), *TREE]
    with log.open("ab") as file:
        return subprocess.Popen(argv, stdout=file, stderr=file)


def children(process: int) -> list[int]:
    """Of a process, those that train."""
    return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_a_tree_that_is_killed_ends_in_the_same_bits(write_config: Callable[[str], Path], tmp_path: Path) -> None:
    undisturbed = node_runs(load_config(write_config("undisturbed"), TREE))
    write_configs(undisturbed)
    for run in undisturbed.values():  # by hand, from the files that anyone may train from
        train(load_config(run.config_file), progress=False)
    path, log = write_config("killed"), tmp_path / "log"
    runs: Mapping[str, NodeRun] = node_runs(load_config(path, TREE))
    generator = random.Random(1)
    for name in ("root", generator.choice(["E^1_0", "E^1_1"])):
        run = runs[name]
        process = command(path, log)
        while not checkpoints(run.output):
            assert process.poll() is None, log.read_text()
            time.sleep(0.005)
        time.sleep(generator.uniform(0, 0.4))
        victim = generator.choice([process.pid, *children(process.pid)])
        os.kill(victim, signal.SIGKILL)
        process.wait(120)
        if victim != process.pid:
            assert process.returncode == 1 and f"{name}: failed (killed by SIGKILL)" in log.read_text()
    assert command(path, log).wait(240) == 0, log.read_text()
    assert all(status.state is State.TRAINED for status in tree_status(runs).values())
    for name, run in runs.items():
        assert bits(run) == bits(undisturbed[name]), name
