"""What a user may get wrong, command by command: exit code 2, nothing on stdout, and one message that names it and says what is allowed."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import t2i_experts

CLI = Callable[..., tuple[int, str, str]]

MODEL, CHECKPOINT = "base64/diffusion_pytorch_model.safetensors", "checkpoints/000000000064"


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _replace(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


FILES = {
    "blank.txt": b" \n\n", "latin.txt": "ein Äpfelchen".encode("latin-1"), "log.txt": b"hello",
    "latin.yaml": "output: Äpfel".encode("latin-1"), "broken.yaml": b"a: [1", "list.yaml": b"[1, 2]", "empty.yaml": b"",
    "circle.yaml": b"extends: circle.yaml", "orphan.yaml": b"extends: nobody.yaml",
    "columns.csv": b"fil,caption\na,b\n", "latin.csv": b"file,caption\na,\xff\n", "scores.csv": b"file,caption,score\npictures/a.png,a,3\n",
    "broken.jsonl": b"{\n", "broken.json": b"[]", "text.rtf": b"a", "windows.txt": "“a” cat".encode("cp1252"),
}  # fmt: skip

BROKEN_MODELS: dict[str, Callable[[Path], object]] = {
    "cut": lambda m: _cut(m / MODEL),
    "bare": lambda m: (m / MODEL).unlink(),
    "wide": lambda m: _replace(m / "base64/config.json", '"channels": 16', '"channels": 24'),
    "odd": lambda m: _replace(m / "base64/config.json", '"blocks"', '"bloks"'),
    "garbled": lambda m: (m / "model_index.json").write_text("{"),
    "mute": lambda m: shutil.rmtree(m / "t5"),
    "deaf": lambda m: _cut(m / "clip/open_clip_model.safetensors"),
}

BROKEN_SHARDS: dict[str, Callable[[Path], object]] = {
    "lost": lambda s: (s / "00000.tar").unlink(),
    "short": lambda s: _cut(s / "00000.tar"),
    "loose": lambda s: (s / "manifest.json").unlink(),
    "damaged": lambda s: (s / "manifest.json").write_text("{"),
}

BROKEN_RUNS: dict[str, Callable[[Path], object]] = {
    "torn": lambda r: _cut(r / CHECKPOINT / "optimizer.safetensors"),
    "blurred": lambda r: (r / CHECKPOINT / "state.json").write_text("{}"),
    "faded": lambda r: [_cut(snapshot) for snapshot in (r / "snapshots").iterdir()],
    "silent": lambda r: (r / "log.jsonl").write_bytes(b"\xff\n"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, shards: Path, trained: Path) -> Path:
    """A folder with one of each: pictures, texts, models, shards and runs, whole and broken."""
    world = tmp_path_factory.mktemp("world")
    for name, data in FILES.items():
        (world / name).write_bytes(data)
    (world / "empty").mkdir()
    (world / "pictures").mkdir()
    Image.new("RGB", (8, 8), "red").save(world / "pictures" / "a.png")
    (world / "pictures" / "a.txt").write_text("a red square")
    for name in ("latin", "zipped"):
        (world / name).mkdir()
    shutil.copy(world / "pictures" / "a.png", world / "latin")
    (world / "latin" / "a.txt").write_bytes("ein Äpfelchen".encode("latin-1"))
    (world / "zipped" / "00000.tar").write_bytes(gzip.compress((shards / "train" / "00000.tar").read_bytes()))
    for source, broken in ((model_folder, BROKEN_MODELS), (shards / "train", BROKEN_SHARDS), (trained, BROKEN_RUNS)):
        for name, spoil in {"whole": lambda path: None, **broken}.items():
            folder = world / source.name / name
            shutil.copytree(source, folder)
            spoil(folder)
    config = trained.with_suffix(".yaml").read_text(encoding="utf-8")
    (world / "run.yaml").write_text(config.replace(str(trained), str(world / "new")), encoding="utf-8")
    for name in ("whole", "torn", "blurred"):
        (world / f"{name}.yaml").write_text(config.replace(str(trained), str(world / "run" / name)), encoding="utf-8")
    return world


USAGE: list[tuple[list[str], list[str]]] = [
    (["generat"], ["unknown command 'generat'", "'generate'", "train, report"]),
    (["--verbos"], ["--verbos"]),
    (["shards", "biuld"], ["'biuld'", "'build'"]),
    (["generate", "a", "--stepz", "3"], ["--stepz", "--steps"]),
    (["generate", "a", "b"], ["extra argument", "b"]),
    (["generate", "a", "--steps", "many"], ["'--steps'", "integer", "'many'"]),
    (["generate", "a", "--guidance", "much"], ["'--guidance'", "number", "'much'"]),
    (["generate", "a", "--seed"], ["'--seed'", "requires an argument"]),
    (["train"], ["'CONFIG'"]),
    (["ema", "run/whole", "--out", "x"], ["'--sigma-rel'"]),
    (["report"], ["'RUN'"]),
    (["config", "diff", "run.yaml"], ["'B'"]),
    (["shards", "build", "pictures"], ["'--out'"]),
    (["shards", "show", "train/whole", "first"], ["'index'", "'first'"]),
    (["completion"], ["'SHELL'"]),
]

GENERATE: list[tuple[list[str], list[str]]] = [
    ([], ["PROMPT", "--prompts", "neither"]),
    (["a", "--prompts", "blank.txt"], ["both", "PROMPT='a'"]),
    (["--prompts", "latin.txt"], ["--prompts=latin.txt", "not UTF-8", "Latin-1", "iconv -f latin1 -t utf-8"]),
    (["--prompts", "windows.txt"], ["--prompts=windows.txt", "Windows-1252", "iconv -f cp1252 -t utf-8"]),
    (["--prompts", "blank.txt"], ["--prompts=blank.txt", "no prompt"]),
    (["--prompts", "nowhere.txt"], ["--prompts=nowhere.txt", "no such file", "a prompt on each line"]),
    (["--prompts", "pictures"], ["--prompts=pictures", "a folder", "a prompt on each line"]),
    (["a", "--steps", "-3"], ["--steps=-3", "at least 1"]),
    (["a", "--num", "0"], ["--num=0", "at least 1"]),
    (["a", "--seed", "-1"], ["--seed=-1", "negative"]),
    (["a", "--guidance", "nan"], ["--guidance=nan", "finite"]),
    (["a", "--sampler", "eular"], ["'eular'", "did you mean 'euler'?", "dpmpp_2m, euler, heun"]),
    (["a", "--dtype", "half"], ["--dtype='half'", "float32, bfloat16"]),
    (["a", "--device", "gpu"], ["device='gpu'", "cpu"]),
    (["a", "--size", "512"], ["--size=512", "16 px"]),
    (["a", "--size", "0"], ["--size=0", "at least 1"]),
    (["a", "--style", "log.txt"], ["--style=log.txt", "cannot read"]),
    (["a", "--style", "nowhere.png"], ["--style=nowhere.png", "no such file"]),
    (["a", "--out", "x.jpg"], ["--out=x.jpg", "PNG"]),
    (["a", "--out", "log.txt"], ["--out=log.txt", "is a file"]),
    (["a", "--out", "/proc/new/x.png"], ["--out", "/proc/new", "cannot be made"]),
    (["a", "--model", "nowhere"], ["model='nowhere'", "no such folder"]),
    (["a", "--model", "empty"], ["model='empty'", "model_index.json"]),
    (["a", "--model", "run/whole"], ["run/whole", "did you mean run/whole/model?"]),
    (["a", "--model", "tiny/cut"], [f"tiny/cut/{MODEL}", "damaged"]),
    (["a", "--model", "tiny/bare"], [f"weights not found: tiny/bare/{MODEL}"]),
    (["a", "--model", "tiny/wide"], [f"tiny/wide/{MODEL}", "does not fit its config.json", "(16, 8, 3, 3) in the file", "(24, 8, 3, 3)"]),
    (["a", "--model", "tiny/odd"], ["tiny/odd/base64/config.json", "resolutions[0].bloks", "'blocks'"]),
    (["a", "--model", "tiny/garbled"], ["tiny/garbled/model_index.json", "line 1"]),
    (["a", "--model", "tiny/mute"], ["encoders.t5", "tiny/mute"]),
    (["a", "--model", "tiny/deaf"], ["encoders.clip_text", "damaged"]),
]

TRAIN: list[tuple[list[str], list[str]]] = [
    (["nowhere.yaml"], ["nowhere.yaml", "not found", "tiny/base64"]),
    (["tiny/bse64"], ["did you mean 'tiny/base64'?"]),
    (["broken.yaml"], ["broken.yaml", "not valid YAML", "line"]),
    (["latin.yaml"], ["latin.yaml", "utf-8"]),
    (["list.yaml"], ["list.yaml", "keys and values"]),
    (["empty.yaml"], ["empty.yaml is empty", "data, output, stage, training", "extends: tiny/base64"]),
    (["pictures"], ["CONFIG='pictures' is a folder", "no YAML file", "config list"]),
    (["."], ["CONFIG='.' is a folder", "broken.yaml", "config list"]),
    (["circle.yaml"], ["circle", "circle.yaml"]),
    (["orphan.yaml"], ["nobody.yaml", "extended by", "orphan.yaml"]),
    (["run.yaml", "training"], ["'training'", "key=value"]),
    (["run.yaml", "training.optimzer.beta1=0.5"], ["training.optimzer", "did you mean 'optimizer'?"]),
    (["run.yaml", "batch_size=4"], ["batch_size", "did you mean 'training.batch_size'?"]),
    (["run.yaml", "training.images=many"], ["training.images", "'many'", "Integer"]),
    (["run.yaml", "training.images=0"], ["training.images=0", "positive"]),
    (["run.yaml", "training.precision=fp16"], ["training.precision", "'fp16'", "['fp32', 'bf16']"]),
    (["run.yaml", "training.images=[1"], ["training.images=[1", "YAML"]),
    (["run.yaml", "training=3"], ["training: ", "TrainingConfig", "3"]),
    (["run.yaml", "data.train=x"], ["data.train: ", "'x'", "'[a, b]'"]),
    (["run.yaml", "data.train[0]=x"], ["data.train: ", "as a whole", "'[a, b]'"]),
    (["run.yaml", "stage.network.resolutions[1].channels=7"], ["stage.network.resolutions: ", "as a whole"]),
    (["run.yaml", "stage.encoders={}"], ["'stage.encoders={}'", "changes nothing"]),
    (["run.yaml", "stage.encoders.t6.drop=0.1"], ["stage.encoders.t6.kind", "stage.encoders has t5, clip_text"]),
    (["run.yaml", "stage.size=17"], ["stage.size=17", "multiple of 2"]),
    (["run.yaml", "training.trackers=[wandbb]"], ["training.trackers=['wandbb']", "tensorboard and wandb"]),
]
"""Of a config, so `config check` and `config show` say the same."""

BEGIN: list[tuple[list[str], list[str]]] = [
    (["run.yaml", "output=log.txt"], ["output='log.txt'", "File exists"]),
    (["run.yaml", "output=/proc/x/y"], ["output='/proc/x/y'", "cannot be used"]),
    (["run.yaml", "training.device=tpu"], ["training.device='tpu'", "cpu"]),
    (["run.yaml", "sampling.sampler=eular"], ["sampling.sampler: unknown sampler 'eular'", "'euler'"]),
    (["run.yaml", "stage.encoders.t5.kind=t6"], ["stage.encoders.t5.kind: ", "'t6'", "clip_image, clip_text, t5"]),
    (["run.yaml", "data.train=[nowhere]"], ["nowhere", "not found"]),
    (["run.yaml", "data.train=[pictures]"], ["pictures", "shards build"]),
    (["run.yaml", "data.train=[train/lost]"], ["train/lost/00000.tar is missing", "shards check"]),
    (["run.yaml", "data.train=[train/short]"], ["train/short/00000.tar has", "the manifest says", "shards check"]),
    (["run.yaml", "data.train=[train/loose]"], ["train/loose", "--write-manifest"]),
    (["run.yaml", "data.train=[train/damaged]"], ["train/damaged/manifest.json", "damaged"]),
    (["whole.yaml", "training.batch_size=4"], ["another config", "training.batch_size: 8 -> 4"]),
    (["torn.yaml"], [f"run/torn/{CHECKPOINT}", "cannot be read", "remove it"]),
    (["blurred.yaml"], [f"run/blurred/{CHECKPOINT}", "images_seen and config"]),
]

OTHERS: list[tuple[list[str], list[str]]] = [
    (["report", "nowhere"], ["RUN='nowhere'", "log.jsonl"]),
    (["report", "run/silent"], ["run/silent/log.jsonl", "tells nothing"]),
    (["report", "run/whole", "--out", "log.txt"], ["--out 'log.txt'", "folder"]),
    (["ema", "nowhere", "--sigma-rel", "0.1", "--out", "x"], ["RUN='nowhere' is not there", "the output folder of a training run"]),
    (["ema", "log.txt", "--sigma-rel", "0.1", "--out", "x"], ["RUN='log.txt' is a file", "the output folder of a training run"]),
    (["ema", "empty", "--sigma-rel", "0.1", "--out", "x"], ["empty holds no snapshots", "snapshot_every_images"]),
    (["ema", "run/whole", "--sigma-rel", "0.4", "--out", "x"], ["sigma_rel=0.4", "below 0.2887"]),
    (["ema", "run/whole", "--sigma-rel", "0.1", "--out", "x", "--images", "17"], ["17", "16, 32, 48, 64"]),
    (["ema", "run/whole", "--sigma-rel", "0.1", "--out", "empty"], ["out='empty' exists already"]),
    (["ema", "run/faded", "--sigma-rel", "0.13", "--out", "x"], ["run/faded/snapshots", "cannot be read"]),
    (["config", "check", "run.yaml", "sampling.sampler=eular"], ["sampling.sampler", "'euler'"]),
    (["config", "diff", "run.yaml", "nowhere"], ["nowhere", "not found"]),
    (["config", "diff", "tiny/garbled", "run.yaml"], ["tiny/garbled/model_index.json", "line 1"]),
    (["config", "diff", f"run/blurred/{CHECKPOINT}", "run.yaml"], [CHECKPOINT, "images_seen and config"]),
    (["config", "copy", "tiny"], ["NAME='tiny'", "tiny/base64"]),
    (["config", "copy", "tiny/base64", "run.yaml"], ["run.yaml is there already", "another DEST"]),
    (["config", "copy", "tiny/base64", "/proc/x"], ["DEST='/proc/x'", "cannot be written"]),
    (["completion", "tcsh"], ["SHELL='tcsh'", "bash, zsh, fish"]),
]

BUILD: list[tuple[list[str], list[str]]] = [
    (["nowhere"], ["source not found: nowhere"]),
    (["text.rtf"], ["'.rtf'", ".csv, .tsv"]),
    (["empty"], ["nothing to build from empty"]),
    (["columns.csv"], ["columns.csv, line 1", "file missing", "fil, caption"]),
    (["latin.csv"], ["latin.csv, line 2: not UTF-8", "Latin-1", "iconv -f latin1 -t utf-8"]),
    (["latin"], ["nothing to build from latin", "caption file is not UTF-8", "iconv -f latin1 -t utf-8", "1 (a.png)"]),
    (["zipped"], ["nothing to build from zipped", "gzip", "gunzip"]),
    (["broken.jsonl"], ["broken.jsonl, line 1"]),
    (["broken.json"], ["broken.json", "JSON object"]),
    (["pictures", "--kind", "cvs"], ["'cvs'", "did you mean 'csv'?", "coco, csv"]),
    (["pictures", "--kind", "csv"], ["source pictures", "as csv"]),
    (["pictures", "--resize", "0"], ["--resize=0", "at least 1"]),
    (["pictures", "--samples-per-shard", "0"], ["--samples-per-shard=0", "at least 1"]),
    (["pictures", "--workers", "0"], ["--workers=0", "at least 1"]),
    (["scores.csv", "--images", "nowhere"], ["--images nowhere", "not a folder"]),
    (["scores.csv", "--where", "score >"], ["--where", "invalid syntax", "allowed", "score >"]),
    (["scores.csv", "--where", "scor > 5"], ["no record has the field 'scor'", "did you mean 'score'?", "^^^^"]),
    (["scores.csv", "--where", "open('x')"], ["--where", "no condition", "allowed"]),
    (["scores.csv", "--where", "score > 5"], ["nothing to build", "left out by --where: 1"]),
    (["pictures", "--out", "pictures"], ["--out pictures", "is not empty"]),
    (["pictures", "--out", "log.txt"], ["--out log.txt", "is a file"]),
    (["pictures", "--out", "/proc/x"], ["--out /proc/x", "cannot be written"]),
]

SHARDS: list[tuple[list[str], list[str]]] = [
    (["check", "nowhere"], ["not found: nowhere"]),
    (["check", "pictures"], ["pictures holds no tars"]),
    (["check", "train/damaged"], ["train/damaged/manifest.json", "damaged"]),
    (
        ["check", "zipped", "--write-manifest"],
        ["no manifest written for zipped", "00000.tar: is gzip-compressed", "gunzip < zipped/00000.tar"],
    ),
    (["check", "train/whole", "--workers", "0"], ["--workers=0", "at least 1"]),
    (["show", "pictures"], ["pictures", "shards build"]),
    (["show", "train/whole", "40"], ["INDEX=40", "[0, 40)"]),
    (["show", "train/whole", "--num", "0"], ["--num=0", "at least 1"]),
    (["show", "train/whole", "--sheet", "x.jpg"], ["--sheet x.jpg", ".png"]),
    (["show", "train/whole", "--sheet", "nowhere/x.png"], ["--sheet nowhere/x.png", "cannot be written"]),
    (["show", "train/whole", "--out", "empty"], ["--out empty", "cannot be written", "directory"]),
    (["stats", "train/short"], ["train/short/00000.tar", "shards check"]),
    (["stats", "train/whole", "--sample", "0"], ["--sample=0", "at least 1"]),
    (["stats", "train/whole", "--size", "0"], ["--size=0", "at least 1"]),
    (["stats", "train/whole", "--config", "nowhere"], ["nowhere", "not found", "tiny/base64"]),
]

MISTAKES = [
    *((["generate", *(argv if "--model" in argv else [*argv, "--model", "tiny/whole"])], said) for argv, said in GENERATE),
    *((["config", "check", *argv], said) for argv, said in TRAIN),
    *((["train", *argv], said) for argv, said in [*TRAIN[::6], *BEGIN]),
    *OTHERS,
    *((["shards", "build", *(argv if "--out" in argv else [*argv, "--out", "x"])], said) for argv, said in BUILD),
    *((["shards", *argv], said) for argv, said in SHARDS),
]


EARLY = {
    "nowhere.txt", "latin.txt", "-3", "0", "-1", "nan", "eular", "half", "nowhere.png", "x.jpg", "nowhere.yaml", "sampling.sampler=eular",
    "stage.encoders.t5.kind=t6",
}  # fmt: skip
"""Arguments of generate and train that are seen to be wrong before seconds are spent on importing torch."""


def _names(mistake: tuple[list[str], list[str]]) -> str:
    return " ".join(mistake[0])


@pytest.fixture
def content(world: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, int]]:
    """content() -> sizes of the files of the world, in which everything runs."""
    monkeypatch.chdir(world)
    return lambda: {str(path): path.stat().st_size for path in sorted(world.rglob("*")) if path.suffix != ".index" and path.name != ".lock"}


@pytest.mark.parametrize("mistake", USAGE, ids=_names)
def test_what_is_no_command_says_what_was_wrong_and_where_the_help_is(
    cli: CLI, content: Callable[[], dict[str, int]], mistake: tuple[list[str], list[str]]
) -> None:
    argv, said = mistake
    before = content()
    code, out, err = cli(*argv)
    assert (code, out) == (2, "")
    message, help = err.splitlines()
    assert message.startswith("error: ") and all(part in message for part in said), message
    see, program, *command, option = help.split()
    assert (see, program, option) == ("see", "t2i-experts", "--help") and command == argv[: len(command)]
    assert content() == before


@pytest.mark.parametrize("mistake", MISTAKES, ids=_names)
def test_a_mistake_is_one_message_that_names_it_and_nothing_is_written(
    cli: CLI, content: Callable[[], dict[str, int]], mistake: tuple[list[str], list[str]]
) -> None:
    argv, said = mistake
    before = content()
    code, out, err = cli(*argv)
    message = err.rpartition("\r")[2]  # a progress bar that was wiped out may stand before it
    first, *more = message.splitlines()
    assert (code, out) == (2, ""), err
    assert first.startswith("error: ") and all(line.startswith("  ") for line in more), err
    assert len(first) < 1000 and all(part in message for part in said), message
    assert content() == before

    code, out, err = cli("--debug", *argv)
    assert (code, out) == (2, "")
    assert "Traceback (most recent call last)" in err and err.endswith(message)


def test_a_wrong_name_or_number_costs_no_import_of_torch(world: Path) -> None:
    """One process tells all of them, which cannot import it."""
    early = [(argv, said) for argv, said in MISTAKES if argv[0] in ("generate", "train") and set(argv) & EARLY]
    assert set().union(*(argv for argv, _ in early)) >= EARLY
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from t2i_experts.cli.app import main\n"
        f"for argv in {[argv for argv, _ in early]!r}:\n"
        "    try: main(argv)\n"
        "    except SystemExit as exit: print(exit.code, file=sys.stderr)\n"
    )
    path = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(t2i_experts.__file__).parents[1])}
    run = subprocess.run([sys.executable, "-c", code], cwd=world, env=path, capture_output=True, text=True, check=True)
    said = run.stderr.splitlines()
    assert said[1::2] == ["2"] * len(early)
    for message, (_, parts) in zip(said[::2], early, strict=True):
        assert all(part in message for part in parts), message


def test_variables_of_the_environment(cli: CLI, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, said in (("T2I_PLUGINS", "allowed: 1, or 0"), ("T2I_DEBUG", "boolean")):
        with monkeypatch.context() as patch:
            patch.setenv(variable, "perhaps")
            code, out, err = cli("plugins")
            assert (code, out) == (2, "") and variable in err and said in err


def test_the_list_is_of_many_kinds() -> None:
    assert len(MISTAKES) + len(USAGE) >= 100
    assert {argv[0] for argv, _ in MISTAKES} >= {"generate", "train", "report", "ema", "config", "shards", "completion"}


def test_json_documents_of_mistakes_are_none(cli: CLI, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --json, what is wrong is told on stderr as well, and stdout stays empty."""
    monkeypatch.chdir(world)
    for argv in (["shards", "check", "nowhere"], ["config", "show", "nowhere"], ["report", "nowhere"], ["train", "nowhere"]):
        code, out, err = cli(*argv, "--json")
        assert (code, out) == (2, "") and "nowhere" in err
    assert json.loads(cli("config", "list", "--json")[1])
