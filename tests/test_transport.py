"""Moments in a new basis: what is exact, what the formula says, what stays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oasis_jax.bases import orthonormalise
from oasis_jax.transport import carry, keep, reset

B1, B2 = 0.9, 0.99


def moments(count=5, shape=(6, 4), seed=0):
    """Moments after `count` Adam updates, in float32."""
    rng = np.random.default_rng(seed)
    mu, nu = np.zeros(shape), np.zeros(shape)
    for _ in range(count):
        gradient = rng.normal(0.5, 1, shape)
        mu = B1 * mu + (1 - B1) * gradient
        nu = B2 * nu + (1 - B2) * gradient**2
    return jnp.asarray(mu, jnp.float32), jnp.asarray(nu, jnp.float32)


def basis(shape, seed=0):
    return orthonormalise(jax.random.normal(jax.random.key(seed), shape))


def transcription(mu, nu, motion, t, clip):
    """methods as printed in the LDAdam paper's code, in float64."""
    mu, nu, motion = (np.asarray(a, np.float64) for a in (mu, nu, motion))
    m, v = mu / (1 - B1**t), nu / (1 - B2**t)
    square = motion * motion
    if clip == "abs":
        bracket = np.abs(square @ (v - m * m) + (motion @ m) ** 2)
    else:
        bracket = square @ np.maximum(v - m * m, 0) + (motion @ m) ** 2
    return motion @ mu, (1 - B2**t) * bracket


@pytest.mark.parametrize("clip", ["variance", "abs"])
@pytest.mark.parametrize("count", [1, 2, 30])
def test_carry_is_the_formula(clip, count):
    mu, nu = moments(count)
    motion = basis((12, 6), 1).T @ basis((12, 6), 2)
    expected = transcription(mu, nu, motion, count, clip)
    got = carry(mu, nu, motion, count, B1, B2, clip=clip)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6)


def test_clips_agree_where_the_variance_is_positive():
    mu, nu = moments(30)
    motion = basis((6, 6), 1)
    mean, second = mu / (1 - B1**30), nu / (1 - B2**30)
    nu = nu + jnp.maximum(jnp.square(mean) - second, 0)
    both = [carry(mu, nu, motion, 30, B1, B2, clip=c)[1] for c in ("abs", "variance")]
    np.testing.assert_allclose(*both, rtol=1e-5, atol=1e-7)


def test_an_orthogonal_change_of_basis_leaves_p_m_unchanged():
    p_old = basis((12, 6))
    p_new = p_old @ basis((6, 6), 1)
    mu, nu = moments()
    moved, _ = carry(mu, nu, p_new.T @ p_old, 5, B1, B2)
    np.testing.assert_allclose(p_new @ moved, p_old @ mu, atol=1e-6)


def test_two_carries_within_a_span_compose():
    p0 = basis((12, 6))
    p1, p2 = p0 @ basis((6, 6), 1), p0 @ basis((6, 6), 2)
    mu, nu = moments()
    once, _ = carry(mu, nu, p2.T @ p0, 5, B1, B2)
    first, between = carry(mu, nu, p1.T @ p0, 5, B1, B2)
    twice, _ = carry(first, between, p2.T @ p1, 5, B1, B2)
    np.testing.assert_allclose(twice, once, atol=1e-5)


def test_second_moment_means_what_it_says():
    """For uncorrelated coordinates, E[(R c)^2] is what carry predicts from E[c^2]."""
    rng = np.random.default_rng(0)
    spread = np.linspace(0.5, 2, 6)[:, None]
    draws = rng.normal(0.3, 1, (200_000, 6, 1)) * spread
    motion = np.asarray(basis((6, 6), 3), np.float64)
    mean, second = draws.mean(axis=0), (draws**2).mean(axis=0)
    # So many updates that the bias corrections are 1.
    _, nu = carry(
        jnp.float32(mean), jnp.float32(second), jnp.float32(motion), 10**6, B1, B2
    )
    np.testing.assert_allclose(nu, ((motion @ draws) ** 2).mean(axis=0), rtol=0.02)


def test_nothing_to_carry_at_count_zero():
    mu, nu = moments()
    got = carry(mu, nu, basis((6, 6)), 0, B1, B2)
    np.testing.assert_array_equal(got[0], mu)
    np.testing.assert_array_equal(got[1], nu)


def test_identity_motion_changes_nothing():
    mu, nu = moments(30)
    got = carry(mu, nu, jnp.eye(6), 30, B1, B2)
    np.testing.assert_array_equal(got[0], mu)
    np.testing.assert_array_equal(got[1], nu)


@pytest.mark.parametrize("transport", [carry, keep, reset])
def test_leading_axes_are_batch_axes(transport):
    pairs = [moments(seed=i) for i in range(3)]
    mu, nu = (jnp.stack(column) for column in zip(*pairs, strict=True))
    motion = jnp.stack([basis((6, 6), 1), jnp.eye(6), basis((6, 6), 2)])
    batched = transport(mu, nu, motion, 5, B1, B2)
    for i in range(3):
        alone = transport(mu[i], nu[i], motion[i], 5, B1, B2)
        for a, b in zip(batched, alone, strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-6, atol=1e-7)


def test_keep_and_reset():
    mu, nu = moments()
    motion = basis((6, 6))
    np.testing.assert_array_equal(keep(mu, nu, motion, 5, B1, B2)[0], mu)
    assert not reset(mu, nu, motion, 5, B1, B2)[0].any()
    assert not reset(mu, nu, motion, 5, B1, B2)[1].any()
    np.testing.assert_array_equal(reset(mu, nu, jnp.eye(6), 5, B1, B2)[1], nu)


@pytest.mark.parametrize(
    "arguments, options, sentence",
    [
        ((jnp.ones((6, 4)), jnp.ones((6, 5)), jnp.eye(6)), {}, r"moments \(6, 4\) and"),
        ((jnp.ones((6, 4)), jnp.ones((6, 4)), jnp.eye(5)), {}, r"fit motion \(5, 5\)"),
        (
            (jnp.ones((6, 4)), jnp.ones((6, 4)), jnp.eye(6)),
            {"clip": "sqrt"},
            "clip is 'sqrt'",
        ),
    ],
)
def test_bad_input(arguments, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        carry(*arguments, 1, B1, B2, **options)
