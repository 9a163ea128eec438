"""Builds one stage's layers of a checkpoint and prints how much memory that took: at the peak, and what stays.

Run by tests/models/wan/test_loading_memory.py in a process of its own, so that the peak is that of loading alone.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from models.wan.arch import load_arch
from models.wan.checkpoint import open_text_encoder, open_transformer
from models.wan.layer_memory import Workload
from models.wan.layers import dit_layers, text_layers
from utils.config.schema import AdapterConfig, ModelConfig, OptimizerConfig, TrainConfig
from utils.layers import LayerSpec


def memory_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise AssertionError(field)


def build(specs: list[LayerSpec]) -> list[Any]:
    return [spec.build(torch.device("cpu")) for spec in specs]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--mode", choices=("dit_lora", "encoder_ft"), required=True)
    parser.add_argument("--transformer_dtype")
    parser.add_argument("--blocks_to_swap", type=int, default=0)
    parser.add_argument("--first", type=int, required=True)
    parser.add_argument("--last", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    trains_text = arguments.mode == "encoder_ft"
    config = TrainConfig(
        output_dir="unused",
        dataset="unused",
        blocks_to_swap=arguments.blocks_to_swap,
        model=ModelConfig(
            type="wan",
            ckpt_path=str(arguments.root),
            transformer_dtype=arguments.transformer_dtype,
            cache_text_embeddings=not trains_text,
            train_text_encoder=trains_text,
            freeze_transformer=True,
        ),
        adapter=None if trains_text else AdapterConfig(),
        optimizer=OptimizerConfig(lr=1e-4),
    )
    workload = Workload(8.0, 8.0)
    if trains_text:
        specs = text_layers(config, open_text_encoder(arguments.root / "umt5.pth"), workload)
    else:
        source = open_transformer(arguments.root)
        arch = load_arch(arguments.root / "config.json", source.shapes)
        specs = dit_layers(config, source, arch, [], {}, workload)
    build(specs[-1:])  # libraries that are imported inside functions
    before = memory_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    layers = build(specs[arguments.first : arguments.last + 1])
    peak, after = memory_kib("VmHWM"), memory_kib("VmRSS")
    owned = sum(
        tensor.untyped_storage().nbytes()
        for layer in layers
        for tensor in (*layer.parameters(), *layer.buffers())
    )
    print(json.dumps({"peak": (peak - before) * 1024, "kept": (after - before) * 1024, "owned": owned}))


if __name__ == "__main__":
    main()
