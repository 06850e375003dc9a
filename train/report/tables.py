"""Tables, for people."""

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE
from rich.table import Table


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    # Numbers align right; the first column holds names.
    rule = [":---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(line)} |" for line in (header, rule, *body)]


def human_bytes(count: float) -> str:
    """'1.50 GiB': three significant digits or more, in powers of 1024."""
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            break
        size /= 1024
    digits = 0 if unit == "B" else 2 if abs(size) < 10 else 1
    return f"{size:,.{digits}f} {unit}"


def memory_table(parts: Mapping[str, int], total: int, title: str) -> Table:
    """A table of sizes in bytes, with the total, given, in the last row.

    >>> memory_table({"weights": 4 * 2**20}, 2**23, "What a step needs").row_count
    2
    """
    table = Table(title=title, title_style="bold", box=SIMPLE, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, count in parts.items():
        table.add_row(name.replace("_", " "), human_bytes(count))
    table.add_section()
    table.add_row("total", human_bytes(total), style="bold")
    return table
