"""What fits a GPU of some size, and the mildest change of the configuration that would make it fit.

Changes are tried in the order of what they cost: time first (recomputing, copies from host memory, smaller
micro-batches), then exactness (8-bit weights, 8-bit moments), then more GPUs, and last a smaller bucket. Within one kind
the least of it is named.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from utils.config.schema import ActivationCheckpointing, TrainConfig
from utils.partition import USABLE_SHARE

GPU_SIZES_GB = (24, 48, 80, 141)
# From what keeps most on the device to what keeps least.
_MODES: tuple[ActivationCheckpointing, ...] = (False, "selective", True, "offload")
_MOST_STAGES = 8

Settings = tuple[tuple[str, Any], ...]
# (configuration, bucket or None for the largest, bytes of the device) -> bytes of the fullest stage
Needs = Callable[[TrainConfig, str | None, float], float]


@dataclass(frozen=True)
class Room:
    """What the search may use.

    Attributes:
        num_blocks: of the model, whose weights can be swapped; all but one at most.
        num_layers: of the pipeline.
        num_gpus: where it is given; None: as many as the stages need.
        buckets: names, the largest first.
    """

    num_blocks: int
    num_layers: int
    num_gpus: int | None
    buckets: Sequence[str]


@dataclass(frozen=True)
class Remedy:
    """Settings to write, by dotted key, and the bytes of the fullest stage with them.

    `largest_bucket` is set where larger buckets have to be left out of the dataset.
    """

    settings: Settings
    largest_bucket: str | None
    needs: float

    def __str__(self) -> str:
        parts = [f"{key} = {_toml(value)}" for key, value in self.settings]
        if self.largest_bucket is not None:
            parts.append(f"no bucket larger than {self.largest_bucket}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Fit:
    """How a configuration does on GPUs of one size.

    Attributes:
        gpu_gb: the size, in 10^9 bytes.
        needs: bytes of the fullest stage at the largest bucket.
        verdict: "fits" up to 80 % of the device, "tight" up to all of it, else "too large".
        remedies: what would make it fit: the mildest one, and where that one wants more GPUs, one that does not. Empty
            where it fits, or where nothing helps.
    """

    gpu_gb: int
    needs: float
    verdict: str
    remedies: tuple[Remedy, ...]


def find_fit(config: TrainConfig, gpu_gb: int, room: Room, needs: Needs) -> Fit:
    """Judge one size, and search where it does not fit."""
    device = gpu_gb * 1e9
    plain = needs(config, None, device)
    if plain <= USABLE_SHARE * device:
        return Fit(gpu_gb, plain, "fits", ())
    verdict = "tight" if plain <= device else "too large"
    return Fit(gpu_gb, plain, verdict, _remedies(config, device, room, needs))


def with_settings(config: TrainConfig, settings: Settings) -> TrainConfig:
    """The configuration with these values, keys dotted."""
    for key, value in settings:
        table, _, name = key.rpartition(".")
        if table:
            config = replace(config, **{table: replace(getattr(config, table), **{name: value})})
        else:
            config = replace(config, **{name: value})
    return config


def _remedies(config: TrainConfig, device: float, room: Room, needs: Needs) -> tuple[Remedy, ...]:
    search = _Search(config, device, room, needs)
    first = search.without_more_gpus()
    if first is not None:
        return (first,)
    found = [search.with_more_stages(), search.with_smaller_buckets()]
    return tuple(remedy for remedy in found if remedy is not None)


class _Search:
    def __init__(self, config: TrainConfig, device: float, room: Room, needs: Needs) -> None:
        self._config, self._device, self._room, self._needs = config, device, room, needs
        self._limit = USABLE_SHARE * device
        self._bucket: str | None = None
        position = _MODES.index(config.activation_checkpointing)
        self._modes: list[Settings] = [
            (),
            *((("activation_checkpointing", mode),) for mode in _MODES[position + 1 :]),
        ]

    def without_more_gpus(self, more: Settings = ()) -> Remedy | None:
        """The first that fits, on top of `more`."""
        for base in self._bases(more):
            found = self._with_base((*more, *base))
            if found is not None:
                return found
        return None

    def with_more_stages(self) -> Remedy | None:
        """More stages alone, else with the rest; the fewest stages win."""
        for number in self._stage_numbers():
            found = self.without_more_gpus(self._staged(number))
            if found is not None:
                return found
        return None

    def with_smaller_buckets(self) -> Remedy | None:
        """The largest bucket that fits, whatever other settings it takes on the same GPUs."""
        for bucket in self._room.buckets[1:]:
            self._bucket = bucket
            found = self.without_more_gpus()
            if found is not None:
                return found
        return None

    def _bases(self, more: Settings) -> Iterator[Settings]:
        config = with_settings(self._config, more)
        copies = (self._room.num_gpus or config.pipeline_stages) // config.pipeline_stages
        shared: Settings = (("zero_stage", 1),) if copies > 1 and not config.zero_stage else ()
        in_8_bits: Settings = ()
        if config.model.transformer_dtype is None:
            in_8_bits = (("model.transformer_dtype", "float8"),)
        moments: Settings = (("optimizer.type", "adamw8bit"),) if config.optimizer.type == "adamw" else ()
        split: Settings = ()
        if (size := config.micro_batch_size_per_gpu) > 1:
            # The same samples per step in more pieces: the mean over them stays what it is.
            pieces = config.gradient_accumulation_steps * size
            split = (("micro_batch_size_per_gpu", 1), ("gradient_accumulation_steps", pieces))
        exact = shared + split
        ladder: list[Settings] = [
            (),
            shared,
            split,
            exact,
            in_8_bits,
            exact + in_8_bits,
            moments,
            exact + moments,
        ]
        ladder.append(exact + in_8_bits + moments)
        yield from dict.fromkeys(ladder)

    def _with_base(self, base: Settings) -> Remedy | None:
        # What saves most comes first, so that a hopeless case costs few plans.
        if all(self._try(settings) is None for settings in self._least(base)):
            return None
        for mode in self._modes:
            # Without a smaller bucket, nothing changed has been found not to fit.
            found = self._try(base + mode) if base + mode or self._bucket else None
            if found is not None:
                return found
        for mode in self._modes:
            found = self._fewest_swapped(base + mode)
            if found is not None:
                return found
        return None

    def _least(self, base: Settings) -> list[Settings]:
        """The settings on top of `base` that keep least on the device."""
        most = self._room.num_blocks - 1
        strongest = [base + mode for mode in self._modes[-2:]]
        return [
            *strongest,
            *((*settings, ("blocks_to_swap", most)) for settings in strongest if most > 0),
        ]

    def _fewest_swapped(self, settings: Settings) -> Remedy | None:
        low, high = self._config.blocks_to_swap + 1, self._room.num_blocks - 1
        if low > high:
            return None

        def attempt(number: int) -> Remedy | None:
            return self._try((*settings, ("blocks_to_swap", number)))

        best = attempt(high)
        if best is None:
            return None
        while low < high:
            middle = (low + high) // 2
            found = attempt(middle)
            if found is None:
                low = middle + 1
            else:
                best, high = found, middle
        return best

    def _try(self, settings: Settings) -> Remedy | None:
        needed = self._needs(with_settings(self._config, settings), self._bucket, self._device)
        return Remedy(settings, self._bucket, needed) if needed <= self._limit else None

    def _stage_numbers(self) -> list[int]:
        now, gpus = self._config.pipeline_stages, self._room.num_gpus
        if gpus is None:
            numbers = [now * 2**power for power in range(1, _MOST_STAGES)]
            numbers = [number for number in numbers if number <= max(_MOST_STAGES, 2 * now)]
        else:
            numbers = [number for number in range(now + 1, gpus + 1) if gpus % number == 0]
        return [number for number in numbers if number <= self._room.num_layers]

    def _staged(self, number: int) -> Settings:
        settings: Settings = (("pipeline_stages", number),)
        if self._config.partition_method == "manual":
            # Its list of boundaries is for another number of stages.
            settings += (("partition_method", "cost"), ("partition_split", ()))
        return settings


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return str(list(value))
    return f'"{value}"' if isinstance(value, str) else str(value)
