"""Fine-tuning: a Hugging Face model on a task."""

import json
from typing import Any

from rich.console import Console

from oasis_jax import hf
from oasis_jax.compat import without_accelerators
from train.options import Finetune
from train.report.log import console as standard_error
from train.report.tables import memory_table
from train.run import build
from train.run.evaluation import of_state
from train.run.folder import claim, first_begun
from train.run.loop import fit
from train.run.planning import plan_tuning


def run(config: Finetune, *, console: Console | None = None) -> dict[str, Any]:
    """Trains; writes everything to `config.out`; returns the summary.

    Raises:
      UserError, HfError, CheckpointError: if something is wrong that the user can mend;
        the run's files are as the last finished step left them.
    """
    console = console or standard_error()
    config.recipe()  # a wrong option is found before anything is read
    with claim(config):
        return _train(config, console)


def _train(config: Finetune, console: Console) -> dict[str, Any]:
    folder = hf.resolve(config.model)
    stored = build.stored_shape(config, folder)
    begun = first_begun(config)
    data = build.task_data(
        config, folder, stored, begun=begun, progress=console.is_terminal
    )
    console.print(f"data       {data.description}")
    config, outputs = config.lasting(data.train_rows), build.outputs_of(config, data)
    loaded = hf.load(folder, seed=config.seed, **build.changes_of(config, outputs))
    if loaded.fresh:
        console.print(f"initialised {', '.join(loaded.fresh)}")
    setup = build.tuning(config, loaded.config, params=loaded.params)
    beside = {
        "data_fingerprint": data.fingerprint,
        "labels": list(data.labels),
        "stop_tokens": list(data.ends),
        "begun": begun.isoformat(),
    }
    judge = build.kind_of(config.task).judge(config, setup, data)
    return fit(
        config,
        setup,
        data,
        of_state(judge),
        about=config.as_dict() | beside | {"outputs": outputs},
        title=config.model,
        console=console,
        keep_best=True,
        extra={"task": config.task, "model": config.model},
    )


def main(config: Finetune) -> None:
    if config.target is not None:
        _plan(config, config.target)
        return
    best = run(config)["best"]
    numbers = (f"{k} {v:.4f}" for k, v in best.items() if isinstance(v, float))
    print(
        f"best at step {best['step']}: {', '.join(numbers)}; results in {config.out}/"
    )


def _plan(config: Finetune, target: str) -> None:
    # A GPU that is there would be claimed, and is not needed.
    without_accelerators()
    planned = plan_tuning(config, target)
    if config.json:
        print(json.dumps(planned, indent=2))
        return
    title = f"What a step needs on {target}"
    table = memory_table(planned["parts"], planned["peak_bytes"], title)
    Console(highlight=False, markup=False).print(table)
