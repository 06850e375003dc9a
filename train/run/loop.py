"""The loop of every training run: from a set-up and its data to metrics and pictures.

A command builds a `Setup`, a `Dataset` and a function that evaluates; `fit` does the rest:
checkpoints, resuming, the log, the progress bar, stopping when asked to.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console

from oasis_jax.checkpoints import Checkpoints
from oasis_jax.planning.memory import step_memory
from oasis_jax.seeds import narrow
from oasis_jax.state import OasisTrainState
from train.data.batches import Dataset
from train.errors import Diverged, Preempted, UserError
from train.options import Training
from train.report.curves import energy_plot, loss_plot
from train.report.log import MetricsLog, read_json, write_json
from train.report.progress import Bar, progress_bar
from train.run.folder import RunFolder, best, merit, resume
from train.run.setup import Setup, compiled_step, warm_start
from train.run.signals import stop_signals
from train.run.summary import describe, mean_energy, record, summarise

Evaluate = Callable[[OasisTrainState], dict[str, Any]]
"""Judges a state on the held-out split; gives at least `val_loss`."""


def fit(
    config: Training,
    setup: Setup,
    data: Dataset,
    evaluate: Evaluate,
    *,
    about: Mapping[str, Any],
    title: str,
    console: Console,
    keep_best: bool = False,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Trains; writes everything to `config.out`; returns the summary.

    A run that is resumed and has nothing left to do is left as it is.

    Args:
      about: The options, to be kept, with `data_fingerprint`: a run only continues on
        the same data.
      title: The model, in a few words.
      keep_best: Also keeps the state with the best evaluation.
      extra: Also goes into the summary.

    Raises:
      Diverged: if updates in a row were not finite.
      Preempted: if it was asked to stop.
      UserError, CheckpointError: if something is wrong that the user can mend; the run's
        files are as the last finished step left them.
    """
    folder, objective = RunFolder(config.out), setup.objective
    batches = data.train(config.batch, narrow(config.seed))
    with Checkpoints(folder.checkpoints, every=config.checkpoint_every) as checkpoints:
        done, state = 0, setup.state
        # A run that was killed before its first checkpoint starts again.
        if config.resume and checkpoints.steps():
            done, state = resume(config, checkpoints, state, batches, about)
            if done >= config.steps and folder.summary.exists():
                summary = read_json(folder.summary)
                # Without a loss it diverged, which is to be found out again.
                if summary["val_loss"] is not None:
                    console.print(
                        f"finished   {config.out} has all of its {done} steps"
                    )
                    return summary
            console.print(f"resumed    {config.out} after step {done}")
        elif state.bases:
            start = batches.get_state()
            first = next(batches)
            batches.set_state(start)
            state = warm_start(setup, first)
        folder.path.mkdir(parents=True, exist_ok=True)
        write_json(folder.config, about)

        step = compiled_step(setup, state, config.accumulate)
        parts = step_memory(
            state,
            objective.loss_fn,
            objective.batch,
            compiled=step,
            accumulate=config.accumulate,
            weighted=True,
        )
        describe(console, config, setup, parts, title)
        log = MetricsLog(
            folder.metrics,
            resumed_step=done,
            tensorboard=folder.tensorboard if config.tensorboard else None,
        )

        def evaluated(state: OasisTrainState, done: int) -> dict[str, Any]:
            result, before = evaluate(state), best(log.records)
            if keep_best and (before is None or merit(result) > merit(before)):
                with Checkpoints(folder.best, keep=1) as kept:
                    kept.save(done, state, config=about, force=True)
            return result

        step_seconds: list[float] = []
        stop: UserError | None = None
        bar = progress_bar(config.steps, console=console)
        with log, stop_signals() as asked, bar as shown:
            shown.at(done)
            while done < config.steps:
                done += 1
                started = time.perf_counter()
                state, loss = step(state, next(batches))
                loss = float(loss)  # waits for the step
                step_seconds.append(time.perf_counter() - started)
                rate = config.batch * config.seq / step_seconds[-1]
                if done % config.log_every == 0 or done == config.steps:
                    log(record(setup, state, done, loss, rate))
                _show(console, shown, config, done, loss, rate, state)
                stop = _skipped(console, config, done, state)
                if asked():
                    stop = Preempted(
                        f"stopped after step {done}, which is saved; continue with"
                        f" --resume --out {config.out}"
                    )
                if done % config.eval_every == 0 and done < config.steps:
                    log({"step": done, **evaluated(state, done)})
                checkpoints.save(
                    done, state, config=about, data=batches, force=stop is not None
                )
                if stop is not None:
                    break
            result = None
            if stop is None:
                result = evaluated(state, done)
                if done not in {r["step"] for r in log.records if "val_loss" in r}:
                    log({"step": done, **result})
        if stop is None:
            checkpoints.save(done, state, config=about, data=batches, force=True)
    records = log.records
    if not isinstance(stop, Preempted):
        summary = summarise(config, state, parts, records, step_seconds, result)
        summary |= {**(extra or {}), **({"best": best(records)} if keep_best else {})}
        write_json(folder.summary, summary)
        loss_plot(records, config.out / "loss.png")
        energy_plot(records, config.out / "energy.png")
    if stop is not None:
        raise stop
    return summary


def _skipped(
    console: Console, config: Training, done: int, state: OasisTrainState
) -> Diverged | None:
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
    return Diverged(
        f"stopped at step {done}: {in_a_row} updates in a row were not finite"
        f" (--max-skips {config.max_skips}); weights, moments and bases, as the last"
        f" finite step left them, are saved in {config.out}; try a lower --lr"
    )


def _show(
    console: Console,
    bar: Bar,
    config: Training,
    done: int,
    loss: float,
    rate: float,
    state: OasisTrainState,
) -> None:
    """Loss, tokens/s and captured energy; a line now and then without a terminal."""
    status = f"loss {loss:.4f}  {rate:,.0f} tokens/s"
    energy = mean_energy(state)
    if energy is not None:
        status += f"  energy {energy:.3f}"
    bar.at(done, status)
    if not console.is_terminal and done % max(1, config.steps // 10) == 0:
        console.print(f"step {done}/{config.steps}  {status}")
