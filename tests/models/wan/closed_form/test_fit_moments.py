"""Moments from two encoders, against the whole encoders and the whole DiT of another code path."""

import pytest
import torch
from safetensors.torch import save_file

from models.wan.checkpoint import EXPERT_DIRS, TEXT_ENCODER_FILE, TOKENIZER_DIR, open_text_encoder
from models.wan.closed_form.fit_moments import ANCHOR_WEIGHT, MEASURED, collect, streamed
from models.wan.closed_form.fit_prompts import FitPlan, FitPrompt
from models.wan.names import umt5_to_hf
from models.wan.probes.encoder_drift import load_text_embedding
from models.wan.probes.encoder_stream import open_encoder_pair
from models.wan.text_encoder import WanTokenizer, load_umt5

CPU = torch.device("cpu")
NEUTRAL = [
    f"a {colour} {shape} moves" for colour in ("red", "blue") for shape in ("circle", "square", "triangle")
]
PLAN = FitPlan(
    (
        FitPrompt("", "anchor"),
        FitPrompt("blurred, static", "anchor"),
        FitPrompt("a green circle on a dark background", "neutral", True),
        *(FitPrompt(text, "neutral") for text in NEUTRAL),
        FitPrompt("the zorp rests", "domain"),
        FitPrompt("here is a zorp", "domain", True),
    )
)


class Setting:
    """A checkpoint with two experts, and a tuned encoder."""

    def __init__(self, root, checkpoint):
        self.checkpoint, self.base = checkpoint, checkpoint / TEXT_ENCODER_FILE
        self.tuned = root / "tuned.safetensors"
        source, random = open_text_encoder(self.base), torch.Generator().manual_seed(0)
        tensors = {name: source.get(name).float() for name in source.shapes}
        for name, tensor in tensors.items():
            if tensor.ndim == 2:
                tensors[name] = tensor + 0.1 * tensor.std() * torch.randn(tensor.shape, generator=random)
        save_file({umt5_to_hf(name): tensor.contiguous() for name, tensor in tensors.items()}, self.tuned)
        self.tokenizer = WanTokenizer(checkpoint / TOKENIZER_DIR)
        self.pair = open_encoder_pair(self.base, self.tuned)
        self.embeds = [
            load_text_embedding(checkpoint / name, self.pair.sizes.d_model) for name in EXPERT_DIRS.values()
        ]

    def collect(self, plan=PLAN, **limits):
        seen = []
        found = collect(
            self.pair, plan, self.tokenizer, self.embeds, torch.float32, CPU, seen.append, **limits
        )
        return found, seen

    def states(self, encoder, text):
        umt5 = load_umt5(open_text_encoder(encoder), torch.float32, CPU)
        with torch.no_grad():
            return umt5(input_ids=torch.tensor([self.tokenizer(text)])).last_hidden_state[0]


@pytest.fixture(scope="module")
def setting(tmp_path_factory, tiny_t2v):
    return Setting(tmp_path_factory.mktemp("moments"), tiny_t2v)


def test_sums_are_those_of_whole_encoders_at_true_length(setting):
    found, _ = setting.collect()
    assert len(found) == 2
    for expert, moments in enumerate(found):
        embed = setting.embeds[expert]
        tuned = torch.cat([embed(setting.states(setting.tuned, text)) for text in NEUTRAL]).double()
        base = torch.cat([embed(setting.states(setting.base, text)) for text in NEUTRAL]).double()
        inputs = sum(part.inputs() for part in moments.parts)
        wanted = sum(part.wanted() for part in moments.parts)
        assert sum(part.num_tokens for part in moments.parts) == len(tuned)
        assert torch.allclose(inputs, tuned.T @ tuned, rtol=1e-4, atol=1e-4)
        assert torch.allclose(wanted, (base - tuned).T @ tuned, rtol=1e-3, atol=1e-3)
        kept = embed(setting.states(setting.tuned, "the zorp rests")).double()
        assert torch.allclose(moments.kept.inputs(), kept.T @ kept, rtol=1e-4, atol=1e-4)
        assert moments.kept.wanted() is None
        assert torch.allclose(moments.padding_D, embed(torch.zeros(1, setting.pair.sizes.d_model))[0])
    assert not torch.allclose(found[0].padding_D, found[1].padding_D)


def test_each_anchor_counts_once_however_long_it_is(setting):
    moments = setting.collect()[0][0]
    embed, expected = setting.embeds[0], 0
    for text in ("", "blurred, static"):
        tokens = embed(setting.states(setting.tuned, text)).double()
        expected = expected + tokens.T @ tokens / len(tokens)
    assert moments.anchors.weight == pytest.approx(2.0)
    assert torch.allclose(moments.anchors.inputs(), expected, rtol=1e-4, atol=1e-5)
    shares = moments.shares(0.7)
    assert [share.weight for share in shares] == [1 - ANCHOR_WEIGHT, ANCHOR_WEIGHT, 0.7]


def test_parts_are_growing_numbers_of_prompts(setting):
    moments = setting.collect()[0][0]
    assert moments.part_prompts == (1, 2, 3, 6)
    lengths = [len(setting.tokenizer(text)) for text in NEUTRAL]
    assert [part.num_tokens for part in moments.parts] == [
        lengths[0],
        lengths[1],
        lengths[2],
        sum(lengths[3:]),
    ]


def test_held_out_prompts_are_measured_on_and_not_summed(setting):
    moments = setting.collect()[0][0]
    held = moments.measured["neutral", True]
    expected = setting.embeds[0](setting.states(setting.base, "a green circle on a dark background"))
    assert held.num_prompts == 1 and torch.allclose(held.base_ND, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(held.base_ND, held.tuned_ND, atol=1e-3)
    assert set(moments.measured) == {
        *(("anchor", False), ("neutral", False), ("neutral", True), ("domain", False), ("domain", True))
    }
    assert len(moments.measured["neutral", False].tuned_ND) <= MEASURED[False]


def test_how_much_is_in_memory_at_once_changes_no_sum(setting):
    (whole, _), seen = setting.collect()
    (pieces, _), seen_in_pieces = setting.collect(max_tokens=12)
    # More passes, each over all layers of the encoders; every prompt goes through every layer once.
    assert sum(seen) == sum(seen_in_pieces) and len(seen_in_pieces) > 3 * len(seen)
    for one, other in zip(whole.parts, pieces.parts, strict=True):
        assert torch.allclose(one.inputs(), other.inputs(), rtol=1e-5, atol=1e-5)


def test_pieces_hold_every_prompt_once():
    ids = [[0] * length for length in (5, 3, 9, 1, 1, 20, 2)]
    pieces = list(streamed(ids, 8))
    assert [place for piece in pieces for place in piece] == list(range(7))
    assert all(sum(len(ids[place]) for place in piece) <= 8 or len(piece) == 1 for piece in pieces)
    assert list(streamed([], 8)) == []
