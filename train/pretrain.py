"""One training run: from options to a trained model, its metrics and its pictures."""

import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

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
from oasis_jax.memory import step_memory
from oasis_jax.methods import row
from oasis_jax.models import llama
from oasis_jax.select import Selection, select
from oasis_jax.state import OasisTrainState
from train import report
from train.config import Pretrain, UserError, parse_rank
from train.data import Batch, TextData, load


@dataclass(frozen=True)
class Setup:
    """What the options describe, built but not yet compiled."""

    model: llama.Llama
    selection: Selection
    state: OasisTrainState
    loss_fn: Callable


def set_up(
    config: Pretrain,
    vocab_size: int | None = None,
    *,
    layers: int | None = None,
    abstract: bool = False,
) -> Setup:
    """Builds the model and a first state.

    Args:
      vocab_size, layers: The preset's own if None.
      abstract: Give the state's shapes only; nothing is computed or allocated.

    Raises:
      UserError: if the method, the preset, the rank or the pattern make no sense.
    """
    try:
        recipe = config.recipe()
        given = {"vocab_size": vocab_size, "layers": layers}
        changes = {name: size for name, size in given.items() if size is not None}
        model = llama.Llama(
            llama.preset(
                config.preset,
                remat=config.remat,
                residuals=config.residuals,
                loss_chunk=config.loss_chunk,
                dtype=jnp.dtype(config.dtype),
                param_dtype=jnp.dtype(config.param_dtype),
                **changes,
            )
        )
        tokens = jax.ShapeDtypeStruct((config.batch, config.seq), jnp.int32)
        init = partial(model.init, jax.random.key(config.seed))
        shapes = jax.eval_shape(init, tokens)
        # Decided on shapes, so that a wrong rank is found before anything is compiled.
        selection = select(shapes["params"], shapes["subspace"], recipe.rules)
        schedule = optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=config.lr,
            warmup_steps=round(config.warmup * config.steps),
            decay_steps=config.steps,
            end_value=config.lr / 10,
        )
        adam = dict(b1=config.b1, b2=config.b2, weight_decay=config.weight_decay)
        tx = optax.chain(
            optax.clip_by_global_norm(config.clip),
            recipe.optimizer(schedule, peak=config.lr, **adam),
        )
        create = partial(
            OasisTrainState.create,
            apply_fn=model.apply,
            tx=tx,
            rules=selection,
            seed=config.seed,
        )
        if abstract:
            state = jax.eval_shape(lambda p: create(params=p), shapes["params"])
        else:
            # Under jit, the initial tokens are never made.
            params = jax.jit(lambda: init(jnp.zeros(tokens.shape, tokens.dtype)))()[
                "params"
            ]
            state = create(params=params)
    except ValueError as error:
        raise UserError(str(error)) from None

    def loss_fn(variables: Any, batch: Any) -> jax.Array:
        total: Any = model.apply(variables, *_inputs(batch, config.cross_documents))
        return total / batch["tokens"][:, 1:].size

    return Setup(model, selection, state, loss_fn)


def run(config: Pretrain, *, console: Console | None = None) -> dict[str, Any]:
    """Trains; writes everything to `config.out`; returns the summary.

    Raises:
      UserError, DataError, CheckpointError: if something is wrong that the user can
        mend; the run's files are as the last finished step left them.
    """
    console = console or report.console()
    checkpoint_directory = config.out / "checkpoints"
    config.recipe()  # a wrong option is found before the data is read
    _claim(config)
    data = load(
        config.data,
        str(config.tokenizer) if config.tokenizer else None,
        cache=config.cache,
        data_dir=config.data_dir,
        progress=console.is_terminal,
    )
    console.print(f"data       {data.description}")
    batches = data.train(config.batch, config.seq, config.seed)
    data.validation(config.batch, config.seq)  # too short a split is found now
    setup = set_up(config, data.vocab_size)
    about = config.as_dict() | {"data_fingerprint": data.fingerprint}

    with Checkpoints(
        checkpoint_directory, every=config.checkpoint_every
    ) as checkpoints:
        done, state = 0, setup.state
        # A run that was killed before its first checkpoint starts again.
        if config.resume and checkpoints.steps():
            done, state = _resume(config, checkpoints, state, batches, data)
            console.print(f"resumed    {config.out} after step {done}")
        elif state.subspace:
            first = next(data.train(config.batch, config.seq, config.seed))
            state = jax.jit(lambda s, b: s.warm_start(setup.loss_fn, b))(state, first)
        config.out.mkdir(parents=True, exist_ok=True)
        report.write_json(config.out / "config.json", about)

        step = _compiled_step(setup, state, config)
        parts = step_memory(
            state,
            setup.loss_fn,
            batch_shape(config),
            compiled=step,
            accumulate=config.accumulate,
        )
        _describe(console, config, setup, parts)
        log = report.MetricsLog(
            config.out / "metrics.jsonl",
            resumed_step=done,
            tensorboard=config.out / "tensorboard" if config.tensorboard else None,
        )
        with log, _stop_signal() as stopped, _progress(console, config, done) as show:
            evaluate = partial(_evaluate, setup, data, config)
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
                    log(_record(done, loss, rate, state, config))
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
    return _finish(config, setup, state, parts, result, step_seconds)


def _claim(config: Pretrain) -> None:
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
    config: Pretrain,
    checkpoints: Checkpoints,
    state: OasisTrainState,
    batches: Any,
    data: TextData,
) -> tuple[int, OasisTrainState]:
    saved = checkpoints.config()
    config.check_continues(saved)
    if saved["data_fingerprint"] != data.fingerprint:
        raise UserError(
            f"cannot resume {config.out}: the text or its tokenizer changed since"
            f" (fingerprint {saved['data_fingerprint']}, now {data.fingerprint})"
        )
    return checkpoints.restore(state, data=batches)


def batch_shape(config: Pretrain) -> dict[str, jax.ShapeDtypeStruct]:
    row = jax.ShapeDtypeStruct((config.batch, config.seq + 1), jnp.int32)
    return {"tokens": row, "segments": row}


def train_step(setup: Setup, config: Pretrain) -> Callable:
    """One step, `(state, batch) -> (state, loss)`, not yet jitted."""

    def step(state: OasisTrainState, batch: Batch):
        count = config.accumulate
        state = state.refresh(setup.loss_fn, batch, accumulate=count)
        loss, grads = state.value_and_grad(setup.loss_fn, accumulate=count)(batch)
        return state.apply_gradients(grads), loss

    return step


def _compiled_step(setup: Setup, state: OasisTrainState, config: Pretrain):
    """The train step, compiled once and for all, with the state donated."""
    jitted = jax.jit(train_step(setup, config), donate_argnums=0)
    return jitted.lower(state, batch_shape(config)).compile()


def _evaluate(
    setup: Setup, data: TextData, config: Pretrain, state: OasisTrainState
) -> dict[str, Any]:
    """Token-weighted mean loss on the held-out split."""
    total = count = 0.0
    params = jax.jit(lambda state: state.merged_params())(state)
    for batch in data.validation(config.batch, config.seq, config.eval_batches):
        losses, weights = _held_out(setup.model, config.cross_documents, params, batch)
        total += float(losses)
        count += float(weights)
    return {"val_loss": total / count, "val_tokens": int(count)}


@partial(jax.jit, static_argnums=(0, 1))
def _held_out(model: llama.Llama, cross_documents: bool, params: Any, batch: Any):
    weights, inputs = batch["weights"], _inputs(batch, cross_documents)
    total: Any = model.apply({"params": params}, *inputs, weights)
    return total, jnp.sum(weights)


def _inputs(batch: Any, cross_documents: bool) -> tuple[Any, Any, Any]:
    """What the model takes of a batch: tokens, segments and targets."""
    tokens = batch["tokens"]
    segments = None if cross_documents else batch["segments"][:, :-1]
    return tokens[:, :-1], segments, tokens[:, 1:]


def _record(
    done: int, loss: float, rate: float, state: OasisTrainState, config: Pretrain
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
    console: Console, config: Pretrain, done: int, state: OasisTrainState
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


def _describe(
    console: Console, config: Pretrain, setup: Setup, parts: dict[str, int]
) -> None:
    count = sum(leaf.size for leaf in jax.tree.leaves(setup.state.params))
    console.print(
        f"model      {config.preset}, {count:,} parameters, {config.dtype},"
        f" remat {config.remat}",
    )
    console.print(f"method     {config.method}")
    if setup.selection.matches:
        console.print(str(setup.selection))
    total = parts["peak"]
    named = {k.replace("_", " "): v for k, v in parts.items() if k != "peak"}
    console.print(report.memory_table(named, total, "What a step needs"))


def _finish(
    config: Pretrain,
    setup: Setup,
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


def _rank(config: Pretrain) -> float | int | None:
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
def _progress(console: Console, config: Pretrain, done: int) -> Iterator[Callable]:
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


def main(config: Pretrain) -> int:
    summary = run(config)
    skipped = f", {summary['skipped']} updates skipped" if summary["skipped"] else ""
    print(
        f"validation loss {summary['val_loss']:.4f} over {summary['val_tokens']:,} tokens"
        f"{skipped}; results in {config.out}/",
        file=sys.stdout,
    )
    return 0
