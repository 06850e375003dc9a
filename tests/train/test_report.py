"""The log survives a kill; tables are exact; pictures are written and are pictures."""

import json
import math
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from train.report import (
    MetricsLog,
    compare_markdown,
    compare_plot,
    energy_plot,
    frontier_plot,
    human_bytes,
    loss_plot,
    memory_table,
    read_metrics,
    scalars,
    write_json,
)


def trained(step, **extra):
    return {"step": step, "loss": 5.0 / step, **extra}


def assert_picture(path):
    """It decodes, has some size, and is not blank."""
    pixels = imread(path)
    assert min(pixels.shape[:2]) > 300
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 10


# --- The log ------------------------------------------------------------------------


def test_log_reads_back_what_was_written_and_flushes(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsLog(path) as log:
        log({"step": 1, "loss": jnp.float32(0.5), "motion": {"a": np.array([1.0, 2])}})
        # Read before it is closed: a kill loses nothing that was logged.
        expected = {"step": 1, "loss": 0.5, "motion": {"a": [1.0, 2.0]}}
        assert log.read() == [expected]
        log({"step": 1, "val_loss": math.nan, "val_tokens": 64})
    assert read_metrics(path)[0] == expected
    assert math.isnan(read_metrics(path)[1]["val_loss"])


@pytest.mark.parametrize(
    ("resumed_step", "kept"), [(None, [1, 2, 2, 3]), (2, [1, 2, 2]), (0, [])]
)
@pytest.mark.parametrize("torn", ["", '{"step": 4, "lo', '{"step": 4}'])
def test_resuming_forgets_later_steps_and_torn_lines(
    tmp_path, resumed_step, kept, torn
):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for record in (trained(1), trained(2), {"step": 2, "val_loss": 1}, trained(3)):
            log(record)
    path.write_text(path.read_text() + torn)
    with MetricsLog(path, resumed_step=resumed_step) as log:
        log(trained(9))
    assert [record["step"] for record in read_metrics(path)] == [*kept, 9]
    assert list(tmp_path.iterdir()) == [path]


def test_scalars_are_flat():
    record = {"step": 3, "loss": 1, "energy": {"mlp/down": [0.5, 0.25], "out": 0.75}}
    assert dict(scalars(record)) == {
        "loss": 1.0,
        "energy/mlp/down/0": 0.5,
        "energy/mlp/down/1": 0.25,
        "energy/out": 0.75,
    }


def test_tensorboard_gets_the_same_numbers(tmp_path, monkeypatch):
    import tensorboardX

    seen = []
    monkeypatch.setattr(
        tensorboardX.SummaryWriter, "add_scalar", lambda _, *scalar: seen.append(scalar)
    )
    with MetricsLog(tmp_path / "m.jsonl", tensorboard=tmp_path / "events") as log:
        log(trained(5, motion={"a": [0.5]}))
    assert seen == [("loss", 1.0, 5), ("motion/a/0", 0.5, 5)]
    assert list((tmp_path / "events").iterdir())


def test_missing_tensorboard_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"pip install 'oasis_jax\[tensorboard\]'"):
        MetricsLog(tmp_path / "metrics.jsonl", tensorboard=tmp_path)
    MetricsLog(tmp_path / "metrics.jsonl").close()


def test_write_json_replaces_whole_files(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"loss": 1.5})
    before = path.read_text()
    with pytest.raises(ValueError, match="Circular"):
        endless: dict = {}
        endless["self"] = endless
        write_json(path, endless)
    assert path.read_text() == before
    write_json(path, {"loss": np.float32(0.5), "bytes": [1, 2]})
    assert json.loads(path.read_text()) == {"loss": 0.5, "bytes": [1, 2]}
    assert list(tmp_path.iterdir()) == [path]


# --- Pictures -----------------------------------------------------------------------

LOSSES = {
    "both": [trained(1), trained(2), {"step": 2, "val_loss": 2.0, "val_tokens": 8}],
    "training only": [trained(step) for step in range(1, 200)],
    "validation only": [{"step": 2, "val_loss": 2.0}],
    "diverged": [trained(1), {"step": 2, "loss": math.nan}],
}


@pytest.mark.parametrize("records", LOSSES.values(), ids=LOSSES)
def test_loss_plot(tmp_path, records):
    assert loss_plot(records, tmp_path / "loss.png")
    assert_picture(tmp_path / "loss.png")


ENERGIES = {
    "four paths": {f"mlp/{index}": [0.9, 0.8, 0.7] for index in range(4)},
    "one number": {"mlp/down": 0.5},
    "mixed, odd, nan": {"a": 0.5, "b": [0.1, math.nan], "c": [0.3]},
}


@pytest.mark.parametrize("energy", ENERGIES.values(), ids=ENERGIES)
def test_energy_plot(tmp_path, energy):
    records = [trained(step, captured_energy=energy) for step in (1, 2, 3)]
    assert energy_plot([*records, {"step": 3, "val_loss": 1.0}], tmp_path / "e.png")
    assert_picture(tmp_path / "e.png")


def test_nothing_to_draw_writes_nothing(tmp_path):
    for records in ([], [{"step": 1, "captured_energy": {}}], [{"step": 1}]):
        assert not energy_plot(records, tmp_path / "energy.png")
        assert not loss_plot(records, tmp_path / "loss.png")
    assert not list(tmp_path.iterdir())


def test_pictures_do_not_need_pyplot(tmp_path, monkeypatch):
    """Importing pyplot would choose a backend for the whole process."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert loss_plot(LOSSES["both"], tmp_path / "loss.png")


# --- Comparisons --------------------------------------------------------------------


def compared(method, val_loss, peak, trials, **extra):
    return {
        "method": method,
        "val_loss": val_loss,
        "val_tokens": 65536,
        "tokens_per_s": 12345.6,
        "step_ms_median": 8.25,
        "saved_activation_bytes": 2**20,
        "gradient_bytes": 2**20,
        "optimizer_state_bytes": 2**21,
        "peak_bytes": peak,
        "lr": 1e-3,
        "rank": 64,
        "curve": [[10, 5.0], [20, val_loss]],
        "all": [
            {"lr": lr, "seed": seed, "val_loss": loss, "curve": []}
            for lr, seed, loss in trials
        ],
        **extra,
    }


ROWS = [
    compared("galore", math.nan, 3 * 2**20, [(1e-3, 0, math.nan), (3e-3, 0, None)]),
    compared("oasis", 3.03, 5 * 2**19, [(1e-3, 0, 3.03), (3e-3, 0, 3.5)]),
    compared(
        "adamw",
        3.0,
        None,
        [(1e-3, 0, 2.99), (1e-3, 1, 3.01), (3e-3, 0, 3.2), (3e-3, 1, math.inf)],
        rank=None,
        optimizer_state_bytes=2**22,
    ),
]


def test_compare_markdown():
    # The lines are long because the table is.
    assert compare_markdown(ROWS) == (
        "| method | val loss | vs adamw | tokens/s | step (ms) | activations "
        "| gradients | optimizer | peak | lr | rank |\n"
        "| :--- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: "
        "| ---: |\n"
        "| adamw | **3.0000** | baseline | 12,346 | 8.2 | 1.0 MiB "
        "| 1.0 MiB | 4.0 MiB | n/a | 0.001 | n/a |\n"
        "| oasis | 3.0300 | +1.00 % | 12,346 | 8.2 | 1.0 MiB "
        "| 1.0 MiB | **2.0 MiB** | **2.5 MiB** | 0.001 | 64 |\n"
        "| galore | diverged | n/a | 12,346 | 8.2 | 1.0 MiB "
        "| 1.0 MiB | **2.0 MiB** | 3.0 MiB | 0.001 | 64 |\n"
        "\n"
        "Validation tokens: 65,536.\n"
        "\n"
        "| val loss at lr | 0.001 | 0.003 |\n"
        "| :--- | ---: | ---: |\n"
        "| adamw | **3.0000 ± 0.0141** | diverged 1/2 |\n"
        "| oasis | **3.0300** | 3.5000 |\n"
        "| galore | diverged | diverged |\n"
    )


@pytest.mark.parametrize("baseline", ["galore", "absent"])
def test_differences_need_a_baseline_that_converged(baseline):
    table = compare_markdown(ROWS, baseline=baseline)
    assert f"vs {baseline}" in table
    assert "+1.00 %" not in table and "nan" not in table


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], ROWS * 4], ids=len)
def test_compare_plot(tmp_path, rows):
    compare_plot(rows, tmp_path / "compare.png")
    assert_picture(tmp_path / "compare.png")


@pytest.mark.parametrize("told", [None, 3 * 2**20])
def test_frontier_plot(tmp_path, told):
    def point(level, rank, peak):
        return {
            "configuration": f"oasis:{level}",
            "method": "oasis",
            "rank": rank,
            "residuals": "whole",
            "compiled_peak_bytes": peak,
            "peak_bytes": told,
            "ratio": {"median": 1 + 1 / peak},
        }

    rows = [point("none", "", 2**21), point("block", "", 2**20), point("mlp", "8", 9)]
    failed = {"configuration": "adamw:none", "method": "adamw", "failed": "no memory"}
    frontier_plot([*rows, failed], tmp_path / "frontier.png")
    assert_picture(tmp_path / "frontier.png")


# --- Memory -------------------------------------------------------------------------


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
