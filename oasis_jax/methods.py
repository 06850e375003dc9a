"""The table of methods: every one is a row of shared parts.

What is saved, what the basis follows, what happens to the moments, what form the weight
gradient has. A new method is a new row, and at most one new part.

    recipe = method("velora", groups=16)
    state = OasisTrainState.create(..., tx=recipe.optimizer(3e-3), rules=recipe.rules)
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import optax
from optax import contrib

from oasis_jax.gradient.side import galore, ldadam, osd
from oasis_jax.leaves import is_matrix, per_leaf, scale_matching, unstacked
from oasis_jax.lora import Lora
from oasis_jax.optimizer import (
    adam_in_coordinates,
    decay_weights,
    lift_updates,
    oasis_adam,
)
from oasis_jax.paths import map_with_paths
from oasis_jax.proximal import proximal
from oasis_jax.select import Rule
from oasis_jax.trackers import (
    BlockMean,
    Complement,
    Fixed,
    Oja,
    Random,
    Svd,
    Tracker,
)

Rank = float | int

LINEAR = "attn/|mlp/"
"""What the C4 benchmark projects: every kernel of a transformer's blocks."""


class Recipe(NamedTuple):
    """A method with all its options settled.

    Attributes:
      rules: For `OasisTrainState.create`, which the optimizer is for, too.
      optimizer: `optimizer(learning_rate, peak=None, b1=..., b2=..., weight_decay=...)`;
        `peak` is a schedule's largest value, for those that need it. What is not given
        is the method's own default.
    """

    rules: tuple[Rule, ...]
    optimizer: Callable[..., optax.GradientTransformation]


@dataclass(frozen=True)
class Method:
    """One row.

    Attributes:
      about: What distinguishes it, in a few words.
      paper: Where it was published.
      saves: What a projected kernel's layer keeps of its input X.
      basis: What the basis follows.
      moved: When it moves.
      moments: What happens to Adam's moments then.
      gradient: Form of the weight gradient that the optimizer sees.
      build: `build(settings) -> Recipe`, where the settings are `pattern`, `rank`,
        `stride` and the options.
      state: `state(n_in, n_out, r)`: numbers kept by the optimizer per kernel, where r
        is the rank on the side that is projected.
      held: `held(n_in, n_out, r)`: numbers kept beside weights and optimizer, a basis
        per input, or an adapter per kernel.
      rank: Default, of n_in (of the smaller side where the gradient is projected).
      pattern: Which kernels, by default.
      options: Its own options, with the published defaults.
      rate: A learning rate that suits it, in units of AdamW's.
      ablation: Whether it exists only to tell what a part of another is worth.
    """

    about: str
    paper: str
    saves: str
    basis: str
    moved: str
    moments: str
    gradient: str
    build: Callable[[SimpleNamespace], Recipe]
    state: Callable[[int, int, int], float]
    held: Callable[[int, int, int], float] = lambda n_in, n_out, r: 0
    rank: Rank | None = 0.25
    pattern: str = LINEAR
    options: Mapping[str, Any] = field(default_factory=dict)
    rate: float = 1.0
    ablation: bool = False

    @property
    def projected(self) -> bool:
        """Whether a rank means anything to it."""
        return self.rank is not None

    def bytes_per_parameter(self, n: int = 1024) -> float:
        """What the optimizer and the basis keep per weight of a square n x n kernel."""
        r = round((self.rank or 0) * n)
        return 4 * (self.state(n, n, r) + self.held(n, n, r)) / n**2


def _adam_state(n_in: int, n_out: int, r: int) -> float:
    return 2 * r * n_out


def _full_state(n_in: int, n_out: int, r: int) -> float:
    return 2 * n_in * n_out


def _basis(n_in: int, n_out: int, r: int) -> float:
    return n_in * r


def _with(factory: Callable, **own: Any) -> Callable[..., Any]:
    """A factory of optimizers that ignores `peak`, with a method's own arguments."""
    return lambda learning_rate, peak=None, **adam: factory(learning_rate, **own | adam)


def _adamw(learning_rate: Any, b1=0.9, b2=0.999, weight_decay=0.0) -> Any:
    """`optax.adamw` with float32 moments, also of weights in bfloat16."""
    return oasis_adam(learning_rate, b1, b2, weight_decay=weight_decay)


# Lifted into the weights: of the product P D, one layer's exists at a time. On a CPU the
# compiled peak is smaller than with full-size updates, on a GPU it is the same.
_in_place = partial(oasis_adam, in_place=True)


def _plain(factory: Callable) -> Callable[[SimpleNamespace], Recipe]:
    return lambda s: Recipe((), _with(factory))


def _oasis(
    tracker: Callable[[SimpleNamespace], Tracker], transport: str = "carry"
) -> Callable[[SimpleNamespace], Recipe]:
    def build(s: SimpleNamespace) -> Recipe:
        rule = Rule(s.pattern, s.rank, tracker(s), s.stride)
        own = dict(transport=transport, scale=s.scale)
        return Recipe((rule,), _with(_in_place, **own))

    return build


def _oasis_row(about: str, tracker: Tracker, **changes: Any) -> Method:
    """OASIS with one part changed, so that the part's effect can be told."""
    row: dict[str, Any] = dict(
        about=about,
        paper="ours",
        saves="Z = X P",
        basis="activations",
        moved="every step",
        moments="carried",
        gradient="projected",
        build=_oasis(lambda s: tracker, changes.pop("transport", "carry")),
        options=dict(scale=1.0) | changes.pop("options", {}),
        state=_adam_state,
        held=_basis,
        ablation=True,
    )
    return Method(**row | changes)


def _prac(s: SimpleNamespace) -> Recipe:
    tracker = Complement(Svd(s.interval), s.share, s.random_interval, unbiased=True)
    rules = [Rule(s.pattern, s.rank, tracker, s.stride, gradient="full")]
    if s.nonlinear:
        rules.append(Rule(".", s.nonlinear, tracker, s.stride, inputs=True))
    return Recipe(tuple(rules), _with(_adamw))


def _rso(s: SimpleNamespace) -> Recipe:
    tracker = Random(s.interval, s.kind)
    rules = (Rule(s.pattern, s.rank, tracker, s.stride),)
    if s.proximal is None:
        return Recipe(rules, _with(_in_place, transport="reset"))

    def optimizer(learning_rate, b1=0.9, b2=0.999, weight_decay=0.0):
        adam = adam_in_coordinates(b1, b2, transport="reset")
        return optax.chain(
            proximal(adam, learning_rate, s.proximal, pattern=s.pattern),
            lift_updates(in_place=True),
            decay_weights(weight_decay),
            optax.scale_by_learning_rate(learning_rate),
        )

    return Recipe(rules, _with(optimizer))


def _compact(s: SimpleNamespace) -> Recipe:
    tracker = Random(s.interval, "gaussian", stored=False, shared=s.shared)

    def optimizer(learning_rate, **adam):
        # Attention keeps its output anyway, so o_proj is not projected; but it must not
        # learn faster than what is.
        return optax.chain(
            _in_place(learning_rate, scale=s.scale, transport="keep", **adam),
            scale_matching("o_proj", s.out_scale * s.scale),
        )

    return Recipe((Rule(s.pattern, s.rank, tracker, s.stride),), _with(optimizer))


def _velora(s: SimpleNamespace) -> Recipe:
    tracker = BlockMean(s.average, s.scale)
    rank = s.rank if s.groups is None else s.groups
    rule = Rule(s.pattern, rank, tracker, s.stride, gradient="full")
    return Recipe((rule,), _with(_adamw))


def _galore(s: SimpleNamespace) -> Recipe:
    own = dict(scale=s.scale, interval=s.interval, base=s.base, pattern=s.pattern)
    return Recipe((), _with(galore, rank=s.rank, **own))


def _osd(s: SimpleNamespace) -> Recipe:
    own = dict(scale=s.scale, interval=s.interval, base=s.base, pattern=s.pattern)

    def optimizer(learning_rate, peak=None, **adam):
        return osd(learning_rate, s.rank, peak_learning_rate=peak, **own, **adam)

    return Recipe((), optimizer)


def _ldadam(s: SimpleNamespace) -> Recipe:
    own = dict(rho=s.rho, error_feedback=s.error_feedback, pattern=s.pattern)
    return Recipe((), _with(ldadam, rank=s.rank, **own))


def _lora(s: SimpleNamespace) -> Recipe:
    return Recipe((Rule(s.pattern, s.rank, Lora(s.alpha), s.stride),), _with(_adamw))


def _adafactor(learning_rate: Any, b1=None, b2=None, weight_decay=0.0) -> Any:
    del b1, b2  # it has a schedule of its own, and no first moment
    decay = weight_decay or None
    return unstacked(optax.adafactor(learning_rate, weight_decay_rate=decay))


def _muon(s: SimpleNamespace) -> Recipe:
    def dimensions(params: Any) -> Any:
        """Trailing axes are the matrix; what the pattern leaves out goes to Adam."""

        def leaf(path: str, param: Any) -> Any:
            if not (is_matrix(path, param.shape) and re.search(s.pattern, path)):
                return None
            return contrib.MuonDimensionNumbers(param.ndim - 2, param.ndim - 1)

        return map_with_paths(leaf, params)

    def optimizer(learning_rate, b1=0.9, b2=0.999, weight_decay=0.0):
        return contrib.muon(
            learning_rate,
            weight_decay=weight_decay,
            adam_b1=b1,
            adam_b2=b2,
            adam_weight_decay=weight_decay,
            muon_weight_dimension_numbers=dimensions,
            consistent_rms=0.2,  # with which AdamW's learning rates suit it
        )

    return Recipe((), _with(optimizer))


def _optax_galore(s: SimpleNamespace) -> Recipe:
    def optimizer(learning_rate, b1=0.9, b2=0.999, weight_decay=0.0):
        adam = optax.scale_by_adam(b1, b2)

        def own(path: str, shape: tuple[int, ...]) -> optax.GradientTransformation:
            if not (is_matrix(path, shape) and re.search(s.pattern, path)):
                return adam
            rank = s.rank if isinstance(s.rank, int) else round(s.rank * min(shape))
            return contrib.scale_by_galore(
                rank, s.interval, s.scale, base_optimizer=adam
            )

        # It knows matrices only, and whole ranks only.
        return optax.chain(
            unstacked(per_leaf(own)),
            optax.add_decayed_weights(weight_decay),
            optax.scale_by_learning_rate(learning_rate),
        )

    return Recipe((), _with(optimizer))


def _galore_state(n_in: int, n_out: int, r: int) -> float:
    return 2 * r * max(n_in, n_out) + r * min(n_in, n_out)


def _lora_state(n_in: int, n_out: int, r: int) -> float:
    return 2 * r * (n_in + n_out)


_GRADIENT_SIDE: dict[str, Any] = dict(
    saves="X", basis="gradient", gradient="projected after the fact"
)
_FULL: dict[str, Any] = dict(
    saves="X", basis="-", moved="-", moments="full size", gradient="full", rank=None
)

METHODS: dict[str, Method] = {
    "adamw": Method(
        about="AdamW",
        paper="1711.05101",
        build=_plain(_adamw),
        state=_full_state,
        **_FULL,
    ),
    "oasis": _oasis_row(
        "tracked axes of the activations", Oja(), paper="2604.09406", ablation=False
    ),
    "oasis-complement": _oasis_row(
        "a tracked half, and a random half of what it leaves out",
        Oja(),
        paper="ours",
        basis="activations + random",
        build=_oasis(lambda s: Complement(Oja(), s.share, s.interval, s.unbiased)),
        options=dict(share=0.5, interval=20, unbiased=False),
        ablation=False,
    ),
    "prac": Method(
        about="principal and scaled random directions: an unbiased gradient",
        paper="2602.23111",
        saves="Z1, Z2",
        basis="activations (SVD) + random",
        moved="every interval",
        moments="full size",
        gradient="full, from P C",
        build=_prac,
        state=_full_state,
        held=_basis,
        rank=0.6,
        options=dict(interval=500, random_interval=500, share=0.5, nonlinear=0.4),
    ),
    "rso": Method(
        about="a new random subspace per outer iteration, Adam from zero in each",
        paper="2502.07222",
        saves="Z = X P",
        basis="random",
        moved="every interval",
        moments="reset",
        gradient="projected",
        build=_rso,
        state=_adam_state,
        held=_basis,
        options=dict(interval=50, kind="gaussian", proximal=None),
    ),
    "compact": Method(
        about="a random basis of which only the seed is kept",
        paper="2410.15352",
        saves="Z = X P, one per kernel",
        basis="random, from a seed",
        moved="every interval",
        moments="kept",
        gradient="projected",
        build=_compact,
        state=_adam_state,
        held=lambda i, o, r: 1,
        pattern="attn/[qkv]_proj|mlp/",
        options=dict(interval=50, scale=0.25, out_scale=0.5, shared=False),
        rate=4.0,
    ),
    "velora": Method(
        about="one number per sub-token",
        paper="2405.17991",
        saves="one number per sub-token",
        basis="first batch's mean",
        moved="never",
        moments="full size",
        gradient="full, from P C",
        build=_velora,
        state=_full_state,
        held=lambda i, o, r: i / r,
        rank=0.125,
        pattern="attn/v_proj|mlp/down_proj",
        options=dict(groups=None, scale=1.0, average="once"),
    ),
    "galore": Method(
        about="the gradient's leading singular vectors, now and then",
        paper="2403.03507",
        moved="every interval",
        moments="kept",
        build=_galore,
        state=_galore_state,
        options=dict(interval=200, scale=0.25, base="adam"),
        rate=4.0,
        **_GRADIENT_SIDE,
    ),
    "osd": Method(
        about="the gradient's principal subspace by online PCA",
        paper="2408.12857",
        moved="every step",
        moments="kept",
        build=_osd,
        state=lambda i, o, r: _galore_state(i, o, r) + 2 * r * min(i, o),
        options=dict(interval=200, scale=0.25, base="adam"),
        rate=4.0,
        **_GRADIENT_SIDE,
    ),
    "ldadam": Method(
        about="power iteration on gradient and momentum, error feedback",
        paper="2410.16103",
        moved="every step",
        moments="carried",
        build=_ldadam,
        state=lambda i, o, r: _galore_state(i, o, r) + i * o,
        options=dict(rho=0.908, error_feedback=True),
        **_GRADIENT_SIDE,
    ),
    "lora": Method(
        about="frozen kernels, trained low-rank adapters",
        paper="2106.09685",
        saves="X, X A",
        basis="trained",
        moved="-",
        moments="of the adapters",
        gradient="adapters",
        build=_lora,
        state=_lora_state,
        held=lambda i, o, r: r * (i + o),
        options=dict(alpha=None),
    ),
    "adafactor": Method(
        about="Optax's Adafactor: a factored second moment, no first",
        paper="1804.04235",
        build=_plain(_adafactor),
        state=lambda i, o, r: i + o if min(i, o) >= 128 else i * o,
        rate=10.0,  # it multiplies by the weights' size
        **_FULL,
    ),
    "muon": Method(
        about="Optax's Muon: orthogonalised momentum",
        paper="jordan2024muon",
        build=_muon,
        state=lambda i, o, r: i * o,
        **_FULL,
    ),
    "optax-galore": Method(
        about="Optax's own GaLore: the larger side, moments kept",
        paper="optax.contrib",
        moved="every interval",
        moments="kept",
        build=_optax_galore,
        state=lambda i, o, r: 2 * r * min(i, o) + r * max(i, o),
        options=dict(interval=200, scale=1.0),
        **_GRADIENT_SIDE,
    ),
    # OASIS with one part changed at a time.
    "oasis-frozen": _oasis_row(
        "basis of the first batch, never moved", Fixed(), moved="never"
    ),
    "oasis-random": _oasis_row(
        "a random basis every 50 steps, moments reset",
        Random(50),
        basis="random",
        moved="every 50 steps",
        moments="reset",
        transport="reset",
    ),
    "oasis-unaligned": _oasis_row(
        "tracked, columns left where they were", Oja(axes="none")
    ),
    "oasis-gradient": _oasis_row(
        "tracked, columns on the gradient's axes",
        Oja(axes="gradient"),
        held=lambda i, o, r: i * r + r * r,
    ),
    "oasis-keep": _oasis_row(
        "tracked, moments kept as they are", Oja(), moments="kept", transport="keep"
    ),
    "oasis-reset": _oasis_row(
        "tracked, moments reset at every move",
        Oja(),
        moments="reset",
        transport="reset",
    ),
}


def row(name: str) -> Method:
    """The row of that name.

    Raises:
      ValueError: if there is none; lists those there are.
    """
    if name not in METHODS:
        raise ValueError(f"method is {name!r}, expected one of {', '.join(METHODS)}")
    return METHODS[name]


def method(
    name: str,
    *,
    pattern: str | None = None,
    rank: Rank | None = None,
    stride: int = 1,
    **options: Any,
) -> Recipe:
    """A method, ready to use.

    Args:
      name: A key of `METHODS`.
      pattern: Regular expression of the kernels' paths; the row's own if None.
      rank: As in `Rule`; the row's own if None.
      stride: As in `Rule`.
      options: The method's own; those that are None are as published.

    Raises:
      ValueError: if there is no such method, or an option is another method's (names
        those that it has).

    Example:
      >>> method("velora", groups=16).rules[0].rank
      16
    """
    chosen = row(name)
    options = {key: value for key, value in options.items() if value is not None}
    for key in options:
        if key not in chosen.options:
            known = ", ".join(chosen.options) or "none"
            others = [n for n, other in METHODS.items() if key in other.options]
            whose = f", it is one of {', '.join(others)}" if others else ""
            raise ValueError(f"{key} is no option of {name}, whose are: {known}{whose}")
    settings = SimpleNamespace(
        pattern=chosen.pattern if pattern is None else pattern,
        rank=chosen.rank if rank is None else rank,
        stride=stride,
        **dict(chosen.options) | options,
    )
    return chosen.build(settings)
