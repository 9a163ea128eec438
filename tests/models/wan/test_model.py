import pytest
import torch

from models.wan import model as model_module
from models.wan.checkpoint import find_checkpoint
from models.wan.layers import Workload
from models.wan.model import WanModel
from utils.errors import UserError
from utils.layers import global_names
from utils.lora import ADAPTER_WEIGHTS, parameter_names


@pytest.fixture
def make_model(tiny_ti2v, make_config):
    def make(mode: str = "dit_lora", **sections) -> WanModel:
        sections["model"] = {"ckpt_path": str(tiny_ti2v)} | sections.get("model", {})
        config = make_config(mode, **sections)
        return WanModel(config, find_checkpoint(config.model))

    return make


def test_targets_are_resolved_from_the_checkpoints_headers(make_model):
    model = make_model(adapter={"train_blocks_range": (1, 2)})
    assert model.targets == [f"blocks.{index}.cross_attn.{one}" for index in (1, 2) for one in "kv"]
    assert make_model("encoder_ft").targets == []


def test_a_range_beyond_the_checkpoint_is_refused(make_model):
    with pytest.raises(UserError, match=r"train_blocks_range = \[1, 29\]"):
        make_model(adapter={"train_blocks_range": (1, 29)})


def build(model: WanModel, make_config, build_layers, open_tiny, root, **adapter):
    specs, layers = build_layers(make_config("dit_lora", adapter=adapter), open_tiny(root), model.targets)
    return {
        name: parameter
        for spec, layer in zip(specs, layers, strict=True)
        for name, parameter in global_names(spec.name, layer).items()
    }


def test_ratios_are_those_of_the_full_products(make_model, make_config, build_layers, open_tiny, tiny_ti2v):
    model = make_model(adapter={"alpha": 6.0})
    parameters = build(model, make_config, build_layers, open_tiny, tiny_ti2v, alpha=6.0)
    assert [delta.ratio for delta in model.deltas(parameters)] == [0.0] * len(model.targets)
    generator = torch.Generator().manual_seed(0)
    for target in model.targets:
        up = parameters[parameter_names(target)[1]]
        up.data = torch.randn(up.shape, generator=generator) * 0.01
    base = open_tiny(tiny_ti2v).source
    deltas = {delta.module: delta.ratio for delta in model.deltas(parameters)}
    assert list(deltas) == model.targets
    for target in model.targets:
        down, up = (parameters[name].detach() for name in parameter_names(target))
        expected = (1.5 * up @ down).norm() / base.get(f"{target}.weight").norm()
        assert deltas[target] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("changes", [{"model": {"transformer_dtype": "float8"}}, {"blocks_to_swap": 3}])
def test_ratios_are_of_the_files_weight_where_it_is_stored_otherwise(
    changes, make_model, make_config, build_layers, open_tiny, tiny_ti2v
):
    model = make_model(**changes)
    config = make_config("dit_lora", **changes)
    specs, layers = build_layers(config, open_tiny(tiny_ti2v), model.targets)
    parameters = {
        name: parameter
        for spec, layer in zip(specs, layers, strict=True)
        for name, parameter in global_names(spec.name, layer).items()
    }
    for target in model.targets:
        parameters[parameter_names(target)[1]].data.fill_(0.01)
    base = open_tiny(tiny_ti2v).source
    for delta in model.deltas(parameters):
        assert delta.weight_norm == pytest.approx(base.get(f"{delta.module}.weight").norm().item(), rel=1e-5)
        assert delta.ratio > 0


def test_a_stage_measures_its_own_modules(make_model, make_config, build_layers, open_tiny, tiny_ti2v):
    model = make_model()
    parameters = build(model, make_config, build_layers, open_tiny, tiny_ti2v)
    mine = {name: value for name, value in parameters.items() if name.startswith("blocks.1.")}
    assert [delta.module for delta in model.deltas(mine)] == [
        "blocks.1.cross_attn.k",
        "blocks.1.cross_attn.v",
    ]
    assert model.deltas({}) == []


def test_an_export_is_read_again(make_model, make_config, build_layers, open_tiny, tiny_ti2v, tmp_path):
    """An adapter as it is before any step has no effect and passes; one that is not finite is refused."""
    model = make_model()
    parameters = build(model, make_config, build_layers, open_tiny, tiny_ti2v)
    trained = {
        name: parameters[name].detach().clone()
        for target in model.targets
        for name in parameter_names(target)
    }
    model.export(trained, tmp_path, {"variant": "ti2v-5b"})
    trained[parameter_names(model.targets[-1])[1]][0, 0] = torch.inf
    with pytest.raises(UserError, match="read again after it was written.*holds NaN or infinite values"):
        model.export(trained, tmp_path, {"variant": "ti2v-5b"})


@pytest.mark.parametrize("is_untrained", [True, False])
def test_an_adapter_that_never_trained_is_checked_to_change_nothing(
    make_model, make_config, build_layers, open_tiny, tiny_ti2v, tmp_path, monkeypatch, is_untrained
):
    checks = []
    monkeypatch.setattr(
        model_module, "check_saved_adapter", lambda *_, is_untrained: checks.append(is_untrained)
    )
    model = make_model()
    parameters = build(model, make_config, build_layers, open_tiny, tiny_ti2v)
    trained = {
        name: parameters[name].detach().clone()
        for target in model.targets
        for name in parameter_names(target)
    }
    if not is_untrained:
        trained[parameter_names(model.targets[-1])[1]][0, 0] = 1e-6
    model.export(trained, tmp_path, {"variant": "ti2v-5b"})
    assert checks == [is_untrained]


def test_the_exported_adapter_starts_a_model(
    make_model, make_config, build_layers, open_tiny, tiny_ti2v, tmp_path
):
    model = make_model()
    parameters = build(model, make_config, build_layers, open_tiny, tiny_ti2v)
    trained = {
        name: torch.randn_like(parameters[name]).detach()
        for target in model.targets
        for name in parameter_names(target)
    }
    paths = model.export(trained, tmp_path, {"variant": "ti2v-5b"})
    assert paths[0] == tmp_path / ADAPTER_WEIGHTS
    with pytest.raises(UserError, match="only there"):
        make_model(adapter={"init_from_existing": str(tmp_path), "include": ("cross_attn.k",)})
    continued = make_model(adapter={"init_from_existing": str(tmp_path)})
    continued.attach_data([], None)
    continued.batches.workload = Workload(video_tokens=24.0, text_tokens=8.0)
    for spec in continued.layer_specs():
        if spec.trainable:
            built = global_names(spec.name, spec.build(torch.device("cpu")))
            for name, parameter in built.items():
                if parameter.requires_grad:
                    assert torch.equal(parameter, trained[name]), name


def test_opening_a_model_reads_no_weight(make_model, monkeypatch):
    def refuse(self, name):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr("utils.tensor_source._SafetensorsSource.get", refuse)
    model = make_model()
    assert model.arch.num_layers > 0
    assert model.targets
