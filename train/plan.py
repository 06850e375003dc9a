"""What a train step needs on a device, before there is one.

The step is the one that `pretrain` runs. It is compiled for the device from shapes alone;
nothing is allocated and nothing is run. With a budget, configurations are searched: the
clock is estimated (`oasis_jax.planning.flops`), memory is what the compiler reports.
"""

import importlib.metadata
import json
import platform
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from oasis_jax.compat import without_accelerators
from oasis_jax.methods import row
from oasis_jax.models import llama
from oasis_jax.models.blocks import REMAT
from oasis_jax.planning import memory, targets
from oasis_jax.planning.flops import train_work
from train import report
from train.config import METHOD_OPTIONS, Plan, Pretrain, Training, UserError
from train.loop import Setup, train_step
from train.pretrain import set_up

GIB = targets.GIB
PARTS = ("weights", "optimizer_state", "bases", "gradients", "saved_activations")
RANKS = ("128", "256", "512", "0.125", "0.25")
"""What a search tries, where a model is wide enough."""


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


# Options that do not shape the step: what is left, an option added later included, does.
_ASIDE = frozenset(
    "data tokenizer steps lr warmup b1 b2 weight_decay clip seed out resume eval_every"
    " eval_batches checkpoint_every log_every max_skips tensorboard cache data_dir"
    " budget_gib methods plans json".split()
)


def configuration(config: Plan) -> dict[str, Any]:
    """The options that shape the step; the rank is the method's own if not given."""
    values = {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if field.name not in _ASIDE
    }
    if values["rank"] is None:
        values["rank"] = row(config.method).rank
    return {
        name: value
        for name, value in values.items()
        if value is not None or name not in METHOD_OPTIONS
    }


def as_flags(config: Plan) -> str:
    """What to type to get this plan again."""
    default = Plan()
    always = ("preset", "method", "remat", "batch", "seq", "target")
    words: list[str] = []
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in _ASIDE or value is None:
            continue
        flag = field.name.replace("_", "-")
        if isinstance(value, bool) and field.name not in METHOD_OPTIONS:
            # For `pretrain`, too, to which this is a line to start from.
            if value != getattr(Pretrain, field.name):
                words.append(f"--{flag}" if value else f"--no-{flag}")
        elif field.name in always or value != getattr(default, field.name):
            words += [f"--{flag}", str(value)]
    return shlex.join(words)


def versions() -> dict[str, str | None]:
    """Of everything that the numbers depend on; None where it is not installed."""
    names = (
        *("oasis_jax", "jax", "jaxlib", "flax", "optax"),
        *("jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13", "libtpu"),
    )
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def step_seconds(config: Plan, setup: Setup) -> float:
    """An estimate, by `oasis_jax.planning.flops`."""
    work = train_work(
        setup.model.config,
        config.recipe().rules,
        batch=config.batch,
        seq=config.seq,
        accumulate=config.accumulate,
    )
    return work.seconds(targets.find(config.target))


def compile_plan(config: Plan) -> Planned:
    """Compiles the train step of these options for their target.

    Raises:
      UserError: if options make no sense, the target is unknown or its compiler not
        installed, or the step does not compile; the first line names the configuration.
    """
    # What is wrong with the target is found before anything is traced.
    target = targets.find(config.target)
    targets.device(target)
    setup = set_up(config, abstract=True)
    needs, parts = compile_step(setup, config, config.target, as_flags(config))
    fits = not needs.refused and needs.peak_bytes <= target.memory
    seconds = step_seconds(config, setup)
    return Planned(config, needs.peak_bytes, parts, seconds, fits)


def compile_step(
    setup: Setup, config: Training, target: str, name: str
) -> tuple[memory.Plan, dict[str, int]]:
    """What a train step needs on a target, and its parts.

    Args:
      setup: Of which shapes are enough.
      name: What errors call it.

    Raises:
      TargetError, PlanError: as `memory.plan` does.
    """
    needs = memory.plan(
        train_step(setup, config), setup.state, setup.batch, target=target, name=name
    )
    counted = memory.step_parts(
        setup.state, setup.loss_fn, setup.batch, accumulate=config.accumulate
    )
    parts = {name: counted[name] for name in PARTS}
    parts["workspace"] = max(0, needs.peak_bytes - sum(parts.values()))
    return needs, parts


# --- A search -----------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A configuration with estimates of its peak in bytes and of its speed."""

    config: Plan
    bytes: int
    tokens_per_second: float

    @property
    def kind(self) -> tuple[str, str | None]:
        """Of each kind one plan is wanted: what a rank costs in loss is not known here."""
        return self.config.method, self.config.rank


def variants(config: Plan) -> list[Plan]:
    """Every method, rank and level of recomputation that a search looks at."""
    width = llama.preset(config.preset).width
    found = []
    for name in config.methods.replace(" ", "").split(","):
        try:
            method = row(name)
        except ValueError as error:
            raise UserError(f"--methods: {error}") from None
        ranks: list[str | None] = [None]
        if method.projected:
            wide_enough = [r for r in RANKS if "." in r or int(r) <= width]
            ranks = [config.rank] if config.rank else [*wide_enough]
        found += [
            replace(_as_method(config, name), rank=rank, remat=remat)
            for rank in ranks
            for remat in REMAT
        ]
    return found


def _as_method(config: Plan, name: str) -> Plan:
    """Of another method: without a rank, and without the options that it lacks."""
    absent: dict[str, Any] = {
        option: None for option in METHOD_OPTIONS if option not in row(name).options
    }
    return replace(config, method=name, rank=None, **absent)


def batches(config: Plan) -> list[int]:
    """Powers of two times the microbatches, up to the batch that is asked for.

    >>> batches(Plan(batch=24, accumulate=2))
    [2, 4, 8, 16, 24]
    """
    sizes = {config.batch}
    size = config.accumulate
    while size < config.batch:
        sizes.add(size)
        size *= 2
    return sorted(sizes)


def candidates(variant: Plan) -> list[Candidate]:
    """One per batch. Traced once, for what is saved grows with the batch."""
    smallest = replace(variant, batch=variant.accumulate)
    setup = set_up(smallest, abstract=True)
    parts = memory.step_parts(
        setup.state,
        setup.loss_fn,
        setup.batch,
        accumulate=variant.accumulate,
    )
    saved = parts.pop("saved_activations")
    # The gradient of the logits, and one more copy of them, in float32.
    logits = 2 * 4 * variant.seq * setup.model.config.vocab_size
    found = []
    for batch in batches(variant):
        config = replace(variant, batch=batch)
        size = sum(parts.values()) + batch // variant.accumulate * (saved + logits)
        speed = batch * variant.seq / step_seconds(config, setup)
        found.append(Candidate(config, size, speed))
    return found


def search(
    pool: list[Candidate],
    budget: int,
    wanted: int,
    confirm: Callable[[Candidate], Planned | None],
    attempts: int = 4,
) -> list[Planned]:
    """The fastest plans that fit, one per method and rank; the compiler has the word.

    Args:
      pool: What may be tried.
      budget: Bytes.
      wanted: How many plans at most.
      confirm: Compiles a candidate; None if it does not compile.
      attempts: Compilations per kind at most. They take a minute each.
    """
    ratios: dict[tuple[str, str], float] = {}

    def expected(candidate: Candidate) -> float:
        """The estimate, mended by what the compiler has said of the like."""
        like = candidate.config.method, candidate.config.remat
        return candidate.bytes * ratios.get(like, 1.0)

    fastest: dict[Any, float] = {}
    for candidate in pool:
        if candidate.bytes <= budget:
            best = fastest.get(candidate.kind, 0.0)
            fastest[candidate.kind] = max(best, candidate.tokens_per_second)
    plans: list[Planned] = []
    for kind in sorted(fastest, key=lambda k: -fastest[k]):
        left = sorted(
            (c for c in pool if c.kind == kind), key=lambda c: -c.tokens_per_second
        )
        tried = 0
        for candidate in left:
            if tried == attempts or len(plans) == wanted:
                break
            if expected(candidate) > budget:
                continue
            tried += 1
            plan = confirm(candidate)
            if plan is None:
                continue
            config = candidate.config
            ratios[config.method, config.remat] = max(
                ratios.get((config.method, config.remat), 0.0),
                plan.peak_bytes / candidate.bytes,
            )
            if plan.fits_device and plan.peak_bytes <= budget:
                plans.append(plan)
                break
    return sorted(plans, key=lambda p: -p.tokens_per_second)


def run_search(config: Plan, console: Console) -> dict[str, Any]:
    """Searches, and tells on the console how far it is.

    Raises:
      UserError: if nothing fits; it names the smallest plan there is.
    """
    assert config.budget_gib is not None
    target = targets.find(config.target)
    budget = round(config.budget_gib * GIB)
    if budget > target.memory:
        raise UserError(
            f"--budget-gib is {config.budget_gib:g}, but {target.name} has"
            f" {target.memory / GIB:.1f} GiB"
        )
    targets.device(target)
    looked_at = variants(config)
    done: dict[Plan, Planned] = {}
    complaints: list[str] = []

    with _progress(console, len(looked_at)) as (show, expect):
        pool: list[Candidate] = []
        for variant in looked_at:
            show(f"trace {variant.method} {variant.rank or ''} {variant.remat}")
            pool += candidates(variant)

        def confirm(plan: Plan) -> Planned | None:
            if plan not in done:
                expect(1)
                show(f"compile {as_flags(plan)}")
                try:
                    done[plan] = compile_plan(plan)
                except memory.PlanError as error:
                    complaints.append(str(error))
                    return None
            return done[plan]

        plans = search(pool, budget, config.plans, lambda c: confirm(c.config))
        if not plans:
            confirm(min(pool, key=lambda c: c.bytes).config)
        adamw = confirm(
            replace(
                _as_method(config, "adamw"),
                remat="block",
                batch=config.accumulate,
            )
        )
    if not done:
        raise UserError(complaints[0])
    for complaint in complaints:
        console.print(complaint)
    if not plans:
        smallest = min(done.values(), key=lambda p: p.peak_bytes)
        raise UserError(
            f"no plan fits --budget-gib {config.budget_gib:g}: the smallest there is,"
            f" {as_flags(smallest.config)}, needs"
            f" {report.human_bytes(smallest.peak_bytes)}"
        )
    return {
        "budget_bytes": budget,
        "plans": [plan.record() for plan in plans],
        "adamw_block": None if adamw is None else adamw.record(),
        "versions": versions(),
    }


@contextmanager
def _progress(console: Console, total: int) -> Iterator[tuple[Callable, Callable]]:
    columns = [BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}")]
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        started = 0

        def show(text: str) -> None:
            nonlocal started
            bar.update(task, completed=started, description=text)
            started += 1
            if not console.is_terminal:
                console.print(text)

        def expect(more: int) -> None:
            nonlocal total
            total = max(total, started + more)
            bar.update(task, total=total)

        yield show, expect


# --- What is printed ----------------------------------------------------------------


def _print_plan(plan: Planned) -> None:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    config = plan.config
    console.print(as_flags(config))
    console.print(report.memory_table(plan.parts, plan.peak_bytes, "What a step needs"))
    memory_of = targets.find(config.target).memory
    verdict = "fits" if plan.fits_device else "does not fit"
    console.print(
        f"{verdict} {config.target}, which has {report.human_bytes(memory_of)};"
        f" about {plan.tokens_per_second:,.0f} tokens/s (estimated)"
    )


def _print_plans(found: dict[str, Any], config: Plan) -> None:
    table = Table(
        title=f"Plans within {config.budget_gib:g} GiB of {config.target}",
        title_style="bold",
        box=SIMPLE,
    )
    names = ("method", "rank", "remat", "batch")
    for column in (*names, "peak", "tokens/s, estimated"):
        table.add_column(column, justify="left" if column in names[:3] else "right")
    for plan in found["plans"]:
        cells = [plan["configuration"][name] for name in names]
        table.add_row(
            *("-" if cell is None else str(cell) for cell in cells),
            report.human_bytes(plan["peak_bytes"]),
            f"{plan['estimated_tokens_per_second']:,.0f}",
        )
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    adamw = found["adamw_block"]
    if adamw is not None:
        batch = adamw["configuration"]["batch"]
        needs = report.human_bytes(adamw["peak_bytes"])
        console.print(f"adamw with --remat block and --batch {batch} needs {needs}")


def main(config: Plan) -> int:
    # A GPU that is there would be claimed, and is not needed.
    without_accelerators()
    try:
        if config.budget_gib is not None:
            found = run_search(config, report.console())
            if config.json:
                print(json.dumps(found, indent=2))
            else:
                _print_plans(found, config)
            return 0
        plan = compile_plan(config)
    except (targets.TargetError, memory.PlanError) as error:
        raise UserError(str(error)) from None
    if config.json:
        print(json.dumps(plan.record() | {"versions": versions()}, indent=2))
    else:
        _print_plan(plan)
    return 0
