"""Kills a small pretraining run at random moments and resumes it, until it is done.

    python benchmarks/survival.py --out benchmarks/results/survival.json

A run is killed, as one of `KINDS` says, and resumed, again and again, until it has all of
its steps; then the next run begins, until there were as many kills as asked for. Every
run's last checkpoint must equal that of a run that nobody touched, leaf for leaf and bit
for bit, the position in the data included, and so must every loss in its log. Every end
must have an exit code that its kind allows, and no traceback.
"""

import collections
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import timing
import tyro

from oasis_jax.checkpoints import Checkpoints
from train.errors import DONE, INTERRUPTED, Preempted, UserError
from train.report.log import read_metrics, write_json
from train.run import build
from train.run.folder import RunFolder
from train.run.machine import machine

ROOT = Path(__file__).parent.parent
PATIENCE = 120
"""Seconds that a run may take to end."""
ROOM = 64 << 20
"""Bytes of the disk that is filled."""


@dataclass(frozen=True)
class Config:
    """How often and how."""

    kills: int = 100
    seed: int = 0
    """Of the kinds and the moments."""
    steps: int = 40
    """Of each run."""
    out: Path | None = None

    def __post_init__(self):
        if self.kills < 1 or self.steps < 6:
            raise UserError("--kills is 1 or more, and --steps 6 or more")


@dataclass
class Found:
    """What came of one kind of kill."""

    kills: int = 0
    codes: collections.Counter[str] = field(default_factory=collections.Counter)
    again: list[int] = field(default_factory=list)
    """Steps that had been logged and had to be done a second time, kill by kill."""


class Runs:
    """Runs of one command, in a folder that may be a disk of its own."""

    def __init__(self, config: Config, folder: Path, disk: Path):
        self._steps, self._disk = config.steps, disk
        text = folder / "text.txt"
        lines = (f"{n} {n * n % 1009} bottles on the wall\n" for n in range(4000))
        text.write_text("".join(lines))
        self._command = [
            *(sys.executable, "-m", "train", "pretrain"),
            *("--data", str(text), "--cache", str(folder / "cache")),
            *("--steps", str(config.steps), "--checkpoint-every", "3"),
            *"--batch 2 --seq 32 --log-every 1 --eval-every 7 --eval-batches 1".split(),
        ]
        self._environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        self._said = folder / "said"

    def start(self, run: RunFolder) -> subprocess.Popen:
        """Begins it, or goes on with it if it has begun."""
        resume = ["--resume"] if run.checkpoints.is_dir() else []
        with self._said.open("w") as said:
            return subprocess.Popen(
                [*self._command, "--out", str(run.path), *resume],
                env=self._environment,
                cwd=ROOT,
                stdout=said,
                stderr=said,
            )

    def end(self, process: subprocess.Popen) -> tuple[int | None, str]:
        """The exit code, None if it had to be ended, and all that was said."""
        try:
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = None
        return code, self._said.read_text(errors="replace")

    def fill(self) -> None:
        """Leaves no room on the disk."""
        try:
            with (self._disk / "filler").open("wb", buffering=0) as file:
                while file.write(bytes(1 << 20)):
                    pass
        except OSError:
            pass

    def empty(self) -> None:
        (self._disk / "filler").unlink(missing_ok=True)


# --- Kinds of kills -----------------------------------------------------------------

Kill = Callable[[Runs, subprocess.Popen, random.Random], None]


def kill(runs: Runs, process: subprocess.Popen, draw: random.Random) -> None:
    process.kill()


def term(runs: Runs, process: subprocess.Popen, draw: random.Random) -> None:
    process.send_signal(signal.SIGTERM)


def term_twice(runs: Runs, process: subprocess.Popen, draw: random.Random) -> None:
    process.send_signal(signal.SIGTERM)
    time.sleep(draw.uniform(0, 0.3))
    process.send_signal(signal.SIGTERM)


def full(runs: Runs, process: subprocess.Popen, draw: random.Random) -> None:
    runs.fill()


KINDS: dict[str, tuple[Kill, set[int]]] = {
    "kill -9": (kill, {-signal.SIGKILL}),
    # 130 where it came before there was anything to save.
    "TERM": (term, {Preempted.exit_code, INTERRUPTED, -signal.SIGTERM}),
    "TERM twice": (term_twice, {Preempted.exit_code, INTERRUPTED, -signal.SIGTERM}),
    "kill -9, a bit flipped": (kill, {-signal.SIGKILL}),
    "disk full": (full, {UserError.exit_code}),
}
"""What is done, and which exit codes are right beside that of a run that was done by then.
Before a run listens to signals, the system's own answer is right too."""


def flip(run: RunFolder, draw: random.Random) -> bool:
    """One bit of the newest checkpoint, if there is one to fall back on."""
    steps = sorted(int(p.name) for p in run.checkpoints.glob("*") if p.name.isdigit())
    if len(steps) < 2:
        return False
    newest = run.checkpoints / str(steps[-1])
    files = [file for file in newest.rglob("*") if file.is_file()]
    # As a disk would: the more bytes a file has, the likelier it is hit.
    (file,) = draw.choices(files, [f.stat().st_size for f in files])
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)
    return True


# --- What a run left ----------------------------------------------------------------


def losses(run: RunFolder) -> list[tuple[int, str, float]]:
    """(step, "loss" or "val_loss", value) of every record."""
    return [
        (record["step"], name, record[name])
        for record in (read_metrics(run.metrics) if run.metrics.exists() else [])
        for name in ("loss", "val_loss")
        if name in record
    ]


def final(run: RunFolder) -> dict[str, bytes]:
    """All leaves of the last checkpoint, and the position in the data."""
    with Checkpoints(run.checkpoints) as checkpoints:
        setup, *_ = build.saved(checkpoints.config())
        step, state = checkpoints.restore(setup.state)
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    found = {jax.tree_util.keystr(p): np.asarray(leaf).tobytes() for p, leaf in leaves}
    for file in sorted((run.checkpoints / str(step) / "data").glob("process_*")):
        found[file.name] = file.read_bytes()
    return found | {"step": str(step).encode()}


def differs(run: RunFolder, reference: tuple[Any, Any]) -> list[str]:
    """What is not as it is in the run that nobody touched."""
    state, logged = reference
    own = final(run)
    wrong = [f"{name} differs" for name in state if own.get(name) != state[name]]
    if losses(run) != logged:
        wrong.append("metrics.jsonl differs")
    return wrong


# --- The whole ----------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Whether the folder is a disk of its own now, which takes a right to mount."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(folder)]
    mounted = bool(shutil.which("mount")) and not (
        subprocess.run(command, capture_output=True, check=False).returncode
    )
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def moment(run: RunFolder, process: subprocess.Popen, draw: random.Random) -> None:
    """Waits: for a while from the start on, or for some lines of the log and a bit."""
    begun = time.monotonic()
    early, wanted = draw.random() < 0.2, lines(run.metrics) + draw.randrange(1, 12)
    patience = draw.uniform(0, 8) if early else PATIENCE
    while process.poll() is None and time.monotonic() - begun < patience:
        if not early and lines(run.metrics) >= wanted:
            time.sleep(draw.uniform(0, 0.1))
            return
        time.sleep(0.001)


class Survey:
    """Kills runs, one after another, and keeps what came of it."""

    def __init__(self, config: Config, runs: Runs, disk: Path, kinds: list[str]):
        self._config, self._runs, self._disk = config, runs, disk
        self._draw = random.Random(config.seed)
        self.found = {kind: Found() for kind in kinds}
        self.wrong: list[str] = []
        self.kills = self.finished = self._begun = 0
        untouched = RunFolder(disk / "untouched")
        code, said = runs.end(runs.start(untouched))
        if code != DONE:
            raise UserError(f"a run that nobody touches fails: {said.strip()[-500:]}")
        self._reference = final(untouched), losses(untouched)
        shutil.rmtree(untouched.path)

    def run(self, tick: Callable[[str], None]) -> None:
        """Begins a run, and kills and resumes it until it is done."""
        run = RunFolder(self._disk / f"run{self._begun}")
        self._begun += 1
        before = None  # the kind of the last kill
        while True:
            logged = max((step for step, *_ in losses(run)), default=0)
            process = self._runs.start(run)
            kind = None
            if self.kills < self._config.kills:
                kind = self._draw.choice(list(self.found))
                moment(run, process, self._draw)
                if process.poll() is None:
                    KINDS[kind][0](self._runs, process, self._draw)
            code, said = self._runs.end(process)
            self._runs.empty()
            place = (
                f"run {self._begun}, {kind or 'left alone'} after {self.kills} kills"
            )
            if "Traceback" in said:
                self.wrong.append(f"{place}: a traceback: {said[-2000:]}")
            resumed = re.search(r"resumed .* after step (\d+)", said)
            if before and resumed:
                self.found[before].again.append(max(0, logged - int(resumed[1])))
            if code == DONE:
                self.finished += 1
                self.wrong += [
                    f"{place}: {name}" for name in differs(run, self._reference)
                ]
                break
            if kind is None or code not in KINDS[kind][1]:
                last = (said.strip().splitlines() or ["nothing was said"])[-1]
                self.wrong.append(f"{place}: exit code {code}, {last}")
                break
            if kind.endswith("flipped") and not flip(run, self._draw):
                kind = "kill -9"  # there was nothing yet to fall back on
            self.found[kind].kills += 1
            self.found[kind].codes[str(code)] += 1
            self.kills, before = self.kills + 1, kind
            tick(f"kill {self.kills}: {kind} after step {logged}, code {code}")
        shutil.rmtree(run.path, ignore_errors=True)


def survive(config: Config, folder: Path) -> dict[str, Any]:
    disk = folder / "disk"
    with small_disk(disk) as mounted, timing.progress(config.kills) as tick:
        kinds = [kind for kind in KINDS if mounted or kind != "disk full"]
        survey = Survey(config, Runs(config, folder, disk), disk, kinds)
        begun = time.monotonic()
        while survey.kills < config.kills and len(survey.wrong) < 10:
            survey.run(tick)
    rows = [
        {
            "kind": kind,
            "kills": found.kills,
            "codes": dict(sorted(found.codes.items())),
            "again": found.again,
        }
        for kind, found in survey.found.items()
    ]
    return {
        "machine": machine(),
        "kills": survey.kills,
        "seed": config.seed,
        "steps": config.steps,
        "runs": survey.finished,
        "minutes": (time.monotonic() - begun) / 60,
        "rows": rows,
        "wrong": survey.wrong,
    }


def main(config: Config) -> None:
    with tempfile.TemporaryDirectory() as folder:
        result = survive(config, Path(folder))
    print(json.dumps(result, indent=2))
    if config.out:
        write_json(config.out, result)
    if result["wrong"]:
        raise SystemExit(f"{len(result['wrong'])} things went wrong")


if __name__ == "__main__":
    timing.run(main, tyro.cli(Config))
