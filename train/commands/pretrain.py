"""Pretraining: a LLaMA on text."""

from typing import Any

from rich.console import Console

from train.data.corpus import load
from train.options import Pretrain
from train.report.log import console as standard_error
from train.run import build
from train.run.evaluation import judge_text, of_state
from train.run.folder import claim
from train.run.loop import fit


def run(config: Pretrain, *, console: Console | None = None) -> dict[str, Any]:
    """Trains; writes everything to `config.out`; returns the summary.

    Raises:
      UserError, CheckpointError: if something is wrong that the user can mend; the run's
        files are as the last finished step left them.
    """
    console = console or standard_error()
    config.recipe()  # a wrong option is found before the data is read
    with claim(config):
        return _train(config, console)


def _train(config: Pretrain, console: Console) -> dict[str, Any]:
    data = load(
        config.data,
        str(config.tokenizer) if config.tokenizer else None,
        seq=config.seq,
        cache=config.cache,
        data_dir=config.data_dir,
        held_batches=config.eval_batches,
        progress=console.is_terminal,
    )
    console.print(f"data       {data.description}")
    setup = build.pretraining(config, data.vocab_size)
    beside = {"data_fingerprint": data.fingerprint, "vocab_size": data.vocab_size}
    return fit(
        config,
        setup,
        data,
        of_state(judge_text(config, setup, data)),
        about=config.as_dict() | beside,
        title=config.preset,
        console=console,
    )


def main(config: Pretrain) -> None:
    summary = run(config)
    skipped = f", {summary['skipped']} updates skipped" if summary["skipped"] else ""
    print(
        f"validation loss {summary['val_loss']:.4f} over {summary['val_tokens']:,} tokens"
        f"{skipped}; results in {config.out}/"
    )
