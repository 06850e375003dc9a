"""A run's model as a folder that transformers opens."""

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from oasis_jax import hf
from oasis_jax.checkpoints import CheckpointError, Checkpoints
from train.data.chat import read_chat
from train.data.coder import coder_of
from train.data.tokenizer import byte_tokenizer, open_tokenizer
from train.errors import UserError
from train.options import Export, Finetune, Pretrain
from train.options.fields import Role, of_role
from train.report.log import read_metrics
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
    own = {} if source else _tokenizer(saved["tokenizer"])
    return hf.save(
        config.out,
        model.config,
        params,
        source=source,
        label_names=labels or None,
        problem_type=_problem(saved),
        stop_tokens=_stop_tokens(saved, source),
        beside=own | {"README.md": card(saved, folder, step)},
    )


def _problem(saved: Mapping[str, Any]) -> str | None:
    """What transformers calls the task of a classifier."""
    if not saved.get("outputs"):
        return None
    return "single_label_classification" if saved["labels"] else "regression"


def _stop_tokens(saved: Mapping[str, Any], source: str | None) -> list[int] | None:
    """Those that end a text of the run's decoder."""
    if source is None:
        return [coder_of(saved["tokenizer"]).separator]
    if saved.get("outputs"):
        return None
    if saved.get("stop_tokens"):
        return saved["stop_tokens"]
    # Of a run that did not say it yet.
    folder = hf.resolve(source)
    tokenizer, _ = open_tokenizer(folder / "tokenizer.json")
    return [read_chat(folder).end(tokenizer)]


def _tokenizer(given: str | None) -> dict[str, str]:
    """The tokenizer that a model was pretrained with, and the token that ends a text."""
    tokenizer = open_tokenizer(given)[0] if given else byte_tokenizer()
    end = tokenizer.id_to_token(coder_of(given).separator)
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(about, indent=2) + "\n",
    }


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
