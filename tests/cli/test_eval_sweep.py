"""`eval sweep`: a point is what `eval coco` gives, none is drawn twice, and what cannot go together in one folder is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from t2i_experts.cascade.model_folder import save_model
from t2i_experts.cascade.pipeline import CascadePipeline
from t2i_experts.cascade.stage import build_network
from t2i_experts.conditioning.conditioner import TextConditioner
from t2i_experts.config import SamplingConfig, StageConfig
from t2i_experts.evaluation import coco, parts
from tests.evaluation.test_processes import command, launched

CLI = Callable[..., tuple[int, str, str]]
COUNT = 10
SMALL = ("--features", "open_clip", "--features-model", "clip", "--device", "cpu", "--dtype", "float32", "--resolution", "16")
SCORED = ("--metric", "clip:model=clip")
SOURCE = ("--shards", "shards", "--num", COUNT)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory, stage_config: StageConfig) -> Path:
    torch.manual_seed(1)
    network = build_network(stage_config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("other") / "tiny"
    save_model(folder, stage_config, SamplingConfig(steps=1), network.state_dict(), TextConditioner.from_config(stage_config.encoders))
    return folder


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip_folder: Path, model_folder: Path, other_model: Path, shards: Path) -> Path:
    """`shards` with captions, the models `a/model` and `b/model`, and `clip`; parts of 4 pictures. The working folder."""
    for name, folder in (("shards", shards / "train"), ("a/model", model_folder), ("b/model", other_model), ("clip", clip_folder)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(parts, "SIZE", 4)
    return tmp_path


@pytest.fixture
def sweep(cli: CLI, world: Path) -> Callable[..., Any]:
    """sweep(*arguments): the record, of `a/model` unless they name models."""

    def run(*arguments: object) -> Any:
        model = [] if "--model" in arguments else ["--model", "a/model"]
        code, out, err = cli("eval", "sweep", *SMALL, *SOURCE, *SCORED, *model, *arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return run


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, int, int]]:
    """(guidance, steps, index) of all pictures that are drawn."""
    found: list[tuple[float, int, int]] = []
    draw = CascadePipeline.__call__

    def watched(pipeline: CascadePipeline, prompt: Any, **options: Any) -> Any:
        sampling = options["sampling"]
        found.extend((sampling.guidance, sampling.steps, index) for index in options["indices"])
        return draw(pipeline, prompt, **options)

    monkeypatch.setattr(CascadePipeline, "__call__", watched)
    return found


def settings(record: Any) -> list[tuple[str, str, int, float]]:
    return [(point["model"], *(point["sampling"][name] for name in ("sampler", "steps", "guidance"))) for point in record["points"]]


def test_a_point_is_what_eval_coco_gives(sweep: Callable[..., Any], cli: CLI, world: Path) -> None:
    record = sweep("--guidance", "3", "--steps", "2,1", "--sampler", "euler,heun", "--seed", 5, "--kid")
    assert record == json.loads((world / "sweep/sweep.json").read_text())
    assert settings(record) == [("a/model", sampler, n, 3.0) for sampler in ("euler", "heun") for n in (1, 2)]
    for place, arguments in ((1, ("euler", 2, 3)), (2, ("heun", 1, 3))):
        options = [word for pair in zip(("--sampler", "--steps", "--guidance"), arguments, strict=True) for word in pair]
        run = (*SMALL, *SOURCE, *SCORED, "--kid", "--model", "a/model", "--seed", 5, *options)
        code, out, err = cli("eval", "coco", *run, "--json", "--out", f"coco{place}")
        assert code == 0, err
        alone, point = json.loads(out), record["points"][place]
        for name in ("distance", "kid", "scores"):
            assert point[name] == alone[name]
        whole = json.loads((world / "sweep" / point["folder"] / "result.json").read_text())
        for one in (whole, alone):
            one["generated"].pop("seconds"), one["reference"].pop("seconds"), one["values"].pop("path")
        assert {name: value for name, value in alone.items() if name != "seconds"} == whole
        assert (world / "sweep/ids.csv").read_bytes() == (world / f"coco{place}/ids.csv").read_bytes()
        with np.load("sweep/reference.npz") as one, np.load(f"coco{place}/reference.npz") as other:
            assert (one["mu"] == other["mu"]).all() and (one["sigma"] == other["sigma"]).all()
    lowest = min(record["points"], key=lambda point: point["distance"])
    highest = max(record["points"], key=lambda point: point["scores"]["clip"]["mean"])
    for place, point in ((record["best"]["distance"], lowest), (record["best"]["scores"]["clip"], highest)):
        assert place == {"model": "a/model", **{key: point["sampling"][key] for key in ("sampler", "steps", "guidance")}}
    page = (world / "sweep/sweep.md").read_text()
    assert page.count(f"**{lowest['distance']:.2f}**") == 2 and f"**{highest['scores']['clip']['mean']:.2f}**" in page
    assert "n = 10 prompts of shards" in page and "![" in page
    picture = Image.open(world / "sweep/curve.png").convert("RGB")
    assert picture.size == (960, 720) and len(np.unique(np.array(picture).reshape(-1, 3), axis=0)) > 50


def test_points_that_exist_are_read_and_others_added(
    sweep: Callable[..., Any], cli: CLI, world: Path, drawn: list[tuple[float, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = parts.Parts.write
    reference = []

    def killed(self: parts.Parts, indices: range, arrays: Any) -> None:
        if self.folder.name == "reference":
            reference.append(indices.start)
        if "guidance2" in str(self.folder) and indices.start == 4:
            raise MemoryError("killed")
        write(self, indices, arrays)

    sums, measured = [], coco.Evaluation.measured_reference
    monkeypatch.setattr(coco.Evaluation, "measured_reference", lambda self: sums.append(self.out) or measured(self))
    few = ("--guidance", "1,2", "--steps", "1")
    with monkeypatch.context() as patch:
        patch.setattr(parts.Parts, "write", killed)
        assert cli("eval", "sweep", *SMALL, *SOURCE, *SCORED, "--model", "a/model", *few)[0] == 1
    assert reference == [0, 4, 8] and drawn == [*((1.0, 1, i) for i in range(10)), *((2.0, 1, i) for i in range(8))]
    assert settings(json.loads((world / "sweep/sweep.json").read_text())) == [("a/model", "dpmpp_2m", 1, 1.0)]
    drawn.clear()
    record = sweep(*few)
    assert drawn == [(2.0, 1, i) for i in range(4, 10)] and len(record["points"]) == 2
    drawn.clear()

    again = sweep(*few, "--batch-size", 3)
    assert not drawn and again["points"] == record["points"]
    more = sweep("--guidance", "2,0.5", "--steps", "1")
    assert {guidance for guidance, *_ in drawn} == {0.5}
    assert [g for *_, g in settings(more)] == [0.5, 1.0, 2.0] and more["points"][1:] == record["points"]
    drawn.clear()

    sums.clear()
    both = sweep("--model", "b/model", "--model", "a/model", *few)
    assert len(sums) == 1, "the reference is summed up once for all points"
    assert len(drawn) == 2 * COUNT and [*both["models"]] == ["b", "a"]
    assert settings(both) == [("b", "dpmpp_2m", 1, g) for g in (1.0, 2.0)] + [("a", "dpmpp_2m", 1, g) for g in (0.5, 1.0, 2.0)]
    assert [point["distance"] for point in both["points"][2:]] == [point["distance"] for point in more["points"]]
    assert both["models"]["a"]["fingerprint"] != both["models"]["b"]["fingerprint"]
    drawn.clear()

    with monkeypatch.context() as patch:
        patch.setattr(parts.Parts, "read", lambda *_: pytest.fail("a finished point is not summed up again"))
        sweep("--model", "b/model", *few)
    kernel = sweep("--guidance", "1", "--steps", 1, "--kid")
    assert not drawn and ["kid" in point for point in kernel["points"]] == [False, True, False, False, False]


def test_another_sweep_in_the_same_folder_is_refused(sweep: Callable[..., Any], cli: CLI, world: Path) -> None:
    few = ("--guidance", 2, "--steps", 1)
    sweep(*few)
    before = {path: path.read_bytes() for path in (world / "sweep").rglob("*") if path.is_file()}
    for arguments, said in (
        (["--guidance", 7, "--seed", 1], "seed is 0 there and 1 here"),
        (["--num", 9], "prompts is "),
        (["--reference", "all"], "reference.which is 'chosen' there and 'all' here"),
        (["--guidance", 7, "--threshold", 0.9], "threshold is None there and 0.9 here"),
        (["--resolution", 20], "resolution is 16 there and 20 here"),
    ):
        code, out, err = cli("eval", "sweep", *SMALL, *SOURCE, *SCORED, "--model", "a/model", *few, *arguments)
        assert (code, out) == (2, "") and said in err and "choose another --out" in err and err.count("\n") == 1, err
    assert {path: path.read_bytes() for path in (world / "sweep").rglob("*") if path.is_file()} == before


def test_a_dry_run_says_which_points_exist_and_writes_nothing(sweep: Callable[..., Any], cli: CLI, world: Path) -> None:
    sweep("--guidance", 2, "--steps", 1)
    before = sorted(world.rglob("*"))
    wanted = ("--guidance", "1,2,3,4", "--steps", "1")
    plan = sweep(*wanted, "--model", "a/model", "--model", "b/model", "--dry-run")
    assert (plan["count"], plan["existing"], len(plan["points"])) == (8, 1, 8) and plan["estimate"]["seconds"] > 0
    there = [point for point in plan["points"] if point["exists"]]
    assert [(point["model"], point["steps"], point["guidance"]) for point in there] == [("a/model", 1, 2.0)] and there[0]["seconds"] == 0
    assert all(point["pictures"] == COUNT for point in plan["points"] if not point["exists"])
    assert plan["estimate"]["seconds"] == pytest.approx(sum(point["seconds"] for point in plan["points"]), abs=1)
    code, out, _ = cli("eval", "sweep", *SMALL, *SOURCE, *SCORED, "--model", "a/model", *wanted, "--dry-run")
    assert code == 0 and "4 points, of which 1 are there" in out and "a/model: dpmpp_2m, 1 steps, guidance 2: there" in out
    assert sorted(world.rglob("*")) == before


def test_scores_or_distances_alone_have_tables_and_curves_too(cli: CLI, world: Path) -> None:
    (world / "lines.txt").write_text("a red cube\na green apple\ndogs\n")
    small = ("--device", "cpu", "--guidance", "1,2", "--steps", 1, "--model", "a/model")
    code, out, err = cli("eval", "sweep", "--prompts", "lines.txt", *SCORED, *small, "--out", "scores")
    assert code == 0 and "2 points, of which 0 are there" in err
    lines = out.splitlines()
    head = next(i for i, line in enumerate(lines) if "CLIP score" in line and "guidance" in line)
    points = json.loads((world / "scores/sweep.json").read_text())["points"]
    for line, point in zip(lines[head + 1 : head + 3], points, strict=True):
        assert line.split()[:4] == ["a/model", "dpmpp_2m", "1", f"{point['sampling']['guidance']:g}"]
        assert f"{point['scores']['clip']['mean']:.2f}" in line and "distance" not in point
    assert lines[-1] == "scores/sweep.json, scores/sweep.md, scores/curve.png" and (world / "scores/curve.png").is_file()
    code, out, err = cli("eval", "sweep", *SMALL, *SOURCE, *small, "--out", "distances")
    assert code == 0 and "CLIP-FID" in out and "CLIP score" not in out and (world / "distances/curve.png").is_file()


def test_two_processes_share_each_point(sweep: Callable[..., Any], world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ("--guidance", "1,2", "--steps", 1)
    one = sweep(*few, "--out", "one")
    draw = CascadePipeline.__call__

    def watched(pipeline: CascadePipeline, prompt: Any, **options: Any) -> Any:
        with open(world / f"drawn{os.environ['RANK']}", "a") as file:
            file.writelines(f"{options['sampling'].guidance:g} {i}\n" for i in options["indices"])
        return draw(pipeline, prompt, **options)

    monkeypatch.setattr(CascadePipeline, "__call__", watched)
    arguments = ["eval", "sweep", *SMALL, *SOURCE, *SCORED, "--model", "a/model", *few, "--out", "two", "--json"]
    (code, out, err), others = launched(2, command(*arguments), world)
    assert code == 0 and others == (0, "", ""), err
    shares = [(world / f"drawn{rank}").read_text().split("\n")[:-1] for rank in (0, 1)]
    assert shares == [[f"{g} {i}" for g in (1, 2) for i in share] for share in ([0, 1, 2, 3, 8, 9], [4, 5, 6, 7])]
    two = json.loads(out)
    for point, other in zip(one["points"], two["points"], strict=True):
        assert (point["distance"], point["scores"], point["generated"]["sha256"]) == (
            other["distance"],
            other["scores"],
            other["generated"]["sha256"],
        )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--guidance", "1,x"], ["--guidance='1,x': 'x' is not a number"]),
        (["--guidance", "1,-2"], ["--guidance=-2.0 must be finite and not negative"]),
        (["--guidance", "1,nan"], ["--guidance=nan"]),
        (["--guidance", "3,1,3.0"], ["--guidance='3,1,3.0': 3.0 comes twice"]),
        (["--steps", "1,2.5"], ["--steps='1,2.5': '2.5' is not a whole number"]),
        (["--steps", "4,0"], ["--steps=0 must be at least 1"]),
        (["--steps", "4,"], ["--steps='4,': '' is not a whole number"]),
        (["--sampler", "heun,hein"], ["'hein'", "heun"]),
        (["--model", "a/model", "--model", "a/model"], ["--model='a/model' comes twice"]),
        (["--model", "a/model", "--model", "./a/model"], ["--model='./a/model' has the same weights as --model='a/model'"]),
        (["--model", "a/model", "--model", "nowhere"], ["nowhere"]),
        (["--metric", "clop"], ["'clop'", "clip"]),
        (["--num", "1"], ["at least 2 pictures"]),
        (["--batch-size", "0"], ["--batch-size=0 must be at least 1"]),
    ],
    ids=" ".join,
)
def test_mistakes_are_told_in_one_line(cli: CLI, world: Path, arguments: list[str], said: list[str]) -> None:
    code, out, err = cli("eval", "sweep", *SMALL, "--shards", "shards", *arguments)
    assert (code, out) == (2, "") and err.count("\n") == 1, err
    assert all(part in err for part in said), err
    assert not (world / "sweep").exists()
