import json
import os
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from utils.errors import UserError
from utils.tensor_source import (
    RenamedSource,
    open_pth,
    open_safetensors,
    open_sharded,
    open_weights,
    read_safetensors_header,
)

TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.tensor(2.5, dtype=torch.bfloat16),
    "c": torch.zeros(0, 4, dtype=torch.int64),
}


@pytest.fixture
def safetensors_file(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(TENSORS, path, metadata={"made": "here"})
    return path


@pytest.fixture
def sharded(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    names = {"a": "m-00001-of-00002.safetensors", "b": "m-00002-of-00002.safetensors"}
    for name, shard in names.items():
        save_file({name: torch.full((2,), float(ord(name)))}, directory / shard)
    (directory / "m.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return directory


def write_header(path, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def test_header_and_values_of_a_safetensors_file(safetensors_file):
    source = open_safetensors([safetensors_file])
    assert source.files == (safetensors_file,)
    assert source.shapes == {"a.weight": (2, 3), "b": (), "c": (0, 4)}
    assert source.dtypes == {"a.weight": "F32", "b": "BF16", "c": "I64"}
    assert source.metadata() == {"made": "here"}
    for name, tensor in TENSORS.items():
        assert source.get(name).dtype == tensor.dtype
        assert torch.equal(source.get(name), tensor)


def test_reading_headers_imports_no_torch(safetensors_file):
    code = (
        "import sys; from pathlib import Path; from utils.tensor_source import open_safetensors;"
        f"print(sorted(open_safetensors([Path({str(safetensors_file)!r})]).shapes), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['a.weight', 'b', 'c'] False"


def test_pth_file(tmp_path):
    path = tmp_path / "w.pth"
    torch.save(TENSORS, path)
    source = open_weights(path)
    assert source.shapes == {"a.weight": (2, 3), "b": (), "c": (0, 4)}
    assert source.dtypes == {"a.weight": "F32", "b": "BF16", "c": "I64"}
    assert source.metadata() == {}
    assert torch.equal(source.get("a.weight"), TENSORS["a.weight"])


def test_shards_are_one_source(sharded):
    source = open_sharded(sharded)
    assert len(source.files) == 2
    assert source.get("b").tolist() == [98.0, 98.0]


def test_a_directory_with_a_single_file_and_the_file_itself_open(tmp_path, safetensors_file):
    assert (
        open_sharded(tmp_path).shapes
        == open_sharded(safetensors_file).shapes
        == open_safetensors([safetensors_file]).shapes
    )


def test_renamed_source_hides_and_renames(safetensors_file):
    source = RenamedSource(open_safetensors([safetensors_file]), {"x": "b"})
    assert source.shapes == {"x": ()}
    assert source.get("x").item() == 2.5
    with pytest.raises(UserError, match="has no tensor 'b'"):
        source.get("b")


@pytest.mark.parametrize("opener", [open_safetensors, open_pth])
def test_a_missing_file_is_named(tmp_path, opener):
    path = tmp_path / "nowhere.pth"
    with pytest.raises(UserError, match=r"nowhere\.pth: no such file"):
        opener(path if opener is open_pth else [path])


def test_every_truncation_of_a_safetensors_file_is_noticed(safetensors_file):
    whole = safetensors_file.read_bytes()
    for length in (0, 5, 8, 40, len(whole) - 1):
        safetensors_file.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"w\.safetensors: truncated.*again"):
            read_safetensors_header(safetensors_file)


def test_a_longer_file_than_its_header_says_is_noticed(safetensors_file):
    with safetensors_file.open("ab") as file:
        file.write(b"123")
    with pytest.raises(UserError, match="3 bytes longer"):
        read_safetensors_header(safetensors_file)


@pytest.mark.parametrize(
    "header",
    [
        b"{not json",
        b"\xff\xfe\x00garbage",
        b"[" * 100_000,
        [1, 2],
        {"t": 3},
        {"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"t": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        {"t": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}},
        {"t": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}},
        {"t": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}},
        {"t": {"dtype": "Q7", "shape": [1], "data_offsets": [0, 4]}},
        {"t": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}},
        {"__metadata__": 3},
    ],
)
def test_a_garbage_header_is_refused_with_the_file_and_the_way_out(tmp_path, header):
    path = write_header(tmp_path / "bad.safetensors", header, b"\0" * 4)
    with pytest.raises(UserError, match=r"bad\.safetensors: .*(again|convert|not a)"):
        read_safetensors_header(path)


def test_a_header_of_absurd_length_is_not_read(tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(UserError, match=r"not a \.safetensors file"):
        read_safetensors_header(path)


def test_a_missing_shard_is_named(sharded):
    (sharded / "m-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"m-00002-of-00002\.safetensors: missing, but m\.safetensors\.index\.json names it"
    ):
        open_sharded(sharded)


def test_a_tensor_that_only_the_index_knows_is_named(sharded):
    save_file({"z": torch.zeros(1)}, sharded / "m-00002-of-00002.safetensors")
    with pytest.raises(UserError, match=r"m-00002-of-00002\.safetensors: .*promises b in it"):
        open_sharded(sharded)


def test_a_tensor_that_the_index_does_not_know_is_named(sharded):
    save_file({"b": torch.zeros(1), "z": torch.zeros(1)}, sharded / "m-00002-of-00002.safetensors")
    with pytest.raises(UserError, match="does not list z"):
        open_sharded(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded):
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, sharded / "m-00002-of-00002.safetensors")
    with pytest.raises(UserError, match="holds a, and so does"):
        open_sharded(sharded)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not readable as JSON"),
        ("[]", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"a": "../../secret.safetensors"}}', "not a plain file name"),
        ('{"weight_map": {"a": 3}}', "not a plain file name"),
    ],
)
def test_a_bad_index_is_refused(sharded, index, message):
    (sharded / "m.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=message):
        open_sharded(sharded)


def test_directories_without_one_clear_set_of_weights_are_refused(sharded, tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        open_sharded(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"no \.safetensors files"):
        open_sharded(empty)
    (sharded / "n.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="several indices"):
        open_sharded(sharded)
    for index in sharded.glob("*.index.json"):
        index.unlink()
    with pytest.raises(UserError, match="2 .safetensors files and no index"):
        open_sharded(sharded)


def test_truncated_and_damaged_pth_files_are_refused(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"a": torch.randn(1000)}, path)
    whole = path.read_bytes()
    for length in (0, 100, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"w\.pth: (truncated|damaged)"):
            open_pth(path)
    path.write_bytes(whole.replace(b"torch", b"porch"))
    with pytest.raises(UserError, match=r"w\.pth: (damaged|refused)"):
        open_pth(path)


class Code:
    """Runs a command when it is unpickled."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return (os.mkdir, (str(self.witness),))


def test_code_in_a_pth_file_is_refused_and_not_run(tmp_path):
    witness, path = tmp_path / "witness", tmp_path / "w.pth"
    torch.save({"a": torch.zeros(2), "b": Code(witness)}, path)
    with pytest.raises(UserError, match=r"w\.pth: refused.*code in a weight file is never run"):
        open_pth(path)
    assert not witness.exists()


@pytest.mark.parametrize(
    "content", [torch.zeros(2), {}, {"state_dict": {"a": torch.zeros(1)}}, {1: torch.zeros(1)}]
)
def test_a_pth_file_of_something_else_is_refused(tmp_path, content):
    path = tmp_path / "w.pth"
    torch.save(content, path)
    with pytest.raises(UserError, match=r"w\.pth: (holds a|its entry)"):
        open_pth(path)


def test_other_suffixes_and_directories_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"w\.gguf: not a weight file"):
        open_weights(tmp_path / "w.gguf")
    with pytest.raises(UserError, match="is a directory"):
        open_safetensors([tmp_path])
