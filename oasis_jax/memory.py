"""What a step needs, in bytes: counted from shapes, and as the compiler reports it."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from oasis_jax import subspace as sub
from oasis_jax.compat import saved_residuals
from oasis_jax.state import OasisTrainState


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays (or their shapes) in a tree."""
    return sum(
        int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def saved_activations(function: Callable, *args: Any) -> list[jax.core.ShapedArray]:
    """The arrays that autodiff creates and keeps for the backward pass.

    Args:
      function: Scalar-valued and differentiable in all floating-point arguments.
      args: Arrays or `ShapeDtypeStruct`s; what is kept of them is not counted, for it
        exists anyway.
    """
    return [
        aval
        for aval, where in saved_residuals(function, *args)
        if not where.startswith(("from the argument", "from a constant"))
    ]


def compiled_bytes(compiled: jax.stages.Compiled) -> int:
    """Arguments + outputs + temporaries - aliased, as the compiler reports them."""
    analysis: Any = compiled.memory_analysis()
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        + analysis.temp_size_in_bytes
        - analysis.alias_size_in_bytes
    )


def step_memory(
    state: OasisTrainState,
    loss_fn: Callable,
    *args: Any,
    compiled: jax.stages.Compiled,
    accumulate: int = 1,
) -> dict[str, int]:
    """What one train step needs, by part.

    Args:
      state, loss_fn, args, accumulate: Those of the step.
      compiled: The step, lowered and compiled with the state donated.

    Returns:
      Bytes of `weights`, `gradients`, `optimizer_state`, `bases`, `saved_activations`
      (of one microbatch), and `peak`: all that the compiled step holds, which is not
      their sum, since buffers are shared in time and scratch space is added.
    """
    micro = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(
            (a.shape[0] // accumulate, *a.shape[1:]), a.dtype
        ),
        args,
    )
    _, grads = jax.eval_shape(state.value_and_grad(_value_of(loss_fn)), *micro)

    def loss(params, probe, *args):
        return _value_of(loss_fn)({"params": params, sub.COLLECTION: probe}, *args)

    probe = jax.eval_shape(sub.probe, state.subspace, state.params)
    kept = saved_activations(loss, state.params, probe, *micro)
    return {
        "weights": tree_bytes(state.params),
        "gradients": tree_bytes(grads.params),
        "optimizer_state": tree_bytes(state.opt_state),
        "bases": tree_bytes(state.subspace),
        "saved_activations": tree_bytes(kept),
        "peak": compiled_bytes(compiled),
    }


def _value_of(loss_fn: Callable) -> Callable:
    def value(*args):
        result = loss_fn(*args)
        return result[0] if isinstance(result, tuple) else result

    return value
