import os
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

from models.wan.arch import VARIANTS
from models.wan.caching import (
    EMPTY_CAPTION,
    LatentFilling,
    WanCache,
    WeightHashes,
    build_filling,
    first_frame_condition,
    hash_weights,
    media_rules,
)
from models.wan.checkpoint import VAE_FILES, find_checkpoint
from models.wan.text_encoder import TextEncoder, WanTokenizer
from models.wan.vae import WanVae, load_vae
from utils.config.schema import DatasetConfig, DirectoryConfig, ModelConfig
from utils.data.cache import CacheStore
from utils.data.manifest import Manifest, build_manifest
from utils.data.media import load_clip
from utils.data.memo import HashMemo
from utils.distributed import Processes
from utils.errors import UserError

CPU = torch.device("cpu")
ALONE = Processes(rank=0, local_rank=0, world_size=1, device=CPU)
HASHES = WeightHashes(vae="vae", text_encoder="encoder", tokenizer="tokenizer")


def silent(done: int, total: int) -> None:
    pass


def model_config(root, **values) -> ModelConfig:
    defaults = {
        "type": "wan",
        "ckpt_path": str(root),
        "dtype": "float32",
        "cache_text_embeddings": True,
        "train_text_encoder": False,
        "freeze_transformer": True,
    }
    return ModelConfig(**(defaults | values))


@pytest.fixture(scope="module")
def i2v(tiny_i2v):
    config = model_config(tiny_i2v, expert="low_noise")
    return config, find_checkpoint(config), VARIANTS["i2v-a14b"]


@pytest.fixture(scope="module")
def manifest(tiny_dataset, tmp_path_factory):
    """One short video and one image of the dataset, in a folder of their own."""
    folder = tmp_path_factory.mktemp("two")
    chosen = [next(path for path in sorted(tiny_dataset.rglob(f"*{kind}"))) for kind in (".mp4", ".png")]
    for path in chosen:
        shutil.copy(path, folder / path.name)
        (folder / path.name).with_suffix(".txt").write_text(f"a caption of {path.stem}")
    dataset = DatasetConfig(
        resolutions=(48,),
        num_ar_buckets=1,
        enable_ar_bucket=False,
        frame_buckets=(1, 5),
        directory=(DirectoryConfig(path=str(folder)),),
    )
    made = build_manifest(dataset, media_rules(VARIANTS["i2v-a14b"]), HashMemo())
    assert sorted(sample.bucket.num_frames for sample in made.samples) == [1, 5]
    return made


@pytest.fixture(scope="module")
def vae(tiny_i2v):
    return load_vae(tiny_i2v / VAE_FILES["2.1"], torch.float32, CPU)


@pytest.fixture(scope="module")
def pipeline(tiny_i2v):
    """diffusers' own image-to-video pipeline around a VAE that its own converter prepared."""
    module = AutoencoderKLWan(base_dim=8)
    state = torch.load(tiny_i2v / VAE_FILES["2.1"], weights_only=True)
    module.load_state_dict(convert_wan_vae_to_diffusers(state), strict=True)
    return WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=module.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


@pytest.mark.parametrize("num_frames", [1, 5, 9])
def test_the_first_frame_is_given_to_the_model_as_diffusers_gives_it(num_frames, vae, pipeline):
    generator = torch.Generator().manual_seed(0)
    video_BCFHW = torch.rand(1, 3, num_frames, 32, 48, generator=generator) * 2 - 1
    with torch.no_grad():
        _, theirs = pipeline.prepare_latents(
            video_BCFHW[:, :, 0],
            batch_size=1,
            height=32,
            width=48,
            num_frames=num_frames,
            dtype=torch.float32,
            device=CPU,
        )
    ours = first_frame_condition(video_BCFHW, vae)
    assert ours.shape == (1, 20, (num_frames - 1) // 4 + 1, 4, 6)
    # Measured: at most 2.4e-7.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-6)


def test_the_first_frames_mask_and_filling_are_the_official_ones(vae):
    """The official recipe: a mask of pixel frames folded by four, and grey (0 in [-1, 1]) frames through the VAE."""
    video_BCFHW = torch.rand(1, 3, 9, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask_frames = torch.zeros(12)
    mask_frames[:4] = 1  # the first of 9 frames counts four times
    mask = mask_frames.view(3, 4).T.view(1, 4, 3, 1, 1).expand(1, 4, 3, 2, 2)
    grey = torch.zeros(1, 3, 8, 16, 16)
    encoded = vae.encode(torch.cat((video_BCFHW[:, :, :1], grey), dim=2))
    condition = first_frame_condition(video_BCFHW, vae)
    assert torch.equal(condition, torch.cat((mask, encoded), dim=1))
    # Nothing of the later frames is given away.
    other = video_BCFHW.clone()
    other[:, :, 1:] = 0.7
    assert torch.equal(first_frame_condition(other, vae), condition)


def test_the_video_that_was_given_is_left_as_it_was(vae):
    video_BCFHW = torch.rand(1, 3, 5, 16, 16)
    before = video_BCFHW.clone()
    first_frame_condition(video_BCFHW, vae)
    assert torch.equal(video_BCFHW, before)


def make_cache(manifest, root, config, variant, hashes=HASHES) -> WanCache:
    return WanCache(manifest, CacheStore(root), hashes, config, variant)


def test_latents_are_encoded_once_and_read_back(manifest, i2v, vae, tmp_path):
    config, paths, variant = i2v
    calls = []
    first = make_cache(manifest, tmp_path, config, variant)
    stats = first.fill_latents(paths, ALONE, False, lambda done, total: calls.append((done, total)))
    assert (stats.num_items, stats.num_encoded) == (2, 2)
    assert calls == [(0, 2), (1, 2), (2, 2)]
    again = make_cache(manifest, tmp_path, config, variant)
    assert again.fill_latents(paths, ALONE, False, silent).num_encoded == 0
    assert again.fill_latents(paths, ALONE, True, silent).num_encoded == 2
    for index, sample in enumerate(manifest.samples):
        item = again.read_latents(index)
        video_BCFHW = load_clip(sample, media_rules(variant)).unsqueeze(0)
        assert torch.equal(item["latents"], vae.encode(video_BCFHW)[0])
        assert torch.equal(item["cond"], first_frame_condition(video_BCFHW, vae)[0])
        assert item["latents"].dtype == torch.float32


@pytest.fixture(scope="module")
def images(tiny_dataset, tmp_path_factory):
    """Four images and two videos of a bucket each, as samples."""
    folder = tmp_path_factory.mktemp("several")
    for kind, count in ((".png", 4), (".mp4", 2)):
        for path in sorted(tiny_dataset.rglob(f"*{kind}"))[:count]:
            shutil.copy(path, folder / path.name)
            (folder / path.name).with_suffix(".txt").write_text("a shape")
    dataset = DatasetConfig(
        resolutions=(48,),
        enable_ar_bucket=False,
        frame_buckets=(1, 5),
        directory=(DirectoryConfig(path=str(folder)),),
    )
    return build_manifest(dataset, media_rules(VARIANTS["i2v-a14b"]), HashMemo())


def test_batches_and_workers_change_neither_keys_nor_more_than_the_last_bits(
    images, i2v, tmp_path, monkeypatch
):
    monkeypatch.setattr("utils.data.decode.MIN_CLIPS_PER_WORKER", 1)
    config, paths, variant = i2v
    made = {}
    for name, how in {
        "alone": LatentFilling(),
        "ahead": LatentFilling(decode_workers=1),
        "batched": LatentFilling(batch_size=3),
    }.items():
        cache = make_cache(images, tmp_path / name, config, variant)
        assert cache.fill_latents(paths, ALONE, False, silent, how).num_encoded == 6
        made[name] = [cache.read_latents(index) for index in range(6)]
    for alone, ahead, batched in zip(*made.values(), strict=True):
        for part in ("latents", "cond"):
            assert torch.equal(ahead[part], alone[part])
            # Measured: at most 4.8e-6 for latents up to 4.
            torch.testing.assert_close(batched[part], alone[part], rtol=0, atol=2e-5)


def test_batches_are_of_one_bucket_and_as_large_as_asked(images, i2v, tmp_path, monkeypatch):
    config, paths, _ = i2v
    shapes = []
    encode = WanVae.encode

    def watched(self, video_BCFHW):
        shapes.append(tuple(video_BCFHW.shape))
        return encode(self, video_BCFHW)

    monkeypatch.setattr(WanVae, "encode", watched)
    cache = make_cache(images, tmp_path, config, VARIANTS["t2v-a14b"])
    cache.fill_latents(paths, ALONE, False, silent, LatentFilling(batch_size=3))
    assert sorted(shapes) == [(1, 3, 1, 48, 48), (2, 3, 5, 48, 48), (3, 3, 1, 48, 48)]


def test_a_gpu_without_memory_is_told_with_what_to_do(images, i2v, tmp_path, monkeypatch):
    config, paths, variant = i2v

    def full(self, video_BCFHW):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(WanVae, "encode", full)
    cache = make_cache(images, tmp_path, config, variant)
    with pytest.raises(UserError, match=r"3 clip\(s\) of \[1, 48, 48\].*caching_batch_size"):
        cache.fill_latents(paths, ALONE, False, silent, LatentFilling(batch_size=3))


def test_content_that_is_not_what_its_key_says_is_not_encoded(images, i2v, tmp_path):
    """The key was made with a hash on trust; nothing may be put under it that another file made."""
    config, paths, variant = i2v
    on_trust = replace(images.samples[0], content_hash="0" * 32, mtime_ns=None)
    samples = (on_trust, *images.samples[1:])
    cache = make_cache(Manifest(samples, ()), tmp_path, config, variant)
    with pytest.raises(UserError, match="--trust_cache"):
        cache.fill_latents(paths, ALONE, False, silent, LatentFilling())
    with pytest.raises(UserError, match="missing"):
        cache.read_latents(0)


def test_a_file_that_changes_between_scan_and_filling_is_not_encoded(images, i2v, tmp_path):
    """Latents of the new content must not come under the key of the old one, for which they would be found ever after."""
    config, paths, variant = i2v
    moving = tmp_path / "moving.png"
    shutil.copy(images.samples[0].path, moving)
    sample = replace(images.samples[0], path=moving, mtime_ns=moving.stat().st_mtime_ns)
    cache = make_cache(Manifest((sample,), ()), tmp_path, config, variant)
    old = moving.read_bytes()
    shutil.copy(images.samples[1].path, moving)
    with pytest.raises(UserError, match="when the dataset was scanned"):
        cache.fill_latents(paths, ALONE, False, silent)
    with pytest.raises(UserError, match="missing"):
        cache.read_latents(0)
    moving.write_bytes(old)  # another time stamp, the same content
    assert cache.fill_latents(paths, ALONE, False, silent).num_encoded == 1


def test_the_configuration_says_how_latents_are_made(make_config, monkeypatch):
    plain = {"skip_bad": False}
    assert build_filling(make_config("dit_lora", decode_workers=0), 1, **plain) == LatentFilling()
    config = make_config("dit_lora", decode_workers=7, caching_batch_size=4)
    assert build_filling(config, 8, skip_bad=True) == LatentFilling(4, 7, True)
    monkeypatch.setattr("models.wan.caching.automatic_workers", lambda ranks: 100 + ranks)
    assert build_filling(make_config("dit_lora"), 8, **plain).decode_workers == 108


def test_other_variants_are_not_conditioned(manifest, i2v, tmp_path):
    config, paths, variant = i2v
    cache = make_cache(manifest, tmp_path, config, VARIANTS["t2v-a14b"])
    cache.fill_latents(paths, ALONE, False, silent)
    assert set(cache.read_latents(0)) == {"latents"}
    # ... and what was made for one is not taken for the other.
    with pytest.raises(UserError):
        make_cache(manifest, tmp_path, config, variant).read_latents(0)


def test_every_caption_of_a_file_is_encoded(manifest, i2v, tmp_path):
    config, paths, variant = i2v
    first, *others = manifest.samples
    several = Manifest((replace(first, captions=("a disc", *first.captions, "a disc")), *others), ())
    cache = make_cache(several, tmp_path, config, variant)
    tokenizer = WanTokenizer(paths.tokenizer_dir)
    assert cache.fill_text(paths, tokenizer, ALONE, False, silent).num_encoded == 4
    assert len(cache.read_text("a disc")) == len(tokenizer("a disc"))
    # What is there of the other dataset is not made again.
    assert (
        make_cache(manifest, tmp_path, config, variant)
        .fill_text(paths, tokenizer, ALONE, False, silent)
        .num_encoded
        == 0
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_captions_are_encoded_at_their_true_length(dtype, manifest, i2v, tiny_i2v, tmp_path):
    _, paths, variant = i2v
    config = model_config(tiny_i2v, expert="low_noise", dtype=dtype)
    tokenizer = WanTokenizer(paths.tokenizer_dir)
    cache = make_cache(manifest, tmp_path, config, variant)
    assert cache.fill_text(paths, tokenizer, ALONE, False, silent).num_encoded == 3
    assert cache.fill_text(paths, tokenizer, ALONE, False, silent).num_encoded == 0
    encoder = TextEncoder(paths.text_encoder, tokenizer, getattr(torch, dtype), CPU, "sdpa")
    for caption in (EMPTY_CAPTION, *(sample.caption for sample in manifest.samples)):
        states_LD = cache.read_text(caption)
        assert states_LD.shape == (len(tokenizer(caption)), 64)
        assert states_LD.dtype == getattr(torch, dtype)
        (alone,) = encoder.encode([caption])
        # There it was encoded in a batch. Measured: 9.5e-7 in float32, 0 in bfloat16 (whose last place is 2e-2).
        tolerance = 5e-6 if dtype == "float32" else 0.1
        torch.testing.assert_close(states_LD, alone, rtol=0, atol=tolerance)


CHANGES = {
    "another VAE": (WeightHashes("other", "encoder", "tokenizer"), {}, 2, 0),
    "another encoder": (WeightHashes("vae", "other", "tokenizer"), {}, 0, 3),
    "another tokenizer": (WeightHashes("vae", "encoder", "other"), {}, 0, 3),
    "another precision of the VAE": (HASHES, {"vae_dtype": "bfloat16"}, 2, 0),
    "another precision of the encoder": (HASHES, {"dtype": "bfloat16"}, 0, 3),
    "another attention": (HASHES, {"text_attn_implementation": "eager"}, 0, 3),
    "another law of the noise level": (HASHES, {"shift": 5.0}, 0, 0),
}


@pytest.mark.parametrize(("hashes", "values", "num_latents", "num_texts"), CHANGES.values(), ids=CHANGES)
def test_nothing_made_by_something_else_is_ever_used(
    hashes, values, num_latents, num_texts, manifest, i2v, tiny_i2v, filled, tmp_path
):
    _, paths, variant = i2v
    root = tmp_path / "store"
    shutil.copytree(filled, root)
    cache = make_cache(manifest, root, model_config(tiny_i2v, expert="low_noise", **values), variant, hashes)
    assert cache.fill_latents(paths, ALONE, False, silent).num_encoded == num_latents
    assert (
        cache.fill_text(paths, WanTokenizer(paths.tokenizer_dir), ALONE, False, silent).num_encoded
        == num_texts
    )


@pytest.fixture(scope="module")
def filled(manifest, i2v, tmp_path_factory):
    """A full cache made with HASHES."""
    config, paths, variant = i2v
    root = tmp_path_factory.mktemp("cache") / "store"
    cache = make_cache(manifest, root, config, variant)
    assert cache.fill_latents(paths, ALONE, False, silent).num_encoded == 2
    assert cache.fill_text(paths, WanTokenizer(paths.tokenizer_dir), ALONE, False, silent).num_encoded == 3
    return root


def test_a_warm_cache_opens_no_weights(manifest, i2v, filled, tmp_path):
    config, paths, variant = i2v
    nothing = type(paths)(*(tmp_path / "absent" for _ in range(5)))
    cache = make_cache(manifest, filled, config, variant)
    assert cache.fill_latents(nothing, ALONE, False, silent).num_encoded == 0
    assert cache.fill_text(nothing, WanTokenizer(paths.tokenizer_dir), ALONE, False, silent).num_encoded == 0


def test_ranks_share_the_work(manifest, i2v, tmp_path):
    config, paths, variant = i2v
    counts = []
    for rank in (0, 1):
        cache = make_cache(manifest, tmp_path, config, variant)
        counts.append(cache.fill_latents(paths, Processes(rank, rank, 2, CPU), False, silent).num_encoded)
    assert counts == [1, 1]
    assert (
        make_cache(manifest, tmp_path, config, variant).fill_latents(paths, ALONE, False, silent).num_encoded
        == 0
    )


def test_hashes_follow_the_content_of_each_file(tiny_i2v, i2v, tmp_path):
    config, paths, _ = i2v
    root = tmp_path / "copy"
    shutil.copytree(tiny_i2v, root)
    copied = find_checkpoint(model_config(root, expert=config.expert))
    original = hash_weights(paths, HashMemo())
    assert hash_weights(copied, HashMemo()) == original
    # Another encoder has the same size: weights are never taken on trust.
    memo = HashMemo(tmp_path / "memo", trust_sizes=True)
    before = hash_weights(copied, memo)
    flipped = copied.text_encoder.read_bytes()[:-1] + b"?"
    copied.text_encoder.write_bytes(flipped)
    os.utime(copied.text_encoder, ns=(1, 1))
    assert hash_weights(copied, memo).text_encoder != before.text_encoder
    shutil.copy(paths.text_encoder, copied.text_encoder)
    with copied.text_encoder.open("ab") as file:
        file.write(b"x")
    changed = hash_weights(copied, HashMemo())
    assert changed.text_encoder != original.text_encoder
    assert (changed.vae, changed.tokenizer) == (original.vae, original.tokenizer)
    config_file = copied.tokenizer_dir / "tokenizer_config.json"
    config_file.write_text(config_file.read_text() + "\n")
    assert hash_weights(copied, HashMemo()).tokenizer != original.tokenizer
