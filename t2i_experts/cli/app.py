"""The root command: a table of sub-commands, each imported only when it is asked for, and the exit codes that all of them share.

Exit codes: 0 done; 1 failed while running; 2 the user's input is wrong (usage errors, and every ValueError that a command raises);
130 interrupted. A traceback is shown only with `--debug`.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from t2i_experts import __version__
from t2i_experts.registry import LazyCommand

PROGRAM = "t2i-experts"


COMMANDS: Mapping[str, LazyCommand] = {
    "generate": LazyCommand("t2i_experts.cli.generate:generate", "Draw pictures from a prompt."),
    "train": LazyCommand("t2i_experts.cli.train:train", "Train one node or stage; running the same command again resumes."),
    "report": LazyCommand("t2i_experts.cli.report:report", "Write a page with charts about a training run."),
    "ema": LazyCommand("t2i_experts.cli.ema:ema", "Average the weights of a finished run over another width."),
    "config": LazyCommand("t2i_experts.cli.config:app", "Show, check, compare, list and copy configs."),
    "shards": LazyCommand("t2i_experts.cli.shards:app", "Build, check, show and measure training data."),
    "doctor": LazyCommand("t2i_experts.cli.doctor:doctor", "Look at the installation, the machine and a config's needs."),
    "plugins": LazyCommand("t2i_experts.cli.plugins:plugins", "List the plugins, and all parts that are chosen by name."),
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
    """A command whose `--help` is quick."""

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
        if name not in self.table and not name.startswith("-") and name not in (names := self.list_commands(ctx)):
            near = difflib.get_close_matches(name, names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            ctx.fail(f"unknown command {name!r}.{hint} Allowed: {', '.join(names)}.")
        return super().resolve_command(ctx, args)


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
    """Tells the user on stderr what went wrong, and returns the exit code."""
    if debug:
        traceback.print_exception(error)
    if isinstance(error, ValueError):
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"error: {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
    if not debug:
        print(f"run again with --debug for the traceback: {PROGRAM} --debug COMMAND ...", file=sys.stderr)
    return 1


def main(argv: Sequence[str] | None = None, table: Mapping[str, LazyCommand] = COMMANDS) -> None:
    """Runs the command line on `argv` (default: the process's own arguments). Always raises SystemExit with the exit code."""
    session = {"debug": False}
    try:
        build_root(table).main(args=argv, prog_name=PROGRAM, obj=session)
    except Exception as error:
        code = report(error, debug=session["debug"])
        if _one_of_several_processes():
            _flush()
            os._exit(code)
        raise SystemExit(code) from None
    finally:
        _flush()


def _one_of_several_processes() -> bool:
    """Whether this process of a launcher's has connections to others. Closing them at exit after an error may wait for the others, which
    the launcher ends only when this one is gone: four processes that had all failed were seen to wait for each other for good."""
    distributed: Any = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _flush() -> None:
    """Writes out what is buffered; a reader that has gone away (`| head`) is no error of ours."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
