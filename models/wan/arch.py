"""The numbers of each Wan 2.2 variant, and reading them from a checkpoint's `config.json` and tensor shapes.

Sources: the published `config.json` files and `wan/configs/*.py` of the official repository. Nothing here knows
a "tiny" model: sizes come from the checkpoint at hand, and only what the variant itself fixes is a constant.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from models.wan.config_json import read_config_json
from utils.errors import UserError

Shape = tuple[int, ...]
VaeKind = Literal["2.1", "2.2"]
NUM_TRAIN_TIMESTEPS = 1000
PATCH_SIZE = (1, 2, 2)


@dataclass(frozen=True)
class VariantInfo:
    """What a variant fixes, whatever the width of the model.

    `boundary` is on the shifted noise level sigma in [0, 1]; sigma >= boundary belongs to the high-noise expert.
    """

    name: str
    model_type: str
    in_dim: int
    out_dim: int
    vae_kind: VaeKind
    vae_stride: tuple[int, int, int]
    fps: int
    boundary: float | None

    @property
    def pixel_multiple(self) -> int:
        """Width and height of a clip are multiples of this many px (VAE stride times patch size)."""
        return self.vae_stride[1] * PATCH_SIZE[1]

    @property
    def has_experts(self) -> bool:
        """True where the checkpoint holds a high-noise and a low-noise transformer."""
        return self.boundary is not None

    def sigma_range(self, expert: str | None, min_t: float, max_t: float) -> tuple[float, float]:
        """The part of [min_t, max_t] that this expert is responsible for; sigma >= boundary is the high-noise one's.

        All of it for `both`, and where there are no experts. A bound of 0 or 1 is none: it asks for nothing.

        Raises:
            UserError: nothing is left of the range, or a bound asks for levels of the other expert.
        """
        if self.boundary is None or expert in (None, "both"):
            return min_t, max_t
        low = max(min_t, self.boundary) if expert == "high_noise" else min_t
        high = max_t if expert == "high_noise" else min(max_t, self.boundary)
        if low >= high:
            raise UserError(
                f"model.min_t = {min_t:g} and model.max_t = {max_t:g} leave nothing to the {expert} expert of {self.name}, "
                f"whose noise levels are {'at least' if expert == 'high_noise' else 'below'} {self.boundary:g}; leave "
                "min_t and max_t out"
            )
        if expert == "high_noise" and 0 < min_t < low:
            raise UserError(
                f"model.min_t = {min_t:g} lies below {low:g}, where the high_noise expert of {self.name} begins: it never "
                "sees such noise levels; leave min_t out, or train the low_noise expert there"
            )
        if expert == "low_noise" and high < max_t < 1:
            raise UserError(
                f"model.max_t = {max_t:g} lies above {high:g}, where the low_noise expert of {self.name} ends: it never "
                "sees such noise levels; leave max_t out, or train the high_noise expert there"
            )
        return low, high

    def latent_frames(self, num_frames: int) -> int:
        """Number of latent frames of a clip of 4n+1 frames."""
        return (num_frames - 1) // self.vae_stride[0] + 1


VARIANTS: dict[str, VariantInfo] = {
    info.name: info
    for info in (
        VariantInfo("ti2v-5b", "ti2v", 48, 48, "2.2", (4, 16, 16), 24, None),
        VariantInfo("t2v-a14b", "t2v", 16, 16, "2.1", (4, 8, 8), 16, 0.875),
        VariantInfo("i2v-a14b", "i2v", 36, 16, "2.1", (4, 8, 8), 16, 0.900),
    )
}
_BY_MODEL_TYPE = {info.model_type: info for info in VARIANTS.values()}


@dataclass(frozen=True)
class WanArch:
    """Sizes of one DiT. Everything but `text_dim` stands in the checkpoint's `config.json`."""

    model_type: str
    dim: int
    ffn_dim: int
    freq_dim: int
    in_dim: int
    out_dim: int
    num_heads: int
    num_layers: int
    text_len: int
    eps: float
    text_dim: int

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.num_heads

    @property
    def variant(self) -> VariantInfo:
        """The variant that this model is."""
        return _BY_MODEL_TYPE[self.model_type]

    def to_config_json(self) -> dict[str, Any]:
        """The official `config.json` of this model, keys in the published order."""
        values = asdict(self)
        keys = (
            "dim",
            "eps",
            "ffn_dim",
            "freq_dim",
            "in_dim",
            "model_type",
            "num_heads",
            "num_layers",
            "out_dim",
            "text_len",
        )
        return {"_class_name": "WanModel", "_diffusers_version": "0.33.0"} | {
            key: values[key] for key in keys
        }


def _published(model_type: str, in_dim: int, out_dim: int, sizes: tuple[int, int, int, int]) -> WanArch:
    dim, ffn_dim, num_heads, num_layers = sizes
    return WanArch(
        model_type=model_type,
        dim=dim,
        ffn_dim=ffn_dim,
        freq_dim=256,
        in_dim=in_dim,
        out_dim=out_dim,
        num_heads=num_heads,
        num_layers=num_layers,
        text_len=512,
        eps=1e-6,
        text_dim=4096,
    )


# The published models, by the name of their variant: to say what a foreign file is, and to make files of the real size.
PUBLISHED: dict[str, WanArch] = {
    info.name: _published(info.model_type, info.in_dim, info.out_dim, sizes)
    for info, sizes in (
        (VARIANTS["ti2v-5b"], (3072, 14336, 24, 30)),
        (VARIANTS["t2v-a14b"], (5120, 13824, 40, 40)),
        (VARIANTS["i2v-a14b"], (5120, 13824, 40, 40)),
    )
}


# Sizes in `config.json` that a header does not show.
_NOT_IN_SHAPES = ("num_heads", "text_len", "eps")
# The first linear layer of the feed-forward of Wan 2.1's small model; no Wan 2.2 has this width.
_WAN_21_SMALL = (8960, 1536)


def load_arch(config_path: Path, shapes: dict[str, Shape]) -> WanArch:
    """Read `config.json` and check it against the tensor shapes of the weights beside it.

    Where there is none (single files for ComfyUI have none), a model of the published sizes is known by its shapes.

    Args:
        config_path: the official `config.json`, or that of a diffusers directory.
        shapes: official tensor names and shapes, from the files' headers.

    Raises:
        UserError: the file is missing (and the sizes are not published ones) or unreadable, names no Wan 2.2 variant, or
            disagrees with the headers.
    """
    try:
        values = read_config_json(config_path)
    except FileNotFoundError:
        _check_not_wan_21(shapes, config_path)
        return _published_arch(config_path, shapes)
    needed = (
        "model_type",
        "dim",
        "ffn_dim",
        "freq_dim",
        "in_dim",
        "out_dim",
        "num_heads",
        "num_layers",
        "text_len",
        "eps",
    )
    absent = [key for key in needed if not isinstance(values, dict) or key not in values]
    if absent:
        raise UserError(
            f"{config_path}: has no {', '.join(absent)}; it is not the config.json of a Wan 2.2 DiT"
        )
    sizes = [key for key in needed if key not in ("model_type", "eps")]
    wrong = [key for key in sizes if type(values[key]) is not int or values[key] < 1]
    # No DiT has more blocks than tensors; a mistyped number must not make us list a million names.
    wrong += ["num_layers"] if not wrong and shapes and values["num_layers"] > len(shapes) else []
    wrong += ["eps"] if type(values["eps"]) is not float else []
    if wrong:
        raise UserError(
            f"{config_path}: {wrong[0]} = {values[wrong[0]]!r} cannot be right; download the file again"
        )
    if not isinstance(values["model_type"], str) or values["model_type"] not in _BY_MODEL_TYPE:
        raise UserError(
            f"{config_path}: model_type {values['model_type']!r} is no Wan 2.2 variant (known: {', '.join(_BY_MODEL_TYPE)})"
        )
    text_shape = shapes.get("text_embedding.0.weight", ())
    arch = WanArch(
        text_dim=text_shape[1] if len(text_shape) == 2 else 0, **{key: values[key] for key in needed}
    )
    _check_shapes(arch, shapes, config_path)
    return arch


def _published_arch(config_path: Path, shapes: dict[str, Shape]) -> WanArch:
    """The published model of these shapes; a header alone does not tell how many heads any other has."""
    patch = shapes.get("patch_embedding.weight")
    for arch in PUBLISHED.values():
        if patch == (arch.dim, arch.in_dim, *PATCH_SIZE):
            mismatch = describe_mismatch(shapes, expected_shapes(arch))
            if mismatch:
                raise UserError(
                    f"{config_path.parent}: the weights are not those of {arch.variant.name}: {mismatch}; download them again"
                )
            return arch
    raise UserError(
        f"{config_path}: missing, and the sizes of the weights are those of no published Wan 2.2, so that nothing says how "
        "many heads it has; download it, or copy the model's config.json (official or diffusers') there"
    )


def expected_shapes(arch: WanArch) -> dict[str, Shape]:
    """Official names and shapes of every tensor of a DiT with these sizes (825 for TI2V-5B, 1095 for A14B)."""
    dim, ffn = arch.dim, arch.ffn_dim
    volume = PATCH_SIZE[0] * PATCH_SIZE[1] * PATCH_SIZE[2]
    shapes: dict[str, Shape] = {
        "patch_embedding.weight": (dim, arch.in_dim, *PATCH_SIZE),
        "patch_embedding.bias": (dim,),
    }

    def linear(name: str, out_features: int, in_features: int) -> None:
        shapes[f"{name}.weight"] = (out_features, in_features)
        shapes[f"{name}.bias"] = (out_features,)

    def attention(name: str) -> None:
        for projection in "qkvo":
            linear(f"{name}.{projection}", dim, dim)
        shapes[f"{name}.norm_q.weight"] = (dim,)
        shapes[f"{name}.norm_k.weight"] = (dim,)

    linear("text_embedding.0", dim, arch.text_dim)
    linear("text_embedding.2", dim, dim)
    linear("time_embedding.0", dim, arch.freq_dim)
    linear("time_embedding.2", dim, dim)
    linear("time_projection.1", 6 * dim, dim)
    for index in range(arch.num_layers):
        block = f"blocks.{index}"
        shapes[f"{block}.modulation"] = (1, 6, dim)
        attention(f"{block}.self_attn")
        shapes[f"{block}.norm3.weight"] = (dim,)
        shapes[f"{block}.norm3.bias"] = (dim,)
        attention(f"{block}.cross_attn")
        linear(f"{block}.ffn.0", ffn, dim)
        linear(f"{block}.ffn.2", dim, ffn)
    shapes["head.modulation"] = (1, 2, dim)
    linear("head.head", arch.out_dim * volume, dim)
    return shapes


def _check_shapes(arch: WanArch, shapes: dict[str, Shape], config_path: Path) -> None:
    info = arch.variant
    if (arch.in_dim, arch.out_dim) != (info.in_dim, info.out_dim):
        raise UserError(
            f"{config_path}: in_dim/out_dim {arch.in_dim}/{arch.out_dim} do not fit model_type {arch.model_type!r}, "
            f"which has {info.in_dim}/{info.out_dim}"
        )
    if arch.num_heads < 1 or arch.dim % arch.num_heads or arch.head_dim % 2:
        raise UserError(
            f"{config_path}: dim {arch.dim} does not split into {arch.num_heads} heads of even width"
        )
    expected = expected_shapes(arch)
    _check_not_wan_21(shapes, config_path)
    found = variant_of_shapes(shapes)
    if found is not None and found is not info:
        raise UserError(
            f"{config_path}: is that of {info.name}, but the weights are those of {found.name} (they take {found.in_dim} "
            f"channels and give {found.out_dim}, not {info.in_dim} and {info.out_dim}); give the config.json that was "
            "published with the weights, or other weights"
        )
    mismatch = describe_mismatch(shapes, expected)
    if mismatch:
        raise UserError(
            f"{config_path.parent}: the weights are not those that config.json describes: {mismatch}"
        )
    _check_unseen_sizes(arch, config_path)


def _check_not_wan_21(shapes: dict[str, Shape], config_path: Path) -> None:
    what = describe_wan_21(shapes)
    if what:
        raise UserError(
            f"{config_path.parent}: the weights are those of {what}; this project trains Wan 2.2 only"
        )


def _check_unseen_sizes(arch: WanArch, config_path: Path) -> None:
    """What no tensor's shape tells has to be as published, where all that shapes tell is."""
    published = PUBLISHED[arch.variant.name]
    if replace(arch, **{key: getattr(published, key) for key in _NOT_IN_SHAPES}) != published:
        return
    for key in _NOT_IN_SHAPES:
        value, needed = getattr(arch, key), getattr(published, key)
        if value != needed:
            raise UserError(
                f"{config_path}: {key} = {value:g}, but {published.variant.name}, whose weights these are by their sizes, "
                f"has {needed:g}; download the file again"
            )


def describe_wan_21(shapes: dict[str, Shape]) -> str:
    """Which model of Wan 2.1 these weights are, where its shapes tell; empty for all else.

    The text-to-video model of 14 B has the very shapes of an expert of T2V-A14B, so it cannot be known here.
    """
    image_key = next((key for key in shapes if ".k_img." in key or key.startswith("img_emb.")), None)
    if image_key is not None:
        return f"a Wan 2.1 image-to-video model ({image_key} belongs to its image branch)"
    if shapes.get("blocks.0.ffn.0.weight") == _WAN_21_SMALL:
        return "Wan 2.1 T2V-1.3B (width 1536)"
    return ""


def variant_of_shapes(shapes: dict[str, Shape]) -> VariantInfo | None:
    """The variant that takes and gives as many channels as these weights; None where none does, or it cannot be told."""
    patch, head = shapes.get("patch_embedding.weight", ()), shapes.get("head.head.weight", ())
    if len(patch) != 5 or len(head) != 2:
        return None
    channels = (patch[1], head[0] // (PATCH_SIZE[0] * PATCH_SIZE[1] * PATCH_SIZE[2]))
    return next((info for info in VARIANTS.values() if (info.in_dim, info.out_dim) == channels), None)


def describe_mismatch(shapes: dict[str, Shape], expected: dict[str, Shape]) -> str:
    """How a header differs from the tensors a model should have: the first three differences, or nothing."""
    wrong = [
        f"{name} is {list(shapes[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    missing = [f"{name} is missing" for name in expected if name not in shapes]
    extra = [f"{name} is not one of its tensors" for name in shapes if name not in expected]
    problems = wrong + missing + extra
    more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more
