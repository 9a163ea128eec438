"""The plan of a run's stages: layers, share of the work and memory of each, and how long stages wait for each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from utils.config.schema import TrainConfig
from utils.memory import StageMemory, stage_memory
from utils.partition import USABLE_SHARE, Partition, plan_stages, state_share
from utils.planned_layer import LayerFacts
from utils.schedule import StepTiming, in_flight, simulate

_HEAD = ("stage", "layers", "work", "weights", "grad+optim", "in flight", "activations", "device", "host")


@dataclass(frozen=True)
class PlannedStage:
    """One stage.

    Attributes:
        first, last: indices of its layers.
        names: of its first and last layer.
        forward, backward: FLOPs per sample.
        share: of the work of all stages.
        in_flight: micro-batches between forward and backward, at most.
        memory: bytes.
    """

    first: int
    last: int
    names: tuple[str, str]
    forward: float
    backward: float
    share: float
    in_flight: int
    memory: StageMemory


@dataclass(frozen=True)
class StagePlan:
    """All stages of one copy of the model, and the time of a step in FLOPs of the mean sample, transfers free."""

    partition: Partition
    stages: tuple[PlannedStage, ...]
    timing: StepTiming
    num_micro_batches: int

    @property
    def bounds(self) -> tuple[int, ...]:
        """Stage i owns layers bounds[i] .. bounds[i+1] - 1."""
        return self.partition.bounds


def make_plan(
    specs: Sequence[LayerFacts],
    config: TrainConfig,
    device_bytes: float | None,
    copies: int = 1,
) -> StagePlan:
    """Split the layers and work the plan out; nothing is built. The arguments are those of `plan_stages`.

    Raises:
        UserError: as `plan_stages`.
    """
    partition = plan_stages(specs, config, device_bytes, copies)
    micro_batches, num_stages = config.gradient_accumulation_steps, config.pipeline_stages
    total, share = sum(partition.stage_costs), state_share(config, copies)
    stages = []
    for stage, (start, end) in enumerate(pairwise(partition.bounds)):
        costs = partition.layer_costs[start:end]
        forward, backward = sum(cost.forward for cost in costs), sum(cost.backward for cost in costs)
        flying = in_flight(stage, num_stages, micro_batches) if backward else 0
        stages.append(
            PlannedStage(
                first=start,
                last=end - 1,
                names=(specs[start].name or "input", specs[end - 1].name or "input"),
                forward=forward,
                backward=backward,
                share=(forward + backward) / total if total else 0.0,
                in_flight=flying,
                memory=stage_memory((spec.memory for spec in specs[start:end]), flying, share),
            )
        )
    timing = simulate([s.forward for s in stages], [s.backward for s in stages], micro_batches)
    return StagePlan(partition, tuple(stages), timing, micro_batches)


def describe_plan(plan: StagePlan) -> list[str]:
    """The plan as a small table, for people."""
    rows = [_HEAD, *(_row(number, stage) for number, stage in enumerate(plan.stages))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    lines = [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    if len(plan.stages) > 1:
        lines.append(
            f"  stages wait for each other in {plan.timing.bubble:.0%} of the time with {plan.num_micro_batches} "
            f"micro-batch(es) per step: {plan.timing.speedup:.2f} times as fast as one stage, transfers not counted"
        )
    return lines


def plan_warnings(plan: StagePlan, device_bytes: float | None) -> list[str]:
    """One warning where a stage will not fit its GPU, or only just."""
    if device_bytes is None:
        return []
    number = max(range(len(plan.stages)), key=lambda index: plan.stages[index].memory.device)
    memory = plan.stages[number].memory
    if memory.device <= USABLE_SHARE * device_bytes:
        return []
    remedies = (
        "use more pipeline_stages, train fewer blocks, or choose optimizer.type = 'adamw8bit', "
        "activation_checkpointing = 'offload', blocks_to_swap or model.transformer_dtype = 'float8'"
    )
    if memory.resident > device_bytes:
        return [
            f"warning: stage {number} needs {size_text(memory.resident)} before any activation, and its GPU has "
            f"{size_text(device_bytes)}; {remedies}"
        ]
    fits = "more than" if memory.device > device_bytes else f"more than {USABLE_SHARE:.0%} of"
    return [
        f"warning: stage {number} needs about {size_text(memory.device)}, {fits} the {size_text(device_bytes)} of its GPU, "
        f"and kernels need some for themselves; {remedies}"
    ]


def size_text(num_bytes: float) -> str:
    """Bytes for people: 0, 3.2 MB, 12.5 GB (powers of ten)."""
    if not num_bytes:
        return "0"
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def _row(number: int, stage: PlannedStage) -> tuple[str, ...]:
    memory = stage.memory
    sizes = (memory.weights, memory.optimizer), (memory.activations, memory.device, memory.host)
    return (
        str(number),
        f"{stage.first}-{stage.last} ({stage.names[0]} .. {stage.names[1]})",
        f"{stage.share:.0%}",
        *map(size_text, sizes[0]),
        str(stage.in_flight),
        *map(size_text, sizes[1]),
    )
