"""Folders from strangers: what leads out of them, is out of proportion, or is damaged."""

import json
import os
import shutil
import struct

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from oasis_jax import hf
from oasis_jax.hf.folders import INDEX, WEIGHTS
from tests.hf_fixtures import DIRECTORY
from train.data.tokenizer import Limits, byte_tokenizer, open_tokenizer
from train.errors import UserError


def copied(case, to):
    return shutil.copytree(DIRECTORY / case, to, dirs_exist_ok=True)


def configured(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def rewritten(folder, **changes):
    save_file(load_file(folder / WEIGHTS) | changes, folder / WEIGHTS)
    return folder


def refused(function):
    with pytest.raises(hf.HfError) as caught:
        function()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What leads out of the folder


@pytest.mark.parametrize(
    "name",
    [
        "../other.safetensors",
        "sub/../../other.safetensors",
        "/etc/other.safetensors",
        "C:\\other.safetensors",
        "C:other.safetensors",
        "..\\other.safetensors",
        "other\0.safetensors",
    ],
)
def test_an_index_names_files_of_its_folder(name, tmp_path):
    folder = copied("llama", tmp_path / "model")
    (folder / WEIGHTS).rename(tmp_path / "other.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    assert "would lie outside of the folder" in refused(lambda: hf.load(folder))


@pytest.mark.parametrize("name", ["weights.bin", "model.pkl", 7, None, ["a"]])
def test_an_index_names_safetensors(name, tmp_path):
    folder = copied("llama", tmp_path)
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    said = refused(lambda: hf.load(folder))
    assert str(name) in said and "only .safetensors are read" in said


@pytest.mark.parametrize(
    "name",
    ["config.json", WEIGHTS, "generation_config.json", "tokenizer.json", "x.model"],
)
def test_links_stay_in_the_folder(name, tmp_path):
    folder = copied("llama", tmp_path / "model")
    loaded = hf.load(folder)
    secret = tmp_path / "secret"
    if (folder / name).exists():
        (folder / name).rename(secret)
    else:
        secret.write_text("{}")
    (folder / name).symlink_to("../secret")
    said = refused(
        lambda: (
            hf.load(folder),
            hf.save(tmp_path / "out", *loaded[:2], source=folder),
        )
    )
    assert f"{folder / name}: is a link to {secret}, outside of the folder" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("blobs", ["models--a--b/blobs/0", "blobs/ab/0"])
def test_the_hubs_cache_is_links(blobs, tmp_path):
    blob = tmp_path / blobs
    blob.parent.mkdir(parents=True)
    folder = copied("llama", tmp_path / "models--a--b" / "snapshots" / "main")
    (folder / WEIGHTS).rename(blob)
    (folder / WEIGHTS).symlink_to(os.path.relpath(blob, folder))
    assert hf.load(folder).config.layers == 2


def test_what_is_no_file(tmp_path):
    folder = copied("llama", tmp_path)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")  # reading it would wait for ever
    assert "config.json: is no file" in refused(lambda: hf.load(folder))
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("config.json")
    assert "config.json: cannot be read" in refused(lambda: hf.load(folder))


# What is out of proportion


@pytest.mark.parametrize("value", [0, -1, 1.5, 1e9, "16", True, [16], {}, 10**12])
@pytest.mark.parametrize(
    ("case", "field"),
    [
        ("llama", "vocab_size"),
        ("llama", "num_hidden_layers"),
        ("bert", "hidden_size"),
        ("bert", "type_vocab_size"),
    ],
)
def test_sizes_are_whole_numbers(case, field, value, tmp_path):
    folder = configured(copied(case, tmp_path), **{field: value})
    said = refused(lambda: hf.load_config(folder))
    assert f"config.json says {field} is {value!r}, expected a whole number" in said


@pytest.mark.parametrize(
    ("case", "field", "value", "found"),
    [
        ("llama", "num_hidden_layers", 10**9, "20 tensors, of 2 layers"),
        ("llama", "num_hidden_layers", 30, "20 tensors, of 2 layers"),
        ("llama", "vocab_size", 10**9, "model.embed_tokens.weight is (48, 16)"),
        ("llama", "hidden_size", 2**20, "model.embed_tokens.weight is (48, 16)"),
        ("llama", "intermediate_size", 10**9, "up_proj.weight is (24, 16)"),
        ("qwen3", "head_dim", 2**20, "q_proj.weight is (32, 16)"),
        ("bert", "max_position_embeddings", 10**9, "position_embeddings.weight is (32"),
        ("bert", "type_vocab_size", 10**9, "token_type_embeddings.weight is (2, 16)"),
        ("bert-labels", "hidden_size", 64, "word_embeddings.weight is (48, 16)"),
    ],
)
def test_sizes_are_those_of_the_weights(case, field, value, found, tmp_path):
    folder = configured(copied(case, tmp_path), **{field: value})
    for read in (hf.load, hf.describe):
        said = refused(lambda read=read: read(folder))
        assert str(value) in said and field in said and found in said


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[" * 100_000, "is nested more than 50 deep"),
        ('{"a": ' * 60 + "1" + "}" * 60, "is nested more than 50 deep"),
        ('{"rms_norm_eps": NaN}', "is no JSON (the number NaN is not finite)"),
        ('{"rms_norm_eps": 1e999}', "is no JSON (the number 1e999 is not finite)"),
        ("9" * 5000, "is no JSON (Exceeds the limit"),
        ("[]", "is no JSON object"),
        ('{"architectures": "Llama"}', "architectures is 'Llama', expected a list"),
        ('{"model_type": ["llama"]}', "model_type is ['llama'], expected one of"),
    ],
)
def test_a_config_that_is_none(content, sentence, tmp_path):
    (tmp_path / "config.json").write_text(content)
    assert sentence in refused(lambda: hf.load_config(tmp_path))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "added_tokens.json"])
def test_texts_that_are_no_json(name, tmp_path):
    (tmp_path / name).write_text("[" * 100_000)
    assert f"{name}: is nested more than 50" in refused(lambda: hf.texts(tmp_path))
    (tmp_path / name).write_text("\ufeff{}")  # as Windows writes it
    assert hf.texts(tmp_path) == {name: (tmp_path / name).resolve()}


@pytest.mark.parametrize(
    "name", ["config.json", INDEX, "generation_config.json", "tokenizer.json"]
)
def test_a_file_that_is_too_large(name, tmp_path):
    folder = copied("llama", tmp_path / "model")
    loaded = hf.load(folder)
    (folder / WEIGHTS).rename(folder / "weights") if name == INDEX else None
    with (folder / name).open("wb") as file:
        file.truncate(1 << 40)  # with a hole in it
    said = refused(
        lambda: (hf.load(folder), hf.save(tmp_path / "o", *loaded[:2], source=folder))
    )
    assert f"{name}: has 1,099,511,627,776 bytes, and at most" in said


# A header's length, the header, and what is after it.
HEADERS = {
    "empty": b"",
    "a header of a petabyte": struct.pack("<Q", 10**15) + b"{}",
    "overlapping": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
    b'"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}1234',
    "beyond the file": b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}1234',
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_lie(name, tmp_path):
    content = HEADERS[name]
    if content.startswith(b"{"):
        content = struct.pack("<Q", content.rindex(b"}") + 1) + content
    folder = copied("llama", tmp_path)
    (folder / WEIGHTS).write_bytes(content)
    assert "is damaged or cut short" in refused(lambda: hf.load(folder))


# Weights


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_are_finite(value, dtype, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    folder = copied("llama", tmp_path)
    dtype = jax.numpy.dtype(dtype)
    tensors = {k: v.astype(dtype) for k, v in load_file(folder / WEIGHTS).items()}
    tensors[name][3, 5] = tensors[name][0, 0] = value
    save_file(tensors, folder / WEIGHTS)
    said = refused(lambda: hf.load(folder))
    assert f"1 tensor with numbers that are not finite: {name} in {WEIGHTS} (2)" in said


def test_weights_fit_the_dtype_that_is_asked_for(tmp_path):
    folder = rewritten(
        copied("llama", tmp_path), **{"model.norm.weight": np.full(16, 1e30, "f4")}
    )
    hf.load(folder)
    said = refused(lambda: hf.load(folder, param_dtype=jax.numpy.float16))
    assert "model.norm.weight in model.safetensors (16 as float16)" in said


def test_a_tied_head_is_the_embedding(tmp_path):
    folder = copied("llama", tmp_path)
    table = load_file(folder / WEIGHTS)["model.embed_tokens.weight"]
    hf.load(rewritten(folder, **{"lm_head.weight": table}))
    other = table.copy()
    other[-1, -1] += 1
    said = refused(lambda: hf.load(rewritten(folder, **{"lm_head.weight": other})))
    assert "lm_head.weight is not model.embed_tokens.weight, though config" in said
    assert "tie_word_embeddings is true" in said
    configured(folder, tie_word_embeddings=False)
    loaded = hf.load(folder)
    assert np.array_equal(loaded.params["lm_head"]["kernel"], other.T)
    folder = configured(copied("llama", tmp_path / "no"), tie_word_embeddings=False)
    assert "1 tensor missing: lm_head.weight" in refused(lambda: hf.load(folder))


# Exports


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_nothing_stale_is_written(tmp_path):
    source = configured(
        copied("bert-labels", tmp_path / "source"),
        problem_type="regression",
        num_labels=7,
        finetuning_task="mnli",
        _name_or_path="/home/me",
        bos_token_id=10**6,
        eos_token_id=[1, 48],
        sep_token_id=5,
    )
    loaded = hf.load(source)
    names = ("a", "b", "c")
    for number, (options, problem) in enumerate(
        (
            (
                dict(label_names=names, problem_type="single_label_classification"),
                "single_label_classification",
            ),
            (dict(label_names=names), None),
            ({}, "regression"),
        )
    ):
        out = hf.save(tmp_path / str(number), *loaded[:2], source=source, **options)
        about = read(out, "config.json")
        assert about.get("problem_type") == problem
        stale = {"num_labels", "finetuning_task", "_name_or_path", "bos_token_id"}
        assert not stale & about.keys()
        assert (about["eos_token_id"], about["sep_token_id"]) == ([1], 5)
    bare = hf.load(source, labels=0)
    about = read(hf.save(tmp_path / "bare", *bare[:2], source=source), "config.json")
    assert not {"id2label", "label2id", "problem_type"} & about.keys()


@pytest.mark.parametrize(
    ("theirs", "stops", "expected"),
    [
        (None, [7], {"eos_token_id": 7, "pad_token_id": 3}),
        (
            {"eos_token_id": 5, "top_p": 0.5},
            [7],
            {"eos_token_id": [5, 7], "top_p": 0.5},
        ),
        ({"eos_token_id": [99, 7, 5]}, [7], {"eos_token_id": [7, 5]}),
        ({"eos_token_id": 99}, [7, 8], {"eos_token_id": [7, 8]}),
        ({"eos_token_id": 99, "top_k": 2}, None, {"top_k": 2}),
    ],
)
def test_stop_tokens(theirs, stops, expected, tmp_path):
    source = configured(copied("llama", tmp_path / "in"), pad_token_id=3)
    if theirs is not None:
        (source / "generation_config.json").write_text(json.dumps(theirs))
    loaded = hf.load(source)
    out = hf.save(tmp_path / "out", *loaded[:2], source=source, stop_tokens=stops)
    assert read(out, "generation_config.json") == expected
    if stops:
        assert read(out, "config.json")["eos_token_id"] in (stops, *stops)
    said = refused(lambda: hf.save(tmp_path / "x", *loaded[:2], stop_tokens=[48]))
    assert "stop token 48 is not in the vocabulary of 48" in said


# Anything


def _folder(tmp):
    if not tmp.exists():
        copied("bert-labels", tmp)
        configured(tmp, id2label={"0": "a", "1": "b", "2": "c"})
        tensors = load_file(tmp / WEIGHTS)
        (tmp / WEIGHTS).unlink()
        save_file(tensors, tmp / "a.safetensors")
        index = {"weight_map": dict.fromkeys(tensors, "a.safetensors")}
        (tmp / INDEX).write_text(json.dumps(index))
        byte_tokenizer().save(str(tmp / "tokenizer.json"))
        (tmp / "tokenizer_config.json").write_text('{"eos_token": "a"}')
        (tmp / "generation_config.json").write_text('{"eos_token_id": 1}')
    return {f.name: f.read_bytes() for f in tmp.iterdir() if f.suffix != ".npz"}


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(-1, 9), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(-1, 9), max_size=3),
)


def _mutated(draw, content):
    """With other values in the place of some of JSON's, or other bytes."""
    if content[:1] == b"{" and draw(st.booleans()):
        fields = node = json.loads(content)
        key = draw(st.sampled_from(sorted(node)))
        while isinstance(node[key], dict) and node[key] and draw(st.booleans()):
            node = node[key]
            key = draw(st.sampled_from(sorted(node)[:50]))
        node[key] = draw(VALUES)
        return json.dumps(fields).encode()
    # Most that there is to spoil of weights is at their beginning.
    at = draw(st.integers(0, min(len(content), 3000)))
    how = draw(st.sampled_from(["flip", "cut", "insert"]))
    if how == "cut":
        return content[:at]
    if how == "insert":
        return content[:at] + draw(st.binary(min_size=1, max_size=9)) + content[at:]
    other = bytes([draw(st.integers(0, 255))])
    return content[:at] + other + content[at + 1 :]


def _anything(data, tmp_path):
    whole = _folder(tmp_path / "whole")
    folder, out = tmp_path / "mutated", tmp_path / "out"
    for path in (folder, out):
        shutil.rmtree(path, ignore_errors=True)
    folder.mkdir()
    chosen = data.draw(st.sampled_from(sorted(whole)))
    for name, content in whole.items():
        other = _mutated(data.draw, content) if name == chosen else content
        (folder / name).write_bytes(other)
    loaded = hf.load(tmp_path / "whole")
    for act in (
        lambda: hf.load_config(folder),
        lambda: hf.describe(folder),
        lambda: hf.load(folder, place=lambda path, leaf: None),
        lambda: hf.save(out, *loaded[:2], source=folder, stop_tokens=[1]),
        lambda: Limits(8, 10**6).check(open_tokenizer(folder / "tokenizer.json")[0]),
    ):
        try:
            act()
        except (hf.HfError, UserError) as error:
            assert str(error) and len(str(error).splitlines()) == 1


OPTIONS = dict(
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@settings(max_examples=60, **OPTIONS)
@given(data=st.data())
def test_anything_is_read_or_refused(data, tmp_path):
    _anything(data, tmp_path)


@pytest.mark.slow
@settings(max_examples=3000, **OPTIONS | {"derandomize": False})
@given(data=st.data())
def test_much_more_is_read_or_refused(data, tmp_path):
    _anything(data, tmp_path)
