"""Statistics are those of numpy, however the images come in; files are pytorch-fid's."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from t2i_experts.evaluation.statistics import FeatureStatistics, Gaussian, load_statistics, save_statistics


def features(count: int, dimension: int, seed: int = 0) -> Tensor:
    """Far from zero, where sums of squares would lose most digits."""
    generator = torch.Generator().manual_seed(seed)
    return (1e4 + torch.randn(count, dimension, generator=generator, dtype=torch.float64)).float()


def gathered(rows: Tensor, *sizes: int) -> FeatureStatistics:
    statistics = FeatureStatistics(rows.shape[1])
    for batch in rows.split(list(sizes)):
        statistics.add(batch)
    return statistics


def assert_numpys(statistics: FeatureStatistics, rows: Tensor) -> None:
    found, exact = statistics.gaussian(), rows.double().numpy()
    assert found.count == len(rows)
    np.testing.assert_allclose(found.mean, exact.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.covariance, np.cov(exact.T), rtol=1e-9, atol=1e-12)
    if found.factor is not None:
        torch.testing.assert_close(found.factor @ found.factor.T, found.covariance, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("count", [5, 12, 13, 300])
def test_batches_and_merging_change_nothing_and_few_images_keep_a_factor(count: int) -> None:
    rows = features(count, 12)
    parts = [gathered(rows, count), gathered(rows, 1, 3, 0, count - 4)]
    merged, empty = gathered(rows[:3], 2, 1), FeatureStatistics(12)
    for other in (gathered(rows[3:], count - 3), empty):
        merged.merge(other)
    empty.merge(merged)
    for statistics in (*parts, merged, empty):
        assert_numpys(statistics, rows)
        assert (statistics.gaussian().factor is not None) == (count <= 12)


def test_what_cannot_be_gathered_is_named() -> None:
    statistics = gathered(features(3, 4), 3)
    bad = features(3, 4)
    bad[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"image 4 \(counted from 0\) hold NaN"):
        statistics.add(bad)
    with pytest.raises(ValueError, match=r"\(2, 5\) where \(B, 4\)"):
        statistics.add(features(2, 5))
    with pytest.raises(ValueError, match="5 dimensions cannot be merged with features of 4"):
        statistics.merge(FeatureStatistics(5))
    assert statistics.count == 3
    with pytest.raises(ValueError, match="1 images have no covariance"):
        gathered(features(1, 4), 1).gaussian()


def _rank(rank: int, file: str, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=3)
    rows = features(20, 6)
    own = [rows[:13], rows[13:], rows[:0]][rank]
    whole = gathered(own, len(own)).over_processes()
    torch.save((whole.count, whole.mean, whole.gaussian().covariance), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_three_processes_of_which_one_has_no_image(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("fork")
    processes = [spawn.Process(target=_rank, args=(rank, str(tmp_path / "store"), str(tmp_path))) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    exact = gathered(features(20, 6), 20)
    for rank in range(3):
        count, mean, covariance = torch.load(tmp_path / f"{rank}.pt")
        assert count == 20
        torch.testing.assert_close(mean, exact.mean, rtol=1e-14, atol=0)
        torch.testing.assert_close(covariance, exact.gaussian().covariance, rtol=1e-9, atol=1e-12)
    assert exact.over_processes() is exact


def test_a_file_gives_back_what_was_saved_and_is_pytorch_fids(tmp_path: Path) -> None:
    path, gaussian = tmp_path / "a.npz", gathered(features(30, 5), 30).gaussian()
    save_statistics(path, gaussian, '{"features": "x"}')
    found, protocol = load_statistics(path)
    assert torch.equal(found.mean, gaussian.mean) and torch.equal(found.covariance, gaussian.covariance)
    assert (found.count, protocol) == (30, '{"features": "x"}')
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]
    from pytorch_fid import fid_score

    mu, sigma = fid_score.compute_statistics_of_path(str(path), None, 1, 5, "cpu")
    np.testing.assert_array_equal(mu, gaussian.mean)
    np.testing.assert_array_equal(sigma, gaussian.covariance)
    np.savez(path, mu=mu.astype(np.float32), sigma=sigma)
    assert load_statistics(path)[0].count is None


def test_a_file_that_is_none_says_why(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with pytest.raises(ValueError, match=r"not found: .*a\.npz"):
        load_statistics(path)
    eye, odd = np.eye(3), np.eye(3)
    odd[0, 1] = 1
    for arrays, said in (
        ({"mu": eye[0]}, "lacks sigma; its arrays are: mu"),
        ({"mu": eye[0], "sigma": eye[:2]}, r"\(3,\) and covariance of shape \(2, 3\)"),
        ({"mu": eye[0] * np.nan, "sigma": eye}, "its mean holds NaN"),
        ({"mu": eye[0], "sigma": odd}, "not symmetric"),
        ({"mu": np.array([{}]), "sigma": eye}, "allow_pickle=False"),
    ):
        np.savez(path, **arrays)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=said):
            load_statistics(path)
    for data in (b"", b"hello", b"PK\x03\x04"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="cannot be read"):
            load_statistics(path)
    for target, said in (("a.pt", "must end in .npz"), ("nowhere/a.npz", "cannot be written")):
        with pytest.raises(ValueError, match=said):
            save_statistics(tmp_path / target, Gaussian(torch.zeros(1), torch.zeros(1, 1)))
