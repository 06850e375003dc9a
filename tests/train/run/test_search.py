"""Which configurations a search tries, and what it believes."""

from oasis_jax.models.blocks import REMAT
from train.options import Plan
from train.run.planning import Planned
from train.run.search import Candidate, batches, search, variants


def test_variants_join_by_being_in_the_table():
    found = variants(Plan(methods="adamw,oasis", preset="llama-1b"))
    assert {v.remat for v in found} == set(REMAT)
    assert [v.rank for v in found if v.method == "adamw"] == [None] * len(REMAT)
    assert {v.rank for v in found if v.method == "oasis"} >= {"256", "512", "0.125"}
    given = variants(Plan(methods="oasis", rank="64"))
    assert {v.rank for v in given} == {"64"}


def test_options_go_to_the_methods_that_have_them():
    adamw, velora = (
        v
        for v in variants(Plan(methods="adamw,velora", groups=16, rank="4"))
        if v.remat == "block"
    )
    assert adamw.groups is None
    assert velora.groups == 16


def test_batches_are_powers_of_two():
    assert batches(Plan(batch=8)) == [1, 2, 4, 8]
    assert batches(Plan(batch=12, accumulate=3)) == [3, 6, 12]


def candidate(size: int, speed: float, method: str = "oasis", rank: str | None = "64"):
    return Candidate(Plan(method=method, rank=rank, batch=1, seq=size), size, speed)


def compiler(factor: float, seen: list):
    """Says that everything needs `factor` times what was estimated."""

    def confirm(c: Candidate) -> Planned:
        seen.append(c.bytes)
        seconds = c.config.batch * c.config.seq / c.tokens_per_second
        return Planned(c.config, round(factor * c.bytes), {}, seconds, True)

    return confirm


def test_search_takes_the_fastest_that_fits():
    seen: list[int] = []
    pool = [candidate(size, speed) for size, speed in [(10, 1), (20, 2), (30, 3)]]
    (plan,) = search(pool, 25, 3, compiler(1.0, seen))
    assert plan.peak_bytes == 20
    assert seen == [20]  # what cannot fit is not compiled


def test_search_believes_the_compiler():
    seen: list[int] = []
    pool = [candidate(size, size) for size in (10, 17, 18, 20)]
    (plan,) = search(pool, 25, 3, compiler(2.0, seen))
    assert plan.peak_bytes == 20
    assert seen == [20, 10]  # learnt from the first what 18 and 17 would need


def test_search_gives_one_plan_of_a_kind_fastest_first():
    pool = [
        candidate(10, 1, rank="64"),
        candidate(10, 3, rank="32"),
        candidate(10, 2, rank="32"),
        candidate(10, 4, method="adamw", rank=None),
    ]
    plans = search(pool, 25, 2, compiler(1.0, []))
    assert [p.tokens_per_second for p in plans] == [4, 3]
    assert search(pool, 5, 2, compiler(1.0, [])) == []


def test_search_goes_on_after_what_does_not_compile():
    pool = [candidate(10, 2), candidate(9, 1)]
    good = compiler(1.0, [])
    (plan,) = search(pool, 25, 1, lambda c: None if c.bytes == 10 else good(c))
    assert plan.peak_bytes == 9
