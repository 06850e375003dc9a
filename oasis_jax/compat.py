"""What depends on JAX's version, or on what is not public in it. Nothing else may."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def batched_linalg(function: Callable, matrices: Array) -> Any:
    """`function` of each trailing matrix of (..., m, n): batched, one by one on CPU.

    From jax 0.10 on, a batched LAPACK call on CPU waits for its parts inside the thread
    pool that has to run them. Two such calls at once, on two cores, wait for each other
    for ever. (Seen with 0.10.2: two independent `jnp.linalg.cholesky` of (4, 172, 172)
    in one jitted function.)
    """
    if matrices.ndim == 2:
        return function(matrices)
    batch = matrices.shape[:-2]

    def one_by_one(stack: Array) -> Any:
        flat = jax.lax.map(function, stack.reshape(-1, *stack.shape[-2:]))
        return jax.tree.map(lambda a: a.reshape(*batch, *a.shape[1:]), flat)

    return jax.lax.platform_dependent(matrices, cpu=one_by_one, default=function)


def saved_residuals(function: Callable, *args: Any) -> list[tuple[Any, str]]:
    """What autodiff keeps of `function(*args)` for its backward pass.

    `jax.ad_checkpoint.print_saved_residuals` as a list: the abstract value and the
    description of each. Arguments and constants are described as 'from the argument',
    'from a constant' and cost nothing extra.
    """
    from jax._src.ad_checkpoint import saved_residuals as listed

    return listed(function, *args)


@cache
def has_cudnn_attention() -> bool:
    """Whether attention of cuDNN can be traced: whether JAX's CUDA plugin is installed.

    Without it the tracing raises, though the program may never be lowered for CUDA.
    """
    a = jax.ShapeDtypeStruct((1, 8, 1, 8), jnp.bfloat16)
    kernel = partial(jax.nn.dot_product_attention, implementation="cudnn")
    try:
        jax.eval_shape(kernel, a, a, a)
    except RuntimeError:
        return False
    return True


def reuse_forward(
    vjp: Callable, replaced: Sequence[tuple[Callable[[Any], bool], Array]]
) -> Callable:
    """The result of `jax.vjp` with some of what it keeps replaced.

    A function with its own gradient kernels, whose residuals cannot be asked for, can
    thus run its forward kernel once and its backward kernel in another place: trace the
    forward again there, and replace all that it computed. Nothing then needs it. What
    is not found is computed again, so that the gradient is right either way.

    Args:
      vjp: Second result of `jax.vjp`; its leaves are its residuals.
      replaced: Pairs of what tells a residual and what to put there.
    """
    leaves, structure = jax.tree.flatten(vjp)
    for tells, value in replaced:
        leaves = [value if tells(leaf) else leaf for leaf in leaves]
    return jax.tree.unflatten(structure, leaves)


def compile_only_device(platform: str, **options: Any) -> jax.Device:
    """The first device of a machine that is not there; it can be compiled for only.

    Args:
      platform: 'cuda' or 'tpu'.
      options: As the platform's plugin knows them: `target_config` (the text of a
        `GpuTargetConfigProto`) and `topology` of a GPU, `topology_name` of a TPU.
    """
    from jax.experimental import topologies

    with _environment(_WITHOUT_TPU):
        return topologies.get_topology_desc(platform=platform, **options).devices[0]


# What libtpu reads when it is loaded.
_WITHOUT_TPU = {
    # Outside Google's cloud there is no server that knows the machine's TPUs; it would
    # be asked again and again.
    "TPU_SKIP_MDS_QUERY": "1",
    # A lock file keeps two processes from one TPU. None is opened here, and plans may
    # be made side by side, or after a process that was killed with the lock.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    """Environment variables while it lasts; those that are set already stay."""
    added = {k: v for k, v in settings.items() if k not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def lowering_for(capability: tuple[int, int] | None) -> Iterator[None]:
    """While it lasts, fused attention checks this compute capability.

    jax (0.10.2) asks the default backend instead of the one that is lowered for, so
    without a GPU it refuses packed sequences, and heads of more than 128, on a Hopper.
    It checks while it traces, so what JAX has traced for one GPU is not checked again
    for another in the same process.

    Args:
      capability: Of the GPU that is lowered for; None leaves everything as it is.
    """
    try:
        from jax._src.cudnn import fused_attention_stablehlo as fused

        asked: Any = fused.check_compute_capability
    except (ImportError, AttributeError):
        asked = None
    if capability is None or asked is None:
        yield
        return

    def at_least(wanted: str) -> bool:
        return capability >= tuple(int(part) for part in wanted.split("."))

    fused.check_compute_capability = at_least
    try:
        yield
    finally:
        fused.check_compute_capability = asked


def without_accelerators() -> None:
    """Nothing but the CPU is started from now on; what has started stays."""
    from jax._src import xla_bridge

    if not xla_bridge.backends_are_initialized():
        jax.config.update("jax_platforms", "cpu")
