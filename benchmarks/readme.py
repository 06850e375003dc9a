"""Writes the measured tables into README.md, so that no number there is typed by hand.

    python benchmarks/readme.py

Between `<!-- name: ... -->` and `<!-- end -->` goes what `SECTIONS[name]` makes of the
JSON in `benchmarks/results/`; a section without results stays as it is.
"""

import json
import re
import statistics
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from glue import table
from timing import TARGETS

from train.report import compare_markdown, human_bytes

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"


def _load(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def _machine(about: dict[str, Any]) -> str:
    return (
        f"{about['device']}, {about['cores']} cores, jax {about['jax']},"
        f" Python {about['python']}"
    )


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


def first_run() -> str:
    """What `make train` printed."""
    printed = (RESULTS / "first_run.txt").read_text().rstrip()
    return "\n".join(f"    {line}".rstrip() for line in printed.splitlines())


def quality() -> str:
    rows = _load("quality.json")
    return (
        f"{_losses(rows)} at each method's best"
        f" learning rate; mean over seeds {rows[0]['seeds']}, of ablations over seeds"
        f" {rows[-1]['seeds']} ({_machine(rows[0]['machine'])}):\n\n"
        + compare_markdown(rows, losses_only=True)
        + "\n![Loss of the methods](benchmarks/results/quality.png)"
    )


def methods() -> str:
    rows = _load("methods.json")
    return (
        f"{_losses(rows)}, each method with its"
        f" published defaults (`python -m train methods`) at its best of three learning"
        f" rates, seed {rows[0]['seeds'][0]}; `peak` is the compiled step's"
        f" ({_machine(rows[0]['machine'])}):\n\n"
        + compare_markdown(rows)
        + "\n![Loss and memory of the methods](benchmarks/results/methods.png)"
    )


def residuals() -> str:
    """Loss and bytes; times are left out, for trials had not a machine to themselves."""
    rows = sorted(_load("residuals.json"), key=lambda row: row["val_loss"])
    lines = [
        f"{_losses(rows)} at a learning rate of {rows[0]['lr']:g}, mean ± deviation over"
        f" seeds {rows[0]['seeds']}; bytes are those of the compiled step"
        f" ({_machine(rows[0]['machine'])}):",
        "",
        "| method:rank:residuals | val loss | activations | optimizer | peak |",
        "|:---|---:|---:|---:|---:|",
    ]
    for row in rows:
        deviation = statistics.stdev(trial["val_loss"] for trial in row["all"])
        sizes = ("saved_activation_bytes", "optimizer_state_bytes", "peak_bytes")
        cells = [f"{row['val_loss']:.4f} ± {deviation:.4f}"]
        cells += [human_bytes(row[size]) for size in sizes]
        lines.append(f"| {row['method']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _every(names: tuple[str, ...], make: Callable[[str], str]) -> str:
    """What `make` says of each of the results that exist: one device has one."""
    found = [name for name in names if (RESULTS / f"{name}.json").exists()]
    if not found:
        raise FileNotFoundError(names)
    return "\n\n".join(map(make, found))


def glue() -> str:
    return _every(("glue", "glue_gpu"), _glue)


def _glue(name: str) -> str:
    """A column a task, points, and what a step kept, and took where it ran alone."""
    result = _load(f"{name}.json")
    config = result["configuration"]
    rows = table(result)
    tasks = list(rows[0]["tasks"])
    seeds = rows[0]["tasks"][tasks[0]]["seeds"]
    sizes = {
        task: "{steps} of {batch} x {seq}".format(**config["sizes"][task])
        for task in tasks
    }
    steps = ", ".join(f"{size} ({task})" for task, size in sizes.items())
    if len(set(sizes.values())) == 1:
        steps = sizes[tasks[0]]
    # A GPU was shared by trials, so what their steps took says nothing.
    timed = result["machine"]["device"] == "cpu"
    time = ", and so is the time, the least of the trials' medians" if timed else ""
    heads = [
        *tasks,
        *(["step (ms)"] if timed else []),
        "optimizer",
        "activations",
        "peak",
    ]
    lines = [
        f"{config['model']} (22 M parameters), steps of packed tokens: {steps};"
        f" rank {config['rank']}. The dev set after the last step, in points"
        " (CoLA Matthews, MRPC mean of F1 and accuracy, RTE and SST-2 accuracy), mean"
        f" ± deviation over {seeds} seeds at the best of three learning rates, and of"
        " one beyond where the best is at an end; bytes are of"
        f" {tasks[0]}'s compiled step{time} ({_machine(result['machine'])}):",
        "",
        f"| method | average | {' | '.join(heads)} |",
        "|:---|---:|" + "---:|" * len(heads),
    ]
    for row in rows:
        first = row["tasks"][tasks[0]]
        parts = ("optimizer_state_bytes", "saved_activation_bytes", "peak_bytes")
        cells = [
            row["method"],
            f"{row['average']:.1f} ± {row['deviation']:.1f}",
            *(f"{t['mean']:.1f} ± {t['deviation']:.1f}" for t in row["tasks"].values()),
            *([f"{first['step_ms']:,.0f}"] if timed else []),
            *(human_bytes(first["bytes"][part]) for part in parts),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    rates = [
        f"{row['method']} "
        + "/".join(f"{task['lr']:g}" for task in row["tasks"].values())
        for row in rows
    ]
    return "\n".join([*lines, "", f"Learning rates, by task: {', '.join(rates)}."])


def finetune_plans() -> str:
    result = _load("finetune_plan_h200.json")
    config = result["plans"][0]["configuration"]
    parts = ("weights", "gradients", "optimizer_state", "bases", "saved_activations")
    lines = [
        f"Peak of the compiled step of {config['model']} on instructions,"
        f" {config['batch']} x {config['seq']} packed tokens, {config['param_dtype']}"
        f" weights, for an {config['target']} (jax {result['versions']['jax']}), OASIS at"
        " r = 256:",
        "",
        "| method | embeddings | peak |"
        f" {' | '.join(p.replace('_', ' ') for p in parts)} |",
        "|:---|:---|" + "---:|" * (1 + len(parts)),
    ]
    for plan in result["plans"]:
        own = plan["configuration"]
        sizes = [plan["peak_bytes"], *(plan["parts"][part] for part in parts)]
        cells = [own["method"], own["embeddings"], *map(human_bytes, sizes)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def step() -> str:
    result = _load("step_cpu.json")
    lines = [
        "One train step, OASIS against AdamW, alternating in one process:"
        f" {_workload(result['configuration'])} ({_timed_on(result)}).",
        "",
        "| method:recomputation | step (ms, median) | saved activations | gradients |"
        " optimizer | peak |",
        "|:---|---:|---:|---:|---:|---:|",
    ]
    for name, milliseconds in result["step_ms_median"].items():
        memory = result["memory"][name]
        parts = ("saved_activations", "gradients", "optimizer_state", "peak")
        cells = [human_bytes(memory[part]) for part in parts]
        lines.append(f"| {name} | {milliseconds:,.0f} | {' | '.join(cells)} |")
    for pair, ratio in result["ratio_median"].items():
        lines += ["", f"Median ratio {pair}, pair by pair: **{ratio:.3f}**."]
    return "\n".join(lines)


def plans() -> str:
    """One row a configuration, one column a device, and shares of AdamW's."""
    found = {}
    for name in ("h200", "v5p"):
        with suppress(FileNotFoundError):
            found[name] = _load(f"plan_{name}.json")
    if not found:
        raise FileNotFoundError("plan_*.json")

    def key(plan: dict[str, Any]) -> tuple[str, str, str]:
        names = ("method", "remat", "residuals")
        return tuple(plan["configuration"][name] for name in names)

    peaks = {
        target: {key(plan): plan["peak_bytes"] for plan in result["plans"]}
        for target, result in found.items()
    }
    first = next(iter(found.values()))
    config, versions = first["plans"][0]["configuration"], first["versions"]
    compilers = [
        f"{name} {versions[name]}"
        for name in ("jax", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "libtpu")
        if versions.get(name)
    ]
    lines = [
        "Peak of the whole compiled step (arguments + outputs + temporaries - aliased, as"
        f" the compiler reports it) of {config['preset']}, {config['batch']} x"
        f" {config['seq']} tokens, {config['param_dtype']} weights, float32 moments, OASIS"
        f" at r = 256, compiled for a device that was not there ({', '.join(compilers)});"
        " in brackets, as a share of AdamW's without recomputation and with that of whole"
        " blocks:",
        "",
        f"| method | recomputation | residuals | {' | '.join(peaks)} |",
        "|:---|:---|:---|" + "---:|" * len(peaks),
    ]
    for row in dict.fromkeys(k for own in peaks.values() for k in own):
        cells = []
        for own in peaks.values():
            shares = [
                f"{own[row] / own[base]:.2f}"
                for base in (("adamw", level, "whole") for level in ("none", "block"))
                if row in own and base in own
            ]
            cell = human_bytes(own[row]) if row in own else "n/a"
            cells.append(f"{cell} ({', '.join(shares)})" if shares else cell)
        lines.append(f"| {' | '.join((*row, *cells))} |")
    return "\n".join(lines)


def frontier() -> str:
    return _every(("frontier_cpu", "frontier_gpu"), _frontier)


def _frontier(name: str) -> str:
    """Step time and peak of every configuration, and the picture."""
    result = _load(f"{name}.json")
    first = result["rows"][0]["configuration"]
    planned = _planned(result)
    more = ["planned", "step (ms)", "estimated (ms)"] if planned else []
    heads = ["step", "quartiles", "peak", "saved activations", *more]
    lines = [
        f"Step time in units of `{first}`, median and quartiles, and peak memory of"
        f" {_workload(result['configuration'])} ({_timed_on(result)}):",
        "",
        f"| method:recomputation:rank:residuals | {' | '.join(heads)} |",
        "|:---|" + "---:|" * len(heads),
    ]
    methods = list(dict.fromkeys(row["method"] for row in result["rows"]))

    def by_memory(row: dict[str, Any]) -> tuple[int, int]:
        return methods.index(row["method"]), -row.get("compiled_peak_bytes", 0)

    for row in sorted(result["rows"], key=by_memory):
        if "failed" in row:
            empty = " n/a |" * (len(heads) - 1)
            lines.append(f"| {row['configuration']} | failed |{empty}")
            continue
        ratio = row["ratio"]
        cells = [
            f"{ratio['median']:.3f}",
            f"{ratio['low']:.3f} to {ratio['high']:.3f}",
            human_bytes(row["peak_bytes"] or row["compiled_peak_bytes"]),
            human_bytes(row["memory"]["saved_activations"]),
        ]
        if planned:
            plan = planned.get((row["method"], row["remat"], row["residuals"]), {})
            cells += [
                human_bytes(plan["peak_bytes"]) if plan else "n/a",
                f"{1e3 * row['step_seconds_median']:,.0f}",
                f"{1e3 * plan['estimated_step_seconds']:,.0f}" if plan else "n/a",
            ]
        lines.append(f"| {row['configuration']} | {' | '.join(cells)} |")
    picture = f"benchmarks/results/{name}.png"
    return "\n".join(lines) + f"\n\n![Step time against peak memory]({picture})"


def _planned(result: dict[str, Any]) -> dict[tuple[str, ...], dict[str, Any]]:
    """What was planned of the same steps for the same device, before there was one."""
    target = TARGETS.get(result["machine"]["device"])
    try:
        plans = _load(f"plan_{target}.json")["plans"]
    except FileNotFoundError:
        return {}
    config = result["configuration"]
    same = ("preset", "batch", "seq", "dtype", "param_dtype", "cross_documents")
    return {
        tuple(own[name] for name in ("method", "remat", "residuals")): plan
        for plan in plans
        if (own := plan["configuration"])
        and all(own[name] == config[name] for name in same)
        and own.get("rank") in (None, config["rank"])  # AdamW has none
    }


SECTIONS: dict[str, Callable[[], str]] = {
    "first run": first_run,
    "quality": quality,
    "methods": methods,
    "residuals": residuals,
    "glue": glue,
    "finetune plans": finetune_plans,
    "step": step,
    "plans": plans,
    "frontier": frontier,
}


def fill(text: str) -> str:
    """The text with every section that has results written anew."""
    for name, make in SECTIONS.items():
        try:
            content = make()
        except FileNotFoundError:
            continue
        pattern = rf"(<!-- {name}:[^\n]*-->\n).*?(<!-- end -->)"
        text = re.sub(
            pattern,
            lambda match, content=content: f"{match[1]}\n{content}\n\n{match[2]}",
            text,
            flags=re.DOTALL,
        )
    return text


if __name__ == "__main__":
    README.write_text(fill(README.read_text()))
