"""How a run judges its state: on the held-out split, by its objective."""

import json
from collections.abc import Callable
from typing import Any

import jax

from oasis_jax.state import OasisTrainState
from train.data.batches import TextData
from train.data.instructions import Instructions
from train.data.labelled import Labelled
from train.files import replacing
from train.objectives.answers import answered
from train.objectives.labels import scores
from train.objectives.metrics import metrics
from train.objectives.text import held_out_loss
from train.options import Finetune, Pretrain
from train.run.folder import RunFolder
from train.run.setup import Setup

Judge = Callable[[Any], dict[str, Any]]
"""Judges the parameters of the plain model."""


def of_state(judge: Judge) -> Callable[[OasisTrainState], dict[str, Any]]:
    """Judges a state, with its adapters merged."""
    merged = jax.jit(lambda state: state.merged_params())
    return lambda state: judge(merged(state))


def judge_text(config: Pretrain, setup: Setup, data: TextData) -> Judge:
    """By the loss per token."""
    model: Any = setup.objective.model

    def judge(params: Any) -> dict[str, Any]:
        batches = data.validation(config.batch)
        return held_out_loss(model, params, batches, config.cross_documents)

    return judge


def judge_labels(config: Finetune, setup: Setup, data: Labelled) -> Judge:
    """By the task's metrics, and the loss."""
    model: Any = setup.objective.model
    return lambda params: scores(
        model, params, data.validation(config.batch), data.metrics, data.order
    )


def judge_answers(config: Finetune, setup: Setup, data: Instructions) -> Judge:
    """By the loss per token and, of some prompts, by what is answered."""
    model: Any = setup.objective.model

    def judge(params: Any) -> dict[str, Any]:
        result = held_out_loss(model, params, data.validation(config.batch))
        lines = answered(
            model,
            params,
            data.prompts(config.generate),
            data.decode,
            batch=config.batch,
            new_tokens=config.new_tokens,
            ends=data.ends,
        )
        if not lines:
            return result
        with replacing(RunFolder(config.out).answers) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
        said, right = ([line[k] for line in lines] for k in ("answer", "reference"))
        return result | metrics(data.metrics, said, right) | {"asked": len(lines)}

    return judge
