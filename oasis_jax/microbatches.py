"""A batch, a part of it at a time: what is cut, and how the parts become one result."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from oasis_jax.paths import flatten_paths


class Part(NamedTuple):
    """What a microbatch, or a whole batch, gives.

    Attributes:
      counted: A tree of means over what counts, such as the loss and its gradients.
      observed: A tree of means over rows, whatever counts of them.
      weight: How much counts, a scalar; None where every row counts the same.
      aux: Anything.
    """

    counted: Any
    observed: Any = None
    weight: Any = None
    aux: Any = None


def as_mean(
    value: Any, weighted: bool = False, has_aux: bool | None = None
) -> tuple[Array, Array | None, Any]:
    """What a loss function returned, as a mean, its weight, and its aux.

    Args:
      value: The loss, or where `weighted` a total and its weight; with an aux in a pair.
      has_aux: None to find it out.

    Returns:
      The mean to be differentiated, for the weight is a constant. Of a weight of zero it
      is the total, as if that were one.

    Raises:
      ValueError: if it is weighted and no total with its scalar weight.

    Example:
      >>> as_mean((jnp.float32(6), 4), weighted=True)[:2]
      (Array(1.5, dtype=float32), Array(4., dtype=float32))
    """
    aux = None
    if has_aux is None:
        has_aux = isinstance(value[0] if weighted else value, tuple)
    if has_aux:
        value, aux = value
    if not weighted:
        return value, None, aux
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ValueError(
            "weighted: the loss function returned"
            f" {jax.tree.map(jnp.shape, value)} (shapes), expected a pair (total, weight)"
        )
    total, weight = (jnp.asarray(one) for one in value)
    if total.shape or weight.shape:
        raise ValueError(
            f"weighted: the total has shape {total.shape} and the weight {weight.shape},"
            " expected two scalars; sum them"
        )
    wide = jnp.promote_types(total.dtype, jnp.float32)
    weight = jax.lax.stop_gradient(weight.astype(wide))
    return total / _divisor(weight), weight, aux


def accumulate(once: Callable[..., Part], args: tuple, count: int) -> Part:
    """Joins what `once` gives of microbatches into what the whole batch would give.

    The leading axis of every array in `args` is cut; they must agree on it. What has no
    axis (a number, an array of rank 0) and what is no array goes to every microbatch as
    it is, but a typed PRNG key of rank 0 is folded with the microbatch's number, so that
    each draws numbers of its own.

    Args:
      once: A function of `args`.
      args: Trees of arrays, (batch, ...).
      count: Number of microbatches; of 1, `once` gets the very `args`.

    Returns:
      As `once`, with `counted` averaged by weight where there is one (zero where the whole
      weight is) and `observed` averaged, both in float32 and brought back to their
      dtypes; `weight` summed, and every `aux` stacked.

    Raises:
      ValueError: if arrays differ in their leading axis (names two of them and both
        sizes), or it does not divide into the microbatches.

    Example:
      >>> seen = lambda x, w: Part(jnp.sum(x * w) / jnp.sum(w), weight=jnp.sum(w))
      >>> accumulate(seen, (jnp.arange(4.0), jnp.array([1.0, 0, 1, 1])), 2).counted
      Array(1.6666666, dtype=float32)
    """
    if count == 1:
        return _whole(once(*args))
    _check(args, count)
    arrays, put = arrays_of(args)
    rows = [
        a.reshape(count, a.shape[0] // count, *a.shape[1:]) for a in arrays if a.ndim
    ]

    def micro(number: Any, own: list) -> Part:
        cut = iter(own)
        return once(*put([next(cut) if a.ndim else _own(a, number) for a in arrays]))

    like = jax.eval_shape(micro, 0, [a[0] for a in rows])

    def wide(leaf):
        return jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32))

    def body(total: Part, numbered: tuple):
        part = micro(*numbered)
        weight = part.weight

        def counts(t, a):
            return t + (a / count if weight is None else a * _divisor(weight))

        counted = jax.tree.map(counts, total.counted, part.counted)
        observed = jax.tree.map(
            lambda t, a: t + a / count, total.observed, part.observed
        )
        whole = None if weight is None else total.weight + weight
        return Part(counted, observed, whole), part.aux

    start = jax.tree.map(wide, like._replace(aux=None))
    total, aux = jax.lax.scan(body, start, (jnp.arange(count), rows))
    if total.weight is not None:
        divisor = _divisor(total.weight)
        counted = jax.tree.map(lambda t: t / divisor, total.counted)
        total = total._replace(counted=counted)
    total = jax.tree.map(
        lambda t, leaf: t.astype(leaf.dtype), total, like._replace(aux=None)
    )
    return _whole(total._replace(aux=aux))


def arrays_of(args: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The arrays of a tree (or their shapes), and what puts others in their places."""
    structure: Any
    leaves, structure = jax.tree.flatten(args)
    places = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "shape")]

    def put(arrays: list[Any]) -> Any:
        new = dict(enumerate(leaves)) | dict(zip(places, arrays, strict=True))
        return structure.unflatten(new.values())

    return [leaves[i] for i in places], put


def shape_of_part(leaf: Any, count: int) -> jax.ShapeDtypeStruct:
    """The shape of a microbatch's array, where that of the batch is `leaf`."""
    cut = (leaf.shape[0] // count, *leaf.shape[1:]) if leaf.shape else ()
    return jax.ShapeDtypeStruct(cut, leaf.dtype)


def _divisor(weight: Array) -> Array:
    return jnp.where(weight == 0, jnp.ones_like(weight), weight)


def _whole(part: Part) -> Part:
    """Nothing counted is nothing learnt, even where zero times it was not finite."""
    if part.weight is None:
        return part
    empty = part.weight == 0
    return part._replace(
        counted=jax.tree.map(
            lambda a: jnp.where(empty, jnp.zeros_like(a), a), part.counted
        )
    )


def _own(scalar: Any, number: Any) -> Any:
    is_key = jnp.issubdtype(scalar.dtype, jax.dtypes.prng_key)
    return jax.random.fold_in(scalar, number) if is_key else scalar


def _check(args: tuple, count: int) -> None:
    sizes = {
        path: leaf.shape[0]
        for path, leaf in flatten_paths(args).items()
        if getattr(leaf, "shape", ())
    }
    if not sizes:
        return
    (first, size), *others = sizes.items()
    for path, other in others:
        if other != size:
            raise ValueError(
                f"argument {first} has a batch of {size}, and {path} one of {other};"
                f" all arrays are cut into {count} microbatches, so let loss_fn close over"
                " what has no batch axis"
            )
    if size % count:
        raise ValueError(
            f"argument {first} has a batch of {size}, which does not divide"
            f" into {count} microbatches"
        )
