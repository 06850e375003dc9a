"""The work of a train step, counted from shapes: operations, bytes moved, seconds.

Per token, a kernel W (n_in, n_out) takes, with n_out summed over the kernels of an input
for those that share it,

    2 n_in n_out    forward, y = x W
    2 n_in n_out    backward, dx = dy W^T
    2 n_in n_out    weight gradient, x^T dy

which is 6 N for N weights in all. A projected kernel of rank r has, instead of the last,

    2 r n_out       z^T dy
    2 n_in r        projection, z = x P
    2 n_in r / s    tracking, x^T z, of every s-th token

and once per step, in float32, with P (n_in, r):

    2 n_in r n_out  lift of the update, P C
    10 n_in r^2     retraction (two Gram matrices, two products), and the motion
    4 r^2 n_out     both moments carried

An adapter of rank r takes 6 r (n_in + n_out) in place of the weight gradient. Attention
over T tokens takes 4 T H E forward and 10 T H E backward, where the scores are made again,
for H heads of size E: what lies above the diagonal is computed, and thrown away.

Recomputation adds, per token:

    none, elementwise   nothing
    mlp                 gate, up and o_proj, and the projections
    block               4 T H E, and the forward pass of a block but for its last product:
                        nearly 2 N, so that AdamW takes 8 N; projections and tracking

Elementwise operations are not counted: they take time by the bytes that they move.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from oasis_jax.lora import Lora
from oasis_jax.planning.targets import Target
from oasis_jax.select import Rule
from oasis_jax.trackers import Complement, Oja

EFFICIENCY = 0.5
"""Share of a device's peak that a good train step reaches. Stated, not measured."""

EXACT = 15.0
"""What a float32 operation costs in units of a bfloat16 one.

The float32 units of an H200 make 67 of its tensor cores' 989 TFLOP/s; a TPU makes a
float32 product of six in bfloat16."""


@dataclass(frozen=True)
class Work:
    """What one step does.

    Attributes:
      flops: Floating-point operations of matrix products; a product and a sum are two.
      exact_flops: Those of them that are in float32 whatever the model's dtype is.
      bytes: Moved to and from the device's memory.
    """

    flops: float
    exact_flops: float
    bytes: float

    def seconds(self, target: Target, efficiency: float = EFFICIENCY) -> float:
        """An estimate of the step's time: of arithmetic or of memory, whichever is more.

        Example:
          >>> from oasis_jax.planning.targets import find
          >>> round(Work(1e12, 0, 1e9).seconds(find("cpu")), 3)
          2.0
        """
        priced = self.flops + (EXACT - 1) * self.exact_flops
        return max(priced / (target.flops * efficiency), self.bytes / target.bandwidth)


@dataclass(frozen=True)
class Input:
    """Kernels that share an input.

    Attributes:
      path: Of the first, as rules see it.
      n_in: Features of the input.
      n_out: Of all outputs together.
      count: How many layers have it.
      recomputed: The levels of recomputation that make its outputs twice.
    """

    path: str
    n_in: int
    n_out: int
    count: int
    recomputed: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        return self.n_in * self.n_out * self.count


def llama_inputs(config: Any) -> tuple[Input, ...]:
    """The inputs of a `LlamaConfig`'s dense layers, its output head last."""
    c = config
    inner = c.heads * c.head_size
    qkv = inner + 2 * c.kv_heads * c.head_size
    head = "embed/embedding" if c.tied else "lm_head/kernel"
    return (
        Input("blocks/attn/q_proj/kernel", c.width, qkv, c.layers, ("block",)),
        Input("blocks/attn/o_proj/kernel", inner, c.width, c.layers, ("block", "mlp")),
        Input(
            "blocks/mlp/gate_proj/kernel",
            c.width,
            2 * c.hidden,
            c.layers,
            ("block", "mlp"),
        ),
        Input("blocks/mlp/down_proj/kernel", c.hidden, c.width, c.layers),
        Input(head, c.width, c.vocab_size, 1),
    )


# In units of T H E: forward 4, backward 10.
_ATTENTION = 14
_ATTENTION_FORWARD = 4


def train_work(
    config: Any,
    rules: Sequence[Rule] = (),
    *,
    batch: int,
    seq: int,
    accumulate: int = 1,
) -> Work:
    """The work of one train step of a LLaMA, by the formulas above.

    Args:
      config: A `LlamaConfig`, or what has its fields.
      rules: Of the method (`Recipe.rules`). Kernels that none matches are dense; what an
        optimizer does with full-size gradients beyond AdamW is not counted.
      batch, seq: Sequences per step, and tokens in each.
      accumulate: Microbatches per step.

    Example:
      >>> from oasis_jax.models.llama import preset
      >>> small = preset("llama-60m", remat="none")
      >>> dense = train_work(small, batch=8, seq=256)
      >>> oasis = train_work(small, (Rule("attn/|mlp/"),), batch=8, seq=256)
      >>> 0.8 < oasis.flops / dense.flops < 1.1
      True
    """
    tokens = batch * seq
    heads = _ATTENTION + (_ATTENTION_FORWARD if config.remat == "block" else 0)
    flops = float(
        heads * seq * config.heads * config.head_size * config.layers * tokens
    )
    exact = 0.0
    weight_bytes = np.dtype(config.param_dtype).itemsize
    width = np.dtype(config.dtype).itemsize
    # The embedding is read by rows; its moments and its gradient are whole.
    embedding = 0 if config.tied else config.vocab_size * config.width
    moved = float(embedding * (2 * 8 + 4 * weight_bytes))
    for place in llama_inputs(config):
        rule = _rule(place.path, rules)
        forward = 2.0 * place.weights
        again = forward if config.remat in place.recomputed else 0.0
        per_token, per_step, trained, held = _gradient(place, rule, config.remat)
        flops += tokens * (2 * forward + again + per_token) + per_step
        exact += per_step
        passes = accumulate * (3 if again else 2)
        moved += (
            # Weights: read by each pass, read and written by the update.
            (passes + 2) * weight_bytes * place.weights
            # Gradients: written and read in float32; both moments read and written.
            + trained * (2 * 4 * accumulate + 2 * 8)
            + 4 * held * (passes + 2)
            # Activations: read and written by each product of the token's.
            + tokens
            * width
            * place.count
            * (place.n_in + place.n_out)
            * (4 if again else 3)
        )
    # Logits, their softmax and their gradient, in float32.
    moved += 3.0 * 4 * tokens * config.vocab_size
    return Work(flops, exact, moved)


def _rule(path: str, rules: Sequence[Rule]) -> Rule | None:
    return next((r for r in rules if not r.inputs and re.search(r.pattern, path)), None)


def _gradient(
    place: Input, rule: Rule | None, remat: str
) -> tuple[float, float, float, float]:
    """Of all layers: flops per token, flops per step, numbers trained, numbers held."""
    n, out, layers = place.n_in, place.n_out, place.count
    rank = None if rule is None else rule.columns(n)
    if rule is None or rank is None:
        return 2.0 * place.weights, 0.0, place.weights, 0.0
    if isinstance(rule.tracker, Lora):
        adapter = layers * rank * (n + out)
        return 6.0 * adapter, 0.0, adapter, adapter
    inside = place.path.startswith("blocks/")
    projections = 2 if inside and remat in ("mlp", "block") else 1
    looks = (2 if inside and remat == "block" else 1) / rule.stride
    per_token = 2 * rank * out + 2 * n * rank * (projections + looks)
    per_step = 2.0 * n * rank * out
    tracks = isinstance(rule.tracker, Oja | Complement) or rule.tracker == "oja"
    if tracks:
        per_step += 10 * n * rank**2
    coordinates = rule.gradient == "coordinates"
    if tracks and coordinates:
        per_step += 4 * rank**2 * out
    trained = (rank if coordinates else n) * out
    return layers * per_token, layers * per_step, layers * trained, layers * n * rank
