"""Counted work against closed forms, and against XLA's own count."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from oasis_jax import OasisTrainState
from oasis_jax.methods import method
from oasis_jax.models import llama
from oasis_jax.models.blocks import REMAT
from oasis_jax.planning.flops import EXACT, Work, llama_inputs, train_work
from oasis_jax.planning.targets import TARGETS
from oasis_jax.select import Rule

SHAPE = llama.LlamaConfig(64, 128, 344, 1, 4, 2)
BATCH, SEQ = 16, 32


def lowered_step(config, recipe) -> jax.stages.Lowered:
    model = llama.Llama(config)
    tokens = jax.ShapeDtypeStruct((BATCH, SEQ + 1), jnp.int32)

    def loss_fn(variables, tokens):
        logits = model.apply(variables, tokens[:, :-1])
        return jnp.mean(llama.token_losses(logits, tokens[:, 1:]))

    def create():
        variables = model.init(jax.random.key(0), jnp.zeros((1, SEQ), jnp.int32))
        return OasisTrainState.create(
            apply_fn=model.apply,
            **variables,
            tx=recipe.optimizer(1e-3),
            rules=recipe.rules,
        )

    def step(state, tokens):
        loss, grads = state.value_and_grad(loss_fn)(tokens)
        return state.apply_gradients(grads), loss

    return jax.jit(step).lower(jax.eval_shape(create), tokens)


ADAMW, OASIS, STRIDED = (
    method("adamw"),
    method("oasis", rank=32),
    method("oasis", rank=0.125, stride=4),
)
CASES = {
    f"{name}-{remat}": (recipe, remat)
    for name, recipe in {"adamw": ADAMW, "oasis": OASIS}.items()
    for remat in REMAT
} | {"strided": (STRIDED, "elementwise")}


@pytest.mark.parametrize(("recipe", "remat"), CASES.values(), ids=CASES)
def test_xla_counts_the_same(recipe, remat):
    """To what is elementwise, which only XLA counts.

    It counts a scan's body once, however often it runs, so there is one layer.
    """
    config = replace(SHAPE, remat=remat)
    counted = train_work(config, recipe.rules, batch=BATCH, seq=SEQ).flops
    seen = lowered_step(config, recipe).cost_analysis()["flops"]
    assert counted == pytest.approx(seen, rel=0.05)


@pytest.mark.parametrize("recipe", [ADAMW, OASIS], ids=["adamw", "oasis"])
def test_xla_counts_the_same_once_compiled(recipe):
    """So it is no work that the compiler would take away.

    It unrolls a loop that runs once, and then merges what is recomputed with what it
    repeats; so there are two layers. What is done once a step is batched over them.
    """
    config = replace(SHAPE, remat="block")
    work = train_work(config, recipe.rules, batch=BATCH, seq=SEQ)
    counted = work.flops + work.exact_flops
    compiled = lowered_step(replace(config, layers=2), recipe).compile()
    assert counted == pytest.approx(compiled.cost_analysis()["flops"], rel=0.08)


def blocks(config) -> int:
    return sum(place.weights for place in llama_inputs(config)[:-1])


@pytest.mark.parametrize("name", llama.PRESETS)
def test_inputs_hold_all_weights(name):
    """But for the vectors and the embedding, where it is not the head."""
    config = llama.PRESETS[name]
    shapes = jax.eval_shape(
        llama.Llama(config).init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32)
    )
    expected = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    heads = config.heads + 2 * config.kv_heads
    small = (config.qkv_bias * heads + config.qk_norm * 2) * config.head_size
    vectors = config.width * (2 * config.layers + 1) + small * config.layers
    embedding = 0 if config.tied else config.vocab_size * config.width
    counted = sum(place.weights for place in llama_inputs(config))
    assert counted + vectors + embedding == expected


@pytest.mark.parametrize(
    ("remat", "per_weight", "attention"),
    [("none", 6, 14), ("elementwise", 6, 14)],
)
def test_adamw_takes_6_per_weight(remat, per_weight, attention):
    config = llama.preset("llama-1b", remat=remat)
    work = train_work(config, batch=2, seq=512)
    head = config.width * config.vocab_size
    scores = attention * 512 * config.width * config.layers
    tokens = 2 * 512
    expected = tokens * (per_weight * blocks(config) + 6 * head + scores)
    assert work.flops == expected
    assert work.exact_flops == 0


def test_block_takes_nearly_8_per_weight():
    config = llama.preset("llama-1b", remat="block")
    tokens = 1024
    work = train_work(config, batch=1, seq=tokens)
    head = 6 * config.width * config.vocab_size
    scores = 18 * tokens * config.width * config.layers
    per_weight = (work.flops / tokens - head - scores) / blocks(config)
    down = config.width * config.hidden * config.layers / blocks(config)
    assert per_weight == pytest.approx(8 - 2 * down)


@pytest.mark.parametrize("stride", [1, 4])
def test_a_projected_kernel(stride):
    """What the docstring says, for a model whose one projected kernel is down_proj."""
    config = replace(SHAPE, remat="none", layers=3)
    rule = Rule("down_proj", 32, stride=stride)
    dense = train_work(config, batch=BATCH, seq=SEQ)
    work = train_work(config, (rule,), batch=BATCH, seq=SEQ)
    n, out, r, tokens = config.hidden, config.width, 32, BATCH * SEQ
    per_token = 2 * r * out + 2 * n * r + 2 * n * r / stride - 2 * n * out
    per_step = 2 * n * r * out + 10 * n * r**2 + 4 * r**2 * out
    assert work.flops - dense.flops == 3 * (tokens * per_token + per_step)
    assert work.exact_flops == 3 * per_step


def test_a_smaller_rank_is_less_work():
    config = llama.preset("llama-1b")
    works = [
        train_work(config, method("oasis", rank=rank).rules, batch=8, seq=2048)
        for rank in (64, 256, 1024)
    ]
    assert works == sorted(works, key=lambda w: w.flops)
    assert works == sorted(works, key=lambda w: w.bytes)


def test_seconds_are_those_of_what_takes_longer():
    target = TARGETS["h200"]
    assert Work(989e12, 0, 1).seconds(target, 0.5) == pytest.approx(2)
    assert Work(989e12, 989e12, 1).seconds(target, 1) == pytest.approx(EXACT)
    assert Work(1, 0, 4.8e12).seconds(target) == pytest.approx(1)
