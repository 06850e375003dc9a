"""Step time of OASIS against AdamW, alternating in one process.

    python benchmarks/step.py --out benchmarks/results/step_cpu.json

Both steps are compiled first; then they take turns, so that a machine whose speed drifts
drifts for both. The figure is the median of the ratios pair by pair.
"""

import dataclasses
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
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
    """What is timed; the defaults are one layer shape of the C4 benchmark's 60M model."""

    preset: str = "llama-60m"
    layers: int = 4
    vocab_size: int = 256
    batch: int = 4
    seq: int = 512
    rank: float = 0.125
    stride: int = 1
    """The tracker looks at every stride-th token."""
    remat: str = "elementwise"
    dtype: str = "float32"
    methods: tuple[str, ...] = ("oasis", "adamw")
    """The first is divided by the others."""
    pairs: int = 10
    out: Path | None = None


def prepare(config: Config, name: str):
    """The compiled step of a method, its first state and what it needs."""
    recipe = method(name, rank=config.rank, stride=config.stride)
    model = llama.Llama(
        llama.preset(
            config.preset,
            layers=config.layers,
            vocab_size=config.vocab_size,
            remat=config.remat,
            dtype=jnp.dtype(config.dtype),
        )
    )
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (config.batch, config.seq + 1))
    tokens = jnp.asarray(tokens, jnp.int32)

    def loss_fn(variables, tokens):
        logits = model.apply(variables, tokens[:, :-1])
        return jnp.mean(llama.token_losses(logits, tokens[:, 1:]))

    variables = jax.jit(model.init)(jax.random.key(0), tokens[:, :-1])
    state = OasisTrainState.create(
        apply_fn=model.apply,
        **variables,
        tx=optax.chain(optax.clip_by_global_norm(1.0), recipe.optimizer(1e-3)),
        rules=recipe.rules,
    )

    def step(state, tokens):
        loss, grads = state.value_and_grad(loss_fn)(tokens)
        return state.apply_gradients(grads), loss

    compiled = jax.jit(step, donate_argnums=0).lower(state, tokens).compile()
    memory = step_memory(state, loss_fn, tokens, compiled=compiled)
    return compiled, state, tokens, memory


def main(config: Config) -> None:
    steps = {name: prepare(config, name) for name in config.methods}
    states = {name: state for name, (_, state, _, _) in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in track(range(config.pairs + 2), "timing"):
        for name, (compiled, _, tokens, _) in steps.items():
            started = time.perf_counter()
            states[name], loss = compiled(states[name], tokens)
            jax.block_until_ready((states[name], loss))
            if turn >= 2:  # the first turns warm up
                seconds[name].append(time.perf_counter() - started)
    first, *others = config.methods
    result = {
        "configuration": dataclasses.asdict(config) | {"out": str(config.out)},
        "machine": machine(),
        "step_ms": {n: [round(1e3 * t, 2) for t in s] for n, s in seconds.items()},
        "step_ms_median": {n: 1e3 * statistics.median(s) for n, s in seconds.items()},
        "ratio_median": {
            f"{first}/{other}": statistics.median(
                a / b for a, b in zip(seconds[first], seconds[other], strict=True)
            )
            for other in others
        },
        "memory": {name: memory for name, (_, _, _, memory) in steps.items()},
    }
    print(json.dumps({k: v for k, v in result.items() if k != "step_ms"}, indent=2))
    if config.out:
        report.write_json(config.out, result)


if __name__ == "__main__":
    main(tyro.cli(Config))
