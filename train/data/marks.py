"""Marks in a text that no text has itself: noncharacters of Unicode."""

OPEN, CLOSE = "\ufdd0", "\ufdd1"
"""Around what a template marks by {% generation %}."""
END = "\ufdd2"
"""Where a content ends."""

_FIRST, _LAST = "\ufdd4", "\ufdd5"
_DIGITS = [chr(0xFDE0 + digit) for digit in range(10)]
NUMBERED = f"{_FIRST}[^{_LAST}]*{_LAST}"
"""A regular expression of what `numbered` writes."""


def numbered(number: int) -> str:
    """A mark that says a number.

    >>> number_of(numbered(120))
    120
    """
    return _FIRST + "".join(_DIGITS[int(digit)] for digit in str(number)) + _LAST


def number_of(mark: str) -> int:
    """What a mark of `numbered` says."""
    return int("".join(str(_DIGITS.index(digit)) for digit in mark[1:-1]))
