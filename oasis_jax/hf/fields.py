"""Fields of a `config.json`: each is of its kind, or refused in a sentence.

An absent field and null are the same, as in transformers.
"""

from collections.abc import Mapping
from typing import Any

from oasis_jax.hf.errors import HfError, shown

Fields = Mapping[str, Any]

MOST = 2**31 - 1
"""Of a number of layers, tokens, ...: what JAX counts an axis with."""


def need(stored: Fields, name: str) -> Any:
    """A field that has no default."""
    if stored.get(name) is None:
        raise HfError(f"config.json has no {name}")
    return stored[name]


def only(stored: Fields, name: str, *allowed: Any) -> None:
    """Refuses other values; an absent field has its default, which is allowed."""
    value = stored.get(name)
    if value is not None and value not in allowed:
        words = " or ".join(repr(a) for a in allowed) or "none"
        raise HfError(
            f"config.json says {name} is {shown(value)}, supported is {words}"
        )


def whole(
    stored: Fields,
    name: str,
    default: int | None = None,
    *,
    least: int = 1,
    most: int = MOST,
) -> int:
    """A whole number; without a default it has to be there.

    Example:
      >>> whole({"heads": 4}, "heads"), whole({}, "kv_heads", 2)
      (4, 2)
    """
    value = need(stored, name) if default is None else _or(stored, name, default)
    if not _is_whole(value) or not least <= value <= most:
        raise _refused(name, value, f"a whole number from {least:,} to {most:,}")
    return value


def number(
    stored: Fields, name: str, default: float | None = None, *, zero: bool = False
) -> float:
    """A finite number that is positive, or with `zero` not negative."""
    value = need(stored, name) if default is None else _or(stored, name, default)
    good = isinstance(value, float) or _is_whole(value)
    if not good or not (0 < value <= 1e300 or (zero and value == 0)):
        raise _refused(name, value, "a number from 0" if zero else "a positive number")
    return value


def flag(stored: Fields, name: str) -> bool:
    """True or false; false where it is absent."""
    value = _or(stored, name, False)
    if not isinstance(value, bool):
        raise _refused(name, value, "true or false")
    return value


def words(stored: Fields, name: str) -> list[str]:
    """A list of texts; empty where it is absent."""
    value = _or(stored, name, [])
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise _refused(name, value, "a list of texts")
    return value


def table(stored: Fields, name: str) -> Mapping[str, Any]:
    """An object; empty where it is absent."""
    value = _or(stored, name, {})
    if not isinstance(value, dict):
        raise _refused(name, value, "an object")
    return value


def label_names(stored: Fields) -> tuple[str, ...]:
    """Names of labels in the order of their numbers, of `id2label`; () without one.

    Example:
      >>> label_names({"id2label": {"1": "bad", "0": "good"}})
      ('good', 'bad')
    """
    named = table(stored, "id2label")
    ids = [str(i) for i in range(len(named))]
    if named.keys() != set(ids):
        raise HfError(
            f"config.json says id2label has the keys {shown(sorted(named))}, expected"
            f" the numbers from 0 to {len(named) - 1}"
        )
    if wrong := [v for v in named.values() if not isinstance(v, str | int | float)]:
        raise HfError(f"config.json has {shown(wrong[0])} in id2label, expected a text")
    return tuple(str(named[i]) for i in ids)


def is_token(value: Any, vocabulary: int) -> bool:
    """Whether it is the number of a token."""
    return _is_whole(value) and 0 <= value < vocabulary


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _or(stored: Fields, name: str, default: Any) -> Any:
    value = stored.get(name)
    return default if value is None else value


def _refused(name: str, value: Any, expected: str) -> HfError:
    return HfError(f"config.json says {name} is {shown(value)}, expected {expected}")
