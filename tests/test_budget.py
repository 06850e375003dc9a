"""Compiled peaks against the budget in `memory_budget.json`.

A peak may not grow by more than 2 %. Where it should, or has fallen, write the budget
anew, from the repository root:

    python tests/test_budget.py

That compiles under this suite's XLA flags and replaces the numbers of the JAX version
that is installed; those of other versions stay. Where a version has none, nothing is
checked.
"""

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    # What pytest does, before anything imports JAX.
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    import conftest  # noqa: F401

import jax
import jax.numpy as jnp
import pytest

from oasis_jax import OasisTrainState
from oasis_jax.methods import method
from oasis_jax.models.llama import Llama, LlamaConfig
from oasis_jax.planning import memory

FILE = Path(__file__).with_name("memory_budget.json")
GROWTH = 0.02

# method, remat, residuals
CONFIGURATIONS = [
    ("adamw", "elementwise", "whole"),
    ("oasis", "none", "whole"),
    ("oasis", "elementwise", "whole"),
    ("oasis", "elementwise", "int8"),
    ("oasis", "mlp", "whole"),
    ("prac", "block", "whole"),
]
NAMES = {"/".join(c): c for c in CONFIGURATIONS}


def peak(name: str, remat: str, residuals: str) -> int:
    """Of the whole train step on CPU; nothing is run."""
    model = Llama(LlamaConfig(256, 64, 172, 2, 4, 4, remat=remat, residuals=residuals))
    recipe = method(name)
    tokens = jax.ShapeDtypeStruct((4, 64), jnp.int32)

    def first():
        variables = model.init(jax.random.key(0), jnp.zeros(tokens.shape, tokens.dtype))
        return OasisTrainState.create(
            apply_fn=model.apply,
            **variables,
            tx=recipe.optimizer(1e-3),
            rules=recipe.rules,
        )

    def loss_fn(variables, tokens):
        targets = jnp.roll(tokens, -1, axis=1)
        return model.apply(variables, tokens, None, targets) / tokens.size

    def step(state, tokens):
        state = state.refresh(loss_fn, tokens)
        loss, grads = state.value_and_grad(loss_fn)(tokens)
        return state.apply_gradients(grads), loss

    shapes = jax.eval_shape(first)
    return memory.plan(step, shapes, tokens, target="cpu").peak_bytes


def stored() -> dict[str, dict[str, int]]:
    """Bytes by JAX version and configuration."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def complaint(name: str, found: int, budget: int) -> str | None:
    """What is wrong with a peak, if anything."""
    if found <= budget * (1 + GROWTH):
        return None
    return (
        f"{name}: the compiled step needs {found} bytes, {found / budget - 1:.1%} more"
        f" than its budget of {budget}; if it should, run python tests/test_budget.py"
    )


@pytest.mark.parametrize("name", NAMES)
def test_peak_is_within_budget(name):
    budget = stored().get(jax.__version__)
    if budget is None:
        pytest.skip(f"{FILE.name} has no entry for jax {jax.__version__}")
    assert name in budget, f"{name} has no budget; run python tests/test_budget.py"
    problem = complaint(name, peak(*NAMES[name]), budget[name])
    assert problem is None, problem


def test_complaint():
    assert complaint("oasis/none", 1020, 1000) is None
    message = complaint("oasis/none", 1100, 1000)
    assert message is not None
    for part in ("oasis/none", "1100", "10.0%", "1000", "python tests/test_budget.py"):
        assert part in message


if __name__ == "__main__":
    budgets = stored()
    budgets[jax.__version__] = {name: peak(*c) for name, c in NAMES.items()}
    FILE.write_text(json.dumps(budgets, indent=2, sort_keys=True) + "\n")
    print(FILE.read_text(), end="")
