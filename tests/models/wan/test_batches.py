"""Micro-batches, made of a cache in memory: what the model sees, what it should answer, and that both are repeatable."""

from base64 import b64encode
from dataclasses import replace
from pathlib import Path
from zlib import compress

import numpy as np
import pytest
import torch

from models.wan.arch import VARIANTS
from models.wan.batches import WanBatches
from models.wan.checkpoint import TOKENIZER_DIR
from models.wan.stages import TextWire
from utils.config.schema import CaptionAugConfig
from utils.data.buckets import Bucket
from utils.data.manifest import SampleRecord
from utils.data.masks import LossMask, MaskGrid
from utils.data.media import MediaInfo
from utils.data.sampler import MicroBatch, Visit
from utils.flow_matching import NUM_SIGMA_BINS
from utils.layers import PreparedBatch
from utils.loss_recorder import LossRecorder
from utils.rng import generator

BUCKET = Bucket(64, 32, 5)
CAPTIONS = ("a red circle moves to the right", "a blue square", "a green star")
BOTH = {"need_inputs": True, "need_labels": True}


class MemoryCache:
    """Latents of 48 channels, conditioning for I2V, and text states of the length of the caption."""

    frames = 2

    def __init__(self, channels: int, with_condition: bool = False) -> None:
        self._channels = channels
        self._with_condition = with_condition

    def read_latents(self, sample_index):
        random = torch.Generator().manual_seed(sample_index)
        item = {"latents": torch.randn(self._channels, self.frames, 2, 4, generator=random)}
        if self._with_condition:
            item["cond"] = torch.full((20, 2, 2, 4), float(sample_index + 1))
        return item

    def read_text(self, caption):
        return torch.full((len(caption), 6), 1.0 + len(caption))


@pytest.fixture
def make_batches(tiny_ti2v, make_config):
    def make(
        mode="dit_lora",
        variant="ti2v-5b",
        order=(0, 1, 2),
        model=None,
        more=(),
        start=0.0,
        masks=None,
        buckets=(BUCKET,) * 3,
        **top,
    ) -> WanBatches:
        samples = [
            SampleRecord(
                sample_id=1000 + number,
                path=Path(f"clip_{number}.mp4"),
                kind="video",
                captions=(CAPTIONS[number], *more),
                bucket=buckets[number],
                num_repeats=1.0,
                content_hash="0" * 32,
                clip_start_seconds=start,
                info=MediaInfo("video", 64, 32, 48, 24.0, 2.0),
                mask=(masks or {}).get(number),
            )
            for number in order
        ]
        info = VARIANTS[variant]
        cache = MemoryCache(info.out_dim, info.model_type == "i2v")
        config = make_config(mode, model=model, **top)
        return WanBatches(config, info, samples, cache, tiny_ti2v / TOKENIZER_DIR)

    return make


def mask_of(*rows: list[float]) -> LossMask:
    """A mask of 2 x 4 latent positions."""
    sums_HW = (np.array(rows) * 255 * 256).round().astype("<u2")
    return LossMask(Path("mask.png"), "1" * 32, MaskGrid(2, 4, 16, b64encode(compress(sums_HW)).decode()))


def batch_of(*visits: tuple[int, int]) -> MicroBatch:
    return MicroBatch(tuple(Visit(index, visit) for index, visit in visits), BUCKET, 0)


def test_inputs_and_labels_belong_together(make_batches):
    prepared = make_batches().prepare(batch_of((0, 0), (2, 5)), 0.25, **BOTH)
    wire = TextWire(*prepared.inputs)
    target_BCFHW, sigma_B, weight_B, index_B = prepared.labels
    assert wire.latents_BCFHW.shape == target_BCFHW.shape == (2, 48, 2, 2, 4)
    assert wire.latents_BCFHW.dtype == target_BCFHW.dtype == torch.float32
    torch.testing.assert_close(wire.timesteps_BT, 1000 * sigma_B[:, None])
    assert weight_B.tolist() == [0.25, 0.25]
    assert index_B.tolist() == [0, 2]
    cache = MemoryCache(48)
    for row, index in enumerate((0, 2)):
        # noisy = latents + sigma * (noise - latents), and the target is noise - latents.
        recovered = wire.latents_BCFHW[row] - sigma_B[row] * target_BCFHW[row]
        torch.testing.assert_close(recovered, cache.read_latents(index)["latents"], rtol=0, atol=1e-5)
        noise = target_BCFHW[row] + cache.read_latents(index)["latents"]
        assert abs(noise.mean()) < 0.2
        assert 0.9 < noise.std() < 1.1


def test_a_stage_gets_what_it_needs_and_the_same_as_any_other(make_batches):
    batches, batch = make_batches(), batch_of((1, 3))
    both = batches.prepare(batch, 1.0, **BOTH)
    first = batches.prepare(batch, 1.0, need_inputs=True, need_labels=False)
    last = make_batches().prepare(batch, 1.0, need_inputs=False, need_labels=True)
    assert first.labels is None
    assert last.inputs is None
    assert all(torch.equal(mine, other) for mine, other in zip(first.inputs, both.inputs, strict=True))
    assert all(torch.equal(mine, other) for mine, other in zip(last.labels, both.labels, strict=True))


@pytest.mark.parametrize("mode", ["dit_lora", "encoder_ft"])
def test_masks_ride_behind_the_labels_of_those_micro_batches_that_have_any(make_batches, mode):
    left = [1.0, 0.5, 0.0, 0.0]
    masked = make_batches(mode, masks={1: mask_of(left, left)})
    for visits in (((0, 0),), ((0, 0), (2, 1))):
        with_masks = masked.prepare(batch_of(*visits), 1.0, **BOTH)
        without = make_batches(mode).prepare(batch_of(*visits), 1.0, **BOTH)
        assert len(with_masks.labels) == len(without.labels) == 4
    mixed = masked.prepare(batch_of((0, 0), (1, 3)), 1.0, **BOTH)
    plain = make_batches(mode).prepare(batch_of((0, 0), (1, 3)), 1.0, **BOTH)
    *labels, mask_BFHW = mixed.labels
    assert mask_BFHW.dtype == torch.float32
    assert mask_BFHW.tolist() == [[[[1.0] * 4] * 2], [[left] * 2]]
    # Nothing else knows of it: neither noise nor inputs.
    assert all(torch.equal(one, other) for one, other in zip(labels, plain.labels, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(mixed.inputs, plain.inputs, strict=True))
    assert masked.prepare(batch_of((1, 3)), 1.0, need_inputs=True, need_labels=False).labels is None


def conditioned_visits(batches: WanBatches, sample: int, visits: range) -> list[bool]:
    """Which visits keep the first latent frame clean, by what the model is told."""
    wires = [TextWire(*batches.prepare(batch_of((sample, visit)), 1.0, **BOTH).inputs) for visit in visits]
    return [wire.timesteps_BT.shape[1] > 1 for wire in wires]


def test_an_image_conditioned_visit_differs_in_its_first_frame_alone(make_batches):
    batch = batch_of((0, 0), (2, 5))
    plain = make_batches().prepare(batch, 0.25, **BOTH)
    prepared = make_batches(model={"first_frame_prob": 1.0}).prepare(batch, 0.25, **BOTH)
    wire, noisy = TextWire(*prepared.inputs), TextWire(*plain.inputs)
    clean_BCHW = torch.stack([MemoryCache(48).read_latents(index)["latents"][:, 0] for index in (0, 2)])
    assert torch.equal(wire.latents_BCFHW[:, :, 0], clean_BCHW)
    assert torch.equal(wire.latents_BCFHW[:, :, 1:], noisy.latents_BCFHW[:, :, 1:])
    told = noisy.timesteps_BT[:, 0].tolist()
    assert wire.timesteps_BT.tolist() == [[0.0, told[0]], [0.0, told[1]]]
    *labels, mask_BFHW = prepared.labels
    # Target, noise level (of the frames that count), weight and sample: as without.
    assert all(torch.equal(one, other) for one, other in zip(labels, plain.labels, strict=True))
    assert mask_BFHW.tolist() == [[[[0.0] * 4] * 2, [[1.0] * 4] * 2]] * 2
    assert torch.equal(wire.text, noisy.text) and torch.equal(wire.seed, noisy.seed)


def test_the_loss_of_an_image_conditioned_visit_is_the_mean_over_the_other_frames(make_batches):
    left = [1.0, 0.5, 0.0, 0.0]
    batches = make_batches(model={"first_frame_prob": 1.0}, masks={1: mask_of(left, left)})
    prepared = batches.prepare(batch_of((0, 0), (1, 3)), 1.0, **BOTH)
    target_BCFHW = prepared.labels[0]
    velocity_BCFHW = torch.randn(target_BCFHW.shape, generator=generator(0, "velocity")).requires_grad_()
    recorder = LossRecorder()
    recorder(velocity_BCFHW, prepared.labels).backward()
    errors_BCHW = (velocity_BCFHW.detach() - target_BCFHW)[:, :, 1].square()
    weights = torch.tensor(left)
    expected = [errors_BCHW[0].mean(), (errors_BCHW[1] * weights).sum() / (weights.sum() * 2 * 48)]
    torch.testing.assert_close(torch.tensor(recorder.sample_losses()), torch.stack(expected))
    assert not velocity_BCFHW.grad[:, :, 0].any() and velocity_BCFHW.grad[0, :, 1].all()
    # In the metrics it counts at the level of what was noised.
    counts = recorder.totals()[2 + NUM_SIGMA_BINS :]
    assert counts.nonzero()[0].tolist() == sorted({int(sigma * 10) for sigma in prepared.labels[1].tolist()})


def test_visits_are_image_conditioned_by_seed_sample_and_visit(make_batches):
    some = {"first_frame_prob": 0.3}
    reference = conditioned_visits(make_batches(model=some), 0, range(60))
    assert 8 <= sum(reference) <= 28
    names = [torch.rand((), generator=generator(0, "first_frame", 1000, v)).item() < 0.3 for v in range(60)]
    assert reference == names
    # Neither place nor order matters; sample and seed do.
    assert conditioned_visits(make_batches(model=some, order=(2, 0, 1)), 1, range(40, 60)) == reference[40:]
    assert conditioned_visits(make_batches(model=some), 1, range(60)) != reference
    assert conditioned_visits(make_batches(model=some, seed=1), 0, range(60)) != reference
    assert set(conditioned_visits(make_batches(model={"first_frame_prob": 1.0}), 0, range(9))) == {True}


def test_a_visit_that_is_not_chosen_is_as_it_would_be_without(make_batches):
    mixed = make_batches(model={"first_frame_prob": 0.5})
    chosen = conditioned_visits(mixed, 0, range(20))
    yes, no = chosen.index(True), chosen.index(False)
    alone, plain = (one.prepare(batch_of((0, no)), 1.0, **BOTH) for one in (mixed, make_batches()))
    for mine, other in ((alone.inputs, plain.inputs), (alone.labels, plain.labels)):
        assert all(torch.equal(one, two) for one, two in zip(mine, other, strict=True))
    # In the company of one that is, it is told its level for every frame, and counts whole.
    together = mixed.prepare(batch_of((0, yes), (0, no)), 1.0, **BOTH)
    wire = TextWire(*together.inputs)
    assert torch.equal(wire.latents_BCFHW[1], plain.inputs[2][0])
    assert wire.timesteps_BT[1].tolist() == plain.inputs[3][0].tolist() * 2
    assert wire.timesteps_BT[0, 0] == 0.0 < wire.timesteps_BT[0, 1]
    mask_BFHW = together.labels[4]
    assert not mask_BFHW[0, 0].any() and mask_BFHW[0, 1].all() and mask_BFHW[1].all()


def test_images_are_never_conditioned(make_batches, monkeypatch):
    monkeypatch.setattr(MemoryCache, "frames", 1)
    image, clip = Bucket(64, 32, 1), Bucket(64, 32, 5)
    batches = make_batches(model={"first_frame_prob": 1.0}, buckets=(image, clip, image))
    assert batches.describe_first_frame() == [
        "first frame: clean, at timestep 0 and left out of the loss at 100.0% of visits of 1 of 3 samples; images never"
    ]
    prepared = batches.prepare(batch_of((0, 0), (2, 0)), 1.0, **BOTH)
    plain = make_batches(buckets=(image, clip, image)).prepare(batch_of((0, 0), (2, 0)), 1.0, **BOTH)
    assert all(torch.equal(one, two) for one, two in zip(prepared.inputs, plain.inputs, strict=True))
    assert len(prepared.labels) == 4
    (warning,) = make_batches(model={"first_frame_prob": 0.5}, buckets=(image,) * 3).describe_first_frame()
    assert warning.startswith("warning: first_frame_prob = 0.5 changes nothing")
    assert make_batches().describe_first_frame() == []


def test_timesteps_of_the_mean_sample_are_counted(make_batches):
    buckets = (Bucket(64, 32, 1), Bucket(64, 32, 5), Bucket(64, 32, 9))
    assert make_batches(buckets=buckets).workload.time_rows == 1.0
    assert make_batches(buckets=buckets, model={"first_frame_prob": 0.1}).workload.time_rows == 2.0


def test_a_stage_that_needs_nothing_reads_nothing(make_batches, monkeypatch):
    """A stage in the middle gets its tensors from its neighbour; the cache may be far away."""
    batches = make_batches()
    reads = []
    for name in ("read_latents", "read_text"):
        monkeypatch.setattr(MemoryCache, name, lambda self, what: reads.append(what))
    assert batches.prepare(
        batch_of((0, 0), (1, 0)), 1.0, need_inputs=False, need_labels=False
    ) == PreparedBatch(None, None)
    assert reads == []


def test_the_last_stage_reads_no_captions(make_batches, monkeypatch):
    batches = make_batches()
    monkeypatch.setattr(MemoryCache, "read_text", None)
    assert batches.prepare(batch_of((0, 0)), 1.0, need_inputs=False, need_labels=True).labels is not None


def test_noise_is_a_function_of_seed_sample_and_visit(make_batches):
    def noised(batches, index, visit):
        target_BCFHW, sigma_B, *_ = batches.prepare(batch_of((index, visit)), 1.0, **BOTH).labels
        return target_BCFHW[0], sigma_B.item()

    target, sigma = noised(make_batches(), 0, 4)
    torch.manual_seed(77)
    again, sigma_again = noised(make_batches(), 0, 4)
    assert torch.equal(again, target)
    assert sigma_again == sigma
    for batches, visit in (
        (make_batches(), (0, 5)),
        (make_batches(), (1, 4)),
        (make_batches(seed=1), (0, 4)),
    ):
        other, other_sigma = noised(batches, *visit)
        latents = (MemoryCache(48).read_latents(index)["latents"] for index in (visit[0], 0))
        # Other noise, and not only other latents under it.
        assert not torch.allclose(other + next(latents), target + next(latents), atol=1e-3)
        assert other_sigma != sigma


def test_draws_have_the_names_that_make_old_runs_repeatable(make_batches):
    """Noise and noise level come from streams of their own, named by the sample's id and not by its place."""
    batches = make_batches(seed=9)
    target_BCFHW, sigma_B, *_ = batches.prepare(batch_of((2, 7)), 1.0, **BOTH).labels
    noise = torch.randn(48, 2, 2, 4, generator=generator(9, "noise", 1002, 7))
    assert torch.equal(target_BCFHW[0], noise - MemoryCache(48).read_latents(2)["latents"])
    sigma = batches.sigma_law.sample(generator(9, "sigma", 1002, 7))
    assert sigma_B.item() == pytest.approx(sigma, rel=1e-6)


def test_neither_place_nor_company_changes_a_samples_noise(make_batches):
    """A sample keeps its noise when others are added to the dataset, or share its micro-batch."""
    alone = make_batches().prepare(batch_of((2, 1)), 1.0, **BOTH)
    together = make_batches().prepare(batch_of((0, 0), (2, 1)), 1.0, **BOTH)
    moved = make_batches(order=(2, 0, 1)).prepare(batch_of((0, 1)), 1.0, **BOTH)
    assert torch.equal(together.labels[1][1], alone.labels[1][0])
    assert torch.equal(moved.labels[1], alone.labels[1])
    cached = [MemoryCache(48).read_latents(index)["latents"] for index in (2, 2, 0)]
    noises = [alone.labels[0][0], together.labels[0][1], moved.labels[0][0]]
    for target, latents in zip(noises, cached, strict=True):
        torch.testing.assert_close(target + latents, noises[0] + cached[0], rtol=0, atol=1e-6)


def test_the_first_frame_is_behind_the_noisy_latents(make_batches):
    prepared = make_batches(variant="i2v-a14b", model={"expert": "low_noise"}).prepare(
        batch_of((1, 0)), 1.0, **BOTH
    )
    latents_BCFHW, target_BCFHW = prepared.inputs[2], prepared.labels[0]
    assert latents_BCFHW.shape == (1, 36, 2, 2, 4)
    assert target_BCFHW.shape == (1, 16, 2, 2, 4)
    assert (latents_BCFHW[:, 16:] == 2.0).all()


def test_cached_states_are_padded_with_zeros(make_batches):
    wire = TextWire(*make_batches().prepare(batch_of((0, 0), (1, 0)), 1.0, **BOTH).inputs)
    longest = len(CAPTIONS[0])
    assert wire.text.shape == (2, longest, 6)
    assert wire.lens_B.tolist() == [longest, len(CAPTIONS[1])]
    assert not wire.text[1, len(CAPTIONS[1]) :].any()
    assert wire.text[1, : len(CAPTIONS[1])].all()


def test_the_encoder_gets_token_ids(make_batches):
    batches = make_batches("encoder_ft")
    wire = TextWire(*batches.prepare(batch_of((0, 0), (1, 0)), 1.0, **BOTH).inputs)
    ids = [batches.tokenizer(caption) for caption in CAPTIONS[:2]]
    assert wire.text.dtype == torch.int64
    assert wire.lens_B.tolist() == [len(one) for one in ids]
    for row, one in enumerate(ids):
        assert wire.text[row, : len(one)].tolist() == one


@pytest.mark.parametrize("mode", ["encoder_ft", "dit_lora"])
def test_a_share_of_visits_sees_the_empty_caption(mode, make_batches):
    def lengths(fraction: float) -> list[int]:
        batches = make_batches(mode, uncond_fraction=fraction)
        return [
            int(TextWire(*batches.prepare(batch_of((0, v)), 1.0, **BOTH).inputs).lens_B) for v in range(60)
        ]

    empty = 1 if mode == "encoder_ft" else 0  # the end token alone; this cache's states of "" have no rows
    full = lengths(0.0)[0]
    assert set(lengths(0.0)) == {full}
    assert set(lengths(1.0)) == {empty}
    some = lengths(0.3)
    assert set(some) == {full, empty}
    assert 8 <= some.count(empty) <= 28
    assert lengths(0.3) == some


AUG = CaptionAugConfig(enable=True, keywords=("circle",), single_token=0.5)


def visits_of(batches: WanBatches, sample: int, visits: int = 40) -> list[list[int]]:
    wires = [TextWire(*batches.prepare(batch_of((sample, v)), 1.0, **BOTH).inputs) for v in range(visits)]
    return [wire.text[0, : int(wire.lens_B)].tolist() for wire in wires]


def test_the_encoder_sees_augmented_captions(make_batches):
    batches = make_batches("encoder_ft", model={"caption_aug": AUG})
    alone, whole = batches.tokenizer("circle"), batches.tokenizer(CAPTIONS[0])
    seen = visits_of(batches, 0)
    assert 8 <= seen.count(alone) <= 32
    assert seen.count(alone) + seen.count(whole) == len(seen)
    assert visits_of(make_batches("encoder_ft", model={"caption_aug": AUG}), 0) == seen
    assert visits_of(batches, 1) == [batches.tokenizer(CAPTIONS[1])] * 40  # holds no keyword
    (line,) = batches.describe_captions()
    assert "alone at 50.0% of visits" in line and "1 of 3 captions" in line and "circle" not in line


def test_augmentation_leaves_empty_captions_and_noise_as_they_are(make_batches):
    plain = make_batches("encoder_ft", uncond_fraction=0.4)
    both = make_batches("encoder_ft", uncond_fraction=0.4, model={"caption_aug": AUG})
    empty = plain.tokenizer("")
    assert [ids == empty for ids in visits_of(both, 0)] == [ids == empty for ids in visits_of(plain, 0)]
    assert any(ids != empty and ids != plain.tokenizer(CAPTIONS[0]) for ids in visits_of(both, 0))
    left, right = (TextWire(*b.prepare(batch_of((0, 3)), 1.0, **BOTH).inputs) for b in (plain, both))
    assert torch.equal(left.latents_BCFHW, right.latents_BCFHW)


def test_keywords_that_are_nowhere_are_warned_of(make_batches):
    aug = replace(AUG, keywords=("triangle",))
    assert any(
        line.startswith("warning: no caption holds a keyword") and "triangle" not in line
        for line in make_batches("encoder_ft", model={"caption_aug": aug}).describe_captions()
    )
    assert make_batches("encoder_ft").describe_captions() == []


def test_dropout_seeds_name_the_samples_and_their_visits(make_batches):
    def seed(*visits, **top) -> int:
        return int(TextWire(*make_batches(**top).prepare(batch_of(*visits), 1.0, **BOTH).inputs).seed)

    reference = seed((0, 0), (1, 2))
    assert seed((0, 0), (1, 2)) == reference
    assert (
        len(
            {
                reference,
                seed((0, 0), (1, 3)),
                seed((0, 0)),
                seed((1, 2), (0, 0)),
                seed((0, 0), (1, 2), seed=5),
            }
        )
        == 5
    )


def test_noise_levels_stay_in_the_configured_range(make_batches):
    batches = make_batches(model={"min_t": 0.4, "max_t": 0.45})
    sigmas = [float(batches.prepare(batch_of((0, visit)), 1.0, **BOTH).labels[1]) for visit in range(40)]
    assert 0.4 <= min(sigmas) < max(sigmas) <= 0.45


@pytest.mark.parametrize(("expert", "share"), [("low_noise", 0.0), ("high_noise", 1.0)])
def test_noise_levels_stay_on_the_experts_side_of_the_boundary(expert, share, make_batches):
    batches = make_batches(variant="t2v-a14b", model={"expert": expert})
    sigmas = [float(batches.prepare(batch_of((0, visit)), 1.0, **BOTH).labels[1]) for visit in range(40)]
    assert sum(sigma >= 0.875 for sigma in sigmas) / 40 == share


def test_tokens_are_counted_from_the_bucket(make_batches):
    batches = make_batches()
    # 5 frames of 64 x 32 px: 2 latent frames of 2 x 1 tokens.
    assert batches.num_tokens(batch_of((0, 0), (1, 0))) == 8
    assert batches.workload.video_tokens == 4
    expected = sum(len(batches.tokenizer(caption)) for caption in CAPTIONS) / 3
    assert batches.workload.text_tokens == pytest.approx(expected)


def test_a_sample_is_described_by_its_file(make_batches):
    assert make_batches().describe_sample(2) == "clip_2.mp4"
    assert make_batches(start=1.5).describe_sample(2) == "clip_2.mp4 (clip from 1.50 s)"


def test_each_visit_sees_one_of_several_captions(make_batches):
    def seen(visits=range(90), index=0, **top) -> list[int]:
        batches = make_batches(more=("a disc", "a ball that rolls"), **top)
        prepared = [batches.prepare(batch_of((index, visit)), 1.0, **BOTH) for visit in visits]
        return [int(TextWire(*one.inputs).lens_B) for one in prepared]  # this cache has a row for each letter

    lengths = [len(caption) for caption in (CAPTIONS[0], "a disc", "a ball that rolls")]
    reference = seen()
    assert set(reference) == set(lengths)
    assert all(15 <= reference.count(length) <= 45 for length in lengths)
    assert seen([7, 3]) == [reference[7], reference[3]]  # neither order nor other visits matter
    assert seen(seed=1) != reference
    assert [length == lengths[1] for length in seen(index=1)] != [
        length == lengths[1] for length in reference
    ]
    assert set(seen(uncond_fraction=0.5)) == {0, *lengths}


def test_tokens_of_several_captions_are_averaged(make_batches):
    batches = make_batches(more=("a disc",))
    counts = [len(batches.tokenizer(caption)) for caption in (*CAPTIONS, "a disc", "a disc", "a disc")]
    assert batches.workload.text_tokens == pytest.approx(sum(counts) / 6)
