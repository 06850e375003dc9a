"""Batches, and what every data set of the trainer is to its loop."""

import abc
import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Protocol

import grain
import numpy as np

from train.errors import DataError

Batch = dict[str, np.ndarray]
"""Arrays by name, whose first axis counts rows. Of text `tokens` and `segments`, both
int32 (batch, seq + 1): inputs are `tokens[:, :-1]`, targets `tokens[:, 1:]`. `segments`
numbers the documents of a row from 1 (0 is padding); a separator belongs to the document it
ends, and neither attention nor loss crosses from one segment to another: a document's
first token is no target, and its separator is one, once.
"""


class Dataset(Protocol):
    """Examples with a training and a held-out split.

    Attributes:
      fingerprint: Hash of the data and of the way of preparing it. A checkpoint stores it
        to notice that the data changed under its iterator.
      description: One line for a human: where from, and how much.
    """

    @property
    def fingerprint(self) -> str: ...

    @property
    def description(self) -> str: ...

    def train(self, batch: int, seed: int) -> grain.DatasetIterator[Batch]:
        """Returns endless batches, shuffled by `seed` and anew in each epoch.

        Args:
          batch: Rows per batch.
          seed: In [0, 2**32). Equal seeds give equal batches.

        Returns:
          An iterator whose `get_state()` is a small JSON-compatible dict; `set_state()` on
          a new iterator with the same arguments continues with the very next batch.
        """
        ...

    def validation(self, batch: int) -> Iterator[Batch]:
        """Returns the held-out split once; where rows only fill up a batch, `weights`,
        float32, are 0."""
        ...


Order = Callable[[grain.MapDataset[Any]], grain.MapDataset[Any]]
"""What is done to rows that are read at random: they are shuffled, or left as they are."""


@dataclasses.dataclass(frozen=True)
class TextData(abc.ABC):
    """Tokenised text with a training and a held-out split; made by `corpus.load`.

    Attributes:
      vocab_size: Every token is in [0, vocab_size).
      seq: Predicted tokens per row; a row holds one more.
      held_batches: `validation` stops after so many; None reads everything.
      fingerprint, description: As of every `Dataset`.
    """

    vocab_size: int
    seq: int
    held_batches: int | None
    fingerprint: str
    description: str

    def train(self, batch: int, seed: int) -> grain.DatasetIterator[Batch]:
        """Returns endless batches, shuffled by `seed` and anew in each epoch.

        A batch may have more rows than there are windows in the text.
        """
        rows = self.rows("train", lambda d: d.seed(seed).shuffle().repeat())
        return iter(rows.batch(batch, drop_remainder=True))

    def validation(self, batch: int) -> Iterator[Batch]:
        """Returns the held-out split once, in order.

        Besides `tokens` and `segments` each batch has `weights`, float32
        (batch, seq): 1 where the target is text, 0 where it only fills up the last
        batch. A mean over tokens with these weights counts every window once.
        """
        rows = self.rows("validation", lambda d: d)
        batches = (_pad(element, batch) for element in rows.batch(batch))
        return itertools.islice(batches, self.held_batches)

    @abc.abstractmethod
    def rows(self, split: str, order: Order) -> grain.IterDataset[Batch]:
        """Single rows, (seq + 1,) each; `order` applies to what is read at random."""


def shuffled(
    rows: grain.sources.RandomAccessDataSource[Batch], batch: int, seed: int
) -> grain.DatasetIterator[Batch]:
    """Returns endless batches of single rows; see `Dataset.train`.

    An epoch is ceil(rows / batch) batches and has each row once: rows of zeros, whose
    weights are 0, fill up its last batch.
    """
    pad = functools.partial(grain.experimental.batch_and_pad, batch_size=batch)
    order = grain.MapDataset.source(rows).seed(seed).shuffle()
    return iter(order.batch(batch, batch_fn=pad).repeat().to_iter_dataset())


Key = Callable[[Any], Hashable]
"""What is equal in equal items."""


def normal(text: str) -> str:
    """The text as its duplicates have it: one space wherever there is white space.

    >>> normal(" a\\r\\n b ")
    'a b'
    """
    return " ".join(text.split())


def split_off(
    items: Sequence[Any], size: int, draw: np.random.Generator, key: Key, data: str
) -> tuple[list[Any], list[Any], str]:
    """What stays, and about `size` items held out by chance, both in their order.

    Equal items stay on one side, so `size` is met exactly where there are none. Only where
    all are equal there is no other way.

    Args:
      data: Where the items are from, for messages.

    Returns:
      Both, and what is to be said of equal items: "; ..." if there are any.

    Raises:
      DataError: if there is but one item.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(key(item), []).append(index)
    if len(items) < 2:
        raise DataError(f"data {data!r} is too small to hold out a part of it")
    if len(groups) == 1:
        note = f"; all {len(items):,} rows are equal, those held out among them"
        return [*items[size:]], [*items[:size]], note
    parts = [*groups.values()]
    drawn = [parts[i] for i in draw.permutation(len(parts)).tolist()]
    held: set[int] = set()
    for part in drawn:
        if len(held) < size and len(held) + len(part) <= max(size, len(items) // 2):
            held.update(part)
    held = held or {*min(drawn, key=len)}
    stays = [item for i, item in enumerate(items) if i not in held]
    copies = len(items) - len(parts)
    note = f"; {counted(copies, 'duplicate row')}, kept on one side" if copies else ""
    return stays, [items[i] for i in sorted(held)], note


def shared(train: Sequence[Any], held: Sequence[Any], key: Key) -> str:
    """What is to be said of held-out items that are trained on: "; ..." if any are."""
    seen = {key(item) for item in train}
    both = sum(key(item) in seen for item in held)
    verb = "is" if both == 1 else "are"
    return (
        f"; {counted(both, 'held-out row')} {verb} among the training rows"
        if both
        else ""
    )


def counted(number: int, name: str) -> str:
    """A number of things.

    >>> counted(1200, "row")
    '1,200 rows'
    """
    return f"{number:,} {name}{'s' * (number != 1)}"


def fill(rows: Batch, batch: int) -> Batch:
    """Adds rows of zeros up to `batch`."""
    missing = batch - len(next(iter(rows.values())))
    return {
        key: np.pad(val, ((0, missing), *[(0, 0)] * (val.ndim - 1)))
        for key, val in rows.items()
    }


def _pad(rows: Batch, batch: int) -> Batch:
    """Adds rows of zeros up to `batch`, and the weights that leave them out."""
    full = fill(rows, batch)
    return full | {"weights": (full["segments"][:, 1:] > 0).astype(np.float32)}
