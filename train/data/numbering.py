"""Labels as numbers: the model's own, the task's, or in the order of those found."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

from train.data.tables import Example, found_labels
from train.data.tasks import Task
from train.errors import DataError

_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Numbering:
    """The labels of a classifier.

    Attributes:
      names: By number.
      numbers: Of what the data says.
      order: The task's own number of each, which its metrics go by.
    """

    names: tuple[str, ...]
    numbers: Mapping[str, int]
    order: tuple[int, ...]

    def of(self, example: Example) -> int:
        """The number of an example's label.

        Raises:
          DataError: if it is no label.
        """
        if example.label not in self.numbers:
            raise DataError(
                f"{example.place}: label {example.label!r} is none of"
                f" {some(self.numbers)}"
            )
        return self.numbers[example.label]


def number_labels(
    task: Task,
    splits: Mapping[str, list[Example]],
    data: str,
    *,
    outputs: int | None = None,
    own: Sequence[str] = (),
) -> Numbering:
    """Numbers the labels of a task.

    Args:
      task: If it has labels, they are it; else those that the data has.
      splits: All examples; where nothing else says what labels there are, those of
        `train` say it.
      data: What it is called in messages.
      outputs: Of the model's head, if it is stored.
      own: The names that the model has for its labels. With a head that is stored they
        decide, unless they are LABEL_0 and so on, which say nothing. Without one they
        do if they are just the data's.

    Raises:
      DataError: if the data has a label that is none of the model's, or if there are
        more or fewer than the model has outputs.
    """
    examples = [example for part in splits.values() for example in part]
    said = dict.fromkeys(task.labels or (example.label for example in examples))
    spelled = task.spelled or (() if task.labels else tuple(said))
    named = any(not re.fullmatch("LABEL_[0-9]+", name) for name in own)
    found = _by_name(said, own)
    if len(found) < len(said) and named and outputs:
        found = _by_number(tuple(said), spelled, len(own)) or found
    if found and len(found) == len(said) and (outputs or len(found) == len(own)):
        return _numbering(task, tuple(own), found)
    if named and outputs:
        label = next(label for label in said if label not in found)
        place = next((e.place for e in examples if e.label == label), data)
        raise DataError(f"{place}: label {label!r} is none of the model's: {some(own)}")
    names = task.labels or found_labels(splits["train"], data)
    if outputs not in (None, len(names)):
        raise DataError(
            f"the model's head has {outputs} outputs, but {data} needs {len(names)}"
            f" ({some(names)})"
        )
    return _numbering(task, names, {name: i for i, name in enumerate(names)})


def some(names: Iterable[str]) -> str:
    """The first of them, and how many more there are."""
    first, rest = [*names][:_SHOWN], [*names][_SHOWN:]
    return ", ".join(first) + (f" and {len(rest)} more" if rest else "")


def _numbering(
    task: Task, names: tuple[str, ...], numbers: Mapping[str, int]
) -> Numbering:
    spelled = {
        word: numbers[label]
        for word, label in zip(task.spelled, task.labels, strict=False)
    }
    # What is no label of the task comes after those that are.
    theirs = [numbers[label] for label in task.labels]
    rest = [i for i in range(len(names)) if i not in theirs]
    order = tuple([*theirs, *rest].index(i) for i in range(len(names)))
    return Numbering(names, {**numbers, **spelled}, order)


def _by_name(said: Iterable[str], own: Sequence[str]) -> dict[str, int]:
    """Numbers of those that are the model's: to the letter, else but for case."""
    exact = {name: i for i, name in enumerate(own)}
    alike: dict[str, list[int]] = {}
    for name, i in exact.items():
        alike.setdefault(_plain(name), []).append(i)
    found = {}
    for label in said:
        near = alike.get(_plain(label), [])
        if label in exact:
            found[label] = exact[label]
        elif len(near) == 1:
            found[label] = near[0]
    return found


def _by_number(
    said: Sequence[str], spelled: Sequence[str], outputs: int
) -> dict[str, int]:
    """Numbers of labels that the data spells as the model's numbers; {} if not all."""
    whole = [re.fullmatch("[0-9]{1,9}", word) for word in spelled]
    if not whole or not all(m and int(m[0]) < outputs for m in whole):
        return {}
    return {label: int(word) for label, word in zip(said, spelled, strict=True)}


def _plain(name: str) -> str:
    return re.sub(r"[-_\s]+", " ", name).strip().casefold()
