"""Peak of the compiled step by method, rank and recomputation.

    python benchmarks/memory.py

Nothing runs: each step is lowered from shapes and compiled, and the compiler is asked.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro
from rich.progress import track

from oasis_jax import OasisTrainState
from oasis_jax.memory import step_memory
from oasis_jax.methods import method
from oasis_jax.models import llama
from train import report
from train.pretrain import machine


@dataclasses.dataclass
class Config:
    """What is compiled."""

    preset: str = "llama-60m"
    batch: int = 8
    seq: int = 512
    dtype: str = "float32"
    ranks: tuple[float, ...] = (0.125, 0.25, 0.5)
    remats: tuple[str, ...] = llama.REMAT
    out: Path = Path("benchmarks/results/memory.json")


def measure(config: Config, name: str, rank: float | None, remat: str) -> dict:
    recipe = method(name, rank=rank)
    model = llama.Llama(
        llama.preset(config.preset, remat=remat, dtype=jnp.dtype(config.dtype))
    )
    tokens = jax.ShapeDtypeStruct((config.batch, config.seq + 1), jnp.int32)

    def loss_fn(variables, tokens):
        logits = model.apply(variables, tokens[:, :-1])
        return jnp.mean(llama.token_losses(logits, tokens[:, 1:]))

    def create():
        zeros = jnp.zeros(tokens.shape, tokens.dtype)
        return OasisTrainState.create(
            apply_fn=model.apply,
            **model.init(jax.random.key(0), zeros[:, :-1]),
            tx=recipe.optimizer(1e-3),
            rules=recipe.rules,
        )

    def step(state, tokens):
        loss, grads = state.value_and_grad(loss_fn)(tokens)
        return state.apply_gradients(grads), loss

    state = jax.eval_shape(create)
    compiled = jax.jit(step, donate_argnums=0).lower(state, tokens).compile()
    parts = step_memory(state, loss_fn, tokens, compiled=compiled)
    return {"method": name, "rank": rank, "remat": remat, **parts}


def main(config: Config) -> None:
    cases = [
        (name, rank, remat)
        for name, rank in [("adamw", None), *(("oasis", r) for r in config.ranks)]
        for remat in config.remats
    ]
    rows = [measure(config, *case) for case in track(cases, "compiling")]
    configuration = dataclasses.asdict(config) | {"out": str(config.out)}
    report.write_json(
        config.out, {"configuration": configuration, "machine": machine(), "rows": rows}
    )


if __name__ == "__main__":
    main(tyro.cli(Config))
