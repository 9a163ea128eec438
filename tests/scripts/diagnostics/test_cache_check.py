"""cache_check on caches that training's own code has filled: with this encoder, another one, and with values that lie."""

import csv
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.wan.checkpoint import open_text_encoder
from scripts.diagnostics import cache_check as probe
from tests.helpers.workspace import ROOT, Workspace, make_workspace
from utils.data.cache import CacheStore
from utils.data.cache_keys import TEXT
from utils.report import read_summary

SCRIPT = ROOT / "scripts" / "diagnostics" / "cache_check.py"
NUM_CAPTIONS = 7  # six files and the empty caption
OLD_NS = 1_600_000_000_000_000_000  # old enough for the memo to believe the time stamp


@dataclass(frozen=True)
class Setting:
    """A filled cache, the encoder that filled it, and a config that names both."""

    workspace: Workspace
    encoder: Path
    config: Path

    def check(self, *arguments: object, name: str = "tag"):
        reports = self.workspace.root / "reports"
        words = ["--config", self.config, "--reports_dir", reports, "--run_tag", name, *arguments]
        before = content(self.workspace.cache)
        status = probe.main([str(word) for word in words])
        assert content(self.workspace.cache) == before
        report = reports / "cache_check" / name
        return status, (read_summary(report) if report.exists() else None)

    def rows(self, table: str, name: str = "tag") -> list[dict[str, str]]:
        with (self.workspace.root / "reports" / "cache_check" / name / f"{table}.csv").open(
            newline=""
        ) as file:
            return list(csv.DictReader(file))

    def fill(self, *more: str) -> None:
        flags = ["--cache_only"]
        assert self.workspace.train("dit_lora", f"model.llm_path={self.encoder}", *more, flags=flags) == 0


def content(directory: Path) -> dict:
    return {
        path: (path.read_bytes() if path.is_file() else None, path.stat().st_mtime_ns)
        for path in directory.rglob("*")
    }


def write_encoder(source: Path, target: Path, scale: float = 1.0) -> Path:
    """The encoder with one of its tensors scaled, in a file of the same size and time stamp."""
    tensors = torch.load(source, weights_only=True)
    # Not of q or k: with one token, which the empty caption has, those change nothing.
    name = "blocks.0.attn.v.weight"
    tensors[name] = tensors[name] * scale
    torch.save(tensors, target)
    os.utime(target, ns=(OLD_NS, OLD_NS))
    return target


def write_config(workspace: Workspace, encoder: Path, dtype: str = "float32") -> Path:
    text = (ROOT / "configs" / "smoke_dit_lora.toml").read_text()
    text = re.sub(r"(?m)^output_dir = .*$", f'output_dir = "{workspace.out}"', text)
    text = re.sub(r"(?m)^dataset = .*$", f'dataset = "{workspace.root / "dataset.toml"}"', text)
    text = re.sub(r"(?m)^dtype = .*$\n", "", text)
    ckpt = f'ckpt_path = "{workspace.checkpoint}"\nllm_path = "{encoder}"\ndtype = "{dtype}"'
    text = re.sub(r"(?m)^ckpt_path = .*$", ckpt, text)
    path = workspace.root / "train.toml"
    path.write_text(text)
    return path


@pytest.fixture
def setting(tmp_path, tiny_ti2v, tiny_dataset) -> Setting:
    workspace = make_workspace(tmp_path, tiny_ti2v, tiny_dataset)
    encoder = write_encoder(tiny_ti2v / "models_t5_umt5-xxl-enc-bf16.pth", tmp_path / "a.pth")
    found = Setting(workspace, encoder, write_config(workspace, encoder))
    found.fill()
    return found


def test_made_with_this_encoder(setting, capsys) -> None:
    status, summary = setting.check("--verify", "all")
    metrics = summary.metrics
    assert (status, summary.verdict) == (0, "pass")
    assert (metrics["num_captions"], metrics["num_this_encoder"]) == (NUM_CAPTIONS, NUM_CAPTIONS)
    assert (metrics["num_verified"], metrics["num_mismatches"]) == (NUM_CAPTIONS, 0)
    assert metrics["max_relative_difference"] <= 1e-6 and metrics["min_cosine"] > 1 - 1e-6
    assert (metrics["num_latents"], metrics["num_latents_missing"]) == (6, 0)
    assert f"All {NUM_CAPTIONS} embeddings name this encoder" in summary.explanation
    assert [entry.role for entry in summary.inputs] == ["config", "text_encoder", "hashes"]
    (maker,) = setting.rows("encoders")
    assert (maker["items"], maker["is_this_encoder"]) == (str(NUM_CAPTIONS), "True")
    assert maker["seen_at"] == str(setting.encoder)
    directory = setting.workspace.root / "reports" / "cache_check" / "tag"
    names = {"report.md", "summary.json", "differences.png"}
    names |= {f"{table}.csv" for table in ("datasets", "encoders", "verified", "captions")}
    assert {path.name for path in directory.iterdir()} == names
    captions = {path.read_text().strip() for path in setting.workspace.media.glob("*.txt")}
    written = "".join(path.read_text() for path in directory.iterdir() if path.suffix != ".png")
    assert captions and not any(caption in written for caption in captions)


def test_made_with_another_encoder(setting, tmp_path) -> None:
    other = write_encoder(setting.encoder, tmp_path / "b.pth", 1.5)
    write_config(setting.workspace, other)
    status, summary = setting.check()
    metrics = summary.metrics
    assert (status, summary.verdict) == (1, "fail")
    assert (metrics["num_another_encoder"], metrics["num_this_encoder"]) == (NUM_CAPTIONS, 0)
    assert f"{NUM_CAPTIONS} of {NUM_CAPTIONS} captions have embeddings of another" in summary.explanation
    assert {row["status"] for row in setting.rows("captions")} == {"another encoder"}
    (maker,) = setting.rows("encoders")
    assert (maker["is_this_encoder"], maker["seen_at"]) == ("False", str(setting.encoder))
    assert {row["made_by"] for row in setting.rows("captions")} == {maker["encoder"]}


def test_the_flag_asks_about_another_encoder_than_the_config(setting, tmp_path) -> None:
    write_encoder(setting.encoder, tmp_path / "b.pth", 1.5)
    assert setting.check("--text_encoder", tmp_path / "b.pth")[0] == 1
    assert setting.check("--text_encoder", setting.encoder, name="own")[0] == 0


def test_some_of_each(setting, tmp_path) -> None:
    """After the encoder has been changed, only a part of the captions was encoded anew, and one is new."""
    other = write_encoder(setting.encoder, tmp_path / "b.pth", 1.5)
    for name in ("image_00", "image_01"):
        (setting.workspace.media / f"{name}.txt").rename(setting.workspace.media / f"{name}.kept")
    Setting(setting.workspace, other, setting.config).fill()
    for name in ("image_00", "image_01"):
        (setting.workspace.media / f"{name}.kept").rename(setting.workspace.media / f"{name}.txt")
    (setting.workspace.media / "image_02.txt").write_text("a caption that nobody has encoded")
    write_config(setting.workspace, other)
    status, summary = setting.check("--verify", "2")
    metrics = summary.metrics
    assert status == 1
    found = [metrics[f"num_{name}"] for name in ("this_encoder", "another_encoder", "missing", "damaged")]
    assert found == [NUM_CAPTIONS - 3, 2, 1, 0]
    assert (metrics["num_verified"], metrics["num_mismatches"]) == (2, 0)
    files = {Path(row["file"]).stem: row["status"] for row in setting.rows("captions")}
    assert files["image_00"] == files["image_01"] == "another encoder" and files["image_02"] == "missing"
    assert metrics["num_latents_missing"] == 0
    assert [row["items"] for row in setting.rows("encoders")] == ["7", "5"]


@pytest.mark.parametrize("change", ["one number", "all", "NaN", "length"])
def test_values_that_lie_under_a_key_and_checksum_that_are_right(setting, change) -> None:
    store = CacheStore(setting.workspace.cache)
    key = sorted(store.keys(TEXT))[3]
    states, metadata = store.get(key)["states"].clone(), store.metadata(key)
    if change == "one number":
        states[0, 0] += 0.01 * states.norm()
    elif change == "NaN":
        states[0, 0] = float("nan")
    else:
        states = states * 1.01 if change == "all" else torch.cat((states, states[-1:]))
    store.put(key, {"states": states}, metadata)
    store.flush()
    status, summary = setting.check("--verify", "all")
    assert (status, summary.metrics["num_mismatches"]) == (1, 1)
    assert summary.metrics["num_this_encoder"] == NUM_CAPTIONS  # the keys see nothing
    assert "1 of 7 compared embeddings are not what this encoder makes" in summary.explanation
    assert setting.rows("verified")[0]["is_match"] == "False"
    assert setting.check("--verify", "0", name="keys")[0] == 3


def test_a_file_replaced_under_its_size_and_time_stamp(setting) -> None:
    """The memo believes that nothing has changed, so the keys agree; the values do not, nor does the whole hash."""
    size = setting.encoder.stat().st_size
    write_encoder(setting.encoder, setting.encoder, 1.5)
    assert setting.encoder.stat().st_size == size and setting.encoder.stat().st_mtime_ns == OLD_NS
    status, summary = setting.check("--verify", "3")
    assert (status, summary.metrics["num_this_encoder"], summary.metrics["num_mismatches"]) == (1, 7, 3)
    status, summary = setting.check("--full_hash", name="hash")
    assert (status, summary.metrics["num_another_encoder"]) == (1, NUM_CAPTIONS)
    assert any("remembers under its size and time stamp" in note for note in summary.notes)


def test_a_damaged_item_is_told_and_stays_where_it_is(setting) -> None:
    store = CacheStore(setting.workspace.cache)
    key = sorted(store.keys(TEXT))[0]
    place = store.place(key)
    with place.shard.path.open("r+b") as file:
        file.seek(place.entry.offset + place.entry.length - 4)
        file.write(b"\xff\xff\xff\x7f")
    status, summary = setting.check("--verify", "all")
    assert (status, summary.metrics["num_damaged"], summary.metrics["num_verified"]) == (3, 1, 6)
    assert "1 damaged" in summary.explanation
    (row,) = [row for row in setting.rows("captions") if row["status"] == "damaged"]
    assert "checksum" in row["damage"]


def test_another_precision_is_no_other_encoder(setting) -> None:
    write_config(setting.workspace, setting.encoder, "bfloat16")
    status, summary = setting.check()
    assert (status, summary.metrics["num_other_settings"]) == (3, NUM_CAPTIONS)
    assert "7 other settings" in summary.explanation


def test_in_bfloat16_batching_is_no_mismatch_and_another_encoder_is(setting) -> None:
    setting.fill("model.dtype=bfloat16")
    write_config(setting.workspace, setting.encoder, "bfloat16")
    status, summary = setting.check("--verify", "all")
    assert status == 0 and summary.caps["relative_tolerance"] >= 0.05
    assert summary.metrics["max_relative_difference"] < 0.02  # measured: 0
    write_encoder(setting.encoder, setting.encoder, 1.5)
    assert setting.check("--verify", "all", name="other")[1].metrics["num_mismatches"] == NUM_CAPTIONS


def test_the_seed_chooses_which_are_compared(setting) -> None:
    chosen = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert setting.check("--verify", "3", "--seed", seed, name=name)[0] == 0
        chosen.append({row["caption"] for row in setting.rows("verified", name)})
    assert chosen[0] == chosen[1] != chosen[2] and len(chosen[0]) == 3


def test_without_a_cache_there_is_no_answer_and_none_is_made(setting, tmp_path) -> None:
    setting.workspace.cache.rename(tmp_path / "gone")
    status, summary = setting.check()
    assert (status, summary.verdict) == (3, "inconclusive") and "There is no cache at" in summary.explanation
    assert not setting.workspace.cache.exists()


def test_in_encoder_mode_there_is_nothing_to_check(setting) -> None:
    text = setting.config.read_text()
    text = text.replace("cache_text_embeddings = true", "cache_text_embeddings = false")
    text = text.replace("train_text_encoder = false", "train_text_encoder = true")
    setting.config.write_text(re.sub(r"(?ms)^\[(adapter|budget)\].*?(?=^\[|\Z)", "", text))
    status, summary = setting.check()
    assert status == 3 and "caches no embeddings (encoder_ft)" in summary.explanation
    assert summary.metrics["num_latents"] == 6


def test_an_eval_dataset_with_a_cache_of_its_own_counts_too(setting, tmp_path) -> None:
    toml = (setting.workspace.root / "dataset.toml").read_text()
    (tmp_path / "held.toml").write_text(
        toml.replace(str(setting.workspace.cache), str(tmp_path / "held_cache"))
    )
    text = setting.config.read_text()
    setting.config.write_text(f'eval_datasets = ["{tmp_path / "held.toml"}"]\n' + text)
    status, summary = setting.check()
    assert status == 3 and f"no cache at {tmp_path / 'held_cache'}" in summary.explanation
    assert [row["dataset"] for row in setting.rows("datasets")] == ["dataset", "eval dataset held"]


def test_without_arguments_it_takes_the_newest_run_and_leaves_it_alone(setting, monkeypatch, capsys) -> None:
    monkeypatch.chdir(setting.workspace.root)
    settings = ("max_steps=1", "output_dir=output/a", f"model.llm_path={setting.encoder}")
    assert setting.workspace.train("dit_lora", *settings) == 0
    (run,) = Path("output/a").iterdir()
    before = content(Path("output")) | content(setting.workspace.cache)
    capsys.readouterr()
    assert probe.main([]) == 0
    assert content(Path("output")) | content(setting.workspace.cache) == before
    assert f"config: {run / 'config.toml'} (of the newest run below output)" in capsys.readouterr().out
    # The run was trained with what the file held then.
    write_encoder(setting.encoder, setting.encoder, 1.5)
    os.utime(setting.encoder)
    assert probe.main(["--config", str(run), "--run_tag", "later"]) == 1
    assert "was trained with another encoder" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "missing.toml"], "does not exist"),
        (["--text_encoder", "missing.pth"], "no such file"),
        (["--device", "nonsense"], "--device nonsense"),
    ],
)
def test_wrong_use_is_one_line(setting, arguments, words, capsys) -> None:
    assert setting.check(*arguments) == (2, None)
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error


@pytest.mark.parametrize("count", ["-1", "some", "1.5", "٣"])
def test_verify_takes_a_number_or_all(count) -> None:
    with pytest.raises(SystemExit) as stopped:
        probe.main([f"--verify={count}"])
    assert stopped.value.code == 2


def test_help_needs_no_torch() -> None:
    code = f"import runpy, sys; sys.argv = ['x', '--help']\ntry: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\nexcept SystemExit as e: assert not e.code\nsys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=60)
    assert done.returncode == 0


@pytest.mark.parametrize("what", ["text", "code", "vae", "adapter", "part"])
def test_what_is_no_encoder_gets_no_verdict(setting, tmp_path, what, capsys) -> None:
    """Its hash could be compared all the same, and would say "another encoder"."""
    file = tmp_path / ("other.pth" if what in ("text", "code", "vae") else "other.safetensors")
    if what == "text":
        file.write_text("not weights")
    elif what == "code":
        torch.save({"blocks.0.attn.q.weight": subprocess.run}, file)
    elif what == "vae":
        shutil.copy(setting.workspace.checkpoint / "Wan2.2_VAE.pth", file)
    else:
        name = "diffusion_model.blocks.0.cross_attn.k.lora_A.weight" if what == "adapter" else "norm.weight"
        save_file({name: torch.zeros(4, 4) if what == "adapter" else torch.zeros(4)}, file)
    assert setting.check("--text_encoder", file) == (2, None)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"error: {file}: ") and error.count(str(file)) == 1


def test_a_run_s_directory_means_the_encoder_that_it_saved_last(setting, tmp_path) -> None:
    run = tmp_path / "encoder_run"
    source = open_text_encoder(setting.encoder)
    for epoch, scale in ((1, 1.5), (2, 1.0)):
        (run / f"epoch{epoch}").mkdir(parents=True)
        tensors = {name: source.get(name).clone() for name in source.shapes}
        tensors["blocks.0.attn.v.weight"] *= scale
        save_file(tensors, run / f"epoch{epoch}" / "text_encoder.safetensors")
        os.utime(run / f"epoch{epoch}" / "text_encoder.safetensors", ns=(OLD_NS + epoch, OLD_NS + epoch))
    shutil.copy(setting.config, run / "config.toml")
    _, summary = setting.check("--text_encoder", run)
    assert summary.metrics["encoder_path"] == str(run / "epoch2" / "text_encoder.safetensors")


def test_own_states_in_other_settings_are_no_trouble_of_another_encoder(setting, tmp_path) -> None:
    """A newer item of another encoder beside an older one of this encoder in another precision."""
    other = write_encoder(setting.encoder, tmp_path / "b.pth", 1.5)
    setting.fill(f"model.llm_path={other}")
    write_config(setting.workspace, setting.encoder, "bfloat16")
    status, summary = setting.check()
    assert status == 3 and summary.metrics["num_other_settings"] == NUM_CAPTIONS
    assert summary.metrics["num_another_encoder"] == 0
