"""What is told of a run."""

import dataclasses

import jax.numpy as jnp
import pytest

from train.options import Pretrain
from train.run.build import pretraining
from train.run.summary import mean_energy

ENERGIES = {
    "places of unequal layers": ({"blocks": [1.0, 1.0, 1.0], "head": 0.0}, 0.75),
    "one": ({"head": 0.5}, 0.5),
    "nothing projected": ({}, None),
}


@pytest.mark.parametrize("seen, mean", ENERGIES.values(), ids=ENERGIES)
def test_captured_energy_is_a_mean_over_layers(seen, mean):
    config = Pretrain(batch=1, seq=4, rank="2")
    state = pretraining(config, 16, layers=1, abstract=True).state
    arrays = {path: jnp.array(shares) for path, shares in seen.items()}
    seen = dataclasses.replace(state.diagnostics, captured_energy=arrays)
    assert mean_energy(dataclasses.replace(state, diagnostics=seen)) == mean
