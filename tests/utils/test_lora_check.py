"""A saved adapter is read again: everything that can be wrong with one is refused, what is right passes."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from utils.config.schema import AdapterConfig
from utils.errors import UserError
from utils.lora import parameter_names, save_adapter
from utils.lora_check import check_saved_adapter

TARGETS = ["blocks.0.cross_attn.k", "blocks.1.cross_attn.v"]
SHAPES = {f"{target}.weight": (6, 4) for target in TARGETS}
METADATA = {"variant": "ti2v-5b", "rank": "2"}


@pytest.fixture
def saved(tmp_path):
    def save(up=1.0):
        trained = {}
        for target in TARGETS:
            down_name, up_name = parameter_names(target)
            trained |= {down_name: torch.ones(2, 4), up_name: torch.full((6, 2), up)}
        return save_adapter(trained, TARGETS, AdapterConfig(rank=2, alpha=4.0), tmp_path, METADATA)[0]

    return save


def check(path, *, targets=TARGETS, shapes=SHAPES, rank=2, metadata=METADATA, is_untrained=False):
    check_saved_adapter(path, targets, shapes, rank, metadata, is_untrained=is_untrained)


def change(path, key, make):
    tensors = load_file(path)
    tensors[key] = make(tensors[key])
    save_file(tensors, path, metadata=METADATA)


def test_sound_files_pass(saved):
    check(saved())
    check(saved(up=0.0), is_untrained=True)


def test_an_untrained_adapter_must_change_nothing(saved):
    with pytest.raises(UserError, match=r"blocks\.0\.cross_attn\.k is untrained and would change the model"):
        check(saved(up=1e-8), is_untrained=True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"targets": [*TARGETS, "blocks.2.cross_attn.k"]}, r"blocks\.2\.cross_attn\.k is missing"),
        ({"targets": TARGETS[:1]}, r"blocks\.1\.cross_attn\.v is missing or is no target"),
        ({"shapes": {}}, "the base has no blocks.0.cross_attn.k"),
        (
            {"shapes": dict.fromkeys(SHAPES, (4, 6))},
            r"has A \[2, 4\] and B \[6, 2\], the base needs \[2, 6\]",
        ),
        ({"rank": 4}, r"the base needs \[4, 4\] and \[6, 4\]"),
        ({"metadata": {"variant": "t2v-a14b"}}, "metadata are not those"),
        ({"metadata": {"base_hash": "1"}}, "metadata are not those"),
    ],
)
def test_what_does_not_fit_is_refused(saved, wrong, message):
    with pytest.raises(UserError, match=rf"adapter_model\.safetensors: .*{message}.*not kept"):
        check(saved(), **wrong)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("part", ["A", "B"])
def test_numbers_that_are_none_are_refused(saved, value, part):
    path = saved()
    change(path, f"diffusion_model.{TARGETS[1]}.lora_{part}.weight", lambda tensor: tensor.fill_(value))
    with pytest.raises(
        UserError, match=r"cross_attn\.v.lora_[AB]\.weight holds NaN or infinite values.*not kept"
    ):
        check(path)
