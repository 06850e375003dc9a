"""LoRA: adapters against plain autodiff, a frozen base, and a merge that changes nothing.

The oracle is the same model written by hand, in which every adapted kernel is
W + s A B and A, B are ordinary parameters.
"""

import math
from dataclasses import replace
from functools import cache, partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from oasis_jax import (
    COLLECTION,
    Lora,
    OasisTrainState,
    Oja,
    Place,
    Random,
    Rule,
    oasis_adam,
)
from oasis_jax.checkpoints import Checkpoints
from oasis_jax.linen import OasisDense, shared_dense
from oasis_jax.lora import Adapter
from oasis_jax.paths import flatten_paths, map_with_paths

# No two sizes are equal, so that a shape says what it is.
WIDTH, HIDDEN, OUT, RANK, LAYERS = 16, 24, 5, 3, 2
HEADS = {"q_proj": 10, "k_proj": 11, "v_proj": 12}


class Model(nn.Module):
    """Three kernels on one input, one with a bias on their product, one on that."""

    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        own = dict(param_dtype=self.param_dtype)
        q, k, v = shared_dense(self, "qkv", x, HEADS, **own)
        x = nn.tanh(q) * k[..., :10] + nn.tanh(v[..., :10])
        x = nn.gelu(OasisDense(HIDDEN, name="up", **own)(x))
        return OasisDense(OUT, name="down", **own)(x)


class Block(nn.Module):
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, _):
        own = dict(param_dtype=self.param_dtype)
        y = nn.tanh(OasisDense(HIDDEN, name="up", **own)(x))
        return x + OasisDense(WIDTH, name="down", **own)(y), None


class Scanned(nn.Module):
    """Kernels with a leading axis, one for each layer."""

    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            Block,
            variable_axes={"params": 0, COLLECTION: 0},
            split_rngs={"params": True},
            length=LAYERS,
        )(self.param_dtype, name="blocks")
        return layers(x, None)[0][..., :OUT]


X = jax.random.normal(jax.random.key(1), (8, 3, WIDTH)) * jnp.linspace(0.2, 3, WIDTH)
Y = jnp.sin(X[..., :OUT])
EVERYTHING = (Rule(".", RANK, Lora(alpha=6)),)
QUERIES_AND_VALUES = (Rule("q_proj|v_proj", RANK, Lora(alpha=6)),)
SCALE = 2.0  # alpha / rank
ADAPTED = {"q_proj/kernel", "v_proj/kernel"}
KERNELS = [f"{name}/kernel" for name in (*HEADS, "up", "down")]
MODEL, SCANNED = Model(), Scanned()
TX = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2, weight_decay=0.1))


@cache
def variables(model):
    return jax.jit(model.init)(jax.random.key(0), X)


@cache
def applied(model):
    return jax.jit(model.apply)


def create(model=MODEL, rules=EVERYTHING, seed=0) -> OasisTrainState:
    return created(model, rules, seed)


@cache
def created(model, rules, seed, tx=TX) -> OasisTrainState:
    return OasisTrainState.create(
        apply_fn=model.apply, **variables(model), tx=tx, rules=rules, seed=seed
    )


def loss_fn(model, variables, x=X, y=Y):
    return jnp.mean((model.apply(variables, x) - y) ** 2)


@partial(jax.jit, static_argnums=0)
def step(model, state, x):
    _, grads = state.value_and_grad(partial(loss_fn, model))(x, Y)
    return state.apply_gradients(grads)


def adapters_of(state: OasisTrainState) -> dict[str, dict]:
    """{"a": A, "b": B} by kernel path."""
    weights = state.layout.params.split(state.trained)
    return {path: weights[path] for path in state.frozen}


def moved(state: OasisTrainState) -> OasisTrainState:
    """The state with adapters in which nothing is zero any more."""
    leaves = jax.tree.map(
        lambda a: a + 0.1 * np.random.default_rng(a.size).normal(size=a.shape),
        adapters_of(state),
    )
    leaves = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), leaves)
    weights = state.layout.params.split(state.trained)
    return replace(state, trained=state.layout.params.join(weights | leaves))


def by_hand(params, adapters, scale=SCALE):
    """The plain parameters in which W is W + s A B."""

    def kernel(path, w):
        if path not in adapters:
            return w
        return w + scale * adapters[path]["a"] @ adapters[path]["b"]

    return map_with_paths(kernel, params)


def split(state: OasisTrainState):
    """What is trained besides adapters, by path; and the adapters."""
    adapters = adapters_of(state)
    rest = {p: w for p, w in flatten_paths(state.params).items() if p not in adapters}
    return rest, adapters


def hand_loss(state: OasisTrainState, rest, adapters, model=None):
    """The loss as a function of exactly what LoRA trains."""
    params = map_with_paths(lambda path, w: rest.get(path, w), state.params)
    return loss_fn(model or MODEL, {"params": by_hand(params, adapters)})


# --- One layer ----------------------------------------------------------------------

SCALES = {
    "alpha is the rank's double": (Lora(alpha=8), 4, 2.0),
    "alpha is a quarter": (Lora(alpha=1.0), 4, 0.25),
    "no alpha": (Lora(), 4, 1.0),
    "no alpha, other rank": (Lora(), 7, 1.0),
}


@pytest.mark.parametrize("lora, rank, scale", SCALES.values(), ids=SCALES)
def test_layer_is_plain_autodiff(lora, rank, scale):
    """Y = X W + s (X A) B for three kernels of one input, of which two are adapted.

    Values, and the gradients of X, of each A and B, and of the W that is not adapted.
    """
    keys = jax.random.split(jax.random.key(2), 5)
    kernels = {
        name: jax.random.normal(key, (WIDTH, n_out))
        for key, (name, n_out) in zip(keys, HEADS.items(), strict=False)
    }
    shapes = [kernels[name].shape for name in ("q_proj", "v_proj")]
    adapter = lora.adapter(keys[3], Place(("q_proj", "v_proj"), lora), shapes, rank)
    assert [a.shape for a in adapter.a] == [(WIDTH, rank)] * 2
    assert [b.shape for b in adapter.b] == [(rank, 10), (rank, 12)]
    assert not np.allclose(adapter.a[0], adapter.a[1])  # each its own
    b = tuple(jax.random.normal(keys[4], b.shape) for b in adapter.b)
    weights = jnp.cos(jnp.arange(33.0))

    def ours(x, a, b, k):
        place = replace(adapter, a=a, b=b)
        return jnp.concatenate(place(x, kernels | {"k_proj": k}), axis=-1)

    def expected(x, a, b, k):
        q = x @ kernels["q_proj"] + scale * (x @ a[0]) @ b[0]
        v = x @ kernels["v_proj"] + scale * (x @ a[1]) @ b[1]
        return jnp.concatenate([q, x @ k, v], axis=-1)

    @partial(jax.jit, static_argnums=0)
    def pulled(f, *args):
        value, pull = jax.vjp(f, *args)
        return value, pull(jnp.sin(value) * weights)

    args = (X, adapter.a, b, kernels["k_proj"])
    chex.assert_trees_all_close(
        pulled(ours, *args), pulled(expected, *args), rtol=2e-4, atol=2e-4
    )


def test_layer_computes_in_the_inputs_dtype():
    place = Place(("kernel",), Lora())
    adapter = Lora().adapter(jax.random.key(0), place, [(WIDTH, 4)], RANK)
    kernel = jnp.ones((WIDTH, 4))
    (y,) = adapter(X.astype(jnp.bfloat16), {"kernel": kernel})
    assert y.dtype == jnp.bfloat16
    assert adapter.merge(0, kernel.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_a_is_drawn_within_its_bound_and_b_is_zero():
    """Uniform in +-1 / sqrt(n_in): the variance is a third of the square of that."""
    shapes = [(LAYERS, 400, 6), (LAYERS, 400, 6)]
    place = Place(("q", "v"), Lora())
    one = Lora().adapter(jax.random.key(0), place, shapes, 50)
    assert isinstance(one, Adapter)
    for a, b in zip(one.a, one.b, strict=True):
        assert a.shape == (LAYERS, 400, 50) and b.shape == (LAYERS, 50, 6)
        assert np.abs(a).max() <= 1 / math.sqrt(400) and not np.any(b)
        np.testing.assert_allclose(np.var(a), 1 / 1200, rtol=0.05)
        assert not np.allclose(a[0], a[1])  # each layer its own
    other = Lora().adapter(jax.random.key(1), place, shapes, 50)
    assert not np.allclose(one.a[0], other.a[0])


# --- The train state ----------------------------------------------------------------

MODELS = {"one by one": MODEL, "scanned": SCANNED}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_begins_as_the_base_model_bit_for_bit(model):
    """B is zero, so neither the function nor the merged parameters have changed."""
    state = create(model)
    apply = applied(model)
    adapted = {"params": state.params, COLLECTION: state.subspace}
    np.testing.assert_array_equal(apply(adapted, X), apply({"params": state.params}, X))
    chex.assert_trees_all_equal(state.merged_params(), state.params)


RULES = {"everything": EVERYTHING, "q and v": QUERIES_AND_VALUES}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_gradients_are_those_of_the_model_by_hand(rules):
    """Of A and B where there is an adapter, of the parameter everywhere else."""
    state = moved(create(rules=rules))
    rest, adapters = split(state)
    assert set(adapters) == (ADAPTED if rules is QUERIES_AND_VALUES else set(KERNELS))
    loss, grads = jax.jit(lambda s: s.value_and_grad(partial(loss_fn, MODEL))(X, Y))(
        state
    )
    expected, (rest_grads, adapter_grads) = jax.jit(
        jax.value_and_grad(partial(hand_loss, state), argnums=(0, 1))
    )(rest, adapters)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    seen = flatten_paths(grads.params, is_leaf=lambda leaf: is_adapter(leaf))
    close = partial(chex.assert_trees_all_close, rtol=1e-4, atol=1e-6)
    close({path: seen[path] for path in rest}, rest_grads)
    close({path: seen[path] for path in adapters}, adapter_grads)


def is_adapter(leaf) -> bool:
    return isinstance(leaf, dict) and set(leaf) == {"a", "b"}


def test_no_full_size_gradient_of_an_adapted_kernel():
    """Neither comes back from `value_and_grad` nor is computed on the way."""
    state = create(rules=QUERIES_AND_VALUES)
    shapes = {path: w.shape for path, w in flatten_paths(state.params).items()}

    def differentiate(state):
        return state.value_and_grad(partial(loss_fn, MODEL))(X, Y)

    _, grads = jax.eval_shape(differentiate, state)
    seen = {path: leaf.shape for path, leaf in flatten_paths(grads.params).items()}
    for name in ("q_proj", "v_proj"):
        assert f"{name}/kernel" not in seen
        assert seen[f"{name}/kernel/a"] == (WIDTH, RANK)
        assert seen[f"{name}/kernel/b"] == (RANK, HEADS[name])
    others = {path: shape for path, shape in shapes.items() if path not in ADAPTED}
    assert {path: seen[path] for path in others} == others

    made = {
        (equation.outvars[0].aval.shape)
        for equation in jax.make_jaxpr(differentiate)(state).jaxpr.eqns
        if equation.primitive.name == "dot_general"
    }
    both_ways = {shapes[p] for p in ADAPTED} | {shapes[p][::-1] for p in ADAPTED}
    assert not made & both_ways
    full = {shapes["k_proj/kernel"], shapes["k_proj/kernel"][::-1]}
    assert made & full  # it would have been seen


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_steps_are_those_of_optax_by_hand(rules):
    """Three steps of clipping and AdamW on hand-built A, B and what is not adapted.

    The kernels W stay as they were, bit for bit; everything else moves.
    """
    state = moved(create(rules=rules))
    start, (rest, adapters) = state, split(state)
    opt_state = TX.init((rest, adapters))

    @jax.jit
    def theirs(trained, opt_state):
        grads = jax.grad(partial(hand_loss, start), argnums=(0, 1))(*trained)
        updates, opt_state = TX.update(grads, opt_state, trained)
        return optax.apply_updates(trained, updates), opt_state

    trained = (rest, adapters)
    compiled = step._cache_size()
    for _ in range(3):
        state = step(MODEL, state, X)
        trained, opt_state = theirs(trained, opt_state)
    assert step._cache_size() <= compiled + 1
    chex.assert_trees_all_close(split(state), trained, rtol=1e-4, atol=1e-5)
    before, after = flatten_paths(start.params), flatten_paths(state.params)
    for path in before:
        same = np.array_equal(before[path], after[path])
        assert same == (path in adapters), path
    for path, leaves in adapters_of(state).items():
        assert not np.allclose(leaves["a"], adapters[path]["a"], atol=1e-4), path
        assert not np.allclose(leaves["b"], adapters[path]["b"], atol=1e-4), path


MERGES = {
    f"{name}, {dtype}": (model, dtype, tolerance)
    for name, model in MODELS.items()
    # bfloat16 rounds the merged weights, of which there are two dozen in a sum.
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 2e-2))
}


@pytest.mark.parametrize("model, dtype, tolerance", MERGES.values(), ids=MERGES)
def test_merged_parameters_are_the_same_function(model, dtype, tolerance):
    """As a plain tree of the same shapes and dtypes, applied without the subspace."""
    model = model.clone(param_dtype=jnp.dtype(dtype))
    state = moved(create(model))
    merged = state.merged_params()
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, state.params)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(merged))
    apply = applied(model)
    adapted = apply({"params": state.params, COLLECTION: state.subspace}, X)
    plain = apply({"params": state.params}, X)
    scale = np.abs(adapted).max()
    error = np.abs(apply({"params": merged}, X) - adapted).max() / scale
    assert error < tolerance
    assert np.abs(plain - adapted).max() / scale > 10 * tolerance  # not for nothing
    widened = by_hand(
        jax.tree.map(lambda a: a.astype(jnp.float32), state.params), adapters_of(state)
    )
    expected = jax.tree.map(lambda a: a.astype(dtype), widened)
    chex.assert_trees_all_close(merged, expected, rtol=1e-2 * (dtype != "float32"))


def test_merging_leaves_other_methods_alone():
    """Without adapters the merged parameters are the parameters themselves."""
    state = create(rules=(Rule("up", 0.5, gradient="full"),))
    chex.assert_trees_all_equal(state.merged_params(), state.params)


def test_what_is_not_finite_changes_no_adapter():
    state = moved(create())

    after = step(MODEL, state, X * jnp.nan)
    assert int(after.diagnostics.skipped) == 1
    for name in ("params", "subspace", "opt_state"):
        chex.assert_trees_all_equal(getattr(after, name), getattr(state, name))


def test_checkpoint_comes_back_bit_for_bit(tmp_path):
    """Into a state of another seed, whose A is another; and it goes on the same way."""
    model = SCANNED

    saved = step(model, step(model, create(model), X), X)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, saved, config={"method": "lora"})
    fresh = create(model, seed=5)
    assert not np.allclose(adapters_of(fresh)["blocks/up/kernel"]["a"][0, 0], 0)
    with Checkpoints(tmp_path) as checkpoints:
        done, restored = checkpoints.restore(fresh)
    assert done == 2
    chex.assert_trees_all_equal(
        [np.asarray(leaf) for leaf in jax.tree.leaves(restored)],
        [np.asarray(leaf) for leaf in jax.tree.leaves(saved)],
    )
    after, expected = step(model, restored, X), step(model, saved, X)
    chex.assert_trees_all_equal(after.subspace, expected.subspace)
    chex.assert_trees_all_equal(after.params, expected.params)


def as_before(state: OasisTrainState) -> dict:
    """The leaves by the names that earlier versions gave them: those of the model's trees.

    Adapters were kept in `subspace` and kernels, adapted or not, in `params`.
    """
    same = ("step", "opt_state", "diagnostics", "seed")
    trees = {name: getattr(state, name) for name in same}
    return trees | {"params": state.params, "subspace": state.subspace}


OASIS = oasis_adam(1e-2)
MIXED = (
    Rule("q_proj|v_proj", RANK, Lora(alpha=6)),
    Rule("up", 0.5, Oja(axes="gradient")),
    Rule("down", 0.5, Random(stored=False)),
)


@pytest.mark.parametrize("rules", [EVERYTHING, MIXED], ids=["lora", "mixed"])
def test_checkpoints_of_earlier_versions_restore(rules, tmp_path):
    """Their leaves had other paths; all of them come back, and none is left over."""
    saved = jax.tree.map(lambda a: a + 1, created(MODEL, rules, 0, OASIS))
    old = as_before(saved)
    paths = set(flatten_paths(old))
    assert {"params/q_proj/kernel", "subspace/qkv/a/1", "subspace/qkv/b/0"} <= paths
    if rules is MIXED:
        gram = {"subspace/up/projection/basis", "subspace/up/projection/gram"}
        assert gram | {"subspace/down/projection/basis/seed"} <= paths
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, old, config={})
    fresh = created(MODEL, rules, 5, OASIS)
    with Checkpoints(tmp_path) as checkpoints:
        _, restored = checkpoints.restore(fresh)
        checkpoints.save(3, restored, config={}, force=True)
        _, again = checkpoints.restore(fresh)
    chex.assert_trees_all_equal(restored, saved)
    chex.assert_trees_all_equal(again, saved)


BAD = {
    "alpha zero": (lambda: Lora(alpha=0), "lora: alpha is 0, expected a positive"),
    "alpha negative": (lambda: Lora(alpha=-2.0), "lora: alpha is -2.0, expected a pos"),
    "alpha nan": (lambda: Lora(alpha=float("nan")), "lora: alpha is nan, expected a"),
    "rank above n_in": (
        lambda: create(rules=(Rule("up", 11, Lora()),)),
        "up/kernel: rule 'up' asks for rank 11, but it has only 10 input features",
    ),
    "no match": (
        lambda: create(rules=(Rule("gate", 2, Lora()),)),
        "rule 'gate' matches no kernel; the nearest are",
    ),
    "two ranks on one input": (
        lambda: create(rules=(Rule("q_proj", 2, Lora()), Rule("v_proj", 3, Lora()))),
        "qkv: the kernels q_proj/kernel, v_proj/kernel share one input",
    ),
}


@pytest.mark.parametrize("make, sentence", BAD.values(), ids=BAD)
def test_bad_options(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_rank_may_exceed_n_out():
    """Only A must be thin: five outputs, rank six."""
    state = create(rules=(Rule("down", 6, Lora()),))
    assert adapters_of(state)["down/kernel"]["b"].shape == (6, OUT)
