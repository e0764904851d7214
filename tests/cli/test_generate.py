"""`t2i-experts generate` as a stranger uses it, with a model of random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from t2i_experts.cascade.device import default_dtype
from t2i_experts.cli.app import main
from t2i_experts.cli.generate import slug

Generate = Callable[..., tuple[int, str, str]]
DTYPE = str(default_dtype(torch.device("cpu"))).removeprefix("torch.")


@pytest.fixture
def generate(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Generate:
    """generate(*arguments) -> exit code, stdout, stderr; on the CPU, with the tiny model unless told otherwise, in tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("T2I_DEBUG", raising=False)

    def generate(*arguments: object) -> tuple[int, str, str]:
        argv = [str(argument) for argument in arguments]
        for option, value in (("--model", str(model_folder)), ("--device", "cpu")):
            argv += [] if option in argv else [option, value]
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main(["generate", *argv])
        captured = capsys.readouterr()
        return int(exit.value.code or 0), captured.out, captured.err

    return generate


def pixels(path: Path | str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def facts(path: Path | str) -> dict[str, Any]:
    with Image.open(path) as image:
        image.load()
        return json.loads(image.text["t2i-experts"])  # type: ignore[attr-defined]


def written(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# What comes out


def test_one_picture_to_a_file(generate: Generate, tmp_path: Path) -> None:
    code, out, _ = generate("a red cube", "--out", "new/cube.PNG")
    assert (code, out) == (0, "new/cube.PNG\n")
    assert written(tmp_path) == ["new/cube.PNG"]
    assert pixels("new/cube.PNG").shape == (16, 16, 3)
    assert pixels("new/cube.PNG").std() > 5


def test_without_out_it_goes_to_a_folder_under_its_words_and_seed(generate: Generate, tmp_path: Path) -> None:
    code, out, _ = generate("A red cube, on grass!", "--seed", 7)
    assert (code, out) == (0, "pictures/a-red-cube-on-grass-7.png\n")
    assert written(tmp_path) == ["pictures/a-red-cube-on-grass-7.png"]


def test_several_prompts_and_several_of_each(generate: Generate, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("\ufeffa red cube\r\n\r\n  一只猫  \na red cube\n".encode())
    code, out, _ = generate("--prompts", "prompts.txt", "--num", 2, "--out", "many")
    names = ["0-a-red-cube-0", "1-a-red-cube-0", "2-一只猫-0", "3-一只猫-0", "4-a-red-cube-0", "5-a-red-cube-0"]
    assert code == 0
    assert out.splitlines() == [f"many/{name}.png" for name in names]
    assert written(tmp_path / "many") == sorted(f"{name}.png" for name in names)
    assert [(facts(path)["prompt"], facts(path)["index"]) for path in out.splitlines()] == [
        ("a red cube", 0), ("a red cube", 1), ("一只猫", 2), ("一只猫", 3), ("a red cube", 4), ("a red cube", 5),
    ]  # fmt: skip
    pictures = [pixels(path).tobytes() for path in out.splitlines()]
    assert len(set(pictures)) == 6, "every picture has its own noise"


def test_names_sort_as_they_were_drawn(generate: Generate) -> None:
    _, out, _ = generate("", "--num", 11, "--steps", 1, "--guidance", 1, "--out", "many")
    assert out.splitlines() == sorted(out.splitlines())
    assert out.splitlines()[10] == "many/10-picture-0.png"


def test_json_is_one_document_and_nothing_else(generate: Generate, model_folder: Path) -> None:
    code, out, err = generate("a red cube 猫", "--num", 2, "--out", "many", "--json", "--sampler", "heun", "--seed", 3)
    assert (code, err) == (0, "warning: t5's vocabulary lacks these characters, and it can hardly read them: '猫'\n")
    document = json.loads(out)
    assert out.count("\n") == 1 and "猫" in out
    assert [picture["path"] for picture in document["pictures"]] == ["many/0-a-red-cube-猫-3.png", "many/1-a-red-cube-猫-3.png"]
    for index, picture in enumerate(document["pictures"]):
        assert (picture["prompt"], picture["seed"], picture["index"], picture["style"]) == ("a red cube 猫", 3, index, None)
        assert facts(picture["path"]).items() >= {key: value for key, value in picture.items() if key != "path"}.items()
    assert document["sampling"]["sampler"] == "heun"
    assert (document["device"], document["dtype"]) == ("cpu", DTYPE)
    assert document["model"]["source"] == str(model_folder)
    assert document["seconds"] > 0


def test_progress_goes_to_stderr_and_paths_to_stdout(generate: Generate) -> None:
    _, out, err = generate("a", "--num", 2, "--batch-size", 1, "--out", "many")
    assert out == "many/0-a-0.png\nmany/1-a-0.png\n"
    assert "/8" in err and "step" in err, "two batches of four steps"


# What a picture depends on


def test_the_png_tells_how_to_draw_it_again(generate: Generate, model_folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (20, 30), (200, 30, 90)).save(tmp_path / "style.png")
    chosen = ("--seed", 5, "--steps", 3, "--guidance", 2.5, "--sampler", "heun", "--threshold", 0.9, "--negative", "a green apple")
    generate("a red cube", *chosen, "--style", "style.png", "--out", "first.png")
    told = facts("first.png")
    sampling = told["sampling"]
    assert told["model"]["source"] == str(model_folder)
    again: list[object] = [told["prompt"], "--model", told["model"]["source"], "--out", "again.png"]
    for name in ("seed", "negative", "style"):
        again += [f"--{name}", told[name]]
    for name in ("steps", "guidance", "sampler", "threshold"):
        again += [f"--{name}", sampling[name]]
    code, _, _ = generate(*again)
    assert code == 0
    assert Path("again.png").read_bytes() == Path("first.png").read_bytes()


def test_the_png_tells_what_computed_it(generate: Generate) -> None:
    generate("a red cube", "--out", "half.png", "--dtype", "bfloat16")
    assert (facts("half.png")["device"], facts("half.png")["dtype"]) == ("cpu", "bfloat16")


def test_the_models_own_settings_are_told_too(generate: Generate) -> None:
    generate("a red cube", "--out", "plain.png")
    assert facts("plain.png")["sampling"].items() >= {"sampler": "dpmpp_2m", "steps": 4, "guidance": 3.0, "threshold": 0.0}.items()
    generate("a red cube", "--out", "given.png", "--sampler", "dpmpp_2m", "--steps", 4, "--guidance", 3, "--threshold", 0)
    assert Path("given.png").read_bytes() == Path("plain.png").read_bytes()


def test_the_python_door_draws_the_picture_of_the_png(generate: Generate, model_folder: Path) -> None:
    from t2i_experts.cascade.pipeline import CascadePipeline
    from t2i_experts.config import SamplingConfig, from_plain

    _, out, _ = generate("a red cube", "--num", 3, "--batch-size", 1, "--seed", 2, "--out", "many")
    told = facts(out.splitlines()[2])
    pipeline = CascadePipeline.from_pretrained(told["model"]["source"], device="cpu")
    assert pipeline.model.fingerprint == told["model"]["fingerprint"]
    sampling = from_plain(SamplingConfig, told["sampling"])
    image = pipeline(told["prompt"], seed=told["seed"], indices=[told["index"]], sampling=sampling)
    assert (image[0].permute(1, 2, 0).numpy() == pixels(out.splitlines()[2])).all()


def test_picture_i_does_not_depend_on_the_batch_size(generate: Generate, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red cube\n\na green apple\ntwo dogs on the left of a very long sentence\n🐈\n")
    folders = []
    for size in (1, 3, 8):
        code, out, _ = generate("--prompts", "prompts.txt", "--batch-size", size, "--out", f"by{size}")
        assert code == 0
        folders.append([pixels(path) for path in out.splitlines()])
    assert len(folders[0]) == 4
    for others in folders[1:]:
        for first, other in zip(folders[0], others, strict=True):
            assert abs(first - other).max() <= 2


def test_the_same_seed_gives_the_same_bytes_and_everything_else_another_picture(generate: Generate, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "style.png")

    def draw(*arguments: object, prompt: str = "a red cube") -> bytes:
        assert generate(prompt, "--out", "x.png", *arguments)[0] == 0
        return pixels("x.png").tobytes()

    first = draw()
    before = Path("x.png").read_bytes()
    assert draw() == first
    assert Path("x.png").read_bytes() == before
    assert draw("--dtype", DTYPE, "--batch-size", 3) == first
    for arguments in (
        ("--seed", 1), ("--seed", 2**64), ("--steps", 5), ("--guidance", 1), ("--sampler", "euler"), ("--threshold", 0.5),
        ("--negative", "a green apple"), ("--style", "style.png"), ("--dtype", "float32" if DTYPE == "bfloat16" else "bfloat16"),
    ):  # fmt: skip
        assert draw(*arguments) != first, arguments
    assert draw(prompt="a green apple") != first


# Strange prompts


def test_a_prompt_of_5000_words_is_drawn_and_its_cut_is_told(generate: Generate) -> None:
    prompt = "a red apple on the left " * 834
    code, out, err = generate(prompt, "--out", "long")
    assert code == 0
    assert len(Path(out.strip()).name) < 64
    warnings = [line for line in err.splitlines() if "warning: " in line]
    assert len(warnings) == 2
    for encoder, line in zip(("t5", "clip_text"), warnings, strict=True):
        cut = int(line.split("up to character ")[1].split(":")[0])
        assert f"{encoder} reads the prompt only" in line
        assert repr(prompt[max(0, cut - 40) : cut]) in line
        assert 0 < cut < 1000
    code, _, err = generate("a red apple", "--negative", prompt, "--out", "short")
    assert code == 0 and err.count("warning: ") == 2, "a cut negative prompt is told as well"
    assert "warning" not in generate("a red apple", "--out", "short")[2]


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("", "picture"),
        ("  ", "picture"),
        ("🍎👩‍👩‍👧 🏳️‍🌈", "picture"),
        ("一只红色的猫", "一只红色的猫"),
        ("../../x/.y", "x-y"),
        ("%s {} \n", "s"),
        ("a\x00b", "a-b"),
    ],
)
def test_strange_prompts_are_drawn_and_stay_in_the_folder(generate: Generate, tmp_path: Path, prompt: str, name: str) -> None:
    code, out, _ = generate(prompt, "--out", "many", "--steps", 1)
    assert (code, out) == (0, f"many/{name}-0.png\n")
    assert written(tmp_path) == [f"many/{name}-0.png"]
    assert facts(f"many/{name}-0.png")["prompt"] == prompt


def test_every_slug_is_a_file_name(tmp_path: Path) -> None:
    for text in ("猫" * 500, "𠀀" * 500, "İ" * 500, "a/b\\c:d*e?f", ".", "..", "-", "_", "con\n"):
        name = f"12345-{slug(text)}-{2**64}.png"
        (tmp_path / name).touch()
        assert Path(name).name == name and slug(text)


def test_a_slug_keeps_the_words_of_any_script() -> None:
    assert slug("Un café — e\u0301te\u0301, 3 €") == "un-café-été-3"
    assert slug("हिन्दी में") == "हिन्दी-में", "marks that cannot stand alone stay in their words"
    assert slug("红苹果🍎") == "红苹果"
    assert slug("🍎🍎") == slug("\u0301") == slug("") == "picture"


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        (["a red cube"], None),
        (["a “red” cube…"], None),
        (["a 🍎 cube"], "'🍎'"),
        (["一只猫"], "'一只猫'; the prompt '一只猫' has no others"),
        (["猫 and 猫", "🍎!", "猫🍎", "a red cube"], "'猫🍎'; 2 prompts have no others"),
    ],
)
def test_characters_that_t5_does_not_know_are_told_once(generate: Generate, tmp_path: Path, prompts: list[str], said: str | None) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    code, _, err = generate("--prompts", "prompts.txt", "--steps", 1, "--guidance", 1, "--json")
    warnings = [] if said is None else [f"warning: t5's vocabulary lacks these characters, and it can hardly read them: {said}"]
    assert (code, err.splitlines()) == (0, warnings)


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], ["PROMPT", "--prompts", "neither"]),
        (["a", "--prompts", "prompts.txt"], ["PROMPT='a'", "--prompts=prompts.txt", "both"]),
        (["a", "--num", 0], ["--num=0", "at least 1"]),
        (["a", "--batch-size", -1], ["--batch-size=-1", "at least 1"]),
        (["a", "--seed", -1], ["--seed=-1", "negative"]),
        (["a", "--steps", 0], ["--steps=0", "at least 1"]),
        (["a", "--guidance", -1], ["--guidance=-1.0", "not negative"]),
        (["a", "--guidance", "nan"], ["--guidance=nan"]),
        (["a", "--guidance", "inf"], ["--guidance=inf", "finite"]),
        (["a", "--sampler", "dpmp_2m"], ["sampler 'dpmp_2m'", "did you mean 'dpmpp_2m'", "euler, heun"]),
        (["a", "--threshold", 2], ["--threshold=2.0", "[0, 1)"]),
        (["a", "--threshold", -0.5], ["--threshold=-0.5", "[0, 1)"]),
        (["a", "--size", 100], ["--size=100", "16 px and no others"]),
        (["a", "--width", 20, "--height", 12], ["--width=20 --height=12", "16x16 px and no others"]),
        (["a", "--width", 16], ["--width and --height together", "height=None"]),
        (["a", "--size", 16, "--width", 16, "--height", 16], ["not with --size", "size=16"]),
        (["a", "--dtype", "float16"], ["--dtype='float16'", "float32, bfloat16"]),
        (["a", "--device", "nonsense"], ["device='nonsense'", "cpu"]),
        (["a", "--device", "cuda:99"], ["device='cuda:99'"]),
        (["a", "--out", "x.jpg"], ["--out=x.jpg", "PNG"]),
        (["a", "--out", "x.png", "--num", 2], ["--out=x.png", "2 pictures", "folder"]),
        (["a", "--out", "folder.png"], ["--out=folder.png", "is a folder"]),
        (["a", "--out", "prompts.txt"], ["--out=prompts.txt", "is a file"]),
        (["a", "--out", "prompts.txt/new/x.png"], ["--out=prompts.txt/new/x.png", "prompts.txt is a file"]),
        (["a", "--model", "./nowhere"], ["model='./nowhere'", "no such folder"]),
        (["a", "--model", "folder.png"], ["model='folder.png'", "holds no model_index.json"]),
        (["a", "--style", "prompts.txt"], ["--style=prompts.txt", "cannot read"]),
        (["a", "--style", "nowhere.png"], ["--style=nowhere.png", "no such file"]),
        (["a", "--negative", "b", "--guidance", 1], ["--negative='b'", "guidance 1", "--guidance"]),
        (["\udcff"], ["PROMPT='\\udcff'", "UTF-8"]),
        (["a", "--negative", "\udcff"], ["--negative='\\udcff'", "UTF-8"]),
        (["--prompts", "latin.txt"], ["--prompts=latin.txt", "UTF-8"]),
        (["--prompts", "blank.txt"], ["--prompts=blank.txt", "no prompt"]),
        (["--prompts", "nowhere.txt"], ["--prompts=nowhere.txt"]),
        (["--prompts", "folder.png"], ["--prompts=folder.png"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("as_json", [[], ["--json"]], ids=["", "json"])
def test_a_mistake_is_one_line_that_names_it_and_nothing_is_written(
    generate: Generate, tmp_path: Path, arguments: list[object], said: list[str], as_json: list[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("a red cube\n")
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "latin.txt").write_bytes("ein Äpfelchen".encode("latin-1"))
    (tmp_path / "folder.png").mkdir()
    before = written(tmp_path)
    code, out, err = generate(*arguments, *as_json)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert all(part in line for part in said), line
    assert written(tmp_path) == before
    assert not (tmp_path / "pictures").exists()


def test_a_size_is_refused_before_the_weights_are_read(generate: Generate, model_folder: Path, tmp_path: Path) -> None:
    for name in ("model_index.json", "base64/config.json"):
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_bytes((model_folder / name).read_bytes())
    for size, said in ((32, "--size=32; this model makes pictures of 16x16 px"), (16, "is not whole, it lacks t5")):
        code, _, err = generate("a", "--model", tmp_path / "model", "--size", size)
        assert code == 2 and said in err


@pytest.mark.parametrize("arguments", [["--num", "many"], ["--steps", "1.5"], ["--nonsense"], ["b"]])
def test_usage_errors_exit_with_2(generate: Generate, tmp_path: Path, arguments: list[str]) -> None:
    code, out, err = generate("a", *arguments)
    assert (code, out) == (2, "")
    assert arguments[0] in err and "Traceback" not in err
    assert written(tmp_path) == []


def test_a_style_for_a_model_that_reads_no_pictures(generate: Generate, model_folder: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from t2i_experts.cascade.model_folder import load_model, save_model
    from t2i_experts.cascade.stage import build_network
    from t2i_experts.conditioning.conditioner import TextConditioner

    model = load_model(model_folder)
    stage = model.stages["base64"]
    config = replace(stage.config, encoders={"t5": replace(stage.config.encoders["t5"], model=str(model_folder / "t5"))})
    conditioner = TextConditioner.from_config(config.encoders)
    save_model(tmp_path / "text", config, stage.sampling, build_network(config).state_dict(), conditioner)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "style.png")
    code, out, err = generate("a", "--model", "text", "--style", "style.png")
    assert (code, out) == (2, "")
    assert err == "error: --style=style.png: this model has no encoder of pictures; its encoders: t5\n"
    assert generate("a", "--model", "text", "--out", "x.png")[0] == 0


def test_a_picture_in_a_folder_is_never_overwritten(generate: Generate, tmp_path: Path) -> None:
    paths = [generate("a cube", "--out", "many", "--guidance", guidance)[1].strip() for guidance in (1, 2, 3)]
    assert paths == ["many/a-cube-0.png", "many/a-cube-0-2.png", "many/a-cube-0-3.png"]
    assert [facts(path)["sampling"]["guidance"] for path in paths] == [1, 2, 3]


def test_a_folder_that_cannot_be_made_is_the_users_mistake(generate: Generate) -> None:
    code, out, err = generate("a cube", "--out", "/proc/nowhere")
    assert (code, out) == (2, "")
    assert "--out: the folder /proc/nowhere cannot be made" in err
