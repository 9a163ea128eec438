"""What arms are held against: the base's latents are the base's, and are drawn again where they are lost."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from scripts.tiny_world import proof_measure, proof_task
from scripts.tiny_world.asset import ASSET, load_official, read_quality, write_official
from scripts.tiny_world.drawing import Drawing
from scripts.tiny_world.proof_arms import Plan
from scripts.tiny_world.proof_data import Amounts
from scripts.tiny_world.proof_measure import Painter, Weights, measure
from scripts.tiny_world.proof_task import Place, read_result, run_task

AMOUNTS = Amounts(known_prompts=3, new_prompts=3, held_out_prompts=3, neutral_prompts=3)
BASE, GENTLE = Plan(arms=("base", "gentle")).chosen()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    work = tmp_path_factory.mktemp("proof")
    write_official(ASSET, work / "checkpoint")
    return Place(work, work / "checkpoint", Drawing(**read_quality()["drawing"] | {"steps": 2}))


@pytest.fixture(scope="module")
def painter(place) -> Painter:
    return Painter(load_official(place.checkpoint), place.checkpoint, place.drawing)


def test_no_arm_but_the_base_writes_what_all_are_held_against(painter, tmp_path):
    latents = tmp_path / "latents.safetensors"
    with pytest.raises(ValueError, match="the base was not drawn yet"):
        measure(painter, Weights(Path("encoder.safetensors")), 1000, AMOUNTS, latents)
    with pytest.raises(ValueError, match="the base was not drawn yet"):
        measure(painter, Weights(None, {"low_noise": Path("adapter.safetensors")}), 1000, AMOUNTS, latents)
    assert not latents.exists()
    found = measure(painter, Weights(), 1000, AMOUNTS, latents)
    assert found["known"]["distance"] == found["neutral"]["distance"] == [0.0] * 3
    assert load_file(latents)["known"].shape == (3, 16, 1, 6, 6)
    assert [len(found["single"][what]) for what in ("text", "colour", "both")] == [3, 3, 3]


def test_a_tuned_encoder_is_held_against_the_bases_latents(painter, monkeypatch, tmp_path):
    latents = tmp_path / "latents.safetensors"
    measure(painter, Weights(), 1000, AMOUNTS, latents)
    kept = latents.read_bytes()
    draw = proof_measure.draw

    def moved(*arguments: Any) -> tuple[torch.Tensor, Any]:
        own, pictures = draw(*arguments)
        return own * 1.5, pictures

    monkeypatch.setattr(proof_measure, "draw", moved)
    encoder = painter.checkpoint / "models_t5_umt5-xxl-enc-bf16.pth"
    found = measure(painter, Weights(encoder), 1000, AMOUNTS, latents)
    # The base's own encoder, so half of its latents is all there is.
    assert found["known"]["distance"] == pytest.approx([0.5] * 3)
    assert latents.read_bytes() == kept


def test_the_base_is_drawn_again_where_its_latents_are_lost(place, monkeypatch):
    plan = Plan(seeds=(0,), amounts=AMOUNTS)
    first = run_task(place, plan, BASE, 0)
    kept = place.base_latents(0).read_bytes()
    done: list[str] = []
    whole = proof_task.measure

    def counted(*arguments: Any, **named: Any) -> dict[str, Any]:
        done.append("measured")
        return whole(*arguments, **named)

    monkeypatch.setattr(proof_task, "measure", counted)
    assert run_task(place, plan, BASE, 0) == first
    assert not done
    place.base_latents(0).unlink()
    again = run_task(place, plan, BASE, 0)
    assert done == ["measured"]
    assert again["outcomes"] == first["outcomes"] == read_result(place.result("base", 0))["outcomes"]
    assert place.base_latents(0).read_bytes() == kept


def test_another_arm_that_is_done_is_read(place):
    place.result("gentle", 0).parent.mkdir(parents=True, exist_ok=True)
    place.result("gentle", 0).write_text('{"arm": "gentle"}')
    assert run_task(place, Plan(seeds=(0,), amounts=AMOUNTS), GENTLE, 0) == {"arm": "gentle"}
