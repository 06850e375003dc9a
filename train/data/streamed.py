"""A TFDS text dataset, read where it lies: tokenised and packed as it comes."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from train.data.batches import Batch, Order, TextData
from train.data.coder import Coder
from train.data.tfds import open_prepared, random_access
from train.errors import DataError

# Part of every fingerprint: raise it whenever the rows would differ.
_PREPARATION = 1


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


@dataclasses.dataclass(frozen=True)
class _Streamed(TextData):
    """A TFDS text dataset: random access to documents, packed as they come."""

    documents: dict[str, Sequence[Any]]
    coder: Coder

    def _encode(self, record: dict[str, bytes]) -> dict[str, np.ndarray]:
        pieces = self.coder.document(record["text"].decode("utf-8"))
        return {"tokens": np.concatenate([*pieces]).astype(np.int32)}

    def rows(self, split: str, order: Order) -> grain.IterDataset[Batch]:
        documents = order(grain.MapDataset.source(self.documents[split]))
        packed = _ConcatThenSplit(
            documents.map(self._encode).to_iter_dataset(),
            length_struct={"tokens": self.seq + 1},
        )
        return packed.map(
            lambda row: {"tokens": row["tokens"], "segments": row["tokens_segment_ids"]}
        )


def open_text(
    name: str, data_dir: str | None, coder: Coder, seq: int, held_batches: int | None
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
        f" and {len(documents['validation']):,} held-out documents",
        documents=documents,
        coder=coder,
    )
