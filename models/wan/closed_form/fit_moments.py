"""What a closed-form adapter is solved from: second moments of the text states that the DiT's cross-attention reads.

Both encoders run block by block over a bounded number of tokens at a time, and their states go through the text embedding
of each DiT; only sums are kept, and a few tokens to measure on. Prompts count at their true length. What pads them is one
constant vector, the same for both encoders, and is pinned by the solver. Both experts of A14B come from one pass.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.wan.closed_form.fit_prompts import FitPlan, FitPrompt, Role
from models.wan.probes.encoder_stream import EncoderPair, LayerStates, stream_states
from utils.closed_form import Moments, Share

# Tokens whose states are in memory at once: 2.1 GB for the two XXL encoders in float32.
MAX_STREAMED_TOKENS = 65_536
# Tokens that are summed at once.
_BATCH_TOKENS = 2048
# Neutral prompts are summed in parts, so that the fit with fewer of them can be told: ends of the parts, as shares.
PARTS = (1 / 8, 1 / 4, 1 / 2, 1.0)
# Tokens that residuals are measured on.
MEASURED = {True: 512, False: 256}
# What the prompts weigh together that Wan reads at every sampling: the empty and the negative one are few tokens among
# thousands, and half of all passes of the DiT read one of them.
ANCHOR_WEIGHT = 0.05
DEFAULT_KEEP_WEIGHT = 1.0

Embed = Callable[[Tensor], Tensor]
Group = tuple[Role, bool]


@dataclass(frozen=True)
class MeasuredTokens:
    """Tokens behind the text embedding, float32 [N, D]; how many each prompt has of them."""

    base_ND: Tensor
    tuned_ND: Tensor
    lengths: tuple[int, ...]

    @property
    def num_prompts(self) -> int:
        """Prompts that the tokens are of."""
        return len(self.lengths)


@dataclass(frozen=True)
class FitMoments:
    """What one DiT's adapter is solved from.

    Attributes:
        parts: of neutral prompts, disjoint: up to the shares in PARTS.
        part_prompts: how many prompts the parts up to and with each have.
        anchors: of the prompts that are always fitted on.
        kept: of domain prompts; None where there are none.
        measured: tokens to measure on, by role and whether they were held out.
        padding_D: what pads every prompt, [D].
    """

    parts: tuple[Moments, ...]
    part_prompts: tuple[int, ...]
    anchors: Moments
    kept: Moments | None
    measured: dict[Group, MeasuredTokens]
    padding_D: Tensor

    def shares(self, keep_weight: float, num_parts: int | None = None) -> list[Share]:
        """The least-squares problem's shares: all neutral tokens together weigh 1, all kept ones `keep_weight`."""
        shares = [
            Share(self.parts[:num_parts], 1.0 - ANCHOR_WEIGHT),
            Share([self.anchors], ANCHOR_WEIGHT),
        ]
        return shares if self.kept is None else [*shares, Share([self.kept], keep_weight)]


@dataclass
class _Sample:
    """Whole prompts until there are enough tokens."""

    limit: int
    base: list[Tensor] = field(default_factory=list)
    tuned: list[Tensor] = field(default_factory=list)
    count: int = 0

    def add(self, base_ND: Tensor, tuned_ND: Tensor) -> None:
        room = self.limit - self.count
        if room > 0:
            self.base.append(base_ND[:room].clone())
            self.tuned.append(tuned_ND[:room].clone())
            self.count += min(len(base_ND), room)


class Collector:
    """Sums up what one DiT reads."""

    def __init__(self, plan: FitPlan, embed: Embed, text_dim: int, device: torch.device) -> None:
        """Nothing yet.

        Args:
            plan: the prompts that will come, in its order.
            embed: the DiT's text embedding, [N, text_dim] -> [N, D] on `device`.
            text_dim: width of text states.
            device: where the sums are.
        """
        self._embed, self._device = embed, device
        self._padding = embed(torch.zeros(1, text_dim, device=device))[0]
        width = len(self._padding)
        fitted = plan.of("neutral", is_held=False)
        ends = sorted({math.ceil(share * len(fitted)) for share in PARTS})
        self._ends = [end for end in ends if end]
        self._parts = [Moments(width, device) for _ in self._ends]
        self._anchors = Moments(width, device)
        has_kept = bool(plan.of("domain", is_held=False))
        self._kept = Moments(width, device, is_kept=True) if has_kept else None
        self._num_fitted = 0
        self._samples: dict[Group, _Sample] = {}

    def add(self, prompts: Sequence[FitPrompt], base: Sequence[Tensor], tuned: Sequence[Tensor]) -> None:
        """Add the states of prompts, [L, text_dim] each."""
        waiting: dict[int, tuple[Moments, list[Tensor], list[Tensor]]] = {}
        for prompt, base_LD, tuned_LD in zip(prompts, base, tuned, strict=True):
            moments = self._moments_of(prompt)
            group = (prompt.role, prompt.is_held)
            sample = self._samples.setdefault(group, _Sample(MEASURED[prompt.is_held]))
            if sample.count < sample.limit:
                sample.add(self._embedded([base_LD]), self._embedded([tuned_LD]))
            if moments is None:
                continue
            if prompt.role == "anchor":  # each counts once, however long it is
                self._sum(moments, [base_LD], [tuned_LD], 1 / len(base_LD))
                continue
            _, own_base, own_tuned = waiting.setdefault(id(moments), (moments, [], []))
            own_base.append(base_LD)
            own_tuned.append(tuned_LD)
            if sum(map(len, own_base)) >= _BATCH_TOKENS:
                self._sum(*waiting.pop(id(moments)))
        for rest in waiting.values():
            self._sum(*rest)

    def result(self) -> FitMoments:
        """The sums of all that was added."""
        measured = {
            group: MeasuredTokens(
                torch.cat(sample.base), torch.cat(sample.tuned), tuple(map(len, sample.base))
            )
            for group, sample in self._samples.items()
        }
        return FitMoments(
            tuple(self._parts), tuple(self._ends), self._anchors, self._kept, measured, self._padding
        )

    def _moments_of(self, prompt: FitPrompt) -> Moments | None:
        if prompt.is_held:
            return None
        if prompt.role == "anchor":
            return self._anchors
        if prompt.role == "domain":
            return self._kept
        part = next(place for place, end in enumerate(self._ends) if self._num_fitted < end)
        self._num_fitted += 1
        return self._parts[part]

    def _sum(self, moments: Moments, base: list[Tensor], tuned: list[Tensor], weight: float = 1.0) -> None:
        wanted = None if moments is self._kept else self._embedded(base)
        moments.add(self._embedded(tuned), wanted, weight)

    def _embedded(self, states: list[Tensor]) -> Tensor:
        return self._embed(torch.cat(states).to(self._device).float())


def collect(
    pair: EncoderPair,
    plan: FitPlan,
    tokenise: Callable[[str], list[int]],
    embeds: Sequence[Embed],
    dtype: torch.dtype,
    device: torch.device,
    on_layer: Callable[[int], None],
    max_tokens: int = MAX_STREAMED_TOKENS,
) -> list[FitMoments]:
    """Run both encoders over all prompts once, and sum up for each DiT.

    Args:
        pair: base and tuned encoder.
        plan: the prompts.
        tokenise: a prompt's token ids.
        embeds: the text embedding of each DiT.
        dtype: what the encoders compute in.
        device: where everything is computed.
        on_layer: called behind every layer with the number of prompts that went through it.
        max_tokens: whose states are in memory at once.

    Raises:
        UserError: as `stream_states`, and where a state is not finite.
    """
    collectors = [Collector(plan, embed, pair.sizes.d_model, device) for embed in embeds]
    ids = [tokenise(prompt.text) for prompt in plan.prompts]
    for places in streamed(ids, max_tokens):

        def seen(_: LayerStates, count: int = len(places)) -> None:
            on_layer(count)

        base, tuned = stream_states(pair, [ids[place] for place in places], dtype, device, seen)
        with torch.no_grad():
            for collector in collectors:
                collector.add([plan.prompts[place] for place in places], base, tuned)
    return [collector.result() for collector in collectors]


def streamed(ids: Sequence[Sequence[int]], max_tokens: int) -> Iterator[range]:
    """Places of prompts, in order, in pieces of at most `max_tokens` tokens (a longer prompt is one by itself)."""
    first, count = 0, 0
    for place, own in enumerate(ids):
        if count and count + len(own) > max_tokens:
            yield range(first, place)
            first, count = place, 0
        count += len(own)
    if count:
        yield range(first, len(ids))
