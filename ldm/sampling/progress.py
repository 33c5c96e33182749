"""The progress bar of scripts that sample or measure clips."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def progress_bar(console: Console, description: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """A bar while the context lasts; yields its `rich.progress.Progress.update`, to be called with keywords."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        yield partial(progress.update, progress.add_task(description, total=total))
