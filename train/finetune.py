"""Fine-tuning: a Hugging Face model on a task, and the numbers that tasks are judged by."""

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from oasis_jax import hf
from oasis_jax.checkpoints import Checkpoints
from oasis_jax.compat import without_accelerators
from oasis_jax.models.bert import Bert, BertConfig
from oasis_jax.models.generate import generate, pad
from oasis_jax.models.llama import Llama, LlamaConfig
from oasis_jax.planning import memory, targets
from oasis_jax.state import OasisTrainState
from train import loop, report
from train.config import Finetune, UserError
from train.plan import compile_step, versions
from train.pretrain import held_out_loss, token_loss
from train.sft import SftData, exact_match, load_sft
from train.tasks import TASKS, TaskData, load_task, metrics, slots

BEST = "best"
"""Folder of the checkpoint with the best evaluation, beside `checkpoints`."""

Evaluate = Callable[[OasisTrainState], dict[str, Any]]


@dataclass(frozen=True)
class Work:
    """A task, seen from the training loop.

    Attributes:
      data: Its examples.
      size: Number of rows to train on.
      outputs: Of the classifier; 0 for a decoder.
      labels: Their names.
    """

    data: TaskData | SftData
    size: int
    outputs: int = 0
    labels: tuple[str, ...] = ()


def run(config: Finetune, *, console: Console | None = None) -> dict[str, Any]:
    """Trains; writes everything to `config.out`; returns the summary.

    Raises:
      UserError, DataError, HfError, CheckpointError: if something is wrong that the user
        can mend; the run's files are as the last finished step left them.
    """
    console = console or report.console()
    config.recipe()  # a wrong option is found before anything is read
    loop.claim(config)
    folder = hf.resolve(config.model)
    shape = shape_of(config, folder)
    work = _work(config, folder, shape, console)
    console.print(f"data       {work.data.description}")
    config = config.lasting(work.size)
    loaded = hf.load(folder, seed=config.seed, **_changes(config, work.outputs))
    if loaded.fresh:
        console.print(f"initialised {', '.join(loaded.fresh)}")
    setup = set_up(config, loaded.config, params=loaded.params)
    about = config.as_dict() | {
        "data_fingerprint": work.data.fingerprint,
        "labels": list(work.labels),
        "outputs": work.outputs,
    }
    evaluate = _evaluation(config, setup, work)
    summary = loop.fit(
        config,
        setup,
        work.data.train(config.batch, config.seed),
        partial(_evaluate_and_keep, config, evaluate, about),
        about=about,
        title=config.model,
        console=console,
    )
    summary |= {"task": config.task, "model": config.model, "best": _best(config.out)}
    report.write_json(config.out / "summary.json", summary)
    return summary


def shape_of(config: Finetune, folder: Path) -> Any:
    """The config of the folder's model, as it is stored.

    Raises:
      UserError: if the model is of another kind than the task needs.
    """
    wanted = Llama if config.task == "sft" else Bert
    shape = hf.load_config(folder)
    if isinstance(shape, LlamaConfig) != (wanted is Llama):
        families = [name for name, f in hf.FAMILIES.items() if f.model is wanted]
        raise UserError(
            f"--task {config.task} needs a model of {', '.join(families)}, and --model"
            f" {config.model} is {'a decoder' if wanted is Bert else 'an encoder'}"
        )
    return shape


def _changes(config: Finetune, outputs: int) -> dict[str, Any]:
    """What of the stored config is changed."""
    own = {"labels": outputs} if outputs else {"loss_chunk": config.loss_chunk}
    return loop.model_options(config) | own


def changed(config: Finetune, shape: Any, outputs: int) -> Any:
    """The stored config as a run has it."""
    return replace(shape, **_changes(config, outputs))


def _work(config: Finetune, folder: Path, shape: Any, console: Console) -> Work:
    """Reads and tokenises the task's data."""
    limits: dict[str, Any] = dict(
        vocab_size=shape.vocab_size, positions=shape.positions, seq=config.seq
    )
    limits |= dict(eval_data=config.eval_data, progress=console.is_terminal)
    if config.task == "sft":
        sft = load_sft(config.data, folder, seed=config.seed, **limits)
        return Work(sft, sft.train_rows)
    data = load_task(
        config.task,
        config.data,
        folder / "tokenizer.json",
        labels=shape.labels or None,
        text=config.text,
        text_pair=config.text_pair,
        label=config.label,
        regression=config.regression,
        data_dir=config.data_dir,
        packed=config.pack,
        **limits,
    )
    return Work(data, data.train_rows, len(data.labels) or 1, data.labels)


def set_up(
    config: Finetune, shape: Any, *, params: Any = None, abstract: bool = False
) -> loop.Setup:
    """The train step of a model on a task.

    Args:
      shape: The model's config, with the options of this run.
      params: To start from; drawn by the seed if None.
      abstract: As in `loop.set_up`.

    Raises:
      UserError: if the method, the rank or the pattern make no sense.
    """
    make = _instruction if isinstance(shape, LlamaConfig) else _classification
    model, loss_fn, batch = make(config, shape)
    rise = round(config.warmup * config.steps)
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, config.lr, rise),
            optax.linear_schedule(config.lr, 0.0, max(1, config.steps - rise)),
        ],
        [rise],
    )
    setup = loop.set_up(
        config,
        model,
        loss_fn,
        batch,
        (jax.ShapeDtypeStruct((config.batch, config.seq), jnp.int32),),
        schedule=schedule,
        params=params,
        abstract=abstract,
    )
    return replace(setup, prepare=_weighted)


def _weighted(batch: Any) -> Any:
    """Weights that make a mean one over what counts in the whole batch, even if cut."""
    weights = batch["weights"]
    total = jnp.maximum(jnp.sum(weights), 1.0)
    return {**batch, "weights": weights * (weights.size / total)}


# --- Classification and regression ----------------------------------------------------


def _classification(config: Finetune, shape: BertConfig) -> tuple:
    model = Bert(shape)
    row = jax.ShapeDtypeStruct((config.batch, config.seq), jnp.int32)
    each = (config.batch, slots(config.seq, config.pack))
    batch = {
        **dict.fromkeys(("tokens", "segments", "types"), row),
        "firsts": jax.ShapeDtypeStruct(each, jnp.int32),
        "labels": jax.ShapeDtypeStruct(
            each, jnp.float32 if shape.labels == 1 else jnp.int32
        ),
        "weights": jax.ShapeDtypeStruct(each, jnp.float32),
    }

    def loss_fn(variables: Any, batch: Any) -> jax.Array:
        losses = _losses(_outputs(model, variables, batch), batch["labels"])
        return jnp.mean(losses * batch["weights"])

    return model, loss_fn, batch


def _outputs(model: Bert, variables: Any, batch: Any) -> jax.Array:
    inputs = (batch[name] for name in ("tokens", "segments", "types", "firsts"))
    outputs: Any = model.apply(variables, *inputs)
    return outputs


def _losses(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of each example, or of a regression its squared error, (B, K)."""
    if jnp.issubdtype(labels.dtype, jnp.floating):
        return (outputs[..., 0] - labels) ** 2
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels)


@partial(jax.jit, static_argnums=0)
def _judge(model: Bert, params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    outputs = _outputs(model, {"params": params}, batch)
    regression = jnp.issubdtype(batch["labels"].dtype, jnp.floating)
    predictions = outputs[..., 0] if regression else jnp.argmax(outputs, axis=-1)
    return predictions, _losses(outputs, batch["labels"])


def _scores(
    config: Finetune, model: Bert, data: TaskData, params: Any
) -> dict[str, Any]:
    """The task's metrics, their mean as `score`, and the loss, on the held-out split."""
    seen: list[tuple[Any, ...]] = []
    for batch in data.dev(config.batch):
        predictions, losses = _judge(model, params, batch)
        real = batch["weights"] > 0
        rows = (predictions, batch["labels"], losses)
        seen.append(tuple(np.asarray(a)[real] for a in rows))
    predictions, labels, losses = map(np.concatenate, zip(*seen, strict=True))
    found = metrics(config.task, predictions, labels)
    return {
        "val_loss": float(losses.mean()),
        "val_examples": len(losses),
        **found,
        "score": statistics.fmean(found.values()),
    }


# --- Instructions ---------------------------------------------------------------------


def _instruction(config: Finetune, shape: LlamaConfig) -> tuple:
    model = Llama(shape)
    row = jax.ShapeDtypeStruct((config.batch, config.seq + 1), jnp.int32)
    weights = jax.ShapeDtypeStruct((config.batch, config.seq), jnp.float32)
    batch = {"tokens": row, "segments": row, "weights": weights}

    def loss_fn(variables: Any, batch: Any) -> jax.Array:
        return token_loss(model, variables, batch) / batch["weights"].size

    return model, loss_fn, batch


def _answers(
    config: Finetune, model: Llama, data: SftData, params: Any
) -> dict[str, Any]:
    """The held-out loss per token and, of some prompts, the share answered exactly."""
    found = held_out_loss(model, params, data.dev(config.batch))
    room = model.config.positions
    asked = [
        (prompt, reference)
        for prompt, reference in data.prompts(config.generate)
        if room is None or len(prompt) + config.new_tokens <= room
    ]
    if not asked:
        return found
    said: list[str] = []
    for start in range(0, len(asked), config.batch):
        prompts = [prompt for prompt, _ in asked[start : start + config.batch]]
        rows = generate(
            model, params, *pad(prompts), new_tokens=config.new_tokens, end=data.end
        )
        said += [data.decode(row) for row in np.asarray(rows).tolist()]
    references = [reference for _, reference in asked]
    with (config.out / "answers.jsonl").open("w") as file:
        for (prompt, reference), answer in zip(asked, said, strict=True):
            line = dict(prompt=data.decode(prompt), answer=answer, reference=reference)
            file.write(json.dumps(line) + "\n")
    return found | {"exact_match": exact_match(said, references), "asked": len(asked)}


# --- Evaluation -----------------------------------------------------------------------


def _evaluation(config: Finetune, setup: loop.Setup, work: Work) -> Evaluate:
    judge: Any = _scores if isinstance(work.data, TaskData) else _answers
    merged = jax.jit(lambda state: state.merged_params())
    return lambda state: judge(config, setup.model, work.data, merged(state))


def _merit(record: dict[str, Any]) -> float:
    """What the best checkpoint has most of: the score, or the least loss."""
    return record.get("score", -record["val_loss"])


def _evaluate_and_keep(
    config: Finetune, evaluate: Evaluate, about: Any, state: OasisTrainState
) -> dict[str, Any]:
    """Evaluates, and keeps the state if none before it was better."""
    result, before = evaluate(state), _best(config.out)
    if before is None or _merit(result) > _merit(before):
        with Checkpoints(config.out / BEST, keep=1) as checkpoints:
            checkpoints.save(int(state.step), state, config=about, force=True)
    return result


def _best(out: Path) -> dict[str, Any] | None:
    """The first of the run's best evaluations so far, if there was any."""
    records = report.read_metrics(out / "metrics.jsonl")
    return max((r for r in records if "val_loss" in r), key=_merit, default=None)


# --- A plan ---------------------------------------------------------------------------


def plan(config: Finetune) -> dict[str, Any]:
    """What the step needs on `config.target`, compiled and not run.

    Needs the folder's `config.json` only, and no data.
    """
    folder = hf.resolve(config.model)
    outputs = 0 if config.task == "sft" else len(TASKS[config.task].labels) or 1
    shape = changed(config, shape_of(config, folder), outputs)
    setup = set_up(config.lasting(config.batch), shape, abstract=True)
    needs, parts = compile_step(
        setup,
        config,
        str(config.target),
        name=f"{config.task} of {config.model} with {config.method}",
    )
    return {
        "peak_bytes": needs.peak_bytes,
        "parts": parts,
        "configuration": config.as_dict(),
        "versions": versions(),
    }


def _tell(planned: dict[str, Any], config: Finetune) -> None:
    if config.json:
        print(json.dumps(planned, indent=2))
        return
    title = f"What a step needs on {config.target}"
    table = report.memory_table(planned["parts"], planned["peak_bytes"], title)
    Console(highlight=False, markup=False).print(table)


def main(config: Finetune) -> int:
    if config.target is not None:
        # A GPU that is there would be claimed, and is not needed.
        without_accelerators()
        try:
            _tell(plan(config), config)
        except (targets.TargetError, memory.PlanError) as error:
            raise UserError(str(error)) from None
        return 0
    best = run(config)["best"]
    numbers = (f"{k} {v:.4f}" for k, v in best.items() if isinstance(v, float))
    print(
        f"best at step {best['step']}: {', '.join(numbers)}; results in {config.out}/",
        file=sys.stdout,
    )
    return 0
