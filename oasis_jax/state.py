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
from oasis_jax.lift import is_step, lift
from oasis_jax.paths import flatten_paths, map_with_paths
from oasis_jax.select import DEFAULT_RULES, Rule, Selection, select


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
          tx: An Optax optimizer. It must lift the updates of kernels whose gradients it
            sees in coordinates, as `oasis_adam` does; with rules of full-size gradients,
            or with LoRA, any will do.
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
            opt_state=tx.init(_optimized(params, sub.probe(subspace, params))),
            diagnostics=Diagnostics(
                captured_energy=_zeros(sub.watched(subspace)),
                # Not the same arrays: all are donated.
                motion=_zeros(sub.projections(subspace), sub.COORDINATES),
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
        probe = sub.probe(self.subspace, self.params)
        # Kernels behind a slot or an adapter are closed over, not differentiated: a
        # gradient of theirs would be a dense zero array.
        stand_ins = sub.gradient_leaves(probe)
        trainable = map_with_paths(
            lambda path, leaf: None if path in stand_ins else leaf, self.params
        )

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
            params = _replace_leaves(grads, sub.gradient_leaves(observations))
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
        trained = _trained(self.params, self.subspace)
        bases = sub.bases(self.subspace, sub.COORDINATES)
        updates, opt_state = self.tx.update(
            _lifted(grads.params, self.subspace),
            self.opt_state,
            trained,
            basis=bases,
            motion=sub.by_kernel(self.subspace, motions),
        )
        finite = _all_finite((grads, subspace))
        trained = _applied(trained, updates, bases, finite)
        opt_state = _choose(finite, opt_state, self.opt_state)
        subspace = _choose(finite, subspace, self.subspace)
        params, subspace = _put_back(trained, self.params, subspace)
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
                gradient_norm=optax.tree.norm(_wide(grads.params)),
                skipped=before.skipped + skip,
                skipped_in_a_row=jnp.where(finite, 0, before.skipped_in_a_row + 1),
            ),
        )

    def warm_start(
        self, loss_fn: Callable, *args: Any, iterations: int = 4, accumulate: int = 1
    ) -> "OasisTrainState":
        """Turns the bases towards one batch's activations, before the first step.

        The forward pass does not depend on P, so each iteration is one block power
        iteration on the batch's X^T X. Only bases change.

        Args:
          loss_fn, args, accumulate: As for `value_and_grad`.
          iterations: How many; each costs a forward pass.
        """
        places = dict.fromkeys(sub.projections(self.subspace), jnp.asarray(True))
        return replace(
            self,
            subspace=self._renewed(places, iterations, loss_fn, args, accumulate),
        )

    def refresh(
        self, loss_fn: Callable, *args: Any, accumulate: int = 1
    ) -> "OasisTrainState":
        """Renews the bases that are due from this step's batch, before it is used.

        For methods whose basis comes from a whole batch every so often (PRAC, VeLoRA);
        for all others it does nothing and compiles to nothing:

            state = state.refresh(loss_fn, batch)
            loss, grads = state.value_and_grad(loss_fn)(batch)
            state = state.apply_gradients(grads)

        Args:
          loss_fn, args, accumulate: As for `value_and_grad`.
        """
        due = sub.due(self.subspace, self.step)
        if not due:
            return self
        places = sub.projections(self.subspace)
        passes = max(places[path].tracker.passes for path in due)
        subspace = jax.lax.cond(
            jnp.any(jnp.stack(list(due.values()))),
            lambda: self._renewed(due, passes, loss_fn, args, accumulate),
            lambda: self.subspace,
        )
        return replace(self, subspace=subspace)

    def _renewed(self, which, passes: int, loss_fn: Callable, args, accumulate: int):
        """The subspace after `passes` renewals of the places in `which`."""
        probe = sub.probe(self.subspace, self.params)
        key = jax.random.fold_in(jax.random.key(self.seed), self.step)

        def once(subspace):
            def observe(*micro):
                seen = jax.grad(
                    lambda seen: _value(
                        loss_fn({"params": self.params, sub.COLLECTION: seen}, *micro)
                    )
                )(map_bases(subspace, probe))
                return None, sub.forward_observations(subspace, seen)

            if accumulate == 1:
                return observe(*args)[1]
            return _accumulate(observe, args, accumulate, False)[1]

        def iterate(i, subspace):
            observations = once(subspace)
            own_key = jax.random.fold_in(key, i)
            new = sub.renew(subspace, observations, own_key, which)
            return _choose(_all_finite((observations, new)), new, subspace)

        return jax.lax.fori_loop(0, passes, iterate, self.subspace)

    def merged_params(self) -> Any:
        """The parameters of the plain model: `params`, with LoRA's adapters merged."""
        merged = {
            kernel: (adapter, i)
            for path, adapter in sub.adapters(self.subspace).items()
            for i, kernel in enumerate(sub.kernel_paths(path, adapter))
        }

        def merge(path: str, leaf: Array) -> Array:
            if path not in merged:
                return leaf
            adapter, i = merged[path]
            return adapter.merge(i, leaf)

        return map_with_paths(merge, self.params)

    def _check_lifted(self) -> None:
        """Finds an optimizer that does not lift now, not at the first step."""
        probe = sub.probe(self.subspace, self.params)
        trained = _trained(self.params, self.subspace)
        seen = _optimized(self.params, probe)
        wanted = {path: leaf.shape for path, leaf in flatten_paths(trained).items()}
        try:
            updates, _ = jax.eval_shape(
                lambda g, s, p, b: self.tx.update(g, s, p, basis=b),
                seen,
                self.opt_state,
                trained,
                sub.bases(self.subspace, sub.COORDINATES),
            )
        except TypeError:  # it added, say, a decayed weight to a projected gradient
            updates = seen
        for path, update in flatten_paths(updates, is_leaf=is_step).items():
            if not is_step(update) and update.shape != wanted[path]:
                raise ValueError(
                    f"{path}: the optimizer leaves its projected gradient of shape"
                    f" {update.shape} unlifted, for a parameter of shape {wanted[path]};"
                    " use oasis_adam, or a rule with gradient='full', or pass rules=()"
                    " to project nothing"
                )


def map_bases(subspace: Any, probe: Any) -> Any:
    """The probe with the subspace's bases."""
    return sub.map_projections(
        lambda _, p, zeros: replace(zeros, basis=p.basis), subspace, probe
    )


def _zeros(places: dict[str, Any], gradient: str | None = None) -> dict[str, Array]:
    return {
        path: jnp.zeros(p.basis.shape[:-2])
        for path, p in places.items()
        if gradient in (None, p.gradient)
    }


def _replace_leaves(params: Any, leaves: dict[str, Any]) -> Any:
    """The tree of `params` with the leaves at some paths replaced."""
    return map_with_paths(
        lambda path, leaf: leaves.get(path, leaf),
        params,
        is_leaf=lambda leaf: leaf is None,
    )


def _optimized(params: Any, probe: Any) -> Any:
    """The tree of what the optimizer moves: parameters, coordinates, adapters.

    Of a kernel whose gradient it sees in coordinates that is the slot; of an adapted one
    `{"a": A, "b": B}`; else the parameter.
    """
    lifted = sub.bases(probe, sub.FULL_SIZE)
    leaves = sub.gradient_leaves(probe)
    return _replace_leaves(
        params, {path: leaf for path, leaf in leaves.items() if path not in lifted}
    )


def _trained(params: Any, subspace: Any) -> Any:
    """The parameters as the optimizer sees them: adapters in place of their kernels."""
    return _replace_leaves(params, sub.gradient_leaves(sub.only_adapters(subspace)))


def _lifted(grads: Any, subspace: Any) -> Any:
    """The gradients with P C where the optimizer wants them at full size."""
    projected = sub.bases(subspace, sub.FULL_SIZE)
    return map_with_paths(
        lambda path, leaf: lift(projected[path], leaf) if path in projected else leaf,
        grads,
    )


def _applied(trained: Any, updates: Any, bases: dict[str, Any], when: Array) -> Any:
    """The parameters after their updates, or as they were."""

    def leaf(path: str, update: Any, weight: Array) -> Array:
        if is_step(update):
            return update.applied(weight, bases[path], when)
        return jnp.where(when, optax.apply_updates(weight, update), weight)

    return map_with_paths(leaf, updates, trained, is_leaf=is_step)


def _put_back(trained: Any, params: Any, subspace: Any) -> tuple[Any, Any]:
    """Undoes `_trained`: adapters go to the subspace, their kernels stay as they were."""
    adapted = sub.gradient_leaves(sub.only_adapters(subspace))
    leaves = {}

    def kernel(path: str, old: Array, new: Any) -> Array:
        if path not in adapted:
            return new
        leaves[path] = new
        return old

    params = map_with_paths(kernel, params, trained)
    return params, sub.put_adapters(subspace, leaves)


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


def _wide(tree: Any) -> Any:
    """In float32, so that the state keeps its dtypes when weights are bfloat16."""
    return optax.tree.cast(tree, jnp.float32)


def _choose(condition: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def _all_finite(tree: Any) -> Array:
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(leaves)) if leaves else jnp.asarray(True)
