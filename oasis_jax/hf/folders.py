"""The files of a folder, and one sentence for each way in which they can be wrong.

A folder comes from anywhere, so all of its files are found by `inside`: none lies
elsewhere, is larger than its kind may be, or is anything but a file.
"""

import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path, PureWindowsPath
from typing import Any, TypeVar

from oasis_jax.errors import first_line
from oasis_jax.hf.errors import HfError, shown, some
from oasis_jax.hf.families import Family, family_from

T = TypeVar("T")
CONFIG = "config.json"
GENERATION = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# What the folder of a model has besides its weights and the two configs.
_TEXTS = """tokenizer* special_tokens_map.json added_tokens.json vocab.* merges.txt
chat_template* *.model""".split()

_SMALL_JSON = {
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
}

# Those of the largest models have a hundredth of it.
_MOST_BYTES = {CONFIG: 1 << 24, GENERATION: 1 << 20, INDEX: 1 << 26}
_MOST_OF_OTHERS = 1 << 28
_DEEPEST = 50  # objects in objects


def resolve(folder: str | os.PathLike) -> Path:
    """The folder of that name, or one with the snapshot of a model of the hub.

    Needs the package huggingface_hub where it is not a folder.

    Raises:
      HfError: if it is no folder, and cannot be fetched.
    """
    path = Path(folder)
    if path.is_dir():
        return path
    absent = f"{folder}: there is no such folder"
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", str(folder)):
        raise HfError(absent)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise HfError(
            f"{absent}, and fetching a model of that name needs the package "
            "huggingface_hub"
        ) from None
    # Some have all weights a second time, in a file of another name.
    wanted = ["*.json", "model*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(str(folder), allow_patterns=wanted))
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise HfError(f"{absent}, and no model of the hub ({reason})") from error


def inside(folder: Path, name: str) -> Path | None:
    """Where a file of a folder lies, links followed; None if there is none.

    A snapshot in the cache of the hub consists of links to the cache's blobs, which
    count as the folder's own.

    Raises:
      HfError: if the name or a link leads out of the folder, if it is no file, or if it
        has more bytes than are read of its kind.
    """
    windows = PureWindowsPath(name)
    if (
        not name
        or not name.isprintable()
        or name.startswith("/")
        or "\\" in name
        or windows.drive
        or ".." in windows.parts
    ):
        raise HfError(
            f"{folder}: the file {shown(name)} would lie outside of the folder"
        )
    path = folder / name
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(root) for root in _roots(folder)):
        raise HfError(f"{path}: is a link to {real}, outside of the folder")
    try:
        about = real.stat()
    except FileNotFoundError:
        return None
    except OSError as error:  # links in a circle, a name that is too long
        raise HfError(f"{path}: cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(about.st_mode):
        raise HfError(f"{path}: is no file")
    most = _MOST_BYTES.get(name, _MOST_OF_OTHERS)
    if not name.endswith(".safetensors") and about.st_size > most:
        raise HfError(
            f"{path}: has {about.st_size:,} bytes, and at most {most:,} are read of such"
            " a file"
        )
    return real


def _roots(folder: Path) -> Iterator[Path]:
    """Folders in which a folder's files may lie."""
    real = Path(os.path.realpath(folder))
    yield real
    repository = real.parent.parent
    if real.parent.name == "snapshots" and repository.name.startswith("models--"):
        yield repository / "blobs"
        yield repository.parent / "blobs"  # which repositories share


def stored_config(folder: Path) -> tuple[Family, dict[str, Any]]:
    """The fields of `config.json`, and the family it belongs to."""
    stored = read_json(folder, CONFIG)
    if stored is None:
        raise HfError(f"{folder}: has no {CONFIG}")
    return told(folder, lambda: family_from(stored)), stored


def texts(folder: str | os.PathLike) -> dict[str, Path]:
    """What a model's folder has besides weights and configs, its tokenizer above all.

    Returns:
      Where the files lie, links followed, by name.

    Raises:
      HfError: as `inside` does, of any of them, or if one is JSON in its name only.
    """
    folder = Path(folder)
    names = {file.name for pattern in _TEXTS for file in folder.glob(pattern)}
    found = {
        name: inside(folder, name)
        for name in sorted(names)
        if not (folder / name).is_dir()
    }
    for name in found.keys() & _SMALL_JSON:
        read_json(folder, name)
    return {name: path for name, path in found.items() if path is not None}


def weight_files(folder: Path) -> dict[str, Path]:
    """The file of all weights, or all shards of the index: where they lie, by name."""
    if (path := inside(folder, WEIGHTS)) is not None:
        return {WEIGHTS: path}
    if (index := read_json(folder, INDEX)) is not None:
        shards = index.get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise HfError(f"{folder / INDEX}: has no weight_map")
        names = {
            name if isinstance(name, str) else shown(name) for name in shards.values()
        }
        if others := sorted(n for n in names if not n.endswith(".safetensors")):
            raise HfError(
                f"{folder / INDEX}: names {some(others)}, and only .safetensors are read"
            )
        found = {name: inside(folder, name) for name in sorted(names)}
        if absent := [name for name, path in found.items() if path is None]:
            raise HfError(f"{folder}: {INDEX} names {some(absent)}, absent here")
        return {name: path for name, path in found.items() if path is not None}
    if others := sorted(path.name for path in folder.glob("*.bin")):
        raise HfError(
            f"{folder}: has {others[0]} and no {WEIGHTS}; only safetensors are read, so "
            "convert it with save_pretrained of transformers"
        )
    raise HfError(f"{folder}: has no {WEIGHTS}")


def read_json(folder: Path, name: str) -> dict[str, Any] | None:
    """The object in a JSON file of a folder; None if there is no such file."""
    path, file = inside(folder, name), folder / name
    if path is None:
        return None
    try:
        found = json.loads(
            path.read_text(encoding="utf-8-sig"),
            parse_constant=_finite,
            parse_float=_finite,
        )
    except ValueError as error:
        raise HfError(f"{file}: is no JSON ({first_line(error)})") from error
    except OSError as error:
        raise HfError(f"{file}: cannot be read ({error.strerror})") from error
    except RecursionError:
        raise HfError(f"{file}: is nested more than {_DEEPEST} deep") from None
    if not _is_shallow(found):
        raise HfError(f"{file}: is nested more than {_DEEPEST} deep")
    if not isinstance(found, dict):
        raise HfError(f"{file}: is no JSON object")
    return found


def _finite(word: str) -> float:
    number = float(word)
    if abs(number) == float("inf") or number != number:
        raise ValueError(f"the number {word[:20]} is not finite")
    return number


def _is_shallow(value: Any) -> bool:
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            part
            for node in level
            if isinstance(node, dict | list)
            for part in (node.values() if isinstance(node, dict) else node)
        ]
    return not level


def told(folder: Path, function: Callable[[], T]) -> T:
    """What the function gives; its errors say which folder it is about."""
    try:
        return function()
    except ValueError as error:
        raise HfError(f"{folder}: {error}") from error
