"""The table of methods, printed."""

import io
import json
from contextlib import redirect_stdout

import pytest

from oasis_jax.methods import METHODS
from train.__main__ import main
from train.commands.methods import record

COLUMNS = {
    "what is saved": "saves",
    "what the basis follows": "basis",
    "when it moves": "moves",
    "moments": "moments",
    "form of the gradient": "weight gradient",
    "optimizer memory": "bytes per parameter",
    "where it is published": "paper",
}


def said(*words: str) -> str:
    """Standard output of a command that succeeds."""
    out = io.StringIO()
    with redirect_stdout(out):
        assert main(["methods", *words]) == 0
    return out.getvalue()


@pytest.fixture(scope="module")
def printed() -> str:
    return said()


@pytest.fixture(scope="module")
def as_json() -> list[dict]:
    return json.loads(said("--json"))


def block(printed: str, name: str) -> str:
    """The lines of one row: from its name to the next, for long cells are wrapped."""
    lines = printed.splitlines()
    first = next(i for i, line in enumerate(lines) if line.split()[:1] == [name])
    rest = iter(lines[first + 1 :])
    own = [lines[first]]
    while (line := next(rest)).startswith("   ") and line.strip():
        own.append(line)
    return "\n".join(own)


@pytest.mark.parametrize("column", COLUMNS.values(), ids=COLUMNS)
def test_table_has_the_column(printed, as_json, column):
    rule = next(i for i, s in enumerate(printed.splitlines()) if "───" in s)
    assert column in printed.splitlines()[rule - 1]
    assert all(row[column] not in ("", None) for row in as_json)


@pytest.mark.parametrize("name", METHODS)
def test_table_has_the_row(printed, as_json, name):
    """Whole words of every cell, options as they are typed; and the same as JSON."""
    (row,) = [row for row in as_json if row["method"] == name]
    assert row == json.loads(json.dumps(record(name, METHODS[name])))
    own = block(printed, name).replace(",", " ").split()
    options = row.pop("options")
    for value in row.values():
        cell = f"{value:g}" if isinstance(value, float) else value
        assert set(str("-" if cell is None else cell).replace(",", " ").split()) <= set(
            own
        )
    for option, value in options.items():
        flag = f"--{option.replace('_', '-')}"
        # The value may be on the next line, where another cell's words come between.
        assert flag in own and str(value) in own


def test_rows_are_in_the_tables_order(as_json):
    assert [row["method"] for row in as_json] == list(METHODS)


BYTES = {
    # Moments of 1024^2 numbers are 8 bytes a weight; a quarter rank's, 2; its basis, 1.
    "adamw": 8,
    "oasis": 3,
    "oasis-complement": 3,
    "prac": 8 + 4 * 0.6,
    "rso": 3,
    "compact": 2,
    "velora": 8,
    "galore": 3,
    "osd": 5,
    "ldadam": 7,
    "lora": 6,
    "adafactor": 8 / 1024,
    "muon": 4,
    "optax-galore": 3,
}


@pytest.mark.parametrize("name, count", BYTES.items(), ids=BYTES)
def test_bytes_per_parameter(as_json, name, count):
    (row,) = [row for row in as_json if row["method"] == name]
    assert row["bytes per parameter"] == pytest.approx(count, abs=5.1e-3)


def test_every_row_that_is_no_ablation_is_listed_above():
    assert set(BYTES) == {name for name, row in METHODS.items() if not row.ablation}
