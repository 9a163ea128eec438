"""`train.py --plan`: what a configuration would train, on how many GPUs of what size, how long, and on how much disk.

Everything is by arithmetic from the DiT's headers and what can be seen of the dataset within a second. No GPU, no tensor,
and (but for an encoder in a `.pth` that trains) no torch. The document's schema: docs/plan.md.
"""

from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

from models.wan.arch import VariantInfo, WanArch
from models.wan.component_shapes import text_encoder_sizes
from models.wan.costs import num_adapter_weights
from models.wan.layer_plan import first_trained_block
from models.wan.noise import noise_document, noise_warnings
from models.wan.plan_data import BucketUse, DataPlan, plan_data
from models.wan.plan_model import PlannedModel, data_missing, plan_model
from models.wan.planner import Planner, smallest_that_fits
from utils.config.experts import side_model, sides_of
from utils.config.guardrails import mode_of
from utils.config.schema import LoadedConfig, TrainConfig
from utils.data.manifest import default_cache_dir
from utils.errors import UserError
from utils.lora_targets import describe_targets
from utils.number_bytes import FLOAT32, bytes_of, trained_bytes
from utils.plan_disk import free_bytes, run_disk
from utils.plan_fit import GPU_SIZES_GB, Fit
from utils.stage_plan import StagePlan, size_text

FORMAT = 1
SECONDS_FOR_FILES = 1.0
# Mask and encoded first frame.
_CONDITION_CHANNELS = 20


def make_plan_document(
    loaded: LoadedConfig, num_gpus: int | None, tflops: float, data: DataPlan | None = None
) -> dict[str, Any]:
    """The plan as one JSON document.

    Args:
        loaded: the configuration; of its files only the DiT's have to be there.
        num_gpus: processes that will be started; None: as many as `pipeline_stages`.
        tflops: what a GPU is expected to reach, in 10^12 FLOPs per second.
        data: what is known of the dataset, where it has been looked at before.

    Raises:
        UserError: the DiT's headers are missing, or they and the configuration do not fit each other.
    """
    config = loaded.train
    gpus = check_gpus(config, num_gpus)
    model = plan_model(loaded)
    copies = gpus // config.pipeline_stages
    if data is None:
        data = plan_data(loaded.dataset, config, model.arch.variant, copies, SECONDS_FOR_FILES)
    planner = Planner(model, data, num_gpus)
    fits = tuple(planner.fit(config, size) for size in GPU_SIZES_GB)
    device_bytes = smallest_that_fits(fits)
    stages = planner.stages(config, device_bytes)
    trained = _num_trained(model, config)
    missing = [*model.missing, *data_missing(loaded)]
    disk = _disk_part(loaded, model, data, trained, copies)
    return {
        "format": FORMAT,
        "config": loaded.path,
        "overrides": list(loaded.overrides),
        "mode": mode_of(config),
        "model": _model_part(model, config),
        "training": _training_part(model, config, trained),
        "parallel": {
            "gpus": gpus,
            "gpus_given": num_gpus is not None,
            "stages": config.pipeline_stages,
            "copies": copies,
            "zero_stage": config.zero_stage,
            "micro_batch_size": config.micro_batch_size_per_gpu,
            "micro_batches_per_step_and_copy": config.gradient_accumulation_steps,
            "samples_per_step": _samples_per_step(config, copies),
        },
        "dataset": _data_part(data, loaded),
        "split_for_gpu_gb": device_bytes / 1e9,
        "stages": _stage_parts(planner, config, stages, data),
        "fit": [_fit_part(fit) for fit in fits],
        "compute": _compute_part(config, stages, data, copies, tflops),
        "disk": disk,
        "missing": [{"key": one.key, "reason": one.reason, "fix": one.fix} for one in missing],
        "notes": [
            *map(str, loaded.notes),
            *model.notes,
            *_noise_notes(config, model.arch.variant),
            *_data_notes(data),
            *_disk_notes(disk),
        ],
    }


def check_gpus(config: TrainConfig, num_gpus: int | None) -> int:
    """How many processes there will be.

    Raises:
        UserError: the stages do not divide them.
    """
    stages = config.pipeline_stages
    if num_gpus is not None and num_gpus % stages:
        raise UserError(
            f"--gpus {num_gpus}: pipeline_stages = {stages} does not divide it; give a multiple, or change pipeline_stages"
        )
    return num_gpus or stages


def _samples_per_step(config: TrainConfig, copies: int) -> int:
    return config.micro_batch_size_per_gpu * config.gradient_accumulation_steps * copies


def _model_part(model: PlannedModel, config: TrainConfig) -> dict[str, Any]:
    arch, variant = model.arch, model.arch.variant
    number = sum(prod(shape) for source in model.sources for shape in source.shapes.values())
    files = [file for source in model.sources for file in source.files]
    low, high = variant.sigma_range(config.model.expert, config.model.min_t, config.model.max_t)
    return {
        "variant": variant.name,
        "expert": config.model.expert,
        "boundary": variant.boundary,
        "noise_levels": [low, high],
        "noise": noise_document(config.model, variant),
        "layout": model.layout,
        "files": [str(file) for file in files],
        "parameters": number,
        "parameters_text": billions(number),
        "file_bytes": sum(Path(file).stat().st_size for file in files),
        "dtypes": sorted(set(model.source.dtypes.values())),
        "num_blocks": arch.num_layers,
        "width": arch.dim,
        "text_encoder_parameters": (
            None if model.text_shapes is None else sum(prod(shape) for shape in model.text_shapes.values())
        ),
    }


def _num_trained(model: PlannedModel, config: TrainConfig) -> int:
    if config.adapter is not None:
        return num_adapter_weights(model.source.shapes, model.targets, config.adapter.rank)
    if model.text_shapes is None:
        return 0
    first = first_trained_block(config, text_encoder_sizes(model.text_shapes).num_layers)

    def trains(name: str) -> bool:
        if name.startswith("blocks."):
            return int(name.split(".")[1]) >= first
        return config.model.train_token_embedding or not name.startswith("token_embedding.")

    return sum(prod(shape) for name, shape in model.text_shapes.items() if trains(name))


def _training_part(model: PlannedModel, config: TrainConfig, trained: int) -> dict[str, Any]:
    adapter = config.adapter
    part: dict[str, Any] = {
        "trainable_parameters": trained,
        "trainable_parameters_text": billions(trained),
        "optimizer": config.optimizer.type,
        "dtype": config.model.dtype,
        "transformer_dtype": config.model.transformer_dtype or config.model.dtype,
        "activation_checkpointing": config.activation_checkpointing,
        "blocks_to_swap": config.blocks_to_swap,
        "rank": None if adapter is None else adapter.rank,
        "targets": list(model.targets),
        "targets_text": describe_targets(model.targets),
        "text_blocks": None,
    }
    if model.text_shapes is not None:
        layers = text_encoder_sizes(model.text_shapes).num_layers
        part["text_blocks"] = [first_trained_block(config, layers), layers - 1]
    return part


def _data_part(data: DataPlan, loaded: LoadedConfig) -> dict[str, Any]:
    return {
        "path": loaded.dataset_path,
        "source": data.source,
        "samples": data.samples,
        "files": data.files,
        "skipped": dict(data.skipped),
        "files_not_examined": data.not_examined,
        "mean_video_tokens": data.mean.video_tokens,
        "mean_text_tokens": data.mean.text_tokens,
        "longest_text_tokens": data.largest_text,
        "buckets": [
            {
                "bucket": str(use.bucket),
                "frames": use.bucket.num_frames,
                "tokens": use.tokens,
                "samples": use.samples,
            }
            for use in data.buckets
        ],
        "micro_batches_per_epoch": data.micro_batches_per_epoch,
        "steps": data.steps,
    }


def _stage_parts(
    planner: Planner, config: TrainConfig, plan: StagePlan, data: DataPlan
) -> list[dict[str, Any]]:
    # Buckets of as many tokens need as many bytes.
    per_tokens: dict[int, list[dict[str, float]]] = {}
    for use in data.buckets:
        if use.tokens not in per_tokens:
            found = planner.bytes_at(config, plan.bounds, use)
            per_tokens[use.tokens] = [asdict(stage) | {"device": stage.device} for stage in found]
    parts = []
    for number, stage in enumerate(plan.stages):
        at = {str(use.bucket): per_tokens[use.tokens][number] for use in data.buckets}
        largest = at[str(data.buckets[0].bucket)]
        parts.append(
            {
                "stage": number,
                "first_layer": stage.first,
                "last_layer": stage.last,
                "layers_text": f"{stage.names[0]} .. {stage.names[1]}",
                "work_share": stage.share,
                "micro_batches_in_flight": stage.in_flight,
                "forward_flops": stage.forward,
                "backward_flops": stage.backward,
                "bytes": {
                    key: largest[key] for key in ("weights", "trainables", "gradients", "optimizer", "host")
                },
                "activations": {name: values["activations"] for name, values in at.items()},
                "transfers": {name: values["transfers"] for name, values in at.items()},
                "device": {name: values["device"] for name, values in at.items()},
            }
        )
    return parts


def _fit_part(fit: Fit) -> dict[str, Any]:
    return {
        "gpu_gb": fit.gpu_gb,
        "needs": fit.needs,
        "verdict": fit.verdict,
        "would_fit_with": [
            {
                "settings": dict(remedy.settings),
                "largest_bucket": remedy.largest_bucket,
                "needs": remedy.needs,
                "text": str(remedy),
            }
            for remedy in fit.remedies
        ],
    }


def _compute_part(
    config: TrainConfig, plan: StagePlan, data: DataPlan, copies: int, tflops: float
) -> dict[str, Any]:
    per_sample = sum(stage.forward + stage.backward for stage in plan.stages)
    samples = _samples_per_step(config, copies)
    seconds = plan.timing.span * config.micro_batch_size_per_gpu / (tflops * 1e12)
    return {
        "tflops_per_gpu": tflops,
        "flops_per_sample": per_sample,
        "flops_per_step": per_sample * samples,
        "step_seconds": seconds,
        "samples_per_second": samples / seconds if seconds else None,
        "waiting_share": plan.timing.bubble,
        "steps": data.steps if data.steps is not None else config.max_steps,
        "run_seconds": None if data.steps is None else data.steps * seconds,
    }


def _disk_part(
    loaded: LoadedConfig, model: PlannedModel, data: DataPlan, trained: int, copies: int
) -> dict[str, Any]:
    config = loaded.train
    export = float(trained * trained_bytes(config.optimizer))
    if model.text_shapes is not None:
        whole = sum(prod(shape) for shape in model.text_shapes.values())
        number = whole if config.model.save_text_encoder_full else trained
        export = float(number * bytes_of(config.model.dtype))
    per_epoch = None
    if data.micro_batches_per_epoch is not None:
        per_epoch = data.micro_batches_per_epoch / (config.gradient_accumulation_steps * copies)
    run = run_disk(config, trained, export, data.steps, per_epoch)
    cache_dir = None if loaded.dataset is None else default_cache_dir(loaded.dataset)
    latents = sum(_latent_bytes(model.arch, use) * use.samples for use in data.buckets) * data.unseen_factor
    text = 0.0
    if config.model.cache_text_embeddings:
        per_token = model.arch.text_dim * bytes_of(config.model.dtype)
        text = data.text_tokens * per_token * data.unseen_factor
    known = data.source == "dataset"
    return {
        "cache_dir": None if cache_dir is None else str(cache_dir),
        "cache_latents": latents if known else None,
        "cache_text": text if known else None,
        "cache_free": None if cache_dir is None else free_bytes(cache_dir),
        "latent_bytes_per_clip": {str(use.bucket): _latent_bytes(model.arch, use) for use in data.buckets},
        "output_dir": config.output_dir,
        "checkpoint": run.checkpoint,
        "checkpoints": run.checkpoints,
        "export": run.export,
        "exports": run.exports,
        "output_free": free_bytes(Path(config.output_dir)),
    }


def _latent_bytes(arch: WanArch, use: BucketUse) -> float:
    variant, bucket = arch.variant, use.bucket
    _, rows, columns = variant.vae_stride
    places = variant.latent_frames(bucket.num_frames) * (bucket.height // rows) * (bucket.width // columns)
    channels = variant.out_dim + (_CONDITION_CHANNELS if variant.model_type == "i2v" else 0)
    return float(places * channels * FLOAT32)


def _noise_notes(config: TrainConfig, variant: VariantInfo) -> list[str]:
    notes = []
    for expert in sides_of(config) or (None,):
        model = config.model if expert is None else side_model(config.model, expert)
        notes += noise_warnings(noise_document(model, variant), expert)
    return notes


def _data_notes(data: DataPlan) -> list[str]:
    notes = []
    if data.source == "published":
        notes.append("no dataset: planned at sizes that the model was made for")
    elif data.source == "buckets":
        notes.append("no sample of the dataset is there: planned at its buckets, the largest as the mean")
    elif data.not_examined:
        notes.append(
            f"{data.not_examined} files of the dataset were not examined for lack of time; counts are scaled up "
            "(scripts/diagnostics/dataset_inspect.py looks into all of them)"
        )
    return notes


def _disk_notes(disk: dict[str, Any]) -> list[str]:
    """Where a disk has no room for what is known to come. Cache and run may share one."""
    notes = []
    wanted = {
        disk["cache_dir"]: ((disk["cache_latents"] or 0.0) + (disk["cache_text"] or 0.0), disk["cache_free"]),
        disk["output_dir"]: (disk["checkpoints"] + (disk["exports"] or disk["export"]), disk["output_free"]),
    }
    for place, (needed, free) in wanted.items():
        if free is not None and needed > free:
            notes.append(
                f"the disk of {place} has {size_text(free)} free, and {size_text(needed)} are needed"
            )
    return notes


def billions(number: float) -> str:
    """A number of parameters for people: `14.29 B`, `26.2 M`, `640`."""
    for size, unit, digits in ((1e9, "B", 2), (1e6, "M", 1), (1e3, "k", 1)):
        if number >= size:
            return f"{number / size:.{digits}f} {unit}"
    return str(int(number))
