"""A wheel of what is committed holds every module, and trains where nothing else is."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TRAIN = "--steps 2 --batch 2 --seq 16 --eval-batches 1".split()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built of the files that git knows or would add: what it ignores is not there."""
    listed = subprocess.run(
        "git ls-files -z --cached --others --exclude-standard".split(),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("this is no git checkout")
    clone, out = (tmp_path_factory.mktemp(name) for name in ("clone", "wheel"))
    for name in filter(None, listed.stdout.split("\0")):
        # A removed file is listed until that is committed; tests have large fixtures.
        if (ROOT / name).is_file() and not name.startswith(("tests/", "benchmarks/")):
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    subprocess.run([*build, "--wheel-dir", out, clone], check=True)
    (made,) = out.glob("*.whl")
    return made


def trains(python: str | Path, folder: Path, environment: dict[str, str]) -> None:
    """Two steps on a text, from that folder."""
    text = folder / "text.txt"
    text.write_text("a wheel that trains is worth more than one that imports " * 50)
    places = [f"--data={text}", f"--cache={folder}/c", f"--out={folder}/r"]
    run = subprocess.run(
        [python, "-m", "train", "pretrain", *TRAIN, *places],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "validation loss" in run.stdout


def test_wheel_trains_from_another_folder(wheel, tmp_path):
    """With this environment's dependencies, and the wheel's modules alone."""
    unpacked = tmp_path / "unpacked"
    zipfile.ZipFile(wheel).extractall(unpacked)
    packages = {path.name for path in unpacked.iterdir() if path.suffix != ".dist-info"}
    assert packages == {"oasis_jax", "train"}
    for package in packages:
        ours = {p.relative_to(ROOT) for p in (ROOT / package).rglob("*.py")}
        theirs = {p.relative_to(unpacked) for p in (unpacked / package).rglob("*.py")}
        assert theirs == ours
    trains(sys.executable, tmp_path, os.environ | {"PYTHONPATH": str(unpacked)})


@pytest.mark.slow
def test_wheel_trains_in_a_clean_environment(wheel, tmp_path):
    """As after `pip install`: takes minutes, and what pip downloads."""
    venv.create(tmp_path / "clean", with_pip=True)
    python = tmp_path / "clean" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", f"{wheel}[train]"]
    subprocess.run(install, check=True)
    bare = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    trains(python, tmp_path, bare)
