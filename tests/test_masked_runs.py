"""Loss masks in whole runs of both modes: what they change, and what they leave as it is."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from tests.helpers.workspace import Workspace, check_refused, make_workspace
from utils.metrics import read_metrics

# Two samples a micro-batch, so that some hold one with and one without a mask.
RUN = ("max_steps=3", "micro_batch_size_per_gpu=2", "checkpoint_every_n_steps=3")
TRAINED = {"dit_lora": "adapter_model.safetensors", "encoder_ft": "text_encoder.safetensors"}


@pytest.fixture
def workspace(tmp_path, tiny_ti2v, tiny_dataset) -> Workspace:
    return make_workspace(tmp_path, tiny_ti2v, tiny_dataset)


def give_masks(workspace: Workspace, level: int) -> None:
    """Masks for an image and two videos: white on the left, `level` on the right."""
    folder = workspace.root / "masks"
    folder.mkdir(exist_ok=True)
    for name in ("image_00.png", "video_00.mp4", "video_02.mp4"):
        width, height = (128, 96) if name == "video_00.mp4" else (128, 128)
        pixels_HW = np.full((height, width), 255, np.uint8)
        pixels_HW[:, width // 2 :] = level
        Image.fromarray(pixels_HW).save(folder / f"{Path(name).stem}.png")
    path = workspace.root / "dataset.toml"
    text = path.read_text()
    if "mask_path" not in text:
        path.write_text(f'{text}mask_path = "{folder}"\n')


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run)]


def trained(run: Path, mode: str) -> dict:
    return load_file(next(run.glob("epoch*")) / TRAINED[mode])


@pytest.mark.parametrize("mode", ["dit_lora", "encoder_ft"])
def test_white_masks_change_no_bit_and_others_do(workspace, capsys, mode) -> None:
    assert workspace.train(mode, *RUN) == 0
    assert "loss masks" not in capsys.readouterr().err
    give_masks(workspace, 255)
    assert workspace.train(mode, *RUN) == 0
    said = capsys.readouterr().err
    assert "loss masks: 3 of 6 samples" in said
    assert "cache of latents: 6 items, 0 encoded now" in said  # what is cached does not depend on masks
    give_masks(workspace, 0)
    assert workspace.train(mode, *RUN) == 0
    plain, white, half = workspace.runs()
    assert losses(white) == losses(plain) != losses(half)
    weights, same, other = (trained(run, mode) for run in (plain, white, half))
    assert all((same[name] == weights[name]).all() for name in weights)
    assert not all((other[name] == weights[name]).all() for name in weights)


@pytest.mark.long
def test_a_changed_mask_is_another_dataset(workspace, capsys) -> None:
    give_masks(workspace, 0)
    assert workspace.train("dit_lora", *RUN) == 0
    give_masks(workspace, 50)
    resume = ("max_steps=5", "micro_batch_size_per_gpu=2", "checkpoint_every_n_steps=3")
    capsys.readouterr()
    code = workspace.train("dit_lora", *resume, flags=["--resume_from_checkpoint"])
    check_refused(code, capsys.readouterr().err, "dataset: ", "with other content")
    give_masks(workspace, 0)
    assert workspace.train("dit_lora", *resume, flags=["--resume_from_checkpoint"]) == 0
    assert len(losses(workspace.run())) == 5


@pytest.mark.long
@pytest.mark.parametrize("mode", ["dit_lora", "encoder_ft"])
def test_masks_give_the_same_losses_on_two_stages(workspace, mode) -> None:
    give_masks(workspace, 0)
    assert workspace.train(mode, *RUN) == 0
    done = workspace.launch(["torchrun", "--nproc_per_node", "2"], mode, *RUN, "pipeline_stages=2")
    assert done.returncode == 0, done.stderr
    one, two = workspace.runs()
    assert losses(one) == losses(two)
    weights, other = trained(one, mode), trained(two, mode)
    assert all((other[name] == weights[name]).all() for name in weights)
