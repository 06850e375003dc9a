"""Text in, batches of tokens out.

Two routes lead to the same batches:

* *Local text* (files, a directory, or the Python standard library's own source)
  is tokenised once into a small TFDS dataset in the cache, then read at random.
  A batch depends on nothing but (fingerprint, batch, seq, seed, position).
* *A TFDS text dataset* (`tfds:c4/en`) is read where it lies, tokenised on the
  fly and packed: preparing it a second time would double hundreds of gigabytes.

Nothing here needs TensorFlow or the network.
"""

import abc
import collections
import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import os
import platform
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import read_only_builder

from train.text import (
    Coder,
    DataError,
    coder_of,
    progress_bar,
    read_documents,
    standard_library,
    text_files,
)

Batch = dict[str, np.ndarray]
"""`tokens` and `segments`, both int32 (batch, seq + 1).

Inputs are `tokens[:, :-1]`, targets `tokens[:, 1:]`. `segments` numbers the
documents of a row from 1 (0 is padding); a separator belongs to the document it
ends, and attention must not cross from one segment to another.
"""

# Part of every fingerprint: raise it whenever the prepared tokens would differ.
_PREPARATION = 1
_BLOCK = 4096  # tokens per record


_Order = Callable[[grain.MapDataset[Any]], grain.MapDataset[Any]]
_Read = Callable[[], Iterator[str]]  # reads all documents, from the start each time
_Blocks = dict[str, Iterable[np.ndarray]]  # split to blocks of tokens


@dataclasses.dataclass(frozen=True)
class TextData(abc.ABC):
    """Tokenised text with a training and a held-out split; made by `load`.

    Attributes:
      vocab_size: Every token is in [0, vocab_size).
      fingerprint: Hash of the text, the tokenizer and the way of preparing it. A
        checkpoint stores it to notice that the data changed under its iterator.
      description: One line for a human: where from, and how much.
    """

    vocab_size: int
    fingerprint: str
    description: str

    def train(self, batch: int, seq: int, seed: int) -> grain.DatasetIterator[Batch]:
        """Returns endless batches, shuffled by `seed` and anew in each epoch.

        Args:
          batch: Rows per batch; may exceed the number of windows in the corpus.
          seq: Predicted tokens per row; a row holds one more.
          seed: In [0, 2**32). Equal seeds give equal batches.

        Returns:
          An iterator of `Batch`. Its `get_state()` is a small JSON-compatible dict;
          `set_state()` on a new iterator with the same arguments continues with
          the very next batch.

        Raises:
          DataError: if a split of local text is too short for one row.
        """
        rows = self._rows("train", seq, lambda d: d.seed(seed).shuffle().repeat())
        return iter(rows.batch(batch, drop_remainder=True))

    def validation(
        self, batch: int, seq: int, max_batches: int | None = None
    ) -> Iterator[Batch]:
        """Returns the held-out split once, in order.

        Besides `tokens` and `segments` each batch has `weights`, float32
        (batch, seq): 1 where the target is text, 0 where it only fills up the last
        batch. A mean over tokens with these weights counts every window once.

        Args:
          batch: Rows per batch, the same for all batches.
          seq: Predicted tokens per row.
          max_batches: Stops early; None reads everything.

        Raises:
          DataError: if a split of local text is too short for one row.
        """
        rows = self._rows("validation", seq, lambda d: d)
        batches = (_pad(element, batch) for element in rows.batch(batch))
        return itertools.islice(batches, max_batches)

    @abc.abstractmethod
    def _rows(self, split: str, seq: int, order: _Order) -> grain.IterDataset[Batch]:
        """Single rows, (seq + 1,) each; `order` applies to what is read at random."""


def load(
    data: str | None,
    tokenizer: str | None,
    *,
    cache: Path,
    data_dir: str | None = None,
    progress: bool = True,
) -> TextData:
    """Finds text, and prepares it unless that was done before.

    Args:
      data: A text file (one document), a `.jsonl` file (one document per line, in
        the field `text`), a directory (every text file below it, each a document),
        `tfds:NAME` (a TFDS dataset already prepared, with a feature `text`), or
        None for the Python standard library's own source.
      tokenizer: Path of a `tokenizer.json`, or None for bytes: 256 tokens, byte 0
        separates documents.
      cache: Where prepared tokens live, one folder per fingerprint. Preparing needs
        about two bytes of memory per token.
      data_dir: Where TFDS datasets lie; None is TFDS's own default.
      progress: Shows a bar while preparing, if standard error is a terminal.

    Raises:
      DataError: if the text or the tokenizer is missing, empty or unreadable.

    Example:
      >>> data = load(None, None, cache=Path(tempfile.mkdtemp()), progress=False)
      >>> next(data.train(batch=8, seq=256, seed=0))["tokens"].shape
      (8, 257)
    """
    coder = coder_of(tokenizer)
    if data is not None and data.startswith("tfds:"):
        return _streamed(data.removeprefix("tfds:"), data_dir, coder)
    files = standard_library() if data is None else text_files(data)
    read = functools.partial(read_documents, files, skip_undecodable=data is None)
    name = data or f"Python {platform.python_version()} standard library"
    return _prepared(name, read, coder, Path(cache), progress)


class PackedText(tfds.core.GeneratorBasedBuilder):
    """Token streams in blocks of equal length; each split ends in a shorter one."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, splits: _Blocks, dtype: np.dtype, **kwargs: Any):
        self._splits = splits
        self._dtype = dtype
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        # Without an encoding TFDS stores each integer as a varint, which is slow to
        # read; unshuffled, because windows run across neighbouring records.
        block = tfds.features.Tensor(shape=(None,), dtype=self._dtype, encoding="bytes")
        features = tfds.features.FeaturesDict({"tokens": block})
        return tfds.core.DatasetInfo(
            builder=self, features=features, disable_shuffling=True
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {key: self._generate_examples(val) for key, val in self._splits.items()}

    def _generate_examples(self, blocks: Iterable[np.ndarray]) -> Iterator[Any]:
        return ((index, {"tokens": block}) for index, block in enumerate(blocks))


def _prepared(
    name: str, read: _Read, coder: Coder, cache: Path, progress: bool
) -> TextData:
    """Tokenises what `read` yields, unless the cache has it, and opens it."""
    sizes: collections.Counter[bytes] = collections.Counter()
    content = hashlib.sha256(repr((_PREPARATION, _BLOCK, coder.identity)).encode())
    documents = 0
    for text in read():
        digest = _digest(text)
        content.update(digest)
        sizes[digest] += len(text)
        documents += 1
    if not documents:
        raise DataError(f"data {name!r} is empty: there is no text in it")
    fingerprint = content.hexdigest()[:16]
    target = cache / fingerprint
    if not target.exists():
        with progress_bar(progress) as bar:
            task = bar.add_task("Preparing tokens", total=sizes.total())
            splits = _splits(read, coder, sizes, lambda n: bar.advance(task, n))
            _write(target, splits, coder.dtype)
    # Also open to others: tfds.data_source("packed_text:1.0.0", data_dir=target).
    folder = target / PackedText.name / str(PackedText.VERSION)
    blocks = tfds.builder_from_directory(folder).as_data_source()
    count = {
        split: (len(records) - 1) * _BLOCK + len(records[len(records) - 1]["tokens"])
        for split, records in blocks.items()
    }
    return _Prepared(
        coder.vocab_size,
        fingerprint,
        f"{name}: {documents:,} document{'s' * (documents > 1)},"
        f" {count['train']:,} training and {count['validation']:,} held-out tokens",
        blocks=blocks,
        count=count,
        separator=coder.separator,
    )


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _splits(
    read: _Read,
    coder: Coder,
    sizes: collections.Counter[bytes],
    advance: Callable[[int], object],
) -> _Blocks:
    """Returns the blocks of both splits; about a twentieth is held out.

    Whole documents where possible, chosen by a hash of their text so that equal
    ones stay on one side and the order of files does not matter. If not one is
    small enough (a single book, a few of them), the tail of the stream instead.
    """
    held: set[bytes] = set()
    taken, total = 0, sizes.total()
    for digest in sorted(sizes):
        if taken < total / 20 and taken + sizes[digest] <= total / 10:
            held.add(digest)
            taken += sizes[digest]

    def stream(keep: Callable[[bytes], bool]) -> Iterator[np.ndarray]:
        for text in read():
            if keep(_digest(text)):
                yield from coder.document(text, advance)

    if held:
        return {
            "train": _blocks(stream(lambda digest: digest not in held)),
            "validation": _blocks(stream(lambda digest: digest in held)),
        }
    tokens = np.concatenate([*stream(lambda digest: True)])
    cut = len(tokens) - max(1, len(tokens) // 10)
    return {"train": _blocks([tokens[:cut]]), "validation": _blocks([tokens[cut:]])}


def _blocks(stream: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Cuts a stream into blocks of _BLOCK tokens and a shorter, maybe empty, one."""
    rest: list[np.ndarray] = []
    size = 0
    for tokens in stream:
        rest.append(tokens)
        size += len(tokens)
        if size >= _BLOCK:
            joined = np.concatenate(rest)
            size %= _BLOCK
            yield from joined[: len(joined) - size].reshape(-1, _BLOCK)
            rest = [joined[len(joined) - size :]]
    yield np.concatenate(rest)


def _write(target: Path, splits: _Blocks, dtype: np.dtype) -> None:
    """Prepares beside the target and renames, so that a kill leaves no half."""
    target.parent.mkdir(parents=True, exist_ok=True)
    tfds.disable_progress_bar()  # TFDS draws its own even without a terminal
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".prepare-") as scratch:
        data = Path(scratch, "data")
        builder = PackedText(splits, dtype, data_dir=data, file_format="array_record")
        with contextlib.redirect_stdout(io.StringIO()):  # "Downloading ..."
            builder.download_and_prepare(
                download_dir=Path(scratch, "downloads"),
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            )
        try:
            data.replace(target)
        except OSError:
            if not target.exists():  # else another process was faster; same content
                raise


@dataclasses.dataclass(frozen=True)
class _Windows:
    """Window i is stream[i * seq : i * seq + seq + 1]: neighbours share one token.

    Every token but the first is thus a target exactly once; what is left after the
    last whole window is not used.
    """

    blocks: Sequence[Any]
    count: int
    seq: int
    separator: int

    def __len__(self) -> int:
        return max(0, self.count - 1) // self.seq

    def __getitem__(self, index: int) -> Batch:
        first, start = divmod(index * self.seq, _BLOCK)
        stop = start + self.seq + 1
        needed = range(first, first + -(-stop // _BLOCK))
        parts = [self.blocks[block]["tokens"] for block in needed]
        tokens = np.concatenate(parts)[start:stop].astype(np.int32)
        ends = (tokens == self.separator).astype(np.int32)
        return {
            "tokens": tokens,
            "segments": 1 + np.cumsum(ends, dtype=np.int32) - ends,
        }


@dataclasses.dataclass(frozen=True)
class _Prepared(TextData):
    """Local text: random access to windows, so Grain resumes from a number."""

    blocks: dict[str, Sequence[Any]]
    count: dict[str, int]
    separator: int

    def _rows(self, split: str, seq: int, order: _Order) -> grain.IterDataset[Batch]:
        if min(self.count.values()) <= seq:
            raise DataError(
                f"seq {seq} needs at least {seq + 1} training and {seq + 1} held-out"
                f" tokens, but there is only {self.description}; shorten seq or add"
                " text"
            )
        windows = _Windows(self.blocks[split], self.count[split], seq, self.separator)
        return order(grain.MapDataset.source(windows)).to_iter_dataset()


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

    def _rows(self, split: str, seq: int, order: _Order) -> grain.IterDataset[Batch]:
        documents = order(grain.MapDataset.source(self.documents[split]))
        packed = _ConcatThenSplit(
            documents.map(self._encode).to_iter_dataset(),
            length_struct={"tokens": seq + 1},
        )
        return packed.map(
            lambda row: {"tokens": row["tokens"], "segments": row["tokens_segment_ids"]}
        )


def _streamed(name: str, data_dir: str | None, coder: Coder) -> TextData:
    """Opens a TFDS text dataset, to be tokenised as it is read."""
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
        hashlib.sha256(repr((state, splits)).encode()).hexdigest()[:16],
        f"tfds:{builder.info.full_name} in {where}: {len(documents['train']):,} training"
        f" and {len(documents['validation']):,} held-out documents",
        documents=documents,
        coder=coder,
    )


def open_prepared(
    name: str, data_dir: str | None
) -> tuple[tfds.core.DatasetBuilder, str]:
    """Opens a prepared TFDS dataset, without its code and without preparing it.

    Returns:
      The dataset, and the data directory for messages.

    Raises:
      DataError: if it is not there.
    """
    where = data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    try:
        # From the files alone: the class behind a name such as c4 may need
        # TensorFlow or Beam, and tfds.builder would look for it first.
        builder = read_only_builder.builder_from_files(name, data_dir=data_dir)
    except ValueError as error:
        raise DataError(
            f"tfds:{name} is not prepared in {where}; check the name (NAME/CONFIG:"
            f"VERSION) and the data directory, or prepare it once with `tfds build"
            f" {name} --file_format=array_record --data_dir={where}` (c4 also needs"
            " Apache Beam, and days on one machine)"
        ) from error
    return builder, where


def random_access(
    builder: tfds.core.DatasetBuilder, where: str, **splits: str
) -> dict[str, Sequence[Any]]:
    """The records of some splits, each named as its keyword.

    Raises:
      DataError: if the files have an order that cannot be left.
    """
    try:
        return {
            key: builder.as_data_source(split=split) for key, split in splits.items()
        }
    except NotImplementedError as error:
        info = builder.info
        raise DataError(
            f"tfds:{info.full_name} in {where}: stored as {info.file_format.value},"
            " which cannot be read at random; prepare it with"
            " --file_format=array_record"
        ) from error


def shuffled(
    rows: grain.sources.RandomAccessDataSource[Batch], batch: int, seed: int
) -> grain.DatasetIterator[Batch]:
    """Returns endless batches of single rows; see `TextData.train`."""
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
