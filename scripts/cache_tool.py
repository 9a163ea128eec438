"""Look after the cache of a dataset: what is in it, what is damaged, what nobody needs.

    python scripts/cache_tool.py stats DIR                              # items, bytes, age, what made them
    python scripts/cache_tool.py verify DIR [--remove]                  # compare every checksum; status 1 if any is wrong
    python scripts/cache_tool.py prune DIR --config TOML [--config ...] # what no config needs; --yes deletes it

DIR is the dataset's cache_dir, by default .wan_cache in its first directory. Exit status: 0; 1 damaged items were found;
2 wrong use.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from utils.cli import run_command
from utils.errors import EXIT_FAILED, EXIT_OK, UserError

_MAX_VALUES_SHOWN = 5
_SKIPPED_SHOWN = 10


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="cache_tool.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    shared = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    shared.add_argument("dir", type=Path, metavar="DIR", help="the cache")
    shared.add_argument("--debug", action="store_true", help="show stack traces")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("stats", parents=[shared], help="count what is there", allow_abbrev=False)
    verify_parser = commands.add_parser(
        "verify", parents=[shared], help="compare every item with its checksum", allow_abbrev=False
    )
    verify_parser.add_argument("--remove", action="store_true", help="delete damaged items")
    prune_parser = commands.add_parser(
        "prune", parents=[shared], help="show, or delete, what no config needs", allow_abbrev=False
    )
    prune_parser.add_argument(
        "--config",
        action="append",
        required=True,
        metavar="TOML",
        help="a training config whose items stay (repeatable)",
    )
    prune_parser.add_argument("--yes", action="store_true", help="really delete; without it nothing is")
    return parser.parse_args(argv)


def stats(root: Path) -> int:
    """Print what is in the cache."""
    from utils.data.cache_upkeep import find_leftovers, measure, open_existing

    kinds = measure(open_existing(root))
    if not kinds:
        print(f"{root}: no items")
    for kind in kinds:
        print(
            f"{kind.kind}: {kind.num_items} items, {size(kind.num_bytes)}, written {day(kind.oldest)} to "
            f"{day(kind.newest)}"
        )
        for name, values in sorted(kind.made_by.items()):
            print(f"  {name}: {counts(values)}")
        if kind.num_unreadable:
            print(f"  {kind.num_unreadable} with a header that cannot be read: run verify")
    left = find_leftovers(root)
    if left.paths:
        print(f"{len(left.paths)} leftover files, {size(left.num_bytes)}: prune deletes them")
    return EXIT_OK


def verify(root: Path, remove: bool) -> int:
    """Compare every checksum; name what is damaged."""
    from utils.data.cache_upkeep import all_keys, find_damaged, open_existing
    from utils.progress import Progress

    store = open_existing(root)
    keys = all_keys(store)
    bar = Progress("checking items", len(keys))
    try:
        damaged = find_damaged(store, keys, lambda: bar.advance(1))
    finally:
        bar.close()
    for key, reason in damaged.items():
        print(f"{'removed' if remove else 'damaged'}: {key} in {store.place(key)}: {reason}")
        if remove:
            store.remove(key)
    store.flush()
    print(f"{len(keys)} items checked, {len(damaged)} damaged")
    if damaged and not remove:
        print("--remove deletes them; training makes removed items anew")
    return EXIT_FAILED if damaged else EXIT_OK


def prune(root: Path, configs: Sequence[str], yes: bool) -> int:
    """Show, or delete, items that none of the configs needs, and what killed processes left."""
    from utils.data.cache_upkeep import all_keys, delete, find_leftovers, find_unneeded, open_existing
    from utils.data.compaction import remove_items

    store = open_existing(root)
    # Listed before the configs are worked out, so that what is filled in meanwhile is not judged.
    keys = all_keys(store)
    needed: set[str] = set()
    for path in configs:
        needed |= needed_by(path, root)
    unneeded = find_unneeded(store, keys, needed)
    leftovers = find_leftovers(root)
    kept = len(keys) - len(unneeded.keys)
    print(f"{len(keys)} items: {kept} needed, {len(unneeded.keys)} not ({size(unneeded.num_bytes)})")
    print(f"{len(leftovers.paths)} leftover files ({size(leftovers.num_bytes)})")
    if not yes:
        print("nothing was deleted; --yes deletes what is not needed and the leftovers")
        return EXIT_OK
    freed = remove_items(store, unneeded.keys)
    delete(leftovers)
    print(f"removed: {size(freed.freed_bytes + leftovers.num_bytes)} are free again")
    if freed.left_bytes:
        print(
            f"{size(freed.left_bytes)} of removed items stay in shards that hold little else to free, or that another "
            "process is writing; a later prune gives them back"
        )
    return EXIT_OK


def needed_by(path: str, root: Path) -> set[str]:
    """Keys that training by one config reads.

    Raises:
        UserError: the config is not right, or its dataset has another cache, so that it could only be a mistake.
    """
    from models.wan.setup import needed_items
    from utils.config.load import load_config
    from utils.data.inspect import printable
    from utils.data.manifest import BAD_FILE_CODES, default_cache_dir

    config = load_config(path, check_files=True)
    assert config.dataset is not None, "load_config with check_files has read it"
    found = needed_items(config, root)
    if found is None:
        own = default_cache_dir(config.dataset)
        raise UserError(
            f"{path}: its dataset keeps its cache in {own}, not in {root}; give the configs that use {root}"
        )
    needed, left_out = found
    print(f"{path}: needs {len(needed)} items")
    # By accident, or for want of a caption; what is left out by rule was never in the cache.
    lost = [skipped for skipped in left_out if skipped.code in {*BAD_FILE_CODES, "no_caption"}]
    for skipped in lost[:_SKIPPED_SHOWN]:
        print(printable(f"  skipped {skipped.path}: {skipped.reason}; its items count as not needed"))
    if len(lost) > _SKIPPED_SHOWN:
        print(f"  ... and {len(lost) - _SKIPPED_SHOWN} more; dataset_inspect.py names all")
    return needed


def counts(values: Counter[str]) -> str:
    """The commonest values with how often each stands there."""
    shown = [f"{value} ({count})" for value, count in values.most_common(_MAX_VALUES_SHOWN)]
    more = len(values) - len(shown)
    return ", ".join(shown) + (f" and {more} other values" if more else "")


def size(num_bytes: int) -> str:
    """Bytes in a unit that reads well."""
    value, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{num_bytes} B" if unit == "B" else f"{value:.1f} {unit}"


def day(seconds: float) -> str:
    """A time in UTC, to the minute."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def run(arguments: argparse.Namespace) -> int:
    """The chosen command."""
    if arguments.command == "stats":
        return stats(arguments.dir)
    if arguments.command == "verify":
        return verify(arguments.dir, arguments.remove)
    return prune(arguments.dir, arguments.config, arguments.yes)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    arguments = parse_arguments(argv)
    return run_command(lambda: run(arguments), debug=arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
