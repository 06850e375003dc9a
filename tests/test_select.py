"""Rules decide, say what they matched, and refuse nonsense."""

import jax
import jax.numpy as jnp
import pytest

from oasis_jax import Declaration, Fixed, Place, Probe, Random, Rule, select

PARAMS = {
    "attn": {
        name: {"kernel": jax.ShapeDtypeStruct((3, 16, 8), jnp.float32)}
        for name in ("q_proj", "k_proj", "v_proj")
    },
    "mlp": {"down": {"kernel": jax.ShapeDtypeStruct((3, 32, 16), jnp.float32)}},
    "head": {"kernel": jax.ShapeDtypeStruct((16, 100), jnp.float32)},
}
QKV = ("q_proj/kernel", "k_proj/kernel", "v_proj/kernel")
DECLARED = {
    "attn": {"qkv": Declaration(Place(QKV))},
    "mlp": {"down": {"projection": Declaration(Place(("kernel",)))}},
}

CASES = {
    "fraction": ([Rule(".*", 0.25)], {"attn/qkv": 4, "mlp/down/projection": 8}),
    "number": ([Rule(".*", 5)], {"attn/qkv": 5, "mlp/down/projection": 5}),
    "at least one": ([Rule("attn", 0.001)], {"attn/qkv": 1}),
    "all of it": ([Rule("mlp", 1.0)], {"mlp/down/projection": 32}),
    "first match wins": (
        [Rule("mlp", 0.125), Rule(".*", 0.5)],
        {"attn/qkv": 8, "mlp/down/projection": 4},
    ),
    "full": ([Rule("attn", "full"), Rule(".*", 2)], {"mlp/down/projection": 2}),
    "none": ([], {}),
}


@pytest.mark.parametrize("rules, ranks", CASES.values(), ids=CASES)
def test_ranks(rules, ranks):
    selection = select(PARAMS, DECLARED, rules)
    assert {path: shape[-1] for path, shape in selection.shapes.items()} == ranks
    made = selection.init(jax.random.key(0))
    assert {path: p.basis.shape for path, p in made.items()} == selection.shapes
    assert all(shape[0] == 3 for shape in selection.shapes.values())  # scanned layers


def test_trackers_and_strides_reach_their_place():
    rules = [Rule("attn", 2, Random(9), stride=4), Rule("mlp", 2, "fixed")]
    made = select(PARAMS, DECLARED, rules).init(jax.random.key(0))
    assert made["attn/qkv"].place == Place(QKV, Random(9), stride=4)
    assert made["mlp/down/projection"].tracker == Fixed()


def test_part_of_a_shared_input():
    """Only v is projected; q and k are applied plainly, and all come out right."""
    rules = [Rule("v_proj", 4), Rule("mlp", 4)]
    place = select(PARAMS, DECLARED, rules).init(jax.random.key(0))["attn/qkv"]
    assert place.kernels == ("v_proj/kernel",)
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (5, 16))
    weights = {
        n: jax.random.normal(k, (16, 8)) for n, k in zip(QKV, keys[1:], strict=True)
    }
    probe = Probe(place.place, place.basis[0], (jnp.zeros((4, 8)),), jnp.zeros(()))
    outputs = probe(x, weights)
    for output, kernel in zip(outputs, weights.values(), strict=True):
        assert jnp.array_equal(output, x @ kernel)


def test_bases_differ_by_place_and_seed():
    def made(seed):
        selection = select(PARAMS, DECLARED, [Rule(".*", 4)])
        return selection.init(jax.random.key(seed))

    first = made(0)
    assert not jnp.allclose(
        first["attn/qkv"].basis, first["mlp/down/projection"].basis[:, :16]
    )
    assert not jnp.allclose(first["attn/qkv"].basis, made(1)["attn/qkv"].basis)
    assert jnp.array_equal(first["attn/qkv"].basis, made(0)["attn/qkv"].basis)


def test_report():
    rules = [Rule("q_proj|k_proj|v_proj", 0.25), Rule("nothing|mlp", "full")]
    assert str(select(PARAMS, DECLARED, rules)) == (
        "'q_proj|k_proj|v_proj' (rank 0.25, oja)\n"
        "  attn/q_proj/kernel\n"
        "  attn/k_proj/kernel\n"
        "  attn/v_proj/kernel\n"
        "'nothing|mlp' (full)\n"
        "  mlp/down/kernel"
    )
    assert "no rule (full)\n  mlp/down/kernel" in str(
        select(PARAMS, DECLARED, [Rule("attn", 2)])
    )


BAD_RULES = {
    "zero": (dict(rank=0), "rank is 0"),
    "negative": (dict(rank=-1), "rank is -1"),
    "above one": (dict(rank=1.5), "rank is 1.5"),
    "zero share": (dict(rank=0.0), "rank is 0.0"),
    "nan": (dict(rank=float("nan")), "rank is nan"),
    "bool": (dict(rank=True), "rank is True"),
    "word": (dict(rank="half"), "rank is 'half'"),
    "tracker": (dict(tracker="adam"), "tracker is 'adam', expected one of"),
    "stride": (dict(stride=0), "stride is 0"),
}


@pytest.mark.parametrize("fields, sentence", BAD_RULES.values(), ids=BAD_RULES)
def test_bad_rules(fields, sentence):
    with pytest.raises(ValueError, match=f"rule 'attn': {sentence}"):
        Rule("attn", **fields)


def test_bad_pattern():
    with pytest.raises(ValueError, match=r"rule '\(': missing \)"):
        Rule("(")


BAD_SELECTIONS = {
    "nothing matched": (
        [Rule("attn/w_proj")],
        r"rule 'attn/w_proj' matches no kernel; the nearest are attn/._proj/kernel",
    ),
    "shadowed": (
        [Rule(".*"), Rule("mlp")],
        "rule 'mlp' decides nothing: earlier rules",
    ),
    "rank above n_in": (
        [Rule("attn", 17)],
        r"attn/q_proj/kernel: rule 'attn' asks for rank 17, .* only 16 input features",
    ),
    "conflict": (
        [Rule("q_proj", 2), Rule(".*", 4)],
        r"attn/qkv: the kernels .* share one input and so one basis, but rules",
    ),
    "not declared": ([Rule("head")], "rule 'head' matches no kernel"),
}


@pytest.mark.parametrize("rules, sentence", BAD_SELECTIONS.values(), ids=BAD_SELECTIONS)
def test_bad_selections(rules, sentence):
    with pytest.raises(ValueError, match=sentence):
        select(PARAMS, DECLARED, rules)


def test_model_without_projectable_layers():
    with pytest.raises(ValueError, match=r"declares no projectable layer \(OasisDense"):
        select(PARAMS, {}, [Rule(".*")])
