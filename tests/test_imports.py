"""Importing must cost little and do nothing: no network, no weights, no logging set-up, and no torch behind `--help`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

NO_NETWORK = """
import socket

def refuse(*args, **kwargs):
    raise SystemExit(f"tried to reach the network: {args}")

socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse
"""

HELP = """
import contextlib, io, sys, time
import t2i_experts
from t2i_experts.cli.app import COMMANDS, load, main

def show(*argv):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([*argv, "--help"])
    heavy = {"torch", "numpy", "PIL", "transformers", "omegaconf", "rich", "pydantic"} & set(sys.modules)
    assert not heavy, f"{argv} --help imports {heavy}"
    return out.getvalue()

text = show()
assert not {command.target.split(":")[0] for command in COMMANDS.values()} & set(sys.modules), "the root's help imports its commands"
for name, command in COMMANDS.items():
    assert name in text and command.help in text
    assert "Usage: t2i-experts " + name in show(name)
    for nested in getattr(load(name, command), "commands", {}):
        assert f"Usage: t2i-experts {name} {nested}" in show(name, nested)
"""

MODULES = """
import importlib, logging, os, pkgutil, threading
import numpy, torch
import t2i_experts

root = logging.getLogger()
seeds = (torch.get_rng_state(), numpy.random.get_state()[1].copy())
before = (root.level, list(root.handlers), threading.active_count(), os.getcwd())
names = [module.name for module in pkgutil.walk_packages(t2i_experts.__path__, "t2i_experts.") if not module.name.endswith("__main__")]
for name in names:
    importlib.import_module(name)
assert before == (root.level, list(root.handlers), threading.active_count(), os.getcwd())
assert not [name for name in names if logging.getLogger(name).handlers]
assert not torch.cuda.is_initialized()
assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
assert torch.equal(seeds[0], torch.get_rng_state()) and (seeds[1] == numpy.random.get_state()[1]).all()
"""


def run(program: str, home: Path) -> None:
    """Runs a program in a process of its own, without network, in an empty home in which it must leave nothing."""
    root = Path(__file__).parents[1]
    environment = {**os.environ, "HOME": str(home), "HF_HOME": str(home), "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", NO_NETWORK + program], cwd=home, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stdout and not done.stderr, done.stdout + done.stderr
    assert not list(home.iterdir())


def test_help_of_every_command_imports_nothing_heavy(tmp_path: Path) -> None:
    run(HELP, tmp_path)


def test_every_module_imports_without_side_effects(tmp_path: Path) -> None:
    run(MODULES, tmp_path)
