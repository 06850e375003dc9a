"""The loop of every training run: from a model and its data to metrics and pictures.

A command builds a `Setup`, an iterator of batches that can tell and take its position,
and a function that evaluates; `fit` does the rest: checkpoints, resuming, the log, the
progress bar, stopping when asked to.
"""

import re
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from oasis_jax.checkpoints import Checkpoints
from oasis_jax.leaves import by_pattern, unstacked
from oasis_jax.methods import row
from oasis_jax.paths import flatten_paths, map_with_paths
from oasis_jax.planning.memory import step_memory, tree_bytes
from oasis_jax.select import Selection, select
from oasis_jax.state import OasisTrainState
from train import report
from train.config import Training, UserError, parse_rank

VOCABULARY = r"(^|/)(embed/(word/)?embedding$|lm_head/)"
"""The parameters that have a row per token of the vocabulary, and their moments."""


@dataclass(frozen=True)
class Setup:
    """What the options describe, built but not yet compiled.

    Attributes:
      model: Its `apply` is the state's.
      selection: What is projected.
      state: The first one, or its shapes.
      loss_fn: `loss_fn(variables, batch)`, a mean over the batch.
      batch: Shape of a batch.
      prepare: What is done to a whole batch before it is cut into microbatches.
    """

    model: Any
    selection: Selection
    state: OasisTrainState
    loss_fn: Callable
    batch: Any
    prepare: Callable[[Any], Any] = lambda batch: batch


def set_up(
    config: Training,
    model: nn.Module,
    loss_fn: Callable,
    batch: Any,
    inputs: tuple[Any, ...],
    *,
    schedule: optax.Schedule,
    params: Any = None,
    abstract: bool = False,
) -> Setup:
    """A first state for a model.

    Args:
      model, loss_fn, batch: As in `Setup`.
      inputs: Shapes of what the model takes.
      schedule: Of the learning rate.
      params: To start from; drawn by the seed if None.
      abstract: Give the state's shapes only; nothing is computed or allocated.

    Raises:
      UserError: if the method, the rank or the pattern make no sense.
    """
    try:
        recipe = config.recipe()
        init = partial(model.init, jax.random.key(config.seed))
        shapes = jax.eval_shape(init, *inputs)
        # Decided on shapes, so that a wrong rank is found before anything is compiled.
        selection = select(shapes["params"], shapes["subspace"], recipe.rules)
        adam = dict(b1=config.b1, b2=config.b2, weight_decay=config.weight_decay)
        tx = recipe.optimizer(schedule, peak=config.lr, **adam)
        if config.embeddings != "adamw":
            other = {
                "adafactor": lambda: unstacked(optax.adafactor(schedule)),
                "frozen": optax.set_to_zero,
            }
            tx = by_pattern(VOCABULARY, other[config.embeddings](), tx)
        create = partial(
            OasisTrainState.create,
            apply_fn=model.apply,
            tx=optax.chain(optax.clip_by_global_norm(config.clip), tx),
            rules=selection,
            seed=config.seed,
        )
        if abstract:
            state = jax.eval_shape(lambda p: create(params=p), shapes["params"])
        else:
            if params is None:

                def first() -> Any:
                    # Under jit, the initial tokens are never made.
                    zeros = [jnp.zeros(a.shape, a.dtype) for a in inputs]
                    return init(*zeros)["params"]

                params = jax.jit(first)()
            state = create(params=params)
    except ValueError as error:
        raise UserError(str(error)) from None
    if config.embeddings == "frozen":
        loss_fn = _frozen(loss_fn)
    return Setup(model, selection, state, loss_fn, batch)


def model_options(config: Training) -> dict[str, Any]:
    """The options that a model's configuration has too."""
    return dict(
        remat=config.remat,
        residuals=config.residuals,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
    )


def _frozen(loss_fn: Callable) -> Callable:
    """The loss, of which the vocabulary's gradients are known to be zero."""

    def stopped(path: str, leaf: jax.Array) -> jax.Array:
        return jax.lax.stop_gradient(leaf) if re.search(VOCABULARY, path) else leaf

    def loss(variables: Any, batch: Any) -> jax.Array:
        params = map_with_paths(stopped, variables["params"])
        return loss_fn(variables | {"params": params}, batch)

    return loss


def fit(
    config: Training,
    setup: Setup,
    batches: Any,
    evaluate: Callable[[OasisTrainState], dict[str, Any]],
    *,
    about: Mapping[str, Any],
    title: str,
    console: Console,
) -> dict[str, Any]:
    """Trains; writes everything to `config.out`; returns the summary.

    Args:
      batches: A Grain iterator, not yet advanced.
      evaluate: Gives at least `val_loss`.
      about: The options, to be kept, with `data_fingerprint`: a run only continues on
        the same data.
      title: The model, in a few words.

    Raises:
      UserError, CheckpointError: if something is wrong that the user can mend; the run's
        files are as the last finished step left them.
    """
    with Checkpoints(
        config.out / "checkpoints", every=config.checkpoint_every
    ) as checkpoints:
        done, state = 0, setup.state
        # A run that was killed before its first checkpoint starts again.
        if config.resume and checkpoints.steps():
            done, state = _resume(config, checkpoints, state, batches, about)
            console.print(f"resumed    {config.out} after step {done}")
        elif state.subspace:
            start = batches.get_state()
            first = next(batches)
            batches.set_state(start)
            state = jax.jit(lambda s, b: s.warm_start(setup.loss_fn, b))(state, first)
        config.out.mkdir(parents=True, exist_ok=True)
        report.write_json(config.out / "config.json", about)

        step = _compiled_step(setup, state, config)
        parts = step_memory(
            state,
            setup.loss_fn,
            setup.batch,
            compiled=step,
            accumulate=config.accumulate,
        )
        describe(console, config, setup, parts, title)
        log = report.MetricsLog(
            config.out / "metrics.jsonl",
            resumed_step=done,
            tensorboard=config.out / "tensorboard" if config.tensorboard else None,
        )
        with log, _stop_signal() as stopped, _progress(console, config, done) as show:
            step_seconds = []
            while int(state.step) < config.steps:
                started = time.perf_counter()
                state, loss = step(state, next(batches))
                loss = float(loss)  # waits for the step
                step_seconds.append(time.perf_counter() - started)
                done += 1
                rate = config.batch * config.seq / step_seconds[-1]
                seen = state.diagnostics
                if done % config.log_every == 0 or done == config.steps:
                    log(_record(done, loss, rate, state))
                show(done, loss, rate, seen)
                reason = _skipped(console, config, done, state)
                if stopped():
                    reason = (
                        f"stopped after step {done}, which is saved; continue with"
                        f" --resume --out {config.out}"
                    )
                if done % config.eval_every == 0 and done < config.steps:
                    log({"step": done, **evaluate(state)})
                checkpoints.save(
                    done, state, config=about, data=batches, force=reason is not None
                )
                if reason:
                    raise UserError(reason)
            result = evaluate(state)
            if done not in {r["step"] for r in log.read() if "val_loss" in r}:
                log({"step": done, **result})
        checkpoints.save(done, state, config=about, data=batches, force=True)
    return _finish(config, state, parts, result, step_seconds)


def claim(config: Training) -> None:
    """Refuses to write over another run, or to resume one that is not there."""
    taken = config.out.exists() and (config.out.is_file() or any(config.out.iterdir()))
    if taken and not config.resume:
        raise UserError(
            f"--out {config.out} already holds something; continue it with --resume, or"
            " choose another --out"
        )
    if config.resume and not (config.out / "checkpoints").is_dir():
        raise UserError(f"--resume: there is no run in --out {config.out}")


def _resume(
    config: Training,
    checkpoints: Checkpoints,
    state: OasisTrainState,
    batches: Any,
    about: Mapping[str, Any],
) -> tuple[int, OasisTrainState]:
    saved = checkpoints.config()
    config.check_continues(saved)
    fingerprint = about["data_fingerprint"]
    if saved["data_fingerprint"] != fingerprint:
        raise UserError(
            f"cannot resume {config.out}: the text or its tokenizer changed since"
            f" (fingerprint {saved['data_fingerprint']}, now {fingerprint})"
        )
    return checkpoints.restore(state, data=batches)


def train_step(setup: Setup, config: Training) -> Callable:
    """One step, `(state, batch) -> (state, loss)`, not yet jitted."""

    def step(state: OasisTrainState, batch: Any):
        count, batch = config.accumulate, setup.prepare(batch)
        state = state.refresh(setup.loss_fn, batch, accumulate=count)
        loss, grads = state.value_and_grad(setup.loss_fn, accumulate=count)(batch)
        return state.apply_gradients(grads), loss

    return step


def _compiled_step(setup: Setup, state: OasisTrainState, config: Training):
    """The train step, compiled once and for all, with the state donated."""
    jitted = jax.jit(train_step(setup, config), donate_argnums=0)
    return jitted.lower(state, setup.batch).compile()


def _record(
    done: int, loss: float, rate: float, state: OasisTrainState
) -> dict[str, Any]:
    seen = jax.device_get(state.diagnostics)
    return {
        "step": done,
        "loss": loss,
        "tokens_per_s": round(rate, 1),
        "gradient_norm": float(seen.gradient_norm),
        "skipped": int(seen.skipped),
        "captured_energy": _short(seen.captured_energy),
        "motion": _short(seen.motion),
    }


def _short(values: dict[str, np.ndarray]) -> dict[str, Any]:
    return {
        path.removesuffix("/projection"): np.round(np.float64(value), 6).tolist()
        for path, value in values.items()
    }


def _skipped(
    console: Console, config: Training, done: int, state: OasisTrainState
) -> str | None:
    """Tells of a skipped update; gives the reason to stop if there were too many."""
    seen = state.diagnostics
    in_a_row = int(seen.skipped_in_a_row)
    if not in_a_row:
        return None
    console.print(
        f"step {done}: gradients or activations not finite, update skipped"
        f" ({in_a_row} in a row, {int(seen.skipped)} in all)"
    )
    if in_a_row < config.max_skips:
        return None
    return (
        f"stopped at step {done}: {in_a_row} updates in a row were not finite"
        f" (--max-skips {config.max_skips}); weights, moments and bases, as the last"
        f" finite step left them, are saved in {config.out}; try a lower --lr"
    )


def describe(
    console: Console,
    config: Training,
    setup: Setup,
    parts: dict[str, int],
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
    if setup.selection.matches:
        console.print(str(setup.selection))
    total = parts["peak"]
    named = {k: v for k, v in parts.items() if k != "peak"}
    console.print(report.memory_table(named, total, "What a step needs"))


def _vocabulary(config: Training, state: OasisTrainState) -> str:
    """What the embeddings cost, of which few think."""

    def own(tree: Any) -> dict[str, Any]:
        leaves = flatten_paths(tree).items()
        return {path: leaf for path, leaf in leaves if re.search(VOCABULARY, path)}

    weights, moments = own(state.params), own(state.opt_state)
    total = tree_bytes(state.opt_state)
    return (
        f"vocabulary {sum(leaf.size for leaf in weights.values()):,} of the parameters,"
        f" --embeddings {config.embeddings}:"
        f" {report.human_bytes(tree_bytes(moments))} of the optimizer's"
        f" {report.human_bytes(total)}"
    )


def _finish(
    config: Training,
    state: OasisTrainState,
    parts: dict[str, int],
    result: dict[str, Any],
    step_seconds: list[float],
) -> dict[str, Any]:
    records = report.read_metrics(config.out / "metrics.jsonl")
    # The first step of a process pays for what is set up lazily.
    timed = step_seconds[1:] or step_seconds
    median = statistics.median(timed) if timed else None
    energies = [float(np.mean(e)) for e in state.diagnostics.captured_energy.values()]
    summary = {
        "method": config.method,
        **result,
        "steps": config.steps,
        "lr": config.lr,
        "rank": _rank(config),
        "seed": config.seed,
        "tokens_per_s": config.batch * config.seq / median if median else None,
        "step_ms_median": 1e3 * median if median else None,
        "saved_activation_bytes": parts["saved_activations"],
        "gradient_bytes": parts["gradients"],
        "optimizer_state_bytes": parts["optimizer_state"],
        "weight_bytes": parts["weights"],
        "basis_bytes": parts["bases"],
        "peak_bytes": parts["peak"],
        "captured_energy": statistics.mean(energies) if energies else None,
        "skipped": int(state.diagnostics.skipped),
        "curve": [[r["step"], r["val_loss"]] for r in records if "val_loss" in r],
        "config": config.as_dict(),
        "machine": machine(),
    }
    report.write_json(config.out / "summary.json", summary)
    report.loss_plot(records, config.out / "loss.png")
    report.energy_plot(records, config.out / "energy.png")
    return summary


def _rank(config: Training) -> float | int | None:
    """As given, or the method's own; None where it means nothing."""
    own = row(config.method).rank
    if own is None:
        return None
    if config.groups is not None:
        return config.groups
    return own if config.rank is None else parse_rank(config.rank)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    import os
    import platform

    import flax

    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "optax": optax.__version__,
    }


@contextmanager
def _stop_signal() -> Iterator[Callable[[], bool]]:
    """Turns Ctrl-C and SIGTERM into a question that the loop asks after each step."""
    caught: list[int] = []

    def note(number: int, frame: Any) -> None:
        if caught:  # the second one means it
            raise KeyboardInterrupt
        caught.append(number)

    try:
        before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: whoever runs us handles signals
        before = {}
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _progress(console: Console, config: Training, done: int) -> Iterator[Callable]:
    """A bar with loss, tokens/s and captured energy; a line now and then without a TTY."""
    columns = [BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    columns.append(TextColumn("{task.fields[status]}"))
    every = max(1, config.steps // 10)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=config.steps, completed=done, status="")

        def show(step: int, loss: float, rate: float, seen: Any) -> None:
            status = f"loss {loss:.4f}  {rate:,.0f} tokens/s"
            if seen.captured_energy:
                shares = [np.mean(e) for e in seen.captured_energy.values()]
                status += f"  energy {np.mean(shares):.3f}"
            bar.update(task, completed=step, status=status)
            if not console.is_terminal and step % every == 0:
                console.print(f"step {step}/{config.steps}  {status}")

        yield show
