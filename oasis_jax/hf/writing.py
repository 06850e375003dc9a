"""A config and parameters to a folder that transformers opens."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from oasis_jax.hf.errors import HfError, some
from oasis_jax.hf.families import (
    FAMILIES,
    Config,
    Family,
    Place,
    family_of,
    labels_of,
)
from oasis_jax.hf.fields import is_token
from oasis_jax.hf.fields import label_names as names_of
from oasis_jax.hf.folders import (
    CONFIG,
    GENERATION,
    INDEX,
    WEIGHTS,
    read_json,
    resolve,
    stored_config,
    texts,
    told,
)
from oasis_jax.hf.weights import DTYPES
from oasis_jax.paths import flatten_paths

PyTree = Any

PROBLEMS = (
    "regression",
    "single_label_classification",
    "multi_label_classification",
)
"""What transformers knows a classifier to be for."""

# Said anew, or of another head, another task, another folder.
_STALE = """architectures dtype torch_dtype finetuning_task id2label label2id num_labels
problem_type task_specific_params _name_or_path""".split()


def save(
    folder: str | os.PathLike,
    config: Config,
    params: PyTree,
    *,
    family: str | None = None,
    source: str | os.PathLike | None = None,
    label_names: Sequence[str] | None = None,
    problem_type: str | None = None,
    stop_tokens: Sequence[int] | None = None,
    beside: Mapping[str, str] | None = None,
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
        fields of its `config.json` that need not change are kept, its tokenizer is
        copied, and its `generation_config.json` but for tokens that there are not.
      label_names: Of the classifier's outputs; by default the source's, or LABEL_0, ...
      problem_type: What its outputs are for, one of `PROBLEMS`; by default the source's,
        if its labels are the same.
      stop_tokens: Those that end a generated text: the `eos_token_id` of `config.json`,
        and in `generation_config.json` beside those of the source.
      beside: More files of text by name, in the place of the source's.
      max_shard_bytes: Of a file of weights, unless a single tensor is larger.

    Returns:
      The folder.

    Raises:
      HfError: if the folder has something in it, if the family cannot express the
        config, if the parameters are not those of the config, if a stop token is not in
        the vocabulary, or as `load` does, for what is kept of the source.
    """
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise HfError(f"{folder}: is there and not empty, so name another folder")
    origin = None if source is None else resolve(source)
    row, stored = _row(config, family, origin)
    about = told(folder, lambda: _about(row, config, stored, label_names, problem_type))
    tensors = _tensors(folder, row, config, params)
    dtypes = sorted({str(t.leaf.dtype) for t in tensors})
    # transformers 5 calls it 'dtype', and 4 does not know that name.
    about["torch_dtype"] = dtypes[0] if len(dtypes) == 1 else "float32"
    generation = _with_stops(folder, config, about, origin, stop_tokens)
    copied = {} if origin is None else texts(origin)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        _dump(partial / CONFIG, about)
        if generation:
            _dump(partial / GENERATION, generation)
        for name, file in copied.items():
            shutil.copyfile(file, partial / name)
        for name, text in (beside or {}).items():
            (partial / name).write_text(text, encoding="utf-8")
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


def _about(
    row: Family,
    config: Config,
    stored: Mapping[str, Any] | None,
    label_names: Sequence[str] | None,
    problem_type: str | None,
) -> dict[str, Any]:
    """The fields of `config.json`, nothing stale among them."""
    theirs = names_of(stored or {})
    about = row.fields(config, stored)
    about = {k: v for k, v in about.items() if k not in _STALE}
    about = _without_lost_tokens(about, config)
    about["model_type"] = row.model_type
    about["architectures"] = [row.architecture(config)]
    labels = labels_of(config)
    if not labels:
        return about
    if problem_type is not None and problem_type not in PROBLEMS:
        known = ", ".join(PROBLEMS)
        raise HfError(f"problem_type is {problem_type!r}, expected one of {known}")
    names = label_names
    if names is None:
        fits = len(theirs) == labels
        names = theirs if fits else [f"LABEL_{i}" for i in range(labels)]
    if len(names) != labels:
        raise HfError(f"there are {len(names)} label_names and {labels} labels")
    if stored and tuple(names) == theirs and problem_type is None:
        problem_type = stored.get("problem_type")
    if problem_type is not None:
        about["problem_type"] = problem_type
    return about | {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def _with_stops(
    folder: Path,
    config: Config,
    about: dict[str, Any],
    origin: Path | None,
    stops: Sequence[int] | None,
) -> dict[str, Any]:
    """The fields of `generation_config.json`; puts the stop tokens there and into `about`.

    transformers reads that file alone where there is one, so a new one has all tokens
    that `about` names.
    """
    stored = read_json(origin, GENERATION) if origin is not None else None
    kept = _without_lost_tokens(stored or {}, config)
    if not stops:
        return kept
    if lost := [t for t in stops if not is_token(t, config.vocab_size)]:
        raise HfError(
            f"{folder}: stop token {lost[0]} is not in the vocabulary of"
            f" {config.vocab_size}"
        )
    about["eos_token_id"] = _one_or_all(stops)
    theirs = kept.get("eos_token_id")
    theirs = theirs if isinstance(theirs, list) else [] if theirs is None else [theirs]
    if stored is None:
        others = {name: about.get(name) for name in ("bos_token_id", "pad_token_id")}
        kept = {name: token for name, token in others.items() if token is not None}
    return kept | {"eos_token_id": _one_or_all([*theirs, *stops])}


def _one_or_all(tokens: Sequence[int]) -> int | list[int]:
    distinct = [*dict.fromkeys(tokens)]
    return distinct[0] if len(distinct) == 1 else distinct


def _without_lost_tokens(fields: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Without numbers of tokens that the vocabulary does not have."""
    kept = dict(fields)
    for name in [name for name in kept if name.endswith("_token_id")]:
        value = kept[name]
        found = value if isinstance(value, list) else [value]
        known = [token for token in found if is_token(token, config.vocab_size)]
        if value is not None and known != found:
            del kept[name]
            if known:
                kept[name] = known
    return kept


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
        shutil.copymode(folder / CONFIG, folder / name)
        index |= {tensor.name: name for tensor in shard}
    if len(shards) > 1:
        size = sum(tensor.bytes for tensor in tensors)
        _dump(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": index})


def _dump(file: Path, fields: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
