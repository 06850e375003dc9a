"""What the safetensors of a folder hold: known by their headers, read a tensor at a time.

Nothing here unpickles. That a header fits its file is seen to by safetensors: no two
tensors overlap, none goes beyond the end.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from oasis_jax.errors import first_line
from oasis_jax.hf.errors import HfError, some
from oasis_jax.hf.families import Family
from oasis_jax.hf.folders import weight_files

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
"""Of weights, by the name that safetensors has for them."""

_CHUNK = 1 << 20  # numbers looked at at once

# Where all bits of the exponent are set, a number is infinite or none.
_EXPONENT = {"float32": 0x7F80_0000, "float16": 0x7C00, "bfloat16": 0x7F80}


class Stored(NamedTuple):
    """A tensor in a file that is open.

    Attributes:
      file: As safetensors opens it.
      where, name: The file's name, and the tensor's in it.
      shape, dtype: Of the tensor; a key of `DTYPES`, if it is a weight.
    """

    file: Any
    where: str
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> np.ndarray:
        """The tensor, in memory."""
        return self.file.get_tensor(self.name)


def stored_tensors(folder: Path, family: Family, files: ExitStack) -> dict[str, Stored]:
    """All tensors of a folder by plain name; `files` closes what is opened."""
    found: dict[str, list[Stored]] = {}
    for where, path in weight_files(folder).items():
        file = files.enter_context(_opened(folder / where, path))
        for name in file.keys():  # noqa: SIM118 (it is no dict)
            part = file.get_slice(name)
            shape = tuple(part.get_shape())
            tensor = Stored(file, where, name, shape, part.get_dtype())
            found.setdefault(family.plain(name), []).append(tensor)
    twice = [
        " and ".join(f"{t.name} in {t.where}" for t in tensors)
        for tensors in found.values()
        if len(tensors) > 1
    ]
    if twice:
        raise HfError(f"{folder}: {count('stored twice', twice)}")
    return {name: tensors[0] for name, tensors in found.items()}


def not_finite(values: np.ndarray) -> int:
    """How many of the numbers are infinite or none; of one of `DTYPES`, contiguous.

    Example:
      >>> not_finite(np.array([1, np.nan, -np.inf], np.float16))
      2
    """
    mask = _EXPONENT[values.dtype.name]
    bits = values.reshape(-1).view(f"uint{8 * values.dtype.itemsize}")
    chunks = (bits[i : i + _CHUNK] & mask for i in range(0, bits.size, _CHUNK))
    return sum(int(np.count_nonzero(chunk == mask)) for chunk in chunks)


def differ(one: Stored, other: Stored) -> bool:
    """Whether two tensors are not the same numbers."""
    if one.shape != other.shape or not {one.dtype, other.dtype} <= DTYPES.keys():
        return True
    rows = max(1, _CHUNK // max(1, int(np.prod(one.shape[1:]))))
    parts = [tensor.file.get_slice(tensor.name) for tensor in (one, other)]
    for start in range(0, one.shape[0], rows):
        stop = min(start + rows, one.shape[0])
        here, there = (part[start:stop].astype(np.float32) for part in parts)
        if not np.array_equal(here, there, equal_nan=True):
            return True
    return False


def count(what: str, found: list[str]) -> str:
    """How many tensors something is said of, and the first of them."""
    return f"{len(found)} tensor{'s' * (len(found) > 1)} {what}: {some(found)}"


def _opened(file: Path, path: Path) -> Any:
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
        raise HfError(f"{file}: is damaged or cut short ({reason})") from error
