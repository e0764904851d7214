"""The experts of an ensemble as differences from its root: trained as such, or cut from whole ones to a rank or a number of bytes.

Differences are from the root as it is stored: where that is rounded to bfloat16, a cut difference makes up for it as well as its rank
allows. A trained one is kept as it was trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from t2i_experts.cascade.expert_folders import ExpertState
from t2i_experts.cascade.expert_weights import LOW_RANK
from t2i_experts.cascade.files import naming
from t2i_experts.cascade.weights import cast
from t2i_experts.experts.lowrank import Decomposition, LowRankDifference, relative_error, restore, within_together
from t2i_experts.experts.lowrank_file import load_difference
from t2i_experts.experts.states import State, count_bytes, digest, fingerprint


@dataclass(frozen=True)
class Limit:
    """How much of the experts' differences is kept: `rank` of each matrix (infinity: all, bit for bit), or what fits in `budget_bytes` for
    all experts together. With neither, only those that were trained at low rank are differences."""

    rank: float | None = None
    budget_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.budget_bytes is not None:
            raise ValueError(f"--rank={self.rank}, --bytes={self.budget_bytes}: give one of the two")
        for name, value in (("rank", self.rank), ("bytes", self.budget_bytes)):
            if value is not None and value < 1:
                raise ValueError(f"--{name}={value} must be at least 1")

    @property
    def cuts(self) -> bool:
        """Whether whole experts are cut."""
        return self.rank is not None or self.budget_bytes is not None


@dataclass(frozen=True)
class StoredSize:
    """What storing an expert costs.

    kind: whole, trained (at low rank), cut, or root (it is the root itself). ranks: smallest, median and largest of the matrices that are
    factors; none without any. error: see `relative_error`; 0 for whole experts, whatever type they are rounded to.
    """

    kind: str
    bytes: int
    ranks: tuple[float, ...]
    error: float


def read_trained(folder: Path, weights: State, root: State) -> LowRankDifference | None:
    """The difference that was trained, from the stage's folder of a run's model, whose `weights` are given.

    None if the run did not train at low rank, or began with other weights than these of a root. Raises ValueError naming the file if the
    two do not give the weights, bit for bit.
    """
    path = folder / LOW_RANK
    if not path.is_file():
        return None
    difference, _ = load_difference(path)
    if difference.root != fingerprint(root):
        return None
    with naming(path):
        if digest(restore(root, difference, dtype=torch.float32)) != digest(weights):
            raise ValueError("with the root it does not give the weights beside it; one of the two is of another time of the run")
    return difference


def cut_experts(
    root: ExpertState,
    experts: Mapping[str, ExpertState],
    trained: Mapping[str, LowRankDifference],
    limit: Limit,
    dtype: torch.dtype | None,
) -> tuple[State | None, dict[str, ExpertState], dict[str, StoredSize]]:
    """The root as it is to be stored, None if all experts are whole; the experts as they are to be; and what each costs.

    root, experts: whole. trained: of some experts the difference from the root, as `read_trained` gives it; taken as it is unless `limit`
    has a lower rank. dtype: that all is stored in; None: as it is. An expert of another network than the root's stays whole.

    Raises ValueError for a budget that is too small for what is not cut.
    """
    assert not isinstance(root.weights, LowRankDifference)
    stored = cast(root.weights, dtype)
    kept = {name: _from(stored, one.to(dtype) if dtype else one) for name, one in trained.items() if _fits(one, limit)}
    if not limit.cuts and not kept:
        return None, dict(experts), {name: _size(stored, None, expert, dtype) for name, expert in experts.items()}
    alike = [name for name, expert in experts.items() if expert.config.network == root.config.network and name not in kept]
    if limit.cuts:
        fixed = sum(one.bytes for one in kept.values()) + sum(
            count_bytes(cast(_whole(expert), dtype)) for name, expert in experts.items() if name not in kept and name not in alike
        )
        kept |= _cut(stored, {name: _whole(experts[name]) for name in alike}, limit, fixed, dtype)
    else:  # those that are the root itself need nothing beside it
        kept |= {name: _from(stored, LowRankDifference("", {}, {})) for name in alike if _is_root(experts[name], root)}
    as_trained = {name for name, one in trained.items() if _fits(one, limit)}
    sizes = {name: _size(stored, kept.get(name), expert, dtype, is_trained=name in as_trained) for name, expert in experts.items()}
    return stored, {name: replace(expert, weights=kept.get(name, expert.weights)) for name, expert in experts.items()}, sizes


def _fits(difference: LowRankDifference, limit: Limit) -> bool:
    return limit.rank is None or all(factors.rank <= limit.rank for factors in difference.factors.values())


def _from(root: State, difference: LowRankDifference) -> LowRankDifference:
    """The same difference from a root that may have been rounded, without the tensors that are the root's."""
    whole = {name: tensor for name, tensor in difference.whole.items() if not torch.equal(tensor, root[name])}
    return replace(difference, root=fingerprint(root), whole=whole)


def _cut(root: State, experts: Mapping[str, State], limit: Limit, fixed: int, dtype: torch.dtype | None) -> dict[str, LowRankDifference]:
    """fixed: bytes of experts that are not cut."""
    if limit.rank is not None:
        found = {}
        for name, expert in experts.items():  # one decomposition in memory at a time
            decomposition = Decomposition(root, expert, dtype)
            found[name] = decomposition.at_rank(int(min(limit.rank, decomposition.largest_rank)))
        return found
    decompositions = {name: Decomposition(root, expert, dtype) for name, expert in experts.items()}
    smallest = fixed + sum(one.smallest_bytes for one in decompositions.values())
    assert limit.budget_bytes is not None
    if limit.budget_bytes < smallest:
        raise ValueError(f"--bytes={limit.budget_bytes} must be at least {smallest}, which what cannot be cut needs")
    return within_together(decompositions, limit.budget_bytes - fixed)


def _whole(expert: ExpertState) -> State:
    assert not isinstance(expert.weights, LowRankDifference)
    return expert.weights


def _is_root(expert: ExpertState, root: ExpertState) -> bool:
    return digest(_whole(expert)) == digest(_whole(root))


def _size(
    root: State, difference: LowRankDifference | None, expert: ExpertState, dtype: torch.dtype | None, *, is_trained: bool = False
) -> StoredSize:
    if difference is None:
        return StoredSize("whole", count_bytes(cast(_whole(expert), dtype)), (), 0.0)
    ranks = [factors.rank for factors in difference.factors.values()]
    spread = (min(ranks), median(ranks), max(ranks)) if ranks else ()
    kind = "trained" if is_trained else "cut" if difference.names else "root"
    return StoredSize(kind, difference.bytes, spread, relative_error(root, difference, _whole(expert)))
