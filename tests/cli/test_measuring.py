"""What is told of distances: a spread only where there is one, and that few pictures are too few."""

from __future__ import annotations

from t2i_experts.cli.measuring import distance_lines


def test_subsets_of_all_pictures_have_no_spread_to_tell() -> None:
    numbers = {"distance": 1.0, "kid": {"mean": 0.25, "spread": 1e-17, "subsets": 100, "size": 64}}
    alike = distance_lines(numbers, "FID", 16, {"A": 64, "B": 64})
    assert alike[-1] == "KID 0.250000 (all 64 of each: no spread)"
    other = distance_lines(numbers, "FID", 16, {"A": 64, "B": 128})
    assert other[-1] == "KID 0.250000 +- 0.000000 (100 subsets of 64)"


def test_few_pictures_are_told_with_the_set_that_has_them() -> None:
    lines = distance_lines({"distance": 1.0}, "FID", 64, {"A": 64, "B": 65})
    assert lines == ["FID 1.0000", "  with few pictures it is far too large: A has 64 for 64 dimensions"]
