"""A label, or a number, for every example."""

import statistics
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from oasis_jax.models.bert import Bert, BertConfig
from train.objectives.metrics import metrics
from train.objectives.objective import Counted, Objective, integers


def labels(shape: BertConfig, batch: int, seq: int, slots: int) -> Objective:
    """The mean over examples of their cross-entropy, or of their squared error.

    Args:
      shape: The model; with one output it predicts a number.
      batch, seq: Rows, and tokens per row.
      slots: The most examples of a row.
    """
    model = Bert(shape)
    row, each = integers(batch, seq), integers(batch, slots)
    number = jax.ShapeDtypeStruct(each.shape, jnp.float32)
    shapes = {
        **dict.fromkeys(("tokens", "segments", "types"), row),
        "firsts": each,
        "labels": number if shape.labels == 1 else each,
        "weights": number,
    }

    def loss_fn(variables: Any, batch: Any) -> Counted:
        losses = _losses(_outputs(model, variables, batch), batch["labels"])
        weights = batch["weights"]
        return jnp.sum(losses * weights), jnp.sum(weights)

    return Objective(model, (row,), shapes, loss_fn)


def scores(
    model: Bert,
    params: Any,
    batches: Iterable[Any],
    names: Sequence[str],
    order: Sequence[int] = (),
) -> dict[str, Any]:
    """Metrics by name, their mean as `score`, and the loss, of held-out batches.

    Args:
      order: The number that the metrics have for each of the model's labels, where it
        is another: one of them, f1 say, knows which label is the positive one.
    """
    seen: list[tuple[Any, ...]] = []
    for batch in batches:
        predictions, losses = _judge(model, params, batch)
        real = batch["weights"] > 0
        rows = (predictions, batch["labels"], losses)
        seen.append(tuple(np.asarray(a)[real] for a in rows))
    predictions, right, losses = map(np.concatenate, zip(*seen, strict=True))
    if order:
        predictions, right = (np.asarray(order)[a] for a in (predictions, right))
    measured = metrics(names, predictions, right)
    return {
        "val_loss": float(losses.mean()),
        "val_examples": len(losses),
        **measured,
        "score": statistics.fmean(measured.values()),
    }


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
