"""Labels as numbers: by the model's names, by its numbers, or as they are found."""

import pytest

from train.data.numbering import number_labels
from train.data.tables import Example
from train.data.tasks import TASKS
from train.errors import DataError


def number(task, labels, own=(), outputs=None):
    examples = [Example("x", label, f"d.csv:{i}") for i, label in enumerate(labels)]
    found = number_labels(
        TASKS[task], {"train": examples}, "d.csv", own=own, outputs=outputs
    )
    return found.names, [found.of(example) for example in examples], found.order


OWN = ("good", "Not-Bad", "so so")
STARS = ("1 star", "2 stars", "3 stars")
# The task, what the data says, the model's names, whether its head is stored; the names
# by number, and the numbers of what the data says.
CASES = {
    "names": ("classification", "good|so so|Not-Bad", OWN, True, OWN, [0, 2, 1]),
    "alike": ("classification", "GOOD|not_bad|So-So", OWN, True, OWN, [0, 1, 2]),
    "fewer": ("classification", "so so|so so", OWN, True, OWN, [2, 2]),
    "numbers": ("classification", "2|0|1", OWN, True, OWN, [2, 0, 1]),
    "few numbers": ("classification", "2|2", STARS, True, STARS, [2, 2]),
    "names that are numbers": (
        "classification",
        "0|1",
        ("1", "0"),
        True,
        ("1", "0"),
        [1, 0],
    ),
    "generic": (
        "classification",
        "b|a",
        ("LABEL_0", "LABEL_1"),
        True,
        ("a", "b"),
        [1, 0],
    ),
    "generic, from 1": (
        "classification",
        "2|1",
        ("LABEL_0", "LABEL_1"),
        True,
        ("1", "2"),
        [1, 0],
    ),
    "fresh, just these": (
        "classification",
        "a|b",
        ("b", "a"),
        False,
        ("b", "a"),
        [1, 0],
    ),
    "fresh, others": ("classification", "a|b", ("x", "y"), False, ("a", "b"), [0, 1]),
    "fresh, more": (
        "classification",
        "a|b",
        ("b", "a", "c"),
        False,
        ("a", "b"),
        [0, 1],
    ),
    "glue": ("sst2", "0|1", ("Positive", "Negative"), True, None, [1, 0]),
    "glue by number": ("sst2", "0|1", ("bad", "fine"), True, None, [0, 1]),
    "glue, more labels": (
        "sst2",
        "negative|1",
        ("negative", "neutral", "positive"),
        True,
        None,
        [0, 2],
    ),
    "glue, generic": (
        "mrpc",
        "0|1",
        ("LABEL_0", "LABEL_1"),
        True,
        ("not_equivalent", "equivalent"),
        [0, 1],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_numbering(name):
    task, said, own, stored, names, numbers = CASES[name]
    said = said.split("|")
    got = number(task, said, own, len(own) if stored else None)
    assert got[:2] == (names or own, numbers)


def test_the_tasks_own_order():
    """What metrics see: label 1 of mrpc is the positive one, whatever the model says."""
    own = ("equivalent", "other", "not_equivalent")
    _, numbers, order = number("mrpc", ["0", "1"], own, 3)
    assert (numbers, order) == ([2, 0], (1, 2, 0))
    assert [order[n] for n in numbers] == [0, 1]


@pytest.mark.parametrize(
    ("task", "said", "own", "message"),
    [
        (
            "classification",
            ["good", "fine"],
            OWN,
            "d.csv:1: label 'fine' is none of the model's: good, Not-Bad, so so",
        ),
        ("classification", ["0", "3"], OWN, "label '0' is none of the model's: good"),
        (
            "classification",
            ["x"],
            ("X", "x "),
            "label 'x' is none of the model's: X, x ",
        ),
        ("rte", ["entailment"], ("yes", "no"), "'entailment' is none of the model's"),
        (
            "classification",
            ["a", "b"],
            ("LABEL_0", "LABEL_1", "LABEL_2"),
            "the model's head has 3 outputs, but d.csv needs 2 (a, b)",
        ),
    ],
)
def test_labels_of_another_model(task, said, own, message):
    with pytest.raises(DataError) as caught:
        number(task, said, own, len(own))
    assert message in str(caught.value)
