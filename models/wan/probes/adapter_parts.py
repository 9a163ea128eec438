"""What a LoRA file is, from its header: whose names, which ranks, which targets, for which variant."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from models.wan.arch import VARIANTS, Shape, WanArch, expected_shapes
from models.wan.names import dit_to_diffusers
from models.wan.probes.expected_parts import PUBLISHED_DITS
from utils.errors import UserError
from utils.lora_names import KOHYA_PREFIX, adapted_shape, kohya_aliases, matrix_shape, parse_adapter_key
from utils.lora_targets import describe_targets

_IN_BLOCK = re.compile(r"blocks\.\d{1,4}\.[a-z_]+\.[a-z0-9]+")
_KIND = re.compile(r"this is a (.+) adapter, which")


@dataclass(frozen=True)
class AdapterFacts:
    """A LoRA file.

    Attributes:
        label: what it is, in a few words.
        naming: whose names.
        ranks: all ranks, ascending.
        targets: a line per path, such as `cross_attn.k in blocks 20-29`.
        variants: published variants that its shapes fit.
        modules: official module paths, with the shape [out, in] of the weight that each adapts.
        keys: `module.part` by stored name.
        is_unsupported: it is not plain LoRA.
        problems, remarks: what is wrong, and what else is worth knowing.
    """

    label: str
    naming: str
    ranks: tuple[int, ...]
    targets: tuple[str, ...]
    variants: tuple[str, ...]
    modules: dict[str, Shape]
    keys: dict[str, str]
    is_unsupported: bool
    problems: tuple[str, ...]
    remarks: tuple[str, ...]


def read_adapter_facts(shapes: Mapping[str, Shape], metadata: Mapping[str, str]) -> AdapterFacts:
    """Everything that names, shapes and metadata of a LoRA file say."""
    parts: dict[str, dict[str, str]] = {}
    kinds: Counter[str] = Counter()
    problems: list[str] = []
    for key in shapes:
        try:
            tensor = parse_adapter_key(key, _aliases())
        except UserError as error:
            match = _KIND.search(str(error))
            kinds[match[1] if match else "unsupported"] += 1
            continue
        if tensor is None:
            problems.append(f"{key} is not a tensor of a LoRA")
            continue
        found = parts.setdefault(tensor.module, {})
        if tensor.part in found:
            problems.append(f"{found[tensor.part]} and {key} are both the {tensor.part} of {tensor.module}")
        found[tensor.part] = key
    modules, ranks, wrong = _modules(parts, shapes)
    known = [module for module in modules if module in _known_modules()]
    unknown = [
        f"{module} is not a module of the Wan 2.2 DiT" for module in modules if module not in _known_modules()
    ]
    variants = tuple(name for name in VARIANTS if known and not _misfits(modules, name))
    has_alpha = any("alpha" in found for found in parts.values())
    remarks = [
        f"the file has {'its own alpha' if has_alpha else 'no alpha: its scale is 1 unless an adapter_config.json says otherwise'}"
    ]
    remarks += _variant_remarks(variants, metadata)
    if kinds:
        kind = kinds.most_common(1)[0][0]
        remarks.append(f"it is a {kind} adapter, which nothing here supports; only plain LoRA is")
    label = (
        f"{kinds.most_common(1)[0][0]} adapter"
        if kinds
        else f"LoRA of rank {', '.join(map(str, ranks)) or 'unknown'}"
    )
    return AdapterFacts(
        label=label,
        naming=_naming(shapes),
        ranks=ranks,
        targets=tuple(describe_targets([module for module in known if _IN_BLOCK.fullmatch(module)])),
        variants=variants,
        modules=modules,
        keys={key: f"{module}.{part}" for module, found in parts.items() for part, key in found.items()},
        is_unsupported=bool(kinds),
        problems=tuple(problems + wrong + unknown),
        remarks=tuple(remarks),
    )


def misfits(facts: AdapterFacts, shapes: Mapping[str, Shape]) -> list[str]:
    """How the adapter does not fit a DiT with these official names and shapes, one sentence per module."""
    found = []
    for module, adapted in facts.modules.items():
        shape = shapes.get(f"{module}.weight")
        if shape is None:
            found.append(f"the base has no {module}")
        elif matrix_shape(shape) != adapted:
            found.append(f"{module} adapts {list(adapted)}, the base has {list(matrix_shape(shape))}")
    return found


def _modules(
    parts: Mapping[str, Mapping[str, str]], shapes: Mapping[str, Shape]
) -> tuple[dict[str, Shape], tuple[int, ...], list[str]]:
    """Adapted shapes by module, all ranks, and what does not fit together."""
    modules: dict[str, Shape] = {}
    ranks: set[int] = set()
    problems = []
    for module, found in parts.items():
        if not {"A", "B"} <= found.keys():
            problems.append(f"{module} has no {'A' if 'A' not in found else 'B'}")
            continue
        down, up = shapes[found["A"]], shapes[found["B"]]
        adapted = adapted_shape(down, up)
        if adapted is None:
            problems.append(
                f"{module}: A is {list(down)} and B is {list(up)}, not [rank, in] and [out, rank]"
            )
            continue
        modules[module] = adapted
        ranks.add(down[0])
    return modules, tuple(sorted(ranks)), problems


def _variant_remarks(variants: tuple[str, ...], metadata: Mapping[str, str]) -> list[str]:
    remarks = []
    if not variants:
        remarks.append("its shapes fit none of the published models (it may be for a smaller one)")
    elif len(variants) > 1:
        remarks.append(
            f"its shapes fit {' and '.join(variants)}, which names and shapes of these targets cannot tell apart"
        )
    if "variant" in metadata:
        told = " ".join(metadata["variant"].split())[:40]
        expert = " ".join(metadata.get("expert", "none").split())[:40]
        remarks.append(
            f"its metadata say that it is for {told}" + (f", {expert}" if expert != "none" else "")
        )
    return remarks


def _misfits(modules: Mapping[str, Shape], variant: str) -> bool:
    shapes = _published_linears(variant)
    return any(shapes.get(module) != adapted for module, adapted in modules.items())


def _naming(shapes: Mapping[str, Shape]) -> str:
    """Whose names most keys have."""
    names = list(shapes)
    count = Counter(
        (
            "kohya"
            if name.startswith(KOHYA_PREFIX)
            else (
                "PEFT"
                if name.startswith("base_model.model.")
                else (
                    "diffusers"
                    if ".attn1." in name or ".attn2." in name or ".ffn.net." in name
                    else "ComfyUI (diffusion_model.)" if name.startswith("diffusion_model.") else "bare"
                )
            )
        )
        for name in names
    )
    return count.most_common(1)[0][0] if count else "no"


@cache
def _published_linears(variant: str) -> dict[str, Shape]:
    """Module paths of all layers of a published variant that can be adapted, and the shapes [out, in] of their weights."""
    info = VARIANTS[variant]
    sizes = PUBLISHED_DITS[variant]
    arch = WanArch(
        model_type=info.model_type,
        freq_dim=256,
        in_dim=info.in_dim,
        out_dim=info.out_dim,
        num_heads=1,
        text_len=512,
        eps=1e-6,
        text_dim=4096,
        **sizes,
    )
    return {
        name.removesuffix(".weight"): matrix_shape(shape)
        for name, shape in expected_shapes(arch).items()
        if name.endswith(".weight") and len(shape) >= 2
    }


@cache
def _known_modules() -> frozenset[str]:
    """Linear layers of any Wan 2.2 DiT of up to 40 blocks."""
    return frozenset(_published_linears("t2v-a14b"))


@cache
def _aliases() -> dict[str, str]:
    """Official paths by kohya's flattened names and by diffusers' names."""
    modules = sorted(_known_modules())
    flat = kohya_aliases(modules)
    return {dit_to_diffusers(module): module for module in modules} | flat
