"""Checkpoints: everything that moves, saved atomically and restored bit for bit.

Only `storage.py` and this know Orbax. A checkpoint is the directory `<step>/` with

    about/  JSON: the run's configuration and an index {leaf path: "dtype[shape]"}
    state/  the leaves of the state, a flat dict keyed by path
    data/   the position of the Grain iterator, one file per process (optional)
    digests.json  of every file, there before the checkpoint has its name (`digests.py`)

The state is stored flat because Orbax gives custom nodes back as plain dicts; the
caller's tree supplies the structure again, and where a leaf was called otherwise once
(`former_paths`, as `OasisTrainState` has) that name too. The index lets a restore tell
a checkpoint of another model (an error) from a damaged one (fall back to the one before).
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from oasis_jax.digests import Damaged
from oasis_jax.errors import first_line
from oasis_jax.paths import flatten_paths
from oasis_jax.storage import CheckpointError as CheckpointError
from oasis_jax.storage import Storage

PyTree = Any


class Checkpoints:
    """The checkpoints of one run.

    Example:
      >>> state = {"w": jnp.ones(3)}
      >>> with Checkpoints(Path(tempfile.mkdtemp()), keep=3, every=10) as checkpoints:
      ...     for step in range(1, 21):
      ...         written = checkpoints.save(step, state, config={"lr": 0.1})
      ...     checkpoints.steps(), checkpoints.restore(state)[0]
      ([10, 20], 20)

    Args:
      directory: Created if absent.
      keep: How many of the newest checkpoints survive.
      every: `save` writes at multiples of this, and when Orbax hears of a preemption.

    Raises:
      CheckpointError: if the directory cannot be made.
    """

    def __init__(self, directory: Path, *, keep: int = 3, every: int = 1):
        self.directory = Path(directory).absolute()
        self._every = every
        # The step this object last wrote or read; what lies beyond it is stale.
        self._position: int | None = None
        self._storage = Storage(self.directory, keep=keep)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            self.close()
        except CheckpointError as error:
            # What is under way already says why it all ends.
            if kind is None:
                raise
            warnings.warn(str(error), RuntimeWarning, stacklevel=2)

    def close(self) -> None:
        """Waits for the last write and releases Orbax's threads.

        Raises:
          CheckpointError: if that write failed.
        """
        self._storage.close()

    def steps(self) -> list[int]:
        """The steps that have a directory, oldest first; some may be unreadable."""
        return self._storage.steps()

    def save(
        self,
        step: int,
        state: PyTree,
        *,
        config: Mapping[str, Any],
        data: Any = None,
        force: bool = False,
    ) -> bool:
        """Writes a checkpoint in the background; `close` waits for it.

        Checkpoints at or after `step` that this object did not itself write or restore
        (unreadable ones that `restore` passed over, or those of an abandoned run) are
        moved to `superseded/`, so that they neither block this write nor count as
        newer than it. Nothing but `keep` ever deletes a checkpoint. The step that this
        object last wrote or restored is not written again.

        Args:
          step: Number of updates contained in `state`.
          state: Any registered pytree of arrays and numbers. Its buffers may be donated
            as soon as this returns.
          config: JSON-able; `Checkpoints.config` reads it back.
          data: Grain iterator whose next element is the next one to train on.
          force: Write even if `step` is not a multiple of `every`.

        Returns:
          Whether a checkpoint was written.

        Raises:
          CheckpointError: if this checkpoint, or the one that was being written, could
            not be: the disk is full, say. Those before it are as they were.
          TypeError: if `config` is not JSON-able, or `state` holds a typed PRNG key.
          ValueError: if two leaves of `state` have the same path.
        """
        due = step % self._every == 0 or self._storage.reached_preemption(step)
        written = step == self._position and step in self.steps()
        if written or not (due or force):
            return False
        json.dumps(config)  # Orbax would fail in its own thread, much later
        leaves = _flatten(state)
        about = {
            "config": dict(config),
            "leaves": {path: _describe(leaf) for path, leaf in leaves.items()},
            "data": data is not None,
        }
        items = {
            "about": ocp.args.JsonSave(about),
            "state": ocp.args.StandardSave(
                # Orbax refuses empty arrays; the index alone can rebuild them.
                {path: leaf for path, leaf in leaves.items() if np.size(leaf)}
            ),
        }
        if data is not None:
            items["data"] = _grain().CheckpointSave(data)
        horizon = step - 1 if self._position is None else min(step - 1, self._position)
        stale = [other for other in self.steps() if other > horizon]
        self._storage.save(step, ocp.args.Composite(**items), stale=stale)
        self._position = step
        return True

    def config(self, step: int | None = None) -> dict[str, Any]:
        """The configuration saved at `step`, or in the newest checkpoint that is whole.

        No model need exist yet.

        Raises:
          CheckpointError: if there is no such checkpoint or it cannot be read.
        """
        self._storage.settle()
        reasons = []
        for candidate in reversed(self.steps() if step is None else [step]):
            try:
                self._storage.check(candidate)
                return self._about(candidate)["config"]
            except Exception as error:
                reasons.append(_reason(self.directory / str(candidate), error))
        raise self._none_readable(reasons)

    def restore(
        self, like: PyTree, *, data: Any = None, latest: int | None = None
    ) -> tuple[int, PyTree]:
        """Reads the newest checkpoint that is whole.

        One that cannot be read, or whose files are not those that were written, is
        reported by a `RuntimeWarning`, left where it is until the next `save` sets it
        aside, and the one before it is tried. A checkpoint without digests, an older
        version's, is taken at its word.

        Args:
          like: The target: arrays or `jax.ShapeDtypeStruct`. Decides the structure,
            static fields and shardings of the result; its method `former_paths`, if it
            has one, says what older checkpoints call its leaves. Leaves without a
            sharding, and uncommitted arrays, come back uncommitted on the default device.
          data: Grain iterator to move to the saved position. Untouched on failure.
          latest: Passes over what is newer than this step; the next `save` sets it aside.

        Returns:
          The step and the state, of the structure of `like`.

        Raises:
          CheckpointError: if no checkpoint can be read, or if leaves, shapes or dtypes
            differ from those of `like`. The message names them.
        """
        self._storage.settle()
        reasons = []
        for step in reversed(self.steps()):
            if latest is not None and step > latest:
                continue
            directory = self.directory / str(step)
            try:
                self._storage.check(step)
                about = self._about(step)
                # Not a CheckpointError when this fails: the file itself is damaged.
                saved, has_data = dict(about["leaves"]), bool(about["data"])
            except Exception as error:
                reasons.append(_warn(directory, error))
                continue
            stored = _stored_paths(saved, like)
            now = {then: path for path, then in stored.items()}
            saved = {now.get(path, path): what for path, what in saved.items()}
            _check_same_leaves(directory, saved, like)
            if data is not None and not has_data:
                raise CheckpointError(
                    f"{directory}: was saved without a data iterator, so the position "
                    "in the data is unknown; restore without data= to start it afresh"
                )
            try:
                state = self._restore_state(step, like, stored)
                if data is not None:
                    self._restore_data(step, data)
            except Exception as error:
                reasons.append(_warn(directory, error))
                continue
            self._position = step
            return step, state
        raise self._none_readable(reasons, latest)

    def _about(self, step: int) -> dict[str, Any]:
        items = ocp.args.Composite(about=ocp.args.JsonRestore())
        return self._storage.restore(step, items)["about"]

    def _restore_state(
        self, step: int, like: PyTree, stored: Mapping[str, str]
    ) -> PyTree:
        leaves = _flatten(like)
        targets = {stored[path]: _target(leaf) for path, leaf in leaves.items()}
        wanted = {path: leaf for path, leaf in targets.items() if np.size(leaf)}
        items = ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
        values = targets | self._storage.restore(step, items)["state"]
        return jax.tree.unflatten(
            jax.tree.structure(like),
            [_place(values[stored[path]], leaf) for path, leaf in leaves.items()],
        )

    def _restore_data(self, step: int, data: Any) -> None:
        before = data.get_state()
        try:
            items = ocp.args.Composite(data=_grain().CheckpointRestore(data))
            self._storage.restore(step, items)
        except Exception:
            data.set_state(before)
            raise

    def _none_readable(
        self, reasons: list[str], latest: int | None = None
    ) -> CheckpointError:
        if not reasons:
            which = "" if latest is None else f" of step {latest} or before"
            return CheckpointError(f"{self.directory}: there is no checkpoint{which}")
        return CheckpointError(
            f"{self.directory}: no checkpoint can be read: " + "; ".join(reasons)
        )


def _grain():
    # Only the trainer's data pipeline needs Grain; the library must import without it.
    import grain

    return grain.checkpoint


def _flatten(tree: PyTree) -> dict[str, Any]:
    leaves = flatten_paths(tree)
    if len(leaves) != len(jax.tree.leaves(tree)):
        raise ValueError("two leaves of the state have the same path; rename one")
    return leaves


def _stored_paths(saved: Mapping[str, str], like: PyTree) -> dict[str, str]:
    """Under which path a checkpoint has each leaf of `like`: its own, or a former one."""
    former = like.former_paths() if hasattr(like, "former_paths") else {}
    return {
        path: path if path in saved else former.get(path, path)
        for path in _flatten(like)
    }


def _describe(leaf: Any) -> str:
    """'bfloat16[4,8]'."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        raise TypeError("save jax.random.key_data(key), not the typed key itself")
    return f"{dtype}[{','.join(map(str, np.shape(leaf)))}]"


def _check_same_leaves(directory: Path, saved: dict[str, str], like: PyTree) -> None:
    wanted = {path: _describe(leaf) for path, leaf in _flatten(like).items()}
    wrong = [
        f"{path} is {saved.get(path, 'absent')} in the checkpoint "
        f"and {wanted.get(path, 'absent')} in the target"
        for path in sorted(saved.keys() | wanted.keys())
        if saved.get(path) != wanted.get(path)
    ]
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(
            f"{directory}: {'; '.join(wrong[:5])}{more}. "
            "Was it written with another configuration?"
        )


def _target(leaf: Any) -> Any:
    """What Orbax is asked for: an array of given sharding, or one in host memory."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        placed = leaf.sharding is not None
    elif isinstance(leaf, jax.Array):
        placed = leaf.committed
    else:
        return leaf
    if placed:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    # Orbax commits what it places. A committed counter next to sharded weights cannot
    # enter jit, so what was uncommitted goes through the host. A broadcast view stands
    # for the shape without allocating it.
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


def _place(value: Any, leaf: Any) -> Any:
    """The restored value as `leaf` wants it; `value` is its target if it is empty."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return jnp.zeros(value.shape, value.dtype, device=value.sharding)
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return value if isinstance(value, jax.Array) else jnp.array(value)
    return value


def _reason(directory: Path, error: Exception) -> str:
    kind = "" if isinstance(error, Damaged) else f"{type(error).__name__}: "
    return f"{directory} is unreadable ({kind}{first_line(error)})"


def _warn(directory: Path, error: Exception) -> str:
    reason = _reason(directory, error)
    warnings.warn(
        f"{reason}; falling back to the checkpoint before it",
        RuntimeWarning,
        stacklevel=3,
    )
    return reason
