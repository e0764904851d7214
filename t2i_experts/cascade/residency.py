"""Which networks are on the device, where not all of them fit: those of now and of next, which comes while the one of now computes.

A picture takes its networks in an order that is known: the encoders, the experts from high noise to low, and the encoders again. So
whatever is needed last leaves first: when the experts begin that is the encoders.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from t2i_experts.cascade.model_folder import LoadedModel
from t2i_experts.conditioning.conditioner import TextConditioner
from t2i_experts.diffusion.guidance import prepare
from t2i_experts.experts.blend import RatioBlend
from t2i_experts.experts.ensemble import ExpertEnsemble, each_network
from t2i_experts.types import Conditioning, Denoiser

FREE_FOR_WEIGHTS = 0.75
"""Of a GPU's free memory; the rest is for what networks compute."""


class Budget:
    """How much of a device encoders and networks may take.

    memory: in bytes; None: on CUDA all of what the encoders take, which come first, and `FREE_FOR_WEIGHTS` of what they leave; elsewhere
    there is no bound. exceeded: the bound, if all of them together exceed it.
    """

    def __init__(self, device: torch.device, memory: int | None) -> None:
        self.exceeded: int | None = None
        self._device = device
        self._memory = memory

    def networks_on(self, conditioner: TextConditioner, networks: int) -> torch.device:
        """Where networks of so many bytes are to be read to: the device, or the host, from which they are to take turns."""
        encoders = weight_bytes(encoder_modules(conditioner))
        bound = self._memory
        if bound is None and self._device.type == "cuda":
            bound = encoders + int(FREE_FOR_WEIGHTS * torch.cuda.mem_get_info(self._device)[0])
        self.exceeded = bound if bound is not None and encoders + networks > bound else None
        return self._device if self.exceeded is None else torch.device("cpu")


def encoder_modules(conditioner: TextConditioner) -> list[nn.Module]:
    """The models of all encoders, some of which may be the same."""
    return [encoder.model for encoder in conditioner.encoders.values()]


def weight_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of all their weights, each counted once."""
    return sum(tensor.nbytes for tensor in _tensors(modules))


class Guest:
    """Modules that are on the device together, or not at all. At home they are on the host, in page-locked memory if the device is CUDA."""

    def __init__(self, modules: Iterable[nn.Module], device: torch.device) -> None:
        """Brings them home, wherever they are."""
        self._tensors = _tensors(modules)
        self._device = device
        self._home = [_at_home(tensor, device) for tensor in self._tensors]
        self._arrived: torch.cuda.Event | None = None
        self.bytes = sum(tensor.nbytes for tensor in self._home)
        self.leave()

    def arrive(self, stream: torch.cuda.Stream | None) -> None:
        """Begins to copy them to the device, on a stream of CUDA beside what is being computed."""
        with torch.cuda.stream(stream):  # with None it does nothing
            for tensor, home in zip(self._tensors, self._home, strict=True):
                tensor.data = home.to(self._device, non_blocking=True, copy=True)
            self._arrived = stream.record_event() if stream is not None else None

    def wait(self) -> None:
        """Lets the current stream wait until they are there; this thread does not."""
        if self._arrived is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(self._arrived)
            for tensor in self._tensors:
                tensor.data.record_stream(current)  # their memory is not used again before what is computed with them is done
            self._arrived = None

    def leave(self) -> None:
        """Frees the device's memory: weights do not change, so there is nothing to bring home."""
        for tensor, home in zip(self._tensors, self._home, strict=True):
            tensor.data = home
        self._arrived = None


class Residency:
    """Lets guests in and out, so that the weights on the device stay within a budget, unless the one guest that evaluates exceeds it.

    path: the guests in the order in which a picture needs them, over and over; one may come several times.
    """

    def __init__(self, path: Sequence[Guest], device: torch.device, budget: int) -> None:
        self._path = path
        self._at = len(path) - 1
        self._budget = budget
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.here: list[Guest] = []
        """The guests that are on the device, or on the way."""

    def enter(self, guest: Guest) -> None:
        """Returns when `guest` may compute on the current stream, and lets the one that comes after it in, if both fit."""
        if self.here and self._path[self._at] is guest:
            return
        self._at = (self._at + self._until(guest)) % len(self._path)
        self._let_in(guest, keep=[guest])
        guest.wait()
        then = self._path[(self._at + 1) % len(self._path)]
        if then is not guest and guest.bytes + then.bytes <= self._budget:
            self._let_in(then, keep=[guest, then])

    def _let_in(self, guest: Guest, keep: Collection[Guest]) -> None:
        if guest in self.here:
            return
        while sum(one.bytes for one in self.here) + guest.bytes > self._budget:
            others = [one for one in self.here if one not in keep]
            if not others:
                break
            last = max(others, key=self._until)
            last.leave()
            self.here.remove(last)
        guest.arrive(self._stream)
        self.here.append(guest)

    def _until(self, guest: Guest) -> int:
        """How many places of the path further on this guest is needed next."""
        return next(steps for steps in range(1, len(self._path) + 1) if self._path[(self._at + steps) % len(self._path)] is guest)


class Visitor:
    """A `Denoiser` whose network is let in before it computes."""

    def __init__(self, network: Denoiser, guest: Guest, residency: Residency) -> None:
        self.network = network
        self._guest = guest
        self._residency = residency

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        """What the network makes of the conditioning."""
        self._residency.enter(self._guest)
        return prepare(self.network, conditioning)

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's estimate."""
        self._residency.enter(self._guest)
        return self.network(x, sigma, conditioning)


class VisitingConditioner(TextConditioner):
    """The same encoders, let in before they are asked."""

    def __init__(self, conditioner: TextConditioner, guest: Guest, residency: Residency) -> None:
        super().__init__(conditioner.encoders, conditioner._configs, conditioner._root, conditioner._fingerprints)
        self._guest = guest
        self._residency = residency

    def _encode(self, *inputs: object) -> Conditioning:
        self._residency.enter(self._guest)
        return super()._encode(*inputs)  # type: ignore[arg-type]

    def null(self, batch: int = 1) -> Conditioning:
        """See `TextConditioner`; on the device, too."""
        self._residency.enter(self._guest)
        return super().null(batch)


def take_turns(model: LoadedModel, device: torch.device, budget: int) -> LoadedModel:
    """The same model on `device`, in which encoders and networks, wherever they are now, take turns within so many bytes.

    Its codec stays where it is. Nothing else may compute with these networks at the same time.
    """
    (name, stage), *_ = model.stages.items()
    denoiser = stage.denoiser
    chosen = [expert for _, expert in reversed(denoiser.experts)] if isinstance(denoiser, ExpertEnsemble) else [denoiser]
    guests = {id(network): Guest([network], device) for network in chosen if isinstance(network, nn.Module)}
    if isinstance(denoiser, RatioBlend):  # its two experts answer together, and come together
        guests |= dict.fromkeys((id(denoiser.high), id(denoiser.low)), guests[id(denoiser)])
    encoders = Guest(encoder_modules(model.conditioner), device)
    residency = Residency([encoders, *(guests[id(network)] for network in chosen)], device, budget)
    visiting = each_network(denoiser, lambda network: Visitor(network, guests[id(network)], residency))
    conditioner = VisitingConditioner(model.conditioner, encoders, residency)
    return replace(model, stages={name: replace(stage, denoiser=visiting)}, conditioner=conditioner)


def _tensors(modules: Iterable[nn.Module]) -> list[Tensor]:
    return list({id(tensor): tensor for module in modules for tensor in (*module.parameters(), *module.buffers())}.values())


def _at_home(tensor: Tensor, device: torch.device) -> Tensor:
    home = tensor.detach().cpu()
    return home.pin_memory() if device.type == "cuda" else home
