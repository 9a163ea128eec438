"""Which modules get an adapter: from globs, block range or explicit lists to names that exist in the checkpoint.

Works on names alone and needs no torch, so that a configuration can be checked before anything is loaded.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from utils.config.guardrails import check_targets
from utils.config.schema import AdapterConfig, BudgetConfig
from utils.config.targets import select
from utils.errors import UserError

_BLOCK_PATH = re.compile(r"^blocks\.(\d+)\.(.+)$")


def linear_modules(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Every linear layer inside the blocks, from a header: names whose weight has two dimensions."""
    return [
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if name.startswith("blocks.") and name.endswith(".weight") and len(shape) == 2
    ]


def split_block_path(module: str) -> tuple[int, str]:
    """`blocks.3.cross_attn.k` -> (3, "cross_attn.k").

    Raises:
        UserError: the module is not inside a block.
    """
    match = _BLOCK_PATH.match(module)
    if match is None:
        raise UserError(f"{module}: adapters go on linear layers inside blocks (blocks.N.path) only")
    return int(match[1]), match[2]


def resolve_targets(linears: Sequence[str], adapter: AdapterConfig, budget: BudgetConfig | None) -> list[str]:
    """The modules that get an adapter, in model order.

    Args:
        linears: every linear layer inside the blocks of the base checkpoint, e.g. `blocks.3.cross_attn.k`.
        adapter: include/exclude globs or `include_file`, block range, and the self-attention approval.
        budget: guardrails ask whether there is one.

    Raises:
        UserError: a pattern or line matches nothing, a block is out of range, or a guardrail forbids a target.
    """
    num_blocks = 1 + max(split_block_path(name)[0] for name in linears)
    if adapter.include_file is not None:
        chosen = _read_include_file(Path(adapter.include_file), set(linears))
    else:
        paths = sorted({split_block_path(name)[1] for name in linears})
        selected = set(select(paths, adapter.include, adapter.exclude))
        chosen = {name for name in linears if split_block_path(name)[1] in selected}
    if adapter.train_blocks_range is not None:
        first, last = adapter.train_blocks_range
        if last >= num_blocks:
            raise UserError(
                f"adapter.train_blocks_range = [{first}, {last}]: the checkpoint's blocks are 0 .. {num_blocks - 1}"
            )
        chosen = {name for name in chosen if first <= split_block_path(name)[0] <= last}
    # A glob is narrowed to the approved blocks; an explicit line outside them is refused below.
    if adapter.self_attn_approval is not None and adapter.include_file is None:
        approved = set(adapter.self_attn_approval.blocks)
        chosen = {
            name
            for name in chosen
            if not split_block_path(name)[1].startswith("self_attn.") or split_block_path(name)[0] in approved
        }
    if not chosen:
        raise UserError("[adapter]: no module is left to adapt after include, exclude and train_blocks_range")
    targets = [name for name in linears if name in chosen]
    problems = check_targets(targets, adapter, budget)
    if problems:
        raise UserError("; ".join(map(str, problems)))
    return targets


def describe_targets(targets: Sequence[str]) -> list[str]:
    """The target list for people, a line per path: `cross_attn.k in blocks 20-29`."""
    blocks: dict[str, list[int]] = {}
    for target in targets:
        block, path = split_block_path(target)
        blocks.setdefault(path, []).append(block)
    return [f"{path} in blocks {number_ranges(numbers)}" for path, numbers in blocks.items()]


def number_ranges(numbers: Sequence[int]) -> str:
    """`0-3, 7` for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _read_include_file(path: Path, known: set[str]) -> set[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"adapter.include_file = {str(path)!r}: cannot be read ({error})") from None
    wanted = [line.removesuffix(".weight") for line in lines if line and not line.startswith("#")]
    absent = [line for line in wanted if line not in known]
    if absent:
        raise UserError(
            f"{path}: {len(absent)} of {len(wanted)} lines name no linear layer of this checkpoint, e.g. {absent[0]!r}; "
            "make the list anew from this checkpoint's keys"
        )
    return set(wanted)
