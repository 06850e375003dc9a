"""A TFDS text dataset, read where it lies: tokenised and packed as it comes."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from train.data.batches import Batch, Order, TextData, normal
from train.data.coder import Coder
from train.data.tfds import open_prepared, random_access
from train.errors import DataError
from train.report.progress import progress_bar

# Part of every fingerprint: raise it whenever the rows would differ.
_PREPARATION = 2


class _ConcatThenSplit(grain.experimental.ConcatThenSplitIterDataset):
    """Grain's packing, with a state that survives JSON.

    Grain 0.2.18 compares the slices in its state with a tuple. A checkpoint brings
    them back as lists, "no document is pending" then reads as "one is", and the
    iterator silently skips a document.
    """

    def __iter__(self) -> grain.DatasetIterator[Batch]:
        iterator = super().__iter__()
        restore = iterator.set_state

        def set_state(state: dict[str, Any]) -> None:
            slices = {key: tuple(val) for key, val in state["remainder_slices"].items()}
            restore(state | {"remainder_slices": slices})

        iterator.set_state = set_state
        return iterator


class _Unseen:
    """Leaves out documents that are held out too."""

    def __init__(self, held: frozenset[bytes], count: int):
        self.held, self.count, self.in_a_row = held, count, 0

    def __call__(self, record: dict[str, bytes]) -> bool:
        unseen = _digest(record) not in self.held
        self.in_a_row = 0 if unseen else self.in_a_row + 1
        if self.in_a_row > 2 * self.count:  # an endless stream would look for ever
            raise DataError("all training documents equal held-out ones")
        return unseen


def _digest(record: dict[str, bytes]) -> bytes:
    text = normal(record["text"].decode("utf-8", "replace"))
    return hashlib.sha256(text.encode()).digest()


@dataclasses.dataclass(frozen=True)
class _Streamed(TextData):
    """A TFDS text dataset: random access to documents, packed as they come."""

    documents: dict[str, Sequence[Any]]
    coder: Coder
    held: frozenset[bytes]  # digests of held-out documents that may be among the others

    def _encode(self, record: dict[str, bytes]) -> dict[str, np.ndarray]:
        pieces = self.coder.document(record["text"].decode("utf-8"))
        return {"tokens": np.concatenate([*pieces]).astype(np.int32)}

    def rows(self, split: str, order: Order) -> grain.IterDataset[Batch]:
        documents = order(grain.MapDataset.source(self.documents[split]))
        if split == "train" and self.held:
            documents = documents.filter(_Unseen(self.held, len(self.documents[split])))
        packed = _ConcatThenSplit(
            documents.map(self._encode).to_iter_dataset(),
            length_struct={"tokens": self.seq + 1},
        )
        return packed.map(
            lambda row: {"tokens": row["tokens"], "segments": row["tokens_segment_ids"]}
        )


def open_text(
    name: str,
    data_dir: str | None,
    coder: Coder,
    seq: int,
    held_batches: int | None,
    progress: bool,
) -> TextData:
    """Opens a TFDS text dataset, to be tokenised as it is read.

    Raises:
      DataError: if it is not there, has no text, or is too small to train on.
    """
    builder, where = open_prepared(name, data_dir)
    if "text" not in builder.info.features:
        raise DataError(
            f"tfds:{name} in {where}: no feature 'text' among"
            f" {sorted(builder.info.features)}"
        )
    sizes = {key: split.num_examples for key, split in builder.info.splits.items()}
    held = next((key for key in ("validation", "test") if sizes.get(key)), None)
    tail = 0 if held else max(1, sizes.get("train", 0) // 100)
    cut = sizes.get("train", 0) - tail
    if cut <= 0:
        raise DataError(
            f"tfds:{name} in {where}: too few documents to train on, {sizes}"
        )
    documents = random_access(
        builder,
        where,
        train=f"train[:{cut}]",
        validation=held or f"train[{cut}:]",
    )
    digests: set[bytes] = set()
    if tail:
        with progress_bar(tail, "Reading held-out text", shown=progress) as bar:
            for index in range(tail):
                digests.add(_digest(documents["validation"][index]))
                bar.advance()
    kept = "; training documents that equal held-out ones are left out" if tail else ""
    state = (_PREPARATION, coder.identity, builder.info.full_name, tail)
    splits = [
        (key, split.num_bytes, split.shard_lengths)
        for key, split in sorted(builder.info.splits.items())
    ]
    return _Streamed(
        coder.vocab_size,
        seq,
        held_batches,
        hashlib.sha256(repr((state, splits)).encode()).hexdigest()[:16],
        f"tfds:{builder.info.full_name} in {where}: {len(documents['train']):,} training"
        f" and {len(documents['validation']):,} held-out documents{kept}",
        documents=documents,
        coder=coder,
        held=frozenset(digests),
    )
