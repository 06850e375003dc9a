"""What numbers were measured on."""

import importlib.metadata
import os
import platform
from typing import Any

import jax


def machine() -> dict[str, Any]:
    """The device, the processor's cores and the versions of what computes."""
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")},
    }


def versions() -> dict[str, str | None]:
    """Of everything that a compiled program depends on; None where it is absent."""
    names = (
        *("oasis_jax", "jax", "jaxlib", "flax", "optax"),
        *("jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13", "libtpu"),
    )
    known: dict[str, str | None] = {"python": platform.python_version()}
    for name in names:
        try:
            known[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            known[name] = None
    return known
