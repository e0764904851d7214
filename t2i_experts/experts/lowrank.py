"""Experts as differences of low rank from their root: W_expert ~ W_root + up @ down.

Fine-tuning moves weights by differences whose singular values fall off (Aghajanyan et al. 2012.13255, Hu et al. 2106.09685), and TimeStep
Master (2503.07416) trains experts for ranges of noise of this form. N experts then cost one network and N small differences. Here an expert
that was trained whole is cut down by singular value decomposition; `lowrank_training.py` trains the factors themselves.

A linear layer's weight is a matrix (out, in), a convolution's (out, in * k * k). What is no matrix, and a matrix whose factors would not be
smaller than itself, is stored whole, as the expert has it; what is equal to the root's is not stored at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from t2i_experts.experts.states import State, count_bytes, fingerprint, refuse_misfit


@dataclass(frozen=True, eq=False)
class Factors:
    """The difference up @ down of a matrix. up: (out, rank); down: (rank, in), both in the matrix's type, of about the same norm."""

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        """How many singular values there are."""
        return self.up.shape[1]

    def product(self, shape: Sequence[int]) -> Tensor:
        """up @ down in float64, of the shape of the tensor that it is added to."""
        return (self.up.double() @ self.down.double()).reshape(*shape)


@dataclass(frozen=True, eq=False)
class LowRankDifference:
    """An expert's weights as what they have beyond the root's.

    root: the root's `fingerprint`. factors: of matrices, by name. whole: tensors as they are in the expert, by name. All others are the
    root's.
    """

    root: str
    factors: Mapping[str, Factors]
    whole: State

    @property
    def bytes(self) -> int:
        """Of all that is stored."""
        factors = {f"{name} {i}": t for name, f in self.factors.items() for i, t in enumerate((f.up, f.down))}
        return count_bytes(factors) + count_bytes(self.whole)

    @property
    def names(self) -> frozenset[str]:
        """The tensors that are not the root's."""
        return frozenset(self.factors) | frozenset(self.whole)

    def tensor(self, name: str, own: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The expert's tensor of that name, where the root has `own`: `own` itself, or the one that is stored, if it is whole.

        Otherwise own + up @ down, computed in float64 on its device, where the factors must be too, and rounded to `dtype`, by default
        own's. A root in bfloat16 needs a wider one: its own type would round away what is small beside the weight.
        """
        if name in self.whole:
            return self.whole[name]
        if name in self.factors:
            return (own.double() + self.factors[name].product(own.shape)).to(dtype or own.dtype)
        return own

    def to(self, to: torch.device | torch.dtype) -> LowRankDifference:
        """A copy on a device, or with its floating-point tensors rounded to another type."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(to, copy=True) if isinstance(to, torch.device) or tensor.is_floating_point() else tensor.clone()

        factors = {name: Factors(moved(one.up), moved(one.down)) for name, one in self.factors.items()}
        return replace(self, factors=factors, whole={name: moved(tensor) for name, tensor in self.whole.items()})


def refuse_other_root(root: State, difference: LowRankDifference, found: str | None = None) -> None:
    """Raises ValueError for another root than the one that a difference was taken from, and for tensors that it does not have so.

    found: the root's `fingerprint`, if it is known already.
    """
    found = found or fingerprint(root)
    if found != difference.root:
        raise ValueError(f"the difference was taken from the root {difference.root}, and these weights are {found}")
    sizes: dict[str, tuple[int, ...]] = {name: (f.up.shape[0], f.down.shape[1]) for name, f in difference.factors.items()}
    own = {name: tuple(root[name].flatten(1).shape) for name in sizes if name in root and root[name].ndim > 1}
    sizes |= {name: tuple(tensor.shape) for name, tensor in difference.whole.items()}
    own |= {name: tuple(root[name].shape) for name in difference.whole if name in root}
    if wrong := sorted(name for name in sizes if sizes[name] != own.get(name)):
        raise ValueError(f"the difference has {wrong[0]} of {sizes[wrong[0]]}, and the root {own.get(wrong[0], 'none that is so')}")


def restore(root: State, difference: LowRankDifference, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The expert's weights, see `LowRankDifference.tensor`: bit for bit where stored whole.

    Raises ValueError as `refuse_other_root` does.
    """
    refuse_other_root(root, difference)
    return {name: difference.tensor(name, own, dtype).clone() for name, own in root.items()}


def relative_error(root: State, difference: LowRankDifference, expert: State) -> float:
    """How far what is restored in float32 is from the expert: over all matrices, relative to the expert's distance from the root; 0 if
    there is none."""
    lost = whole = 0.0
    for name, own in root.items():
        if own.ndim > 1 and own.is_floating_point():
            wanted = expert[name].double()
            lost += float((difference.tensor(name, own, torch.float32).double() - wanted).square().sum())
            whole += float((own.double() - wanted).square().sum())
    return math.sqrt(lost / whole) if whole else 0.0


def extract(root: State, expert: State, *, rank: int | None = None, budget_bytes: int | None = None) -> LowRankDifference:
    """The difference of an expert from its root with `rank` singular values of each matrix, or as many, and of those matrices, as are
    worth most in `budget_bytes`. See `Decomposition`, which does the work once for several of them.

    Raises ValueError unless exactly one of the two is given, and as `Decomposition` does.
    """
    if (rank is None) == (budget_bytes is None):
        raise ValueError(f"rank={rank}, budget_bytes={budget_bytes}: give exactly one of the two")
    decomposition = Decomposition(root, expert)
    return decomposition.at_rank(rank) if rank is not None else decomposition.within(budget_bytes or 0)


@dataclass(frozen=True, eq=False)
class _Spectrum:
    """The decomposition of one matrix's difference, u @ diag(s) @ v, with `whole`, the expert's tensor in the type that is stored."""

    whole: Tensor
    u: Tensor
    s: Tensor
    v: Tensor

    @classmethod
    def of(cls, root: Tensor, expert: Tensor, whole: Tensor) -> _Spectrum:
        difference = (expert.double() - root.double().to(expert.device)).flatten(1)
        u, s, v = torch.linalg.svd(difference, full_matrices=False)
        return cls(whole, u.float(), s, v.float())

    @property
    def component_bytes(self) -> int:
        """Of one singular value's vectors."""
        return (self.u.shape[0] + self.v.shape[1]) * self.whole.element_size()

    @cached_property
    def energies(self) -> Tensor:
        """Squared singular values, descending: what each component leaves out of the squared error."""
        return self.s.square().cpu()

    def bytes(self, rank: int) -> int:
        """What the matrix costs at a rank: that of its factors, but never more than it costs whole."""
        return min(rank * self.component_bytes, count_bytes({"": self.whole}))

    def is_whole(self, rank: int) -> bool:
        return rank > 0 and rank * self.component_bytes >= count_bytes({"": self.whole})

    def lost(self, rank: int) -> float:
        """The squared error at a rank, without that of the type that is stored."""
        return 0.0 if self.is_whole(rank) else float(self.energies[rank:].sum())

    def factors(self, rank: int) -> Factors:
        root, dtype = self.s[:rank].sqrt().float(), self.whole.dtype
        return Factors((self.u[:, :rank] * root).to(dtype).contiguous(), (root[:, None] * self.v[:rank]).to(dtype).contiguous())


@dataclass(frozen=True)
class RankError:
    """What a difference costs and how far it is off: error, relative to the whole difference, 0 to 1, root of the sum of squares."""

    rank: int
    bytes: int
    error: float


class Decomposition:
    """The singular values of an expert's difference from its root, matrix by matrix, from which differences of any size are cut.

    root: as it is stored. dtype: that floating-point tensors of the difference are stored in; None: the expert's.

    Raises ValueError naming the first tensor that does not fit.
    """

    def __init__(self, root: State, expert: State, dtype: torch.dtype | None = None) -> None:
        refuse_misfit(root, expert, "the expert")
        self.root = fingerprint(root)
        kept = {name: tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor for name, tensor in expert.items()}
        changed = {name: tensor for name, tensor in kept.items() if not torch.equal(tensor, root[name].to(tensor))}
        matrices = {name: tensor for name, tensor in changed.items() if tensor.ndim > 1 and tensor.is_floating_point()}
        self._spectra = {name: _Spectrum.of(root[name], expert[name], tensor) for name, tensor in matrices.items()}
        self._vectors = {name: tensor.clone() for name, tensor in changed.items() if name not in self._spectra}

    @property
    def smallest_bytes(self) -> int:
        """Of what is no matrix, and always stored."""
        return count_bytes(self._vectors)

    @property
    def largest_rank(self) -> int:
        """From this rank on, every matrix is stored whole and the expert is restored bit for bit."""
        return max((math.ceil(count_bytes({"": s.whole}) / s.component_bytes) for s in self._spectra.values()), default=0)

    def at_rank(self, rank: int) -> LowRankDifference:
        """The same rank for every matrix. Raises ValueError for a negative one."""
        if rank < 0:
            raise ValueError(f"rank={rank} must be >= 0")
        return self._cut(dict.fromkeys(self._spectra, rank))

    def within(self, budget_bytes: int) -> LowRankDifference:
        """As much of the squared difference as fits; see `within_together`."""
        return within_together({"": self}, budget_bytes)[""]

    def errors(self, ranks: Sequence[int]) -> tuple[RankError, ...]:
        """Bytes and error of `at_rank` for each of these ranks. Relative to the matrices' difference; of one that is zero, 0."""
        whole = sum(spectrum.lost(0) for spectrum in self._spectra.values())

        def row(rank: int) -> RankError:
            lost = sum(spectrum.lost(rank) for spectrum in self._spectra.values())
            size = self.smallest_bytes + sum(spectrum.bytes(rank) for spectrum in self._spectra.values())
            return RankError(rank, size, math.sqrt(lost / whole) if whole else 0.0)

        return tuple(map(row, ranks))

    def _cut(self, ranks: Mapping[str, int]) -> LowRankDifference:
        whole = {name: spectrum.whole.clone() for name, spectrum in self._spectra.items() if spectrum.is_whole(ranks[name])}
        factors = {
            name: spectrum.factors(ranks[name])
            for name, spectrum in self._spectra.items()
            if ranks[name] and not spectrum.is_whole(ranks[name])
        }
        return LowRankDifference(self.root, factors, {**self._vectors, **whole})


def within_together(decompositions: Mapping[str, Decomposition], budget_bytes: int) -> dict[str, LowRankDifference]:
    """Differences of several experts, by name, that take so many bytes together, with as much of the squared differences as fits.

    Components of all matrices of all experts are taken in the order of their squared singular value per byte.

    Raises ValueError if not even what is no matrix fits.
    """
    smallest = sum(one.smallest_bytes for one in decompositions.values())
    left = budget_bytes - smallest
    if left < 0:
        raise ValueError(f"budget_bytes={budget_bytes} must be >= {smallest}, which what is no matrix needs")
    spectra = {(expert, name): spectrum for expert, one in decompositions.items() for name, spectrum in one._spectra.items()}
    ranks = dict.fromkeys(spectra, 0)
    components = [
        (-energy / spectrum.component_bytes, key, rank)
        for key, spectrum in spectra.items()
        for rank, energy in enumerate(spectrum.energies.tolist(), 1)
    ]
    for _, key, rank in sorted(components):
        cost = spectra[key].bytes(rank) - spectra[key].bytes(rank - 1)
        if rank == ranks[key] + 1 and cost <= left:
            ranks[key], left = rank, left - cost
    return {
        expert: one._cut({name: rank for (owner, name), rank in ranks.items() if owner == expert}) for expert, one in decompositions.items()
    }
