"""A control that has to fail: encoder training with cached text embeddings, which would train nothing."""

from dataclasses import dataclass
from pathlib import Path

from scripts.tiny_world.proof_arms import Plan, arms_of, write_configs
from scripts.tiny_world.proof_task import Place, call_train
from utils.errors import EXIT_USER_ERROR, TrainingStoppedError

_ON = "cache_text_embeddings = true"


@dataclass(frozen=True)
class Refusal:
    """What `train.py` answered: its exit status and the lines that it said."""

    status: int
    said: str

    @property
    def is_refused(self) -> bool:
        """Whether it was refused for the reason that is meant, and not for another."""
        return self.status == EXIT_USER_ERROR and "cache_text_embeddings" in self.said


def refused_cache(place: Place, plan: Plan) -> Refusal:
    """Ask `train.py` for encoder training with the cache left on."""
    arm = next(arm for arm in arms_of(plan.recipe) if arm.kind == "encoder")
    config = write_configs(arm, plan.seeds[0], place.work, place.checkpoint, None, plan.recipe.batch)
    wrong = config.with_name("cache_left_on.toml")
    text = config.read_text(encoding="utf-8")
    wrong.write_text(text.replace("cache_text_embeddings = false", _ON), encoding="utf-8")
    if _ON not in wrong.read_text(encoding="utf-8"):
        raise TrainingStoppedError(f"{wrong}: does not have the cache on")
    status, log = call_train(wrong, _log(place))
    return Refusal(status, log.read_text(encoding="utf-8").strip())


def _log(place: Place) -> Path:
    return place.work / "logs" / "cache_left_on.log"
