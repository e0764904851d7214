"""The command line as a process: what it imports before it must, and how it ends."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

import t2i_experts
from t2i_experts.cli.importing import without_collecting

MISTAKE = """
import sys
from t2i_experts.cli.app import main
try:
    main(["generate", "x", "--steps", "0"])
except SystemExit as end:
    assert end.code == 2, end.code
heavy = {"torch", "numpy", "PIL", "transformers", "omegaconf", "yaml"} & set(sys.modules)
assert not heavy, f"a wrong option imports {heavy}"
"""

END = """
import atexit
import t2i_experts.__main__ as door
import t2i_experts.cli.app as app

class Kept:
    def __del__(self):
        print("taken apart")

kept = Kept()

def main():
    atexit.register(print, "handler", end="")
    print("output", end=" ")
    {end}

app.main = main
door.run()
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(t2i_experts.__file__).parents[1])}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)


def test_a_wrong_option_is_told_before_anything_large_is_imported() -> None:
    done = run(MISTAKE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "error: --steps=0 must be at least 1\n")


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("raise SystemExit(0)", 0, ""),
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit", 0, ""),
        ("raise SystemExit('no room')", 1, "no room\n"),
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
        ("raise ValueError('no room')", 1, "ValueError: no room\n"),
    ],
)
def test_the_process_ends_with_its_output_its_code_and_its_exit_handlers_and_takes_nothing_apart(end: str, code: int, said: str) -> None:
    done = run(END.replace("{end}", end))
    assert (done.returncode, done.stdout) == (code, "output handler")
    assert done.stderr.endswith(said) and bool(done.stderr) == bool(said)


@pytest.mark.parametrize("enabled", [True, False])
def test_collecting_goes_on_as_it_was(enabled: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(KeyError), without_collecting():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()
