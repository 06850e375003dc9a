"""The table of methods: every one is a row of shared parts.

What is saved, what the basis follows, what happens to the moments, what form the weight
gradient has. A new method is a new row, and at most one new part (`recipes.py`).

    recipe = method("velora", groups=16)
    state = OasisTrainState.create(..., tx=recipe.optimizer(3e-3), rules=recipe.rules)
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from oasis_jax import recipes
from oasis_jax.recipes import Rank, Recipe, Where
from oasis_jax.trackers import Fixed, Oja, Random, Tracker

LINEAR = "attn/|mlp/"
"""What the C4 benchmark projects: every kernel of a transformer's blocks."""


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
      build: `build(where, options) -> Recipe`.
      optimizer_numbers: Of (n_in, n_out, r), where r is the rank on the side that is
        projected: numbers kept by the optimizer per kernel.
      basis_numbers: Likewise, numbers kept beside weights and optimizer: a basis per
        input, or an adapter per kernel.
      options: A frozen dataclass of its own options; the defaults are as published.
      rank: Default, of n_in (of the smaller side where the gradient is projected).
      pattern: Which kernels, by default.
      lr_factor: A learning rate that suits it, in units of AdamW's.
      ablation: Whether it exists only to tell what a part of another is worth.
    """

    about: str
    paper: str
    saves: str
    basis: str
    moved: str
    moments: str
    gradient: str
    build: Callable[[Where, Any], Recipe]
    optimizer_numbers: Callable[[int, int, int], float]
    basis_numbers: Callable[[int, int, int], float] = lambda n_in, n_out, r: 0
    options: type[Any] = recipes.NoOptions
    rank: Rank | None = 0.25
    pattern: str = LINEAR
    lr_factor: float = 1.0
    ablation: bool = False

    @property
    def projected(self) -> bool:
        """Whether a rank means anything to it."""
        return self.rank is not None

    @property
    def published(self) -> dict[str, Any]:
        """Its own options by name, as published."""
        return {option.name: option.default for option in fields(self.options)}

    def bytes_per_parameter(self, n: int = 1024) -> float:
        """What the optimizer and the basis keep per weight of a square n x n kernel."""
        r = round((self.rank or 0) * n)
        numbers = self.optimizer_numbers(n, n, r) + self.basis_numbers(n, n, r)
        return 4 * numbers / n**2


def _adam_state(n_in: int, n_out: int, r: int) -> float:
    return 2 * r * n_out


def _full_state(n_in: int, n_out: int, r: int) -> float:
    return 2 * n_in * n_out


def _basis(n_in: int, n_out: int, r: int) -> float:
    return n_in * r


def _galore_state(n_in: int, n_out: int, r: int) -> float:
    return 2 * r * max(n_in, n_out) + r * min(n_in, n_out)


def _lora_state(n_in: int, n_out: int, r: int) -> float:
    return 2 * r * (n_in + n_out)


_OASIS: dict[str, Any] = dict(
    saves="Z = X P",
    basis="activations",
    moved="every step",
    moments="carried",
    gradient="projected",
    optimizer_numbers=_adam_state,
    basis_numbers=_basis,
    options=recipes.OasisOptions,
)
_GRADIENT_SIDE: dict[str, Any] = dict(
    saves="X", basis="gradient", gradient="projected after the fact"
)
_FULL: dict[str, Any] = dict(
    saves="X", basis="-", moved="-", moments="full size", gradient="full", rank=None
)


def _ablation(
    about: str, tracker: Tracker, transport: str = "carry", **words: Any
) -> Method:
    """OASIS with one part changed, so that the part's effect can be told."""
    build = recipes.tracked(tracker, transport)
    row = _OASIS | dict(about=about, paper="ours", build=build, ablation=True)
    return Method(**row | words)


_PUBLISHED: dict[str, Method] = {
    "adamw": Method(
        about="AdamW",
        paper="1711.05101",
        build=recipes.adamw,
        optimizer_numbers=_full_state,
        **_FULL,
    ),
    "oasis": Method(
        about="tracked axes of the activations",
        paper="2604.09406",
        build=recipes.tracked(Oja()),
        **_OASIS,
    ),
    "oasis-complement": Method(
        about="a tracked half, and a random half of what it leaves out",
        paper="ours",
        build=recipes.complement,
        **_OASIS
        | dict(basis="activations + random", options=recipes.ComplementOptions),
    ),
    "prac": Method(
        about="principal and scaled random directions: an unbiased gradient",
        paper="2602.23111",
        saves="Z1, Z2",
        basis="activations (SVD) + random",
        moved="every interval",
        moments="full size",
        gradient="full, from P C",
        build=recipes.prac,
        optimizer_numbers=_full_state,
        basis_numbers=_basis,
        rank=0.6,
        options=recipes.PracOptions,
    ),
    "rso": Method(
        about="a new random subspace per outer iteration, Adam from zero in each",
        paper="2502.07222",
        saves="Z = X P",
        basis="random",
        moved="every interval",
        moments="reset",
        gradient="projected",
        build=recipes.rso,
        optimizer_numbers=_adam_state,
        basis_numbers=_basis,
        options=recipes.RsoOptions,
    ),
    "compact": Method(
        about="a random basis of which only the seed is kept",
        paper="2410.15352",
        saves="Z = X P, one per kernel",
        basis="random, from a seed",
        moved="every interval",
        moments="kept",
        gradient="projected",
        build=recipes.compact,
        optimizer_numbers=_adam_state,
        basis_numbers=lambda i, o, r: 1,
        pattern="attn/[qkv]_proj|mlp/",
        options=recipes.CompactOptions,
        lr_factor=4.0,
    ),
    "velora": Method(
        about="one number per sub-token",
        paper="2405.17991",
        saves="one number per sub-token",
        basis="first batch's mean",
        moved="never",
        moments="full size",
        gradient="full, from P C",
        build=recipes.velora,
        optimizer_numbers=_full_state,
        basis_numbers=lambda i, o, r: i / r,
        rank=0.125,
        pattern="attn/v_proj|mlp/down_proj",
        options=recipes.VeloraOptions,
    ),
    "galore": Method(
        about="the gradient's leading singular vectors, now and then",
        paper="2403.03507",
        moved="every interval",
        moments="kept",
        build=recipes.galore,
        optimizer_numbers=_galore_state,
        options=recipes.GaloreOptions,
        lr_factor=4.0,
        **_GRADIENT_SIDE,
    ),
    "osd": Method(
        about="the gradient's principal subspace by online PCA",
        paper="2408.12857",
        moved="every step",
        moments="kept",
        build=recipes.osd,
        optimizer_numbers=lambda i, o, r: _galore_state(i, o, r) + 2 * r * min(i, o),
        options=recipes.GaloreOptions,
        lr_factor=4.0,
        **_GRADIENT_SIDE,
    ),
    "ldadam": Method(
        about="power iteration on gradient and momentum, error feedback",
        paper="2410.16103",
        moved="every step",
        moments="carried",
        build=recipes.ldadam,
        optimizer_numbers=lambda i, o, r: _galore_state(i, o, r) + i * o,
        options=recipes.LdadamOptions,
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
        build=recipes.lora,
        optimizer_numbers=_lora_state,
        basis_numbers=lambda i, o, r: r * (i + o),
        options=recipes.LoraOptions,
    ),
    "adafactor": Method(
        about="Optax's Adafactor: a factored second moment, no first",
        paper="1804.04235",
        build=recipes.adafactor,
        optimizer_numbers=lambda i, o, r: i + o if min(i, o) >= 128 else i * o,
        lr_factor=10.0,  # it multiplies by the weights' size
        **_FULL,
    ),
    "muon": Method(
        about="Optax's Muon: orthogonalised momentum",
        paper="jordan2024muon",
        build=recipes.muon,
        optimizer_numbers=lambda i, o, r: i * o,
        **_FULL,
    ),
    "optax-galore": Method(
        about="Optax's own GaLore: the larger side, moments kept",
        paper="optax.contrib",
        moved="every interval",
        moments="kept",
        build=recipes.optax_galore,
        optimizer_numbers=lambda i, o, r: 2 * r * min(i, o) + r * max(i, o),
        options=recipes.OptaxGaloreOptions,
        **_GRADIENT_SIDE,
    ),
}

# OASIS with one part changed at a time.
_ABLATIONS: dict[str, Method] = {
    "oasis-frozen": _ablation(
        "basis of the first batch, never moved", Fixed(), moved="never"
    ),
    "oasis-random": _ablation(
        "a random basis every 50 steps, moments reset",
        Random(50),
        "reset",
        basis="random",
        moved="every 50 steps",
        moments="reset",
    ),
    "oasis-unaligned": _ablation(
        "tracked, columns left where they were", Oja(axes="none")
    ),
    "oasis-gradient": _ablation(
        "tracked, columns on the gradient's axes",
        Oja(axes="gradient"),
        basis_numbers=lambda i, o, r: i * r + r * r,
    ),
    "oasis-keep": _ablation(
        "tracked, moments kept as they are", Oja(), "keep", moments="kept"
    ),
    "oasis-reset": _ablation(
        "tracked, moments reset at every move", Oja(), "reset", moments="reset"
    ),
}

METHODS = _PUBLISHED | _ABLATIONS


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
    given = {key: value for key, value in options.items() if value is not None}
    for key in given:
        if key not in chosen.published:
            known = ", ".join(chosen.published) or "none"
            others = [n for n, other in METHODS.items() if key in other.published]
            whose = f", it is one of {', '.join(others)}" if others else ""
            raise ValueError(f"{key} is no option of {name}, whose are: {known}{whose}")
    where = Where(
        chosen.pattern if pattern is None else pattern,
        chosen.rank if rank is None else rank,
        stride,
    )
    return chosen.build(where, chosen.options(**given))
