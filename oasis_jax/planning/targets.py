"""Devices to compile for, whether they are there or not.

    python -m train plan --target h200            a row of TARGETS
    python -m train plan --target v5p:2x2x1       a TPU, of another slice

What a step needs is what one device needs: it is compiled for the first device of the
slice alone.
"""

import importlib.util
import re
from dataclasses import dataclass, replace
from typing import Any

import jax

from oasis_jax.compat import compile_only_device

GIB = 2**30


class TargetError(ValueError):
    """There is no such target, or what it takes is not installed: one sentence."""


@dataclass(frozen=True)
class Gpu:
    """What XLA's compiler wants to know of a GPU; sizes in bytes, clock in GHz.

    Source: NVIDIA's data sheets, and the descriptions that come with openxla/xla.
    """

    model: str
    capability: tuple[int, int]
    cores: int
    clock: float
    l2: int
    shared: int
    threads: int = 2048
    fpus: int = 128

    def describe(self, memory: int, bandwidth: float) -> str:
        """The text of a `GpuTargetConfigProto`."""
        major, minor = self.capability
        info = dict(
            threads_per_block_limit=1024,
            threads_per_warp=32,
            threads_per_core_limit=self.threads,
            thread_dim_limit_x=1024,
            thread_dim_limit_y=1024,
            thread_dim_limit_z=64,
            block_dim_limit_x=2**31 - 1,
            block_dim_limit_y=2**16 - 1,
            block_dim_limit_z=2**16 - 1,
            registers_per_core_limit=65536,
            registers_per_block_limit=65536,
            core_count=self.cores,
            fpus_per_core=self.fpus,
            clock_rate_ghz=self.clock,
            l2_cache_size=self.l2,
            memory_bandwidth=round(bandwidth),
            device_memory_size=memory,
            shared_memory_per_block=48 * 1024,
            shared_memory_per_core=self.shared,
            # A block can have all of a core's, but for one KiB that the system keeps.
            shared_memory_per_block_optin=self.shared - 1024,
            device_address_bits=64,
        )
        # What is made for 9.0a runs on nothing else, and is what libraries want there.
        extension = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
        lines = [
            *(f"{key}: {value}" for key, value in info.items()),
            f"cuda_compute_capability {{ major: {major} minor: {minor}"
            f" feature_extension: {extension} }}",
            f'name: "{self.model}"',
            'driver_version: "13.0.0"',
            'runtime_version: "13.0.0"',
            'compile_time_toolkit_version: "13.0.0"',
            'dnn_version: "9.10.0"',
        ]
        return (
            f"gpu_device_info {{ {' '.join(lines)} }}"
            ' platform_name: "CUDA"'
            " dnn_version_info { major: 9 minor: 10 patch: 0 }"
            f' device_description_str: "{self.model}"'
        )


@dataclass(frozen=True)
class Target:
    """A device to compile for.

    Attributes:
      name: As it is asked for.
      platform: cpu, gpu or tpu.
      memory: Of one device, in bytes, as programs find it.
      flops: Peak of matrix products in bfloat16, without sparsity, per second.
      bandwidth: Of its memory, bytes per second.
      gpu: What the compiler wants to know of a GPU.
      slice: Of a TPU, chips by axis; the smallest that is one host's.
    """

    name: str
    platform: str
    memory: int
    flops: float
    bandwidth: float
    gpu: Gpu | None = None
    slice: str = ""

    @property
    def extra(self) -> str | None:
        """The extra of this package that it takes; None if none."""
        return None if self.platform == "cpu" else f"plan-{self.platform}"

    @property
    def capability(self) -> tuple[int, int] | None:
        """Compute capability of a GPU."""
        return None if self.gpu is None else self.gpu.capability

    @property
    def installed(self) -> bool:
        """Whether its compiler is."""
        return any(
            all(importlib.util.find_spec(module) is not None for module in modules)
            for modules in _COMPILERS[self.platform]
        )


# Alternatives, each a list of modules that must all be there.
_COMPILERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "cpu": ((),),
    "gpu": (("jax_cuda13_plugin",), ("jax_cuda12_plugin",)),
    "tpu": (("libtpu",),),
}

_HOPPER: dict[str, Any] = dict(
    capability=(9, 0), cores=132, clock=1.98, l2=50 * 2**20, shared=228 * 1024
)
_ADA: dict[str, Any] = dict(capability=(8, 9), shared=100 * 1024, threads=1536)


def _gpu(name: str, memory: int, flops: float, bandwidth: float, **gpu: Any) -> Target:
    return Target(name, "gpu", memory, flops, bandwidth, gpu=Gpu(**gpu))


def _tpu(name: str, gib: float, flops: float, bandwidth: float, slice: str) -> Target:
    return Target(name, "tpu", round(gib * GIB), flops, bandwidth, slice=slice)


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        _gpu("h200", 151_397_597_184, 989e12, 4.8e12, model="NVIDIA H200", **_HOPPER),
        _gpu("h100", 84_942_979_072, 989e12, 3.35e12, model="NVIDIA H100", **_HOPPER),
        _gpu(
            "a100",
            85_100_068_864,
            312e12,
            2.039e12,
            model="NVIDIA A100-SXM4-80GB",
            capability=(8, 0),
            cores=108,
            clock=1.41,
            l2=40 * 2**20,
            shared=164 * 1024,
            fpus=64,
        ),
        _gpu(
            "l4",
            22 * GIB,
            121e12,
            0.3e12,
            model="NVIDIA L4",
            cores=58,
            clock=2.04,
            l2=48 * 2**20,
            **_ADA,
        ),
        _gpu(
            "rtx-4090",
            round(23.6 * GIB),
            165e12,
            1.008e12,
            model="NVIDIA GeForce RTX 4090",
            cores=128,
            clock=2.52,
            l2=72 * 2**20,
            **_ADA,
        ),
        _tpu("v5e", 15.75, 197e12, 0.819e12, "2x2"),
        _tpu("v5p", 95.74, 459e12, 2.765e12, "2x2x1"),
        _tpu("v6e", 31.25, 918e12, 1.64e12, "2x2"),
        # Nominal, for there is no one CPU: it is there to try things out.
        Target("cpu", "cpu", 64 * GIB, 1e12, 50e9),
    )
}


def find(name: str) -> Target:
    """A row of `TARGETS`; a TPU's slice may follow a colon.

    Raises:
      TargetError: if there is none of that name (lists those there are), or what
        follows the colon is no slice.

    Example:
      >>> find("v5p:2x2x2").slice
      '2x2x2'
    """
    base, colon, slice = name.partition(":")
    if base not in TARGETS:
        raise TargetError(
            f"target is {name!r}, expected one of {', '.join(TARGETS)}, or a slice of a"
            " TPU such as v5p:2x2x1"
        )
    target = TARGETS[base]
    if not colon:
        return target
    if target.platform != "tpu":
        raise TargetError(f"target {name}: {base} has no slices, only a TPU has")
    axes = target.slice.count("x") + 1
    if not re.fullmatch("x".join([r"[1-9]\d*"] * axes), slice):
        raise TargetError(
            f"target {name}: the slice is {slice!r}, expected {axes} numbers of chips"
            f" such as {target.slice}"
        )
    return replace(target, name=name, slice=slice)


def device(target: Target | str) -> jax.Device:
    """The device to compile for; nothing can run on it unless it is the CPU.

    Raises:
      TargetError: as `find` does; if the compiler is not installed, naming the extra; or
        if it knows no such slice.

    Example:
      >>> device("cpu").platform
      'cpu'
    """
    if isinstance(target, str):
        target = find(target)
    if target.platform == "cpu":
        return jax.local_devices(backend="cpu")[0]
    if not target.installed:
        raise TargetError(
            f"target {target.name} needs the extra {target.extra}:"
            f" pip install 'oasis_jax[{target.extra}]'"
        )
    if target.gpu is not None:
        text = target.gpu.describe(target.memory, target.bandwidth)
        return compile_only_device("cuda", target_config=text, topology="1x1x1")
    generation = target.name.partition(":")[0]
    try:
        return compile_only_device("tpu", topology_name=f"{generation}:{target.slice}")
    except Exception as error:  # its types are the plugin's own
        raise TargetError(f"target {target.name}: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
