"""The list of LoRA targets that exist in a checkpoint, in the form that `[adapter] include_file` reads."""

from collections.abc import Mapping, Sequence

from utils.config.target_rules import FREE_TARGETS
from utils.config.targets import select
from utils.errors import UserError
from utils.lora_targets import describe_targets, linear_modules, split_block_path
from utils.tensor_source import Shape


def choose_targets(
    shapes: Mapping[str, Shape], patterns: Sequence[str], blocks: Sequence[int] | None
) -> list[str]:
    """Linear layers inside the blocks that the patterns match, in model order.

    Args:
        shapes: official names and shapes of a DiT.
        patterns: globs on the path within a block, such as `cross_attn.{k,v}`.
        blocks: block numbers; None for all.

    Raises:
        UserError: a pattern matches nothing, or the DiT has no such block; the message says what there is.
    """
    linears = linear_modules(shapes)
    if not linears:
        raise UserError("--targets: there is no linear layer inside a block; give a Wan 2.2 DiT")
    paths = list(dict.fromkeys(split_block_path(name)[1] for name in linears))
    try:
        chosen = set(select(paths, patterns))
    except UserError as error:
        raise UserError(f"--targets: {str(error).removeprefix('adapter.include: ')}") from None
    there = {split_block_path(name)[0] for name in linears}
    absent = [block for block in blocks or () if block not in there]
    if absent:
        raise UserError(
            f"--blocks: there is no block {absent[0]}; the blocks of this DiT are {min(there)}-{max(there)}"
        )
    wanted = there if blocks is None else set(blocks)
    return [
        name
        for name in linears
        if split_block_path(name)[1] in chosen and split_block_path(name)[0] in wanted
    ]


def parse_blocks(text: str) -> list[int]:
    """Block numbers of `20-29`, `3`, or `0-3,20-29`, ascending.

    Raises:
        UserError: the text is something else.
    """
    numbers: set[int] = set()
    for piece in text.split(","):
        first, dash, last = (word.strip() for word in piece.partition("-"))
        ends = [first, last] if dash else [first]
        if not all(end.isascii() and end.isdecimal() and len(end) < 5 for end in ends) or int(ends[-1]) < int(
            ends[0]
        ):
            raise UserError(f"--blocks: {text!r} is no range of blocks; write 20-29, 3, or 0-3,20-29")
        numbers |= set(range(int(ends[0]), int(ends[-1]) + 1))
    return sorted(numbers)


def target_file_text(targets: Sequence[str], origin: str) -> str:
    """The content of an include file: a module path per line, under a head of comments that its reader skips."""
    head = [
        f"{len(targets)} LoRA targets that exist in {origin}",
        *describe_targets(targets),
        *target_remarks(targets),
    ]
    return "".join(f"# {line}\n" for line in head) + "".join(f"{target}\n" for target in targets)


def target_remarks(targets: Sequence[str]) -> list[str]:
    """What training will ask for where targets go beyond `cross_attn.{k,v}`."""
    inner = {split_block_path(target)[1] for target in targets}
    remarks = []
    if any(path.startswith("self_attn.") for path in inner):
        remarks.append(
            "self_attn targets need [adapter.self_attn_approval] with a written reason, in at most 4 blocks"
        )
    if inner - set(FREE_TARGETS):
        remarks.append("targets beyond cross_attn.{k,v} need a [budget]")
    return remarks
