"""What the proof was to show, fixed beforehand, and whether it did."""

from collections.abc import Sequence
from dataclasses import dataclass

from scripts.tiny_world.proof_data import LENGTHS
from scripts.tiny_world.proof_statistics import (
    FEWEST_TEXTS,
    Estimate,
    Outcomes,
    Results,
    mean_difference,
    outcomes,
    recovered,
    share,
)
from scripts.tiny_world.world import COLOURS, SHAPES

CHANCE = 1 / (len(COLOURS) * len(SHAPES))
KNOWN, NEW, HELD_OUT, KNOWN_LOSS, RECOVERED = 0.95, 0.90, 0.85, 0.02, 0.5
# Of what known words lost, by the closed form at rank 16; and what new words may lose to it.
SOLVED, NEW_LOSS = 0.4, 0.02
# A convention: two pictures of different noise are about 1 apart.
NEUTRAL_CHANGE = 0.02


@dataclass(frozen=True)
class Finding:
    """A target and what was found.

    Attributes:
        name, target: what it is about, and the limit, for people.
        found: in the unit of `limit`.
        limit: what it is held against.
        at_least: whether it must not be below the limit (else: not above it).
        in_points: whether a person wants to see it in percent or points.
        why: where it was missed, what the numbers say about it.
        by_low: whether the lower end of the interval is held against the limit, and not the value.
    """

    name: str
    target: str
    found: Estimate
    limit: float
    at_least: bool = True
    in_points: bool = True
    why: str = ""
    by_low: bool = False

    @property
    def is_met(self) -> bool:
        """By the value itself, or what stands for it."""
        value = self.found.low if self.by_low else self.found.value
        return value >= self.limit if self.at_least else value <= self.limit

    @property
    def is_settled(self) -> bool:
        """Whether the whole interval lies on the side of the value, over at least `FEWEST_TEXTS` texts."""
        return self.found.num_texts >= FEWEST_TEXTS and not self.found.low < self.limit < self.found.high

    def _settled(self) -> str:
        if not self.found.num_texts:
            return "no interval"
        if self.found.num_texts < FEWEST_TEXTS:
            return f"no: fewer than {FEWEST_TEXTS} texts"
        return "yes" if self.is_settled else "no"

    def row(self) -> dict[str, object]:
        """For a table."""
        return {
            "target": self.name,
            "wanted": self.target,
            "found": (
                self.found.shown(100.0 if self.in_points else 1.0) if self.in_points else _plain(self.found)
            ),
            "by seed": ", ".join(_number(value, self.in_points) for value in self.found.by_seed),
            "n texts": self.found.num_texts or "",
            "n pictures": self.found.num_pictures or "",
            "met": "yes" if self.is_met else "no",
            "settled at 95 %": self._settled(),
            "why": self.why,
        }


def judge_targets(results: Results, what: str = "both") -> list[Finding]:
    """Every target whose arms were run; `what` has to be right of a picture: `both` or, less strict, `nearest`."""
    arms = {name for name, _ in results}
    found = _of_base(results, what)
    if "gentle" in arms:
        found += _of_gentle(results, what)
    if "damaging" in arms:
        base, damaged = (outcomes(results, arm, "known", what) for arm in ("base", "damaging"))
        loss = mean_difference(base, damaged)
        found.append(
            Finding("damage: known words lost at the damaging rate", "at least 2 points", loss, KNOWN_LOSS)
        )
    if {"damaging", "damaging_lora"} <= arms:
        found += _of_translator(results, what)
    if {"damaging", "damaging_closed_16"} <= arms:
        found += _of_closed_form(results, what)
    return found


def _of_base(results: Results, what: str) -> list[Finding]:
    known = share(outcomes(results, "base", "known", what))
    new = share(outcomes(results, "base", LENGTHS, what))
    return [
        Finding(
            "base: known words",
            "at least 95 %",
            known,
            KNOWN,
            why=_reason(results, "base", "known", known, KNOWN),
        ),
        Finding(
            "base: new words",
            f"chance, {CHANCE:.1%}, not below the interval",
            new,
            CHANCE,
            False,
            by_low=True,
        ),
    ]


def _of_gentle(results: Results, what: str) -> list[Finding]:
    found = []
    for cell, limit in (*((length, NEW) for length in LENGTHS), ("held_out", HELD_OUT)):
        value = share(outcomes(results, "gentle", cell, what))
        name = f"gentle: {'held-out combinations' if cell == 'held_out' else f'new words, {cell} prompts'}"
        why = _reason(results, "gentle", cell, value, limit)
        found.append(Finding(name, f"at least {limit:.0%}", value, limit, why=why))
    loss = mean_difference(
        outcomes(results, "base", "known", what), outcomes(results, "gentle", "known", what)
    )
    why = "" if loss.value <= KNOWN_LOSS else _mistakes(results, "gentle", "known")
    found.append(Finding("gentle: known words lost", "at most 2 points", loss, KNOWN_LOSS, False, why=why))
    drifts, cap = neutral_drifts(results, "gentle")
    worst = Estimate(max(drifts), min(drifts), max(drifts), 0, 0, tuple(drifts))
    found.append(
        Finding("gentle: neutral drift, worst seed", f"at most {cap:g}", worst, cap, False, in_points=False)
    )
    return found


def _of_translator(results: Results, what: str) -> list[Finding]:
    base, damaged, mended = (
        outcomes(results, arm, "known", what) for arm in ("base", "damaging", "damaging_lora")
    )
    half = recovered(base, damaged, mended, RECOVERED)
    away = mean_difference(
        outcomes(results, "damaging_lora", "neutral", "distance"),
        outcomes(results, "damaging", "neutral", "distance"),
    )
    return [
        Finding(
            "translator: points of known words beyond half of what was lost",
            "at least 0",
            half,
            0.0,
            why=_told(base, damaged, mended),
        ),
        Finding(
            "translator: neutral pictures go further from the base's, relative distance of latents",
            f"at most {NEUTRAL_CHANGE:g}",
            away,
            NEUTRAL_CHANGE,
            at_least=False,
            in_points=False,
        ),
    ]


def _of_closed_form(results: Results, what: str) -> list[Finding]:
    solved = "damaging_closed_16"
    base, damaged, mended = (outcomes(results, arm, "known", what) for arm in ("base", "damaging", solved))
    back = recovered(base, damaged, mended, SOLVED)
    lost = mean_difference(
        outcomes(results, "damaging", LENGTHS, what), outcomes(results, solved, LENGTHS, what)
    )
    return [
        Finding(
            "closed form: points of known words beyond 40 % of what was lost",
            "at least 0",
            back,
            0.0,
            why=_told(base, damaged, mended),
        ),
        Finding("closed form: new words lost to it", "at most 2 points", lost, NEW_LOSS, False),
    ]


def _told(base: Outcomes, damaged: Outcomes, mended: Outcomes) -> str:
    """How much of what was lost came back."""
    lost, back = base.mean() - damaged.mean(), mended.mean() - damaged.mean()
    return f"{100 * back:+.1f} of {100 * lost:.1f} lost points" + (
        f" ({back / lost:.0%})" if lost > 0 else ""
    )


def neutral_drifts(results: Results, arm: str) -> tuple[list[float], float]:
    """Drift of neutral prompts by `te_eval`, for each seed, and the probe's cap."""
    probes = [result["probes"]["te_eval"] for (name, _), result in sorted(results.items()) if name == arm]
    return [probe["neutral_drift"] for probe in probes], probes[0]["caps"]["max_neutral_drift"]


def _reason(results: Results, arm: str, cell: str, value: Estimate, limit: float) -> str:
    return "" if value.value >= limit else _mistakes(results, arm, cell)


def _mistakes(results: Results, arm: str, cell: str) -> str:
    """What is wrong, which is what the numbers alone say about a reason."""
    wrong = {
        said: 1 - outcomes(results, arm, cell, what).mean()
        for what, said in (
            ("colour", "the colour"),
            ("shape", "the shape, read strictly,"),
            ("nearest", "colour or best fitting shape"),
        )
    }
    return "; ".join(f"{said} wrong in {value:.1%}" for said, value in wrong.items())


def _plain(found: Estimate) -> str:
    return f"{found.value:.4f} [{found.low:.4f}, {found.high:.4f}]"


def _number(value: float, in_points: bool) -> str:
    return f"{100 * value:.1f}" if in_points else f"{value:.4f}"


def all_met(findings: Sequence[Finding]) -> bool:
    """Whether every target is met."""
    return all(finding.is_met for finding in findings)
