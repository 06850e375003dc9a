"""From coordinates to weights, in place."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from oasis_jax.bases import Blocks, Seeded
from oasis_jax.lift import Step, is_step, lift

N, R, M = 8, 4, 3
DECAY = -0.25


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def held(kind, batch):
    """A basis per layer, and P with the factor of its lift, in float64."""
    if kind == "array":
        basis = normal(1, *batch, N, R)
        return basis, np.asarray(basis, np.float64)
    if kind == "seeded":
        seeds = jnp.arange(np.prod(batch, dtype=int), dtype=jnp.float32)
        basis = Seeded(seeds.reshape(batch), N, R, salt=3)
        return basis, np.asarray(basis.array(), np.float64)
    basis = Blocks(normal(2, *batch, N // R), R, 0.5)
    vectors = np.asarray(basis.vector, np.float64).reshape(-1, N // R, 1)
    whole = np.stack([0.5 * np.kron(np.eye(R), v) for v in vectors])
    return basis, whole.reshape(*batch, N, R)


def pieces(batch=(), dtype=jnp.float32):
    step = Step(normal(3, *batch, R, M), jnp.float32(DECAY))
    return normal(4, *batch, N, M, dtype=dtype), step


KINDS = pytest.mark.parametrize("kind", ["array", "seeded", "blocks"])


@KINDS
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
def test_applied_is_the_sum(batch, kind):
    kernel, step = pieces(batch)
    basis, p = held(kind, batch)
    w, d = (np.asarray(a, np.float64) for a in (kernel, step.coordinates))

    @jax.jit
    def both(step, kernel, basis):
        return step.applied(kernel, basis), lift(basis, step.coordinates)

    new, lifted = both(step, kernel, basis)
    assert new.dtype == kernel.dtype
    np.testing.assert_allclose(new, w + p @ d + DECAY * w, atol=2e-6)
    np.testing.assert_allclose(lifted, p @ d, atol=2e-6)


@pytest.mark.parametrize(
    "batch, kind, dtype",
    [
        ((), "array", jnp.float32),
        ((2, 3), "array", jnp.bfloat16),
        ((3,), "blocks", jnp.float32),
        ((3,), "seeded", jnp.bfloat16),
    ],
)
def test_not_applied_leaves_every_bit(batch, kind, dtype):
    kernel, step = pieces(batch, dtype)
    kernel = np.array(kernel)
    kernel[..., 0, 0] = -0.0
    bad = Step(jnp.full_like(step.coordinates, jnp.nan), step.decay)
    basis, _ = held(kind, batch)
    same = jax.jit(Step.applied)(bad, kernel, basis, jnp.asarray(False))
    assert same.dtype == dtype
    assert np.asarray(same).tobytes() == kernel.tobytes()


@pytest.mark.parametrize("batch", [(), (2,)])
def test_bfloat16_is_rounded_once(batch):
    """Lift and decay are 3/8 of a unit in the last place each; their sum rounds up."""
    part = 0.75 * 2**-8
    kernel = jnp.ones((*batch, 2, 2), jnp.bfloat16)
    basis = jnp.broadcast_to(jnp.eye(2), kernel.shape)
    step = Step(jnp.full(kernel.shape, part), jnp.float32(part))
    new = jax.jit(Step.applied)(step, kernel, basis)
    assert new.dtype == jnp.bfloat16
    np.testing.assert_array_equal(new.astype(jnp.float32), 1 + 2**-7)


def test_linear_under_optax():
    """What scales an update scales the step."""
    kernel, step = pieces((2,))
    basis, _ = held("array", (2,))
    tx = optax.chain(optax.scale(-0.5), optax.scale_by_learning_rate(0.2))
    scaled, _ = tx.update({"w": step}, tx.init({"w": kernel}))
    assert is_step(scaled["w"])
    applied = jax.jit(Step.applied)
    change = applied(step, kernel, basis) - kernel
    new = applied(scaled["w"], kernel, basis)
    np.testing.assert_allclose(new, kernel + 0.1 * change, atol=1e-6)


def test_ranks_must_agree():
    with pytest.raises(ValueError, match=r"basis has shape \(8, 4\).*rank 4 is not 3"):
        lift(jnp.ones((8, 4)), jnp.ones((3, 2)))
