"""What the path of a module of a transformer says about it. No torch."""


def block_of(module: str) -> int | None:
    """3 for `blocks.3.cross_attn.k`, None for a module outside the blocks."""
    parts = module.split(".")
    return int(parts[1]) if len(parts) > 2 and parts[0] == "blocks" and parts[1].isdecimal() else None


def type_of(module: str) -> str:
    """`cross_attn` for `blocks.3.cross_attn.k`, `head` for `head.head`."""
    return module.split(".")[0 if block_of(module) is None else 2]
