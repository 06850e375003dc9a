"""The options of the methods' own: one flag for all methods that have an option of a name.

They are declared where their methods are (`oasis_jax.recipes`); an option that a method is
given there is a flag of the trainer.
"""

import dataclasses
import types
import typing
from typing import TYPE_CHECKING, Any, Literal

from oasis_jax.bounds import Bound
from oasis_jax.methods import METHODS, Recipe, method, row
from train.errors import UserError
from train.options.fields import Options, Role, flag, option


def _flag_type(kind: Any) -> Any:
    """What a word on the command line becomes; the method checks what it means."""
    alternatives = [kind]
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        alternatives = [one for one in typing.get_args(kind) if one is not type(None)]
    plain = len(alternatives) == 1 and alternatives[0] in (int, float, bool)
    return alternatives[0] if plain else str


def _declared() -> list[tuple[str, Any, Any]]:
    """A field for every option that some method has; None is as published."""
    kinds: dict[str, Any] = {}
    methods: dict[str, list[str]] = {}
    bounds: dict[str, Bound | None] = {}
    for name, chosen in METHODS.items():
        hints = typing.get_type_hints(chosen.options)
        for one in dataclasses.fields(chosen.options):
            kind = _flag_type(hints[one.name])
            if kinds.setdefault(one.name, kind) is not kind:
                raise TypeError(
                    f"{one.name} of {name} is {kind.__name__}, and of"
                    f" {', '.join(methods[one.name])} {kinds[one.name].__name__}"
                )
            methods.setdefault(one.name, []).append(name)
            bounds[one.name] = one.metadata["bound"]
    return [
        (
            name,
            kind | None,
            option(None, f"Of {', '.join(methods[name])}.", Role.METHOD, bounds[name]),
        )
        for name, kind in kinds.items()
    ]


if TYPE_CHECKING:

    @dataclasses.dataclass(frozen=True)
    class MethodOptions(Options):
        """Options of the methods' own; one that is None is as published."""
else:
    MethodOptions = dataclasses.make_dataclass(
        "MethodOptions", _declared(), bases=(Options,), frozen=True
    )

METHOD_OPTIONS = tuple(field.name for field in dataclasses.fields(MethodOptions))
"""The name of every option that some method has."""


def given(options: MethodOptions) -> dict[str, Any]:
    """What is given of them."""
    values = {name: getattr(options, name) for name in METHOD_OPTIONS}
    return {name: value for name, value in values.items() if value is not None}


def only_of(name: str, options: MethodOptions) -> dict[str, Any]:
    """Of all methods' options, None for those that the method lacks."""
    published = row(name).published
    return {
        option: getattr(options, option) if option in published else None
        for option in METHOD_OPTIONS
    }


def recipe(
    name: str, options: MethodOptions, *, steps: int | None = None, **where: Any
) -> Recipe:
    """A method with its options, as the command line understands them.

    Args:
      name: A key of `METHODS`.
      options: What is not given is as published, but of what counts steps at most a
        tenth of the run's, or as --interval if that is given.
      steps: Of the run, if they are known.
      where: `pattern`, `rank`, `stride`, as of `oasis_jax.method`.

    Raises:
      UserError: if there is no such method, or an option is another method's.
    """
    try:
        chosen, values = row(name), given(options)
        kinds = typing.get_type_hints(chosen.options)
        for one in dataclasses.fields(chosen.options):
            published: Any = one.default
            if one.name in values:
                value = _meant(one.name, kinds[one.name], values[one.name])
                values[one.name] = value
            elif one.metadata["steps"] and steps is not None:
                longest = values.get("interval") or max(1, steps // 10)
                values[one.name] = min(published, longest)
        return method(name, **where, **values)
    except ValueError as error:
        raise UserError(_as_flags(str(error))) from None


def _meant(name: str, kind: Any, value: Any) -> Any:
    """A word that is none of an option's own is its number."""
    kinds = typing.get_args(kind)
    words = [w for k in kinds if typing.get_origin(k) is Literal for w in k.__args__]
    if float not in kinds or not isinstance(value, str) or value in words:
        return value
    try:
        return float(value)
    except ValueError:
        raise UserError(
            f"{flag(name)} is {value!r}, expected a number or {' or '.join(words)}"
        ) from None


def _as_flags(sentence: str) -> str:
    """The library's sentence about an option, with the option as it is typed here."""
    name, is_option, rest = sentence.partition(" is no option of ")
    return f"{flag(name)}{is_option}{rest}" if is_option else sentence
