"""Whatever is wrong with what the user gives: one clear message, the right exit status, and nothing left behind."""

import json
import os
import resource
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import pytest
import torch

from tests.helpers.workspace import (
    Workspace,
    check_refused,
    linked_copy,
    make_workspace,
    mount_or_skip,
)
from train import main, parse_arguments
from utils.data.cache import CacheStore

SHARD = "diffusion_pytorch_model-00002-of-00003.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
ENCODER = "models_t5_umt5-xxl-enc-bf16.pth"
VAE = "Wan2.2_VAE.pth"


@pytest.fixture
def workspace(tmp_path, tiny_ti2v, tiny_dataset) -> Workspace:
    """With a checkpoint of links, so that a test may put something else in a file's place."""
    return make_workspace(tmp_path, linked_copy(tiny_ti2v, tmp_path / "checkpoint"), tiny_dataset)


@pytest.fixture
def refused(workspace, capsys) -> Iterator[Callable[..., None]]:
    """`refused(*expected, overrides=..., mode=...)`: a run ends in one message and leaves no run and no temporary file."""

    def check(*expected: str, mode: str = "dit_lora", overrides: tuple[str, ...] = ()) -> None:
        code = workspace.train(mode, *overrides)
        check_refused(code, capsys.readouterr().err, *expected)
        assert workspace.runs() == [] and workspace.leftovers() == []

    yield check
    assert not torch.distributed.is_initialized()


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def cut(path: Path, share: float) -> None:
    """Keep the first part of a file, as a download that stopped."""
    content = path.read_bytes()
    replace(path, content[: int(len(content) * share)])


# ---------------------------------------------------------------------- weights


@pytest.mark.parametrize("name", ["config.json", SHARD, ENCODER, VAE, "google/umt5-xxl"])
def test_a_missing_weight_file(workspace, refused, name) -> None:
    path = workspace.checkpoint / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    refused(str(path), "missing", "download it")


@pytest.mark.parametrize("name", [SHARD, ENCODER, VAE])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.7])
def test_a_truncated_weight_file(workspace, refused, name, share) -> None:
    cut(workspace.checkpoint / name, share)
    refused(str(workspace.checkpoint / name), "truncated", "download or copy it again")


@pytest.mark.parametrize("name", ["google/umt5-xxl/tokenizer.json", "config.json", INDEX])
def test_a_truncated_text_file(workspace, refused, name) -> None:
    cut(workspace.checkpoint / name, 0.5)
    refused(str((workspace.checkpoint / name).parent))


def edit_index(workspace: Workspace, change: Callable[[dict[str, str]], None]) -> None:
    path = workspace.checkpoint / INDEX
    document = json.loads(path.read_text())
    change(document["weight_map"])
    replace(path, json.dumps(document).encode())


def test_a_shard_missing_from_the_index(workspace, refused) -> None:
    def forget_a_shard(weight_map: dict[str, str]) -> None:
        for name in [name for name, shard in weight_map.items() if shard == SHARD]:
            del weight_map[name]

    edit_index(workspace, forget_a_shard)
    refused(str(workspace.checkpoint), "missing")


def test_a_shard_that_only_the_index_knows(workspace, refused) -> None:
    edit_index(workspace, lambda weight_map: weight_map.update({"extra.weight": "another.safetensors"}))
    refused(str(workspace.checkpoint / "another.safetensors"), INDEX, "download it again")


def test_a_weight_file_that_holds_code(workspace, refused) -> None:
    path = workspace.checkpoint / VAE
    path.unlink()
    torch.save({"weight": Path("x")}, path)
    refused(str(path), "code in a weight file is never run")


def test_a_part_of_an_encoder_is_not_an_encoder(workspace, refused) -> None:
    partial = ("model.save_text_encoder_full=false", "model.text_train_blocks=1", "max_steps=1")
    assert workspace.train("encoder_ft", *partial) == 0
    encoder = workspace.run() / "epoch1" / "text_encoder.safetensors"
    moved = shutil.move(encoder, workspace.root / "part.safetensors")
    shutil.rmtree(workspace.out)
    refused(str(moved), "save_text_encoder_full", overrides=(f"model.llm_path={moved}",))


# ---------------------------------------------------------------------- the dataset


def test_an_empty_dataset(workspace, refused) -> None:
    shutil.rmtree(workspace.media)
    workspace.media.mkdir()
    refused(str(workspace.media))


def test_no_dataset_directory(workspace, refused) -> None:
    shutil.rmtree(workspace.media)
    refused(str(workspace.media), "does not exist", "dataset.toml")
    assert not workspace.media.exists()


@pytest.mark.parametrize("name", ["image_01.png", "video_01.mp4"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_an_unreadable_file(workspace, refused, capsys, name, share) -> None:
    cut(workspace.media / name, share)
    assert workspace.train("dit_lora", "max_steps=1") == 0
    said = capsys.readouterr().err
    assert f"skipped {workspace.media / name}: " in said and "5 samples" in said
    shutil.rmtree(workspace.out)
    workspace.write_dataset('on_bad_file = "error"')
    refused(str(workspace.media / name), 'on_bad_file = "skip"')


def test_only_unreadable_files(workspace, refused) -> None:
    for path in workspace.media.iterdir():
        if path.suffix != ".txt":
            path.write_bytes(b"not media")
    refused(str(workspace.media), "image_00")


def test_damaged_files_are_named_before_those_that_are_left_out_on_purpose(workspace, capsys) -> None:
    cut(workspace.media / "video_02.mp4", 0.3)
    for number in range(20):
        (workspace.media / f"another_{number}.png").write_bytes(b"no caption, so nobody looks into it")
    assert workspace.train("dit_lora", "max_steps=1") == 0
    said = capsys.readouterr().err
    assert f"skipped {workspace.media / 'video_02.mp4'}: " in said and "... and 11 more" in said


def test_files_that_share_a_caption_by_their_stem_are_named(workspace, capsys) -> None:
    shutil.copy(workspace.media / "image_01.png", workspace.media / "video_01.png")
    assert workspace.train("dit_lora", flags=["--cache_only"]) == 0
    said = capsys.readouterr().err
    shared = f"{workspace.media / 'video_01.txt'}: is the caption of 2 files of one stem, video_01.mp4, video_01.png"
    assert f"warning: {shared}" in said and "7 samples" in said


def test_a_bad_mask(workspace, refused, capsys) -> None:
    masks = workspace.root / "masks"
    masks.mkdir()
    (masks / "video_01.png").write_bytes(b"no picture")
    with (workspace.root / "dataset.toml").open("a") as file:
        file.write(f'mask_path = "{masks}"\n')
    assert workspace.train("dit_lora", flags=["--cache_only"]) == 0
    said = capsys.readouterr().err
    assert (
        f"skipped {workspace.media / 'video_01.mp4'}: its mask, {masks / 'video_01.png'}: not readable"
        in said
    )
    assert "loss masks: 0 of 5 samples" in said
    shutil.rmtree(masks)
    refused(str(masks), "mask_path", "does not exist")


@pytest.mark.parametrize("mode", ["dit_lora", "encoder_ft"])
def test_a_caption_that_is_too_long_is_reported(workspace, capsys, mode) -> None:
    (workspace.media / "image_01.txt").write_text("a red circle and " * 400)
    assert workspace.train(mode, "max_steps=1") == 0
    (line,) = [
        line for line in capsys.readouterr().err.splitlines() if "too long" in line or "tokens, and" in line
    ]
    assert line.startswith(f"warning: {workspace.media / 'image_01.png'}: its caption has ")
    assert int(line.split(" tokens")[0].rsplit(" ", 1)[1]) > 1200
    assert "512" in line and "shorten it" in line


def test_a_caption_of_exactly_the_longest_length_is_not_reported(workspace, tiny_ti2v, capsys) -> None:
    from models.wan.text_encoder import MAX_TEXT_TOKENS, WanTokenizer

    tokenizer = WanTokenizer(tiny_ti2v / "google/umt5-xxl")
    words = ["red"]
    while tokenizer.count(" ".join(words)) < MAX_TEXT_TOKENS:
        words.append("red")
    assert tokenizer.count(" ".join(words)) == MAX_TEXT_TOKENS
    caption = workspace.media / "image_01.txt"
    caption.write_text(" ".join(words))
    assert workspace.train("dit_lora", flags=["--cache_only"]) == 0
    assert "warning" not in capsys.readouterr().err
    caption.write_text(" ".join([*words, "red"]))
    assert workspace.train("dit_lora", flags=["--cache_only"]) == 0
    assert f"has {MAX_TEXT_TOKENS + 1} tokens" in capsys.readouterr().err


def test_a_damaged_item_of_the_cache(workspace, capsys) -> None:
    assert workspace.train("dit_lora", flags=["--cache_only"]) == 0
    item = next(CacheStore(workspace.cache).items("latents")).key
    place = CacheStore(workspace.cache).place(item)
    content = bytearray(place.shard.path.read_bytes())
    content[place.entry.offset + place.entry.length - 1] ^= 128
    place.shard.path.write_bytes(content)
    capsys.readouterr()
    code = workspace.train("dit_lora", "epochs=1")
    check_refused(code, capsys.readouterr().err, str(workspace.cache), item, "--cache_only")
    assert workspace.train("dit_lora", "epochs=1") == 0


def damage_behind_the_beginning(video: Path) -> None:
    """Zeros in the place of all frames but the first few, which the first one needs; the index stays whole, so only decoding finds it."""
    with av.open(str(video)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        spans = [(packet.pos, packet.size) for packet in packets[4:]]
    content = bytearray(video.read_bytes())
    for begin, size in spans:
        content[begin : begin + size] = bytes(size)
    video.write_bytes(content)


def test_a_video_damaged_behind_a_whole_beginning_is_left_out(workspace, capsys) -> None:
    video = workspace.media / "video_01.mp4"
    damage_behind_the_beginning(video)
    assert workspace.train("dit_lora", "max_steps=1") == 0
    said = capsys.readouterr().err
    assert (
        "dataset: 6 samples" in said and "5 encoded now (5 new), 0 there already, 1 cannot be decoded" in said
    )
    (line,) = [line for line in said.splitlines() if line.startswith(f"  skipped {video}: ")]
    assert "as far as the clip reaches" in line
    assert "3 steps of" not in said and "5 micro-batches in the first epoch" in said
    # It is tried again by the next run, because it may have been mended; the run itself is the same.
    assert workspace.train("dit_lora", "max_steps=2", flags=["--resume_from_checkpoint"]) == 0
    assert "0 encoded now, 5 there already, 1 cannot be decoded" in capsys.readouterr().err
    workspace.write_dataset('on_bad_file = "error"')
    code = workspace.train("dit_lora", "max_steps=1")
    check_refused(code, capsys.readouterr().err, str(video), "as far as the clip reaches", "mend the file")


def test_a_dataset_of_which_nothing_can_be_decoded(workspace, capsys) -> None:
    for path in workspace.media.iterdir():
        if path.suffix == ".mp4":
            damage_behind_the_beginning(path)
        elif path.suffix == ".png":
            path.unlink()
    code = workspace.train("dit_lora", "max_steps=1")
    check_refused(code, capsys.readouterr().err, "nothing to train on", "none of its 3 clips can be decoded")
    assert workspace.runs() == []


# ---------------------------------------------------------------------- the disk


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[int], Path]]:
    """`small_disk(size)`: a file system of that many bytes."""
    place = tmp_path / "small_disk"
    place.mkdir()

    def mount(size_bytes: int) -> Path:
        mount_or_skip(size_bytes, place)
        return place

    yield mount
    subprocess.run(["umount", str(place)], capture_output=True, check=False)


# Room for nothing; a part of the run directory; metrics; the adapter; the adapter and a part of the checkpoint.
@pytest.mark.parametrize("pages", [1, 4, 7, 10, 24, 40])
def test_a_full_disk_while_training(workspace, small_disk, capsys, pages) -> None:
    disk = small_disk(pages * 4096)
    code = workspace.train("dit_lora", "max_steps=3", f"output_dir={disk / 'out'}")
    check_refused(code, capsys.readouterr().err, str(disk), "the disk is full", "free some space")
    assert not [path for path in disk.rglob("*") if path.name.endswith(".tmp")]
    for run in (disk / "out").glob("*"):
        assert (run / "config.toml").is_file() and (run / "targets.json").is_file()
        assert not list(run.glob("global_step*")) and not (run / "latest").exists()
        for line in (run / "metrics.jsonl").read_text().splitlines():
            json.loads(line)
        for epoch in run.glob("epoch*"):
            assert {path.name for path in epoch.iterdir()} == {
                "adapter_config.json",
                "adapter_model.safetensors",
            }


def test_a_full_disk_while_caching_keeps_what_is_whole(workspace, small_disk, capsys) -> None:
    disk = small_disk(8 * 4096)
    dataset = workspace.root / "dataset.toml"
    dataset.write_text(dataset.read_text().replace(str(workspace.cache), str(disk / "cache")))
    code = workspace.train("dit_lora")
    check_refused(code, capsys.readouterr().err, str(disk / "cache"), "the disk is full")
    assert workspace.runs() == [] and not list(disk.rglob("*.tmp"))
    whole = list(CacheStore(disk / "cache").keys("latents"))
    assert whole
    subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
    assert workspace.train("dit_lora", flags=["--cache_only"]) == 0
    left = 6 - len(whole)
    assert f"{left} encoded now ({left} new), {len(whole)} there already" in capsys.readouterr().err


def test_a_file_that_grows_over_the_limit(workspace, capsys) -> None:
    assert workspace.train("dit_lora", flags=["--cache_only"]) == 0
    capsys.readouterr()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # the adapter has 34 kB
    try:
        code = workspace.train("dit_lora", "max_steps=1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    check_refused(code, capsys.readouterr().err, str(workspace.run() / "epoch1"), "ulimit -f")
    assert workspace.leftovers() == [] and not list(workspace.run().glob("epoch*"))


def test_a_read_only_output_directory(workspace, small_disk, capsys) -> None:
    disk = small_disk(1 << 20)
    done = subprocess.run(["mount", "-o", "remount,ro", str(disk)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("remounting is not allowed here")
    code = workspace.train("dit_lora", "max_steps=1", f"output_dir={disk / 'out'}")
    check_refused(code, capsys.readouterr().err, str(disk / "out"), "is not writable")


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_an_output_directory_that_cannot_be_made(workspace, refused, place) -> None:
    (workspace.root / "file").write_text("")
    refused("output_dir", str(workspace.root / place), overrides=(f"output_dir={workspace.root / place}",))


# ---------------------------------------------------------------------- processes


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield int(taken.getsockname()[1])


def test_a_port_in_use(workspace, refused, monkeypatch, taken_port) -> None:
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for key, value in (launched | {"MASTER_PORT": str(taken_port)}).items():
        monkeypatch.setenv(key, value)
    refused(f"127.0.0.1:{taken_port}", "in use", "--master_port")
    assert os.environ["MASTER_PORT"] == str(taken_port)


@pytest.mark.parametrize("key", ["RANK", "WORLD_SIZE", "MASTER_PORT"])
def test_launcher_variables_that_are_no_numbers(workspace, refused, monkeypatch, key) -> None:
    launched = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29511",
    }
    for name, value in (launched | {key: "many"}).items():
        monkeypatch.setenv(name, value)
    refused(key, "'many'")


def test_a_world_size_that_the_stages_do_not_divide(refused) -> None:
    refused("pipeline_stages = 2", "the 1 process", "Start 2", overrides=("pipeline_stages=2",))


@pytest.mark.long
def test_of_several_processes_one_speaks(workspace) -> None:
    done = workspace.launch(["torchrun", "--nproc_per_node", "2"], "dit_lora", "pipeline_stages=3")
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if "pipeline_stages = 3" in line]
    assert line.startswith("error: ") and "the 2 processes" in line and "Start 3" in line
    assert workspace.runs() == []


def test_more_stages_than_layers(workspace, refused, monkeypatch) -> None:
    # Found out before any process waits for another, so one process that claims to be of many is enough to show it.
    monkeypatch.setattr("utils.run.check_world_size", lambda config, world_size: None)
    refused("pipeline_stages", overrides=("pipeline_stages=50",))


# ---------------------------------------------------------------------- the command line


def test_a_build_that_fails_leaves_no_run(workspace, refused, monkeypatch) -> None:
    from utils.errors import UserError

    def fail(*_: object, **__: object) -> None:
        raise UserError("no room for the model")

    monkeypatch.setattr("utils.run.build_pipeline", fail)
    refused("no room for the model")


def test_what_no_user_can_mend_has_status_one_and_one_line(workspace, capsys, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a broken library\nwith a second line")

    monkeypatch.setattr("utils.run.build_pipeline", fail)
    assert workspace.train("dit_lora") == 1
    said = capsys.readouterr().err
    assert said.splitlines()[-1] == "failed: RuntimeError: a broken library (--debug shows where)"
    assert "Traceback" not in said and workspace.runs() == []
    assert workspace.train("dit_lora", flags=["--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_debug_shows_the_trace_of_a_user_error(workspace, capsys) -> None:
    assert workspace.train("dit_lora", "adapter.rank=0", flags=["--debug"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said and "adapter.rank" in said


@pytest.mark.parametrize(
    "words", [[], ["--config"], ["--config", "x.toml", "--resume"], ["--conf", "x.toml"]]
)
def test_a_wrong_command_line(words, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments(words)
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_as_many_epochs_as_fit_into_a_number_are_refused_and_not_counted(refused) -> None:
    refused("epochs: must be at least 1 and at most", overrides=(f"epochs={2**63 - 1}",))


def test_a_config_that_is_not_there(capsys) -> None:
    check_refused(
        main(["--config", "no/such.toml"]), capsys.readouterr().err, "no/such.toml", "does not exist"
    )


def test_a_run_to_continue_that_is_none(workspace, capsys) -> None:
    (workspace.out / "mine").mkdir(parents=True)
    code = workspace.train("dit_lora", flags=["--resume_from_checkpoint", "mine"])
    check_refused(code, capsys.readouterr().err, "--resume_from_checkpoint mine", str(workspace.out / "mine"))


@pytest.mark.parametrize(("name", "damage"), [("stage_0.safetensors", "cut"), ("loop.json", "missing")])
def test_a_damaged_checkpoint(workspace, capsys, name, damage) -> None:
    steps = ("checkpoint_every_n_steps=1", "max_steps=2")
    assert workspace.train("dit_lora", *steps) == 0
    checkpoint = workspace.run() / "global_step2"
    if damage == "cut":
        cut(checkpoint / name, 0.4)
    else:
        (checkpoint / name).unlink()
    capsys.readouterr()
    longer = (*steps[:1], "max_steps=3")
    code = workspace.train("dit_lora", *longer, flags=["--resume_from_checkpoint"])
    check_refused(code, capsys.readouterr().err, str(checkpoint / name), f"delete {checkpoint}")
    shutil.rmtree(checkpoint)  # as the message says
    assert workspace.train("dit_lora", *longer, flags=["--resume_from_checkpoint"]) == 0
    assert "from global_step1 (1 of 3 steps done)" in capsys.readouterr().err
