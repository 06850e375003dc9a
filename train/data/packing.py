"""Examples of any length, packed into rows of one length."""

import dataclasses
import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from train.data.batches import Batch


def pack(
    lengths: Sequence[int], capacity: int, most: int | None = None
) -> list[list[int]]:
    """Puts items, in their order, each into the first row that has room for it.

    Args:
      lengths: Of the items; at most `capacity`.
      capacity: What a row holds.
      most: Items that a row takes; None if as many as fit.

    Returns:
      The items of each row, by index.

    Example:
      >>> pack([3, 4, 2, 1, 1], capacity=5)
      [[0, 2], [1, 3], [4]]
    """
    rows: list[list[int]] = []
    # Rows by the room that is left in them: looking for the first of all in `capacity`
    # numbers, instead of in as many as there are rows, keeps large data fast.
    heaps: list[list[int]] = [[] for _ in range(capacity + 1)]
    none = len(lengths)
    first = np.full(capacity + 1, none)
    for item, length in enumerate(lengths):
        room = length + int(np.argmin(first[length:]))
        if first[room] == none:
            room, row = capacity, len(rows)
            rows.append([])
        else:
            row = heapq.heappop(heaps[room])
            first[room] = heaps[room][0] if heaps[room] else none
        rows[row].append(item)
        if len(rows[row]) != most:
            left = room - length
            heapq.heappush(heaps[left], row)
            first[left] = heaps[left][0]
    return rows


def pack_shuffled(
    lengths: Sequence[int],
    capacity: int,
    draw: np.random.Generator,
    most: int | None = None,
) -> list[list[int]]:
    """As `pack`, with the items taken in a random order."""
    order = draw.permutation(len(lengths)).tolist()
    rows = pack([lengths[index] for index in order], capacity, most)
    return [[order[item] for item in row] for row in rows]


class Answered(NamedTuple):
    """A conversation in tokens.

    Attributes:
      tokens: All of it; int32.
      learnt: Which of them are targets; bool, never the first.
      start: Where the last answer begins.
    """

    tokens: np.ndarray
    learnt: np.ndarray
    start: int


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """Rows of `seq` + 1 tokens for random access; made by `pack_examples`.

    A row has `tokens` and `segments`, int32 (seq + 1,), and `weights`, float32 (seq,):
    1 where the target is a token of an answer.
    """

    examples: list[Answered]
    contents: list[list[int]]  # the examples of each row
    seq: int

    def __len__(self) -> int:
        return len(self.contents)

    def __getitem__(self, index: int) -> Batch:
        tokens, segments = np.zeros((2, self.seq + 1), np.int32)
        weights = np.zeros(self.seq, np.float32)
        start = 0
        for segment, number in enumerate(self.contents[index], start=1):
            example = self.examples[number]
            stop = min(start + len(example.tokens), self.seq + 1)
            tokens[start:stop] = example.tokens[: stop - start]
            segments[start:stop] = segment
            # Token i is the target at i - 1; a document's first one is never one.
            weights[start : stop - 1] = example.learnt[1 : stop - start]
            start = stop
        return {"tokens": tokens, "segments": segments, "weights": weights}


def pack_examples(
    examples: list[Answered], seq: int, draw: np.random.Generator
) -> PackedRows:
    """Packs examples in a random order; what is longer than a row is cut at its end."""
    lengths = [min(len(example.tokens), seq + 1) for example in examples]
    return PackedRows(examples, pack_shuffled(lengths, seq + 1, draw), seq)
