"""The options of every command; each field is a flag."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oasis_jax.methods import METHODS, Recipe, method, row
from oasis_jax.residuals import WIDTHS

TASK_NAMES = ("cola", "mrpc", "rte", "sst2", "stsb", "classification", "sft")
EMBEDDINGS = ("adamw", "adafactor", "frozen")

METHOD_OPTIONS = tuple(dict.fromkeys(o for m in METHODS.values() for o in m.options))
"""Every option that some method has; each is a field of `Training`."""


class UserError(Exception):
    """Something that the user can mend; the message is one clear sentence."""


@dataclass(frozen=True)
class Training:
    """What every run has in common."""

    method: str = "oasis"
    """A row of the table of methods, such as oasis or adamw."""
    steps: int = 600
    """Optimizer steps."""
    batch: int = 16
    """Sequences per step."""
    seq: int = 128
    """Tokens per sequence."""
    rank: str | None = None
    """A fraction of each layer's input features (0.25) or a number of columns (64); the
    method's own by default."""
    pattern: str | None = None
    """Regular expression; the kernels whose path it matches are projected, or adapted.
    The method's own by default."""
    stride: int = 1
    """The tracker looks at every stride-th token."""
    lr: float = 3e-3
    """Peak learning rate."""
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises. Then it falls: as a cosine to
    a tenth or, in fine-tuning, as a line to zero."""
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.0
    clip: float = 1.0
    """Global gradient norm at most; of projected gradients in their coordinates."""
    accumulate: int = 1
    """Microbatches per step."""
    remat: str = "elementwise"
    """What the backward pass recomputes: none, elementwise, mlp or block."""
    residuals: str = "whole"
    """How what is kept for it is kept: whole, or fp8 or int8 with a scale per token."""
    loss_chunk: int = 2048
    """Tokens whose logits exist at once."""
    embeddings: str = "adamw"
    """How what has a row per token of the vocabulary (the embedding, the output head) is
    trained: adamw, as the method trains what it does not project; adafactor, in little
    memory; or frozen."""
    dtype: str = "float32"
    """Of the computation: float32 or bfloat16."""
    param_dtype: str = "float32"
    """Of the weights: float32 or bfloat16; the optimizer's moments are float32."""
    seed: int = 0
    """Of the initial weights, the order of the data and the bases."""
    out: Path = Path("runs/pretrain")
    """Where results and checkpoints go."""
    resume: bool = False
    """Continue the run in --out."""
    eval_every: int = 100
    """Steps between evaluations."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    max_skips: int = 10
    """Stop after this many updates in a row were skipped because gradients were not
    finite."""
    tensorboard: bool = False
    """Also write TensorBoard event files."""
    # What follows are options of some methods (python -m train methods).
    interval: int | None = None
    """Steps between two bases; by default as published, but at most a tenth of --steps."""
    random_interval: int | None = None
    """Of prac: steps between two random complements; by default as --interval."""
    share: float | None = None
    """Of prac and oasis-complement: how much of the rank is principal."""
    unbiased: bool | None = None
    """Of oasis-complement: scale the random part so that X P P^T is X in the mean."""
    nonlinear: float | None = None
    """Of prac: rank of norms' and activation functions' inputs; 0 keeps them whole."""
    kind: str | None = None
    """Of rso: gaussian or haar."""
    proximal: float | None = None
    """Of rso: eta of the proximal term."""
    shared: bool | None = None
    """Of compact: one basis for all kernels of an input."""
    groups: int | None = None
    """Of velora: sub-tokens per token."""
    average: str | None = None
    """Of velora: once, batch, or the decay of a running mean."""
    scale: float | None = None
    """Of oasis, galore, osd, compact: multiplies projected updates; velora: gradients."""
    out_scale: float | None = None
    """Of compact: multiplies o_proj's updates on top of --scale."""
    base: str | None = None
    """Of galore and osd: adam, lion or adafactor."""
    rho: float | None = None
    """Of ldadam: weight of the momentum in the power iteration."""
    error_feedback: bool | None = None
    """Of ldadam."""
    alpha: float | None = None
    """Of lora: the adapters are scaled by alpha / rank."""

    def __post_init__(self):
        for name in ("batch", "seq", "accumulate", "checkpoint_every", "log_every"):
            _at_least(self, name, 1)
        for name in ("loss_chunk", "max_skips", "stride"):
            _at_least(self, name, 1)
        _at_least(self, "seed", 0)
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UserError(f"--lr is {self.lr}, expected a positive number")
        if not 0 <= self.warmup <= 1:
            raise UserError(f"--warmup is {self.warmup}, expected a share in [0, 1]")
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in ("float32", "bfloat16"):
                raise UserError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)!r}, expected"
                    " float32 or bfloat16"
                )
        for name, known in (("residuals", WIDTHS), ("embeddings", EMBEDDINGS)):
            if getattr(self, name) not in known:
                raise UserError(
                    f"--{name} is {getattr(self, name)!r}, expected one of"
                    f" {', '.join(known)}"
                )
        if self.batch % self.accumulate:
            raise UserError(
                f"--batch {self.batch} does not divide into --accumulate"
                f" {self.accumulate} microbatches"
            )
        if self.rank is not None:
            parse_rank(self.rank)
        if self.interval is not None:
            _at_least(self, "interval", 1)

    def recipe(self) -> Recipe:
        """The method, with its rank, pattern and options.

        Raises:
          UserError: if there is none of that name, or an option is another method's.
        """
        try:
            published = row(self.method).options
            options = {name: getattr(self, name) for name in METHOD_OPTIONS}
            for name in ("interval", "random_interval"):
                if name in published and options[name] is None:
                    shortest = max(1, self.steps // 10)
                    options[name] = min(published[name], self.interval or shortest)
            if options["average"] not in (None, "once", "batch"):
                options["average"] = _number("average", options["average"])
            return method(
                self.method,
                pattern=self.pattern,
                rank=None if self.rank is None else parse_rank(self.rank),
                stride=self.stride,
                **options,
            )
        except ValueError as error:
            raise UserError(_as_flags(str(error))) from None

    # Fields that may differ between a run and its continuation: where things lie and
    # how often to look, nothing that a number depends on.
    _FREE = frozenset(
        "out resume cache data_dir tensorboard log_every eval_every eval_batches"
        " checkpoint_every max_skips generate new_tokens".split()
    )

    def as_dict(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return {
            name: str(value) if isinstance(value, Path) else value
            for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def of(cls, saved: dict[str, Any]) -> Any:
        """The options that `as_dict` made `saved` of."""
        values: dict[str, Any] = {
            field.name: saved[field.name]
            for field in dataclasses.fields(cls)
            if field.name in saved
        }
        for field in dataclasses.fields(cls):
            if field.type in (Path, Path | None) and values.get(field.name):
                values[field.name] = Path(values[field.name])
        return cls(**values)

    def check_continues(self, saved: dict[str, Any]) -> None:
        """Refuses to continue another run.

        Raises:
          UserError: naming the options that differ, with both values.
        """
        mine = {k: v for k, v in self.as_dict().items() if k not in self._FREE}
        changed = differences(saved, mine)
        if changed:
            raise UserError(
                f"cannot resume {self.out}: {changed};"
                " repeat the options of that run, or choose another --out"
            )


@dataclass(frozen=True)
class Pretrain(Training):
    """Train a LLaMA on text."""

    preset: str = "llama-tiny"
    """Shape of the model."""
    data: str | None = None
    """A .txt or .jsonl file, a directory of text, or tfds:NAME; without it, the Python
    standard library's own source."""
    tokenizer: Path | None = None
    """A tokenizer.json; without it, bytes."""
    cross_documents: bool = False
    """Let tokens attend to earlier documents in their row. Without a mask to build,
    attention takes less memory and time on a GPU."""
    eval_batches: int = 64
    """Held-out batches per evaluation, at most."""
    cache: Path = Path("data")
    """Where prepared tokens are kept."""
    data_dir: str | None = None
    """Where TFDS datasets lie, for tfds:NAME."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("steps", "eval_every", "eval_batches"):
            _at_least(self, name, 1)


@dataclass(frozen=True, kw_only=True)
class Finetune(Training):
    """Fine-tune a Hugging Face model on a task."""

    model: str
    """A folder with config.json, *.safetensors and tokenizer.json, or a hub's name."""
    task: str
    """cola, mrpc, rte, sst2 or stsb (GLUE), classification, or sft (instructions)."""
    data: str
    """A folder with train.tsv and dev.tsv as GLUE distributes them, or tfds:glue/cola; for
    classification a .csv, .tsv or .jsonl file; for sft a .jsonl file with prompt and
    completion, question and answer, or messages."""
    eval_data: str | None = None
    """A file to hold out; otherwise dev.tsv, or a part of --data."""
    text: str = "text"
    """Of classification: the column of the text."""
    text_pair: str | None = None
    """Of classification: the column of a second text."""
    label: str = "label"
    """Of classification: the column of the label."""
    regression: bool = False
    """Of classification: the label is a number to predict."""
    pack: bool = False
    """Of classification and GLUE: put several examples into a row of --seq tokens, each
    on its own, in place of padding; --batch counts rows. Sft always does."""
    epochs: float = 3.0
    """Passes over the training examples, unless --steps are given."""
    steps: int = 0
    """Optimizer steps; 0 for those of --epochs."""
    eval_every: int = 0
    """Steps between evaluations; 0 for one per epoch."""
    generate: int = 32
    """Of sft: held-out prompts that are answered at each evaluation, and compared."""
    new_tokens: int = 256
    """Of sft: most tokens of an answer."""
    lr: float = 5e-5
    warmup: float = 0.06
    b2: float = 0.999
    out: Path = Path("runs/finetune")
    data_dir: str | None = None
    """Where TFDS datasets lie, for tfds:NAME."""
    target: str | None = None
    """Do not train: say what the step needs on this device, as `plan` does."""
    json: bool = False
    """With --target: as JSON."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("steps", "eval_every", "generate"):
            _at_least(self, name, 0)
        _at_least(self, "new_tokens", 1)
        if not (math.isfinite(self.epochs) and self.epochs > 0):
            raise UserError(f"--epochs is {self.epochs}, expected a positive number")
        if self.task not in TASK_NAMES:
            raise UserError(
                f"--task is {self.task!r}, expected one of {', '.join(TASK_NAMES)}"
            )

    def lasting(self, examples: int) -> "Finetune":
        """With numbers of steps in the place of epochs."""
        epoch = max(1, examples // self.batch)
        steps = self.steps or max(1, round(self.epochs * epoch))
        every = self.eval_every or min(epoch, steps)
        return dataclasses.replace(self, steps=steps, eval_every=every)


@dataclass(frozen=True)
class Export:
    """Write the model of a run as a folder that transformers opens."""

    checkpoint: Path
    """A run's folder, of which the best checkpoint is taken if one is marked, else the
    newest; or a folder of checkpoints."""
    out: Path
    """A folder that is absent or empty."""


def differences(saved: dict[str, Any], mine: dict[str, Any]) -> str:
    """Which options were saved with another value than they have now, and both."""

    def shown(value: Any) -> Any:
        return "not given" if value is None else value

    return "; ".join(
        f"--{name.replace('_', '-')} was {shown(saved[name])} and is {shown(value)}"
        for name, value in mine.items()
        if name in saved and saved[name] != value
    )


def _as_flags(sentence: str) -> str:
    """The library's sentence about an option, with the option as it is typed here."""
    name, is_option, rest = sentence.partition(" is no option of ")
    return f"--{name.replace('_', '-')}{is_option}{rest}" if is_option else sentence


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--{option} is {text!r}, expected a number") from None


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
class Methods:
    """Print the table of methods."""

    json: bool = False
    """As JSON."""


@dataclass(frozen=True)
class Compare(Pretrain):
    """Train with several methods on equal terms, and tabulate.

    Every option of `pretrain` holds for all methods; --method, --lr, --seed and --resume
    are set by the comparison. Finished trials in --out are kept, not run again.
    """

    methods: str = "adamw,oasis"
    """Names separated by commas, or all; name:rank:residuals overrides --rank and
    --residuals, as in oasis:0.5 or oasis:0.5:int8. An option of some methods is for those
    that have it."""
    lrs: str = "1e-3,3e-3,1e-2"
    """Peak learning rates, separated by commas; each method keeps its best. A method
    whose updates are scaled down takes them times its own factor."""
    seeds: str = "0"
    """Seeds, separated by commas. Learning rates are swept with the first; the others
    repeat each method's best."""
    out: Path = Path("runs/compare")
    jobs: int = 1
    """Trials at a time. With more than one, each has an equal share of the cores, and
    times are not comparable with those of other machines or settings."""


@dataclass(frozen=True)
class Plan(Pretrain):
    """Say what a train step needs on a device, which need not be there.

    Options of `pretrain` that shape the step hold here too; others are ignored.
    """

    preset: str = "llama-1b"
    target: str = "cpu"
    """h200, h100, a100, l4, rtx-4090, v5e, v5p, v6e or cpu; v5p:2x2x1 names a slice."""
    batch: int = 8
    seq: int = 2048
    dtype: str = "bfloat16"
    param_dtype: str = "bfloat16"
    cross_documents: bool = True
    budget_gib: float | None = None
    """Search for the fastest configurations that need no more: methods, ranks (unless
    --rank is given), levels of recomputation, batches up to --batch."""
    methods: str = "adamw,oasis"
    """What a search looks at, names separated by commas."""
    plans: int = 3
    """How many plans a search prints at most, one per method and rank."""
    json: bool = False
    """As JSON."""

    def __post_init__(self):
        super().__post_init__()
        _at_least(self, "plans", 1)
        budget = self.budget_gib
        if budget is not None and not (math.isfinite(budget) and budget > 0):
            raise UserError(f"--budget-gib is {budget}, expected a positive number")


def _at_least(config: Any, name: str, least: int) -> None:
    if getattr(config, name) < least:
        raise UserError(
            f"--{name.replace('_', '-')} is {getattr(config, name)}, expected at least"
            f" {least}"
        )
