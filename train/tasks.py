"""Classification and regression: tables of text in, batches of labelled rows out.

Tables are small, so all of one is tokenised when it is loaded and kept in memory.
Rows are then read at random: a batch depends on nothing but (fingerprint, batch,
seed, position).
"""

import dataclasses
import functools
import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grain
import numpy as np
import scipy.stats
import sklearn.metrics
import tokenizers

from train.data import Batch, fill, shuffled
from train.packing import pack_shuffled
from train.tables import (
    Columns,
    Example,
    found_labels,
    hold_out,
    read_prepared,
    read_table,
)
from train.text import (
    DataError,
    check_fits,
    existing_file,
    open_tokenizer,
    progress_bar,
    vocabulary_size,
)

# Part of every fingerprint: raise it whenever the rows would differ.
_PREPARATION = 1
_CHUNK = 1024  # examples given to the tokenizer at once


@dataclasses.dataclass(frozen=True)
class Task:
    """How a task is distributed, and what it is judged by.

    Attributes:
      columns: What is read of its TSV; None where the user says it.
      labels: Names of the labels in the order of their numbers. Empty where the label
        is a number, or where the names are those found in the data.
      spelled: What the TSV says instead of `labels`, if it does.
      metrics: Keys of `METRICS`, the headline first.
    """

    columns: Columns | None = None
    labels: tuple[str, ...] = ()
    spelled: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("accuracy",)


_COLA = ("source", "label", "mark", "sentence")
_SENTENCES = ("sentence1", "sentence2")

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
    "rte": Task(Columns(_SENTENCES, "label"), labels=("entailment", "not_entailment")),
    "sst2": Task(
        Columns(("sentence",), "label"),
        labels=("negative", "positive"),
        spelled=("0", "1"),
    ),
    "stsb": Task(Columns(_SENTENCES, "score"), metrics=("pearson", "spearman")),
    "classification": Task(),
}


def _correlation(function: Callable) -> Callable[[np.ndarray, np.ndarray], float]:
    def score(labels: np.ndarray, predictions: np.ndarray) -> float:
        return function(labels, predictions).statistic if len(labels) > 1 else 0.0

    return score


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "matthews": sklearn.metrics.matthews_corrcoef,
    "f1": functools.partial(sklearn.metrics.f1_score, zero_division=0),
    "accuracy": sklearn.metrics.accuracy_score,
    "pearson": _correlation(scipy.stats.pearsonr),
    "spearman": _correlation(scipy.stats.spearmanr),
}


def metrics(
    task: str,
    predictions: np.ndarray | Sequence[float],
    labels: np.ndarray | Sequence[float],
) -> dict[str, float]:
    """Scores predictions as the task does, the headline first.

    Args:
      task: A key of `TASKS`.
      predictions: (n,), numbers of labels; values for a regression.
      labels: (n,), the right ones. Floats make "classification" a regression.

    Returns:
      Each metric by name, 0 where it is not defined (all predictions alike).

    Example:
      >>> metrics("mrpc", [1, 1, 1, 0], [1, 1, 0, 0])
      {'f1': 0.8, 'accuracy': 0.75}
    """
    right, given = np.asarray(labels), np.asarray(predictions)
    names = TASKS[task].metrics
    if np.issubdtype(right.dtype, np.floating):
        names = TASKS["stsb"].metrics
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they warn before they return NaN, or 0
        scores = {name: float(METRICS[name](right, given)) for name in names}
    return {name: float(np.nan_to_num(score)) for name, score in scores.items()}


@dataclasses.dataclass(frozen=True)
class TaskData:
    """Tokenised examples with a training and a held-out split; made by `load_task`.

    A batch has `tokens`, `segments` (the row's examples from 1 on; 0 is padding) and
    `types` (the tokenizer's token types), all int32 (batch, seq). Of each example it has
    in `firsts`, int32, where it begins, in `labels`, int32 or for a regression float32,
    its label, and in `weights`, float32, 1, all (batch, slots(seq, packed)); where a row
    has fewer examples, or only fills up a batch, the weight is 0.

    Attributes:
      labels: Names by number; empty for a regression.
      train_size, dev_size: Numbers of examples.
      train_rows: Number of rows that the examples for training are in.
      fingerprint: Hash of the rows. A checkpoint stores it to notice that the data
        changed under its iterator.
      description: One line for a human: where from, and how much.
    """

    labels: tuple[str, ...]
    train_size: int
    dev_size: int
    train_rows: int
    fingerprint: str
    description: str
    rows: dict[str, "_Rows"] = dataclasses.field(repr=False)

    def train(self, batch: int, seed: int) -> grain.DatasetIterator[Batch]:
        """Returns endless batches, shuffled by `seed` and anew in each epoch.

        Its `get_state()` is a small JSON-compatible dict; `set_state()` on a new
        iterator with the same arguments continues with the very next batch.
        """
        return shuffled(self.rows["train"], batch, seed)

    def dev(self, batch: int) -> Iterator[Batch]:
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


def load_task(
    name: str,
    data: str,
    tokenizer_file: str | Path,
    *,
    seq: int,
    vocab_size: int,
    positions: int | None = None,
    labels: int | None = None,
    eval_data: str | None = None,
    text: str = "text",
    text_pair: str | None = None,
    label: str = "label",
    regression: bool = False,
    data_dir: str | None = None,
    packed: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> TaskData:
    """Reads and tokenises a task.

    Args:
      name: A key of `TASKS`.
      data: For a task of GLUE a folder with its `train.tsv` and `dev.tsv`; for
        "classification" a `.csv` (cells may be quoted), `.tsv` (they are not) or
        `.jsonl` file; for both `tfds:NAME`, a TFDS dataset already prepared.
      tokenizer_file: Path of a `tokenizer.json`. What it puts around texts stays.
      seq: Tokens per row; of longer examples the longer text is cut first.
      vocab_size: Tokens that the model's embedding has.
      positions: Positions that the model has; None if it has no limit.
      labels: Outputs of the model's head, if it has one.
      eval_data: A file to hold out, in place of `dev.tsv` or a tenth of `data`.
      text, text_pair, label: Columns of "classification"; one text if no pair.
      regression: The label of "classification" is a number.
      data_dir: Where TFDS datasets lie; None is TFDS's own default.
      packed: Puts several examples into a row, where they fit.
      seed: Of the tenth that is held out if nothing else is, and of the order in which
        examples are packed.
      progress: Shows a bar while tokenising, if standard error is a terminal.

    Raises:
      DataError: if the data cannot be used, or does not fit the model.
    """
    task = TASKS[name]
    fields = (text,) if text_pair is None else (text, text_pair)
    columns = task.columns or Columns(fields, label)
    tokenizer, _ = open_tokenizer(tokenizer_file)
    check_fits(vocabulary_size(tokenizer), vocab_size, seq, positions)
    texts = len(columns.text)
    special = tokenizer.num_special_tokens_to_add(texts == 2)
    if seq < special + texts:
        raise DataError(
            f"seq {seq} leaves no room for text beside {special} special tokens"
        )
    regression = "pearson" in task.metrics or (regression and not task.columns)
    splits = _splits(task, columns, data, eval_data, data_dir)
    names = () if regression else task.labels or found_labels(splits["train"], data)
    outputs = len(names) or 1
    if labels not in (None, outputs):
        raise DataError(
            f"the model's head has {labels} outputs, but {data} needs {outputs}"
            + (f" ({', '.join(names)})" if names else "")
        )
    held = ""
    if "validation" not in splits:
        splits = hold_out(splits["train"], data, seed)
        held = f" (a tenth, by seed {seed})"
    spellings = (*enumerate(names), *enumerate(task.spelled))
    known = {spelling: index for index, spelling in spellings}
    number = _value if regression else functools.partial(_index, known)
    dtype = np.float32 if regression else np.int32
    tokenizer.enable_truncation(seq, strategy="longest_first")
    rows, truncated, most = {}, 0, slots(seq, packed)
    with progress_bar(progress) as bar:
        tokenising = bar.add_task("Tokenising", total=sum(map(len, splits.values())))
        for split, examples in splits.items():
            values = np.array([number(example) for example in examples], dtype)
            tokens, types, cut = _encode(
                tokenizer, examples, functools.partial(bar.advance, tokenising)
            )
            contents = [[example] for example in range(len(tokens))]
            if packed:
                draw, lengths = np.random.default_rng(seed), [*map(len, tokens)]
                contents = pack_shuffled(lengths, seq, draw, most)
            pad = _padding(tokenizer)
            rows[split] = _Rows(tokens, types, values, contents, seq, most, pad)
            truncated += cut
    train, dev = rows["train"], rows["validation"]
    used = sum(map(len, train.tokens)) / (seq * len(train))
    return TaskData(
        names,
        len(train.tokens),
        len(dev.tokens),
        len(train),
        _fingerprint(rows, names),
        f"{name} in {data}: {len(train.tokens):,} training and {len(dev.tokens):,}"
        f" held-out examples{held}, {', '.join(names) or 'a regression'};"
        f" {truncated:,} truncated to {seq} tokens; rows {used:.0%} full",
        rows,
    )


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
            columns = Columns(_SENTENCES if pair else ("sentence",), "label")
        return read_prepared(data.removeprefix("tfds:"), columns, data_dir)
    files = {"train": data, "validation": eval_data}
    if task.columns:
        folder = Path(data).expanduser()
        files["train"] = str(folder / "train.tsv")
        files["validation"] = eval_data or str(folder / "dev.tsv")
    return {
        split: read_table(existing_file(file), columns)
        for split, file in files.items()
        if file
    }


def _index(known: dict[str, int], example: Example) -> int:
    if example.label not in known:
        raise DataError(
            f"{example.place}: label {example.label!r} is none of {', '.join(known)}"
        )
    return known[example.label]


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
        for encoding in tokenizer.encode_batch(part):
            tokens.append(np.array(encoding.ids, np.int32))
            types.append(np.array(encoding.type_ids, np.int32))
            truncated += bool(encoding.overflowing)
        advance(len(part))
    return tokens, types, truncated


def _padding(tokenizer: tokenizers.Tokenizer) -> int:
    """Any token will do where nothing is read, but some models know their own."""
    found = map(tokenizer.token_to_id, ("[PAD]", "<pad>"))
    return next((token for token in found if token is not None), 0)


def _fingerprint(rows: dict[str, _Rows], names: tuple[str, ...]) -> str:
    settings = [
        (split, part.seq, part.slots, part.padding) for split, part in rows.items()
    ]
    content = hashlib.sha256(repr((_PREPARATION, names, settings)).encode())
    for part in rows.values():
        content.update(repr(part.contents).encode())
        content.update(np.array([len(tokens) for tokens in part.tokens]).tobytes())
        for values in (*part.tokens, *part.types, part.labels):
            content.update(values.tobytes())
    return content.hexdigest()[:16]
