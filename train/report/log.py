"""Records of a run, written as they come: JSON lines, and TensorBoard's events.

A training record is

    {"step", "loss", "learning_rate", "tokens_per_s", "gradient_norm", "skipped",
     "captured_energy": {path: [one number per layer] or number}, "motion": likewise}

and an evaluation record is {"step", "val_loss", "val_tokens" or "val_examples"} and the
task's metrics.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from train.files import naming, replacing

Record = Mapping[str, Any]


def console() -> Console:
    """Where progress is told: standard error, one line a line, whatever its width."""
    return Console(stderr=True, soft_wrap=True, highlight=False, markup=False)


class MetricsLog:
    """Appends records to a JSON-lines file and, if asked, to TensorBoard.

    Attributes:
      records: All of the file's records, oldest first, as a reader would find them.

    Example:
      >>> with MetricsLog(Path(tempfile.mkdtemp()) / "metrics.jsonl") as log:
      ...     log({"step": 201, "loss": 3.5, "captured_energy": {"mlp/down": [0.9]}})
      ...     log.records[0]["loss"]
      3.5

    Args:
      path: The file; its folder is created if absent.
      resumed_step: Records of later steps are removed first, for they will be written
        again. None keeps all. A line that a kill cut short is removed in either case.
      tensorboard: Folder for TensorBoard's events. Nested records become scalars named
        'captured_energy/mlp/down/0'.

    Raises:
      ImportError: if `tensorboard` is given and tensorboardX is not installed.
    """

    def __init__(
        self,
        path: Path,
        *,
        resumed_step: int | None = None,
        tensorboard: Path | None = None,
    ):
        self.path = Path(path)
        self._writer = None
        if tensorboard is not None:
            self._writer = _summary_writer(tensorboard, resumed_step)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.records: list[dict[str, Any]] = []
        if self.path.exists():
            last = math.inf if resumed_step is None else resumed_step
            before = read_metrics(self.path)
            self.records = [record for record in before if record["step"] <= last]
            _replace(self.path, "".join(map(_line, self.records)))
        self._file = self.path.open("a")

    def __call__(self, record: Record) -> None:
        """Writes one record; numpy and JAX numbers are welcome."""
        line = _line(record)
        self.records.append(json.loads(line))
        with naming(self.path):
            self._file.write(line)
            # Whoever watches the file, or reads it after a kill, sees every finished step.
            self._file.flush()
        if self._writer is not None:
            for name, value in scalars(record):
                self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a record that was told of already
            self._file.close()
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, without a last line that was cut short.

    Raises:
      json.JSONDecodeError: if any other line is not JSON.
    """
    *lines, tail = Path(path).read_text().split("\n")
    del tail  # empty unless the writer was killed in the middle of a line
    return [json.loads(line) for line in lines]


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """The numbers of a record but for its step, under slash-separated names.

    >>> dict(scalars({"step": 1, "motion": {"mlp/down": [0.5, 0.25]}}))
    {'motion/mlp/down/0': 0.5, 'motion/mlp/down/1': 0.25}
    """

    def walk(name: str, value: Any) -> Iterator[tuple[str, float]]:
        if isinstance(value, Mapping):
            items = [(str(key), item) for key, item in value.items()]
        elif np.ndim(value):
            items = [(str(index), item) for index, item in enumerate(value)]
        else:
            yield name, float(value)
            return
        for key, item in items:
            yield from walk(f"{name}/{key}", item)

    for key, value in record.items():
        if key != "step":
            yield from walk(key, value)


def write_json(path: Path, value: Any) -> None:
    """Writes strict JSON; a reader sees the old file or the new one, never a part.

    A number that is not finite is written as null, and if `value` is a dict, its
    `not_finite` lists where.
    """
    text = json.dumps(_strict(value), indent=2, allow_nan=False)
    _replace(Path(path), text + "\n")


def read_json(path: Path) -> Any:
    """What `write_json` wrote."""
    return json.loads(Path(path).read_text())


def _summary_writer(directory: Path, resumed_step: int | None):
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "logging to TensorBoard needs tensorboardX: "
            "pip install 'oasis_jax[tensorboard]'"
        ) from error
    purge = None if resumed_step is None else resumed_step + 1
    return SummaryWriter(str(directory), purge_step=purge)


def _line(record: Record) -> str:
    return json.dumps(_strict(record), allow_nan=False) + "\n"


def _strict(value: Any) -> Any:
    """As JSON has it: null where a number is not finite, and a list of such places."""
    absent: list[str] = []

    def walk(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: walk(f"{name}/{k}" if name else k, v) for k, v in value.items()}
        if isinstance(value, list):
            return [walk(f"{name}/{i}", item) for i, item in enumerate(value)]
        if isinstance(value, float) and not math.isfinite(value):
            absent.append(name)
            return None
        return value

    written = walk("", json.loads(json.dumps(value, default=_plain)))
    if absent and isinstance(written, dict):
        written["not_finite"] = absent
    return written


def _plain(value: Any) -> Any:
    return np.asarray(value).tolist()


def _replace(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)
