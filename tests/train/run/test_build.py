"""From options to a set-up run: schedules and seeds at their ends."""

import jax
import numpy as np
import pytest

from train.options import Pretrain
from train.run.build import pretraining

SMALL = dict(batch=1, seq=8, rank="2")


@pytest.mark.parametrize("warmup, steps", [(1.0, 4), (0.0, 4), (1.0, 1), (0.5, 1)])
def test_any_share_of_a_run_may_be_warm_up(warmup, steps):
    config = Pretrain(warmup=warmup, steps=steps, **SMALL)
    setup = pretraining(config, 16, layers=1, abstract=True)
    rates = [float(setup.schedule(step)) for step in range(steps + 1)]
    assert np.isfinite(rates).all() and min(rates) >= 0
    assert max(rates) <= config.lr * (1 + 1e-6)
    if warmup == 1.0:
        assert rates == sorted(rates)


def test_wide_seeds_make_runs_of_their_own():
    """Of 64 bits; those that fit 32 are what they were."""
    first = {}
    for seed in (0, 2**32, 2**40, 2**64 - 1):
        setup = pretraining(Pretrain(seed=seed, **SMALL), 16, layers=1)
        first[seed] = np.asarray(jax.tree.leaves(setup.state.params)[0])
        assert setup.state.seed.dtype == np.uint32
    draws = [leaf.tobytes() for leaf in first.values()]
    assert len(set(draws)) == len(draws)
