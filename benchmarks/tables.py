"""Writes what was measured into the pages, so that no number there is typed by hand.

    python benchmarks/tables.py

In README.md and docs/results.md, what stands between `<!-- name: command -->` and
`<!-- end -->` is what `SECTIONS[name]` makes of the files in `benchmarks/results/`, which
the command wrote.
"""

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glue import table
from timing import TARGETS

from train.report.comparison import compare_markdown
from train.report.tables import human_bytes

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
PAGES = (ROOT / "README.md", ROOT / "docs/results.md")
MARKED = re.compile(r"(<!-- ([^:\n]+):[^\n]*-->\n).*?(<!-- end -->)", re.DOTALL)


def _load(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _markdown(caption: str, rows: list[dict[str, str]], words: int = 1) -> str:
    """A caption and a table, whose first columns are words and the others numbers."""
    head, *body = (
        f"| {' | '.join(cells)} |" for cells in [rows[0], *(r.values() for r in rows)]
    )
    rule = "|" + ":---|" * words + "---:|" * (len(rows[0]) - words)
    return "\n".join([caption, "", head, rule, *body])


def _sizes(memory: dict[str, Any], parts: str) -> dict[str, str]:
    """Cells of bytes, by their heads; a trial's keys end in `_bytes`."""
    keys = {
        p: p if p in memory else f"{p.removesuffix('s')}_bytes" for p in parts.split()
    }
    return {p.replace("_", " "): human_bytes(memory[key]) for p, key in keys.items()}


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}"


def _picture(says: str, name: str) -> str:
    """Of results, as docs/results.md shows it."""
    return f"\n![{says}](../benchmarks/results/{name}.png)"


def _machine(about: dict[str, Any]) -> str:
    cores = "1 core" if about["cores"] == 1 else f"{about['cores']} cores"
    return f"{about['device']}, {cores}, jax {about['jax']}, Python {about['python']}"


def _timed_on(result: dict[str, Any]) -> str:
    """The machine of a result of `timing.py`, which clock it was, and its note."""
    config = result["configuration"]
    clock = {"wall": "wall time", "cpu": "time of the process on its core"}
    said = [_machine(result["machine"]), clock[config["clock"]], config["note"]]
    return "; ".join(part for part in said if part)


def _workload(config: dict[str, Any]) -> str:
    """What a result of `timing.py` worked on."""
    layers, vocabulary = config["layers"], config["vocab_size"]
    size = [] if layers is None else [f"{layers} layers"]
    size += [] if vocabulary is None else [f"a vocabulary of {vocabulary:,}"]
    return (
        f"{config['preset']}{' with ' if size else ''}{' and '.join(size)},"
        f" {config['batch']} x {config['seq']} tokens, {config['dtype']} computation,"
        f" {config['param_dtype']} weights, rank {config['rank']}"
        f"{' of n_in' if '.' in config['rank'] else ''}"
    )


def _losses(rows: list[dict[str, Any]]) -> str:
    """What a comparison measured, as the start of a sentence."""
    config = rows[0]["config"]
    return (
        f"Validation loss (nats per byte, token-weighted) of {config['preset']} after"
        f" {config['steps']} steps of {config['batch']} x {config['seq']} bytes of"
        f" {Path(config['data'] or 'the standard library').name}"
    )


# --- The front page -----------------------------------------------------------------


def first_run_shortened() -> str:
    """What is trained, what a step needs, how it begins and how it ends."""
    lines = [line for line in first_run().splitlines() if line.strip()]
    needs = next(n for n, line in enumerate(lines) if "What a step needs" in line)
    steps = [n for n, line in enumerate(lines) if line.startswith("    step ")]
    shown = [*lines[:4], "    ...", *lines[needs : steps[0] + 1], "    ..."]
    return "\n".join([*shown, *lines[steps[-1] :]])


def h200() -> str:
    """The measured steps, the largest first, whatever the method."""
    result = _load("frontier_gpu")
    return _markdown(
        f"A train step of {_workload(result['configuration'])} ({_timed_on(result)}):",
        [
            {
                "method": row["method"],
                "recomputed": row["remat"],
                "residuals": row["residuals"],
                "step (ms)": _milliseconds(row["step_seconds_median"]),
                **_sizes(
                    row["memory"] | {"peak": row["peak_bytes"]},
                    "peak saved_activations gradients optimizer_state",
                ),
            }
            for row in sorted(result["rows"], key=lambda row: -row["peak_bytes"])
        ],
        words=3,
    )


def losses() -> str:
    """Every method's, in one sentence."""
    rows = sorted(_load("methods"), key=lambda row: row["val_loss"])
    base = next(row["val_loss"] for row in rows if row["method"] == "adamw")
    config = rows[0]["config"]
    shares = [
        f"{row['method']} {100 * (row['val_loss'] / base - 1):+.1f} %" for row in rows
    ]
    return (
        f"Validation loss of {config['preset']} after {config['steps']} steps against"
        f" AdamW's, each at its best of three learning rates, one seed"
        f" ({_machine(rows[0]['machine'])}):\n{', '.join(shares)}."
    )


# --- The page of results ------------------------------------------------------------


def first_run() -> str:
    """What `make train` printed."""
    printed = (RESULTS / "first_run.txt").read_text().rstrip()
    return "\n".join(f"    {line}".rstrip() for line in printed.splitlines())


def quality() -> str:
    rows = _load("quality")
    caption = (
        f"{_losses(rows)} at each method's best learning rate; mean over seeds"
        f" {rows[0]['seeds']}, of ablations over seeds {rows[-1]['seeds']}"
        f" ({_machine(rows[0]['machine'])}):\n\n"
    )
    picture = _picture("Loss of the methods", "quality")
    return caption + compare_markdown(rows, losses_only=True) + picture


def methods() -> str:
    rows = _load("methods")
    caption = (
        f"{_losses(rows)}, each method with its published defaults (`python -m train"
        " methods`) at its best of three learning rates, seed"
        f" {rows[0]['seeds'][0]}; `peak` is the compiled step's"
        f" ({_machine(rows[0]['machine'])}):\n\n"
    )
    picture = _picture("Loss and memory of the methods", "methods")
    return caption + compare_markdown(rows) + picture


def residuals() -> str:
    """Loss and bytes; times are left out, for trials had not a machine to themselves."""
    rows = sorted(_load("residuals"), key=lambda row: row["val_loss"])

    def loss(row: dict[str, Any]) -> str:
        deviation = statistics.stdev(trial["val_loss"] for trial in row["all"])
        return f"{row['val_loss']:.4f} ± {deviation:.4f}"

    return _markdown(
        f"{_losses(rows)} at a learning rate of {rows[0]['lr']:g}, mean ± deviation over"
        f" seeds {rows[0]['seeds']}; bytes are those of the compiled step"
        f" ({_machine(rows[0]['machine'])}):",
        [
            {
                "method:rank:residuals": row["method"],
                "val loss": loss(row),
                **_sizes(row, "saved_activations optimizer_state peak"),
            }
            for row in rows
        ],
    )


def glue(name: str) -> str:
    """A column a task, points, and what a step kept, and took where it ran alone."""
    result = _load(name)
    config, rows = result["configuration"], table(result)
    tasks = rows[0]["tasks"]
    first = next(iter(tasks))
    sizes = {
        task: "{steps} of {batch} x {seq}".format(**config["sizes"][task])
        for task in tasks
    }
    steps = ", ".join(f"{size} ({task})" for task, size in sizes.items())
    if len(set(sizes.values())) == 1:
        steps = sizes[first]
    # A GPU was shared by trials, so what their steps took says nothing.
    timed = result["machine"]["device"] == "cpu"
    time = ", and so is the time, the least of the trials' medians" if timed else ""

    def points(mean: float, deviation: float) -> str:
        return f"{mean:.1f} ± {deviation:.1f}"

    def cells(row: dict[str, Any]) -> dict[str, str]:
        own = row["tasks"][first]
        return {
            "method": row["method"],
            "average": points(row["average"], row["deviation"]),
            **{k: points(t["mean"], t["deviation"]) for k, t in row["tasks"].items()},
            **({"step (ms)": f"{own['step_ms']:,.0f}"} if timed else {}),
            **_sizes(own["bytes"], "optimizer_state saved_activations peak"),
        }

    rates = [
        f"{row['method']} "
        + "/".join(f"{task['lr']:g}" for task in row["tasks"].values())
        for row in rows
    ]
    caption = (
        f"{config['model']} (22 M parameters), steps of packed tokens: {steps};"
        f" rank {config['rank']}. The dev set after the last step, in points"
        " (CoLA Matthews, MRPC mean of F1 and accuracy, RTE and SST-2 accuracy), mean"
        f" ± deviation over {tasks[first]['seeds']} seeds at the best of three learning"
        " rates, and of one beyond where the best is at an end; bytes are of"
        f" {first}'s compiled step{time} ({_machine(result['machine'])}):"
    )
    scores = _markdown(caption, [cells(row) for row in rows])
    return f"{scores}\n\nLearning rates, by task: {', '.join(rates)}."


def finetune_plans() -> str:
    result = _load("finetune_plan_h200")
    config = result["plans"][0]["configuration"]
    return _markdown(
        f"Peak of the compiled step of {config['model']} on instructions,"
        f" {config['batch']} x {config['seq']} packed tokens, {config['param_dtype']}"
        f" weights, for an {config['target']} (jax {result['versions']['jax']}), OASIS at"
        " r = 256:",
        [
            {
                "method": plan["configuration"]["method"],
                "embeddings": plan["configuration"]["embeddings"],
                **_sizes(
                    plan | plan["parts"],
                    "peak weights gradients optimizer_state bases saved_activations",
                ),
            }
            for plan in result["plans"]
        ],
        words=2,
    )


def step() -> str:
    result = _load("step_cpu")
    steps = _markdown(
        "One train step, OASIS against AdamW, alternating in one process:"
        f" {_workload(result['configuration'])} ({_timed_on(result)}).",
        [
            {
                "method:recomputation": name,
                "step (ms, median)": f"{milliseconds:,.0f}",
                **_sizes(
                    result["memory"][name],
                    "saved_activations gradients optimizer_state peak",
                ),
            }
            for name, milliseconds in result["step_ms_median"].items()
        ],
    )
    ((pair, ratio),) = result["ratio_median"].items()
    return f"{steps}\n\nMedian ratio {pair}, pair by pair: **{ratio:.3f}**."


def plans() -> str:
    """One row a configuration, one column a device, and shares of AdamW's."""
    results = {target: _load(f"plan_{target}") for target in ("h200", "v5p")}
    peaks = {
        target: {
            _dials(plan["configuration"]): plan["peak_bytes"] for plan in r["plans"]
        }
        for target, r in results.items()
    }

    def cell(own: dict[tuple[str, ...], int], dials: tuple[str, ...]) -> str:
        if dials not in own:
            return "n/a"
        bases = [own["adamw", level, "whole"] for level in ("none", "block")]
        shares = ", ".join(f"{own[dials] / base:.2f}" for base in bases)
        return f"{human_bytes(own[dials])} ({shares})"

    versions = results["h200"]["versions"]
    compilers = ("jax", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "libtpu")
    config = results["h200"]["plans"][0]["configuration"]
    return _markdown(
        "Peak of the whole compiled step (arguments + outputs + temporaries - aliased, as"
        f" the compiler reports it) of {config['preset']}, {config['batch']} x"
        f" {config['seq']} tokens, {config['param_dtype']} weights, float32 moments, OASIS"
        " at r = 256, compiled for a device that was not there"
        f" ({', '.join(f'{name} {versions[name]}' for name in compilers)}); in brackets,"
        " as a share of AdamW's without recomputation and with that of whole blocks:",
        [
            dict(zip(("method", "recomputation", "residuals"), dials, strict=True))
            | {target: cell(own, dials) for target, own in peaks.items()}
            for dials in dict.fromkeys(k for own in peaks.values() for k in own)
        ],
        words=3,
    )


def _dials(config: dict[str, Any]) -> tuple[str, ...]:
    return config["method"], config["remat"], config["residuals"]


def budget() -> str:
    """What was found to fit, and what AdamW needs."""
    result = _load("plan_7b_h200")
    best, adamw = result["plans"][0], result["adamw_block"]
    config = best["configuration"]
    return (
        f"It finds {config['method']} at r = {config['rank']} with `--remat"
        f" {config['remat']}`, {human_bytes(best['peak_bytes'])}; AdamW with `--remat"
        f" block` needs {human_bytes(adamw['peak_bytes'])},"
        f" {adamw['peak_bytes'] / best['peak_bytes']:.1f} times as much"
        f" (jax {result['versions']['jax']})."
    )


def frontier(name: str) -> str:
    """Step time and peak of every configuration, and the picture."""
    result = _load(name)
    planned = _planned(result)
    methods = list(dict.fromkeys(row["method"] for row in result["rows"]))

    def by_memory(row: dict[str, Any]) -> tuple[int, int]:
        return methods.index(row["method"]), -row.get("compiled_peak_bytes", 0)

    def cells(row: dict[str, Any]) -> dict[str, str]:
        ratio, peak = row["ratio"], row["peak_bytes"] or row["compiled_peak_bytes"]
        shown = {
            "method:recomputation:rank:residuals": row["configuration"],
            "step": f"{ratio['median']:.3f}",
            "quartiles": f"{ratio['low']:.3f} to {ratio['high']:.3f}",
            "peak": human_bytes(peak),
            **_sizes(row["memory"], "saved_activations"),
        }
        if not planned:
            return shown
        plan = planned.get(_dials(row))
        return shown | {
            "planned": human_bytes(plan["peak_bytes"]) if plan else "n/a",
            "step (ms)": _milliseconds(row["step_seconds_median"]),
            "estimated (ms)": _milliseconds(plan["estimated_step_seconds"])
            if plan
            else "n/a",
        }

    points = _markdown(
        f"Step time in units of `{result['rows'][0]['configuration']}`, median and"
        f" quartiles, and peak memory of {_workload(result['configuration'])}"
        f" ({_timed_on(result)}):",
        [cells(row) for row in sorted(result["rows"], key=by_memory)],
    )
    return f"{points}\n{_picture('Step time against peak memory', name)}"


def _planned(result: dict[str, Any]) -> dict[tuple[str, ...], dict[str, Any]]:
    """What was planned of the same steps for the same device, before there was one."""
    device = result["machine"]["device"]
    if device not in TARGETS:
        return {}
    config = result["configuration"]
    same = ("preset", "batch", "seq", "dtype", "param_dtype", "cross_documents")
    return {
        _dials(own): plan
        for plan in _load(f"plan_{TARGETS[device]}")["plans"]
        if (own := plan["configuration"])
        and all(own[name] == config[name] for name in same)
        and own.get("rank") in (None, config["rank"])  # AdamW has none
    }


def checkpoints() -> str:
    """What digests cost beside the saving."""
    result = _load("checkpoints")
    return _markdown(
        f"Saving a state until its checkpoint is whole, medians of {result['rounds']}"
        " saves with digests and without, in turns; sealing is part of saving, and in"
        " brackets is its share of the rest"
        f" ({_machine(result['machine'])}, which others used too):",
        [
            {
                "state": human_bytes(row["bytes"]),
                "save blocks (ms)": _milliseconds(row["blocked_seconds"]),
                "whole after (ms)": _milliseconds(row["save_seconds"]),
                "without digests (ms)": _milliseconds(row["save_seconds_without"]),
                "sealing (ms)": f"{_milliseconds(row['seal_seconds'])}"
                f" ({100 * row['share_of_sealing']:.1f} %)",
                "checking (ms)": _milliseconds(row["check_seconds"]),
            }
            for row in result["rows"]
        ],
    )


def survival() -> str:
    """Kills by kind, and what was wrong."""
    result = _load("survival")
    kills, runs = result["kills"], result["runs"]

    def cells(row: dict[str, Any]) -> dict[str, str]:
        again = row["again"]
        mean = f"{statistics.mean(again):.1f}" if again else "n/a"
        return {
            "kind": row["kind"],
            "kills": str(row["kills"]),
            "exit codes": ", ".join(f"{c} ({n})" for c, n in row["codes"].items()),
            "steps done again, mean": mean,
            "most": str(max(again)) if again else "n/a",
        }

    wrong = len(result["wrong"])
    return _markdown(
        f"{kills} kills at random moments of {runs} runs of {result['steps']} steps, a"
        " checkpoint every third (seed"
        f" {result['seed']}; {_machine(result['machine'])}). Final states, places in the"
        " data and losses that were not, bit for bit, those of the run that nobody"
        " touched, exit codes that were not right, tracebacks and hangs:"
        f" {wrong or 'none'}.",
        [cells(row) for row in result["rows"]],
    )


def templates() -> str:
    """Texts that templates write here and in transformers."""
    result = _load("templates")
    used = ", ".join(f"{name} {v}" for name, v in result["versions"].items())
    rows = [{k: str(v) for k, v in row.items()} for row in result["table"]]
    return _markdown(
        "Texts of ten conversations, with and without the words that ask for an answer,"
        f" and what {{% generation %}} marks in them ({used}):",
        rows,
    )


SECTIONS: dict[str, Callable[[], str]] = {
    "first run, shortened": first_run_shortened,
    "h200": h200,
    "losses": losses,
    "first run": first_run,
    "checkpoints": checkpoints,
    "survival": survival,
    "templates": templates,
    "quality": quality,
    "methods": methods,
    "residuals": residuals,
    "glue": lambda: "\n\n".join(map(glue, ("glue", "glue_gpu"))),
    "finetune plans": finetune_plans,
    "step": step,
    "plans": plans,
    "budget": budget,
    "frontier": lambda: "\n\n".join(map(frontier, ("frontier_cpu", "frontier_gpu"))),
}


def fill(text: str) -> str:
    """The page with every marked section written anew."""
    return MARKED.sub(
        lambda found: f"{found[1]}\n{SECTIONS[found[2]]()}\n\n{found[3]}", text
    )


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(fill(page.read_text()))
