"""Greedy continuation of prompts."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from oasis_jax.models.cache import empty_cache


def pad(prompts: Sequence[Sequence[int]], multiple: int = 64) -> tuple[Array, Array]:
    """Prompts as a batch, padded on the right.

    Args:
      prompts: Tokens of each row.
      multiple: The width of the batch divides by it, so that few widths are compiled.

    Returns:
      (B, width) int32 and (B,) int32, the lengths.

    Example:
      >>> tokens, lengths = pad([[5, 6, 7], [8]], multiple=4)
      >>> tokens.tolist(), lengths.tolist()
      ([[5, 6, 7, 0], [8, 0, 0, 0]], [3, 1])
    """
    lengths = [len(prompt) for prompt in prompts]
    width = -(-max(lengths, default=0) // multiple) * multiple
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return jnp.asarray(tokens), jnp.asarray(lengths, jnp.int32)


def generate(
    model: nn.Module,
    params: Any,
    prompts: Array,
    lengths: Array,
    *,
    new_tokens: int,
    end: int | Sequence[int] | None = None,
) -> Array:
    """Goes on from each prompt with the most probable token, again and again.

    Compiled once for a model, a shape of `prompts` and `new_tokens`, whatever the lengths
    and the end. Stops when all rows have ended.

    Args:
      model: A `Llama`, or what takes the same arguments.
      params: Of the model, float32 or bfloat16.
      prompts: (B, width) int32, each row padded on the right with any tokens.
      lengths: (B,) int32, of the prompts without the padding, at least 1.
      new_tokens: How many tokens to make of each row, at least 1.
      end: The token after which a row is over, or several. It is in the result, and fills
        the rest of the row.

    Returns:
      (B, new_tokens) int32, without the prompts. Rows do not depend on each other.

    Raises:
      ValueError: if a prompt is empty, longer than its row, or with the new tokens
        beyond the positions of the model, or if a token is not in the vocabulary. What
        is traced by an outer transformation is not known, and not checked.

    Example:
      >>> from oasis_jax.models.llama import Llama, preset
      >>> model = Llama(preset("llama-tiny", layers=1, width=16, hidden=16))
      >>> prompts, lengths = pad([[5, 6, 7], [8]])
      >>> params = model.init(jax.random.key(0), prompts)["params"]
      >>> generate(model, params, prompts, lengths, new_tokens=4).shape
      (2, 4)
    """
    _check(model, prompts, lengths, new_tokens)
    # No token is -1. The numbers are an argument, so that no other ones compile again.
    ends = jnp.asarray(-1 if end is None else end, jnp.int32).reshape(-1)
    return _generate(model, new_tokens, params, prompts, lengths, ends)


@partial(jax.jit, static_argnums=(0, 1))
def _generate(model, new_tokens, params, prompts, lengths, ends):
    batch, width = prompts.shape

    def advance(tokens, **options):
        logits, cache = model.apply({"params": params}, tokens, **options)
        return jnp.argmax(logits[:, -1], axis=-1).astype(jnp.int32), cache

    token, cache = advance(
        prompts,
        cache=empty_cache(model.config, batch, width + new_tokens),
        read=lengths - 1,
    )
    out = jnp.zeros((batch, new_tokens), jnp.int32).at[:, 0].set(token)

    def over(tokens):
        return jnp.any(tokens[:, None] == ends, axis=-1)

    def going(state):
        i, out, _ = state
        return (i < new_tokens) & ~jnp.all(over(out[:, i - 1]))

    def body(state):
        i, out, cache = state
        last = out[:, i - 1]
        token, cache = advance(last[:, None], cache=cache, start=lengths + i - 1)
        token = jnp.where(over(last), last, token)
        return i + 1, out.at[:, i].set(token), cache

    done, out, _ = jax.lax.while_loop(going, body, (1, out, cache))
    # What is left when all rows are over repeats their ends.
    return jnp.where(jnp.arange(new_tokens) < done, out, out[:, done - 1][:, None])


def _check(model, prompts, lengths, new_tokens) -> None:
    if new_tokens < 1:
        raise ValueError(f"new_tokens is {new_tokens}, expected at least 1")
    if prompts.ndim != 2 or lengths.shape != prompts.shape[:1]:
        raise ValueError(
            f"prompts have shape {prompts.shape} and lengths {lengths.shape}, expected"
            " (batch, width) and (batch,)"
        )
    if isinstance(prompts, jax.core.Tracer) or isinstance(lengths, jax.core.Tracer):
        return
    width, vocabulary = prompts.shape[1], model.config.vocab_size
    positions = getattr(model.config, "positions", None)
    for row, (length, tokens) in enumerate(
        zip(np.asarray(lengths).tolist(), np.asarray(prompts), strict=True)
    ):
        if length < 1:
            raise ValueError(f"prompt {row} is empty, expected at least one token")
        if length > width:
            raise ValueError(
                f"prompt {row} has length {length}, but the prompts are {width} wide"
            )
        if positions and length + new_tokens > positions:
            raise ValueError(
                f"prompt {row} has {length} tokens, and with {new_tokens} new ones more"
                f" than the {positions} positions of the model; ask for fewer, or shorten"
                " the prompt"
            )
        largest = tokens.max()
        if largest >= vocabulary:
            raise ValueError(
                f"prompt {row} has token {largest}, but the vocabulary of the model ends"
                f" at {vocabulary - 1}"
            )
