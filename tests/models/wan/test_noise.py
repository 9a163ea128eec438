"""What is told of the noise levels before training."""

import pytest

from models.wan.arch import VARIANTS
from models.wan.noise import build_sigma_law, describe_noise, noise_document
from utils.config.schema import ModelConfig


def model(expert=None, **values) -> ModelConfig:
    switches = {"cache_text_embeddings": True, "train_text_encoder": False, "freeze_transformer": True}
    return ModelConfig(type="wan", ckpt_path="x", expert=expert, **switches, **values)


@pytest.mark.parametrize(("variant", "boundary"), [("t2v-a14b", 0.875), ("i2v-a14b", 0.9)])
def test_an_experts_law_ends_at_the_boundary(variant, boundary):
    high, low = (build_sigma_law(model(expert), VARIANTS[variant]) for expert in ("high_noise", "low_noise"))
    assert (high.min_t, high.max_t, high.is_open_above) == (boundary, 1.0, False)
    assert (low.min_t, low.max_t, low.is_open_above) == (0.0, boundary, True)
    assert not build_sigma_law(model("low_noise", max_t=0.5), VARIANTS[variant]).is_open_above
    assert not build_sigma_law(model(), VARIANTS["ti2v-5b"]).is_open_above


def test_both_sides_have_their_share_of_the_law():
    # The shares by numerical integration stand in test_flow_matching.
    for expert, share in (("high_noise", 0.368), ("low_noise", 0.632)):
        document = noise_document(model(expert, shift=5.0), VARIANTS["t2v-a14b"])
        assert document["share_of_range"] == pytest.approx(share, abs=1e-3)
        assert document["shares_of_sides"] == pytest.approx(
            {"high_noise": 0.368, "low_noise": 0.632}, abs=1e-3
        )
        assert sum(document["shares_by_tenth"].values()) == pytest.approx(1.0)


def test_the_histogram_shows_the_range_and_no_more():
    lines = describe_noise(model("high_noise", shift=5.0), VARIANTS["t2v-a14b"])
    assert lines[1].split()[:4] == ["875", "-", "900", "24.4%"]
    assert lines[2].split()[:4] == ["900", "-", "1000", "75.6%"]
    assert "36.8% on the side of high_noise, 63.2% on the side of low_noise" in lines[3]
    assert len(lines) == 4
    assert not any("side" in line for line in describe_noise(model(), VARIANTS["ti2v-5b"]))


@pytest.mark.parametrize(
    ("expert", "values", "words"),
    [
        (
            "high_noise",
            {"shift": 1.0},
            "only 2.58% of the chosen law lies in the range of the high_noise expert",
        ),
        ("low_noise", {"shift": 100.0}, "lower model.shift"),
        ("high_noise", {"shift": 1.0}, "raise model.shift"),
        (None, {"min_t": 0.99}, "min_t = 0.99 to max_t = 1"),
    ],
)
def test_a_law_that_hardly_visits_the_range_is_warned_of(expert, values, words):
    variant = VARIANTS["t2v-a14b" if expert else "ti2v-5b"]
    warnings = [
        line for line in describe_noise(model(expert, **values), variant) if line.startswith("warning: ")
    ]
    assert len(warnings) == 1 and words in warnings[0]


@pytest.mark.parametrize(
    ("expert", "values"),
    [
        ("high_noise", {"shift": 5.0}),
        ("low_noise", {"shift": 1.0}),
        ("high_noise", {"timestep_sample_method": "uniform"}),
        # Narrow, but where the law has its bulk: nothing crowds at an end.
        (None, {"min_t": 0.49, "max_t": 0.51}),
    ],
)
def test_else_there_is_no_warning(expert, values):
    variant = VARIANTS["t2v-a14b" if expert else "ti2v-5b"]
    assert not any("warning" in line for line in describe_noise(model(expert, **values), variant))
