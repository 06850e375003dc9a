"""The loop of every training run: from a set-up and its data to metrics and pictures.

A command builds a `Setup`, a `Dataset` and a function that evaluates; `fit` does the rest:
checkpoints, resuming, the log, the progress bar, stopping when asked to.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import grain
import jax
from rich.console import Console

from oasis_jax.checkpoints import Checkpoints
from oasis_jax.planning.memory import step_memory
from oasis_jax.seeds import narrow
from oasis_jax.state import OasisTrainState
from train.data.batches import Batch, Dataset
from train.errors import Diverged, Preempted
from train.options import Training
from train.report.curves import energy_plot, loss_plot
from train.report.log import MetricsLog, read_json, write_json
from train.report.progress import Bar, progress_bar
from train.run.divergence import WINDOW, Losses
from train.run.folder import RunFolder, best, merit, resume
from train.run.setup import Setup, compiled_step, warm_start
from train.run.signals import Signals, listening
from train.run.summary import describe, mean_energy, record, summarise

Evaluate = Callable[[OasisTrainState], dict[str, Any]]
"""Judges a state on the held-out split; gives at least `val_loss`."""

ROLLBACKS = 3
"""How often a run may go back to a checkpoint."""


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
      Diverged: if updates in a row were not finite, or the loss rose too far.
      Preempted: if it was asked to stop.
      UserError, CheckpointError: if something is wrong that the user can mend; the run's
        files are as the last finished step left them.
    """
    folder, objective = RunFolder(config.out), setup.objective
    batches = data.train(config.batch, narrow(config.seed))
    with (
        listening() as signals,
        Checkpoints(folder.checkpoints, every=config.checkpoint_every) as checkpoints,
    ):
        done, state, saved = 0, setup.state, {}
        # A run that was killed before its first checkpoint starts again.
        if config.resume and checkpoints.steps():
            done, state = resume(config, checkpoints, state, batches, about)
            saved = checkpoints.config(done)
            summary = _finished(config, folder, done)
            if summary is not None:
                console.print(f"finished   {config.out} has all of its {done} steps")
                return summary
            console.print(f"resumed    {config.out} after step {done}")
            if config.extends(saved, done):
                console.print(
                    f"extended   from {saved['steps']} to {config.steps} steps, with the"
                    f" learning rate that a run of {config.steps} has"
                )
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
        losses = Losses.of(config.max_rise, saved.get("losses"))
        signals.defer()
        run = Run(
            *(config, setup, step, evaluate, about, keep_best),
            *(console, folder, checkpoints, signals, batches),
            *(state, done, losses),
        )
        del state  # it is the run's, which gives its memory away
        try:
            run.to_the_end()
        except Diverged:
            _write_summary(run, parts, None, extra)
            raise
        finally:
            run.log.close()
        return _write_summary(run, parts, run.result, extra)


def _finished(config: Training, folder: RunFolder, done: int) -> dict[str, Any] | None:
    """The summary of a run that has nothing left to do."""
    if done < config.steps or not folder.summary.exists():
        return None
    summary: dict[str, Any] = read_json(folder.summary)
    # Without a loss it diverged, which is to be found out again.
    whole = summary["steps"] == config.steps and summary["val_loss"] is not None
    return summary if whole else None


@dataclass
class Run:
    """A run under way.

    Attributes:
      step: The train step, compiled.
      state: After `done` steps. Its memory is the next step's.
      losses: Which say whether it has diverged.
      seconds: Of the steps of this process.
      result: Of the last evaluation.
      log: What is measured.
    """

    config: Training
    setup: Setup
    step: Callable[[OasisTrainState, Batch], tuple[OasisTrainState, jax.Array]]
    evaluate: Evaluate
    about: Mapping[str, Any]
    keep_best: bool
    console: Console
    folder: RunFolder
    checkpoints: Checkpoints
    signals: Signals
    batches: grain.DatasetIterator[Batch]
    state: OasisTrainState
    done: int
    losses: Losses
    seconds: list[float] = field(default_factory=list)
    result: dict[str, Any] | None = None
    log: MetricsLog = field(init=False)
    _owed: bool = False  # a checkpoint was due while the loss was rising

    def __post_init__(self):
        self.log = self._open_log()

    def to_the_end(self) -> None:
        """Trains, saves and evaluates until all steps are done.

        Raises:
          Diverged, Preempted: if it ends before.
        """
        if self.config.on_divergence == "rollback":
            self.save(force=True)  # there is always something to go back to
        with progress_bar(self.config.steps, console=self.console) as bar:
            bar.at(self.done)
            self.judge()
            while self.done < self.config.steps:
                self.advance(bar)
                trouble = self.trouble()
                if trouble is not None:
                    self.go_back(trouble)
                if self.signals.stop:
                    self.stop()
                # Before it is judged: who is killed then has only that left to do.
                self.save()
                self.judge()

    def advance(self, bar: Bar) -> None:
        """One step."""
        config = self.config
        started = time.perf_counter()
        self.state, result = self.step(self.state, next(self.batches))
        loss = float(result)  # waits for the step
        self.seconds.append(time.perf_counter() - started)
        self.done += 1
        self.losses.add(loss)
        rate = config.batch * config.seq / self.seconds[-1]
        if self.done % config.log_every == 0 or self.done == config.steps:
            self.log(record(self.setup, self.state, self.done, loss, rate))
        self._show(bar, loss, rate)

    def save(self, *, force: bool = False) -> None:
        """Writes a checkpoint if one is due, or was asked for."""
        asked, self.signals.save = self.signals.save, False
        last = self.done == self.config.steps
        if not (force or asked or last) and self.losses.rising():
            # It would push out one from before the rise.
            self._owed |= self.done % self.config.checkpoint_every == 0
            return
        written = self.checkpoints.save(
            self.done,
            self.state,
            config={**self.about, "losses": self.losses.as_dict()},
            data=self.batches,
            force=force or asked or last or self._owed,
        )
        self._owed = False
        if written and asked:
            self.console.print(f"saved      step {self.done}, as asked by a signal")

    def stop(self) -> None:
        """Saves, and ends the run.

        Raises:
          Preempted: always.
        """
        self.save(force=True)
        raise Preempted(
            f"stopped after step {self.done}, which is saved; continue with"
            f" --resume --out {self.config.out}"
        )

    def judge(self) -> None:
        """Evaluates, if this is due; what is in the log already is taken from there.

        Raises:
          Preempted: if it was asked to stop meanwhile.
        """
        due = self.done and self.done % self.config.eval_every == 0
        if not due and self.done < self.config.steps:
            return
        for seen in self.log.records:
            if seen["step"] == self.done and seen.get("val_loss") is not None:
                self.result = {k: v for k, v in seen.items() if k != "step"}
                return
        try:
            with self.signals.interrupting():
                result = self.evaluate(self.state)
        except KeyboardInterrupt:
            if not self.signals.stop:
                raise
            self.stop()
        before = best(self.log.records)
        if self.keep_best and (before is None or merit(result) > merit(before)):
            with Checkpoints(self.folder.best, keep=1) as kept:
                kept.save(self.done, self.state, config=self.about, force=True)
        self.log({"step": self.done, **result})
        self.result = result

    def trouble(self) -> str | None:
        """Why the run cannot go on as it is. Tells of an update that was skipped."""
        config, seen = self.config, self.state.diagnostics
        in_a_row = int(seen.skipped_in_a_row)
        if in_a_row:
            self.console.print(
                f"step {self.done}: gradients or activations not finite, update skipped"
                f" ({in_a_row} in a row, {int(seen.skipped)} in all)"
            )
        if in_a_row >= config.max_skips:
            return (
                f"{in_a_row} updates in a row were not finite (--max-skips"
                f" {config.max_skips})"
            )
        if self.losses.risen():
            limit = self.losses.limit
            return (
                f"the median loss of the last {WINDOW} steps, {self.losses.median:.4g},"
                f" is above {limit:.4g}, which is --max-rise {config.max_rise:g} times"
                f" that of the start"
            )
        return None

    def go_back(self, trouble: str) -> None:
        """Goes on from the newest checkpoint from before, with the batches after these.

        Raises:
          Diverged: if the run shall stop instead, or there is no such checkpoint.
        """
        skips = int(self.state.diagnostics.skipped_in_a_row)
        before = self.done - WINDOW - skips
        good = [step for step in self.checkpoints.steps() if step <= before]
        tries = self.losses.rollbacks + 1
        if self.config.on_divergence == "stop" or not good or tries > ROLLBACKS:
            raise Diverged(self._last_words(trouble, good))
        at, self.state = self.done, jax.eval_shape(lambda state: state, self.state)
        self.done, self.state = self.checkpoints.restore(self.state, latest=before)
        saved = self.checkpoints.config(self.done).get("losses")
        self.losses = Losses.of(self.config.max_rise, saved)
        self.losses.rollbacks = tries
        self.losses.last = []  # else the next rise would reach back beyond this step
        self.log.close()
        self.log = self._open_log()
        self.console.print(
            f"step {at}: {trouble}; back to step {self.done}, with other batches"
            f" ({tries} of at most {ROLLBACKS} rollbacks)"
        )

    def _last_words(self, trouble: str, good: list[int]) -> str:
        words = f"stopped at step {self.done}: {trouble}"
        if self.losses.rollbacks:
            words += f", after {self.losses.rollbacks} rollbacks"
        if self.losses.risen():
            newest = f"{self.folder.checkpoints / str(max(good, default=0))}"
            words += (
                f"; the newest checkpoint from before is {newest}"
                if good
                else "; there is no checkpoint from before"
            )
        else:  # skipped updates have changed nothing
            self.save(force=True)
            words += (
                "; weights, moments and bases, as the last finite step left them, are"
                f" saved in {self.config.out}"
            )
        words += "; try a lower --lr or a longer --warmup in another --out"
        if self.config.on_divergence == "stop" and good:
            words += ", or --resume with --on-divergence rollback"
        return words

    def _open_log(self) -> MetricsLog:
        folder = self.folder.tensorboard if self.config.tensorboard else None
        return MetricsLog(
            self.folder.metrics, resumed_step=self.done, tensorboard=folder
        )

    def _show(self, bar: Bar, loss: float, rate: float) -> None:
        """Loss, tokens/s, captured energy; a line now and then without a terminal."""
        status = f"loss {loss:.4f}  {rate:,.0f} tokens/s"
        energy = mean_energy(self.state)
        if energy is not None:
            status += f"  energy {energy:.3f}"
        bar.at(self.done, status)
        steps = self.config.steps
        if not self.console.is_terminal and self.done % max(1, steps // 10) == 0:
            self.console.print(f"step {self.done}/{steps}  {status}")


def _write_summary(
    run: Run,
    parts: Mapping[str, int],
    result: Mapping[str, Any] | None,
    extra: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The summary, and the pictures.

    Args:
      result: The last evaluation; None if training diverged.
    """
    records = run.log.records
    rollbacks = run.losses.rollbacks
    summary = summarise(
        run.config, run.state, parts, records, run.seconds, result, rollbacks
    )
    summary |= {**(extra or {}), **({"best": best(records)} if run.keep_best else {})}
    write_json(run.folder.summary, summary)
    loss_plot(records, run.folder.path / "loss.png")
    energy_plot(records, run.folder.path / "energy.png")
    return summary
