"""Classification and regression: tables of text in, batches of labelled rows out.

Tables are small, so all of one is tokenised when it is loaded and kept in memory.
Rows are then read at random: a batch depends on nothing but (fingerprint, batch,
seed, position).
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import grain
import numpy as np
import tokenizers

from train.data.batches import Batch, fill, shared, shuffled
from train.data.numbering import number_labels, some
from train.data.packing import pack_shuffled
from train.data.spelling import Spelling
from train.data.tables import (
    TABLES,
    Example,
    content,
    hold_out,
    read_prepared,
    read_table,
)
from train.data.tasks import SENTENCES, TASKS, Columns, Task
from train.data.text import row_files
from train.data.tokenizer import Limits, open_tokenizer
from train.errors import DataError
from train.report.progress import progress_bar

# Part of every fingerprint: raise it whenever the rows would differ.
_PREPARATION = 2
_CHUNK = 1024  # examples given to the tokenizer at once


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Tokenised examples with a training and a held-out split; made by `load_labelled`.

    A batch has `tokens`, `segments` (the row's examples from 1 on; 0 is padding) and
    `types` (the tokenizer's token types), all int32 (batch, seq). Of each example it has
    in `firsts`, int32, where it begins, in `labels`, int32 or for a regression float32,
    its label, and in `weights`, float32, 1, all (batch, slots(seq, packed)); where a row
    has fewer examples, or only fills up a batch, the weight is 0.

    Attributes:
      labels: Names by number; empty for a regression.
      order: The task's own number of each, which `metrics` go by.
      metrics: What predictions are judged by; see `Task`.
      train_size, validation_size: Numbers of examples.
      train_rows: Number of rows that the examples for training are in.
      fingerprint, description: As of every `Dataset`.
    """

    labels: tuple[str, ...]
    order: tuple[int, ...]
    metrics: tuple[str, ...]
    train_size: int
    validation_size: int
    train_rows: int
    fingerprint: str
    description: str
    rows: dict[str, "_Rows"] = dataclasses.field(repr=False)
    ends: ClassVar[tuple[int, ...]] = ()  # nothing is generated

    def train(self, batch: int, seed: int) -> grain.DatasetIterator[Batch]:
        """Returns endless batches, shuffled by `seed` and anew in each epoch."""
        return shuffled(self.rows["train"], batch, seed)

    def validation(self, batch: int) -> Iterator[Batch]:
        """Returns the held-out split once, rows with little text first.

        Where a whole batch has little, its rows are cut to a half or a quarter of seq:
        at most three shapes for much less work.
        """
        rows = self.rows["validation"]
        used = [rows.used(index) for index in range(len(rows))]
        order = np.argsort(used, kind="stable")
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            widths = (rows.seq // 4, rows.seq // 2, rows.seq)
            width = next(width for width in widths if width >= used[chosen[-1]])
            parts = [rows.row(index, width) for index in chosen]
            joined = {key: np.stack([part[key] for part in parts]) for key in parts[0]}
            yield fill(joined, batch)


def slots(seq: int, packed: bool) -> int:
    """The most examples of a row: of packed ones, few tasks have some under 8 tokens."""
    return max(1, seq // 8) if packed else 1


def load_labelled(
    name: str,
    data: str,
    tokenizer_file: str | Path,
    limits: Limits,
    *,
    columns: Columns | None = None,
    regression: bool = False,
    labels: int | None = None,
    label_names: Sequence[str] = (),
    eval_data: str | None = None,
    data_dir: str | None = None,
    packed: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Labelled:
    """Reads and tokenises a task whose examples have labels.

    Args:
      name: A key of `TASKS`.
      data: For a task of GLUE a folder with its `train.tsv` and `dev.tsv`; for
        "classification" a file with an ending of `tables.TABLES`, compressed or not, a
        directory or a pattern of such; for both `tfds:NAME`, a TFDS dataset already
        prepared.
      tokenizer_file: Path of a `tokenizer.json`. What it puts around texts stays.
      limits: Of longer examples the longer text is cut first.
      columns: Of "classification": what is read; else as the task is distributed.
      regression: The label of "classification" is a number.
      labels: Outputs of the model's head, if it has one.
      label_names: The names that the model has for its labels; see `number_labels`.
      eval_data: A file to hold out, in place of `dev.tsv` or a tenth of `data`.
      data_dir: Where TFDS datasets lie; None is TFDS's own default.
      packed: Puts several examples into a row, where they fit.
      seed: Of the tenth that is held out if nothing else is, and of the order in which
        examples are packed.
      progress: Shows a bar while tokenising, if standard error is a terminal.

    Raises:
      DataError: if the data cannot be used, or does not fit the model.
    """
    task = TASKS[name]
    if regression and not task.columns:
        task = task.as_regression()
    read = task.columns or columns or Columns(("text",), "label")
    tokenizer, _ = open_tokenizer(tokenizer_file)
    limits.check(tokenizer)
    seq, texts = limits.seq, len(read.text)
    special = tokenizer.num_special_tokens_to_add(texts == 2)
    if seq < special + texts:
        raise DataError(
            f"seq {seq} leaves no room for text beside {special} special tokens"
        )
    splits = _splits(task, read, data, eval_data, data_dir)
    names, order, number = _numbers(task, splits, data, labels, label_names)
    held = ""
    if "validation" in splits:
        note = shared(splits["train"], splits["validation"], content)
    else:
        splits, note = hold_out(splits["train"], data, seed)
        held = f" (a tenth, by seed {seed})"
    dtype = np.float32 if task.regression else np.int32
    encoder = Spelling.of(tokenizer).plain
    encoder.enable_truncation(seq, strategy="longest_first")
    rows, truncated, most = {}, 0, slots(seq, packed)
    total = sum(map(len, splits.values()))
    with progress_bar(total, "Tokenising", shown=progress) as bar:
        for split, examples in splits.items():
            values = np.array([number(example) for example in examples], dtype)
            tokens, types, cut = _encode(encoder, examples, bar.advance)
            contents = [[example] for example in range(len(tokens))]
            if packed:
                draw, lengths = np.random.default_rng(seed), [*map(len, tokens)]
                contents = pack_shuffled(lengths, seq, draw, most)
            pad = _padding(tokenizer)
            rows[split] = _Rows(tokens, types, values, contents, seq, most, pad)
            truncated += cut
    train, held_out = rows["train"], rows["validation"]
    used = sum(map(len, train.tokens)) / (seq * len(train))
    return Labelled(
        names,
        order,
        task.metrics,
        len(train.tokens),
        len(held_out.tokens),
        len(train),
        _fingerprint(rows, names),
        f"{name} in {data}: {len(train.tokens):,} training and {len(held_out.tokens):,}"
        f" held-out examples{held}, {some(names) or 'a regression'};"
        f" {truncated:,} truncated to {seq} tokens; rows {used:.0%} full{note}",
        rows,
    )


def _numbers(
    task: Task,
    splits: dict[str, list[Example]],
    data: str,
    outputs: int | None,
    own: Sequence[str],
) -> tuple[tuple[str, ...], tuple[int, ...], Callable[[Example], float]]:
    """Names and order of the labels, none of a regression, and the label of an example."""
    if not task.regression:
        found = number_labels(task, splits, data, outputs=outputs, own=own)
        return found.names, found.order, found.of
    if outputs not in (None, 1):
        raise DataError(f"the model's head has {outputs} outputs, but {data} needs 1")
    return (), (), _value


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Examples of any length, read as rows of `seq` tokens with one or several."""

    tokens: list[np.ndarray]
    types: list[np.ndarray]
    labels: np.ndarray
    contents: list[list[int]]  # the examples of each row
    seq: int
    slots: int
    padding: int

    def __len__(self) -> int:
        return len(self.contents)

    def __getitem__(self, index: int) -> Batch:
        return self.row(index, self.seq)

    def used(self, index: int) -> int:
        """Tokens of text in a row."""
        return sum(len(self.tokens[example]) for example in self.contents[index])

    def row(self, index: int, width: int) -> Batch:
        tokens = np.full(width, self.padding, np.int32)
        segments, types = np.zeros((2, width), np.int32)
        firsts = np.zeros(self.slots, np.int32)
        labels = np.zeros(self.slots, self.labels.dtype)
        weights = np.zeros(self.slots, np.float32)
        start = 0
        for slot, example in enumerate(self.contents[index]):
            stop = start + len(self.tokens[example])
            tokens[start:stop] = self.tokens[example]
            segments[start:stop] = slot + 1
            types[start:stop] = self.types[example]
            firsts[slot], labels[slot], weights[slot] = start, self.labels[example], 1
            start = stop
        return {
            "tokens": tokens,
            "segments": segments,
            "types": types,
            "firsts": firsts,
            "labels": labels,
            "weights": weights,
        }


def _splits(
    task: Task,
    columns: Columns,
    data: str,
    eval_data: str | None,
    data_dir: str | None,
) -> dict[str, list[Example]]:
    """Reads the split `train`, and `validation` if something says what to hold out."""
    if data.startswith("tfds:"):
        if eval_data:
            raise DataError(f"{data} cannot be combined with the file {eval_data}")
        if task.columns:  # TFDS has names of its own for the columns of GLUE
            pair = len(columns.text) == 2
            columns = Columns(SENTENCES if pair else ("sentence",), "label")
        return read_prepared(data.removeprefix("tfds:"), columns, data_dir)
    files = {"train": data, "validation": eval_data}
    if task.columns:
        folder = Path(data).expanduser()
        files["train"] = str(folder / "train.tsv")
        files["validation"] = eval_data or str(folder / "dev.tsv")
    return {
        split: [
            example
            for part in row_files(file, TABLES)
            for example in read_table(part, columns)
        ]
        for split, file in files.items()
        if file
    }


def _value(example: Example) -> float:
    try:
        value = float(example.label)
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise DataError(f"{example.place}: label {example.label!r} is no number")
    return value


def _encode(
    tokenizer: tokenizers.Tokenizer,
    examples: list[Example],
    advance: Callable[[int], object],
) -> tuple[list[np.ndarray], list[np.ndarray], int]:
    """Tokens and types of all examples, and how many did not fit."""
    tokens, types, truncated = [], [], 0
    for start in range(0, len(examples), _CHUNK):
        part = [example.text for example in examples[start : start + _CHUNK]]
        for encoding in _encoded(tokenizer, part):
            tokens.append(np.array(encoding.ids, np.int32))
            types.append(np.array(encoding.type_ids, np.int32))
            truncated += bool(encoding.overflowing)
        advance(len(part))
    return tokens, types, truncated


def _encoded(
    tokenizer: tokenizers.Tokenizer, part: list[Any]
) -> list[tokenizers.Encoding]:
    try:
        return tokenizer.encode_batch(part)
    except Exception as error:  # all that the library raises
        raise DataError(
            f"the tokenizer fails at a text of the data: {error}"
        ) from error


def _padding(tokenizer: tokenizers.Tokenizer) -> int:
    """Any token will do where nothing is read, but some models know their own."""
    found = map(tokenizer.token_to_id, ("[PAD]", "<pad>"))
    return next((token for token in found if token is not None), 0)


def _fingerprint(rows: dict[str, _Rows], names: tuple[str, ...]) -> str:
    settings = [
        (split, part.seq, part.slots, part.padding) for split, part in rows.items()
    ]
    digest = hashlib.sha256(repr((_PREPARATION, names, settings)).encode())
    for part in rows.values():
        digest.update(repr(part.contents).encode())
        digest.update(np.array([len(tokens) for tokens in part.tokens]).tobytes())
        for values in (*part.tokens, *part.types, part.labels):
            digest.update(values.tobytes())
    return digest.hexdigest()[:16]
