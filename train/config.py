"""The options of every command; each field is a flag."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oasis_jax.models import llama


class UserError(Exception):
    """Something that the user can mend; the message is one clear sentence."""


@dataclass(frozen=True)
class Pretrain:
    """Train a LLaMA on text."""

    method: str = "oasis"
    """A row of the table of methods, such as oasis or adamw."""
    preset: str = "llama-tiny"
    """Shape of the model."""
    data: str | None = None
    """A .txt or .jsonl file, a directory of text, or tfds:NAME; without it, the Python
    standard library's own source."""
    tokenizer: Path | None = None
    """A tokenizer.json; without it, bytes."""
    steps: int = 600
    """Optimizer steps."""
    batch: int = 16
    """Sequences per step."""
    seq: int = 128
    """Tokens per sequence."""
    rank: str = "0.25"
    """A fraction of each layer's input features (0.25) or a number of columns (64)."""
    pattern: str = llama.PROJECTED
    """Regular expression; the kernels whose path it matches are projected."""
    stride: int = 1
    """The tracker looks at every stride-th token."""
    lr: float = 3e-3
    """Peak learning rate."""
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises; then it falls, as a cosine,
    to a tenth."""
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.0
    clip: float = 1.0
    """Global gradient norm at most; of projected gradients in their coordinates."""
    accumulate: int = 1
    """Microbatches per step."""
    remat: str = "elementwise"
    """What the backward pass recomputes: none, elementwise or block."""
    dtype: str = "float32"
    """Of the computation: float32 or bfloat16."""
    seed: int = 0
    """Of the initial weights, the order of the data and the bases."""
    out: Path = Path("runs/pretrain")
    """Where results and checkpoints go."""
    resume: bool = False
    """Continue the run in --out."""
    eval_every: int = 100
    """Steps between evaluations."""
    eval_batches: int = 64
    """Held-out batches per evaluation, at most."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    max_skips: int = 10
    """Stop after this many updates in a row were skipped because gradients were not
    finite."""
    tensorboard: bool = False
    """Also write TensorBoard event files."""
    cache: Path = Path("data")
    """Where prepared tokens are kept."""
    data_dir: str | None = None
    """Where TFDS datasets lie, for tfds:NAME."""

    def __post_init__(self):
        for name in (
            "steps",
            "batch",
            "seq",
            "accumulate",
            "eval_every",
            "eval_batches",
        ):
            _at_least(self, name, 1)
        for name in ("checkpoint_every", "log_every", "max_skips", "stride"):
            _at_least(self, name, 1)
        _at_least(self, "seed", 0)
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UserError(f"--lr is {self.lr}, expected a positive number")
        if not 0 <= self.warmup <= 1:
            raise UserError(f"--warmup is {self.warmup}, expected a share in [0, 1]")
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"--dtype is {self.dtype!r}, expected float32 or bfloat16")
        if self.batch % self.accumulate:
            raise UserError(
                f"--batch {self.batch} does not divide into --accumulate"
                f" {self.accumulate} microbatches"
            )
        parse_rank(self.rank)

    # Fields that may differ between a run and its continuation: where things lie and
    # how often to look, nothing that a number depends on.
    _FREE = frozenset(
        "out resume cache data_dir tensorboard log_every eval_every eval_batches"
        " checkpoint_every max_skips".split()
    )

    def as_dict(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return {
            name: str(value) if isinstance(value, Path) else value
            for name, value in dataclasses.asdict(self).items()
        }

    def check_continues(self, saved: dict[str, Any]) -> None:
        """Refuses to continue another run.

        Raises:
          UserError: naming the options that differ, with both values.
        """
        mine = self.as_dict()
        changed = [
            f"--{name} was {saved[name]} and is {mine[name]}"
            for name in mine
            if name not in self._FREE and name in saved and saved[name] != mine[name]
        ]
        if changed:
            raise UserError(
                f"cannot resume {self.out}: {'; '.join(changed)};"
                " repeat the options of that run, or choose another --out"
            )


def parse_rank(text: str) -> float | int:
    """0.25 is a fraction, 64 a number of columns.

    Raises:
      UserError: if it is neither.
    """
    try:
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise UserError(
            f"--rank is {text!r}, expected a fraction such as 0.25 or a whole number"
        ) from None


@dataclass(frozen=True)
class Compare(Pretrain):
    """Train with several methods on equal terms, and tabulate.

    Every option of `pretrain` holds for all methods; --method, --lr, --seed and --resume
    are set by the comparison. Finished trials in --out are kept, not run again.
    """

    methods: str = "adamw,oasis"
    """Names separated by commas; name:rank overrides --rank, as in oasis:0.5."""
    lrs: str = "1e-3,3e-3,1e-2"
    """Peak learning rates, separated by commas; each method keeps its best."""
    seeds: str = "0"
    """Seeds, separated by commas. Learning rates are swept with the first; the others
    repeat each method's best."""
    out: Path = Path("runs/compare")
    jobs: int = 1
    """Trials at a time. With more than one, each has an equal share of the cores, and
    times are not comparable with those of other machines or settings."""


def _at_least(config: Any, name: str, least: int) -> None:
    if getattr(config, name) < least:
        raise UserError(
            f"--{name.replace('_', '-')} is {getattr(config, name)}, expected at least"
            f" {least}"
        )
