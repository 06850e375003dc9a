"""Devices to compile for: the table, its errors, and a compilation for each."""

import re

import jax
import jax.numpy as jnp
import pytest

from oasis_jax.planning import memory, targets
from oasis_jax.planning.memory import Plan, PlanError, compiled_bytes, plan
from oasis_jax.planning.targets import TARGETS, TargetError, find

WEIGHTS = jax.ShapeDtypeStruct((256, 256), jnp.float32)


def step(weights):
    return weights - 0.1 * (weights @ weights)


def needs(name: str) -> None:
    """Skips where the target's compiler is not installed."""
    target = find(name)
    if not target.installed:
        pytest.skip(f"{name} needs the extra {target.extra}")


# --- The table ----------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_rows_are_plausible(target):
    assert target.platform in ("cpu", "gpu", "tpu")
    assert 2**33 < target.memory < 2**38
    assert 1e11 < target.flops < 1e16
    assert 1e10 < target.bandwidth < 1e13
    assert (target.gpu is not None) == (target.platform == "gpu")
    assert bool(target.slice) == (target.platform == "tpu")
    extras = {"cpu": None, "gpu": "plan-gpu", "tpu": "plan-tpu"}
    assert target.extra == extras[target.platform]


def test_extras_exist():
    import tomllib
    from pathlib import Path

    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    for target in TARGETS.values():
        assert target.extra is None or target.extra in project["optional-dependencies"]


@pytest.mark.parametrize(
    "name", [name for name, target in TARGETS.items() if target.platform == "gpu"]
)
def test_description_is_well_formed(name):
    """As text protos are: braces match, every field has a value."""
    target = TARGETS[name]
    text = target.gpu.describe(target.memory, target.bandwidth)
    assert text.count("{") == text.count("}")
    fields = dict(re.findall(r"(\w+): (\S+)", text))
    assert int(fields["device_memory_size"]) == target.memory
    assert int(fields["memory_bandwidth"]) == target.bandwidth
    assert int(fields["core_count"]) == target.gpu.cores


def test_a_slice():
    assert find("v5p").slice == "2x2x1"
    assert find("v5p:4x4x4").slice == "4x4x4"
    assert find("v5p:4x4x4").memory == find("v5p").memory


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h300", "target is 'h300', expected one of h200, h100, a100, l4"),
        ("", "target is '', expected one of"),
        ("h200:2x2", "target h200:2x2: h200 has no slices, only a TPU has"),
        ("v5p:2x2", "the slice is '2x2', expected 3 numbers of chips such as 2x2x1"),
        ("v5e:2x0", "the slice is '2x0', expected 2 numbers of chips such as 2x2"),
        ("v5e:", "the slice is '', expected 2 numbers"),
    ],
)
def test_unknown_targets(name, message):
    with pytest.raises(TargetError, match=re.escape(message)):
        find(name)


@pytest.mark.parametrize(
    ("name", "extra"), [("h200", "plan-gpu"), ("v5p:2x2x1", "plan-tpu")]
)
def test_missing_compiler(monkeypatch, name, extra):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda module: None)
    sentence = f"target {name} needs the extra {extra}: pip install"
    with pytest.raises(TargetError, match=sentence) as caught:
        plan(step, WEIGHTS, target=name)
    assert str(caught.value).endswith(f"'oasis_jax[{extra}]'")
    assert "\n" not in str(caught.value)


# --- A plan -------------------------------------------------------------------------


def test_cpu_plan_is_the_compilers():
    compiled = jax.jit(step, donate_argnums=0).lower(WEIGHTS).compile()
    found = plan(step, WEIGHTS)
    assert found.peak_bytes == compiled_bytes(compiled)
    assert found.argument_bytes == found.output_bytes == found.alias_bytes == 2**18
    assert not found.refused
    total = found.argument_bytes + found.output_bytes + found.temporary_bytes
    assert found.peak_bytes == total - found.alias_bytes


def test_arrays_and_shapes_are_the_same():
    assert plan(step, jnp.ones((256, 256))) == plan(step, WEIGHTS)


def test_donation():
    assert plan(step, WEIGHTS, donate=()).alias_bytes == 0
    jitted = jax.jit(step)  # keeps its own
    assert plan(jitted, WEIGHTS).alias_bytes == 0


def test_what_does_not_compile_is_named():
    def wrong(weights):
        return weights @ jnp.ones((3, 3))

    with pytest.raises(PlanError) as caught:
        plan(wrong, WEIGHTS, name="my step")
    first = str(caught.value).splitlines()[0]
    assert first.startswith("my step on cpu: TypeError: dot_general")


@pytest.mark.parametrize(
    ("message", "peak"),
    [
        ("Ran out of memory. Used 120.50G of 95.74G hbm. Exceeded", 120.5 * 2**30),
        (
            "the total memory required for HLO temporaries (32.00G) exceeds available"
            " HBM (15.75G).",
            33 * 2**30,
        ),
    ],
)
def test_refusals_of_a_tpu(message, peak):
    inputs = outputs = aliased = 2**30
    found = memory._refused(message, inputs, outputs, aliased)
    assert found == Plan(peak, inputs, outputs, peak - 2**30, aliased, refused=True)


@pytest.mark.parametrize("name", TARGETS)
def test_compiles(name):
    needs(name)
    found = plan(step, WEIGHTS, target=name)
    assert found.argument_bytes == found.alias_bytes == 2**18
    assert found.peak_bytes < 2**23


@pytest.mark.parametrize("name", ["h200", "v5e", "cpu"])
def test_lowers_for_the_target(name):
    """Not for the machine that compiles."""
    needs(name)

    def by_platform(x):
        return jax.lax.platform_dependent(
            x,
            cuda=lambda x: jnp.concatenate([x, x]),
            tpu=lambda x: jnp.concatenate([x, 2 * x]),
            cpu=lambda x: jnp.concatenate([x, 3 * x]),
        )

    found = plan(by_platform, WEIGHTS, target=name, donate=())
    assert found.output_bytes == 2**19


def test_fused_attention():
    """cuDNN's, compiled without a GPU: it never holds the scores."""
    needs("h200")
    heads = jax.ShapeDtypeStruct((2, 1024, 8, 64), jnp.bfloat16)

    def grads(q, k, v, implementation):
        def loss(*qkv):
            out = jax.nn.dot_product_attention(
                *qkv, is_causal=True, implementation=implementation
            )
            return out.astype(jnp.float32).sum()

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    scores = 2 * 8 * 1024 * 1024 * 2
    found = plan(
        lambda q, k, v: grads(q, k, v, "cudnn"), heads, heads, heads, target="h200"
    )
    assert found.temporary_bytes < scores


def test_a_step_too_large_for_a_tpu():
    needs("v5e")
    large = jax.ShapeDtypeStruct((65536, 65536), jnp.float32)
    found = plan(step, large, target="v5e")
    assert found.refused
    assert found.peak_bytes > find("v5e").memory
