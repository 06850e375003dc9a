"""What a classifier is judged by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oasis_jax.models.bert import Bert, BertConfig
from train.objectives.labels import scores


@pytest.mark.parametrize(("order", "f1"), [((0, 1), 0.0), ((1, 0), 0.8)])
def test_metrics_go_by_the_tasks_numbers(order, f1):
    """Of a model that always says its label 0, right for two of three examples."""
    model = Bert(BertConfig(9, 8, 8, layers=1, heads=1, positions=4, labels=2))
    tokens = np.ones((3, 4), np.int32)
    params = model.init(jax.random.key(0), jnp.asarray(tokens))["params"]
    params = jax.tree.map(jnp.zeros_like, params)
    params["classifier"]["bias"] = jnp.array([9.0, 0.0])
    batch = {
        "tokens": tokens,
        "segments": tokens,
        "types": 0 * tokens,
        "firsts": np.zeros((3, 1), np.int32),
        "labels": np.array([[0], [0], [1]], np.int32),
        "weights": np.ones((3, 1), np.float32),
    }
    got = scores(model, params, [batch], ("f1", "accuracy"), order)
    assert got["f1"] == pytest.approx(f1)
    assert got["accuracy"] == pytest.approx(2 / 3)
