"""Rules about what an adapter may touch. They are applied twice: to the patterns of the config, before any weight is
opened, and to the resolved module names of the model.

`cross_attn.{k,v}` is free, because it changes what the model listens to and not how it draws. Everything else needs a
`[budget]`, and `self_attn.*`, where adapters have repeatedly caused artifacts and collapse, a written approval too.
"""

from collections.abc import Iterable, Sequence

from utils.config.experts import on_each_side
from utils.config.introspect import keys_of
from utils.config.rules import Rule
from utils.config.schema import AdapterConfig, BudgetConfig, Problem, TrainConfig
from utils.config.targets import expand_braces, matches, split_block
from utils.errors import UserError

FREE_TARGETS = expand_braces("cross_attn.{k,v}")
MAX_APPROVED_BLOCKS = 4
MAX_APPROVED_RANK = 8

_SELF_ATTN = "self_attn."
_KNOWN_PATHS = expand_braces("{{self_attn,cross_attn}.{q,k,v,o},ffn.{0,2}}")
_NUM_SHOWN = 4
_BUDGET_FIX = (
    'add a [budget] section, e.g. max_delta_ratio = 0.05 and action = "stop", or keep to cross_attn.{k,v}'
)
_APPROVAL_FIX = (
    'take it out, add exclude = ["self_attn.*"], or add an [adapter.self_attn_approval] section with a written '
    f"reason and at most {MAX_APPROVED_BLOCKS} blocks"
)


@on_each_side
def check_patterns(config: TrainConfig) -> list[Problem]:
    """Every pattern of include and exclude has well-formed braces, and include is not empty."""
    problems = []
    if config.adapter is not None:
        if not config.adapter.include:
            problems.append(
                Problem("adapter.include", "is empty", 'name the targets, e.g. ["cross_attn.{k,v}"]')
            )
        for key, patterns in (
            ("adapter.include", config.adapter.include),
            ("adapter.exclude", config.adapter.exclude),
        ):
            problems += [Problem(key, message, "mend the pattern") for message in _brace_errors(patterns)]
    return problems


@on_each_side
def check_self_attn(config: TrainConfig) -> list[Problem]:
    """Targets in self_attn.* are refused without [adapter.self_attn_approval]."""
    adapter = config.adapter
    if adapter is None or not _patterns_are_sound(adapter):
        return []
    found = [pattern for pattern in adapter.include if _may_reach_self_attn(pattern, adapter.exclude)]
    if adapter.self_attn_approval is None:
        reason = "reaches self_attn.*, where adapters have repeatedly caused artifacts and collapse"
        return [Problem("adapter.include", f'"{pattern}" {reason}', _APPROVAL_FIX) for pattern in found]
    if not found and adapter.include_file is None:
        reason = "approves self_attn targets, but no include pattern reaches any"
        return [
            Problem(
                "adapter.self_attn_approval", reason, "take the section out, or add the targets to include"
            )
        ]
    return []


@on_each_side
def check_self_attn_approval(config: TrainConfig) -> list[Problem]:
    """An approval for self_attn.* has a written reason, 1 to 4 different blocks, and a rank of at most 8."""
    if config.adapter is None or config.adapter.self_attn_approval is None:
        return []
    approval, where = config.adapter.self_attn_approval, "adapter.self_attn_approval"
    problems = []
    if not approval.reason.strip():
        problems.append(
            Problem(f"{where}.reason", "is blank", "say in a sentence why self-attention has to be adapted")
        )
    if not 1 <= len(approval.blocks) <= MAX_APPROVED_BLOCKS:
        reason = f"names {len(approval.blocks)} blocks; an approval is for 1 to {MAX_APPROVED_BLOCKS}"
        problems.append(Problem(f"{where}.blocks", reason, "choose the few blocks that need it"))
    if len(set(approval.blocks)) != len(approval.blocks):
        problems.append(Problem(f"{where}.blocks", "names a block twice", "name each block once"))
    if config.adapter.rank > MAX_APPROVED_RANK:
        reason = f"is {config.adapter.rank}; with self_attn targets it may be at most {MAX_APPROVED_RANK}"
        problems.append(
            Problem(
                "adapter.rank", reason, f"set rank = {MAX_APPROVED_RANK} or lower, or leave self_attn out"
            )
        )
    return problems


@on_each_side
def check_approved_blocks(config: TrainConfig) -> list[Problem]:
    """The blocks of a self_attn approval lie within train_blocks_range."""
    adapter = config.adapter
    if adapter is None or adapter.self_attn_approval is None or adapter.train_blocks_range is None:
        return []
    if len(adapter.train_blocks_range) != 2:
        return []
    first, last = adapter.train_blocks_range
    outside = [block for block in adapter.self_attn_approval.blocks if not first <= block <= last]
    if not outside:
        return []
    reason = (
        f"names block {', '.join(map(str, outside))}, which train_blocks_range = [{first}, {last}] leaves out"
    )
    return [
        Problem(
            "adapter.self_attn_approval.blocks", reason, "approve blocks of the range, or widen the range"
        )
    ]


@on_each_side
def check_budget_for_targets(config: TrainConfig) -> list[Problem]:
    """Every target other than cross_attn.{k,v} needs a [budget]."""
    adapter = config.adapter
    if adapter is None or config.budget is not None or not _patterns_are_sound(adapter):
        return []
    found = [pattern for pattern in adapter.include if _may_reach_beyond_free(pattern, adapter.exclude)]
    reason = "reaches more than cross_attn.{k,v}, which is only done under a delta budget"
    return [Problem("adapter.include", f'"{pattern}" {reason}', _BUDGET_FIX) for pattern in found]


@on_each_side
def check_include_file(config: TrainConfig) -> list[Problem]:
    """include_file stands alone: it lists exact module paths, so no include, exclude or train_blocks_range beside it."""
    adapter = config.adapter
    if adapter is None or adapter.include_file is None:
        return []
    filters = [
        name
        for name in ("include", "exclude", "train_blocks_range")
        if getattr(adapter, name) != keys_of(AdapterConfig)[name].default
    ]
    reason = "would be ignored: include_file lists the exact modules"
    return [Problem(f"adapter.{name}", reason, f"take out {name} or include_file") for name in filters]


def check_targets(
    module_paths: Sequence[str], adapter: AdapterConfig, budget: BudgetConfig | None
) -> list[Problem]:
    """The same guardrails on the resolved targets.

    Adapters on `self_attn.*` are placed only in the blocks of `adapter.self_attn_approval.blocks`, whatever
    `train_blocks_range` says; the caller resolves accordingly and this checks that it did.

    Args:
        module_paths: every target of the whole model by its full name, such as `blocks.3.self_attn.q`.
        adapter: the run's `[adapter]`.
        budget: the run's `[budget]`, if it has one.
    """
    key = "adapter.include" if adapter.include_file is None else "adapter.include_file"
    placed = [(path, *split_block(path)) for path in module_paths]
    problems = []
    self_attn = {path: block for path, block, inner in placed if inner.startswith(_SELF_ATTN)}
    if self_attn:
        problems += _check_placed_self_attn(self_attn, adapter, key)
    elif adapter.self_attn_approval is not None:
        reason = "approves self_attn targets, but there is none among the resolved targets"
        problems.append(
            Problem("adapter.self_attn_approval", reason, "take the section out, or add the targets")
        )
    beyond = [path for path, _, inner in placed if inner not in FREE_TARGETS]
    if beyond and budget is None:
        reason = f"targets {_list(beyond)}: only cross_attn.{{k,v}} goes without a delta budget"
        problems.append(Problem(key, reason, _BUDGET_FIX))
    return problems


def _check_placed_self_attn(
    self_attn: dict[str, int | None], adapter: AdapterConfig, key: str
) -> list[Problem]:
    approval = adapter.self_attn_approval
    if approval is None:
        reason = f"targets {_list(self_attn)}, where adapters have repeatedly caused artifacts and collapse"
        return [Problem(key, reason, _APPROVAL_FIX)]
    problems = []
    stray = [path for path, block in self_attn.items() if block not in approval.blocks]
    if stray:
        reason = f"targets {_list(stray)}, but self_attn is approved only for blocks {list(approval.blocks)}"
        problems.append(Problem(key, reason, "take these out, or have their blocks approved"))
    unused = [block for block in approval.blocks if block not in self_attn.values()]
    if unused:
        reason = f"names block {', '.join(map(str, unused))}, where there is no self_attn target"
        problems.append(
            Problem(
                "adapter.self_attn_approval.blocks", reason, "name only blocks of the model that are adapted"
            )
        )
    return problems


def _may_reach_self_attn(pattern: str, exclude: Sequence[str]) -> bool:
    return any(inner.startswith(_SELF_ATTN) for inner in _reach(pattern, exclude))


def _may_reach_beyond_free(pattern: str, exclude: Sequence[str]) -> bool:
    return any(inner not in FREE_TARGETS for inner in _reach(pattern, exclude))


def _reach(pattern: str, exclude: Sequence[str]) -> list[str]:
    """Names that a pattern can select after `exclude`, as far as they are known without a model.

    Those are the linear layers that the rules are about, and what the pattern spells out itself. A glob that selects
    none of these stands for itself: whatever it finds is something else.
    """
    names: list[str] = []
    for glob in expand_braces(pattern):
        known = [path for path in _KNOWN_PATHS if matches(glob, path)]
        names += known or [split_block(glob)[1]]
    return [name for name in names if not any(name == one or matches(one, name) for one in exclude)]


def _patterns_are_sound(adapter: AdapterConfig) -> bool:
    return not _brace_errors([*adapter.include, *adapter.exclude])


def _brace_errors(patterns: Iterable[str]) -> list[str]:
    messages = []
    for pattern in patterns:
        try:
            expand_braces(pattern)
        except UserError as error:
            messages.append(str(error))
    return messages


def _list(paths: Iterable[str]) -> str:
    paths = list(paths)
    more = f" and {len(paths) - _NUM_SHOWN} more" if len(paths) > _NUM_SHOWN else ""
    return ", ".join(paths[:_NUM_SHOWN]) + more


TARGET_RULES = (
    Rule(check_patterns, ("adapter.include", "adapter.exclude")),
    Rule(
        check_self_attn,
        ("adapter.include", "adapter.exclude", "adapter.self_attn_approval", "adapter.include_file"),
    ),
    Rule(check_self_attn_approval, ("adapter.self_attn_approval", "adapter.rank")),
    Rule(check_approved_blocks, ("adapter.self_attn_approval.blocks", "adapter.train_blocks_range")),
    Rule(check_budget_for_targets, ("adapter.include", "adapter.exclude", "budget")),
    Rule(
        check_include_file,
        ("adapter.include", "adapter.exclude", "adapter.include_file", "adapter.train_blocks_range"),
    ),
)
