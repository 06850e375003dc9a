"""An answer to every prompt."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from oasis_jax.models.generate import generate, pad
from oasis_jax.models.llama import Llama, LlamaConfig
from train.objectives.objective import Objective, integers
from train.objectives.text import token_loss


def answers(shape: LlamaConfig, batch: int, seq: int) -> Objective:
    """The mean cross-entropy of the tokens of answers.

    Args:
      shape: The model.
      batch, seq: Rows, and predicted tokens per row; a row holds one more.
    """
    model = Llama(shape)

    row = integers(batch, seq + 1)
    weights = jax.ShapeDtypeStruct((batch, seq), jnp.float32)
    shapes = {"tokens": row, "segments": row, "weights": weights}
    return Objective(model, (integers(batch, seq),), shapes, partial(token_loss, model))


def answered(
    model: Llama,
    params: Any,
    prompts: Sequence[tuple[list[int], str]],
    decode: Callable[[Sequence[int]], str],
    *,
    batch: int,
    new_tokens: int,
    ends: Sequence[int],
) -> list[dict[str, str]]:
    """What the model answers to those prompts that leave room for an answer.

    Args:
      prompts: Tokens, and the right answer's text.
      decode: Tokens to text, up to the end token.
      batch: Prompts at a time.
      new_tokens: Most tokens of an answer.
      ends: Tokens that end one.

    Returns:
      The text of `prompt`, `answer` and `reference`, for each.
    """
    room = model.config.positions
    asked = [
        (prompt, reference)
        for prompt, reference in prompts
        if room is None or len(prompt) + new_tokens <= room
    ]
    said: list[str] = []
    for start in range(0, len(asked), batch):
        part = pad([prompt for prompt, _ in asked[start : start + batch]])
        rows = generate(model, params, *part, new_tokens=new_tokens, end=ends)
        said += [decode(row) for row in np.asarray(rows).tolist()]
    return [
        dict(prompt=decode(prompt), answer=answer, reference=reference)
        for (prompt, reference), answer in zip(asked, said, strict=True)
    ]
