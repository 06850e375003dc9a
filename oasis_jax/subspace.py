"""The inputs of a model that can be projected, and what stands for each in a collection.

The Flax collection `subspace` has one site for each input. What stands there depends on
who looks:

    Declaration   `model.init` made it: these kernels are applied to one input
    Projection    the train state keeps it: a basis that moves
    Probe         a differentiated call carries it: its cotangents are the projected
                  gradients, and what is told of the input
    Adapter       in the stead of a projection (`oasis_jax.lora`)

All of them know their `Place`, which is static, and apply kernels to the input; only a
`Probe` projects it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import jax
from jax import Array

from oasis_jax.dense import dense, projected_dense
from oasis_jax.trackers import Tracker

COLLECTION = "subspace"
"""The Flax collection; list it in `variable_axes` when scanning over layers."""

COORDINATES, FULL_SIZE = "coordinates", "full"
"""What an optimizer gets to see of a projected kernel's gradient: C, or P C."""


@dataclass(frozen=True)
class Place:
    """One input of a model, and what is decided about it. Static: hashable, no arrays.

    Attributes:
      kernels: Paths of the kernels applied to it, relative to the module that declares
        it; none where the input is that of a norm or an activation function. Once it
        is decided, those kernels only that are projected, or adapted.
      tracker: How the basis moves, or `Lora`; None where nothing is projected.
      stride: Token stride of what the tracker sees.
      gradient: `COORDINATES` or `FULL_SIZE`.
    """

    kernels: tuple[str, ...] = ()
    tracker: Tracker | None = None
    stride: int = 1
    gradient: str = COORDINATES

    @property
    def shared(self) -> bool:
        """Whether its kernels share one basis."""
        return self.tracker is None or self.tracker.shared

    def basis_of(self, basis: Any, index: int) -> Any:
        """The basis of one of the kernels: that of the place, or its own."""
        return basis if self.shared else replace(basis, salt=index)


class Site:
    """What stands in the collection for an input; a subclass is a frozen dataclass."""

    place: Place
    # Whether it does more than apply kernels: it projects their input, or adapts them.
    active: ClassVar[bool] = False

    @property
    def kernels(self) -> tuple[str, ...]:
        """As of its place."""
        return self.place.kernels

    def __call__(
        self, x: Array, kernels: Mapping[str, Array], precision=None
    ) -> tuple[Array, ...]:
        """Applies `kernels`, by path relative to the module, to `x`, (..., n_in)."""
        return tuple(dense(x, kernel, precision) for kernel in kernels.values())


def is_site(node: Any) -> bool:
    """Whether it stands for an input: where a walk over the collection ends."""
    return isinstance(node, Site)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Declaration(Site):
    """A layer's word that it applies kernels to an input, or keeps one.

    Attributes:
      place: Its kernels.
      token: Where there are no kernels, whose shapes would tell: zeros, (..., n_in), one
        token of the input, with the axes that a scan puts in front.

    Example:
      >>> layer = Declaration(Place(kernels=('kernel',)))
      >>> (y,) = layer(jnp.ones((2, 8)), {'kernel': jnp.ones((8, 3))})
      >>> y.shape
      (2, 3)
    """

    place: Place = field(default=Place(), metadata={"static": True})
    token: Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Projection(Site):
    """A basis and what moves it: what the train state keeps of a place.

    Attributes:
      place: Its kernels, tracker and stride.
      basis: P, (..., n_in, r) float32, an array or otherwise held.
      gram: Running mean of C C^T, (..., r, r) float32, where the tracker's axes need it.
    """

    place: Place = field(metadata={"static": True})
    basis: Any  # an array, or a `bases.Held`
    gram: Array | None = None

    @property
    def tracker(self) -> Tracker:
        """As of its place, where something is decided."""
        assert self.place.tracker is not None
        return self.place.tracker

    def basis_of(self, index: int) -> Any:
        """The basis of one of the kernels."""
        return self.place.basis_of(self.basis, index)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Observation:
    """What a forward pass tells of an input; a mean over its N tokens, so additive.

    Attributes:
      energy_gradient: S = X^T Z / N, (..., n_in, r) float32, or what a basis that is no
        array observes, shaped like it.
      energy: |X|^2 / N, (...) float32.
    """

    energy_gradient: Any  # as the basis is held
    energy: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Probe(Site):
    """A place in a differentiated call: zeros whose cotangents carry the gradients.

    JAX gives the cotangent of a `Probe` the same type; read it by `coordinates` and
    `observation`.

    Attributes:
      place: Its kernels and stride.
      basis: P, (..., n_in, r).
      slots: Zeros, one (..., r, n_out) float32 per kernel.
      energy: Zero, (...) float32.

    Example:
      >>> probe = Probe(
      ...     Place(('kernel',)), jnp.eye(8, 2), (jnp.zeros((2, 3)),), jnp.zeros(()))
      >>> x, kernel = jnp.ones((4, 8)), jnp.ones((8, 3))
      >>> cotangent = jax.grad(lambda p: p(x, {'kernel': kernel})[0].sum())(probe)
      >>> cotangent.coordinates[0].shape, float(cotangent.observation.energy)
      ((2, 3), 8.0)
    """

    place: Place = field(metadata={"static": True})
    basis: Any  # an array, or a `bases.Held`
    slots: tuple[Array, ...]
    energy: Array
    active: ClassVar[bool] = True

    @property
    def stride(self) -> int:
        """As of its place."""
        return self.place.stride

    @property
    def coordinates(self) -> tuple[Array, ...]:
        """Of a cotangent: C = P^T G of each kernel, (..., r, n_out) float32."""
        return self.slots

    @property
    def observation(self) -> Observation:
        """Of a cotangent: what is told of the input."""
        return Observation(self.basis, self.energy)

    def basis_of(self, index: int) -> Any:
        """The basis of one of the kernels."""
        return self.place.basis_of(self.basis, index)

    def __call__(
        self, x: Array, kernels: Mapping[str, Array], precision=None
    ) -> tuple[Array, ...]:
        """Applies `kernels` to `x`, (..., n_in); projects those of its place."""

        def projected(names, slots, basis):
            inputs = [kernels[name] for name in names]
            options: Any = dict(stride=self.stride, precision=precision)
            return projected_dense(x, inputs, slots, basis, self.energy, **options)

        if self.place.shared:
            outputs = projected(self.kernels, self.slots, self.basis)
        else:
            pairs = enumerate(zip(self.kernels, self.slots, strict=True))
            outputs = tuple(
                projected([name], [slot], self.basis_of(i))[0]
                for i, (name, slot) in pairs
            )
        by_name = dict(zip(self.kernels, outputs, strict=True))
        return tuple(
            by_name[name] if name in by_name else dense(x, kernel, precision)
            for name, kernel in kernels.items()
        )
