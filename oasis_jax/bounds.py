"""What a number may be: a test and the words for it, said once."""

import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple


class Bound(NamedTuple):
    """A test, and the words for it, when they are asked for."""

    holds: Callable[[Any], bool]
    words: Callable[[], str]


def at_least(least: int) -> Bound:
    """A number from `least`."""
    return Bound(lambda value: value >= least, lambda: f"at least {least}")


def one_of(names: Collection[str]) -> Bound:
    """One of a table's keys; a row that is added later is one, too."""

    def words() -> str:
        known = " or ".join(names) if len(names) == 2 else ", ".join(names)
        return known if len(names) == 2 else f"one of {known}"

    return Bound(lambda value: value in names, words)


# A comparison with NaN is false, so that it is within no bound.
POSITIVE = Bound(lambda v: math.isfinite(v) and v > 0, lambda: "a positive number")
NOT_NEGATIVE = Bound(
    lambda v: math.isfinite(v) and v >= 0, lambda: "a number that is not negative"
)
SHARE = Bound(lambda v: 0 <= v <= 1, lambda: "a share in [0, 1]")
DECAY = Bound(lambda v: 0 <= v < 1, lambda: "a decay in [0, 1)")


def check(name: str, value: Any, bound: Bound) -> None:
    """Refuses a number out of its bound; what is no Python number yet is let through.

    Raises:
      ValueError: names the argument, its value and the bound.

    Example:
      >>> check("b1", 1.5, DECAY)
      Traceback (most recent call last):
      ValueError: b1 is 1.5, expected a decay in [0, 1)
    """
    if isinstance(value, int | float) and not bound.holds(value):
        raise ValueError(f"{name} is {value}, expected {bound.words()}")
