"""Tiny random models of transformers, and what they compute: for `test_hf.py`.

Writes `tests/fixtures/hf/<case>/`: `config.json` and `model.safetensors`, as
`save_pretrained` leaves them, and `expected.npz` with tokens, and logits or the last
hidden states. Needs torch and transformers 5:

    python tests/hf_fixtures.py
"""

from pathlib import Path

import numpy as np

DIRECTORY = Path(__file__).parent / "fixtures" / "hf"
LENGTH = 12

_SIZES = dict(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=32,
    bos_token_id=None,
    eos_token_id=None,
)
_DECODER = _SIZES | dict(num_key_value_heads=2, tie_word_embeddings=False)
_LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=100.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)

# The class of transformers, and the fields of its config.
CASES = {
    "llama": (
        "LlamaForCausalLM",
        _DECODER | dict(rope_parameters=_LLAMA3, tie_word_embeddings=True),
    ),
    "llama-linear": (
        "LlamaForCausalLM",
        _DECODER
        | dict(
            rope_parameters=dict(rope_type="linear", rope_theta=500.0, factor=2.0),
            head_dim=8,
        ),
    ),
    "qwen2": ("Qwen2ForCausalLM", _DECODER | dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3ForCausalLM", _DECODER | dict(head_dim=8)),
    "mistral": ("MistralForCausalLM", _DECODER | dict(sliding_window=None)),
    "bert": ("BertModel", _SIZES),
    "bert-labels": ("BertForSequenceClassification", _SIZES | dict(num_labels=3)),
    "bert-masked": ("BertForMaskedLM", _SIZES),
    "roberta": ("RobertaModel", _SIZES | dict(type_vocab_size=1)),
    "roberta-labels": ("RobertaForSequenceClassification", _SIZES | dict(num_labels=3)),
}


def build(case: str, seed: int):
    """A model of transformers whose parameters are all random, biases and norms too."""
    import torch
    import transformers

    name, settings = CASES[case]
    architecture = getattr(transformers, name)
    torch.manual_seed(seed)
    model = architecture(architecture.config_class(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def compute(model, seed: int) -> dict[str, np.ndarray]:
    """Random tokens and what the model makes of them; encoders get padding and types."""
    import torch

    random = np.random.default_rng(seed)
    tokens = random.integers(2, 48, (2, LENGTH))  # 0 and 1 are padding somewhere
    inputs = {"tokens": tokens}
    options = {}
    if model.config.model_type in ("bert", "roberta"):
        inputs["segments"] = np.ones_like(tokens)
        inputs["segments"][1, -4:] = 0
        tokens[1, -4:] = model.config.pad_token_id
        inputs["types"] = random.integers(0, model.config.type_vocab_size, tokens.shape)
        options = {
            "attention_mask": torch.tensor(inputs["segments"]),
            "token_type_ids": torch.tensor(inputs["types"]),
        }
    with torch.no_grad():
        out = model(torch.tensor(tokens), output_hidden_states=True, **options)
    results = {"hidden": out.hidden_states[-1].numpy()}
    if "logits" in out:
        results["logits"] = out.logits.numpy()
    return {k: v.astype(np.int32) for k, v in inputs.items()} | results


def main() -> None:
    for case in CASES:
        model = build(case, seed=0)
        model.save_pretrained(DIRECTORY / case)
        np.savez_compressed(DIRECTORY / case / "expected.npz", **compute(model, seed=0))
        (DIRECTORY / case / "generation_config.json").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
