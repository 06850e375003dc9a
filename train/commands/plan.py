"""What a train step needs on a device, told; or which steps fit a budget."""

import json
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from oasis_jax.compat import without_accelerators
from oasis_jax.planning import targets
from train.options import Plan
from train.report.log import console as standard_error
from train.report.tables import human_bytes, memory_table
from train.run.machine import versions
from train.run.planning import Planned, as_flags, compile_plan
from train.run.search import run_search


def main(config: Plan) -> None:
    # A GPU that is there would be claimed, and is not needed.
    without_accelerators()
    if config.budget_gib is not None:
        plans = run_search(config, standard_error())
        if config.json:
            print(json.dumps(plans, indent=2))
        else:
            _print_plans(plans, config)
        return
    plan = compile_plan(config)
    if config.json:
        print(json.dumps(plan.record() | {"versions": versions()}, indent=2))
    else:
        _print_plan(plan)


def _print_plan(plan: Planned) -> None:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    config = plan.config
    console.print(as_flags(config))
    console.print(memory_table(plan.parts, plan.peak_bytes, "What a step needs"))
    memory_of = targets.find(config.target).memory
    verdict = "fits" if plan.fits_device else "does not fit"
    console.print(
        f"{verdict} {config.target}, which has {human_bytes(memory_of)};"
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
            human_bytes(plan["peak_bytes"]),
            f"{plan['estimated_tokens_per_second']:,.0f}",
        )
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    adamw = found["adamw_block"]
    if adamw is not None:
        batch = adamw["configuration"]["batch"]
        needs = human_bytes(adamw["peak_bytes"])
        console.print(f"adamw with --remat block and --batch {batch} needs {needs}")
