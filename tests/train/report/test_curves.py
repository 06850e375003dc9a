"""Pictures of one run are written, and are pictures."""

import math
import sys

import pytest

from tests.train.report.pictures import assert_picture
from train.report.curves import energy_plot, loss_plot


def trained(step, **extra):
    return {"step": step, "loss": 5.0 / step, **extra}


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
