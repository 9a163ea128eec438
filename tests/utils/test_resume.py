"""What may change between a run and its continuation, what is refused and how, and where the run goes on."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from utils.checkpoint import LATEST, LoopState, checkpoint_name, loop_document
from utils.config.changes import parse_allowed
from utils.config.load import load_config
from utils.config.schema import LoadedConfig, ProbesConfig, SamplesConfig
from utils.data.buckets import Bucket
from utils.data.sampler import BatchPlan
from utils.distributed import init_processes, shutdown
from utils.errors import UserError
from utils.resume import Continuation, Inputs, find_run, input_name, keep_global_batch, position_after
from utils.run_dir import NEWEST, create_run_dir, record_config

ROOT = Path(__file__).resolve().parents[2]
INPUTS = Inputs({"the dataset": "aa", "the text encoder": "bb"}, {"the dataset": "5 samples of 5 files"})


@pytest.fixture(scope="module", autouse=True)
def _group() -> Iterator[None]:
    init_processes(1.0)
    yield
    shutdown()


@pytest.fixture
def config(tmp_path, monkeypatch) -> LoadedConfig:
    monkeypatch.chdir(ROOT)
    return load_config("configs/smoke_dit_lora.toml", [f"output_dir={tmp_path / 'out'}", "epochs=9"])


def plan_of(num_samples: int = 5, size: int = 1) -> BatchPlan:
    samples = [
        SimpleNamespace(sample_id=index, bucket=Bucket(32, 32, 1), num_repeats=1.0)
        for index in range(num_samples)
    ]
    return BatchPlan(samples, size, 0)


def started(config: LoadedConfig, per_step: int = 2) -> Path:
    """A run with a checkpoint after three steps."""
    path = create_run_dir(config, lambda directory: None).path
    state = LoopState(
        3, 6, per_step, 1.0, 6, INPUTS.fingerprints, INPUTS.descriptions, config.train.optimizer.type
    )
    (path / checkpoint_name(3)).mkdir()
    (path / checkpoint_name(3) / "loop.json").write_text(loop_document(state, 1, []))
    (path / LATEST).write_text(checkpoint_name(3))
    return path


def changed(config: LoadedConfig, **values: object) -> LoadedConfig:
    return replace(config, train=replace(config.train, **values))


def resume(
    config: LoadedConfig,
    allowed: str | None = None,
    inputs: Inputs = INPUTS,
    copies: int = 1,
    plan: BatchPlan | None = None,
    said: list[str] | None = None,
) -> Continuation | None:
    say = (said if said is not None else []).append
    return find_run(config, NEWEST, allowed, plan or plan_of(), inputs, copies, say)


def refusal(*arguments: object, **options: object) -> list[str]:
    with pytest.raises(UserError) as raised:
        resume(*arguments, **options)  # type: ignore[arg-type]
    return str(raised.value).splitlines()


# ---------------------------------------------------------------------- the configuration


@pytest.mark.parametrize(
    "values",
    [
        {"epochs": 7},
        {"max_steps": 100},
        {"pipeline_stages": 2},
        {"zero_stage": 1},
        {"checkpoint_every_n_steps": 3},
        {"timeout_minutes": 5.0},
        {"activation_checkpointing": False},
        {
            "probes": ProbesConfig(
                run=("attn_logit_probe",),
                every_n_epochs=2,
                timeout_minutes=1.0,
                on_fail="stop",
                reports_dir="elsewhere",
            )
        },
        {"samples": SamplesConfig(size="64x64", seeds=1, device="cuda", negative_prompt="")},
    ],
)
def test_when_and_where_things_happen_may_change(config, values) -> None:
    started(config)
    assert resume(changed(config, **values)) is not None


def test_what_is_computed_may_not_and_the_message_shows_each_difference(config) -> None:
    run = started(config)
    other = changed(
        config,
        seed=3,
        epochs=10,
        optimizer=replace(config.train.optimizer, lr=0.5),
        model=replace(config.train.model, variant="ti2v-5b"),
        budget=None,
    )
    first, *differences, last = refusal(other)
    assert str(run) in first
    assert [line.strip() for line in differences] == [
        "budget.action: 'warn' -> (not set)",
        "budget.every_n_steps: 50 -> (not set)",
        "budget.max_delta_ratio: 0.05 -> (not set)",
        "model.variant: (not set) -> 'ti2v-5b'",
        "optimizer.lr: 0.001 -> 0.5",
        "seed: 0 -> 3",
    ]
    names = "budget.action,budget.every_n_steps,budget.max_delta_ratio,model.variant,optimizer.lr,seed"
    assert f"--allow_changed {names}," in last and "without --resume_from_checkpoint" in last
    assert resume(other, names) is not None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("micro_batch_size_per_gpu", 2),
        ("gradient_clipping", 0.5),
        ("uncond_fraction", 0.1),
        ("warmup_steps", 3),
        ("lr_scheduler", "cosine"),
    ],
)
def test_every_key_that_is_compared_is_refused_and_can_be_allowed(config, key, value) -> None:
    run = started(config)
    other = changed(config, **{key: value})
    assert any(line.strip().startswith(f"{key}: ") for line in refusal(other))
    said: list[str] = []
    found = resume(other, key, said=said)
    assert found is not None and getattr(found.config.train, key) == value
    assert any(line.startswith(f"changed, as allowed: {key}: ") for line in said)
    # Looking changes nothing; when training begins, that is the run's configuration, and the one before is kept.
    assert getattr(load_config(run / "config.toml").train, key) != value
    record_config(run, found.config.train, 3)
    assert getattr(load_config(run / "config.toml").train, key) == value
    assert getattr(load_config(run / "inputs" / "config_until_step3.toml").train, key) != value
    assert resume(other) is not None


def test_a_table_allows_what_is_in_it_and_nothing_more(config) -> None:
    started(config)
    other = changed(config, optimizer=replace(config.train.optimizer, lr=0.5, weight_decay=0.5), seed=1)
    lines = refusal(other, "optimizer")
    assert [line.strip() for line in lines[1:-1]] == ["seed: 0 -> 1"]
    assert "--allow_changed optimizer,seed" in lines[-1]
    assert resume(other, "optimizer, seed") is not None


def test_a_name_that_is_none_is_refused() -> None:
    assert parse_allowed("optimizer.lr, epochs,dataset", ["dataset"]) == {"optimizer.lr", "epochs", "dataset"}
    assert parse_allowed(None, []) == frozenset()
    with pytest.raises(UserError, match="--allow_changed optimiser.lr: is neither .* dataset, dit"):
        parse_allowed("optimiser.lr", ["dit", "dataset"])


def test_another_optimizer_begins_with_state_of_its_own(config) -> None:
    run = started(config)
    other = changed(config, optimizer=replace(config.train.optimizer, type="adamw8bit"))
    found = resume(other, "optimizer.type")
    record_config(run, other.train, 3)
    same = resume(other)
    assert found is not None and not found.run_dir.with_optimizer
    # The checkpoint is still of the other one: killed before it saves, the run begins the state anew once more.
    assert same is not None and not same.run_dir.with_optimizer


# ---------------------------------------------------------------------- the inputs


def test_changed_inputs_are_named_and_can_be_allowed(config) -> None:
    started(config)
    now = Inputs(
        {"the dataset": "cc", "the text encoder": "dd", "the keywords": "ee"},
        {"the dataset": "5 samples of 5 files", "the text encoder": "b.pth", "the keywords": "a list"},
    )
    lines = refusal(config, inputs=now)
    assert [line.strip() for line in lines[1:-1]] == [
        "dataset: 5 samples of 5 files -> 5 samples of 5 files, with other content",
        "text_encoder: not known -> b.pth",
        "keywords: (none) -> a list",
    ]
    assert "--allow_changed dataset,keywords,text_encoder" in lines[-1]
    assert len(refusal(config, "dataset", inputs=now)) == 4
    found = resume(config, "dataset,keywords,text_encoder", inputs=now)
    assert found is not None and found.run_dir.state is not None
    assert found.run_dir.state.fingerprints == now.fingerprints


def test_the_place_in_changed_data_is_where_as_many_samples_were_seen(config) -> None:
    started(config)
    now = Inputs(INPUTS.fingerprints | {"the dataset": "cc"}, INPUTS.descriptions)
    larger = plan_of(num_samples=4, size=1)
    found = resume(config, "dataset", inputs=now, plan=larger)
    assert found is not None and found.run_dir.state is not None
    assert found.run_dir.state.micro_batches_seen == 6
    size = "micro_batch_size_per_gpu"
    twice = resume(changed(config, **{size: 2}), size, plan=plan_of(size=2))
    assert twice is not None and twice.run_dir.state is not None
    # 5 samples an epoch in micro-batches of 2, 2, 1: six samples are the first epoch and one micro-batch.
    assert twice.run_dir.state.micro_batches_seen == 4


@pytest.mark.parametrize("samples", range(12))
@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_position_is_the_first_with_as_many_samples_before_it(samples, size) -> None:
    plan = plan_of(size=size)
    seen, expected = 0, 0
    while seen < samples:
        seen += len(plan.micro_batch(expected).visits)
        expected += 1
    assert position_after(plan, samples) == expected


def test_names_of_inputs() -> None:
    assert [input_name(what) for what in ("the dataset", "the DiT", "the text encoder")] == [
        "dataset",
        "dit",
        "text_encoder",
    ]


# ---------------------------------------------------------------------- the global batch


def test_other_copies_keep_the_global_batch(config) -> None:
    run = started(config, per_step=2)
    said: list[str] = []
    single = changed(config, gradient_accumulation_steps=1)
    found = resume(single, copies=1, said=said)
    assert found is not None and found.run_dir.state is not None
    assert found.config.train.gradient_accumulation_steps == 2
    assert found.run_dir.state.micro_batches_per_step == 2
    assert any("gradient_accumulation_steps = 2 instead of 1" in line for line in said)
    assert load_config(run / "config.toml").train.gradient_accumulation_steps == 2
    both = resume(single, copies=2)
    assert both is not None and both.config.train.gradient_accumulation_steps == 1


def test_copies_that_cannot_share_a_step_are_refused_with_the_ones_that_can(config) -> None:
    run = started(config, per_step=4)
    (message,) = refusal(config, copies=3)
    assert f"{run / 'global_step3'}: a step of this run has 4 micro-batches, and 3 data-parallel" in message
    assert "start 1, 2, 4 copies" in message
    found = resume(config, "gradient_accumulation_steps", copies=3)
    assert found is not None and found.run_dir.state is not None
    assert found.config.train.gradient_accumulation_steps == config.train.gradient_accumulation_steps
    assert found.run_dir.state.micro_batches_per_step == 3 * config.train.gradient_accumulation_steps


def test_a_batch_that_fits_is_left_alone(config) -> None:
    state = LoopState(1, 2, 2, 0.0)
    assert keep_global_batch(config.train, state, 1, frozenset(), Path("x")).gradient_accumulation_steps == 2


# ---------------------------------------------------------------------- no run, or none left


def test_without_a_run_or_a_checkpoint_it_begins_at_the_start(config) -> None:
    said: list[str] = []
    assert find_run(config, None, None, plan_of(), INPUTS, 1, said.append) is None and said == []
    assert resume(config, said=said) is None and "starting at step 0" in said[-1]
    run = create_run_dir(config, lambda directory: None).path
    found = resume(config, said=said)
    assert found is not None and found.run_dir.path == run and found.run_dir.checkpoint is None
    assert "has no checkpoint yet" in said[-1]
    assert "seed" in " ".join(refusal(changed(config, seed=5)))


def test_a_finished_run_is_left_alone(config) -> None:
    started(config)
    said: list[str] = []
    found = resume(changed(config, max_steps=3), said=said)
    assert found is not None and found.is_finished and "is finished (3 of 3 steps)" in said[-1]
