"""Peak memory against step time: what each level of recomputation buys, by method.

    python benchmarks/frontier.py

On a CPU a small model, all configurations taking turns; on a GPU `llama-1b` as in
`plans.py`, each in a process of its own. Times are in units of the first
configuration's. One that does not fit the device is listed with what it said, and has no
point in the picture.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import timing
import tyro

from oasis_jax.models.blocks import REMAT
from train.errors import UserError
from train.report.comparison import frontier_plot
from train.report.log import write_json


@dataclass(frozen=True)
class Config(timing.Workload):
    """What is compared; these defaults are a CPU's, a GPU has larger ones."""

    vocab_size: int | None = 2048
    seq: int = 256
    rounds: int = 6
    configurations: tuple[str, ...] = (
        *(f"adamw:{level}" for level in REMAT),
        "lora:elementwise",
        "galore:elementwise",
        *(f"oasis:{level}" for level in REMAT),
        "oasis:elementwise::int8",
    )
    """method:remat[:rank[:residuals]]; times are in units of the first's."""
    out: Path = Path("benchmarks/results/frontier_cpu.json")
    """The picture lies beside it."""


# The workload of plans.py.
GPU = Config(
    preset="llama-1b",
    layers=None,
    vocab_size=None,
    batch=8,
    seq=2048,
    rank="256",
    dtype="bfloat16",
    param_dtype="bfloat16",
    cross_documents=True,
    rounds=10,
    out=Path("benchmarks/results/frontier_gpu.json"),
)


def row(
    config: Config, case: timing.Case, measured: Any, base: timing.Measured
) -> dict[str, Any]:
    """One configuration as plain values."""
    named = {"configuration": case.label, **asdict(case)}
    if isinstance(measured, str):
        return named | {"failed": measured}
    return {
        **named,
        "step_seconds": [round(s, 5) for s in measured.seconds],
        "step_seconds_median": measured.median,
        "ratio": timing.ratios(measured, base, paired=timing.takes_turns(config)),
        "compile_seconds": round(measured.compile_seconds, 2),
        "compiled_peak_bytes": measured.memory["peak"],
        **timing.speeds(config, measured),
        "memory": measured.memory,
    }


def main(config: Config) -> None:
    cases = [timing.Case.parse(text) for text in config.configurations]

    def write(found: timing.Found) -> None:
        base = found[cases[0].label]
        if isinstance(base, str):
            raise UserError(f"{cases[0].label} failed: {base}")
        done = [case for case in cases if case.label in found]
        rows = [row(config, case, found[case.label], base) for case in done]
        config.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(config.out, {**timing.about(config, base.machine), "rows": rows})
        frontier_plot(rows, config.out.with_suffix(".png"))

    timing.measure(config, cases, write)
    print(f"{config.out} and {config.out.with_suffix('.png')}")


if __name__ == "__main__":
    small = jax.default_backend() == "cpu"
    timing.run(main, tyro.cli(Config, default=Config() if small else GPU))
