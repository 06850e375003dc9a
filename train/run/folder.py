"""A run's folder: its files, whose it is, what was best in it."""

import datetime
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oasis_jax.checkpoints import Checkpoints
from oasis_jax.state import OasisTrainState
from train.errors import UserError
from train.files import LOCK, owned
from train.options import Training
from train.report.log import read_json

BESIDE = (
    *("data_fingerprint", "vocab_size", "labels", "outputs"),
    *("stop_tokens", "begun", "losses"),
)
"""What is saved with a run's options and is none."""


@dataclass(frozen=True)
class RunFolder:
    """The names of a run's files."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """The checkpoint with the best evaluation, if a run keeps that."""
        return self.path / "best"

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def answers(self) -> Path:
        """What a decoder said at the last evaluation, if it was asked."""
        return self.path / "answers.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    def to_export(self) -> Path:
        """Where its checkpoints lie: the best one's, else all, else the folder itself.

        Raises:
          UserError: if there is none.
        """
        for folder in (self.best, self.checkpoints):
            if folder.is_dir():
                return folder
        if not self.path.is_dir():
            raise UserError(f"--checkpoint {self.path}: there is no such folder")
        # Orbax would create what it does not find.
        if not any(path.name.isdigit() for path in self.path.iterdir()):
            raise UserError(f"--checkpoint {self.path}: there is no checkpoint in it")
        return self.path


@contextmanager
def claim(config: Training) -> Iterator[RunFolder]:
    """The folder of a run, which is this process's alone until it is left.

    Raises:
      UserError: if it is another run's, or there is none to resume.
    """
    folder, out = RunFolder(config.out), config.out
    taken = UserError(
        f"--out {out} already holds something; continue it with --resume, or"
        " choose another --out"
    )
    if out.is_file():
        raise taken
    with owned(out, f"--out {out}"):
        if not config.resume and holds_something(out):
            raise taken
        if config.resume and not folder.checkpoints.is_dir():
            raise UserError(f"--resume: there is no run in --out {out}")
        yield folder


def holds_something(out: Path) -> bool:
    """Whether there is more in a folder than what says whose it is."""
    return any(path.name != LOCK for path in out.iterdir())


def first_begun(config: Training) -> datetime.datetime:
    """When the run was begun, or now.

    A template may write the date into prompts, which shall stay as they are.
    """
    file = RunFolder(config.out).config
    if config.resume and file.exists():
        begun = read_json(file).get("begun")
        if begun is not None:
            return datetime.datetime.fromisoformat(begun)
    return datetime.datetime.now()


def resume(
    config: Training,
    checkpoints: Checkpoints,
    state: OasisTrainState,
    batches: Any,
    about: Mapping[str, Any],
) -> tuple[int, OasisTrainState]:
    """The newest checkpoint's step and state; `batches` are where they were.

    A run that has done all its steps may be given more.

    Raises:
      UserError: if the options or the data are not those of the run, or one of its
        options is not known here.
      CheckpointError: if there is none that can be read.
    """
    saved = checkpoints.config()
    type(config).of(options_of(saved))  # an option that is gone cannot be repeated
    config.check_continues(saved, max(checkpoints.steps()))
    fingerprint = about["data_fingerprint"]
    if saved["data_fingerprint"] != fingerprint:
        raise UserError(
            f"cannot resume {config.out}: the text or its tokenizer changed since"
            f" (fingerprint {saved['data_fingerprint']}, now {fingerprint})"
        )
    done, state = checkpoints.restore(state, data=batches)
    config.check_continues(saved, done)  # the newest may be one that cannot be read
    return done, state


def options_of(saved: Mapping[str, Any]) -> dict[str, Any]:
    """What was saved with a run, without what is no option."""
    return {name: value for name, value in saved.items() if name not in BESIDE}


def merit(record: Mapping[str, Any]) -> float:
    """What the best evaluation has most of: the score, or the least loss."""
    loss = record["val_loss"]
    if loss is None or not math.isfinite(loss):
        return -math.inf
    return record.get("score", -loss)


def best(records: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The first of the best evaluations, if there was any."""
    evaluations = (record for record in records if "val_loss" in record)
    return max(evaluations, key=merit, default=None)
