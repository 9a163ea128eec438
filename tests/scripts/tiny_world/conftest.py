from collections.abc import Callable

import pytest
from torch import Tensor


@pytest.fixture(scope="session")
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """L2 norm of the difference over that of the reference."""

    def error(value: Tensor, reference: Tensor) -> float:
        return ((value - reference).norm() / reference.norm()).item()

    return error
