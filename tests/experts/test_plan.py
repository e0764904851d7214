from __future__ import annotations

import random
from dataclasses import replace
from fractions import Fraction

import pytest

from t2i_experts.config import load_config
from t2i_experts.diffusion.noise import LogNormalSigma
from t2i_experts.experts.interval import NoiseInterval, node_name, parse_node
from t2i_experts.experts.plan import Node, TreePlan

ALL = NoiseInterval(Fraction(0), Fraction(1))


def plan(*overrides: str) -> TreePlan:
    """The tree of the smallest config with these overrides and 100 images a node."""
    return TreePlan.from_config(load_config("tiny/base64", ["experts.images=100", *overrides]))


def names(nodes: tuple[Node, ...]) -> list[str]:
    return [node.name for node in nodes]


def test_ediffis_own_plan() -> None:
    tree = TreePlan.from_config(load_config("ediffi/experts"))
    high = [node_name(level, 2**level - 1) for level in range(1, 10)]
    assert names(tree.nodes) == ["root", "E^1_0", "E^2_0", "E^3_0", "complement", *high]
    assert [node.parent for node in tree.nodes] == [None, "root", "E^1_0", "E^2_0", "root", "root", *high[:-1]]
    assert names(tree.leaves) == ["E^3_0", "complement", "E^9_511"]
    assert tree["complement"].interval == NoiseInterval(Fraction(1, 8), Fraction(511, 512))
    assert tree.root.images == load_config("ediffi/base64").training.images == 500_000 * 2048
    assert {node.images for node in tree.nodes[1:]} == {50_000 * 2048}
    for node in tree.nodes:
        if dyadic := parse_node(node.name):
            assert node.interval == NoiseInterval.node(*dyadic)


def test_the_two_experts_of_config_c() -> None:
    tree = plan("experts.leaves=[complement, E^9_511]")
    assert names(tree.leaves) == ["complement", "E^9_511"] and len(tree.nodes) == 11
    assert tree["complement"].interval == NoiseInterval(Fraction(0), Fraction(511, 512))


def test_the_two_experts_of_sr256_and_a_shallow_tree() -> None:
    assert names(plan("experts.leaves=[E^1_0, E^1_1]").nodes) == ["root", "E^1_0", "E^1_1"]
    shallow = plan("experts.leaves=[E^2_3, E^2_0, E^2_1, E^2_2]")
    assert names(shallow.leaves) == ["E^2_0", "E^2_1", "E^2_2", "E^2_3"], "from low noise to high, whatever the order in the config"
    assert names(shallow.nodes) == ["root", "E^1_0", "E^2_0", "E^2_1", "E^1_1", "E^2_2", "E^2_3"]
    assert sum(node.images for node in shallow.nodes) == 8000 + 6 * 100


def test_without_leaves_there_is_the_root_alone() -> None:
    tree = TreePlan.from_config(load_config("tiny/base64"))
    assert names(tree.nodes) == names(tree.leaves) == ["root"]


def test_a_tree_of_ones_own() -> None:
    tree = plan(
        "experts.leaves=[low, mid, E^2_3]",
        "experts.nodes.low={quantiles: [0, 0.3], parent: half}",
        "experts.nodes.mid={quantiles: [3/10, 0.75], images: 7}",
        "experts.nodes.half.quantiles=[0, 1/2]",
        "experts.nodes.E^2_3.parent=root",
        "stage.noise={mean: 0.5, std: 2}",
    )
    noise = LogNormalSigma(0.5, 2)
    assert tree.nodes == (
        Node("root", NoiseInterval(Fraction(0), Fraction(1), noise), None, 8000),
        Node("half", NoiseInterval(Fraction(0), Fraction(1, 2), noise), "root", 100),
        Node("low", NoiseInterval(Fraction(0), Fraction(3, 10), noise), "half", 100),
        Node("mid", NoiseInterval(Fraction(3, 10), Fraction(3, 4), noise), "root", 7),
        Node("E^2_3", NoiseInterval(Fraction(3, 4), Fraction(1), noise), "root", 100),
    )
    assert names(tree.lineage("low")) == ["low", "half", "root"]


LEAVES = "experts.leaves=[E^3_0, complement, E^9_511]"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["experts.leaves=[E^2_0, E^2_1, E^2_3]"], ["gap between E^2_1 and E^2_3", "(0.3012, 0.6766]", "1/2 to 3/4"]),
        (["experts.leaves=[E^2_1, E^1_1]"], ["gap below E^2_1", "(0, 0.1341]", "0 to 1/4"]),
        (["experts.leaves=[E^1_0]"], ["gap above E^1_0", "(0.3012, inf)", "1/2 to 1"]),
        (["experts.leaves=[E^1_0, E^1_1, E^3_6]"], ["E^1_1 and E^3_6 overlap", "(0.6766, 1.198]", "3/4 to 7/8"]),
        (["experts.leaves=[E^1_0, E^2_1, E^1_1]"], ["E^1_0 and E^2_1 overlap", "(0.1341, 0.3012]"]),
        (["experts.leaves=[E^3_0, E^1_0, complement]"], ["E^3_0 and E^1_0 overlap", "(0, 0.07574]"]),
        (["experts.leaves=[E^1_0, up]", "experts.nodes.up.quantiles=[0.499, 1]"], ["E^1_0 and up overlap", "499/1000 to 1/2"]),
        (["experts.leaves=[E^1_0, up]", "experts.nodes.up.quantiles=[0.5000000000000001, 1]"], ["gap between E^1_0 and up"]),
        (["experts.leaves=[E^1_0, E^1_1, complement]"], ["complement must be one range", "leave nothing"]),
        (["experts.leaves=[E^2_1, complement]"], ["complement must be one range", "(0, 0.1341]", "(0.3012, inf)"]),
        (["experts.leaves=[E^1_0, E^1_1, E^1_0]"], ["names E^1_0 twice"]),
        (["experts.leaves=[root]"], ["root", "`training`"]),
        (["experts.leaves=[E^0_0]"], ["E^0_0", "root"]),
        (["experts.leaves=[E^1_0, E^1_2]"], ["E^1_2 is no node"]),
        (["experts.leaves=[E^1_0, rest]"], ["experts.leaves: unknown node 'rest'", "experts.nodes.rest.quantiles"]),
        ([LEAVES, "experts.nodes.E^3_0.parent=E^2x"], ["experts.nodes.E^3_0.parent: unknown node 'E^2x'"]),
        ([LEAVES, "experts.nodes.E^1_0.parent=E^2_0"], ["circle", "E^2_0 -> E^1_0 -> E^2_0"]),
        ([LEAVES, "experts.nodes.complement.parent=complement"], ["circle", "complement -> complement"]),
        ([LEAVES, "experts.nodes.E^3_0.parent=E^1_1"], ["E^3_0", "reaches out of its parent E^1_1"]),
        ([LEAVES, "experts.nodes.complement.parent=E^1_0"], ["complement", "reaches out of its parent E^1_0"]),
        ([LEAVES, "experts.nodes.E^4_0.images=3"], ["experts.nodes.E^4_0", "no leaf"]),
        ([LEAVES, "experts.nodes.root.images=3"], ["root", "`training`"]),
        ([LEAVES, "experts.nodes.E^3_0.quantiles=[0, 1/8]"], ["experts.nodes.E^3_0.quantiles", "ignored"]),
        ([LEAVES, "experts.nodes.complement.quantiles=[1/8, 511/512]"], ["complement is the leaf"]),
        (["experts.leaves=[E^2_0]", "experts.nodes.E^2_0.parent=complement"], ["complement is the leaf"]),
        (["experts.leaves=[a]", "experts.nodes.a.quantiles=[1/0, 1]"], ["experts.nodes.a.quantiles=['1/0', '1']", "must be two"]),
        (["experts.leaves=[a]", "experts.nodes.a.quantiles=[1/2, 1/4]"], ["experts.nodes.a.quantiles=['1/2', '1/4']", "u_lo < u_hi"]),
        (["experts.leaves=[a]", "experts.nodes.a.quantiles=[nan, inf]"], ["experts.nodes.a.quantiles", "must be two"]),
    ],
)
def test_what_is_no_tree_is_refused_by_name(overrides: list[str], said: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        plan(*overrides)
    assert all(part in str(caught.value) for part in said), caught.value


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["experts.leaves=[E^1_0, E^1_1]"], "experts.images=0 must be positive"),
        (["experts.leaves=[E^1_0, E^1_1]", "experts.images=-1"], "experts.images=-1 must be positive"),
        (["experts.images=5"], "experts.images=5 would be ignored: experts.leaves is empty"),
        (["experts.nodes.E^1_0.images=5"], "experts.nodes=.* would be ignored"),
        (["experts.leaves=[E^1_0, E^1_1]", "experts.images=1", "experts.nodes.E^1_0.images=0"], r"experts.nodes.E\^1_0.images=0 must be"),
        (["experts.leaves=[a]", "experts.images=1", "experts.nodes.a.quantiles=[0, 1/2, 1]"], r"quantiles=\['0', '1/2', '1'\] must be"),
        (["experts.leaves=[../a]", "experts.images=1"], r"experts\.leaves: a node's name .* received '\.\./a'"),
        (["experts.leaves=[a]", "experts.images=1", "experts.nodes={b/c: {}}"], "experts.nodes: a node's name .* received 'b/c'"),
        (["experts.leafs=[a]"], "did you mean 'leaves'"),
        (["experts.leaves=[a]", "experts.nodes.a.image=5"], "did you mean 'images'"),
    ],
)
def test_what_a_config_cannot_say_of_experts(overrides: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_config("tiny/base64", overrides)


def test_a_plan_that_was_not_made_from_a_config_is_checked_too() -> None:
    root, low, high = Node("root", ALL, None, 1), *(Node(f"E^1_{i}", NoiseInterval.node(1, i), "root", 1) for i in (0, 1))
    assert names(TreePlan((high, low, root)).nodes) == ["root", "E^1_0", "E^1_1"], "parents first"
    wrong = {
        "gap above E\\^1_0": (root, low),
        "one node without a parent.*root, orphan": (root, low, high, replace(low, name="orphan", parent=None)),
        "one node without a parent.*none": (),
        "circle": (root, replace(low, parent="E^1_1"), replace(high, parent="E^1_0")),
        "parent of E\\^1_1 is E\\^5_9, which is no node": (
            root,
            Node("E^2_3", NoiseInterval.node(2, 3), "E^1_1", 1),
            low,
            replace(high, parent="E^5_9"),
        ),
        "several nodes of one name": (root, low, high, low),
        "must cover all noise": (replace(low, parent=None),),
        "has the noise": (root, low, replace(high, interval=NoiseInterval.node(1, 1, LogNormalSigma(0, 1)))),
    }
    for said, nodes in wrong.items():
        with pytest.raises(ValueError, match=said):
            TreePlan(nodes)
    with pytest.raises(ValueError, match="no node 'E\\^2_0' in the plan; it has root, E\\^1_0, E\\^1_1"):
        TreePlan((root, low, high))["E^2_0"]


@pytest.mark.parametrize("seed", range(20))
def test_any_binary_tree_partitions_the_noise_and_no_leaf_can_be_missing_or_split(seed: int) -> None:
    rng = random.Random(seed)
    leaves = [(1, 0), (1, 1)]
    for _ in range(rng.randrange(1, 12)):
        level, index = leaves.pop(rng.randrange(len(leaves)))
        leaves += [(level + 1, 2 * index), (level + 1, 2 * index + 1)]
    rng.shuffle(leaves)
    called = [node_name(*leaf) for leaf in leaves]
    tree = plan(f"experts.leaves=[{', '.join(called)}]")
    assert sorted(names(tree.leaves)) == sorted(called)
    assert len(tree.nodes) == 2 * len(leaves) - 1, "a binary tree"
    assert sum(leaf.interval.share for leaf in tree.leaves) == 1
    seen = set[str]()
    for node in tree.nodes:
        assert node.parent is None or node.parent in seen
        seen.add(node.name)

    one = rng.randrange(len(leaves))
    with pytest.raises(ValueError, match="gap"):
        plan(f"experts.leaves=[{', '.join(called[:one] + called[one + 1 :])}]")
    rest = plan(f"experts.leaves=[{', '.join(['complement', *called[:one], *called[one + 1 :]])}]")
    assert rest["complement"].interval == tree[called[one]].interval
    level, index = leaves[one]
    with pytest.raises(ValueError, match="overlap"):
        plan(f"experts.leaves=[{', '.join([*called, node_name(level + 1, 2 * index + 1)])}]")
