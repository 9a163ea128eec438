"""Files that are all header: read by the library that everybody uses, and small on disk."""

from safetensors import safe_open

from utils.sparse_weights import write_sparse_safetensors
from utils.tensor_source import open_safetensors


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
