"""A run's model as a folder that transformers opens."""

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from oasis_jax import hf
from oasis_jax.checkpoints import CheckpointError, Checkpoints
from train.data.tokenizer import byte_tokenizer, coder_of, open_tokenizer
from train.errors import UserError
from train.files import replacing
from train.options import Export, Finetune, Pretrain
from train.options.fields import Role, of_role
from train.report.log import read_metrics, write_json
from train.run import build
from train.run.folder import RunFolder


def run(config: Export) -> Path:
    """Writes `config.out`, and returns it.

    Raises:
      UserError, HfError, CheckpointError: if there is no checkpoint, or something where
        the folder should be; nothing is written then.
    """
    folder = RunFolder(config.checkpoint).to_export()
    with Checkpoints(folder) as checkpoints:
        saved = checkpoints.config()
        setup, source, labels = build.saved(saved)
        step, state = checkpoints.restore(setup.state)
    params = jax.device_get(jax.jit(lambda state: state.merged_params())(state))
    model: Any = setup.objective.model
    hf.save(config.out, model.config, params, source=source, label_names=labels or None)
    if source is None:
        _write_tokenizer(config.out, saved["tokenizer"])
    with replacing(config.out / "README.md") as temporary:
        temporary.write_text(card(saved, folder, step))
    return config.out


def _write_tokenizer(folder: Path, given: str | None) -> None:
    """The tokenizer that a model was pretrained with, and the token that ends a text."""
    tokenizer = open_tokenizer(given)[0] if given else byte_tokenizer()
    end = tokenizer.id_to_token(coder_of(given).separator)
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
    write_json(folder / "tokenizer_config.json", about)


def card(saved: Mapping[str, Any], folder: Path, step: int) -> str:
    """A model card: what was done, and what it measured."""
    records = _records(RunFolder(folder.parent).metrics)
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
    kind = Finetune if "task" in saved else Pretrain
    for name in of_role(kind, Role.STEP, Role.METHOD, Role.RUN):
        if saved.get(name) is not None:
            lines.append(f"| {name} | {saved[name]} |")
    measured = {k: v for k, v in measured.items() if isinstance(v, int | float)}
    if measured:
        lines += ["", "Measured on the held-out split:", ""]
        lines += [f"- {name}: {_shown(v)}" for name, v in measured.items()]
    return "\n".join(lines) + "\n"


def _shown(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:.4f}"


def _records(file: Path) -> list[dict[str, Any]]:
    return read_metrics(file) if file.exists() else []


def main(config: Export) -> None:
    try:
        print(f"wrote {run(config)}/")
    except CheckpointError as error:
        raise UserError(f"--checkpoint {config.checkpoint}: {error}") from None
