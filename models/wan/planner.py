"""Stages and their bytes for a configuration, from shapes alone; and for others, where a setting is tried out."""

from models.wan.arch import PATCH_SIZE
from models.wan.component_shapes import text_encoder_sizes
from models.wan.layer_memory import Workload
from models.wan.layer_plan import plan_dit_layers, plan_text_layers
from models.wan.media import time_rows
from models.wan.plan_data import BucketUse, DataPlan
from models.wan.plan_model import PlannedModel
from utils.config.schema import TrainConfig
from utils.number_bytes import FLOAT32, bytes_of
from utils.partition import state_share
from utils.plan_fit import Fit, Room, find_fit
from utils.plan_memory import StageBytes, WireSize, stage_bytes
from utils.planned_layer import PlannedLayer
from utils.stage_plan import StagePlan, make_plan


class Planner:
    """Plans one model on one dataset. `num_gpus` None: as many as the configured stages need, one copy."""

    def __init__(self, model: PlannedModel, data: DataPlan, num_gpus: int | None) -> None:
        self._model, self._data, self._num_gpus = model, data, num_gpus
        self._by_name = {str(use.bucket): use for use in data.buckets}
        self._plans: dict[tuple[TrainConfig, float | None], StagePlan] = {}
        self._needs_of: dict[tuple[TrainConfig, str | None, float], float] = {}

    def copies(self, config: TrainConfig) -> int:
        """Data-parallel copies of the model."""
        return (self._num_gpus or config.pipeline_stages) // config.pipeline_stages

    def layers(self, config: TrainConfig, workload: Workload) -> list[PlannedLayer]:
        """All layers, first to last."""
        model, text = self._model, list[PlannedLayer]()
        if model.text_shapes is not None:
            text = plan_text_layers(config, model.text_shapes, workload)
        return text + plan_dit_layers(config, model.source.shapes, model.arch, model.targets, workload)

    def stages(self, config: TrainConfig, device_bytes: float | None) -> StagePlan:
        """The split that a run on such devices makes: by the mean sample."""
        key = (config, device_bytes)
        if key not in self._plans:
            layers = self.layers(config, self._data.mean)
            self._plans[key] = make_plan(layers, config, device_bytes, self.copies(config))
        return self._plans[key]

    def bytes_at(self, config: TrainConfig, bounds: tuple[int, ...], use: BucketUse) -> list[StageBytes]:
        """Every stage's bytes while micro-batches of this bucket run, with the longest caption."""
        variant, share = self._model.arch.variant, config.model.first_frame_prob
        workload = Workload(
            float(use.tokens), float(self._data.largest_text), float(time_rows(variant, use.bucket, share))
        )
        return stage_bytes(
            self.layers(config, workload),
            self._wires(config, workload),
            bounds,
            config.gradient_accumulation_steps,
            state_share(config, self.copies(config)),
        )

    def needs(self, config: TrainConfig, bucket: str | None, device_bytes: float) -> float:
        """Bytes of the fullest stage on a device of this size, at a bucket (None: the largest)."""
        key = (config, bucket, device_bytes)
        if key not in self._needs_of:
            use = self._data.buckets[0] if bucket is None else self._by_name[bucket]
            bounds = self.stages(config, device_bytes).bounds
            self._needs_of[key] = max(stage.device for stage in self.bytes_at(config, bounds, use))
        return self._needs_of[key]

    def fit(self, config: TrainConfig, gpu_gb: int) -> Fit:
        """Whether it fits a GPU of this size, and what would make it."""
        largest_per_tokens: dict[int, str] = {}
        for use in self._data.buckets:
            largest_per_tokens.setdefault(use.tokens, str(use.bucket))
        room = Room(
            num_blocks=self._model.arch.num_layers,
            num_layers=len(self.layers(config, self._data.mean)),
            num_gpus=self._num_gpus,
            buckets=tuple(largest_per_tokens.values()),
        )
        return find_fit(config, gpu_gb, room, self.needs)

    def _wires(self, config: TrainConfig, workload: Workload) -> list[WireSize]:
        """What is behind each layer: see `TextWire` and `DitWire` of `models/wan/stages.py`."""
        arch, samples = self._model.arch, config.micro_batch_size_per_gpu
        compute = bytes_of(config.model.dtype)
        video, trains_text = workload.video_tokens * samples, config.model.train_text_encoder
        patch = PATCH_SIZE[0] * PATCH_SIZE[1] * PATCH_SIZE[2]
        embedded = float(samples * arch.text_len * arch.dim * compute)
        hidden = float(video * arch.dim * bytes_of(config.model.residual_dtype))
        # The time embedding and its six rows of modulation, float32.
        modulation = float(samples * workload.time_rows * 7 * arch.dim * FLOAT32)
        dit = WireSize(hidden, embedded + modulation, hidden + (embedded if trains_text else 0.0))
        wires = [dit] * (arch.num_layers + 1)
        if self._model.text_shapes is None:
            return wires
        sizes = text_encoder_sizes(self._model.text_shapes)
        states = float(samples * workload.text_tokens * sizes.d_model * FLOAT32)
        text = WireSize(states, float(video * arch.in_dim * patch * FLOAT32), states)
        return [text] * (sizes.num_layers + 2) + wires


def smallest_that_fits(fits: tuple[Fit, ...]) -> float:
    """Bytes of the smallest device on which nothing has to be changed; of the largest where there is none."""
    fitting = [fit.gpu_gb for fit in fits if fit.verdict == "fits"]
    return (min(fitting) if fitting else max(fit.gpu_gb for fit in fits)) * 1e9
