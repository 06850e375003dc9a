"""Words of a command line to options, and back."""

import dataclasses
import io
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from typing import Annotated, Any, Union

import tyro
from rich.box import ROUNDED
from rich.console import Console
from rich.table import Table

from oasis_jax.methods import METHODS
from train.errors import UserError
from train.options.commands import COMMANDS
from train.options.fields import Options, Role, flag, nearest, of_role
from train.options.method import METHOD_OPTIONS, MethodOptions


def as_words(kind: type[Options], values: Mapping[str, Any]) -> list[str]:
    """What a person would type to give a command some options.

    >>> from train.options import Pretrain
    >>> as_words(Pretrain, {"lr": 1e-3, "resume": False, "rank": None})
    ['--lr=0.001', '--no-resume']
    """
    of_methods = of_role(kind, Role.METHOD)
    words = []
    for name, value in values.items():
        if isinstance(value, bool) and name not in of_methods:
            words.append(flag(name) if value else flag(f"no_{name}"))
        elif value is not None:
            words.append(f"{flag(name)}={value}")
    return words


def parse(words: Sequence[str], prog: str, about: str = "") -> tuple[str, Options]:
    """The command that is named, and its options.

    Args:
      words: As they are typed.
      prog: What is typed before them.
      about: Stands in the help of all commands together.

    Raises:
      UserError: if there is no such command or option (it names the nearest), a value
        cannot be read, or is out of its bound.
      SystemExit: after `--help`, which is printed.
    """
    command, rest = (words[0], list(words[1:])) if words else ("", [])
    kind = COMMANDS.get(command)
    if kind is None and not {"-h", "--help"} & set(words):
        said = f"{command!r} is no command" if command else "no command is given"
        raise UserError(f"{said}; there are {', '.join(COMMANDS)}")
    given: dict[str, Any] = {}
    if kind is not None:
        _check_known(command, kind, rest)
        if issubclass(kind, MethodOptions):
            rest, given = _of_methods(rest)
    # Those of the methods are shown by the method, each with all of its own.
    try:
        parsed = _run_tyro(_all_commands(), [*words[:1], *rest], prog, about)
    except SystemExit:
        if kind is not None and issubclass(kind, MethodOptions):
            _print_methods()
        raise
    assert kind is not None
    for group in vars(parsed).values():
        given |= vars(group)
    return command, kind(**given)


def _check_known(command: str, kind: type[Options], words: Sequence[str]) -> None:
    """Refuses flags that the command does not read."""
    names = ((f.name, *f.metadata.get("also", ())) for f in dataclasses.fields(kind))
    known = {name.replace("_", "-") for each in names for name in each}
    for word in words:
        name = word[2:].partition("=")[0].replace("_", "-")
        if not word.startswith("--") or name in known | {"help", ""}:
            continue
        if name.removeprefix("no-") not in known:
            near = nearest(name, kind)
            raise UserError(f"{flag(name)} is no option of {command}; {near}")


def _of_methods(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The words without the options of methods, and those. Each takes one value."""
    flags = {flag(name) for name in METHOD_OPTIONS}
    mine: list[str] = []
    others: list[str] = []
    remaining = iter(words)
    for word in remaining:
        name, equals, _ = word.partition("=")
        if name.replace("_", "-") not in flags:
            others.append(word)
            continue
        mine.append(word)
        if not equals:
            mine += [value for value in [next(remaining, None)] if value is not None]
    parsed = _run_tyro(_group(MethodOptions, METHOD_OPTIONS, MethodOptions), mine, "")
    return others, vars(parsed)


def _run_tyro(
    kind: Any, words: Sequence[str], prog: str, about: str | None = None
) -> Any:
    """What tyro makes of the words; what it complains of, in one sentence."""
    complaint = io.StringIO()
    try:
        with redirect_stderr(complaint):
            return tyro.cli(kind, args=words, prog=prog, description=about)
    except SystemExit as stop:
        if not stop.code:
            raise
    # A box: a title, what is wrong, a rule, and where to find help.
    lines = [line.strip("\u2502 ") for line in complaint.getvalue().splitlines()[1:]]
    rule = next((i for i, line in enumerate(lines) if line[:1] in "\u2500\u2570"), None)
    raise UserError(" ".join(line for line in lines[:rule] if line))


def _all_commands() -> Any:
    """Every command as tyro wants it: a group of options is a field of its own."""
    return Union[  # noqa: UP007
        tuple(
            Annotated[_grouped(kind), tyro.conf.subcommand(name)]
            for name, kind in COMMANDS.items()
        )
    ]


def _grouped(kind: type[Options]) -> Any:
    """A class with a field for each group, by who declared its options first."""
    groups: dict[type[Options], list[str]] = {}
    for field in dataclasses.fields(kind):
        if field.metadata["role"] is not Role.METHOD:
            declared = (c for c in reversed(kind.__mro__) if field.name in _own(c))
            groups.setdefault(next(declared), []).append(field.name)
    members = []
    for owner, names in groups.items():
        group: Any = Annotated[_group(kind, names, owner), tyro.conf.OmitArgPrefixes]
        members.append((owner.__name__.lower(), group))
    made = dataclasses.make_dataclass(kind.__name__, members)
    made.__doc__ = kind.__doc__
    return made


def _own(kind: type) -> dict[str, Any]:
    return vars(kind).get("__annotations__", {})


def _group(kind: type[Options], names: Sequence[str], owner: type) -> Any:
    """A class of some of a command's options, with their help."""
    members: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(kind):
        if field.name in names:
            also = [flag(name) for name in field.metadata["also"]]
            about = tyro.conf.arg(help=field.metadata["about"], aliases=also)
            default = dataclasses.field(default=field.default)
            members.append((field.name, Annotated[field.type, about], default))
    members.sort(key=lambda member: member[2].default is not dataclasses.MISSING)
    made = dataclasses.make_dataclass(owner.__name__, members)
    made.__doc__ = owner.__doc__
    return made


def _print_methods() -> None:
    """The options of every method, under its own title."""
    console = Console(file=sys.stdout, highlight=False, markup=False)
    for name, method in METHODS.items():
        if method.ablation or not method.published:
            continue
        table = Table(
            title=f"options of {name}",
            title_justify="left",
            title_style="none",
            box=ROUNDED,
            show_header=False,
            expand=True,
        )
        table.add_column(no_wrap=True)
        table.add_column(ratio=1)
        for one in dataclasses.fields(method.options):
            default = "unset" if one.default is None else one.default
            note = "; at most a tenth of --steps" if one.metadata["steps"] else ""
            about = f"{one.metadata['about']} (default: {default}{note})"
            table.add_row(flag(one.name), about)
        console.print(table)
