"""Evaluations of a denoiser as CUDA graphs: one launch each, where hundreds take the CPU longer than the GPU takes to compute."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from t2i_experts.diffusion.guidance import prepare
from t2i_experts.types import Conditioning, Denoiser

_WARM_UP = 2  # evaluations before one is recorded: kernels are loaded and chosen, and compiled code is compiled


class GraphMemory:
    """What the graphs of several denoisers share, of which only one runs at a time: the memory for all that an evaluation makes, the stream
    that they are recorded on (memory that was used on one stream is not used again on another), and the turns that threads take."""

    def __init__(self) -> None:
        self.turn = threading.Lock()
        self._places: dict[torch.device, tuple[Any, torch.cuda.Stream]] = {}

    def on(self, device: torch.device) -> tuple[Any, torch.cuda.Stream]:
        """The pool and the stream of a device."""
        if device not in self._places:
            self._places[device] = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        return self._places[device]

    def leave(self, device: torch.device) -> None:
        """After a recording that failed, in whatever state: what is recorded next takes another pool and stream."""
        self._places.pop(device, None)


class GraphedDenoiser:
    """A `Denoiser` around another on CUDA, which records each kind of evaluation once and then replays it.

    A kind is given by the shapes of x and of the prepared conditioning; x, sigma and the prompt are copied into the tensors that the graph
    reads, on the device. What cannot be replayed is evaluated as ever: on other devices, with gradients, sigmas of (B,), a conditioning
    that is not prepared, and a network that CUDA cannot record, of which a warning tells.

    The weights are read where they lie: they may change, but not move. Threads take turns; all evaluations belong on one stream, with all
    of other denoisers that share the memory.
    """

    def __init__(self, denoiser: Denoiser, memory: GraphMemory | None = None) -> None:
        """memory: None: of its own."""
        self.denoiser = denoiser
        self._graphs: dict[Hashable, _Graph | None] = {}
        self._memory = memory or GraphMemory()

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        """What the denoiser inside makes of the conditioning."""
        return prepare(self.denoiser, conditioning)

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """The estimate of the denoiser inside, (B, C, H, W)."""
        if not x.is_cuda or sigma.ndim or not conditioning.projected or torch.is_grad_enabled():
            return self.denoiser(x, sigma, conditioning)
        computed_in = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        kind = (computed_in, x.shape, x.stride(), x.dtype, *((name, t.shape, t.dtype) for name, t in conditioning.projected.items()))
        with self._memory.turn:
            if kind not in self._graphs:
                with torch.inference_mode(False), torch.no_grad():  # so that other modes may write into what is made here
                    self._graphs[kind] = self._record(x, sigma, conditioning)
            graph = self._graphs[kind]
            return self.denoiser(x, sigma, conditioning) if graph is None else graph(x, sigma, conditioning)

    def _record(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> _Graph | None:
        try:
            with torch.cuda.stream(torch.cuda.current_stream(x.device)):  # which a failure may leave another than it was
                return _Graph(self.denoiser, x, sigma, conditioning, self._memory)
        except RuntimeError as error:
            self._memory.leave(x.device)
            warnings.warn(f"the denoiser cannot be recorded as a CUDA graph, and every kernel is launched by itself: {error}", stacklevel=3)
            return None


class _Graph:
    """One recorded evaluation, with the tensors that it reads and writes."""

    def __init__(self, denoiser: Denoiser, x: Tensor, sigma: Tensor, conditioning: Conditioning, memory: GraphMemory) -> None:
        """Raises RuntimeError for a denoiser that waits for the device."""
        self._x = torch.empty_like(x)
        self._sigma = torch.empty((), dtype=torch.float64, device=x.device)  # as samplers give it
        self._projected = {name: torch.empty_like(tensor) for name, tensor in conditioning.projected.items()}
        self._holds: Conditioning | None = None
        self._fill(x, sigma, conditioning)
        inputs = (self._x, self._sigma, Conditioning(conditioning.embeddings, self._projected))
        pool, stream = memory.on(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                denoiser(*inputs)
        torch.cuda.current_stream(x.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._denoised = denoiser(*inputs)

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        self._fill(x, sigma, conditioning)
        self._graph.replay()
        return self._denoised.clone()

    def _fill(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> None:
        self._x.copy_(x)
        if sigma.device == self._sigma.device:
            self._sigma.copy_(sigma)
        else:
            self._sigma.fill_(float(sigma))  # a number goes along with its kernel, and nothing waits
        if conditioning is not self._holds:
            torch._foreach_copy_(list(self._projected.values()), [conditioning.projected[name] for name in self._projected])
            self._holds = conditioning
