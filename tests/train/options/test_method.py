"""The table of methods as people and programs see it, and every way to ask amiss."""

import dataclasses
import io
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from oasis_jax.methods import METHODS
from oasis_jax.trackers import BlockMean, Complement, Oja, Random, Svd
from train.__main__ import main
from train.commands import compare, pretrain
from train.errors import UserError
from train.options import Compare, Pretrain
from train.options.method import METHOD_OPTIONS
from train.run import loop, trials
from train.run.summary import rank_of


def test_every_option_of_a_row_is_a_field():
    """With no value of its own, so that what is not given is as published."""
    fields = {field.name: field for field in dataclasses.fields(Pretrain)}
    for name, row in METHODS.items():
        for option in row.published:
            assert option in METHOD_OPTIONS, (name, option)
            assert fields[option].default is None, (name, option)


# --- Options reach the recipe -------------------------------------------------------


def rule(**options):
    first, *_ = Pretrain(**options).recipe().rules
    return first


TRACKERS = {
    "oasis": (dict(method="oasis"), Oja()),
    "rso, a tenth of the steps": (
        dict(method="rso", steps=200),
        Random(20, "gaussian"),
    ),
    "rso, as published": (dict(method="rso", steps=5000), Random(50, "gaussian")),
    "rso, given": (dict(method="rso", interval=7, kind="haar"), Random(7, "haar")),
    "compact": (
        dict(method="compact", steps=30, shared=True),
        Random(3, "gaussian", stored=False, shared=True),
    ),
    "complement": (
        dict(method="oasis-complement", share=0.25, unbiased=True),
        Complement(Oja(), 0.25, 20, True),
    ),
    "complement, short": (
        dict(method="oasis-complement", steps=5),
        Complement(Oja(), 0.5, 1, False),
    ),
    "prac": (dict(method="prac"), Complement(Svd(60), 0.5, 60, True)),
    "prac, given": (
        dict(method="prac", interval=30, share=0.75),
        Complement(Svd(30), 0.75, 30, True),
    ),
    "prac, both given": (
        dict(method="prac", interval=30, random_interval=5),
        Complement(Svd(30), 0.5, 5, True),
    ),
    "velora": (dict(method="velora"), BlockMean("once", 1.0)),
    "velora, each batch": (
        dict(method="velora", average="batch", scale=2.0),
        BlockMean("batch", 2.0),
    ),
    "velora, running mean": (
        dict(method="velora", average="0.9"),
        BlockMean(0.9, 1.0),
    ),
}


@pytest.mark.parametrize("options, tracker", TRACKERS.values(), ids=TRACKERS)
def test_options_reach_the_tracker(options, tracker):
    """Intervals are as published, but at most a tenth of the steps unless given."""
    assert rule(**options).tracker == tracker


RANKS = {
    "own": (dict(method="prac"), 0.6),
    "fraction": (dict(method="oasis", rank="0.125"), 0.125),
    "columns": (dict(method="rso", rank="12"), 12),
    "velora's": (dict(method="velora"), 0.125),
    "groups": (dict(method="velora", groups=16), 16),
    "groups before rank": (dict(method="velora", groups=16, rank="0.5"), 16),
}


@pytest.mark.parametrize("options, rank", RANKS.values(), ids=RANKS)
def test_rank_reaches_the_rule(options, rank):
    assert rule(**options).rank == rank
    assert rank_of(Pretrain(**options)) == rank


def test_pattern_and_stride_reach_the_rule():
    mine = rule(method="lora", pattern="q_proj", stride=3, alpha=8.0)
    assert (mine.pattern, mine.stride, mine.tracker.alpha) == ("q_proj", 3, 8.0)


def test_nonlinear_zero_keeps_norms_whole():
    assert len(Pretrain(method="prac").recipe().rules) == 2
    assert Pretrain(method="prac").recipe().rules[1].inputs
    assert len(Pretrain(method="prac", nonlinear=0.0).recipe().rules) == 1


def directions(config: Pretrain, factory=None, steps: int = 12):
    """Updates of the recipe's optimizer (or of another) on made-up gradients."""
    params = {"mlp": {"kernel": jnp.ones((8, 6))}, "head": jnp.ones((6, 2))}
    tx = factory or config.recipe().optimizer(1e-2, peak=1e-2)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for i in range(steps):
        keys = jax.random.split(jax.random.key(i))
        grads = {
            "mlp": {"kernel": jax.random.normal(keys[0], (8, 6))},
            "head": jax.random.normal(keys[1], (6, 2)),
        }
        updates, state = update(grads, state, params)
    return updates


def test_options_reach_the_gradient_side():
    """`interval=7, scale=0.5` is `galore(..., interval=7, scale=0.5)`, and nothing else."""
    from oasis_jax import galore

    config = Pretrain(method="galore", interval=7, scale=0.5, rank="2")
    got = directions(config)

    def expected(**changes):
        own = dict(scale=0.5, interval=7, pattern="mlp/") | changes
        return directions(config, galore(1e-2, 2, **own))

    def same(a, b):
        return all(
            bool(jnp.allclose(x, y, atol=1e-7))
            for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        )

    assert same(got, expected())
    assert not same(got, expected(interval=5))
    assert not same(got, expected(scale=0.25))


def test_interval_of_galore_is_capped():
    """80 steps: a basis every 8 of them, not every 200."""
    short = Pretrain(method="galore", rank="2", steps=80)
    given = dataclasses.replace(short, interval=8)
    published = dataclasses.replace(short, interval=200)
    one, two, three = (
        directions(c)["mlp"]["kernel"] for c in (short, given, published)
    )
    assert jnp.array_equal(one, two) and not jnp.allclose(one, three)


# --- Errors -------------------------------------------------------------------------

# What is wrong, and what the user is told; none of it takes a compiled step to find.
BAD = {
    "method": ("--method=galroe", "method is 'galroe', expected one of adamw, oasis,"),
    "option of another": (
        "--method=galore --groups=4",
        "--groups is no option of galore, whose are:",
    ),
    "option of none": (
        "--method=adamw --interval=4",
        "--interval is no option of adamw, whose are: none",
    ),
    "two words": (
        "--method=rso --random-interval=4",
        "--random-interval is no option of rso",
    ),
    "groups": (
        "--method=velora --groups=7",
        "blocks/attn/v_proj/kernel: rule 'attn/v_proj|mlp/down_proj' asks for 7 groups,"
        " which do not divide its 128 input features",
    ),
    "groups as rank": (
        "--method=velora --rank=0.3",
        "38 groups, which do not divide its 128 input features",
    ),
    "groups of one kernel": (
        "--method=velora --groups=16",
        "mlp/down_proj/kernel: rule 'attn/v_proj|mlp/down_proj' asks for 16 groups,"
        " which do not divide its 344 input features",
    ),
    "no columns for a part": (
        "--method=prac --rank=1",
        "asks for rank 1, which leaves no column for a part at share 0.5",
    ),
    "average": ("--method=velora --average=x", "--average is 'x', expected a number"),
    "average above one": ("--method=velora --average=2", "average is 2.0, expected"),
    "base": (
        "--method=galore --base=sgdd",
        "base is 'sgdd', expected one of 'adam', 'lion', 'adafactor'",
    ),
    "kind": ("--method=rso --kind=cauchy", "kind is 'cauchy', expected 'haar' or"),
    "alpha": ("--method=lora --alpha=0", "alpha is 0.0, expected a positive number"),
    "proximal": ("--method=rso --proximal=0", "strength is 0.0, expected a positive"),
    "share": ("--method=prac --share=1.5", "share is 1.5, expected between 0 and 1"),
    "interval": (
        "--method=galore --interval=0",
        "--interval is 0, expected at least 1",
    ),
    "random interval": ("--method=prac --random-interval=0", "interval is 0, expected"),
    "nonlinear": ("--method=prac --nonlinear=2", "rank is 2.0, expected a fraction"),
    "pattern that is none": ("--method=oasis --pattern=(", "rule '(': missing )"),
}
for _name in ("oasis", "compact", "lora", "prac"):
    BAD[f"rank of {_name}"] = (
        f"--method={_name} --rank=4096",
        "asks for rank 4096, but it has only 128 input features",
    )
    BAD[f"pattern of {_name}"] = (
        f"--method={_name} --pattern=nosuch",
        "rule 'nosuch' matches no kernel; the nearest are blocks/",
    )
for _name, _side in (("galore", "in"), ("osd", "in"), ("ldadam", "out")):
    BAD[f"rank of {_name}"] = (
        f"--method={_name} --rank=4096",
        f"blocks/attn/k_proj/kernel: rank is 4096, but side '{_side}' of a kernel of"
        " shape (4, 128, 128) has only 128 features",
    )
    BAD[f"pattern of {_name}"] = (
        f"--method={_name} --pattern=nosuch",
        "pattern 'nosuch' matches no leaf that is a matrix; the nearest are blocks/",
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("a sentence says more than a traceback " * 100)
    return path


@pytest.fixture
def tiny(corpus, tmp_path, monkeypatch) -> list[str]:
    """Flags of a tiny run that fails the test if it comes to compiling its step."""

    def compiled(*_):
        raise AssertionError("it went on to compile a step")

    monkeypatch.setattr(loop, "compiled_step", compiled)
    sizes = "--steps=2 --batch=2 --seq=16 --eval-batches=1".split()
    cache = corpus.with_name("cache")
    return [f"--data={corpus}", f"--cache={cache}", f"--out={tmp_path / 'run'}", *sizes]


@pytest.mark.parametrize("words, sentence", BAD.values(), ids=BAD)
def test_bad_options_of_pretrain(tiny, words, sentence, capsys, tmp_path):
    """One line that says what is wrong, exit code 2, and nothing left behind."""
    assert main(["pretrain", *words.split(), *tiny]) == 2
    out, err = capsys.readouterr()
    told = [line for line in err.splitlines() if not line.startswith("data ")]
    assert len(told) == 1 and told[0].startswith("error: ") and sentence in told[0]
    assert not out and "Traceback" not in err
    assert not (tmp_path / "run").exists()


BAD_COMPARISONS = {
    "method": (
        "--methods=adamw,galroe",
        "--methods: method is 'galroe', expected one of adamw, oasis,",
    ),
    "option of none": (
        "--methods=adamw,galore --groups=4",
        "--groups is an option of velora, and --methods adamw,galore has none of them",
    ),
    "two words": (
        "--methods=adamw --random-interval=4",
        "--random-interval is an option of prac, and --methods adamw has none of them",
    ),
    "option of several": (
        "--methods=adamw,lora --scale=0.5",
        "--scale is an option of oasis, oasis-complement, compact, velora, galore, osd,",
    ),
    "average": ("--methods=adamw,velora --average=x", "--average is 'x', expected a"),
    "kind": ("--methods=adamw,rso --kind=cauchy", "kind is 'cauchy', expected 'haar'"),
    "alpha": ("--methods=adamw,lora --alpha=0", "alpha is 0.0, expected a positive"),
    "rank zero": ("--methods=oasis:0", "rank is 0, expected a fraction of n_in"),
    "interval": ("--methods=galore --interval=0", "--interval is 0, expected at least"),
}


@pytest.mark.parametrize(
    "words, sentence", BAD_COMPARISONS.values(), ids=BAD_COMPARISONS
)
def test_bad_options_of_compare(tiny, words, sentence, capsys, tmp_path, monkeypatch):
    """As above, and before any trial begins."""

    def trial(*_, **__):
        raise AssertionError("a trial began")

    monkeypatch.setattr(trials.subprocess, "run", trial)
    assert main(["compare", *words.split(), *tiny]) == 2
    out, err = capsys.readouterr()
    (told,) = err.splitlines()
    assert told.startswith("error: ") and sentence in told and not out
    assert not (tmp_path / "run").exists()


# What depends on the model is found by the trial, whose sentence is passed on.
BAD_TRIALS = {
    "groups": (
        "--methods=velora --groups=7",
        "trial velora-lr0.001-seed0: error: blocks/attn/v_proj/kernel: rule"
        " 'attn/v_proj|mlp/down_proj' asks for 7 groups, which do not divide its 128",
    ),
    "rank": (
        "--methods=oasis:4096",
        "trial oasis-r4096-lr0.001-seed0: error: blocks/attn/o_proj/kernel: rule"
        " 'attn/|mlp/' asks for rank 4096, but it has only 128 input features",
    ),
    "rank of galore": (
        "--methods=galore --rank=4096",
        "trial galore-lr0.004-seed0: error: blocks/attn/k_proj/kernel: rank is 4096,",
    ),
    "pattern": (
        "--methods=oasis --pattern=nosuch",
        "error: rule 'nosuch' matches no kernel; the nearest are blocks/",
    ),
    "pattern of galore": (
        "--methods=galore --pattern=nosuch",
        "error: pattern 'nosuch' matches no leaf that is a matrix; the nearest",
    ),
    "base": ("--methods=galore --base=sgdd", "base is 'sgdd', expected one of"),
}


def in_process(command: list[str], **_) -> subprocess.CompletedProcess:
    """Runs a trial's command line here, to save the start of a process."""
    assert command[1:3] == ["-m", "train"]
    err = io.StringIO()
    with redirect_stderr(err), redirect_stdout(io.StringIO()):
        code = main(command[3:])
    return subprocess.CompletedProcess(command, code, "", err.getvalue())


@pytest.mark.parametrize("words, sentence", BAD_TRIALS.values(), ids=BAD_TRIALS)
def test_bad_options_that_a_trial_finds(tiny, words, sentence, capsys, monkeypatch):
    monkeypatch.setattr(trials.subprocess, "run", in_process)
    assert main(["compare", *words.split(), "--lrs=1e-3", *tiny]) == 2
    out, err = capsys.readouterr()
    (told,) = err.splitlines()
    assert told.startswith("error: ") and sentence in told and not out


def test_an_option_goes_to_those_that_have_it():
    """--scale is given to oasis, galore and velora, and adamw and lora do not mind."""
    labels = ("adamw", "lora", "oasis:0.5", "velora", "galore")
    config = Compare(methods=",".join(labels), scale=0.5, groups=8)
    compare.check_methods(config, config.methods.split(","))
    for label, expected in {
        "adamw": set(),
        "lora": set(),
        "oasis:0.5": {"--rank=0.5", "--scale=0.5"},
        "velora": {"--scale=0.5", "--groups=8"},
        "galore": {"--scale=0.5"},
    }.items():
        trial = compare.Trial(label, 1e-3, 0)
        words = compare.command(config, trial, Path("out"))
        own = {
            word
            for word in words
            if word.split("=")[0] in ("--scale", "--groups", "--rank")
        }
        assert own == expected


FLAGS = {
    "yes": ("--error-feedback=True", True),
    "no": ("--error-feedback=False", False),
}


@pytest.mark.parametrize("flag, value", FLAGS.values(), ids=FLAGS)
def test_yes_and_no_survive_the_command_line(flag, value, monkeypatch):
    """Of a comparison to its trials, whose method's own default is the other one."""
    config = Compare(methods="ldadam", error_feedback=value)
    words = compare.command(config, compare.Trial("ldadam", 1e-3, 0), Path("out"))
    assert flag in words
    seen = []
    monkeypatch.setattr(pretrain, "main", seen.append)
    assert main(words[3:]) == 0
    assert seen[0].error_feedback is value and seen[0].method == "ldadam"


def test_errors_are_user_errors():
    """Who calls the function, not the command, catches one kind of exception."""
    with pytest.raises(UserError, match="--groups is no option of oasis"):
        Pretrain(method="oasis", groups=2).recipe()
