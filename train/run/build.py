"""From options to a set-up run: of a preset, of a Hugging Face folder, of a saved run."""

import datetime
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import optax

from oasis_jax import hf
from oasis_jax.models import llama
from oasis_jax.models.bert import Bert
from train.data.instructions import Instructions, load_instructions
from train.data.labelled import Labelled, load_labelled, slots
from train.data.tasks import ANSWERS, LABELS, TASKS, Columns
from train.data.tokenizer import Limits
from train.errors import UserError
from train.objectives.answers import answers
from train.objectives.labels import labels
from train.objectives.objective import Objective
from train.objectives.text import next_token
from train.options import Finetune, Pretrain, Training
from train.run.evaluation import Judge, judge_answers, judge_labels
from train.run.folder import options_of
from train.run.setup import Setup, set_up


def pretraining(
    config: Pretrain,
    vocab_size: int | None = None,
    *,
    layers: int | None = None,
    abstract: bool = False,
) -> Setup:
    """A LLaMA that learns the next token.

    Args:
      vocab_size, layers: The preset's own if None.
      abstract: As in `set_up`.

    Raises:
      UserError: if the method, the preset, the rank or the pattern make no sense.
    """
    sizes = {"vocab_size": vocab_size, "layers": layers}
    changes = {name: size for name, size in sizes.items() if size is not None}
    changes |= _model_options(config) | {"loss_chunk": config.loss_chunk}
    try:
        shape = llama.preset(config.preset, **changes)
    except ValueError as error:
        raise UserError(str(error)) from None
    objective = next_token(
        shape, config.batch, config.seq, cross_documents=config.cross_documents
    )
    rise = round(config.warmup * config.steps)
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.lr,
        warmup_steps=rise,
        decay_steps=max(config.steps, rise + 1),  # it may rise to the end
        end_value=config.lr / 10,
    )
    return set_up(config, objective, schedule, abstract=abstract)


def tuning(
    config: Finetune, shape: Any, *, params: Any = None, abstract: bool = False
) -> Setup:
    """A model that learns a task.

    Args:
      config: With numbers of steps in the place of epochs.
      shape: The model's config, as `shaped` makes it.
      params, abstract: As in `set_up`.

    Raises:
      UserError: if the method, the rank or the pattern make no sense.
    """
    rise = round(config.warmup * config.steps)
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, config.lr, rise),
            optax.linear_schedule(config.lr, 0.0, max(1, config.steps - rise)),
        ],
        [rise],
    )
    objective = kind_of(config.task).objective(config, shape)
    return set_up(config, objective, schedule, params=params, abstract=abstract)


def saved(about: Mapping[str, Any]) -> tuple[Setup, str | None, list[str]]:
    """What a checkpoint's configuration describes, in shapes.

    Returns:
      The set-up, the model that the run began with (None if with random weights), and
      the names of its labels.

    Raises:
      UserError: if an option is not known here; it names the nearest.
    """
    options = options_of(about)
    if "task" not in about:
        setup = pretraining(Pretrain.of(options), about["vocab_size"], abstract=True)
        return setup, None, []
    config = Finetune.of(options)
    stored = stored_shape(config, hf.resolve(config.model))
    setup = tuning(config, shaped(config, stored, about["outputs"]), abstract=True)
    return setup, config.model, about["labels"]


def stored_shape(config: Finetune, folder: Path) -> Any:
    """The config of the folder's model, as it is stored.

    Raises:
      UserError: if the model is of another kind than the task needs.
    """
    wanted, shape = kind_of(config.task).model, hf.load_config(folder)
    families = [name for name, f in hf.FAMILIES.items() if f.model is wanted]
    if isinstance(shape, llama.LlamaConfig) != (wanted is llama.Llama):
        raise UserError(
            f"--task {config.task} needs a model of {', '.join(families)}, and --model"
            f" {config.model} is {'a decoder' if wanted is Bert else 'an encoder'}"
        )
    return shape


def shaped(config: Finetune, shape: Any, outputs: int) -> Any:
    """The stored config as a run has it."""
    return replace(shape, **changes_of(config, outputs))


def changes_of(config: Finetune, outputs: int) -> dict[str, Any]:
    """What of the stored config is changed; `outputs` are a classifier's, or 0."""
    head = {"labels": outputs} if outputs else {"loss_chunk": config.loss_chunk}
    return _model_options(config) | head


def _model_options(config: Training) -> dict[str, Any]:
    """The options that a model's config has too."""
    return dict(
        remat=config.remat,
        residuals=config.residuals,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
    )


# --- What a task's objective needs of a run -----------------------------------------


@dataclass(frozen=True)
class Kind:
    """A row: what `Task.objective` means.

    Attributes:
      model: The Flax module that it takes.
      load: `load(config, folder, limits, model, begun, progress)`: its examples.
      objective: `objective(config, shape)`.
      judge: `judge(config, setup, data)`.
    """

    model: type
    load: Callable[..., Any]
    objective: Callable[[Finetune, Any], Objective]
    judge: Callable[[Finetune, Setup, Any], Judge]


def _load_labelled(
    config: Finetune,
    folder: Path,
    limits: Limits,
    model: hf.Described,
    begun: datetime.datetime,
    progress: bool,
) -> Labelled:
    del begun
    text = (
        (config.text,) if config.text_pair is None else (config.text, config.text_pair)
    )
    return load_labelled(
        config.task,
        config.data,
        folder / "tokenizer.json",
        limits,
        columns=Columns(text, config.label),
        regression=config.regression,
        labels=len(model.label_names) if model.classifies else None,
        label_names=model.label_names,
        eval_data=config.eval_data,
        data_dir=config.data_dir,
        packed=config.pack,
        progress=progress,
    )


def _load_instructions(
    config: Finetune,
    folder: Path,
    limits: Limits,
    model: hf.Described,
    begun: datetime.datetime,
    progress: bool,
) -> Instructions:
    return load_instructions(
        config.task,
        config.data,
        folder,
        limits,
        eval_data=config.eval_data,
        seed=config.seed,
        now=begun,
        progress=progress,
    )


KINDS: dict[str, Kind] = {
    LABELS: Kind(
        Bert,
        _load_labelled,
        lambda c, shape: labels(shape, c.batch, c.seq, slots(c.seq, c.pack)),
        judge_labels,
    ),
    ANSWERS: Kind(
        llama.Llama,
        _load_instructions,
        lambda c, shape: answers(shape, c.batch, c.seq),
        judge_answers,
    ),
}


def kind_of(task: str) -> Kind:
    """What a task of that name needs."""
    return KINDS[TASKS[task].objective]


def task_data(
    config: Finetune,
    folder: Path,
    shape: Any,
    *,
    begun: datetime.datetime,
    progress: bool,
) -> Labelled | Instructions:
    """Reads and tokenises the task's data.

    Args:
      folder: Of the model, whose tokenizer it takes.
      shape: The model's config, as it is stored.
      begun: When the run began, for templates that write the date.
      progress: Shows a bar.

    Raises:
      DataError: if the data cannot be used, or does not fit the model.
      HfError: if a file of the folder lies outside of it, or its config is not that of
        its weights.
    """
    limits = Limits(config.seq, shape.vocab_size, shape.positions)
    model = hf.describe(folder)
    hf.texts(folder)  # none of the tokenizer's files is elsewhere
    return kind_of(config.task).load(config, folder, limits, model, begun, progress)


def outputs_of(config: Finetune, data: Labelled | Instructions) -> int:
    """Of the classifier that the data wants; 0 for a decoder."""
    return TASKS[config.task].outputs and (len(data.labels) or 1)
