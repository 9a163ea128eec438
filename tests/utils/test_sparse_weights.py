"""Files that are all header: read by the library that everybody uses, and small on disk."""

import pytest
import torch
from safetensors import safe_open

from utils.sparse_weights import fill, read_plainly, write_sparse_safetensors, write_sparse_shards
from utils.tensor_source import open_safetensors, open_sharded


def test_the_header_is_real_and_the_disk_is_empty(tmp_path):
    path = tmp_path / "large.safetensors"
    shapes = {"a.weight": (4096, 65536), "b": (3,), "alpha": ()}
    promised = write_sparse_safetensors(
        path, shapes, {"a.weight": "BF16", "b": "F32", "alpha": "F32"}, {"x": "y"}
    )
    assert promised == 4096 * 65536 * 2 + 12 + 4
    assert path.stat().st_size > promised > 5e8 and path.stat().st_blocks * 512 < 100_000
    source = open_safetensors([path])
    assert source.shapes == shapes and source.dtypes["a.weight"] == "BF16" and source.metadata() == {"x": "y"}
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(shapes)
        assert file.get_slice("a.weight").get_shape() == [4096, 65536]
        assert file.get_tensor("b").tolist() == [0.0, 0.0, 0.0]


def test_shards_of_which_one_tensor_has_values(tmp_path):
    shapes = {f"block{number}.weight": (100, 50 + number) for number in range(9)}
    spans = write_sparse_shards(tmp_path / "base", "weights", shapes, "F32", 3)
    source = open_sharded(tmp_path / "base")
    assert (
        source.shapes == shapes
        and len(source.files) == 3
        and len({span.path for span in spans.values()}) == 3
    )
    values = torch.arange(100 * 54, dtype=torch.float32).reshape(100, 54)
    fill([spans["block4.weight"]], values.numpy().tobytes())
    assert torch.equal(source.get("block4.weight"), values)
    assert not source.get("block3.weight").any() and not source.get("block5.weight").any()
    with pytest.raises(ValueError, match="bytes for a tensor"):
        fill([spans["block4.weight"]], b"short")
    buffer = memoryview(bytearray(1000))
    assert read_plainly([spans["block4.weight"], spans["block0.weight"]], buffer) == 4 * 100 * (54 + 50)
    path = spans["block8.weight"].path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(EOFError):
        read_plainly([spans["block8.weight"]], buffer)
