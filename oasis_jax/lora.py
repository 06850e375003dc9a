"""LoRA: frozen kernels with trained low-rank adapters, as a place in the subspace tree.

Where OASIS's projection changes what is kept and leaves the function as it is, an adapter
changes the function: `Y = X W + s (X A) B`. It stands where a projection would stand, so
the same models and rules serve both; the train state updates A and B and leaves W.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from oasis_jax.dense import dense
from oasis_jax.trackers import Tracker


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapter:
    """The adapters of kernels that share an input.

    Attributes:
      kernels: Their paths, relative to the module.
      scale: s = alpha / r.
      a: One (..., n_in, r) float32 per kernel.
      b: One (..., r, n_out) float32 per kernel, zero at first.
    """

    kernels: tuple[str, ...] = field(metadata={"static": True})
    scale: float = field(metadata={"static": True})
    a: tuple[Array, ...]
    b: tuple[Array, ...]

    # It has no basis and no slots that come and go.
    basis: ClassVar[None] = None

    @property
    def slots(self) -> tuple[Array, ...]:
        return self.b

    def __call__(
        self, x: Array, kernels: Mapping[str, Array], precision=None
    ) -> tuple[Array, ...]:
        """Applies `kernels` (by relative path) to `x`, adapted where there is one."""

        def apply(name: str, kernel: Array) -> Array:
            if name not in self.kernels:
                return dense(x, kernel, precision)
            i = self.kernels.index(name)
            coefficients = dense(x, self.a[i], precision)
            update = dense(coefficients, self.b[i], precision)
            # Not behind stop_gradient, which would copy the kernel into the residuals;
            # the train state does not differentiate it.
            scale = jnp.asarray(self.scale, x.dtype)
            return dense(x, kernel, precision) + scale * update

        return tuple(apply(name, kernel) for name, kernel in kernels.items())

    def merge(self, index: int, kernel: Array) -> Array:
        """W + s A B, in the dtype of W."""
        update = jnp.matmul(self.a[index], self.b[index])
        return (kernel + self.scale * update).astype(kernel.dtype)


@dataclass(frozen=True)
class Lora(Tracker):
    """In a rule, in the place of a tracker: adapts the kernels that it matches.

    Attributes:
      alpha: s = alpha / r; None makes s = 1 at any rank.

    Example:
      >>> from oasis_jax import Rule
      >>> Rule("q_proj|v_proj", rank=8, tracker=Lora(alpha=16)).rank
      8

    Source: LoRA (arXiv 2106.09685); A is drawn as PEFT draws it, uniform within
    1 / sqrt(n_in).
    """

    alpha: float | None = None
    name: ClassVar[str] = "lora"

    def __post_init__(self):
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"lora: alpha is {self.alpha}, expected a positive number")

    def adapter(
        self,
        key: Array,
        kernels: Sequence[str],
        shapes: Sequence[tuple[int, ...]],
        rank: int,
    ) -> Adapter:
        """Adapters for kernels of those shapes, (..., n_in, n_out)."""
        keys = jax.random.split(key, len(kernels))
        a, b = [], []
        for own_key, (*batch, n_in, n_out) in zip(keys, shapes, strict=True):
            bound = 1 / math.sqrt(n_in)
            shape = (*batch, n_in, rank)
            a.append(jax.random.uniform(own_key, shape, jnp.float32, -bound, bound))
            b.append(jnp.zeros((*batch, rank, n_out), jnp.float32))
        alpha = rank if self.alpha is None else self.alpha
        return Adapter(tuple(kernels), alpha / rank, tuple(a), tuple(b))
