"""Tables of methods are exact; their pictures are written, and are pictures."""

import math

import pytest

from tests.train.report.pictures import assert_picture
from train.report.comparison import compare_markdown, compare_plot, frontier_plot


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
