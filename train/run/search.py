"""The fastest train steps that fit a budget.

The clock is estimated (`oasis_jax.planning.flops`), memory is what the compiler reports.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

from rich.console import Console

from oasis_jax.methods import row
from oasis_jax.models import llama
from oasis_jax.models.blocks import REMAT
from oasis_jax.planning import memory, targets
from train.errors import UserError
from train.options import Plan
from train.options.method import only_of
from train.report.progress import progress_bar
from train.report.tables import human_bytes
from train.run import build
from train.run.machine import versions
from train.run.planning import Planned, as_flags, compile_plan, step_seconds

GIB = targets.GIB
RANKS = ("128", "256", "512", "0.125", "0.25")
"""What a search tries, where a model is wide enough."""


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
    return replace(config, method=name, rank=None, **only_of(name, config))


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
    setup = build.pretraining(smallest.training(), abstract=True)
    objective, model = setup.objective, cast(Any, setup.objective.model)
    how: Any = dict(accumulate=variant.accumulate, weighted=True)
    parts = memory.step_parts(setup.state, objective.loss_fn, objective.batch, **how)
    saved = parts.pop("saved_activations")
    # The gradient of the logits, and one more copy of them, in float32.
    logits = 2 * 4 * variant.seq * model.config.vocab_size
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

    with progress_bar(len(looked_at), console=console) as bar:
        pool: list[Candidate] = []
        total, started = len(looked_at), 0

        def show(text: str) -> None:
            nonlocal started
            bar.at(started, text, max(total, started + 1))
            started += 1
            if not console.is_terminal:
                console.print(text)

        for variant in looked_at:
            show(f"trace {variant.method} {variant.rank or ''} {variant.remat}")
            pool += candidates(variant)

        def confirm(plan: Plan) -> Planned | None:
            if plan not in done:
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
            f" {human_bytes(smallest.peak_bytes)}"
        )
    return {
        "budget_bytes": budget,
        "plans": [plan.record() for plan in plans],
        "adamw_block": None if adamw is None else adamw.record(),
        "versions": versions(),
    }
