"""A folder of Hugging Face's to a config and parameters.

Weights are mapped, not read: one tensor at a time goes into the leaf, stacked over
layers, that it belongs to, and the leaf to the device before the next is begun.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from oasis_jax.hf.errors import HfError
from oasis_jax.hf.families import Config, Family, Place, labels_of, with_labels
from oasis_jax.hf.fields import label_names
from oasis_jax.hf.folders import resolve, stored_config, told
from oasis_jax.hf.weights import (
    DTYPES,
    Stored,
    count,
    differ,
    not_finite,
    stored_tensors,
)
from oasis_jax.models.llama import LlamaConfig
from oasis_jax.paths import path_hash

PyTree = Any
_STDDEV = 0.02  # of new kernels, as in BERT and RoBERTa


class Loaded(NamedTuple):
    """A model that was loaded.

    Attributes:
      config: Of `Llama` or `Bert`.
      params: Their parameters, nested dicts of arrays of `config.param_dtype`.
      fresh: Paths of those that were not stored but initialised, such as a classifier.
    """

    config: Config
    params: PyTree
    fresh: tuple[str, ...]


class Described(NamedTuple):
    """A model, as far as `config.json` and the headers of its weights say.

    Attributes:
      config: Of `Llama` or `Bert`.
      label_names: By number, as `config.json` has them; () where it names none.
      classifies: Whether a classifier of these labels is stored.
    """

    config: Config
    label_names: tuple[str, ...]
    classifies: bool


def load_config(folder: str | os.PathLike, **changes: Any) -> Config:
    """The config of a folder, with some of its fields changed.

    Args:
      folder: Or a name of the hub's, as in `resolve`.
      **changes: As in `load`.

    Raises:
      HfError: as `load` does, for what concerns `config.json`.
    """
    folder = resolve(folder)
    family, stored = stored_config(folder)
    return _changed(folder, told(folder, lambda: family.config(stored)), changes)


def describe(folder: str | os.PathLike) -> Described:
    """What a folder has, at the cost of reading its headers.

    Raises:
      HfError: as `load` does, for what is seen without reading a weight: the sizes of
        `config.json` must be those of the tensors. And if it names another number of
        labels than its classifier has.
    """
    folder = resolve(folder)
    family, stored = stored_config(folder)
    config = told(folder, lambda: family.config(stored))
    names = told(folder, lambda: label_names(stored))
    with ExitStack() as files:
        tensors = stored_tensors(folder, family, files)
        told(folder, lambda: _check_sizes(family, config, tensors))
        if isinstance(config, LlamaConfig):
            return Described(config, (), False)
        kernel = tensors.get(family.name("classifier/kernel", with_labels(config, 1)))
    if kernel is None or not kernel.shape:
        return Described(config, names, False)
    labels = kernel.shape[0]
    if names and len(names) != labels:
        raise HfError(
            f"{folder}: config.json names {len(names)} labels in id2label, but"
            f" {kernel.name} is {kernel.shape}"
        )
    names = names or tuple(f"LABEL_{i}" for i in range(labels))
    return Described(with_labels(config, labels), names, True)


def load(
    folder: str | os.PathLike,
    config: Config | None = None,
    *,
    seed: int = 0,
    place: Callable[[str, np.ndarray], Any] = lambda path, leaf: jax.device_put(leaf),
    **changes: Any,
) -> Loaded:
    """The model of a folder, as the Flax module `Llama` or `Bert` takes it.

    Example:
      >>> from oasis_jax.hf import save
      >>> from oasis_jax.models.llama import Llama, LlamaConfig
      >>> config = LlamaConfig(32, 16, 40, layers=2, heads=4, kv_heads=2, positions=8)
      >>> tokens = jnp.zeros((1, 8), jnp.int32)
      >>> params = jax.jit(Llama(config).init)(jax.random.key(0), tokens)["params"]
      >>> loaded = load(save(tempfile.mkdtemp(), config, params), remat="block")
      >>> loaded.params["blocks"]["attn"]["k_proj"]["kernel"].shape
      (2, 16, 8)

    Args:
      folder: Or a name of the hub's, as in `resolve`.
      config: Instead of the folder's, `labels` and `param_dtype` too.
      seed: Of parameters that are not stored: an encoder's pooler and classifier.
      place: Takes the path and the value of each leaf once it is whole, and puts it
        where it shall be.
      **changes: Fields of the config to be changed: `dtype`, `remat`, `residuals`,
        `labels`, ... None changes nothing. `param_dtype` is that of the stored tensors
        if they agree, else float32. With `labels=0` a stored classifier is left.

    Raises:
      HfError: if a file is absent, damaged, out of proportion or outside of the folder,
        if the model is of no family that is read, or if tensors are missing,
        unexpected, there twice, not finite, or have another shape than those of the
        config: all are named, and both shapes. Also if a head is stored that is not the
        embedding it is said to be tied to.
    """
    folder = resolve(folder)
    family, fields_ = stored_config(folder)
    given = {name for name, value in changes.items() if value is not None}
    if config is None:
        found = told(folder, lambda: family.config(fields_))
    else:
        told(folder, lambda: family.check(config))
        found, given = config, {*given, "labels", "param_dtype"}
    found = _changed(folder, found, changes)
    with ExitStack() as files:
        stored: Mapping[str, Stored] = stored_tensors(folder, family, files)
        found = _with_stored_labels(folder, family, found, stored, "labels" in given)
        stored = _with_pooler(family, found, stored)
        told(folder, lambda: _check_sizes(family, found, stored))
        leaves = family.leaves(found)
        places = family.places(found, leaves)
        fresh = _absent(family, places, stored)
        _check(
            folder, family, found, [p for p in places if p.path not in fresh], stored
        )
        if "param_dtype" not in given:
            dtypes = {stored[p.name].dtype for p in places if p.path not in fresh}
            found = replace(found, param_dtype=DTYPES[_only(dtypes)])
        params: dict[str, Any] = {}
        spoilt: list[str] = []
        for path, leaf in leaves.items():
            if path in fresh:
                value = _initialised(path, leaf.shape, seed, found.param_dtype)
            else:
                parts = [p for p in places if p.path == path]
                value = _read(leaf.shape, found.param_dtype, parts, stored, spoilt)
            if not spoilt:
                params[path] = place(path, value)
            del value
    if spoilt:
        raise HfError(f"{folder}: {count('with numbers that are not finite', spoilt)}")
    return Loaded(found, _nested(params), fresh)


def _changed(folder: Path, config: Config, changes: Mapping[str, Any]) -> Config:
    asked = {name: value for name, value in changes.items() if value is not None}
    if unknown := asked.keys() - {f.name for f in fields(config)}:
        named = ", ".join(sorted(unknown))
        raise HfError(f"{folder}: is a {type(config).__name__}, which has no {named}")
    return told(folder, lambda: replace(config, **asked))


def _with_stored_labels(
    folder: Path,
    family: Family,
    config: Config,
    stored: Mapping[str, Stored],
    asked: bool,
) -> Config:
    """The config with as many labels as are stored, if no number was asked for."""
    wanted = labels_of(config)
    if not wanted:
        return config
    kernel = stored.get(family.name("classifier/kernel", config))
    if kernel is None or not kernel.shape or kernel.shape[0] == wanted:
        return config
    if asked:
        raise HfError(
            f"{folder}: the stored classifier has {kernel.shape[0]} labels, and "
            f"{wanted} are asked for"
        )
    return with_labels(config, kernel.shape[0])


def _with_pooler(
    family: Family, config: Config, stored: Mapping[str, Stored]
) -> Mapping[str, Stored]:
    """RoBERTa's pooler has one name with a classifier, and another without."""
    other = with_labels(config, int(not labels_of(config)))
    for path in ("pooler/kernel", "pooler/bias"):
        if path in family.names:
            here, there = family.name(path, config), family.name(path, other)
            if here not in stored and there in stored:
                stored = {**stored, here: stored[there]}
    return stored


def _absent(
    family: Family, places: Sequence[Place], stored: Mapping[str, Stored]
) -> tuple[str, ...]:
    """Paths of the subtrees that may be absent, and are so as a whole."""
    fresh: tuple[str, ...] = ()
    for subtree in family.optional:
        parts = [p for p in places if p.path.startswith(f"{subtree}/")]
        if not any(p.name in stored for p in parts):
            fresh += tuple(p.path for p in parts)
    return fresh


def _check_sizes(family: Family, config: Config, stored: Mapping[str, Stored]) -> None:
    """Holds the config's sizes to what is stored, before they shape or count anything."""
    layers = {
        name: int(match[1])
        for name in stored
        if (match := re.search(r"\blayers?\.(\d{1,9})\.", name))
    }
    # Fewer may be those of a shard that is lost, which are missed by name.
    if config.layers > len(stored):
        raise HfError(
            f"config.json says num_hidden_layers is {config.layers}, but there are"
            f" {len(stored)} tensors, of {len(set(layers.values()))} layers"
        )
    for path, axes in family.sizes(config).items():
        places = {family.name(path, config, i): i for i in {*layers.values(), 0}}
        tensor = next((stored[name] for name in places if name in stored), None)
        if tensor is None:
            lost = family.full(family.name(path, config, 0), config)
            raise HfError(count("missing", [lost]))
        wrong = [
            f"{field} is {size}"
            for (field, size), there in zip(axes, tensor.shape, strict=False)
            if size != there
        ]
        if wrong or len(tensor.shape) != len(axes):
            said = " and ".join(wrong) or "it is a matrix"
            raise HfError(
                f"config.json says {said}, but {tensor.name} is {tensor.shape}"
            )


def _check(
    folder: Path,
    family: Family,
    config: Config,
    places: Sequence[Place],
    stored: Mapping[str, Stored],
) -> None:
    wanted = {p.name: p.shape for p in places}
    # A tied head may be stored all the same.
    harmless = rf"{family.ignored}|^lm_head\.weight$"
    head, table = stored.get("lm_head.weight"), stored.get("embed_tokens.weight")
    if head and table and "lm_head.weight" not in wanted and differ(head, table):
        raise HfError(
            f"{folder}: {head.name} is not {table.name}, though config.json says"
            " tie_word_embeddings is true; say false there to keep the head that is"
            " stored, or remove it"
        )
    problems = {
        "missing": [family.full(n, config) for n in wanted if n not in stored],
        "unexpected": [
            tensor.name
            for name, tensor in stored.items()
            if name not in wanted and not re.search(harmless, name)
        ],
        "of another shape": [
            f"{stored[name].name} is {stored[name].shape}, expected {shape}"
            for name, shape in wanted.items()
            if name in stored and stored[name].shape != shape
        ],
        f"of none of the dtypes {', '.join(DTYPES)}": [
            f"{stored[name].name} is {stored[name].dtype}"
            for name in wanted
            if name in stored and stored[name].dtype not in DTYPES
        ],
    }
    named = [count(what, found) for what, found in problems.items() if found]
    if named:
        raise HfError(f"{folder}: {'; '.join(named)}")


def _only(dtypes: set[str]) -> str:
    return dtypes.pop() if len(dtypes) == 1 else "F32"


def _read(
    shape: tuple[int, ...],
    dtype: Any,
    parts: Sequence[Place],
    stored: Mapping[str, Stored],
    spoilt: list[str],
) -> np.ndarray:
    """The leaf; adds to `spoilt` what of it has numbers that are not finite."""
    value = np.empty(shape, dtype)
    for part in parts:
        source = stored[part.name]
        tensor = source.read()
        here = value[...] if part.layer is None else value[part.layer]
        with np.errstate(over="ignore", invalid="ignore"):  # it is said below
            here[...] = tensor.T if part.transposed else tensor
        del tensor  # before the next is read
        if bad := not_finite(here):
            name = "" if DTYPES[source.dtype] == dtype else f" as {np.dtype(dtype)}"
            spoilt.append(f"{source.name} in {source.where} ({bad:,}{name})")
    return value


def _initialised(
    path: str, shape: tuple[int, ...], seed: int, dtype: Any
) -> np.ndarray:
    if not path.endswith("/kernel"):
        return np.zeros(shape, dtype)
    random = np.random.default_rng([seed, path_hash(path)])
    return (_STDDEV * random.standard_normal(shape, np.float32)).astype(dtype)


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree
