"""The table of tasks: its rows make sense, and another row is another task."""

import pytest

from train.data.labelled import load_labelled
from train.data.tasks import ANSWERS, CORRELATIONS, LABELS, TASKS, Columns, Task
from train.data.tokenizer import Limits
from train.errors import UserError
from train.objectives.metrics import METRICS
from train.options import Finetune


@pytest.mark.parametrize("name", TASKS)
def test_every_row_is_of_known_parts(name):
    task = TASKS[name]
    assert task.metrics and {*task.metrics} <= {*METRICS}
    assert task.objective in (LABELS, ANSWERS)
    assert len(task.spelled) in (0, len(task.labels))
    assert task.regression == (task.metrics == CORRELATIONS)
    assert not (task.regression and task.labels)


@pytest.mark.parametrize(
    ("name", "outputs"), [("cola", 2), ("stsb", 1), ("classification", 1), ("sft", 0)]
)
def test_outputs(name, outputs):
    assert TASKS[name].outputs == outputs


def test_a_row_makes_a_task(tmp_path, tokenizer_file, monkeypatch):
    options = dict(model="model", task="qnli", data=str(tmp_path))
    with pytest.raises(UserError, match="--task is 'qnli', expected one of cola"):
        Finetune(**options)
    row = Task(
        Columns(("question", "sentence"), "label"),
        labels=("entailment", "not_entailment"),
    )
    monkeypatch.setitem(TASKS, "qnli", row)
    header, *lines = (
        "index\tquestion\tsentence\tlabel",
        "0\tran it far\tit ran far\tentailment",
        "1\tsat it\tit ran\tnot_entailment",
        "2\tran it\tit ran\tentailment",
    )
    for split, part in (("train", lines), ("dev", lines[1:2])):
        (tmp_path / f"{split}.tsv").write_text("\n".join([header, *part]))
    data = load_labelled(
        "qnli", str(tmp_path), tokenizer_file, Limits(16, 1000), progress=False
    )
    assert (data.train_size, data.validation_size) == (3, 1)
    assert (data.labels, data.metrics) == (row.labels, ("accuracy",))
    assert next(data.validation(1))["labels"].tolist() == [[1]]
    assert sorted(next(data.train(3, 0))["labels"].ravel()) == [0, 0, 1]
    assert Finetune(**options).task == "qnli"
