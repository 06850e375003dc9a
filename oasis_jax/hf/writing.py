"""A config and parameters to a folder that transformers opens."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from oasis_jax.hf.families import (
    FAMILIES,
    Config,
    Family,
    HfError,
    Place,
    family_of,
    labels_of,
)
from oasis_jax.hf.folders import DTYPES, INDEX, WEIGHTS, resolve, some, stored_config
from oasis_jax.paths import flatten_paths

PyTree = Any

# What the folder of a model has besides its weights.
_TEXTS = """tokenizer* special_tokens_map.json added_tokens.json vocab.* merges.txt
chat_template* generation_config.json *.model""".split()


def save(
    folder: str | os.PathLike,
    config: Config,
    params: PyTree,
    *,
    family: str | None = None,
    source: str | os.PathLike | None = None,
    label_names: Sequence[str] | None = None,
    max_shard_bytes: int = 5 * 2**30,
) -> Path:
    """Writes a folder that transformers opens.

    It is written beside and renamed, so what has the name is whole. No more than a
    shard is in memory at once.

    Example:
      >>> from oasis_jax.hf import load
      >>> from oasis_jax.models.llama import Llama, LlamaConfig
      >>> config = LlamaConfig(32, 16, 40, layers=2, heads=4, kv_heads=2, tied=True)
      >>> init = jax.jit(Llama(config).init)
      >>> params = init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
      >>> folder = save(tempfile.mkdtemp(), config, params)
      >>> sorted(file.name for file in folder.iterdir())
      ['config.json', 'model.safetensors']

    Args:
      folder: Absent or empty.
      config, params: As of `load`; tensors are written in the dtypes they have.
      family: One of `FAMILIES`; by default that of `source`, or the one that expresses
        the config.
      source: Folder, or name of the hub's, of the model that training began with. The
        fields of its `config.json` that need not change are kept, and its tokenizer is
        copied.
      label_names: Of the classifier's outputs; by default the source's, or LABEL_0, ...
      max_shard_bytes: Of a file of weights, unless a single tensor is larger.

    Returns:
      The folder.

    Raises:
      HfError: if the folder has something in it, if the family cannot express the
        config, or if the parameters are not those of the config.
    """
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise HfError(f"{folder}: is there and not empty, so name another folder")
    origin = None if source is None else resolve(source)
    row, stored = _row(config, family, origin)
    about = row.fields(config, stored)
    about["model_type"] = row.model_type
    about["architectures"] = [row.architecture(config)]
    about |= _label_fields(labels_of(config), label_names, about)
    tensors = _tensors(folder, row, config, params)
    dtypes = sorted({str(t.leaf.dtype) for t in tensors})
    # The name that transformers 5 gave it, 'dtype', is one that 4 does not know.
    about.pop("dtype", None)
    about["torch_dtype"] = dtypes[0] if len(dtypes) == 1 else "float32"
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        _dump(partial / "config.json", about)
        if origin is not None:
            for file in (file for p in _TEXTS for file in origin.glob(p)):
                shutil.copyfile(file, partial / file.name)
        _write(partial, tensors, max_shard_bytes)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def _row(
    config: Config, family: str | None, origin: Path | None
) -> tuple[Family, Mapping[str, Any] | None]:
    """The family to write, and the fields to keep of the source's."""
    if family is not None and family not in FAMILIES:
        raise HfError(f"family is {family!r}, expected one of {', '.join(FAMILIES)}")
    theirs, stored = stored_config(origin) if origin else (None, None)
    row = FAMILIES[family] if family else theirs or family_of(config)
    return row, stored if row is theirs else None


def _label_fields(
    labels: int, names: Sequence[str] | None, about: Mapping[str, Any]
) -> dict[str, Any]:
    if not labels:
        return {}
    if names is None:
        theirs = about.get("id2label") or {}
        kept = [theirs[i] for i in sorted(theirs, key=int)]
        fits = len(kept) == labels
        names = kept if fits else [f"LABEL_{i}" for i in range(labels)]
    if len(names) != labels:
        raise HfError(f"there are {len(names)} label_names and {labels} labels")
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


class _Tensor(NamedTuple):
    """A tensor to write: a leaf, or one layer of it."""

    name: str
    leaf: Any
    place: Place

    @property
    def bytes(self) -> int:
        return int(np.prod(self.place.shape)) * self.leaf.dtype.itemsize

    def value(self) -> np.ndarray:
        part, layer = self.leaf, self.place.layer
        if layer is not None and isinstance(part, jax.Array):
            # The layer is an operand, so one program serves all.
            part = jax.lax.dynamic_index_in_dim(part, layer, keepdims=False)
        elif layer is not None:
            part = part[layer]
        array = np.asarray(part)
        # safetensors writes bfloat16 that is not contiguous in the wrong order.
        return np.ascontiguousarray(array.T if self.place.transposed else array)


def _tensors(
    folder: Path, family: Family, config: Config, params: PyTree
) -> list[_Tensor]:
    """All that is to be written, layer after layer."""
    leaves, wanted = flatten_paths(params), family.leaves(config)
    found, expected = (
        {path: leaf.shape for path, leaf in each.items()} for each in (leaves, wanted)
    )
    wrong = [
        f"{path} is {found.get(path, 'absent')}, expected {expected.get(path, 'none')}"
        for path in sorted(found.keys() | expected.keys())
        if found.get(path) != expected.get(path)
    ]
    wrong += [
        f"{path} is {leaf.dtype}, expected one of {', '.join(map(str, DTYPES.values()))}"
        for path, leaf in leaves.items()
        if leaf.dtype not in DTYPES.values()
    ]
    if wrong:
        raise HfError(f"{folder}: these are not the config's parameters: {some(wrong)}")
    places = family.places(config, wanted)
    places.sort(key=lambda p: -1 if p.layer is None else p.layer)
    return [_Tensor(family.full(p.name, config), leaves[p.path], p) for p in places]


def _shards(tensors: Sequence[_Tensor], most: int) -> Iterator[list[_Tensor]]:
    shard: list[_Tensor] = []
    for tensor in tensors:
        if shard and sum(t.bytes for t in [*shard, tensor]) > most:
            yield shard
            shard = []
        shard.append(tensor)
    yield shard


def _write(folder: Path, tensors: Sequence[_Tensor], most: int) -> None:
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import save_file
    except ImportError:
        raise HfError(
            "writing weights needs the package safetensors: pip install oasis_jax[hf]"
        ) from None
    shards = list(_shards(tensors, most))
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = WEIGHTS
        if len(shards) > 1:
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        # transformers refuses a file without this.
        tensors_of = {t.name: t.value() for t in shard}
        try:
            save_file(tensors_of, folder / name, {"format": "pt"})
        except SafetensorError as error:  # a full disk, say
            (folder / name).unlink(missing_ok=True)
            raise HfError(f"{folder / name} cannot be written: {error}") from error
        # safetensors makes files that nobody else may read.
        shutil.copymode(folder / "config.json", folder / name)
        index |= {tensor.name: name for tensor in shard}
    if len(shards) > 1:
        size = sum(tensor.bytes for tensor in tensors)
        _dump(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": index})


def _dump(file: Path, fields: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
