"""The train state: parameters, bases and optimizer state as one pytree.

    loss, grads = state.value_and_grad(loss_fn)(batch)
    state = state.apply_gradients(grads)

One step uses one P for everything: the gradient's coordinates, Adam, the lift. Then P
moves, once, and the moments are carried along.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from oasis_jax import subspace as sub
from oasis_jax.paths import flatten_paths, map_with_paths
from oasis_jax.select import DEFAULT_RULES, Rule, Selection, select
from oasis_jax.trackers import WARM_START


class Gradients(NamedTuple):
    """What one differentiated call sends back.

    Attributes:
      params: Shaped like the parameters, but a projected kernel's leaf is the
        coordinates of its gradient, (..., r, n_out) float32.
      observations: Shaped like the subspace; each basis is the energy gradient S.
    """

    params: Any
    observations: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Diagnostics:
    """What the last step saw, at the price of no extra pass.

    Attributes:
      captured_energy: |XP|^2 / |X|^2 by projection, (...) float32 each.
      motion: 1 - |R|_F^2 / r by projection, (...) float32 each.
      gradient_norm: Global norm of the gradients, projected ones in coordinates.
      skipped: Updates skipped so far because something was not finite, int32.
      skipped_in_a_row: How many of them just now, int32.
    """

    captured_energy: dict[str, Array]
    motion: dict[str, Array]
    gradient_norm: Array
    skipped: Array
    skipped_in_a_row: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OasisTrainState:
    """Everything that training moves; like Flax's `TrainState`, plus the subspace.

    Attributes:
      step: Batches consumed, int32 scalar.
      params: Exactly the tree of the same model built with plain layers.
      subspace: The bases; empty where nothing is projected.
      opt_state: The optimizer's.
      diagnostics: Of the last step.
      seed: Of the trackers' randomness, uint32 scalar.
      apply_fn, tx: Static.

    Example:
      >>> import flax.linen as nn
      >>> from oasis_jax import OasisTrainState, oasis_adam
      >>> from oasis_jax.linen import OasisDense
      >>> model = nn.Sequential([OasisDense(32), nn.gelu, OasisDense(1)])
      >>> x, y = jnp.ones((4, 16)), jnp.ones((4, 1))
      >>> state = OasisTrainState.create(
      ...     apply_fn=model.apply, **model.init(jax.random.key(0), x),
      ...     tx=optax.chain(optax.clip_by_global_norm(1.0), oasis_adam(3e-3)))
      >>> def loss_fn(variables, x, y):
      ...     return jnp.mean((state.apply_fn(variables, x) - y) ** 2)
      >>> loss, grads = state.value_and_grad(loss_fn)(x, y)
      >>> state = state.apply_gradients(grads)
      >>> int(state.step)
      1
    """

    step: Array
    params: Any
    subspace: Any
    opt_state: Any
    diagnostics: Diagnostics
    seed: Array
    apply_fn: Callable = field(metadata={"static": True})
    tx: optax.GradientTransformationExtraArgs = field(metadata={"static": True})

    @classmethod
    def create(
        cls,
        *,
        apply_fn: Callable,
        params: Any,
        tx: optax.GradientTransformation,
        subspace: Any = None,
        rules: Sequence[Rule] | Selection = DEFAULT_RULES,
        seed: int = 0,
    ) -> "OasisTrainState":
        """A first state.

        Args:
          apply_fn: Usually `model.apply`.
          params, subspace: As `model.init` returned them; the latter says which
            layers can be projected.
          tx: An Optax optimizer. With projected kernels it must lift their updates,
            as `oasis_adam` does.
          rules: Which kernels, which rank; or a `Selection` made of them. `()` projects
            nothing.
          seed: For the bases.

        Raises:
          ValueError: as `select` does; or if `tx` returns updates that do not have
            the parameters' shapes (names the first such path and both shapes).
        """
        if not isinstance(rules, Selection):
            rules = select(params, {} if subspace is None else subspace, rules)
        subspace = rules.init(jax.random.key(seed))
        tx = optax.with_extra_args_support(tx)
        state = cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            subspace=subspace,
            opt_state=tx.init(_slots_in_place(params, sub.probe(subspace, params))),
            diagnostics=Diagnostics(
                captured_energy=_zeros(subspace),
                motion=_zeros(subspace),  # not the same arrays: all are donated
                gradient_norm=jnp.zeros(()),
                skipped=jnp.zeros((), jnp.int32),
                skipped_in_a_row=jnp.zeros((), jnp.int32),
            ),
            seed=jnp.asarray(seed, jnp.uint32),
            apply_fn=apply_fn,
            tx=tx,
        )
        state._check_lifted()
        return state

    def value_and_grad(
        self, loss_fn: Callable, *, has_aux: bool = False, accumulate: int = 1
    ) -> Callable:
        """Like `jax.value_and_grad(loss_fn)`, with projected gradients.

        Args:
          loss_fn: `loss_fn(variables, *args)`, where `variables` holds the collections
            `params` and `subspace`, ready for `apply_fn(variables, ...)`. A mean over
            the batch.
          has_aux: Whether it returns `(loss, aux)`.
          accumulate: Number of microbatches into which the leading axis of every
            array in `args` is cut. Losses and gradients are averaged in float32, so the
            result is that of the whole batch; `aux` comes back stacked.

        Returns:
          A function of `*args` that returns `(loss, Gradients)`, or
          `((loss, aux), Gradients)`.

        Raises:
          ValueError: if a batch does not divide into the microbatches.
        """
        if accumulate < 1:
            raise ValueError(f"accumulate is {accumulate}, expected at least 1")
        projected = sub.bases(self.subspace)
        # The kernels behind a slot are closed over, not differentiated: a gradient of
        # theirs would be a dense zero array.
        trainable = map_with_paths(
            lambda path, leaf: None if path in projected else leaf, self.params
        )
        probe = sub.probe(self.subspace, self.params)

        def differentiated(trainable, probe, *args):
            params = jax.tree.map(
                lambda leaf, kernel: kernel if leaf is None else leaf,
                trainable,
                self.params,
                is_leaf=lambda leaf: leaf is None,
            )
            return loss_fn({"params": params, sub.COLLECTION: probe}, *args)

        grad_fn = jax.value_and_grad(differentiated, argnums=(0, 1), has_aux=has_aux)

        def once(*args):
            value, (grads, observations) = grad_fn(trainable, probe, *args)
            params = _slots_in_place(grads, observations)
            return value, Gradients(params, observations)

        if accumulate == 1:
            return once
        return lambda *args: _accumulate(once, args, accumulate, has_aux)

    def apply_gradients(self, grads: Gradients) -> "OasisTrainState":
        """One optimizer step, then one move of the bases.

        Where anything in `grads` is not finite, parameters, moments and bases stay as
        they are, bit for bit, and the skip is counted in `diagnostics`; `step` counts
        the batch all the same.

        Raises:
          TypeError: if `grads` does not come from `value_and_grad`.
        """
        if not isinstance(grads, Gradients):
            raise TypeError(
                "projected kernels need the Gradients of this package's own"
                f" value_and_grad, not {type(grads).__name__}"
            )
        key = jax.random.fold_in(jax.random.key(self.seed), self.step)
        subspace, motions = sub.advance(
            self.subspace, grads.observations, self.step, key
        )
        updates, opt_state = self.tx.update(
            grads.params,
            self.opt_state,
            self.params,
            basis=sub.bases(self.subspace),
            motion=sub.by_kernel(self.subspace, motions),
        )
        finite = _all_finite((grads, subspace))
        new = (optax.apply_updates(self.params, updates), subspace, opt_state)
        old = (self.params, self.subspace, self.opt_state)
        params, subspace, opt_state = _choose(finite, new, old)
        before = self.diagnostics
        skip = jnp.where(finite, 0, 1)
        return replace(
            self,
            step=self.step + 1,
            params=params,
            subspace=subspace,
            opt_state=opt_state,
            diagnostics=Diagnostics(
                captured_energy=sub.captured_energy(self.subspace, grads.observations),
                motion=sub.moved_share(motions),
                gradient_norm=optax.tree.norm(grads.params),
                skipped=before.skipped + skip,
                skipped_in_a_row=jnp.where(finite, 0, before.skipped_in_a_row + 1),
            ),
        )

    def warm_start(
        self, loss_fn: Callable, *args: Any, iterations: int = 4
    ) -> "OasisTrainState":
        """Turns the bases towards one batch's activations, before the first step.

        The forward pass does not depend on P, so each iteration is one block power
        iteration on the batch's X^T X. Only bases change.

        Args:
          loss_fn, args: As for `value_and_grad`.
          iterations: How many; each costs a forward pass.
        """
        probe = sub.probe(self.subspace, self.params)

        def iterate(_, subspace):
            seen = map_bases(subspace, probe)
            observations = jax.grad(
                lambda seen: _value(
                    loss_fn({"params": self.params, sub.COLLECTION: seen}, *args)
                )
            )(seen)
            key = jax.random.key(self.seed)
            new, _ = sub.advance(subspace, observations, WARM_START, key)
            return _choose(_all_finite((observations, new)), new, subspace)

        return replace(
            self, subspace=jax.lax.fori_loop(0, iterations, iterate, self.subspace)
        )

    def _check_lifted(self) -> None:
        """Finds an optimizer that does not lift now, not at the first step."""
        grads = _slots_in_place(self.params, sub.probe(self.subspace, self.params))
        projected = sub.bases(self.subspace)
        wanted = {path: leaf.shape for path, leaf in flatten_paths(self.params).items()}
        try:
            updates, _ = jax.eval_shape(
                lambda g, s, p, b: self.tx.update(g, s, p, basis=b),
                grads,
                self.opt_state,
                self.params,
                projected,
            )
        except TypeError:  # it added, say, a decayed weight to a projected gradient
            updates = grads
        for path, update in flatten_paths(updates).items():
            if update.shape != wanted[path]:
                raise ValueError(
                    f"{path}: the optimizer leaves its projected gradient of shape"
                    f" {update.shape} unlifted, for a parameter of shape {wanted[path]};"
                    " use oasis_adam, or pass rules=() to project nothing"
                )


def map_bases(subspace: Any, probe: Any) -> Any:
    """The probe with the subspace's bases."""
    return sub.map_projections(
        lambda _, p, zeros: replace(zeros, basis=p.basis), subspace, probe
    )


def _zeros(subspace: Any) -> dict[str, Array]:
    places = sub.projections(subspace)
    return {path: jnp.zeros(p.basis.shape[:-2]) for path, p in places.items()}


def _slots_in_place(params: Any, probe: Any) -> Any:
    """The tree of `params` with every projected kernel's leaf replaced by its slot."""
    slots: dict[str, Any] = {}
    for path, p in sub.projections(probe).items():
        slots.update(zip(sub.kernel_paths(path, p), p.slots, strict=True))
    return map_with_paths(
        lambda path, leaf: slots.get(path, leaf),
        params,
        is_leaf=lambda leaf: leaf is None,
    )


def _accumulate(once: Callable, args: tuple, count: int, has_aux: bool):
    """Averages `once` over microbatches cut from the leading axis of `args`."""
    for path, leaf in flatten_paths(args).items():
        if leaf.shape[0] % count:
            raise ValueError(
                f"argument {path} has a batch of {leaf.shape[0]}, which does not divide"
                f" into {count} microbatches"
            )
    cut = jax.tree.map(lambda a: a.reshape(count, -1, *a.shape[1:]), args)
    shapes = jax.eval_shape(once, *jax.tree.map(lambda a: a[0], cut))
    (loss_shape, grad_shapes) = shapes
    loss_shape = loss_shape[0] if has_aux else loss_shape

    def wide(leaf):
        return jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32))

    def body(total, micro):
        value, grads = once(*micro)
        loss, aux = value if has_aux else (value, None)
        return jax.tree.map(lambda t, g: t + g / count, total, (loss, grads)), aux

    total, aux = jax.lax.scan(body, jax.tree.map(wide, (loss_shape, grad_shapes)), cut)
    loss, grads = jax.tree.map(
        lambda t, like: t.astype(like.dtype), total, (loss_shape, grad_shapes)
    )
    return ((loss, aux) if has_aux else loss), grads


def _value(result: Any) -> Array:
    return result[0] if isinstance(result, tuple) else result


def _choose(condition: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def _all_finite(tree: Any) -> Array:
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(leaves)) if leaves else jnp.asarray(True)
