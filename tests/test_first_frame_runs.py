"""Image-conditioned training of TI2V-5B in whole runs: what it changes, what it leaves, and how it is evaluated."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.helpers.workspace import Workspace, check_refused, make_workspace
from utils.eval_records import EVAL_FILE, SAMPLES_DIR
from utils.metrics import read_metrics, read_rows

# Two samples a micro-batch, so that some hold one visit with and one without a clean first frame.
RUN = ("max_steps=4", "micro_batch_size_per_gpu=2", "checkpoint_every_n_steps=2")
SOME = "model.first_frame_prob=0.5"
TRAINED = {"dit_lora": "adapter_model.safetensors", "encoder_ft": "text_encoder.safetensors"}


@pytest.fixture
def workspace(tmp_path, tiny_ti2v, tiny_dataset) -> Workspace:
    return make_workspace(tmp_path, tiny_ti2v, tiny_dataset)


def losses(run: Path) -> list[tuple[float, float]]:
    return [(row["loss"], row["grad_norm"]) for row in read_metrics(run)]


def trained(run: Path, mode: str) -> dict:
    return load_file(max(run.glob("epoch*")) / TRAINED[mode])


@pytest.mark.parametrize("mode", ["dit_lora", "encoder_ft"])
def test_nothing_changes_by_default_and_a_share_changes_what_it_should(workspace, capsys, mode) -> None:
    assert workspace.train(mode, *RUN) == 0
    assert "first frame" not in capsys.readouterr().err
    assert workspace.train(mode, *RUN, "model.first_frame_prob=0.0") == 0
    capsys.readouterr()
    assert workspace.train(mode, *RUN, SOME) == 0
    said = capsys.readouterr().err
    assert "left out of the loss at 50.0% of visits of 3 of 6 samples; images never" in said
    assert "cache of latents: 6 items, 0 encoded now" in said  # what is cached does not depend on it
    plain, zero, some = workspace.runs()
    assert losses(zero) == losses(plain) != losses(some)
    assert all((trained(zero, mode)[name] == value).all() for name, value in trained(plain, mode).items())


@pytest.mark.long
def test_a_run_goes_on_as_if_it_had_not_stopped_and_not_with_another_share(workspace, capsys) -> None:
    assert workspace.train("dit_lora", *RUN, SOME) == 0
    assert workspace.train("dit_lora", *RUN, SOME, "max_steps=2") == 0
    capsys.readouterr()
    resume = ["--resume_from_checkpoint"]
    code = workspace.train("dit_lora", *RUN, "model.first_frame_prob=0.25", flags=resume)
    check_refused(code, capsys.readouterr().err, "model.first_frame_prob: 0.5 -> 0.25")
    assert workspace.train("dit_lora", *RUN, SOME, flags=resume) == 0
    whole, parts = workspace.runs()
    assert losses(parts) == losses(whole)


@pytest.mark.long
@pytest.mark.parametrize(
    ("mode", "recompute"),
    [("dit_lora", "true"), ("dit_lora", "false"), ("dit_lora", '"offload"'), ("encoder_ft", '"selective"')],
)
def test_two_stages_and_every_way_to_recompute_give_the_same_losses(workspace, mode, recompute) -> None:
    """The timesteps of each micro-batch cross the stages in one shape or the other."""
    assert workspace.train(mode, *RUN, SOME) == 0
    two = ("pipeline_stages=2", f"activation_checkpointing={recompute}")
    done = workspace.launch(["torchrun", "--nproc_per_node", "2"], mode, *RUN, SOME, *two)
    assert done.returncode == 0, done.stderr
    alone, staged = workspace.runs()
    # The norm of a gradient is summed in another order.
    assert [loss for loss, _ in losses(alone)] == [loss for loss, _ in losses(staged)]
    assert all((trained(staged, mode)[name] == value).all() for name, value in trained(alone, mode).items())


@pytest.mark.long
def test_a_dataset_is_evaluated_as_text_and_its_videos_again_with_their_first_frame(
    workspace, capsys
) -> None:
    table = f'eval_datasets=[{{name = "holdout", config = "{workspace.root / "dataset.toml"}"}}]'
    evaluation = (table, "eval_quantiles=[0.3,0.8]", "max_steps=1")
    assert workspace.train("dit_lora", *RUN, *evaluation) == 0
    capsys.readouterr()
    assert workspace.train("dit_lora", *RUN, *evaluation, SOME) == 0
    said = capsys.readouterr().err
    assert "its 3 video sample(s) again with a clean first frame, as holdout.first_frame" in said
    assert "evaluation at step 0: holdout.first_frame: loss " in said
    without, with_it = workspace.runs()
    rows = [(row["dataset"], row["step"], row["num_samples"]) for row in read_rows(with_it / EVAL_FILE)]
    assert rows == [
        (name, step, n) for step in (0, 1) for name, n in (("holdout", 6), ("holdout.first_frame", 3))
    ]

    def first(run: Path, name: str) -> dict[str, list[float]]:
        found = json.loads((run / SAMPLES_DIR / name / "step0.json").read_text())
        return {sample["sample"]: sample["loss"] for sample in found["samples"]}

    text, image = first(with_it, "holdout"), first(with_it, "holdout.first_frame")
    # Before the first step the text-only one is that of a run without, and the other one is another number.
    assert text == first(without, "holdout")
    assert len(image) == 3 and all(Path(name).suffix == ".mp4" for name in image)
    assert all(image[name] != text[name] for name in image)
    assert [row["dataset"] for row in read_rows(without / EVAL_FILE)] == ["holdout"] * 2


@pytest.mark.parametrize("flags", [[], ["--dry_run"], ["--plan"]])
def test_it_is_refused_for_other_variants_by_name(tmp_path, tiny_t2v, tiny_dataset, capsys, flags) -> None:
    workspace = make_workspace(tmp_path, tiny_t2v, tiny_dataset)
    code = workspace.train("dit_lora", *RUN, SOME, 'model.expert="low_noise"', flags=flags)
    said = capsys.readouterr().err
    check_refused(
        code, said, "model.first_frame_prob: is 0.5, which is for ti2v-5b only; t2v-a14b is a text-to-video"
    )
    assert not workspace.out.exists()
