"""Randomness as a function of what it is for, never of who asks or when.

A draw is named by (seed, purpose, identities...): the same name gives the same numbers on every rank, in every
pipeline layout and after every resume.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import xxhash

_SEED_BITS = 63


def derive_seed(seed: int, purpose: str, *identity: int | str) -> int:
    """A 63-bit seed that depends on every argument."""
    text = "|".join([str(seed), purpose, *map(str, identity)])
    return xxhash.xxh3_64_intdigest(text.encode()) >> (64 - _SEED_BITS)


def generator(seed: int, purpose: str, *identity: int | str) -> torch.Generator:
    """A CPU generator for one named draw. CPU, so that a seed means the same numbers on every machine."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, *identity))


@contextmanager
def seeded_globally(seed: int, device: torch.device) -> Iterator[None]:
    """Run the body with torch's global generators set to `seed`, then put them back.

    For code that draws from the global generator (dropout inside library modules). `device` is the device that the
    body draws on.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
