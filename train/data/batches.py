"""Batches, and what every data set of the trainer is to its loop."""

import abc
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import grain
import numpy as np

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
    """Returns endless batches of single rows; see `Dataset.train`."""
    order = grain.MapDataset.source(rows).seed(seed).shuffle().repeat()
    return iter(order.to_iter_dataset().batch(batch, drop_remainder=True))


def split_off(
    items: Sequence[Any], size: int, draw: np.random.Generator
) -> tuple[list[Any], list[Any]]:
    """What stays, and `size` items held out by chance, both in their order."""
    held = set(draw.permutation(len(items))[:size].tolist())
    stays = [item for i, item in enumerate(items) if i not in held]
    return stays, [items[i] for i in sorted(held)]


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
