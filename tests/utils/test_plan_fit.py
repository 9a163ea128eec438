"""The search for settings: the mildest that fits, in order, with a model of memory whose answers are known."""

from dataclasses import replace

import pytest

from utils.config.schema import AdapterConfig, ModelConfig, OptimizerConfig, TrainConfig
from utils.plan_fit import Room, find_fit, with_settings

GB = 1e9
CONFIG = TrainConfig(
    output_dir="x",
    dataset="x",
    model=ModelConfig(
        type="wan",
        ckpt_path="x",
        cache_text_embeddings=True,
        train_text_encoder=False,
        freeze_transformer=True,
    ),
    adapter=AdapterConfig(),
    optimizer=OptimizerConfig(lr=1e-4),
)
ROOM = Room(num_blocks=40, num_layers=42, num_gpus=None, buckets=("large", "middle", "small"))
ACTIVATIONS = {False: 40.0, "selective": 20.0, True: 10.0, "offload": 6.0}
BUCKETS = {None: 1.0, "large": 1.0, "middle": 0.5, "small": 0.1}


def needs_of(weights: float, state: float = 0.0, activations: float = 1.0, copies: int = 1):
    """Bytes of a model: weights (half of them in blocks' linear layers), state, activations."""

    def needs(config: TrainConfig, bucket: str | None, device: float) -> float:
        held = weights * (1 - 0.5 * (config.model.transformer_dtype == "float8"))
        held *= 1 - config.blocks_to_swap / 40
        states = state / (copies if config.zero_stage else 1)
        states *= 0.25 if config.optimizer.type == "adamw8bit" else 1
        kept = activations * ACTIVATIONS[config.activation_checkpointing] * BUCKETS[bucket]
        kept *= config.micro_batch_size_per_gpu
        return GB * (held + states + kept) / config.pipeline_stages

    return needs


def texts(config, gpu_gb, needs, room=ROOM):
    return [str(remedy) for remedy in find_fit(config, gpu_gb, room, needs).remedies]


def test_verdicts_by_the_share_of_the_device():
    needs = needs_of(5.0)  # 15 GB with the default, activation_checkpointing = true
    assert [find_fit(CONFIG, size, ROOM, needs).verdict for size in (24, 18, 12)] == [
        "fits",
        "tight",
        "too large",
    ]
    assert find_fit(CONFIG, 24, ROOM, needs).remedies == ()


def test_stronger_checkpointing_comes_first_and_in_order():
    plain = replace(CONFIG, activation_checkpointing=False)
    needs = needs_of(5.0)
    assert texts(plain, 48, needs) == ['activation_checkpointing = "selective"']
    assert texts(plain, 24, needs) == ["activation_checkpointing = true"]
    assert texts(plain, 15, needs) == ['activation_checkpointing = "offload"']


def test_then_the_fewest_blocks_to_swap():
    needs = needs_of(28.0, activations=0.1)
    assert texts(CONFIG, 24, needs) == ["blocks_to_swap = 14"]  # 28 x 26 / 40 + 1 = 19.2 of 19.2
    assert find_fit(CONFIG, 24, ROOM, needs).remedies[0].needs == pytest.approx(19.2e9)
    already = replace(CONFIG, blocks_to_swap=10)
    assert texts(already, 24, needs) == ["blocks_to_swap = 14"]


def test_then_smaller_micro_batches_before_anything_that_is_not_exact():
    wide = replace(CONFIG, micro_batch_size_per_gpu=4, gradient_accumulation_steps=2)
    (text,) = texts(wide, 24, needs_of(1.0))
    assert text == "micro_batch_size_per_gpu = 1, gradient_accumulation_steps = 8"


def test_shared_state_where_there_are_copies_and_eight_bits_else():
    needs = needs_of(4.0, state=60.0, activations=0.1, copies=4)
    assert texts(CONFIG, 48, needs, replace(ROOM, num_gpus=4)) == ["zero_stage = 1"]
    assert texts(CONFIG, 48, needs) == ['optimizer.type = "adamw8bit"']


def test_float8_where_swapping_is_not_enough():
    def needs(config, bucket, device):
        return GB * (30.0 if config.model.transformer_dtype is None else 12.0)

    assert texts(CONFIG, 24, needs) == ['model.transformer_dtype = "float8"']


def test_more_stages_and_beside_it_what_needs_no_more_gpus():
    def needs(config, bucket, device):
        return GB * (60.0 / config.pipeline_stages) * BUCKETS[bucket]

    assert texts(CONFIG, 24, needs) == ["pipeline_stages = 4", "no bucket larger than small"]
    # A given number of GPUs is not exceeded, and is divided.
    assert texts(CONFIG, 48, needs, replace(ROOM, num_gpus=6)) == [
        "pipeline_stages = 2",
        "no bucket larger than middle",
    ]
    assert texts(CONFIG, 24, needs, replace(ROOM, num_gpus=2)) == ["no bucket larger than small"]


def test_a_split_by_hand_does_not_outlive_its_number_of_stages():
    split = replace(CONFIG, pipeline_stages=2, partition_method="manual", partition_split=(20,))
    (remedy,) = find_fit(
        split, 24, replace(ROOM, buckets=("large",)), lambda c, b, d: 60e9 / c.pipeline_stages
    ).remedies
    assert str(remedy) == 'pipeline_stages = 4, partition_method = "cost", partition_split = []'
    assert with_settings(split, remedy.settings).partition_split == ()


def test_nothing_helps():
    fit = find_fit(CONFIG, 24, ROOM, lambda config, bucket, device: 1e12)
    assert fit.verdict == "too large" and fit.remedies == ()


def test_settings_reach_tables():
    changed = with_settings(CONFIG, (("model.transformer_dtype", "float8"), ("blocks_to_swap", 3)))
    assert changed.model.transformer_dtype == "float8" and changed.blocks_to_swap == 3
    assert CONFIG.model.transformer_dtype is None
