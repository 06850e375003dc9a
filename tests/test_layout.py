"""The static plan of a state: which kernel belongs where, and what its views show."""

import chex
import jax
import jax.numpy as jnp
import pytest

from oasis_jax import (
    Declaration,
    Lora,
    OasisTrainState,
    Place,
    Probe,
    Projection,
    Rule,
    oasis_adam,
)
from oasis_jax.layout import Kernel
from oasis_jax.lora import Adapter

PARAMS = {
    "attn": {n: {"kernel": jnp.ones((16, 8))} for n in ("q", "k", "v")},
    "mlp": {"kernel": jnp.ones((24, 16)), "bias": jnp.ones(16)},
    "head": {"kernel": jnp.ones((16, 5))},
}
DECLARED = {
    "attn": {"qkv": Declaration(Place(("q/kernel", "k/kernel", "v/kernel")))},
    "mlp": {"projection": Declaration(Place(("kernel",)))},
    "head": {"projection": Declaration(Place(("kernel",)))},
    "norm": {"input": Declaration(token=jnp.zeros((2, 16)))},
}
RULES = (
    Rule("q/|v/", 4, gradient="full"),
    Rule("mlp", 3, Lora(alpha=6)),
    Rule("norm", 2, inputs=True),
)
TX = oasis_adam(1e-2)


def create(rules=RULES):
    return OasisTrainState.create(
        apply_fn=lambda *_: None, params=PARAMS, subspace=DECLARED, tx=TX, rules=rules
    )


def test_kernels():
    assert create().layout.kernels == {
        "attn/q/kernel": Kernel("attn/q/kernel", "attn/qkv", 0, "full"),
        "attn/v/kernel": Kernel("attn/v/kernel", "attn/qkv", 1, "full"),
        "mlp/kernel": Kernel("mlp/kernel", "mlp/projection", 0, "adapter"),
    }


def test_is_static():
    """Equal, and of one hash, for equal decisions; another for others."""
    one, other = create().layout, create().layout
    assert one is not other and one == other and hash(one) == hash(other)
    assert one != create(RULES[:1]).layout
    state = create()
    same = state.with_variables(state.params, state.subspace)
    assert jax.tree.structure(same) == jax.tree.structure(state)


def test_views():
    """What a model is applied to: the plain parameters, and one site for each input."""
    state = create()
    chex.assert_trees_all_equal(state.params, PARAMS)
    assert set(state.frozen) == {"mlp/kernel"}
    assert {k: v.shape for k, v in state.trained["mlp"]["kernel"].items()} == {
        "a": (24, 3),
        "b": (3, 16),
    }
    kinds = {
        "attn/qkv": Projection,
        "norm/input": Projection,
        "mlp/projection": Adapter,
    }
    for subspace, kind in ((state.subspace, Projection), (state.probed, Probe)):
        sites = state.layout.sites.split(subspace)
        assert isinstance(sites.pop("head/projection"), Declaration)
        assert {path: type(site) for path, site in sites.items()} == {
            path: kind if known is Projection else known
            for path, known in kinds.items()
        }
    assert [s.shape for s in state.probed["attn"]["qkv"].slots] == [(4, 8)] * 2
    assert state.probed["norm"]["input"].energy.shape == (2,)


def test_variables_come_back():
    state = create()
    doubled = jax.tree.map(lambda a: 2 * a, (state.params, state.subspace))
    other = state.with_variables(*doubled)
    chex.assert_trees_all_equal((other.params, other.subspace), doubled)
    chex.assert_trees_all_equal(
        other.merged_params()["mlp"]["kernel"], 2 * PARAMS["mlp"]["kernel"]
    )


def test_another_shape_is_refused():
    with pytest.raises(ValueError, match="mlp"):
        create().with_variables({"attn": PARAMS["attn"]}, create().subspace)
