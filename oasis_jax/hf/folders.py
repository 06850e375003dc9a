"""The files of a folder, and one sentence for each way in which they can be wrong."""

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np

from oasis_jax.hf.families import Family, HfError, family_from

T = TypeVar("T")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
"""Of weights, by the name that safetensors has for them."""

_SHOWN = 8


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


def stored_config(folder: Path) -> tuple[Family, dict[str, Any]]:
    """The fields of `config.json`, and the family it belongs to."""
    stored = read_json(folder / "config.json")
    return told(folder, lambda: family_from(stored)), stored


def weight_files(folder: Path) -> list[Path]:
    """The file of all weights, or all shards of the index."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        shards = read_json(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise HfError(f"{folder / INDEX}: has no weight_map")
        paths = [folder / name for name in sorted(set(shards.values()))]
        if absent := [path.name for path in paths if not path.is_file()]:
            raise HfError(f"{folder}: {INDEX} names {some(absent)}, absent here")
        return paths
    if others := sorted(path.name for path in folder.glob("*.bin")):
        raise HfError(
            f"{folder}: has {others[0]} and no {WEIGHTS}; only safetensors are read, so "
            "convert it with save_pretrained of transformers"
        )
    raise HfError(f"{folder}: has no {WEIGHTS}")


def open_weights(path: Path) -> Any:
    """A file of weights, mapped into memory; a context manager."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise HfError(
            "reading weights needs the package safetensors: pip install oasis_jax[hf]"
        ) from None
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        reason = first_line(error)
        raise HfError(f"{path}: is damaged or cut short ({reason})") from error


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise HfError(f"{file.parent}: has no {file.name}") from None
    except ValueError as error:
        raise HfError(f"{file}: is no JSON ({first_line(error)})") from error
    if not isinstance(found, dict):
        raise HfError(f"{file}: is no JSON object")
    return found


def told(folder: Path, function: Callable[[], T]) -> T:
    """What the function gives; its errors say which folder it is about."""
    try:
        return function()
    except ValueError as error:
        raise HfError(f"{folder}: {error}") from error


def some(found: Sequence[str]) -> str:
    """The first of them, and how many more there are.

    Example:
      >>> some([str(i) for i in range(10)])
      '0, 1, 2, 3, 4, 5, 6, 7 and 2 more'
    """
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(found[:_SHOWN]) + more


def first_line(error: Exception) -> str:
    """Of its message, which may run to pages."""
    return (str(error).strip() or "no details").splitlines()[0][:200]
