"""The root command over a table of fakes: laziness, exit codes, and what the user reads."""

from __future__ import annotations

import ast
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import pytest
import typer

import t2i_experts
from t2i_experts import cli
from t2i_experts.cli.app import LazyCommand, main
from t2i_experts.training.divergence import TrainingDiverged

Run = Callable[..., tuple[int, str, str]]


def draw(prompt: str, num: int = 1, size: int = 64) -> None:
    """Draws a picture.

    And this is said only in the command's own help.
    """
    print(f"{prompt} {num} {size}")


def fail_with(kind: str) -> int | None:
    """Raises what it is told to, or returns a number, as a plugin's command may."""
    match kind:
        case "three":
            return 3
        case "eof":
            raise EOFError("Ran out of input")
        case "pipe":
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        case "abort":
            raise typer.Abort
        case "input":
            raise ValueError("size=65 must be one of 64, 256, 1024")
        case "running":
            raise RuntimeError("the disk\nis full")
        case "interrupt":
            raise KeyboardInterrupt
        case "told":
            raise KeyboardInterrupt("interrupted after 3 pictures")
        case "diverged":
            raise TrainingDiverged("the loss rose\nto 3")
        case "exit":
            raise typer.Exit(7)
    return None


def check(folder: Path) -> None:
    """Checks a folder."""
    print(f"checked {folder.name}")


def build(folder: Path, samples: int = 8) -> None:
    """Builds a folder."""
    print(f"built {folder.name} of {samples}")


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Mapping[str, LazyCommand]:
    module = ModuleType("fake_commands")
    shards = typer.Typer()
    shards.command()(check)
    shards.command("build")(build)
    vars(module).update(draw=draw, fail_with=fail_with, shards=shards)
    monkeypatch.setitem(sys.modules, "fake_commands", module)
    return {
        "draw": LazyCommand("fake_commands:draw", "Draw pictures."),
        "fail": LazyCommand("fake_commands:fail_with", "Fail."),
        "shards": LazyCommand("fake_commands:shards", "Training data."),
        "absent": LazyCommand("no_such_module:command", "A command whose module cannot be imported."),
    }


@pytest.fixture
def run(table: Mapping[str, LazyCommand], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.delenv("T2I_DEBUG", raising=False)

    def run(*argv: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            main(argv, table)
        out, err = capsys.readouterr()
        return int(exit.value.code or 0), out, err

    return run


def test_the_roots_help_lists_commands_that_it_cannot_even_import(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for line in ("draw", "Draw pictures.", "A command whose module cannot be imported.", "--version", "--debug"):
        assert line in out


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"t2i-experts {t2i_experts.__version__}\n", "")


def test_a_command_runs_with_its_arguments_and_options(run: Run) -> None:
    assert run("draw", "a red apple", "--num", "3") == (0, "a red apple 3 64\n", "")


def test_a_groups_commands_run_and_its_help_lists_them(run: Run) -> None:
    assert run("shards", "build", "apples", "--samples", "2") == (0, "built apples of 2\n", "")
    assert run("shards", "check", "apples") == (0, "checked apples\n", "")
    code, out, _ = run("shards", "--help")
    assert code == 0 and "Builds a folder." in out and "Checks a folder." in out


@pytest.mark.parametrize("argv", [("draw",), ("shards", "build")])
def test_a_commands_help_names_its_whole_path(run: Run, argv: tuple[str, ...]) -> None:
    code, out, _ = run(*argv, "--help")
    assert code == 0 and out.startswith(f"Usage: t2i-experts {' '.join(argv)} ")


def test_no_command_shows_the_help_and_is_a_usage_error(run: Run) -> None:
    code, out, err = run()
    assert code == 2 and "Draw pictures." in out + err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("drow",), "Did you mean 'draw'? Allowed: draw, fail, shards, absent\n"),
        (("zzz",), "unknown command 'zzz'. Allowed: draw, fail, shards, absent\n"),
        (("--nonsense",), "--nonsense"),
        (("draw",), "PROMPT"),
        (("draw", "an apple", "--num", "many"), "'--num'"),
        (("shards", "bild"), "build"),
    ],
)
def test_usage_errors_exit_with_2_and_say_what_was_wrong(run: Run, argv: tuple[str, ...], said: str) -> None:
    code, out, err = run(*argv)
    assert code == 2 and out == "" and said.lower() in err.lower()


def test_a_value_error_is_the_users_and_shows_no_traceback(run: Run) -> None:
    assert run("fail", "input") == (2, "", "error: size=65 must be one of 64, 256, 1024\n")


def test_any_other_error_is_one_line_and_the_way_to_the_traceback(run: Run) -> None:
    code, out, err = run("fail", "running")
    first, second = err.splitlines()
    assert code == 1 and out == ""
    assert first == "error: RuntimeError: the disk is full"
    assert "--debug" in second


@pytest.mark.parametrize(("kind", "said"), [("eof", "end of file: Ran out of input"), ("pipe", "Broken pipe")])
def test_errors_that_click_keeps_for_itself_are_told_too(run: Run, kind: str, said: str) -> None:
    code, out, err = run("fail", kind)
    assert code == 1 and out == "" and said in err.splitlines()[0]
    assert "Traceback" in run("--debug", "fail", kind)[2]


def test_an_error_that_was_written_for_the_user_is_told_as_it_is(run: Run) -> None:
    assert run("fail", "diverged") == (1, "", "error: the loss rose to 3\n")
    assert "Traceback" in run("--debug", "fail", "diverged")[2]


def test_a_command_that_cannot_be_imported_harms_only_itself(run: Run) -> None:
    code, _, err = run("absent")
    assert code == 1 and "no_such_module" in err and "Traceback" not in err
    assert run("draw", "an apple")[0] == 0


@pytest.mark.parametrize(("kind", "code"), [("input", 2), ("running", 1)])
def test_debug_shows_the_traceback_and_changes_no_exit_code(run: Run, monkeypatch: pytest.MonkeyPatch, kind: str, code: int) -> None:
    for argv, variable in ((("--debug", "fail", kind), "0"), (("fail", kind), "1")):
        monkeypatch.setenv("T2I_DEBUG", variable)
        got, _, err = run(*argv)
        assert got == code and "Traceback" in err and "fail_with" in err


@pytest.mark.parametrize(
    ("kind", "code", "said"),
    [
        ("interrupt", 130, "interrupted\n"),
        ("told", 130, "interrupted after 3 pictures\n"),
        ("exit", 7, ""),
        ("none", 0, ""),
        ("three", 0, ""),
        ("abort", 1, "aborted\n"),
    ],
)
def test_other_ways_to_end(run: Run, kind: str, code: int, said: str) -> None:
    assert run("fail", kind) == (code, "", said)


def test_ctrl_c_while_a_command_is_imported_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "slow_command.py").write_text("raise KeyboardInterrupt")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SystemExit) as exit:
        main(["slow"], {"slow": LazyCommand("slow_command:run", "")})
    assert exit.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_of_several_processes_one_says_that_they_were_interrupted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run("fail", "interrupt") == (130, "", "")


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_goes_away_is_no_error_to_report(lines: int) -> None:
    program = (
        "import sys, types; from t2i_experts.cli.app import LazyCommand, main\n"
        f"def tell(): print('apple\\n' * {lines})\n"
        "sys.modules['fake'] = types.ModuleType('fake'); sys.modules['fake'].tell = tell\n"
        "sys.stdin.read()\n"
        "main(['tell'], {'tell': LazyCommand('fake:tell', '')})"
    )
    command = [sys.executable, "-c", program]
    root = Path(t2i_experts.__file__).parents[1]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, cwd=root, env=buffered, text=True) as telling:
        assert telling.stdin is not None
        assert telling.stdout is not None
        assert telling.stderr is not None
        telling.stdout.close()
        telling.stdin.close()  # only now does it begin to print
        assert telling.stderr.read() == ""
        assert telling.wait(timeout=30) in (0, 1)


def test_an_option_with_a_metavar_says_its_own_name() -> None:
    """Typer 0.27 would make the metavar its name: `--CONFIG`."""
    for file in Path(cli.__file__).parent.glob("*.py"):
        for call in ast.walk(ast.parse(file.read_text())):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "typer.Option" and "metavar" in {k.arg for k in call.keywords}:
                assert call.args, f"{file.name}:{call.lineno}"
