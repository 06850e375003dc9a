"""Files that are whole or not there, and folders with one owner."""

import resource
import signal
import subprocess
import sys

import pytest

from train.__main__ import main
from train.errors import UserError
from train.files import LOCK, is_owned, owned, replacing, scratch
from train.report.log import MetricsLog, read_json, read_metrics, write_json

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


def test_an_error_names_the_file_that_was_to_be(tmp_path):
    with pytest.raises(OSError) as caught, replacing(tmp_path / "a.json") as temporary:
        temporary.mkdir()
        temporary.write_text("new")
    assert caught.value.filename == str(tmp_path / "a.json")


@pytest.fixture
def no_room():
    """No file of this process may grow beyond a few bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_finds_no_room_names_itself(tmp_path, no_room):
    """A log keeps what it had; a file of another kind stays as it was."""
    log, other = tmp_path / "metrics.jsonl", tmp_path / "summary.json"
    write_json(other, {"old": 1})
    with pytest.raises(OSError, match="too large") as full, MetricsLog(log) as metrics:
        metrics({"step": 1, "loss": 1.0})
        no_room()
        metrics({"step": 2, "loss": 1.0, "why": "long" * 99})
    assert full.value.filename == str(log)
    assert [record["step"] for record in read_metrics(log)] == [1]
    with pytest.raises(OSError, match="too large") as full:
        write_json(other, {"new": "long" * 99})
    assert full.value.filename == str(other)
    assert read_json(other) == {"old": 1}
    assert {file.name for file in tmp_path.iterdir()} == {log.name, other.name}


def test_a_folder_that_is_a_file_is_one_sentence(tmp_path, capsys):
    """Whatever the user is, root included."""
    (tmp_path / "file").touch()
    text = tmp_path / "text.txt"
    text.write_text("words\n" * 500)
    out = tmp_path / "file/out"
    code = main(f"pretrain --data {text} --cache {tmp_path}/c --out {out}".split())
    said = capsys.readouterr().err.splitlines()[-1]
    assert code == 2
    assert said.startswith("error: ") and f"{tmp_path}/file" in said
    assert "Not a directory" in said


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
