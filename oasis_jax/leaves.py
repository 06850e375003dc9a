"""Optax transformations that treat leaves by their paths and shapes."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from oasis_jax.paths import flatten_paths, map_with_paths


def per_leaf(
    factory: Callable[[str, tuple[int, ...]], optax.GradientTransformation],
) -> optax.GradientTransformationExtraArgs:
    """Gives every leaf a transformation of its own, made from its path and shape.

    For what cannot be known before the parameters are, such as a rank that is a share of
    a dimension. The state is a dictionary keyed by path.

    Example:
      >>> tx = per_leaf(lambda path, shape: optax.scale(shape[0]))
      >>> w = {'w': jnp.ones(3)}
      >>> tx.update(w, tx.init(w))[0]['w']
      Array([3., 3., 3.], dtype=float32)
    """

    def make(path: str, leaf: Any) -> optax.GradientTransformationExtraArgs:
        return optax.with_extra_args_support(factory(path, leaf.shape))

    def init(params):
        leaves = flatten_paths(params).items()
        return {path: make(path, leaf).init(leaf) for path, leaf in leaves}

    def update(updates, state, params=None, **extra_args):
        weights = {} if params is None else flatten_paths(params)
        done = {
            path: make(path, leaf).update(
                leaf, state[path], weights.get(path), **extra_args
            )
            for path, leaf in flatten_paths(updates).items()
        }
        new = map_with_paths(lambda path, _: done[path][0], updates)
        return new, {path: own for path, (_, own) in done.items()}

    return optax.GradientTransformationExtraArgs(init, update)


def is_matrix(path: str, shape: tuple[int, ...]) -> bool:
    """Whether a leaf is a matrix, or a stack of them.

    Two axes do not tell: the biases of scanned layers are stacked too, so Flax's names of
    vectors are known here.

    Args:
      path: As `paths.flatten_paths` writes it.
      shape: Of the leaf.

    Example:
      >>> is_matrix('head/kernel', (3, 8)), is_matrix('blocks/up_proj/bias', (3, 8))
      (True, False)
    """
    return len(shape) >= 2 and path.rpartition("/")[2] not in ("bias", "scale")


def unstacked(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Shows a transformation each layer of a stack as a leaf of its own.

    For transformations that look at the shape of a leaf, as Adafactor and
    `optax.contrib.galore` do: a leaf with axes before its last two (scanned layers)
    becomes a list of matrices, and their updates are stacked again. The state of `tx` is
    over the lists. Vectors and matrices pass as they are, stacked vectors among them.

    Example:
      >>> tx = unstacked(optax.scale_by_factored_rms(min_dim_size_to_factor=1))
      >>> [v.shape for v in tx.init({'up': jnp.ones((2, 8, 16))}).v_row['up']]
      [(8,), (8,)]
    """
    tx = optax.with_extra_args_support(tx)

    def layers(leaf):
        return leaf if leaf.ndim <= 2 else list(leaf.reshape(-1, *leaf.shape[-2:]))

    def stack(like, update):
        return update if like.ndim <= 2 else jnp.stack(update).reshape(like.shape)

    def init(params):
        return tx.init(jax.tree.map(layers, params))

    def update(updates, state, params=None, **extra_args):
        parts = None if params is None else jax.tree.map(layers, params)
        new, state = tx.update(
            jax.tree.map(layers, updates), state, parts, **extra_args
        )
        return jax.tree.map(stack, updates, new), state

    return optax.GradientTransformationExtraArgs(init, update)


def matching(pattern: str) -> Callable[[Any], Any]:
    """A mask for Optax: whether the regular expression matches a leaf's path.

    Example:
      >>> from oasis_jax import oasis_adam
      >>> kernels = matching(r"(^|/)kernel(/|$)")
      >>> kernels({"up": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}})
      {'up': {'bias': False, 'kernel': True}}
      >>> tx = oasis_adam(1e-3, weight_decay=0.1, mask=kernels)
    """
    return lambda tree: map_with_paths(
        lambda path, _: re.search(pattern, path) is not None, tree
    )


def scale_matching(pattern: str, factor: float) -> optax.GradientTransformation:
    """Multiplies the updates of the leaves whose path the regular expression matches.

    Example:
      >>> tx = scale_matching('o_proj', 0.5)
      >>> updates, _ = tx.update({'o_proj': 4.0, 'q_proj': 4.0}, tx.init(None))
      >>> updates
      {'o_proj': 2.0, 'q_proj': 4.0}
    """
    return optax.stateless(
        lambda updates, params: map_with_paths(
            lambda path, u: factor * u if re.search(pattern, path) else u, updates
        )
    )


def by_pattern(
    pattern: str, matching: optax.GradientTransformation, rest: Any
) -> optax.GradientTransformationExtraArgs:
    """One transformation for the leaves whose path the expression matches, another for
    the rest.

    Example:
      >>> tx = by_pattern('embed', optax.set_to_zero(), optax.scale(-1.0))
      >>> updates = {'embed': jnp.ones(2), 'up': jnp.ones(2)}
      >>> tx.update(updates, tx.init(updates))[0]
      {'embed': Array([0., 0.], dtype=float32), 'up': Array([-1., -1.], dtype=float32)}
    """

    def label(params: Any) -> Any:
        return map_with_paths(
            lambda path, _: "matching" if re.search(pattern, path) else "rest", params
        )

    # The rest first: what it returns may be no array (`Step`), which none looks at then.
    return optax.partition({"matching": matching, "rest": rest}, label)
