"""Trains cases of the tiny Wan for a few steps, in the pipeline or as a plain `nn.Sequential`, and writes what came out.

Run by tests/utils/test_pipeline.py, once per number of processes: many cases per launch, because starting is dear.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from models.wan.arch import load_arch
from models.wan.checkpoint import find_checkpoint, open_sharded, open_text_encoder
from models.wan.layers import Workload, dit_layers, text_layers
from models.wan.stages import TextWire
from utils.cli import end_process
from utils.config.schema import (
    ActivationCheckpointing,
    AdapterConfig,
    BudgetConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from utils.layers import LayerSpec, PreparedBatch, global_names, table_names
from utils.lora_targets import linear_modules, resolve_targets
from utils.loss_recorder import LossRecorder
from utils.optim import build_optimizer

NUM_STEPS = 3
EVALUATE_AFTER_STEP = 1
EVAL_STEP = 50  # names other micro-batches than those of training
MICRO_BATCHES = 4
# Frames, rows and columns of latents: images and clips of several shapes in one accumulation window.
SHAPES = ((1, 4, 4), (3, 4, 6), (2, 6, 4), (1, 6, 6))


@dataclass(frozen=True)
class Case:
    """One training to compare."""

    name: str
    model: dict[str, Any]
    adapter: dict[str, Any] | None = None
    clipping: float = 0.01
    recompute: ActivationCheckpointing = True
    swap: int = 0
    # The case whose plain training this one has to equal.
    like: str = ""
    micro_batches: int = MICRO_BATCHES


def encoder(name: str, **model: Any) -> Case:
    return Case(name, {"cache_text_embeddings": False, "train_text_encoder": True, **model})


def lora(name: str, dtype: str = "float32", transformer_dtype: str | None = None, **adapter: Any) -> Case:
    model = {"cache_text_embeddings": True, "train_text_encoder": False, "dtype": dtype}
    return Case(name, {**model, "transformer_dtype": transformer_dtype}, {"rank": 4, **adapter})


ENDS = str(Path(__file__).parents[1] / "assets" / "targets_at_both_ends.txt")
# {encoder whole, encoder's top, LoRA in all blocks, in the first, in those of the middle, in the last, at both ends} x
# {float32, bfloat16}, and what else there is to configure. Where a band ends, stages without trained parameters begin.
CASES = [
    encoder("encoder_all_fp32", dtype="float32"),
    encoder("encoder_all_bf16", dtype="bfloat16"),
    encoder("encoder_top1_fp32", dtype="float32", text_train_blocks=1),
    encoder("encoder_top1_bf16", dtype="bfloat16", text_train_blocks=1),
    encoder(
        "encoder_tokens_dropout_fp32", dtype="float32", train_token_embedding=True, text_encoder_dropout=0.1
    ),
    lora("lora_all_fp32"),
    lora("lora_all_bf16", "bfloat16"),
    lora("lora_first_fp32", train_blocks_range=(0, 0)),
    lora("lora_first_bf16", "bfloat16", train_blocks_range=(0, 0)),
    lora("lora_middle_fp32", train_blocks_range=(1, 2)),
    lora("lora_middle_bf16", "bfloat16", train_blocks_range=(1, 2)),
    lora("lora_last_fp32", train_blocks_range=(3, 3), dropout=0.1),
    # Two of the blocks visit the device in 8 bits.
    replace(lora("lora_float8_bf16", "bfloat16", transformer_dtype="float8"), swap=2),
    lora("lora_last_bf16", "bfloat16", train_blocks_range=(3, 3), dropout=0.1),
    lora("lora_ends_fp32", include_file=ENDS),
    lora("lora_ends_bf16", "bfloat16", include_file=ENDS),
    replace(lora("lora_unclipped_fp32"), clipping=0.0),
    replace(lora("lora_kept_bf16", "bfloat16"), recompute=False),
    lora("lora_broad_fp32", include=("cross_attn.*", "ffn.*"), train_blocks_range=(2, 3)),
]


def variants(case: Case) -> list[Case]:
    """The same training with everything that must not change a number: recomputation, swapped blocks, both."""
    ways: list[tuple[str, ActivationCheckpointing, int]] = [
        ("none", False, 0),
        ("selective", "selective", 0),
        ("offload", "offload", 0),
        ("swap_none", False, 3),
        ("swap_true", True, 3),
        ("swap_selective", "selective", 2),
        ("swap_offload", "offload", 1),
    ]
    return [
        replace(case, name=f"{case.name}_{way}", like=case.name, recompute=mode, swap=swap)
        for way, mode, swap in ways
    ]


VARIED = ("encoder_tokens_dropout_fp32", "encoder_top1_bf16", "lora_last_fp32", "lora_all_bf16")
CASES += [variant for case in list(CASES) if case.name in VARIED for variant in variants(case)]


def make_config(case: Case, tiny: Path, num_stages: int) -> TrainConfig:
    model = ModelConfig(type="wan", ckpt_path=str(tiny), freeze_transformer=True, **case.model)
    return TrainConfig(
        output_dir="unused",
        dataset="unused",
        pipeline_stages=num_stages,
        activation_checkpointing=case.recompute,
        blocks_to_swap=case.swap,
        gradient_clipping=case.clipping,
        model=model,
        adapter=None if case.adapter is None else AdapterConfig(**case.adapter),
        budget=None if case.adapter is None else BudgetConfig(),
        optimizer=OptimizerConfig(lr=1e-2, weight_decay=0.1),
    )


def make_specs(config: TrainConfig) -> list[LayerSpec]:
    paths = find_checkpoint(config.model)
    source = open_sharded(paths.transformer_dir)
    arch = load_arch(paths.config_json, source.shapes)
    workload = Workload(video_tokens=8.0, text_tokens=8.0)
    targets: list[str] = []
    if config.adapter is not None:
        targets = resolve_targets(linear_modules(source.shapes), config.adapter, config.budget)
    text = (
        []
        if config.adapter is not None
        else text_layers(config, open_text_encoder(paths.text_encoder), workload)
    )
    return text + dit_layers(config, source, arch, targets, {}, workload)


def make_batch(config: TrainConfig, step: int, index: int, num_micro_batches: int) -> PreparedBatch:
    """One micro-batch of 1 or 2 samples; its shape changes with the micro-batch."""
    random = torch.Generator().manual_seed(1000 * step + index)
    frames, rows, columns = SHAPES[(step + index) % len(SHAPES)]
    size = 1 + (step + index) % 2
    latents = torch.randn(size, 48, frames, rows, columns, generator=random)
    lens = torch.randint(2, 9, (size,), generator=random)
    length = int(lens.max())
    if config.model.train_text_encoder:
        text = torch.randint(1, 300, (size, length), generator=random)
    else:
        text = torch.randn(size, length, 64, generator=random).to(getattr(torch, config.model.dtype))
    text = text * (torch.arange(length) < lens[:, None]).view(size, length, *(1,) * (text.dim() - 2))
    sigma = torch.rand(size, generator=random)
    wire = TextWire(text, lens, latents, (1000 * sigma)[:, None], torch.tensor([step * 100 + index]))
    weight = torch.full((size,), 1.0 / size)
    labels = (torch.randn(latents.shape, generator=random), sigma, weight, torch.arange(size))
    if (step + index) % 3 == 1:  # some micro-batches have loss masks, others do not
        labels += (torch.rand(size, 1, rows, columns, generator=random),)
    return PreparedBatch(tuple(wire), labels)


def run_plain(case: Case, tiny: Path, out: Path) -> None:
    """The reference: the same layers in a plain nn.Sequential, plain autograd, plain AdamW."""
    config = make_config(case, tiny, 1)
    specs = make_specs(config)
    layers = [spec.build(torch.device("cpu")) for spec in specs]
    parameters: dict[str, nn.Parameter] = {}
    tables: set[str] = set()
    for spec, layer in zip(specs, layers, strict=True):
        parameters |= global_names(spec.name, layer)
        tables |= table_names(spec.name, layer)
    trainables = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    model = nn.Sequential(*layers).train()
    optimizer = build_optimizer(trainables, config.optimizer, tables)
    recorder = LossRecorder()
    rows = []
    for step in range(NUM_STEPS):
        recorder.clear()
        for index in range(case.micro_batches):
            batch = make_batch(config, step, index, case.micro_batches)
            loss = recorder(model(batch.inputs), batch.labels)
            (loss / case.micro_batches).backward()
        norms = [p.grad.float().norm().double() for _, p in sorted(trainables.items()) if p.grad is not None]
        norm = torch.stack(norms).square().sum().sqrt().item()
        if 0 < case.clipping < norm:
            for parameter in trainables.values():
                if parameter.grad is not None:
                    parameter.grad.mul_(case.clipping / (norm + 1e-6))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rows.append({"norm": norm, "totals": recorder.totals().tolist()})
        if step == EVALUATE_AFTER_STEP:
            rows[-1]["evaluated"] = evaluate_plain(case, config, model)
    write(out / case.name, rows, trainables, {})


def evaluate_plain(case: Case, config: TrainConfig, model: nn.Module) -> list[list[float]]:
    """Losses of each micro-batch, without gradients and with dropout off."""
    recorder = LossRecorder()
    model.eval()
    losses = []
    with torch.no_grad():
        for index in range(case.micro_batches):
            batch = make_batch(config, EVAL_STEP, index, case.micro_batches)
            recorder.clear()
            recorder(model(batch.inputs), batch.labels)
            losses.append(recorder.sample_losses())
    model.train()
    return losses


def evaluate_pipeline(
    case: Case, config: TrainConfig, pipeline: Any, recorder: LossRecorder
) -> list[list[float]]:
    """The same of this copy's share, in one pass; empty where no loss is computed."""
    indices = range(pipeline.dp_rank, case.micro_batches, pipeline.dp_size)
    batches = [make_batch(config, EVAL_STEP, index, case.micro_batches) for index in indices]
    recorder.clear()
    pipeline.forward_only(batches)
    losses = iter(recorder.sample_losses())
    return [[next(losses) for _ in batch.labels[1]] for batch in batches] if pipeline.is_last else []


def run_pipeline(case: Case, tiny: Path, out: Path, num_stages: int, processes: Any) -> None:
    from utils.partition import plan_stages
    from utils.pipeline import build_pipeline

    config = make_config(case, tiny, num_stages)
    specs = make_specs(config)
    recorder = LossRecorder()
    dp_size = processes.world_size // num_stages
    pipeline = build_pipeline(
        specs,
        plan_stages(specs, config).bounds,
        recorder,
        lambda trainables, tables, _: build_optimizer(trainables, config.optimizer, tables),
        micro_batch_size=1,
        gradient_accumulation_steps=case.micro_batches // dp_size,
        gradient_clipping=case.clipping,
        processes=processes,
    )
    buffers = pipeline.engine.pipe_buffers
    most_held = 0

    def count_held(*_: Any) -> None:
        nonlocal most_held
        held = sum(buffer is not None for key in ("inputs", "outputs") for buffer in buffers[key])
        most_held = max(most_held, held)

    pipeline.engine.module.register_forward_pre_hook(count_held)
    rows = []
    for step in range(NUM_STEPS):
        recorder.clear()

        def batches(step: int = step) -> Iterator[PreparedBatch]:
            for index in range(pipeline.dp_rank, case.micro_batches, dp_size):
                yield make_batch(config, step, index, case.micro_batches)

        pipeline.train_step(batches())
        rows.append({"norm": pipeline.gradient_norm, "totals": recorder.totals().tolist()})
        if step == EVALUATE_AFTER_STEP:
            rows[-1]["evaluated"] = evaluate_pipeline(case, config, pipeline, recorder)
    held = {
        "trained": len(pipeline.trainables),
        "frozen_gradients": sum(
            p.grad is not None for p in pipeline.parameters.values() if not p.requires_grad
        ),
        "most_buffers": most_held,
    }
    suffix = f"{case.name}-stage{pipeline.stage_id}-dp{pipeline.dp_rank}"
    write(
        out / suffix,
        rows if pipeline.is_last else [{"norm": row["norm"]} for row in rows],
        pipeline.trainables,
        held,
    )


def write(
    stem: Path, rows: list[dict[str, Any]], trainables: dict[str, nn.Parameter], held: dict[str, int]
) -> None:
    stem.with_suffix(".json").write_text(json.dumps({"rows": rows, "held": held}))
    save_file(
        {name: tensor.detach().clone() for name, tensor in trainables.items()},
        stem.with_suffix(".safetensors"),
    )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stages", type=int, default=0, help="0: plain nn.Sequential")
    parser.add_argument("--cases", nargs="+", required=True)
    parser.add_argument("--micro_batches", type=int, default=MICRO_BATCHES)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [case for case in CASES if case.name in arguments.cases]
    processes = None
    if arguments.stages:
        from utils.distributed import init_processes

        processes = init_processes(timeout_minutes=2)
    for case in chosen:
        case = replace(case, micro_batches=arguments.micro_batches)
        if processes is None:
            run_plain(case, arguments.tiny, arguments.out)
        else:
            run_pipeline(case, arguments.tiny, arguments.out, arguments.stages, processes)
    return 0


if __name__ == "__main__":
    end_process(main())
