"""Compiled steps are shared between the runs of a test session, and with its processes."""

import os

import jax
import pytest

from train.run import loop


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("compiled"))
    settings = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


@pytest.fixture
def killed_at(monkeypatch):
    """Runs something whose machine goes away after a step, before that is written."""

    def call(step: int, run) -> None:
        real = loop.record

        def record(setup, state, done, *rest):
            if done == step:
                raise RuntimeError("the machine went away")
            return real(setup, state, done, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "record", record)
            with pytest.raises(RuntimeError, match="went away"):
                run()

    return call
