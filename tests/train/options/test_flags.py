"""Words to options and back: roles, bounds, help, and what is said of a wrong word."""

import dataclasses
import io
import json
from contextlib import redirect_stdout

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oasis_jax.methods import METHODS
from train.__main__ import main
from train.errors import UserError
from train.options import COMMANDS, Compare, Finetune, Plan, Pretrain
from train.options.fields import Role, flag, of_role
from train.options.flags import as_words, parse
from train.options.method import METHOD_OPTIONS, MethodOptions
from train.run.folder import options_of

# As a run of version 0.1.0 wrote it, before options had groups.
BEFORE = {
    **dict(method="galore", steps=12, batch=4, seq=64, rank=None, pattern=None),
    **dict(stride=1, lr=0.003, warmup=0.1, b1=0.9, b2=0.99, weight_decay=0.0),
    **dict(clip=1.0, accumulate=1, remat="elementwise", residuals="whole", seed=0),
    **dict(loss_chunk=2048, embeddings="adamw", dtype="float32", max_skips=10),
    **dict(param_dtype="float32", out="runs/a", resume=False, eval_every=6),
    **dict(checkpoint_every=6, log_every=1, tensorboard=False, interval=4),
    **dict(random_interval=None, share=None, unbiased=None, nonlinear=None),
    **dict(kind=None, proximal=None, shared=None, groups=None, average=None),
    **dict(scale=0.5, out_scale=None, base=None, rho=None, error_feedback=None),
    **dict(alpha=None, preset="llama-tiny", data="text.txt", tokenizer=None),
    **dict(cross_documents=False, eval_batches=4, cache="data", data_dir=None),
    **dict(data_fingerprint="0123", vocab_size=256),
}


def parsed(*words: str):
    return parse(words, "python -m train")


def help_of(command: str) -> str:
    out = io.StringIO()
    with redirect_stdout(out), pytest.raises(SystemExit):
        parsed(command, "--help")
    return out.getvalue()


@pytest.mark.parametrize("name, kind", COMMANDS.items())
def test_every_option_says_what_it_is(name, kind):
    for field in dataclasses.fields(kind):
        assert field.metadata["about"], field.name
        assert isinstance(field.metadata["role"], Role), field.name


@pytest.mark.parametrize("name, kind", COMMANDS.items())
def test_help_names_every_flag_of_the_command_and_no_other(name, kind):
    shown = help_of(name).replace("\n", " ")
    mine = {field.name for field in dataclasses.fields(kind)}
    others = {f.name for k in COMMANDS.values() for f in dataclasses.fields(k)} - mine
    for option in mine:
        assert f"{flag(option)} " in shown.replace(",", " "), option
    # Others may be mentioned in sentences, but have no line of their own.
    for option in others:
        assert f"│ {flag(option)} " not in shown, option


def test_help_of_all_tells_the_exit_codes(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "0 done, 2 something that the user can mend, 3 training diverged, 75" in told


@pytest.mark.parametrize("command", ["pretrain", "finetune", "compare", "plan"])
def test_help_gives_each_method_a_title(command):
    shown = help_of(command)
    for name, method in METHODS.items():
        if method.published and not method.ablation:
            assert f"options of {name} " in shown


UNKNOWN = {
    "a slip": ("pretrain --bacth=4", "--bacth is no option of pretrain", "--batch"),
    "other words": ("pretrain --learning-rate=1", "--learning-rate is no", "--lr"),
    "of another": ("compare --resume", "--resume is no option of compare", "--"),
    "not read": ("plan --seed=3", "--seed is no option of plan", "--"),
    "negated": ("export --no-json", "--no-json is no option of export", "--"),
    "two dashes": ("methods --jsn", "--jsn is no option of methods", "--json"),
}


def test_some_flags_have_another_name():
    one = parse(["compare", "--method=adamw,oasis", "--lr=1e-3", "--seed=2"], "x", "")
    assert (one[1].methods, one[1].lrs, one[1].seeds) == ("adamw,oasis", "1e-3", "2")


@pytest.mark.parametrize("words, sentence, near", UNKNOWN.values(), ids=UNKNOWN)
def test_an_unknown_option_names_the_nearest(words, sentence, near, capsys):
    assert main(words.split()) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: {sentence}")
    assert f"the nearest is {near}" in said


AMISS = {
    "no number": ("pretrain --steps=many", "--steps", "many"),
    "no value": ("pretrain --steps", "--steps", ""),
    "no value, of a method": ("pretrain --interval", "--interval", ""),
    "no integer, of a method": ("pretrain --interval=x", "--interval", "x"),
    "a stray word": ("pretrain stray", "stray", ""),
    "no command": ("", "no command is given", "pretrain, finetune"),
    "another command": ("pretran", "'pretran' is no command", "pretrain, finetune"),
    "required": ("export --out=a", "--checkpoint", "required"),
}


@pytest.mark.parametrize("words, first, second", AMISS.values(), ids=AMISS)
def test_what_cannot_be_read_is_one_sentence(words, first, second, capsys):
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    (said,) = err.splitlines()
    assert said.startswith("error: ") and first in said and second in said and not out


SENSELESS = "--clip=-1 --clip=nan --b1=-1 --b1=nan --b2=1.5 --weight-decay=-5"
SENSELESS += " --weight-decay=nan --lr=0 --lr=inf --warmup=2 --warmup=nan --batch=0"
SENSELESS += " --seed=-1 --seed=18446744073709551616 --stride=0 --interval=0"


@pytest.mark.parametrize("word", SENSELESS.split())
def test_senseless_numbers_are_refused_by_name(word, capsys):
    name, value = word.split("=")
    assert main(["pretrain", word]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: {name} is {value[:3]}")
    assert "expected a" in said


METHODS_OWN = ["--scale=nan --method=oasis", "--rho=7 --method=ldadam"]
METHODS_OWN += ["--out-scale=nan --method=compact", "--alpha=inf --method=lora"]


@pytest.mark.parametrize("words", METHODS_OWN)
def test_senseless_numbers_of_methods_are_refused(words, capsys, tmp_path):
    out = tmp_path / "run"
    assert main(["pretrain", *words.split(), f"--out={out}"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    name = words.split("=")[0]
    assert f"{name} is" in said and "expected a" in said and not out.exists()


def test_a_method_option_goes_anywhere_on_the_line():
    _, config = parsed("pretrain", "--interval", "7", "--method=galore", "--scale=0.5")
    assert (config.interval, config.scale, config.method) == (7, 0.5, "galore")


CONFIGS = {
    "pretrain": Pretrain(method="rso", interval=3, kind="haar", decay="=(a|-b)$ "),
    "finetune": Finetune(model="a b", task="rte", data="x=y", pack=True),
    "compare": Compare(error_feedback=False, lrs="1e-3"),
    "plan": Plan(budget_gib=1.5, cross_documents=False, groups=4),
}


@pytest.mark.parametrize("name, config", CONFIGS.items(), ids=CONFIGS)
def test_words_give_the_options_again(name, config):
    assert parsed(name, *as_words(type(config), vars(config))) == (name, config)


@settings(max_examples=10, deadline=None)
@given(
    batch=st.integers(1, 9),
    lr=st.floats(1e-9, 1e9),
    pattern=st.none()
    | st.text(st.characters(codec="ascii", categories=["Ll"]), min_size=1),
    resume=st.booleans(),
    rho=st.none() | st.floats(0, 1, exclude_max=True),
)
def test_words_give_any_options_again(**values):
    config = Pretrain(**values)
    words = as_words(Pretrain, {name: values[name] for name in values})
    assert parsed("pretrain", *words) == ("pretrain", config)


# --- Roles --------------------------------------------------------------------------


def test_methods_own_options_have_their_role():
    assert set(of_role(MethodOptions, Role.METHOD)) == set(METHOD_OPTIONS)
    assert METHOD_OPTIONS


CHANGES = {
    "log_every": (Role.LOOK, 7),
    "lr": (Role.RUN, 0.5),
    "batch": (Role.STEP, 2),
    "interval": (Role.METHOD, 9),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_role_decides_what_may_change_at_resume(name):
    role, value = CHANGES[name]
    assert name in of_role(Pretrain, role)
    config = Pretrain(method="galore")
    again = dataclasses.replace(config, **{name: value})
    if role is Role.LOOK:
        again.check_continues(config.as_dict(), done=1)
    else:
        with pytest.raises(UserError, match=f"{flag(name)} was .* and is {value}"):
            again.check_continues(config.as_dict(), done=1)


# --- Saved options ------------------------------------------------------------------


def test_options_are_what_json_keeps():
    config = Pretrain(method="velora", groups=4)
    kept = json.loads(json.dumps(config.as_dict()))
    assert Pretrain.of(kept) == config


def test_options_of_before_are_understood():
    config = Pretrain.of(options_of(BEFORE))
    assert (config.method, config.interval, config.scale) == ("galore", 4, 0.5)
    config.check_continues(BEFORE, done=1)


def test_a_saved_option_that_is_gone_names_the_nearest():
    saved = options_of(BEFORE) | {"warm_up": 3}
    with pytest.raises(UserError, match=r"have --warm-up, .*nearest is --warmup"):
        Pretrain.of(saved)


def test_an_option_that_is_new_has_its_default():
    saved = options_of(BEFORE)
    del saved["clip"]
    assert Pretrain.of(saved).clip == Pretrain.clip
