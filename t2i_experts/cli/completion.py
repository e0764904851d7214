"""`t2i-experts completion SHELL`: the script through which a shell asks this program what may come next."""

from __future__ import annotations

from typing import Annotated

import typer

from t2i_experts.cli.app import COMPLETE, PROGRAM

SHELLS = ("bash", "zsh", "fish")


def completion(shell: Annotated[str, typer.Argument(metavar="SHELL", help=f"{', '.join(SHELLS[:-1])} or {SHELLS[-1]}.")]) -> None:
    """Print the script that makes a shell complete commands, options, configs and models at the Tab key.

    In ~/.bashrc: eval "$(t2i-experts completion bash)". In ~/.zshrc, after compinit: eval "$(t2i-experts completion zsh)".
    For fish: t2i-experts completion fish > ~/.config/fish/completions/t2i-experts.fish
    """
    if shell not in SHELLS:
        raise ValueError(f"SHELL={shell!r}; allowed: {', '.join(SHELLS)}")
    from typer.completion import get_completion_script  # type: ignore[attr-defined]

    typer.echo(get_completion_script(prog_name=PROGRAM, complete_var=COMPLETE, shell=shell))
