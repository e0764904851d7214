"""The shell scripts over a fake interpreter that writes down what pip is asked for, in a checkout whose path has spaces."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FAKE_PYTHON = """#!/bin/sh
case "$1 $2" in
    "-m venv") mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
    "-m pip") shift 2; echo "pip $*" >> "$LOG"; test -z "$PIP_FAILS" ;;
    "-m "*) shift; echo "run $*" >> "$LOG" ;;
    *) exec "$REAL_PYTHON" "$@" ;;
esac
"""

Run = Callable[..., tuple[int, list[str], str]]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "a check out"
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    shutil.copytree(ROOT / ".ci", folder / ".ci")
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


@pytest.fixture
def run(checkout: Path, tmp_path: Path) -> Run:
    """Runs a script from another folder; returns its exit code, what was logged since the last run, and its stderr."""
    log, python, modules = tmp_path / "log", tmp_path / "python3", tmp_path / "modules"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    modules.mkdir()
    for name in ("pip", "ensurepip"):
        (modules / f"{name}.py").touch()

    def run(script: str, *arguments: str, **variables: str) -> tuple[int, list[str], str]:
        log.write_text("")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "T2I_"))}
        environment = {
            **kept,
            "PYTHON": str(python),
            "REAL_PYTHON": sys.executable,
            "LOG": str(log),
            "PYTHONPATH": str(modules),
            **variables,
        }
        command = ["bash", str(checkout / script), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        return done.returncode, log.read_text().splitlines(), done.stderr

    return run


def test_the_first_run_installs_and_the_second_does_not_touch_pip(run: Run, checkout: Path) -> None:
    code, (install, draw), _ = run("scripts/quickstart.sh")
    assert code == 0
    assert install.startswith("pip install ")
    assert f"--constraint {checkout}/scripts/constraints.txt --editable {checkout}" in install
    assert draw == f"run t2i_experts generate a red apple --out {checkout}/out"
    code, (draw,), _ = run("scripts/quickstart.sh", "two green pears", "--num", "4")
    assert code == 0
    assert draw == f"run t2i_experts generate two green pears --out {checkout}/out --num 4"


def test_options_without_a_prompt_keep_the_default_one(run: Run) -> None:
    _, log, _ = run("scripts/quickstart.sh", "--seed", "3")
    assert " a red apple " in log[-1]
    assert log[-1].endswith(" --seed 3")


@pytest.mark.parametrize("name", ["pyproject.toml", "scripts/constraints.txt"])
def test_a_changed_requirement_installs_again(run: Run, checkout: Path, name: str) -> None:
    run("scripts/quickstart.sh")
    with (checkout / name).open("a") as file:
        file.write("# changed\n")
    assert len(run("scripts/quickstart.sh")[1]) == 2
    assert len(run("scripts/quickstart.sh")[1]) == 1


def test_an_installation_for_tests_serves_the_quick_start_but_not_the_other_way_round(run: Run, checkout: Path) -> None:
    run("scripts/quickstart.sh")
    code, (install, *checks), _ = run(".ci/run", "-k", "order")
    assert code == 0
    assert install.endswith(f"--editable {checkout}[test]")
    assert [line.split()[1] for line in checks] == ["ruff", "ruff", "mypy", "pytest"]
    assert checks[-1].endswith("-k order")
    assert all(line.startswith("run ") for line in run("scripts/test.sh")[1] + run("scripts/quickstart.sh")[1])


def test_a_failed_installation_says_so_and_is_tried_again(run: Run) -> None:
    code, log, err = run("scripts/quickstart.sh", PIP_FAILS="yes")
    assert code == 1
    assert len(log) == 1
    assert "error: the installation failed" in err
    assert len(run("scripts/quickstart.sh")[1]) == 2


def test_torch_may_come_from_an_index_of_its_own_with_its_own_version(run: Run, checkout: Path) -> None:
    _, (torch, rest, _), _ = run("scripts/quickstart.sh", T2I_TORCH_INDEX="file:///wheels")
    assert torch.endswith("--index-url file:///wheels torch>=2.11 torchvision")
    assert "--index-url" not in rest
    constraints = checkout / ".venv" / "constraints.txt"
    assert f"--constraint {constraints}" in torch
    assert f"--constraint {constraints}" in rest
    dropped = set((checkout / "scripts/constraints.txt").read_text().splitlines()) - set(constraints.read_text().splitlines())
    assert {line.split("==")[0] for line in dropped} == {"torch", "torchvision", "setuptools"}


def test_without_a_python_that_is_new_enough_it_says_what_to_do(run: Run) -> None:
    code, log, err = run("scripts/quickstart.sh", PYTHON="/bin/false")
    assert code == 1
    assert log == []
    assert "no Python >= 3.11 found; tried: /bin/false" in err
    assert "PYTHON=" in err


def test_help_names_the_variables(run: Run, checkout: Path) -> None:
    code, log, _ = run("scripts/quickstart.sh", "--help")
    assert code == 0
    assert log == []
    assert not (checkout / ".venv").exists()
