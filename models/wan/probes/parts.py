"""One part of a checkpoint, recognised by its header: what it is, under which names, and what is wrong with it."""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from models.wan.arch import VariantInfo
from models.wan.namings import (
    SCALE_SUFFIXES,
    SPIECE_TENSOR,
    Kind,
    Naming,
    find_naming,
    looks_like,
    split_prefixes,
)
from models.wan.probes.adapter_parts import AdapterFacts, read_adapter_facts
from models.wan.probes.expected_parts import Expectation, count_blocks, expect_part
from utils.config.schema import Expert
from utils.errors import UserError
from utils.report import Verdict
from utils.scaled_source import ScaledSource, has_mark
from utils.tensor_source import Shape, TensorSource

_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_LABELS: dict[Kind, str] = {
    "transformer": "DiT",
    "text_encoder": "UMT5 encoder",
    "vae": "VAE",
    "adapter": "adapter",
    "unknown": "unknown",
}
# What this project and others write into a header and a person wants to see.
_SHOWN_METADATA = (
    "project_version",
    "variant",
    "expert",
    "boundary",
    "base_hash",
    "encoder_hash",
    "rank",
    "num_targets",
)


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        path: the file or directory that holds it.
        source: its tensors as they are stored, with those of other parts of the same file.
        names: stored names of this part.
        naming: official names and what does not have one.
        expectation: what it should hold; None for an adapter or what is not known.
        adapter: of an adapter, what it is.
        storage: how the numbers are stored: `plain`, `fp8_scaled`, `fp8 without scales`.
        expert: of an A14B transformer, which of the two.
        expert_basis: what that was told by.
        problems: what is missing or wrong; empty where it is complete.
        remarks: what else is worth knowing.
    """

    path: Path
    source: TensorSource
    names: tuple[str, ...]
    naming: Naming
    expectation: Expectation | None
    adapter: AdapterFacts | None
    storage: str
    expert: Expert | None
    expert_basis: str
    problems: tuple[str, ...]
    remarks: tuple[str, ...]

    @property
    def kind(self) -> Kind:
        """Which part of Wan 2.2, `adapter` or `unknown`."""
        return self.naming.kind

    @property
    def variant(self) -> VariantInfo | None:
        """Of a DiT."""
        return self.expectation.variant if self.expectation else None

    @property
    def verdict(self) -> Verdict:
        """Recognised and complete, recognised and not complete, or not recognised."""
        if self.kind == "unknown":
            return "inconclusive"
        if self.adapter is not None and self.adapter.is_unsupported:
            return "inconclusive"
        return "fail" if self.problems else "pass"

    @property
    def label(self) -> str:
        """What it is, in a few words: `DiT of t2v-a14b, high_noise`."""
        if self.kind == "transformer":
            name = self.variant.name if self.variant else "a variant that cannot be told"
            return f"DiT of {name}" + (f", {self.expert}" if self.expert else "")
        if self.kind == "vae":
            return f"VAE of Wan {self.naming.vae_kind}"
        if self.adapter is not None:
            return self.adapter.label
        return _LABELS[self.kind]

    @property
    def layout(self) -> str:
        """Container, naming, prefix and storage in a few words."""
        files = len(self.source.files)
        words = ["1 file" if files == 1 else f"{files} shards"]
        if self.adapter is not None:
            words.append(f"{self.adapter.naming} names")
        elif self.naming.style:
            words.append(f"{self.naming.style} names")
        if self.naming.prefix and self.kind not in ("unknown", "adapter"):
            words.append(f"prefix {self.naming.prefix}")
        if self.storage != "plain":
            words.append(self.storage)
        if SPIECE_TENSOR in self.names:
            words.append("with its tokenizer")
        return ", ".join(words)

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shapes by official name."""
        return {name: self.source.shapes[stored] for name, stored in self.naming.official.items()}

    @property
    def official_of(self) -> dict[str, str]:
        """Official name by stored name; of an adapter the module's, with `.A`, `.B` or `.alpha`."""
        if self.adapter is not None:
            return self.adapter.keys
        return {stored: official for official, stored in self.naming.official.items()}

    @property
    def num_bytes(self) -> int:
        """Bytes of all its tensors in the files."""
        return sum(tensor_bytes(self.source, name) for name in self.names)

    @property
    def num_parameters(self) -> int:
        """Numbers of all its tensors; scales, marks and the tokenizer do not count."""
        aside = set(self.naming.extras) | set(self.naming.repeats)
        return sum(math.prod(self.source.shapes[name]) for name in self.names if name not in aside)

    @property
    def dtypes(self) -> dict[str, int]:
        """Number of tensors of each dtype, most first."""
        return dict(Counter(self.source.dtypes[name] for name in self.names).most_common())

    @property
    def metadata(self) -> dict[str, str]:
        """Those entries of the header's metadata that are worth showing."""
        found = self.source.metadata()
        return {key: " ".join(found[key].split())[:80] for key in _SHOWN_METADATA if key in found}

    def with_expert(self, expert: Expert | None, basis: str, remarks: Sequence[str] = ()) -> "Part":
        """The same part with the expert that it is known to be."""
        return replace(self, expert=expert, expert_basis=basis, remarks=(*self.remarks, *remarks))


def tensor_bytes(source: TensorSource, name: str) -> int:
    """Bytes of one tensor as it is stored."""
    place = source.location(name)
    if place is not None:
        return place[2] - place[1]
    bits = re.sub(r"\D", "", source.dtypes[name].partition("_")[0])
    return math.prod(source.shapes[name]) * int(bits or 8) // 8


def recognise(path: Path, source: TensorSource) -> list[Part]:
    """Every part that the tensors of one file, or one set of shards, make up.

    Args:
        path: what was opened.
        source: as it is stored (not a `ScaledSource`).
    """
    groups = split_prefixes(source.shapes)
    parts = [_recognise_group(path, source, names, prefix) for prefix, names in groups.items()]
    return sorted(parts, key=lambda part: part.kind == "unknown")


def _recognise_group(path: Path, source: TensorSource, names: Sequence[str], prefix: str) -> Part:
    naming = find_naming(names, prefix)
    storage = _storage(source, names)
    part = Part(path, source, tuple(names), naming, None, None, storage, None, "", (), ())
    if naming.kind == "adapter":
        facts = read_adapter_facts({name: source.shapes[name] for name in names}, source.metadata())
        return replace(part, adapter=facts, problems=facts.problems, remarks=facts.remarks)
    if naming.kind == "unknown":
        return replace(part, remarks=(looks_like(naming.unknown),))
    config_layers, config_remarks = _layers_of_config(path, source)
    expectation = expect_part(naming, part.shapes, config_layers)
    if expectation.foreign:
        foreign = replace(naming, kind="unknown")
        return replace(part, naming=foreign, remarks=(f"it looks like {expectation.foreign}",))
    problems = [*_problems(part, expectation), *_storage_problems(part)]
    remarks = [*expectation.remarks, *config_remarks, *_part_remarks(part, expectation)]
    return replace(part, expectation=expectation, problems=tuple(problems), remarks=tuple(remarks))


def _problems(part: Part, expectation: Expectation) -> list[str]:
    """Missing tensors, wrong shapes, names that do not belong, and numbers that are no floats."""
    expected, shapes, stored = expectation.shapes, part.shapes, part.naming.official
    wrong = [
        f"{stored[name]} is {list(shapes[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    missing = [f"{name} is missing" for name in expected if name not in shapes]
    strays = [stored[name] for name in shapes if name not in expected]
    unknown = [f"{name} is not one of its tensors" for name in (*strays, *part.naming.unknown)]
    numbers = [
        f"{name} holds {part.source.dtypes[name]}, which no weight is stored as"
        for name in stored.values()
        if part.source.dtypes[name] not in _FLOATS
    ]
    return wrong + missing + unknown + numbers


def _part_remarks(part: Part, expectation: Expectation) -> list[str]:
    remarks = []
    if part.kind == "text_encoder":
        if SPIECE_TENSOR in part.names:
            remarks.append("the tokenizer travels in the file (spiece_model), as ComfyUI needs it")
        elif part.naming.style == "Hugging Face":
            remarks.append("the tokenizer is not in the file (no spiece_model), which ComfyUI needs")
        there = sum(name in part.naming.official for name in expectation.shapes)
        if there < len(expectation.shapes):
            remarks.append(
                f"holds {there} of the encoder's {len(expectation.shapes)} tensors, as a file of the trained tensors "
                "alone does (save_text_encoder_full = false); it cannot be used as an encoder by itself"
            )
    if part.naming.repeats:
        remarks.append(f"{part.naming.repeats[0]} is there a second time under another name (tied)")
    return remarks


def _storage(source: TensorSource, names: Sequence[str]) -> str:
    eight = any(source.dtypes[name].startswith("F8") and source.shapes[name] != (0,) for name in names)
    if has_mark(source.shapes):
        return "fp8_scaled"
    if eight and any(name.endswith((".scale_weight", ".weight_scale")) for name in names):
        return "fp8 with scales and without the mark"
    return "fp8 without scales" if eight else "plain"


def _storage_problems(part: Part) -> list[str]:
    """What is wrong between the 8-bit weights of a scaled file and their scales."""
    there = set(part.names)
    scales = [
        (name, name.removesuffix(suffix) + ".weight")
        for name in part.naming.extras
        for suffix in SCALE_SUFFIXES
        if name.endswith(suffix)
    ]
    lonely = [f"{scale} has no {weight}" for scale, weight in scales if weight not in there]
    if lonely or part.storage != "fp8_scaled":
        return lonely
    try:
        ScaledSource(part.source)
    except UserError as error:
        return [str(error)]
    return []


def _layers_of_config(path: Path, source: TensorSource) -> tuple[int | None, tuple[str, ...]]:
    """`num_layers` of the `config.json` beside the weights, where it can be right; and what to say about it."""
    if any(path.suffix == suffix for suffix in (".pth", ".pt")):
        return None, ()  # the config.json beside it is the DiT's
    config = (path if path.is_dir() else path.parent) / "config.json"
    if not config.is_file():
        return None, ()
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return None, (f"{config.name} is not readable as JSON ({' '.join(str(error).split())})",)
    layers = values.get("num_layers") if isinstance(values, dict) else None
    is_possible = type(layers) is int and 0 < layers <= len(source.shapes)
    return (layers if is_possible else None), ()


def blocks_of(part: Part) -> int:
    """Number of blocks."""
    return count_blocks(part.shapes)


def sizes_text(sizes: Mapping[str, int]) -> str:
    """`dim 5120, ffn_dim 13824, ...`."""
    return ", ".join(f"{name} {size}" for name, size in sizes.items())
