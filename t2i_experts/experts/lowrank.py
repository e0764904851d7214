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
from dataclasses import dataclass
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


def restore(root: State, difference: LowRankDifference) -> dict[str, Tensor]:
    """The expert's weights: bit for bit where stored whole; otherwise root + up @ down, computed in float64 and rounded to the root's type.

    Raises ValueError for another root than the one that the difference was taken from.
    """
    found = fingerprint(root)
    if found != difference.root:
        raise ValueError(f"the difference was taken from the root {difference.root}, and these weights are {found}")

    def tensor(name: str, own: Tensor) -> Tensor:
        if name in difference.whole:
            return difference.whole[name].clone()
        if name in difference.factors:
            return (own.double() + difference.factors[name].product(own.shape)).to(own.dtype)
        return own.clone()

    return {name: tensor(name, own) for name, own in root.items()}


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
    """The decomposition of one matrix's difference, u @ diag(s) @ v, with `whole`, the expert's tensor."""

    whole: Tensor
    u: Tensor
    s: Tensor
    v: Tensor

    @classmethod
    def of(cls, root: Tensor, expert: Tensor) -> _Spectrum:
        difference = (expert.double() - root.double().to(expert.device)).flatten(1)
        u, s, v = torch.linalg.svd(difference, full_matrices=False)
        return cls(expert, u.to(expert.dtype), s, v.to(expert.dtype))

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
        """The squared error at a rank."""
        return 0.0 if self.is_whole(rank) else float(self.energies[rank:].sum())

    def factors(self, rank: int) -> Factors:
        root = self.s[:rank].sqrt().to(self.u.dtype)
        return Factors((self.u[:, :rank] * root).contiguous(), (root[:, None] * self.v[:rank]).contiguous())


@dataclass(frozen=True)
class RankError:
    """What a difference costs and how far it is off: error, relative to the whole difference, 0 to 1, root of the sum of squares."""

    rank: int
    bytes: int
    error: float


class Decomposition:
    """The singular values of an expert's difference from its root, matrix by matrix, from which differences of any size are cut.

    Raises ValueError naming the first tensor that does not fit.
    """

    def __init__(self, root: State, expert: State) -> None:
        refuse_misfit(root, expert, "the expert")
        self.root = fingerprint(root)
        changed = {name: tensor for name, tensor in expert.items() if not torch.equal(tensor, root[name].to(tensor))}
        self._spectra = {name: _Spectrum.of(root[name], t) for name, t in changed.items() if t.ndim > 1 and t.is_floating_point()}
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
        """As much of the squared difference as fits: components of all matrices in the order of their squared singular value per byte.

        Raises ValueError if not even what is no matrix fits.
        """
        left = budget_bytes - self.smallest_bytes
        if left < 0:
            raise ValueError(f"budget_bytes={budget_bytes} must be >= {self.smallest_bytes}, which what is no matrix needs")
        ranks = dict.fromkeys(self._spectra, 0)
        components = [
            (-energy / spectrum.component_bytes, name, rank)
            for name, spectrum in self._spectra.items()
            for rank, energy in enumerate(spectrum.energies.tolist(), 1)
        ]
        for _, name, rank in sorted(components):
            cost = self._spectra[name].bytes(rank) - self._spectra[name].bytes(rank - 1)
            if rank == ranks[name] + 1 and cost <= left:
                ranks[name], left = rank, left - cost
        return self._cut(ranks)

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
