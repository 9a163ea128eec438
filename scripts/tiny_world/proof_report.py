"""The report of the proof: targets, every arm with its intervals, what arms differ by, and a sheet of pictures."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scripts.tiny_world.asset import QUALITY_FILE
from scripts.tiny_world.drawing import EXPERTS
from scripts.tiny_world.proof_arms import BASE, Arm, Plan
from scripts.tiny_world.proof_control import Refusal
from scripts.tiny_world.proof_data import LENGTHS, NEW_WORDS, neutral_prompts
from scripts.tiny_world.proof_measure import cells_of
from scripts.tiny_world.proof_statistics import FEWEST_TEXTS, Results, mean_difference, outcomes, share
from scripts.tiny_world.proof_targets import all_met, judge_targets
from scripts.tiny_world.proof_task import MEASURE_SEED, Place
from utils.report import Report, Verdict

if TYPE_CHECKING:
    from PIL.Image import Image

# Outcomes that have tables, and how they are called.
WHATS = (
    ("both", "colour and shape right"),
    ("nearest", "colour and best fitting shape right"),
    ("colour", "colour right"),
)
CELLS = (*LENGTHS, "held_out", "known")
# (arm, held against): what the arms and controls are there to tell apart.
COMPARED = (
    ("damaging_lora", "damaging"),
    ("damaging_lora_new", "damaging_lora"),
    ("damaging_more", "damaging_lora"),
    ("shuffled", "damaging_lora"),
    ("band", "damaging_lora"),
    ("self_attn", "damaging_lora"),
    ("damaging_closed", "damaging_lora"),
    ("damaging_closed_16", "damaging_lora"),
    ("damaging_closed_16", "damaging"),
    ("damaging_closed_capped", "damaging_lora"),
    ("damaging_closed_lora", "damaging_closed"),
    ("gentle_lora", "gentle"),
    ("gentle_closed", "gentle"),
    ("gentle_closed_capped", "gentle"),
    ("gentle_more", "gentle_lora"),
    ("gentle_lora_new", "gentle_lora"),
)
_SHEET_ARMS = ("base", "gentle", "damaging", "damaging_lora", "shuffled", "self_attn")
# (cell, place in it) of the rows of the sheet.
_SHEET_ROWS = (
    ("known", 0),
    ("known", 1),
    ("single", 0),
    ("single", 1),
    ("verbose", 2),
    ("held_out", 0),
    ("held_out", 1),
    ("neutral", 0),
    ("neutral", 1),
)
HOW_TO_READ = """\
- **New words** name a combination of colour and shape (three words) or an attribute (two, for the held-out combinations).
  Right is a picture with the right colour and the right shape, as the checker measures it. Chance is 5.6 %. The strict
  reading of the shape decides over the targets. Shapes are the last thing that a miniature learns to draw, so there are tables
  too for the shape that fits best, however badly it is drawn, and for the colour alone (chance 16.7 %).
- **Known** are prompts of known words; all prompts have templates that no training of the proof saw. Every arm draws the same
  prompts from the same noise, so differences are paired.
- Pictures of one text are not independent of one another, so each **text** counts once, by the mean of its pictures over noise
  and seeds. Intervals are Student's at 95 % over texts, of paired differences too. `counts` says how many texts there are; the
  bare new words are three, so their interval says next to nothing. Intervals hold neither how much trainings differ (the
  values by seed do) nor how much words do: they are for these words (`words.csv` has each).
- **distance** is the relative distance of a picture's latents to those that the base drew: 0 where nothing changed.
- A target is **met** by its value; **settled** says whether the whole interval agrees, and is never said over
  fewer than """ + f"{FEWEST_TEXTS} texts."
NEXT_STEPS: dict[Verdict, str] = {
    "pass": "- Run it again after a change of the training code; `scripts/reports.py compare` holds two reports side by side.",
    "fail": (
        "- The column `why` of the targets says which attribute is wrong; the sheet shows how.\n"
        "- A missed target is a finding. Do not tune the rates until it is met: they were fixed beforehand."
    ),
    "inconclusive": "- Run it with more seeds.",
}


def write_report(
    report: Report, place: Place, plan: Plan, results: Results, refusal: Refusal, asset: Path
) -> Path:
    """Fill and write the report; returns its directory."""
    for path in (asset / QUALITY_FILE, *sorted(asset.glob("*.safetensors")), place.work / "plan.json"):
        report.add_input("plan" if path.name == "plan.json" else "checkpoint", path)
    findings, less_strict = judge_targets(results), judge_targets(results, "nearest")
    for name, found, said in (
        ("targets", findings, "Targets"),
        ("targets_nearest", less_strict, "The same by the best fitting shape, which does not decide"),
    ):
        report.table(name, [finding.row() for finding in found], said, inline_rows=len(found))
    for what, said in WHATS:
        arms = [arm_row(arm, results, what) for arm in plan.chosen()]
        report.table(f"arms_{what}", arms, f"Arms: {said}, in percent, with intervals", inline_rows=len(arms))
        compared = list(comparisons(results, what))
        report.table(
            f"compared_{what}", compared, f"Differences, paired: {said}, in points", inline_rows=len(compared)
        )
    report.table("counts", list(count_rows(results)), "How many texts and pictures", inline_rows=10)
    report.table("words", list(word_rows(results)), "New words, each by itself", inline_rows=0)
    report.table("seeds", list(seed_rows(results)), "Every seed", inline_rows=0)
    report.section("Controls", controls(results, refusal))
    for finding in findings:
        report.metric(finding.name, finding.found.value, f"{finding.target}; met: {finding.is_met}")
    for finding in less_strict:
        report.metric(f"{finding.name} (nearest shape)", finding.found.value, f"met: {finding.is_met}")
    add_cost(report, results)
    report.picture("pictures", draw_sheet(place, plan), f"Seed {plan.seeds[0]}: the same noise in each row")
    is_refused = refusal.is_refused
    report.metric("cache_left_on_is_refused", is_refused, "encoder training with cached embeddings")
    met = sum(finding.is_met for finding in findings)
    verdict: Verdict = "pass" if all_met(findings) and is_refused else "fail"
    said = f"{met} of {len(findings)} targets met, {sum(one.is_met for one in less_strict)} by the best fitting shape"
    said += f", {len(plan.seeds)} seed(s) for each arm"
    missed = [finding.name for finding in findings if not finding.is_met]
    said += f"; missed: {', '.join(missed)}" if missed else ""
    return report.write(verdict, said, HOW_TO_READ, NEXT_STEPS[verdict])


def arm_row(arm: Arm, results: Results, what: str) -> dict[str, object]:
    """One arm over all seeds; `what` has to be right, one of `WHATS`."""
    row: dict[str, object] = {"arm": arm.name, "what": arm.what}
    for cell in CELLS:
        row[cell] = share(outcomes(results, arm.name, cell, what)).shown()
    now, before = (outcomes(results, name, "known", what) for name in (arm.name, BASE))
    row["known against base"] = mean_difference(now, before).shown(sign="+")
    for cell in ("known", "neutral"):
        row[f"{cell} distance"] = f"{outcomes(results, arm.name, cell, 'distance').mean():.3f}"
    row |= probe_columns(arm, results)
    return row


def count_rows(results: Results) -> Iterable[dict[str, object]]:
    """How many texts and pictures there are of each cell, of all seeds together; the same for every arm."""
    for cell in CELLS:
        found = share(outcomes(results, BASE, cell))
        yield {"cell": cell, "texts": found.num_texts, "pictures": found.num_pictures}
    neutral = outcomes(results, BASE, "neutral", "distance")
    yield {
        "cell": "neutral",
        "texts": len(neutral.by_text()),
        "pictures": sum(map(len, neutral.values)),
    }


def word_rows(results: Results) -> Iterable[dict[str, object]]:
    """Means of each new word by itself, over all seeds: intervals are over texts, and hold for these words alone."""
    for arm in dict.fromkeys(name for name, _ in results):
        for word in NEW_WORDS:
            row: dict[str, object] = {"arm": arm, "word": word}
            for cell in (*LENGTHS, "held_out"):
                for what, _ in WHATS:
                    own = outcomes(results, arm, cell, what).with_word(word)
                    row[f"{cell} {what}"] = round(own.mean(), 4) if own.by_text() else ""
            yield row


def probe_columns(arm: Arm, results: Results) -> dict[str, str]:
    """Key numbers of the probes, the worst of all seeds."""
    probes = [result["probes"] for (name, _), result in sorted(results.items()) if name == arm.name]
    row = {"neutral drift": "", "largest delta ratio": "", "logit ratios": ""}
    if arm.kind == "encoder":
        row["neutral drift"] = f"{max(probe['te_eval']['neutral_drift'] for probe in probes):.4f}"
    pairs = [(probe, expert) for probe in probes for expert in EXPERTS]
    if arm.has_adapter:
        ratios = [probe[f"lora_delta_budget.{expert}"]["max_ratio"] for probe, expert in pairs]
        row["largest delta ratio"] = f"{max(ratios):.3f}"
    if arm.kind == "adapter":
        logits = [probe[f"attn_logit_probe.{expert}"] for probe, expert in pairs]
        lowest, highest = min(one["min_std_ratio"] for one in logits), max(
            one["max_std_ratio"] for one in logits
        )
        row["logit ratios"] = f"{lowest:.2f} to {highest:.2f}"
    return row


def comparisons(results: Results, what: str) -> Iterable[dict[str, object]]:
    """Differences that arms and controls are there for; `what` as of `arm_row`."""
    arms = {name for name, _ in results}
    for name, other in COMPARED:
        if {name, other} <= arms:
            row: dict[str, object] = {"arm": name, "against": other}
            for cell in CELLS:
                found = mean_difference(
                    outcomes(results, name, cell, what), outcomes(results, other, cell, what)
                )
                row[cell] = found.shown(sign="+")
            found = mean_difference(
                outcomes(results, name, "neutral", "distance"),
                outcomes(results, other, "neutral", "distance"),
            )
            row["neutral distance"] = f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
            yield row


def seed_rows(results: Results) -> Iterable[dict[str, object]]:
    """Every training by itself."""
    for (name, seed), result in sorted(results.items()):
        row: dict[str, object] = {"arm": name, "seed": seed}
        alone: Results = {(name, seed): result}
        for cell in CELLS:
            for what in ("both", "nearest", "colour", "shape"):
                row[f"{cell} {what}"] = round(outcomes(alone, name, cell, what).mean(), 4)
        for cell in ("known", "neutral"):
            row[f"{cell} distance"] = round(outcomes(alone, name, cell, "distance").mean(), 4)
        yield row | {
            f"{probe} {key}": value
            for probe, numbers in result["probes"].items()
            for key, value in numbers.items()
            if isinstance(value, float)
        }


def controls(results: Results, refusal: Refusal) -> str:
    """What the controls say, in sentences."""
    state = "refused, as it must be" if refusal.is_refused else "NOT refused for that reason"
    lines = [f"- **Encoder training with the cache left on** was {state} (exit status {refusal.status})."]
    arms = {name for name, _ in results}
    adapters = [
        name for name in ("damaging_lora", "damaging_closed", "band", "self_attn", "shuffled") if name in arms
    ]
    if adapters:
        lines.append(
            "- **Adapters on the base's own encoder**, known words (what the adapter alone does to how they are drawn):"
        )
    for name in adapters:
        right = share(outcomes(results, name, "known_base_encoder"))
        away = outcomes(results, name, "known_base_encoder", "distance").mean()
        lines.append(f"  - {name}: {right.shown()} % right, distance {away:.3f} from the base's pictures")
    if {"self_attn", "damaging_lora"} <= set(adapters):
        found = mean_difference(
            outcomes(results, "self_attn", "known_base_encoder", "distance"),
            outcomes(results, "damaging_lora", "known_base_encoder", "distance"),
        )
        lines.append(
            f"  - self_attn - damaging_lora, paired: {found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}] in distance"
        )
    return "\n".join(lines)


def add_cost(report: Report, results: Results) -> None:
    """Processor time by what it was spent on."""
    for part in ("training", "drawing", "probes"):
        used = sum(result["cpu_seconds"][part] for result in results.values())
        report.metric(f"processor_minutes_{part}", round(used / 60, 1), "of one core, of all arms and seeds")


def draw_sheet(place: Place, plan: Plan) -> "Image":
    """Some prompts, drawn by some arms from the same noise."""
    from utils.data.grid_sheet import GridRow, draw_grid

    seed = plan.seeds[0]
    there = [arm.name for arm in plan.chosen()]
    shown = [name for name in _SHEET_ARMS if name in there]
    drawn = {name: _pictures(place.pictures(name, seed)) for name in shown}
    texts: dict[str, list[str]] = {
        cell: [prompt.text for prompt in prompts]
        for cell, prompts in cells_of(plan.amounts, MEASURE_SEED + seed).items()
    }
    texts["neutral"] = neutral_prompts(plan.amounts.neutral_prompts)
    rows = [
        GridRow(texts[cell][index], cell, tuple((drawn[name][cell][index][None], "") for name in shown))
        for cell, index in _SHEET_ROWS
    ]
    return draw_grid(shown, rows)


def _pictures(path: Path) -> Mapping[str, Any]:
    with np.load(path, allow_pickle=False) as packed:
        return dict(packed)
