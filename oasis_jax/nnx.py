"""Flax NNX: a drop-in for `nnx.Linear` and an `nnx.Optimizer` that keeps the bases.

model = Model(rngs=nnx.Rngs(0))                          # built with OasisLinear
optimizer = OasisOptimizer(model, oasis_adam(3e-3), rules=[Rule("mlp", rank=0.25)])

@nnx.jit
def train_step(model, optimizer, x, y):
    def loss_fn(model, x, y):
        return jnp.mean((model(x) - y) ** 2)
    loss, grads = optimizer.value_and_grad(loss_fn)(model, x, y)
    optimizer.update(model, grads)
    return loss
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import optax
from flax import nnx
from flax.nnx.nn.dtypes import canonicalize_dtype
from jax import Array, lax

from oasis_jax.select import DEFAULT_RULES, Rule, Selection
from oasis_jax.state import Diagnostics, Gradients, OasisTrainState
from oasis_jax.subspace import COLLECTION, Declaration, Place


class Subspace(nnx.Variable):
    """Holds what stands for a layer's input: declared at first, a basis once selected."""


class OasisLinear(nnx.Linear):
    """`nnx.Linear` whose kernel can be projected; the same arguments.

    A layer with its own `dot_general` cannot be projected and does not declare itself.

    Example:
      >>> layer = OasisLinear(3, 5, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 3))).shape
      (2, 5)
    """

    def __init__(self, in_features: int, out_features: int, **options: Any):
        super().__init__(in_features, out_features, **options)
        kernels = ("kernel",) if self.dot_general is lax.dot_general else ()
        self.projection = Subspace(Declaration(Place(kernels)))

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """Maps (..., in_features) to (..., out_features)."""
        projection = self.projection.get_value()
        if not projection.active:
            return super().__call__(inputs, out_sharding)
        kernel = self.kernel[...]
        bias = None if self.bias is None else self.bias[...]
        dtype = canonicalize_dtype(inputs, kernel, bias, dtype=self.dtype)
        (y,) = projection(inputs.astype(dtype), {"kernel": kernel}, self.precision)
        return y if bias is None else y + bias.astype(dtype)


class OasisOptimizer(nnx.Optimizer):
    """`nnx.Optimizer` for models with projected layers.

    The bases live in the model, where its forward pass needs them; moments and
    counters live here.

    Args:
      model: Its `OasisLinear` layers get a basis where a rule says so.
      tx: An Optax optimizer that lifts, such as `oasis_adam`, or a chain with one.
      rules: Which kernels, which rank.
      wrt: What is trained.
      seed: For the bases.

    Raises:
      ValueError: as `OasisTrainState.create` does.

    Example:
      >>> from oasis_jax import oasis_adam
      >>> model = OasisLinear(8, 1, rngs=nnx.Rngs(0))
      >>> optimizer = OasisOptimizer(model, optax.chain(oasis_adam(1e-2)))
      >>> loss_fn = lambda model, x: jnp.mean(model(x) ** 2)
      >>> loss, grads = optimizer.value_and_grad(loss_fn)(model, jnp.ones((4, 8)))
      >>> optimizer.update(model, grads)
      >>> int(optimizer.diagnostics.skipped)
      0
    """

    def __init__(
        self,
        model: nnx.Module,
        tx: optax.GradientTransformation,
        *,
        rules: Sequence[Rule] | Selection = DEFAULT_RULES,
        wrt: Any = nnx.Param,
        seed: int = 0,
    ):
        state = OasisTrainState.create(
            apply_fn=_no_apply,
            params=_pure(model, wrt),
            subspace=_pure(model, Subspace),
            tx=tx,
            rules=rules,
            seed=seed,
        )
        self.wrt = wrt
        self.tx = state.tx
        self.state = nnx.Variable(_without_variables(state))
        _put(model, Subspace, state.subspace)

    @property
    def diagnostics(self) -> Diagnostics:
        """Of the last step."""
        return self.state.get_value().diagnostics

    def value_and_grad(self, loss_fn: Callable, *, has_aux: bool = False) -> Callable:
        """Like `nnx.value_and_grad(loss_fn)`, with projected gradients.

        Args:
          loss_fn: `loss_fn(model, *args)`; what it changes in the model besides the
            trained parameters (statistics, counters) is kept.
          has_aux: Whether it returns `(loss, aux)`.

        Returns:
          A function of `(model, *args)` that returns `(loss, Gradients)`, or
          `((loss, aux), Gradients)`.
        """

        def differentiated(model: nnx.Module, *args: Any):
            pure_loss, rest = self._pure(model, loss_fn, has_aux)
            grad_fn = self._whole(model).value_and_grad(pure_loss, has_aux=True)
            (loss, (aux, rest)), grads = grad_fn(rest, *args)
            nnx.update(model, rest)
            return ((loss, aux) if has_aux else loss), grads

        return differentiated

    def refresh(self, model: nnx.Module, loss_fn: Callable, *args: Any) -> None:
        """Renews the bases that are due from this step's batch, in place.

        As `OasisTrainState.refresh` does; call it before `value_and_grad` for methods
        such as PRAC and VeLoRA. What `loss_fn` changes in the model is not kept.

        Args:
          loss_fn: `loss_fn(model, *args)`, the loss or `(loss, aux)`.
        """
        pure_loss, rest = self._pure(model, loss_fn, has_aux=None)
        state = self._whole(model).refresh(pure_loss, rest, *args)
        _put(model, Subspace, state.subspace)

    def _pure(
        self, model: nnx.Module, loss_fn: Callable, has_aux: bool | None
    ) -> tuple[Callable, Any]:
        """`loss_fn` of variables and the model's other state, and that state.

        It returns `(loss, (aux, other state))`, for `has_aux=None` whatever `loss_fn` does.
        """
        graph, params, subspace, rest = self._split(model)

        def pure_loss(variables: Any, rest: Any, *args: Any):
            inner = nnx.merge(
                graph,
                _filled(params, variables["params"]),
                _filled(subspace, variables[COLLECTION]),
                rest,
                copy=True,
            )
            result = loss_fn(inner, *args)
            if has_aux is None:
                return result
            loss, aux = result if has_aux else (result, None)
            return loss, (aux, self._split(inner)[-1])

        return pure_loss, rest

    def update(  # type: ignore[override]
        self, model: nnx.Module, grads: Gradients, /
    ) -> None:
        """One optimizer step, then one move of the bases, both in place.

        Raises:
          TypeError: as `OasisTrainState.apply_gradients` does.
        """
        state = self._whole(model).apply_gradients(grads)
        _put(model, self.wrt, state.params)
        _put(model, Subspace, state.subspace)
        self.state.set_value(_without_variables(state))

    def _split(self, model: nnx.Module) -> Any:
        return nnx.split(model, self.wrt, Subspace, ...)

    def _whole(self, model: nnx.Module) -> OasisTrainState:
        return self.state.get_value().with_variables(
            _pure(model, self.wrt), _pure(model, Subspace)
        )


def _without_variables(state: OasisTrainState) -> OasisTrainState:
    """What the state holds beyond the model."""
    return replace(state, trained=None, frozen={}, bases={})


def _no_apply(*args: Any, **kwargs: Any):
    raise TypeError("an NNX model is called, not applied")


def _pure(model: nnx.Module, kind: Any) -> dict[Any, Any]:
    """The raw values of one kind of variable as nested dictionaries."""
    return nnx.to_pure_dict(nnx.state(model, kind))


def _filled(state: nnx.State, values: Any) -> nnx.State:
    """A copy of `state` with other raw values."""
    filled = jax.tree.map(lambda leaf: leaf, state)
    nnx.replace_by_pure_dict(filled, values)
    return filled


def _put(model: nnx.Module, kind: Any, values: Any) -> None:
    nnx.update(model, _filled(nnx.state(model, kind), values))
