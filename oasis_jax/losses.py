"""Cross-entropy of a linear head, whose logits never exist all at once.

The logits of a language model, tokens x vocabulary, outweigh everything else that a
small one keeps. Here they are made and consumed a chunk of tokens at a time. A loss is a
single number, so that its cotangent merely scales the gradients: they are computed along
with the loss, chunk by chunk, and kept instead of the logits, which are computed once.

Shape suffixes: R rows, C tokens of a row in a chunk, V vocabulary.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from oasis_jax.chunks import Chunks, chunks
from oasis_jax.dense import dense, observe, project
from oasis_jax.lora import Adapter
from oasis_jax.subspace import Probe, Site


class _Options(NamedTuple):
    """What is static about one call."""

    chunk: int
    transposed: bool
    stride: int
    precision: lax.PrecisionLike


def chunked_cross_entropy(
    x: Array,
    kernel: Array,
    targets: Array,
    weights: Array,
    *,
    projection: Site | None = None,
    chunk: int = 2048,
    transposed: bool = False,
    precision: lax.PrecisionLike = None,
) -> Array:
    """Weighted sum of the cross-entropies of `softmax(x W)`, in nats.

        loss = sum over tokens t of weights_t (log sum_v exp(x_t W)_v - (x_t W)_targets_t)

    Kept for the backward pass, with D = weights (softmax(x W) - one-hot) a chunk at a
    time, are the gradients themselves:

        x       D W^T     (..., n) in the dtype of x
        W       x^T D     its shape and dtype, added up in float32; or, projected,
        slot    Z^T D     (r, V) float32, and basis and energy as of `projected_dense`

    `weights` are constants and get no gradient; neither does a projected kernel.
    Meanwhile a few arrays (chunk, V) float32 exist. Not to be wrapped in
    `jax.checkpoint`, which would compute it all twice and save nothing.

    Args:
      x: Hidden states, (..., n); its dtype is that of the products, whose results are
        float32.
      kernel: W, (n, V), any float dtype; cast to that of x.
      targets: (...) int32 in [0, V); where the weight is zero, anything.
      weights: (...) float32.
      projection: What stands in the kernel's place. Of a `Probe` the input is projected;
        an adapter is applied, at the price of a copy of the kernel; else nothing changes.
      chunk: Tokens at a time, at most. It need not divide their number.
      transposed: Whether kernel is W^T, (V, n), as an embedding is.
      precision: As in `jax.lax.dot_general`.

    Returns:
      () float32. Divide by the sum of the weights for a mean.

    Raises:
      ValueError: if shapes do not fit together; the message names both.
      TypeError: if the slot is not float32.

    Example:
      >>> x, kernel = jnp.ones((2, 3, 8)), jnp.zeros((8, 5))
      >>> targets, weights = jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 3))
      >>> loss = chunked_cross_entropy(x, kernel, targets, weights, chunk=2)
      >>> round(float(jnp.exp(loss / 6)), 3)
      5.0

    Source: gradients in the forward pass as in Liger Kernel's fused linear
    cross-entropy (arXiv 2410.10989); with a projected gradient, ours.
    """
    if isinstance(projection, Adapter):
        x, kernel = _adapt(projection, x, kernel, transposed, precision)
    _check(x, kernel, targets, weights, chunk, transposed)
    slot = basis = energy = None
    stride = 1
    if isinstance(projection, Probe):
        _check_probe(projection, x, kernel, transposed)
        stride, basis = projection.stride, projection.basis_of(0)
        (slot,), energy = projection.slots, projection.energy
    options = _Options(chunk, transposed, stride, precision)
    return _loss(options, x, kernel, targets, weights, slot, basis, energy)


def _check(x, kernel, targets, weights, chunk, transposed) -> None:
    if chunk < 1:
        raise ValueError(
            f"chunked_cross_entropy: chunk is {chunk}, expected at least 1 token"
        )
    n = x.shape[-1] if x.ndim else "n"
    if kernel.ndim != 2 or kernel.shape[int(transposed)] != n:
        expected = f"(vocabulary, {n})" if transposed else f"({n}, vocabulary)"
        raise ValueError(
            f"chunked_cross_entropy: kernel has shape {kernel.shape}, expected"
            f" {expected} for x of shape {x.shape}"
        )
    for name, a in {"targets": targets, "weights": weights}.items():
        if a.shape != x.shape[:-1]:
            raise ValueError(
                f"chunked_cross_entropy: {name} have shape {a.shape}, expected"
                f" {x.shape[:-1]} for x of shape {x.shape}"
            )


def _check_probe(projection: Probe, x, kernel, transposed) -> None:
    if len(projection.slots) != 1:
        raise ValueError(
            "chunked_cross_entropy: projection is that of"
            f" {len(projection.slots)} kernels, expected 1"
        )
    (slot,), basis = projection.slots, projection.basis
    if basis.ndim != 2 or basis.shape[0] != x.shape[-1]:
        raise ValueError(
            f"chunked_cross_entropy: basis has shape {basis.shape}, expected"
            f" ({x.shape[-1]}, rank) for x of shape {x.shape}"
        )
    expected = (basis.shape[1], kernel.shape[int(not transposed)])
    if slot.shape != expected:
        raise ValueError(
            f"chunked_cross_entropy: slot has shape {slot.shape}, expected {expected}"
            f" for rank {basis.shape[1]} and kernel {kernel.shape}"
        )
    if slot.dtype != jnp.float32:
        raise TypeError(f"chunked_cross_entropy: slot is {slot.dtype}, not float32")


def _adapt(adapter: Adapter, x, kernel, transposed, precision) -> tuple[Array, Array]:
    """x and W with s x A and B beside them: their product is s x A B more."""
    (a,), (b,) = adapter.a, adapter.b
    more = jnp.asarray(adapter.scale, x.dtype) * dense(x, a, precision)
    b = (b.T if transposed else b).astype(x.dtype)
    kernel = jnp.concatenate([kernel.astype(x.dtype), b], axis=int(transposed))
    return jnp.concatenate([x, more], axis=-1), kernel


# --- A chunk --------------------------------------------------------------------------


def _split(tokens: tuple[int, ...], chunk: int) -> tuple[int, Chunks]:
    """How many rows of tokens there are, and how each is cut.

    Every row is in every chunk, so that rows spread over devices stay where they are.
    """
    rows, length = math.prod(tokens[:-1]), math.prod(tokens[-1:])
    if rows > chunk:
        rows, length = 1, rows * length
    return rows, chunks(length, chunk // rows)


def _product(a: Array, b: Array, axes: tuple, precision, dtype=jnp.float32) -> Array:
    return lax.dot_general(
        a, b, (axes, ((), ())), precision, preferred_element_type=dtype
    )


def _chunk_losses(options: _Options, x, kernel, targets, weights):
    """Losses (R, C), logits (R, C, V) and their log-sum-exp, all float32."""
    axes = (2,), (int(options.transposed),)
    logits = _product(x, kernel, axes, options.precision)
    lse = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    own = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    # What has no weight may have a target that does not exist.
    losses = jnp.where(weights == 0, 0, weights * (lse - own)[..., 0])
    return losses, logits, lse


def _walk(
    options: _Options, body: Callable, initial: Any, x, kernel, targets, weights
) -> Any:
    """Carries `body(carry, i, split, x, kernel, targets, weights)` over the chunks."""
    rows, split = _split(targets.shape, options.chunk)
    x, targets, weights = (
        a.reshape(rows, split.total, *a.shape[targets.ndim :])
        for a in (x, targets, weights.astype(jnp.float32))
    )
    kernel = kernel.astype(x.dtype)

    def step(carry, i):
        own_weights = jnp.where(split.fresh(i), split.take(weights, i), 0)
        own = split.take(x, i), kernel, split.take(targets, i), own_weights
        return body(carry, i, split, *own), None

    return lax.scan(step, initial(rows, split), jnp.arange(split.pieces))[0]


# --- The sum --------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(options, x, kernel, targets, weights, slot, basis, energy):
    del slot, basis, energy  # they exist for their cotangents

    def body(total, i, split, *own):
        return total + jnp.sum(_chunk_losses(options, *own)[0])

    return _walk(options, body, lambda *_: jnp.zeros(()), x, kernel, targets, weights)


def _forward(options, x, kernel, targets, weights, slot, basis, energy):
    del energy
    n, precision = x.shape[-1], options.precision
    observed = coefficients = None
    if slot is not None:
        coefficients = project(x, basis, precision)
        # Of all tokens at once, so that they are counted as `projected_dense` does.
        observed = observe(x, coefficients, basis, options.stride, precision)

    def initial(rows, split):
        total, dx = jnp.zeros(()), jnp.zeros((rows, split.total, n), x.dtype)
        like = kernel if slot is None else slot
        return total, dx, jnp.zeros(like.shape, jnp.float32)

    def body(carry, i, split, x, kernel, targets, weights):
        total, dx, gradient = carry
        losses, logits, lse = _chunk_losses(options, x, kernel, targets, weights)
        hit = targets[..., None] == lax.broadcasted_iota(jnp.int32, logits.shape, 2)
        dlogits = weights[..., None] * (jnp.exp(logits - lse) - hit)
        # As autodiff has it after a product in the dtype of x.
        dlogits = dlogits.astype(x.dtype)
        vocabulary = int(not options.transposed)
        own_dx = _product(
            dlogits, kernel, ((2,), (vocabulary,)), precision, dtype=x.dtype
        )
        left, right = x, dlogits
        if coefficients is not None:
            left = split.take(coefficients.reshape(*dx.shape[:2], -1), i)
        elif options.transposed:
            left, right = dlogits, x
        gradient += _product(left, right, ((0, 1), (0, 1)), precision)
        return total + jnp.sum(losses), split.add(dx, own_dx, i), gradient

    total, dx, gradient = _walk(options, body, initial, x, kernel, targets, weights)
    if slot is None:
        gradient = gradient.astype(kernel.dtype)
    return total, (dx.reshape(x.shape), gradient, observed)


def _backward(options, residuals, scale):
    del options
    dx, gradient, observed = residuals
    # The product in float32, which scale is.
    dx, gradient = ((scale * a).astype(a.dtype) for a in (dx, gradient))
    if observed is None:
        return dx, gradient, None, None, None, None, None
    return dx, None, None, None, gradient, *observed


_loss.defvjp(_forward, _backward)
