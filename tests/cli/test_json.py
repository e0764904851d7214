"""Every command that prints results prints them as one JSON document with --json; and what is no terminal gets no colour."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from t2i_experts.cli.app import COMMANDS, load, main

CLI = Callable[..., tuple[int, str, str]]

NO_RESULTS = {"completion"}
"""Prints a script for a shell."""


def _leaves() -> Iterator[tuple[str, Any]]:
    """Every command that can be run, by its whole name."""
    for name, command in COMMANDS.items():
        loaded = load(name, command)
        nested = getattr(loaded, "commands", None)
        yield from ((f"{name} {inner}", leaf) for inner, leaf in nested.items()) if nested else [(name, loaded)]


LEAVES = dict(_leaves())


@pytest.mark.parametrize("name", LEAVES)
def test_every_command_has_the_same_option(name: str) -> None:
    command = LEAVES[name]
    options = {option: parameter for parameter in command.params for option in parameter.opts}
    assert ("--json" in options) == (name not in NO_RESULTS)
    if name not in NO_RESULTS:
        assert options["--json"].help.startswith("Print one JSON document on stdout") and options["--json"].default is False


def test_stdout_is_one_document(cli: CLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Path, trained: Path) -> None:
    """One command after the other; stdout's only line is an object with the keys that are named."""
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    for i in range(3):
        Image.new("RGB", (16, 16), (80 * i, 9, 9)).save(f"pictures/{i}.png")
        Path(f"pictures/{i}.txt").write_text("a red square 猫\n", encoding="utf-8")
    shutil.copytree(trained, "run")
    Path("run.yaml").write_text(trained.with_suffix(".yaml").read_text().replace(f"output: {trained}", "output: run"))

    def document(*arguments: str) -> Any:
        code, out, _ = cli(*arguments, "--json")
        assert code == 0 and out.endswith("\n") and out.count("\n") == 1, arguments
        return json.loads(out)

    assert document("shards", "build", "pictures", "--out", "data")["samples"] == 3
    assert document("shards", "check", "data")["good"] is True
    assert document("shards", "check", "data", "--write-manifest")["manifest_written"] is True
    assert document("shards", "show", "data", "1")["captions"] == ["a red square 猫"]
    assert len(document("shards", "show", "data", "--num", "2", "--sheet", "sheet.png")["samples"]) == 2
    assert document("shards", "stats", "data")["samples"] == 3
    train = document("train", "run.yaml")
    assert train == {
        "output": "run", "model": "run/model", "images_seen": 64, "images": 64, "finished": True, "stopped_by": None, "parameters": 55463,
    }  # fmt: skip
    assert document("train", "run.yaml", "--quiet") == train
    assert document("report", "run")["report"] == "run/report.md"
    assert document("ema", "run", "--sigma-rel", "0.1", "--out", "other")["out"] == "other"
    pictures = document("generate", "a cube", "--model", str(model_folder), "--device", "cpu", "--steps", "1")["pictures"]
    assert [picture["path"] for picture in pictures] == ["pictures/a-cube-0.png"]
    assert document("eval", "nearest", "pictures", "--train", "pictures", "--device", "cpu")["copies"]["generated"] == 4
    assert document("experts", "plan", "run.yaml")["images"] == 64
    assert document("config", "show", "run.yaml")["training.images"] == {"value": 64, "origin": "run.yaml"}
    assert document("config", "check", "run.yaml", "training.seed=1") == {"config": "run.yaml", "ok": True}
    assert document("config", "diff", "run.yaml", "run") == {}
    assert "tiny/base64" in document("config", "list")
    assert document("config", "copy", "tiny/photos") == {"written": ["tiny/photos.yaml", "tiny/base64.yaml"]}
    assert "sampler" in document("plugins")["parts"]


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("variables", "coloured"),
    [({"TERM": "xterm"}, True), ({"TERM": "dumb"}, False), ({"TERM": "xterm", "NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True)],
)
def test_only_a_terminal_that_wants_it_gets_colour(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], coloured: bool) -> None:
    for name in ("NO_COLOR", "TERM", "T2I_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(SystemExit) as exit:
        main(["config", "show", "nowhere"])
    said = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert exit.value.code == 2 and "config file not found: nowhere" in said
    assert said.startswith("\x1b[31merror:\x1b[0m ") == coloured and ("\x1b" in said) == coloured
