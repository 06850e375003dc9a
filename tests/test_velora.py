"""VeLoRA against recorded numbers, and what VeLoRA and CompAct store and save.

`velora.npz` holds inputs and outputs of the public implementation (README.md beside it
says of what). Each case is driven by its own JSON configuration, so that another file of
the same kind can take its place: set OASIS_FIXTURES to its directory. Matrices are in
PyTorch's layout, (out, in), and are transposed here.
"""

import json
import os
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from oasis_jax import OasisTrainState, Rule
from oasis_jax.linen import OasisDense
from oasis_jax.methods import method
from oasis_jax.models import llama
from oasis_jax.planning.memory import saved_activations, tree_bytes
from oasis_jax.subspace import COLLECTION
from oasis_jax.trackers import BlockMean

FILE = (
    Path(
        os.environ.get("OASIS_FIXTURES")
        or Path(__file__).parents[1] / "../shared/fixtures"
    ).resolve()
    / "velora.npz"
)


@cache
def load():
    with np.load(FILE) as arrays:
        return dict(arrays)


def cases():
    """The cases of the file; one that skips, saying so, where there is no file."""
    if not FILE.exists():
        why = f"no {FILE}; set OASIS_FIXTURES to the directory of velora.npz"
        return [pytest.param(None, marks=pytest.mark.skip(reason=why))]
    return json.loads(str(load()["cases"]))


def average(init_type):
    """`BlockMean.average` for what the reference calls `init_type`."""
    named = {"batch_average_once": "once", "batch_average": "batch"}
    return named.get(init_type) or float(init_type.removeprefix("ema_"))


@pytest.mark.parametrize("name", cases())
def test_recorded(name):
    """v, zp, y, dx, dW and db of every batch, as a train state sees them."""
    prefix = f"{name}/"
    data = {k.removeprefix(prefix): a for k, a in load().items() if prefix in k}
    config = json.loads(str(data["config"]))
    groups = config["num_groups"]
    params = {"kernel": jnp.asarray(data["W"].T)}
    if config["bias"]:
        params["bias"] = jnp.asarray(data["b"])
    n_out = params["kernel"].shape[-1]
    model = OasisDense(n_out, use_bias=config["bias"], precision="highest")
    declared = model.init(jax.random.key(0), data["x"][0])[COLLECTION]
    tracker = BlockMean(average(config["init_type"]), config["scale"])
    state = OasisTrainState.create(
        apply_fn=model.apply,
        params=params,
        subspace=declared,
        # It keeps the last gradients, as an optimizer sees them, and moves nothing.
        tx=optax.chain(optax.trace(0.0), optax.scale(0.0)),
        rules=[Rule("kernel", groups, tracker, gradient="full")],
    )

    def loss_fn(variables, x, dy):
        y = model.apply(variables, x)
        return jnp.sum(y * dy), y

    @jax.jit
    def step(state, x, dy):
        state = state.refresh(loss_fn, x, dy)
        (_, y), grads = state.value_and_grad(loss_fn, has_aux=True)(x, dy)
        basis = state.layout.bases(state.bases)["kernel"]
        variables = {"params": state.params, COLLECTION: state.probed}
        dx = jax.grad(lambda x: loss_fn(variables, x, dy)[0])(x)
        out = {"y": y, "v": basis.vector, "zp": basis.project(x, "highest"), "dx": dx}
        state = state.apply_gradients(grads)
        seen = state.opt_state[0].trace
        out |= {"dW": seen["kernel"].T, "db": seen.get("bias")}
        return state, out

    atol = {"y": 0, "dx": 0, "db": 0, "v": 5e-7, "zp": 5e-6, "dW": 5e-5}
    with jax.default_matmul_precision("highest"):
        for k, (x, dy) in enumerate(zip(data["x"], data["dY"], strict=True)):
            state, out = step(state, x, dy)
            for what, tolerance in atol.items():
                if what == "db" and not config["bias"]:
                    continue
                np.testing.assert_allclose(
                    out[what],
                    data[what][k],
                    rtol=0,
                    atol=tolerance,
                    err_msg=f"{what} of batch {k}",
                )
    np.testing.assert_array_equal(state.params["kernel"], data["W"].T)


# Sizes that no two axes share, so that shapes tell what an array is.
CONFIG = llama.LlamaConfig(50, 32, 48, 2, 4, 4, remat="none")
TOKENS = jnp.zeros((3, 11), jnp.int32)
MODEL = llama.Llama(CONFIG)
VARIABLES = jax.eval_shape(MODEL.init, jax.random.key(0), TOKENS[:, :-1])


def loss_fn(variables, tokens):
    logits = MODEL.apply(variables, tokens[:, :-1])
    return jnp.mean(llama.token_losses(logits, tokens[:, 1:]))


def create(name, **options):
    """A state's shapes."""
    recipe = method(name, **options)
    make = partial(
        OasisTrainState.create,
        apply_fn=MODEL.apply,
        tx=recipe.optimizer(1e-3),
        rules=recipe.rules,
    )
    return jax.eval_shape(lambda variables: make(**variables), VARIABLES)


def saved(state):
    """Shapes of what a step keeps for its backward pass."""

    def loss(params, zeros):
        return loss_fn({"params": params, COLLECTION: zeros}, TOKENS)

    zeros = jax.eval_shape(lambda state: state.probed, state)
    kept = saved_activations(loss, state.params, zeros)
    return [tuple(aval.shape) for aval in kept]


LAYERS, WIDTH, HIDDEN = CONFIG.layers, CONFIG.width, CONFIG.hidden


@pytest.mark.parametrize(
    "name, options, expected",
    [
        # One seed for each of q/k/v, gate/up and down's input.
        ("compact", {}, 4 * 3 * LAYERS),
        ("compact", {"shared": True}, 4 * 3 * LAYERS),
        # One vector for v's and one for down's input.
        ("velora", {}, 4 * LAYERS * (WIDTH / (WIDTH // 8) + HIDDEN / (HIDDEN // 8))),
        ("velora", {"groups": 2}, 4 * LAYERS * (WIDTH / 2 + HIDDEN / 2)),
    ],
    ids=str,
)
def test_no_basis_is_stored(name, options, expected):
    assert tree_bytes(create(name, **options).subspace) == expected


@pytest.mark.parametrize(
    "name, options, coefficients",
    [
        # v_proj and down_proj.
        ("velora", {"groups": 2}, {2: 2}),
        ("velora", {"rank": 0.25}, {8: 1, 12: 1}),
        # q, k, v, gate and up have 32 input features, down has 48.
        ("compact", {"rank": 0.25}, {8: 5, 12: 1}),
        ("compact", {"rank": 0.25, "shared": True}, {8: 2, 12: 1}),
    ],
    ids=str,
)
def test_saved_coefficients(name, options, coefficients):
    """Per token: `groups` of each input for VeLoRA, r of each kernel for CompAct."""
    tokens = TOKENS[:, :-1].shape

    def count(state, n):
        return saved(state).count((LAYERS, *tokens, n))

    state, plain = create(name, **options), create("adamw")
    for n, expected in coefficients.items():
        assert count(state, n) - count(plain, n) == expected
    # The inputs of down_proj are gone, save for what SwiGLU keeps of its own.
    assert count(state, HIDDEN) == count(plain, HIDDEN) - 1


@pytest.mark.parametrize("options", [{"groups": 5}, {"groups": 64}], ids=str)
def test_groups_that_do_not_divide(options):
    groups = options["groups"]
    sentence = f"kernel: rule .* asks for {groups} groups, which do not divide its"
    with pytest.raises(ValueError, match=f"{sentence} {HIDDEN} input features"):
        create("velora", pattern="down_proj", **options)


def test_options_of_other_methods():
    sentence = "groups is no option of galore, whose are: .*, it is one of velora"
    with pytest.raises(ValueError, match=sentence):
        method("galore", groups=4)
