"""Signals of keywords and the token table, on cases that are known beforehand."""

import pytest
import torch
from safetensors.torch import save_file

from models.wan.checkpoint import TEXT_ENCODER_FILE, open_text_encoder
from models.wan.names import umt5_to_hf
from models.wan.probes.encoder_keywords import common_tokens, keyword_signals, table_drift
from models.wan.probes.encoder_prompts import TEMPLATES, Entry, sentence_pairs
from models.wan.probes.encoder_stream import TABLE, open_encoder_pair

CIRCLE = Entry("keyword", 1, "circle", "circle")
END = 1


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3], [1, 2, 3], (3, 0)),
        ([1, 2, 9], [1, 3, 9], (1, 1)),
        ([1, 2, 2, 9], [1, 2, 9], (2, 1)),
        ([5, 9], [6, 7, 9], (0, 1)),
        ([5], [6], (0, 0)),
        ([9, 9], [9, 9, 9], (2, 0)),
    ],
)
def test_common_tokens(first, second, expected):
    assert common_tokens(first, second) == expected
    assert common_tokens(second, first) == expected


def sentences():
    texts = [text for pair in sentence_pairs("circle") for text in pair]
    return texts, {text: index for index, text in enumerate(texts)}


def test_a_sentence_is_compared_with_itself_without_the_keyword():
    pairs = sentence_pairs("blue {circle}")
    assert len(pairs) == len(TEMPLATES)
    for having, lacking in pairs:
        assert "blue {circle}" in having and "something" in lacking
        assert having.replace("blue {circle}", "something") == lacking


def test_the_signal_in_the_other_tokens_by_hand():
    """Three tokens: the keyword's or the placeholder's in the middle, of which the context knows nothing."""
    texts, place = sentences()
    ids = [[7, 100 if "circle" in text else 200, END] for text in texts]
    lacking = torch.tensor([[3.0, 0.0], [1.0, 1.0], [0.0, 4.0]])  # context of norm 5
    base = [
        lacking + (torch.tensor([[0.0, 0], [9, 9], [0.5, 0]]) if i % 2 == 0 else 0) for i in range(len(ids))
    ]
    tuned = [
        lacking + (torch.tensor([[0.0, 0], [0, 0], [2.0, 0]]) if i % 2 == 0 else 0) for i in range(len(ids))
    ]
    (signal,) = keyword_signals([CIRCLE], ids, place, base, tuned)
    assert signal.base_context == pytest.approx(0.1)
    assert signal.tuned_context == pytest.approx(0.4)
    assert signal.context_gain == pytest.approx(4.0)
    # Means of the three tokens: (4, 5) / 3 without it; (9.5, 9) / 3 and (2, 0) / 3 more with it.
    assert signal.base_pooled == pytest.approx((9.5**2 + 9**2) ** 0.5 / 41**0.5)
    assert signal.tuned_pooled == pytest.approx(2 / 41**0.5)


def test_no_signal_has_no_gain():
    texts, place = sentences()
    states = [torch.ones(2, 2)] * len(texts)
    (signal,) = keyword_signals([CIRCLE], [[5, END]] * len(texts), place, states, states)
    assert (signal.base_context, signal.context_gain, signal.pooled_gain) == (0.0, None, None)


@pytest.fixture
def pair_with(tiny_ti2v, tmp_path):
    """`pair_with(change)`: the tiny encoder against itself with another token table."""

    def build(change):
        source = open_text_encoder(tiny_ti2v / TEXT_ENCODER_FILE)
        tensors = {name: source.get(name).clone() for name in source.shapes}
        tensors[TABLE] = change(tensors[TABLE].float())
        save_file({umt5_to_hf(name): tensor for name, tensor in tensors.items()}, tmp_path / "t.safetensors")
        return open_encoder_pair(tiny_ti2v / TEXT_ENCODER_FILE, tmp_path / "t.safetensors")

    return build


def test_a_table_that_did_not_change(pair_with):
    found = table_drift(pair_with(lambda table: table), [10, 20], 5)
    assert (found.num_rows, found.num_changed, found.num_keyword_rows_changed) == (384, 0, 0)
    assert found.neighbours_kept == 1.0
    assert table_drift(pair_with(lambda table: table), [], 5).neighbours_kept is None


@pytest.mark.parametrize("rows_at_once", [384, 7])
def test_one_changed_row_is_found_and_its_neighbours_with_it(pair_with, monkeypatch, rows_at_once):
    monkeypatch.setattr("models.wan.probes.encoder_keywords._ROWS_AT_ONCE", rows_at_once)
    nearest = []

    def move(table):
        """Row 10 becomes row 200 with a little of itself; its neighbours by brute force, before and after."""
        moved = table.clone()
        moved[10] = table[200] + 0.01 * table[10]
        for one in (table, moved):
            cosines = torch.cosine_similarity(one[10:11], one, dim=1)
            cosines[10] = -2
            nearest.append(set(cosines.topk(5).indices.tolist()))
        return moved

    found = table_drift(pair_with(move), [10], 5)
    assert (found.num_changed, found.num_keyword_rows, found.num_keyword_rows_changed) == (1, 1, 1)
    assert 200 in nearest[1] and 200 not in nearest[0]
    assert found.neighbours_kept == pytest.approx(len(nearest[0] & nearest[1]) / len(nearest[0] | nearest[1]))
