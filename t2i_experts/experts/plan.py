"""The tree of experts: which networks are trained, each from which other one, on which noise and for how long (eDiff-I, 2211.01324).

A node is trained from its parent's weights on its own interval of p(sigma). Some nodes are only steps on the way: the ensemble consists of
the leaves, whose intervals partition all noise levels. eDiff-I grows the two outermost branches of the binary tree, down to E^3_0 and
E^9_511, and one expert for all that these two leave, the complement, from the root.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise

from t2i_experts.config import ExpertsConfig, NodeConfig, RunConfig
from t2i_experts.config.expert_rules import read_quantiles
from t2i_experts.diffusion.noise import LogNormalSigma, NoiseDistribution
from t2i_experts.experts.interval import NoiseInterval, complement, node_name, parse_node

ROOT = "root"
"""The node of all noise levels, from which all others descend."""

COMPLEMENT = "complement"
"""The leaf of all that the other leaves leave."""


@dataclass(frozen=True)
class Node:
    """One network of the tree.

    parent: the node from whose weights it starts; None for the root. images: that it is trained on, in its own run.
    """

    name: str
    interval: NoiseInterval
    parent: str | None
    images: int


@dataclass(frozen=True)
class TreePlan:
    """All nodes: parents before their children, siblings and what descends from them from low noise to high, whatever order was given.

    Raises ValueError, naming the nodes, for names that are not unique, an unknown parent, a circle of parents, none or several without a
    parent, a root that does not cover all noise, a child that reaches out of its parent, and a gap or an overlap between the leaves.
    """

    nodes: tuple[Node, ...]

    def __post_init__(self) -> None:
        _check_parents(self.nodes)
        object.__setattr__(self, "nodes", tuple(_in_order(self.nodes, None)))
        _check_intervals(self.nodes)
        _check_partition(self.leaves)

    @classmethod
    def from_config(cls, config: RunConfig) -> TreePlan:
        """The tree of `experts` in a config, whose `training` is the root's. Raises ValueError that names the key or the nodes."""
        experts, noise = config.experts, config.stage.noise
        parents = _parents(experts)
        for name in experts.nodes:
            if name not in parents:
                raise ValueError(f"experts.nodes.{name} would be ignored: no leaf of {experts.leaves} descends from it")
        intervals = _intervals(experts, parents, LogNormalSigma(noise.mean, noise.std))
        images = {name: experts.nodes.get(name, NodeConfig()).images or experts.images for name in parents}
        images[ROOT] = config.training.images
        nodes = {name: Node(name, intervals[name], parent, images[name]) for name, parent in parents.items()}
        _check_partition([nodes[name] for name in experts.leaves or [ROOT]])
        return cls(tuple(nodes.values()))

    def __getitem__(self, name: str) -> Node:
        """The node of that name. Raises ValueError with the names that there are."""
        if name not in self._by_name:
            raise ValueError(f"no node {name!r} in the plan; it has {', '.join(self._by_name)}")
        return self._by_name[name]

    @property
    def root(self) -> Node:
        """The node without a parent."""
        return self.nodes[0]

    @cached_property
    def leaves(self) -> tuple[Node, ...]:
        """The nodes that are nobody's parent, from low noise to high: the ensemble."""
        parents = {node.parent for node in self.nodes}
        return tuple(sorted((node for node in self.nodes if node.name not in parents), key=lambda node: node.interval.u_lo))

    def lineage(self, name: str) -> tuple[Node, ...]:
        """The node, its parent and so on to the root. Raises ValueError for an unknown name."""
        node = self[name]
        return (node, *(self.lineage(node.parent) if node.parent is not None else ()))

    @cached_property
    def _by_name(self) -> dict[str, Node]:
        return {node.name: node for node in self.nodes}


def _parents(experts: ExpertsConfig) -> dict[str, str | None]:
    """The parent of every leaf and of every ancestor of one, as far as names lead."""
    if ROOT in experts.leaves or ROOT in experts.nodes:
        raise ValueError(f"experts: {ROOT} is the network that `training` trains; leaves and nodes name those that grow out of it")
    if twice := next((name for name in experts.leaves if experts.leaves.count(name) > 1), None):
        raise ValueError(f"experts.leaves={experts.leaves} names {twice} twice; allowed is each node once")
    parents: dict[str, str | None] = {ROOT: None}
    for leaf in experts.leaves:
        name = leaf
        while name not in parents:
            parents[name] = parent = _parent(name, experts)
            name = parent
    return parents


def _parent(name: str, experts: ExpertsConfig) -> str:
    """The parent that the config says, else the node of the binary tree from which a node of it was split, else the root."""
    said = experts.nodes.get(name, NodeConfig()).parent
    if said is not None:
        return said
    level, index = parse_node(name) or (1, 0)
    return node_name(level - 1, index // 2) if level > 1 else ROOT


def _intervals(experts: ExpertsConfig, parents: dict[str, str | None], noise: NoiseDistribution) -> dict[str, NoiseInterval]:
    everything = NoiseInterval(Fraction(0), Fraction(1), noise)
    intervals = {name: _interval(name, experts, parents, noise) for name in parents if name not in (ROOT, COMPLEMENT)}
    intervals[ROOT] = everything
    if COMPLEMENT in parents:
        if COMPLEMENT not in experts.leaves or experts.nodes.get(COMPLEMENT, NodeConfig()).quantiles:
            raise ValueError(
                f"experts: {COMPLEMENT} is the leaf of what the others leave; give a node with quantiles or children another name"
            )
        left = complement([intervals[name] for name in experts.leaves if name != COMPLEMENT], everything)
        if len(left) != 1:
            ranges = "; ".join(map(str, left)) or "nothing"
            raise ValueError(f"experts.leaves={experts.leaves}: complement must be one range, but the other leaves leave {ranges}")
        intervals[COMPLEMENT] = left[0]
    return intervals


def _interval(name: str, experts: ExpertsConfig, parents: dict[str, str | None], noise: NoiseDistribution) -> NoiseInterval:
    """The interval that a node's name stands for, or its quantiles."""
    quantiles, key = experts.nodes.get(name, NodeConfig()).quantiles, f"experts.nodes.{name}.quantiles"
    dyadic = parse_node(name)
    if dyadic == (0, 0):
        raise ValueError(f"experts: E^0_0 is called {ROOT}; it is a parent, and no leaf of a tree")
    if dyadic:
        if quantiles:
            raise ValueError(f"{key}={quantiles} would be ignored: the name says them; call the node otherwise")
        return NoiseInterval.node(*dyadic, noise)
    if not quantiles:
        child = next((child for child, parent in parents.items() if parent == name), None)
        where = "experts.leaves" if child is None else f"experts.nodes.{child}.parent"
        raise ValueError(f"{where}: unknown node {name!r}; allowed: E^level_index, {ROOT}, {COMPLEMENT}, or any name that {key} explains")
    u_lo, u_hi = read_quantiles(quantiles, key)
    try:
        return NoiseInterval(u_lo, u_hi, noise)
    except ValueError as error:
        raise ValueError(f"{key}={quantiles}: {error}") from error


def _in_order(nodes: Sequence[Node], parent: str | None) -> Iterator[Node]:
    for node in sorted((node for node in nodes if node.parent == parent), key=lambda node: node.interval.u_lo):
        yield node
        yield from _in_order(nodes, node.name)


def _check_parents(nodes: Sequence[Node]) -> None:
    """Raises ValueError unless every node descends from the only one that has no parent."""
    parents = {node.name: node.parent for node in nodes}
    if len(parents) < len(nodes):
        raise ValueError(f"the plan has several nodes of one name: {', '.join(node.name for node in nodes)}")
    for name, parent in parents.items():
        if parent is not None and parent not in parents:
            raise ValueError(f"the parent of {name} is {parent}, which is no node of the plan; it has {', '.join(parents)}")
    for name in parents:
        line = [name]
        while (above := parents[line[-1]]) is not None:
            line.append(above)
            if above in line[:-1]:
                raise ValueError(f"the parents of {name} go in a circle: {' -> '.join(line)}")
    roots = [name for name, parent in parents.items() if parent is None]
    if len(roots) != 1:
        raise ValueError(f"the plan needs one node without a parent, its root; received {', '.join(roots) or 'none'}")


def _check_intervals(nodes: Sequence[Node]) -> None:
    """Raises ValueError unless the first of the nodes, the root, covers all noise, and every other one lies within its parent."""
    by_name = {node.name: node for node in nodes}
    root = nodes[0]
    if root.interval.share != 1:
        raise ValueError(f"{root.name} has no parent and must cover all noise; received {root.interval}")
    for node in nodes:
        if node.interval.distribution != root.interval.distribution:
            raise ValueError(f"{node.name} has the noise {node.interval.distribution}, {root.name} {root.interval.distribution}")
        if node.parent is not None and not node.interval.within(parent := by_name[node.parent].interval):
            raise ValueError(f"{node.name} ({node.interval}) reaches out of its parent {node.parent} ({parent})")


def _check_partition(leaves: Sequence[Node]) -> None:
    """Raises ValueError, naming the range and its neighbours, for the first gap or overlap between the leaves' intervals."""
    ordered = sorted(leaves, key=lambda leaf: (leaf.interval.u_lo, leaf.interval.u_hi))
    noise = ordered[0].interval.distribution
    for lower, upper in pairwise([None, *ordered, None]):
        ends = lower.interval.u_hi if lower else Fraction(0)
        begins = upper.interval.u_lo if upper else Fraction(1)
        if ends < begins:
            neighbours = " and ".join(leaf.name for leaf in (lower, upper) if leaf)
            where = "between" if lower and upper else "above" if lower else "below"
            raise ValueError(f"the leaves have a gap {where} {neighbours}: no expert for {NoiseInterval(ends, begins, noise)}")
        if lower and upper and begins < ends:
            both = NoiseInterval(begins, min(ends, upper.interval.u_hi), noise)
            raise ValueError(f"the leaves {lower.name} and {upper.name} overlap: two experts for {both}")
