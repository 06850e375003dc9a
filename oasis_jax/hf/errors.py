"""What is wrong with a folder, in one line, whatever a stranger has put into it."""

from collections.abc import Sequence
from typing import Any

_SHOWN = 8
_LONGEST = 2_000


class HfError(ValueError):
    """A folder of Hugging Face's that is not what it should be, or cannot be written.

    The message is one line of bounded length: what a file brings into it, such as the
    name of a tensor, is written out where it cannot be printed.

    Example:
      >>> print(HfError("no tensor a\\nb"))
      no tensor a\\nb
    """

    def __init__(self, message: str):
        super().__init__(_one_line(message))


def shown(value: Any) -> str:
    """A value of a file as a message has it, cut if it is long.

    Example:
      >>> shown("a" * 200)[-9:]
      'aaaaa ...'
    """
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]} ..."


def some(found: Sequence[str]) -> str:
    """The first of them, and how many more there are.

    Example:
      >>> some([str(i) for i in range(10)])
      '0, 1, 2, 3, 4, 5, 6, 7 and 2 more'
    """
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(found[:_SHOWN]) + more


def _one_line(text: str) -> str:
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )
