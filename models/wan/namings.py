"""Which part of Wan 2.2 a list of tensor names belongs to, under whose naming, and the official name of each.

The one answer to "under which names is this stored" for training and probes. Works on names alone. A file may hold several parts under prefixes of their own, as all-in-one files for ComfyUI do.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from models.wan.arch import VaeKind
from models.wan.component_shapes import VaeSizes, expected_vae_shapes
from models.wan.names import (
    dit_to_diffusers,
    dit_to_official,
    umt5_to_hf,
    umt5_to_official,
    vae_to_diffusers,
)
from models.wan.tokenizer_place import SPIECE_TENSOR
from utils.errors import UserError
from utils.lora_names import parse_adapter_key
from utils.scaled_source import SCALED_FP8_MARK

Kind = Literal["transformer", "text_encoder", "vae", "adapter", "unknown"]

SCALE_SUFFIXES = (".scale_weight", ".scale_input")
# Longest first: what an all-in-one file for ComfyUI, or a program that saves a whole model, puts before the names.
PREFIXES = (
    "text_encoders.umt5xxl.transformer.",
    "model.diffusion_model.",
    "first_stage_model.",
    "diffusion_model.",
    "text_encoder.",
    "transformer.",
    "module.",
    "vae.",
)
_NUM_TRIED = 48
_ARTICLES: dict[Kind, str] = {
    "transformer": "a DiT",
    "text_encoder": "a UMT5 encoder",
    "vae": "a VAE",
    "adapter": "a LoRA adapter",
}
_GIVE: dict[Kind, str] = {
    "transformer": "give Wan 2.2's DiT: a directory of shards, or its .safetensors file",
    "text_encoder": "give UMT5's encoder alone: the official .pth, umt5_xxl_fp16.safetensors, a diffusers text_encoder/, or one "
    "that this project saved",
    "vae": "give Wan2.1_VAE.pth or Wan2.2_VAE.pth, the same as .safetensors, or a diffusers vae/",
}
# Names that no part of Wan 2.2 has, and what they say; the first that is found counts.
_MARKS: tuple[tuple[str, str], ...] = (
    ("vace_blocks.", "a VACE model (it has vace_blocks)"),
    ("casual_audio_encoder.", "a speech-to-video model (it has casual_audio_encoder)"),
    ("face_adapter.", "an Animate model (it has face_adapter)"),
    ("control_adapter.", "a camera or control model (it has control_adapter)"),
    ("ref_conv.", "a control model with reference images (it has ref_conv)"),
    (".k_img.", "a Wan 2.1 image-to-video model (its CLIP branch: k_img, v_img)"),
    (".add_k_proj.", "a Wan 2.1 image-to-video model of diffusers (its CLIP branch: add_k_proj, add_v_proj)"),
    ("img_emb.", "a Wan 2.1 image-to-video model (its CLIP branch: img_emb)"),
    ("image_embedder.", "a Wan 2.1 image-to-video model of diffusers (its CLIP branch: image_embedder)"),
    ("double_blocks.", "a model with double_blocks, such as HunyuanVideo or FLUX"),
    ("input_blocks.", "a U-Net, such as Stable Diffusion's"),
    ("visual.transformer.resblocks.", "a CLIP vision encoder"),
    ("vision_model.", "a CLIP vision encoder"),
    ("text_model.", "a CLIP text encoder"),
    ("decoder.block.", "a T5 with its decoder; Wan uses the encoder alone"),
    ("model.layers.", "a language model with a decoder"),
)


@dataclass(frozen=True)
class Naming:
    """What the names of one part are.

    Attributes:
        kind: the part.
        style: whose names: `official`, `diffusers`, `Hugging Face`; empty for an adapter or what is not known.
        prefix: what stands before each name.
        vae_kind: of a VAE, which of the two.
        official: stored name by official name.
        repeats: stored names of a tensor that is there under another name already (a tied token table).
        unknown: stored names that are not names of this part.
        extras: stored names that go with the format and not with the part: scales, the fp8 mark, the tokenizer.
    """

    kind: Kind
    style: str
    prefix: str
    vae_kind: VaeKind | None
    official: dict[str, str]
    repeats: tuple[str, ...]
    unknown: tuple[str, ...]
    extras: tuple[str, ...]


@dataclass(frozen=True)
class _Style:
    kind: Kind
    style: str
    vae_kind: VaeKind | None
    translate: Callable[[str], str | None]


def find_part(where: Path, names: Iterable[str], kind: Kind) -> Naming:
    """The part `kind` among the tensors of a file, whatever stands beside it.

    Args:
        where: the file or directory, for messages.
        names: of all its tensors, as they are stored.
        kind: `transformer`, `text_encoder` or `vae`.

    Raises:
        UserError: it is not there; the message says what is there instead.
    """
    names = list(names)
    found = [find_naming(group, prefix, kind) for prefix, group in split_prefixes(names).items()]
    wanted = [naming for naming in found if naming.kind == kind]
    if wanted:
        return max(wanted, key=lambda naming: len(naming.official))
    others = [_ARTICLES[naming.kind] for naming in found if naming.kind in _ARTICLES]
    prefix = _unknown_prefix(names, kind)
    if others:
        why = f"it is {' and '.join(others)}"
    elif prefix:
        known = ", ".join(PREFIXES)
        why = f"before the names of {_ARTICLES[kind]} stands {prefix!r}, a prefix that is not known (known: none, {known})"
    else:
        why = looks_like(names)
    raise UserError(f"{where}: is not {_ARTICLES[kind]} of Wan 2.2: {why}; {_GIVE[kind]}")


def shown_names(naming: Naming, *, strict: bool) -> dict[str, str]:
    """Stored name by the name to show: official ones; with `strict` also names that do not belong, for checks to refuse."""
    shown = dict(naming.official)
    if strict:
        shown |= {
            name.removeprefix(naming.prefix): name
            for name in naming.unknown
            if name.removeprefix(naming.prefix) not in shown
        }
    return shown


def split_prefixes(names: Iterable[str]) -> dict[str, list[str]]:
    """Stored names by their prefix.

    Few names beside many are strays, not a part: they stay with the most.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(next((one for one in PREFIXES if name.startswith(one)), ""), []).append(name)
    if not groups:
        return {"": []}
    main = max(groups, key=lambda prefix: len(groups[prefix]))
    for prefix in [
        one for one in groups if one != main and len(groups[one]) < _fewest(names_of=groups[main])
    ]:
        groups[main] += groups.pop(prefix)
    return groups


def find_naming(names: Sequence[str], prefix: str, wanted: Kind | None = None) -> Naming:
    """Which part the names belong to: the part and naming that most of some names fit, else `unknown`.

    Where they fit several alike, as a few names may (`blocks.2.norm1.weight`), `wanted` decides.
    """
    extras = tuple(name for name in names if is_extra(name.removeprefix(prefix)))
    aside = set(extras)
    plain = [name for name in names if name not in aside]
    tried = plain[:: max(1, len(plain) // _NUM_TRIED)]
    if sum(_is_of_adapter(name) for name in tried) * 2 > len(tried):
        return Naming("adapter", "", prefix, None, {}, (), (), extras)
    bare = [name.removeprefix(prefix) for name in tried]
    counts = {style: sum(style.translate(name) is not None for name in bare) for style in _styles()}
    best = max(counts, key=lambda style: (counts[style], style.kind == wanted))
    if counts[best] * 2 <= len(tried) or foreign_marks(plain):
        return Naming("unknown", "", prefix, None, {}, (), tuple(plain), extras)
    official: dict[str, str] = {}
    repeats, unknown = [], []
    for name in plain:
        found = best.translate(name.removeprefix(prefix)) if name.startswith(prefix) else None
        if found is None:
            unknown.append(name)
        elif found in official:
            repeats.append(name)
        else:
            official[found] = name
    return Naming(
        best.kind, best.style, prefix, best.vae_kind, official, tuple(repeats), tuple(unknown), extras
    )


def is_extra(name: str) -> bool:
    """Whether a name goes with the format of a file and not with the model."""
    return name in (SCALED_FP8_MARK, SPIECE_TENSOR) or name.endswith(SCALE_SUFFIXES)


def foreign_marks(names: Iterable[str]) -> str:
    """What names that Wan 2.2 does not have look like; empty where there are none.

    One name alone is a stray or damage, not another model.
    """
    names = list(names)
    for mark, meaning in _MARKS:
        if sum(mark in name for name in names) > 1:
            return meaning
    return ""


def looks_like(names: Sequence[str]) -> str:
    """A sentence about names that are not those of any part of Wan 2.2."""
    if not names:
        return "it holds no tensors"
    meaning = foreign_marks(names)
    if meaning:
        return f"it looks like {meaning}"
    tops = Counter(name.partition(".")[0] for name in names).most_common(3)
    listed = ", ".join(f"{top} ({count})" for top, count in tops)
    return f"its {len(names)} names begin with {listed}"


def _unknown_prefix(names: Sequence[str], kind: Kind) -> str:
    """What stands before all names, where the rest of them are those of `kind`; else nothing."""
    first, last = min(names, default=""), max(names, default="")
    alike = next(
        (index for index, pair in enumerate(zip(first, last, strict=False)) if len(set(pair)) > 1), None
    )
    common = first[:alike]
    places = [index + 1 for index, letter in enumerate(common) if letter == "."]
    for place in places:
        if find_naming([name[place:] for name in names], "", kind).kind == kind:
            return common[:place]
    return ""


def _fewest(names_of: Sequence[str]) -> int:
    """Below this many names, a prefix is that of strays."""
    return max(2, len(names_of) // 20)


def _is_of_adapter(name: str) -> bool:
    try:
        return parse_adapter_key(name) is not None
    except UserError:  # an adapter of a kind that is not supported is one all the same
        return True


@cache
def _styles() -> tuple[_Style, ...]:
    styles = [
        _Style("transformer", "official", None, _known_if(dit_to_diffusers)),
        _Style("transformer", "diffusers", None, _translated_by(dit_to_official)),
        _Style("text_encoder", "official", None, _known_if(umt5_to_hf)),
        _Style("text_encoder", "Hugging Face", None, _translated_by(umt5_to_official)),
    ]
    for kind in ("2.1", "2.2"):
        official = list(expected_vae_shapes(VaeSizes(kind, 8, 8)))
        renamed = {stored: name for name, stored in vae_to_diffusers(official, kind).items()}
        styles.append(_Style("vae", "official", kind, {name: name for name in official}.get))
        styles.append(_Style("vae", "diffusers", kind, renamed.get))
    return tuple(styles)


def _known_if(check: Callable[[str], str]) -> Callable[[str], str | None]:
    """The name itself, where `check` accepts it."""
    translate = _translated_by(check)
    return lambda name: None if translate(name) is None else name


def _translated_by(translate: Callable[[str], str]) -> Callable[[str], str | None]:
    """`translate`, with None for what it refuses."""

    def translated(name: str) -> str | None:
        try:
            return translate(name)
        except UserError:
            return None

    return translated
