"""What a shell is told at the Tab key, by the protocol of the scripts that `t2i-experts completion` prints."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import t2i_experts
from t2i_experts.cli.app import COMMANDS, COMPLETE, PROGRAM
from t2i_experts.cli.completion import SHELLS
from t2i_experts.config import shipped_configs

CLI = Callable[..., tuple[int, str, str]]
Complete = Callable[..., list[str]]


@pytest.fixture
def complete(cli: CLI, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Complete:
    """complete(*words) -> what bash may put in the place of the last one; in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> list[str]:
        with monkeypatch.context() as patch:
            patch.setenv(COMPLETE, "complete_bash")
            patch.setenv("COMP_WORDS", "\n".join([PROGRAM, *words]))
            patch.setenv("COMP_CWORD", str(len(words)))
            code, out, err = cli()
        assert (code, err) == (0, "")
        return out.split()

    return run


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_for_this_program_and_asks_by_the_variable_that_it_answers(cli: CLI, shell: str) -> None:
    code, out, err = cli("completion", shell)
    assert (code, err) == (0, "")
    assert f"{COMPLETE}=complete_{shell}" in out and re.search(rf"\b(complete|compdef)\b.* {PROGRAM}\b", out)


def test_commands_and_options(complete: Complete) -> None:
    assert complete("") == list(COMMANDS)
    assert complete("re") == ["report"]
    assert complete("--deb") == ["--debug"]
    assert {"build", "check", "show", "stats"} <= set(complete("shards", ""))
    assert complete("config", "c") == ["check", "copy"]
    assert complete("generate", "'a red apple'", "--gui") == ["--guidance"]
    assert "--resize" in complete("shards", "build", "pictures", "--out", "x", "--")
    assert complete("generat", "--") and complete("nonsense", "sh"), "a slip in the line is no error here"


def test_configs_are_shipped_names_and_yaml_files(complete: Complete) -> None:
    assert complete("train", "") == list(shipped_configs())
    Path("mine.yaml").touch()
    Path("tiny").mkdir()
    Path("tiny/own.yaml").touch()
    assert complete("train", "ti") == ["tiny/base64", "tiny/experts", "tiny/photos"]
    assert complete("config", "show", "m") == ["mine.yaml"]
    assert complete("config", "diff", "mine.yaml", "tiny/") == ["tiny/base64", "tiny/experts", "tiny/photos", "tiny/own.yaml"]
    assert complete("config", "copy", "mi") == [], "which the shell takes for files"
    assert complete("shards", "stats", "data", "--config", "e") == ["ediffi/base64", "ediffi/experts", "emoji/base64", "emoji/experts"]
    assert complete("train", "nothing/") == []


def test_models_and_samplers(complete: Complete) -> None:
    for folder in ("runs/photos/model", "runs/photos/best", "runs/other", "flat", "[odd]"):
        Path(folder).mkdir(parents=True)
    for folder in ("runs/photos/model", "runs/photos/best", "flat", "[odd]"):
        Path(folder, "model_index.json").touch()
    assert complete("generate", "a", "--model", "") == ["[odd]", "flat", "runs/photos/best", "runs/photos/model"]
    assert complete("generate", "a", "--model", "runs/photos/m") == ["runs/photos/model"]
    assert complete("generate", "a", "--model", "[o") == ["[odd]"]
    assert complete("generate", "a", "--sampler", "") == ["dpmpp_2m", "euler", "heun"]
    assert complete("generate", "a", "--sampler", "h") == ["heun"]
    assert complete("eval", "score", "a", "--metric", "") == ["clip"]
    assert complete("eval", "nearest", "a", "--features", "") == ["pixels", "tiles", *complete("eval", "fid", "a", "--features", "")]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_itself_completes_a_line_without_torch(tmp_path: Path) -> None:
    """The script's function, called as bash calls it, with a program that refuses to import torch."""
    program = tmp_path / PROGRAM
    code = "import sys; sys.modules['torch'] = None; from t2i_experts.cli.app import main; main()"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{code}"\n')
    program.chmod(0o755)
    script = f"""
        eval "$({sys.executable} -m t2i_experts completion bash)"
        complete -p {PROGRAM}
        COMP_WORDS=({PROGRAM} train "tiny/"); COMP_CWORD=2
        _t2i_experts_completion {PROGRAM}
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(Path(t2i_experts.__file__).parents[1])}
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, env={**os.environ, **path}, cwd=tmp_path)
    assert done.stderr == "" and done.stdout.splitlines()[1:] == ["tiny/base64", "tiny/experts", "tiny/photos"]
    assert "-F _t2i_experts_completion" in done.stdout.splitlines()[0]
