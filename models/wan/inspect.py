"""A dataset as a Wan 2.2 variant sees it: manifest, caption lengths, plan and noise levels. No weights are opened."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from models.wan.arch import VariantInfo
from models.wan.caching import all_captions
from models.wan.checkpoint import has_tokenizer, locate, read_variant
from models.wan.datasets import data_fingerprint
from models.wan.media import MEMO_FILE, media_rules, without_images
from models.wan.noise import build_sigma_law
from models.wan.text_encoder import WanTokenizer
from utils.config.schema import DatasetConfig, TrainConfig
from utils.data.buckets import MediaRules, build_buckets
from utils.data.inspect import RunLength, printable, run_length
from utils.data.manifest import BAD_FILE_CODES, Manifest, build_manifest, default_cache_dir
from utils.data.memo import HashMemo
from utils.data.sampler import BatchPlan
from utils.sigma_law import SigmaBin, SigmaLaw, sigma_histogram

__all__ = ["Inspection", "SigmaBin", "count_tokens", "inspect_dataset", "sigma_histogram"]


@dataclass(frozen=True)
class Inspection:
    """What training would work with.

    Attributes:
        variant: the model's, by its `config.json`.
        rules: what clips must look like for it.
        manifest: may be empty.
        unused_lengths: clip lengths in frames that are configured and hold no sample.
        stops_at: files at which training would stop, because of `on_bad_file` or `missing_caption` = "error".
        caption_tokens: number of tokens of each caption before it is cut; None without a tokenizer.
        plan: the order of micro-batches; None where nothing is left.
        length: of the run; None where nothing is left.
        law: of the noise level.
        fingerprint: the same that a run records of the dataset; None where nothing is left.
    """

    variant: VariantInfo
    rules: MediaRules
    manifest: Manifest
    unused_lengths: tuple[int, ...]
    stops_at: tuple[str, ...]
    caption_tokens: dict[str, int] | None
    plan: BatchPlan | None
    length: RunLength | None
    law: SigmaLaw
    fingerprint: str | None


def inspect_dataset(config: TrainConfig, dataset: DatasetConfig) -> Inspection:
    """Examine every file and count what training would make of them.

    Rules that stop training at a bad file do not stop this: such files are in `stops_at`. Nothing is written; what
    an earlier run remembered about unchanged files is used.

    Raises:
        UserError: the variant or the noise range cannot be settled, a directory is missing, or keys are illegal.
    """
    variant = read_variant(config.model)
    law = build_sigma_law(config.model, variant)
    rules = media_rules(variant)
    memo = HashMemo(default_cache_dir(dataset) / MEMO_FILE, read_only=True)
    manifest = build_manifest(_without_stops(dataset), rules, memo, allow_empty=True)
    stops_at = _stops_at(dataset, manifest)
    if variant.model_type == "i2v":
        manifest = without_images(manifest, allow_empty=True)
    plan = length = fingerprint = None
    if manifest.samples:
        plan = BatchPlan(manifest.samples, config.micro_batch_size_per_gpu, config.seed)
        length = run_length(config, plan)
        fingerprint = data_fingerprint(manifest)
    tokens = count_tokens(config, all_captions(manifest.samples))
    return Inspection(
        variant=variant,
        rules=rules,
        manifest=manifest,
        unused_lengths=_unused_lengths(dataset, rules, manifest),
        stops_at=stops_at,
        caption_tokens=tokens,
        plan=plan,
        length=length,
        law=law,
        fingerprint=fingerprint,
    )


def _without_stops(dataset: DatasetConfig) -> DatasetConfig:
    caption_rule = "skip" if dataset.missing_caption == "error" else dataset.missing_caption
    return replace(dataset, on_bad_file="skip", missing_caption=caption_rule)


def _unused_lengths(dataset: DatasetConfig, rules: MediaRules, manifest: Manifest) -> tuple[int, ...]:
    configured = {
        bucket.num_frames
        for directory in dataset.directory
        for bucket in build_buckets(dataset, directory, rules)
    }
    return tuple(sorted(configured - {sample.bucket.num_frames for sample in manifest.samples}))


def _stops_at(dataset: DatasetConfig, manifest: Manifest) -> tuple[str, ...]:
    codes = set(BAD_FILE_CODES) if dataset.on_bad_file == "error" else set()
    if dataset.missing_caption == "error":
        codes.add("no_caption")
    return tuple(
        printable(f"{entry.path}: {entry.reason}") for entry in manifest.skipped if entry.code in codes
    )


def count_tokens(config: TrainConfig, captions: Iterable[str]) -> dict[str, int] | None:
    """Tokens of each caption before it is cut, with the end token; None where the model has no tokenizer yet."""
    directory = locate(config.model)[0].tokenizer_dir
    if not has_tokenizer(directory):
        return None
    tokenizer = WanTokenizer(directory)
    return {caption: tokenizer.count(caption) for caption in captions}
