"""The report of a pair of runs: `pair.json` and `report.md`, from what both runs have left on disk and nothing else.

So a pair that was cut off and continued has the report of one that was not. The fields: docs/outputs.md.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from models.wan.model import WanModel
from models.wan.noise import noise_document
from utils.adapter_runs import last_save
from utils.checkpoint import latest_checkpoint, read_state
from utils.config.dump import config_hash
from utils.config.schema import Expert, TrainConfig
from utils.data.sampler import BatchPlan
from utils.delta_budget import summarise
from utils.eval_records import EVAL_FILE
from utils.lora import load_initial_adapter
from utils.lora_targets import describe_targets
from utils.metrics import read_metrics, read_rows
from utils.pair_dir import FORMAT
from utils.probe_outcomes import read_outcomes
from utils.tensor_source import open_safetensors
from utils.trainer import total_steps

_SHOWN_METADATA = (
    "variant",
    "expert",
    "boundary",
    "base_hash",
    "encoder_hash",
    "config_hash",
    "rank",
    "num_targets",
    "step",
    "epoch",
)


@dataclass(frozen=True)
class HalfFacts:
    """One expert's run, for the report.

    Attributes:
        expert: which.
        variant, boundary: of the model.
        settings: what is trained, and what may differ between the two.
        noise: the law of its noise levels (`models.wan.noise`).
        status: `not begun`, `begun` (it can be continued) or `complete`.
        progress: steps and losses; empty before the first step.
        timesteps: lowest and highest that were visited; None before the first step.
        delta: how far the adapter moves the weights; None where that is not known yet.
        evaluations, probes: the last of each dataset, and all outcomes.
        metadata: of the adapter that was saved last.
        adapter: name of the finished adapter in the pair's directory.
    """

    expert: Expert
    variant: str
    boundary: float | None
    settings: dict[str, Any]
    noise: dict[str, Any]
    status: str
    progress: dict[str, Any]
    timesteps: dict[str, float] | None
    delta: dict[str, Any] | None
    evaluations: list[dict[str, Any]]
    probes: list[dict[str, Any]]
    metadata: dict[str, str] | None
    adapter: str | None = None

    @property
    def is_complete(self) -> bool:
        """Whether all steps are done."""
        return self.status == "complete"


def half_facts(
    expert: Expert, config: TrainConfig, model: WanModel, plan: BatchPlan, run: Path | None
) -> HalfFacts:
    """Read one half of a pair; `run` None: it does not exist yet.

    Raises:
        UserError: a file of the run is damaged.
    """
    variant = model.arch.variant
    rows = [] if run is None else read_metrics(run)
    status, steps, total = _status(config, plan, run, rows)
    saved = None if run is None else last_save(run)
    return HalfFacts(
        expert=expert,
        variant=variant.name,
        boundary=variant.boundary,
        settings=_settings(config, model),
        noise=noise_document(config.model, variant),
        status=status,
        progress=_progress(rows, steps, total),
        timesteps=_timesteps(rows),
        delta=_delta(config, model, rows, saved if status == "complete" else None),
        evaluations=[] if run is None else _last_evaluations(read_rows(run / EVAL_FILE)),
        probes=[] if run is None else read_outcomes(run),
        metadata=None if saved is None else _metadata(saved),
    )


def pair_document(halves: Sequence[HalfFacts]) -> dict[str, Any]:
    """`pair.json`."""
    experts = {}
    for half in halves:
        values = asdict(half)
        for shared in ("expert", "variant", "boundary"):
            del values[shared]
        experts[half.expert] = {"run": half.expert, **values}
    return {
        "format": FORMAT,
        "variant": halves[0].variant,
        "boundary": halves[0].boundary,
        "is_complete": all(half.is_complete for half in halves),
        "experts": experts,
    }


def _settings(config: TrainConfig, model: WanModel) -> dict[str, Any]:
    adapter = config.adapter
    assert adapter is not None, "a pair trains adapters"
    return {
        "config_hash": config_hash(config),
        "seed": config.seed,
        "rank": adapter.rank,
        "alpha": adapter.alpha,
        "num_targets": len(model.targets),
        "targets": describe_targets(model.targets),
        "init": adapter.init,
        "init_from_existing": adapter.init_from_existing,
    }


def _status(
    config: TrainConfig, plan: BatchPlan, run: Path | None, rows: Sequence[Mapping[str, Any]]
) -> tuple[str, int, int | None]:
    """How far it is, in a word; the steps that are saved; and how many there will be, where that is known."""
    checkpoint = None if run is None else latest_checkpoint(run)
    if checkpoint is None:
        return ("begun" if rows else "not begun"), 0, config.max_steps
    state = read_state(checkpoint)
    total = total_steps(config, plan, state)
    return ("complete" if state.step >= total else "begun"), state.step, total


def _progress(rows: Sequence[Mapping[str, Any]], saved_step: int, total: int | None) -> dict[str, Any]:
    if not rows:
        return {}
    losses = [row["loss"] for row in rows]
    tenth = max(1, len(losses) // 10)
    return {
        "steps": rows[-1]["step"],
        "saved_step": saved_step,
        "total_steps": total,
        "samples_seen": rows[-1]["samples_seen"],
        "seconds": round(sum(row["step_seconds"] for row in rows), 1),
        "loss_first_step": losses[0],
        "loss_last_step": losses[-1],
        "loss_first_tenth": sum(losses[:tenth]) / tenth,
        "loss_last_tenth": sum(losses[-tenth:]) / tenth,
    }


def _timesteps(rows: Iterable[Mapping[str, Any]]) -> dict[str, float] | None:
    ranges = [row["timesteps"] for row in rows if "timesteps" in row]
    if not ranges:
        return None
    return {"min": min(one["min"] for one in ranges), "max": max(one["max"] for one in ranges)}


def _delta(
    config: TrainConfig, model: WanModel, rows: Sequence[Mapping[str, Any]], finished: Path | None
) -> dict[str, Any] | None:
    """Of the finished file, as `lora_delta_budget` measures it; before that what `[budget]` measured last."""
    if finished is not None:
        assert config.adapter is not None, "a pair trains adapters"
        parameters = load_initial_adapter(finished, model.targets, config.adapter)
        overall = summarise(model.deltas(parameters)).overall
        return {
            "max_ratio": _finite(overall.max_ratio),
            "mean_ratio": _finite(overall.mean_ratio),
            "worst_module": overall.worst_module,
        }
    measured = [row for row in rows if row.get("max_delta_ratio") is not None]
    if not measured:
        return None
    row = measured[-1]
    return {"max_ratio": row["max_delta_ratio"], "mean_ratio": row["mean_delta_ratio"], "worst_module": None}


def _finite(number: float) -> float | None:
    """A base weight that is all zeros makes a ratio infinite, which JSON cannot say."""
    return number if math.isfinite(number) else None


def _last_evaluations(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({row["dataset"]: row for row in rows}.values())


def _metadata(adapter: Path) -> dict[str, str]:
    found = open_safetensors([adapter]).metadata()
    return {key: found[key] for key in _SHOWN_METADATA if key in found}


def pair_text(document: Mapping[str, Any]) -> str:
    """`report.md` from `pair.json`."""
    experts: Mapping[str, Mapping[str, Any]] = document["experts"]
    states = ", ".join(f"{name} {one['status']}" for name, one in experts.items())
    rows = [
        ("status", [one["status"] for one in experts.values()]),
        *((label, [read(one) for one in experts.values()]) for label, read in _ROWS),
        *_evaluation_rows(experts),
    ]
    lines = [
        f"# Adapters for both experts of {document['variant']}",
        "",
        f"{'Complete' if document['is_complete'] else 'Not complete'}: {states}. The experts part at the noise level "
        f"{document['boundary']:g} (timestep {document['boundary'] * 1000:g}), which belongs to high_noise. Both runs had "
        "the same data in the same order, the same seed and so the same noise.",
        "",
        f"| | {' | '.join(experts)} |",
        "| --- |" + " --- |" * len(experts),
        *(f"| {label} | {' | '.join(cells)} |" for label, cells in rows),
        "",
    ]
    outcomes = [
        f"- {name}: {row['tool']} on epoch{row['epoch']}: {row['result']}: {row['explanation']}"
        for name, one in experts.items()
        for row in one["probes"]
    ]
    if outcomes:
        lines += ["## Probes", "", *outcomes, ""]
    lines += [
        "## How to read it",
        "",
        "- **Losses** of the two are not comparable: each expert answers at other noise levels, where the task is harder or "
        "easier. Compare each with its own beginning.",
        "- **timesteps visited** are what the model was told in training, lowest and highest; they lie on the expert's side "
        "or something is wrong. **share of the law** is how much of the chosen law lies on that side: where it is small, "
        "draws crowd at one end.",
        "- **delta ratios** say how far the adapter moves the weights, as `lora_delta_budget` measures it.",
        "- Load each adapter into its own expert. In the files, only the metadata tell them apart.",
        "",
        "All numbers, the metadata of the adapters included: `pair.json`. Every step: `metrics.jsonl` of each run.",
        "",
    ]
    return "\n".join(lines)


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _pair(one: float | None, other: float | None, digits: int = 4) -> str:
    return "-" if one is None else f"{_number(one, digits)} -> {_number(other, digits)}"


def _steps(one: Mapping[str, Any]) -> str:
    progress = one["progress"]
    if not progress:
        return "0"
    total = f" of {progress['total_steps']}" if progress["total_steps"] is not None else ""
    return f"{progress['steps']}{total}; {progress['samples_seen']} samples in {progress['seconds']:g} s"


def _visited(one: Mapping[str, Any]) -> str:
    found = one["timesteps"]
    return "-" if found is None else f"{found['min']:g} to {found['max']:g}"


def _tenths(one: Mapping[str, Any]) -> str:
    shares = one["noise"]["shares_by_tenth"]
    return ", ".join(f"{name}: {share:.1%}" for name, share in shares.items() if share >= 0.0005)


def _deltas(one: Mapping[str, Any]) -> str:
    delta = one["delta"]
    if delta is None:
        return "-"
    worst = f" ({delta['worst_module']})" if delta["worst_module"] else ""
    return f"at most {_number(delta['max_ratio'])}{worst}, mean {_number(delta['mean_ratio'])}"


_ROWS = (
    ("run directory", lambda one: f"`{one['run']}/`"),
    ("adapter", lambda one: f"`{one['adapter']}`" if one["adapter"] else "-"),
    ("targets", lambda one: f"{one['settings']['num_targets']}: {'; '.join(one['settings']['targets'])}"),
    ("rank, alpha", lambda one: f"{one['settings']['rank']}, {one['settings']['alpha'] or 'as rank'}"),
    ("steps", _steps),
    (
        "loss, first -> last step",
        lambda one: _pair(one["progress"].get("loss_first_step"), one["progress"].get("loss_last_step")),
    ),
    (
        "loss, mean of the first -> last tenth",
        lambda one: _pair(one["progress"].get("loss_first_tenth"), one["progress"].get("loss_last_tenth")),
    ),
    (
        "timesteps, its side",
        lambda one: f"{one['noise']['range'][0] * 1000:g} to {one['noise']['range'][1] * 1000:g}",
    ),
    ("timesteps visited", _visited),
    ("share of the law on its side", lambda one: f"{one['noise']['share_of_range']:.1%}"),
    ("visits by noise level", _tenths),
    ("delta ratios", _deltas),
)


def _evaluation_rows(experts: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    names = dict.fromkeys(row["dataset"] for one in experts.values() for row in one["evaluations"])
    rows = []
    for name in names:
        cells = []
        for one in experts.values():
            row = next((row for row in one["evaluations"] if row["dataset"] == name), None)
            cells.append(
                "-"
                if row is None
                else f"loss {_number(row['loss'])} at step {row['step']}, change {_number(row.get('change'))}"
            )
        rows.append((f"evaluation {name}", cells))
    return rows
