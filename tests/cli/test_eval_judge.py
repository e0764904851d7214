"""`t2i-experts eval judge` with a model and a judge of random weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from t2i_experts.cascade.picture import read_metadata
from t2i_experts.evaluation import judging
from t2i_experts.evaluation.composition import load_prompts
from t2i_experts.evaluation.judge import Judge, JudgeConfig, JudgeNetwork, load_judge, save_judge

CLI = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = JudgeConfig(("owl", "cat"), ("3D", "flat"), ("red",), ("white", "pink"), channels=8, blocks=1, threshold=0.05)
    torch.manual_seed(0)
    own = {"all": {"categories": {"style": {"confirmed": 0.987, "rejected": 0.654, "cases": 9}}}}
    folder = tmp_path_factory.mktemp("judge")
    save_judge(Judge(words, JudgeNetwork(words), own), folder)
    return folder


def test_the_scores_stand_beside_the_judges_accuracy(cli: CLI, judge: Path, model_folder: Path, tmp_path: Path) -> None:
    options = ["--model", model_folder, "--judge", judge, "--num", 12, "--seed", 3, "--steps", 2, "--device", "cpu", "--batch-size", 5]
    code, out, _ = cli("eval", "judge", *options, "--out", tmp_path / "judged", "--json")
    result = json.loads(out)
    prompts = load_prompts(12, seed=3)
    assert code == 0 and result["scores"]["style"]["cases"] == 12
    assert result["scores"]["object"]["cases"] == sum(claim.category == "object" for prompt in prompts for claim in prompt.claims)
    assert sum(scores["style"]["cases"] for scores in result["by_split"].values()) == 12
    assert result["judge"]["accuracy"]["all"]["categories"]["style"]["confirmed"] == 0.987
    assert result["sampling"]["steps"] == 2 and result["model"]["fingerprint"] and result["seed"] == 3

    kept = json.loads((tmp_path / "judged/result.json").read_text(encoding="utf-8"))
    assert kept["scores"] == result["scores"] and [one["prompt"] for one in kept["pictures"]] == [prompt.text for prompt in prompts]
    verdicts = [claim[-1] for one in kept["pictures"] for claim in one["claims"] if claim[0] == "style"]
    assert sum(verdicts) / 12 == pytest.approx(result["scores"]["style"]["right"])
    for i, one in enumerate(kept["pictures"]):
        facts = read_metadata(tmp_path / "judged" / one["picture"])
        assert facts is not None and (facts["prompt"], facts["index"], facts["seed"]) == (one["prompt"], i, 3)
    assert Image.open(tmp_path / "judged/sheet.png").width > 1000

    code, out, _ = cli("eval", "judge", *options, "--batch-size", 12)
    assert code == 0 and "98.7" in out and "65.4" in out and "all of the prompt" in out
    share = f"{100 * result['scores']['style']['right']:.1f}"
    assert next(line for line in out.splitlines() if line.startswith("style")).split()[1] == share

    changed = [*options[:8], "--steps", 3, *options[10:]]
    assert cli("eval", "judge", *changed, "--out", tmp_path / "other", "--json")[0] == 0
    code, out, err = cli("eval", "compare", tmp_path / "judged/result.json", tmp_path / "other/result.json", "--json")
    assert code == 0, err
    found = json.loads(out)
    other = json.loads((tmp_path / "other/result.json").read_text(encoding="utf-8"))
    change = torch.tensor([_style(after) - _style(before) for before, after in zip(kept["pictures"], other["pictures"], strict=True)])
    assert found["differs"] == {"sampling.steps": [2, 3]}
    difference = found["differences"]["style"][0]
    assert difference["paired"] and difference["value"] == pytest.approx(float(change.mean()))
    assert difference["error"] == pytest.approx(float(change.std() / 12**0.5))
    assert set(found["numbers"]) == set(result["scores"])


def _style(picture: Any) -> float:
    (held,) = (claim[-1] for claim in picture["claims"] if claim[0] == "style")
    return float(held)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--num", "0"], "--num=0"),
        (["--seed", "-1"], "--seed=-1"),
        (["--dtype", "float16"], "--dtype='float16'"),
        (["--judge", "nowhere"], "judge='nowhere' is no folder with judge.json"),
        (["--out", "{full}"], "name a new folder"),
        (["--steps", "0"], "--steps=0"),
        (["--sampler", "ddim"], "ddim"),
    ],
)
def test_what_is_wrong_is_said(cli: CLI, judge: Path, model_folder: Path, tmp_path: Path, options: list[str], said: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    options = [option.format(full=tmp_path / "full") for option in options]
    code, out, err = cli("eval", "judge", "--model", model_folder, "--judge", judge, *options)
    assert code == 2 and out == "" and said in err


def test_a_folder_that_cannot_be_made_is_known_before_anything_is_drawn(
    cli: CLI, judge: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(judging, "draw", lambda *inputs, **options: drawn.append(inputs) or iter(()))
    (tmp_path / "file").touch()
    code, _, err = cli("eval", "judge", "--model", model_folder, "--judge", judge, "--num", 2, "--out", tmp_path / "file/out")
    assert code == 2 and "file/out cannot be made" in err and not drawn


def test_a_judge_that_saw_the_models_scenes_or_does_not_know_itself_is_refused(
    cli: CLI, judge: Path, model_folder: Path, tmp_path: Path
) -> None:
    trained = load_judge(str(judge))
    model = shutil.copytree(model_folder, tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {"provenance": {"dataset_hash": "abc"}}))
    few = ["--model", model, "--num", 1, "--steps", 1, "--device", "cpu", "--json"]
    for shards, code in (({"train": "xyz"}, 0), ({"train": "xyz", "more": "abc"}, 2)):
        save_judge(trained, tmp_path / "other", training={"shards": shards})
        found, _, err = cli("eval", "judge", "--judge", tmp_path / "other", *few)
        assert found == code and ("the very scenes that the model was trained on (dataset hash abc)" in err) == (code == 2)
    save_judge(replace(trained, accuracy={}), tmp_path / "other")
    code, _, err = cli("eval", "judge", "--judge", tmp_path / "other", *few)
    assert code == 2 and "does not say how accurate it is on real scenes" in err
