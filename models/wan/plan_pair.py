"""`--plan` of a pair: the plan of each expert's run, and what the two come to together. One runs after the other."""

from typing import Any

from models.wan.checkpoint import read_variant
from models.wan.plan import FORMAT, SECONDS_FOR_FILES, check_gpus, make_plan_document
from models.wan.plan_data import plan_data
from models.wan.preflight import check_pair
from utils.config.experts import EXPERTS, is_pair, loaded_side
from utils.config.guardrails import mode_of
from utils.config.load import ConfigError
from utils.config.schema import LoadedConfig

# From the one that asks least to the one that asks most.
_VERDICTS = ("fits", "tight", "too large")


def plan_document(loaded: LoadedConfig, num_gpus: int | None, tflops: float) -> dict[str, Any]:
    """The plan of a configuration, of one run or of a pair; see docs/plan.md.

    Raises:
        UserError: as `make_plan_document`, for either expert.
    """
    if not is_pair(loaded.train):
        return make_plan_document(loaded, num_gpus, tflops)
    config = loaded.train
    copies = check_gpus(config, num_gpus) // config.pipeline_stages
    data = plan_data(loaded.dataset, config, read_variant(config.model), copies, SECONDS_FOR_FILES)
    plans = {
        expert: make_plan_document(loaded_side(loaded, expert), num_gpus, tflops, data) for expert in EXPERTS
    }
    problems = check_pair(config)
    if problems:
        raise ConfigError(loaded.path, problems)
    return {
        "format": FORMAT,
        "config": loaded.path,
        "overrides": list(loaded.overrides),
        "mode": mode_of(config),
        "expert": config.model.expert,
        "experts": plans,
        "together": _together(list(plans.values())),
    }


def _together(plans: list[dict[str, Any]]) -> dict[str, Any]:
    def total(*path: str) -> float | None:
        values = []
        for plan in plans:
            value: Any = plan
            for key in path:
                value = value[key]
            values.append(value)
        return None if None in values else sum(values)

    fits = zip(*(plan["fit"] for plan in plans), strict=True)
    return {
        "trainable_parameters": total("training", "trainable_parameters"),
        "steps": total("compute", "steps"),
        "run_seconds": total("compute", "run_seconds"),
        "checkpoints": total("disk", "checkpoints"),
        "exports": total("disk", "exports"),
        "fit": [
            {
                "gpu_gb": sides[0]["gpu_gb"],
                "needs": max(side["needs"] for side in sides),
                "verdict": max((side["verdict"] for side in sides), key=_VERDICTS.index),
            }
            for sides in fits
        ],
    }
