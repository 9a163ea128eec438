"""Whether cached caption states were made with the encoder that a run names: by their keys, and by encoding some anew.

A key is a hash of caption, encoder, tokenizer and settings, so states of another encoder are never read by mistake as
long as the hash of the encoder's file is right. It is looked up in a memo by the file's size and time stamp, so it can
lie; values cannot. Nothing is written, neither into the cache nor into the run.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from models.wan.arch import VariantInfo
from models.wan.caching import EMPTY_CAPTION, WanCache, WeightHashes, all_captions, hash_weights
from models.wan.checkpoint import (
    CheckpointPaths,
    find_checkpoint,
    open_text_encoder,
    read_variant,
    text_encoder_sizes,
)
from models.wan.datasets import MEMO_FILE, scan_dataset
from models.wan.text_encoder import MAX_TEXT_TOKENS, TextEncoder, WanTokenizer
from utils.config.introspect import keys_of
from utils.config.schema import DatasetConfig, DType, LoadedConfig, ModelConfig, TrainConfig
from utils.data.cache import FORMAT_FILE, CacheStore
from utils.data.cache_keys import LATENTS, TEXT, make_key
from utils.data.cache_upkeep import open_existing
from utils.data.manifest import default_cache_dir
from utils.data.memo import HashMemo
from utils.data.reasons import MEMORY_FILE, MadeOf, Want, caption_identity
from utils.errors import UserError

Status = Literal["this encoder", "another encoder", "other settings", "damaged", "missing"]
STATUSES: tuple[Status, ...] = get_args(Status)
ATTENTIONS = get_args(keys_of(ModelConfig)["text_attn_implementation"].kind)
# Relative difference of states of one caption that the same encoder may show. What batching and padding alone do was
# measured at 24 layers: 2e-6 in float32 and 0.022 in bfloat16 (which is as far as bfloat16 is from float32: 0.020).
# The rest is for another device.
FLOORS = {"float32": 1e-4, "bfloat16": 0.05}
# How much farther apart than in two batchings here the same encoder's states may be.
SPREAD_FACTOR = 3.0
_BATCH_SIZE = 16


@dataclass(frozen=True)
class CaptionItem:
    """One caption's states in the cache.

    Attributes:
        identity: hash of the caption, which is itself never told.
        caption: for encoding it anew.
        file: the first file that has it; empty for the empty caption.
        key: under which training looks for it.
        status: what was found under that key, or else of the same caption.
        made_by: hash of the encoder that made what was found; empty where nothing was.
        damage: what is wrong with it, else empty.
    """

    identity: str
    caption: str
    file: str
    key: str
    status: Status
    made_by: str = ""
    damage: str = ""


@dataclass(frozen=True)
class EncoderShare:
    """How many items of text a cache has from one encoder in one precision, and where its file was."""

    fingerprint: str
    dtype: str
    num_items: int
    paths: tuple[str, ...]


@dataclass(frozen=True)
class DatasetCheck:
    """One dataset's part of its cache. `store` is None, and all counts are, where there is no cache."""

    label: str
    root: Path
    store: CacheStore | None
    items: tuple[CaptionItem, ...] = ()
    encoders: tuple[EncoderShare, ...] = ()
    num_latents: int = 0
    num_latents_missing: int = 0
    memo_hash: str = ""

    def count(self, status: Status) -> int:
        """Captions of this status."""
        return sum(item.status == status for item in self.items)


@dataclass(frozen=True)
class Comparison:
    """Cached states of one caption against the same encoded now.

    Attributes:
        identity: of the caption.
        num_tokens: of the caption.
        max_abs: largest difference of one number.
        relative: Frobenius norm of the difference over that of the states; infinite where shapes differ.
        cosine: smallest cosine of a token's two states; 0 where shapes differ.
        spread: `relative` between two batchings here.
        tolerance: what `relative` may be.
    """

    identity: str
    num_tokens: int
    max_abs: float
    relative: float
    cosine: float
    spread: float
    tolerance: float

    @property
    def is_match(self) -> bool:
        """Whether the same encoder may have made both. False too for what is not a number."""
        return self.relative <= self.tolerance


@dataclass(frozen=True)
class Checked:
    """Everything that keys tell: paths and hashes of what encodes, and each dataset."""

    paths: CheckpointPaths
    hashes: WeightHashes
    datasets: tuple[DatasetCheck, ...]


def check_keys(config: LoadedConfig, *, full_hash: bool) -> Checked:
    """Look every caption of the run's datasets up in their caches, and read each item's checksum.

    Args:
        config: of the run, with its datasets.
        full_hash: read the files of encoder, tokenizer and VAE instead of believing the memo about unchanged ones.

    Raises:
        UserError: weights or a dataset are missing, the encoder's file is no UMT5 encoder, or a cache has another format.
    """
    paths = find_checkpoint(config.train.model)
    check_text_encoder(paths.text_encoder)
    variant = read_variant(config.train.model)
    assert config.dataset is not None, "load_config with check_files has read it"
    named = [("dataset", config.dataset)]
    labels = [f"eval dataset {dataset.label}" for dataset in config.train.eval_datasets]
    named += zip(labels, config.eval_datasets, strict=True)
    real = hash_weights(paths, HashMemo()) if full_hash else None
    hashes = real
    checks = []
    for label, dataset in named:
        root = default_cache_dir(dataset)
        if not (root / FORMAT_FILE).is_file():
            checks.append(DatasetCheck(label, root, None))
            continue
        check, used = _check_dataset(label, dataset, config.train, variant, paths, real)
        checks.append(check)
        hashes = hashes or used
    return Checked(paths, hashes or WeightHashes("", "", ""), tuple(checks))


def check_text_encoder(path: Path) -> None:
    """By its header: a hash of any file can be compared, but only an encoder's says something.

    Raises:
        UserError: it is damaged, no UMT5 encoder, or only a part of one.
    """
    try:
        text_encoder_sizes(open_text_encoder(path).shapes)
    except UserError as error:
        where = "" if str(path) in str(error) else f"{path}: "
        raise UserError(f"{where}{error}") from None


def _check_dataset(
    label: str,
    dataset: DatasetConfig,
    config: TrainConfig,
    variant: VariantInfo,
    paths: CheckpointPaths,
    real: WeightHashes | None,
) -> tuple[DatasetCheck, WeightHashes]:
    root = default_cache_dir(dataset)
    memo = HashMemo(root / MEMO_FILE, read_only=True)
    manifest, in_memo = scan_dataset(dataset, variant, paths, memo)
    hashes = real or in_memo
    store = open_existing(root)
    cache = WanCache(manifest, store, hashes, config.model, variant)
    files: dict[str, str] = {}
    for sample in manifest.samples:
        for caption in sample.captions:
            files.setdefault(caption_identity(caption), str(sample.path))
    captions = {caption_identity(text): text for text in {EMPTY_CAPTION, *all_captions(manifest.samples)}}
    shares = _shares(store, memo)
    finder = _Finder(store, hashes, shares, MadeOf(root / MEMORY_FILE))
    items = tuple(
        finder.find(want, captions[want.identity], files.get(want.identity, "")) for want in cache.wants(TEXT)
    )
    check = DatasetCheck(
        label=label,
        root=root,
        store=store,
        items=items,
        encoders=shares,
        num_latents=len({want.key for want in cache.wants(LATENTS)}),
        num_latents_missing=len(cache.missing(LATENTS)),
        memo_hash=in_memo.text_encoder,
    )
    return check, hashes


def _shares(store: CacheStore, memo: HashMemo) -> tuple[EncoderShare, ...]:
    """Who made the items of text, by what is written in each of them; most items first."""
    counts: Counter[tuple[str, str]] = Counter()
    for key in store.keys(TEXT):
        try:
            metadata = store.metadata(key)
        except (KeyError, ValueError):
            metadata = {}
        counts[metadata.get("text_encoder", ""), metadata.get("dtype", "")] += 1
    return tuple(
        EncoderShare(fingerprint, dtype, count, tuple(memo.paths_of(fingerprint)) if fingerprint else ())
        for (fingerprint, dtype), count in counts.most_common()
    )


class _Finder:
    """Looks for a caption's states: those that training reads, else those that something else has made."""

    def __init__(
        self, store: CacheStore, hashes: WeightHashes, shares: Sequence[EncoderShare], made_of: MadeOf
    ) -> None:
        self._store = store
        self._hashes = hashes
        known = made_of.known(TEXT)
        before = [(str(parts.get("weights")), str(parts.get("dtype"))) for parts in known.values()]
        self._makers = list(dict.fromkeys([*((share.fingerprint, share.dtype) for share in shares), *before]))
        self._makers += [(hashes.text_encoder, dtype) for dtype in get_args(DType)]
        self._tokenizers = {hashes.tokenizer, *(str(parts.get("tokenizer")) for parts in known.values())}

    def find(self, want: Want, caption: str, file: str) -> CaptionItem:
        """What there is of a caption."""
        item = CaptionItem(want.identity, caption, file, want.key, "missing")
        if not self._store.has(want.key):
            return self._of_another(item, want)
        damage = self._store.damage(want.key)
        if damage is not None:
            return CaptionItem(want.identity, caption, file, want.key, "damaged", damage=damage)
        # The key says so; what is written in the item has to agree.
        made_by = self._store.metadata(want.key).get("text_encoder", self._hashes.text_encoder)
        status: Status = "this encoder" if made_by == self._hashes.text_encoder else "another encoder"
        return CaptionItem(want.identity, caption, file, want.key, status, made_by)

    def _of_another(self, item: CaptionItem, want: Want) -> CaptionItem:
        """An item of the same caption, as another encoder, precision, tokenizer or attention would name it.

        Of this encoder before others: that one lies there too is no trouble. Of several the newest.
        """
        newest, found = (False, -1), item
        for weights, dtype in self._makers:
            for tokenizer in self._tokenizers:
                for attention in ATTENTIONS:
                    settings = {"attention": attention, "max_tokens": MAX_TEXT_TOKENS}
                    other = {"weights": weights, "dtype": dtype, "tokenizer": tokenizer, "settings": settings}
                    place = self._store.place(make_key(TEXT, {**want.parts, **other}))
                    is_own = weights == self._hashes.text_encoder
                    if place is None or (is_own, place.entry.written_ns) <= newest:
                        continue
                    newest = (is_own, place.entry.written_ns)
                    status: Status = "other settings" if is_own else "another encoder"
                    found = CaptionItem(item.identity, item.caption, item.file, item.key, status, weights)
        return found


def compare(
    items: Iterable[tuple[CaptionItem, CacheStore]],
    config: ModelConfig,
    paths: CheckpointPaths,
    device: torch.device,
) -> list[Comparison]:
    """Encode captions anew, as the cache was filled, and compare with what is in it.

    Each is encoded alone and once more in a batch, padded, because the cache may have been filled in either way; the
    nearer of the two counts, and how far they are from each other says how exact the comparison can be.

    Raises:
        UserError: the encoder cannot be read.
        ValueError, KeyError: an item is damaged or gone since it was looked up.
    """
    chosen = list(items)
    encoder = TextEncoder(
        paths.text_encoder,
        WanTokenizer(paths.tokenizer_dir),
        getattr(torch, config.dtype),
        device,
        config.text_attn_implementation,
    )
    comparisons = []
    for start in range(0, len(chosen), _BATCH_SIZE):
        batch = chosen[start : start + _BATCH_SIZE]
        together = list(encoder.encode([item.caption for item, _ in batch]))
        for (item, store), batched_LD in zip(batch, together, strict=True):
            (alone_LD,) = encoder.encode([item.caption])
            cached_LD = store.peek(item.key)["states"]
            comparisons.append(
                compare_states(item.identity, cached_LD, alone_LD, batched_LD, FLOORS[config.dtype])
            )
    return comparisons


def compare_states(
    identity: str, cached_LD: Tensor, alone_LD: Tensor, batched_LD: Tensor, floor: float
) -> Comparison:
    """Cached states [L, D] against two encodings of the same caption; the tolerance is at least `floor`."""
    spread = _relative(batched_LD, alone_LD)
    now_LD = min((alone_LD, batched_LD), key=lambda states_LD: _relative(cached_LD, states_LD))
    is_alike = cached_LD.shape == now_LD.shape
    cached, now = cached_LD.double(), now_LD.double()
    return Comparison(
        identity=identity,
        num_tokens=alone_LD.shape[0],
        max_abs=float((cached - now).abs().max()) if is_alike else float("inf"),
        relative=_relative(cached_LD, now_LD),
        cosine=float(torch.nn.functional.cosine_similarity(cached, now, dim=-1).min()) if is_alike else 0.0,
        spread=spread,
        tolerance=max(floor, SPREAD_FACTOR * spread),
    )


def _relative(states_LD: Tensor, reference_LD: Tensor) -> float:
    if states_LD.shape != reference_LD.shape:
        return float("inf")
    reference = reference_LD.double()
    return float((states_LD.double() - reference).norm() / reference.norm())
