"""Which tensors a part should hold, worked out from a header that may be damaged or incomplete.

`arch.load_arch`, `text_encoder_sizes` and `vae_sizes` refuse the first thing that is wrong, and need certain tensors to
start from. Here the sizes are those that most tensors agree on, so that one missing or wrong tensor is found out and
does not decide what the others should be.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from models.wan.arch import PATCH_SIZE, PUBLISHED, VARIANTS, Shape, VariantInfo, WanArch, expected_shapes
from models.wan.component_shapes import Umt5Sizes, VaeSizes, expected_umt5_shapes, expected_vae_shapes
from models.wan.namings import Naming

PUBLISHED_DITS = {
    name: {"dim": arch.dim, "ffn_dim": arch.ffn_dim, "num_layers": arch.num_layers}
    for name, arch in PUBLISHED.items()
}
PUBLISHED_UMT5 = Umt5Sizes(256384, 4096, 64, 64, 10240, 24, 32)
PUBLISHED_VAES = {"2.1": VaeSizes("2.1", 96, 96), "2.2": VaeSizes("2.2", 160, 256)}
_WAN21_SMALL = (1536, 8960)
_VOLUME = PATCH_SIZE[0] * PATCH_SIZE[1] * PATCH_SIZE[2]
# The sizes of one head stand in no tensor of a DiT; whatever they are, the names and shapes are the same.
_HEADS_DO_NOT_MATTER = 1


@dataclass(frozen=True)
class Expectation:
    """What a part should be.

    Attributes:
        shapes: official names and shapes of all its tensors.
        sizes: what they follow from, by name.
        variant: of a DiT; None where channels are those of no variant, or where the tensors that tell are missing.
        is_published: the sizes are those of the published model.
        foreign: what it looks like where the sizes are those of another known model; empty otherwise.
        remarks: for the report.
    """

    shapes: dict[str, Shape]
    sizes: dict[str, int]
    variant: VariantInfo | None
    is_published: bool
    foreign: str
    remarks: tuple[str, ...]


def expect_part(naming: Naming, shapes: Mapping[str, Shape], num_layers: int | None) -> Expectation:
    """What a part with these official names and shapes should hold.

    Args:
        naming: see `find_naming`; a transformer, text encoder or VAE.
        shapes: by official name.
        num_layers: what the `config.json` beside it says, if there is one.
    """
    if naming.kind == "transformer":
        return _expect_dit(shapes, num_layers)
    if naming.kind == "text_encoder":
        return _expect_umt5(shapes, num_layers)
    return _expect_vae(naming, shapes)


def _expect_dit(shapes: Mapping[str, Shape], num_layers: int | None) -> Expectation:
    dim = _vote(
        shapes, [(".norm_k.weight", 0), (".norm_q.weight", 0), ("attn.q.weight", 0), ("attn.k.weight", 0)]
    )
    ffn = _vote(shapes, [(".ffn.0.weight", 0), (".ffn.0.bias", 0), (".ffn.2.weight", 1)])
    in_dim = _vote(shapes, [("patch_embedding.weight", 1)])
    out_dim = _vote(shapes, [("head.head.weight", 0), ("head.head.bias", 0)]) // _VOLUME
    by_channels = [
        info for info in VARIANTS.values() if in_dim in (0, info.in_dim) and out_dim in (0, info.out_dim)
    ]
    fitting = [
        name for name, sizes in PUBLISHED_DITS.items() if (sizes["dim"], sizes["ffn_dim"]) == (dim, ffn)
    ]
    variant = by_channels[0] if len(by_channels) == 1 else None
    published = PUBLISHED_DITS[fitting[0]]["num_layers"] if fitting else None
    layers = published or num_layers or count_blocks(shapes)
    arch = WanArch(
        model_type=variant.model_type if variant else "t2v",
        dim=dim,
        ffn_dim=ffn,
        freq_dim=_vote(shapes, [("time_embedding.0.weight", 1)]) or 256,
        in_dim=in_dim or (variant.in_dim if variant else 0),
        out_dim=out_dim or (variant.out_dim if variant else 0),
        num_heads=_HEADS_DO_NOT_MATTER,
        num_layers=layers,
        text_len=512,
        eps=1e-6,
        text_dim=_vote(shapes, [("text_embedding.0.weight", 1)]) or PUBLISHED_UMT5.d_model,
    )
    names = ("dim", "ffn_dim", "num_layers", "in_dim", "out_dim", "freq_dim", "text_dim")
    is_published = variant is not None and variant.name in fitting
    return Expectation(
        shapes=expected_shapes(arch),
        sizes={name: getattr(arch, name) for name in names},
        variant=variant,
        is_published=is_published,
        foreign=_foreign_dit(dim, ffn, in_dim, out_dim, shapes),
        remarks=tuple(_dit_remarks(variant, is_published)),
    )


def _foreign_dit(dim: int, ffn: int, in_dim: int, out_dim: int, shapes: Mapping[str, Shape]) -> str:
    if (dim, ffn) == _WAN21_SMALL:
        return "the size of Wan 2.1's 1.3B model"
    known = {(info.in_dim, info.out_dim) for info in VARIANTS.values()}
    # A head of another width is damage as long as the input is a variant's; both decide.
    if in_dim and out_dim and (in_dim, out_dim) not in known and in_dim not in {one for one, _ in known}:
        return f"a Wan DiT of {in_dim} input and {out_dim} output channels, which no Wan 2.2 variant has"
    return ""


def _dit_remarks(variant: VariantInfo | None, is_published: bool) -> Iterable[str]:
    if variant is None:
        yield "which variant it is cannot be told: the tensors for its input and output are missing or contradict each other"
    elif not is_published:
        yield f"the channels are those of {variant.name}, the sizes are not the published ones"


def _expect_umt5(shapes: Mapping[str, Shape], num_layers: int | None) -> Expectation:
    width = _vote(
        shapes,
        [(".norm1.weight", 0), (".norm2.weight", 0), ("token_embedding.weight", 1), (".attn.q.weight", 1)],
    )
    bias = "pos_embedding.embedding.weight"
    inner = _vote(shapes, [(".attn.q.weight", 0), (".attn.k.weight", 0), (".attn.o.weight", 1)])
    hidden = _vote(shapes, [(".ffn.gate.0.weight", 0), (".ffn.fc1.weight", 0), (".ffn.fc2.weight", 1)])
    heads = _vote(shapes, [(bias, 1)]) or 1
    is_published = (width, hidden) == (PUBLISHED_UMT5.d_model, PUBLISHED_UMT5.d_ff)
    sizes = Umt5Sizes(
        vocab_size=_vote(shapes, [("token_embedding.weight", 0)]),
        d_model=width,
        num_heads=heads,
        d_kv=inner // heads,
        d_ff=hidden,
        num_layers=PUBLISHED_UMT5.num_layers if is_published else num_layers or count_blocks(shapes),
        num_buckets=_vote(shapes, [(bias, 0)]),
    )
    expected = expected_umt5_shapes(sizes)
    if inner % heads:  # one of the two is damaged, and then d_kv is not whole
        expected |= {name: _replace_inner(name, shape, inner) for name, shape in expected.items()}
    remarks = () if is_published else ("the sizes are not those of UMT5-XXL",)
    return Expectation(expected, vars(sizes).copy(), None, is_published, "", remarks)


def _replace_inner(name: str, shape: Shape, inner: int) -> Shape:
    if name.endswith((".attn.q.weight", ".attn.k.weight", ".attn.v.weight")):
        return (inner, shape[1])
    return (shape[0], inner) if name.endswith(".attn.o.weight") else shape


def _expect_vae(naming: Naming, shapes: Mapping[str, Shape]) -> Expectation:
    kind = naming.vae_kind or "2.1"
    first = _vote(shapes, [("encoder.conv1.weight", 0), ("encoder.conv1.bias", 0)])
    last = _vote(shapes, [("decoder.head.0.gamma", 0), ("decoder.head.2.weight", 1)])
    published = PUBLISHED_VAES[kind]
    sizes = VaeSizes(kind, first or published.base_dim, last or published.decoder_base_dim)
    remarks = () if sizes == published else (f"the sizes are not those of the published VAE of Wan {kind}",)
    named = {
        "base_dim": sizes.base_dim,
        "decoder_base_dim": sizes.decoder_base_dim,
        "latent_channels": sizes.latent_channels,
    }
    return Expectation(expected_vae_shapes(sizes), named, None, sizes == published, "", remarks)


def count_blocks(shapes: Mapping[str, Shape]) -> int:
    """How many blocks there are: up to the last that has half as many tensors as the fullest, so that a stray name with
    a large number does not count."""
    tensors = Counter(
        int(parts[1])
        for parts in (name.split(".", 2) for name in shapes)
        if parts[0] == "blocks" and len(parts) == 3 and parts[1].isdecimal() and len(parts[1]) < 6
    )
    fullest = max(tensors.values(), default=0)
    return 1 + max((block for block, count in tensors.items() if count * 2 >= fullest), default=-1)


def _vote(shapes: Mapping[str, Shape], places: Iterable[tuple[str, int]]) -> int:
    """The size that most tensors agree on, of those whose names end so; 0 where there is none.

    Args:
        places: end of the name, and which of the tensor's axes has the size.
    """
    places = list(places)
    votes = Counter(
        shape[axis]
        for name, shape in shapes.items()
        for ending, axis in places
        if name.endswith(ending) and len(shape) > axis
    )
    return votes.most_common(1)[0][0] if votes else 0
