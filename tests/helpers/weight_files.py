"""Weight files with the published names and shapes and no data, in every layout."""

import csv
import gzip
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from models.wan.names import dit_to_diffusers
from utils.sparse_weights import write_sparse_safetensors

KEYS = Path(__file__).resolve().parents[1] / "assets" / "keys"
DITS = {"ti2v-5b": "ti2v5b_keys", "t2v-a14b": "a14b_t2v_keys", "i2v-a14b": "a14b_i2v_keys"}
NUM_SHARDS = {"ti2v-5b": 3, "t2v-a14b": 6, "i2v-a14b": 6}
Shapes = dict[str, tuple[int, ...]]


def published(table: str, column: str = "key") -> Shapes:
    """Names and shapes of a published key list."""
    with gzip.open(KEYS / f"{table}.csv.gz", "rt", encoding="utf-8") as file:
        return {row[column]: tuple(map(int, row["shape"].split("x"))) for row in csv.DictReader(file)}


def dit(variant: str) -> Shapes:
    """A published DiT."""
    return published(DITS[variant])


def write_sharded(directory: Path, shapes: Shapes, num_shards: int, dtype: str = "F32") -> Path:
    """Shards with an index."""
    directory.mkdir(parents=True)
    names, weight_map = list(shapes), {}
    share = -(-len(names) // num_shards)
    for number in range(num_shards):
        shard = f"diffusion_pytorch_model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {name: shapes[name] for name in names[number * share : (number + 1) * share]}
        write_sparse_safetensors(directory / shard, part, dtype)
        weight_map |= dict.fromkeys(part, shard)
    index = directory / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2))
    return directory


def write_a14b(root: Path, variant: str) -> Path:
    """An official root with both experts."""
    for expert in ("high_noise_model", "low_noise_model"):
        write_sharded(root / expert, dit(variant), NUM_SHARDS[variant])
    return root


def write_fp8_scaled(
    path: Path, shapes: Shapes, suffixes: tuple[str, ...] = (".scale_weight", ".scale_input")
) -> Path:
    """ComfyUI's layout of the 14B models: all linear weights in 8 bits with scales beside them."""
    names: Shapes = {"scaled_fp8": (0,)}
    dtypes = {"scaled_fp8": "F8_E4M3"}
    for name, shape in shapes.items():
        is_linear = name.endswith(".weight") and len(shape) == 2
        names[name], dtypes[name] = shape, "F8_E4M3" if is_linear else "F16"
        for suffix in suffixes if is_linear else ():
            scale = name.removesuffix(".weight") + suffix
            names[scale], dtypes[scale] = (), "F32"
    write_sparse_safetensors(path, names, dtypes)
    return path


def renamed(shapes: Mapping[str, tuple[int, ...]], rename: Callable[[str], str]) -> Shapes:
    """The same shapes under other names."""
    return {rename(name): shape for name, shape in shapes.items()}


def as_diffusers(shapes: Shapes) -> Shapes:
    """A DiT under diffusers' names."""
    return renamed(shapes, dit_to_diffusers)
