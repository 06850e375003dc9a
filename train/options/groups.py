"""The groups that commands' options are made of; each has a title in `--help`."""

import re
from dataclasses import dataclass
from pathlib import Path

from oasis_jax.bounds import (
    DECAY,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    Bound,
    at_least,
    one_of,
)
from oasis_jax.residuals import WIDTHS
from train.errors import UserError
from train.options.fields import Options, Role, option
from train.options.method import MethodOptions

SEED = Bound(lambda v: 0 <= v < 2**64, lambda: "at least 0 and below 2**64")
EMBEDDINGS = ("adamw", "adafactor", "frozen")
ON_DIVERGENCE = ("stop", "rollback")
DTYPES = ("float32", "bfloat16")


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
class Trial(Options):
    """What a comparison varies."""

    method: str = option(
        "oasis", "A row of the table of methods, such as oasis or adamw.", Role.STEP
    )
    lr: float = option(3e-3, "Peak learning rate.", Role.RUN, POSITIVE)
    seed: int = option(
        0,
        "Of the initial weights, the order of the data and the bases.",
        Role.RUN,
        SEED,
    )


@dataclass(frozen=True)
class Projected(MethodOptions):
    """What the method works on."""

    rank: str | None = option(
        None,
        "A fraction of each layer's input features (0.25) or a number of columns (64);"
        " the method's own by default.",
        Role.STEP,
    )
    pattern: str | None = option(
        None,
        "Regular expression; the kernels whose path it matches are projected, or"
        " adapted. The method's own by default.",
        Role.STEP,
    )
    stride: int = option(
        1, "The tracker looks at every stride-th token.", Role.STEP, at_least(1)
    )

    def __post_init__(self):
        super().__post_init__()
        if self.rank is not None:
            parse_rank(self.rank)

    def parsed_rank(self) -> float | int | None:
        """As a number; None if it is not given."""
        return None if self.rank is None else parse_rank(self.rank)


@dataclass(frozen=True)
class Step(Options):
    """The size of a train step, and how it is computed."""

    batch: int = option(16, "Sequences per step.", Role.STEP, at_least(1))
    seq: int = option(128, "Tokens per sequence.", Role.STEP, at_least(1))
    accumulate: int = option(1, "Microbatches per step.", Role.STEP, at_least(1))
    remat: str = option(
        "elementwise",
        "What the backward pass recomputes: none, elementwise, mlp or block.",
        Role.STEP,
    )
    residuals: str = option(
        "whole",
        "How what is kept for it is kept: whole, or fp8 or int8 with a scale per token.",
        Role.STEP,
        one_of(WIDTHS),
    )
    loss_chunk: int = option(
        2048, "Tokens whose logits exist at once.", Role.STEP, at_least(1)
    )
    embeddings: str = option(
        "adamw",
        "How what has a row per token of the vocabulary (the embedding, the output head)"
        " is trained: adamw, as the method trains what it does not project; adafactor, in"
        " little memory; or frozen.",
        Role.STEP,
        one_of(EMBEDDINGS),
    )
    dtype: str = option("float32", "Of the computation.", Role.STEP, one_of(DTYPES))
    param_dtype: str = option(
        "float32",
        "Of the weights; the optimizer's moments are float32.",
        Role.STEP,
        one_of(DTYPES),
    )

    def __post_init__(self):
        super().__post_init__()
        if self.batch % self.accumulate:
            raise UserError(
                f"--batch {self.batch} does not divide into --accumulate"
                f" {self.accumulate} microbatches"
            )


@dataclass(frozen=True)
class Schedule(Options):
    """How long, and with which optimizer."""

    steps: int = option(600, "Optimizer steps.", Role.RUN, at_least(1))
    warmup: float = option(
        0.1,
        "Share of the steps over which the learning rate rises. Then it falls: as a"
        " cosine to a tenth or, in fine-tuning, as a line to zero.",
        Role.RUN,
        SHARE,
    )
    b1: float = option(0.9, "Decay of Adam's first moment.", Role.RUN, DECAY)
    b2: float = option(0.99, "Decay of Adam's second moment.", Role.RUN, DECAY)
    weight_decay: float = option(
        0.0,
        "Decoupled, as AdamW's, of the parameters that --decay matches.",
        Role.RUN,
        NOT_NEGATIVE,
    )
    decay: str = option(
        r"(^|/)kernel(/|$)",
        "Regular expression; the parameters whose path it matches decay, whatever the"
        " method: by default kernels (LoRA's adapters of them), so that norms, biases and"
        " embeddings do not. Runs from before there was this option decayed all: '.'.",
        Role.RUN,
    )
    clip: float = option(
        1.0,
        "Global gradient norm at most; of projected gradients in their coordinates.",
        Role.RUN,
        POSITIVE,
    )

    def __post_init__(self):
        super().__post_init__()
        try:
            re.compile(self.decay)
        except re.error as error:
            raise UserError(
                f"--decay is {self.decay!r}, expected a regular expression: {error}"
            ) from None


@dataclass(frozen=True)
class Output(Options):
    """Where results go, and how often to look."""

    out: Path = option(
        Path("runs/pretrain"), "Where results and checkpoints go.", Role.LOOK
    )
    eval_every: int = option(100, "Steps between evaluations.", Role.LOOK, at_least(1))
    checkpoint_every: int = option(
        200, "Steps between checkpoints.", Role.LOOK, at_least(1)
    )
    log_every: int = option(
        10, "Steps between lines of metrics.jsonl.", Role.LOOK, at_least(1)
    )
    max_skips: int = option(
        10,
        "Stop after this many updates in a row were skipped because gradients were not"
        " finite.",
        Role.LOOK,
        at_least(1),
    )
    max_rise: float = option(
        3.0,
        "Training has diverged when the median loss of the last 20 steps is more than"
        " this many times the mean of the first 10 (or 1, if that is more); 0 for never.",
        Role.LOOK,
        NOT_NEGATIVE,
    )
    on_divergence: str = option(
        "stop",
        "Then, and after --max-skips: stop; or rollback, up to three times, to the newest"
        " checkpoint from before, and go on with other batches.",
        Role.LOOK,
        one_of(ON_DIVERGENCE),
    )
    tensorboard: bool = option(False, "Also write TensorBoard event files.", Role.LOOK)


@dataclass(frozen=True)
class Shape(Options):
    """The model."""

    preset: str = option("llama-tiny", "Shape of the model.", Role.STEP)
    cross_documents: bool = option(
        False,
        "Let tokens attend to earlier documents in their row, and count the first token"
        " of a document as predicted from the one before, as it does not otherwise."
        " Without a mask to build, attention takes less memory and time on a GPU.",
        Role.STEP,
    )


@dataclass(frozen=True)
class Corpus(Options):
    """The text."""

    data: str | None = option(
        None,
        "A .txt or .jsonl file, a directory of text, or tfds:NAME; without it, the Python"
        " standard library's own source.",
        Role.RUN,
    )
    tokenizer: Path | None = option(
        None, "A tokenizer.json; without it, bytes.", Role.RUN
    )
    eval_batches: int = option(
        64, "Held-out batches per evaluation, at most.", Role.LOOK, at_least(1)
    )
    cache: Path = option(Path("data"), "Where prepared tokens are kept.", Role.LOOK)
    data_dir: str | None = option(
        None, "Where TFDS datasets lie, for tfds:NAME.", Role.LOOK
    )
