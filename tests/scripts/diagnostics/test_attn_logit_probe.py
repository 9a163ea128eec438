"""The logit probe on cases whose answer is known, on random inputs and on the cache of a real run."""

import csv
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.wan.checkpoint import open_transformer
from scripts.diagnostics import attn_logit_probe as probe
from tests.helpers.workspace import make_workspace
from utils.data.cache import CacheStore
from utils.report import read_summary


def run(tmp_path, *arguments):
    status = probe.main(
        [*map(str, arguments), "--reports_dir", str(tmp_path / "reports"), "--run_tag", "tag"]
    )
    directory = tmp_path / "reports" / "attn_logit_probe" / "tag"
    return status, directory, read_summary(directory) if directory.exists() else None


def blocks_of(directory):
    with (directory / "logit_blocks.csv").open(newline="") as file:
        return {
            (int(row["block"]), row["attention"]): {
                key: float(value) for key, value in row.items() if key != "attention"
            }
            for row in csv.DictReader(file)
        }


def changed_copy(base, target, changes):
    """The base as one file, with some tensors changed by a function each."""
    source = open_transformer(base)
    tensors = {name: source.get(name).clone() for name in source.shapes}
    for name, change in changes.items():
        tensors[name] = change(tensors[name]).contiguous()
    target.mkdir()
    save_file(tensors, target / "model.safetensors")
    shutil.copy(base / "config.json", target)
    return target


def write_adapter(path, source, modules):
    """LoRA of full rank: {module: what is added to its weight}."""
    tensors = {}
    for module, added in modules.items():
        tensors[f"diffusion_model.{module}.lora_A.weight"] = torch.eye(added.shape[1])
        tensors[f"diffusion_model.{module}.lora_B.weight"] = added.float().contiguous()
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_ti2v, tiny_dataset):
    """A translator run of a few steps, with its cache."""
    workspace = make_workspace(tmp_path_factory.mktemp("run"), tiny_ti2v, tiny_dataset)
    done = workspace.launch(["python"], "dit_lora", "max_steps=2", "optimizer.lr=1e-3")
    assert done.returncode == 0, done.stderr
    return workspace


def num_layers(base):
    return json.loads((base / "config.json").read_text())["num_layers"]


@pytest.mark.parametrize("attention", ["cross", "self"])
def test_norm_k_times_1_3_gives_1_30_in_that_block_and_1_00_elsewhere(
    tmp_path, tiny_ti2v, trained, attention
):
    name = f"blocks.1.{attention}_attn.norm_k.weight"
    other = changed_copy(tiny_ti2v, tmp_path / "other", {name: lambda weight: weight * 1.3})
    for place, inputs in (
        ("synthetic", ("--synthetic",)),
        ("cached", ("--config", trained.run() / "config.toml", "--samples", 2)),
    ):
        arguments = ("--base", tiny_ti2v, "--against", other, "--attention", attention, *inputs)
        status, directory, summary = run(tmp_path / place, *arguments)
        assert status == 1 and summary.verdict == "fail"
        found = blocks_of(directory)
        assert len(found) == num_layers(tiny_ti2v)
        for (block, kind), row in found.items():
            # float32: the largest error measured is 3e-7.
            expected = 1.3 if block == 1 else 1.0
            assert kind == f"{attention}_attn" and row["mean_std_ratio"] == pytest.approx(expected, abs=1e-5)
            assert row["min_std_ratio"] == pytest.approx(expected, abs=1e-5)
            assert row["key_ratio"] == pytest.approx(1.0, abs=1e-6)
        assert summary.metrics["worst_block"] == 1 and "1.3000" in summary.explanation
        assert found[1, f"{attention}_attn"]["mean_entropy_ratio"] < 1
        heads = summary.metrics["num_heads"]
        assert summary.metrics["num_heads_outside"] * len(found) == heads
        assert (directory / "logit_ratio_per_block.png").stat().st_size < 100_000


def test_a_longer_key_is_taken_back_by_the_norm_and_a_longer_value_is_not(tmp_path, tiny_ti2v):
    source = open_transformer(tiny_ti2v)
    key, value = "blocks.0.cross_attn.k", "blocks.1.cross_attn.v"
    weights = {module: source.get(f"{module}.weight").float() for module in (key, value)}
    biases = {module: source.get(f"{module}.bias").float() for module in (key, value)}
    # Without biases, a weight that is half as long again makes keys half as long again.
    base = changed_copy(tiny_ti2v, tmp_path / "base", {f"{m}.bias": torch.zeros_like for m in biases})
    adapter = write_adapter(
        tmp_path / "a.safetensors", source, {m: 0.5 * weight for m, weight in weights.items()}
    )
    status, directory, summary = run(tmp_path, "--base", base, "--adapter", adapter, "--synthetic")
    found = blocks_of(directory)
    assert status == 0 and set(found) == {(0, "cross_attn"), (1, "cross_attn")}
    assert found[0, "cross_attn"]["key_ratio"] == pytest.approx(1.5, rel=1e-5)
    assert found[0, "cross_attn"]["mean_std_ratio"] == pytest.approx(1.0, abs=1e-4)  # norm_k's eps
    assert found[1, "cross_attn"]["value_ratio"] == pytest.approx(1.5, rel=1e-5)
    assert found[1, "cross_attn"]["mean_std_ratio"] == 1.0
    assert summary.metrics["max_key_ratio"] == pytest.approx(1.5, rel=1e-5)


def test_an_adapter_that_adds_nothing_is_inconclusive(tmp_path, tiny_ti2v):
    source = open_transformer(tiny_ti2v)
    shape = source.shapes["blocks.0.cross_attn.k.weight"]
    adapter = write_adapter(tmp_path / "a.safetensors", source, {"blocks.0.cross_attn.k": torch.zeros(shape)})
    status, directory, summary = run(tmp_path, "--base", tiny_ti2v, "--adapter", adapter, "--synthetic")
    assert status == 3 and "Nothing changes" in summary.explanation
    assert summary.metrics["inputs"] == "random, 256 queries"
    assert blocks_of(directory)[0, "cross_attn"]["mean_std_ratio"] == 1.0


def test_a_run_s_own_adapter_on_its_own_samples_and_the_run_stays_as_it_is(
    trained, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in trained.root.rglob("*")}
    status, directory, summary = run(tmp_path, "--adapter", trained.run())
    assert {path: path.stat().st_mtime_ns for path in trained.root.rglob("*")} == before
    assert status == 0, summary
    assert summary.metrics["inputs"] == "2 of 6 cached sample(s) at quantiles 0.1,0.5,0.9"
    with (directory / "logit_heads.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["sigma"] for row in rows}) == 3
    assert [entry.role for entry in summary.inputs][:3] == ["adapter", "adapter_config", "config"]
    said = capsys.readouterr().out
    assert "2 of 6 cached sample(s) at noise levels" in said and "block 0 of" in said
    again = run(tmp_path / "again", "--adapter", trained.run())[2]
    assert again.metrics == summary.metrics
    other = run(tmp_path / "other", "--adapter", trained.run(), "--seed", 7)[2]
    assert other.seed == 7 and other.metrics["mean_std_ratio"] != summary.metrics["mean_std_ratio"]


def test_the_number_of_random_queries(tmp_path, tiny_ti2v, monkeypatch):
    from models.wan.probes import logits

    seen = []
    original = logits.synthetic_inputs
    monkeypatch.setattr(
        logits, "synthetic_inputs", lambda *arguments: seen.append(arguments[-1]) or original(*arguments)
    )
    other = changed_copy(tiny_ti2v, tmp_path / "other", {})
    status, _, summary = run(
        tmp_path, "--base", tiny_ti2v, "--against", other, "--synthetic", "--blocks", "1", "--tokens", 32
    )
    assert status == 3 and set(seen) == {32} and summary.metrics["inputs"] == "random, 32 queries"


def test_only_what_is_asked_for_is_read(tmp_path, tiny_ti2v, monkeypatch):
    """With random inputs: nothing but the attentions of the blocks that are measured."""
    from utils.tensor_source import RenamedSource

    read = []
    original = RenamedSource.get
    monkeypatch.setattr(RenamedSource, "get", lambda self, name: read.append(name) or original(self, name))
    other = changed_copy(tiny_ti2v, tmp_path / "other", {})
    arguments = ("--base", tiny_ti2v, "--against", other, "--synthetic", "--blocks", "1")
    assert run(tmp_path, *arguments)[0] == 3
    assert read and {name.rsplit(".", 2)[0] for name in read} == {"blocks.1.cross_attn"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--blocks", "9"), "there is no block 9"),
        (("--blocks", "3-1"), "no range of blocks"),
        (("--blocks", "x"), "no range of blocks"),
        (("--quantiles", "0,1"), "between 0 and 1"),
        (("--samples", "0"), "at least 1"),
        (("--min_ratio", "1.2"), "swap them"),
        (("--device", "toaster"), "is no device"),
        (("--device", "meta"), "--device meta: is not supported"),
        (("--device", "cuda:99"), "GPU(s) can be used here"),
        (("--attention", "self"), "choose another --attention"),
    ],
)
def test_wrong_use_is_one_line(trained, tmp_path, capsys, arguments, words):
    status, directory, _ = run(tmp_path, "--adapter", trained.run(), *arguments)
    error = capsys.readouterr().err
    assert status == 2 and words in error and error.count("\n") == 1 and not directory.exists()


def test_a_cache_that_is_not_there_or_not_whole_is_named(trained, tmp_path, capsys):
    text = (trained.run() / "config.toml").read_text()
    dataset = (trained.root / "dataset.toml").read_text()
    (tmp_path / "dataset.toml").write_text(dataset.replace(str(trained.cache), str(tmp_path / "nothing")))
    lines = [
        f'dataset = "{tmp_path}/dataset.toml"' if line.startswith("dataset = ") else line
        for line in text.splitlines()
    ]
    (tmp_path / "c.toml").write_text("\n".join(lines))
    adapter = trained.run() / "epoch1"
    assert run(tmp_path, "--config", tmp_path / "c.toml", "--adapter", adapter)[0] == 2
    assert "--cache_only" in capsys.readouterr().err and not (tmp_path / "nothing").exists()
    assert run(tmp_path, "--adapter", adapter / "adapter_model.safetensors", "--base", tmp_path)[0] == 2
    capsys.readouterr()
    lone = shutil.copy(adapter / "adapter_model.safetensors", tmp_path / "lone.safetensors")
    assert run(tmp_path, "--adapter", lone, "--base", trained.checkpoint)[0] == 2
    assert "--synthetic" in capsys.readouterr().err


def test_other_variants_and_layouts(tmp_path, tiny_t2v, capsys):
    expert = tiny_t2v / "low_noise_model"
    source = open_transformer(expert)
    weight = source.get("blocks.0.cross_attn.k.weight").float()
    random = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    adapter = write_adapter(
        tmp_path / "a.safetensors", source, {"blocks.0.cross_attn.k": 0.3 * random * weight.std()}
    )
    arguments = ("--adapter", adapter, "--synthetic")
    _, official, _ = run(tmp_path / "official", *arguments, "--base", tiny_t2v, "--expert", "low_noise")
    comfy = tmp_path / "comfy"
    comfy.mkdir()
    tensors = {f"model.diffusion_model.{name}": source.get(name).clone() for name in source.shapes}
    save_file(tensors, comfy / "model.safetensors")
    shutil.copy(expert / "config.json", comfy)
    _, other, _ = run(tmp_path / "comfy_report", *arguments, "--base", comfy / "model.safetensors")
    assert blocks_of(official) == blocks_of(other) and load_file(adapter)
    (comfy / "config.json").unlink()
    assert run(tmp_path / "bare", *arguments, "--base", comfy / "model.safetensors")[0] == 2
    assert "how many heads" in capsys.readouterr().err


def copied_run(trained, target):
    """The run with its dataset and cache elsewhere, to spoil something there."""
    shutil.copytree(trained.root, target, symlinks=True)
    for path in (target / "dataset.toml", *target.rglob("config.toml")):
        path.write_text(path.read_text().replace(str(trained.root), str(target)))
    (adapter,) = target.glob("out/*/epoch*/adapter_model.safetensors")
    return adapter


def content(root):
    return {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_nothing_is_written_where_samples_are_new_or_changed(trained, tmp_path, capsys):
    """Files with other time stamps and one that was never cached: looked at, left out, and not remembered."""
    root = tmp_path / "copy"
    adapter = copied_run(trained, root)
    shutil.copy(root / "media" / "image_00.txt", root / "media" / "new.txt")
    picture = next(path for path in (root / "media").glob("image_00.*") if path.suffix != ".txt")
    shutil.copy(picture, root / "media" / f"new{picture.suffix}")
    with (root / "media" / f"new{picture.suffix}").open("ab") as file:
        file.write(b"\0")  # another content, the same picture
    before = content(root)
    status, _, summary = run(tmp_path, "--adapter", adapter, "--samples", 50)
    assert content(root) == before
    assert status == 0 and any("1 sample(s) of the dataset are not in the cache" in n for n in summary.notes)
    assert "6 of 6 cached sample(s) at noise levels" in capsys.readouterr().out


def test_a_damaged_item_is_named_and_left_where_it_is(trained, tmp_path, capsys):
    root = tmp_path / "copy"
    adapter = copied_run(trained, root)
    store = CacheStore(root / "cache")
    for key in store.keys("latents"):
        place = store.place(key)
        data = bytearray(place.shard.path.read_bytes())
        data[place.entry.offset + place.entry.length - 1] ^= 1
        place.shard.path.write_bytes(data)
    before = content(root)
    status, directory, _ = run(tmp_path, "--adapter", adapter)
    assert content(root) == before
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1 and "--cache_only" in error and not directory.exists()


@pytest.mark.parametrize("inputs", ["cached", "synthetic"])
def test_weights_that_are_not_finite_are_named(trained, tmp_path, capsys, inputs):
    spoilt = {"blocks.1.cross_attn.q.weight": lambda weight: weight.fill_(float("nan"))}
    base = changed_copy(trained.checkpoint, tmp_path / "base", spoilt)
    flags = ["--synthetic"] if inputs == "synthetic" else []
    status, directory, _ = run(tmp_path, "--adapter", trained.run(), "--base", base, *flags)
    error = capsys.readouterr().err
    assert status == 2 and "blocks.1.cross_attn: the base's logits are not finite" in error
    assert not directory.exists()


def test_a_base_in_8_bits_is_taken_at_its_scale(tmp_path, tiny_ti2v):
    """norm_k times 1.3 on top of an fp8_scaled file; and against the plain file a ratio near 1, not that of the scale."""
    source = open_transformer(tiny_ti2v)
    tensors = {name: source.get(name).clone() for name in source.shapes}
    for name in list(tensors):
        if name.startswith("blocks.") and tensors[name].dim() == 2:
            scale = tensors[name].float().abs().max() / 448
            tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
            tensors[f"{name.removesuffix('.weight')}.scale_weight"] = scale.reshape(1)
    mark = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    for place, factor in (("plain", 1.0), ("scaled", 1.3)):
        (tmp_path / place).mkdir()
        changed = {"blocks.2.cross_attn.norm_k.weight": tensors["blocks.2.cross_attn.norm_k.weight"] * factor}
        save_file(tensors | mark | changed, tmp_path / place / "model.safetensors")
        shutil.copy(tiny_ti2v / "config.json", tmp_path / place)
    files = [tmp_path / place / "model.safetensors" for place in ("plain", "scaled")]
    _, directory, _ = run(tmp_path / "1", "--base", files[0], "--against", files[1], "--synthetic")
    for (block, _), row in blocks_of(directory).items():
        assert row["mean_std_ratio"] == pytest.approx(1.3 if block == 2 else 1.0, abs=1e-5)
    status, directory, _ = run(tmp_path / "2", "--base", tiny_ti2v, "--against", files[0], "--synthetic")
    assert status == 0
    # e4m3 has 3 bits behind the point: the largest distance from 1 measured is 0.004.
    assert all(row["mean_std_ratio"] == pytest.approx(1, abs=0.02) for row in blocks_of(directory).values())


def test_another_checkpoint_is_that_of_the_config_s_expert(tmp_path, tiny_t2v, trained):
    text = (trained.run() / "config.toml").read_text()
    text = text.replace(str(trained.checkpoint), str(tiny_t2v))
    (tmp_path / "c.toml").write_text(text.replace("[model]\n", '[model]\nexpert = "low_noise"\n'))
    status, _, summary = run(tmp_path, "--config", tmp_path / "c.toml", "--against", tiny_t2v, "--synthetic")
    assert status == 3, summary
    assert {entry.path.split("/")[-2] for entry in summary.inputs[1:]} == {"low_noise_model"}


@pytest.mark.long
@pytest.mark.parametrize("expert", ["high_noise", "low_noise"])
def test_cached_samples_of_image_to_video_and_both_experts(tmp_path, tiny_i2v, tiny_dataset, expert):
    """Videos alone, with their first frame as condition, at the noise levels of the expert."""
    (tmp_path / "work").mkdir()
    workspace = make_workspace(tmp_path / "work", tiny_i2v, tiny_dataset)
    named = f"model.expert={expert}"
    done = workspace.launch(["python"], "dit_lora", "max_steps=2", "optimizer.lr=3e-3", named)
    assert done.returncode == 0, done.stderr
    status, directory, summary = run(tmp_path, "--adapter", workspace.run(), "--attention", "both")
    assert status == 0, summary
    with (directory / "logit_heads.csv").open(newline="") as file:
        sigmas = {float(row["sigma"]) for row in csv.DictReader(file)}
    assert len(sigmas) == 3 and all((sigma >= 0.9) == (expert == "high_noise") for sigma in sigmas)
    assert all(
        row["mean_std_ratio"] == 1 for (_, kind), row in blocks_of(directory).items() if kind == "self_attn"
    )


def test_a_base_that_has_moved_is_named_with_base(trained, tmp_path, capsys):
    """The run's config names a checkpoint that is not there any more; its cache is known by content."""
    adapter = copied_run(trained, tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("config.toml"):
        path.write_text(path.read_text().replace(str(trained.checkpoint), str(tmp_path / "gone")))
    assert run(tmp_path, "--adapter", adapter)[0] == 2
    assert "check --base" in capsys.readouterr().err
    status, _, summary = run(tmp_path, "--adapter", adapter, "--base", trained.checkpoint)
    assert status == 0 and summary.metrics["inputs"] == "2 of 6 cached sample(s) at quantiles 0.1,0.5,0.9"


def test_a_run_s_directory_stands_for_its_config(trained, tmp_path):
    status, _, summary = run(tmp_path, "--config", trained.run())
    assert status == 0
    assert [entry.path for entry in summary.inputs if entry.role == "config"] == [
        str(trained.run() / "config.toml")
    ]
