"""Every example in a docstring runs."""

import doctest
import importlib
import pkgutil
import tempfile

import jax
import jax.numpy as jnp
import optax
import pytest

import oasis_jax
import train

NAMES = [
    module.name
    for package in (oasis_jax, train)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not module.name.endswith("__main__")
]
GLOBALS = {"jax": jax, "jnp": jnp, "optax": optax, "tempfile": tempfile}


@pytest.mark.parametrize("name", NAMES)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name), extraglobs=GLOBALS)
    assert result.failed == 0
