"""The search says what a comparison of all with all says, whatever the order and the batches, and is exact where products are not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from t2i_experts.evaluation.nearest import NearestSearch


def brute_force(queries: Tensor, features: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Distances and indices by differences in float64, all with all."""
    distances = (queries.double()[:, None] - features.double()[None]).norm(dim=-1).amax(-1)
    return distances.amin(1).numpy(), distances.argmin(1).numpy()


def searched(queries: Tensor, features: Tensor, batches: list[list[int]]) -> NearestSearch:
    search = NearestSearch(queries)
    for batch in batches:
        search.add(features[batch], batch)
    return search


@pytest.mark.parametrize("parts", [1, 5])
def test_it_agrees_with_all_distances_in_every_order_and_batch(parts: int) -> None:
    random = torch.Generator().manual_seed(0)
    queries = torch.randn(37, parts, 20, generator=random)
    features = torch.randn(211, parts, 20, generator=random)
    distances, indices = brute_force(queries, features)
    shuffled = torch.randperm(211, generator=random).tolist()
    for batches in ([[*range(211)]], [[i] for i in shuffled], [shuffled[i : i + 30] for i in range(0, 211, 30)]):
        found = searched(queries, features, batches)
        assert found.indices.tolist() == indices.tolist()
        np.testing.assert_array_equal(found.distances, distances.astype(np.float32))


def test_searches_over_shares_of_the_set_merge_into_one() -> None:
    random = torch.Generator().manual_seed(1)
    queries, features = torch.randn(20, 1, 8, generator=random), torch.randn(90, 1, 8, generator=random)
    features[60:] = features[:30]  # the same distance in other shares
    whole = searched(queries, features, [[*range(90)]])
    merged = searched(queries, features, [])
    for rank in (2, 0, 1):
        share = searched(queries, features, [[*range(rank, 90, 3)]])
        merged.merge(share.distances, share.indices)
    merged.merge(*(lambda empty: (empty.distances, empty.indices))(searched(queries, features, [])))
    assert merged.indices.tolist() == whole.indices.tolist() and max(whole.indices) < 60
    np.testing.assert_array_equal(merged.distances, whole.distances)


def test_copies_and_near_copies_far_from_the_origin_are_told_apart() -> None:
    """Where |a|^2 + |b|^2 - 2ab in float32 has an error of some hundred, distances are 0 and about 1."""
    random = torch.Generator().manual_seed(2)
    features = 3000 * torch.rand(64, 1, 3, generator=random).repeat_interleave(256, 2)  # not near their mean either
    features += 0.03 * torch.randn(64, 1, 768, generator=random)
    near = (features[7] + 0.03 * torch.randn(40, 1, 768, generator=random)).float()
    everything = torch.cat([features, near])
    queries = torch.cat([features[7:8], near[:5], near[:1] + 0.01, features[20:40]])  # whose mean is far from the first
    found = searched(queries, everything, [[*range(100)], [*range(100, 104)]])
    distances, indices = brute_force(queries, everything)
    assert found.indices.tolist() == indices.tolist() == [7, 64, 65, 66, 67, 68, 64, *range(20, 40)]
    assert (
        set(np.delete(found.distances, 6).tolist()) == {0.0}
        and found.distances[6] == pytest.approx(distances[6], rel=1e-6)
        and distances[6] > 0.1
    )


def test_of_equal_training_pictures_the_first_counts() -> None:
    features = torch.tensor([[5.0], [1.0], [2.0], [1.0], [1.0]])[:, None].expand(5, 1, 700).contiguous()
    queries = torch.zeros(1, 1, 700)
    for batches in ([[4], [3], [1], [0, 2]], [[0, 4, 2], [3, 1]], [[0, 1, 2, 3, 4]]):
        found = searched(queries, features, batches)
        assert found.indices.tolist() == [1] and found.distances[0] == pytest.approx(700**0.5)


def test_the_greatest_part_decides() -> None:
    """Of a picture that is equal but for one part, and one that differs a little everywhere, the second is nearer."""
    query = torch.zeros(1, 4, 9)
    one_part, everywhere = torch.zeros(1, 4, 9), torch.full((1, 4, 9), 0.5)
    one_part[0, 2] = 0.9
    found = searched(query, torch.cat([one_part, everywhere]), [[0, 1]])
    assert found.indices.tolist() == [1] and found.distances[0] == pytest.approx(1.5)
    flat = searched(query.view(1, 1, 36), torch.cat([one_part, everywhere]).view(2, 1, 36), [[0, 1]])
    assert flat.indices.tolist() == [0]


def test_features_of_another_shape_are_refused() -> None:
    search = NearestSearch(torch.zeros(2, 1, 3))
    for features, indices in ((torch.zeros(2, 1, 4), [0, 1]), (torch.zeros(2, 2, 3), [0, 1]), (torch.zeros(2, 1, 3), [0])):
        with pytest.raises(ValueError, match="features of shape"):
            search.add(features, indices)
    search.add(torch.zeros(0, 1, 3), [])
    assert search.indices.tolist() == [-1, -1]
