"""One contract for every row of the table of methods; joining it is being a row.

The model is as small as a model with every kind of place can be: two scanned layers with
a shared input, a norm, SwiGLU, and names that the rows' own patterns match.
"""

from dataclasses import replace
from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oasis_jax import OasisTrainState
from oasis_jax.checkpoints import Checkpoints
from oasis_jax.layout import kernel_paths
from oasis_jax.linen import OasisDense, shared_dense
from oasis_jax.lora import Lora
from oasis_jax.methods import METHODS, method
from oasis_jax.models import llama
from oasis_jax.paths import flatten_paths
from oasis_jax.planning.memory import tree_bytes
from oasis_jax.subspace import COLLECTION
from oasis_jax.trackers import BlockMean, Complement, Fixed, Random

WIDTH, HIDDEN, LAYERS, BATCH = 16, 24, 2, 24
OWN = [name for name, row in METHODS.items() if not row.ablation]
# One of each kind: how layers are stacked, batches cut and numbers rounded.
QUICK = ("oasis", "lora", "galore")
# PRAC renews bases as VeLoRA does, and compiles far longer.
SOON = tuple(name for name in OWN if name != "prac")


def quick(names, chosen=QUICK):
    """The names, those that are not chosen by hand, for each compiles a model or two."""
    return [
        pytest.param(name, marks=() if name in chosen else pytest.mark.slow)
        for name in names
    ]


class Mix(nn.Module):
    """In attention's place: two kernels on one input, and one on their product."""

    dtype: Any

    @nn.compact
    def __call__(self, x):
        options = dict(use_bias=False, dtype=self.dtype)
        q, v = shared_dense(
            self, "qv", x, {"q_proj": WIDTH, "v_proj": WIDTH}, **options
        )
        return OasisDense(WIDTH, name="o_proj", **options)(nn.tanh(q) * v)


class Layer(nn.Module):
    config: llama.LlamaConfig

    @nn.compact
    def __call__(self, x, _):
        x += Mix(self.config.dtype, name="attn")(x)
        x += llama.MLP(self.config, name="mlp")(
            llama.RMSNorm(self.config, name="mlp_norm")(x)
        )
        return x, None


class Model(nn.Module):
    scanned: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        config = llama.LlamaConfig(
            7, WIDTH, HIDDEN, LAYERS, 1, 1, dtype=self.dtype, remat="none"
        )
        x = nn.Dense(WIDTH, dtype=self.dtype, name="embed")(x.astype(self.dtype))
        if self.scanned:
            x, _ = nn.scan(
                Layer,
                variable_axes={"params": 0, COLLECTION: 0},
                split_rngs={"params": True},
                length=LAYERS,
            )(config, name="blocks")(x, None)
        else:
            for i in range(LAYERS):
                x, _ = Layer(config, name=f"layer_{i}")(x, None)
        return nn.Dense(5, dtype=self.dtype, name="head")(x).astype(jnp.float32)


X = jax.random.normal(jax.random.key(1), (BATCH, 12)) * jnp.linspace(0.2, 3, 12)
Y = jnp.sin(X[:, :5])


def create(name: str, model: Model) -> OasisTrainState:
    recipe = method(name)
    rate = 3e-3 * METHODS[name].lr_factor
    tx = recipe.optimizer(rate, peak=rate)

    @jax.jit  # many small operations, compiled once
    def made():
        return OasisTrainState.create(
            apply_fn=model.apply,
            **model.init(jax.random.key(0), X),
            tx=tx,
            rules=recipe.rules,
        )

    return made()


def loss_fn(model: Model, variables, x, y):
    return jnp.mean((model.apply(variables, x) - y) ** 2)


def train_step(model: Model, state, x, y, accumulate: int = 1):
    loss = partial(loss_fn, model)
    state = state.refresh(loss, x, y, accumulate=accumulate)
    value, grads = state.value_and_grad(loss, accumulate=accumulate)(x, y)
    return state.apply_gradients(grads), value


@cache
def prepared(name: str):
    """A state, and the one compiled step that most of the contract runs with."""
    model = Model()
    state = create(name, model)
    step = jax.jit(partial(train_step, model))
    return state, step


def run(step, state, count: int, x=X, y=Y):
    losses = []
    for _ in range(count):
        state, loss = step(state, x, y)
        losses.append(float(loss))
    return state, losses


def equal(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.mark.parametrize("name", quick(METHODS, SOON))
def test_trains_and_compiles_once(name):
    """The loss falls, the step compiles once, a basis's columns stay orthogonal."""
    state, step = prepared(name)
    before = step._cache_size()
    state, losses = run(step, state, 80)
    assert step._cache_size() == max(before, 1)
    assert losses[-1] < 0.8 * losses[0] and np.isfinite(losses).all()
    if name in ("compact", "rso"):
        return  # Gaussian columns are only nearly orthogonal
    for basis in state.layout.bases(state.bases).values():
        p = basis if isinstance(basis, jax.Array) else basis.array()
        gram = p.mT @ p
        diagonal = jnp.diagonal(gram, axis1=-2, axis2=-1)
        assert jnp.abs(gram - diagonal[..., None] * jnp.eye(p.shape[-1])).max() < 2e-3


# Of the ablations one, whose basis keeps more than a basis.
@pytest.mark.parametrize("name", quick(METHODS, (*SOON, "oasis-gradient")))
@pytest.mark.parametrize("kind", ["zero gradient", "zero input", "rank one"])
def test_degenerate_batches_stay_finite(name, kind):
    state, step = prepared(name)
    x, y = {
        "zero gradient": (X, jax.jit(Model().apply)({"params": state.params}, X)),
        "zero input": (jnp.zeros_like(X), Y),
        "rank one": (jnp.ones_like(X), Y),
    }[kind]
    state, _ = run(step, state, 3, x, y)
    assert int(state.diagnostics.skipped) == 0
    leaves = jax.tree.leaves((state.params, state.subspace, state.opt_state))
    assert all(np.isfinite(leaf).all() for leaf in leaves)


@pytest.mark.parametrize("name", quick(OWN, SOON))
def test_resumes_bit_for_bit(name, tmp_path):
    """Saved after two steps and restored into a fresh state, it goes on as if nothing."""
    state, step = prepared(name)
    state, _ = run(step, state, 2)
    with Checkpoints(tmp_path, every=1) as checkpoints:
        checkpoints.save(2, state, config={}, force=True)
    through, _ = run(step, state, 2)
    with Checkpoints(tmp_path, every=1) as checkpoints:
        done, restored = checkpoints.restore(prepared(name)[0])
    assert done == 2
    equal(run(step, restored, 2)[0], through)


@pytest.mark.parametrize("name", OWN)
def test_bytes_of_the_state(name):
    """What the table says, and a few counters."""
    state, _ = prepared(name)
    row, selection = METHODS[name], method(name)
    kernels = {
        path: leaf.shape[1:]
        for path, leaf in flatten_paths(state.params).items()
        if path.endswith("kernel") and path.startswith("blocks")
    }
    adapted = set(state.frozen)
    gradient_side = not selection.rules and row.projected
    chosen = set(state.layout.kernels)
    if gradient_side or name == "muon":
        chosen = set(kernels)

    def rank(n_in: int, n_out: int) -> int:
        side = min(n_in, n_out) if gradient_side else n_in
        return round((row.rank or 0) * side)

    def numbers(count: Any, path: str) -> float:
        n_in, n_out = kernels[path]
        return LAYERS * count(n_in, n_out, rank(n_in, n_out))

    moments = sum(numbers(row.optimizer_numbers, path) for path in chosen)
    rest = {"adafactor": 1}.get(name, 2)  # everything else, in full
    moments += rest * sum(
        leaf.size
        for path, leaf in flatten_paths(state.params).items()
        if path not in chosen
    )
    spare = 64 + 16 * len(jax.tree.leaves(state.opt_state))  # counters, placeholders
    assert 4 * moments <= tree_bytes(state.opt_state) <= 4 * moments + spare

    held = sum(numbers(row.basis_numbers, path) for path in adapted)
    for path, place in state.bases.items():
        n_in, r = place.basis.shape[-2:]
        batch = int(np.prod(place.basis.shape[:-2]))
        shape = (
            kernels[kernel_paths(path, place.place)[0]] if place.kernels else (n_in, 0)
        )
        held += batch * row.basis_numbers(n_in, shape[1], r)
    assert tree_bytes(state.subspace) == 4 * held


@pytest.mark.parametrize("name", quick(OWN))
def test_layers_unrolled_and_batches_in_parts(name):
    """Layers one by one, each batch as three microbatches: the same as scanned, whole."""
    state, step = prepared(name)
    model = Model(scanned=False)

    def unrolled(tree: Any) -> Any:
        """`blocks` with its leading axis cut into `layer_0`, `layer_1`."""
        cut = {k: v for k, v in tree.items() if k != "blocks"}
        for i in range(LAYERS if "blocks" in tree else 0):
            cut[f"layer_{i}"] = jax.tree.map(lambda a, i=i: a[i], tree["blocks"])
        return cut

    # What is drawn depends on the path, so both begin with what the first step drew.
    begun, _ = run(step, state, 1)
    start = state.with_variables(state.params, begun.subspace)
    start = replace(start, step=begun.step)
    flat = create(name, model).with_variables(
        unrolled(start.params), unrolled(start.subspace)
    )
    flat = replace(flat, step=start.step)
    after, _ = run(jax.jit(partial(train_step, model, accumulate=3)), flat, 2)
    expected, _ = run(step, start, 2)
    close = partial(np.testing.assert_allclose, rtol=2e-4, atol=3e-5)
    jax.tree.map(close, after.params, unrolled(expected.params))


@pytest.mark.parametrize("name", quick(OWN))
def test_bfloat16(name):
    """Computes in bfloat16, trains, and keeps its own state in float32."""
    step = jax.jit(partial(train_step, Model(dtype=jnp.bfloat16)))
    state, losses = run(step, prepared(name)[0], 40)
    assert losses[-1] < 0.9 * losses[0]
    for leaf in jax.tree.leaves((state.params, state.subspace, state.opt_state)):
        assert leaf.dtype != jnp.bfloat16
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize("name", [n for n in METHODS if n.startswith("oasis")])
def test_scale_of_oasis_is_of_what_is_projected(name):
    params = {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}
    grads = {"kernel": jnp.arange(8.0).reshape(2, 4), "bias": jnp.ones(4)}
    updates = []
    for scale in (1.0, 0.25):
        tx = method(name, rank=2, scale=scale).optimizer(0.1, weight_decay=0.0)
        state = tx.init(grads)
        basis = {"kernel": jnp.eye(6, 2)}
        updates.append(tx.update(grads, state, params, basis=basis)[0])
    whole, part = updates
    np.testing.assert_array_equal(whole["bias"], part["bias"])
    got, wanted = part["kernel"].coordinates, whole["kernel"].coordinates
    np.testing.assert_allclose(got, 0.25 * wanted, rtol=1e-6)
    assert jnp.abs(wanted).max() > 0.05


def test_names_and_options_are_checked():
    with pytest.raises(ValueError, match="method is 'nosuch', expected one of adamw"):
        method("nosuch")
    with pytest.raises(
        ValueError, match="groups is no option of galore, whose are: interval, scale,"
    ):
        method("galore", groups=4)


# --- What a row says of itself --------------------------------------------------------

FORMS = {"coordinates": "projected", "full": "full, from P C"}


@pytest.mark.parametrize("name", METHODS)
def test_words_of_a_row_are_what_it_builds(name):
    """The form of the gradient, when the basis moves, what is projected."""
    row, (rules, optimizer) = METHODS[name], method(name)
    trackers = [rule.tracker for rule in rules]
    assert row.projected == (bool(rules) or row.gradient == "projected after the fact")
    if not rules:
        assert row.saves == "X"
    elif isinstance(trackers[0], Lora):
        assert (row.gradient, row.basis) == ("adapters", "trained")
    else:
        assert row.gradient == FORMS[rules[0].gradient]
        stands = isinstance(trackers[0], Fixed) or (
            isinstance(trackers[0], BlockMean) and trackers[0].average == "once"
        )
        assert (row.moved == "never") == stands
        assert ("random" in row.basis) == isinstance(trackers[0], Random | Complement)
    assert callable(optimizer)


@pytest.mark.parametrize("name", METHODS)
def test_options_of_a_row_reach_its_recipe(name):
    """As published they are its defaults; and what it lacks is refused by name."""
    published = METHODS[name].published
    assert method(name, **published).rules == method(name).rules
    with pytest.raises(ValueError, match=f"nosuch is no option of {name}, whose are: "):
        method(name, nosuch=1)
