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

from oasis_jax.bounds import POSITIVE
from oasis_jax.dense import dense
from oasis_jax.subspace import Place, Site
from oasis_jax.trackers import Tracker


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapter(Site):
    """The adapters of kernels that share an input.

    Attributes:
      place: The kernels; its tracker is the `Lora` that made this.
      a: One (..., n_in, r) float32 per kernel.
      b: One (..., r, n_out) float32 per kernel, zero at first.
    """

    place: Place = field(metadata={"static": True})
    a: tuple[Array, ...]
    b: tuple[Array, ...]
    active: ClassVar[bool] = True

    @property
    def scale(self) -> float:
        """s = alpha / r."""
        assert isinstance(self.place.tracker, Lora)
        return self.place.tracker.scale(self.a[0].shape[-1])

    @classmethod
    def of(cls, place: Place, leaves: Sequence[Mapping[str, Array]]) -> "Adapter":
        """The adapters of a place, from `{"a": A, "b": B}` for each kernel."""
        a, b = (tuple(leaf[half] for leaf in leaves) for half in ("a", "b"))
        return cls(place, a, b)

    @property
    def leaves(self) -> tuple[dict[str, Array], ...]:
        """`{"a": A, "b": B}` for each kernel: what an optimizer moves."""
        return tuple({"a": a, "b": b} for a, b in zip(self.a, self.b, strict=True))

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
        if self.alpha is not None and not POSITIVE.holds(self.alpha):
            raise ValueError(f"lora: alpha is {self.alpha}, expected a positive number")

    def scale(self, rank: int) -> float:
        """s of that rank."""
        return 1.0 if self.alpha is None else self.alpha / rank

    def adapter(
        self, key: Array, place: Place, shapes: Sequence[tuple[int, ...]], rank: int
    ) -> Adapter:
        """Adapters for the place's kernels, of those shapes, (..., n_in, n_out)."""
        keys = jax.random.split(key, len(shapes))
        a, b = [], []
        for kernel_key, (*batch, n_in, n_out) in zip(keys, shapes, strict=True):
            bound = 1 / math.sqrt(n_in)
            shape = (*batch, n_in, rank)
            a.append(jax.random.uniform(kernel_key, shape, jnp.float32, -bound, bound))
            b.append(jnp.zeros((*batch, rank, n_out), jnp.float32))
        return Adapter(place, tuple(a), tuple(b))
