"""What every objective is to a train step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Counted = tuple[jax.Array, jax.Array]
"""A sum of losses, each times its weight, and the sum of the weights."""


@dataclass(frozen=True)
class Objective:
    """A model, and what it shall make small.

    Attributes:
      model: A Flax module.
      inputs: Shapes of what `model.init` takes.
      batch: Shapes of a batch, a dict.
      loss_fn: `loss_fn(variables, batch)`, the total and the weight of what counts in the
        batch: weighted, as `OasisTrainState.value_and_grad` has it.
    """

    model: nn.Module
    inputs: tuple[Any, ...]
    batch: dict[str, Any]
    loss_fn: Callable[[Any, Any], Counted]


def integers(*shape: int) -> jax.ShapeDtypeStruct:
    """The shape of an int32 array."""
    return jax.ShapeDtypeStruct(shape, jnp.int32)
