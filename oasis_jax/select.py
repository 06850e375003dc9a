"""Which kernels are projected, with which rank, and a report of what each rule matched."""

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from oasis_jax.lora import Lora
from oasis_jax.paths import flatten_paths, map_with_paths, path_hash
from oasis_jax.subspace import (
    COORDINATES,
    FULL_SIZE,
    Projection,
    is_projection,
    kernel_paths,
)
from oasis_jax.trackers import TRACKERS, Tracker

FULL = "full"
_TRACKERS: dict[str, type[Any]] = TRACKERS | {Lora.name: Lora}


@dataclass(frozen=True)
class Rule:
    """One line of the decision; the first rule that matches a kernel's path wins.

    Attributes:
      pattern: Regular expression, searched for in the kernel's path, such as
        `blocks/mlp/down_proj/kernel`.
      rank: A float in (0, 1] is a fraction of n_in, an int in [1, n_in] a number of
        columns, and 'full' leaves the kernel unprojected.
      tracker: A tracker, or the name of one with its defaults; or `Lora`.
      stride: The tracker sees every stride-th token.
      gradient: What the optimizer sees of a kernel's gradient: 'coordinates', C = P^T G,
        for an optimizer that lifts; or 'full', P C, for any optimizer.
      inputs: Instead of kernels, the rule is about inputs of norms and activation
        functions, such as `blocks/attn_norm/input`; where it matches, only their
        coefficients are saved.

    Raises:
      ValueError: where a field makes no sense, naming it and its value.

    Example:
      >>> Rule("mlp/down_proj", rank=0.125, stride=4).rank
      0.125
    """

    pattern: str
    rank: float | int | str = 0.25
    tracker: Tracker | str = "oja"
    stride: int = 1
    gradient: str = COORDINATES
    inputs: bool = False

    def __post_init__(self):
        if not _sensible(self.rank):
            raise ValueError(
                f"rule {self.pattern!r}: rank is {self.rank!r}, expected a fraction of"
                " n_in in (0, 1], a whole number from 1, or 'full'"
            )
        if isinstance(self.tracker, str) and self.tracker not in _TRACKERS:
            raise ValueError(
                f"rule {self.pattern!r}: tracker is {self.tracker!r}, expected one of"
                f" {sorted(_TRACKERS)}"
            )
        if self.stride < 1:
            raise ValueError(
                f"rule {self.pattern!r}: stride is {self.stride}, expected at least 1"
            )
        if self.gradient not in (COORDINATES, FULL_SIZE):
            raise ValueError(
                f"rule {self.pattern!r}: gradient is {self.gradient!r}, expected"
                f" {COORDINATES!r} or {FULL_SIZE!r}"
            )
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"rule {self.pattern!r}: {error}") from None

    def columns(self, n_in: int) -> int | None:
        """The rank for an input of n_in features; None where it stays full."""
        if isinstance(self.rank, str):
            return None
        if isinstance(self.rank, float):
            return max(1, round(self.rank * n_in))
        return self.rank


def _sensible(rank: Any) -> bool:
    if isinstance(rank, str):
        return rank == FULL
    if isinstance(rank, bool):
        return False
    if isinstance(rank, int):
        return rank >= 1
    return isinstance(rank, float) and math.isfinite(rank) and 0 < rank <= 1


DEFAULT_RULES = (Rule(".*", rank=0.25),)


@dataclass(frozen=True)
class Selection:
    """What was decided; `print` it for the report, `init` it for the bases.

    Attributes:
      places: The declared tree, its projected places with their tracker and stride.
      shapes: Shape of the basis (of LoRA's A) by place.
      kernels: Shape of the kernels by place.
      matches: The kernel paths that each rule decided, in the rules' order.
      unmatched: Kernels that no rule matched; they stay full.
    """

    places: Any
    shapes: dict[str, tuple[int, ...]]
    kernels: dict[str, tuple[tuple[int, ...], ...]]
    matches: tuple[tuple[Rule, tuple[str, ...]], ...]
    unmatched: tuple[str, ...]

    def init(self, key: jax.Array) -> Any:
        """The subspace: the declared tree with a first basis wherever there is one."""

        def fill(path: str, place: Projection) -> Any:
            if path not in self.shapes:
                return replace(place, energy=None)
            shape = self.shapes[path]
            own_key = jax.random.fold_in(key, path_hash(path))
            if isinstance(place.tracker, Lora):
                return place.tracker.adapter(
                    own_key, place.kernels, self.kernels[path], shape[-1]
                )
            gram = None
            if getattr(place.tracker, "axes", None) == "gradient":
                gram = jnp.zeros((*shape[:-2], shape[-1], shape[-1]), jnp.float32)
            return replace(
                place,
                basis=place.tracker.init(own_key, shape),
                gram=gram,
                energy=None,
            )

        return map_with_paths(fill, self.places, is_leaf=is_projection)

    def __str__(self) -> str:
        lines = []
        for rule, paths in self.matches:
            name = rule.tracker if isinstance(rule.tracker, str) else rule.tracker.name
            what = FULL if rule.rank == FULL else f"rank {rule.rank}, {name}"
            lines.append(f"{rule.pattern!r} ({what})")
            lines += [f"  {path}" for path in paths]
        if self.unmatched:
            lines += ["no rule (full)", *(f"  {path}" for path in self.unmatched)]
        return "\n".join(lines)


def select(
    params: Any, declared: Any, rules: Sequence[Rule] = DEFAULT_RULES
) -> Selection:
    """Decides which of a model's declared kernels are projected.

    Args:
      params: The parameter tree; only shapes are read, so `ShapeDtypeStruct`s will do.
      declared: The `subspace` collection that `model.init` returned: only layers that
        declare themselves (`OasisDense` and its kin) can be projected.
      rules: First match wins; a kernel that none matches stays full.

    Returns:
      A `Selection`.

    Raises:
      ValueError: if a rule matched nothing (names the nearest paths), if a rank exceeds
        n_in (names the kernel and both numbers), or if kernels that share an input were
        given different ranks or trackers.

    Example:
      >>> params = {'up': {'kernel': jnp.zeros((8, 32))}}
      >>> declared = {'up': {'x': Projection(kernels=('kernel',))}}
      >>> select(params, declared, [Rule('up', rank=0.5)]).shapes
      {'up/x': (8, 4)}
    """
    shapes = {path: leaf.shape for path, leaf in flatten_paths(params).items()}
    matched: dict[int, list[str]] = {i: [] for i in range(len(rules))}
    unmatched: list[str] = []
    candidates: dict[bool, list[str]] = {False: [], True: []}  # kernels, inputs
    basis_shapes: dict[str, tuple[int, ...]] = {}

    kernel_shapes: dict[str, tuple[tuple[int, ...], ...]] = {}

    def rule_for(name: str, inputs: bool) -> Rule | None:
        """The rule that decides a kernel, or an input, of that path."""
        candidates[inputs].append(name)
        for i, rule in enumerate(rules):
            if rule.inputs == inputs and re.search(rule.pattern, name):
                matched[i].append(name)
                return rule
        if not inputs:
            unmatched.append(name)
        return None

    def rank_of(rule: Rule, name: str, n_in: int) -> int | None:
        rank = rule.columns(n_in)
        if rank is not None:
            try:
                _resolved(rule.tracker).check(n_in, rank)
            except ValueError as error:
                raise ValueError(
                    f"{name}: rule {rule.pattern!r} asks for {error}"
                ) from None
        return rank

    def decide(path: str, place: Projection) -> Projection:
        if place.features:
            return decide_input(path, place)
        chosen: dict[str, Rule] = {}
        kernels = []
        for name, kernel in zip(place.kernels, kernel_paths(path, place), strict=True):
            rule = rule_for(kernel, inputs=False)
            if rule is None:
                continue
            *batch, n_in, _ = shapes[kernel]
            rank = rank_of(rule, kernel, n_in)
            if rank is None:
                continue
            chosen[name] = rule
            kernels.append(shapes[kernel])
            basis_shapes[path] = (*batch, n_in, rank)
        if not chosen:
            return place
        first, *others = {replace(rule, pattern="") for rule in chosen.values()}
        if others:
            raise ValueError(
                f"{path}: the kernels {', '.join(chosen)} share one input and so one"
                f" basis, but rules {[r.pattern for r in chosen.values()]} give them"
                " different ranks, trackers or strides"
            )
        kernel_shapes[path] = tuple(kernels)
        return replace(
            place,
            kernels=tuple(chosen),
            tracker=_resolved(first.tracker),
            stride=first.stride,
            gradient=first.gradient,
        )

    def decide_input(path: str, place: Projection) -> Projection:
        rule = rule_for(path, inputs=True)
        rank = None if rule is None else rank_of(rule, path, place.features)
        if rule is None or rank is None:
            return place
        basis_shapes[path] = (*place.energy.shape, place.features, rank)
        return replace(
            place,
            tracker=_resolved(rule.tracker),
            stride=rule.stride,
            gradient=FULL_SIZE,
        )

    places = map_with_paths(decide, declared, is_leaf=is_projection)
    for index, rule in enumerate(rules):
        if not matched[index] and not any(
            re.search(rule.pattern, name) for name in candidates[rule.inputs]
        ):
            raise ValueError(_nothing(rule, candidates[rule.inputs]))
        if not matched[index]:
            raise ValueError(
                f"rule {rule.pattern!r} decides nothing: earlier rules match all that"
                " it matches"
            )
    return Selection(
        places,
        basis_shapes,
        kernel_shapes,
        tuple((rule, tuple(matched[i])) for i, rule in enumerate(rules)),
        tuple(unmatched),
    )


def _resolved(tracker: Tracker | str) -> Tracker:
    return _TRACKERS[tracker]() if isinstance(tracker, str) else tracker


def _nothing(rule: Rule, candidates: list[str]) -> str:
    what = "input" if rule.inputs else "kernel"
    if not candidates:
        return (
            f"rule {rule.pattern!r} matches nothing: the model declares no projectable"
            " norm or activation"
            if rule.inputs
            else f"rule {rule.pattern!r} matches nothing: the model declares no"
            " projectable layer (OasisDense, shared_dense, OasisLinear)"
        )
    near = difflib.get_close_matches(rule.pattern, candidates, n=3, cutoff=0.0)
    return f"rule {rule.pattern!r} matches no {what}; the nearest are {', '.join(near)}"
