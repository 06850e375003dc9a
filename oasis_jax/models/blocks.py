"""A stack of equal blocks: scanned, with levels of recomputation.

Recomputation (`remat`) never changes the parameters. Each level keeps of a block its
input, and what has these names (`oasis_jax.residuals`):

    none          everything that autodiff wants to keep
    elementwise   coefficients, observed, qkv, attention, middle, gate_up: all that a matrix
                  product or attention made; norms, activation functions and the rotary
                  embedding are recomputed
    mlp           observed, qkv, attention: what costs most to make again, a byte
    block         nothing
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax import Array

from oasis_jax.models.cache import Cache, Past
from oasis_jax.residuals import (
    ATTENTION,
    COEFFICIENTS,
    GATE_UP,
    MIDDLE,
    OBSERVED,
    QKV,
    WIDTHS,
    narrow,
    policy,
)
from oasis_jax.subspace import COLLECTION

KEPT: dict[str, tuple[str, ...] | None] = {
    "none": None,
    "elementwise": (COEFFICIENTS, OBSERVED, QKV, ATTENTION, MIDDLE, GATE_UP),
    "mlp": (OBSERVED, QKV, ATTENTION),
    "block": (),
}
"""What each level of recomputation keeps, by name; None is everything."""

REMAT = tuple(KEPT)

_NAME = "blocks"


def check_kept(remat: str, residuals: str) -> None:
    """Whether a configuration's two options on what is kept make sense.

    Raises:
      ValueError: if one does not; lists those that do.
    """
    for name, value, known in (
        ("remat", remat, REMAT),
        ("residuals", residuals, WIDTHS),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}, expected one of {known}")


def check_length(tokens: Array, positions: int | None) -> None:
    """Whether a model of so many positions takes such rows; None is no bound.

    Raises:
      ValueError: if not; the message names both numbers.
    """
    if positions is not None and tokens.shape[-1] > positions:
        raise ValueError(
            f"a sequence has {tokens.shape[-1]} tokens, and the model only"
            f" {positions} positions"
        )


def blocks(
    module: nn.Module, block: Callable[..., nn.Module], x: Array, segments: Array | None
) -> Array:
    """Applies a stack of blocks, whose parameters have a leading axis of layers.

    Call it in a compact method; the stack is the submodule `blocks`.

    Args:
      module: The calling module; its `config` has `layers`, `remat` and `residuals`.
      block: A module's class; `block(config)(x, segments)` returns `(x, None)`.
      x: Input, (B, T, D).
      segments: (B, T) int32, as in `oasis_jax.attention`, or None.

    Returns:
      (B, T, D).
    """
    config = _config(module)
    if module.is_initializing():
        scanned = nn.scan(
            block,
            variable_axes={"params": 0, COLLECTION: 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=config.layers,
        )
        return scanned(config, name=_NAME)(x, segments)[0]
    # A function of arrays, so that any transformation of JAX goes around it, and no
    # name of a scope depends on which.
    layer = _layer(block, config)
    x, _ = jax.lax.scan(
        lambda x, variables: (layer(variables, x, segments), None), x, _stacked(module)
    )
    return x


def advance_blocks(
    module: nn.Module, block: Callable[..., nn.Module], x: Array, past: Past
) -> tuple[Array, Cache]:
    """Applies a stack of blocks after a cache; not for training.

    Args:
      module, x: As for `blocks`.
      block: `block(config)(x, None, past)` returns `(x, cache)`.
      past: The cache of all layers, and where each row's tokens begin.

    Returns:
      (B, T, D), and the cache with the new tokens.
    """
    cache, start = past
    layer: Any = block(_config(module), parent=None)
    return jax.lax.scan(
        lambda x, own: layer.apply(own[0], x, None, (own[1], start)),
        x,
        (_stacked(module), cache),
    )


def _config(module: nn.Module) -> Any:
    return getattr(module, "config")  # noqa: B009 (nn.Module does not declare it)


def _stacked(module: nn.Module) -> dict[str, Any]:
    """The variables of the stack, by collection."""
    return {
        name: collection[_NAME]
        for name, collection in module.variables.items()
        if _NAME in collection
    }


def _layer(block: Callable[..., nn.Module], config: Any) -> Callable[..., Array]:
    """A block as a function of its variables and its input."""

    def layer(variables: Any, x: Array, segments: Array | None) -> Array:
        result: Any = block(config, parent=None).apply(variables, x, segments)
        return result[0]

    names = KEPT[config.remat]
    if names is not None:
        # Inside a scan there is nothing to eliminate, and the barrier costs time.
        layer = jax.checkpoint(layer, policy=policy(names), prevent_cse=False)
    return narrow(layer, config.residuals)
