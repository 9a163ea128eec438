"""Files read from the first byte to the last: what is counted, what is found, and in how small pieces."""

import os

import pytest
import torch
from safetensors.torch import save_file

from utils import read_through
from utils.read_through import find_shards, read_file

TENSORS = {
    "a": torch.arange(1000, dtype=torch.float32).reshape(10, 100),
    "b": torch.ones(7, dtype=torch.bfloat16),
    "c": torch.zeros(0, 3),
    "d": torch.tensor(2.0),
    "ids": torch.arange(5),
}


def write(path, tensors):
    torch.save(tensors, path) if path.suffix == ".pth" else save_file(tensors, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("piece", [64, 1 << 20])
def test_every_byte_of_the_tensors_is_read_in_pieces(tmp_path, monkeypatch, suffix, piece):
    monkeypatch.setattr(read_through, "PIECE_BYTES", piece)
    heard = []
    found = read_file(write(tmp_path / f"w{suffix}", TENSORS), heard.append)
    total = sum(tensor.nbytes for tensor in TENSORS.values())
    assert (found.num_tensors, found.num_bytes, found.problems) == (len(TENSORS), total, ())
    assert sum(heard) == total
    if suffix == ".safetensors":
        assert max(heard) <= piece


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("place", [0, 500, 999])
def test_numbers_that_are_none_are_found_in_any_piece(tmp_path, monkeypatch, suffix, place):
    monkeypatch.setattr(read_through, "PIECE_BYTES", 256)
    bad = {name: tensor.clone() for name, tensor in TENSORS.items()}
    bad["a"].view(-1)[place] = torch.nan
    bad["b"][3] = torch.inf
    path = write(tmp_path / f"w{suffix}", bad)
    (problem,) = read_file(path, lambda count: None).problems
    assert problem.startswith(f"{path}: a holds NaN or infinite values (and 1 more)")


def test_a_file_that_cannot_be_read_is_a_problem_and_no_trace(tmp_path):
    path = write(tmp_path / "w.safetensors", TENSORS)
    os.truncate(path, path.stat().st_size - 3)
    (problem,) = read_file(path, lambda count: None).problems
    assert "truncated" in problem
    (problem,) = read_file(tmp_path / "none.pth", lambda count: None).problems
    assert "no such file" in problem


def test_directories_without_an_index(tmp_path):
    write(tmp_path / "one.safetensors", TENSORS)
    assert find_shards(tmp_path) == ([tmp_path / "one.safetensors"], [])
    write(tmp_path / "two.safetensors", TENSORS)
    files, problems = find_shards(tmp_path)
    assert len(files) == 2 and problems == [f"{tmp_path}: holds 2 .safetensors files and no index"]
    (tmp_path / "m.safetensors.index.json").write_text("{}")
    assert "has no weight_map" in find_shards(tmp_path)[1][0]
