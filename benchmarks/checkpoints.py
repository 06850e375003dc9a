"""What a checkpoint's digests cost: saving with and without them.

    python benchmarks/checkpoints.py --out benchmarks/results/checkpoints.json

Both ways take turns in one process. A save is timed until the checkpoint is whole; what
sealing and checking take is timed by itself too, for a disk's own ups and downs are larger.
"""

import json
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import timing
import tyro

from oasis_jax import digests
from oasis_jax.checkpoints import Checkpoints
from train.errors import UserError
from train.report.log import write_json
from train.run.machine import machine


@dataclass(frozen=True)
class Config:
    """What is saved, and where."""

    megabytes: tuple[int, ...] = (50, 500)
    """Of float32 noise in 24 leaves, which is as hard to compress as weights are."""
    rounds: int = 10
    """How often each way is timed, after one time that is not counted."""
    folder: Path | None = None
    """On the disk that is of interest; a temporary folder if None."""
    out: Path | None = None

    def __post_init__(self):
        if min(self.megabytes, default=0) < 1 or self.rounds < 1:
            raise UserError("--megabytes and --rounds are 1 or more")


def saved(folder: Path, state: Any, *, sealed: bool) -> dict[str, float]:
    """Seconds of one save until it is whole, of its sealing, and of a check of it."""
    seal, complete = digests.seal, digests.complete
    sealing = 0.0

    def timed(*args: Any, **options: Any) -> None:
        nonlocal sealing
        started = time.perf_counter()
        seal(*args, **options)
        sealing = time.perf_counter() - started

    shutil.rmtree(folder, ignore_errors=True)
    digests.seal = timed if sealed else lambda *_, **__: None
    if not sealed:
        digests.complete = lambda *_: None
    try:
        checkpoints = Checkpoints(folder)
        started = time.perf_counter()
        checkpoints.save(1, state, config={})
        blocked = time.perf_counter() - started
        checkpoints.close()
        save = time.perf_counter() - started
    finally:
        digests.seal, digests.complete = seal, complete
    started = time.perf_counter()
    digests.check(folder / "1")
    check = time.perf_counter() - started
    return {"save": save, "blocked": blocked, "seal": sealing, "check": check}


def compared(folder: Path, megabytes: int, rounds: int, tick: Any) -> dict[str, Any]:
    """Both ways, in turns: medians, and the medians of the ratios round by round."""
    state = {
        f"layer{n}": jax.random.normal(
            jax.random.key(n), (megabytes * 10_000 // 24, 25)
        )
        for n in range(24)
    }
    jax.block_until_ready(state)
    bare, sealed = [], []
    for turn in range(1 + rounds):
        tick(f"time {megabytes} MB")
        # Who comes second finds another disk than who comes first.
        for way in (False, True) if turn % 2 else (True, False):
            times = saved(folder, state, sealed=way)
            if turn:
                (sealed if way else bare).append(times)
    pairs = list(zip(sealed, bare, strict=True))
    return {
        "bytes": sum(leaf.nbytes for leaf in state.values()),
        "save_seconds": statistics.median(a["save"] for a in sealed),
        "save_seconds_without": statistics.median(b["save"] for b in bare),
        "blocked_seconds": statistics.median(a["blocked"] for a in sealed),
        "seal_seconds": statistics.median(a["seal"] for a in sealed),
        "check_seconds": statistics.median(a["check"] for a in sealed),
        "ratio": statistics.median(a["save"] / b["save"] for a, b in pairs),
        "share_of_sealing": statistics.median(
            a["seal"] / (a["save"] - a["seal"]) for a in sealed
        ),
        "all": {"with": sealed, "without": bare},
    }


def main(config: Config) -> None:
    turns = len(config.megabytes) * (1 + config.rounds)
    with (
        tempfile.TemporaryDirectory(dir=config.folder) as folder,
        timing.progress(turns) as tick,
    ):
        rows = [
            compared(Path(folder) / "run", size, config.rounds, tick)
            for size in config.megabytes
        ]
    result = {"machine": machine(), "rounds": config.rounds, "rows": rows}
    shown = [{k: v for k, v in row.items() if k != "all"} for row in rows]
    print(json.dumps(shown, indent=2))
    if config.out:
        write_json(config.out, result)


if __name__ == "__main__":
    timing.run(main, tyro.cli(Config))
