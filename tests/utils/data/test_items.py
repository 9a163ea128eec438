"""Items as bytes: whole safetensors files, read back as views."""

import mmap

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from utils.data.items import decode_metadata, decode_tensors, encode_item


def view_of(data: bytes) -> memoryview:
    return memoryview(bytearray(data))


@given(
    shape=st.lists(st.integers(0, 4), max_size=4),
    dtype=st.sampled_from(
        [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
    ),
)
def test_there_and_back_for_all_shapes(shape, dtype):
    tensor = (torch.rand(shape) * 100).to(dtype)
    data = encode_item({"x": tensor, "y": tensor.clone()}, {"made": "by"})
    found = decode_tensors(view_of(data))
    assert found.keys() == {"x", "y"}
    for back in found.values():
        assert back.dtype == dtype and back.shape == tensor.shape and torch.equal(back, tensor)
    assert decode_metadata(view_of(data)) == {"made": "by"}
    (theirs,) = {name: t for name, t in safetensors.torch.load(data).items() if name == "x"}.values()
    assert torch.equal(theirs, tensor)


def test_strided_tensors_and_gradients_are_stored_plain():
    strided = torch.randn(4, 6, requires_grad=True).T[::2]
    found = decode_tensors(view_of(encode_item({"x": strided}, {})))
    assert torch.equal(found["x"], strided.detach()) and not found["x"].requires_grad


def test_nothing_is_copied(tmp_path):
    path = tmp_path / "item"
    path.write_bytes(encode_item({"x": torch.arange(8.0)}, {}))
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    payload = memoryview(mapped)
    tensor = decode_tensors(payload)["x"]
    payload[-4:] = torch.tensor([99.0]).numpy().tobytes()
    assert tensor[-1] == 99.0


@pytest.mark.parametrize("data", [b"", b"\x01", b"\xff" * 64, (2).to_bytes(8, "little") + b"[]"])
def test_other_bytes_are_refused(data):
    with pytest.raises(ValueError):
        decode_tensors(view_of(data))


def test_a_header_that_does_not_fit_its_data_is_refused():
    data = encode_item({"x": torch.zeros(4)}, {})
    for broken in (data[:-4], data.replace(b"[4]", b"[5]"), data.replace(b"F32", b"F31")):
        with pytest.raises(ValueError, match="not described rightly"):
            decode_tensors(view_of(broken))
