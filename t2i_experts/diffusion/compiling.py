"""How denoisers are compiled: torch.compile with the choices of its code generator that suit this project's networks."""

from __future__ import annotations

from typing import Any

from torch import nn


def compile_denoiser(denoiser: nn.Module, *, training: bool, dynamic: bool | None = False, backend: str = "inductor") -> None:
    """Compiles a module in place, at its first call.

    training: with its backward pass; otherwise for evaluations, in which a reduction over few pixels stays one kernel: splitting it pays
    for large tensors, and costs a launch. dynamic: see torch.compile. backend: any of torch.compile's; the choices are inductor's.

    Fused expressions may grow longer than by default before they are written to memory: at the default the backward pass of every
    residual block writes and reads two float32 tensors of the size of its activations.
    """
    options: dict[str, Any] = {"realize_opcount_threshold": 100}
    if not training:
        options["split_reductions"] = False
    denoiser.compile(backend=backend, dynamic=dynamic, options=options if backend == "inductor" else None)
