"""Decoupled weight decay, of all leaves or of those in a mask; it knows `Step`s."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from oasis_jax.bounds import NOT_NEGATIVE, check
from oasis_jax.lift import is_step

Mask: TypeAlias = Any | Callable[[optax.Params], Any] | None
"""Which leaves decay: a tree of booleans, or a function to one; None is all of them."""


def decay_weights(
    weight_decay: float, mask: Mask = None
) -> optax.GradientTransformation:
    """`optax.add_decayed_weights` that knows `Step`s.

    Raises:
      ValueError: if the decay makes no sense.
    """
    check("weight_decay", weight_decay, NOT_NEGATIVE)

    if weight_decay:
        return _masked(_add_weights(weight_decay), mask)
    return _masked(optax.identity(), mask)


def with_decay(
    tx: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float,
    mask: Mask = None,
) -> optax.GradientTransformation:
    """A whole optimizer, its learning rate included, with decoupled weight decay on top.

    For one that has no mask, that decays at another rate than its learning rate's, or
    that scales what it has decayed: `updates - learning_rate weight_decay weights`.

    Raises:
      ValueError: if the decay makes no sense.

    Example:
      >>> tx = with_decay(optax.sgd(0.5), 0.5, weight_decay=0.1)
      >>> params = {'w': jnp.ones(2)}
      >>> tx.update({'w': jnp.zeros(2)}, tx.init(params), params)[0]['w']
      Array([-0.05, -0.05], dtype=float32)
    """
    check("weight_decay", weight_decay, NOT_NEGATIVE)
    if not weight_decay:
        return tx
    rate: Any = learning_rate
    if callable(rate):
        decay = _add_weights(lambda count: -weight_decay * rate(count))
    else:
        decay = _add_weights(-weight_decay * rate)
    return optax.chain(tx, _masked(decay, mask))


def _add_weights(factor: Any) -> optax.GradientTransformation:
    """Adds the weights times a factor, a number or a schedule; knows `Step`s."""

    def init(params):
        del params
        if callable(factor):
            return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))
        return optax.EmptyState()

    def update(updates, state, params=None):
        amount = factor
        if callable(factor):
            amount = factor(state.count)
            state = optax.ScaleByScheduleState(optax.safe_increment(state.count))

        def leaf(update, weight):
            if is_step(update):
                return replace(update, decay=update.decay + amount)
            return update + amount * weight

        return jax.tree.map(leaf, updates, params, is_leaf=is_step), state

    return optax.GradientTransformation(init, update)


def _masked(tx: optax.GradientTransformation, mask: Any) -> Any:
    if mask is None:
        return tx
    return optax.masked(tx, _of_leaves(mask) if callable(mask) else mask)


def _of_leaves(mask: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """To the function a `Step` is one leaf, with as many axes as its kernel."""

    def plain(update):
        return update.coordinates if is_step(update) else update

    return lambda tree: mask(jax.tree.map(plain, tree, is_leaf=is_step))
