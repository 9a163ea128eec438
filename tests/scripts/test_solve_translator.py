"""Solving for a translator as a person does: the adapter, its report, caps, privacy, both experts, and bad input."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional as F

from models.wan.arch import load_arch
from models.wan.checkpoint import (
    EXPERT_DIRS,
    TEXT_ENCODER_FILE,
    TOKENIZER_DIR,
    open_text_encoder,
    open_transformer,
)
from models.wan.probes.encoder_drift import load_text_embedding
from models.wan.text_encoder import WanTokenizer, load_umt5
from models.wan.transformer import WanTransformer
from tests.helpers.closed_form import DOMAIN, NEUTRAL, write_prompts, write_tuned
from tests.helpers.diffusers_wan import build_transformer, exact_timesteps
from tests.helpers.workspace import check_refused, make_workspace
from utils.added_lora import WeightedAdapter, adapters_added
from utils.lora_names import read_adapter
from utils.report import read_summary

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "solve_translator.py"
CONFIG = ROOT / "configs" / "smoke_dit_lora.toml"
CPU = torch.device("cpu")


def load_script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


solver = load_script(SCRIPT)


class Place:
    """A directory with prompts and a tuned encoder, and commands in it."""

    def __init__(self, root, checkpoint):
        self.root, self.checkpoint = root, checkpoint
        self.reports = root / "reports"
        self.tuned = write_tuned(root / "tuned.safetensors", checkpoint)
        write_prompts(root)

    def run(self, *flags, out="out", tag="t", domain=True, cap="0.9", **given):
        values = {"model.ckpt_path": self.checkpoint, "model.llm_path": self.tuned} | given
        words = [
            "--config",
            CONFIG,
            "--out",
            self.root / out,
            "--run_tag",
            tag,
            "--reports_dir",
            self.reports,
        ]
        words += [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
        words += ["--set", f"budget.max_delta_ratio={cap}"]
        if "--prompts" not in flags:
            words += ["--prompts", self.root / "neutral.txt"]
        if domain:
            words += ["--domain_prompts", self.root / "domain.txt"]
        return solver.main([str(word) for word in (*words, *flags)])

    def table(self, name, tag="t"):
        return pd.read_csv(self.reports / "closed_form_translator" / tag / f"{name}.csv")

    def summary(self, tag="t"):
        return read_summary(self.reports / "closed_form_translator" / tag)


@pytest.fixture
def place(tmp_path, tiny_ti2v):
    return Place(tmp_path, tiny_ti2v)


def residuals(place, adapter, texts, module):
    """Before and after, by the whole encoders and plain products, one prompt after another."""
    encoders = [
        load_umt5(open_text_encoder(path), torch.float32, CPU)
        for path in (place.checkpoint / TEXT_ENCODER_FILE, place.tuned)
    ]
    tokenizer = WanTokenizer(place.checkpoint / TOKENIZER_DIR)
    embed = load_text_embedding(place.checkpoint, encoders[0].config.d_model)
    weight = open_transformer(place.checkpoint).get(f"{module}.weight").float()
    pair = read_adapter(adapter).modules[module]
    changed = weight + pair.scale * pair.up @ pair.down
    sums = torch.zeros(3, dtype=torch.float64)
    with torch.no_grad():
        for text in texts:
            base, tuned = (
                embed(one(input_ids=torch.tensor([tokenizer(text)])).last_hidden_state[0]) for one in encoders
            )
            wanted = base @ weight.T
            for place_in, got in enumerate((tuned @ weight.T, tuned @ changed.T, torch.zeros(()))):
                sums[place_in] += (got - wanted).double().square().sum()
    before, after, size = sums.sqrt().tolist()
    return before / size, after / size


def test_the_adapter_and_its_report(place, capsys):
    assert place.run("--rank", "6") == 0
    directory = place.reports / "closed_form_translator" / "t"
    assert {path.name for path in directory.iterdir()} == {
        *("report.md", "summary.json", "frontier.png", "groups.csv", "blocks.csv", "modules.csv"),
        *("ridges.csv", "ranks.csv", "prompts.csv"),
    }
    adapter = place.root / "out" / "adapter_model.safetensors"
    file = read_adapter(adapter)
    assert len(file.modules) == 8 and {pair.rank for pair in file.modules.values()} == {6}
    assert {pair.scale for pair in file.modules.values()} == {1.0}
    modules, metrics = place.table("modules").set_index("module"), place.summary().metrics
    assert set(modules.index) == set(file.modules)
    for module, pair in file.modules.items():
        weight = open_transformer(place.checkpoint).get(f"{module}.weight").float()
        ratio = float((pair.up @ pair.down).norm() / weight.norm())
        assert modules.max_delta_ratio[module] == pytest.approx(ratio, rel=1e-4)
    assert 0 < metrics["recovery"] < metrics["full_rank_recovery"] < 1
    assert metrics["recovery"] == pytest.approx(modules.recovery.mean(), rel=1e-6)
    assert metrics["padding_shift"] < 1e-6 and metrics["svd_error"] < 1e-4
    assert metrics["recovery_lost_to_caps"] == 0 and metrics["rank"] == 6
    ranks = place.table("ranks").set_index("rank").recovery
    assert list(ranks.index) == [1, 2, 4, 6, 8, 16] and ranks.is_monotonic_increasing
    assert list(place.table("prompts").num_prompts) == [6, 11, 21, 41]
    ridges = place.table("ridges")
    least = ridges.loc[ridges.loss.idxmin()]
    alike = ridges[ridges.loss <= least.loss + least.loss_error]
    # The largest of those that cannot be told from the best, and so the smallest change.
    assert ridges.is_chosen.sum() == 1 and alike.ridge.idxmax() == ridges.is_chosen.idxmax()
    assert len(alike) > 1 and least.loss_error > 0
    with Image.open(directory / "frontier.png") as image:
        assert image.width <= 1000 and (directory / "frontier.png").stat().st_size < 100_000
    assert f"adapter: {adapter}" in capsys.readouterr().out


def test_residuals_are_those_of_the_written_file_on_prompts_it_has_not_seen(place):
    from models.wan.closed_form.fit_prompts import plan_fit

    assert place.run() == 0
    held = [
        prompt.text
        for prompt in plan_fit(place.root / "neutral.txt", None, None, 0).of("neutral", is_held=True)
    ]
    assert len(held) == 7
    modules = place.table("modules").set_index("module")
    for module in ("blocks.0.cross_attn.k", "blocks.3.cross_attn.v"):
        before, after = residuals(place, place.root / "out", held, module)
        assert modules.before[module] == pytest.approx(before, rel=1e-3)
        assert modules.after[module] == pytest.approx(after, rel=1e-3)


@pytest.mark.long
def test_what_is_written_can_be_probed_and_trained_on(place, tiny_dataset, tmp_path_factory, capsys):
    assert place.run() == 0
    budget = load_script(ROOT / "scripts" / "diagnostics" / "lora_delta_budget.py")
    flags = ["--adapter", place.root / "out", "--base", place.checkpoint, "--max_delta_ratio", "0.9"]
    flags += ["--reports_dir", place.reports, "--run_tag", "t"]
    assert budget.main(list(map(str, flags))) == 0
    probed = read_summary(place.reports / "lora_delta_budget" / "t").metrics
    assert probed["max_ratio"] == pytest.approx(place.summary().metrics["max_delta_ratio"], rel=1e-5)
    with safe_open(place.root / "out" / "adapter_model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["made_by"].startswith("closed form") and metadata["variant"] == "ti2v-5b"
    assert metadata["rank"] == "4" and metadata["targets"].startswith("cross_attn.k in blocks 0-3")
    workspace = make_workspace(tmp_path_factory.mktemp("further"), place.checkpoint, tiny_dataset)
    overrides = (
        f"model.llm_path={place.tuned}",
        f"adapter.init_from_existing={place.root / 'out'}",
        "budget.max_delta_ratio=0.9",
        "max_steps=1",
        "optimizer.lr=0.0",
    )
    assert workspace.train("dit_lora", *overrides) == 0
    (saved,) = workspace.run().glob("epoch*/adapter_model.safetensors")
    own, trained = (read_adapter(path).modules for path in (place.root / "out", saved))
    for module, pair in own.items():
        assert torch.allclose(trained[module].up @ trained[module].down, pair.up @ pair.down, atol=1e-7)
    # The cache of the training names the encoder that the adapter says it is for.
    with safe_open(saved, "pt") as file:
        assert file.metadata()["encoder_hash"] == metadata["encoder_hash"]
        assert file.metadata()["base_hash"] == metadata["base_hash"]


def test_diffusers_loads_it_to_the_same_outputs_as_our_dit(place, monkeypatch):
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    # Timesteps in float64 on diffusers' side too: what is compared is not the rounding of the timestep.
    monkeypatch.setattr("diffusers.models.embeddings.Timesteps.forward", exact_timesteps)
    assert place.run("--ridge", "0.01") == 0
    source = open_transformer(place.checkpoint)
    arch = load_arch(place.checkpoint / "config.json", source.shapes)
    state = {name: source.get(name).float().clone() for name in source.shapes}
    with torch.device("meta"):
        model = WanTransformer(arch)
    model.load_state_dict(state, assign=True)
    parts = {"scheduler": FlowMatchEulerDiscreteScheduler(), "transformer": build_transformer(arch, state)}
    pipeline = WanPipeline(tokenizer=None, text_encoder=None, vae=None, **parts)
    random = torch.Generator().manual_seed(1)
    latents = torch.randn(2, arch.in_dim, 2, 4, 6, generator=random)
    timesteps_B = torch.rand(2, generator=random) * 1000
    texts = torch.randn(2, 9, arch.text_dim, generator=random)
    padded = F.pad(texts, (0, 0, 0, arch.text_len - 9))

    def theirs():
        return pipeline.transformer(latents, timesteps_B, padded, return_dict=False)[0]

    file = place.root / "out" / "adapter_model.safetensors"
    adapter = WeightedAdapter(read_adapter(file).modules)
    with torch.no_grad():
        base, their_base = model(latents, timesteps_B[:, None], texts), theirs()
        with adapters_added({"": model}, [adapter], CPU) as count:
            ours = model(latents, timesteps_B[:, None], texts)
        pipeline.load_lora_weights(str(file))
        found = theirs()
    adapted = [module for module in pipeline.transformer.modules() if hasattr(module, "base_layer")]
    assert count == len(adapted) == 8
    # Measured: 0 (bit-equal), where the adapter adds 10 % of the output.
    assert (ours - base).norm() / base.norm() > 0.01
    assert (found - ours).norm() / ours.norm() < 1e-5
    assert ((found - their_base) - (ours - base)).norm() / (ours - base).norm() < 1e-4


@pytest.mark.long
def test_the_probes_of_trained_adapters_take_it(place):
    assert place.run() == 0
    where = ["--adapter", place.root / "out", "--base", place.checkpoint, "--reports_dir", place.reports]
    where += ["--run_tag", "t"]
    logits = load_script(ROOT / "scripts" / "diagnostics" / "attn_logit_probe.py")
    assert logits.main([*map(str, where), "--synthetic"]) == 0
    metrics = read_summary(place.reports / "attn_logit_probe" / "t").metrics
    assert 0.99 < metrics["min_std_ratio"] <= metrics["max_std_ratio"] < 1.01
    assert (metrics["min_std_ratio"], metrics["max_std_ratio"]) != (1, 1)
    budget = load_script(ROOT / "scripts" / "diagnostics" / "lora_delta_budget.py")
    largest = place.summary().metrics["max_delta_ratio"]
    assert budget.main([*map(str, where), "--max_delta_ratio", str(largest * 1.001)]) == 0
    where[-1] = "above"
    assert budget.main([*map(str, where), "--max_delta_ratio", str(largest * 0.999)]) == 1


def test_the_config_fills_in_the_flags_that_are_not_given(place):
    section = {
        "adapter.init": '"closed_form"',
        "adapter.closed_form.ridge": 0.1,
        "adapter.closed_form.keywords_file": f'"{place.root / "keywords.txt"}"',
    }
    assert place.run(tag="a", out="a", **section) == 0  # --domain_prompts is given, so no keyword counts
    assert place.summary("a").metrics["ridge"] == 0.1
    assert place.run("--ridge", "0.01", tag="b", out="b", **section) == 0
    assert place.summary("b").metrics["ridge"] == 0.01


def test_the_same_command_gives_the_same_numbers(place):
    assert place.run(out="a", tag="a") == place.run(out="b", tag="b") == 0
    one, other = (load_file(place.root / name / "adapter_model.safetensors") for name in "ab")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_cap_is_met_by_a_larger_ridge_and_its_price_is_told(place, capsys):
    assert place.run() == 0
    free = place.summary().metrics
    assert place.run("--max_delta_ratio", "0.02", out="capped", tag="capped") == 0
    capped = place.summary("capped")
    assert 0.018 < capped.metrics["max_delta_ratio"] <= 0.02 < free["max_delta_ratio"]
    assert capped.metrics["ridge"] > capped.metrics["ridge_without_caps"] == free["ridge"]
    assert capped.metrics["recovery_lost_to_caps"] > 0
    assert capped.caps["max_delta_ratio"] == 0.02
    assert "the cap needs a ridge of" in capsys.readouterr().out
    # The config's budget does the same, its mean too.
    budget = {"budget.max_mean_delta_ratio": 0.015}
    assert place.run(out="mean", tag="mean", **budget) == 0
    assert 0.0135 < place.summary("mean").metrics["mean_delta_ratio"] <= 0.015


def test_caps_that_cannot_be_met_are_refused_with_the_nearest(place, capsys):
    code = place.run("--max_delta_ratio", "1e-7")
    check_refused(code, capsys.readouterr().err, "cannot be met", "is the nearest that can be reached")
    code = place.run("--max_delta_ratio", "0.02", "--ridge", "1e-3")
    check_refused(code, capsys.readouterr().err, "--ridge 0.001 reaches a largest delta ratio of")
    assert not (place.root / "out").exists()


def test_a_band_of_blocks_and_a_given_ridge(place):
    assert place.run("--blocks", "1-2", "--ridge", "0.1") == 0
    assert {module.split(".")[1] for module in read_adapter(place.root / "out").modules} == {"1", "2"}
    assert place.summary().metrics["ridge"] == 0.1


def test_what_kept_tokens_weigh(place):
    assert place.run("--ridge", "0.01", "--keep_weight", "0.1", tag="less", out="less") == 0
    assert place.run("--ridge", "0.01", "--keep_weight", "10", tag="more", out="more") == 0
    less, more = (place.table("groups", tag).set_index("group").after for tag in ("less", "more"))
    assert more["domain, fitted"] < 0.3 * less["domain, fitted"]
    assert more["neutral, fitted"] > less["neutral, fitted"]


def test_no_private_word_is_shown(place, capsys):
    assert place.run() == 0
    (place.root / "all.txt").write_text("\n".join([*NEUTRAL, *DOMAIN]) + "\n")
    keywords = ("--prompts", str(place.root / "all.txt"), "--keywords_file", str(place.root / "keywords.txt"))
    assert place.run(*keywords, domain=False, tag="k", out="k") == 0
    said = capsys.readouterr()
    texts = [said.out + said.err]
    texts += [
        path.read_bytes().decode(errors="ignore") for path in place.reports.rglob("*") if path.is_file()
    ]
    texts += [path.read_bytes().decode(errors="ignore") for path in (place.root / "k").iterdir()]
    assert len(texts) > 15 and not any("zorp" in text.lower() for text in texts)
    roles = {entry.role for entry in place.summary("k").inputs}
    assert "prompts" not in roles and "prompts" in {entry.role for entry in place.summary().inputs}
    # Keywords choose the same prompts as the file of the domain names, but which are held out depends on both files.
    assert place.summary("k").metrics["measured_domain_held_out_prompts"] == 1


def test_without_a_domain_it_says_that_nothing_is_known_of_new_words(place, capsys):
    assert place.run(domain=False) == 3
    assert "nobody knows what new words lost" in capsys.readouterr().out
    assert (place.root / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.long
def test_both_experts_from_one_pass(tmp_path, tiny_t2v):
    place = Place(tmp_path, tiny_t2v)
    assert place.run(**{"model.expert": '"both"', "adapter.low_noise.rank": 2}) == 0
    ranks = {}
    for expert, folder in EXPERT_DIRS.items():
        adapter = place.root / "out" / expert / "adapter_model.safetensors"
        with safe_open(adapter, "pt") as file:
            assert file.metadata()["expert"] == expert
        ranks[expert] = {pair.rank for pair in read_adapter(adapter).modules.values()}
        budget = load_script(ROOT / "scripts" / "diagnostics" / "lora_delta_budget.py")
        flags = ["--adapter", adapter, "--base", tiny_t2v / folder, "--max_delta_ratio", "0.9"]
        flags += ["--run_tag", expert, "--reports_dir", place.reports]
        assert budget.main(list(map(str, flags))) == 0
    assert ranks == {"high_noise": {4}, "low_noise": {2}}
    assert set(place.table("modules").expert) == set(EXPERT_DIRS)
    metrics = place.summary().metrics
    assert metrics["high_noise_recovery"] > metrics["low_noise_recovery"] > 0
    # Alone, an expert gets what it gets in a pair.
    assert place.run(out="high", tag="high", **{"model.expert": '"high_noise"'}) == 0
    pair, alone = (
        load_file(place.root / name / "adapter_model.safetensors") for name in ("out/high_noise", "high")
    )
    assert pair.keys() == alone.keys() and all(torch.equal(pair[name], alone[name]) for name in pair)


# Bad input: one clear line, status 2, and nothing is written.


def refused(place, capsys, *flags, expected, **given):
    code = place.run(*flags, **given)
    check_refused(code, capsys.readouterr().err, *expected)
    assert not (place.root / "out").exists() and not (place.reports / "closed_form_translator").exists()


def test_an_encoder_that_is_the_base(place, capsys):
    same = write_tuned(place.root / "same.safetensors", place.checkpoint, strength=0.0)
    refused(place, capsys, expected=("there is nothing to do",), **{"model.llm_path": same})
    base = place.checkpoint / TEXT_ENCODER_FILE
    refused(place, capsys, expected=("names the base encoder itself",), **{"model.llm_path": base})


def test_encoders_of_different_sizes(place, capsys, run_script):
    other = place.root / "other"
    done = run_script("make_tiny_wan.py", "--variant", "ti2v-5b", "--text_layers", "2", "--out", other)
    assert done.returncode == 0, done.stderr
    expected = ("has 2 blocks", "has 3 blocks")
    refused(place, capsys, expected=expected, **{"model.llm_path": other / TEXT_ENCODER_FILE})


def test_encoders_of_different_tokenizers(place, capsys):
    spiece = (place.checkpoint / TOKENIZER_DIR / "spiece.model").read_bytes()
    changed = spiece.replace(b"circle", b"cirkle")
    assert changed != spiece
    write_tuned(
        place.tuned,
        place.checkpoint,
        change=lambda tensors: tensors.update(spiece_model=torch.tensor(list(changed), dtype=torch.uint8)),
    )
    refused(place, capsys, expected=("into other tokens than", "tuned from this base"))


def test_too_few_tokens_for_the_rank(place, capsys):
    (place.root / "few.txt").write_text("a\nb\nc\nd\n")
    prompts = ("--prompts", str(place.root / "few.txt"))
    expected = ("independent tokens, and rank 120 needs at least as many",)
    refused(place, capsys, *prompts, "--rank", "120", expected=expected, domain=False)


def test_a_singular_system(place, capsys):
    (place.root / "few.txt").write_text("a red circle\na blue square\na green circle\na red square\n")
    prompts = ("--prompts", str(place.root / "few.txt"), "--ridge", "0")
    refused(place, capsys, *prompts, expected=("is singular", "larger --ridge"), domain=False)


@pytest.mark.parametrize("name", ["encoder.block.1.layer.0.SelfAttention.q.weight", "shared.weight"])
def test_an_encoder_with_nan(place, capsys, name):
    def damage(tensors):
        tensors[name][:, 0] = float("nan")

    write_tuned(place.tuned, place.checkpoint, change=damage)
    refused(place, capsys, expected=("not finite",))


def test_keywords_in_no_prompt(place, capsys):
    flags = ("--keywords_file", str(place.root / "keywords.txt"))
    refused(place, capsys, *flags, expected=("1 of 1 keywords stand in no prompt",), domain=False)


def test_auto_needs_something_to_hold_out(place, capsys):
    (place.root / "few.txt").write_text("a red circle\na blue square moves\n")
    prompts = ("--prompts", str(place.root / "few.txt"))
    refused(place, capsys, *prompts, expected=("fewer than 4 neutral ones",), domain=False)


@pytest.mark.parametrize(
    ("given", "flags", "expected"),
    [
        ({"adapter.include": '["cross_attn.{k,v,o}"]'}, (), "cross_attn.o is not solved for"),
        ({"adapter.init_from_existing": '"x"'}, (), "would be ignored"),
        ({}, ("--blocks", "2-9"), "the checkpoint's blocks are 0 .. 3"),
        ({}, ("--rank", "500"), "is 128 wide"),
        ({"adapter.rnk": 3}, (), "unknown key"),
    ],
)
def test_a_config_that_asks_for_something_else(place, capsys, given, flags, expected):
    refused(place, capsys, *flags, expected=(expected,), **given)


def test_configs_of_the_other_mode_and_without_an_encoder(place, capsys):
    words = ["--config", ROOT / "configs" / "smoke_te_ft.toml", "--out", place.root / "out"]
    check_refused(solver.main(list(map(str, words))), capsys.readouterr().err, "trains the encoder")
    words[1] = CONFIG
    check_refused(solver.main(list(map(str, words))), capsys.readouterr().err, "model.llm_path is not set")


def test_a_place_that_is_taken_or_not_for_weights(place, capsys):
    (place.root / "out").mkdir()
    check_refused(place.run(), capsys.readouterr().err, "exists already and is never overwritten")
    check_refused(place.run(out="reports/x"), capsys.readouterr().err, "lies among reports")


@pytest.mark.parametrize(
    "flags", [("--ridge", "-1"), ("--ridge", "much"), ("--blocks", "3-1"), ("--keep_weight", "0")]
)
def test_flags_that_are_no_values(place, flags):
    with pytest.raises(SystemExit) as caught:
        place.run(*flags)
    assert caught.value.code == 2


def test_help_needs_no_torch():
    code = f"import runpy, sys; sys.argv = ['x', '--help']; sys.path.insert(0, {str(ROOT)!r})\n"
    code += f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--keep_weight" in done.stdout
