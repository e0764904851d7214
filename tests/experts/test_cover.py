from __future__ import annotations

import math
import random

import pytest
import torch

from t2i_experts.config import load_config
from t2i_experts.experts.cover import cover
from t2i_experts.experts.plan import TreePlan

PLAN = TreePlan.from_config(load_config("ediffi/experts"))


def experts(*available: str) -> list[str]:
    return [covered.expert.name for covered in cover(PLAN, available)]


def test_the_deepest_ancestor_stands_in() -> None:
    assert experts(*(node.name for node in PLAN.nodes)) == ["E^3_0", "complement", "E^9_511"]
    assert experts("root") == ["root", "root", "root"]
    assert experts("root", "E^9_511") == ["root", "root", "E^9_511"]
    assert experts("root", "E^2_0", "E^1_0", "E^5_31", "E^4_15") == ["E^2_0", "root", "E^5_31"]
    assert experts("E^1_0", "complement", "E^8_255") == ["E^1_0", "complement", "E^8_255"], "no root is needed where nothing falls to it"


def test_a_range_without_any_expert_is_named() -> None:
    with pytest.raises(ValueError) as caught:
        experts("E^3_0", "E^9_511")
    assert "sigma in (0.07574, 9.61], quantiles 1/8 to 511/512 (leaf complement); available: E^3_0, E^9_511" in str(caught.value)
    with pytest.raises(ValueError) as caught:
        experts()
    assert all(leaf.name in str(caught.value) for leaf in PLAN.leaves) and "available: none" in str(caught.value)


def test_a_node_that_the_plan_does_not_have() -> None:
    with pytest.raises(ValueError, match="no node 'E\\^2_1' in the plan; it has root, "):
        experts("root", "E^2_1")


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_there_beside_the_root_every_sigma_has_one_expert_that_was_trained_on_it(seed: int) -> None:
    rng = random.Random(seed)
    available = ["root", *(node.name for node in PLAN.nodes[1:] if rng.random() < 0.4)]
    covered = cover(PLAN, available)
    edges = torch.tensor([node.interval.sigma_hi for node in PLAN.nodes if node.interval.sigma_hi < math.inf], dtype=torch.float64)
    sigma = torch.cat([torch.logspace(-320, 308, 2000, dtype=torch.float64).clamp(min=5e-324), edges, torch.nextafter(edges, edges + 1)])
    assert (torch.stack([c.leaf.interval.contains(sigma) for c in covered]).sum(dim=0) == 1).all()
    for c in covered:
        assert c.expert.name in available and c.leaf.interval.within(c.expert.interval)
        nearer = [
            name
            for name in available
            if c.leaf.interval.within(PLAN[name].interval) and PLAN[name].interval.share < c.expert.interval.share
        ]
        assert all(name not in [node.name for node in PLAN.lineage(c.leaf.name)] for name in nearer)
