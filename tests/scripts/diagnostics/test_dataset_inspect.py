import csv
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from utils.data import memo as memo_module
from utils.data.media import probe_media
from utils.report import read_summary

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "scripts" / "diagnostics" / "dataset_inspect.py"
DATASET = "resolutions = [64]\nenable_ar_bucket = false\nframe_buckets = [1, 5, 9]\n"


def load_script():
    spec = importlib.util.spec_from_file_location("dataset_inspect", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["dataset_inspect"] = module
    spec.loader.exec_module(module)
    return module


probe = load_script()


def write_config(root, checkpoint, *, top="", model=""):
    """A training config in `root`, which names `root/dataset.toml`."""
    text = f"""
output_dir = "{root / 'out'}"
dataset = "{root / 'dataset.toml'}"
epochs = 2
gradient_accumulation_steps = 2
{top}
[model]
type = "wan"
ckpt_path = "{checkpoint}"
cache_text_embeddings = true
train_text_encoder = false
freeze_transformer = true
{model}
[adapter]
rank = 4
[optimizer]
lr = 1e-3
"""
    (root / "config.toml").write_text(text, encoding="utf-8")
    return root / "config.toml"


def write_dataset(root, media, *, top="", directory="", name="dataset.toml"):
    text = f'{DATASET}{top}\n[[directory]]\npath = "{media}"\n{directory}\n'
    (root / name).write_text(text, encoding="utf-8")
    return root / name


def run(tmp_path, *arguments, tag="tag"):
    """Exit status, report directory and summary (None without a report)."""
    places = ["--config", tmp_path / "config.toml", "--reports_dir", tmp_path / "reports", "--run_tag", tag]
    status = probe.main([*map(str, places), *map(str, arguments)])
    directory = tmp_path / "reports" / "dataset_inspect" / tag
    return status, directory, read_summary(directory) if directory.exists() else None


def table(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_image(path, caption="a red circle", size=(96, 64), color="red"):
    Image.new("RGB", size, color).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")


def snapshot(folder):
    return sorted((path.relative_to(folder), path.stat().st_mtime_ns) for path in folder.rglob("*"))


def test_the_whole_report(tmp_path, tiny_t2v, tiny_dataset, capsys):
    write_config(tmp_path, tiny_t2v, model='expert = "high_noise"')
    write_dataset(tmp_path, tiny_dataset)
    before = snapshot(tiny_dataset)
    status, directory, summary = run(tmp_path)
    assert status == 0, capsys.readouterr().err
    assert summary.verdict == "pass"
    assert snapshot(tiny_dataset) == before  # nothing is left behind in the dataset
    assert {path.name for path in directory.iterdir()} == {
        *("report.md", "summary.json", "files.csv", "skips.csv"),
        *("buckets.csv", "buckets.png", "caption_tokens.csv", "caption_tokens.png"),
        *("noise_levels.csv", "noise_levels.png", "contact_sheet.png"),
    }
    metrics = summary.metrics
    assert (metrics["num_files"], metrics["num_skipped"], metrics["num_samples"]) == (12, 1, 11)
    assert (metrics["num_images"], metrics["num_videos"]) == (5, 6)
    assert metrics["variant"] == "t2v-a14b" and metrics["fps"] == 16
    # 11 micro-batches of one sample, two to a step, over two epochs.
    assert metrics["micro_batches_first_epoch"] == 11
    assert metrics["steps_per_epoch"] == 5.5 and metrics["steps"] == 11
    assert metrics["unused_lengths"] == [5]
    roles = {entry.role for entry in summary.inputs}
    assert roles == {"config", "dataset", "variant", "tokenizer"}
    assert "a red circle" not in (directory / "report.md").read_text(encoding="utf-8")


def test_the_table_of_files_has_every_file(tmp_path, tiny_t2v, tiny_dataset):
    write_config(tmp_path, tiny_t2v, model='expert = "low_noise"')
    write_dataset(tmp_path, tiny_dataset)
    _, directory, _ = run(tmp_path)
    rows = {Path(row["file"]).name: row for row in table(directory / "files.csv")}
    assert set(rows) == {path.name for path in tiny_dataset.iterdir() if path.suffix != ".txt"}
    skipped = rows.pop("image_05.png")
    assert (skipped["status"], skipped["reason"], skipped["bucket"]) == ("skipped", "no_caption", "")
    assert {row["status"] for row in rows.values()} == {"kept"}
    video = rows["video_00.mp4"]  # 33 frames at 24 per second
    expected = {"bucket": "64x64x9", "frames_in": "33", "frames_used": "9", "seconds": "1.375"}
    assert {key: video[key] for key in expected} == expected
    assert 1 < int(video["caption_tokens"]) < 40 and video["is_truncated"] == "False"
    buckets = {row["bucket"]: row for row in table(directory / "buckets.csv")}
    assert {name: int(row["samples"]) for name, row in buckets.items()} == {"64x64x1": 5, "64x64x9": 6}


def test_noise_levels_of_an_expert(tmp_path, tiny_t2v, tiny_dataset):
    write_config(tmp_path, tiny_t2v, model='expert = "high_noise"\ntimestep_sample_method = "uniform"')
    write_dataset(tmp_path, tiny_dataset)
    _, directory, summary = run(tmp_path)
    assert summary.metrics["boundary"] == 0.875
    assert summary.metrics["share_low_noise"] == pytest.approx(0.875)
    assert summary.metrics["share_high_noise"] == pytest.approx(0.125)
    rows = table(directory / "noise_levels.csv")
    # Uniform between 0.875 and 1: a fifth below 0.9, the rest above.
    assert [float(row["share"]) for row in rows] == pytest.approx([0] * 8 + [0.2, 0.8])
    assert [float(row["unrestricted_share"]) for row in rows] == pytest.approx([0.1] * 10)


def test_the_contact_sheet_shows_what_the_model_sees(tmp_path, tiny_t2v):
    media = tmp_path / "media"
    media.mkdir()
    # Wider than the bucket: only the green middle is left after the crop.
    picture = Image.new("RGB", (192, 64), "red")
    picture.paste("lime", (64, 0, 128, 64))
    picture.save(media / "a.png")
    (media / "a.txt").write_text("a green square")
    write_config(tmp_path, tiny_t2v, model='expert = "low_noise"')
    write_dataset(tmp_path, media)
    status, directory, _ = run(tmp_path)
    assert status == 0
    sheet = Image.open(directory / "contact_sheet.png").convert("RGB")
    colors = {color for count, color in sheet.getcolors(1 << 20) if count > 1000}
    assert (0, 255, 0) in colors
    assert (255, 0, 0) not in colors


def test_the_contact_sheet_and_the_table_show_masks(tmp_path, tiny_t2v):
    media, masks = tmp_path / "media", tmp_path / "masks"
    for folder in (media, masks):
        folder.mkdir()
    for name in ("plain.png", "masked.png", "black.png"):
        write_image(media / name, size=(64, 64), color=(0, 120, 0))
    half = Image.new("L", (64, 64), 255)
    half.paste(0, (0, 0, 64, 48))
    half.save(masks / "masked.png")
    Image.new("L", (64, 64), 0).save(masks / "black.png")
    half.save(masks / "ghost.png")
    write_config(tmp_path, tiny_t2v, model='expert = "low_noise"')
    write_dataset(tmp_path, media, directory=f'mask_path = "{masks}"')
    status, directory, summary = run(tmp_path)
    assert status == 3 and summary.metrics["skipped_by_reason"] == {"bad_mask": 1, "mask_without_medium": 1}
    assert (summary.metrics["num_masked_samples"], summary.metrics["mean_masked_share"]) == (1, 0.75)
    rows = {Path(row["file"]).name: row for row in table(directory / "files.csv")}
    assert {
        name: (row["mask"], row["masked_share"]) for name, row in rows.items() if row["status"] == "kept"
    } == {
        "plain.png": ("", ""),
        "masked.png": (str(masks / "masked.png"), "0.75"),
    }
    sheet = Image.open(directory / "contact_sheet.png").convert("RGB")
    counts = {color: count for count, color in sheet.getcolors(1 << 20)}
    (tinted,) = [
        color for color, count in counts.items() if count > 2000 and color[0] > color[1] and color[2] > 100
    ]
    # Three quarters of one of the two pictures.
    assert counts[tinted] == pytest.approx(0.75 * 64 * 64, rel=0.1)
    assert counts[0, 120, 0] == pytest.approx(1.25 * 64 * 64, rel=0.1)


def run_prompts(tmp_path, file, *arguments):
    """Without the dataset TOML, which is not there."""
    return run(tmp_path, "--prompts", file, *arguments)


def test_prompts_alone(tmp_path, tiny_t2v):
    write_config(tmp_path, tiny_t2v, model='expert = "low_noise"')
    prompts = tmp_path / "captions.jsonl"
    long = "a secret circle on a blue square " * 120
    rows = [{"file": "gone.mp4", "captions": ["a red circle", long]}, {"prompt": "a red circle"}]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    status, directory, summary = run_prompts(tmp_path, prompts)
    assert status == 3 and summary.explanation == "Prompts: 3, of which 1 cut off at 512 tokens."
    assert (summary.metrics["num_prompts"], summary.metrics["num_different_captions"]) == (3, 2)
    assert [(row["place"], row["is_truncated"]) for row in table(directory / "prompts.csv")] == [
        ("line 1, text 1", "False"),
        ("line 1, text 2", "True"),
        ("line 2", "False"),
    ]
    bins = table(directory / "caption_tokens.csv")
    assert (bins[0]["count"], bins[-1]["low"], bins[-1]["count"]) == ("2", "513", "1")
    assert (directory / "caption_tokens.png").exists()
    for path in directory.iterdir():
        assert b"secret" not in path.read_bytes()
    prompts.write_text('"a red circle"')
    assert run(tmp_path, "--prompts", prompts, tag="short")[0] == 0


def test_prompts_that_cannot_be_counted(tmp_path, tiny_t2v, tiny_dataset, capsys):
    write_config(tmp_path, tiny_t2v, model='expert = "low_noise"')
    prompts = tmp_path / "prompts.txt"
    assert run_prompts(tmp_path, prompts)[0] == 2
    assert "prompts cannot be read" in capsys.readouterr().err
    prompts.write_text("a red circle")
    with pytest.raises(SystemExit) as ended:
        run_prompts(tmp_path, prompts, "--dataset", write_dataset(tmp_path, tiny_dataset))
    assert ended.value.code == 2 and "not allowed with" in capsys.readouterr().err
    write_config(tmp_path, tmp_path / "nowhere", model='variant = "ti2v-5b"')
    status, directory, _ = run_prompts(tmp_path, prompts)
    assert status == 2 and not directory.exists()
    assert "no tokenizer is there" in capsys.readouterr().err


@pytest.fixture
def messy(tmp_path, tiny_dataset):
    """Two good files, and one of every kind of bad one."""
    media = tmp_path / "media"
    media.mkdir()
    write_image(media / "good.png")
    for suffix in (".mp4", ".txt"):
        shutil.copy(tiny_dataset / f"video_00{suffix}", media / f"good_video{suffix}")
    (media / "text.mp4").write_text("not a video")
    (media / "text.txt").write_text("a blue square")
    (media / "empty.png").write_bytes(b"")
    (media / "empty.txt").write_text("a blue square")
    whole = (tiny_dataset / "image_00.png").read_bytes()
    (media / "cut_off.png").write_bytes(whole[: len(whole) // 2])
    (media / "cut_off.txt").write_text("a blue square")
    write_image(media / "dot.png", size=(1, 1))
    write_image(media / "silent.png", caption=None)
    write_image(media / "latin.png", caption=None)
    (media / "latin.txt").write_bytes("a cr\xe8me square".encode("latin-1"))
    (media / "notes.pdf").write_bytes(b"%PDF")
    (media / "folder").mkdir()
    (media / "loop.png").symlink_to(media / "loop.png")
    return media


def test_a_messy_folder(tmp_path, tiny_t2v, messy):
    write_config(tmp_path, tiny_t2v, model='expert = "low_noise"')
    write_dataset(tmp_path, messy)
    status, directory, summary = run(tmp_path)
    assert status == 3
    assert summary.verdict == "inconclusive" and "skipped: 9" in summary.explanation
    rows = table(directory / "files.csv")
    reasons = {Path(row["file"]).name: row["reason"] for row in rows if row["status"] == "skipped"}
    assert reasons == {
        **dict.fromkeys(("text.mp4", "empty.png", "cut_off.png", "latin.png"), "unreadable"),
        "dot.png": "too_small",
        "silent.png": "no_caption",
        "notes.pdf": "not_media",
        "folder": "folder",
        "loop.png": "link",
    }
    assert [row["reason"] for row in rows[:4]] == ["unreadable"] * 4
    assert all(row["detail"] for row in rows[:9])
    assert summary.metrics["skipped_by_reason"]["unreadable"] == 4
    assert {row["reason"]: row["count"] for row in table(directory / "skips.csv")}["unreadable"] == "4"


def test_files_at_which_training_would_stop(tmp_path, tiny_t2v, messy):
    write_config(tmp_path, tiny_t2v, model='expert = "low_noise"')
    write_dataset(tmp_path, messy, top='on_bad_file = "error"\nmissing_caption = "error"')
    (messy / "captions.json").write_text('{"ghost.png": "a circle", "good.png": "a circle"}')
    status, _, summary = run(tmp_path)
    assert status == 1
    # All of them, not only the first: 4 unreadable ones, one without caption, one absent, one with two captions.
    assert "training would stop: 7" in summary.explanation
    assert any("silent.png" in note for note in summary.notes)


def test_nothing_is_left(tmp_path, tiny_t2v):
    media = tmp_path / "media"
    media.mkdir()
    write_image(media / "silent.png", caption=None)
    write_config(tmp_path, tiny_t2v, model='expert = "low_noise"')
    write_dataset(tmp_path, media)
    status, directory, summary = run(tmp_path)
    assert status == 1
    assert summary.explanation.startswith("Nothing is left")
    assert not (directory / "contact_sheet.png").exists()
    assert table(directory / "files.csv")[0]["reason"] == "no_caption"


def test_an_image_to_video_model_leaves_images_out(tmp_path, tiny_i2v, tiny_dataset):
    write_config(tmp_path, tiny_i2v, model='expert = "high_noise"')
    write_dataset(tmp_path, tiny_dataset)
    status, _, summary = run(tmp_path)
    assert status == 3
    assert (summary.metrics["num_images"], summary.metrics["num_videos"]) == (0, 6)
    assert summary.metrics["skipped_by_reason"] == {"no_caption": 1, "no_bucket": 5}


def test_a_bucket_that_is_never_visited(tmp_path, tiny_t2v):
    media, rare = tmp_path / "media", tmp_path / "rare"
    for folder, size in ((media, 64), (rare, 96)):
        folder.mkdir()
        write_image(folder / "a.png", size=(size, size))
    write_config(tmp_path, tiny_t2v, model='expert = "low_noise"')
    more = f'[[directory]]\npath = "{rare}"\nresolutions = [96]\nnum_repeats = 0.001'
    write_dataset(tmp_path, media, directory=more)
    status, directory, summary = run(tmp_path)
    assert status == 1
    assert "never visited in the whole run: 1, 96x96x1" in summary.explanation
    visits = {row["bucket"]: row["visits_in_run"] for row in table(directory / "buckets.csv")}
    assert visits == {"64x64x1": "2", "96x96x1": "0"}


def test_a_caption_that_is_cut_off(tmp_path, tiny_t2v):
    media = tmp_path / "media"
    media.mkdir()
    write_image(media / "long.png", caption="a red circle on a blue square " * 120)
    write_image(media / "short.png")
    write_config(tmp_path, tiny_t2v, model='expert = "low_noise"')
    write_dataset(tmp_path, media)
    status, directory, summary = run(tmp_path)
    assert status == 3
    assert summary.explanation == "Captions that are cut off: 1."
    assert summary.metrics["num_captions_over_limit"] == 1
    bins = table(directory / "caption_tokens.csv")
    assert (bins[-1]["low"], bins[-1]["high"], bins[-1]["count"]) == ("513", "", "1")
    assert sum(int(row["count"]) for row in bins) == 2
    truncated = {Path(row["file"]).name: row["is_truncated"] for row in table(directory / "files.csv")}
    assert truncated == {"long.png": "True", "short.png": "False"}


def test_a_clip_that_breaks_off_is_found(tmp_path, tiny_t2v, tiny_dataset, monkeypatch):
    """Its beginning is whole, so that scanning cannot see it."""
    from utils.data import contact_sheet
    from utils.errors import UserError

    def broken(sample, rules):
        if sample.path.name == "video_00.mp4":
            raise UserError(f"{sample.path}: cannot be decoded as far as the clip reaches")
        return load_clip(sample, rules)

    load_clip = contact_sheet.load_clip
    monkeypatch.setattr(contact_sheet, "load_clip", broken)
    write_config(tmp_path, tiny_t2v, model='expert = "low_noise"')
    write_dataset(tmp_path, tiny_dataset)
    status, directory, summary = run(tmp_path, tag="skip")
    assert status == 3
    assert "cannot be decoded, of those looked at: 1" in summary.explanation
    assert any("would leave out the clip of" in note and "video_00" in note for note in summary.notes)
    assert (directory / "contact_sheet.png").exists()
    write_dataset(tmp_path, tiny_dataset, top='on_bad_file = "error"')
    status, _, summary = run(tmp_path, tag="error")
    assert status == 1 and any("would stop at" in note and "video_00" in note for note in summary.notes)


def test_every_clip_is_decoded_where_that_is_asked_for(tmp_path, tiny_t2v, tiny_dataset, monkeypatch):
    """Damage in the middle of a file that is not on the contact sheet."""
    media = tmp_path / "media"
    shutil.copytree(tiny_dataset, media)
    whole = (media / "video_00.mp4").read_bytes()
    middle = whole.index(b"mdat") + len(whole) // 3
    (media / "video_00.mp4").write_bytes(whole[:middle] + bytes(800) + whole[middle + 800 :])
    monkeypatch.setattr(probe, "MAX_PICTURES", 1)
    write_config(tmp_path, tiny_t2v, model='expert = "low_noise"')
    write_dataset(tmp_path, media)
    assert run(tmp_path, tag="some")[0] == 0
    status, directory, summary = run(tmp_path, "--decode_all", tag="all")
    assert status == 3 and "cannot be decoded, of those looked at: 1" in summary.explanation
    reasons = {Path(row["file"]).name: row["reason"] for row in table(directory / "files.csv")}
    assert reasons.pop("video_00.mp4") == "undecodable"
    assert set(reasons.values()) == {"", "no_caption"}


def test_only_config_json_is_needed_of_a_checkpoint(tmp_path, tiny_t2v, tiny_dataset):
    checkpoint = tmp_path / "checkpoint"
    (checkpoint / "low_noise_model").mkdir(parents=True)
    shutil.copy(tiny_t2v / "low_noise_model" / "config.json", checkpoint / "low_noise_model")
    write_config(tmp_path, checkpoint, model='expert = "low_noise"')
    write_dataset(tmp_path, tiny_dataset)
    status, directory, summary = run(tmp_path)
    assert status == 0
    assert summary.metrics["num_captions_over_limit"] is None
    assert "captions were not counted" in summary.explanation
    assert any("no tokenizer" in note for note in summary.notes)
    assert {row["caption_tokens"] for row in table(directory / "files.csv")} == {""}
    assert not (directory / "caption_tokens.csv").exists()


def test_the_variant_may_be_named_before_there_is_a_checkpoint(tmp_path, tiny_dataset, capsys):
    write_dataset(tmp_path, tiny_dataset)
    write_config(tmp_path, tmp_path / "nowhere", model='variant = "ti2v-5b"')
    status, _, summary = run(tmp_path)
    assert status == 0 and summary.metrics["fps"] == 24
    assert summary.metrics["boundary"] is None
    write_config(tmp_path, tmp_path / "nowhere")
    assert run(tmp_path, tag="other")[0] == 2
    assert "write model.variant" in capsys.readouterr().err


def test_another_dataset(tmp_path, tiny_t2v, tiny_dataset):
    media = tmp_path / "media"
    media.mkdir()
    write_image(media / "one.png")
    write_config(tmp_path, tiny_t2v, model='expert = "low_noise"')  # its dataset TOML does not exist
    other = write_dataset(tmp_path, media, name="other, with = and 'quotes'.toml")
    status, _, summary = run(tmp_path, "--dataset", other)
    assert status == 0 and summary.metrics["num_samples"] == 1


def test_what_a_run_remembers_is_used_and_left_as_it_is(tmp_path, tiny_t2v, monkeypatch):
    media, cache = tmp_path / "media", tmp_path / "cache"
    media.mkdir()
    for name in ("known.png", "new.png"):
        write_image(media / name)
        os.utime(media / name, (1_600_000_000, 1_600_000_000))
    memo = memo_module.HashMemo(cache / "content_hashes.jsonl")
    memo.media_info(media / "known.png")
    memo.save()
    before = (cache / "content_hashes.jsonl").read_bytes()
    probed = []
    monkeypatch.setattr(
        memo_module, "probe_media", lambda path: probed.append(path.name) or probe_media(path)
    )
    write_config(tmp_path, tiny_t2v, model='expert = "low_noise"')
    write_dataset(tmp_path, media, top=f'cache_dir = "{cache}"')
    assert run(tmp_path)[0] == 0
    assert probed == ["new.png"]
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == {"content_hashes.jsonl": before}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("", "expert"),
        ('expert = "low_noise"\nvariant = "i2v-a14b"', "variant"),
        ('expert = "high_noise"\nmax_t = 0.5', "leave nothing to the high_noise expert"),
    ],
)
def test_wrong_use_is_one_clear_message(tmp_path, tiny_t2v, tiny_dataset, capsys, model, expected):
    write_config(tmp_path, tiny_t2v, model=model)
    write_dataset(tmp_path, tiny_dataset)
    status, directory, _ = run(tmp_path)
    said = capsys.readouterr().err
    assert status == 2 and expected in said and "Traceback" not in said
    assert not directory.exists()


def test_a_missing_directory_is_wrong_use(tmp_path, tiny_t2v, capsys):
    write_config(tmp_path, tiny_t2v, model='expert = "low_noise"')
    write_dataset(tmp_path, tmp_path / "nowhere")
    assert run(tmp_path)[0] == 2
    assert "does not exist" in capsys.readouterr().err


def test_a_config_that_is_not_right_is_answered_without_torch(tmp_path):
    (tmp_path / "config.toml").write_text("[model]\n")
    code = (
        f"import sys, runpy; sys.argv = ['x', '--config', {str(tmp_path / 'config.toml')!r}]\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 2, end.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_names_that_are_no_utf8(tmp_path, tiny_t2v):
    media = tmp_path / "media"
    media.mkdir()
    write_image(media / "good.png")
    odd = Path(str(media) + "/odd\udce8.png")
    try:
        write_image(odd)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    write_config(tmp_path, tiny_t2v, model='expert = "low_noise"')
    write_dataset(tmp_path, media)
    status, directory, _ = run(tmp_path)
    assert status == 0
    assert any("odd\\udce8.png" in row["file"] for row in table(directory / "files.csv"))
    assert json.loads((directory / "summary.json").read_text())["metrics"]["num_samples"] == 2
