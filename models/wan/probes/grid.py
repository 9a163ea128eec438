"""What prompt_grid draws and how it measures: its columns, its cells, and the change that each column makes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from models.wan.arch import VariantInfo
from models.wan.probes.encoder_prompts import Entry, Group
from models.wan.probes.encoder_subject import SAVED_ENCODER
from models.wan.sample_adapters import choose_adapters, parse_weighted
from utils.errors import UserError
from utils.paired import Paired, paired_difference
from utils.saved_runs import find_saved_file, last_saved
from utils.tensor_source import open_safetensors

if TYPE_CHECKING:
    import numpy as np

    from models.wan.sample_job import SampleJob, Variation, Where

BASE = "base"
# What the files of a column are called among the inputs of a report.
ADAPTER_ROLE = "adapter of {name} (weight {weight})"
ENCODER_ROLE = "text_encoder of {name}"


@dataclass(frozen=True)
class Column:
    """A way to draw: its name, and what is put into the base."""

    name: str
    adapters: tuple[str, ...] = ()
    text_encoder: Path | None = None

    def variation(self, variant: VariantInfo) -> "Variation":
        """For the sampler.

        Raises:
            UserError: an adapter is missing, or is for another variant, or does not say for which expert it is.
        """
        from models.wan.sample_job import Variation

        mend = 'give a file whose metadata hold expert = "high_noise" or "low_noise"'
        adapters = choose_adapters(variant, self.adapters, flag=f"--run {self.name}:", mend=mend)
        return Variation(tuple(adapters), self.text_encoder)


@dataclass(frozen=True)
class Cell:
    """One prompt drawn with one seed in one column, held against the base.

    Attributes:
        entry: the prompt.
        seed: of the noise.
        column: its name.
        latent_distance: ||z - z_base|| / ||z_base|| of the latents.
        ssim: structural similarity of the decoded pixels to the base's.
    """

    entry: Entry
    seed: int
    column: str
    latent_distance: float
    ssim: float

    @property
    def change(self) -> float:
        """1 - SSIM: 0 where the picture stayed."""
        return 1.0 - self.ssim


@dataclass(frozen=True)
class Change:
    """The mean change that a column makes to a group of prompts, with its interval at 95 %.

    Attributes:
        column, group: whose and of which prompts.
        by_prompt: the mean change of each prompt over its seeds, which are not independent of one another.
        change: mean over prompts, and the ends of its interval; a change is never below 0.
        latent_distance: mean over cells.
    """

    column: str
    group: Group
    by_prompt: tuple[float, ...]
    change: Paired
    latent_distance: float


def parse_column(text: str) -> Column:
    """`NAME=PATH[+PATH ...]`: each PATH an adapter (`:WEIGHT` behind it), a tuned encoder, or a run that saved one.

    Raises:
        UserError: a name or path is missing, or two encoders are named.
    """
    name, equals, rest = text.partition("=")
    if not equals or not name or not rest:
        raise UserError(
            f"--run {text!r}: write NAME=PATH, or NAME=PATH+PATH for an encoder and an adapter together"
        )
    if name == BASE:
        raise UserError(
            f"--run {text!r}: the name {BASE!r} is that of the checkpoint without anything; choose another"
        )
    adapters: list[str] = []
    encoders: list[Path] = []
    for part in rest.split("+"):
        encoder = _encoder_at(parse_weighted(part)[0])
        if encoder is None:
            adapters.append(part)
        else:
            encoders.append(encoder)
    if len(encoders) > 1:
        raise UserError(
            f"--run {text!r}: names two text encoders ({encoders[0]}, {encoders[1]}); one can be used at a time"
        )
    return Column(name, tuple(adapters), encoders[0] if encoders else None)


def _encoder_at(path: Path) -> Path | None:
    """The tuned encoder that a path means, None where it means an adapter."""
    if path.is_dir():
        is_one = (path / SAVED_ENCODER.name).is_file() or last_saved(path, SAVED_ENCODER) is not None
        return find_saved_file(path, SAVED_ENCODER) if is_one else None
    if path.suffix == ".pth":
        return path
    if not path.is_file():
        return None  # whoever reads the adapter says that it is missing
    names = open_safetensors([path]).shapes
    starts = ("shared.", "encoder.block.", "token_embedding.")
    return path if any(name.startswith(starts) for name in names) else None


def draw_cells(
    job: "SampleJob", where: "Where", entries: Sequence[Entry], columns: Sequence[Column]
) -> "tuple[list[Cell], dict[str, list[np.ndarray]]]":
    """Draw everything, and hold each column against the first, which is the base.

    Args:
        job: with a variation for each of `columns`, the base first, and a prompt for each of `entries`.
        where: to compute.
        entries: of each sample.
        columns: the base and the others.

    Returns:
        The cells of all columns but the base, and the frames (uint8 [F, H, W, 3]) of every column's samples.
    """
    from models.wan.pictures import to_frames
    from models.wan.sample_job import decode, sample
    from utils.picture_change import structural_similarity

    latents = sample(job, where)
    where.say("decoding")
    frames = {
        column.name: [to_frames(video) for video in videos]
        for column, videos in zip(columns, decode(job, latents, where), strict=True)
    }
    cells = []
    for column, own in zip(columns[1:], latents[1:], strict=True):
        for index, (entry, seed) in enumerate(zip(entries, job.seeds, strict=True)):
            base = latents[0][index].double()
            distance = ((own[index].double() - base).norm() / base.norm()).item()
            pixels, base_pixels = frames[column.name][index], frames[columns[0].name][index]
            cells.append(Cell(entry, seed, column.name, distance, structural_similarity(pixels, base_pixels)))
    return cells, frames


def summarise(cells: Sequence[Cell]) -> list[Change]:
    """The change that each column makes to each group of prompts."""
    keys = dict.fromkeys((cell.column, cell.entry.group) for cell in cells)
    return [_change([cell for cell in cells if (cell.column, cell.entry.group) == key]) for key in keys]


def _change(own: Sequence[Cell]) -> Change:
    by_prompt = tuple(_means_by_prompt(own))
    change = paired_difference(by_prompt, [0.0] * len(by_prompt))
    if change.low is not None:
        change = replace(change, low=max(0.0, change.low))
    distance = fmean(cell.latent_distance for cell in own)
    return Change(own[0].column, own[0].entry.group, by_prompt, change, distance)


def _means_by_prompt(cells: Sequence[Cell]) -> Iterator[float]:
    for number in dict.fromkeys(cell.entry.number for cell in cells):
        yield fmean(cell.change for cell in cells if cell.entry.number == number)
