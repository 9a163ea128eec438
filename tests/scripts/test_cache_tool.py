"""The cache tool as a person runs it, on the cache that a training command has filled."""

import os
import shutil
import time

import pytest

from scripts.cache_tool import main, size
from tests.helpers.workspace import check_refused, make_workspace
from utils.config.dump import dump_config
from utils.config.load import load_config
from utils.data.cache import CacheStore
from utils.data.cache_upkeep import all_keys


@pytest.fixture(scope="module")
def filled(tmp_path_factory, tiny_ti2v, tiny_dataset):
    """A workspace whose cache holds what dit_lora needs: 6 latents, 6 captions and the empty one."""
    workspace = make_workspace(tmp_path_factory.mktemp("filled"), tiny_ti2v, tiny_dataset)
    assert workspace.train("dit_lora", flags=["--cache_only"]) == 0
    return workspace


@pytest.fixture
def workspace(filled, tmp_path, tiny_ti2v, tiny_dataset):
    """A copy of it."""
    made = make_workspace(tmp_path, tiny_ti2v, tiny_dataset)
    shutil.copytree(filled.cache, made.cache)
    return made


def write_config(workspace, mode: str, *overrides: str):
    arguments = workspace.arguments(mode, *overrides)
    loaded = load_config(arguments[1], arguments[3::2])
    path = workspace.root / f"{mode}.toml"
    path.write_text(dump_config(loaded.train), encoding="utf-8")
    return str(path)


def keys_in(workspace, kind: str) -> list[str]:
    return list(CacheStore(workspace.cache).keys(kind))


def test_stats(workspace, capsys):
    assert main(["stats", str(workspace.cache)]) == 0
    said = capsys.readouterr().out
    assert "latents: 6 items" in said and "text: 7 items" in said and "UTC to" in said
    assert "  bucket: 64x64" in said and "  dtype: float32 (6)" in said and "  text_encoder: " in said
    assert "shape" not in said and "circle" not in said  # no captions
    assert main(["stats", str(workspace.media)]) == 2


def test_verify_names_damage_and_removes_it_only_when_told(workspace, capsys):
    cache = str(workspace.cache)
    assert main(["verify", cache]) == 0
    assert "13 items checked, 0 damaged" in capsys.readouterr().out
    damaged = keys_in(workspace, "latents")[2]
    place = CacheStore(workspace.cache).place(damaged)
    data = bytearray(place.shard.path.read_bytes())
    data[place.entry.offset + place.entry.length - 1] ^= 1
    place.shard.path.write_bytes(data)
    assert main(["verify", cache]) == 1
    said = capsys.readouterr().out
    assert f"damaged: {damaged} in {place}: does not match its checksum" in said and "--remove" in said
    assert CacheStore(workspace.cache).has(damaged)
    assert main(["verify", cache, "--remove"]) == 1
    assert f"removed: {damaged}" in capsys.readouterr().out
    assert not CacheStore(workspace.cache).has(damaged)
    assert main(["verify", cache]) == 0
    assert len(all_keys(CacheStore(workspace.cache))) == 12


def test_prune_keeps_what_training_needs(workspace, capsys):
    config = write_config(workspace, "dit_lora")
    assert main(["prune", str(workspace.cache), "--config", config, "--yes"]) == 0
    said = capsys.readouterr().out
    assert "needs 13 items" in said and "13 items: 13 needed, 0 not" in said
    capsys.readouterr()
    assert workspace.train("dit_lora", flags=["--cache_only"]) == 0
    said = capsys.readouterr()
    assert (said.out + said.err).count(" 0 encoded now") == 2


def test_prune_keeps_what_evaluation_needs(workspace, capsys):
    """Both datasets in one cache: what only the evaluated one has stays; a cache that only it has can be pruned too."""
    holdout, text = workspace.root / "holdout.toml", (workspace.root / "dataset.toml").read_text()
    holdout.write_text(text)
    alone = workspace.root / "alone"
    alone.mkdir()
    for path in workspace.media.glob("image_00.*"):
        shutil.copy(path, alone)
    (workspace.root / "dataset.toml").write_text(text.replace(str(workspace.media), str(alone)))
    cache = str(workspace.cache)
    config = write_config(workspace, "dit_lora", f"eval_datasets=['{holdout}']")
    assert main(["prune", cache, "--config", config]) == 0
    assert "13 needed, 0 not" in capsys.readouterr().out
    assert main(["prune", cache, "--config", write_config(workspace, "dit_lora")]) == 0
    assert "3 needed, 10 not" in capsys.readouterr().out
    elsewhere = workspace.root / "dataset.toml"
    elsewhere.write_text(elsewhere.read_text().replace(cache, str(workspace.root / "other")))
    config = write_config(workspace, "dit_lora", f"eval_datasets=['{holdout}']")
    assert main(["prune", cache, "--config", config]) == 0
    assert "13 needed, 0 not" in capsys.readouterr().out


def test_prune_deletes_only_with_yes(workspace, capsys):
    captions = sorted(workspace.media.glob("image_*.txt"))
    captions[0].write_text("a teal hexagon")
    leftover = workspace.cache / "shards" / ".x.index.y.tmp"
    leftover.write_bytes(b"torn")
    os.utime(leftover, (time.time() - 7200,) * 2)
    before = all_keys(CacheStore(workspace.cache))
    command = ["prune", str(workspace.cache), "--config", write_config(workspace, "dit_lora")]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "12 needed, 1 not" in said and "1 leftover files (4 B)" in said
    assert "nothing was deleted" in said
    assert all_keys(CacheStore(workspace.cache)) == before and leftover.exists()
    assert main([*command, "--yes"]) == 0
    after = all_keys(CacheStore(workspace.cache))
    (gone,) = set(before) - set(after)
    assert gone.startswith("text/") and not leftover.exists()


def test_prune_keeps_what_any_config_needs(workspace, capsys):
    """encoder_ft alone reads no cached captions; with dit_lora beside it they stay."""
    encoder_ft, dit_lora = (write_config(workspace, mode) for mode in ("encoder_ft", "dit_lora"))
    both = ["prune", str(workspace.cache), "--config", encoder_ft, "--config", dit_lora, "--yes"]
    assert main(both) == 0
    assert len(keys_in(workspace, "text")) == 7
    assert main(["prune", str(workspace.cache), "--config", encoder_ft, "--yes"]) == 0
    assert keys_in(workspace, "text") == [] and len(keys_in(workspace, "latents")) == 6
    # Another precision of the VAE needs other latents.
    other = write_config(workspace, "dit_lora", "model.vae_dtype=bfloat16")
    assert main(["prune", str(workspace.cache), "--config", other]) == 0
    assert "6 items: 0 needed, 6 not" in capsys.readouterr().out


def test_prune_refuses_a_config_of_another_cache(workspace, tmp_path, capsys):
    config = write_config(workspace, "dit_lora")
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(workspace.cache, elsewhere)
    code = main(["prune", str(elsewhere), "--config", config, "--yes"])
    check_refused(code, capsys.readouterr().err, "keeps its cache in", str(elsewhere))
    assert len(all_keys(CacheStore(elsewhere))) == 13


def test_prune_names_files_that_cannot_be_read(workspace, capsys):
    image = workspace.media / "image_00.png"
    image.write_bytes(image.read_bytes()[:40])
    assert main(["prune", str(workspace.cache), "--config", write_config(workspace, "dit_lora")]) == 0
    assert f"skipped {image}: " in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["prune", "x"], ["clean", "x"], ["stats"]])
def test_wrong_use(arguments):
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2


def test_sizes_read_well():
    assert [size(number) for number in (0, 999, 1500, 2_000_000, 3 * 10**9)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "2.0 MB",
        "3.0 GB",
    ]
