"""What the train step of llama-1b needs on a device that is not here.

    python benchmarks/plans.py --target h200
    python benchmarks/plans.py --target v5p

needs the extras `train` and `plan-gpu` or `plan-tpu`. Each row is what
`python -m train plan ... --json` prints; nothing runs.
"""

import dataclasses
from pathlib import Path

import tyro
from rich.progress import track

from train.options import Plan
from train.report.log import write_json
from train.run.machine import machine, versions
from train.run.planning import compile_plan

ROWS = (
    ("adamw", "none", "whole"),
    ("adamw", "elementwise", "whole"),
    ("adamw", "mlp", "whole"),
    ("adamw", "block", "whole"),
    ("oasis", "none", "whole"),
    ("oasis", "elementwise", "whole"),
    ("oasis", "elementwise", "int8"),
    ("oasis", "mlp", "whole"),
    ("oasis", "mlp", "int8"),
    ("oasis", "block", "whole"),
)
"""Method, level of recomputation, width of residuals."""


@dataclasses.dataclass
class Config:
    """What is compiled."""

    target: str = "h200"
    preset: str = "llama-1b"
    batch: int = 8
    seq: int = 2048
    rank: str = "256"
    rows: tuple[int, ...] = tuple(range(len(ROWS)))
    """Which of `ROWS`."""
    out: Path | None = None
    """benchmarks/results/plan_TARGET.json if not given."""


def main(config: Config) -> None:
    out = config.out or Path(f"benchmarks/results/plan_{config.target}.json")
    records = []
    for index in track(config.rows, "compiling"):
        method, remat, residuals = ROWS[index]
        plan = Plan(
            method=method,
            remat=remat,
            residuals=residuals,
            rank=config.rank if method == "oasis" else None,
            preset=config.preset,
            batch=config.batch,
            seq=config.seq,
            target=config.target,
        )
        records.append(compile_plan(plan).record())
        # After each, for a compiler of TPU programs takes minutes.
        about = {"machine": machine(), "versions": versions(), "plans": records}
        write_json(out, about)


if __name__ == "__main__":
    main(tyro.cli(Config))
