"""What tuning a Llama-3.2-1B on instructions needs on a device that is not here.

    python benchmarks/finetune_plans.py

needs the extras `train` and `plan-gpu`. Each row is what `python -m train finetune --task
sft ... --target h200 --json` prints for a folder with that model's config.json.
"""

import dataclasses
import json
import tempfile
from pathlib import Path

import tyro
from rich.progress import track

from oasis_jax import hf
from oasis_jax.models.llama import preset
from train.options import Finetune
from train.report.log import write_json
from train.run.machine import machine
from train.run.planning import plan_tuning

ROWS = (
    ("adamw", None, "adamw"),
    ("lora", "256", "frozen"),
    ("oasis", "256", "adamw"),
    ("oasis", "256", "adafactor"),
    ("oasis", "256", "frozen"),
)
"""Method, rank, optimizer of the embeddings."""


@dataclasses.dataclass
class Config:
    """What is compiled."""

    target: str = "h200"
    preset: str = "llama-3.2-1b"
    batch: int = 8
    seq: int = 2048
    out: Path = Path("benchmarks/results/finetune_plan_h200.json")


def main(config: Config) -> None:
    records = []
    with tempfile.TemporaryDirectory() as folder:
        family = hf.FAMILIES["llama"]
        fields = family.fields(preset(config.preset), None)
        fields |= dict(model_type="llama", architectures=[family.base])
        Path(folder, "config.json").write_text(json.dumps(fields))
        for method, rank, embeddings in track(ROWS, "compiling"):
            options = Finetune(
                model=folder,
                task="sft",
                data="any.jsonl",
                method=method,
                rank=rank,
                embeddings=embeddings,
                batch=config.batch,
                seq=config.seq,
                dtype="bfloat16",
                param_dtype="bfloat16",
                target=config.target,
            )
            found = plan_tuning(options, config.target)
            found["configuration"] |= dict(model=config.preset, data="any.jsonl")
            records.append(found)
    about = {"machine": machine(), "versions": records[0]["versions"]}
    write_json(config.out, about | {"plans": records})


if __name__ == "__main__":
    main(tyro.cli(Config))
