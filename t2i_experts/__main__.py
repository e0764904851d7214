"""`python -m t2i_experts` is `t2i-experts`; `accelerate launch -m t2i_experts train CONFIG` comes through here."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys


def run() -> None:
    """The command line as a process of its own, which leaves when all exit handlers that were registered in it have run.

    Python would go on to take the modules apart, for more than a second where torch and the encoders' libraries have been imported, and
    the system takes their memory back anyway.
    """
    status = 1

    def leave() -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # a reader that is gone, a stream that is closed or none at all
                stream.flush()
        os._exit(status)

    atexit.register(leave)  # before anything else is imported: what is registered first runs last
    try:
        from t2i_experts.cli.app import main

        main()
    except SystemExit as end:
        status = 0 if end.code is None else end.code if isinstance(end.code, int) else 1
        raise
    except KeyboardInterrupt:  # while the command line itself is imported
        print("interrupted", file=sys.stderr)
        status = 130


if __name__ == "__main__":
    run()
