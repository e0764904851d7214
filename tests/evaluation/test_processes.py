"""Several processes measure as one does, each picture once; and what fails in one of them ends all, told by the first."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import socket
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from t2i_experts.cascade.pipeline import CascadePipeline
from t2i_experts.cli import app
from t2i_experts.evaluation.composition import load_prompts
from t2i_experts.evaluation.features import FeatureOptions, load_features
from t2i_experts.evaluation.judge import Judge, JudgeConfig, JudgeNetwork, save_judge
from t2i_experts.evaluation.judging import draw_and_judge
from t2i_experts.evaluation.processes import ALONE, FailedProcess, Processes, open_processes
from t2i_experts.evaluation.protocol import Comparison, Pace, compare, measure_images
from t2i_experts.evaluation.statistics import FeatureStatistics, Gaussian

CPU = torch.device("cpu")


def launched(count: int, work: Callable[[int], Any], folder: Path, timeout: float = 60) -> list[Any]:
    """What `work(rank)` returns in each of some processes as a launcher would start them; its exit code if that is not 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(rank: int) -> None:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"})
        torch.save(work(rank), folder / f"rank{rank}.pt")

    processes = [multiprocessing.get_context("fork").Process(target=run, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
    try:
        assert all(process.exitcode is not None for process in processes), "a process hangs"
    finally:
        for process in processes:
            process.kill()
    return [
        torch.load(folder / f"rank{rank}.pt", weights_only=False) if process.exitcode == 0 else process.exitcode
        for rank, process in enumerate(processes)
    ]


def command(*arguments: object) -> Callable[[int], tuple[int, str, str]]:
    """The command line in a process: exit code, stdout, stderr."""

    def run(rank: int) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        app._one_of_several_processes = lambda: False  # it would end this process before its result is kept
        time.sleep = lambda seconds: None  # there is no launcher
        with redirect_stdout(out), redirect_stderr(err):
            try:
                app.main([str(argument) for argument in arguments])
            except SystemExit as exit:
                return int(exit.code or 0), out.getvalue(), err.getvalue()

    return run


@pytest.fixture
def sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip_folder: Path) -> Path:
    """Folders `a` of 35 and `b` of 20 pictures, and `clip`, a network of 12 features. The working folder."""
    random = np.random.default_rng(0)
    for name, most, count in (("a", 255, 35), ("b", 180, 20)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.fromarray(random.integers(0, most, (40, 40, 3)).astype(np.uint8)).save(tmp_path / name / f"{i:02}.png")
    (tmp_path / "clip").symlink_to(clip_folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


FID = ("eval", "fid", "a", "b", "--features", "open_clip", "--model", "clip", "--device", "cpu", "--json")


def test_three_processes_give_the_record_of_one(sets: Path) -> None:
    wanted = (*FID, "--kid", "--precision-recall", "--infinity", "--batch", 4, "--workers", 1, "--save-stats")
    ((code, out, _),) = launched(1, command(*wanted, "one.npz"), sets)
    one = json.loads(out)
    several = launched(3, command(*wanted, "three.npz"), sets)
    assert code == 0 and [result[0] for result in several] == [0, 0, 0]
    assert [result[1] for result in several[1:]] == ["", ""] and not any("note" in result[2] for result in several[1:])
    three = json.loads(several[0][1])
    assert (one["settings"]["processes"], three["settings"]["processes"]) == (1, 3)
    for name in ("generated", "reference"):
        assert [three[name][key] for key in ("count", "sha256", "shorter_side")] == [
            one[name][key] for key in ("count", "sha256", "shorter_side")
        ]
    assert three["distance"] == pytest.approx(one["distance"], rel=1e-6)
    assert three["kid"]["mean"] == pytest.approx(one["kid"]["mean"], rel=1e-5)
    assert three["kid"]["spread"] == pytest.approx(one["kid"]["spread"], rel=1e-5)
    assert three["infinity"]["distances"] == pytest.approx(one["infinity"]["distances"], rel=1e-5)  # the draws see one order
    assert three["precision_recall"] == one["precision_recall"] and three["notes"] == one["notes"]
    with np.load("one.npz") as first, np.load("three.npz") as second:
        np.testing.assert_allclose(second["mu"], first["mu"], rtol=1e-6, atol=1e-7)
        assert int(second["count"]) == 35


def test_what_is_wrong_in_one_process_ends_all_and_is_told_once(sets: Path) -> None:
    (sets / "a/04.png").write_bytes(b"")  # the second process's
    results = launched(3, command(*FID), sets)
    assert [(code, out) for code, out, _ in results] == [(2, "")] * 3
    assert "1 of the 35 pictures of a cannot be read" in results[0][2] and "04.png" in results[0][2]
    assert "error" not in results[1][2] + results[2][2]
    code, out, err = launched(2, command(*FID, "--device", "tpu"), sets)[0]
    assert (code, out) == (2, "") and err.count("error") == 1


def test_several_processes_score_captions_as_one_does(sets: Path) -> None:
    for i in range(20):
        (sets / f"b/{i:02}.txt").write_text(" ".join(["a red square"] * (1 + 7 * (i % 5))))
    wanted = ("eval", "clip", "b", "--model", "clip", "--device", "cpu", "--batch", 4, "--workers", 1, "--json")
    ((_, one, _),) = launched(1, command(*wanted), sets)
    several = launched(3, command(*wanted), sets)
    assert [(code, bool(out)) for code, out, _ in several] == [(0, True), (0, False), (0, False)]
    first, second = json.loads(one), json.loads(several[0][1])
    assert (first["settings"].pop("processes"), second["settings"].pop("processes")) == (1, 3)
    assert second["mean"] == pytest.approx(first["mean"], rel=1e-5) and second["error"] == pytest.approx(first["error"], rel=1e-4)
    assert second["captions"] == first["captions"] and first["captions"]["too_long"]["count"] > 3
    assert second["set"]["sha256"] == first["set"]["sha256"] and second["count"] == 20
    (sets / "b/07.txt").unlink()
    failed = launched(2, command(*wanted), sets)
    assert [code for code, _, _ in failed] == [2, 2] and "07.png" in failed[0][2] and not failed[1][2]


def test_several_processes_draw_and_judge_as_one_does(model_folder: Path, tmp_path: Path) -> None:
    words = JudgeConfig(("owl", "cat"), ("3D", "flat"), ("red",), ("white", "pink"), channels=8, blocks=1, threshold=0.05)
    torch.manual_seed(0)
    save_judge(Judge(words, JudgeNetwork(words), {"all": {"categories": {}}}), tmp_path / "judge")
    wanted = ("eval", "judge", "--model", model_folder, "--judge", tmp_path / "judge", "--num", 5, "--steps", 1, "--device", "cpu")
    ((_, one, _),) = launched(1, command(*wanted, "--out", tmp_path / "one", "--json"), tmp_path)
    several = launched(3, command(*wanted, "--out", tmp_path / "three", "--batch-size", 1, "--json"), tmp_path)
    assert [(code, bool(out)) for code, out, _ in several] == [(0, True), (0, False), (0, False)]
    first, second = json.loads(one), json.loads(several[0][1])
    assert first["scores"] == second["scores"] and first["by_split"] == second["by_split"]
    pictures = [sorted((tmp_path / name).glob("0*.png")) for name in ("one", "three")]
    assert len(pictures[0]) == 5 and [path.name for path in pictures[0]] == [path.name for path in pictures[1]]
    for own, other in zip(*pictures, strict=True):
        apart = np.array(Image.open(own), dtype=int) - np.array(Image.open(other), dtype=int)
        assert abs(apart).max() <= 2
    failed = launched(2, command(*wanted, "--sampler", "ddim"), tmp_path)
    assert [code for code, _, _ in failed] == [2, 2] and "ddim" in failed[0][2] and not failed[1][2]


def test_drawn_pictures_are_sent_once(model_folder: Path, tmp_path: Path) -> None:
    """A pickled view of a batch holds the whole batch: picture by picture, 32 pictures would be sent as 32 times 32."""
    words = JudgeConfig(("owl", "cat"), ("3D", "flat"), ("red",), ("white", "pink"), channels=8, blocks=1, threshold=0.05)
    sent: list[int] = []

    def gathered(value: Any) -> list[Any]:
        sent.append(len(pickle.dumps(value)))
        return [value]

    pipeline = CascadePipeline.from_pretrained(model_folder, device="cpu", dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Processes, "gather", lambda self, value: gathered(value))
        settings = pipeline.settings(steps=1, guidance=1.0)
        judged = draw_and_judge(pipeline, Judge(words, JudgeNetwork(words), {}), load_prompts(32), sampling=settings, batch_size=32)
    assert judged is not None and sent[0] < 2 * judged.images.numel() + 30_000


def test_steps_are_taken_together(tmp_path: Path) -> None:
    def work(rank: int) -> list[str]:
        told = []
        with open_processes() as processes:
            assert processes.together(lambda: rank) == rank

            def wrong() -> None:
                if rank == 1:
                    raise ValueError("no such weights")

            def broken() -> None:
                if rank == 1:
                    raise OSError("disk full")

            for step in (wrong, broken, lambda: processes.agree("the pictures", rank // 2)):
                with pytest.raises(Exception) as caught:
                    processes.together(step) if step in (wrong, broken) else step()
                told.append(f"{caught.type.__name__}: {caught.value}")
            assert sorted(i for share in processes.everyones(processes.share(7)) for i in share) == list(range(7))
        return told

    first, second, third = launched(3, work, tmp_path)
    assert (
        first[:2] == third[:2] == ["ValueError: process 1: no such weights", "FailedProcess: process 1 has failed with OSError: disk full"]
    )
    assert second[:2] == ["ValueError: no such weights", "OSError: disk full"]
    assert all(told[2].startswith("ValueError: the pictures: processes") for told in (first, second, third))


def test_a_process_that_has_died_leaves_none_hanging(tmp_path: Path) -> None:
    def work(rank: int) -> str:
        with open_processes() as processes:
            processes.everyones(0)
            if rank == 1:
                os._exit(9)
            with pytest.raises(FailedProcess, match="has ended"):
                processes.together(lambda: None)
        return "told"

    assert launched(3, work, tmp_path) == ["told", 9, "told"]


def test_few_images_keep_their_factor_on_several_processes(tmp_path: Path) -> None:
    rows = torch.randn(9, 12, generator=torch.Generator().manual_seed(0))

    def work(rank: int) -> Gaussian:
        with open_processes():
            own = FeatureStatistics(12)
            own.add([rows[:6], rows[:0], rows[6:]][rank])
            return own.over_processes().gaussian()

    for found in launched(3, work, tmp_path):
        assert found.factor is not None and found.factor.shape == (12, 9)
        torch.testing.assert_close(found.factor @ found.factor.T, torch.cov(rows.double().T), rtol=1e-12, atol=1e-14)


def test_devices_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("t2i_experts.evaluation.processes.open_device", lambda device, received: torch.device(device))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    second = Processes(5, 8, 1, 4)
    assert second.device("cuda") == torch.device("cuda:1") and second.device("cpu") == CPU
    with pytest.raises(ValueError, match="--device='cuda:0' would put 8 processes on one GPU"):
        second.device("cuda:0")
    assert ALONE.device("cuda:1") == torch.device("cuda:1") and ALONE.device("cuda") == torch.device("cuda")


def pictures(count: int, side: int = 40) -> Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))


def test_images_in_memory_are_measured_as_files_are(sets: Path) -> None:
    extractor, pace = load_features("open_clip", FeatureOptions(model="clip"), "cpu"), Pace(CPU, batch=8)
    a = torch.stack([torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in sorted(Path("a").iterdir())])
    b = pictures(20)
    wanted = Comparison(kid=True, precision_recall=True)
    whole, parts = (measure_images(images, extractor, pace, keep=True, name="samples") for images in (a, a.split([20, 1, 14])))
    other = measure_images(b, extractor, pace, keep=True)
    first, second = (compare(measured, other, wanted) for measured in (whole, parts))
    assert first["distance"] == pytest.approx(second["distance"], rel=1e-6) and first["distance"] > 0
    assert whole.record["count"] == 35 and whole.record["shorter_side"] == [40, 40] and whole.record["sha256"] is None
    launched(1, command(*FID, "--save-stats", "a.npz"), sets)
    mean = torch.from_numpy(np.load("a.npz")["mu"])
    torch.testing.assert_close(whole.gaussian.mean, mean, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match=r"float32 must be \(B, 3, H, W\), uint8"):
        measure_images(a.float(), extractor, pace)

    def work(rank: int) -> tuple[int, float, torch.Size | None]:
        with open_processes() as processes:
            own = measure_images([a[:0], a[:20], a[20:]][rank], extractor, pace, keep=True, processes=processes)
            return (
                own.gaussian.count or 0,
                compare(own, other, Comparison())["distance"],
                None if own.features is None else own.features.shape,
            )

    results = launched(3, work, sets)
    assert [count for count, _, _ in results] == [35] * 3 and [shape for _, _, shape in results] == [torch.Size([35, 12]), None, None]
    assert [distance for _, distance, _ in results] == pytest.approx([first["distance"]] * 3, rel=1e-6)


def test_features_that_are_no_numbers_are_named(sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from t2i_experts.evaluation.features import OpenCLIPFeatures

    encode = OpenCLIPFeatures.encode

    def broken(extractor: OpenCLIPFeatures, prepared: Tensor) -> Tensor:
        features = encode(extractor, prepared)
        features[1, 3] = torch.nan
        return features

    monkeypatch.setattr(OpenCLIPFeatures, "encode", broken)
    code, out, err = launched(1, command(*FID, "--batch", 18), sets)[0]
    assert (code, out) == (2, "") and "the features of 01.png hold NaN or infinity (and those of 1 others beside it)" in err
    with pytest.raises(ValueError, match=r"image 1 \(counted from 0\) of samples hold NaN"):
        extractor = load_features("open_clip", FeatureOptions(model="clip"), "cpu")
        measure_images(pictures(4), extractor, Pace(CPU), name="samples")
    monkeypatch.setattr(OpenCLIPFeatures, "encode", lambda self, prepared: encode(self, prepared)[:-1])
    with pytest.raises(ValueError, match=r"shape \(3, 12\) where 12 features of each of 4 images were expected, from image 0"):
        measure_images(pictures(4), extractor, Pace(CPU), name="samples")


def test_one_process_of_a_host_loads_before_the_others_and_each_loads_once(tmp_path: Path) -> None:
    def work(rank: int) -> tuple[list[int], int]:
        def load() -> int:
            seen.append(len(list(tmp_path.glob("loaded*"))))  # how many others were done when this one began
            (tmp_path / f"loaded{rank}").touch()
            return rank

        seen: list[int] = []
        with open_processes() as processes:
            return seen, processes.once_a_host_first(load)

    (first, *others) = launched(3, work, tmp_path)
    assert first == ([0], 0)
    assert [result for _, result in others] == [1, 2] and all(len(seen) == 1 and seen[0] >= 1 for seen, _ in others)
