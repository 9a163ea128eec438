"""Keys that diffusion-pipe and this project share, and that do not mean quite the same: said where a TOML came from there.

That it did is told by its other keys. Facts from that project's train.py, dataset.py and model code.
"""

from collections.abc import Mapping
from typing import Any

Remark = tuple[str, str, str]


def remarks_on_training(table: Mapping[str, Any]) -> list[Remark]:
    """Key, remark and what to do, for a training TOML that came from diffusion-pipe."""
    adapter, model, optimizer = (_section(table, name) for name in ("adapter", "model", "optimizer"))
    found: list[Remark] = []
    if "adapter" in table and not {"include", "include_file"} & set(adapter):
        found.append(
            (
                "adapter.include",
                "is not set, so the adapter goes on cross_attn.{k,v}; diffusion-pipe adapts every linear layer of the blocks",
                'write include = ["cross_attn.{k,v}"] if that is what you want',
            )
        )
    if {"epochs", "max_steps"} <= set(table):
        found.append(
            (
                "max_steps",
                "decides alone here; in diffusion-pipe a run ends with epochs or max_steps, whichever is first",
                "",
            )
        )
    if "float8" in str(model.get("transformer_dtype", "")):
        found.append(
            (
                "model.transformer_dtype",
                "weights have one scale per output channel here, and none in diffusion-pipe",
                "",
            )
        )
    return found + _remarks_on_optimizer(optimizer)


def _remarks_on_optimizer(optimizer: Mapping[str, Any]) -> list[Remark]:
    """Defaults that diffusion-pipe leaves to the optimizer's own library: those of torch and bitsandbytes, or of optimi."""
    if optimizer.get("type") == "adamw_optimi":
        if "eps" in optimizer:
            return []
        return [
            (
                "optimizer.eps",
                "is not set: 1e-8 here, 1e-6 in optimi, which sets it there",
                "write eps = 1e-6",
            )
        ]
    if "betas" in optimizer:
        return []
    reason = "is not set: [0.9, 0.99] here, [0.9, 0.999] in diffusion-pipe"
    return [("optimizer.betas", reason, "write betas = [0.9, 0.999]")]


def remarks_on_dataset(table: Mapping[str, Any]) -> list[Remark]:
    """The same for its dataset TOML."""
    found: list[Remark] = []
    directories = table.get("directory")
    tables = [("", table)]
    if isinstance(directories, list):
        tables += [
            (f"directory[{index}].", one) for index, one in enumerate(directories) if isinstance(one, dict)
        ]
    for prefix, one in tables:
        sizes, lengths = one.get("resolutions"), one.get("frame_buckets")
        if isinstance(sizes, list) and len(sizes) > 1:
            found.append(
                (
                    f"{prefix}resolutions",
                    "each file goes to the nearest of them here; diffusion-pipe trains each file at all of them",
                    "for that, list the folder in one [[directory]] for each size",
                )
            )
        if isinstance(lengths, list) and 1 not in lengths:
            found.append(
                (
                    f"{prefix}frame_buckets",
                    "without 1 images are left out; diffusion-pipe always adds it",
                    "add 1 if there are images to train",
                )
            )
        if "mask_path" in one:
            found.append(
                (
                    f"{prefix}mask_path",
                    "the loss is divided by what the mask lets through, so small masks weigh as much as none; in diffusion-pipe "
                    "they weigh less",
                    "",
                )
            )
    for name, here, there in (("enable_ar_bucket", "true", "false"), ("frame_buckets", "[1, 33]", "[1]")):
        if name not in table and "size_buckets" not in table:
            found.append(
                (
                    name,
                    f"is not set: {here} here, {there} in diffusion-pipe",
                    f"write {name} = {there} for that",
                )
            )
    return found


def _section(table: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = table.get(name)
    return found if isinstance(found, dict) else {}
