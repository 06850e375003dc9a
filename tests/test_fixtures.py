"""GaLore, OSD and LDAdam against numbers recorded from their public implementations.

The files hold inputs and outputs only (README.md beside them says of what). Each case is
driven by its own JSON configuration, so that files of the same kind with other shapes,
ranks and settings can take their place: set OASIS_FIXTURES to their directory. They are
in PyTorch's layout, (out, in), and are transposed here; 'right' is the input side.
"""

import functools
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from oasis_jax.gradient.rules import projection_error
from oasis_jax.gradient.side import galore, ldadam, osd

DIRECTORY = Path(
    os.environ.get("OASIS_FIXTURES") or Path(__file__).parents[1] / "../shared/fixtures"
).resolve()
PATH = "w/kernel"


@functools.cache
def load(method):
    file = DIRECTORY / f"{method}.npz"
    if not file.exists():
        return None
    with np.load(file) as arrays:
        return dict(arrays)


def cases(method):
    """The cases of a file; one that skips, saying so, where there is no file."""
    data = load(method)
    if data is None:
        why = f"no {method}.npz in {DIRECTORY}; set OASIS_FIXTURES to where it is"
        return [pytest.param(None, marks=pytest.mark.skip(reason=why))]
    return json.loads(str(data["cases"]))


class Case:
    """One recorded run; matrices as they are here: (n_in, n_out), or (n, r) and (r, m)."""

    def __init__(self, method, name):
        self.data, self.name = load(method), name
        self.config = json.loads(str(self.data[f"{name}/config"]))
        self.output_side = self.config["side"] == "left"
        inputs = f"inputs/{self.config['inputs']}"
        self.start = self.data[f"{inputs}/W0"].T
        self.grads = self.data[f"{inputs}/G"].swapaxes(-1, -2)

    def options(self, *names, **renamed):
        """Of the configuration, those that every method has and those named."""
        config = self.config
        names = ("rank", "eps", "weight_decay", *names)
        options = {name: config[name] for name in names}
        options |= {ours: config[theirs] for ours, theirs in renamed.items()}
        # Where the reference chose the side by its own rule, so do we by ours.
        own = config.get("proj_type") in ("std", "continuous")
        side = "smaller" if own else ("out" if self.output_side else "in")
        b1, b2 = config["betas"]
        return options | {"b1": b1, "b2": b2, "side": side}

    def recorded(self, name):
        """Its steps and values; coordinates and bases with the projected side first."""
        values = self.data[f"{self.name}/{name}"]
        steps = self.data.get(f"{self.name}/{name}_steps", np.arange(len(values)))
        # Output side: torch's P is (m, r) and its moments (r, n), which are ours.
        if name in ("W", "E") or not self.output_side:
            values = values.swapaxes(-1, -2)
        return steps, values

    def runner(self, tx):
        """A compiled function of `flips`, (steps, r) of +-1, that takes all steps.

        It multiplies the rows of the first moment by them before each step, and returns
        every quantity after each, in a dict of stacked arrays.
        """

        def step(carry, inputs):
            params, state = carry
            grad, flip = inputs
            inner = state[0].inner
            mu = jax.tree.map(lambda m: m * flip[:, None], inner.mu)
            state = (state[0]._replace(inner=inner._replace(mu=mu)), *state[1:])
            updates, state = tx.update({"w": {"kernel": grad}}, state, params)
            params = optax.apply_updates(params, updates)
            projected = state[0]
            out = {
                "W": params["w"]["kernel"],
                "P": projected.basis[PATH],
                "m": projected.inner.mu["w"]["kernel"],
                "v": projected.inner.nu["w"]["kernel"],
            }
            if isinstance(projected.memory, dict):
                out["E"] = projected.memory[PATH]
            return (params, state), out

        @jax.jit
        def run(params, grads, flips):
            return jax.lax.scan(step, (params, tx.init(params)), (grads, flips))[1]

        def start(flips):
            with jax.default_matmul_precision("highest"):
                out = run({"w": {"kernel": self.start}}, self.grads, flips)
            return jax.tree.map(np.asarray, out)

        return start

    @property
    def straight(self):
        """Flips that flip nothing."""
        return np.ones((len(self.grads), self.config["rank"]), np.float32)

    def check(self, name, ours, signs=None):
        """Against the recorded steps; `signs` (steps, r) turn our columns to theirs."""
        steps, theirs = self.recorded(name)
        ours = ours[steps]
        if signs is not None:
            turn = signs[steps]
            ours = ours * (turn[:, None, :] if name in ("P", "dP") else turn[..., None])
        if self.output_side and name == "E":
            ours = ours.swapaxes(-1, -2)
        # Moments and errors have the gradients' scale, or its square.
        atol = 3e-6 if name == "W" else 5e-6
        if name in ("m", "v", "E"):
            atol += 1e-5 * np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol, err_msg=name)


def signs(ours, theirs):
    """Of each column, (steps, r): singular vectors are defined up to a sign."""
    return np.sign(np.sum(ours * theirs, axis=-2))


@pytest.mark.parametrize("name", cases("galore"))
def test_galore(name):
    case = Case("galore", name)
    tx = galore(case.config["lr"], **case.options("scale", interval="update_proj_gap"))
    # The first moment outlives the basis it was in: its rows are read as coordinates of
    # the new columns, whatever signs the SVD happened to give those. To follow the
    # recorded run, a row changes sign where we and they start to disagree on it, or
    # cease to. The bases depend on the gradients only, so one run tells them.
    run = case.runner(tx)
    turn = signs(run(case.straight)["P"], case.recorded("P")[1])
    ours = run(turn * np.concatenate([turn[:1], turn[:-1]]))
    case.check("W", ours["W"])
    case.check("P", ours["P"], turn)
    case.check("m", ours["m"], turn)
    case.check("v", ours["v"])


@pytest.mark.parametrize("name", cases("osd"))
def test_osd(name):
    case = Case("osd", name)
    config = case.config
    rates = jnp.asarray(case.data[f"{name}/lr_t"], jnp.float32)
    basis = config["P_optimizer"]
    standard = {"name": "AdamW", "betas": [0.9, 0.999], "eps": 1e-8}
    assert basis == standard | {
        "lr": 1 / config["update_proj_gap"],
        "weight_decay": 0.01,
    }
    tx = osd(
        lambda count: rates[count],
        **case.options("scale", interval="update_proj_gap"),
        peak_learning_rate=config["lr"],
    )
    ours = case.runner(tx)(case.straight)
    _, theirs = case.recorded("P")
    # P[t] is theirs before the step, ours are after it: theirs begin one earlier.
    ours["P"] = np.concatenate([ours["P"][:1], ours["P"]])
    turn = signs(ours["P"], theirs)
    case.check("W", ours["W"])
    case.check("P", ours["P"], turn)
    case.check("m", ours["m"], turn)
    case.check("v", ours["v"])

    grads = case.grads.swapaxes(-1, -2) if case.output_side else case.grads
    slopes = jax.vmap(jax.grad(projection_error))(ours["P"][:-1], grads)
    slopes = np.asarray(slopes).copy()
    slopes[0] = 0  # theirs is recorded so: the first step does not move P
    case.check("dP", slopes, turn)


@pytest.mark.parametrize("name", cases("ldadam"))
def test_ldadam(name):
    case = Case("ldadam", name)
    tx = ldadam(case.config["lr"], **case.options("rho", "error_feedback"))
    ours = case.runner(tx)(case.straight)
    turn = signs(ours["P"], case.recorded("P")[1])
    case.check("W", ours["W"])
    case.check("P", ours["P"], turn)
    case.check("m", ours["m"], turn)
    case.check("v", ours["v"])
    if case.config["error_feedback"]:
        case.check("E", ours["E"])
