"""What is told of a run: at its start, at a step, at its end."""

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console

from oasis_jax.methods import row
from oasis_jax.paths import flatten_paths
from oasis_jax.planning.memory import tree_bytes
from oasis_jax.state import OasisTrainState
from train.options import Training
from train.report.tables import human_bytes, memory_table
from train.run.machine import machine
from train.run.setup import VOCABULARY, Setup, decaying


def describe(
    console: Console,
    config: Training,
    setup: Setup,
    parts: Mapping[str, int],
    title: str,
) -> None:
    """Prints what is trained, how, and what a step needs."""
    count = sum(leaf.size for leaf in jax.tree.leaves(setup.state.params))
    console.print(
        f"model      {title}, {count:,} parameters, {config.dtype},"
        f" remat {config.remat}",
    )
    console.print(f"method     {config.method}")
    console.print(_vocabulary(config, setup.state))
    if config.weight_decay:
        console.print(_decay(config, setup.state))
    if setup.selection.matches:
        console.print(str(setup.selection))
    named = {name: size for name, size in parts.items() if name != "peak"}
    console.print(memory_table(named, parts["peak"], "What a step needs"))


def _vocabulary(config: Training, state: OasisTrainState) -> str:
    """What the embeddings cost, of which few think."""

    def matching(tree: Any) -> dict[str, Any]:
        leaves = flatten_paths(tree).items()
        return {path: leaf for path, leaf in leaves if re.search(VOCABULARY, path)}

    weights, moments = matching(state.params), matching(state.opt_state)
    return (
        f"vocabulary {sum(leaf.size for leaf in weights.values()):,} of the parameters,"
        f" --embeddings {config.embeddings}:"
        f" {human_bytes(tree_bytes(moments))} of the optimizer's"
        f" {human_bytes(tree_bytes(state.opt_state))}"
    )


def _decay(config: Training, state: OasisTrainState) -> str:
    """How much of the parameters decays, and by which rule."""
    leaves = decaying(config, state)
    numbers = sum(leaf.size for leaf in leaves.values())
    return (
        f"decay      {config.weight_decay:g} of {len(leaves)} parameters"
        f" ({numbers:,} numbers), --decay {config.decay}"
    )


def record(
    setup: Setup, state: OasisTrainState, done: int, loss: float, rate: float
) -> dict[str, Any]:
    """A line of metrics.jsonl, after a step.

    Args:
      done: Steps done, this one included.
      loss: Of the step.
      rate: Tokens per second.
    """
    seen = jax.device_get(state.diagnostics)
    return {
        "step": done,
        "loss": loss,
        "learning_rate": float(setup.schedule(done - 1)),
        "tokens_per_s": round(rate, 1),
        "gradient_norm": float(seen.gradient_norm),
        "skipped": int(seen.skipped),
        "captured_energy": _short(seen.captured_energy),
        "motion": _short(seen.motion),
    }


def mean_energy(state: OasisTrainState) -> float | None:
    """The captured energy, a mean over all layers; None where nothing is projected.

    A place in scanned blocks stands for as many layers as there are blocks.
    """
    shares = [np.ravel(e) for e in state.diagnostics.captured_energy.values()]
    return float(np.mean(np.concatenate(shares))) if shares else None


def _short(values: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {
        path.removesuffix("/projection"): np.round(np.float64(value), 6).tolist()
        for path, value in values.items()
    }


def summarise(
    config: Training,
    state: OasisTrainState,
    parts: Mapping[str, int],
    records: Sequence[Mapping[str, Any]],
    step_seconds: Sequence[float],
    result: Mapping[str, Any] | None,
    rollbacks: int,
) -> dict[str, Any]:
    """What a run came to.

    Args:
      parts: Bytes of a step.
      records: Of metrics.jsonl.
      step_seconds: Of the steps of this process.
      result: The last evaluation; None if training diverged.
      rollbacks: How often it went back to a checkpoint.
    """
    # The first step of a process pays for what is set up lazily.
    timed = step_seconds[1:] or step_seconds
    median = statistics.median(timed) if timed else None
    return {
        "method": config.method,
        "diverged": result is None,
        **({"val_loss": None, "val_tokens": None} if result is None else result),
        "steps": config.steps,
        "lr": config.lr,
        "rank": rank_of(config),
        "seed": config.seed,
        "tokens_per_s": config.batch * config.seq / median if median else None,
        "step_ms_median": 1e3 * median if median else None,
        "saved_activation_bytes": parts["saved_activations"],
        "gradient_bytes": parts["gradients"],
        "optimizer_state_bytes": parts["optimizer_state"],
        "weight_bytes": parts["weights"],
        "basis_bytes": parts["bases"],
        "peak_bytes": parts["peak"],
        "captured_energy": mean_energy(state),
        "skipped": int(state.diagnostics.skipped),
        "rollbacks": rollbacks,
        "curve": [[r["step"], r["val_loss"]] for r in records if "val_loss" in r],
        "config": config.as_dict(),
        "machine": machine(),
    }


def rank_of(config: Training) -> float | int | None:
    """As given, or the method's own; None where it means nothing."""
    chosen = row(config.method)
    if not chosen.projected:
        return None
    # Of velora, which counts groups in the place of columns.
    groups = getattr(config, "groups", None)
    return groups or config.parsed_rank() or chosen.rank
