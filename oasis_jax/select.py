"""Which kernels are projected, with which rank, and a report of what each rule matched."""

import difflib
import math
import re
from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from oasis_jax.layout import Layout, kernel_paths
from oasis_jax.lora import Adapter, Lora
from oasis_jax.paths import Outline, flatten_paths, path_hash
from oasis_jax.subspace import (
    COORDINATES,
    FULL_SIZE,
    Place,
    Projection,
    Site,
    is_site,
)
from oasis_jax.trackers import TRACKERS, Tracker

FULL = "full"
# A view: a tracker that is added to the table is known here.
_TRACKERS: Mapping[str, type[Any]] = ChainMap(TRACKERS, {Lora.name: Lora})


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
class Candidate:
    """A kernel, or an input of a norm or an activation function, that a rule may choose.

    Attributes:
      path: Which rules are matched with.
      name: Of the kernel, as the place has it; empty for an input.
      shape: Of the kernel, (..., n_in, n_out), or of one token of the input, (..., n_in).
      match: Position of the first rule that matches.
      rule: That rule.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    match: int | None
    rule: Rule | None

    @property
    def inputs(self) -> bool:
        """Whether it is an input."""
        return not self.name

    def basis_shape(self) -> tuple[int, ...] | None:
        """(..., n_in, r); None where the rule, or its absence, leaves it full.

        Raises:
          ValueError: if the tracker has no such basis; names the path and the rule.
        """
        *batch, n_in = self.shape if self.inputs else self.shape[:-1]
        rank = None if self.rule is None else self.rule.columns(n_in)
        if self.rule is None or rank is None:
            return None
        try:
            _resolved(self.rule.tracker).check(n_in, rank)
        except ValueError as error:
            raise ValueError(
                f"{self.path}: rule {self.rule.pattern!r} asks for {error}"
            ) from None
        return (*batch, n_in, rank)


@dataclass(frozen=True)
class Selection:
    """What was decided; `print` it for the report, `init` it for the bases.

    Attributes:
      sites: Outline of the declared tree.
      places: What was decided about each of its sites, in order.
      shapes: Shape of the basis (of LoRA's A) by site.
      kernels: Shapes of the kernels by site.
      matches: The kernel paths that each rule decided, in the rules' order.
      unmatched: Kernels that no rule matched; they stay full.
    """

    sites: Outline
    places: tuple[Place, ...]
    shapes: dict[str, tuple[int, ...]]
    kernels: dict[str, tuple[tuple[int, ...], ...]]
    matches: tuple[tuple[Rule, tuple[str, ...]], ...]
    unmatched: tuple[str, ...]

    def layout(self, params: Any) -> Layout:
        """The plan of a state with these parameters."""
        return Layout(Outline.of(params), self.sites, self.places)

    def init(self, key: jax.Array) -> dict[str, Projection | Adapter]:
        """First bases, and adapters, by site."""
        places = dict(zip(self.sites.paths, self.places, strict=True))
        return {
            path: self._first(
                path, places[path], jax.random.fold_in(key, path_hash(path))
            )
            for path in self.shapes
        }

    def _first(self, path: str, place: Place, key: jax.Array) -> Projection | Adapter:
        shape, tracker = self.shapes[path], place.tracker
        assert tracker is not None
        if isinstance(tracker, Lora):
            return tracker.adapter(key, place, self.kernels[path], shape[-1])
        gram = None
        if getattr(tracker, "axes", None) == "gradient":
            gram = jnp.zeros((*shape[:-2], shape[-1], shape[-1]), jnp.float32)
        return Projection(place, tracker.init(key, shape), gram)

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
      >>> from oasis_jax import Declaration
      >>> params = {'up': {'kernel': jnp.zeros((8, 32))}}
      >>> declared = {'up': {'x': Declaration(Place(kernels=('kernel',)))}}
      >>> select(params, declared, [Rule('up', rank=0.5)]).shapes
      {'up/x': (8, 4)}
    """
    weights = {path: leaf.shape for path, leaf in flatten_paths(params).items()}
    sites = flatten_paths(declared, is_leaf=is_site)
    candidates = {
        path: tuple(_candidates(path, site, weights, rules))
        for path, site in sites.items()
    }
    chosen = {
        path: tuple((c, shape) for c in own if (shape := c.basis_shape()) is not None)
        for path, own in candidates.items()
    }
    places = tuple(
        _decided(path, site.place, [c for c, _ in chosen[path]])
        for path, site in sites.items()
    )
    everything = [c for own in candidates.values() for c in own]
    matches = tuple(
        (rule, tuple(c.path for c in everything if c.match == position))
        for position, rule in enumerate(rules)
    )
    _check_matches(matches, everything)
    return Selection(
        sites=Outline.of(declared, is_leaf=is_site),
        places=places,
        shapes={path: own[-1][1] for path, own in chosen.items() if own},
        kernels={
            path: tuple(c.shape for c, _ in own if not c.inputs)
            for path, own in chosen.items()
            if own
        },
        matches=matches,
        unmatched=tuple(c.path for c in everything if c.rule is None and not c.inputs),
    )


def _candidates(
    path: str,
    site: Site,
    shapes: Mapping[str, tuple[int, ...]],
    rules: Sequence[Rule],
) -> Iterable[Candidate]:
    """What is declared at a site, each with the first rule that matches."""
    for name, kernel in zip(site.kernels, kernel_paths(path, site.place), strict=True):
        match = _first_match(rules, kernel, inputs=False)
        yield Candidate(kernel, name, shapes[kernel], *match)
    token = getattr(site, "token", None)
    if token is not None:
        match = _first_match(rules, path, inputs=True)
        yield Candidate(path, "", token.shape, *match)


def _first_match(
    rules: Sequence[Rule], path: str, inputs: bool
) -> tuple[int | None, Rule | None]:
    for position, rule in enumerate(rules):
        if rule.inputs == inputs and re.search(rule.pattern, path):
            return position, rule
    return None, None


def _decided(path: str, declared: Place, chosen: Sequence[Candidate]) -> Place:
    """The place with what the rules of its chosen kernels, or its input, say."""
    if not chosen:
        return Place(declared.kernels)
    given = [c.rule for c in chosen if c.rule is not None]
    first, *others = {replace(rule, pattern="") for rule in given}
    if others:
        raise ValueError(
            f"{path}: the kernels {', '.join(c.name for c in chosen)} share one input and"
            f" so one basis, but rules {[rule.pattern for rule in given]} give them"
            " different ranks, trackers or strides"
        )
    return Place(
        kernels=tuple(c.name for c in chosen if not c.inputs),
        tracker=_resolved(first.tracker),
        stride=first.stride,
        # There is no kernel whose gradient an optimizer could lift.
        gradient=FULL_SIZE if first.inputs else first.gradient,
    )


def _check_matches(
    matches: Sequence[tuple[Rule, Sequence[str]]], candidates: Sequence[Candidate]
) -> None:
    """Every rule must decide something."""
    for rule, decided in matches:
        paths = [c.path for c in candidates if c.inputs == rule.inputs]
        if not decided and not any(re.search(rule.pattern, path) for path in paths):
            raise ValueError(_nothing(rule, paths))
        if not decided:
            raise ValueError(
                f"rule {rule.pattern!r} decides nothing: earlier rules match all that"
                " it matches"
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
