"""What decays in a run: as it is asked, as it is told, as it is done."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from oasis_jax.paths import flatten_paths
from train.errors import UserError
from train.options import Pretrain
from train.run.build import pretraining
from train.run.setup import decaying
from train.run.summary import describe

SMALL = dict(batch=1, seq=4, rank="2", warmup=0.0, lr=0.5, weight_decay=0.5)
RUNS = {
    "oasis": dict(),
    "lora": dict(method="lora", pattern="attn/q_proj"),
    "frozen": dict(embeddings="frozen"),
    "adafactor": dict(embeddings="adafactor"),
    "adafactor, all": dict(embeddings="adafactor", decay="."),
    "muon, embeddings": dict(method="muon", rank=None, decay="embed|norm"),
}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_what_is_said_to_decay_does_and_nothing_else(options):
    config = Pretrain(**SMALL | options)
    setup = pretraining(config, 16, layers=1)
    objective, state = setup.objective, setup.state
    shapes = jax.eval_shape(
        lambda s, b: s.value_and_grad(objective.loss_fn, weighted=True)(b)[1],
        state,
        objective.batch,
    )
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    after = flatten_paths(
        jax.jit(lambda s, g: s.apply_gradients(g))(state, zeros).trained
    )
    decays = decaying(config, state)
    assert decays
    for path, weight in flatten_paths(state.trained).items():
        named = re.search(config.decay, path) is not None
        kept = config.embeddings == "frozen" and re.search("embed|lm_head", path)
        assert (path in decays) == (named and not kept), path
        wanted = weight * (1 - 0.25) if path in decays else weight
        np.testing.assert_allclose(after[path], wanted, rtol=1e-5, err_msg=path)


@pytest.mark.parametrize("rate, told", [(0.1, 1), (0.0, 0)])
def test_it_is_told_at_the_start(rate, told):
    config = Pretrain(**SMALL | dict(weight_decay=rate))
    setup = pretraining(config, 16, layers=1, abstract=True)
    console = Console(record=True, width=200, quiet=False, markup=False)
    parts = dict.fromkeys(("weights", "peak"), 1)
    with console.capture() as said:
        describe(console, config, setup, parts, "llama-tiny")
    lines = [line for line in said.get().splitlines() if line.startswith("decay")]
    assert len(lines) == told
    leaves = flatten_paths(setup.state.params)
    kernels = [leaf for path, leaf in leaves.items() if path.endswith("kernel")]
    count = sum(leaf.size for leaf in kernels)
    for line in lines:
        assert line == (
            f"decay      0.1 of {len(kernels)} parameters ({count:,} numbers),"
            " --decay (^|/)kernel(/|$)"
        )


AMISS = {
    "no expression": (
        "(",
        r"--decay is '\(', expected a regular expression: missing \)",
    ),
    "no parameter": (
        "blocks/attn/kernel",
        "--decay blocks/attn/kernel matches no parameter that is trained, and"
        " --weight-decay is 0.5; the nearest are blocks/attn/",
    ),
    "a frozen one": ("lm_head", "--decay lm_head matches no parameter that is trained"),
}


@pytest.mark.parametrize("pattern, said", AMISS.values(), ids=AMISS)
def test_patterns_that_decay_nothing_are_refused(pattern, said):
    with pytest.raises(UserError, match=said):
        config = Pretrain(**SMALL, decay=pattern, embeddings="frozen")
        pretraining(config, 16, layers=1)


def test_without_a_decay_any_pattern_will_do():
    config = Pretrain(**SMALL | dict(weight_decay=0.0), decay="nosuch")
    pretraining(config, 16, layers=1, abstract=True)
