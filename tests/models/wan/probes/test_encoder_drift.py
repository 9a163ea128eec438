"""Groups, layers, neighbours and the DiT's text embedding, on states whose drift is known."""

import pytest
import torch
from safetensors.torch import save_file

from models.wan.checkpoint import open_sharded
from models.wan.names import dit_to_diffusers
from models.wan.probes.encoder_drift import (
    LayerRecorder,
    load_text_embedding,
    measure_prompts,
    neighbours_kept,
    summarise_group,
)
from models.wan.probes.encoder_prompts import Entry, PromptPlan
from models.wan.probes.encoder_stream import LayerStates
from utils.errors import UserError
from utils.text_drift import drift_of

TEXTS = ["", "a lake", "a red circle", "circle"]
GROUP_OF = ["neutral", "neutral", "domain", "keyword"]
PLAN = PromptPlan(tuple(Entry(group, 1, text, text) for group, text in zip(GROUP_OF, TEXTS, strict=True)), ())
PLACE = {text: index for index, text in enumerate(TEXTS)}


def states():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3 + index, 8, generator=generator) for index in range(4)]


def turned(one):
    """Every state turned by 90 degrees."""
    return torch.stack((-one[:, 1], one[:, 0], *[torch.zeros(len(one))] * 6), dim=1) * (
        one.norm(dim=1) / one[:, :2].norm(dim=1)
    ).unsqueeze(1)


def test_layers_are_measured_by_group():
    base = states()
    tuned = [base[0], base[1], turned(base[2]), base[3] * 2]
    recorder = LayerRecorder(PLAN, PLACE)
    recorder(LayerStates("block 0", 0.25, base, tuned))
    (layer,) = recorder.layers
    assert (layer.layer, layer.weight_change) == ("block 0", 0.25)
    assert layer.drift["neutral"] == 0.0 and layer.distance["neutral"] == 0.0
    assert layer.drift["domain"] == pytest.approx(1.0)
    assert layer.drift["keyword"] == pytest.approx(0.0, abs=1e-12)
    assert layer.distance["keyword"] == pytest.approx(1.0)


def test_groups_agree_with_the_shared_definition():
    base, generator = states(), torch.Generator().manual_seed(1)
    tuned = [one + 0.3 * torch.randn(one.shape, generator=generator) for one in base]
    records = measure_prompts(PLAN, PLACE, base, tuned, lambda rows: rows * 3, 2)
    neutral = summarise_group(records, "neutral")
    assert neutral.num_prompts == 2
    assert neutral.drift == pytest.approx(drift_of(base[:2], tuned[:2]), abs=1e-12)
    assert neutral.min_cosine <= neutral.median_cosine
    assert neutral.dit_mean_cosine == pytest.approx(neutral.mean_cosine)
    assert [record.num_tokens for record in records] == [3, 4, 5, 6]
    assert summarise_group(records[:2], "domain") is None
    without = measure_prompts(PLAN, PLACE, base, tuned, None, 2)
    assert without[0].dit is None and summarise_group(without, "neutral").dit_mean_cosine is None


def test_neighbours_are_counted_by_hand():
    # Landmarks 0 to 3 point along the axes, the last row near 0 and 1, then near 2 and 3.
    base = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 1.0], [1, 0.9, 0, 0]])
    tuned = base.clone()
    tuned[4] = torch.tensor([0, 0, 0.9, 1])
    kept = neighbours_kept(base, tuned, range(4), 2)
    assert kept[:4] == [1.0] * 4 and kept[4] == 0.0
    tuned[4] = torch.tensor([1, 0, 0.9, 0])
    assert neighbours_kept(base, tuned, range(4), 2)[4] == pytest.approx(1 / 3)
    assert neighbours_kept(base, tuned, range(4), 10)[4] == 1.0  # all there are
    assert neighbours_kept(base[:1], tuned[:1], [0], 3) == [1.0]  # none but itself


def test_a_common_part_of_all_states_does_not_hide_neighbours():
    base = torch.tensor([[1.0, 0], [-1, 0], [0, 1.0], [0.9, 0.1]], dtype=torch.float64)
    tuned = base.clone()
    tuned[3] = torch.tensor([-0.9, 0.1])
    # Seen from the origin, all of them point the same way and only the second number tells them apart.
    common = torch.tensor([1e3, 0.0], dtype=torch.float64)
    assert neighbours_kept(base + common, tuned + common, range(3), 1)[3] == 0.0


def test_the_text_embedding_is_the_dits(tiny_ti2v, open_tiny, build_reference, tmp_path):
    checkpoint = open_tiny(tiny_ti2v)
    model = build_reference(checkpoint, torch.float32, torch.float32)
    rows = torch.randn(5, checkpoint.arch.text_dim, generator=torch.Generator().manual_seed(0))
    embed = load_text_embedding(tiny_ti2v, checkpoint.arch.text_dim)
    assert torch.equal(embed(rows), model.text_embedding(rows))
    source = open_sharded(tiny_ti2v)
    renamings = {
        "comfyui": lambda name: f"model.diffusion_model.{name}",
        "shorter": lambda name: f"diffusion_model.{name}",
        "diffusers": dit_to_diffusers,
    }
    for label, rename in renamings.items():
        file = tmp_path / f"{label}.safetensors"
        save_file({rename(name): source.get(name).clone() for name in source.shapes}, file)
        assert torch.equal(load_text_embedding(file, 64)(rows), embed(rows))


def test_a_dit_that_does_not_fit_is_refused(tiny_ti2v, tmp_path):
    with pytest.raises(UserError, match="width 64, but the encoders give 48"):
        load_text_embedding(tiny_ti2v, 48)
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="is not a DiT of Wan 2.2"):
        load_text_embedding(tmp_path / "a.safetensors", 64)
