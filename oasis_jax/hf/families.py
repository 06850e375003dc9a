"""How Hugging Face spells the models of `oasis_jax.models`: one row of `FAMILIES` each.

A row reads the fields of a `config.json`, writes them, and has the name of every
parameter (`names.py`).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from oasis_jax.hf.errors import HfError, shown
from oasis_jax.hf.fields import (
    Fields,
    flag,
    label_names,
    number,
    only,
    table,
    whole,
    words,
)
from oasis_jax.hf.names import DECODER, ENCODER, ROBERTA
from oasis_jax.models.bert import Bert, BertConfig
from oasis_jax.models.llama import Llama, LlamaConfig, RopeScaling
from oasis_jax.paths import flatten_paths

Config = LlamaConfig | BertConfig


class Place(NamedTuple):
    """Where a tensor of a checkpoint has its place in the parameters.

    Attributes:
      path, layer: Of the leaf, and of the part of it if it is stacked, else None.
      name: Of the tensor, without prefix.
      shape: Of the tensor, as it is stored.
      transposed: Whether that is another way round than the leaf.
    """

    path: str
    layer: int | None
    name: str
    shape: tuple[int, ...]
    transposed: bool


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
      model_type: As `config.json` has it.
      model: The Flax module; its parameters are those that must have names.
      base, classifier: Architectures written: without and with labels.
      also: More architectures that are read: those of pretraining heads, which are left.
      prefix: Before all names but those of heads; an encoder without labels has none.
      names: Name by path; `{pooler}` is 'classifier' where RoBERTa has labels.
      read, write: Fields of `config.json` to a config and back.
      defaults: What Hugging Face's library takes where a file leaves a field out.
      ignored: Pattern of names that are harmless where they are not wanted.
      optional: Subtrees that may be absent, and are then initialised afresh.
    """

    model_type: str
    model: type[nn.Module]
    base: str
    classifier: str | None
    also: tuple[str, ...]
    prefix: str
    names: Mapping[str, str]
    read: Callable[[Mapping[str, Any]], Config]
    write: Callable[[Any], dict[str, Any]]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    ignored: str = r"rotary_emb\.inv_freq$"
    optional: tuple[str, ...] = ()

    @property
    def architectures(self) -> tuple[str, ...]:
        """All that are read."""
        return tuple(a for a in (self.base, self.classifier, *self.also) if a)

    def architecture(self, config: Config) -> str:
        """What a model of this config is called."""
        return self.classifier if labels_of(config) and self.classifier else self.base

    def leaves(self, config: Config) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the model's parameters by path, in the table's order."""
        found = _traced(self.model_type, config)
        return {path: found[path] for path in sorted(found, key=[*self.names].index)}

    def name(self, path: str, config: Config, layer: int | None = None) -> str:
        """Hugging Face's name of a parameter, without the prefix.

        Example:
          >>> from oasis_jax.models.llama import preset
          >>> family, config = FAMILIES["llama"], preset("llama-tiny")
          >>> family.name("blocks/attn/q_proj/kernel", config, layer=3)
          'layers.3.self_attn.q_proj.weight'
          >>> family.full(family.name("embed/embedding", config), config)
          'model.embed_tokens.weight'
        """
        pooler = "classifier" if labels_of(config) else "pooler"
        return self.names[path].format(i=layer, pooler=pooler)

    def places(
        self, config: Config, leaves: Mapping[str, jax.ShapeDtypeStruct]
    ) -> list[Place]:
        """All tensors that the leaves are made of."""
        places = []
        for path, leaf in leaves.items():
            shape: tuple[int, ...] = leaf.shape
            layers: Sequence[int | None] = [None]
            if path.startswith("blocks/"):
                shape, layers = shape[1:], range(shape[0])
            transposed = path.endswith("/kernel")
            shape = shape[::-1] if transposed else shape
            places += [
                Place(path, i, self.name(path, config, i), shape, transposed)
                for i in layers
            ]
        return places

    def sizes(self, config: Config) -> dict[str, tuple[tuple[str, int], ...]]:
        """What `config.json` says of the axes of some tensors, by path, as stored.

        All sizes of the config but the number of layers are among them, so where these
        tensors agree no parameter is larger than what is stored.
        """
        c: Any = config
        vocabulary, width = ("vocab_size", c.vocab_size), ("hidden_size", c.width)
        hidden = ("intermediate_size", c.hidden)
        if isinstance(config, BertConfig):
            positions = c.positions + c.position_offset
            return {
                "embed/word/embedding": (vocabulary, width),
                "embed/position/embedding": (
                    ("max_position_embeddings", positions),
                    width,
                ),
                "embed/type/embedding": (("type_vocab_size", c.types), width),
                "blocks/mlp/up_proj/kernel": (hidden, width),
            }
        heads = f"num_attention_heads {c.heads} times head_dim {c.head_size}"
        kv_heads = f"num_key_value_heads {c.kv_heads} times head_dim {c.head_size}"
        return {
            "embed/embedding": (vocabulary, width),
            "blocks/attn/q_proj/kernel": ((heads, c.heads * c.head_size), width),
            "blocks/attn/k_proj/kernel": ((kv_heads, c.kv_heads * c.head_size), width),
            "blocks/mlp/up_proj/kernel": (hidden, width),
        }

    def full(self, name: str, config: Config) -> str:
        """A name as a checkpoint that is written has it."""
        bare = isinstance(config, BertConfig) and not config.labels
        heads = ("lm_head.", "classifier.")
        return name if bare or name.startswith(heads) else self.prefix + name

    def plain(self, name: str) -> str:
        """A stored name without prefix, and with 'weight' for the old 'gamma'."""
        name = name.removeprefix(self.prefix)
        name = re.sub(r"(LayerNorm|layer_norm)\.gamma$", r"\1.weight", name)
        return re.sub(r"(LayerNorm|layer_norm)\.beta$", r"\1.bias", name)

    def config(self, stored: Mapping[str, Any]) -> Config:
        """The config of the fields of a `config.json`.

        Raises:
          HfError: if a field is absent, or has a value that the model cannot follow.
        """
        config = self.read({**self.defaults, **stored})
        classifies = self.classifier and _architecture(stored) == self.classifier
        return with_labels(config, _labels(stored)) if classifies else config

    def check(self, config: Config) -> None:
        """Refuses the config of another model."""
        if isinstance(config, BertConfig) != (self.model is Bert):
            raise HfError(
                f"family {self.model_type} cannot express a {type(config).__name__}"
            )

    def fields(
        self, config: Config, stored: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """The fields of a `config.json`; those of `stored` are kept where they fit.

        Raises:
          HfError: if the family cannot express the config.
        """
        self.check(config)
        kept, written = dict(stored or {}), self.write(config)
        # Where all is said already, as with a sliding window, it is left as it is.
        if not kept or _differing(self.read({**self.defaults, **kept}), config):
            kept = {k: v for k, v in kept.items() if k not in _REPLACED} | written
            if "sliding_window" in self.defaults:
                kept["sliding_window"] = None
        # But transformers 4 would overlook the rope that 5 writes.
        kept.pop("rope_parameters", None)
        kept |= {
            k: v for k, v in written.items() if k in ("rope_theta", "rope_scaling")
        }
        if different := _differing(self.read({**self.defaults, **kept}), config):
            named = "; ".join(different)
            raise HfError(f"family {self.model_type} cannot express {named}")
        return kept


@lru_cache(16)
def _traced(model_type: str, config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    init = FAMILIES[model_type].model(config).init
    made = jax.eval_shape(init, jax.random.key(0), tokens)
    return flatten_paths(made["params"])


def family_of(config: Config) -> "Family":
    """The family that expresses a config, if nothing says which.

    Example:
      >>> from oasis_jax.models.llama import preset
      >>> family_of(preset("qwen-2.5-0.5b")).model_type
      'qwen2'
    """
    if isinstance(config, BertConfig):
        return FAMILIES["roberta" if config.position_offset else "bert"]
    return FAMILIES[
        "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    ]


def family_from(stored: Mapping[str, Any]) -> Family:
    """The family that a `config.json` belongs to.

    Raises:
      HfError: if it is none of `FAMILIES`; lists the architectures that are read.
    """
    named, model_type = _architecture(stored), stored.get("model_type")
    for family in FAMILIES.values():
        if named in family.architectures:
            return family
    if named is None and isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    known = ", ".join(a for f in FAMILIES.values() for a in f.architectures)
    what = f"architecture is {shown(named)}"
    if named is None:
        what = f"model_type is {shown(model_type)}"
    raise HfError(f"{what}, expected one of {known}")


def labels_of(config: Config) -> int:
    """Number of labels; 0 without a classifier."""
    return config.labels if isinstance(config, BertConfig) else 0


def with_labels(config: Config, labels: int) -> Config:
    """The config of an encoder with another number of labels."""
    return replace(config, labels=labels) if isinstance(config, BertConfig) else config


def _labels(stored: Fields) -> int:
    # A file that names neither has Hugging Face's two.
    return len(label_names(stored)) or whole(stored, "num_labels", 2)


def _architecture(stored: Fields) -> str | None:
    """Named first."""
    return next(iter(words(stored, "architectures")), None)


# What a step computes with, and what is not the checkpoint's to say.
_OURS = {"dtype", "param_dtype", "remat", "residuals", "loss_chunk", "labels"}

_REPLACED = {
    "layer_types",
    "max_window_layers",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "use_sliding_window",
}


def _differing(read: Config, config: Config) -> list[str]:
    pairs = {
        f.name: (getattr(read, f.name), getattr(config, f.name))
        for f in fields(config)
        if f.name not in _OURS
    }
    return [
        f"{name} = {want!r} (but {got!r})"
        for name, (got, want) in pairs.items()
        # No bound on the positions is expressed by any.
        if got != want and not (name == "positions" and want is None)
    ]


def _read_decoder(
    stored: Fields, *, qkv_bias: bool = False, qk_norm: bool = False
) -> LlamaConfig:
    only(stored, "hidden_act", "silu")
    only(stored, "attention_bias", False)
    only(stored, "mlp_bias", False)
    only(stored, "quantization_config")
    theta, scaling = _read_rope(stored)
    heads = whole(stored, "num_attention_heads")
    config = LlamaConfig(
        vocab_size=whole(stored, "vocab_size"),
        width=whole(stored, "hidden_size"),
        hidden=whole(stored, "intermediate_size"),
        layers=whole(stored, "num_hidden_layers"),
        heads=heads,
        kv_heads=whole(stored, "num_key_value_heads", heads),
        tied=flag(stored, "tie_word_embeddings"),
        head_size=whole(stored, "head_dim", 0, least=0),
        rope_theta=theta,
        norm_eps=number(stored, "rms_norm_eps", zero=True),
        rope_scaling=scaling,
        positions=_read_positions(stored),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
    )
    if config.head_size % 2:
        raise HfError(
            f"config.json says a head has {config.head_size} numbers (head_dim, or"
            f" hidden_size {config.width} by num_attention_heads {heads}), expected an"
            " even number, for they are rotated in pairs"
        )
    return config


def _read_rope(stored: Fields) -> tuple[float, RopeScaling | None]:
    """Base and scaling, in the spelling of transformers 4 or 5."""
    place = "rope_parameters" if stored.get("rope_parameters") else "rope_scaling"
    rope = table(stored, place)
    theta = float(number(rope, "rope_theta", number(stored, "rope_theta", 10_000.0)))
    only(stored, "partial_rotary_factor", 1.0)
    only(rope, "partial_rotary_factor", 1.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    only({f"rope_type of {place}": kind}, f"rope_type of {place}", *_ROPES)
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(number(rope, "factor"))
    return theta, RopeScaling(
        factor=number(rope, "factor"),
        original=whole(rope, "original_max_position_embeddings"),
        low=number(rope, "low_freq_factor"),
        high=number(rope, "high_freq_factor"),
    )


_ROPES = ("default", "linear", "llama3")


def _read_positions(stored: Fields) -> int:
    """As many as see each other: a window as long as the text is none."""
    positions = whole(stored, "max_position_embeddings")
    if stored.get("sliding_window") is None or (
        stored.get("use_sliding_window") is not None
        and not flag(stored, "use_sliding_window")
    ):
        return positions
    window = whole(stored, "sliding_window")
    layers = whole(stored, "num_hidden_layers")
    first = whole(stored, "max_window_layers", 0, least=0)
    # No list of as many as there are layers, for a file may say any number.
    kinds = set(words(stored, "layer_types")) or {
        *["full_attention"] * (first > 0),
        *["sliding_attention"] * (first < layers),
    }
    if len(kinds) > 1:
        raise HfError(
            f"config.json says sliding_window is {window} in some layers only "
            "(layer_types, max_window_layers), supported is all or none"
        )
    (kind,) = kinds
    only({"layer_types": kind}, "layer_types", "sliding_attention", "full_attention")
    return min(positions, window) if kind == "sliding_attention" else positions


def _write_decoder(c: LlamaConfig) -> dict[str, Any]:
    # In the spelling of transformers 4, which 5 reads as well.
    scaling = c.rope_scaling and {
        "rope_type": "linear",
        "factor": c.rope_scaling.factor,
    }
    if scaling and c.rope_scaling and c.rope_scaling.original is not None:
        scaling |= {
            "rope_type": "llama3",
            "original_max_position_embeddings": c.rope_scaling.original,
            "low_freq_factor": c.rope_scaling.low,
            "high_freq_factor": c.rope_scaling.high,
        }
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "intermediate_size": c.hidden,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": c.tied,
        "max_position_embeddings": c.positions or 2048,
    }


def _read_encoder(stored: Fields, *, offset: bool = False) -> BertConfig:
    only(stored, "hidden_act", "gelu")
    only(stored, "position_embedding_type", "absolute")
    only(stored, "is_decoder", False)
    only(stored, "quantization_config")
    vocabulary = whole(stored, "vocab_size")
    pad = whole(stored, "pad_token_id", 0, least=0, most=vocabulary - 1)
    first = pad + 1 if offset else 0
    return BertConfig(
        vocab_size=vocabulary,
        width=whole(stored, "hidden_size"),
        hidden=whole(stored, "intermediate_size"),
        layers=whole(stored, "num_hidden_layers"),
        heads=whole(stored, "num_attention_heads"),
        positions=whole(stored, "max_position_embeddings", least=first + 1) - first,
        types=whole(stored, "type_vocab_size"),
        norm_eps=number(stored, "layer_norm_eps", zero=True),
        position_offset=first,
        pad=pad,
    )


def _write_encoder(c: BertConfig) -> dict[str, Any]:
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "intermediate_size": c.hidden,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "max_position_embeddings": c.positions + c.position_offset,
        "type_vocab_size": c.types,
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
        "layer_norm_eps": c.norm_eps,
        "pad_token_id": c.pad,
    }


def _decoder(model_type: str, architecture: str, features=(), **defaults) -> Family:
    return Family(
        model_type=model_type,
        model=Llama,
        base=architecture,
        classifier=None,
        also=(),
        prefix="model.",
        names=DECODER,
        read=lambda stored: _read_decoder(stored, **dict.fromkeys(features, True)),
        write=_write_decoder,
        defaults={"rms_norm_eps": 1e-6} | defaults,
    )


def _encoder(
    model_type: str, named: str, also: tuple[str, ...], names, offset: bool, **defaults
) -> Family:
    return Family(
        model_type=model_type,
        model=Bert,
        base=f"{named}Model",
        classifier=f"{named}ForSequenceClassification",
        also=tuple(f"{named}For{head}" for head in also),
        prefix=f"{model_type}.",
        names=names,
        read=lambda stored: _read_encoder(stored, offset=offset),
        write=_write_encoder,
        defaults={"layer_norm_eps": 1e-12, "type_vocab_size": 2} | defaults,
        ignored=r"^(embeddings\.position_ids$|(cls|lm_head|classifier|pooler)\.)",
        optional=("pooler", "classifier"),
    )


_QWEN = dict(
    num_key_value_heads=32,
    sliding_window=4096,
    use_sliding_window=False,
    max_window_layers=28,
)

FAMILIES = {
    family.model_type: family
    for family in (
        _decoder("llama", "LlamaForCausalLM"),
        _decoder("qwen2", "Qwen2ForCausalLM", ["qkv_bias"], **_QWEN),
        _decoder("qwen3", "Qwen3ForCausalLM", ["qk_norm"], head_dim=128, **_QWEN),
        _decoder(
            "mistral", "MistralForCausalLM", num_key_value_heads=8, sliding_window=4096
        ),
        _encoder("bert", "Bert", ("MaskedLM", "PreTraining"), ENCODER, False),
        _encoder("roberta", "Roberta", ("MaskedLM",), ROBERTA, True, pad_token_id=1),
    )
}
"""The families that can be read and written, by `model_type`."""
