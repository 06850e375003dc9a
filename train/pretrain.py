"""Pretraining: a LLaMA on text."""

import sys
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console

from oasis_jax.models import llama
from oasis_jax.state import OasisTrainState
from train import loop, report
from train.config import Pretrain, UserError
from train.data import TextData, load


def set_up(
    config: Pretrain,
    vocab_size: int | None = None,
    *,
    layers: int | None = None,
    abstract: bool = False,
) -> loop.Setup:
    """Builds the model and a first state.

    Args:
      vocab_size, layers: The preset's own if None.
      abstract: Give the state's shapes only; nothing is computed or allocated.

    Raises:
      UserError: if the method, the preset, the rank or the pattern make no sense.
    """
    given = {"vocab_size": vocab_size, "layers": layers}
    changes = {name: size for name, size in given.items() if size is not None}
    try:
        shape = llama.preset(
            config.preset,
            loss_chunk=config.loss_chunk,
            **loop.model_options(config),
            **changes,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    model = llama.Llama(shape)
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.lr,
        warmup_steps=round(config.warmup * config.steps),
        decay_steps=config.steps,
        end_value=config.lr / 10,
    )

    def loss_fn(variables: Any, batch: Any) -> jax.Array:
        total = token_loss(model, variables, batch, config.cross_documents)
        return total / batch["tokens"][:, 1:].size

    row = jax.ShapeDtypeStruct((config.batch, config.seq + 1), jnp.int32)
    return loop.set_up(
        config,
        model,
        loss_fn,
        {"tokens": row, "segments": row},
        (jax.ShapeDtypeStruct((config.batch, config.seq), jnp.int32),),
        schedule=schedule,
        abstract=abstract,
    )


def run(config: Pretrain, *, console: Console | None = None) -> dict[str, Any]:
    """Trains; writes everything to `config.out`; returns the summary.

    Raises:
      UserError, DataError, CheckpointError: if something is wrong that the user can
        mend; the run's files are as the last finished step left them.
    """
    console = console or report.console()
    config.recipe()  # a wrong option is found before the data is read
    loop.claim(config)
    data = load(
        config.data,
        str(config.tokenizer) if config.tokenizer else None,
        cache=config.cache,
        data_dir=config.data_dir,
        progress=console.is_terminal,
    )
    console.print(f"data       {data.description}")
    batches = data.train(config.batch, config.seq, config.seed)
    data.validation(config.batch, config.seq)  # too short a split is found now
    setup = set_up(config, data.vocab_size)
    return loop.fit(
        config,
        setup,
        batches,
        partial(_evaluate, setup, data, config),
        about=config.as_dict()
        | {"data_fingerprint": data.fingerprint, "vocab_size": data.vocab_size},
        title=config.preset,
        console=console,
    )


def _evaluate(
    setup: loop.Setup, data: TextData, config: Pretrain, state: OasisTrainState
) -> dict[str, Any]:
    params = jax.jit(lambda state: state.merged_params())(state)
    batches = data.validation(config.batch, config.seq, config.eval_batches)
    return held_out_loss(setup.model, params, batches, config.cross_documents)


def held_out_loss(
    model: llama.Llama,
    params: Any,
    batches: Iterable[Any],
    cross_documents: bool = False,
) -> dict[str, Any]:
    """Mean loss over the tokens that have a weight, and how many they are."""
    total = count = 0.0
    for batch in batches:
        losses, weights = _held_out(model, cross_documents, params, batch)
        total += float(losses)
        count += float(weights)
    return {"val_loss": total / max(count, 1.0), "val_tokens": int(count)}


@partial(jax.jit, static_argnums=(0, 1))
def _held_out(model: llama.Llama, cross_documents: bool, params: Any, batch: Any):
    total = token_loss(model, {"params": params}, batch, cross_documents)
    return total, jnp.sum(batch["weights"])


def token_loss(
    model: llama.Llama, variables: Any, batch: Any, cross_documents: bool = False
) -> jax.Array:
    """Sum of the next tokens' cross-entropies, times their weights if there are any."""
    tokens = batch["tokens"]
    segments = None if cross_documents else batch["segments"][:, :-1]
    total: Any = model.apply(
        variables, tokens[:, :-1], segments, tokens[:, 1:], batch.get("weights")
    )
    return total


def main(config: Pretrain) -> int:
    summary = run(config)
    skipped = f", {summary['skipped']} updates skipped" if summary["skipped"] else ""
    print(
        f"validation loss {summary['val_loss']:.4f} over {summary['val_tokens']:,} tokens"
        f"{skipped}; results in {config.out}/",
        file=sys.stdout,
    )
    return 0
