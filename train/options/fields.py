"""What an option is: its default, what it is for, what it may be, and its role."""

import dataclasses
import difflib
import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from oasis_jax.bounds import Bound
from train.errors import UserError

T = TypeVar("T", bound="Options")


class Role(enum.Enum):
    """What depends on an option."""

    STEP = "the train step, as it is compiled"
    METHOD = "the train step of those methods that read it"
    RUN = "the numbers of a run"
    LOOK = "where things lie and how often to look, no number"


def option(
    default: Any,
    about: str,
    role: Role,
    bound: Bound | None = None,
    *,
    also: Sequence[str] = (),
    **rest: Any,
) -> Any:
    """A field that is an option.

    Args:
      default: `dataclasses.MISSING` if it must be given.
      about: For `--help`.
      role: What depends on it.
      bound: What it may be, unless it is None.
      also: Other names of its flag.
      rest: As of `dataclasses.field`.
    """
    facts = {"about": about, "role": role, "bound": bound, "also": also}
    return dataclasses.field(default=default, metadata=facts, **rest)


def again(group: "type[Options]", name: str, default: Any, **facts: Any) -> Any:
    """An option of a group, for a command with another default, or other words."""
    (field,) = (f for f in dataclasses.fields(group) if f.name == name)
    return dataclasses.field(default=default, metadata={**field.metadata, **facts})


def flag(name: str) -> str:
    """As it is typed.

    >>> flag("weight_decay")
    '--weight-decay'
    """
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class Options:
    """Options of a command, or a group of them.

    Raises:
      UserError: if a value is out of its bound; it names the flag, the value, the bound.
    """

    def __post_init__(self):
        for field in dataclasses.fields(self):
            bound, value = field.metadata.get("bound"), getattr(self, field.name)
            if bound is not None and value is not None and not bound.holds(value):
                shown = repr(value) if isinstance(value, str) else value
                raise UserError(
                    f"{flag(field.name)} is {shown}, expected {bound.words()}"
                )

    def as_dict(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return {
            name: str(value) if isinstance(value, Path) else value
            for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def of(cls: type[T], saved: Mapping[str, Any]) -> T:
        """The options that `as_dict` made `saved` of; those that are new are at defaults.

        Raises:
          UserError: if there is one that this version does not know; names the nearest.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        for name in saved:
            if name not in known:
                raise UserError(
                    f"the saved options have {flag(name)}, which is no option here;"
                    f" {nearest(name, cls)}"
                )
        return cls(
            **{
                name: Path(value)
                if known[name].type in (Path, Path | None) and value
                else value
                for name, value in saved.items()
            }
        )


def nearest(name: str, kind: "type[Options] | Options") -> str:
    """Which option somebody may have meant, by its name or by what it is about.

    >>> from train.options import Pretrain
    >>> nearest("learning_rate", Pretrain), nearest("batch_size", Pretrain)
    ('the nearest is --lr', 'the nearest is --batch')
    """
    words = name.replace("-", " ").replace("_", " ").lower()

    def likeness(field: dataclasses.Field) -> float:
        known = (field.name.replace("_", " "), field.metadata["about"].lower())
        return max(difflib.SequenceMatcher(None, words, one).ratio() for one in known)

    closest = max(dataclasses.fields(kind), key=likeness)
    return f"the nearest is {flag(closest.name)}"


def of_role(options: type[Options] | Options, *roles: Role) -> list[str]:
    """The names of options that have one of these roles."""
    return [
        field.name
        for field in dataclasses.fields(options)
        if field.metadata.get("role") in roles
    ]


def differences(saved: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    """Which options were saved with another value than they have now, and both."""

    def shown(value: Any) -> Any:
        return "not given" if value is None else value

    return "; ".join(
        f"{flag(name)} was {shown(saved[name])} and is {shown(value)}"
        for name, value in mine.items()
        if name in saved and saved[name] != value
    )
