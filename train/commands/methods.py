"""The table of methods, for people and for programs."""

import json
import sys
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from oasis_jax.methods import METHODS, Method
from train.options import Methods
from train.options.fields import flag


def record(name: str, method: Method) -> dict[str, Any]:
    """One row as plain values."""
    return {
        "method": name,
        "saves": method.saves,
        "basis": method.basis,
        "moves": method.moved,
        "moments": method.moments,
        "weight gradient": method.gradient,
        "rank": method.rank,
        # Of a square kernel at the default rank; its weight itself takes 4 in float32.
        "bytes per parameter": round(method.bytes_per_parameter(), 2),
        "lr factor": method.lr_factor,
        "options": method.published,
        "paper": method.paper,
        "about": method.about,
    }


def main(config: Methods) -> None:
    rows = [record(name, method) for name, method in METHODS.items()]
    if config.json:
        print(json.dumps(rows, indent=2))
        return
    table = Table(
        title="Methods", title_style="bold", box=SIMPLE, caption_justify="left"
    )
    for column in rows[0]:
        numeric = column in ("rank", "bytes per parameter", "lr factor")
        table.add_column(column, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    table.caption = (
        "bytes per parameter: of optimizer state and basis, float32, for a 1024 x 1024"
        " kernel at the default rank\n"
        "lr factor: in `compare`, learning rates are multiplied by this\n"
        "options: as published; --interval is at most a tenth of --steps unless given"
    )
    width = None if sys.stdout.isatty() else 240
    Console(width=width, highlight=False, markup=False).print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        flags = (f"{flag(k)} {v}" for k, v in value.items())
        return ", ".join(flags) or "-"
    return f"{value:g}" if isinstance(value, float) else str(value)
