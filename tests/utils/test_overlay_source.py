import pytest
import torch
from safetensors.torch import save_file

from utils.errors import UserError
from utils.overlay_source import OverlaySource
from utils.tensor_source import RenamedSource, open_pth, open_safetensors


def write(path, **tensors):
    save_file(tensors, path, {"name": path.stem})
    return open_safetensors([path])


def test_what_lies_above_hides_what_lies_below(tmp_path) -> None:
    below = write(tmp_path / "below.safetensors", a=torch.zeros(2, 3), b=torch.ones(4))
    above = write(tmp_path / "above.safetensors", b=torch.full((4,), 2.0, dtype=torch.bfloat16))
    both = OverlaySource(below, above)
    assert both.shapes == {"a": (2, 3), "b": (4,)} and both.dtypes == {"a": "F32", "b": "BF16"}
    assert torch.equal(both.get("a"), torch.zeros(2, 3)) and both.get("b").tolist() == [2.0] * 4
    assert both.rows("b", 1, 3).tolist() == [2.0, 2.0]
    both.release()
    assert both.get("b").tolist() == [2.0] * 4
    assert both.is_changed("b") and not both.is_changed("a")
    assert both.metadata() == {"name": "above"}
    assert [path.stem for path in both.files] == ["above", "below"]


def test_what_does_not_fit_is_refused(tmp_path) -> None:
    below = write(tmp_path / "below.safetensors", a=torch.zeros(2, 3))
    for name, tensor in {"other": torch.ones(1), "a": torch.ones(3, 2)}.items():
        above = write(tmp_path / f"{name}.safetensors", **{name: tensor})
        with pytest.raises(UserError, match="does not fit"):
            OverlaySource(below, above)


def test_rows_of_every_kind_of_source(tmp_path) -> None:
    table = torch.arange(24.0).reshape(8, 3)
    torch.save({"t": table}, tmp_path / "t.pth")
    plain = write(tmp_path / "t.safetensors", t=table)
    for source in (plain, open_pth(tmp_path / "t.pth")):
        for start, end in ((0, 8), (3, 4), (5, 8), (2, 2)):
            assert torch.equal(source.rows("t", start, end), table[start:end])
        assert torch.equal(RenamedSource(source, {"new": "t"}).rows("new", 1, 3), table[1:3])
        with pytest.raises(UserError, match="no tensor"):
            source.rows("other", 0, 1)
