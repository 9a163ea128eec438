"""How a picture or clip is sampled: official defaults of each variant, and what it can make at all. No torch.

Sources: `wan/configs/wan_*.py` and `generate.py` of the official repository (Wan-Video/Wan2.2).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from models.wan.arch import NUM_TRAIN_TIMESTEPS, VariantInfo
from utils.config.schema import Expert, SolverName
from utils.errors import UserError

Shape4 = tuple[int, int, int, int]
# The rotary table of the published models has this many positions along each axis.
_MAX_POSITIONS = 1024


@dataclass(frozen=True)
class SamplingSettings:
    """Everything that a sample depends on beside the weights, the text, the seed and a first frame.

    Attributes:
        variant: whose latents these are.
        width, height: of the picture, in px.
        num_frames: 4n+1; 1 is a picture.
        steps: evaluations of the model along the way (each twice with guidance).
        shift: of the noise levels, sigma' = shift * sigma / (1 + (shift - 1) * sigma).
        guidance: scale of classifier-free guidance; of the high-noise expert where there are two. 1 is off.
        guidance_low_noise: that of the low-noise expert; None is the same.
        solver: of diffusers.
        reuse_text_keys: compute what the DiT makes of a text alone (its embedding, keys and values) once for all steps and
            keep it, and not in each step. No number depends on it.
    """

    variant: VariantInfo
    width: int
    height: int
    num_frames: int
    steps: int
    shift: float
    guidance: float
    guidance_low_noise: float | None = None
    solver: SolverName = "unipc"
    reuse_text_keys: bool = True

    @property
    def latent_shape(self) -> Shape4:
        """[C, F, H, W] of one sample's latents."""
        _, rows, columns = self.variant.vae_stride
        frames = self.variant.latent_frames(self.num_frames)
        return (self.variant.out_dim, frames, self.height // rows, self.width // columns)

    def expert_at(self, timestep: float) -> Expert | None:
        """The expert that a timestep (0 to 1000) belongs to; None where there is only one model."""
        boundary = self.variant.boundary
        if boundary is None:
            return None
        return "high_noise" if timestep >= boundary * NUM_TRAIN_TIMESTEPS else "low_noise"

    def guidance_at(self, timestep: float) -> float:
        """The guidance scale at a timestep (0 to 1000)."""
        if self.guidance_low_noise is None or self.expert_at(timestep) != "low_noise":
            return self.guidance
        return self.guidance_low_noise

    @property
    def is_guided(self) -> bool:
        """Whether any step needs the negative prompt."""
        return self.guidance > 1.0 or (self.guidance_low_noise or 0.0) > 1.0


@dataclass(frozen=True)
class _Official:
    steps: int
    shift: float
    guidance: float
    guidance_low_noise: float | None
    num_frames: int
    size: tuple[int, int]


_OFFICIAL = {
    "ti2v-5b": _Official(50, 5.0, 5.0, None, 121, (1280, 704)),
    "t2v-a14b": _Official(40, 12.0, 4.0, 3.0, 81, (1280, 720)),
    "i2v-a14b": _Official(40, 5.0, 3.5, 3.5, 81, (1280, 720)),
}


def official_settings(variant: VariantInfo) -> SamplingSettings:
    """What the official code samples this variant with."""
    official = _OFFICIAL[variant.name]
    width, height = official.size
    return SamplingSettings(
        variant,
        width,
        height,
        official.num_frames,
        official.steps,
        official.shift,
        official.guidance,
        official.guidance_low_noise,
    )


def size_for_image(settings: SamplingSettings, width: int, height: int) -> tuple[int, int]:
    """Width and height that the official code gives a sample with this image as its first frame.

    Within the area of `settings`, as near to the image's aspect ratio as each variant's code comes: for I2V both sides are
    rounded down (`wan/image2video.py`), for TI2V one side is, the other fills the area, and of the two the nearer ratio is
    taken (`best_output_size` in `wan/utils/utils.py`).
    """
    area, ratio, multiple = settings.width * settings.height, width / height, settings.variant.pixel_multiple

    def down(side: float) -> int:
        return max(1, int(side // multiple)) * multiple

    ideal_width = math.sqrt(area * ratio)
    ideal_height = area / ideal_width
    if settings.variant.model_type != "ti2v":
        return down(ideal_width), down(ideal_height)
    by_width = (down(ideal_width), down(area / down(ideal_width)))
    by_height = (down(area / down(ideal_height)), down(ideal_height))

    def distortion(size: tuple[int, int]) -> float:
        own = size[0] / size[1]
        return max(own / ratio, ratio / own)

    return by_width if distortion(by_width) < distortion(by_height) else by_height


def check_settings(settings: SamplingSettings, *, has_image: bool) -> None:
    """Refuse what the variant cannot make, naming the nearest that it can.

    Raises:
        UserError: the size, the number of frames, or a first frame that is missing or out of place.
    """
    for _, message in setting_faults(settings, has_image=has_image, named=lambda name: f"--{name}"):
        raise UserError(message)


def setting_faults(
    settings: SamplingSettings, *, has_image: bool, named: Callable[[str], str]
) -> Iterator[tuple[str, str]]:
    """What the variant cannot make: the setting at fault (as flags call it), and a message with the way out.

    Args:
        settings: to be looked at.
        has_image: whether there is a first frame.
        named: what messages call a setting, such as `--steps` for `steps`.
    """
    variant = settings.variant
    yield from _size_faults(settings)
    yield from _frame_faults(settings)
    image = named("image")
    if variant.model_type == "i2v" and not has_image:
        yield "image", f"{variant.name} makes clips of a first frame; give it with {image}"
    if has_image and variant.model_type == "t2v":
        yield (
            "image",
            f"{variant.name} takes no first frame; leave {image} out, or sample ti2v-5b or i2v-a14b",
        )
    if has_image and settings.num_frames == 1:
        yield (
            "frames",
            f"with {image} the first frame is given, so there is nothing to make of 1 frame; ask for 5",
        )
    if settings.steps < 1 or settings.steps > NUM_TRAIN_TIMESTEPS:
        yield (
            "steps",
            f"{named('steps')} {settings.steps}: write a number from 1 to {NUM_TRAIN_TIMESTEPS}",
        )
    yield from _scale_faults(settings, named)


def _scale_faults(settings: SamplingSettings, named: Callable[[str], str]) -> Iterator[tuple[str, str]]:
    for name, value in (
        ("shift", settings.shift),
        ("guidance", settings.guidance),
        ("guidance_low", settings.guidance_low_noise),
    ):
        if value is not None and not 0.0 < value < math.inf:
            yield name, f"{named(name)} {value:g}: write a number above 0"
        elif name != "shift" and value is not None and value < 1.0:
            yield (
                name,
                f"{named(name)} {value:g}: below 1 there is no guidance; write 1 to switch it off, or more",
            )
    if settings.guidance_low_noise is not None and not settings.variant.has_experts:
        yield (
            "guidance_low",
            f"{named('guidance_low')}: {settings.variant.name} has no low-noise expert; leave it out",
        )


def _size_faults(settings: SamplingSettings) -> Iterator[tuple[str, str]]:
    multiple = settings.variant.pixel_multiple
    given = (settings.width, settings.height)
    legal = tuple(min(max(1, round(side / multiple)), _MAX_POSITIONS) * multiple for side in given)
    if given != legal:
        yield (
            "size",
            f"{settings.width}x{settings.height} px: {settings.variant.name} makes widths and heights that are multiples of "
            f"{multiple}, up to {_MAX_POSITIONS * multiple}; the nearest is {legal[0]}x{legal[1]}",
        )


def _frame_faults(settings: SamplingSettings) -> Iterator[tuple[str, str]]:
    stride, frames = settings.variant.vae_stride[0], settings.num_frames
    most = (_MAX_POSITIONS - 1) * stride + 1
    if 1 <= frames <= most and frames % stride == 1:
        return
    below = min(max(1, (frames - 1) // stride * stride + 1), most)
    nearest = str(below) if frames < below or below == most else f"{below} or {below + stride}"
    yield (
        "frames",
        f"{frames} frames: {settings.variant.name} makes {stride}n+1 frames (1, {stride + 1}, {2 * stride + 1}, ...); the "
        f"nearest is {nearest}",
    )
