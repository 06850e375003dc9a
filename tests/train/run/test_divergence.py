"""When a loss is too far above its start, and when it is not."""

import json
import math
import random

import pytest

from train.run.divergence import START, WINDOW, Losses


def after(losses, factor=3.0) -> Losses:
    seen = Losses(factor)
    for loss in losses:
        seen.add(loss)
    return seen


DRAW = random.Random(0)
NORMAL = {
    "falls": [10 * 0.99**i for i in range(500)],
    "one spike": [5.0] * 100 + [1e9] + [5.0] * 19,
    "nine spikes": [5.0] * 100 + [1e9] * 9 + [5.0] * 11,
    "not numbers": [5.0] * 100 + [math.nan, math.inf] * 50,
    "small and noisy": [DRAW.expovariate(5) for _ in range(2000)],
    "large and noisy": [50 + DRAW.gauss(0, 10) ** 2 for _ in range(2000)],
    "overfitted": [0.7] * 50 + [1e-4] * 50 + [2.5] * 50,
    "doubles": [5.0] * 50 + [10.0] * 50,
    "short": [5.0, 500.0] * 7,
}


@pytest.mark.parametrize("losses", NORMAL.values(), ids=NORMAL)
def test_ordinary_runs_go_on(losses):
    seen = Losses(3.0)
    for loss in losses:
        seen.add(loss)
        assert not seen.risen()


DIVERGED = {
    "a plateau": [5.0] * 100 + [20.0] * 11,
    "at once": [5.0] * START + [100.0] * WINDOW,
    "within the start": [5.0] * 7 + [200.0] * WINDOW * 2,
    "from nearly nothing": [0.01] * 50 + [4.0] * 11,
    "climbs": [5.0 * 1.05**i for i in range(100)],
}


@pytest.mark.parametrize("losses", DIVERGED.values(), ids=DIVERGED)
def test_what_has_diverged_is_seen(losses):
    assert after(losses).rising() and (seen := after(losses)).risen()
    assert seen.median > seen.limit
    assert not after(losses, factor=0).risen()
    assert not after(losses, factor=1e9).rising()


def test_a_rise_is_suspected_at_once():
    assert not after([5.0] * 30).rising()
    assert after([5.0] * 30 + [16.0]).rising()
    assert not after([5.0] * 30 + [16.0] + [5.0] * WINDOW).rising()


@pytest.mark.parametrize("cut", [0, 5, START, 25, 60])
def test_survives_json_at_any_step(cut):
    losses = [5.0] * 50 + [20.0] * 30
    whole, part = after(losses), after(losses[:cut])
    again = Losses.of(3.0, json.loads(json.dumps(part.as_dict())))
    for loss in losses[cut:]:
        again.add(loss)
    assert again == whole
    assert Losses.of(3.0, None) == Losses(3.0)
