"""The base's activations block by block are those of the whole model, with one block in memory at a time."""

import gc
import weakref

import pytest
import torch

from models.wan.arch import load_arch
from models.wan.checkpoint import open_transformer
from models.wan.probes import activations_stream
from models.wan.probes.activations_stream import BaseForward, walk
from models.wan.stages import TextWire
from models.wan.transformer import WanBlock, WanTransformer

CPU = torch.device("cpu")


def opened(root):
    place = root / "high_noise_model" if (root / "high_noise_model").is_dir() else root
    source = open_transformer(place)
    return source, load_arch(place / "config.json", source.shapes)


def drawn(arch, num_tokens=7, seed=0, timesteps=(400.0,)):
    random = torch.Generator().manual_seed(seed)
    return TextWire(
        text=torch.randn(1, num_tokens, arch.text_dim, generator=random),
        lens_B=torch.tensor([num_tokens]),
        latents_BCFHW=torch.randn(1, arch.in_dim, 2, 4, 6, generator=random),
        timesteps_BT=torch.tensor([timesteps]),
        seed=torch.tensor([0]),
    )


@pytest.mark.parametrize(
    ("checkpoint", "timesteps"),
    # The second with a clean first frame.
    [("tiny_ti2v", (400.0,)), ("tiny_ti2v", (0.0, 400.0)), ("tiny_t2v", (400.0,)), ("tiny_i2v", (400.0,))],
)
def test_what_attentions_see_is_what_they_see_in_the_whole_model(checkpoint, timesteps, request):
    source, arch = opened(request.getfixturevalue(checkpoint))
    with torch.device("meta"):
        model = WanTransformer(arch)
    state = {name: source.get(name).float().clone() for name, _ in model.named_parameters()}
    model.load_state_dict(state, assign=True)
    expected = {}
    for index, block in enumerate(model.blocks):
        for kind in ("self_attn", "cross_attn"):

            def keep(_, arguments, place=(index, kind)):
                expected[place] = arguments

            block.get_submodule(kind).register_forward_pre_hook(keep)
    wire, wanted = drawn(arch, timesteps=timesteps), [1, 3]
    with torch.no_grad():
        model(wire.latents_BCFHW, wire.timesteps_BT, wire.text)
    seen = {}
    forward = BaseForward(source, arch, torch.float32, CPU)
    streams = forward.begin([("sample", 0.4, wire)])
    done = list(
        walk(
            forward,
            streams,
            wanted,
            ("cross_attn", "self_attn"),
            lambda block, _, kind, inputs: seen.update({(block, kind): inputs}),
        )
    )
    assert done == [0, 1, 2, 3]
    assert set(seen) == {(block, kind) for block in wanted for kind in ("self_attn", "cross_attn")}
    for place, inputs in seen.items():
        states, text, table, *_ = expected[place]
        assert torch.equal(inputs.states_SD, states[0]) and torch.equal(inputs.source_LD, text[0])
        assert (inputs.table is None) == (table is None)
        assert inputs.num_tokens == (7 if place[1] == "cross_attn" else len(inputs.states_SD))


def test_one_block_is_in_memory_at_a_time_and_none_behind_the_last(tiny_ti2v, monkeypatch):
    source, arch = opened(tiny_ti2v)
    alive, at_once, read = weakref.WeakSet(), [], []

    class Counted(WanBlock):
        def __init__(self, *arguments):
            gc.collect()
            super().__init__(*arguments)
            alive.add(self)
            at_once.append(len(alive))

    monkeypatch.setattr(activations_stream, "WanBlock", Counted)
    original = source.get
    monkeypatch.setattr(source, "get", lambda name: read.append(name) or original(name))
    forward = BaseForward(source, arch, torch.float32, CPU)
    streams = forward.begin([("sample", 0.4, drawn(arch)), ("other", 0.6, drawn(arch, seed=1))])
    for _ in walk(forward, streams, [2], ("cross_attn",), lambda *_: None):
        pass
    assert at_once == [1, 1, 1]
    assert not any(name.startswith(("blocks.3.", "head.")) for name in read)
    assert len(read) == len(set(read))
