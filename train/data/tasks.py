"""The table of tasks: what is read, what is learnt, what it is judged by."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Columns:
    """What is read of a table.

    Attributes:
      text: One column of text, or two.
      label: The column of the label.
      header: All columns of a TSV or CSV that does not name them in its first line.
    """

    text: tuple[str, ...]
    label: str
    header: tuple[str, ...] = ()


LABELS, ANSWERS = "labels", "answers"
"""What is learnt: an encoder gives every example a label or a number; or a decoder gives
every prompt an answer."""


@dataclasses.dataclass(frozen=True)
class Task:
    """How a task is distributed, and what it is judged by.

    Attributes:
      columns: What is read of its TSV; None where the user says it.
      labels: Names of the labels in the order of their numbers. Empty where the label
        is a number, or where the names are those found in the data.
      spelled: What the TSV says instead of `labels`, if it does.
      regression: Whether the label is a number to predict.
      metrics: Keys of `objectives.metrics.METRICS`, the headline first.
      objective: `LABELS` or `ANSWERS`.
    """

    columns: Columns | None = None
    labels: tuple[str, ...] = ()
    spelled: tuple[str, ...] = ()
    regression: bool = False
    metrics: tuple[str, ...] = ("accuracy",)
    objective: str = LABELS

    @property
    def outputs(self) -> int:
        """Of a classifier, as far as it is known without data; 0 for a decoder."""
        return 0 if self.objective == ANSWERS else len(self.labels) or 1

    def as_regression(self) -> "Task":
        """The same, with a number in the place of a label."""
        return dataclasses.replace(self, regression=True, metrics=CORRELATIONS)


CORRELATIONS = ("pearson", "spearman")
SENTENCES = ("sentence1", "sentence2")
_COLA = ("source", "label", "mark", "sentence")

TASKS = {
    "cola": Task(
        Columns(("sentence",), "label", header=_COLA),
        labels=("unacceptable", "acceptable"),
        spelled=("0", "1"),
        metrics=("matthews",),
    ),
    "mrpc": Task(
        Columns(("#1 String", "#2 String"), "Quality"),
        labels=("not_equivalent", "equivalent"),
        spelled=("0", "1"),
        metrics=("f1", "accuracy"),  # GLUE's score is their mean
    ),
    "rte": Task(Columns(SENTENCES, "label"), labels=("entailment", "not_entailment")),
    "sst2": Task(
        Columns(("sentence",), "label"),
        labels=("negative", "positive"),
        spelled=("0", "1"),
    ),
    "stsb": Task(Columns(SENTENCES, "score"), regression=True, metrics=CORRELATIONS),
    "classification": Task(),
    "sft": Task(objective=ANSWERS, metrics=("exact_match",)),
}
