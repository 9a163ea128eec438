"""The DiT of a checkpoint as a denoiser: what it computes, and that its memory is given back."""

import weakref

import pytest
import torch

from models.wan.denoisers import open_dit
from models.wan.layouts import expert_model

CPU = torch.device("cpu")


def open_expert(make_config, root, expert, **model):
    config = make_config("dit_lora", model={"ckpt_path": str(root), "expert": "high_noise", **model})
    return open_dit(config, expert_model(config.model, expert), 12, CPU, None)


def test_it_computes_what_the_transformer_does(
    tiny_t2v, make_config, open_tiny, build_reference, sampling_inputs
):
    latents, timesteps, texts = sampling_inputs
    reference = build_reference(open_tiny(tiny_t2v))
    with open_expert(make_config, tiny_t2v, "high_noise") as dit, torch.no_grad():
        for text, velocity in zip(texts, dit.velocities(latents, timesteps, texts), strict=True):
            assert torch.equal(velocity, reference(latents, timesteps, text))
    with open_expert(make_config, tiny_t2v, "low_noise") as dit, torch.no_grad():
        assert not torch.equal(
            dit.velocities(latents, timesteps, texts)[0], reference(latents, timesteps, texts[0])
        )


def test_the_memory_is_given_back_though_the_dit_is_still_named(tiny_t2v, make_config):
    with open_expert(make_config, tiny_t2v, "high_noise") as dit:
        weights = [weakref.ref(p) for layer in dit.layers.values() for p in layer.parameters()]
        assert len(weights) > 50
    assert dit.layers == {}
    assert not [weight for weight in weights if weight() is not None]


@pytest.mark.parametrize("values", [{"transformer_dtype": "float8"}, {"dtype": "bfloat16"}])
def test_it_runs_in_the_precision_of_the_configuration(
    values, tiny_t2v, make_config, sampling_inputs, relative_error
):
    latents, timesteps, texts = sampling_inputs
    found = []
    for model in ({}, values):
        with open_expert(make_config, tiny_t2v, "high_noise", **model) as dit, torch.no_grad():
            found.append(dit.velocities(latents, timesteps, texts[:1])[0].float())
    # Measured: 2.3e-2 in 8 bits, 3.7e-3 in bfloat16.
    assert 1e-4 < relative_error(found[1], found[0]) < 0.1


def test_a_file_of_one_expert_stays_that_experts(tiny_t2v, make_config):
    own = str(tiny_t2v / "high_noise_model")
    config = make_config(
        "dit_lora", model={"ckpt_path": str(tiny_t2v), "expert": "high_noise", "transformer_path": own}
    )
    assert expert_model(config.model, "high_noise").transformer_path == own
    assert expert_model(config.model, "low_noise").transformer_path is None
    both = make_config(
        "dit_lora", model={"ckpt_path": "unused", "expert": "both", "transformer_path": str(tiny_t2v)}
    )
    assert [expert_model(both.model, expert).transformer_path for expert in ("high_noise", "low_noise")] == (
        [str(tiny_t2v)] * 2
    )
