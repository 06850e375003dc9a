"""Checkpoints come back bit for bit, survive damage, and name what does not fit."""

import dataclasses
import json
import resource
import shutil
import subprocess
import warnings
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from oasis_jax.checkpoints import CheckpointError, Checkpoints

# Several reads of a damaged checkpoint fail together; Orbax reports the first and
# closes its event loop on the others, whose complaints then reach nobody.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slot:
    basis: jax.Array
    previous: jax.Array | None
    rank: int = dataclasses.field(metadata={"static": True})


class Counters(NamedTuple):
    step: jax.Array
    key: jax.Array
    nothing: tuple = ()


def nasty_state(seed: int = 0):
    keys = jax.random.split(jax.random.key(seed), 3)
    weights = {"w/1": jax.random.normal(keys[0], (64, 32)), "b": jnp.zeros((0, 3))}
    return {
        "weights": weights,
        "half": jax.random.normal(keys[1], (5, 7), jnp.bfloat16),
        "odd": jnp.array([jnp.nan, -0.0, jnp.inf, 1e-42]),
        "slot": Slot(jax.random.normal(keys[2], (8, 4)), None, rank=4),
        "adam": optax.adamw(1e-3).init(weights),
        "counters": Counters(jnp.int32(seed), jax.random.key_data(keys[0])),
        "nothing": (None, (), {}),
    }


def batches():
    data = grain.MapDataset.source(np.arange(100)).seed(3).shuffle().repeat()
    return iter(data.to_iter_dataset().batch(4))


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(
        jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
    ):
        if isinstance(one, int):
            assert one == other
            continue
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.sharding == other.sharding
        assert one.committed == other.committed
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints 1, 2, 3; the state of step s is `nasty_state(s)`."""
    with Checkpoints(tmp_path) as checkpoints:
        data = batches()
        for step in (1, 2, 3):
            next(data)
            config = {"rank": 4, "step": step}
            checkpoints.save(step, nasty_state(step), config=config, data=data)
    return tmp_path


def as_saved(state):
    return state


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


@pytest.mark.parametrize("target", [as_saved, abstract])
def test_roundtrip_is_bitwise(run, target):
    with Checkpoints(run) as checkpoints:
        step, state = checkpoints.restore(target(nasty_state(0)))
    assert step == 3
    assert_same(state, nasty_state(3))


def test_shardings_are_the_targets(tmp_path):
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    rows = 2 * jax.device_count()
    state = {
        "sharded": jax.device_put(jnp.arange(rows * 3.0).reshape(rows, 3), sharding),
        "empty": jax.device_put(jnp.zeros((rows, 0)), sharding),
        "free": jnp.int32(7),
    }
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, config={})
    with Checkpoints(tmp_path) as checkpoints:
        _, restored = checkpoints.restore(jax.tree.map(jnp.zeros_like, state))
    assert_same(restored, state)


def test_buffers_may_be_donated_after_save(tmp_path):
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    state = jnp.arange(2**22)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": state}, config={})
        state = overwrite(state)
        _, restored = checkpoints.restore({"x": state})
    np.testing.assert_array_equal(restored["x"], np.arange(2**22))


def test_the_iterator_resumes_at_the_next_batch(tmp_path):
    data = batches()
    for _ in range(5):
        next(data)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, nasty_state(), config={}, data=data)
    expected = [next(data) for _ in range(3)]
    resumed = batches()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.restore(nasty_state(), data=resumed)
    np.testing.assert_array_equal([next(resumed) for _ in range(3)], expected)


def test_a_checkpoint_without_data_cannot_restore_an_iterator(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, nasty_state(), config={})
        with pytest.raises(CheckpointError, match="without a data iterator"):
            checkpoints.restore(nasty_state(), data=batches())


def truncate_arrays(step):
    for file in step.glob("state/**/d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def delete_arrays(step):
    for file in step.glob("state/**/d/*"):
        file.unlink()


def delete_array_metadata(step):
    for name in ("_METADATA", "manifest.ocdbt"):
        (step / "state" / name).unlink()


def truncate_index(step):
    file = step / "about/metadata"
    file.write_text(file.read_text()[:40])


def replace_index(step):
    (step / "about/metadata").write_text("[1, 2]")


def empty_directory(step):
    shutil.rmtree(step)
    step.mkdir()


def delete_position(step):
    for file in step.glob("data/*.json"):
        file.unlink()


def spoil_position(step):
    for file in step.glob("data/*.json"):
        file.write_text(json.dumps({"another": "iterator"}))


DAMAGE = [
    truncate_arrays,
    delete_arrays,
    delete_array_metadata,
    truncate_index,
    replace_index,
    empty_directory,
    delete_position,
    spoil_position,
]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_falls_back_to_the_checkpoint_before(run, damage):
    damage(run / "3")
    expected, resumed = batches(), batches()
    for _ in range(2):
        next(expected)
    message = f"{run / '3'} is unreadable"
    with Checkpoints(run) as checkpoints, pytest.warns(RuntimeWarning, match=message):
        step, state = checkpoints.restore(nasty_state(), data=resumed)
    assert step == 2
    assert_same(state, nasty_state(2))
    np.testing.assert_array_equal(next(resumed), next(expected))
    assert (run / "3").exists()


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


FATES = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "gone": lambda file: file.unlink(),
    "flipped": flip,
    "grown": lambda file: file.write_bytes(file.read_bytes() + b" "),
}


@pytest.mark.parametrize("fate", FATES)
def test_no_damaged_file_goes_unnoticed(run, fate):
    """Whichever file suffers, the result is the saved state or the one before it."""
    good = {file: file.read_bytes() for file in run.glob("3/**/*") if file.is_file()}
    outcomes = set()
    for file, content in good.items():
        FATES[fate](file)
        with Checkpoints(run) as checkpoints, warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            step, state = checkpoints.restore(nasty_state())
        assert_same(state, nasty_state(step))
        if step == 3:
            assert (file.name, fate) == ("digests.json", "gone")  # as before there were
        outcomes.add(step)
        file.write_bytes(content)
    assert 2 in outcomes


def test_a_flipped_bit_is_named_and_kept_aside(run):
    largest = max(
        (f for f in run.glob("3/state/**/d/*")), key=lambda file: file.stat().st_size
    )
    flip(largest)
    name = str(largest.relative_to(run / "3"))
    with Checkpoints(run, keep=2) as checkpoints:
        assert checkpoints.config()["step"] == 2
        with pytest.warns(RuntimeWarning, match=f"3 is unreadable .{name} was changed"):
            assert checkpoints.restore(nasty_state())[0] == 2
        assert checkpoints.save(3, nasty_state(30), config={})
    with Checkpoints(run) as checkpoints:
        assert checkpoints.steps() == [2, 3]
        step, state = checkpoints.restore(nasty_state())
    assert_same((step, state), (3, nasty_state(30)))
    assert (run / "superseded/3.0" / name).exists()


def test_a_foreign_file_is_damage(run):
    (run / "3/state/d/another").touch()
    message = "state/d/another was not there"
    with Checkpoints(run) as checkpoints, pytest.warns(RuntimeWarning, match=message):
        assert checkpoints.restore(nasty_state())[0] == 2


def test_checkpoints_of_before_there_were_digests(run):
    for step in (1, 2, 3):
        (run / f"{step}/digests.json").unlink()
    with Checkpoints(run) as checkpoints, warnings.catch_warnings():
        warnings.simplefilter("error")
        step, state = checkpoints.restore(nasty_state())
    assert_same((step, state), (3, nasty_state(3)))


def test_digests_travel_with_a_copy(run, tmp_path):
    shutil.copytree(run / "3", tmp_path / "copy/3")
    flip(tmp_path / "copy/3/about/metadata")
    message = "about/metadata was changed"
    with (
        Checkpoints(tmp_path / "copy") as checkpoints,
        pytest.raises(CheckpointError, match=message),
    ):
        checkpoints.config()


def test_the_newest_not_later_than(run):
    with Checkpoints(run) as checkpoints:
        step, state = checkpoints.restore(nasty_state(), latest=2)
        assert_same((step, state), (2, nasty_state(2)))
        with pytest.raises(CheckpointError, match="no checkpoint of step 0 or before"):
            checkpoints.restore(nasty_state(), latest=0)
        assert checkpoints.save(4, nasty_state(4), config={})
        assert checkpoints.steps() == [1, 2, 4]
    assert (run / "superseded/3.0").exists()


@pytest.mark.parametrize("damage", [delete_arrays, spoil_position])
def test_nothing_readable_is_an_error_and_leaves_the_iterator(run, damage):
    for step in (1, 2, 3):
        damage(run / str(step))
    data, first = batches(), next(batches())
    message = f"{run}: no checkpoint can be read"
    with (
        Checkpoints(run) as checkpoints,
        pytest.warns(RuntimeWarning),
        pytest.raises(CheckpointError, match=message),
    ):
        checkpoints.restore(nasty_state(), data=data)
    np.testing.assert_array_equal(next(data), first)


def test_no_checkpoint_at_all(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match="there is no checkpoint"):
            checkpoints.restore(nasty_state())
        with pytest.raises(CheckpointError, match="there is no checkpoint"):
            checkpoints.config()


MISMATCHES = {
    "shape": (
        {"half": jnp.zeros((5, 8), jnp.bfloat16)},
        r"half is bfloat16\[5,7\] in the checkpoint and bfloat16\[5,8\] in the target",
    ),
    "dtype": ({"half": jnp.zeros((5, 7))}, r"bfloat16\[5,7\].* and float32\[5,7\]"),
    "missing": ({"new": jnp.zeros(2)}, r"new is absent in .* and float32\[2\] in the"),
    "extra": ({"odd": None}, r"odd is float32\[4\] in .* and absent in the target"),
    "nested": (
        {"slot": Slot(jnp.zeros((8, 2)), None, rank=2)},
        r"slot/basis is float32\[8,4\] .* and float32\[8,2\]",
    ),
}


@pytest.mark.parametrize(("change", "message"), MISMATCHES.values(), ids=MISMATCHES)
def test_a_mismatch_is_named_and_not_passed_over(run, change, message):
    data, first = batches(), next(batches())
    with Checkpoints(run) as checkpoints, warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CheckpointError, match=message) as caught:
            checkpoints.restore(nasty_state() | change, data=data)
    assert str(run / "3") in str(caught.value)
    np.testing.assert_array_equal(next(data), first)


@pytest.mark.parametrize("resumed", [True, False], ids=["resumed", "not resumed"])
def test_saving_over_a_damaged_step(run, resumed):
    """The new checkpoint wins; the damaged one is set aside, not deleted."""
    empty_directory(run / "3")
    (run / "3" / "evidence").touch()
    with Checkpoints(run, keep=1) as checkpoints:
        if resumed:
            with pytest.warns(RuntimeWarning):
                checkpoints.restore(nasty_state())
        assert checkpoints.save(3, nasty_state(30), config={})
    with Checkpoints(run) as checkpoints:
        step, state = checkpoints.restore(nasty_state())
        assert checkpoints.steps() == [3]
    assert step == 3
    assert_same(state, nasty_state(30))
    assert (run / "superseded/3.0/evidence").exists()


def test_saving_before_a_damaged_step(run):
    """A damaged future must not make `keep` prune the present."""
    truncate_arrays(run / "3")
    shutil.move(run / "3", run / "9")
    with Checkpoints(run, keep=1) as checkpoints:
        with pytest.warns(RuntimeWarning):
            checkpoints.restore(nasty_state())
        checkpoints.save(4, nasty_state(4), config={})
        checkpoints.save(5, nasty_state(5), config={})
    with Checkpoints(run) as checkpoints:
        assert checkpoints.steps() == [5]
    assert (run / "superseded/9.0").exists()


def test_keep_prunes_and_every_skips(tmp_path):
    with Checkpoints(tmp_path, keep=2, every=10) as checkpoints:
        written = [
            step
            for step in range(1, 46)
            if checkpoints.save(step, {"x": jnp.arange(3)}, config={})
        ]
        assert written == [10, 20, 30, 40]
        assert checkpoints.save(45, {"x": jnp.arange(3)}, config={}, force=True)
        assert not checkpoints.save(45, {"x": jnp.arange(3)}, config={}, force=True)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [40, 45]


def test_config_needs_no_model(run):
    with Checkpoints(run) as checkpoints:
        assert checkpoints.config() == {"rank": 4, "step": 3}
        assert checkpoints.config(2) == {"rank": 4, "step": 2}
        truncate_index(run / "3")
        assert checkpoints.config() == {"rank": 4, "step": 2}
        with pytest.raises(CheckpointError, match="3 is unreadable"):
            checkpoints.config(3)


@pytest.mark.parametrize(
    ("state", "config", "error", "message"),
    [
        ({"x": 1.0}, {"path": object()}, TypeError, "not JSON serializable"),
        ({"a/b": 1.0, "a": {"b": 2.0}}, {}, ValueError, "the same path"),
        ({"key": jax.random.key(0)}, {}, TypeError, "key_data"),
    ],
    ids=["config", "paths", "typed key"],
)
def test_what_cannot_be_saved_fails_at_once(tmp_path, state, config, error, message):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(error, match=message):
            checkpoints.save(1, state, config=config)
        assert checkpoints.steps() == []


def large(seed: int = 0):
    return {
        f"w{n}": jax.random.normal(jax.random.key(n + seed), (256, 256))
        for n in range(9)
    }


@pytest.fixture
def small_files(tmp_path):
    """No file grows beyond a few kilobytes, which is what a quota does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))

    yield tmp_path, full
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own, for two checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = 5 * large_bytes() // 2
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if (
        not shutil.which("mount")
        or subprocess.run(mount, capture_output=True).returncode
    ):
        pytest.skip("no disk can be mounted here")
    yield disk, lambda: (disk / "other").write_bytes(bytes(large_bytes()))
    subprocess.run(["umount", "-l", str(disk)], check=True)


def large_bytes():
    return sum(leaf.nbytes for leaf in large().values())


@pytest.mark.parametrize("at", ["the next save", "the end"])
@pytest.mark.parametrize("room", ["small_files", "small_disk"])
def test_no_room_is_one_sentence(room, at, request, capfd):
    folder, fill = request.getfixturevalue(room)
    checkpoints = Checkpoints(folder / "run")
    checkpoints.save(1, large(), config={})
    assert checkpoints.restore(large())[0] == 1  # it is there, whole
    fill()
    checkpoints.save(2, large(1), config={})
    with pytest.raises(CheckpointError) as full:
        if at == "the end":
            checkpoints.close()
        else:
            checkpoints.save(3, large(2), config={})
    checkpoints.close()
    why = "File too large" if room == "small_files" else "No space left on device"
    assert str(full.value) == (
        f"{folder / 'run'}: the checkpoint of step 2 cannot be written: {why};"
        " of those there, the newest whole one is step 1"
    )
    assert [file.name for file in (folder / "run").iterdir()] == ["1"]
    with Checkpoints(folder / "run") as after:
        step, state = after.restore(large())
    assert_same((step, state), (1, large()))
    assert "Traceback" not in capfd.readouterr().err


def test_room_again(small_files):
    folder, fill = small_files
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, large(), config={})
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        checkpoints.restore(large())
        fill()
        checkpoints.save(2, large(1), config={})
        with pytest.raises(CheckpointError, match="step 2 cannot be written"):
            checkpoints.save(3, large(2), config={})
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert checkpoints.save(2, large(1), config={})
    with Checkpoints(folder) as checkpoints:
        assert_same(checkpoints.restore(large()), (2, large(1)))


def test_what_is_under_way_is_not_masked(small_files):
    folder, fill = small_files
    with (
        pytest.raises(KeyError, match="the reason"),
        pytest.warns(RuntimeWarning, match="step 1 cannot be written"),
        Checkpoints(folder) as checkpoints,
    ):
        fill()
        checkpoints.save(1, large(), config={})
        raise KeyError("the reason")


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be used: Not a directory"):
        Checkpoints(tmp_path / "file/run")


def test_what_a_kill_left_is_removed_by_the_next_save(run):
    shutil.copytree(run / "3", run / "7.orbax-checkpoint-tmp")
    with Checkpoints(run) as checkpoints:
        checkpoints.restore(nasty_state())
        assert (run / "7.orbax-checkpoint-tmp").exists()  # another may be writing
        checkpoints.save(4, nasty_state(4), config={})
    assert not (run / "7.orbax-checkpoint-tmp").exists()
