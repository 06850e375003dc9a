"""The next token of a text."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from oasis_jax.models.llama import Llama, LlamaConfig
from train.objectives.objective import Counted, Objective, integers


def next_token(
    shape: LlamaConfig, batch: int, seq: int, *, cross_documents: bool = False
) -> Objective:
    """The mean cross-entropy of all tokens of a row that count; see `target_weights`.

    Args:
      shape: The model.
      batch, seq: Rows, and predicted tokens per row; a row holds one more.
      cross_documents: Lets tokens attend to earlier documents in their row, and be
        predicted from them.
    """
    model = Llama(shape)

    def loss_fn(variables: Any, batch: Any) -> Counted:
        return token_loss(model, variables, batch, cross_documents)

    row = integers(batch, seq + 1)
    inputs = (integers(batch, seq),)
    return Objective(model, inputs, {"tokens": row, "segments": row}, loss_fn)


def target_weights(batch: Any, cross_documents: bool = False) -> jax.Array:
    """How much each target counts, (B, T) float32.

    A document's end token is a target, once, and its first token is none: nothing of its
    own comes before it. Padding is none either.

    Args:
      batch: As in `train.data.batches`; its `weights`, if it has any, count on top.
      cross_documents: Counts first tokens too, predicted from the document before.

    Example:
      >>> target_weights({"segments": jnp.array([[1, 1, 2, 2, 0]])}).tolist()
      [[1.0, 0.0, 1.0, 0.0]]
    """
    before, own = batch["segments"][:, :-1], batch["segments"][:, 1:]
    counts = own > 0 if cross_documents else (own > 0) & (own == before)
    weights = counts.astype(jnp.float32)
    return weights * batch["weights"] if "weights" in batch else weights


def token_loss(
    model: Llama, variables: Any, batch: Any, cross_documents: bool = False
) -> Counted:
    """Sum of the next tokens' cross-entropies times their weights, and of the weights."""
    tokens = batch["tokens"]
    segments = None if cross_documents else batch["segments"][:, :-1]
    weights = target_weights(batch, cross_documents)
    total: Any = model.apply(
        variables, tokens[:, :-1], segments, tokens[:, 1:], weights
    )
    return total, jnp.sum(weights)


def held_out_loss(
    model: Llama, params: Any, batches: Iterable[Any], cross_documents: bool = False
) -> dict[str, Any]:
    """Mean loss over the targets that count, by their weights, and how many they are."""
    total = count = 0.0
    for batch in batches:
        losses, weights = _held_out(model, cross_documents, params, batch)
        total += float(losses)
        count += float(weights)
    return {"val_loss": total / max(count, 1.0), "val_tokens": int(count)}


@partial(jax.jit, static_argnums=(0, 1))
def _held_out(model: Llama, cross_documents: bool, params: Any, batch: Any) -> Counted:
    return token_loss(model, {"params": params}, batch, cross_documents)
