"""Packing: first fit, and nothing lost."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.packing import Answered, pack, pack_examples


@settings(deadline=None)
@given(st.lists(st.integers(1, 12), max_size=40), st.integers(12, 20))
def test_packing_is_first_fit(lengths, capacity):
    want: list[list[int]] = []
    for item, length in enumerate(lengths):
        for row in want:
            if sum(lengths[i] for i in row) + length <= capacity:
                row.append(item)
                break
        else:
            want.append([item])
    assert pack(lengths, capacity) == want


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(1, 8)), min_size=1, max_size=20),
    st.integers(9, 17),
    st.integers(0, 3),
)
def test_packing_loses_and_duplicates_nothing(parts, seq, seed):
    examples = [
        Answered(np.arange(a + b) + 100 * i, np.arange(a + b) >= max(1, a), a)
        for i, (a, b) in enumerate(parts, start=1)
    ]
    packed = pack_examples(examples, seq, np.random.default_rng(seed))
    found = {}
    for row in map(packed.__getitem__, range(len(packed))):
        tokens, segments = row["tokens"], row["segments"]
        assert tokens.shape == segments.shape == (seq + 1,)
        assert not tokens[segments == 0].any()
        assert (np.diff(segments[segments > 0]) >= 0).all()
        counted = np.concatenate([[0], row["weights"]])
        for segment in range(1, segments.max() + 1):
            where = segments == segment
            number = tokens[where][0] // 100
            assert number not in found
            found[number] = (tokens[where], counted[where])
    assert sorted(found) == [*range(1, len(parts) + 1)]
    for number, (tokens, counted) in found.items():
        example = examples[number - 1]
        np.testing.assert_array_equal(tokens, example.tokens[: seq + 1])
        place = np.arange(len(tokens))
        np.testing.assert_array_equal(counted, (place >= example.start) & (place > 0))
