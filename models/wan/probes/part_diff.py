"""What differs between two checkpoints: names, shapes, formats and sampled values, part by part, under official names."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from models.wan.probes.adapter_parts import misfits
from models.wan.probes.parts import Part, sizes_text
from utils.tensor_samples import Comparison, Likeness, Sampler, compare_samples, likeness, median_distance

_BLOCK = re.compile(r"\bblocks?\.(\d+)\.")
# Enough to tell two experts apart; each costs a few reads that a cold disk has to seek for.
NUM_EXPERT_TENSORS = 24
_NUM_GROUPS = 6
# A VAE numbers its layers otherwise; with this many kinds of names, every number counts as one of layers.
_MANY_GROUPS = 60
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Difference:
    """One tensor that differs: a line of differences.csv. `what` is `only in A`, `only in B`, `shape`, `values`,
    `dtype` or `name`, in the order in which they matter."""

    part: str
    what: str
    key: str
    a: str
    b: str


@dataclass(frozen=True)
class PartDiff:
    """Two parts held against each other.

    Attributes:
        label: which.
        sentences: what differs, what matters first.
        differences: the same, tensor by tensor.
        counts: number of differences of each kind.
        values: what the samples say; None where there was nothing to compare.
        distance: median relative distance of the tensors whose values differ.
        fits: of an adapter against a DiT, whether it fits; None otherwise.
    """

    label: str
    sentences: tuple[str, ...]
    differences: tuple[Difference, ...]
    counts: dict[str, int]
    values: Likeness | None
    distance: float | None
    fits: bool | None = None

    @property
    def differs(self) -> bool:
        """Anything but names and formats."""
        kinds = ("only in A", "only in B", "shape", "values")
        return self.fits is False or any(self.counts.get(kind) for kind in kinds)


def pair_parts(left: Sequence[Part], right: Sequence[Part]) -> list[tuple[Part, Part]]:
    """Which parts to hold against each other: those of a kind; experts with the same expert where both are known, else
    with each; an adapter with each DiT."""
    pairs = []
    for one in left:
        for other in right:
            kinds = {one.kind, other.kind}
            experts = {one.expert, other.expert} - {None}
            if kinds == {"adapter", "transformer"} or (
                one.kind == other.kind != "unknown" and len(experts) < 2
            ):
                pairs.append((one, other))
    if pairs:
        return pairs
    # Two files of different experts, on purpose: that is the question then.
    return [(one, other) for one in left for other in right if one.kind == other.kind == "transformer"]


def compare_parts(left: Part, right: Part) -> PartDiff:
    """Hold two parts of one kind against each other, or an adapter against a DiT.

    Raises:
        UserError: sampled values cannot be read.
    """
    label = f"{left.label} against {right.label}"
    if left.kind != right.kind:
        return _fit(label, left, right)
    a, b = _tensors(left), _tensors(right)
    shared = [name for name in a if name in b]
    rows = [Difference(label, "only in A", name, _shape(left, a[name]), "") for name in a if name not in b]
    rows += [Difference(label, "only in B", name, "", _shape(right, b[name])) for name in b if name not in a]
    same_shape = {}
    for name in shared:
        one, other = left.source.shapes[a[name]], right.source.shapes[b[name]]
        if one == other:
            same_shape[name] = (a[name], b[name])
        else:
            rows.append(Difference(label, "shape", name, str(list(one)), str(list(other))))
    samples = compare_samples(Sampler(left.source), Sampler(right.source), same_shape)
    rows += _value_rows(label, samples)
    rows += [
        Difference(label, "dtype", name, left.source.dtypes[a[name]], right.source.dtypes[b[name]])
        for name in shared
        if left.source.dtypes[a[name]] != right.source.dtypes[b[name]]
    ]
    rows += [Difference(label, "name", name, a[name], b[name]) for name in shared if a[name] != b[name]]
    counts = dict(Counter(row.what for row in rows))
    found = likeness(samples) if samples else None
    sentences = [*_size_sentences(left, right), *_sentences(rows, len(samples), found, samples)]
    sentences.append(_naming_sentence(left, right, len(shared)))
    return PartDiff(label, tuple(sentences), tuple(rows), counts, found, median_distance(samples))


def compare_experts(one: Part, other: Part) -> tuple[Likeness | None, float | None]:
    """What samples of some tensors say of two experts; (None, None) where all of them are 0 or none can be compared.

    Raises:
        UserError: sampled values cannot be read.
    """
    a, b = one.naming.official, other.naming.official
    names = [
        name for name, shape in one.shapes.items() if len(shape) == 2 and other.shapes.get(name) == shape
    ]
    chosen = names[:: max(1, len(names) // NUM_EXPERT_TENSORS)][:NUM_EXPERT_TENSORS]
    samples = compare_samples(
        Sampler(one.source), Sampler(other.source), {name: (a[name], b[name]) for name in chosen}
    )
    if all(sample.is_zero for sample in samples.values()):
        return None, None
    return likeness(samples), median_distance(samples)


def describe_groups(names: Iterable[str]) -> str:
    """Tensor names in a few words, blocks put together: `blocks.N.cross_attn.k.weight (10), head.head.bias`."""
    groups = Counter(_BLOCK.sub(lambda match: match[0].replace(match[1], "N"), name) for name in names)
    if len(groups) > _MANY_GROUPS:
        merged: Counter[str] = Counter()
        for name, count in groups.items():
            merged[_NUMBER.sub("N", name)] += count
        groups = merged
    shown = [name if count == 1 else f"{name} ({count})" for name, count in groups.most_common(_NUM_GROUPS)]
    more = f" and {len(groups) - _NUM_GROUPS} more kinds" if len(groups) > _NUM_GROUPS else ""
    return ", ".join(shown) + more


def _tensors(part: Part) -> dict[str, str]:
    """Stored names by the name under which they are compared: the official one; of an adapter `module.part`."""
    if part.adapter is None:
        return part.naming.official
    return {part.adapter.keys.get(name, name): name for name in part.names}


def _fit(label: str, left: Part, right: Part) -> PartDiff:
    adapter, base = (left, right) if left.kind == "adapter" else (right, left)
    assert adapter.adapter is not None
    found = misfits(adapter.adapter, base.shapes)
    total = len(adapter.adapter.modules)
    if not found:
        return PartDiff(
            label,
            (f"all {total} adapted modules are in the DiT and have its shapes",),
            (),
            {},
            None,
            None,
            True,
        )
    rows = tuple(
        Difference(label, "shape", text.split(" adapts ")[0].removeprefix("the base has no "), text, "")
        for text in found
    )
    more = "; ..." if len(found) > 10 else ""
    sentence = f"{len(found)} of {total} adapted modules do not fit: {'; '.join(found[:10])}{more}"
    return PartDiff(label, (sentence,), rows, {"shape": len(rows)}, None, None, False)


def _shape(part: Part, stored: str) -> str:
    return f"{list(part.source.shapes[stored])} {part.source.dtypes[stored]}"


def _value_rows(label: str, samples: Mapping[str, Comparison]) -> list[Difference]:
    rows = []
    for name, sample in samples.items():
        if not sample.is_equal and not sample.is_rounding:
            far = "not comparable" if sample.distance is None else f"relative distance {sample.distance:.4g}"
            rows.append(Difference(label, "values", name, far, ""))
    return rows


def _size_sentences(left: Part, right: Part) -> list[str]:
    if left.expectation is None or right.expectation is None:
        return []
    a, b = left.expectation.sizes, right.expectation.sizes
    changed = {name for name in a if a[name] != b.get(name)}
    if not changed:
        return []
    one = sizes_text({name: a[name] for name in a if name in changed})
    other = sizes_text({name: b[name] for name in b if name in changed})
    return [f"the sizes differ: {one} in A, {other} in B"]


def _sentences(
    rows: Sequence[Difference], num_sampled: int, found: Likeness | None, samples: Mapping[str, Comparison]
) -> list[str]:
    """One sentence for each kind of difference, what matters first."""
    by_kind: dict[str, list[str]] = {}
    for row in rows:
        by_kind.setdefault(row.what, []).append(row.key)
    sentences = [
        f"{len(by_kind[kind])} tensors are {kind}: {describe_groups(by_kind[kind])}"
        for kind in ("only in A", "only in B")
        if kind in by_kind
    ]
    if "shape" in by_kind:
        sentences.append(
            f"{len(by_kind['shape'])} tensors have another shape: {describe_groups(by_kind['shape'])}"
        )
    if found is not None:
        sentences.append(_value_sentence(found, num_sampled, by_kind.get("values", []), samples))
    if "dtype" in by_kind:
        formats = Counter((row.a, row.b) for row in rows if row.what == "dtype")
        listed = ", ".join(
            f"{one} in A and {other} in B ({count})" for (one, other), count in formats.most_common(4)
        )
        sentences.append(f"{len(by_kind['dtype'])} tensors are stored in another format: {listed}")
    return sentences


def _value_sentence(
    found: Likeness, num_sampled: int, changed: Sequence[str], samples: Mapping[str, Comparison]
) -> str:
    if all(sample.is_zero for sample in samples.values()):
        return f"all sampled values of {num_sampled} tensors are 0 on both sides, which says nothing about the weights"
    distance = median_distance(samples)
    far = f"median relative distance {distance:.3g}" if distance is not None else "no distance can be given"
    if found == "identical":
        return (
            f"the sampled values of all {num_sampled} tensors of the same shape are equal: the same weights"
        )
    if found == "rounded":
        return f"the sampled values of all {num_sampled} tensors are equal up to rounding ({far}): the same weights in another format"
    where = f"{len(changed)} of {num_sampled} tensors, {far}: {describe_groups(changed)}"
    if found == "near":
        return f"the sampled values differ somewhat, as after tuning or merging, in {where}"
    return f"the sampled values differ altogether, these are different weights, in {where}"


def _naming_sentence(left: Part, right: Part, num_shared: int) -> str:
    one, other = left.layout, right.layout
    if one == other:
        return f"{num_shared} tensors correspond, in the same layout ({one})"
    return f"{num_shared} tensors correspond under their official names; A is {one}; B is {other}"
