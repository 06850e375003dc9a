"""Files that are whole or not there, and folders with one owner."""

import signal
import subprocess
import sys

import pytest

from train.errors import UserError
from train.files import LOCK, is_owned, owned, replacing, scratch

OWNER = """
import sys, time
from pathlib import Path
from train.files import owned
with owned(Path(sys.argv[1]), "--out"):
    print("mine", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def owner(tmp_path):
    """A folder, and another process that has it."""
    command = [sys.executable, "-c", OWNER, str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "mine\n"
    yield tmp_path / "out", process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("old")
    with pytest.raises(OSError, match="no room"), replacing(file) as temporary:
        temporary.write_text("ne")
        raise OSError("no room")
    assert [f.name for f in tmp_path.iterdir()] == ["a.json"]
    assert file.read_text() == "old"
    with replacing(file) as temporary:
        temporary.write_text("new")
    assert [f.name for f in tmp_path.iterdir()] == ["a.json"]
    assert file.read_text() == "new"


def test_a_folder_has_one_owner(owner):
    folder, process = owner
    assert is_owned(folder)
    with pytest.raises(UserError) as refused, owned(folder, "--out runs/a"):
        pass
    assert str(refused.value).startswith(
        f"--out runs/a is in use by process {process.pid} on "
    )


def test_a_lock_dies_with_its_process(owner):
    folder, process = owner
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not is_owned(folder)
    with owned(folder, "--out"):
        assert is_owned(folder)


def test_a_folder_is_left_as_it_was(tmp_path):
    with owned(tmp_path / "new", "--out"):
        assert (tmp_path / "new" / LOCK).exists()
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with owned(tmp_path / "old", "--out"):
        pass
    assert [f.name for f in tmp_path.iterdir()] == ["old"]


def test_what_killed_processes_left_is_removed(owner):
    theirs, process = owner
    parent, left = theirs.parent, theirs.parent / "out-left"
    (left / "deep").mkdir(parents=True)
    (left / LOCK).write_text("{}")
    with scratch(parent, "out") as mine:
        assert {*parent.iterdir()} == {theirs, mine}
        (mine / "data").mkdir()
        (mine / "data" / "a.txt").write_text("a")
        (mine / "b.txt").write_text("b")
    assert [*parent.iterdir()] == [theirs]
    process.send_signal(signal.SIGKILL)
    process.wait()
    with scratch(parent, "out") as mine:
        assert [*parent.iterdir()] == [mine]
    assert not [*parent.iterdir()]
