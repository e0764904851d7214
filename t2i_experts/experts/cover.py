"""Who answers for which noise while a tree is still growing: for a leaf that is not trained yet, the nearest ancestor that is."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from t2i_experts.experts.plan import Node, TreePlan


@dataclass(frozen=True)
class Covered:
    """A leaf, for whose interval `expert` answers: the leaf itself, or an ancestor of it that stands in."""

    leaf: Node
    expert: Node


def cover(plan: TreePlan, available: Collection[str]) -> tuple[Covered, ...]:
    """Every leaf of a plan with its deepest available ancestor, from low noise to high; the leaves' intervals partition (0, inf).

    available: names of the nodes whose weights there are.

    Raises ValueError for a name that the plan does not have, and one that names every range for which there is no expert.
    """
    for name in available:
        plan[name]
    experts = [next((node for node in plan.lineage(leaf.name) if node.name in available), None) for leaf in plan.leaves]
    gaps = [f"{leaf.interval} (leaf {leaf.name})" for leaf, expert in zip(plan.leaves, experts, strict=True) if expert is None]
    if gaps:
        raise ValueError(f"no expert and no ancestor of one for {'; '.join(gaps)}; available: {', '.join(available) or 'none'}")
    return tuple(Covered(leaf, expert) for leaf, expert in zip(plan.leaves, experts, strict=True) if expert is not None)
