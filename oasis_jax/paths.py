"""Parameter paths as people write them."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax


def path_string(path: tuple) -> str:
    """'blocks/attn/q_proj/kernel' for a key path of `jax.tree_util`."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    # An NNX variable is a node of its own; `nnx.Optimizer` shows some trees with it.
    return name.removesuffix("/value")


def flatten_paths(tree, is_leaf=None) -> dict:
    """The leaves of a tree, keyed by their paths, in the tree's order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return {path_string(path): leaf for path, leaf in leaves}


def map_with_paths(function, tree, *rest, is_leaf=None):
    """`jax.tree.map` whose function takes the leaf's path, a string, first."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(path_string(path), *leaves),
        tree,
        *rest,
        is_leaf=is_leaf,
    )


def path_hash(path: str) -> int:
    """A number that stays the same across processes, to fold into a PRNG key."""
    return zlib.crc32(path.encode())


@dataclass(frozen=True)
class Outline:
    """The static shape of a tree: where its leaves are, and what they are called.

    Trees of one shape are taken apart by path, put together and mapped without a walk
    that spells the paths anew. What stands in a leaf's position may be a tree itself.

    Attributes:
      structure: The tree without its leaves.
      paths: Of the leaves, in the tree's order.

    Example:
      >>> outline = Outline.of({'up': {'kernel': 1, 'bias': 2}})
      >>> outline.paths
      ('up/bias', 'up/kernel')
      >>> outline.split({'up': {'kernel': {'a': 3, 'b': 4}, 'bias': 5}})
      {'up/bias': 5, 'up/kernel': {'a': 3, 'b': 4}}
      >>> outline.join({'up/kernel': 6, 'up/bias': 7})
      {'up': {'bias': 7, 'kernel': 6}}
    """

    structure: Any  # a PyTreeDef
    paths: tuple[str, ...]

    @classmethod
    def of(cls, tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> "Outline":
        """The outline of a tree; arrays and their shapes give the same one."""
        leaves, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
        return cls(structure, tuple(path_string(path) for path, _ in leaves))

    def split(self, tree: Any) -> dict[str, Any]:
        """What stands in each leaf's position, by path.

        Raises:
          ValueError: if the tree has another shape (JAX's own words).
        """
        return dict(zip(self.paths, self.structure.flatten_up_to(tree), strict=True))

    def join(self, leaves: Mapping[str, Any]) -> Any:
        """The tree with these leaves.

        Raises:
          KeyError: if there is none for a path.
        """
        return self.structure.unflatten([leaves[path] for path in self.paths])

    def map(self, function: Callable, *trees: Any) -> Any:
        """The tree of `function(path, *leaves)`."""
        columns = (self.structure.flatten_up_to(tree) for tree in trees)
        return self.structure.unflatten(map(function, self.paths, *columns))
