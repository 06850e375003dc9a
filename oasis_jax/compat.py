"""What depends on JAX's version, or on what is not public in it. Nothing else may."""

from collections.abc import Callable
from typing import Any

import jax
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
