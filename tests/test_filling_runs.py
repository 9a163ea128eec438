"""Filling the cache in real runs: what is released before the DiT loads, and what is taken on trust."""

import json
import os
import shutil
import weakref

import pytest

from models.wan import caching, text_encoder
from tests.helpers.workspace import Workspace, check_refused, make_workspace
from utils import run as runs
from utils.metrics import read_metrics


@pytest.fixture
def workspace(tmp_path, tiny_ti2v, tiny_dataset) -> Workspace:
    return make_workspace(tmp_path, tiny_ti2v, tiny_dataset)


@pytest.mark.parametrize(("mode", "loaded"), [("dit_lora", ["vae", "text"]), ("encoder_ft", ["vae"])])
def test_the_encoders_are_gone_before_the_dit_loads(mode, loaded, workspace, monkeypatch) -> None:
    """Weights of both, to the last tensor. In encoder_ft no caption is cached, so UMT5 is not loaded whole at all."""
    seen: list[str] = []
    references: list[weakref.ref] = []
    load_vae, load_umt5, build = caching.load_vae, text_encoder.load_umt5, runs.build

    def watch(name, module):
        seen.append(name)
        references.append(weakref.ref(module))
        references.extend(weakref.ref(parameter) for parameter in module.parameters())

    def watched_vae(*args):
        vae = load_vae(*args)
        watch("vae", vae._module)
        return vae

    def watched_umt5(*args):
        module = load_umt5(*args)
        watch("text", module)
        return module

    def watched_build(*args):
        assert seen == loaded and len(references) > 20
        assert not [reference for reference in references if reference() is not None]
        seen.append("built")
        return build(*args)

    monkeypatch.setattr("utils.data.decode.MIN_CLIPS_PER_WORKER", 1)
    monkeypatch.setattr(caching, "load_vae", watched_vae)
    monkeypatch.setattr(text_encoder, "load_umt5", watched_umt5)
    monkeypatch.setattr(runs, "build", watched_build)
    assert workspace.train(mode, "decode_workers=1", flags=["--dry_run"]) == 0
    assert seen == [*loaded, "built"]


def make_others_time(workspace: Workspace) -> None:
    """Give every file of the dataset the time stamp that a copy gets."""
    for path in workspace.media.iterdir():
        os.utime(path, ns=(10**18, 10**18))


@pytest.mark.long
def test_a_copied_set_is_trusted_and_said_to_be(workspace, capsys, monkeypatch) -> None:
    make_others_time(workspace)
    assert workspace.train("dit_lora", "max_steps=1") == 0
    read: list[str] = []
    from utils.data import memo

    content_hash = memo.content_hash
    monkeypatch.setattr(memo, "content_hash", lambda path: read.append(path.name) or content_hash(path))

    def media_read() -> list[str]:
        return sorted(name for name in read if name.endswith((".png", ".mp4")))

    # Copied: other time stamps. The same run goes on, with nothing read and nothing encoded.
    for path in workspace.media.iterdir():
        os.utime(path, ns=(11 * 10**17, 11 * 10**17))
    capsys.readouterr()
    flags = ["--trust_cache", "--resume_from_checkpoint"]
    assert workspace.train("dit_lora", "max_steps=2", flags=flags) == 0
    said = capsys.readouterr().err
    assert media_read() == []
    assert (
        "--trust_cache: 6 file(s) with another time stamp or place count as unchanged because they have the size that "
        "is known; 0 new or of another size were read" in said
    )
    assert "cache of latents: 6 items, 0 encoded now" in said
    assert len(read_metrics(workspace.run())) == 2

    # What is risked: another picture of the same size keeps its latents. What is not: nothing of it gets under its key.
    image = workspace.media / "image_00.png"
    content = bytearray(image.read_bytes())
    content[-1] ^= 1
    image.write_bytes(content)
    assert workspace.train("dit_lora", flags=["--trust_cache", "--cache_only"]) == 0
    assert "0 encoded now" in capsys.readouterr().err
    shutil.rmtree(workspace.cache / "shards")
    code = workspace.train("dit_lora", flags=["--trust_cache", "--cache_only"])
    check_refused(code, capsys.readouterr().err, str(image), "--trust_cache")
    assert workspace.train("dit_lora", flags=["--cache_only"]) == 0
    assert "image_00.png" in media_read()


def test_trust_and_making_anew_contradict_each_other(workspace, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        workspace.train("dit_lora", flags=["--trust_cache", "--regenerate_cache"])
    assert end.value.code == 2
    assert "not allowed with argument" in capsys.readouterr().err


@pytest.mark.long
def test_workers_and_batches_leave_keys_and_losses_as_they_are(workspace, capsys, monkeypatch) -> None:
    monkeypatch.setattr("utils.data.decode.MIN_CLIPS_PER_WORKER", 1)
    assert workspace.train("dit_lora", "max_steps=2", "decode_workers=0") == 0
    shutil.rmtree(workspace.cache)
    resumed = ("max_steps=3", "decode_workers=1")
    assert workspace.train("dit_lora", *resumed, flags=["--resume_from_checkpoint"]) == 0
    assert "6 encoded now" in capsys.readouterr().err
    shutil.rmtree(workspace.cache)
    assert workspace.train("dit_lora", "max_steps=3", "decode_workers=0") == 0
    first, second = (json.dumps([row["loss"] for row in read_metrics(run)]) for run in workspace.runs())
    assert first == second
    capsys.readouterr()
    # The keys are the same: with other values nothing is encoded.
    assert (
        workspace.train("dit_lora", "caching_batch_size=4", "decode_workers=3", flags=["--cache_only"]) == 0
    )
    assert "6 items, 0 encoded now" in capsys.readouterr().err
