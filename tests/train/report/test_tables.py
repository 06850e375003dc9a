"""Bytes and tables, as people read them."""

import pytest
from rich.console import Console

from train.report.tables import human_bytes, memory_table


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1,023 B"),
        (1536, "1.50 KiB"),
        (123456789, "117.7 MiB"),
        (3 * 2**30, "3.00 GiB"),
        (5000 * 2**40, "5,000.0 TiB"),
    ],
)
def test_human_bytes(count, text):
    assert human_bytes(count) == text


def test_memory_table_ends_with_the_total():
    console = Console(width=60)
    with console.capture() as capture:
        console.print(
            memory_table({"weights": 2**20, "adam": 3 * 2**20}, 5 * 2**20, "Now")
        )
    lines = [line.split() for line in capture.get().splitlines() if line.strip()]
    assert lines == [
        ["Now"],
        ["weights", "1.00", "MiB"],
        ["adam", "3.00", "MiB"],
        ["total", "5.00", "MiB"],
    ]
