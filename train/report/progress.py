"""How far a long piece of work is."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from train.report.log import console as standard_error


@dataclass(frozen=True)
class Bar:
    """A bar; what it is told is drawn if somebody is looking."""

    progress: Progress
    task: TaskID

    def advance(self, count: int = 1) -> None:
        """So much more is done."""
        self.progress.advance(self.task, count)

    def at(self, done: int, status: str = "", total: int | None = None) -> None:
        """So much is done in all, of `total` if that has changed."""
        self.progress.update(self.task, completed=done, status=status, total=total)


@contextmanager
def progress_bar(
    total: int, title: str = "", *, shown: bool = True, console: Console | None = None
) -> Iterator[Bar]:
    """A bar that disappears where there is no terminal.

    Args:
      total: Of whatever is counted.
      title: What is done.
      shown: False draws nothing.
      console: Standard error if None.
    """
    console = console or standard_error()
    columns: list[ProgressColumn] = []
    if title:
        columns.append(TextColumn("{task.description}"))
    columns += [BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    columns += [TextColumn("{task.fields[status]}")]
    disable = not (shown and console.is_terminal)
    with Progress(*columns, console=console, disable=disable) as progress:
        yield Bar(progress, progress.add_task(title, total=total, status=""))
