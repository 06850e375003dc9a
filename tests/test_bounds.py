"""Numbers that make no sense are refused where they are given, in one sentence."""

import math

import jax.numpy as jnp
import optax
import pytest

from oasis_jax import galore, ldadam, method, oasis_adam, osd
from oasis_jax.bounds import DECAY, NOT_NEGATIVE, POSITIVE, SHARE, at_least, one_of
from oasis_jax.methods import METHODS
from oasis_jax.seeds import narrow

NAN, INF = math.nan, math.inf

BOUNDS = {
    "positive": (POSITIVE, [1e-9, 3], [0, -1, NAN, INF]),
    "not negative": (NOT_NEGATIVE, [0, 0.1], [-1e-9, NAN, INF]),
    "share": (SHARE, [0, 0.5, 1], [-0.1, 1.1, NAN, INF]),
    "decay": (DECAY, [0, 0.999], [1, 1.5, -1, NAN]),
    "at least": (at_least(2), [2, 9], [1, -3, NAN]),
    "one of": (one_of(("a", "b")), ["a"], ["c", ""]),
}


@pytest.mark.parametrize("bound, inside, outside", BOUNDS.values(), ids=BOUNDS)
def test_what_a_bound_holds(bound, inside, outside):
    assert all(bound.holds(value) for value in inside)
    assert not any(bound.holds(value) for value in outside)
    assert bound.words()


OPTIMIZERS = {
    "oasis_adam": lambda **o: oasis_adam(**{"learning_rate": 1e-3} | o),
    "galore": lambda **o: galore(**{"learning_rate": 1e-3, "rank": 2} | o),
    "osd": lambda **o: osd(**{"learning_rate": 1e-3, "rank": 2} | o),
    "ldadam": lambda **o: ldadam(**{"learning_rate": 1e-3, "rank": 2} | o),
}
SENSELESS = {
    "b1": [-1.0, 1.0, NAN],
    "b2": [1.5, NAN],
    "weight_decay": [-5.0, NAN, INF],
    "learning_rate": [-1e-3, NAN],
    "scale": [0.0, -1.0, NAN, INF],
    "rho": [7.0, NAN],
}
ONLY = {"rho": ("ldadam",), "scale": ("oasis_adam", "galore", "osd")}
CASES = [
    (optimizer, name, value)
    for optimizer in OPTIMIZERS
    for name, values in SENSELESS.items()
    if optimizer in ONLY.get(name, OPTIMIZERS)
    for value in values
]


@pytest.mark.parametrize("optimizer, name, value", CASES)
def test_optimizers_refuse(optimizer, name, value):
    with pytest.raises(ValueError, match=f"^{name} is {value}, expected a"):
        OPTIMIZERS[optimizer](**{name: value})


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_schedules_are_no_numbers(optimizer):
    OPTIMIZERS[optimizer](learning_rate=optax.constant_schedule(1e-3))


def test_traced_numbers_are_let_through():
    """They have no value to be judged by, as in `optax.inject_hyperparams`."""
    oasis_adam(jnp.asarray(1e-3), b1=jnp.asarray(0.9), weight_decay=jnp.asarray(0.1))


OPTIONS = [
    (name, option)
    for name, row in METHODS.items()
    for option, default in row.published.items()
    if isinstance(default, float)
]


@pytest.mark.parametrize("name, option", OPTIONS)
@pytest.mark.parametrize("value", [NAN, INF, -1.0])
def test_methods_refuse(name, option, value):
    """Every option that is a number, of every row of the table."""
    with pytest.raises(ValueError, match=rf"is {value}, expected"):
        method(name, **{option: value})


SEEDS = {"narrow": (7, 7), "widest that fits": (2**32 - 1, 2**32 - 1)}


@pytest.mark.parametrize("seed, same", SEEDS.values(), ids=SEEDS)
def test_seeds_that_fit_stay(seed, same):
    assert narrow(seed) == same


def test_wide_seeds_differ():
    wide = [2**32, 2**40, 2**63, 2**64 - 1]
    assert len({narrow(seed) for seed in wide}) == len(wide)
    assert all(0 <= narrow(seed) < 2**32 for seed in wide)
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match=f"seed is {seed}, expected"):
            narrow(seed)
