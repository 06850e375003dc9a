"""What a step needs, in bytes: counted from shapes, and as the compiler reports it."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from oasis_jax.compat import lowering_for, saved_residuals
from oasis_jax.microbatches import arrays_of, as_mean, shape_of_part
from oasis_jax.planning import targets
from oasis_jax.state import OasisTrainState
from oasis_jax.subspace import COLLECTION


class PlanError(RuntimeError):
    """A step that does not compile; the message is one sentence, naming its target."""


@dataclass(frozen=True)
class Plan:
    """What one device needs for a step, in bytes, as its compiler reports it.

    Attributes:
      peak_bytes: Arguments + outputs + temporaries - aliased.
      argument_bytes, output_bytes: What goes in and what comes out.
      temporary_bytes: All that lives in between: gradients, saved activations, scratch.
      alias_bytes: Outputs that take the place of donated arguments.
      refused: Whether the compiler gave up because the device has less; then
        `peak_bytes` is what it said to need, and the temporaries are what that leaves.
    """

    peak_bytes: int
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    alias_bytes: int
    refused: bool = False


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
    return _reported(compiled).peak_bytes


def _reported(compiled: jax.stages.Compiled) -> Plan:
    analysis: Any = compiled.memory_analysis()
    arguments = analysis.argument_size_in_bytes
    outputs = analysis.output_size_in_bytes
    temporaries = analysis.temp_size_in_bytes
    aliased = analysis.alias_size_in_bytes
    peak = arguments + outputs + temporaries - aliased
    return Plan(peak, arguments, outputs, temporaries, aliased)


def plan(
    step: Callable,
    *shapes: Any,
    target: str = "cpu",
    donate: Sequence[int] = (0,),
    name: str = "step",
) -> Plan:
    """What a step would need on a device, found by compiling it: nothing is run.

        peak = arguments + outputs + temporaries - aliased

    Args:
      step: Any function of arrays. One that is jitted already keeps its own donations.
      shapes: Its arguments: trees of `ShapeDtypeStruct`s, or of arrays, of which only
        shape and dtype matter.
      target: The device: a key of `oasis_jax.planning.targets.TARGETS`, or a TPU's slice.
      donate: Which arguments may be overwritten.
      name: What errors call the step.

    Returns:
      A `Plan`. Where a TPU's compiler refuses a step that is too large, but says how
      much it needs, that is its peak, and it is marked as `refused`.

    Raises:
      TargetError: if there is no such target, or its compiler is not installed.
      PlanError: if the step does not compile; the first line says what and why.

    Example:
      >>> import jax.numpy as jnp
      >>> weights = jax.ShapeDtypeStruct((256, 256), jnp.float32)
      >>> plan(lambda w: w - 0.1 * (w @ w), weights).argument_bytes
      262144
    """
    chosen = targets.find(target)
    sharding = jax.sharding.SingleDeviceSharding(targets.device(chosen))
    placed = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        jax.eval_shape(lambda *args: args, *shapes),
    )
    jitted: Any = step
    if not hasattr(step, "lower"):
        jitted = jax.jit(step, donate_argnums=tuple(donate))
    try:
        with lowering_for(chosen.capability):
            lowered = jitted.lower(*placed)
        return _reported(lowered.compile())
    except Exception as error:  # a compiler's, a library's: all mean the same here
        if not _REFUSAL.search(str(error)):
            raise PlanError(f"{name} on {target}: {_reason(error)}") from error
        message = str(error)
    inputs = tree_bytes(placed)
    outputs = tree_bytes(lowered.out_info)
    aliased = min(outputs, sum(tree_bytes(placed[i]) for i in donate))
    return _refused(message, inputs, outputs, aliased)


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_REFUSAL = re.compile(
    r"Used (?P<all>[\d.]+)(?P<unit>[KMGT]?) of [\d.]+[KMGT]? hbm"
    r"|HLO temporaries \((?P<temporaries>[\d.]+)(?P<own>[KMGT]?)\) exceeds"
)


def _refused(message: str, inputs: int, outputs: int, aliased: int) -> Plan:
    """What a TPU's compiler says that the step needs; the rest as counted.

    >>> said = "Ran out of memory in memory space hbm. Used 1.50G of 1.00G hbm."
    >>> _refused(said, 2**29, 2**29, 2**29).temporary_bytes == 2**30
    True
    """
    resident = inputs + outputs - aliased
    found: Any = _REFUSAL.search(message)
    if found["all"]:
        peak = round(float(found["all"]) * _UNITS[found["unit"]])
    else:
        peak = resident + round(float(found["temporaries"]) * _UNITS[found["own"]])
    temporary = max(0, peak - resident)
    return Plan(peak, inputs, outputs, temporary, aliased, refused=True)


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def step_memory(
    state: OasisTrainState,
    loss_fn: Callable,
    *args: Any,
    compiled: jax.stages.Compiled,
    accumulate: int = 1,
    weighted: bool = False,
) -> dict[str, int]:
    """What one train step needs, by part.

    Args:
      state, loss_fn, args, accumulate, weighted: Those of the step.
      compiled: The step, lowered and compiled with the state donated.

    Returns:
      What `step_parts` counts, and `peak`: all that the compiled step holds, which is
      not their sum, since buffers are shared in time and scratch space is added.
    """
    how: Any = dict(accumulate=accumulate, weighted=weighted)
    counted = step_parts(state, loss_fn, *args, **how)
    return counted | {"peak": compiled_bytes(compiled)}


def step_parts(
    state: OasisTrainState,
    loss_fn: Callable,
    *args: Any,
    accumulate: int = 1,
    weighted: bool = False,
) -> dict[str, int]:
    """The parts of one train step, counted; nothing is compiled.

    Args:
      state, loss_fn, args, accumulate, weighted: Those of the step; shapes are enough.

    Returns:
      Bytes of `weights`, `gradients`, `optimizer_state`, `bases` and
      `saved_activations` (of one microbatch).
    """
    arrays, put = arrays_of(args)
    micro = [shape_of_part(leaf, accumulate) for leaf in arrays]

    def mean(variables, *own):
        return as_mean(loss_fn(variables, *put([*own])), weighted)[0]

    _, grads = jax.eval_shape(
        # The state is an argument, for it may itself be shapes only.
        lambda state, *micro: state.value_and_grad(mean)(*micro),
        state,
        *micro,
    )

    def loss(params, probe, *own):
        return mean({"params": params, COLLECTION: probe}, *own)

    params, probed = jax.eval_shape(lambda state: (state.params, state.probed), state)
    kept = saved_activations(loss, params, probed, *micro)
    return {
        "weights": tree_bytes(state.params),
        "gradients": tree_bytes(grads.params),
        "optimizer_state": tree_bytes(state.opt_state),
        "bases": tree_bytes(state.subspace),
        "saved_activations": tree_bytes(kept),
    }
