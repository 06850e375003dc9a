"""Runs as processes: which exit codes are results, and what a failure passes on."""

import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from train.errors import DataError, Diverged, Preempted, UserError
from train.run.trials import Processes, run_trial, side_by_side


def script(out, code: int, *, summary: bool, said: str = "") -> list[str]:
    """A process that writes a summary or not, says something, and exits."""
    lines = [f"import pathlib, sys; out = pathlib.Path({str(out)!r})"]
    if summary:
        lines.append("out.mkdir(); (out / 'summary.json').write_text('{\"steps\": 1}')")
    lines.append(f"print({said!r}, file=sys.stderr); sys.exit({code})")
    return [sys.executable, "-c", "\n".join(lines)]


@pytest.mark.parametrize("code", [0, Diverged.exit_code])
def test_what_is_done_or_diverged_has_a_summary(code, tmp_path):
    out = tmp_path / "run"
    assert run_trial(out, script(out, code, summary=True), Processes()) == {"steps": 1}


def test_what_is_finished_does_not_run_again(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 2}))
    assert run_trial(tmp_path, ["no-such-program"], Processes()) == {"steps": 2}


@pytest.mark.parametrize("code", [1, UserError.exit_code, Preempted.exit_code])
def test_a_failure_passes_its_last_words_on(code, tmp_path):
    out = tmp_path / "run"
    command = script(out, code, summary=False, said="first\nerror: too short")
    with pytest.raises(UserError, match="trial run: error: too short"):
        run_trial(out, command, Processes())


def test_a_stopped_trial_can_be_continued(tmp_path):
    out = tmp_path / "run"
    command = script(out, Preempted.exit_code, summary=False, said="stopped, and saved")
    with pytest.raises(Preempted, match="trial run: stopped, and saved"):
        run_trial(out, command, Processes())


SAVES = """
import signal, sys
from pathlib import Path
def save(*_):
    (Path(sys.argv[1]) / "saved").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
(Path(sys.argv[1]) / "ready").touch()
signal.pause()
"""


@pytest.mark.parametrize("gently", [True, False])
def test_processes_end_together(gently, tmp_path):
    processes = Processes()
    with ThreadPoolExecutor(2) as pool:
        folders = [tmp_path / name for name in "ab"]
        for folder in folders:
            folder.mkdir()
        commands = [[sys.executable, "-c", SAVES, str(folder)] for folder in folders]
        running = [pool.submit(processes.run, command) for command in commands]
        while not all((folder / "ready").exists() for folder in folders):
            assert not any(one.done() for one in running)
            time.sleep(0.01)
        if gently:
            processes.stop()
        else:
            processes.kill()
        codes = {one.result().returncode for one in running}
    assert codes == {75 if gently else -signal.SIGKILL}
    assert [(folder / "saved").exists() for folder in folders] == [gently] * 2
    with pytest.raises(Preempted):  # and none begins
        processes.run(["no-such-program"])


def test_exit_codes_tell_kinds_apart():
    codes = [kind.exit_code for kind in (UserError, Diverged, Preempted)]
    assert codes == [2, 3, 75]
    assert DataError.exit_code == UserError.exit_code


def test_side_by_side_keeps_the_order():
    assert side_by_side(lambda n: n * n, [3, 1, 2], jobs=2) == {3: 9, 1: 1, 2: 4}


def test_processes_share_the_cores():
    code = "import os; print(len(os.sched_getaffinity(0)))"

    def cores(_):
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True
        )
        return int(run.stdout)

    alone, together = (side_by_side(cores, [0, 1], jobs) for jobs in (1, 2))
    assert max(together.values()) <= max(1, (alone[0] + 1) // 2)
