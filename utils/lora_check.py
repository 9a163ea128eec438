"""A saved LoRA, read again before it counts: its modules and shapes against the base, its numbers, its metadata."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from utils.errors import UserError
from utils.lora_names import AdapterPair, read_adapter
from utils.tensor_source import Shape


def check_saved_adapter(
    path: Path,
    targets: Sequence[str],
    base_shapes: Mapping[str, Shape],
    rank: int,
    metadata: Mapping[str, str],
    *,
    is_untrained: bool,
) -> None:
    """Read an adapter as any program would.

    Args:
        path: of the file.
        targets: the modules that it should adapt.
        base_shapes: of the base's tensors, by official name.
        rank: of every module.
        metadata: that it should carry.
        is_untrained: every B was zero when it was written, so the file must change nothing at all.

    Raises:
        UserError: it is not what it should be.
    """
    try:
        adapter = read_adapter(path)  # refuses what is not finite
    except UserError as error:
        raise _unsound(path, str(error).removeprefix(f"{path}: ")) from None
    if set(adapter.modules) != set(targets):
        odd = sorted(set(adapter.modules) ^ set(targets))
        raise _unsound(path, f"{odd[0]} is missing or is no target of this run")
    if any(adapter.metadata.get(key) != value for key, value in metadata.items()):
        raise _unsound(path, "its metadata are not those that were written")
    for module, pair in adapter.modules.items():
        expected = base_shapes.get(f"{module}.weight")
        if expected is None:
            raise _unsound(path, f"the base has no {module}")
        problem = _wrong_shape(pair, expected, rank)
        if problem:
            raise _unsound(path, f"{module} {problem}")
        if pair.scale != 1.0:
            raise _unsound(path, f"{module} has the scale {pair.scale:g}, which should be in B")
        if is_untrained and bool(pair.up.any()):
            raise _unsound(path, f"{module} is untrained and would change the model all the same")


def _wrong_shape(pair: AdapterPair, base: Shape, rank: int) -> str:
    found = (tuple(pair.down.shape), tuple(pair.up.shape))
    expected = ((rank, base[1]), (base[0], rank))
    if found == expected:
        return ""
    return f"has A {list(found[0])} and B {list(found[1])}, the base needs {list(expected[0])} and {list(expected[1])}"


def _unsound(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path.name}: the adapter was read again after it was written, and {reason}; it is not kept. Go on from an earlier "
        "checkpoint, with a lower optimizer.lr if it has diverged, or look at the disk"
    )
