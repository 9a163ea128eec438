"""What the DiT makes of a text, made once for all steps of a sample: the same bits as made in each, and nothing stale."""

import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from models.wan.arch import VARIANTS
from models.wan.attention import WanAttention
from models.wan.denoisers import open_dit
from models.wan.layouts import expert_model
from models.wan.sample_adapters import AdapterChoice
from models.wan.sample_job import SampleJob, Variation, Where, sample
from models.wan.sampling_settings import official_settings
from models.wan.stages import DitBlockLayer, DitWire
from models.wan.text_reuse import NOT_KEPT, TextReuse
from utils.added_lora import WeightedAdapter, adapters_added
from utils.lora_names import AdapterPair

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[3]
WORKER = ROOT / "tests" / "workers" / "staged_sampling.py"
STEPS = 3


@pytest.fixture
def made(monkeypatch):
    """One entry for each time that a cross-attention makes keys and values."""
    calls = []
    make = WanAttention.keys_and_values

    def counted(self, source_BLD, table):
        calls.extend([self] if table is None else [])
        return make(self, source_BLD, table)

    monkeypatch.setattr(WanAttention, "keys_and_values", counted)
    return calls


def write_adapter(path: Path, expert: str) -> AdapterChoice:
    generator = torch.Generator().manual_seed(len(expert))
    tensors = {}
    for module in ("cross_attn.k", "cross_attn.v", "self_attn.q"):
        name = f"diffusion_model.blocks.1.{module}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, 128, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(128, 4, generator=generator)
    save_file(tensors, path, {"expert": expert, "variant": "t2v-a14b"})
    return AdapterChoice(path, 1.0, expert)


@pytest.fixture
def job(tiny_t2v, make_config, tmp_path):
    """Both experts, three prompts in batches of two; without an adapter, with both at half their weight and at the whole."""
    own = [
        write_adapter(tmp_path / f"{expert}.safetensors", expert) for expert in ("high_noise", "low_noise")
    ]
    half = tuple(replace(choice, weight=0.5) for choice in own)
    config = make_config("dit_lora", model={"ckpt_path": str(tiny_t2v), "expert": "low_noise"})
    settings = replace(
        official_settings(VARIANTS["t2v-a14b"]), width=32, height=32, num_frames=1, steps=STEPS
    )
    prompts = ("a red circle", "a blue square", "a red circle that moves to the right")
    variations = (Variation(), Variation(half), Variation(tuple(own)))
    return SampleJob(config, settings, prompts, (3, 4, 5), "", variations, batch_size=2)


def with_reuse(job: SampleJob, reuse: bool) -> SampleJob:
    return replace(job, settings=replace(job.settings, reuse_text_keys=reuse))


def test_a_text_is_known_by_itself_and_only_while_it_is_kept():
    reuse, text, other = TextReuse(), torch.ones(1, 2, 3), torch.zeros(1, 2, 3)
    assert reuse.number_of(text) == NOT_KEPT
    with reuse.keeping([text, other]):
        assert [reuse.number_of(one) for one in (text, other, text.clone())] == [1, 2, NOT_KEPT]
    assert reuse.number_of(text) == NOT_KEPT


def test_what_is_kept_belongs_to_a_text_and_its_makers_and_goes_with_the_body():
    reuse, text, other = TextReuse(), torch.ones(1), torch.zeros(1)
    one, two = nn.Identity(), nn.Identity()
    makings = []

    def ask(number: int, *makers: nn.Module) -> object:
        return reuse.made(torch.tensor([number]), makers, lambda: makings.append(number) or len(makings))

    assert ask(1, one) is None
    with reuse.keeping([text, other]):
        assert [ask(1, one), ask(1, one), ask(2, one), ask(1, two), ask(1, one, two)] == [1, 1, 2, 3, 4]
        assert ask(NOT_KEPT, one) is None
    # The next texts have the same numbers.
    with reuse.keeping([other]):
        assert ask(1, one) == 5
        with reuse.keeping([text]):
            assert ask(1, one) == 6
        assert reuse.number_of(other) == NOT_KEPT
    assert ask(1, one) is None and makings == [1, 2, 1, 1, 1, 1]


def test_the_number_is_read_once_for_all_layers_of_a_pass(monkeypatch):
    reuse, makers, reads = TextReuse(), (nn.Identity(),), []
    item = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda self: reads.append(1) or item(self))
    with reuse.keeping([torch.ones(1)]):
        for number in (torch.tensor([1]), torch.tensor([0]), torch.tensor([1])):
            for _ in range(4):
                reuse.made(number, makers, lambda: 1)
    assert len(reads) == 3


@pytest.mark.parametrize(
    ("model", "top"),
    [
        ({}, {}),
        ({"dtype": "bfloat16"}, {}),
        ({"transformer_dtype": "float8"}, {}),
        ({"transformer_dtype": "float8", "dtype": "bfloat16"}, {"blocks_to_swap": 2}),
    ],
)
def test_a_pass_has_the_same_bits_whether_it_is_the_first_or_not(
    model, top, tiny_t2v, make_config, sampling_inputs, made
):
    latents, timesteps, texts = sampling_inputs
    config = make_config(
        "dit_lora", model={"ckpt_path": str(tiny_t2v), "expert": "high_noise", **model}, **top
    )
    with open_dit(config, expert_model(config.model, "high_noise"), 12, CPU, None) as dit, torch.no_grad():
        blocks = sum(name.startswith("blocks.") for name in dit.layers)
        plain = dit.velocities(latents, timesteps, texts)
        assert len(made) == 2 * blocks
        with dit.keeping(texts):
            found = [dit.velocities(latents, timesteps, texts) for _ in range(3)]
            reordered = dit.velocities(latents, timesteps, texts[::-1])[::-1]
            assert len(made) == 4 * blocks
            unknown = dit.velocities(latents, timesteps, [text.clone() for text in texts])
            assert len(made) == 6 * blocks
    for row in (*found, reordered, unknown):
        assert all(torch.equal(one, other) for one, other in zip(row, plain, strict=True))


def test_an_adapter_that_comes_too_late_is_not_missed_either(tiny_t2v, make_config, sampling_inputs):
    """Keys and values are kept under the modules that made them."""
    latents, timesteps, texts = sampling_inputs
    generator = torch.Generator().manual_seed(4)
    pair = AdapterPair(
        torch.randn(2, 128, generator=generator), torch.randn(128, 2, generator=generator), 1.0, "none"
    )
    adapters = [WeightedAdapter({"blocks.0.cross_attn.k": pair, "blocks.1.cross_attn.v": pair})]
    config = make_config("dit_lora", model={"ckpt_path": str(tiny_t2v), "expert": "high_noise"})
    with open_dit(config, expert_model(config.model, "high_noise"), 12, CPU, None) as dit, torch.no_grad():
        plain = dit.velocities(latents, timesteps, texts)[0]
        with adapters_added(dit.layers, adapters, CPU):
            adapted = dit.velocities(latents, timesteps, texts)[0]
        assert not torch.equal(adapted, plain)
        with dit.keeping(texts):
            assert torch.equal(dit.velocities(latents, timesteps, texts)[0], plain)
            with adapters_added(dit.layers, adapters, CPU):
                assert torch.equal(dit.velocities(latents, timesteps, texts)[0], adapted)
            assert torch.equal(dit.velocities(latents, timesteps, texts)[0], plain)


def test_samples_of_two_experts_and_several_adapters_have_the_same_bits(job, made):
    kept = sample(with_reuse(job, True), Where(CPU))
    makings = len(made)
    made.clear()
    plain = sample(with_reuse(job, False), Where(CPU))
    assert all(torch.equal(one, other) for one, other in zip(kept, plain, strict=True))
    assert not torch.equal(plain[0], plain[1]) and not torch.equal(plain[1], plain[2])
    # Two experts, three variations, two batches, text and negative prompt: once each, or in each of the steps of both.
    blocks = len(set(made)) // 2
    assert makings == 2 * 3 * 2 * 2 * blocks
    assert len(made) == STEPS * 3 * 2 * 2 * blocks


@pytest.mark.long
def test_two_stages_keep_each_its_own(job, tmp_path):
    plain = sample(with_reuse(job, False), Where(CPU))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    job_file, found = tmp_path / "job.pickle", tmp_path / "found.safetensors"
    job_file.write_bytes(pickle.dumps(job))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, str(WORKER), str(job_file), str(found)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    latents = load_file(found)
    for reuse in ("kept", "plain"):
        for index, expected in enumerate(plain):
            assert torch.equal(latents[f"{reuse}.{index}"], expected), (reuse, index)
    # Of the blocks of both stages together.
    makings = {reuse: int(latents[f"{reuse}.makings"]) for reuse in ("kept", "plain")}
    assert makings["plain"] * 2 == makings["kept"] * STEPS


def test_training_layers_keep_nothing(make_config, build_layers, open_tiny, tiny_t2v):
    _, layers = build_layers(make_config("dit_lora"), open_tiny(tiny_t2v), ["blocks.0.cross_attn.k"])
    assert all(getattr(layer, "reuse", None) is None for layer in layers)
    assert any(isinstance(layer, DitBlockLayer) for layer in layers) and "reuse" not in DitWire._fields
