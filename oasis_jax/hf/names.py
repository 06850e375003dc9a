"""Names of parameters in Hugging Face's checkpoints, by path.

Without the prefix of the model inside (`model.`, `bert.`). `{i}` stands for the number of
the layer, whose parameters are stacked here. A kernel is stored there as (n_out, n_in);
nothing else is transposed. `{pooler}` is 'classifier' where RoBERTa has one, which then
holds the pooler.
"""

DECODER = {
    "embed/embedding": "embed_tokens.weight",
    "blocks/attn_norm/scale": "layers.{i}.input_layernorm.weight",
    "blocks/attn/q_proj/kernel": "layers.{i}.self_attn.q_proj.weight",
    "blocks/attn/q_proj/bias": "layers.{i}.self_attn.q_proj.bias",
    "blocks/attn/k_proj/kernel": "layers.{i}.self_attn.k_proj.weight",
    "blocks/attn/k_proj/bias": "layers.{i}.self_attn.k_proj.bias",
    "blocks/attn/v_proj/kernel": "layers.{i}.self_attn.v_proj.weight",
    "blocks/attn/v_proj/bias": "layers.{i}.self_attn.v_proj.bias",
    "blocks/attn/q_norm/scale": "layers.{i}.self_attn.q_norm.weight",
    "blocks/attn/k_norm/scale": "layers.{i}.self_attn.k_norm.weight",
    "blocks/attn/o_proj/kernel": "layers.{i}.self_attn.o_proj.weight",
    "blocks/mlp_norm/scale": "layers.{i}.post_attention_layernorm.weight",
    "blocks/mlp/gate_proj/kernel": "layers.{i}.mlp.gate_proj.weight",
    "blocks/mlp/up_proj/kernel": "layers.{i}.mlp.up_proj.weight",
    "blocks/mlp/down_proj/kernel": "layers.{i}.mlp.down_proj.weight",
    "norm/scale": "norm.weight",
    "lm_head/kernel": "lm_head.weight",
}

_LAYER = "encoder.layer.{i}."
ENCODER = {
    "embed/word/embedding": "embeddings.word_embeddings.weight",
    "embed/position/embedding": "embeddings.position_embeddings.weight",
    "embed/type/embedding": "embeddings.token_type_embeddings.weight",
    "embed/norm/scale": "embeddings.LayerNorm.weight",
    "embed/norm/bias": "embeddings.LayerNorm.bias",
    "blocks/attn/q_proj/kernel": _LAYER + "attention.self.query.weight",
    "blocks/attn/q_proj/bias": _LAYER + "attention.self.query.bias",
    "blocks/attn/k_proj/kernel": _LAYER + "attention.self.key.weight",
    "blocks/attn/k_proj/bias": _LAYER + "attention.self.key.bias",
    "blocks/attn/v_proj/kernel": _LAYER + "attention.self.value.weight",
    "blocks/attn/v_proj/bias": _LAYER + "attention.self.value.bias",
    "blocks/attn/o_proj/kernel": _LAYER + "attention.output.dense.weight",
    "blocks/attn/o_proj/bias": _LAYER + "attention.output.dense.bias",
    "blocks/attn_norm/scale": _LAYER + "attention.output.LayerNorm.weight",
    "blocks/attn_norm/bias": _LAYER + "attention.output.LayerNorm.bias",
    "blocks/mlp/up_proj/kernel": _LAYER + "intermediate.dense.weight",
    "blocks/mlp/up_proj/bias": _LAYER + "intermediate.dense.bias",
    "blocks/mlp/down_proj/kernel": _LAYER + "output.dense.weight",
    "blocks/mlp/down_proj/bias": _LAYER + "output.dense.bias",
    "blocks/mlp_norm/scale": _LAYER + "output.LayerNorm.weight",
    "blocks/mlp_norm/bias": _LAYER + "output.LayerNorm.bias",
    "pooler/kernel": "pooler.dense.weight",
    "pooler/bias": "pooler.dense.bias",
    "classifier/kernel": "classifier.weight",
    "classifier/bias": "classifier.bias",
}
ROBERTA = ENCODER | {
    "pooler/kernel": "{pooler}.dense.weight",
    "pooler/bias": "{pooler}.dense.bias",
    "classifier/kernel": "classifier.out_proj.weight",
    "classifier/bias": "classifier.out_proj.bias",
}
