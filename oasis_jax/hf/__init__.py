"""Hugging Face checkpoints in and out: a folder to a config and parameters, and back.

A folder has `config.json`, and `model.safetensors` or shards of it with an index. The
models, their names there and what of `config.json` is understood are the rows of
`FAMILIES`. Needs the package safetensors (`oasis_jax[hf]`), and neither PyTorch nor
transformers.
"""

from oasis_jax.hf.errors import HfError
from oasis_jax.hf.families import FAMILIES, Family
from oasis_jax.hf.folders import inside, resolve, texts
from oasis_jax.hf.reading import Described, Loaded, describe, load, load_config
from oasis_jax.hf.writing import save

__all__ = [
    "FAMILIES",
    "Described",
    "Family",
    "HfError",
    "Loaded",
    "describe",
    "inside",
    "load",
    "load_config",
    "resolve",
    "save",
    "texts",
]
