"""A file that holds only what training changed, laid over the weights that it started from."""

from typing import TYPE_CHECKING

from utils.errors import UserError
from utils.tensor_source import TensorSource

if TYPE_CHECKING:
    import torch


class OverlaySource(TensorSource):
    """All tensors of `below`, those that `above` has taken from there. `files` are those of `above`, then of `below`."""

    def __init__(self, below: TensorSource, above: TensorSource) -> None:
        """Show both as one.

        Raises:
            UserError: `above` has a tensor that `below` lacks, or one of another shape.
        """
        for name, shape in above.shapes.items():
            if below.shapes.get(name) != shape:
                other = list(below.shapes[name]) if name in below.shapes else "no such tensor"
                raise UserError(
                    f"{above.files[0]}: holds only some tensors, and {name} {list(shape)} does not fit {below.files[0]} "
                    f"({other}); give the weights that its training started from"
                )
        self._below = below
        self._above = above
        self.files = (*above.files, *below.files)
        self.shapes = below.shapes | above.shapes
        self.dtypes = below.dtypes | above.dtypes

    def get(self, name: str) -> "torch.Tensor":
        """Read one tensor from the source that has it last."""
        return self._source(name).get(name)

    def rows(self, name: str, start: int, end: int) -> "torch.Tensor":
        """See `TensorSource`."""
        return self._source(name).rows(name, start, end)

    def metadata(self) -> dict[str, str]:
        """The metadata of what lies above."""
        return self._above.metadata()

    def is_changed(self, name: str) -> bool:
        """Whether the tensor is one that lies above."""
        return name in self._above.shapes

    def release(self) -> None:
        """See `TensorSource`."""
        self._above.release()
        self._below.release()

    def _source(self, name: str) -> TensorSource:
        self._check_name(name)
        return self._above if self.is_changed(name) else self._below
