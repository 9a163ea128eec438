import pytest

from scripts.tiny_world.proof_control import Refusal
from scripts.tiny_world.proof_data import LENGTHS
from scripts.tiny_world.proof_statistics import FEWEST_TEXTS
from scripts.tiny_world.proof_targets import Finding, all_met, judge_targets

N = 200


def texts(name: str, number: int = N) -> list[str]:
    return [f"{name} {index % number}" for index in range(N)]


def cell(name: str, share: float) -> dict[str, list]:
    right = [1] * round(share * N) + [0] * (N - round(share * N))
    return {"text": texts(name), "both": right, "colour": [1] * N, "shape": right, "nearest": [1] * N}


def result(
    known: float, new: float, held_out: float, drift: float = 0.01, away: float = 0.1
) -> dict[str, object]:
    outcomes = {"known": cell("known", known), "held_out": cell("held_out", held_out)}
    outcomes |= {length: cell(length, new) for length in LENGTHS}
    probes = {"te_eval": {"neutral_drift": drift, "caps": {"max_neutral_drift": 0.02}}}
    return {
        "outcomes": outcomes | {"neutral": {"text": texts("neutral"), "distance": [away] * N}},
        "probes": probes,
    }


def good() -> dict[tuple[str, int], dict[str, object]]:
    return {
        ("base", 0): result(0.98, 0.05, 0.05, away=0.0),
        ("gentle", 0): result(0.97, 0.95, 0.90),
        ("damaging", 0): result(0.60, 1.0, 0.9, drift=0.3, away=0.5),
        ("damaging_lora", 0): result(0.90, 1.0, 0.9, away=0.5),
    }


def missed(results: dict[tuple[str, int], dict[str, object]]) -> set[str]:
    return {finding.name for finding in judge_targets(results) if not finding.is_met}


def of_single(results: dict[tuple[str, int], dict[str, object]]) -> Finding:
    (found,) = [one for one in judge_targets(results) if one.name == "gentle: new words, single prompts"]
    return found


def test_what_was_asked_for_meets_every_target():
    findings = judge_targets(good())
    assert len(findings) == 11
    assert all_met(findings), missed(good())


@pytest.mark.parametrize(
    ("arm", "worse", "name"),
    [
        ("base", result(0.94, 0.05, 0.05), "base: known words"),
        ("base", result(0.98, 0.20, 0.05), "base: new words"),
        ("gentle", result(0.97, 0.89, 0.90), "gentle: new words, single prompts"),
        ("gentle", result(0.97, 0.95, 0.84), "gentle: held-out combinations"),
        ("gentle", result(0.95, 0.95, 0.90), "gentle: known words lost"),
        ("gentle", result(0.97, 0.95, 0.90, drift=0.03), "gentle: neutral drift, worst seed"),
        ("damaging", result(0.97, 1.0, 0.9, away=0.5), "damage: known words lost at the damaging rate"),
        ("damaging_lora", result(0.75, 1.0, 0.9, away=0.5), "translator: points of known words beyond half"),
        ("damaging_lora", result(0.90, 1.0, 0.9, away=0.55), "translator: neutral pictures go further"),
    ],
)
def test_each_target_can_be_missed(arm, worse, name):
    results = good() | {(arm, 0): worse}
    assert any(found.startswith(name) for found in missed(results)), missed(results)


def test_the_less_strict_reading_has_its_own_findings():
    results = good() | {("gentle", 0): result(0.97, 0.10, 0.10)}
    assert "gentle: held-out combinations" in missed(results)
    by_nearest = {one.name: one for one in judge_targets(results, "nearest")}
    assert by_nearest["gentle: held-out combinations"].is_met
    assert not by_nearest["damage: known words lost at the damaging rate"].is_met


def test_the_worst_seed_of_the_drift_counts():
    results = good()
    for name in ("base", "gentle", "damaging", "damaging_lora"):
        results[(name, 1)] = results[(name, 0)]
    results[("gentle", 1)] = result(0.97, 0.95, 0.90, drift=0.021)
    assert missed(results) == {"gentle: neutral drift, worst seed"}


def test_a_miss_says_which_attribute_is_wrong_and_a_value_near_the_limit_is_not_settled():
    results = good() | {("gentle", 0): result(0.97, 0.89, 0.90)}
    single = of_single(results)
    assert single.row()["why"] == (
        "the colour wrong in 0.0%; the shape, read strictly, wrong in 11.0%; colour or best fitting shape wrong in 0.0%"
    )
    assert not single.is_settled
    far = good() | {("gentle", 0): result(0.97, 0.50, 0.90)}
    assert of_single(far).is_settled
    assert of_single(far).row()["settled at 95 %"] == "yes"


@pytest.mark.parametrize("number", [3, FEWEST_TEXTS - 1])
def test_nothing_is_settled_over_few_texts_however_many_pictures(number):
    results = good()
    results[("gentle", 0)]["outcomes"]["single"] |= {"text": texts("single", number), "both": [0] * N}  # type: ignore[index]
    row = of_single(results).row()
    assert (row["n texts"], row["n pictures"]) == (number, N)
    assert (row["met"], row["settled at 95 %"]) == ("no", "no: fewer than 10 texts")


def test_the_worst_of_some_seeds_has_no_interval_and_is_not_settled():
    (drift,) = [one for one in judge_targets(good()) if one.name.startswith("gentle: neutral drift")]
    assert not drift.is_settled
    assert (drift.row()["n texts"], drift.row()["settled at 95 %"]) == ("", "no interval")


def test_a_refusal_for_another_reason_is_none():
    assert Refusal(2, "model.cache_text_embeddings: is true, which contradicts ...").is_refused
    assert not Refusal(0, "model.cache_text_embeddings").is_refused
    assert not Refusal(2, "error: ckpt_path: no such directory").is_refused
