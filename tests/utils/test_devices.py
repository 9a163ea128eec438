import pytest
import torch

from utils.devices import choose_device
from utils.errors import UserError


def test_the_cpu() -> None:
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu7", "cuda:99", "meta"])
def test_what_is_no_device_is_refused(name) -> None:
    with pytest.raises(UserError, match="--device"):
        choose_device(name)
