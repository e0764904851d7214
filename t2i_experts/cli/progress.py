"""The bar that long work on samples shows."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar on stderr with a rate and, from the moment at which the number of samples is known, an end time.

    Until then it counts what is listed. What was done before the first call, by an interrupted run, is not in the rate.
    """
    from tqdm import tqdm

    bar: tqdm | None = None

    def progress(done: int, total: int | None) -> None:
        nonlocal bar
        if bar is not None and bar.total is None and total is not None:
            bar.close()
            bar = None
        if bar is None:
            bar = tqdm(
                desc="listing" if total is None else what,
                total=total,
                initial=0 if total is None else done,
                leave=total is not None,
                unit=" samples",
                file=sys.stderr,
                mininterval=0.5,
                dynamic_ncols=True,
            )
        bar.total = total
        bar.update(done - bar.n)

    try:
        yield progress
    finally:
        if bar is not None:
            bar.close()


@contextlib.contextmanager
def no_bar(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """In the place of `progress_bar` where another process shows one."""
    yield lambda done, total: None
