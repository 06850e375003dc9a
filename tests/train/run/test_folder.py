"""A run's folder: whose it is, what was best, which checkpoints are exported."""

import pytest

from train.errors import UserError
from train.files import LOCK, is_owned
from train.options import Pretrain
from train.run.folder import RunFolder, best, claim


def test_claims_what_is_empty(tmp_path):
    for out in (tmp_path / "new", tmp_path):
        with claim(Pretrain(out=out)) as folder:
            assert folder.path == out and is_owned(out)
    assert not list(tmp_path.iterdir())  # nothing was put there


def test_what_a_killed_owner_left_is_nothing(tmp_path):
    (tmp_path / LOCK).write_text("{}")
    with claim(Pretrain(out=tmp_path)):
        assert is_owned(tmp_path)


def test_a_run_has_its_folder_alone(tmp_path):
    """Its lock is the process's, and the refused one leaves everything as it was."""
    with claim(Pretrain(out=tmp_path)):
        before = (tmp_path / LOCK).read_bytes()
        for resume in (False, True):
            config = Pretrain(out=tmp_path, resume=resume)
            with pytest.raises(UserError, match="is in use by process"), claim(config):
                pass
        assert (tmp_path / LOCK).read_bytes() == before and is_owned(tmp_path)


def test_refuses_what_is_taken_or_absent(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="already holds something"):
        claim(Pretrain(out=tmp_path)).__enter__()
    with pytest.raises(UserError, match="already holds something"):
        claim(Pretrain(out=tmp_path / "thesis.txt")).__enter__()
    with pytest.raises(UserError, match="there is no run in --out"):
        claim(Pretrain(out=tmp_path, resume=True)).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


EXPORTS = {
    "the best": (["best/3", "checkpoints/6"], "best"),
    "all": (["checkpoints/6"], "checkpoints"),
    "a folder of checkpoints": (["6"], "."),
}


@pytest.mark.parametrize("there, chosen", EXPORTS.values(), ids=EXPORTS)
def test_exports_the_best_if_there_is_one(there, chosen, tmp_path):
    for name in there:
        (tmp_path / name).mkdir(parents=True)
    assert RunFolder(tmp_path).to_export() == tmp_path / chosen


@pytest.mark.parametrize(
    "name, sentence",
    [("nowhere", "there is no such folder"), (".", "there is no checkpoint in it")],
)
def test_nothing_to_export(name, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        RunFolder(tmp_path / name).to_export()


BEST = {
    "least loss": ([{"val_loss": 2.0}, {"val_loss": 1.0}, {"val_loss": 3.0}], 1),
    "most score": (
        [{"val_loss": 1.0, "score": 0.1}, {"val_loss": 2.0, "score": 0.2}],
        1,
    ),
    "the first of equals": ([{"val_loss": 1.0}, {"val_loss": 1.0}], 0),
    "what is a number": ([{"val_loss": None}, {"val_loss": 9.0}], 1),
    "not what is none": ([{"val_loss": float("nan")}, {"val_loss": 9.0}], 1),
    "only evaluations": ([{"loss": 0.0}, {"val_loss": 1.0}], 1),
}


@pytest.mark.parametrize("records, which", BEST.values(), ids=BEST)
def test_the_first_of_the_best(records, which):
    assert best(records) is records[which]


def test_no_evaluation_is_no_best():
    assert best([{"loss": 1.0}]) is None
