"""The rooms: imports run one way, no command knows another, everything has its line.

Read from the imports in the source, of which none is run.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY, TRAINER = "oasis_jax", "train"
FLOORS = "commands run objectives options data report files errors".split()
"""Of train/, from the top: each may import what is further down."""
LONGEST = 400
LONGER = {
    # One table, a row a family: Hugging Face's names and what they mean here.
    "oasis_jax/hf/families.py",
}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def name_of(file: Path) -> str:
    """'train.run.loop'; a package is named as its folder."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(file) for package in (LIBRARY, TRAINER) for file in modules(package)}


def imported(file: Path) -> set[str]:
    """The modules of this repository that a module imports, anywhere in it."""
    seen: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            seen |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import"
            # `from package import module` means the module.
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            seen |= {name if name in NAMES else str(node.module) for name in full}
    return seen & NAMES


GRAPH = {
    name_of(file): imported(file) - {name_of(file)}
    for package in (LIBRARY, TRAINER)
    for file in modules(package)
}


def floor(module: str) -> int:
    """-1 for what lies over all floors, such as __main__."""
    room = module.split(".")[1] if "." in module else ""
    return FLOORS.index(room) if room in FLOORS else -1


def test_no_circles():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for other in GRAPH[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in GRAPH:
        visit(module, ())


@pytest.mark.parametrize("module", [n for n in GRAPH if n.startswith(f"{TRAINER}.")])
def test_imports_go_down(module):
    for other in GRAPH[module]:
        if other.startswith(f"{TRAINER}."):
            same = module.split(".")[:2] == other.split(".")[:2]
            assert same or floor(module) < floor(other), f"{module} -> {other}"


def test_the_library_knows_no_trainer():
    for module, others in GRAPH.items():
        if module.startswith(LIBRARY):
            assert not {other for other in others if other.startswith(TRAINER)}, module


def test_no_command_imports_another():
    inside = f"{TRAINER}.commands."
    for module, others in GRAPH.items():
        if module.startswith(inside):
            assert not [other for other in others if other.startswith(inside)], module


@pytest.mark.parametrize(
    "package, allowed", [(TRAINER, ("data", "report", "files", "errors"))]
)
def test_data_knows_neither_jax_nor_options(package, allowed):
    for file in modules(package):
        if name_of(file).startswith(f"{package}.data"):
            text = file.read_text()
            assert not re.search(r"^\s*(import|from) (jax|flax|optax)\b", text, re.M)
            rooms = {other.split(".")[1] for other in imported(file)}
            assert rooms <= set(allowed), file


@pytest.mark.parametrize(
    "core",
    "bases dense lift optimizer select state subspace trackers transport".split(),
)
def test_the_core_knows_no_flax(core):
    seen, waiting = set(), {f"{LIBRARY}.{core}"}
    while waiting:
        module = waiting.pop()
        seen.add(module)
        waiting |= GRAPH[module] - seen
    for module in seen:
        file = ROOT / Path(*module.split("."))
        file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
        assert not re.search(r"^\s*(import|from) flax\b", file.read_text(), re.M), (
            module
        )


def test_modules_are_short():
    long = {
        str(file.relative_to(ROOT))
        for package in (LIBRARY, TRAINER)
        for file in modules(package)
        if len(file.read_text().splitlines()) > LONGEST
    }
    assert long == LONGER


def test_few_files_lie_flat_in_the_trainer():
    assert len(list((ROOT / TRAINER).glob("*.py"))) <= 6


@pytest.mark.parametrize("package", [LIBRARY, TRAINER])
def test_every_module_has_its_line(package):
    """In docs/architecture.md, so that a stranger finds where a thing is."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    for file in modules(package):
        if file.name != "__init__.py":
            assert file.name in text, file.relative_to(ROOT)


def test_tests_mirror_the_trainer():
    rooms = {path.name for path in (ROOT / TRAINER).iterdir() if path.is_dir()}
    tests = {
        path.name for path in (ROOT / "tests" / TRAINER).iterdir() if path.is_dir()
    }
    assert rooms - tests <= {"__pycache__"} and tests - rooms <= {"__pycache__"}
    for room in rooms - {"__pycache__"}:
        assert list((ROOT / "tests" / TRAINER / room).glob("test_*.py")), room


def test_tests_patch_no_private_names():
    private = re.compile(r"setattr\([^)]*\"_[a-z]|\bpatch\([^)]*\._[a-z]", re.S)
    for file in sorted((ROOT / "tests").rglob("*.py")):
        assert not private.search(file.read_text()), file.relative_to(ROOT)
