"""A run's model as a folder that transformers opens."""

import importlib.metadata
from pathlib import Path
from typing import Any

import jax

from oasis_jax import hf
from oasis_jax.checkpoints import CheckpointError, Checkpoints
from train import finetune, pretrain, report
from train.config import Export, Finetune, Pretrain, UserError
from train.loop import Setup
from train.text import byte_tokenizer, coder_of, open_tokenizer


def run(config: Export) -> Path:
    """Writes `config.out`, and returns it.

    Raises:
      UserError, HfError, CheckpointError: if there is no checkpoint, or something where
        the folder should be; nothing is written then.
    """
    folder = _checkpoints(config.checkpoint)
    with Checkpoints(folder) as checkpoints:
        saved = checkpoints.config()
        setup, source, labels = rebuilt(saved)
        step, state = checkpoints.restore(setup.state)
    params = jax.device_get(jax.jit(lambda state: state.merged_params())(state))
    shape = setup.model.config
    hf.save(config.out, shape, params, source=source, label_names=labels or None)
    if source is None:
        _write_tokenizer(config.out, saved["tokenizer"])
    (config.out / "README.md").write_text(card(saved, folder, step))
    return config.out


def _write_tokenizer(folder: Path, given: str | None) -> None:
    """The tokenizer that a model was pretrained with, and the token that ends a text."""
    tokenizer = open_tokenizer(given)[0] if given else byte_tokenizer()
    end = tokenizer.id_to_token(coder_of(given).separator)
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
    report.write_json(folder / "tokenizer_config.json", about)


def _checkpoints(folder: Path) -> Path:
    """Where the checkpoints lie: in a run's `best`, else in its `checkpoints`, or here."""
    for name in (finetune.BEST, "checkpoints"):
        if (folder / name).is_dir():
            return folder / name
    if not folder.is_dir():
        raise UserError(f"--checkpoint {folder}: there is no such folder")
    # Orbax would create what it does not find.
    if not any(path.name.isdigit() for path in folder.iterdir()):
        raise UserError(f"--checkpoint {folder}: there is no checkpoint in it")
    return folder


def rebuilt(saved: dict[str, Any]) -> tuple[Setup, str | None, list[str]]:
    """The run's set-up in shapes, the model it began with, and its labels."""
    if "task" not in saved:
        size = saved["vocab_size"]
        return pretrain.set_up(Pretrain.of(saved), size, abstract=True), None, []
    tuned = Finetune.of(saved)
    folder = hf.resolve(tuned.model)
    shape = finetune.changed(tuned, finetune.shape_of(tuned, folder), saved["outputs"])
    setup = finetune.set_up(tuned, shape, abstract=True)
    return setup, tuned.model, saved["labels"]


def card(saved: dict[str, Any], folder: Path, step: int) -> str:
    """A model card: what was done, and what it measured."""
    records = _records(folder.parent / "metrics.jsonl")
    measured = next((r for r in records if r["step"] == step and "val_loss" in r), {})
    begun = saved.get("model") or f"{saved.get('preset')}, from random weights"
    lines = [
        "# Model card",
        "",
        f"{begun}, trained by `oasis_jax` {importlib.metadata.version('oasis_jax')}"
        f" with the method `{saved['method']}`:"
        f" {step:,} steps of {saved['batch']} x {saved['seq']} tokens"
        f" of {saved.get('task', 'text')} in `{saved['data'] or 'the standard library'}`.",
        "",
        "| option | value |",
        "|:---|:---|",
    ]
    shown = "rank lr warmup b1 b2 weight_decay clip embeddings dtype param_dtype seed"
    lines += [f"| {name} | {saved.get(name)} |" for name in shown.split()]
    if measured:
        lines += ["", "Measured on the held-out split:", ""]
        lines += [f"- {name}: {_shown(v)}" for name, v in measured.items()]
    return "\n".join(lines) + "\n"


def _shown(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:.4f}"


def _records(file: Path) -> list[dict[str, Any]]:
    return report.read_metrics(file) if file.exists() else []


def main(config: Export) -> int:
    try:
        print(f"wrote {run(config)}/")
    except CheckpointError as error:
        raise UserError(f"--checkpoint {config.checkpoint}: {error}") from None
    return 0
