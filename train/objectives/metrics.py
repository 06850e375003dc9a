"""What predictions and answers are judged by."""

import decimal
import functools
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.stats
import sklearn.metrics

Values = np.ndarray | Sequence[Any]


def _correlation(function: Callable) -> Callable[[np.ndarray, np.ndarray], float]:
    def score(labels: np.ndarray, predictions: np.ndarray) -> float:
        return function(labels, predictions).statistic if len(labels) > 1 else 0.0

    return score


def exact_match(references: Sequence[str], generated: Sequence[str]) -> float:
    """The share of texts whose answer is the reference's.

    As for GSM8K: where a reference has "####", the answers are the numbers after the
    last one, whatever the text before it; else the whole stripped texts are compared.

    Example:
      >>> exact_match(["so #### 42", "42"], ["2 + 40 #### $42.0", "41"])
      0.5
    """
    right = 0
    for text, reference in zip(generated, references, strict=True):
        if "####" in reference:
            right += "####" in text and _answer(text) == _answer(reference)
        else:
            right += text.strip() == reference.strip()
    return right / max(1, len(references))


def _answer(text: str) -> decimal.Decimal | str:
    last = text.rpartition("####")[2].strip()
    plain = last.replace(",", "").replace("$", "").strip()
    number = re.match(r"-?([0-9]+(\.[0-9]+)?|\.[0-9]+)", plain)
    return decimal.Decimal(number[0]) if number else last


METRICS: dict[str, Callable[[Any, Any], float]] = {
    "matthews": sklearn.metrics.matthews_corrcoef,
    # Of label 1, also where a model has more labels than the task.
    "f1": functools.partial(
        sklearn.metrics.f1_score, labels=[1], average="micro", zero_division=0
    ),
    "accuracy": sklearn.metrics.accuracy_score,
    "pearson": _correlation(scipy.stats.pearsonr),
    "spearman": _correlation(scipy.stats.spearmanr),
    "exact_match": exact_match,
}
"""Each takes what is right, then what was said."""


def metrics(
    names: Sequence[str], predictions: Values, right: Values
) -> dict[str, float]:
    """Scores predictions by the metrics of those names.

    Args:
      names: Keys of `METRICS`.
      predictions: (n,): numbers of labels, values of a regression, or texts.
      right: (n,), the right ones.

    Returns:
      Each metric by name, 0 where it is not defined (all predictions alike).

    Example:
      >>> metrics(("f1", "accuracy"), [1, 1, 1, 0], [1, 1, 0, 0])
      {'f1': 0.8, 'accuracy': 0.75}
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they warn before they return NaN, or 0
        scores = {name: float(METRICS[name](right, predictions)) for name in names}
    return {name: float(np.nan_to_num(score)) for name, score in scores.items()}
