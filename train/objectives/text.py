"""The next token of a text."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from oasis_jax.models.llama import Llama, LlamaConfig
from train.objectives.objective import Objective, integers


def next_token(
    shape: LlamaConfig, batch: int, seq: int, *, cross_documents: bool = False
) -> Objective:
    """The mean cross-entropy of all tokens of a row but its first.

    Args:
      shape: The model.
      batch, seq: Rows, and predicted tokens per row; a row holds one more.
      cross_documents: Lets tokens attend to earlier documents in their row.
    """
    model = Llama(shape)

    def loss_fn(variables: Any, batch: Any) -> jax.Array:
        total = token_loss(model, variables, batch, cross_documents)
        return total / batch["tokens"][:, 1:].size

    row = integers(batch, seq + 1)
    inputs = (integers(batch, seq),)
    return Objective(model, inputs, {"tokens": row, "segments": row}, loss_fn)


def token_loss(
    model: Llama, variables: Any, batch: Any, cross_documents: bool = False
) -> jax.Array:
    """Sum of the next tokens' cross-entropies, times their weights if there are any."""
    tokens = batch["tokens"]
    segments = None if cross_documents else batch["segments"][:, :-1]
    total: Any = model.apply(
        variables, tokens[:, :-1], segments, tokens[:, 1:], batch.get("weights")
    )
    return total


def held_out_loss(
    model: Llama, params: Any, batches: Iterable[Any], cross_documents: bool = False
) -> dict[str, Any]:
    """Mean loss over the tokens that have a weight, and how many they are."""
    total = count = 0.0
    for batch in batches:
        losses, weights = _held_out(model, cross_documents, params, batch)
        total += float(losses)
        count += float(weights)
    return {"val_loss": total / max(count, 1.0), "val_tokens": int(count)}


@partial(jax.jit, static_argnums=(0, 1))
def _held_out(model: Llama, cross_documents: bool, params: Any, batch: Any):
    total = token_loss(model, {"params": params}, batch, cross_documents)
    return total, jnp.sum(batch["weights"])
