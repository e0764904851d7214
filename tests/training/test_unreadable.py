"""Runs over shards in which some samples turn out unreadable: they go on, the same however they are cut, and say so once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from t2i_experts.config import load_config
from t2i_experts.shards.index import scan
from t2i_experts.shards.reader import Unreadable
from t2i_experts.training.checkpoints import checkpoints
from t2i_experts.training.trainer import train
from t2i_experts.training.unreadable import UnreadableSamples

WriteConfig = Callable[[str], Path]


@pytest.fixture
def broken(shards: Path, tmp_path: Path) -> list[str]:
    """Overrides that name copies of the shards, in which 4 of 40 training samples and 2 of 8 validation samples are broken."""
    for name, keys in (("train", range(0, 40, 11)), ("validation", (2, 5))):
        shutil.copytree(shards / name, tmp_path / name)
        for tar in (tmp_path / name).glob("*.tar"):
            for row in scan(tar).rows:
                if int(row.key) in keys:
                    with open(tar, "r+b") as file:
                        file.seek(row.image[0])
                        file.write(bytes(row.image[1]))
    return [f"data.train=[{tmp_path / 'train'}]", f"data.validation={tmp_path / 'validation'}", "data.max_unreadable=0.5"]


def events(root: Path, kind: str) -> list[dict[str, object]]:
    return [event for line in (root / "log.jsonl").read_text().splitlines() if (event := json.loads(line))["event"] == kind]


def named(root: Path) -> list[tuple[str, object]]:
    return sorted((Path(str(event["shard"])).parent.name, event["key"]) for event in events(root, "unreadable"))


EVERYTHING = [("train", f"{i:06d}") for i in range(0, 40, 11)] + [("validation", "000002"), ("validation", "000005")]


def test_a_run_goes_on_and_names_each_sample_once(
    write_config: WriteConfig, tmp_path: Path, broken: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*broken, "training.images=96", "training.checkpoint_every_images=16", "training.log_every_images=48"]
    train(load_config(write_config("unbroken"), overrides), progress=False)
    stderr = capsys.readouterr().err
    assert stderr.count("cannot be read") == 5 and "no picture" in stderr and "any further unreadable samples" in stderr
    assert named(tmp_path / "unbroken") == EVERYTHING
    assert [event["images"] for event in events(tmp_path / "unbroken", "validation")] == [6, 6, 6]
    train(load_config(write_config("cut"), [*overrides, "training.images=16"]), progress=False)
    train(load_config(write_config("cut"), [*overrides, "data.workers=2"]), progress=False)
    for name in ("network", "ema", "optimizer"):
        whole, cut = ((checkpoints(tmp_path / run)[-1] / f"{name}.safetensors").read_bytes() for run in ("unbroken", "cut"))
        assert whole == cut
    assert named(tmp_path / "cut") == EVERYTHING


@pytest.mark.slow
def test_all_processes_report_to_one_log(write_config: WriteConfig, tmp_path: Path, broken: list[str]) -> None:
    train(load_config(write_config("one"), [*broken, "training.accumulation=2", "training.images=48"]), progress=False)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "t2i_experts", "train"]
    arguments = [str(write_config("two")), *broken, "training.images=48", "--quiet"]
    two = subprocess.run([*command, *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=180)
    assert two.returncode == 0, two.stderr.decode()
    assert named(tmp_path / "two") == named(tmp_path / "one") == EVERYTHING
    first, second = (load_file(checkpoints(tmp_path / name)[-1] / "network.safetensors") for name in ("one", "two"))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=1e-4, rtol=1e-3, msg=name)
    one, both = (events(tmp_path / name, "validation")[-1] for name in ("one", "two"))
    assert both["images"] == one["images"] == 6 and both["loss"] == pytest.approx(one["loss"], rel=1e-3)


def test_too_much_is_an_error_that_says_what_to_do(write_config: WriteConfig, tmp_path: Path, broken: list[str]) -> None:
    overrides = [*broken, "data.max_unreadable=0"]
    with pytest.raises(ValueError, match=r"data\.max_unreadable=0\.0 allows\. .*log\.jsonl names them; repair") as caught:
        train(load_config(write_config("run"), overrides), progress=False)
    assert "samples drawn in this run could not be read" in str(caught.value)
    assert events(tmp_path / "run", "unreadable")
    again = train(load_config(write_config("run"), [*overrides, "data.max_unreadable=0.1"]), progress=False)
    assert (again / "model_index.json").is_file()
    with pytest.raises(ValueError, match=r"data\.max_unreadable=1\.0 must lie in"):
        load_config(write_config("run"), ["data.max_unreadable=1"])


class Log:
    """What `UnreadableSamples` needs of a run's log."""

    path = Path("log.jsonl")

    def events(self, kind: str) -> list[dict[str, object]]:
        return []

    def event(self, kind: str, images_seen: int, **facts: object) -> None: ...

    def warn(self, text: str) -> None: ...


def test_one_tar_alone_is_not_too_much_however_large() -> None:
    """The rest of a tar that is read as a stream counts as many draws at once; at the start of a run that would be a large share."""
    unreadable = UnreadableSamples(Accelerator(cpu=True), Log(), images_seen=0, max_share=0.1)  # type: ignore[arg-type]
    unreadable.note([Unreadable("http://a/0.tar", None, "gone", draws=10_000)], drawn=True)
    unreadable.tell(64)
    unreadable.note([Unreadable("http://a/1.tar", None, "gone", draws=10_000)], drawn=True)
    unreadable.tell(128)
    unreadable.note([Unreadable("http://a/2.tar", None, "gone", draws=10_000)], drawn=True)
    with pytest.raises(ValueError, match=r"more than data\.max_unreadable=0\.1"):
        unreadable.tell(192)
