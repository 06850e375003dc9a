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

from oasis_jax.advance import advance, due, renew
from oasis_jax.diagnostics import Diagnostics, captured_energy, moved_share
from oasis_jax.layout import ADAPTER, Layout
from oasis_jax.microbatches import Part, as_mean
from oasis_jax.microbatches import accumulate as accumulated
from oasis_jax.seeds import narrow
from oasis_jax.select import DEFAULT_RULES, Rule, Selection, select
from oasis_jax.subspace import COORDINATES, Observation, Probe, Projection
from oasis_jax.updates import applied, as_seen, at_full_size, check_lifted


class Gradients(NamedTuple):
    """What one differentiated call sends back.

    Attributes:
      params: Shaped like the parameters, but a projected kernel's leaf is the
        coordinates of its gradient, (..., r, n_out) float32, and an adapted one's the
        gradients of its adapter, `{"a": dA, "b": dB}`.
      observations: What was told of the projected inputs, by site.
    """

    params: Any
    observations: dict[str, Observation]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OasisTrainState:
    """Everything that training moves; like Flax's `TrainState`, plus the bases.

    Attributes:
      step: Batches consumed, int32 scalar.
      trained: What the optimizer moves: the tree of the parameters, in which an adapted
        kernel is its adapter, `{"a": A, "b": B}`.
      frozen: The kernels behind adapters, by path.
      bases: The bases, by site; empty where nothing is projected.
      opt_state: The optimizer's.
      diagnostics: Of the last step.
      seed: Of the trackers' randomness, uint32 scalar.
      apply_fn, tx: Static.
      layout: Static: how these trees hang together.

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
    trained: Any
    frozen: dict[str, Array]
    bases: dict[str, Projection]
    opt_state: Any
    diagnostics: Diagnostics
    seed: Array
    apply_fn: Callable = field(metadata={"static": True})
    tx: optax.GradientTransformationExtraArgs = field(metadata={"static": True})
    layout: Layout = field(metadata={"static": True})

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
          seed: For the bases; of up to 64 bits.

        Raises:
          ValueError: as `select` does; or if `tx` returns updates that do not have
            the parameters' shapes (names the first such path and both shapes).
        """
        if not isinstance(rules, Selection):
            rules = select(params, {} if subspace is None else subspace, rules)
        layout, seed = rules.layout(params), narrow(seed)
        sites = rules.init(jax.random.key(seed))
        trained, frozen, bases = layout.part(params, sites)
        tx = optax.with_extra_args_support(tx)
        seen = as_seen(layout, trained, bases)
        opt_state = tx.init(seen)
        check_lifted(layout, tx, seen, opt_state, trained, bases)
        return cls(
            step=jnp.zeros((), jnp.int32),
            trained=trained,
            frozen=frozen,
            bases=bases,
            opt_state=opt_state,
            diagnostics=Diagnostics.first(bases),
            seed=jnp.asarray(seed, jnp.uint32),
            apply_fn=apply_fn,
            tx=tx,
            layout=layout,
        )

    # --- The model's view -------------------------------------------------------------

    @property
    def params(self) -> Any:
        """Exactly the tree of the same model built with plain layers."""
        return self.layout.params.join(self._weights | self.frozen)

    @property
    def subspace(self) -> Any:
        """The collection `subspace`: bases, and adapters, each in its module's place."""
        return self.layout.collection(self._weights, self.bases)

    @property
    def probed(self) -> Any:
        """The collection `subspace` as a differentiated call carries it."""
        return self.layout.collection(self._weights, self._probes)

    def with_variables(self, params: Any, subspace: Any) -> "OasisTrainState":
        """The state with other parameters, bases and adapters.

        Args:
          params, subspace: Of the shapes of the properties of these names.
        """
        sites = self.layout.sites.split(subspace)
        trained, frozen, bases = self.layout.part(params, sites)
        return replace(self, trained=trained, frozen=frozen, bases=bases)

    def merged_params(self) -> Any:
        """The parameters of the plain model: `params`, with LoRA's adapters merged."""
        weights = self._weights
        adapters = self.layout.adapters(weights)
        merged = {
            kernel.path: adapters[kernel.site].merge(
                kernel.index, self.frozen[kernel.path]
            )
            for kernel in self.layout.of_form(ADAPTER)
        }
        return self.layout.params.join(weights | merged)

    @property
    def _weights(self) -> dict[str, Any]:
        """What the optimizer moves, by path."""
        return self.layout.params.split(self.trained)

    @property
    def _probes(self) -> dict[str, Probe]:
        return self.layout.probes(self.bases, self._weights)

    # --- One step ---------------------------------------------------------------------

    def value_and_grad(
        self,
        loss_fn: Callable,
        *,
        has_aux: bool = False,
        accumulate: int = 1,
        weighted: bool = False,
    ) -> Callable:
        """Like `jax.value_and_grad(loss_fn)`, with projected gradients.

        Args:
          loss_fn: `loss_fn(variables, *args)`, where `variables` holds the collections
            `params` and `subspace`, ready for `apply_fn(variables, ...)`. A mean over
            the rows of the batch, all of which count the same; else see `weighted`.
          has_aux: Whether it returns `(loss, aux)`.
          accumulate: Number of microbatches into which the leading axis of every array
            in `args` is cut. Losses and gradients are averaged in float32, so the result
            is that of the whole batch; `aux` comes back stacked. What has no axis goes
            to each whole, but a typed PRNG key is folded with its number.
          weighted: Whether `loss_fn` returns, in place of a mean, `(total, weight)`: a
            sum over what counts (tokens that are no padding, say), and their count or
            sum of weights, a constant. Loss and gradients are those of the sum of totals
            over the sum of weights, however unevenly microbatches share what counts (a
            mean of their means is another loss), and zero if nothing does. Observations
            stay means over all rows.

        Returns:
          A function of `*args` that returns `(loss, Gradients)`, or
          `((loss, aux), Gradients)`.

        Raises:
          ValueError: as `microbatches.accumulate` and `microbatches.as_mean` do.
        """
        if accumulate < 1:
            raise ValueError(f"accumulate is {accumulate}, expected at least 1")
        layout, weights = self.layout, self._weights
        # Kernels behind a slot or an adapter are closed over, not differentiated: a
        # gradient of theirs would be a dense zero array.
        slotted = layout.bases(self.bases)
        free = {path: leaf for path, leaf in weights.items() if path not in slotted}

        def differentiated(free, probes, *args):
            variables = layout.variables(weights | free, self.frozen, probes)
            loss, weight, aux = as_mean(loss_fn(variables, *args), weighted, has_aux)
            return loss, (weight, aux)

        grad_fn = jax.value_and_grad(differentiated, argnums=(0, 1), has_aux=True)

        def once(*args) -> Part:
            (loss, (weight, aux)), (grads, seen) = grad_fn(free, self._probes, *args)
            coordinates = {path: probe.coordinates for path, probe in seen.items()}
            params = layout.params.join(grads | layout.by_kernel(coordinates))
            observations = {path: probe.observation for path, probe in seen.items()}
            return Part((loss, params), observations, weight, aux)

        def value_and_gradients(*args):
            (loss, params), seen, _, aux = accumulated(once, args, accumulate)
            return ((loss, aux) if has_aux else loss), Gradients(params, seen)

        return value_and_gradients

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
        layout, lifts = self.layout, self.layout.bases(self.bases, COORDINATES)
        # The tracker first, for the moments want to know how P will have moved; all
        # else is done with the P that the gradient was taken with.
        bases, motions = advance(
            self.bases,
            grads.observations,
            layout.by_site(layout.params.split(grads.params)),
            self.step,
            self._key,
        )
        updates, opt_state = self.tx.update(
            at_full_size(layout, grads.params, self.bases),
            self.opt_state,
            self.trained,
            basis=lifts,
            motion=layout.by_kernel(motions),
        )
        finite = _all_finite((grads, bases))
        # So that the state keeps its dtypes when weights are bfloat16.
        wide = optax.tree.cast(grads.params, jnp.float32)
        return replace(
            self,
            step=self.step + 1,
            trained=applied(layout, self.trained, updates, lifts, finite),
            bases=_choose(finite, bases, self.bases),
            opt_state=_choose(finite, opt_state, self.opt_state),
            diagnostics=self.diagnostics.after(
                finite,
                captured_energy=captured_energy(self.bases, grads.observations),
                motion=moved_share(motions),
                gradient_norm=optax.tree.norm(wide),
            ),
        )

    @property
    def _key(self) -> Array:
        """Of this step's randomness."""
        return jax.random.fold_in(jax.random.key(self.seed), self.step)

    # --- From a whole batch -----------------------------------------------------------

    def warm_start(
        self,
        loss_fn: Callable,
        *args: Any,
        iterations: int = 4,
        accumulate: int = 1,
        weighted: bool = False,
    ) -> "OasisTrainState":
        """Turns the bases towards one batch's activations, before the first step.

        The forward pass does not depend on P, so each iteration is one block power
        iteration on the batch's X^T X. Only bases change.

        Args:
          loss_fn, args, accumulate, weighted: As for `value_and_grad`.
          iterations: How many; each costs a forward pass.
        """
        every = dict.fromkeys(self.bases, jnp.asarray(True))
        bases = self._renewed(every, iterations, loss_fn, args, accumulate, weighted)
        return replace(self, bases=bases)

    def refresh(
        self,
        loss_fn: Callable,
        *args: Any,
        accumulate: int = 1,
        weighted: bool = False,
    ) -> "OasisTrainState":
        """Renews the bases that are due from this step's batch, before it is used.

        For methods whose basis comes from a whole batch every so often (PRAC, VeLoRA);
        for all others it does nothing and compiles to nothing:

            state = state.refresh(loss_fn, batch)
            loss, grads = state.value_and_grad(loss_fn)(batch)
            state = state.apply_gradients(grads)

        Args:
          loss_fn, args, accumulate, weighted: As for `value_and_grad`.
        """
        which = due(self.bases, self.step)
        if not which:
            return self
        passes = max(self.bases[path].tracker.passes for path in which)
        how = (accumulate, weighted)
        bases = jax.lax.cond(
            jnp.any(jnp.stack(list(which.values()))),
            lambda: self._renewed(which, passes, loss_fn, args, *how),
            lambda: self.bases,
        )
        return replace(self, bases=bases)

    def _renewed(self, which, passes: int, loss_fn, args, accumulate, weighted):
        """The bases after `passes` renewals of those in `which`."""
        layout, weights, probes = self.layout, self._weights, self._probes

        def loss(probes, *args):
            variables = layout.variables(weights, self.frozen, probes)
            mean, weight, _ = as_mean(loss_fn(variables, *args), weighted)
            return mean, weight

        def iterate(i, bases):
            here = {p: replace(probes[p], basis=b.basis) for p, b in bases.items()}
            # Where no basis is turned towards the coordinates they are left out. What
            # stays then comes of the forward pass alone, so that the compiler drops the
            # backward.
            turned = [path for path, p in bases.items() if p.gram is not None]

            def observe(*micro) -> Part:
                seen, weight = jax.grad(loss, has_aux=True)(here, *micro)
                observations = {path: probe.observation for path, probe in seen.items()}
                coordinates = {path: seen[path].coordinates for path in turned}
                return Part(coordinates, observations, weight)

            seen = accumulated(observe, args, accumulate)
            key = jax.random.fold_in(self._key, i)
            new = renew(bases, seen.observed, seen.counted, key, which)
            return _choose(_all_finite((seen, new)), new, bases)

        return jax.lax.fori_loop(0, passes, iterate, self.bases)

    # --- Checkpoints ------------------------------------------------------------------

    def former_paths(self) -> dict[str, str]:
        """As of its layout; `Checkpoints.restore` asks for it."""
        return self.layout.former_paths(self.bases)


def _choose(condition: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def _all_finite(tree: Any) -> Array:
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(leaves)) if leaves else jnp.asarray(True)
