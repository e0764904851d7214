"""The command line in this process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from t2i_experts.cli.app import main

CLI = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> CLI:
    """cli(*arguments) -> exit code, stdout, stderr. Neither is a terminal, so neither may hold an escape sequence."""
    monkeypatch.delenv("T2I_DEBUG", raising=False)

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "\x1b" not in captured.out + captured.err
        return int(exit.value.code or 0), captured.out, captured.err

    return run
