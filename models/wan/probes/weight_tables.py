"""Tables about the tensors of a checkpoint: each, by name pattern, by block, by format."""

import math
import re
from collections.abc import Sequence
from typing import Any

from models.wan.namings import is_extra
from models.wan.probes.parts import Part, tensor_bytes
from utils.lora_targets import number_ranges

_BLOCK = re.compile(r"^(?P<list>blocks|encoder\.block)\.(?P<number>\d{1,5})\.")


def key_rows(parts: Sequence[tuple[str, Part]]) -> list[dict[str, Any]]:
    """keys.csv: every tensor, in the order of the files.

    Args:
        parts: with a name for each.
    """
    rows = []
    for name, part in parts:
        official = part.official_of
        for key in part.names:
            shape = part.source.shapes[key]
            rows.append(
                {
                    "part": name,
                    "key": key,
                    "official_key": official.get(key, ""),
                    "shape": _shape(shape),
                    "dtype": part.source.dtypes[key],
                    "values": math.prod(shape),
                    "bytes": tensor_bytes(part.source, key),
                }
            )
    return rows


def shape_rows(parts: Sequence[tuple[str, Part]]) -> list[dict[str, Any]]:
    """shapes.csv: names with the block number taken out, by shape and format; how many, and how large together."""
    groups: dict[tuple[str, str, str, str], dict[str, Any]] = {}
    for name, part in parts:
        official = part.official_of
        for key in part.names:
            shape, dtype = _shape(part.source.shapes[key]), part.source.dtypes[key]
            pattern = _pattern(official.get(key, key))
            row = groups.setdefault(
                (name, pattern, shape, dtype),
                {"part": name, "pattern": pattern, "shape": shape, "dtype": dtype, "tensors": 0, "bytes": 0},
            )
            row["tensors"] += 1
            row["bytes"] += tensor_bytes(part.source, key)
    return list(groups.values())


def block_rows(parts: Sequence[tuple[str, Part]]) -> list[dict[str, Any]]:
    """blocks.csv: per block and outside the blocks: tensors, values, bytes, formats, and missing tensors."""
    rows = []
    for name, part in parts:
        if part.expectation is None:
            continue
        groups: dict[int | None, list[str]] = {}
        for official in part.naming.official:
            groups.setdefault(_block(official), []).append(official)
        absent = [official for official in part.expectation.shapes if official not in part.naming.official]
        for official in absent:
            groups.setdefault(_block(official), [])
        for block in sorted(groups, key=lambda one: -1 if one is None else one):
            stored = [part.naming.official[official] for official in groups[block]]
            rows.append(
                {
                    "part": name,
                    "block": "outside" if block is None else block,
                    "tensors": len(stored),
                    "missing": sum(_block(official) == block for official in absent),
                    "values": sum(math.prod(part.source.shapes[key]) for key in stored),
                    "bytes": sum(tensor_bytes(part.source, key) for key in stored),
                    "dtypes": " ".join(sorted({part.source.dtypes[key] for key in stored})),
                }
            )
    return rows


def block_sentences(parts: Sequence[tuple[str, Part]]) -> list[str]:
    """The blocks in a few lines: those that are alike together, so that an odd one stands out; of an adapter its targets."""
    rows = block_rows(parts)
    sentences = []
    for name, part in parts:
        if part.adapter is not None:
            sentences += [f"{name}: {target}" for target in part.adapter.targets]
        alike: dict[tuple[int, int, int, str], list[int]] = {}
        for row in rows:
            if row["part"] == name and row["block"] != "outside":
                kind = (row["tensors"], row["missing"], row["bytes"], row["dtypes"])
                alike.setdefault(kind, []).append(row["block"])
        for (tensors, missing, size, dtypes), blocks in sorted(alike.items(), key=lambda item: item[1]):
            lacking = f", {missing} missing" if missing else ""
            each = f"{tensors} tensors{lacking}, {size / 1e9:.4g} GB in {dtypes or 'nothing'}"
            sentences.append(f"{name}, blocks {number_ranges(blocks)} ({len(blocks)}): {each} each")
    return sentences


def dtype_rows(parts: Sequence[tuple[str, Part]]) -> list[dict[str, Any]]:
    """dtypes.csv: per part and format: tensors, values, bytes."""
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for name, part in parts:
        for key in part.names:
            dtype = part.source.dtypes[key]
            row = groups.setdefault(
                (name, dtype), {"part": name, "dtype": dtype, "tensors": 0, "values": 0, "bytes": 0}
            )
            row["tensors"] += 1
            row["values"] += math.prod(part.source.shapes[key])
            row["bytes"] += tensor_bytes(part.source, key)
    return list(groups.values())


def part_row(name: str, part: Part) -> dict[str, Any]:
    """parts.csv: a line per part."""
    return {
        "part": name,
        "what": part.label,
        "layout": part.layout,
        "tensors": sum(not is_extra(key) for key in part.names),
        "parameters": part.num_parameters,
        "bytes": part.num_bytes,
        "dtypes": " ".join(f"{dtype}:{count}" for dtype, count in part.dtypes.items()),
        "told_by": part.expert_basis,
        "problems": len(part.problems),
        "verdict": part.verdict,
        "path": part.path.as_posix(),
    }


def _block(official: str) -> int | None:
    match = _BLOCK.match(official)
    return int(match["number"]) if match else None


def _pattern(name: str) -> str:
    """`blocks.N.cross_attn.k.weight` for all blocks; other numbers stay, they are not blocks."""
    return _BLOCK.sub(lambda match: f"{match['list']}.N.", name)


def _shape(shape: Sequence[int]) -> str:
    """`5120x36x1x2x2`; `scalar` for no axes."""
    return "x".join(map(str, shape)) if shape else "scalar"
