"""Does OASIS match AdamW, and which of its parts matter?

    python benchmarks/quality.py --data ../shared/data/tinyshakespeare.txt

Character LLaMA (`llama-tiny`), 600 steps of 16 x 128 bytes, token-weighted validation
loss. Every method, and every ablation of OASIS (one part changed at a time), at the best
of four learning rates, found with the first seed and repeated with the second. Without
`--data` it runs on the Python standard library's source, which makes other numbers.
"""

import dataclasses
from pathlib import Path

import tyro

from train.commands import compare
from train.errors import UserError
from train.options import Compare
from train.report.comparison import compare_markdown, compare_plot
from train.report.log import write_json

ABLATIONS = ("gradient", "unaligned", "random", "keep", "reset", "frozen")


@dataclasses.dataclass
class Config:
    """Where from, where to, and how many trials at a time."""

    data: str | None = None
    out: Path = Path("runs/quality")
    """Trials; those finished are kept when the script is run again."""
    results: Path = Path("benchmarks/results")
    lrs: str = "1e-3,3e-3,6e-3,1e-2"
    seeds: str = "0,1"
    ablation_lrs: str = "1e-3,3e-3,6e-3,1e-2"
    ablation_seeds: str = "0,1"
    jobs: int = 2
    """More than one makes times incomparable, so this table is about loss only."""


def main(config: Config) -> None:
    comparison = Compare(
        methods="adamw,oasis:0.25,oasis:0.5",
        lrs=config.lrs,
        seeds=config.seeds,
        jobs=config.jobs,
        data=config.data,
        out=config.out,
        eval_every=200,
        checkpoint_every=600,
    )
    ablations = dataclasses.replace(
        comparison,
        methods=",".join(f"oasis-{name}:0.25" for name in ABLATIONS),
        lrs=config.ablation_lrs,
        seeds=config.ablation_seeds,
    )
    rows = compare.run(comparison) + compare.run(ablations)
    config.results.mkdir(parents=True, exist_ok=True)
    write_json(config.results / "quality.json", rows)
    table = compare_markdown(rows)
    (config.results / "quality.md").write_text(table)
    compare_plot(rows, config.results / "quality.png")
    print(table)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
