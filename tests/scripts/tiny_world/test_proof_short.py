"""The proof in short: one seed, some arms, coarse targets. Does training still do what it is for?"""

import csv
from statistics import fmean

import numpy as np
import pytest
from PIL import Image

from scripts.sample import main as sample
from scripts.tiny_world.asset import read_quality
from scripts.tiny_world.proof import prove
from scripts.tiny_world.proof_arms import Plan, Recipe
from scripts.tiny_world.proof_data import LENGTHS, Amounts, new_prompts
from scripts.tiny_world.proof_statistics import Estimate, mean_difference, outcomes
from scripts.tiny_world.proof_task import MEASURE_SEED
from utils.errors import UserError
from utils.report import read_summary
from utils.rng import derive_seed

# Five trainings stand before the first test: four minutes on quiet cores, and more beside other tests.
pytestmark = pytest.mark.timeout(1800)

PLAN = Plan(
    seeds=(0,),
    recipe=Recipe(encoder_steps=150, adapter_steps=150, gentle_lr=1e-3, damaging_lr=8e-3),
    amounts=Amounts(known_prompts=54, new_prompts=24, held_out_prompts=18, neutral_prompts=18),
    arms=("base", "gentle", "damaging", "damaging_lora", "shuffled"),
)


@pytest.fixture(scope="module")
def proof(tmp_path_factory):
    place = tmp_path_factory.mktemp("proof")
    return place, prove(place / "work", PLAN, jobs=2, reports_dir=place / "reports", run_tag="first")


def share(proof, arm: str, cell: str, what: str = "colour") -> float:
    return fmean(proof[1]["results"][(arm, 0)]["outcomes"][cell][what])


@pytest.mark.long
def test_the_encoder_learns_new_words_and_keeps_known_ones(proof):
    for length in LENGTHS:
        # Of six colours; the base guesses.
        assert share(proof, "base", length) < 0.5
        assert share(proof, "gentle", length) > share(proof, "base", length) + 0.3
    assert share(proof, "gentle", "known") > share(proof, "base", "known") - 0.06


def known_gain(proof, arm: str, other: str) -> Estimate:
    """How many more of the known words an arm draws, by the strict reading."""
    return mean_difference(*(outcomes(proof[1]["results"], one, "known") for one in (arm, other)))


@pytest.mark.long
def test_a_damaging_rate_is_seen_and_a_translator_brings_some_of_it_back(proof):
    """Measured, known words: base and gentle 100, damaging 65, with translator 72, with shuffled captions 28 %.

    So it is seen that the translator learns from its captions, and that it helps and does not harm. What is not shown: that
    half of the loss comes back (a fifth does here), or that other seeds do the same. The whole proof asks that.
    """
    assert share(proof, "base", "known", "both") > 0.9
    assert share(proof, "base", "known", "distance") == 0
    assert share(proof, "damaging", "known", "distance") > share(proof, "gentle", "known", "distance")
    assert known_gain(proof, "damaging", "base").high < -0.1  # measured: -35 points, -48 to -22
    assert known_gain(proof, "damaging_lora", "damaging").value > 0.02  # measured: 7.4 points, 0.2 to 14.6
    assert known_gain(proof, "damaging_lora", "shuffled").low > 0.1  # measured: 44 points, 31 to 58
    probes = proof[1]["results"][("damaging_lora", 0)]["probes"]
    for expert in ("high_noise", "low_noise"):
        assert probes[f"lora_delta_budget.{expert}"]["num_modules"] == 12
        assert 1e-4 < probes[f"lora_delta_budget.{expert}"]["max_ratio"] < 1
        assert 0.5 < probes[f"attn_logit_probe.{expert}"]["min_std_ratio"] <= 1.5


def summary_rows(done, name: str) -> list[dict[str, str]]:
    with (done["directory"] / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.long
def test_the_report_says_all_that_and_what_is_done_is_not_done_again(proof):
    place, done = proof
    summary = read_summary(done["directory"])
    assert summary.metrics["cache_left_on_is_refused"] is True
    base = outcomes(done["results"], "base", "known")
    assert summary.metrics["base: known words"] == pytest.approx(base.mean())
    # The pictures of a bare word are many, and three texts: said beside it, and nothing is settled.
    (single,) = [row for row in summary_rows(done, "targets") if "single" in row["target"]]
    assert (single["n texts"], single["n pictures"]) == ("3", "24")
    assert single["settled at 95 %"] == "no: fewer than 10 texts"
    (verbose,) = [row for row in summary_rows(done, "counts") if row["cell"] == "verbose"]
    assert verbose == {"cell": "verbose", "texts": "24", "pictures": "24"}
    words = {(row["arm"], row["word"]): row for row in summary_rows(done, "words")}
    assert words["damaging", "zorp"]["single nearest"] and not words["damaging", "vume"]["single nearest"]
    text = (done["directory"] / "report.md").read_text(encoding="utf-8")
    assert "refused, as it must be (exit status 2)" in text
    assert (done["directory"] / "pictures.png").stat().st_size < 500_000
    before = {path: path.stat().st_mtime_ns for path in (place / "work" / "runs").rglob("*.safetensors")}
    again = prove(place / "work", PLAN, jobs=1, reports_dir=place / "reports", run_tag="second")
    assert again["results"] == done["results"]
    assert {
        path: path.stat().st_mtime_ns for path in (place / "work" / "runs").rglob("*.safetensors")
    } == before


@pytest.mark.long
def test_another_plan_does_not_go_on_in_the_same_place(proof):
    other = Plan(seeds=(0,), recipe=Recipe(encoder_steps=151), amounts=PLAN.amounts, arms=PLAN.arms)
    with pytest.raises(UserError, match="another plan"):
        prove(proof[0] / "work", other, jobs=1, reports_dir=proof[0] / "reports", run_tag="other")


@pytest.mark.long
def test_what_is_measured_is_what_the_sampling_script_draws(proof):
    work, drawing = proof[0] / "work", read_quality()["drawing"]
    (encoder,) = (work / "runs" / "damaging_s0").glob("*/epoch*/text_encoder.safetensors")
    (high,) = (work / "runs" / "damaging_lora_s0").glob("*/adapter_high_noise.safetensors")
    prompt = new_prompts("verbose", PLAN.amounts.new_prompts, MEASURE_SEED)[1].text
    out = proof[0] / "sampled.png"
    flags = {
        "--config": work / "configs" / "damaging_lora_s0.toml",
        "--text_encoder": encoder,
        "--adapter_high": high,
        "--adapter_low": high.with_name("adapter_low_noise.safetensors"),
        "--prompt": prompt,
        "--negative_prompt": "",
        "--size": "48x48",
        "--solver": drawing["solver"],
        "--steps": drawing["steps"],
        "--shift": drawing["shift"],
        "--guidance": drawing["guidance"],
        "--seed": derive_seed(MEASURE_SEED, "proof", "verbose", 1),
        "--out": out,
    }
    assert sample([str(word) for pair in flags.items() for word in pair]) == 0
    with np.load(work / "pictures" / "damaging_lora_s0.npz") as pictures:
        measured, other = (pictures["verbose"][index].astype(int) for index in (1, 0))
    sampled = np.asarray(Image.open(out)).astype(int)
    # Padding as one row is the same sum up to rounding; another prompt's picture is far away.
    assert np.abs(sampled - measured).max() <= 2
    assert np.abs(sampled - other).max() > 20
