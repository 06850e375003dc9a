"""Step time of OASIS against AdamW.

    python benchmarks/step.py --out benchmarks/results/step_cpu.json
    python benchmarks/step.py --configurations oasis:mlp:256 adamw:block --preset llama-1b

A configuration is `method:remat[:rank[:residuals]]`. On a CPU they take turns in one
process and the figure is the median of the ratios pair by pair; on a GPU each has its
own process (see `timing.py`).
"""

import json
from dataclasses import dataclass
from pathlib import Path

import timing
import tyro

from train.report.log import write_json


@dataclass(frozen=True)
class Config(timing.Workload):
    """What is timed; the defaults are one layer shape of the C4 benchmark's 60M model."""

    configurations: tuple[str, ...] = ("oasis:elementwise", "adamw:elementwise")
    """The first is divided by the others."""
    out: Path | None = None


def main(config: Config) -> None:
    cases = [timing.Case.parse(text) for text in config.configurations]
    found = timing.complete(timing.measure(config, cases))
    first, *others = found
    paired = timing.takes_turns(config)
    speeds = {name: timing.speeds(config, m) for name, m in found.items()}
    result = {
        **timing.about(config, found[first].machine),
        "step_ms": {
            name: [round(1e3 * s, 2) for s in m.seconds] for name, m in found.items()
        },
        "step_ms_median": {name: 1e3 * m.median for name, m in found.items()},
        "ratio_median": {
            f"{first}/{other}": timing.ratios(
                found[first], found[other], paired=paired
            )["median"]
            for other in others
        },
        **{
            key: {name: speed[key] for name, speed in speeds.items()}
            for key in next(iter(speeds.values()))
        },
        "memory": {name: m.memory for name, m in found.items()},
    }
    print(json.dumps({k: v for k, v in result.items() if k != "step_ms"}, indent=2))
    if config.out:
        write_json(config.out, result)


if __name__ == "__main__":
    timing.run(main, tyro.cli(Config))
