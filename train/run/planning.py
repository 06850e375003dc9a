"""What a train step needs on a device, before there is one.

The step is the one that `pretrain` or `finetune` runs. It is compiled for the device from
shapes alone; nothing is allocated and nothing is run.
"""

import shlex
from dataclasses import dataclass
from typing import Any

from oasis_jax import hf
from oasis_jax.methods import row
from oasis_jax.planning import memory, targets
from oasis_jax.planning.flops import train_work
from train.data.tasks import TASKS
from train.options import Finetune, Plan, Pretrain
from train.options.fields import Role, of_role
from train.options.flags import as_words
from train.run import build
from train.run.machine import versions
from train.run.setup import Setup, train_step

PARTS = ("weights", "optimizer_state", "bases", "gradients", "saved_activations")


@dataclass(frozen=True)
class Planned:
    """A configuration, compiled.

    Attributes:
      config: Its options.
      peak_bytes: As the compiler reports it.
      parts: Bytes by name; `workspace` is what the others leave of the peak.
      seconds: Of a step, estimated.
      fits_device: Whether the device has so much.
    """

    config: Plan
    peak_bytes: int
    parts: dict[str, int]
    seconds: float
    fits_device: bool

    @property
    def tokens_per_second(self) -> float:
        return self.config.batch * self.config.seq / self.seconds

    def record(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "peak_bytes": self.peak_bytes,
            "parts": self.parts,
            "configuration": configuration(self.config),
            "fits_device": self.fits_device,
            "estimated_step_seconds": self.seconds,
            "estimated_tokens_per_second": self.tokens_per_second,
        }


def configuration(config: Plan) -> dict[str, Any]:
    """The options that shape the step; the rank is the method's own if not given."""
    names = of_role(config, Role.STEP)
    values = {name: getattr(config, name) for name in names}
    if values["rank"] is None:
        values["rank"] = row(config.method).rank
    for name in of_role(config, Role.METHOD):
        if getattr(config, name) is not None:
            values[name] = getattr(config, name)
    return values


def as_flags(config: Plan) -> str:
    """What to type to get this plan again."""
    always = ("preset", "method", "remat", "batch", "seq", "target")
    usual, values = Plan(), {}
    for name in of_role(config, Role.STEP, Role.METHOD):
        value, default = getattr(config, name), getattr(usual, name)
        if isinstance(value, bool):
            # For `pretrain`, too, to which this is a line to start from.
            default = getattr(Pretrain, name)
        if name in always or value != default:
            values[name] = value
    words = (word.split("=", 1) for word in as_words(Plan, values))
    return shlex.join(part for word in words for part in word)


def step_seconds(config: Plan, setup: Setup) -> float:
    """An estimate, by `oasis_jax.planning.flops`."""
    model: Any = setup.objective.model
    work = train_work(
        model.config,
        config.training().recipe().rules,
        batch=config.batch,
        seq=config.seq,
        accumulate=config.accumulate,
    )
    return work.seconds(targets.find(config.target))


def compile_plan(config: Plan) -> Planned:
    """Compiles the train step of these options for their target.

    Raises:
      UserError: if options make no sense.
      TargetError: if the target is unknown or its compiler not installed.
      PlanError: if the step does not compile; the first line names the configuration.
    """
    # What is wrong with the target is found before anything is traced.
    target = targets.find(config.target)
    targets.device(target)
    setup = build.pretraining(config.training(), abstract=True)
    needs, parts = compile_step(
        setup, config.target, config.accumulate, as_flags(config)
    )
    fits = not needs.refused and needs.peak_bytes <= target.memory
    seconds = step_seconds(config, setup)
    return Planned(config, needs.peak_bytes, parts, seconds, fits)


def plan_tuning(config: Finetune, target: str) -> dict[str, Any]:
    """What a step of fine-tuning needs: `peak_bytes`, its `parts`, the `configuration`.

    Needs the folder's `config.json` only, and no data.

    Raises:
      UserError, HfError, TargetError, PlanError: as `compile_plan` and `hf.load_config`.
    """
    stored = build.stored_shape(config, hf.resolve(config.model))
    shape = build.shaped(config, stored, TASKS[config.task].outputs)
    setup = build.tuning(config.lasting(config.batch), shape, abstract=True)
    name = f"{config.task} of {config.model} with {config.method}"
    needs, parts = compile_step(setup, target, config.accumulate, name)
    return {
        "peak_bytes": needs.peak_bytes,
        "parts": parts,
        "configuration": config.as_dict(),
        "versions": versions(),
    }


def compile_step(
    setup: Setup, target: str, accumulate: int, name: str
) -> tuple[memory.Plan, dict[str, int]]:
    """What a train step needs on a target, and its parts.

    Args:
      setup: Of which shapes are enough.
      accumulate: Microbatches.
      name: What errors call it.

    Raises:
      TargetError, PlanError: as `memory.plan` does.
    """
    objective = setup.objective
    needs = memory.plan(
        train_step(setup, accumulate),
        setup.state,
        objective.batch,
        target=target,
        name=name,
    )
    how: Any = dict(accumulate=accumulate, weighted=True)
    counted = memory.step_parts(setup.state, objective.loss_fn, objective.batch, **how)
    parts = {name: counted[name] for name in PARTS}
    parts["workspace"] = max(0, needs.peak_bytes - sum(parts.values()))
    return needs, parts
