"""What long work reports, and the bar that a terminal shows of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

Progress = Callable[[str, int, int], object]
"""Called as (what is being done, done so far, in all)."""


@contextlib.contextmanager
def counting_bar(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr for one kind of work, to be called as (done so far, in all); nothing where
    that is no terminal."""
    from tqdm import tqdm

    with tqdm(unit=unit, unit_scale=True, disable=None) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on stderr for one kind of work after the other; nothing where that is no terminal, nor
    for what is done at once."""
    from tqdm import tqdm

    with contextlib.ExitStack() as stack:
        current = ""
        bar = tqdm(disable=True)

        def report(what: str, done: int, total: int) -> None:
            nonlocal current, bar
            if what != current:
                stack.close()
                bar = tqdm(
                    desc=what,
                    total=total,
                    unit="",
                    unit_scale=True,
                    disable=None,
                    leave=False,
                    delay=0.3,
                )
                current = what
                stack.enter_context(bar)
            bar.update(done - bar.n)

        yield report
