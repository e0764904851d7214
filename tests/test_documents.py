"""What the pages tell people to type is what the programs take; the five-minute path and the examples of shards are carried out."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
import typer
from PIL import Image

from t2i_experts.cli.app import COMMANDS, build_root, main
from t2i_experts.config import load_config

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if path.relative_to(ROOT).parts[0] != "tests" and not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
)
PLUGINS = "PLUGINS.md"
"""Its commands are carried out by test_plugin_packages.py, and it has one that its example plugin adds."""


@dataclass(frozen=True)
class Line:
    """What a page tells to type. whole: as a line of its own, and not in the middle of a sentence, with words that stand for others."""

    page: Path
    text: str
    whole: bool

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}: {self.text}"


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of these languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    return [text for language, text in found if language in languages]


def commands(block: str) -> list[list[str]]:
    """The words of each line that is not blank or all comment."""
    return [words for line in block.replace("\\\n", " ").splitlines() if (words := shlex.split(line, comments=True))]


def lines() -> Iterator[Line]:
    """Every line that begins with a program, in blocks, in sentences and in the comments of the configs."""
    for page in PAGES:
        yield from (Line(page, shlex.join(words), True) for block in blocks(page, "bash") for words in commands(block))
        sentences = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        for quoted in re.findall(r"`([^`\n]+ [^`\n]+)`", sentences):
            first = quoted.split()[0]
            if quoted.startswith('eval "$('):  # the shell's own
                continue
            if first in ("t2i-experts", "python", "bash", "accelerate") or first.startswith("scripts/") or first in COMMANDS:
                yield Line(page, quoted, False)
    for config in sorted((ROOT / "configs").rglob("*.yaml")):
        for text in re.findall(r"^# +(t2i-experts .*)$", config.read_text(encoding="utf-8"), re.M):
            yield Line(config, text, True)


LINES = list(lines())


def test_the_pages_are_found() -> None:
    assert {"README.md", "shards/README.md", "configs/README.md", "t2i_experts/README.md", "scripts/README.md"} <= {
        path.relative_to(ROOT).as_posix() for path in PAGES
    }
    assert sum(line.whole for line in LINES) >= 20 and len(LINES) >= 40
    for page in PAGES:
        for block in blocks(page, ""):
            assert "t2i-experts " not in block, f"{page}: commands stand in blocks of bash"


# Whether what is told to type is right


def refuse(line: Line, why: object) -> NoReturn:
    raise AssertionError(f"{line}: {why}")


def check_program(line: Line, words: list[str]) -> None:
    """The words after `t2i-experts`: its own parser takes them, without carrying them out."""
    context = typer.Context(build_root(), info_name="t2i-experts", obj={"debug": False})
    command: Any = context.command
    while words and words[0] == "--debug":
        words = words[1:]
    while words and hasattr(command, "commands" if command is not context.command else "table") and not words[0].startswith("-"):
        name, *words = words
        if not line.whole and name.isupper():
            return
        command = command.get_command(context, name) or refuse(line, f"no command {name!r}")
    if not line.whole or hasattr(command, "commands"):
        known = {option for parameter in command.get_params(context) for option in parameter.opts}
        wrong = [word for word in re.findall(r"--[\w-]+", " ".join(words)) if word not in known]
        assert not wrong, f"{line}: no option {', '.join(wrong)}"
        return
    try:
        parsed = command.make_context(line.text, list(words), parent=context)
    except typer.Exit:  # --help
        return
    except Exception as error:
        said = error.format_message() if hasattr(error, "format_message") else str(error)
        raise AssertionError(f"{line}: {said}") from error
    config = parsed.params.get("config")
    if config:
        load_config(ROOT / config if config.startswith("configs/") else config, parsed.params.get("overrides") or [])


class Parsed(Exception):
    """Raised in the place of all that a script does after it has read its arguments."""


def check_script(line: Line, script: Path, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The script is there, and the parser that it builds takes the words."""
    assert script.is_file(), f"{line}: no such script"
    if script.suffix == ".sh":
        subprocess.run(["bash", "-n", str(script)], check=True)
        if script.name == "quickstart.sh":
            check_program(line, ["generate", *words])
        return
    parse = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        if line.whole or "python " in line.text:
            parse(parser, words)
        else:
            for word in re.findall(r"--[\w-]+", line.text):
                assert word in parser.format_help(), f"{line}: no option {word}"
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.syspath_prepend(script.parent)
    spec = importlib.util.spec_from_file_location(f"documented_{script.stem}", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look for what they are annotated with
    spec.loader.exec_module(module)
    try:
        module.main()
    except Parsed:
        return
    except SystemExit:
        refuse(line, capsys.readouterr().err)
    refuse(line, "the script reads no arguments")


@pytest.mark.parametrize("line", [line for line in LINES if line.page.name != PLUGINS or not line.whole], ids=str)
def test_what_is_told_to_type_is_taken(line: Line, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(line.text) if line.whole or "[" not in line.text else line.text.split()
    match words:
        case ["source", ".venv/bin/activate"] | ["pip", "install", *_] | ["accelerate", "launch"]:
            return
        case ["accelerate", "launch", *_]:
            from accelerate.commands.launch import launch_command_parser

            at = words.index("-m") + 1
            assert words[at] == "t2i_experts"
            try:
                launch_command_parser().parse_args(words[2:])
            except SystemExit:
                refuse(line, capsys.readouterr().err)
            check_program(line, words[at + 1 :])
        case ["t2i-experts", *rest] | ["python", "-m", "t2i_experts", *rest]:
            check_program(line, rest)
        case ["python" | "bash", script, *rest] if script.startswith((".", "scripts/")):
            check_script(line, ROOT / script, rest, monkeypatch, capsys)
        case [script, *rest] if script.startswith("scripts/"):
            check_script(line, ROOT / script, rest, monkeypatch, capsys)
        case [name, *_] if name in COMMANDS and not line.whole:
            check_program(line, words)
        case _:
            refuse(line, "not known to this test")


def test_links_lead_somewhere_and_every_script_is_told_of() -> None:
    for page in PAGES:
        for target in re.findall(
            r"\]\((?!https?:)([^)#\s]+)[^)]*\)", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
        ):
            assert (page.parent / target).exists() or target.startswith("#"), f"{page}: {target}"
    table = "\n".join(line.split("|")[1] for line in (ROOT / "scripts/README.md").read_text().splitlines() if line.startswith("| `"))
    told = set(re.findall(r"`([\w.-]+\.(?:py|sh|json|txt))", table))
    files = {path.name for path in (ROOT / "scripts").iterdir() if path.is_file() and path.name != "README.md"}
    assert told == files


# Carried out


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What `t2i-experts` prints on stdout. Fails if its exit code is not 0."""
    assert words[0] == "t2i-experts"
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main(words[1:])
    captured = capsys.readouterr()
    assert not exit.value.code, f"{shlex.join(words)}: {captured.err}"
    return captured.out


def draw_photos(folder: Path, count: int) -> None:
    """Pictures of one coloured square each, larger than training needs, with their captions beside them."""
    folder.mkdir()
    for i in range(count):
        image = Image.new("RGB", (300, 280), "white")
        image.paste((i * 255 // count, 60, 200 - i), (40 + i, 40, 200, 220 - i))
        image.save(folder / f"{i:02}.jpg")
        (folder / f"{i:02}.txt").write_text(f"a square of colour {i}\na picture of a square\n")


FEWER = {"train": ["training.images=8", "training.batch_size=4", "data.workers=0", "training.device=cpu", "--quiet"],
         "generate": ["--steps", "2", "--device", "cpu"]}  # fmt: skip
"""What makes the commands of five minutes take seconds."""


def test_the_five_minute_path_on_own_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The block of README.md after `Train on your own pictures`, line by line, with the shipped config and encoders."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Train on your own pictures\n")[2]
    block = re.search(r"^```bash\n(.*?)^```$", section, re.M | re.S)
    assert block is not None
    path = commands(block[1])
    assert [words[1] for words in path if words[1] in ("train", "generate")] == ["train", "generate"]
    monkeypatch.chdir(tmp_path)
    draw_photos(Path("photos"), 12)
    shutil.copytree(ROOT / "configs", "configs")
    said = {" ".join(words[1:3]): run([*words, *FEWER.get(words[1], [])], capsys) for words in path}
    assert "12 samples with 24 captions" in said["shards build"] and "good: 12 samples" in said["shards check"]
    picture = next(out for command, out in said.items() if command.startswith("generate")).strip()
    with Image.open(picture) as image:
        assert image.size == (64, 64)
    assert Path("runs/photos/report.md").is_file() and Path("runs/photos/model/model_index.json").is_file()


def test_the_examples_of_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The first block of shards/README.md, each line by itself, on pictures and lists of the names that it uses; without other hosts."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", "configs")
    draw_photos(Path("photos"), 18)
    shutil.copytree("photos", "train2017")
    Path("list.csv").write_text("file,caption\n00.jpg,one\n01.jpg,two\n")
    images = [{"id": i, "file_name": f"{i:02}.jpg"} for i in range(3)]
    annotations = [{"image_id": i, "caption": f"number {i}"} for i in range(3)]
    Path("captions_train2017.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    scored = [{"file": f"{i:02}.jpg", "caption": "a", "similarity": 0.1 * i, "aesthetic": 4.0 + i} for i in range(5)]
    Path("scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scored))
    run(["t2i-experts", "shards", "build", "scores.jsonl", "--images", "photos", "--out", "laion"], capsys)
    Path("laion/manifest.json").unlink()
    run(["t2i-experts", "shards", "build", "photos", "--out", "kept"], capsys)

    for words in commands(blocks(ROOT / "shards/README.md", "bash")[0]):
        assert words[:2] == ["t2i-experts", "shards"]
        if any("://" in word for word in words):
            continue
        shutil.rmtree("data", ignore_errors=True)
        if words[2] != "build":
            for folder in ("data/photos", "data/coco"):
                shutil.copytree("kept", folder)
        out = run(words, capsys)
        assert "--where" not in words or "2 samples" in out, "those with similarity 0.3 and 0.4"
    assert Path("picture.jpg").read_bytes() == Path("photos/17.jpg").read_bytes()
    assert Path("sheet.png").is_file()


def test_the_python_door_of_the_readme(monkeypatch: pytest.MonkeyPatch, model_folder: Path) -> None:
    """The blocks of Python compile, and the one that draws does so, with a tiny model in the place of the embedded one."""
    monkeypatch.setattr("t2i_experts.cascade.model_folder.embedded_model", lambda: model_folder)
    drawn = 0
    for page in PAGES:
        for block in blocks(page, "python"):
            program = compile(block, str(page), "exec")
            if "from_pretrained" in block:
                names: dict[str, Any] = {}
                exec(program, names)
                assert tuple(names["images"].shape) == (2, 3, 16, 16)
                drawn += 1
    assert drawn >= 1
