"""GaLore, Online Subspace Descent and LDAdam: a subspace of the full gradient.

The gradient of a kernel is formed whole and then projected, so any model works as it is;
what shrinks is the optimizer's state. The three are one transformation with different
rules for the basis and different optimizers inside:

    P, A <- rule(P, G)     the basis of this step, and what it projects (G, but for LDAdam)
    C = P^T A              (r, m), from here on as if that were the gradient
    D <- inner(C)          Adam, Lion, Adafactor: any Optax transformation
    update = scale * P D   (n, m)

n is the side of the kernel that is projected, by default the shorter, and m the other. On
the output side all of this happens to the transposed gradient. Leading axes of a leaf
(scanned layers) are batch axes.
"""

import functools
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax

from oasis_jax.bounds import DECAY, NOT_NEGATIVE, check
from oasis_jax.decay import Mask, decay_weights
from oasis_jax.gradient.projected import (
    ProjectGradientsState as ProjectGradientsState,
)
from oasis_jax.gradient.projected import check_choice, project_gradients
from oasis_jax.gradient.rules import OnlinePca, PowerIteration, Svd, check_interval
from oasis_jax.leaves import unstacked
from oasis_jax.optimizer import adam_in_coordinates
from oasis_jax.transport import carry

Base: TypeAlias = str | optax.GradientTransformation


def galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | float = 128,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    *,
    scale: float = 0.25,
    interval: int = 200,
    side: str = "smaller",
    base: Base = "adam",
    pattern: str = "kernel$",
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """GaLore: Adam in the top singular vectors of a recent gradient.

        P = top-r left singular vectors of G, every `interval` steps     C = P^T G
        M <- b1 M + (1 - b1) C        V <- b2 V + (1 - b2) C∘C        t <- t + 1
        U = scale sqrt(1 - b2^t) / (1 - b1^t) P [ M / (sqrt(V) + eps) ]
        W <- (1 - lr wd) (W - lr U)

    The moments stay as they are when P changes. Its state is 2 r m + n r elements a
    kernel, n being the projected side; the full gradient is formed. Leaves that do not
    match `pattern` get the same with P = I and scale 1.

    Args:
      learning_rate: A number or a schedule. The paper's is .01 with scale .25.
      rank: A number of columns, or a fraction in (0, 1] of the projected side.
      b1, b2: Decay rates; for 'lion' its two betas. 'adafactor' uses b1 only.
      eps: Added before the bias correction, unlike in Optax; for 'adam' only.
      weight_decay: Decoupled, *after* the step.
      scale: Multiplies the steps of projected kernels (the paper's alpha).
      interval: Steps between two SVDs.
      side: 'smaller' (the input side if square), 'in' or 'out'.
      base: 'adam', 'lion', 'adafactor' (factored, with first moment and clipping by
        RMS), or an Optax transformation that gives directions for coordinates, with
        the sign of the gradient.
      pattern: See `project_gradients`; the paper projects attention and MLP kernels.
      mask: Which leaves decay, as in `optax.add_decayed_weights`; all if None.

    Returns:
      An Optax transformation whose `update` needs `params`.

    Raises:
      ValueError: see `project_gradients`; for unknown bases and intervals below 1.

    Example:
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), galore(1e-2, rank=4))
      >>> state = tx.init({'up': {'kernel': jnp.ones((8, 16))}})
      >>> state[1][0].inner.mu['up']['kernel'].shape
      (4, 16)

    Source: GaLore (arXiv 2403.03507) and its code. We depart from it in keeping P and
    the moments in float32 whatever the gradients are in, and in leaving the basis alone
    where the gradient is zero or its SVD fails.
    """
    projected = project_gradients(
        _base(base, b1, b2, eps),
        Svd(interval),
        rank,
        scale=scale,
        side=side,
        pattern=pattern,
    )
    return optax.chain(projected, _step_then_decay(learning_rate, weight_decay, mask))


def osd(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | float = 128,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    *,
    scale: float = 0.25,
    interval: int = 200,
    side: str = "smaller",
    base: Base = "adam",
    basis_optimizer: optax.GradientTransformation | None = None,
    peak_learning_rate: float | None = None,
    penalty: float = 0.0,
    pattern: str = "kernel$",
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """Online Subspace Descent: GaLore whose basis descends instead of jumping.

        P_0 = top-r left singular vectors of the first G          C = P^T G
        W as in `galore`, with the P of this step; then, from t = 1 on,
        P <- P - OptP(dL/dP)       L = || P P^T Gn - Gn ||^2,  Gn = G / ||G||

    OptP is AdamW (.9, .999, 1e-8, decay .01) at rate `lr_t / lr_peak / interval`. Its
    moments are 2 n r elements a kernel on top of GaLore's state.

    Args:
      learning_rate, rank, b1, b2, eps, weight_decay, scale, side, base, pattern, mask:
        See `galore`.
      interval: Sets the basis's learning rate, 1 / interval; nothing happens at
        intervals.
      basis_optimizer: OptP, with its own learning rate, in place of AdamW. It works on
        a dict of bases, (..., n, r) by path; its count is 0 at step 1.
      peak_learning_rate: lr_peak. If None it is the learning rate itself where that is
        a number; where it is a schedule, the basis then learns at 1 / interval always.
      penalty: Weight of ||P^T P - I||^2 in L; in the paper, not in its code, where P
        slowly ceases to be orthonormal.

    Returns:
      An Optax transformation whose `update` needs `params`.

    Raises:
      ValueError: as `galore` does.

    Example:
      >>> schedule = optax.cosine_decay_schedule(1e-2, 1000)
      >>> tx = osd(schedule, rank=0.5, peak_learning_rate=1e-2, penalty=0.1)
      >>> state = tx.init({'up': {'kernel': jnp.ones((8, 16))}})
      >>> state[0].basis['up/kernel'].shape
      (8, 4)

    Source: Online Subspace Descent (arXiv 2408.12857) and its code. We depart from it
    in keeping P and the moments in float32, and in leaving P alone where the gradient is
    zero.
    """
    check_interval(interval)
    if basis_optimizer is None:
        rate = _basis_rate(learning_rate, peak_learning_rate, interval)
        basis_optimizer = optax.adamw(rate, weight_decay=0.01)
    projected = project_gradients(
        _base(base, b1, b2, eps),
        OnlinePca(basis_optimizer, penalty),
        rank,
        scale=scale,
        side=side,
        pattern=pattern,
    )
    return optax.chain(projected, _step_then_decay(learning_rate, weight_decay, mask))


def ldadam(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | float = 16,
    b1: float = 0.908,
    b2: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    rho: float = 0.908,
    error_feedback: bool = True,
    side: str = "smaller",
    pattern: str = "kernel$",
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """LDAdam: Adam in a basis that moves every step, and its moments with it.

        A, P, E as in `PowerIteration`        C = P^T A
        M, V <- carry(M, V, R, t)             R = P^T P_old
        M <- b1 M + (1 - b1) C        V <- b2 V + (1 - b2) C∘C        t <- t + 1
        W <- (1 - lr wd) W - lr P [ M / (1 - b1^t) / (sqrt(V / (1 - b2^t)) + eps) ]

    Its state is 2 r m + n r elements a kernel, and n m more with error feedback. Leaves
    that do not match `pattern` get `optax.adamw`.

    Args:
      learning_rate: A number or a schedule.
      rank: A number of columns, or a fraction in (0, 1] of the projected side. The
        paper's code uses 8 with error feedback and 256 without.
      b1, b2, eps, weight_decay, mask: As in `optax.adamw`.
      rho, error_feedback: See `PowerIteration`.
      side: 'smaller' (the *output* side if square), 'in' or 'out'.
      pattern: See `project_gradients`.

    Returns:
      An Optax transformation whose `update` needs `params`. A clip before it bounds G;
      the error is added after.

    Raises:
      ValueError: see `project_gradients`.

    Example:
      >>> tx = ldadam(1e-3, rank=4)
      >>> state = tx.init({'up': {'kernel': jnp.ones((8, 16))}})
      >>> state[0].memory['up/kernel'].shape                  # the error
      (8, 16)

    Source: LDAdam (arXiv 2410.16103) and its code, second moments clipped by `abs` as
    there. We depart from it in float32 for all state, in an error and a step count that
    are part of it, so that a resumed run goes on, and in leaving the basis alone where A
    is zero.
    """
    check("learning_rate", learning_rate, NOT_NEGATIVE)
    check("weight_decay", weight_decay, NOT_NEGATIVE)
    check("rho", rho, DECAY)
    return optax.chain(
        project_gradients(
            adam_in_coordinates(
                b1, b2, eps, transport=functools.partial(carry, clip="abs")
            ),
            PowerIteration(rho, b1, error_feedback),
            rank,
            side=side,
            tie="out",
            pattern=pattern,
        ),
        decay_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _base(base: Base, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    if isinstance(base, optax.GradientTransformation):
        return base
    check_choice("base", base, ("adam", "lion", "adafactor"))
    for name, decay in (("b1", b1), ("b2", b2)):
        check(name, decay, DECAY)
    if base == "adam":
        return adam_in_coordinates(b1, b2, eps, transport="keep", eps_before=True)
    if base == "lion":
        return optax.scale_by_lion(b1, b2)
    return unstacked(
        optax.chain(
            # The few rows of a projected gradient are worth factoring too.
            optax.scale_by_factored_rms(min_dim_size_to_factor=1),
            optax.clip_by_block_rms(1.0),
            optax.ema(b1, debias=False),
        )
    )


def _basis_rate(
    learning_rate: optax.ScalarOrSchedule, peak: float | None, interval: int
) -> optax.ScalarOrSchedule:
    if not callable(learning_rate):
        return learning_rate / (learning_rate if peak is None else peak) / interval
    if peak is None:
        return 1 / interval
    schedule: Callable = learning_rate
    # The basis takes its first step, number 0, at step 1.
    return lambda count: schedule(count + 1) / peak / interval


def _step_then_decay(
    learning_rate: optax.ScalarOrSchedule, weight_decay: float, mask: Mask
) -> optax.GradientTransformation:
    """W <- (1 - lr wd) (W - lr U): the decay sees the updated weights."""
    check("learning_rate", learning_rate, NOT_NEGATIVE)
    check("weight_decay", weight_decay, NOT_NEGATIVE)

    def init(params):
        del params
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("update needs params: their dtype, and to decay them")
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate

        chosen = mask(params) if callable(mask) else True if mask is None else mask

        def part(decays, updates, params):
            decay = weight_decay if decays else 0.0

            def leaf(u, w):
                step = (1 - rate * decay) * u.astype(jnp.float32) + decay * w
                return (-rate * step).astype(u.dtype)

            return jax.tree.map(leaf, updates, params)

        count = optax.safe_increment(state.count)
        updates = jax.tree.map(part, chosen, updates, params)
        return updates, optax.ScaleByScheduleState(count)

    return optax.GradientTransformation(init, update)
