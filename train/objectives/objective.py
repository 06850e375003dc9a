"""What every objective is to a train step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Objective:
    """A model, and what it shall make small.

    Attributes:
      model: A Flax module.
      inputs: Shapes of what `model.init` takes.
      batch: Shapes of a batch, a dict.
      loss_fn: `loss_fn(variables, batch)`, a scalar, a mean over the batch.
      prepare: What is done to a whole batch before it is cut into microbatches.
    """

    model: nn.Module
    inputs: tuple[Any, ...]
    batch: dict[str, Any]
    loss_fn: Callable[[Any, Any], jax.Array]
    prepare: Callable[[Any], Any] = lambda batch: batch


def integers(*shape: int) -> jax.ShapeDtypeStruct:
    """The shape of an int32 array."""
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def weighted(batch: Any) -> Any:
    """Weights that make a mean one over what counts in the whole batch, even if cut."""
    weights = batch["weights"]
    total = jnp.maximum(jnp.sum(weights), 1.0)
    return {**batch, "weights": weights * (weights.size / total)}
