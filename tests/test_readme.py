"""The front page and the documents: their code, their links and their numbers."""

import importlib
import re
from pathlib import Path

import chex
import jax
import pytest
from flax import linen as nn

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def test_the_front_page_is_short():
    assert len(README.read_text().splitlines()) <= 180


def test_the_code_of_the_front_page_trains():
    (code,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.S | re.M)
    names = {}
    exec(compile(code, str(README), "exec"), names)
    before = names["loss_fn"](names["variables"], names["x"], names["y"])
    # Not finite would not be less.
    assert names["loss"] < 0.2 * before

    # Both layers are projected, and have the parameters of plain ones.
    kernels = [
        leaf for leaf in jax.tree.leaves(names["state"].subspace) if leaf.ndim == 2
    ]
    assert {kernel.shape for kernel in kernels} == {(16, 4), (128, 32)}
    plain = nn.Sequential([nn.Dense(128), nn.gelu, nn.Dense(16)])
    params = plain.init(jax.random.key(1), names["x"])["params"]
    chex.assert_trees_all_equal_shapes(params, names["state"].params)


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.S | re.M)
    heads = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)$", page.read_text(), re.M)
    for link in map("".join, links):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        to = (page.parent / path).resolve() if path else page
        assert to.exists(), link
        assert not anchor or anchor in anchors(to), link


def test_tables_are_those_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    tables = importlib.import_module("tables")
    pages = [page.read_text() for page in tables.PAGES]
    marked = [match[2] for text in pages for match in tables.MARKED.finditer(text)]
    assert sorted(marked) == sorted(tables.SECTIONS)
    for page, text in zip(tables.PAGES, pages, strict=True):
        written = tables.fill(text)
        assert written == text, f"python benchmarks/tables.py would change {page.name}"
