"""Which targets count, in training and in judging, of text and of answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oasis_jax.models.llama import Llama, LlamaConfig, token_losses
from oasis_jax.state import OasisTrainState
from train.data import corpus
from train.data.packing import Answered, pack_examples
from train.objectives.answers import answers
from train.objectives.text import held_out_loss, next_token, target_weights
from train.options import Pretrain
from train.run.setup import set_up, train_step

CONFIG = LlamaConfig(32, 8, 16, 1, 2, 2)
MODEL = Llama(CONFIG)
TOKENS = np.random.default_rng(0).integers(1, 32, (2, 7)).astype(np.int32)
PARAMS = MODEL.init(jax.random.key(0), jnp.asarray(TOKENS))["params"]

ONE, TWO, SHORT = [1] * 7, [1, 1, 1, 2, 2, 2, 2], [1, 1, 2, 3, 3, 0, 0]
# Segments of a row, weights or None, and what counts: within documents, and across.
COUNTED = {
    "one document": (ONE, None, [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]),
    "two": (TWO, None, [1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]),
    "one of one token, padding": (SHORT, None, [1, 0, 0, 1, 0, 0], [1, 1, 1, 1, 0, 0]),
    "weights": (TWO, [0, 2, 2, 0, 1, 1], [0, 2, 0, 0, 1, 1], [0, 2, 2, 0, 1, 1]),
    "a row that only fills up": ([0] * 7, [0] * 6, [0] * 6, [0] * 6),
}


def batch_of(segments, weights):
    rows = np.array([segments, ONE], np.int32)
    batch = {"tokens": TOKENS, "segments": rows}
    if weights is not None:
        batch["weights"] = np.array([weights, [1] * 6], np.float32)
    return batch


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize(
    "segments, weights, within, across", COUNTED.values(), ids=COUNTED
)
def test_what_counts_is_learnt_and_judged(segments, weights, within, across, cross):
    """The loss of a step and of an evaluation: the mean of the model's own losses."""
    batch = batch_of(segments, weights)
    counts = np.array([across if cross else within, [1] * 6], np.float32)
    np.testing.assert_array_equal(target_weights(batch, cross), counts)

    seen = None if cross else batch["segments"][:, :-1]
    logits = MODEL.apply({"params": PARAMS}, TOKENS[:, :-1], seen)
    wanted = np.average(token_losses(logits, TOKENS[:, 1:]), weights=counts)

    objective = next_token(CONFIG, 2, 6, cross_documents=cross)
    total, weight = objective.loss_fn({"params": PARAMS}, batch)
    np.testing.assert_allclose(total / weight, wanted, rtol=1e-5)
    judged = held_out_loss(MODEL, PARAMS, [batch, batch], cross)
    np.testing.assert_allclose(judged["val_loss"], wanted, rtol=1e-5)
    assert judged["val_tokens"] == 2 * counts.sum()


def test_batches_of_unequal_weight_are_judged_by_their_tokens():
    """Not a mean of means: the same tokens in other batches give the same loss."""
    rows = batch_of(SHORT, [1, 0, 0, 0, 0, 0])
    apart = [{k: v[i : i + 1] for k, v in rows.items()} for i in (0, 1)]
    whole, parts = (held_out_loss(MODEL, PARAMS, b) for b in ([rows], apart))
    np.testing.assert_allclose(parts["val_loss"], whole["val_loss"], rtol=1e-6)
    assert parts["val_tokens"] == whole["val_tokens"] == 7
    means = [held_out_loss(MODEL, PARAMS, [b])["val_loss"] for b in apart]
    assert abs(np.mean(means) - whole["val_loss"]) > 0.01


@pytest.mark.parametrize("seq", [3, 8, 13])
def test_every_token_but_a_documents_first_is_a_target_once(tmp_path, seq):
    """Of rows that cut documents anywhere; end tokens among them."""
    lengths = [1, 5, 2, 17, 3, 4, 30, 1, 6]
    lines = [f'{{"text": "{chr(97 + i) * n}"}}\n' for i, n in enumerate(lengths)]
    (tmp_path / "a.jsonl").write_text("".join(lines) * 3)
    data = corpus.load(
        str(tmp_path / "a.jsonl"), None, seq=seq, cache=tmp_path / "cache"
    )
    counted, firsts, ends = [], 0, 0
    for batch in data.validation(4):
        weights = np.asarray(target_weights(batch))
        before, own = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
        real = batch["segments"][:, 1:] > 0
        counted.append(own[weights > 0])
        # The separator of bytes is 0: what comes after it is a first token.
        np.testing.assert_array_equal(weights > 0, real & (before != 0))
        firsts += int((real & (before == 0)).sum())
        ends += int((real & (own == 0)).sum())
    targets = np.concatenate(counted)
    assert firsts > 0 and ends > 0
    assert (targets == 0).sum() == ends


def test_no_answer_counts_across_examples():
    """Whatever a packer says of a document's first token, it is no target."""
    examples = [
        Answered(np.arange(1, 4, dtype=np.int32), np.arange(3) >= 1, 0),
        Answered(np.arange(4, 8, dtype=np.int32), np.arange(4) >= 2, 2),
    ]
    rows = pack_examples(examples, 9, np.random.default_rng(0))
    row = {key: value[None] for key, value in rows[0].items()}
    np.testing.assert_array_equal(target_weights(row), row["weights"])
    assert row["weights"].sum() == 2 + 2

    careless = row | {"weights": np.ones_like(row["weights"])}
    assert target_weights(careless).sum() == 2 + 3
    objective = answers(CONFIG, 1, 9)
    assert objective.loss_fn({"params": PARAMS}, careless)[1] == 5


def test_a_step_in_parts_is_the_step():
    """Rows that count unequally: the loss and the gradient of the whole batch."""
    batch = batch_of(SHORT, None)
    losses = []
    for accumulate in (1, 2):
        config = Pretrain(batch=2, seq=6, accumulate=accumulate, rank="2")
        objective = next_token(CONFIG, 2, 6)
        setup = set_up(config, objective, lambda _: 1e-3, params=PARAMS)
        state, loss = jax.jit(train_step(setup, accumulate))(setup.state, batch)
        assert isinstance(state, OasisTrainState)
        losses.append((loss, state.diagnostics.gradient_norm))
    np.testing.assert_allclose(*losses, rtol=1e-4)
