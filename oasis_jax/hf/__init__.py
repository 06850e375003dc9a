"""Hugging Face checkpoints in and out: a folder to a config and parameters, and back.

A folder has `config.json`, and `model.safetensors` or shards of it with an index. The
models, their names there and what of `config.json` is understood are the rows of
`FAMILIES`. Needs the package safetensors (`oasis_jax[hf]`), and neither PyTorch nor
transformers.
"""

from oasis_jax.hf.families import FAMILIES, Family, HfError
from oasis_jax.hf.folders import resolve
from oasis_jax.hf.reading import Loaded, load, load_config
from oasis_jax.hf.writing import save

__all__ = [
    "FAMILIES",
    "Family",
    "HfError",
    "Loaded",
    "load",
    "load_config",
    "resolve",
    "save",
]
