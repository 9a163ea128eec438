import random
from dataclasses import replace

import torch

from models.wan.arch import expected_shapes
from models.wan.component_shapes import expected_umt5_shapes
from models.wan.names import umt5_to_official
from models.wan.vae import WanVae
from scripts.tiny_world import dit_training
from scripts.tiny_world.dit_training import (
    ARCH,
    SHORT_TOKENS,
    UMT5,
    code_pictures,
    encode_ids,
    new_dit,
    new_umt5,
    train_joint,
)
from scripts.tiny_world.tokens import Tokens, write_tokenizer_files
from scripts.tiny_world.vae_training import SIZES, new_vae


def small(monkeypatch) -> WanVae:
    monkeypatch.setattr(dit_training, "NUM_PICTURES", 64)
    monkeypatch.setattr(dit_training, "JOINT", replace(dit_training.JOINT, num_steps=25))
    return WanVae(new_vae(0).requires_grad_(False), SIZES.kind, torch.float32, torch.device("cpu"))


def test_names_and_shapes_are_the_official_ones():
    assert {name: tuple(value.shape) for name, value in new_dit(0).state_dict().items()} == expected_shapes(
        ARCH
    )
    encoder = {umt5_to_official(name): tuple(value.shape) for name, value in new_umt5(0).state_dict().items()}
    assert encoder == expected_umt5_shapes(UMT5)


def test_the_start_follows_from_the_seed():
    for new in (new_dit, new_umt5):
        first, again, other = (list(new(seed).parameters()) for seed in (0, 0, 1))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_coded_pictures_are_those_of_their_scenes(monkeypatch):
    scenes, latents = code_pictures(small(monkeypatch), 0)
    assert latents.shape == (64, ARCH.in_dim, 1, 6, 6)
    assert len(scenes) == 64
    assert not torch.equal(latents[0], latents[1])


def test_text_states_do_not_depend_on_who_else_is_in_the_batch():
    umt5 = new_umt5(0).eval()
    alone, _ = encode_ids(umt5, [[4, 9, 1]])
    padded, lens = encode_ids(umt5, [[4, 9, 1], [5, 6, 7, 8, 9, 1]])
    assert torch.allclose(padded[0, :3], alone[0], atol=1e-5)
    assert not padded[0, 3:].any()
    assert lens.tolist() == [3, 6]


def test_captions_are_drawn_again_until_they_are_short(tmp_path, monkeypatch):
    write_tokenizer_files(tmp_path / "tokens")
    tokens = Tokens(tmp_path / "tokens")
    scenes, _ = code_pictures(small(monkeypatch), 0)
    generator = random.Random(0)
    short = [dit_training._caption_ids(tokens, scene, generator, SHORT_TOKENS) for scene in scenes]
    free = [dit_training._caption_ids(tokens, scene, generator, None) for scene in scenes]
    assert max(map(len, short)) <= SHORT_TOKENS < max(map(len, free))


def test_training_lowers_the_loss_and_moves_everything(tmp_path, monkeypatch):
    write_tokenizer_files(tmp_path / "tokens")
    vae, losses = small(monkeypatch), []
    monkeypatch.setattr(dit_training, "per_sample_loss", _recording(dit_training.per_sample_loss, losses))
    umt5, dit, mean = train_joint(vae, Tokens(tmp_path / "tokens"), 0, tmp_path, lambda _: None)
    assert len(losses) == 25
    assert sum(losses[20:]) < 0.95 * sum(losses[:5])
    assert abs(mean - sum(losses) / 25) < 1e-4
    for trained, start in ((umt5, new_umt5(0)), (dit, new_dit(0))):
        moved = [not torch.equal(a, b) for a, b in zip(trained.parameters(), start.parameters(), strict=True)]
        assert all(moved)


def _recording(function, losses):
    def record(*arguments):
        value = function(*arguments)
        losses.append(value.mean().item())
        return value

    return record
