"""Hugging Face's folders: what is computed from them, the way back, and what is refused.

The oracle is transformers: its results are recorded in `fixtures/hf`, by
`hf_fixtures.py`, and computed anew where it is installed.
"""

import dataclasses
import json
import shutil
import sys
import tracemalloc

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from oasis_jax import hf
from oasis_jax.hf.folders import INDEX, WEIGHTS
from oasis_jax.models.bert import Bert
from oasis_jax.models.generate import generate, pad
from oasis_jax.models.llama import Llama, LlamaConfig, RopeScaling, preset
from oasis_jax.paths import flatten_paths
from tests.hf_fixtures import CASES, DIRECTORY, build, compute


def outputs(loaded, given):
    """Logits, or else hidden states, and the last hidden states of a decoder."""
    variables, tokens = {"params": loaded.params}, given["tokens"]
    if isinstance(loaded.config, LlamaConfig):
        logits, seen = Llama(loaded.config).apply(
            variables,
            tokens,
            capture_intermediates=lambda module, _: module.name == "norm",
        )
        hidden = seen["intermediates"]["norm"]["__call__"][0]
        return {"logits": logits, "hidden": hidden}
    result = Bert(loaded.config).apply(
        variables, tokens, given["segments"], given["types"]
    )
    return {"logits" if loaded.config.labels else "hidden": result}


def check_outputs(loaded, expected):
    for name, got in outputs(loaded, expected).items():
        wanted = expected[name]
        if name == "hidden" and "segments" in expected:
            text = expected["segments"] == 1
            got, wanted = got[text], wanted[text]
        np.testing.assert_allclose(got, wanted, atol=1e-4)


POOLER = ("pooler/kernel", "pooler/bias")


def recorded(case):
    with np.load(DIRECTORY / case / "expected.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize("case", CASES)
def test_computes_what_transformers_did(case):
    loaded = hf.load(DIRECTORY / case)
    check_outputs(loaded, recorded(case))
    # Of a pretraining head nothing is read, and under it there is no pooler.
    assert loaded.fresh == POOLER * (case == "bert-masked")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_there_and_back_in_transformers(case, dtype, tmp_path):
    """The same weights, bit for bit, in a model that computes the same."""
    pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model = build(case, seed=1).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "theirs")
    loaded = hf.load(tmp_path / "theirs")
    assert loaded.config.param_dtype == dtype
    folder = hf.save(tmp_path / "ours", loaded.config, loaded.params)
    reread = type(model)
    if case == "bert-masked":
        reread = sys.modules["transformers"].BertModel
    other, report = reread.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    assert not any(report.values()), report
    stored = model.state_dict()
    for name, tensor in other.state_dict().items():
        was = stored.get(name, stored.get(f"bert.{name}"))
        if was is not None or not loaded.fresh:
            assert tensor.dtype == was.dtype == getattr(torch, dtype)
            assert torch.equal(tensor, was), name
    if dtype == "float32" and case != "bert-masked":
        chex.assert_trees_all_equal(compute(model, 1), compute(other.eval(), 1))
        check_outputs(loaded, compute(model, 1))


def test_stops_where_transformers_does(tmp_path):
    """The token that ends a text, of a folder that had none."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    loaded = hf.load(DIRECTORY / "qwen2")
    model, given = Llama(loaded.config), pad([[5, 6, 7]], multiple=4)

    def said(end=None):
        made = generate(model, loaded.params, *given, new_tokens=12, end=end)
        return np.asarray(made)[0].tolist()

    whole = said()
    end = whole[4]
    ours = said(end)[: whole.index(end) + 1]
    folder = hf.save(
        tmp_path / "out", *loaded[:2], source=DIRECTORY / "qwen2", stop_tokens=[end]
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    made = theirs.generate(
        torch.tensor([[5, 6, 7]]), do_sample=False, max_new_tokens=12
    )
    assert made[0, 3:].tolist() == ours


def test_labels_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    loaded = hf.load(DIRECTORY / "bert-labels")
    names = ("so", "bad", "good")
    problem = "single_label_classification"
    folder = hf.save(
        tmp_path / "out", *loaded[:2], label_names=names, problem_type=problem
    )
    theirs = transformers.AutoConfig.from_pretrained(folder)
    assert theirs.id2label == dict(enumerate(names))
    assert (theirs.num_labels, theirs.problem_type) == (3, problem)


def copied(case, to):
    return shutil.copytree(DIRECTORY / case, to, dirs_exist_ok=True)


def configured(folder, **changes):
    """The folder, with other fields in its config.json; None leaves one out."""
    file = folder / "config.json"
    fields = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
    return folder


def rewritten(folder, change):
    """The folder, with other tensors."""
    tensors = load_file(folder / WEIGHTS)
    save_file(change(tensors), folder / WEIGHTS)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_round_trip(case, tmp_path):
    """Config and parameters; with the source's fields kept, and without; in shards."""
    loaded = hf.load(DIRECTORY / case)
    for name, options in {
        "alone": {},
        "with its source": dict(source=DIRECTORY / case),
        "in shards": dict(max_shard_bytes=4000),
    }.items():
        family = json.loads((DIRECTORY / case / "config.json").read_text())
        folder = hf.save(
            tmp_path / name,
            loaded.config,
            loaded.params,
            family=family["model_type"],
            **options,
        )
        again = hf.load(folder)
        assert again.config == loaded.config
        chex.assert_trees_all_equal(again.params, loaded.params)
    assert not list(tmp_path.glob(".*"))
    modes = {file.stat().st_mode for file in tmp_path.glob("*/*")}
    assert len(modes) == 1
    shards = list((tmp_path / "in shards").glob("model-*.safetensors"))
    assert len(shards) > 3
    assert all(shard.stat().st_size < 9000 for shard in shards)
    single = load_file(tmp_path / "alone" / WEIGHTS)
    assert {n for s in shards for n in load_file(s)} == single.keys()
    weight_map = json.loads((tmp_path / "in shards" / INDEX).read_text())["weight_map"]
    assert weight_map.keys() == single.keys()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes(dtype, tmp_path):
    """Stored dtypes are kept where they agree; those asked for are rounded once."""
    folder = copied("qwen2", tmp_path / "half")
    exact = hf.load(folder).params
    rewritten(folder, lambda t: {n: a.astype(jnp.dtype(dtype)) for n, a in t.items()})
    loaded = hf.load(folder)
    assert loaded.config.param_dtype == dtype
    chex.assert_trees_all_equal(
        loaded.params, jax.tree.map(lambda a: a.astype(dtype), exact)
    )
    again = hf.load(hf.save(tmp_path / "again", loaded.config, loaded.params))
    chex.assert_trees_all_equal(again.params, loaded.params)
    wide = hf.load(folder, param_dtype=jnp.float32)
    assert {a.dtype for a in jax.tree.leaves(wide.params)} == {jnp.dtype("float32")}

    def norm_in_float32(tensors):
        return tensors | {
            "model.norm.weight": tensors["model.norm.weight"].astype("float32")
        }

    assert hf.load(rewritten(folder, norm_in_float32)).config.param_dtype == "float32"


def test_changes_of_the_config():
    config = hf.load_config(DIRECTORY / "llama", dtype=jnp.bfloat16, remat="block")
    assert (config.dtype, config.remat, config.positions) == (jnp.bfloat16, "block", 32)
    assert config.rope_scaling == RopeScaling(4.0, 16, low=1.0, high=4.0)
    asked = dataclasses.replace(config, layers=1)
    with pytest.raises(hf.HfError, match=r"9 tensors unexpected: model\.layers\.1\."):
        hf.load(DIRECTORY / "llama", asked)


def test_fresh_classifier():
    """Of an encoder without one; its seed decides, and the rest is what is stored."""
    loaded, same, other = (
        hf.load(DIRECTORY / "bert", labels=5, seed=seed) for seed in (0, 0, 1)
    )
    assert loaded.fresh == ("classifier/kernel", "classifier/bias")
    chex.assert_trees_all_equal(loaded.params, same.params)
    kernel = loaded.params.pop("classifier")["kernel"]
    assert kernel.shape == (16, 5)
    np.testing.assert_allclose(np.std(kernel), 0.02, rtol=0.2)
    assert not np.allclose(kernel, other.params["classifier"]["kernel"])
    chex.assert_trees_all_equal(loaded.params, hf.load(DIRECTORY / "bert").params)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_labels(family, tmp_path):
    """Those stored if none are asked for; none, and the classifier is left."""
    stored = DIRECTORY / f"{family}-labels"
    assert hf.load_config(stored).labels == 3
    folder = configured(
        copied(stored.name, tmp_path / "a"), id2label=None, label2id=None
    )
    assert hf.load_config(folder).labels == 2  # as transformers has it
    assert hf.load(folder).config.labels == 3
    bare = hf.load(stored, labels=0)
    whole = hf.load(stored)
    assert bare.fresh == ()
    chex.assert_trees_all_equal(
        bare.params, {k: v for k, v in whole.params.items() if k != "classifier"}
    )
    with pytest.raises(hf.HfError, match="classifier has 3 labels, and 5 are asked"):
        hf.load(stored, labels=5)


def test_label_names(tmp_path):
    loaded = hf.load(DIRECTORY / "bert", labels=2)
    source = DIRECTORY / "bert"
    folder = hf.save(
        tmp_path / "a", *loaded[:2], source=source, label_names=("bad", "good")
    )
    fields = json.loads((folder / "config.json").read_text())
    assert fields["id2label"] == {"0": "bad", "1": "good"}
    assert fields["label2id"] == {"bad": 0, "good": 1}
    assert fields["architectures"] == ["BertForSequenceClassification"]
    kept = hf.save(tmp_path / "b", *hf.load(folder)[:2], source=folder)
    assert json.loads((kept / "config.json").read_text()) == fields
    with pytest.raises(hf.HfError, match="there are 1 label_names and 2 labels"):
        hf.save(tmp_path / "c", *loaded[:2], label_names=["one"])


def test_old_names_and_prefixes(tmp_path):
    """BERT's first checkpoints: gamma and beta, and positions as a buffer."""

    def old(tensors):
        renamed = {
            "bert."
            + n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): a
            for n, a in tensors.items()
        }
        ids = np.arange(32)[None]
        return renamed | {
            "bert.embeddings.position_ids": ids,
            "cls.predictions.bias": ids,
        }

    folder = rewritten(copied("bert", tmp_path / "old"), old)
    chex.assert_trees_all_equal(
        hf.load(folder).params, hf.load(DIRECTORY / "bert").params
    )


def test_harmless_leftovers(tmp_path):
    def more(tensors):
        return tensors | {
            "lm_head.weight": tensors["model.embed_tokens.weight"],
            "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32),
        }

    folder = rewritten(copied("llama", tmp_path / "more"), more)
    chex.assert_trees_all_equal(
        hf.load(folder).params, hf.load(DIRECTORY / "llama").params
    )


# The spelling of transformers 4, and what is meant. None is a field left out.
SPELLINGS = {
    "rope of transformers 4": (
        dict(
            rope_parameters=None,
            rope_theta=5e5,
            rope_scaling=dict(
                rope_type="llama3",
                factor=32.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=8192,
            ),
        ),
        dict(rope_theta=5e5, rope_scaling=RopeScaling(32.0, 8192)),
    ),
    "rope of early transformers 4": (
        dict(rope_parameters=None, rope_scaling=dict(type="linear", factor=2.0)),
        dict(rope_theta=1e4, rope_scaling=RopeScaling(2.0)),
    ),
    "no rope": (dict(rope_parameters=None), dict(rope_theta=1e4, rope_scaling=None)),
    "no kv heads": (dict(num_key_value_heads=None), dict(kv_heads=4)),
    "window": (dict(sliding_window=8), dict(positions=8)),
    "window not used": (
        dict(sliding_window=8, use_sliding_window=False),
        dict(positions=32),
    ),
    "window in all layers": (
        dict(sliding_window=8, use_sliding_window=True, max_window_layers=0),
        dict(positions=8),
    ),
    "window in no layer": (
        dict(sliding_window=8, layer_types=["full_attention"] * 2),
        dict(positions=32),
    ),
    "no architecture": (dict(architectures=None), dict(tied=True)),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_of_the_config(name, tmp_path):
    changes, meant = SPELLINGS[name]
    config = hf.load_config(configured(copied("llama", tmp_path), **changes))
    assert {field: getattr(config, field) for field in meant} == meant


def test_window_left_out_of_mistral(tmp_path):
    """Is one of 4096, as in transformers; with a source it is kept, else bounds."""
    folder = configured(
        copied("mistral", tmp_path / "a"),
        max_position_embeddings=8192,
        sliding_window=None,
    )
    loaded = hf.load(folder)
    assert loaded.config.positions == 4096
    kept = hf.save(tmp_path / "b", *loaded[:2], source=folder)
    assert "max_position_embeddings" in (kept / "config.json").read_text()
    alone = hf.save(tmp_path / "c", *loaded[:2], family="mistral")
    fields = [json.loads((f / "config.json").read_text()) for f in (kept, alone)]
    assert [f["max_position_embeddings"] for f in fields] == [8192, 4096]
    assert fields[1]["sliding_window"] is None
    assert hf.load_config(kept).positions == hf.load_config(alone).positions == 4096


def test_source_is_kept(tmp_path):
    """What need not change, also where something else does; and its tokenizer."""
    source = configured(copied("qwen2", tmp_path / "source"), bos_token_id=7)
    (source / "tokenizer.json").write_text("{}")
    loaded = hf.load(source)
    folder = hf.save(tmp_path / "a", *loaded[:2], source=source)
    config = dataclasses.replace(loaded.config, layers=1)
    params = loaded.params | {
        "blocks": jax.tree.map(lambda a: a[:1], loaded.params["blocks"])
    }
    shorter = hf.save(tmp_path / "b", config, params, source=source)
    for result, layers in ((folder, 2), (shorter, 1)):
        fields = json.loads((result / "config.json").read_text())
        assert (fields["bos_token_id"], fields["num_hidden_layers"]) == (7, layers)
        # transformers 4 knows this spelling only.
        assert fields["rope_theta"] == 10_000 and "rope_parameters" not in fields
        assert (result / "tokenizer.json").read_text() == "{}"
        assert hf.load_config(result).layers == layers


def test_host_holds_one_leaf(tmp_path):
    """Not the model, and never two copies of it."""
    config = preset("llama-tiny", vocab_size=4096)
    leaves = hf.FAMILIES["llama"].leaves(config)
    zeros = {path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
    params = traverse_util.unflatten_dict(zeros, sep="/")
    folder = hf.save(tmp_path / "model", config, params)
    del zeros, params
    sizes = []
    tracemalloc.start()
    try:
        hf.load(folder, place=lambda _, leaf: sizes.append(leaf.nbytes))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(sizes) > 2.5 * max(sizes)
    # The largest leaf is one tensor, which is there twice while it is copied.
    assert peak < 2 * max(sizes) + 2**20


CONFIG_ERRORS = {
    "architecture": (
        "llama",
        dict(architectures=["GPT2LMHeadModel"]),
        "architecture is 'GPT2LMHeadModel', expected one of LlamaForCausalLM, Qwen2",
    ),
    "model type": (
        "llama",
        dict(architectures=None, model_type="t5"),
        "model_type is 't5', expected one of LlamaForCausalLM",
    ),
    "yarn": (
        "llama",
        dict(rope_parameters=dict(rope_type="yarn", factor=2.0)),
        "rope_type of rope_parameters is 'yarn', supported is 'default' or 'linear' or "
        "'llama3'",
    ),
    "dynamic": (
        "llama",
        dict(rope_parameters=None, rope_scaling=dict(type="dynamic", factor=2.0)),
        "rope_type of rope_scaling is 'dynamic'",
    ),
    "factor": (
        "llama",
        dict(rope_parameters=dict(rope_type="linear")),
        "config.json has no factor",
    ),
    "partial rotation": (
        "llama",
        dict(partial_rotary_factor=0.5),
        "partial_rotary_factor is 0.5, supported is 1.0",
    ),
    "biases": ("llama", dict(attention_bias=True), "attention_bias is True, supported"),
    "biases of the mlp": ("llama", dict(mlp_bias=True), "mlp_bias is True, supported"),
    "activation": (
        "qwen3",
        dict(hidden_act="gelu"),
        "hidden_act is 'gelu', supported is 'silu'",
    ),
    "quantised": (
        "mistral",
        dict(quantization_config=dict(bits=4)),
        "quantization_config is {'bits': 4}, supported is none",
    ),
    "some layers' window": (
        "qwen2",
        dict(
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=1,
            layer_types=None,
        ),
        "sliding_window is 8 in some layers only",
    ),
    "layer types": (
        "qwen3",
        dict(
            use_sliding_window=True,
            sliding_window=8,
            layer_types=["full_attention", "sliding_attention"],
        ),
        "sliding_window is 8 in some layers only",
    ),
    "heads": (
        "llama",
        dict(num_key_value_heads=3),
        "4 heads do not divide into 3 kv heads",
    ),
    "absent field": ("bert", dict(hidden_size=None), "config.json has no hidden_size"),
    "tanh gelu": ("bert", dict(hidden_act="gelu_new"), "hidden_act is 'gelu_new'"),
    "relative positions": (
        "bert",
        dict(position_embedding_type="relative_key"),
        "position_embedding_type is 'relative_key', supported is 'absolute'",
    ),
    "decoder": ("roberta", dict(is_decoder=True), "is_decoder is True"),
}


@pytest.mark.parametrize("name", CONFIG_ERRORS)
def test_config_that_is_refused(name, tmp_path):
    case, changes, sentence = CONFIG_ERRORS[name]
    folder = configured(copied(case, tmp_path), **changes)
    with pytest.raises(hf.HfError) as caught:
        hf.load_config(folder)
    assert str(caught.value).startswith(f"{folder}: ")
    assert sentence in str(caught.value)


def _without(tensors, *names):
    return {n: a for n, a in tensors.items() if n not in names}


def _only_layer_0(tensors):
    return {n: a for n, a in tensors.items() if ".1." not in n}


TENSOR_ERRORS = {
    "missing": (
        lambda t: _without(t, "model.norm.weight", "lm_head.weight"),
        "2 tensors missing: model.norm.weight, lm_head.weight",
    ),
    "many missing": (
        _only_layer_0,
        "9 tensors missing: model.layers.1.input_layernorm.weight, ",
    ),
    "unexpected": (
        lambda t: t | {"model.extra": np.ones(2, np.float32)},
        "1 tensor unexpected: model.extra",
    ),
    "shape": (
        lambda t: t | {"model.norm.weight": np.ones(8, np.float32)},
        "1 tensor of another shape: model.norm.weight is (8,), expected (16,)",
    ),
    "dtype": (
        lambda t: t | {"model.norm.weight": np.ones(16, np.int8)},
        "1 tensor of none of the dtypes F32, F16, BF16: model.norm.weight is I8",
    ),
    "several": (
        lambda t: _without(t, "lm_head.weight") | {"x": np.ones(1, np.float32)},
        "1 tensor missing: lm_head.weight; 1 tensor unexpected: x",
    ),
    "twice": (
        lambda t: t | {"norm.weight": np.ones(16, np.float32)},
        "1 tensor stored twice: model.norm.weight in model.safetensors and norm.weight "
        "in model.safetensors",
    ),
}


@pytest.mark.parametrize("name", TENSOR_ERRORS)
def test_tensors_that_are_refused(name, tmp_path):
    change, sentence = TENSOR_ERRORS[name]
    folder = rewritten(copied("mistral", tmp_path), change)
    with pytest.raises(hf.HfError) as caught:
        hf.load(folder)
    assert sentence in str(caught.value)
    assert ("and 1 more" in str(caught.value)) == (name == "many missing")


def _shards(folder):
    loaded = hf.load(DIRECTORY / "qwen3")
    folder.rmdir()
    return hf.save(folder, *loaded[:2], max_shard_bytes=10_000)


def _same_tensor_twice(folder):
    first, second, *_ = sorted(_shards(folder).glob("model-*"))
    save_file(load_file(second) | load_file(first), second, {"format": "pt"})


def _lost_shard(folder):
    sorted(_shards(folder).glob("model-*"))[0].unlink()


def _cut_short(folder):
    last = sorted(_shards(folder).glob("model-*"))[-1]
    last.write_bytes(last.read_bytes()[:-1])


def _no_config(folder):
    (copied("bert", folder) / "config.json").unlink()


def _bad_config(folder):
    (copied("bert", folder) / "config.json").write_text("{")


def _no_weights(folder):
    (copied("bert", folder) / WEIGHTS).unlink()


def _pickled(folder):
    (copied("bert", folder) / WEIGHTS).rename(folder / "pytorch_model.bin")


def _empty_index(folder):
    (copied("bert", folder) / WEIGHTS).unlink()
    (folder / INDEX).write_text("{}")


FOLDER_ERRORS = {
    "two shards": (_same_tensor_twice, "in model-00001-of-"),
    "lost shard": (_lost_shard, f"{INDEX} names model-00001-of-"),
    "cut short": (_cut_short, ".safetensors: is damaged or cut short ("),
    "no config": (_no_config, "folder: has no config.json"),
    "bad config": (_bad_config, "config.json: is no JSON ("),
    "no weights": (_no_weights, "folder: has no model.safetensors"),
    "pickled": (
        _pickled,
        "has pytorch_model.bin and no model.safetensors; only safeten",
    ),
    "empty index": (_empty_index, f"{INDEX}: has no weight_map"),
}


@pytest.mark.parametrize("name", FOLDER_ERRORS)
def test_folders_that_are_refused(name, tmp_path):
    spoil, sentence = FOLDER_ERRORS[name]
    folder = tmp_path / "folder"
    folder.mkdir()
    spoil(folder)
    with pytest.raises(hf.HfError) as caught:
        hf.load(folder)
    assert sentence in str(caught.value)


def test_config_of_another_model():
    with pytest.raises(hf.HfError, match="family bert cannot express a LlamaConfig"):
        hf.load(DIRECTORY / "bert", preset("llama-tiny"))


def test_unknown_change():
    with pytest.raises(hf.HfError, match="is a LlamaConfig, which has no labels"):
        hf.load_config(DIRECTORY / "llama", labels=2)


@pytest.mark.parametrize(
    "options, changes, sentence",
    [
        (dict(family="gpt2"), {}, "family is 'gpt2', expected one of llama, qwen2"),
        (dict(family="bert"), {}, "family bert cannot express a LlamaConfig"),
        (dict(family="llama"), {}, r"family llama cannot express qkv_bias = True"),
        (
            {},
            dict(vocab_size=50),
            r"embed/embedding is \(48, 16\), expected \(50, 16\)",
        ),
        ({}, dict(tied=False), "lm_head/kernel is absent, expected"),
    ],
)
def test_saves_that_are_refused(options, changes, sentence, tmp_path):
    loaded = hf.load(DIRECTORY / "qwen2")
    config = dataclasses.replace(loaded.config, **changes)
    with pytest.raises(hf.HfError, match=sentence):
        hf.save(tmp_path / "out", config, loaded.params, **options)
    assert not list(tmp_path.iterdir())


def test_save_leaves_nothing_half_written(tmp_path, monkeypatch):
    loaded = hf.load(DIRECTORY / "qwen2")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").touch()
    with pytest.raises(hf.HfError, match="full: is there and not empty"):
        hf.save(tmp_path / "full", *loaded[:2])

    def fails(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr("safetensors.numpy.save_file", fails)
    with pytest.raises(OSError, match="the disk is full"):
        hf.save(tmp_path / "new", *loaded[:2])
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_resolve(tmp_path, monkeypatch):
    """A folder goes first; the hub's failures are one sentence."""
    calls = []

    class Hub:
        @staticmethod
        def snapshot_download(name, allow_patterns):
            calls.append(name)
            if name == "no/model":
                raise OSError("404\nand a page of advice")
            return tmp_path

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert str(hf.resolve("here")) == "here"
    assert not calls
    assert hf.resolve("some/model") == tmp_path
    with pytest.raises(hf.HfError, match=r"no/model: .* of the hub \(OSError: 404\)"):
        hf.resolve("no/model")
    with pytest.raises(hf.HfError, match=r"folder: there is no such folder$"):
        hf.resolve("/no/such/folder")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(hf.HfError, match="needs the package huggingface_hub"):
        hf.resolve("some/model")


def test_without_safetensors(tmp_path, monkeypatch):
    loaded = hf.load(DIRECTORY / "qwen2")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(hf.HfError, match=r"pip install oasis_jax\[hf\]"):
        hf.load(DIRECTORY / "qwen2")
    with pytest.raises(hf.HfError, match=r"pip install oasis_jax\[hf\]"):
        hf.save(tmp_path / "out", *loaded[:2])


@pytest.mark.parametrize(
    "name, family",
    [
        ("llama-3.2-1b", "llama"),
        ("qwen-2.5-0.5b", "qwen2"),
        ("qwen-3-0.6b", "qwen3"),
        ("mistral-7b", "mistral"),
    ],
)
def test_presets_can_be_written(name, family):
    row, config = hf.FAMILIES[family], preset(name)
    fields = row.fields(config, None)
    assert row.config(json.loads(json.dumps(fields))) == config


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_every_parameter_has_a_name(family):
    """And no two the same."""
    row = hf.FAMILIES[family]
    case = {"bert": "bert-labels", "roberta": "roberta-labels"}.get(family, family)
    config = hf.load_config(DIRECTORY / case)
    leaves = row.leaves(config)
    places = row.places(config, leaves)
    assert {p.path for p in places} == flatten_paths(leaves).keys()
    assert len({p.name for p in places}) == len(places)
