"""What a step needs: as counted, as the compiler reports it, and against AdamW."""

import jax
import jax.numpy as jnp
import optax
import pytest

from oasis_jax import OasisTrainState, oasis_adam
from oasis_jax.methods import method
from oasis_jax.models import llama
from oasis_jax.planning.memory import (
    compiled_bytes,
    saved_activations,
    step_memory,
    tree_bytes,
)


def build(name: str, rank: float = 0.125, remat: str = "elementwise"):
    """A method on a LLaMA of two small layers: state, loss and a batch."""
    config = llama.LlamaConfig(64, 64, 128, 2, 4, 4, remat=remat)
    model = llama.Llama(config)
    tokens = jnp.zeros((4, 33), jnp.int32)

    def loss_fn(variables, tokens):
        logits = model.apply(variables, tokens[:, :-1])
        return jnp.mean(llama.token_losses(logits, tokens[:, 1:]))

    recipe = method(name, rank=rank)
    state = OasisTrainState.create(
        apply_fn=model.apply,
        **model.init(jax.random.key(0), tokens[:, :-1]),
        tx=recipe.optimizer(1e-3),
        rules=recipe.rules,
    )
    return state, loss_fn, tokens


def compiled_step(state, loss_fn, tokens):
    def step(state, tokens):
        loss, grads = state.value_and_grad(loss_fn)(tokens)
        return state.apply_gradients(grads), loss

    return jax.jit(step, donate_argnums=0).lower(state, tokens).compile()


def only(tree, paths):
    """The leaves of a parameter-shaped tree at these paths."""
    from oasis_jax.paths import flatten_paths

    return [leaf for path, leaf in flatten_paths(tree).items() if path in paths]


def test_gradients_and_moments_of_projected_kernels():
    """At r = n/8 they take at most 0.15 of AdamW's, compiled and counted."""
    oasis, loss_fn, tokens = build("oasis")
    adamw, _, _ = build("adamw")
    projected = oasis.layout.kernels
    assert len(projected) == 7

    def needs(state):
        def kept(params, subspace, opt_state, tokens):
            """Gradients and moments of the projected kernels, as a step makes them."""
            import dataclasses

            inner = dataclasses.replace(
                state.with_variables(params, subspace), opt_state=opt_state
            )
            _, grads = inner.value_and_grad(loss_fn)(tokens)
            moments = inner.apply_gradients(grads).opt_state[0]
            trees = (grads.params, moments.mu, moments.nu)
            return [only(tree, projected) for tree in trees]

        compiled = (
            jax.jit(kept)
            .lower(state.params, state.subspace, state.opt_state, tokens)
            .compile()
        )
        reported = compiled.memory_analysis().output_size_in_bytes
        counted = tree_bytes(
            jax.eval_shape(kept, state.params, state.subspace, state.opt_state, tokens)
        )
        # The compiler adds a table of pointers for the tuple.
        assert counted <= reported <= counted + 1024
        return reported

    assert needs(oasis) <= 0.15 * needs(adamw)


def kept(name: str, remat: str) -> list[tuple[int, ...]]:
    """Shapes of what autodiff keeps of a step's loss."""
    state, loss_fn, tokens = build(name, remat=remat)

    def loss(params, subspace):
        return loss_fn({"params": params, "subspace": subspace}, tokens)

    return [a.shape for a in saved_activations(loss, state.params, state.probed)]


WIDE, HIDDEN = (2, 4, 32, 64), (2, 4, 32, 128)  # layers, batch, tokens, n_in
HEADS = (2, 4, 32, 4, 16)
Z, Z_DOWN = (2, 4, 32, 8), (2, 4, 32, 16)  # r = n_in / 8


def test_saved_activations():
    """Without recomputation a plain model keeps every dense layer's input, a projected
    one none of them: norms' outputs feed q/k/v and gate/up, SwiGLU's down_proj."""
    oasis, adamw = kept("oasis", "none"), kept("adamw", "none")
    assert oasis.count(WIDE) <= adamw.count(WIDE) - 2
    assert oasis.count(HIDDEN) == adamw.count(HIDDEN) - 1
    assert (oasis.count(Z), oasis.count(Z_DOWN)) == (3, 1)


@pytest.mark.parametrize(
    "remat, wide, heads, hidden, z, z_down",
    [
        # The residual stream twice; q, k, v, attention's output; gate and up.
        ("elementwise", 2, 4, 2, 3, 1),
        ("mlp", 1, 4, 0, 0, 0),
        ("block", 1, 0, 0, 0, 0),
    ],
)
def test_saved_at_each_level(remat, wide, heads, hidden, z, z_down):
    """What the level's names say, for both methods, and of each no more than once."""
    for name, projections in (("oasis", (z, z_down)), ("adamw", (0, 0))):
        shapes = kept(name, remat)
        counts = [shapes.count(shape) for shape in (WIDE, HEADS, HIDDEN)]
        assert counts == [wide, heads, hidden]
        assert (shapes.count(Z), shapes.count(Z_DOWN)) == projections


def test_step_memory_adds_up():
    state, loss_fn, tokens = build("oasis")
    compiled = compiled_step(state, loss_fn, tokens)
    parts = step_memory(state, loss_fn, tokens, compiled=compiled)
    assert parts["peak"] == compiled_bytes(compiled)
    assert parts["weights"] == tree_bytes(state.params)
    resident = parts["weights"] + parts["optimizer_state"] + parts["bases"]
    assert parts["peak"] > resident + parts["saved_activations"]


@pytest.mark.parametrize("remat", ["elementwise", "block"])
def test_peak_is_below_adamw(remat):
    """The whole compiled step, with the same recomputation for both."""
    oasis = compiled_bytes(compiled_step(*build("oasis", remat=remat)))
    adamw = compiled_bytes(compiled_step(*build("adamw", remat=remat)))
    assert oasis < 0.9 * adamw


def test_donation_aliases_the_whole_state():
    state, loss_fn, tokens = build("oasis")
    analysis = compiled_step(state, loss_fn, tokens).memory_analysis()
    assert analysis.alias_size_in_bytes >= tree_bytes(
        (state.params, state.subspace, state.opt_state)
    )


def test_adamw_row_is_adamw():
    """`oasis_adam` without projections is `optax.adamw`, state for state in bytes."""
    params = {"w": jnp.ones((3, 2))}
    ours = oasis_adam(1e-3).init(params)
    assert tree_bytes(ours) == tree_bytes(optax.adamw(1e-3).init(params))
