"""How long the compiler keeps a first call waiting: with an empty cache, with what that left there, and for more networks of one shape."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from t2i_experts.bench.loops import OwnLoop, add_batch_gradients
from t2i_experts.bench.machine import bench_device, describe
from t2i_experts.bench.network import Size, captions, noise_images, own_network, size_named
from t2i_experts.bench.result import Result, Row
from t2i_experts.bench.timing import Timing
from t2i_experts.cascade.device import synchronize
from t2i_experts.diffusion.compiling import compile_denoiser

NETWORKS = 3
"""As many as a level of the tree of experts that eDiff-I samples from."""

_CHILD = "import sys; from t2i_experts.bench.compile import tell_first_calls; tell_first_calls(*sys.argv[1:])"


def bench_compile(what: str, network: str, batch: int, device: torch.device, *, backend: str = "inductor") -> Result:
    """The first call, until the device is done, in two processes of their own that share a new folder for the compiler's cache.

    what: `step`, forward and backward pass of training, or `evaluation`, as sampling makes it. backend: of torch.compile. Raises
    ValueError for settings that are out of range, RuntimeError with what a process said that failed.
    """
    size_named(network)
    if what not in _FIRST:
        raise ValueError(f"--what={what!r} must be one of {', '.join(_FIRST)}")
    if batch < 1:
        raise ValueError(f"--batch={batch} must be at least 1")
    if backend not in (known := torch.compiler.list_backends(exclude_tags=())):
        raise ValueError(f"--backend={backend!r} must be one of {', '.join(known)}")
    with tempfile.TemporaryDirectory(prefix="t2i-bench-compile-") as cache:
        found = {name: _first_calls_elsewhere(Path(cache), what, network, batch, device, backend) for name in ("cold", "from cache")}
    rows = []
    for name, calls in found.items():
        first, graphs = calls["seconds"][0], calls["graphs"]
        more = {"three networks / one": sum(calls["seconds"]) / first, "graphs": graphs[0], "recompiles": graphs[-1] - graphs[0]}
        rows.append(Row(name, Timing((first,)), ratio=None if name == "cold" else found["cold"]["seconds"][0] / first, more=more))
    settings = {"what": what, "network": network, "batch": batch, "backend": backend}
    return Result("compile", describe(device), settings, rows)


def _first_calls_elsewhere(cache: Path, what: str, network: str, batch: int, device: torch.device, backend: str) -> dict[str, Any]:
    """`first_calls` in a new process with this folder for all that compilers keep."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "TRITON_CACHE_DIR": str(cache / "triton")}
    command = [sys.executable, "-c", _CHILD, what, network, str(batch), str(device), backend]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the process that compiles ended with code {done.returncode}:\n{done.stderr[-4000:]}")
    calls: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return calls


def tell_first_calls(what: str, network: str, batch: str, device: str, backend: str) -> None:
    """Prints `first_calls` as a line of JSON."""
    print(json.dumps(first_calls(what, size_named(network), int(batch), bench_device(device), backend)))


def first_calls(what: str, size: Size, batch: int, device: torch.device, backend: str) -> dict[str, Any]:
    """The first call of each of `NETWORKS` networks with weights of their own. seconds: of each; graphs: compiled so far, after each."""
    counters = torch._dynamo.utils.counters["stats"]
    torch.zeros(64, 64, device=device) @ torch.zeros(64, 64, device=device)  # the device's own start-up does not count
    seconds, graphs = [], []
    for _ in range(NETWORKS):
        call = _FIRST[what](size, batch, device, backend)
        synchronize(device)
        started = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
        graphs.append(counters["unique_graphs"])
    return {"seconds": seconds, "graphs": graphs}


def _step(size: Size, batch: int, device: torch.device, backend: str) -> Callable[[], object]:
    loop = OwnLoop(size, batch, device, backend)
    return lambda: add_batch_gradients(loop)


def _evaluation(size: Size, batch: int, device: torch.device, backend: str) -> Callable[[], object]:
    network = own_network(size, device).eval().to(torch.bfloat16)
    x, sigma, text = noise_images(size, batch, device, 0), torch.ones(batch, device=device), captions(batch, device)
    with torch.no_grad():
        prepared = network.prepare(text)
    compile_denoiser(network, training=False, backend=backend)

    def call() -> object:
        with torch.no_grad():
            return network(x, sigma, prepared)

    return call


_FIRST = {"step": _step, "evaluation": _evaluation}
