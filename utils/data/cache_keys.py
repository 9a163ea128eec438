"""Keys of cached items: a hash of everything that made an item, so that nothing stale is ever read."""

import json
import re
from collections.abc import Mapping

import xxhash

from utils.data.buckets import MediaRules
from utils.data.manifest import SampleRecord
from utils.data.media import PREPROCESSING_VERSION

Setting = str | int | float | bool | None
Parts = Mapping[str, object]

LATENTS, TEXT = "latents", "text"

_KEY = re.compile(r"([a-z_]+)/([0-9a-f]{32})")


def latent_parts(
    record: SampleRecord,
    rules: MediaRules,
    vae_hash: str,
    vae_dtype: str,
    settings: Mapping[str, Setting] | None = None,
) -> dict[str, object]:
    """What makes a sample's latents: file content, bucket, clip, preprocessing, weights and precision.

    The caption, the file's name and `num_repeats` do not enter; frame rate and clip start only for videos.

    Args:
        record: the sample.
        rules: of the model's variant.
        vae_hash: fingerprint of the VAE's weights.
        vae_dtype: precision it encodes in.
        settings: anything else that changes the result.
    """
    is_video = record.kind == "video"
    return {
        "content": record.content_hash,
        "bucket": [record.bucket.width, record.bucket.height, record.bucket.num_frames],
        "fps": float(rules.fps) if is_video else None,
        "clip_start_seconds": record.clip_start_seconds if is_video else None,
        "preprocessing": PREPROCESSING_VERSION,
        "weights": vae_hash,
        "dtype": vae_dtype,
        "settings": dict(settings or {}),
    }


def text_parts(
    caption: str,
    encoder_hash: str,
    tokenizer_hash: str,
    dtype: str,
    settings: Mapping[str, Setting] | None = None,
) -> dict[str, object]:
    """What makes a caption's embedding: the text, encoder and tokenizer weights, precision.

    Args:
        caption: as the sample has it.
        encoder_hash: fingerprint of the encoder's weights.
        tokenizer_hash: fingerprint of the tokenizer's files.
        dtype: precision the encoder runs in.
        settings: anything else that changes the result (attention implementation, longest length, ...).
    """
    return {
        "caption": caption,
        "weights": encoder_hash,
        "tokenizer": tokenizer_hash,
        "dtype": dtype,
        "settings": dict(settings or {}),
    }


def make_key(kind: str, parts: Parts) -> str:
    """`<kind>/<32 hex digits>`, equal exactly where all parts are equal."""
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return f"{kind}/{xxhash.xxh3_128_hexdigest(canonical.encode())}"


def split_key(key: str) -> tuple[str, bytes]:
    """Kind and digest (16 bytes).

    Raises:
        ValueError: `key` is not of the form `<kind>/<32 hex digits>`.
    """
    match = _KEY.fullmatch(key)
    if match is None:
        raise ValueError(f"{key!r} is not a cache key")
    return match[1], bytes.fromhex(match[2])
