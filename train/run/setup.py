"""From a model and its objective to a first state and a compiled train step."""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from oasis_jax.leaves import by_pattern, matching
from oasis_jax.methods import method
from oasis_jax.paths import flatten_paths, map_with_paths
from oasis_jax.seeds import narrow
from oasis_jax.select import Selection, select
from oasis_jax.state import OasisTrainState
from train.errors import UserError
from train.objectives.objective import Counted, Objective
from train.options import Training

VOCABULARY = r"(^|/)(embed/(word/)?embedding$|lm_head/)"
"""The parameters that have a row per token of the vocabulary, and their moments."""


@dataclass(frozen=True)
class Setup:
    """What the options describe, built but not yet compiled.

    Attributes:
      objective: The model, and what it shall make small.
      selection: What is projected.
      state: The first one, or its shapes.
      schedule: The learning rate, by steps done.
    """

    objective: Objective
    selection: Selection
    state: OasisTrainState
    schedule: optax.Schedule


def set_up(
    config: Training,
    objective: Objective,
    schedule: optax.Schedule,
    *,
    params: Any = None,
    abstract: bool = False,
) -> Setup:
    """Selects what is projected, and makes the optimizer and a first state.

    Args:
      objective: Of the run.
      schedule: Of the learning rate.
      params: To start from; drawn by the seed if None.
      abstract: Give the state's shapes only; nothing is computed or allocated.

    Raises:
      UserError: if the method, the rank or the pattern make no sense, or nothing decays
        that should.
    """
    model = objective.model
    init = partial(model.init, jax.random.key(narrow(config.seed)))
    try:
        recipe = config.recipe()
        shapes = jax.eval_shape(init, *objective.inputs)
        # Decided on shapes, so that a wrong rank is found before anything is compiled.
        selection = select(shapes["params"], shapes["subspace"], recipe.rules)
        adam = dict(b1=config.b1, b2=config.b2)
        decay: Any = dict(weight_decay=config.weight_decay, mask=matching(config.decay))
        tx = recipe.optimizer(schedule, peak=config.lr, **adam, **decay)
        if config.embeddings != "adamw":
            adafactor = method("adafactor").optimizer
            other = {
                "adafactor": partial(adafactor, schedule, **decay),
                "frozen": optax.set_to_zero,
            }
            tx = by_pattern(VOCABULARY, other[config.embeddings](), tx)
        create = partial(
            OasisTrainState.create,
            apply_fn=model.apply,
            tx=optax.chain(optax.clip_by_global_norm(config.clip), tx),
            rules=selection,
            seed=config.seed,
        )
        if abstract or config.weight_decay:
            state = jax.eval_shape(lambda p: create(params=p), shapes["params"])
            _check_decay(config, state)
        if not abstract:
            if params is None:

                def first() -> Any:
                    # Under jit, the initial tokens are never made.
                    zeros = [jnp.zeros(a.shape, a.dtype) for a in objective.inputs]
                    return init(*zeros)["params"]

                params = jax.jit(first)()
            state = create(params=params)
    except ValueError as error:
        raise UserError(str(error)) from None
    if config.embeddings == "frozen":
        objective = replace(objective, loss_fn=_frozen(objective.loss_fn))
    return Setup(objective, selection, state, schedule)


def decaying(config: Training, state: OasisTrainState) -> dict[str, Any]:
    """The parameters that decay, by path: those of the trained that --decay matches."""
    frozen = config.embeddings == "frozen"
    return {
        path: leaf
        for path, leaf in flatten_paths(state.trained).items()
        if re.search(config.decay, path)
        and not (frozen and re.search(VOCABULARY, path))
    }


def _check_decay(config: Training, state: OasisTrainState) -> None:
    if config.weight_decay and not decaying(config, state):
        paths = [*flatten_paths(state.trained)]
        near = difflib.get_close_matches(config.decay, paths, n=3, cutoff=0.0)
        raise UserError(
            f"--decay {config.decay} matches no parameter that is trained, and"
            f" --weight-decay is {config.weight_decay:g}; the nearest are"
            f" {', '.join(near)}"
        )


def _frozen(loss_fn: Callable) -> Callable:
    """The loss, of which the vocabulary's gradients are known to be zero."""

    def stopped(path: str, leaf: jax.Array) -> jax.Array:
        return jax.lax.stop_gradient(leaf) if re.search(VOCABULARY, path) else leaf

    def loss(variables: Any, batch: Any) -> Counted:
        params = map_with_paths(stopped, variables["params"])
        return loss_fn(variables | {"params": params}, batch)

    return loss


def train_step(setup: Setup, accumulate: int) -> Callable:
    """One step, `(state, batch) -> (state, loss)`, not yet jitted."""
    loss_fn = setup.objective.loss_fn
    how: Any = dict(accumulate=accumulate, weighted=True)

    def step(state: OasisTrainState, batch: Any):
        state = state.refresh(loss_fn, batch, **how)
        loss, grads = state.value_and_grad(loss_fn, **how)(batch)
        return state.apply_gradients(grads), loss

    return step


def compiled_step(setup: Setup, state: OasisTrainState, accumulate: int) -> Any:
    """The train step, compiled once and for all, with the state donated."""
    jitted = jax.jit(train_step(setup, accumulate), donate_argnums=0)
    return jitted.lower(state, setup.objective.batch).compile()


def warm_start(setup: Setup, batch: Any) -> OasisTrainState:
    """The first state, its bases turned towards a batch."""
    loss_fn = setup.objective.loss_fn

    def start(state: OasisTrainState, batch: Any) -> OasisTrainState:
        return state.warm_start(loss_fn, batch, weighted=True)

    return jax.jit(start)(setup.state, batch)
