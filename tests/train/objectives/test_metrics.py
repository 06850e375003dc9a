"""Metrics against formulas written out, and answers that are the same."""

import numpy as np
import pytest

from train.data.tasks import TASKS
from train.objectives.metrics import exact_match, metrics


def of_task(name, predictions, right):
    return metrics(TASKS[name].metrics, predictions, right)


@pytest.mark.parametrize("seed", range(3))
def test_metrics_by_hand(seed):
    draw = np.random.default_rng(seed)
    labels, given = draw.integers(0, 2, (2, 50))
    tp, tn = np.sum(given & labels), np.sum((1 - given) & (1 - labels))
    fp, fn = np.sum(given & (1 - labels)), np.sum((1 - given) & labels)
    root = np.sqrt(float(tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    want = {"f1": 2 * tp / (2 * tp + fp + fn), "accuracy": (tp + tn) / 50}
    assert of_task("mrpc", given, labels) == pytest.approx(want)
    assert of_task("cola", given, labels) == pytest.approx(
        {"matthews": (tp * tn - fp * fn) / root}
    )
    values, scores = draw.normal(size=(2, 50))

    def pearson(x, y):
        x, y = x - x.mean(), y - y.mean()
        return x @ y / np.sqrt((x @ x) * (y @ y))

    ranks = [v.argsort().argsort().astype(float) for v in (values, scores)]
    want = {"pearson": pearson(values, scores), "spearman": pearson(*ranks)}
    assert of_task("stsb", values, scores) == pytest.approx(want)
    numbers = TASKS["classification"].as_regression()
    assert metrics(numbers.metrics, values, scores) == pytest.approx(want)
    assert of_task("classification", [0, 2, 1], [0, 2, 2]) == {"accuracy": 2 / 3}


@pytest.mark.parametrize("name", [name for name in TASKS if name not in ("rte", "sft")])
@pytest.mark.parametrize("value", [0, 1])
def test_constant_predictions(name, value):
    kind = float if name == "stsb" else int
    for labels in ([0, 1, 1], [0, 0, 0], [1]):
        got = of_task(name, [kind(value)] * len(labels), np.array(labels, kind))
        assert [*got] == [*TASKS[name].metrics]
        assert all(np.isfinite(score) for score in got.values())
        if name in ("cola", "stsb") or (name == "mrpc" and not value):
            assert next(iter(got.values())) == 0
    assert of_task("stsb", [np.nan, 1.0], [1.0, 2.0]) == {"pearson": 0, "spearman": 0}


@pytest.mark.parametrize(
    ("text", "reference", "same"),
    [
        ("#### 42", "x #### 42", True),
        ("so #### 1 #### $1,042.0 apples", "#### 1042", True),
        ("#### -5", "#### $-5", True),
        ("#### .5", "#### 0.50", True),
        ("#### 43", "#### 42", False),
        ("42", "#### 42", False),
        ("#### 4", "#### 42", False),
        ("####", "#### 42", False),
        ("#### yes ", "####yes", True),
        ("42 ", " 42", True),
        ("42.0", "42", False),
        ("#### 42", "42", False),
    ],
)
def test_exact_match(text, reference, same):
    assert exact_match([reference, "a"], [text, "a"]) == (1 + same) / 2
    assert of_task("sft", [text], [reference]) == {"exact_match": same}
