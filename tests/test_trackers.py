"""Bases stay orthonormal, find the principal axes in order, and move as they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oasis_jax.bases import Blocks, motion, orthonormalise, polar
from oasis_jax.trackers import (
    WARM_START,
    BlockMean,
    Complement,
    Fixed,
    Oja,
    Random,
    Svd,
)

KEY = jax.random.key(0)


def covariance(n, ratio=0.7, seed=0):
    """A covariance of known axes, eigenvalues falling by `ratio`; (matrix, axes)."""
    axes, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))
    return jnp.float32(axes * ratio ** np.arange(n) @ axes.T), axes


def orthonormality(basis):
    gram = jnp.asarray(basis, jnp.float32).mT @ jnp.asarray(basis, jnp.float32)
    return jnp.abs(gram - jnp.eye(gram.shape[-1])).max()


def run(tracker, basis, sigma, steps, noise=0.0):
    """`steps` updates with S = Sigma P plus noise, compiled into one loop."""

    def step(i, basis):
        key = jax.random.fold_in(KEY, i)
        draws = jax.random.normal(key, (64, sigma.shape[0]))
        sample = noise * draws.T @ draws / 64
        s = (sigma + sample) @ basis.astype(jnp.float32)
        return tracker.update(basis, s.astype(basis.dtype), i, key)

    return jax.jit(lambda b: jax.lax.fori_loop(0, steps, step, b))(basis)


@pytest.mark.parametrize(
    "tracker", [Oja(), Oja(axes="none"), Random(7), Fixed()], ids=lambda t: str(t)
)
@pytest.mark.parametrize(
    "dtype, n, steps",
    [
        (jnp.float32, 96, 4_000),
        (jnp.bfloat16, 512, 150),
        pytest.param(jnp.bfloat16, 512, 10_000, marks=pytest.mark.slow),  # minutes
    ],
)
def test_orthonormal_after_many_steps(tracker, dtype, n, steps):
    sigma, _ = covariance(n, 0.9)
    basis = tracker.init(KEY, (n, 8)).astype(dtype)
    basis = run(tracker, basis, sigma, steps, noise=0.1)
    assert basis.dtype == dtype
    assert orthonormality(basis) < 1e-3


@pytest.mark.parametrize("rate", [0.1, 2.0, 50.0])
def test_columns_follow_the_principal_axes_in_order(rate):
    sigma, axes = covariance(24)
    basis = run(Oja(rate=rate), Oja().init(KEY, (24, 6)), sigma, 600)
    overlap = np.abs(np.asarray(basis).T @ axes[:, :6])
    np.testing.assert_allclose(overlap, np.eye(6), atol=2e-3)


def test_a_steep_spectrum_is_stable():
    """One axis holds nearly all: a step in units of the mean would overshoot."""
    sigma, axes = covariance(24, 0.2)
    basis = run(Oja(), Oja().init(KEY, (24, 4)), sigma, 300)
    overlap = np.abs(np.asarray(basis).T @ axes[:, :4])
    np.testing.assert_allclose(overlap, np.eye(4), atol=2e-3)


def test_follows_axes_that_turn():
    """Five hundred steps after the covariance changed, so has the basis."""
    before, _ = covariance(24, seed=0)
    after, axes = covariance(24, seed=1)
    basis = run(Oja(), run(Oja(), Oja().init(KEY, (24, 4)), before, 300), after, 500)
    np.testing.assert_allclose(np.abs(basis.T @ axes[:, :4]), np.eye(4), atol=1e-2)


@pytest.mark.parametrize("constant", [1e-4, 3.0, 1e4])
def test_oja_is_scale_free(constant):
    """Activations times a constant, observations times its square: the same basis."""
    sigma, _ = covariance(24)
    basis = Oja().init(KEY, (24, 6))
    expected = Oja().update(basis, sigma @ basis, jnp.int32(3), KEY)
    got = Oja().update(basis, constant**2 * (sigma @ basis), jnp.int32(3), KEY)
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_first_steps_are_bolder():
    sigma, _ = covariance(24)
    basis = Oja().init(KEY, (24, 6))
    steps = [
        1 - jnp.sum(motion(Oja().update(basis, sigma @ basis, i, KEY), basis) ** 2) / 6
        for i in (WARM_START, 0, 1, 100)
    ]
    assert steps[0] == steps[1] > steps[2] > steps[3]


def test_orthonormalise_is_householder_with_positive_diagonal():
    a = np.random.default_rng(0).normal(size=(3, 20, 6))
    q, r = np.linalg.qr(a)
    expected = q * np.sign(np.diagonal(r, axis1=-2, axis2=-1))[:, None]
    np.testing.assert_allclose(orthonormalise(jnp.float32(a)), expected, atol=1e-5)


def test_orthonormalise_of_nearly_dependent_columns():
    a = np.random.default_rng(0).normal(size=(20, 6))
    a[:, 5] = a[:, 0] + 1e-3 * a[:, 5]
    assert orthonormality(orthonormalise(jnp.float32(a))) < 1e-3


def test_polar_is_the_nearest():
    a = np.random.default_rng(0).normal(size=(3, 20, 6))
    u, _, vt = np.linalg.svd(a, full_matrices=False)
    np.testing.assert_allclose(polar(jnp.float32(a)), u @ vt, atol=1e-5)


@pytest.mark.parametrize("tracker", [Oja(), Random(2), Fixed()], ids=lambda t: t.name)
def test_leading_axes_are_batch_axes(tracker):
    basis = tracker.init(KEY, (3, 12, 4))
    assert orthonormality(basis) < 1e-5
    sigma, _ = covariance(12)
    moved = tracker.update(basis, sigma @ basis, jnp.int32(1), KEY)
    assert moved.shape == basis.shape and orthonormality(moved) < 1e-5
    if isinstance(tracker, Oja):
        for i in range(3):
            alone = tracker.update(basis[i], sigma @ basis[i], jnp.int32(1), KEY)
            np.testing.assert_allclose(moved[i], alone, atol=1e-6)


@pytest.mark.parametrize("tracker", [Oja(), Oja(axes="none")], ids=lambda t: t.axes)
def test_nothing_observed_moves_nothing(tracker):
    basis = tracker.init(KEY, (12, 4))
    moved = tracker.update(basis, jnp.zeros_like(basis), jnp.int32(0), KEY)
    np.testing.assert_allclose(moved, basis, atol=1e-6)


def test_rank_deficient_input():
    """Fewer directions than columns: all are found, the basis stays whole."""
    sigma, axes = covariance(24)
    sigma = jnp.float32(axes[:, :2] @ np.diag([2.0, 1.0]) @ axes[:, :2].T)
    basis = run(Oja(), Oja().init(KEY, (24, 6)), sigma, 200)
    assert orthonormality(basis) < 1e-4
    np.testing.assert_allclose(jnp.sum((basis.T @ axes[:, :2]) ** 2), 2, atol=1e-3)


def test_random_stands_still_between_intervals():
    basis = Random(5).init(jax.random.key(2), (12, 4))
    for step in [WARM_START, 0, 1, 2, 3, 5]:
        same = Random(5).update(basis, basis, jnp.int32(step), KEY)
        np.testing.assert_array_equal(same, basis)
    fresh = Random(5).update(basis, basis, jnp.int32(4), KEY)
    again = Random(5).update(basis, basis, jnp.int32(4), KEY)
    other = Random(5).update(basis, basis, jnp.int32(4), jax.random.key(1))
    np.testing.assert_array_equal(fresh, again)
    assert not np.allclose(fresh, basis) and not np.allclose(fresh, other)


def test_fixed_moves_in_the_warm_start_only():
    sigma, axes = covariance(24, 0.5)
    basis = start = Fixed().init(KEY, (24, 4))
    np.testing.assert_array_equal(
        Fixed().update(basis, sigma @ basis, jnp.int32(0), KEY), start
    )
    for _ in range(20):
        basis = Fixed().update(basis, sigma @ basis, jnp.int32(WARM_START), KEY)
    assert jnp.sum((basis.T @ axes[:, :4]) ** 2) > 3.99


def test_motion():
    old = Oja().init(KEY, (2, 12, 4))
    new = old.at[1].set(Oja().init(jax.random.key(1), (12, 4)))
    r = motion(new, old)
    np.testing.assert_array_equal(r[0], np.eye(4))  # exactly: it stood still
    np.testing.assert_allclose(r[1], new[1].T @ old[1], atol=1e-6)


def test_gaussian_bases_are_drawn_like_that():
    """At the start and at every renewal: entries of variance 1/r."""
    tracker = Random(1, "gaussian")
    start = tracker.init(KEY, (200, 40))
    moved = tracker.update(start, start, jnp.int32(0), jax.random.key(1))
    for basis in (start, moved):
        np.testing.assert_allclose(jnp.mean(basis**2), 1 / 40, rtol=0.1)
        assert orthonormality(basis) > 0.1


def test_a_seed_moves_by_one():
    """Per interval, in every layer alike; layers begin with seeds of their own."""
    tracker = Random(3, stored=False)
    basis = start = tracker.init(KEY, (4, 12, 5))
    assert basis.shape == (4, 12, 5) and len(set(start.seed.tolist())) == 4
    for step in range(7):
        np.testing.assert_array_equal(basis.seed, start.seed + step // 3)
        basis = tracker.update(basis, None, jnp.int32(step), KEY)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("principal", [Oja(), Svd()], ids=lambda t: t.name)
def test_complement_stays_orthogonal(principal, unbiased):
    """Also while its principal part moves; the random one is turned, not drawn, then."""
    tracker = Complement(principal, 0.5, 3, unbiased)
    sigma, _ = covariance(16)
    update = jax.jit(tracker.update)
    basis = tracker.init(KEY, (2, 16, 6))
    c = np.sqrt(13 / 3) if unbiased else 1.0
    gram = np.diag([1, 1, 1, *[c**2] * 3])
    for step in range(9):
        old = basis
        key = jax.random.fold_in(KEY, step)
        basis = update(basis, sigma @ basis, jnp.int32(step), key)
        np.testing.assert_allclose(
            basis.mT @ basis, np.broadcast_to(gram, (2, 6, 6)), atol=1e-4
        )
        kept = jnp.sum((basis[..., 3:].mT @ old[..., 3:]) ** 2) / (6 * c**4)
        if (step + 1) % 3 == 0:
            assert kept < 0.7
        elif principal == Svd():
            np.testing.assert_array_equal(basis, old)
        elif step > 3:
            assert 0.8 < kept < 1


@pytest.mark.parametrize("tracker", [Svd(5), Complement(Svd(5))], ids=lambda t: t.name)
def test_svd_is_due_at_its_interval(tracker):
    assert tracker.passes == Svd.passes
    due = [bool(tracker.due(jnp.int32(step))) for step in range(11)]
    assert due == [step % 5 == 0 for step in range(11)]


@pytest.mark.parametrize("tracker", [Oja(), Random(2), Fixed(), Complement()], ids=str)
def test_others_never_ask_for_a_batch(tracker):
    assert tracker.passes == 0 and not tracker.due(jnp.int32(0))


def test_svd_keeps_columns_apart_without_energy():
    """Of nothing, and of one direction, it makes a whole basis."""
    for x in (jnp.zeros((5, 12)), jnp.ones((5, 12))):
        basis = Svd().init(KEY, (12, 4))
        for _ in range(Svd.passes):
            basis = Svd().update(basis, x.T @ (x @ basis), WARM_START, KEY)
        assert orthonormality(basis) < 1e-4
    np.testing.assert_allclose(jnp.abs(basis[:, 0]), 12**-0.5, atol=1e-4)


def unit(v):
    return v / np.linalg.norm(v, axis=-1, keepdims=True)


@pytest.mark.parametrize("average", ["once", "batch", 0.75])
def test_block_mean(average):
    """By hand, over two layers: when it is renewed, and what of."""
    tracker = BlockMean(average, scale=1.5)
    basis = tracker.init(KEY, (2, 12, 3))
    assert basis.shape == (2, 12, 3) and basis.scale == 1.5
    means = np.random.default_rng(0).normal(size=(4, 2, 4)).astype(np.float32)
    expected = None
    for step, mean in enumerate(means):
        seen = Blocks(jnp.asarray(mean), 3, 1.5)
        due = bool(tracker.due(jnp.int32(step)))
        assert due == (step == 0 or average != "once")
        if due:
            if average == 0.75 and step:
                mean = 0.75 * expected + 0.25 * mean
            expected = unit(mean)
            basis = tracker.update(basis, seen, WARM_START, KEY)
        np.testing.assert_allclose(basis.vector, expected, atol=1e-6)
        # The step itself moves nothing, bit for bit.
        same = tracker.update(basis, seen, jnp.int32(step), KEY)
        np.testing.assert_array_equal(same.vector, basis.vector)


def test_block_mean_of_nothing():
    """A mean of zero leaves v as it is; the first step finds it if nobody asked."""
    tracker = BlockMean("batch")
    unknown = tracker.init(KEY, (12, 3))
    zero = Blocks(jnp.zeros(4), 3)
    np.testing.assert_array_equal(
        tracker.update(unknown, zero, WARM_START, KEY).vector, np.zeros(4)
    )
    seen = Blocks(jnp.array([3.0, 0, 4, 0]), 3)
    known = tracker.update(unknown, seen, jnp.int32(0), KEY)
    np.testing.assert_allclose(known.vector, [0.6, 0, 0.8, 0], atol=1e-7)
    np.testing.assert_array_equal(
        tracker.update(known, zero, WARM_START, KEY).vector, known.vector
    )


@pytest.mark.parametrize(
    "tracker, sentence",
    [
        (Oja(), "rank 13, but it has only 12 input features"),
        (Complement(share=0.01), "leaves no column for a part at share 0.01"),
        (BlockMean(), "13 groups, which do not divide its 12 input features"),
    ],
    ids=lambda t: getattr(t, "name", ""),
)
def test_ranks_that_cannot_be(tracker, sentence):
    rank = 4 if tracker.name == "complement" else 13
    with pytest.raises(ValueError, match=sentence):
        tracker.check(12, rank)


def test_no_householder_on_the_hot_path():
    basis = Oja().init(KEY, (2, 12, 4))
    jaxpr = str(jax.make_jaxpr(Oja().update)(basis, basis, 0, KEY))
    assert "cholesky" in jaxpr
    assert not any(name in jaxpr for name in ("geqrf", "householder", "qr["))


def test_equal_settings_are_equal():
    assert Oja(rate=1.0) == Oja(rate=1.0) != Oja(rate=2.0)
    assert hash(Random(3)) == hash(Random(3))


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: Oja(axes="rows"), "axes is 'rows'"),
        (lambda: Oja(rate=0.0), "rate 0.0"),
        (lambda: Random(0), "interval is 0, expected at least 1"),
        (lambda: Random(kind="uniform"), "kind is 'uniform', expected 'haar'"),
        (lambda: Random(shared=False), "per kernel needs stored=False"),
        (lambda: Svd(0), "svd: interval is 0, expected at least 1"),
        (lambda: Complement(share=1.0), "share is 1.0, expected between 0 and 1"),
        (lambda: Complement(interval=0), "complement: interval is 0"),
        (lambda: BlockMean("ever"), "average is 'ever', expected 'once', 'batch'"),
        (lambda: BlockMean(1.0), "average is 1.0"),
    ],
)
def test_bad_settings(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
