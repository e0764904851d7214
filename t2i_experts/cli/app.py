"""The root command: a table of sub-commands, each imported only when it is asked for, and the exit codes that all of them share.

Exit codes: 0 done; 1 failed while running; 2 the user's input is wrong (usage errors, and every ValueError that a command raises);
130 interrupted. A traceback is shown only with `--debug`.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io
import os
import select
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, TextIO

import typer
from typer.core import TyperCommand, TyperGroup

from t2i_experts import __version__
from t2i_experts.registry import LazyCommand

UsageError: Any = typer.BadParameter.__base__  # Click's, to which Typer gives no name

PROGRAM = "t2i-experts"
COMPLETE = "_T2I_EXPERTS_COMPLETE"  # set by the scripts of `completion`; the name is Typer's, made from the program's

COMMANDS: Mapping[str, LazyCommand] = {
    "generate": LazyCommand("t2i_experts.cli.generate:generate", "Draw pictures from a prompt."),
    "train": LazyCommand("t2i_experts.cli.train:train", "Train one node or stage; running the same command again resumes."),
    "report": LazyCommand("t2i_experts.cli.report:report", "Write a page with charts about a training run."),
    "ema": LazyCommand("t2i_experts.cli.ema:ema", "Average the weights of a finished run over another width."),
    "experts": LazyCommand("t2i_experts.cli.experts:app", "Grow experts for ranges of noise: a tree of fine-tunings."),
    "config": LazyCommand("t2i_experts.cli.config:app", "Show, check, compare, list and copy configs."),
    "shards": LazyCommand("t2i_experts.cli.shards:app", "Build, check, show and measure training data."),
    "eval": LazyCommand("t2i_experts.cli.eval:app", "Measure what pictures are worth: FID, CLIP score, the judge."),
    "doctor": LazyCommand("t2i_experts.cli.doctor:doctor", "Look at the installation, the machine and a config's needs."),
    "bench": LazyCommand("t2i_experts.cli.bench:app", "Time this project's code beside strong baselines."),
    "plugins": LazyCommand("t2i_experts.cli.plugins:plugins", "List the plugins, and all parts that are chosen by name."),
    "completion": LazyCommand("t2i_experts.cli.completion:completion", "Print the script that makes a shell complete commands."),
}


def plugin_commands() -> dict[str, LazyCommand]:
    """The commands that plugins add, by name; loads the plugins, but none of their commands."""
    from t2i_experts.registry import registry

    return {name: registry.get("command", name) for name in registry.names("command") if registry.origin("command", name)}


def _without_default_coercion(option: Any) -> Any:
    """The `--help` option with a default of its own type: the default None would cost an import of pydantic to coerce."""
    if option is not None:
        option.default = False
    return option


class Command(TyperCommand):
    """A command whose `--help` is quick, and whose usage errors say which value was received."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Reads the arguments. Raises Click's UsageError, typer.BadParameter for a value that is not of its parameter's type."""
        try:
            return super().parse_args(ctx, args)
        except UsageError as error:
            error.ctx = error.ctx or ctx
            for found in getattr(error.__cause__, "errors", list)():  # pydantic's, which name every part but the value
                error.message += f"; received {found['input']!r}"
            raise

    def get_help_option(self, ctx: Any) -> Any:
        """See `_without_default_coercion`."""
        return _without_default_coercion(super().get_help_option(ctx))


class Group(TyperGroup):
    """A group whose `--help` is quick."""

    def get_help_option(self, ctx: Any) -> Any:
        """See `_without_default_coercion`."""
        return _without_default_coercion(super().get_help_option(ctx))


class Root(Group):
    """The root: knows its commands by name and line of help, and imports the one that is run. Plugins' commands come after the table's."""

    table: Mapping[str, LazyCommand] = COMMANDS

    def list_commands(self, ctx: Any) -> list[str]:
        """The names, in the order of the table."""
        return [*self.table, *plugin_commands()]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command, imported now; None if there is none of that name."""
        command = self.table.get(cmd_name) or plugin_commands().get(cmd_name)
        return load(cmd_name, command) if command else None

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The list of commands in the root's help, out of the table."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.help) for name, command in {**self.table, **plugin_commands()}.items()])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that the arguments name; a usage error that suggests the nearest one if there is none."""
        name = args[0]
        if not (ctx.resilient_parsing or name in self.table or name.startswith("-") or name in (names := self.list_commands(ctx))):
            near = difflib.get_close_matches(name, names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            ctx.fail(f"unknown command {name!r}.{hint} Allowed: {', '.join(names)}.")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> None:
        """Runs the command; what it returns is dropped, for Click would take it for the exit code.

        Ctrl-C is never silent: it says what the KeyboardInterrupt says, or `interrupted`, and ends with 130. Click takes every EOFError for
        a user who leaves, and every broken pipe for a reader of stdout that went away: what is neither is told as the error that it is.
        """
        try:
            super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            if os.environ.get("LOCAL_RANK", "0") == "0":  # of the processes that a launcher started on this host, one says it
                print(*interrupt.args or ["interrupted"], file=sys.stderr)
            raise typer.Exit(130) from interrupt
        except EOFError as error:
            raise RuntimeError(f"unexpected end of file: {error}") from error
        except BrokenPipeError as error:
            if _has_a_reader(sys.stdout):
                raise RuntimeError(str(error)) from error
            raise


def load(name: str, command: LazyCommand) -> Any:
    """Imports a sub-command's module and returns it as Typer's command object."""
    module, attribute = command.target.split(":")
    target = getattr(importlib.import_module(module), attribute)
    holder = typer.Typer(rich_markup_mode=None, add_completion=False)
    holder.callback()(lambda: None)
    if isinstance(target, typer.Typer):
        for registered in target.registered_commands:
            registered.cls = Command
        holder.add_typer(target, name=name, cls=Group, no_args_is_help=True)
    else:
        holder.command(name, cls=Command)(target)
    return typer.main.get_group(holder).commands[name]


def _show_version(value: bool) -> None:
    if value:
        print(f"{PROGRAM} {__version__}")
        raise typer.Exit


def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", envvar="T2I_DEBUG", show_envvar=True)] = False,
) -> None:
    """Text-to-image diffusion whose denoiser is an ensemble of experts, each for its own range of noise."""
    context.obj["debug"] = debug


def build_root(table: Mapping[str, LazyCommand] = COMMANDS) -> Root:
    """The root command over a table of sub-commands."""
    app = typer.Typer(cls=Root, rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False, no_args_is_help=True)
    app.callback()(_root)
    root = typer.main.get_group(app)
    assert isinstance(root, Root)
    root.table = table
    return root


def report(error: Exception, *, debug: bool) -> int:
    """Tells the user on stderr what went wrong, and returns the exit code.

    An exception that this package defines was written for the user; the name of any other's class belongs to what it says.
    """
    if isinstance(error, UsageError):
        return _report_usage(error)
    if isinstance(error, typer.Abort):
        print("aborted", file=sys.stderr)
        return 1
    if debug:
        traceback.print_exception(error)
    if isinstance(error, ValueError):
        print(f"{_error_mark()} {error}", file=sys.stderr)
        return 2
    message = " ".join(str(error).split())
    ours = type(error).__module__.startswith("t2i_experts.")
    print(f"{_error_mark()} {message if ours else f'{type(error).__name__}: {message}'}", file=sys.stderr)
    if not (debug or ours):
        print(f"run again with --debug for the traceback: {PROGRAM} --debug COMMAND ...", file=sys.stderr)
    return 1


def _report_usage(error: Any) -> int:
    """A line that says what is wrong with the arguments, and one that says where the right ones are; the help if there are none at all."""
    message, context = error.format_message(), error.ctx
    if context is not None and message == context.get_help():
        print(message, file=sys.stderr)
        return 2
    print(f"{_error_mark()} {message[:1].lower()}{message[1:].rstrip('.')}", file=sys.stderr)
    if context is not None:
        print(f"  see {context.command_path} --help", file=sys.stderr)
    return 2


def _error_mark() -> str:
    """The word before an error's message, in red where a terminal shows it and NO_COLOR (no-color.org) does not forbid it."""
    coloured = sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return "\x1b[31merror:\x1b[0m" if coloured else "error:"


def main(argv: Sequence[str] | None = None, table: Mapping[str, LazyCommand] = COMMANDS) -> None:
    """Runs the command line on `argv` (default: the process's own arguments). Always raises SystemExit with the exit code."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait took up to seven times as long on busy cores
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")  # Pillow's: who reads pictures has a limit, and names what exceeds it
    session = {"debug": False}
    try:
        with _answering_a_shell():
            code = build_root(table).main(args=argv, prog_name=PROGRAM, obj=session, standalone_mode=False) or 0  # that of typer.Exit
    except Exception as error:
        code = report(error, debug=session["debug"])
    finally:
        _flush()
    if code and _one_of_several_processes():
        os._exit(code)
    raise SystemExit(code)


def _one_of_several_processes() -> bool:
    """Whether this process of a launcher's has connections to others. Closing them at exit after an error may wait for the others, which
    the launcher ends only when this one is gone: four processes that had all failed were seen to wait for each other for good."""
    distributed: Any = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


@contextlib.contextmanager
def _answering_a_shell() -> Iterator[None]:
    """If a shell asks how a line may go on, makes Typer ready to answer; a warning must not get onto the line that the user types."""
    if not os.environ.get(COMPLETE):
        yield
        return
    from typer.completion import completion_init  # type: ignore[attr-defined]

    completion_init()
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def _has_a_reader(stream: TextIO) -> bool:
    """Whether what is written arrives somewhere, as far as the system tells."""
    try:
        asked = select.poll()
        asked.register(stream.fileno(), 0)
    except (OSError, ValueError, AttributeError):  # no file, a closed one, or a system without poll
        return True
    return not any(event & (select.POLLERR | select.POLLHUP) for _, event in asked.poll(0))


def _flush() -> None:
    """Writes out what is buffered; a reader that has gone away (`| head`) is no error of ours."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
