"""Whole processes, from their start to their end: help, a mistake, a picture."""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch

from t2i_experts.bench.machine import describe
from t2i_experts.bench.result import Result, Row
from t2i_experts.bench.timing import interleave

_CPU = torch.device("cpu")
_OWN = (sys.executable, "-m", "t2i_experts")
_TOOLS = ("accelerate", "hf")  # the first that is installed is compared with
_LIBRARIES = "import open_clip, torch; from transformers import T5EncoderModel"
_DIFFUSERS = "from diffusers import IFPipeline; from transformers import T5EncoderModel"


@dataclass(frozen=True)
class Process:
    """A command that is run to its end as often as it is called. cpu: seconds of user and system time of each run."""

    command: Sequence[str]
    code: int = 0
    cpu: list[float] = field(default_factory=list)

    def __call__(self) -> None:
        """Raises RuntimeError if it ends with another exit code than `code`."""
        path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(self.command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode != self.code:
            raise RuntimeError(f"{' '.join(self.command)} ended with {done.returncode} instead of {self.code}: {done.stderr.strip()}")
        self.cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def bench_startup(helps: Sequence[Sequence[str]], *, pictures: int = 5, alone: bool = False, repeats: int = 10) -> Result:
    """Processes that take turns, each after a run that does not count. helps: commands whose help is shown, such as ("shards", "build").

    What needs no torch is compared with the help of Accelerate's command, or the hub's; its floor is `python -c pass`. A picture, 64 px of
    the embedded model in 25 steps, is compared with the import of diffusers' pipeline, which has then drawn nothing; its floor is the
    import of the libraries of its encoders. What is not installed is left out. pictures: how often one is drawn; 0: never. alone: nothing
    of others is run but Python itself.
    """
    if pictures < 0:
        raise ValueError(f"--pictures={pictures} must not be negative")
    tools = {f"{tool} --help": (path, "--help") for tool in _TOOLS if not alone and (path := _installed(tool))}
    quick = {
        "python -c pass": Process((sys.executable, "-c", "pass")),
        **{name: Process(command) for name, command in tools.items()},
        **{" ".join(words): Process((*_OWN, *words)) for words in [("--help",), *((*names, "--help") for names in helps)]},
        "generate x --steps 0": Process((*_OWN, "generate", "x", "--steps", "0"), code=2),
    }
    rows = _rows(quick, repeats, floor="python -c pass", compared=next(iter(tools), None))
    if pictures:
        with tempfile.TemporaryDirectory() as folder:
            slow = {
                "import T5, CLIP": Process((sys.executable, "-c", _LIBRARIES)),
                **({"import IFPipeline": Process((sys.executable, "-c", _DIFFUSERS))} if find_spec("diffusers") and not alone else {}),
                "generate x": Process((*_OWN, "generate", "x", "--out", folder)),
            }
            rows += _rows(slow, pictures, floor="import T5, CLIP", compared="import IFPipeline")
    return Result("startup", describe(_CPU), {"repeats": repeats, "pictures": pictures, "python": sys.version.split()[0]}, rows)


def _installed(tool: str) -> str | None:
    """The path of a command of this Python's environment."""
    return shutil.which(tool, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def _rows(processes: Mapping[str, Process], repeats: int, *, floor: str, compared: str | None) -> list[Row]:
    """A row for each; this package's own with the ratio to the one that they are compared with."""
    timings = interleave(processes, _CPU, repeats=repeats, warmup=1)
    rows = []
    for name, process in processes.items():
        own = process.command[: len(_OWN)] == _OWN
        rows.append(
            Row(
                name,
                timings[name],
                ratio=timings[compared].median / timings[name].median if own and compared in timings else None,
                floor=timings[name].median / timings[floor].median if own else None,
                more={"CPU s": statistics.median(process.cpu[1:])},
            )
        )
    return rows
