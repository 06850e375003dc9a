"""Prepares, times and weighs train steps; what `step.py` and `frontier.py` share.

The step is the one that `python -m train pretrain` runs, on random tokens. On a CPU the
configurations take turns in one process, so that a machine whose speed drifts drifts for
all of them. A GPU's peak only rises while a process lives, so there each configuration
has a process of its own.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any

# Before JAX starts: neither this process nor a worker takes memory that it does not use.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from oasis_jax.methods import row
from oasis_jax.planning import targets
from oasis_jax.planning.flops import llama_inputs
from oasis_jax.planning.memory import step_memory
from train.errors import UserError
from train.options import Pretrain
from train.report.log import console as standard_error
from train.run import build
from train.run.machine import machine, versions
from train.run.setup import train_step

WARM_UP = 2
"""Turns that are not counted. In the first, methods that renew their bases every so many
steps do it: what that costs is in no figure."""

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Case:
    """What is compared: a method, and what its backward pass recomputes and keeps.

    >>> Case.parse("oasis:mlp:256")
    Case(method='oasis', remat='mlp', rank='256', residuals='whole')
    >>> Case.parse("oasis:elementwise::int8").label
    'oasis:elementwise::int8'
    """

    method: str
    remat: str = "elementwise"
    rank: str = ""
    """Of the workload if empty."""
    residuals: str = "whole"

    @classmethod
    def parse(cls, text: str) -> "Case":
        """From `method:remat[:rank[:residuals]]`.

        Raises:
          UserError: if there are more parts, or fewer.
        """
        parts = text.split(":")
        if not 2 <= len(parts) <= 4:
            raise UserError(
                f"configuration is {text!r}, expected method:remat[:rank[:residuals]]"
            )
        return cls(*parts)

    @property
    def label(self) -> str:
        """As it is typed."""
        parts = [self.method, self.remat, self.rank, self.residuals]
        if self.residuals == "whole":
            parts = parts[: 3 if self.rank else 2]
        return ":".join(parts)


@dataclass(frozen=True)
class Workload:
    """What all configurations work on."""

    preset: str = "llama-60m"
    layers: int | None = 4
    """The preset's own if None, and so with the vocabulary."""
    vocab_size: int | None = 256
    batch: int = 4
    seq: int = 512
    rank: str = "0.125"
    """Of the configurations that name none: a fraction of n_in, or a number of columns."""
    stride: int = 1
    """The tracker looks at every stride-th token."""
    dtype: str = "float32"
    param_dtype: str = "float32"
    cross_documents: bool = False
    """As in `pretrain`; `plan` has it too, so that its peak can be compared."""
    rounds: int = 10
    """How often each step is timed, after two that are not."""
    alone: bool = False
    """A process for each configuration; on a GPU there is one in any case."""
    clock: str = "wall"
    """wall, or cpu: the time that the process had a core, which tells more where others
    use the machine too. It is for a CPU, and for a process pinned to one core."""
    note: str = ""
    """Something about the machine that it does not know of itself."""

    def __post_init__(self):
        if self.clock not in CLOCKS:
            raise UserError(
                f"--clock is {self.clock!r}, expected {' or '.join(CLOCKS)}"
            )

    @property
    def tokens(self) -> int:
        return self.batch * self.seq

    def options(self, case: Case) -> Pretrain:
        """Those of `pretrain`. The run is long, so that no basis is renewed twice.

        Raises:
          UserError: if there is no such method.
        """
        try:
            projected = row(case.method).projected
        except ValueError as error:
            raise UserError(str(error)) from None
        rank = (case.rank or self.rank) if projected else None
        return Pretrain(
            method=case.method,
            remat=case.remat,
            rank=rank,
            residuals=case.residuals,
            preset=self.preset,
            batch=self.batch,
            seq=self.seq,
            stride=self.stride,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            cross_documents=self.cross_documents,
            steps=10_000,
        )


@dataclass
class Measured:
    """What is known of one configuration.

    Attributes:
      seconds: Of each counted step.
      compile_seconds: Of tracing and compiling.
      memory: Bytes by part; `peak` is what the compiler reports.
      peak_bytes: The most that the device held in the whole process, compilation
        included; None if it does not tell.
      model_flops: Of one step, by `model_flops`.
      machine: What it ran on.
    """

    compile_seconds: float
    memory: dict[str, int]
    model_flops: float
    machine: dict[str, Any]
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def peak_over_compiled(self) -> float | None:
        """The device's word over the compiler's."""
        return (
            None if self.peak_bytes is None else self.peak_bytes / self.memory["peak"]
        )


def model_flops(config: Any, *, batch: int, seq: int) -> float:
    """Operations that a dense step of a LLaMA cannot do without.

    Per token 6 N, for N weights in matrix products, and 12 T H E per layer of attention;
    what recomputation repeats, or a subspace saves, makes no difference.

    Example:
      >>> from oasis_jax.models.llama import preset
      >>> round(model_flops(preset("llama-60m"), batch=1, seq=1) / 1e6)
      250
    """
    weights = sum(place.weights for place in llama_inputs(config))
    attention = seq * config.heads * config.head_size * config.layers
    return float(batch * seq * (6 * weights + 12 * attention))


TARGETS = {
    "NVIDIA H200": "h200",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA A100-SXM4-40GB": "a100",
    "NVIDIA L4": "l4",
    "NVIDIA GeForce RTX 4090": "rtx-4090",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
}
"""Of the devices as JAX names them. What is not here, another bin of the same chip
included, has a peak that is not known."""


def peak_flops(device: str, dtype: str) -> tuple[float | None, str]:
    """The device's peak per second, or None; and a sentence that says which.

    >>> peak_flops("cpu", "float32")
    (None, 'The peak of cpu in float32 is not known.')
    """
    if device not in TARGETS or dtype != "bfloat16":
        return None, f"The peak of {device} in {dtype} is not known."
    peak = targets.find(TARGETS[device]).flops
    return peak, f"{device} has a peak of {peak / 1e12:g} TFLOP/s in {dtype}."


# --- Measuring ----------------------------------------------------------------------


class Step:
    """A compiled step and the state that it moves on."""

    def __init__(self, workload: Workload, case: Case):
        options = workload.options(case)
        setup = build.pretraining(options, workload.vocab_size, layers=workload.layers)
        jitted = jax.jit(train_step(setup, accumulate=1), donate_argnums=0)
        started = time.perf_counter()
        shape, loss_fn = setup.objective.batch, setup.objective.loss_fn
        self._compiled = jitted.lower(setup.state, shape).compile()
        took = time.perf_counter() - started
        model = setup.objective.model.config
        tokens = np.random.default_rng(0).integers(
            0, model.vocab_size, shape["tokens"].shape
        )
        self._batch = {
            "tokens": jnp.asarray(tokens, jnp.int32),
            "segments": jnp.ones(shape["segments"].shape, jnp.int32),
        }
        self.measured = Measured(
            took,
            step_memory(
                setup.state, loss_fn, shape, compiled=self._compiled, weighted=True
            ),
            model_flops(model, batch=workload.batch, seq=workload.seq),
            machine(),
        )
        self._state = setup.state
        self._clock = CLOCKS[workload.clock]

    def __call__(self, *, count: bool) -> None:
        started = self._clock()
        self._state, loss = self._compiled(self._state, self._batch)
        jax.block_until_ready((self._state, loss))
        if count:
            self.measured.seconds.append(self._clock() - started)


Found = dict[str, Measured | str]


def measure(
    workload: Workload,
    cases: Sequence[Case],
    each: Callable[[Found], object] = lambda found: None,
) -> Found:
    """Times every case, with a progress bar.

    Args:
      each: Is given what there is after each process, for a long run may be cut short.

    Returns:
      By label what was measured, or, of a case that failed in a process of its own (one
      that does not fit the device, say), the last line of what it said.
    """
    if workload.clock == "cpu" and jax.default_backend() != "cpu":
        raise UserError("--clock cpu does not see what an accelerator does")
    found: Found = {}
    if takes_turns(workload):
        found.update(_in_turns(workload, cases))
        each(found)
        return found
    with progress(len(cases)) as tick:
        for case in cases:
            tick(case.label)
            found[case.label] = _alone(workload, case)
            each(found)
    return found


def takes_turns(workload: Workload) -> bool:
    """Whether the configurations run in one process, and so in the same weather."""
    return not workload.alone and jax.default_backend() == "cpu"


def _in_turns(workload: Workload, cases: Sequence[Case]) -> dict[str, Measured]:
    turns = WARM_UP + workload.rounds
    with progress(len(cases) * (1 + turns)) as tick:
        steps = {}
        for case in cases:
            tick(f"compile {case.label}")
            steps[case.label] = Step(workload, case)
        for turn in range(turns):
            for label, step in steps.items():
                tick(f"time {label}")
                step(count=turn >= WARM_UP)
    return {label: step.measured for label, step in steps.items()}


def _alone(workload: Workload, case: Case) -> Measured | str:
    order = {"workload": _plain(workload), "case": asdict(case)}
    result = subprocess.run(
        [sys.executable, __file__, json.dumps(order)],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        return (result.stderr.strip().splitlines() or ["no message"])[-1]
    return Measured(**json.loads(result.stdout.splitlines()[-1]))


def _work(order: dict[str, Any]) -> None:
    """What a process of its own does."""
    workload = Workload(**order["workload"])
    step = Step(workload, Case(**order["case"]))
    for turn in range(WARM_UP + workload.rounds):
        step(count=turn >= WARM_UP)
    seen = jax.local_devices()[0].memory_stats() or {}
    step.measured.peak_bytes = seen.get("peak_bytes_in_use")
    print(json.dumps(asdict(step.measured)))


def _plain(workload: Workload) -> dict[str, Any]:
    """The fields of a workload, without those of the script that extends it."""
    return {f.name: getattr(workload, f.name) for f in fields(Workload)}


@contextmanager
def progress(total: int):
    """A bar; a line for each compilation where there is no terminal."""
    console = standard_error()
    columns = [BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}")]
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        started = 0

        def tick(text: str) -> None:
            nonlocal started
            bar.update(task, completed=started, description=text)
            started += 1
            if not console.is_terminal and not text.startswith("time "):
                console.print(text)

        yield tick
        bar.update(task, completed=total)


# --- Reporting ----------------------------------------------------------------------


def ratios(first: Measured, other: Measured, *, paired: bool) -> dict[str, float]:
    """How long the first takes, in units of the other: the median and the quartiles.

    Args:
      paired: Whether they took turns: then it is of the ratios round by round, else of
        the first's times over the other's median.

    Example:
      >>> about = dict(compile_seconds=0, memory={}, model_flops=0, machine={})
      >>> slow, fast = (Measured(**about, seconds=s) for s in ([3.0, 8.0], [1.0, 4.0]))
      >>> ratios(slow, fast, paired=True)
      {'low': 2.25, 'median': 2.5, 'high': 2.75}
    """
    units = other.seconds if paired else [other.median] * len(first.seconds)
    each = [a / b for a, b in zip(first.seconds, units, strict=True)]
    low, median, high = np.quantile(each, (0.25, 0.5, 0.75)).tolist()
    return {"low": low, "median": median, "high": high}


def speeds(workload: Workload, measured: Measured) -> dict[str, Any]:
    """Tokens per second, model FLOP utilisation and the device's own peak."""
    peak, sentence = peak_flops(measured.machine["device"], workload.dtype)
    share = None if peak is None else measured.model_flops / measured.median / peak
    return {
        "tokens_per_s": round(workload.tokens / measured.median, 1),
        "model_flop_utilisation": share,
        "utilisation_note": sentence,
        "peak_bytes": measured.peak_bytes,
        "peak_over_compiled": measured.peak_over_compiled,
    }


def about(workload: Workload, machine_: dict[str, Any]) -> dict[str, Any]:
    """What every result begins with."""
    configuration = {k: _text(v) for k, v in asdict(workload).items()}
    return {
        "configuration": configuration,
        "machine": machine_,
        "versions": versions(),
        "processes": "one, in turns" if takes_turns(workload) else "one each",
    }


def complete(found: Found) -> dict[str, Measured]:
    """What was measured, of all.

    Raises:
      UserError: naming the first that failed, and what it said.
    """
    for label, measured in found.items():
        if isinstance(measured, str):
            raise UserError(f"{label} failed: {measured}")
    return {k: m for k, m in found.items() if isinstance(m, Measured)}


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, os.PathLike) else value


def run(script: Callable[[Any], None], config: Any) -> None:
    """Calls a script; what its user can mend is one line."""
    try:
        script(config)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    try:
        _work(json.loads(sys.argv[1]))
    except Exception as error:  # a compiler's, a device's: all mean the same here
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise SystemExit(f"{type(error).__name__}: {reason}") from None
