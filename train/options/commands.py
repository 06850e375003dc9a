"""The options of every command: groups, and what only that command reads."""

import dataclasses
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from oasis_jax.bounds import POSITIVE, at_least, one_of
from oasis_jax.methods import Recipe
from train.data.tasks import TASKS
from train.errors import UserError
from train.options.fields import Options, Role, again, differences, of_role, option
from train.options.groups import (
    Corpus,
    Output,
    Projected,
    Schedule,
    Shape,
    Step,
    Trial,
)
from train.options.method import recipe


@dataclass(frozen=True)
class Training(Output, Schedule, Step, Projected, Trial):
    """What every run has in common."""

    resume: bool = option(False, "Continue the run in --out.", Role.LOOK)

    def recipe(self) -> Recipe:
        """The method, with its rank, pattern and options.

        Raises:
          UserError: if there is none of that name, or an option is another method's.
        """
        return recipe(
            self.method,
            self,
            steps=self.steps,
            pattern=self.pattern,
            rank=self.parsed_rank(),
            stride=self.stride,
        )

    def extends(self, saved: Mapping[str, Any], done: int) -> bool:
        """Whether a run that has done all its steps shall have more of them."""
        return done >= saved["steps"] < self.steps

    def check_continues(self, saved: Mapping[str, Any], done: int) -> None:
        """Refuses to continue another run.

        Args:
          saved: The options of the run.
          done: Steps that it has done; a finished one may be given more.

        Raises:
          UserError: naming the options that differ, with both values.
        """
        mine = self.as_dict()
        fixed = set(of_role(self, Role.STEP, Role.METHOD, Role.RUN))
        if self.extends(saved, done):
            fixed -= {"steps", "epochs"}
        changed = differences(saved, {k: v for k, v in mine.items() if k in fixed})
        if changed:
            raise UserError(
                f"cannot resume {self.out}: {changed};"
                " repeat the options of that run, or choose another --out"
            )


@dataclass(frozen=True)
class Pretrain(Training, Corpus, Shape):
    """Train a LLaMA on text."""


@dataclass(frozen=True, kw_only=True)
class Tuning(Options):
    """The model, the task and its data."""

    model: str = option(
        MISSING,
        "A folder with config.json, *.safetensors and tokenizer.json, or a hub's name.",
        Role.STEP,
    )
    task: str = option(
        MISSING,
        "cola, mrpc, rte, sst2 or stsb (GLUE), classification, or sft (instructions).",
        Role.STEP,
        one_of(TASKS),
    )
    data: str = option(
        MISSING,
        "A folder with train.tsv and dev.tsv as GLUE distributes them, or"
        " tfds:glue/cola; for classification a .csv, .tsv, .jsonl, .json or .parquet file,"
        " for sft one of the last three with prompt and completion, question and answer,"
        " or messages: compressed or not, or a folder or pattern of them.",
        Role.RUN,
    )
    eval_data: str | None = option(
        None,
        "A file to hold out; otherwise dev.tsv, or a part of --data.",
        Role.RUN,
    )
    text: str = option("text", "Of classification: the column of the text.", Role.RUN)
    text_pair: str | None = option(
        None, "Of classification: the column of a second text.", Role.RUN
    )
    label: str = option(
        "label", "Of classification: the column of the label.", Role.RUN
    )
    regression: bool = option(
        False, "Of classification: the label is a number to predict.", Role.STEP
    )
    pack: bool = option(
        False,
        "Of classification and GLUE: put several examples into a row of --seq tokens,"
        " each on its own, in place of padding; --batch counts rows. Sft always does.",
        Role.STEP,
    )
    epochs: float = option(
        3.0,
        "Passes over the training examples, unless --steps are given.",
        Role.RUN,
        POSITIVE,
    )
    generate: int = option(
        32,
        "Of sft: held-out prompts that are answered at each evaluation, and compared.",
        Role.LOOK,
        at_least(0),
    )
    new_tokens: int = option(
        256, "Of sft: most tokens of an answer.", Role.LOOK, at_least(1)
    )
    data_dir: str | None = option(
        None, "Where TFDS datasets lie, for tfds:NAME.", Role.LOOK
    )


@dataclass(frozen=True, kw_only=True)
class Finetune(Training, Tuning):
    """Fine-tune a Hugging Face model on a task."""

    target: str | None = option(
        None,
        "Do not train: say what the step needs on this device, as `plan` does.",
        Role.LOOK,
    )
    json: bool = option(False, "With --target: as JSON.", Role.LOOK)
    # Other defaults than other runs have.
    lr: float = again(Trial, "lr", 5e-5)
    warmup: float = again(Schedule, "warmup", 0.06)
    b2: float = again(Schedule, "b2", 0.999)
    out: Path = again(Output, "out", Path("runs/finetune"))
    steps: int = again(
        Schedule,
        "steps",
        0,
        about="Optimizer steps; 0 for those of --epochs.",
        bound=at_least(0),
    )
    eval_every: int = again(
        Output,
        "eval_every",
        0,
        about="Steps between evaluations; 0 for one per epoch.",
        bound=at_least(0),
    )

    def lasting(self, examples: int) -> "Finetune":
        """With numbers of steps in the place of epochs."""
        epoch = max(1, -(-examples // self.batch))
        steps = self.steps or max(1, round(self.epochs * epoch))
        every = self.eval_every or min(epoch, steps)
        return dataclasses.replace(self, steps=steps, eval_every=every)


@dataclass(frozen=True)
class Export(Options):
    """Write the model of a run as a folder that transformers opens."""

    checkpoint: Path = option(
        MISSING,
        "A run's folder, of which the best checkpoint is taken if one is marked, else the"
        " newest; or a folder of checkpoints.",
        Role.LOOK,
    )
    out: Path = option(MISSING, "A folder that is absent or empty.", Role.LOOK)


@dataclass(frozen=True)
class Methods(Options):
    """Print the table of methods."""

    json: bool = option(False, "As JSON.", Role.LOOK)


@dataclass(frozen=True)
class Compare(Output, Schedule, Step, Projected, Corpus, Shape):
    """Train with several methods on equal terms, and tabulate.

    Options of `pretrain` hold for all methods, an option of some methods for those that
    have it. Finished trials in --out are kept, not run again.
    """

    methods: str = option(
        "adamw,oasis",
        "Names separated by commas, or all; name:rank:residuals overrides --rank and"
        " --residuals, as in oasis:0.5 or oasis:0.5:int8.",
        Role.LOOK,
        also=("method",),
    )
    lrs: str = option(
        "1e-3,3e-3,1e-2",
        "Peak learning rates, separated by commas; each method keeps its best. A method"
        " whose updates are scaled down takes them times its own factor.",
        Role.LOOK,
        also=("lr",),
    )
    seeds: str = option(
        "0",
        "Seeds, separated by commas. Learning rates are swept with the first; the others"
        " repeat each method's best.",
        Role.LOOK,
        also=("seed",),
    )
    jobs: int = option(
        1,
        "Trials at a time. With more than one, each has an equal share of the cores, and"
        " times are not comparable with those of other machines or settings.",
        Role.LOOK,
        at_least(1),
    )
    out: Path = again(Output, "out", Path("runs/compare"))

    def trial(self, **of_the_trial: Any) -> Pretrain:
        """One run of the comparison, given what is its own."""
        return Pretrain(**shared(self, Pretrain) | of_the_trial)


@dataclass(frozen=True)
class Plan(Step, Projected, Shape):
    """Say what a train step needs on a device, which need not be there.

    The step is that of `pretrain` with these options; nothing is trained.
    """

    method: str = again(Trial, "method", "oasis")
    preset: str = again(Shape, "preset", "llama-1b")
    batch: int = again(Step, "batch", 8)
    seq: int = again(Step, "seq", 2048)
    dtype: str = again(Step, "dtype", "bfloat16")
    param_dtype: str = again(Step, "param_dtype", "bfloat16")
    cross_documents: bool = again(Shape, "cross_documents", True)
    target: str = option(
        "cpu",
        "h200, h100, a100, l4, rtx-4090, v5e, v5p, v6e or cpu; v5p:2x2x1 names a slice.",
        Role.STEP,
    )
    budget_gib: float | None = option(
        None,
        "Search for the fastest configurations that need no more: methods, ranks (unless"
        " --rank is given), levels of recomputation, batches up to --batch.",
        Role.LOOK,
        POSITIVE,
    )
    methods: str = option(
        "adamw,oasis",
        "What a search looks at, names separated by commas.",
        Role.LOOK,
    )
    plans: int = option(
        3,
        "How many plans a search prints at most, one per method and rank.",
        Role.LOOK,
        at_least(1),
    )
    json: bool = option(False, "As JSON.", Role.LOOK)

    def training(self) -> Pretrain:
        """The run whose step is planned."""
        return Pretrain(**shared(self, Pretrain))


def shared(options: Options, kind: type[Options]) -> dict[str, Any]:
    """The values of those options that another command has too."""
    theirs = {field.name for field in dataclasses.fields(kind)}
    mine = (field.name for field in dataclasses.fields(options))
    return {name: getattr(options, name) for name in mine if name in theirs}


COMMANDS: dict[str, type[Options]] = {
    "pretrain": Pretrain,
    "finetune": Finetune,
    "export": Export,
    "compare": Compare,
    "plan": Plan,
    "methods": Methods,
}
"""What `python -m train` does, and the options of each."""
