"""The layout of a train state: a static plan of its trees, made once.

Three trees are about the same kernels: the parameters, the collection `subspace` that a
model is applied with, and what the optimizer moves. Which kernel belongs to which place,
and in which form the optimizer sees its gradient, follows from the rules; it is worked
out when the state is made, so that no step walks a tree to find out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax.numpy as jnp

from oasis_jax.lora import Adapter, Lora
from oasis_jax.paths import Outline, flatten_paths
from oasis_jax.subspace import (
    COLLECTION,
    COORDINATES,
    FULL_SIZE,
    Declaration,
    Place,
    Probe,
    Projection,
    Site,
)

ADAPTER = "adapter"
"""The third form, beside `COORDINATES` and `FULL_SIZE`: {"a": dA, "b": dB}."""


def kernel_paths(path: str, place: Place) -> tuple[str, ...]:
    """Full paths of a place's kernels: its own path's folder, then their names."""
    folder = path.rpartition("/")[0]
    return tuple(f"{folder}/{name}" if folder else name for name in place.kernels)


@dataclass(frozen=True)
class Kernel:
    """A kernel that is projected, or adapted.

    Attributes:
      path: Its own, in the parameters.
      site: Path of its place in the collection.
      index: Of the kernel among those of the place.
      form: In which the optimizer sees its gradient: `COORDINATES`, `FULL_SIZE` or
        `ADAPTER`.
    """

    path: str
    site: str
    index: int
    form: str


@dataclass(frozen=True)
class Layout:
    """Which kernels belong to which place, and how the trees of a state hang together.

    By path means in a dictionary keyed by the paths of parameters, or of sites.

    Attributes:
      params: Outline of the parameters.
      sites: Outline of the collection, as it was declared.
      places: What was decided about each site, in order.
    """

    params: Outline
    sites: Outline
    places: tuple[Place, ...]

    @cached_property
    def kernels(self) -> dict[str, Kernel]:
        """Every projected or adapted kernel, by path."""
        return {
            kernel: Kernel(kernel, site, index, _form(place))
            for site, place in zip(self.sites.paths, self.places, strict=True)
            if place.tracker is not None
            for index, kernel in enumerate(kernel_paths(site, place))
        }

    def of_form(self, *forms: str) -> list[Kernel]:
        """The kernels whose gradient the optimizer sees in one of these forms."""
        return [kernel for kernel in self.kernels.values() if kernel.form in forms]

    def by_kernel(self, values: Mapping[str, tuple]) -> dict[str, Any]:
        """Values by site, one per kernel, by the kernels' paths instead."""
        return {
            path: values[kernel.site][kernel.index]
            for path, kernel in self.kernels.items()
            if kernel.site in values
        }

    def by_site(self, values: Mapping[str, Any]) -> dict[str, tuple]:
        """Undoes `by_kernel`: values by kernel path, one tuple per site."""
        sites: dict[str, list[Any]] = {}
        for path, kernel in self.kernels.items():
            if path in values:
                sites.setdefault(kernel.site, []).append(values[path])
        return {site: tuple(own) for site, own in sites.items()}

    def bases(self, bases: Mapping[str, Projection], *forms: str) -> dict[str, Any]:
        """The basis of every projected kernel, by its path.

        With `forms`, of those only whose gradient the optimizer sees so.
        """
        return {
            path: bases[kernel.site].basis_of(kernel.index)
            for path, kernel in self.kernels.items()
            if kernel.site in bases and (not forms or kernel.form in forms)
        }

    # --- Between the trees ------------------------------------------------------------

    def part(
        self, params: Any, sites: Mapping[str, Site]
    ) -> tuple[Any, dict[str, Any], dict[str, Projection]]:
        """What a state keeps of the parameters and of what stands at the sites.

        Returns:
          The tree that the optimizer moves: the parameters, but {"a": A, "b": B} in the
          place of an adapted kernel; those kernels, by path; the bases, by site.
        """
        weights = self.params.split(params)
        adapters = self.by_kernel(
            {path: s.leaves for path, s in sites.items() if isinstance(s, Adapter)}
        )
        bases = {path: p for path, p in sites.items() if isinstance(p, Projection)}
        frozen = {path: weights[path] for path in adapters}
        return self.params.join(weights | adapters), frozen, bases

    def adapters(self, weights: Mapping[str, Any]) -> dict[str, Adapter]:
        """The adapters, by site, made of what the optimizer moves, by path."""
        leaves = self.by_site({k.path: weights[k.path] for k in self.of_form(ADAPTER)})
        places = dict(zip(self.sites.paths, self.places, strict=True))
        return {path: Adapter.of(places[path], own) for path, own in leaves.items()}

    def collection(self, weights: Mapping[str, Any], sites: Mapping[str, Site]) -> Any:
        """The collection `subspace` with these sites, and adapters made of `weights`.

        Args:
          weights: What the optimizer moves, by path.
          sites: Projections or probes by path; where there is none, a declaration.
        """
        places = zip(self.sites.paths, self.places, strict=True)
        plain = {path: Declaration(place) for path, place in places}
        return self.sites.join({**plain, **self.adapters(weights), **sites})

    def variables(
        self,
        weights: Mapping[str, Any],
        frozen: Mapping[str, Any],
        sites: Mapping[str, Site],
    ) -> dict[str, Any]:
        """What a model is applied to: the collections `params` and `subspace`."""
        params = self.params.join({**weights, **frozen})
        return {"params": params, COLLECTION: self.collection(weights, sites)}

    def probes(
        self, bases: Mapping[str, Projection], weights: Mapping[str, Any]
    ) -> dict[str, Probe]:
        """The zeros whose cotangents are the projected gradients, by site."""
        projected = self.of_form(COORDINATES, FULL_SIZE)
        columns = self.by_site({k.path: weights[k.path].shape[-1] for k in projected})
        return {
            site: _probe(projection, columns.get(site, ()))
            for site, projection in bases.items()
        }

    def former_paths(self, bases: Mapping[str, Projection]) -> dict[str, str]:
        """What older checkpoints call a state's leaves, by their paths now.

        They had the parameters and the model's collection, adapters included, where there
        are `trained`, `frozen` and `bases`.
        """
        then = {f"trained/{path}": f"params/{path}" for path in self.params.paths}
        then |= {f"bases/{path}": f"subspace/{path}" for path in flatten_paths(bases)}
        for kernel in self.of_form(ADAPTER):
            then[f"frozen/{kernel.path}"] = f"params/{kernel.path}"
            for half in ("a", "b"):
                now = f"trained/{kernel.path}/{half}"
                then[now] = f"subspace/{kernel.site}/{half}/{kernel.index}"
        return then


def _form(place: Place) -> str:
    return ADAPTER if isinstance(place.tracker, Lora) else place.gradient


def _probe(projection: Projection, columns: tuple[int, ...]) -> Probe:
    *batch, _, rank = projection.basis.shape
    slots = tuple(jnp.zeros((*batch, rank, n_out), jnp.float32) for n_out in columns)
    energy = jnp.zeros(batch, jnp.float32)
    return Probe(projection.place, projection.basis, slots, energy)
