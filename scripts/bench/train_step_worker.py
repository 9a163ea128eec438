"""Times real optimizer steps of one kind for scripts/bench/train_step.py, which starts it: one process, one pair, clean memory.

Both of a pair are built with random weights and step in turns: everything trained against a band of it. Prints one line of JSON.
"""

import argparse
import gc
import json
import resource
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from models.wan.arch import PUBLISHED, WanArch, expected_shapes
from models.wan.component_shapes import Umt5Sizes, expected_umt5_shapes
from models.wan.layer_memory import Workload
from models.wan.layers import dit_layers, text_layers
from models.wan.stages import TextWire
from scripts.bench.pipeline_worker import TEXT_TOKENS, Engine, Setup, grid_of
from scripts.bench.random_weights import RandomSource
from utils.bench import machine_facts, stopwatch
from utils.cli import end_process
from utils.config.schema import ActivationCheckpointing, BudgetConfig, TrainConfig
from utils.distributed import init_processes
from utils.layers import LayerSpec, PreparedBatch
from utils.lora_targets import linear_modules, resolve_targets
from utils.stage_plan import make_plan
from utils.timing import take_turns

WARM_UP = 2
# Rows, columns and inner width of the product that the machine's peak is measured with.
PEAK_SIZE = 8192
CHECKPOINTING: dict[str, ActivationCheckpointing] = {
    "full": True,
    "selective": "selective",
    "offload": "offload",
    "off": False,
}
_PUBLISHED = PUBLISHED["ti2v-5b"]
DITS: dict[str, WanArch] = {
    "small": replace(_PUBLISHED, dim=256, ffn_dim=1024, num_heads=2, num_layers=6, text_len=64, text_dim=64),
    "5b": _PUBLISHED,
}
ENCODERS = {
    "small": Umt5Sizes(512, 64, 4, 16, 128, 4, 32),
    "5b": Umt5Sizes(256384, 4096, 64, 64, 10240, 24, 32),
}


@dataclass(frozen=True)
class RandomSetup(Setup):
    """A `Setup` without files: random weights of a named size, in either mode."""

    size: str
    mode: str
    checkpointing: str
    float8: str
    compile: bool

    @property
    def arch(self) -> WanArch:
        """Sizes of the DiT."""
        return DITS[self.size]

    def trained(self, *, band: bool) -> TrainConfig:
        """Everything, or the top third: adapters on the DiT's blocks, or blocks of UMT5."""
        blocks = self.arch.num_layers
        config = self.config(blocks - blocks // 3 if band else 0, rank=32)
        recompute = CHECKPOINTING[self.checkpointing]
        config = replace(config, activation_checkpointing=recompute, compile=self.compile)
        model = replace(
            config.model,
            transformer_dtype=None if self.float8 == "no" else "float8",
            transformer_compute="float8" if self.float8 == "products" else None,
            dtype="bfloat16" if self.float8 == "products" else config.model.dtype,
        )
        if self.mode == "dit_lora":
            return replace(config, model=model)
        trained = ENCODERS[self.size].num_layers // 3 if band else 0
        model = replace(
            model, cache_text_embeddings=False, train_text_encoder=True, text_train_blocks=trained
        )
        return replace(config, model=model, adapter=None)

    def specs(self, config: TrainConfig) -> list[LayerSpec]:
        """All layers, not built."""
        device, workload = self.processes.device, Workload(float(self.tokens), float(TEXT_TOKENS))
        source = RandomSource(expected_shapes(self.arch), device)
        if config.adapter is None:
            text = RandomSource(expected_umt5_shapes(ENCODERS[self.size]), device)
            return [
                *text_layers(config, text, workload),
                *dit_layers(config, source, self.arch, (), {}, workload),
            ]
        targets = resolve_targets(linear_modules(source.shapes), config.adapter, BudgetConfig())
        return dit_layers(config, source, self.arch, targets, {}, workload)

    def batches(self, number: int, dtype: str) -> list[PreparedBatch]:
        """Micro-batches of one sample, on the device: states of the text, or its ids."""
        made = super().batches(number, dtype)
        if self.mode == "dit_lora":
            return made
        ids = torch.randint(2, ENCODERS[self.size].vocab_size, (1, TEXT_TOKENS), device=self.processes.device)
        changed = []
        for batch in made:
            assert batch.inputs is not None, "one process has the first stage"
            changed.append(replace(batch, inputs=tuple(TextWire(*batch.inputs)._replace(text=ids))))
        return changed


def flops(setup: RandomSetup, config: TrainConfig) -> dict[str, float]:
    """FLOPs of a step: as executed (recompute counted, skipped backward not), and the useful ones (recompute left out)."""

    def total(one: TrainConfig) -> float:
        return sum(make_plan(setup.specs(one), one, None).partition.stage_costs)

    return {"executed": total(config), "useful": total(replace(config, activation_checkpointing=False))}


def matrix_peak(device: torch.device) -> float | None:
    """FLOP/s of a large bfloat16 product on a GPU, the fastest of ten; None on a CPU."""
    if device.type != "cuda":
        return None
    left, right = (torch.randn(PEAK_SIZE, PEAK_SIZE, device=device, dtype=torch.bfloat16) for _ in range(2))
    found = take_turns({"product": lambda: left @ right}, 10, warmup=3, measure=stopwatch(device))
    return 2 * PEAK_SIZE**3 / found["product"].low


def peak_gb(setup: RandomSetup, config: TrainConfig) -> float | None:
    """The most memory that a run of this configuration alone holds on a GPU, weights and all; None on a CPU."""
    device = setup.processes.device
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    engine = Engine(setup, config)
    engine.step()
    torch.cuda.synchronize(device)
    held = (torch.cuda.max_memory_allocated(device) - before) / 1e9
    del engine
    return held


def measure(setup: RandomSetup, rounds: int) -> dict[str, Any]:
    """Both of the pair in turns, and each alone for the memory that it holds."""
    device = setup.processes.device
    configs = {"all": setup.trained(band=False), "band": setup.trained(band=True)}
    held = {name: peak_gb(setup, config) for name, config in configs.items()}
    engines = {name: Engine(setup, config) for name, config in configs.items()}
    taken = take_turns(
        {name: engine.step for name, engine in engines.items()},
        rounds,
        warmup=WARM_UP,
        measure=stopwatch(device),
    )
    return {
        "seconds": {name: timing.seconds for name, timing in taken.items()},
        "flops": {name: flops(setup, config) for name, config in configs.items()},
        "peak_gb": held,
        "process_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "matrix_peak": matrix_peak(device),
        "tokens": setup.tokens,
        "machine": machine_facts(device),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=tuple(DITS), required=True, help="of the models")
    parser.add_argument("--mode", choices=("dit_lora", "encoder_ft"), required=True, help="what trains")
    parser.add_argument("--grid", type=grid_of, required=True, help="tokens of a sample, e.g. 4x8x8")
    parser.add_argument(
        "--checkpointing", choices=tuple(CHECKPOINTING), required=True, help="activation_checkpointing"
    )
    parser.add_argument(
        "--float8", choices=("no", "weights", "products"), default="no", help="of the DiT, what is in 8 bits"
    )
    parser.add_argument("--compile", action="store_true", help="compile the DiT's blocks")
    parser.add_argument("--rounds", type=int, required=True, help="times each step is measured")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    processes = init_processes(timeout_minutes=10)
    setup = RandomSetup(
        root=Path(),  # there are no files
        grid=arguments.grid,
        processes=processes,
        size=arguments.size,
        mode=arguments.mode,
        checkpointing=arguments.checkpointing,
        float8=arguments.float8,
        compile=arguments.compile,
    )
    print(json.dumps(measure(setup, arguments.rounds)), flush=True)
    return 0


if __name__ == "__main__":
    end_process(main())
