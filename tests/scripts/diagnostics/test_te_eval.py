"""What encoder training changed: known answers, privacy, verdicts, bad input, and a real run of train.py."""

import contextlib
import hashlib
import importlib.util
import io
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from models.wan.checkpoint import TEXT_ENCODER_FILE, TOKENIZER_DIR, open_text_encoder, open_transformer
from models.wan.names import umt5_to_hf
from models.wan.probes.encoder_stream import TABLE
from models.wan.text_encoder import WanTokenizer
from tests.helpers.workspace import Workspace, environment, make_workspace
from utils.data.cache import CacheStore
from utils.metrics import read_metrics
from utils.report import read_summary

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "scripts" / "diagnostics" / "te_eval.py"
# One token each in the tiny tokenizer, and in no neutral prompt of these tests.
MOVED, STILL = "circle", "square"
NEUTRAL = ("a lake at dawn", "two birds on a branch", "the camera pans over a wide valley")
DOMAIN = (f"a red {MOVED} on a dark background", f"the yellow {MOVED} moves up")
AUG = (
    'model.caption_aug={enable=true,keywords=["circle","square","triangle"],single_token=0.5}',
    "model.train_token_embedding=true",
    "budget={max_neutral_drift=0.9,every_n_steps=1}",
)


def load_script():
    spec = importlib.util.spec_from_file_location("te_eval", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["te_eval"] = module
    spec.loader.exec_module(module)
    return module


probe = load_script()


@pytest.fixture(scope="module")
def tensors(tiny_ti2v):
    source = open_text_encoder(tiny_ti2v / TEXT_ENCODER_FILE)
    return {name: source.get(name).clone() for name in source.shapes}


class Place:
    """A directory with files of prompts, and commands in it."""

    def __init__(self, root, checkpoint, tensors):
        self.root, self.checkpoint, self.tensors = root, checkpoint, tensors
        for name, lines in (("neutral", NEUTRAL), ("domain", DOMAIN), ("keywords", (MOVED, STILL))):
            (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
        self.reports = root / "reports"

    def write(self, changes, name="tuned.safetensors", *, only=False):
        shown = {} if only else self.tensors
        save_file(
            {umt5_to_hf(key): value.contiguous() for key, value in (shown | changes).items()},
            self.root / name,
        )
        return self.root / name

    def moved_row(self):
        """The encoder with one token row changed: that of MOVED."""
        tokenizer = WanTokenizer(self.checkpoint / TOKENIZER_DIR)
        token, end = tokenizer(MOVED)
        assert all(token not in tokenizer(text) for text in (*NEUTRAL, STILL, "")) and end == 1
        table = self.tensors[TABLE].clone()
        table[token] += table.std() * torch.randn(
            table.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float32
        ).to(table.dtype)
        return {TABLE: table}

    def run(self, tuned, *flags, tag="t", base=True):
        given = ["--text_encoder", tuned, "--reports_dir", self.reports, "--run_tag", tag]
        given += ["--prompts", self.root / "neutral.txt"]
        given += ["--base", self.checkpoint] if base else ["--base_text_encoder", self.checkpoint]
        return probe.main([str(word) for word in (*given, *flags)])

    def domain(self):
        return ("--domain_prompts", self.root / "domain.txt", "--keywords_file", self.root / "keywords.txt")

    def summary(self, tag="t"):
        return read_summary(self.reports / "te_eval" / tag)

    def table(self, name, tag="t"):
        return pd.read_csv(self.reports / "te_eval" / tag / f"{name}.csv")


@pytest.fixture
def place(tmp_path, tiny_ti2v, tensors):
    return Place(tmp_path, tiny_ti2v, tensors)


def test_one_changed_token_row_moves_that_keyword_and_nothing_else(place):
    assert place.run(place.write(place.moved_row()), *place.domain(), "--no-redact") == 0
    prompts = place.table("prompts").set_index("prompt")
    assert set(prompts.index) == {
        "(empty prompt)",
        "(Wan's negative prompt)",
        *NEUTRAL,
        *DOMAIN,
        MOVED,
        STILL,
    }
    moved = prompts[[MOVED in name for name in prompts.index]]
    still = prompts.drop(moved.index)
    assert len(moved) == 3 and (moved.cosine < 0.99).all() and (moved.distance > 0.05).all()
    for column in (
        "cosine",
        "pooled_cosine",
        "norm_ratio",
        "dit_cosine",
        "dit_norm_ratio",
        "neighbours_kept",
    ):
        assert (still[column] == 1.0).all(), column
    assert (still.distance == 0.0).all()
    keywords = place.table("keywords").set_index("keyword")
    assert keywords.loc[STILL, "context_gain"] == keywords.loc[STILL, "pooled_gain"] == 1.0
    assert abs(keywords.loc[MOVED, "context_gain"] - 1) > 0.01
    metrics = place.summary().metrics
    assert metrics["neutral_drift"] == 0.0 and metrics["neutral_mean_cosine"] == 1.0
    assert metrics["neutral_dit_mean_cosine"] == metrics["neutral_neighbours_kept"] == 1.0
    assert metrics["layers_changed"] == "tokens"
    assert (metrics["token_rows_changed"], metrics["keyword_rows_changed"]) == (1, 1)
    assert metrics["domain_drift"] > 0.001
    assert "Jaccard" in (place.reports / "te_eval" / "t" / "report.md").read_text()


def test_the_whole_report(place, capsys):
    assert place.run(place.write(place.moved_row()), *place.domain()) == 0
    directory = place.reports / "te_eval" / "t"
    assert {path.name for path in directory.iterdir()} == {
        *("report.md", "summary.json", "groups.csv", "layers.csv", "prompts.csv", "keywords.csv"),
        *("drift_per_layer.png", "cosines.png"),
    }
    summary = place.summary()
    assert (summary.tool, summary.verdict) == ("te_eval", "pass")
    assert summary.caps["max_neutral_drift"] == probe.DEFAULT_MAX_NEUTRAL_DRIFT
    assert {entry.role for entry in summary.inputs} == {
        "text_encoder",
        "base_text_encoder",
        "base",
        "prompts",
    }
    layers = place.table("layers")
    assert list(layers.layer) == ["tokens", "block 0", "block 1", "block 2", "norm"]
    assert list(layers.weight_change > 0) == [True, False, False, False, False]
    assert (layers.domain_drift > 0).all() and (layers.neutral_drift == 0).all()
    groups = place.table("groups").set_index("group")
    assert list(groups.num_prompts) == [5, 2, 2]
    prompts = place.table("prompts")
    for group in groups.index:
        cosines = prompts[prompts.group == group].cosine
        assert groups.mean_cosine[group] == pytest.approx(cosines.mean())
        assert summary.metrics[f"{group}_median_cosine"] == pytest.approx(cosines.median())
        assert summary.metrics[f"{group}_drift"] == pytest.approx(1 - cosines.mean(), abs=1e-9)
    for name in ("drift_per_layer.png", "cosines.png"):
        with Image.open(directory / name) as image:
            assert image.width <= 1000 and (directory / name).stat().st_size < 100_000
    assert "te_eval" in (place.reports / "INDEX.md").read_text()
    assert "pass: Neutral prompts drifted by 0" in capsys.readouterr().out


SECRETS = (MOVED, STILL, "lake at dawn", "birds on a branch", "pans over a wide", "yellow", "a red")


def found_in(place, said):
    """Which of the private words stand in any file that was written, or on the screen."""
    texts = {"screen": said.lower()}
    for path in place.reports.rglob("*"):
        if path.is_file():
            texts[path.name] = path.read_bytes().decode("utf-8", errors="ignore").lower()
    assert len(texts) > 8
    return {secret for secret in SECRETS for text in texts.values() if secret in text}


def digests(words):
    return {
        digest[:8]
        for word in words
        for digest in (function(word.encode()).hexdigest() for function in HASHES)
    }


HASHES = (hashlib.sha256, hashlib.sha1, hashlib.md5)


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        ((), {"lake at dawn", "birds on a branch", "pans over a wide"}),
        (("--redact",), set()),
        (("--no-redact",), set(SECRETS)),
    ],
    ids=["default", "redact", "no-redact"],
)
def test_private_words_are_in_no_file_and_not_on_the_screen(place, capsys, flags, shown):
    # The names of private files say something too.
    for name in ("neutral", "domain", "keywords"):
        (place.root / f"{name}.txt").rename(place.root / f"{name}_yellow.txt")
    (place.root / "neutral.txt").write_text((place.root / "neutral_yellow.txt").read_text())
    private = ("--domain_prompts", place.root / "domain_yellow.txt")
    private += ("--keywords_file", place.root / "keywords_yellow.txt")
    assert place.run(place.write(place.moved_row()), *private, *flags) == 0
    captured = capsys.readouterr()
    assert found_in(place, captured.out + captured.err) == shown
    if not flags:
        prompts = place.table("prompts")
        hidden = prompts[prompts.group != "neutral"].prompt
        assert hidden.str.fullmatch(r"(domain|keyword) \d \([0-9a-f]{8}\)").all()
        assert not digests((*DOMAIN, MOVED, STILL)) & set(hidden.str.extract(r"\((\w+)\)")[0])


def test_an_error_in_a_private_file_does_not_repeat_it(place, capsys):
    (place.root / "keywords.txt").write_bytes(b"circle\xff\n")
    assert place.run(place.write({}), *place.domain(), "--debug") == 2
    captured = capsys.readouterr()
    assert "not UTF-8" in captured.err
    assert "circle" not in captured.out + captured.err


def scaled(tensors, factor):
    generator = torch.Generator().manual_seed(3)
    return {
        name: (tensor + factor * tensor.float().std() * torch.randn(tensor.shape, generator=generator)).to(
            tensor.dtype
        )
        for name, tensor in tensors.items()
        if tensor.ndim == 2
    }


def test_verdict_and_exit_status(place, tensors, capsys):
    far, near = place.write(scaled(tensors, 0.5), "far.safetensors"), place.write({}, "near.safetensors")
    longer = place.write({"norm.weight": tensors["norm.weight"] * 1.5}, "longer.safetensors")
    moved = place.write(place.moved_row())
    one_neutral = place.root / "other.txt"
    one_neutral.write_text("a stone\n")
    for number, (tuned, flags, status, words) in enumerate(
        (
            (far, (), 1, "above the cap of 0.02"),
            (far, ("--max_neutral_drift", "1.9"), 0, "whether the domain moved is not known"),
            (far, ("--max_neutral_drift", "1.9", "--domain_prompts", one_neutral), None, "domain prompts"),
            (near, place.domain(), 3, "cache_text_embeddings = true"),
            (longer, (), 3, "1.5 times as long"),
            (moved, ("--keywords_file", place.root / "keywords.txt"), 0, "keywords by"),
        )
    ):
        found = place.run(tuned, *flags, tag=f"t{number}")
        said = capsys.readouterr().out
        summary = place.summary(f"t{number}")
        assert words in said and words in summary.explanation
        assert {"pass": 0, "fail": 1, "inconclusive": 3}[summary.verdict] == found
        assert status in (None, found)
        if number == 2:  # whatever moved further decides
            metrics = summary.metrics
            assert (found == 0) == (metrics["domain_drift"] > metrics["neutral_drift"])


def test_domain_prompts_that_stayed_while_neutral_ones_moved_are_inconclusive(place, capsys):
    (place.root / "neutral.txt").write_text(f"a {MOVED} at dawn\n")
    (place.root / "domain.txt").write_text("a wide valley\n")
    tuned = place.write(place.moved_row())
    flags = ("--domain_prompts", place.root / "domain.txt", "--max_neutral_drift", "1.5")
    assert place.run(tuned, *flags) == 3
    assert "domain prompts moved no more than that (0)" in capsys.readouterr().out


def test_an_encoder_of_only_the_trained_tensors(place, tensors, capsys):
    changes = {name: tensor for name, tensor in scaled(tensors, 0.1).items() if name.startswith("blocks.2.")}
    assert place.run(place.write(changes, "part.safetensors", only=True), *place.domain(), tag="part") in (
        0,
        1,
        3,
    )
    assert "holds only the trained tensors" in capsys.readouterr().out
    place.run(place.write(changes, "whole.safetensors"), *place.domain(), tag="whole")
    part, whole = place.summary("part").metrics, place.summary("whole").metrics
    assert part == whole and part["layers_changed"] == "block 2"


def test_without_a_dit_and_in_another_dtype(place, tensors, capsys):
    tuned = place.write({name: tensor.to(torch.float16) for name, tensor in scaled(tensors, 0.01).items()})
    assert place.run(tuned, "--dtype", "bfloat16", base=False) in (0, 3)
    said = capsys.readouterr().out
    assert "without a DiT" in said and "part of the drift is rounding" in said
    assert "neutral_dit_mean_cosine" not in place.summary().metrics


def test_bad_input_is_one_line_and_leaves_no_report(place, tmp_path, tensors, capsys):
    whole, width = place.write({}), tensors["norm.weight"][:48]
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "code.pth").write_bytes(b"PK\x05\x06" + bytes(18))
    fp8 = place.write({"norm.weight": tensors["norm.weight"].to(torch.float8_e4m3fn)}, "fp8.safetensors")
    other = place.write({"norm.weight": width, "blocks.0.norm1.weight": width.clone()}, "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-100])
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "tokenizer.json").write_text("{}")
    dit = open_transformer(place.checkpoint).files[0]
    cases = [
        (whole, ("--prompts", tmp_path / "empty.txt"), "holds no prompt"),
        (whole, ("--neutral_prompts", tmp_path / "bytes.txt"), "not UTF-8"),
        (whole, ("--keywords_file", tmp_path / "missing"), "does not exist"),
        (whole, ("--device", "cuda:77"), "--device"),
        (whole, ("--tokenizer", tmp_path), "holds no tokenizer"),
        (whole, ("--tokenizer", tmp_path / "damaged"), "no tokenizer can be loaded"),
        (whole, ("--denoise_samples", "2"), "needs the run's config"),
        (whole, ("--base", tmp_path / "nowhere"), "no such checkpoint"),
        (whole, ("--base_text_encoder", dit), "give UMT5's encoder alone|no UMT5"),
        (dit, (), "UMT5"),
        (fp8, (), "quantised"),
        (other, (), "no UMT5 encoder|does not fit"),
        (tmp_path / "cut.safetensors", (), "truncated"),
        (tmp_path / "code.pth", (), "code.pth"),
        (tmp_path / "nothing.safetensors", (), "no such file"),
    ]
    for tuned, flags, words in cases:
        assert place.run(tuned, *flags) == 2, flags
        said = capsys.readouterr().err
        assert any(word in said for word in words.split("|")), said
        assert said.count("\n") == 1 and said.startswith("error: "), said
        assert not (place.reports / "te_eval").exists()
    for flags in (
        ("--neighbours", "0"),
        ("--max_neutral_drift", "-1"),
        ("--denoise_samples", "x"),
        ("--nope",),
    ):
        with pytest.raises(SystemExit) as stopped:
            place.run(whole, *flags)
        assert stopped.value.code == 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_ti2v, tiny_dataset) -> Workspace:
    """A real run that trains the encoder on captions and keywords alone, its table too."""
    workspace = make_workspace(tmp_path_factory.mktemp("trained"), tiny_ti2v, tiny_dataset)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert workspace.train("encoder_ft", *AUG, "max_steps=12", "optimizer.lr=3e-4") == 0, said.getvalue()
    return workspace


def contents(directory):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in directory.rglob("*")}


def test_a_real_run_without_arguments_and_nothing_written_into_it(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained.root)
    (trained.root / "output").symlink_to(trained.out)
    before = contents(trained.out) | contents(trained.cache)
    assert probe.main(["--run_tag", "real"]) in (0, 1, 3)
    assert contents(trained.out) | contents(trained.cache) == before
    said = capsys.readouterr().out
    assert "of the newest run below output" in said and "3 of the run's [model.caption_aug]" in said
    assert "circle" not in said
    summary = read_summary(trained.root / "reports" / "te_eval" / "real")
    metrics = summary.metrics
    assert metrics["layers_changed"] == "tokens, block 0, block 1, block 2, norm"
    assert 0 < metrics["neutral_drift"] < metrics["keyword_drift"]
    assert metrics["training_loss"] in ("falls", "is level", "rises")
    assert (
        metrics["training_loss_slope_low"]
        <= metrics["training_loss_slope"]
        <= metrics["training_loss_slope_high"]
    )
    assert {"config", "metrics"} <= {entry.role for entry in summary.inputs}
    # The probe and the budget in training measure the same, one on files and one on the live encoder.
    assert metrics["neutral_drift"] == pytest.approx(
        read_metrics(trained.run())[-1]["neutral_drift"], rel=1e-3
    )
    assert summary.caps["max_neutral_drift"] == 0.9
    # A report has no place in the run.
    assert probe.main(["--reports_dir", str(trained.run() / "reports")]) == 2
    assert contents(trained.out) | contents(trained.cache) == before


def test_losses_with_the_keyword_alone(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained.root)
    before = contents(trained.out) | contents(trained.cache)
    flags = ["--config", str(trained.run() / "config.toml"), "--denoise_samples", "2"]
    assert probe.main([*flags, "--run_tag", "loss", "--no-redact"]) in (0, 1, 3)
    assert contents(trained.out) | contents(trained.cache) == before
    table = pd.read_csv(trained.root / "reports" / "te_eval" / "loss" / "keyword_losses.csv")
    summary = read_summary(trained.root / "reports" / "te_eval" / "loss")
    assert list(table.keyword) == ["circle", "square", "triangle"] and (table.samples == 2).all()
    assert table.change.to_numpy() == pytest.approx((table.tuned_loss - table.base_loss).to_numpy(), abs=1e-9)
    assert (table.change != 0).all() and ((table.low < table.change) & (table.change < table.high)).all()
    assert summary.metrics["keyword_loss_change"] == pytest.approx(table.change.mean())
    assert summary.seed == 0
    # Other noise, other losses; the same noise, the same.
    assert probe.main([*flags, "--run_tag", "again", "--no-redact"]) in (0, 1, 3)
    assert probe.main([*flags, "--run_tag", "other", "--no-redact", "--seed", "5"]) in (0, 1, 3)
    again, other = (
        pd.read_csv(trained.root / "reports" / "te_eval" / tag / "keyword_losses.csv")
        for tag in ("again", "other")
    )
    assert again.equals(table) and (other.base_loss != table.base_loss).all()


def test_a_cache_that_is_gone_is_said(trained, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    text = (trained.run() / "config.toml").read_text()
    dataset = (trained.root / "dataset.toml").read_text().replace(str(trained.cache), str(tmp_path / "gone"))
    (tmp_path / "dataset.toml").write_text(dataset)
    (tmp_path / "config.toml").write_text(
        text.replace(str(trained.root / "dataset.toml"), str(tmp_path / "dataset.toml"))
    )
    flags = ["--config", str(tmp_path / "config.toml"), "--text_encoder", str(trained.run())]
    assert probe.main([*flags, "--denoise_samples", "1"]) == 2
    assert "gone: no cache there" in capsys.readouterr().err
    assert not (tmp_path / "gone").exists()
    (tmp_path / "gone").mkdir()  # a probe does not make a cache of an empty folder
    assert probe.main([*flags, "--denoise_samples", "1"]) == 2
    assert list((tmp_path / "gone").iterdir()) == []


def test_what_the_losses_need_is_asked_before_the_encoders_run(trained, monkeypatch, tmp_path, capsys):
    from models.wan.probes import encoder_stream

    monkeypatch.chdir(trained.root)
    monkeypatch.setattr(encoder_stream, "stream_states", lambda *_: pytest.fail("the encoders ran"))
    shutil.copytree(trained.checkpoint, tmp_path / "another")
    flags = ["--config", str(trained.run()), "--denoise_samples", "1"]
    assert probe.main([*flags, "--base", str(tmp_path / "another")]) == 2
    assert "leave one of the two flags out" in capsys.readouterr().err


def test_a_damaged_item_is_left_where_it_is(trained, monkeypatch, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(trained.root, copy, symlinks=True)
    for path in (copy / "dataset.toml", *copy.rglob("config.toml")):
        path.write_text(path.read_text().replace(str(trained.root), str(copy)))
    store = CacheStore(copy / "cache")
    for key in store.keys("latents"):
        place = store.place(key)
        data = bytearray(place.shard.path.read_bytes())
        data[place.entry.offset + place.entry.length - 1] ^= 1
        place.shard.path.write_bytes(data)
    before = contents(copy / "cache")
    monkeypatch.chdir(copy)
    (config,) = copy.glob("out/*/config.toml")
    assert probe.main(["--config", str(config), "--denoise_samples", "1"]) == 2
    assert "does not match its checksum" in capsys.readouterr().err
    assert contents(copy / "cache") == before


@pytest.mark.parametrize("content", [b"[]\n", b'{"loss": 1}\n', b"\xff\xfe\n"])
def test_damaged_metrics_are_named(trained, monkeypatch, tmp_path, capsys, content):
    copy = tmp_path / "run"
    shutil.copytree(trained.run(), copy)
    (copy / "metrics.jsonl").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    assert probe.main(["--config", str(copy), "--text_encoder", str(copy)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "metrics.jsonl" in said and "put back the file" in said


def test_as_a_person_runs_it(place):
    tuned = place.write(place.moved_row())
    command = [sys.executable, str(SCRIPT), "--text_encoder", tuned, "--base", place.checkpoint]
    command += ["--reports_dir", place.reports, *place.domain()]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        env=environment(),
        cwd=place.root,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and "report: " in done.stdout


def test_help_needs_no_torch():
    code = f"import runpy, sys; sys.argv = ['x', '--help']; sys.path.insert(0, {str(ROOT)!r})\n"
    code += f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--keywords_file" in done.stdout and "Exit status" in done.stdout
