"""How a method is built of shared parts, and the options of its own.

Every function here takes a `Where` and the method's options, a dataclass whose defaults are
as published, and returns a `Recipe`. `methods.METHODS` is the table of them.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Literal, NamedTuple

import optax
from optax import contrib

from oasis_jax.bounds import DECAY, POSITIVE, Bound, at_least, check
from oasis_jax.decay import decay_weights, with_decay
from oasis_jax.gradient import side
from oasis_jax.leaves import is_matrix, per_leaf, scale_matching, unstacked
from oasis_jax.lora import Lora
from oasis_jax.optimizer import (
    adam_in_coordinates,
    lift_updates,
    oasis_adam,
)
from oasis_jax.paths import map_with_paths
from oasis_jax.proximal import proximal
from oasis_jax.select import Rule
from oasis_jax.trackers import BlockMean, Complement, Oja, Random, Svd, Tracker

Rank = float | int


class Recipe(NamedTuple):
    """A method with all its options settled.

    Attributes:
      rules: For `OasisTrainState.create`, which the optimizer is for, too.
      optimizer: `optimizer(learning_rate, peak=None, b1=..., b2=..., weight_decay=...,
        mask=None)`; `peak` is a schedule's largest value, for those that need it. What is
        not given is the method's own default. The decay is decoupled, learning rate times
        `weight_decay` whatever the method, of the leaves in `mask`; of all if it is None.
    """

    rules: tuple[Rule, ...]
    optimizer: Callable[..., optax.GradientTransformation]


@dataclass(frozen=True)
class Where:
    """Which kernels, and how much of them.

    Attributes:
      pattern: Regular expression of the kernels' paths.
      rank: As in `Rule`; None for methods to which it means nothing.
      stride: The tracker sees every stride-th token.
    """

    pattern: str
    rank: Rank | None
    stride: int = 1

    @property
    def columns(self) -> Rank:
        """The rank, of a method that has one."""
        assert self.rank is not None
        return self.rank

    def rule(self, tracker: Tracker, rank: Rank | None = None, **changes: Any) -> Rule:
        """A rule for these kernels."""
        rank = self.columns if rank is None else rank
        return Rule(self.pattern, rank, tracker, self.stride, **changes)


def _with(factory: Callable, **own: Any) -> Callable[..., Any]:
    """A factory of optimizers that ignores `peak`, with a method's own arguments."""
    return lambda learning_rate, peak=None, **adam: factory(learning_rate, **own | adam)


# Lifted into the weights: of the product P D, one layer's exists at a time. On a CPU the
# compiled peak is smaller than with full-size updates, on a GPU it is the same.
_in_place = partial(oasis_adam, in_place=True)


def option(
    default: Any, about: str, bound: Bound | None = None, *, steps: bool = False
) -> Any:
    """A field of a method's options.

    Args:
      default: As published.
      about: One sentence.
      bound: What it may be, unless it is None; else the method's parts say.
      steps: Whether it counts steps, so that a short run wants a smaller number.
    """
    bound = at_least(1) if steps else bound
    facts = {"about": about, "bound": bound, "steps": steps}
    return field(default=default, metadata=facts)


@dataclass(frozen=True)
class NoOptions:
    """The method has no options of its own; what those of others have in common.

    Raises:
      ValueError: if one is out of its bound; names it, its value and the bound.
    """

    def __post_init__(self):
        for one in fields(self):
            if one.metadata["bound"] is not None:
                check(one.name, getattr(self, one.name), one.metadata["bound"])


# --- Full-size optimizers -----------------------------------------------------------


def _adamw(learning_rate: Any, b1=0.9, b2=0.999, weight_decay=0.0, mask=None) -> Any:
    """`optax.adamw` with float32 moments, also of weights in bfloat16."""
    return oasis_adam(learning_rate, b1, b2, weight_decay=weight_decay, mask=mask)


def adamw(where: Where, options: NoOptions) -> Recipe:
    del where, options
    return Recipe((), _with(_adamw))


def _adafactor(
    learning_rate: Any, b1=None, b2=None, weight_decay=0.0, mask=None
) -> Any:
    del b1, b2  # it has a schedule of its own, and no first moment
    tx = unstacked(optax.adafactor(learning_rate))
    # Optax's own decay is not multiplied by the learning rate.
    return with_decay(tx, learning_rate, weight_decay, mask)


def adafactor(where: Where, options: NoOptions) -> Recipe:
    del where, options
    return Recipe((), _with(_adafactor))


def muon(where: Where, options: NoOptions) -> Recipe:
    del options

    def dimensions(params: Any) -> Any:
        """Trailing axes are the matrix; what the pattern leaves out goes to Adam."""

        def leaf(path: str, param: Any) -> Any:
            if not (is_matrix(path, param.shape) and re.search(where.pattern, path)):
                return None
            return contrib.MuonDimensionNumbers(param.ndim - 2, param.ndim - 1)

        return map_with_paths(leaf, params)

    def optimizer(learning_rate, b1=0.9, b2=0.999, weight_decay=0.0, mask=None):
        tx = contrib.muon(
            learning_rate,
            adam_b1=b1,
            adam_b2=b2,
            muon_weight_dimension_numbers=dimensions,
            consistent_rms=0.2,  # with which AdamW's learning rates suit it
        )
        # The Adam in it takes no mask.
        return with_decay(tx, learning_rate, weight_decay, mask)

    return Recipe((), _with(optimizer))


# --- The activations' side ----------------------------------------------------------


@dataclass(frozen=True)
class OasisOptions(NoOptions):
    scale: float = option(1.0, "Multiplies projected updates.", POSITIVE)


def tracked(tracker: Tracker, transport: str = "carry") -> Callable[..., Recipe]:
    """OASIS's recipe with a tracker, and what happens to moments when it moves."""

    def build(where: Where, options: OasisOptions) -> Recipe:
        adam = _with(_in_place, transport=transport, scale=options.scale)
        return Recipe((where.rule(tracker),), adam)

    return build


@dataclass(frozen=True)
class ComplementOptions(OasisOptions):
    share: float = option(0.5, "How much of the rank is principal.")
    interval: int = option(20, "Steps between two random complements.", steps=True)
    unbiased: bool = option(
        False, "Scale the random part so that X P P^T is X in the mean."
    )


def complement(where: Where, options: ComplementOptions) -> Recipe:
    tracker = Complement(Oja(), options.share, options.interval, options.unbiased)
    return tracked(tracker)(where, options)


@dataclass(frozen=True)
class PracOptions(NoOptions):
    interval: int = option(500, "Steps between two bases.", steps=True)
    random_interval: int = option(
        500, "Steps between two random complements.", steps=True
    )
    share: float = option(0.5, "How much of the rank is principal.")
    nonlinear: float = option(
        0.4, "Rank of norms' and activation functions' inputs; 0 keeps them whole."
    )


def prac(where: Where, options: PracOptions) -> Recipe:
    principal = Svd(options.interval)
    random = options.random_interval
    tracker = Complement(principal, options.share, random, unbiased=True)
    rules = [where.rule(tracker, gradient="full")]
    if options.nonlinear:
        inputs = Rule(".", options.nonlinear, tracker, where.stride, inputs=True)
        rules.append(inputs)
    return Recipe(tuple(rules), _with(_adamw))


@dataclass(frozen=True)
class RsoOptions(NoOptions):
    interval: int = option(50, "Steps between two bases.", steps=True)
    kind: Literal["gaussian", "haar"] = option(
        "gaussian", "Of the random bases: gaussian or haar."
    )
    proximal: float | None = option(None, "Eta of the proximal term.")


def rso(where: Where, options: RsoOptions) -> Recipe:
    rules = (where.rule(Random(options.interval, options.kind)),)
    eta = options.proximal
    if eta is None:
        return Recipe(rules, _with(_in_place, transport="reset"))

    def optimizer(learning_rate, b1=0.9, b2=0.999, weight_decay=0.0, mask=None):
        adam = adam_in_coordinates(b1, b2, transport="reset")
        return optax.chain(
            proximal(adam, learning_rate, eta, pattern=where.pattern),
            lift_updates(in_place=True),
            decay_weights(weight_decay, mask),
            optax.scale_by_learning_rate(learning_rate),
        )

    return Recipe(rules, _with(optimizer))


@dataclass(frozen=True)
class CompactOptions(NoOptions):
    interval: int = option(50, "Steps between two bases.", steps=True)
    scale: float = option(0.25, "Multiplies projected updates.", POSITIVE)
    out_scale: float = option(
        0.5, "Multiplies o_proj's updates on top of scale.", POSITIVE
    )
    shared: bool = option(False, "One basis for all kernels of an input.")


def compact(where: Where, options: CompactOptions) -> Recipe:
    scale, shared = options.scale, options.shared
    tracker = Random(options.interval, "gaussian", stored=False, shared=shared)

    def optimizer(learning_rate, weight_decay=1e-4, mask=None, **adam):
        own: Any = dict(scale=scale, transport="keep", weight_decay=0.0)
        # Attention keeps its output anyway, so o_proj is not projected; but it must not
        # learn faster than what is. It decays as all do.
        tx = optax.chain(
            _in_place(learning_rate, **own, **adam),
            scale_matching("o_proj", options.out_scale * scale),
        )
        return with_decay(tx, learning_rate, weight_decay, mask)

    return Recipe((where.rule(tracker),), _with(optimizer))


@dataclass(frozen=True)
class VeloraOptions(NoOptions):
    groups: int | None = option(None, "Sub-tokens per token, in the place of the rank.")
    scale: float = option(1.0, "Multiplies projected gradients.", POSITIVE)
    average: float | Literal["once", "batch"] = option(
        "once", "Of batches' means: once, batch, or the decay of a running mean."
    )


def velora(where: Where, options: VeloraOptions) -> Recipe:
    tracker = BlockMean(options.average, options.scale)
    rule = where.rule(tracker, rank=options.groups, gradient="full")
    return Recipe((rule,), _with(_adamw))


@dataclass(frozen=True)
class LoraOptions(NoOptions):
    alpha: float | None = option(
        None, "The adapters are scaled by alpha / rank; by 1 unless given.", POSITIVE
    )


def lora(where: Where, options: LoraOptions) -> Recipe:
    return Recipe((where.rule(Lora(options.alpha)),), _with(_adamw))


# --- The gradient's side ------------------------------------------------------------


@dataclass(frozen=True)
class GaloreOptions(NoOptions):
    interval: int = option(200, "Steps between two bases.", steps=True)
    scale: float = option(0.25, "Multiplies projected updates.", POSITIVE)
    base: str = option("adam", "What runs in coordinates: adam, lion or adafactor.")

    def arguments(self, where: Where) -> dict[str, Any]:
        """As `oasis_jax.gradient.side` takes them."""
        return dict(vars(self), pattern=where.pattern)


def galore(where: Where, options: GaloreOptions) -> Recipe:
    own = options.arguments(where)
    return Recipe((), _with(side.galore, rank=where.columns, **own))


def osd(where: Where, options: GaloreOptions) -> Recipe:
    own = options.arguments(where)

    def optimizer(learning_rate, peak=None, **adam):
        return side.osd(
            learning_rate, where.columns, peak_learning_rate=peak, **own, **adam
        )

    return Recipe((), optimizer)


@dataclass(frozen=True)
class LdadamOptions(NoOptions):
    rho: float = option(0.908, "Weight of the momentum in the power iteration.", DECAY)
    error_feedback: bool = option(
        True, "Whether what a projection loses is added to the next gradient."
    )


def ldadam(where: Where, options: LdadamOptions) -> Recipe:
    own = dict(vars(options), pattern=where.pattern)
    return Recipe((), _with(side.ldadam, rank=where.columns, **own))


@dataclass(frozen=True)
class OptaxGaloreOptions(NoOptions):
    interval: int = option(200, "Steps between two bases.", steps=True)
    scale: float = option(1.0, "Multiplies projected updates.", POSITIVE)


def optax_galore(where: Where, options: OptaxGaloreOptions) -> Recipe:
    def optimizer(learning_rate, b1=0.9, b2=0.999, weight_decay=0.0, mask=None):
        adam = optax.scale_by_adam(b1, b2)

        def own(path: str, shape: tuple[int, ...]) -> optax.GradientTransformation:
            if not (is_matrix(path, shape) and re.search(where.pattern, path)):
                return adam
            rank = where.columns
            columns = rank if isinstance(rank, int) else round(rank * min(shape))
            return contrib.scale_by_galore(
                columns, options.interval, options.scale, base_optimizer=adam
            )

        # It knows matrices only, and whole ranks only.
        return optax.chain(
            unstacked(per_leaf(own)),
            decay_weights(weight_decay, mask),
            optax.scale_by_learning_rate(learning_rate),
        )

    return Recipe((), _with(optimizer))
