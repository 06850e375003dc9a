"""Parameter paths as people write them."""

import zlib

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
