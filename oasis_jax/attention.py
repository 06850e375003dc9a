"""Attention that never holds its scores, and keeps one number per query for each head.

    S = q k^T / sqrt(E),   L = log sum exp S,   out = exp(S - L) v

Kept for the backward pass are the inputs, `out` and `L`, (B, H, T) float32, whatever
computes it: cuDNN's kernels where the program is lowered for CUDA, chunks of queries
elsewhere. The choice falls in the lowering, so that a program can be compiled for a
machine that is not here. Both are one function with one backward rule, for autodiff
would make a choice between two keep what either of them keeps.

`out` and `L` have the name `residuals.ATTENTION`: inside `jax.checkpoint`, a policy that
keeps it recomputes q, k and v alone.

Shape suffixes: B batch, T tokens, H query heads, K key/value heads, E head size;
G = H / K heads share a key, C queries are in a chunk.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from oasis_jax.chunks import Chunks, chunks
from oasis_jax.compat import has_cudnn_attention, reuse_forward
from oasis_jax.residuals import ATTENTION, keep

IMPLEMENTATIONS = ("cudnn", "blockwise", "xla")


class _Options(NamedTuple):
    """What is static about one call."""

    implementation: str | None
    causal: bool
    chunk: int


def attention(
    q: Array,
    k: Array,
    v: Array,
    segments: Array | None = None,
    *,
    causal: bool = True,
    chunk: int = 128,
    implementation: str | None = None,
) -> Array:
    """Softmax attention of grouped queries, within packed documents.

    `out = softmax(q k^T / sqrt(E)) v` with the softmax in float32.

    What each implementation costs beyond q, k, v and the gradients, in elements:

        blockwise   kept: out, and B H T float32. Meanwhile some B H chunk T float32.
                    Computes what causality masks, too.
        cudnn       the same is kept, no scores. With segments it needs a bias, B T^2
                    of the dtype: not kept, but built in both passes, and the backward
                    pass also writes its gradient, another B T^2.
        xla         B H T^2 float32 several times over, of which autodiff keeps most.

    Differentiable once, in reverse, except 'xla'.

    Args:
      q: (B, T, H, E), float32, bfloat16 or float16.
      k, v: (B, T, K, E) of the same dtype, where K divides H.
      segments: (B, T) int32, the number of the packed document that each token belongs
        to; tokens attend within their document only. None means one document.
      causal: Whether a token attends to itself and earlier ones only.
      chunk: Queries at a time, at most; of 'blockwise'. It need not divide T.
      implementation: One of `IMPLEMENTATIONS`. None takes 'cudnn' where the program is
        lowered for CUDA, if dtype and head size allow it and JAX's CUDA plugin is
        installed, and else 'blockwise'.

    Returns:
      (B, T, H, E) in the dtype of q.

    Raises:
      ValueError: if shapes do not fit together, or cuDNN was asked for and cannot.

    Example:
      >>> q, k = jnp.ones((1, 6, 4, 8)), jnp.ones((1, 6, 2, 8))
      >>> attention(q, k, k, chunk=4).shape
      (1, 6, 4, 8)

    Source: FlashAttention-2 (arXiv 2307.08691) for the backward pass. Here a chunk of
    queries sees all keys at once, so that there is no running maximum.
    """
    _check(q, k, v, segments, chunk, implementation)
    if implementation == "xla":
        return _kernel(q, k, v, segments, causal, "xla")
    refusal = _cudnn_refusal(q, segments)
    if implementation == "cudnn":
        if refusal:
            raise ValueError(
                f"attention: cuDNN {refusal}; leave implementation out, or say"
                " 'blockwise'"
            )
    elif implementation is None and (refusal or not has_cudnn_attention()):
        implementation = "blockwise"
    return _attention(_Options(implementation, causal, chunk), q, k, v, segments)


def _check(q, k, v, segments, chunk, implementation) -> None:
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention: implementation is {implementation!r}, expected one of"
            f" {IMPLEMENTATIONS} or None"
        )
    if chunk < 1:
        raise ValueError(f"attention: chunk is {chunk}, expected at least 1")
    if q.ndim != 4:
        raise ValueError(
            f"attention: q has shape {q.shape}, expected (batch, tokens, heads, size)"
        )
    batch, tokens, heads, size = q.shape
    expected = (batch, tokens, k.shape[2] if k.ndim == 4 else "kv heads", size)
    for name, a in {"k": k, "v": v}.items():
        if a.shape != expected:
            raise ValueError(
                f"attention: {name} has shape {a.shape}, expected"
                f" ({', '.join(map(str, expected))}) for q of shape {q.shape}"
            )
        if a.dtype != q.dtype:
            raise ValueError(
                f"attention: {name} is {a.dtype}, expected {q.dtype} as q is"
            )
    if heads % k.shape[2]:
        raise ValueError(
            f"attention: {heads} query heads do not divide into {k.shape[2]} key heads"
        )
    if segments is not None and segments.shape != (batch, tokens):
        raise ValueError(
            f"attention: segments have shape {segments.shape}, expected"
            f" {(batch, tokens)} for q of shape {q.shape}"
        )


def _cudnn_refusal(q: Array, segments: Array | None) -> str | None:
    """Why cuDNN cannot, if it cannot, as the rest of a sentence."""
    tokens, size = q.shape[1], q.shape[3]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16 only, and q is {q.dtype}"
    # Hopper takes 256, but what it will run on is not known while tracing.
    if size > 128 or size % 8:
        return f"takes head sizes up to 128 that divide by 8, and q's is {size}"
    if segments is not None and tokens % 2:
        return f"takes segments of an even number of tokens only, and q has {tokens}"
    return None


def _kernel(q, k, v, segments, causal, implementation) -> Array:
    """JAX's own."""
    mask = None
    if segments is not None:
        mask = (segments[:, :, None] == segments[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=causal, implementation=implementation
    )


# --- One function, computed in two ways -----------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options, q, k, v, segments):
    return _forward(options, q, k, v, segments)[0]


def _forward(options, q, k, v, segments):
    out, lse = _choose(options, _cudnn_forward, _blockwise_forward, q, k, v, segments)
    out, lse = keep((out, lse), ATTENTION)
    return out, (q, k, v, segments, out, lse)


def _backward(options, residuals, dy):
    grads = _choose(options, _cudnn_backward, _blockwise_backward, *residuals, dy)
    return (*grads, None)


_attention.defvjp(_forward, _backward)


def _choose(options: _Options, cudnn: Any, blockwise: Any, *args: Any) -> Any:
    cudnn, blockwise = partial(cudnn, options), partial(blockwise, options)
    match options.implementation:
        case "cudnn":
            return cudnn(*args)
        case "blockwise":
            return blockwise(*args)
    return lax.platform_dependent(*args, cuda=cudnn, default=blockwise)


# --- cuDNN ----------------------------------------------------------------------------


def _is_lse(q: Array, a: Any) -> bool:
    """Whether this is the log of the softmax's denominators, (B, H, T) float32."""
    batch, tokens, heads, _ = q.shape
    return a.shape == (batch, heads, tokens) and a.dtype == jnp.float32


def _cudnn_vjp(options, q, k, v, segments):
    kernel = partial(
        _kernel, segments=segments, causal=options.causal, implementation="cudnn"
    )
    return jax.vjp(kernel, q, k, v)


def _cudnn_forward(options, q, k, v, segments):
    # The public function rounds its log-sum-exp to the dtype of q; what autodiff keeps
    # of it is exact.
    out, vjp = _cudnn_vjp(options, q, k, v, segments)
    (lse,) = [a for a in jax.tree.leaves(vjp) if _is_lse(q, a)]
    return out, lse


def _cudnn_backward(options, q, k, v, segments, out, lse, dy):
    fresh, vjp = _cudnn_vjp(options, q, k, v, segments)
    # The forward kernel is traced again but, with its results replaced, not run.
    return reuse_forward(
        vjp, [(lambda a: a is fresh, out), (partial(_is_lse, q), lse)]
    )(dy)


# --- Chunks of queries ----------------------------------------------------------------


def _grouped(a_BTHE: Array, groups: int) -> Array:
    """(B, T, K, G, E)."""
    batch, tokens, _, size = a_BTHE.shape
    return a_BTHE.reshape(batch, tokens, groups, -1, size)


def _scores(options, split: Chunks, i, q_BCKGE, k_BTKE, segments):
    """Scores of a chunk, (B, K, G, C, T) float32; -inf where nothing is to be seen."""
    scores = jnp.einsum(
        "bckge,btke->bkgct", q_BCKGE, k_BTKE, preferred_element_type=jnp.float32
    )
    scores *= q_BCKGE.shape[-1] ** -0.5
    seen = jnp.ones((1, 1, 1), bool)
    if options.causal:
        queries = split.positions(i)
        seen = (jnp.arange(split.total) <= queries[:, None])[None]
    if segments is not None:
        own = split.take(segments, i)
        seen = seen & (own[:, :, None] == segments[:, None, :])
    # No row is without anything: a token sees itself.
    return jnp.where(seen[:, None, None], scores, -jnp.inf)


def _after(i: Array, data: Array) -> Array:
    """The number of a chunk, known no earlier than the data.

    The masks of all chunks could be made before there is any data. They would be, once
    for all layers, and kept: B H T^2 bytes on a TPU.
    """
    return lax.optimization_barrier((i, data))[0]


def _blockwise_forward(options, q, k, v, segments):
    split = chunks(q.shape[1], options.chunk)
    q_BTKGE = _grouped(q, k.shape[2])
    batch, tokens, heads, _ = q.shape

    def body(carry, i):
        out, lse = carry
        i = _after(i, q)
        scores = _scores(options, split, i, split.take(q_BTKGE, i), k, segments)
        own_lse = jax.nn.logsumexp(scores, axis=-1)
        weights = jnp.exp(scores - own_lse[..., None]).astype(v.dtype)
        own = jnp.einsum("bkgct,btke->bckge", weights, v)
        return (split.put(out, own, i), split.put(lse, own_lse, i, -1)), None

    out = jnp.zeros_like(q_BTKGE)
    kv_heads = k.shape[2]
    lse = jnp.zeros((batch, kv_heads, heads // kv_heads, tokens), jnp.float32)
    (out, lse), _ = lax.scan(body, (out, lse), jnp.arange(split.pieces))
    return out.reshape(q.shape), lse.reshape(batch, heads, tokens)


def _blockwise_backward(options, q, k, v, segments, out, lse, dy):
    split = chunks(q.shape[1], options.chunk)
    kv_heads, dtype = k.shape[2], q.dtype
    q_BTKGE, dy_BTKGE = _grouped(q, kv_heads), _grouped(dy, kv_heads)
    wide = jnp.einsum("bthe,bthe->bht", dy, out, preferred_element_type=jnp.float32)
    lse, wide = (a.reshape(a.shape[0], kv_heads, -1, a.shape[-1]) for a in (lse, wide))

    def body(carry, i):
        dq, dk, dv = carry
        i = _after(i, dy)
        own_q, own_dy = split.take(q_BTKGE, i), split.take(dy_BTKGE, i)
        own_lse, own_wide = split.take(lse, i, -1), split.take(wide, i, -1)
        scores = _scores(options, split, i, own_q, k, segments)
        weights = jnp.exp(scores - own_lse[..., None])
        # What the chunk before has seen has had its say.
        weights = jnp.where(split.fresh(i)[:, None], weights, 0)
        dv += jnp.einsum(
            "bkgct,bckge->btke",
            weights.astype(dtype),
            own_dy,
            preferred_element_type=jnp.float32,
        )
        dweights = jnp.einsum(
            "bckge,btke->bkgct", own_dy, v, preferred_element_type=jnp.float32
        )
        dscores = weights * (dweights - own_wide[..., None]) * q.shape[-1] ** -0.5
        dscores = dscores.astype(dtype)
        dk += jnp.einsum(
            "bkgct,bckge->btke", dscores, own_q, preferred_element_type=jnp.float32
        )
        own_dq = jnp.einsum("bkgct,btke->bckge", dscores, k)
        return (split.add(dq, own_dq, i), dk, dv), None

    zeros = jnp.zeros_like(q_BTKGE), *(jnp.zeros(k.shape, jnp.float32),) * 2
    (dq, dk, dv), _ = lax.scan(body, zeros, jnp.arange(split.pieces))
    return dq.reshape(q.shape), dk.astype(dtype), dv.astype(dtype)
