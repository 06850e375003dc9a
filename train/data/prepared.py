"""Local text, tokenised once into a small TFDS dataset and then read at random."""

import contextlib
import dataclasses
import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds

from train.data.batches import Batch, Order, TextData, counted, normal
from train.data.coder import Coder
from train.errors import DataError
from train.files import scratch
from train.report.progress import progress_bar

# Part of every fingerprint: raise it whenever the prepared tokens would differ.
_PREPARATION = 2
BLOCK = 4096  # tokens per record

Read = Callable[[], Iterator[str]]
"""Reads all documents, from the start each time."""
_Blocks = dict[str, Iterable[np.ndarray]]  # split to blocks of tokens


class _Info(tfds.core.DatasetInfo):
    """One of a dataset that is made here."""

    def initialize_from_bucket(self) -> None:
        """TFDS would look for it elsewhere, and leave a temporary folder behind."""


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
        return _Info(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {key: self._generate_examples(val) for key, val in self._splits.items()}

    def _generate_examples(self, blocks: Iterable[np.ndarray]) -> Iterator[Any]:
        return ((index, {"tokens": block}) for index, block in enumerate(blocks))


def prepare(
    name: str,
    read: Read,
    coder: Coder,
    cache: Path,
    progress: bool,
    seq: int,
    held_batches: int | None,
    note: str = "",
) -> TextData:
    """Tokenises what `read` yields, unless the cache has it, and opens it.

    Args:
      note: What else is to be said of the files, for the description.

    Raises:
      DataError: if there is no text, or a split is too short for one row.
    """
    groups: _Groups = {}
    content = hashlib.sha256(repr((_PREPARATION, BLOCK, coder.identity)).encode())
    documents = 0
    for text in read():
        digest = _digest(text)
        content.update(digest)
        group = groups.setdefault(_digest(normal(text)), _Group(digest))
        group.size += len(text)
        documents += 1
    if not documents:
        raise DataError(f"data {name!r} is empty: there is no text in it{note}")
    if 1 == len(groups) < documents:
        raise DataError(
            f"data {name!r}: nothing can be held out, its {documents:,} documents are"
            " all equal"
        )
    held, copies = _held(groups), documents - len(groups)
    fingerprint = content.hexdigest()[:16]
    target = cache / fingerprint
    if not target.exists():
        total = sum(group.size for group in groups.values())
        with progress_bar(total, "Preparing tokens", shown=progress) as bar:
            _write(target, _splits(read, coder, held, bar.advance), coder.dtype)
    # Also open to others: tfds.data_source("packed_text:1.0.0", data_dir=target).
    folder = target / PackedText.name / str(PackedText.VERSION)
    blocks = tfds.builder_from_directory(folder).as_data_source()
    count = {
        split: (len(records) - 1) * BLOCK + len(records[len(records) - 1]["tokens"])
        for split, records in blocks.items()
    }
    description = (
        f"{name}: {counted(documents, 'document')},"
        f" {count['train']:,} training and {count['validation']:,} held-out tokens"
    )
    if copies:
        kept = "kept on one side" if held else "read once"
        description += f"; {counted(copies, 'duplicate document')}, {kept}"
    if min(count.values()) <= seq:
        raise DataError(
            f"seq {seq} needs at least {seq + 1} training and {seq + 1} held-out"
            f" tokens, but there is only {description}; shorten seq or add text"
        )
    return _Prepared(
        coder.vocab_size,
        seq,
        held_batches,
        fingerprint,
        description + note,
        blocks=blocks,
        count=count,
        separator=coder.separator,
    )


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


@dataclasses.dataclass
class _Group:
    """Documents that are equal but for white space."""

    first: bytes  # the digest of the first of them
    size: int = 0  # characters of them all


_Groups = dict[bytes, _Group]  # by the digest of what is equal


def _held(groups: _Groups) -> set[bytes]:
    """About a twentieth of the text, chosen by a hash of it.

    So equal documents stay on one side, and the order of files does not matter. Empty if
    not one is small enough.
    """
    held: set[bytes] = set()
    taken, total = 0, sum(group.size for group in groups.values())
    for digest, group in sorted(groups.items(), key=lambda item: item[1].first):
        if taken < total / 20 and taken + group.size <= total / 10:
            held.add(digest)
            taken += group.size
    return held


def _splits(
    read: Read, coder: Coder, held: set[bytes], advance: Callable[[int], object]
) -> _Blocks:
    """Returns the blocks of both splits.

    Whole documents where possible. If not one is small enough (a single book, a few of
    them), the tail of the stream instead, of which there must be no copy: then
    documents that are equal are read once.
    """

    def stream(keep: Callable[[bytes], bool]) -> Iterator[np.ndarray]:
        for text in read():
            if keep(_digest(normal(text))):
                yield from coder.document(text, advance)

    if held:
        return {
            "train": _blocks(stream(lambda digest: digest not in held)),
            "validation": _blocks(stream(lambda digest: digest in held)),
        }
    seen: set[bytes] = set()

    def is_new(digest: bytes) -> bool:
        new = digest not in seen
        seen.add(digest)
        return new

    tokens = np.concatenate([*stream(is_new)])
    cut = len(tokens) - max(1, len(tokens) // 10)
    return {"train": _blocks([tokens[:cut]]), "validation": _blocks([tokens[cut:]])}


def _blocks(stream: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Cuts a stream into blocks of BLOCK tokens and a shorter, maybe empty, one."""
    rest: list[np.ndarray] = []
    size = 0
    for tokens in stream:
        rest.append(tokens)
        size += len(tokens)
        if size >= BLOCK:
            joined = np.concatenate(rest)
            size %= BLOCK
            yield from joined[: len(joined) - size].reshape(-1, BLOCK)
            rest = [joined[len(joined) - size :]]
    yield np.concatenate(rest)


def _write(target: Path, splits: _Blocks, dtype: np.dtype) -> None:
    """Prepares beside the target and renames, so that a kill leaves no half."""
    tfds.disable_progress_bar()  # TFDS draws its own even without a terminal
    with scratch(target.parent, ".prepare-") as folder:
        data = folder / "data"
        builder = PackedText(splits, dtype, data_dir=data, file_format="array_record")
        with contextlib.redirect_stdout(io.StringIO()):  # "Downloading ..."
            builder.download_and_prepare(
                download_dir=folder / "downloads",
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
        first, start = divmod(index * self.seq, BLOCK)
        stop = start + self.seq + 1
        needed = range(first, first + -(-stop // BLOCK))
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

    def rows(self, split: str, order: Order) -> grain.IterDataset[Batch]:
        stream = self.blocks[split], self.count[split]
        windows = _Windows(*stream, self.seq, self.separator)
        return order(grain.MapDataset.source(windows)).to_iter_dataset()
