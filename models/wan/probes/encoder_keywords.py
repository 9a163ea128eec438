"""What tuning did to keywords: the signal that each one injects into a sentence, and their rows in the token table."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor
from torch.nn import functional

from models.wan.probes.encoder_prompts import Entry, sentence_pairs
from models.wan.probes.encoder_stream import TABLE, EncoderPair
from utils.tensor_source import TensorSource

_ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class KeywordSignal:
    """How much a keyword's presence moves a sentence, mean over the templates, by base and by tuned encoder.

    A sentence with the keyword is compared with the same one that has a placeholder there. That a part of a text matters
    as much as the representation changes without it is the idea of Li, Monroe and Jurafsky 2016, "Understanding Neural
    Networks through Representation Erasure".

    Attributes:
        entry: the keyword.
        base_context, tuned_context: ||with - without||_F / ||without||_F over the other tokens' states: what the keyword
            says to its neighbours.
        base_pooled, tuned_pooled: the same of the means over all tokens: what it does to the sentence as a whole.
    """

    entry: Entry
    base_context: float
    tuned_context: float
    base_pooled: float
    tuned_pooled: float

    @property
    def context_gain(self) -> float | None:
        """tuned / base; None where the base has no signal."""
        return self.tuned_context / self.base_context if self.base_context else None

    @property
    def pooled_gain(self) -> float | None:
        """The same of the whole sentence."""
        return self.tuned_pooled / self.base_pooled if self.base_pooled else None


@dataclass(frozen=True)
class TableDrift:
    """The token table: how many rows changed, and the Jaccard index of the keywords' nearest rows before and after.

    `num_keyword_rows` of them belong to keywords; `neighbours_kept` is a mean over those, None without keywords.
    """

    num_rows: int
    num_changed: int
    num_keyword_rows: int
    num_keyword_rows_changed: int
    neighbours_kept: float | None


def keyword_signals(
    keywords: Sequence[Entry],
    token_ids: Sequence[Sequence[int]],
    place: dict[str, int],
    base: Sequence[Tensor],
    tuned: Sequence[Tensor],
) -> list[KeywordSignal]:
    """One record per keyword, from states behind the final norm; see `measure_prompts`."""
    records = []
    for entry in keywords:
        pairs = [(place[having], place[lacking]) for having, lacking in sentence_pairs(entry.text)]
        numbers = [
            measure(side, token_ids, pairs)
            for measure in (_context_signal, _pooled_signal)
            for side in (base, tuned)
        ]
        records.append(KeywordSignal(entry, *numbers))
    return records


def common_tokens(first: Sequence[int], second: Sequence[int]) -> tuple[int, int]:
    """Lengths of the longest common beginning and, of what is left of the shorter one, the longest common end."""
    shorter = min(len(first), len(second))
    start = next((i for i in range(shorter) if first[i] != second[i]), shorter)
    left = shorter - start
    end = next((i for i in range(left) if first[-1 - i] != second[-1 - i]), left)
    return start, end


def _context_signal(
    states: Sequence[Tensor], token_ids: Sequence[Sequence[int]], pairs: Sequence[tuple[int, int]]
) -> float:
    found = []
    for having, lacking in pairs:
        start, end = common_tokens(token_ids[having], token_ids[lacking])
        others = [
            torch.cat((rows[:start], rows[len(rows) - end :])).double()
            for rows in (states[having], states[lacking])
        ]
        found.append(_relative(*others))
    return fmean(found)


def _pooled_signal(
    states: Sequence[Tensor], token_ids: Sequence[Sequence[int]], pairs: Sequence[tuple[int, int]]
) -> float:
    return fmean(
        _relative(states[having].double().mean(0), states[lacking].double().mean(0))
        for having, lacking in pairs
    )


def _relative(with_it: Tensor, without: Tensor) -> float:
    size = float(without.norm())
    return float((with_it - without).norm()) / size if size else 0.0


def table_drift(pair: EncoderPair, keyword_tokens: Sequence[int], count: int) -> TableDrift:
    """Compare the token tables, some thousand rows at a time; neighbours are looked for only where a row changed.

    Args:
        pair: the two encoders.
        keyword_tokens: tokens of all keywords, each once, without the end token.
        count: how many nearest rows (by cosine, without the row itself) are compared.
    """
    num_rows = pair.sizes.vocab_size
    changed: set[int] = set()
    for start in range(0, num_rows, _ROWS_AT_ONCE):
        base, tuned = (_chunk(source, start, num_rows) for source in (pair.base, pair.tuned))
        changed |= {start + int(row) for row in (base != tuned).any(dim=1).nonzero().flatten()}
    moved = len(changed & set(keyword_tokens))
    kept = None
    if keyword_tokens:
        kept = 1.0
        if changed:
            nearest = [
                _nearest(source, num_rows, keyword_tokens, count) for source in (pair.base, pair.tuned)
            ]
            kept = fmean(len(a & b) / len(a | b) for a, b in zip(*nearest, strict=True))
    return TableDrift(num_rows, len(changed), len(keyword_tokens), moved, kept)


def _nearest(source: TensorSource, num_rows: int, tokens: Sequence[int], count: int) -> list[set[int]]:
    """The rows of the table that are nearest to those of `tokens`, one set for each."""
    own = functional.normalize(
        torch.cat([source.rows(TABLE, token, token + 1) for token in tokens]).float(), dim=1
    )
    scores, rows = torch.empty(len(tokens), 0), torch.empty(len(tokens), 0, dtype=torch.int64)
    for start in range(0, num_rows, _ROWS_AT_ONCE):
        similar = own @ functional.normalize(_chunk(source, start, num_rows), dim=1).T
        for index, token in enumerate(tokens):
            if start <= token < start + similar.shape[1]:
                similar[index, token - start] = -torch.inf
        scores = torch.cat((scores, similar), dim=1)
        rows = torch.cat((rows, torch.arange(start, start + similar.shape[1]).expand(len(tokens), -1)), dim=1)
        scores, order = scores.topk(min(count, scores.shape[1]), dim=1)
        rows = rows.gather(1, order)
    return [set(found) for found in rows.tolist()]


def _chunk(source: TensorSource, start: int, num_rows: int) -> Tensor:
    rows = source.rows(TABLE, start, min(num_rows, start + _ROWS_AT_ONCE)).float()
    source.release()
    return rows
