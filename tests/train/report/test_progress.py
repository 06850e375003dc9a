"""A bar is drawn where somebody looks, and nowhere else."""

import io

import pytest
from rich.console import Console

from train.report.progress import progress_bar


def drawn(terminal: bool, shown: bool = True) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=100, color_system=None)
    with progress_bar(5, "Reading", shown=shown, console=console) as bar:
        bar.advance(2)
        bar.advance()
        bar.at(4, "loss 2.5", total=6)
    return file.getvalue()


def test_a_terminal_sees_a_bar():
    text = drawn(terminal=True)
    for part in ("Reading", "4/6", "loss 2.5"):
        assert part in text


@pytest.mark.parametrize(("terminal", "shown"), [(False, True), (True, False)])
def test_nothing_is_drawn_elsewhere(terminal, shown):
    assert drawn(terminal, shown) == ""


def test_standard_error_without_a_terminal(capfd):
    with progress_bar(5, "Reading") as bar:
        bar.advance(2)
    assert capfd.readouterr() == ("", "")
