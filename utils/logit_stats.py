"""Spread and entropy of attention logits, per head, without ever holding all of them.

The logits of a query q over keys k_1 .. k_L are q . k_l / sqrt(K), K the head's width. The softmax over the keys does not
change when one number is added to all logits of a query, so only their spread over the keys matters: per query, the
standard deviation over the keys (L in its denominator) and the entropy of the softmax, in nats; both then averaged over
the queries.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 25


@dataclass(frozen=True)
class LogitStats:
    """Means over all queries of a batch, float64 of shape [N] on the CPU, one value for each head."""

    std_N: Tensor
    entropy_N: Tensor


def logit_stats(query_BSNK: Tensor, key_BLNK: Tensor, chunk_elements: int = CHUNK_ELEMENTS) -> LogitStats:
    """Measure the logits of every query over all keys; they are made in float32.

    Args:
        query_BSNK: queries, B batch, S positions, N heads, K width.
        key_BLNK: keys, L positions.
        chunk_elements: how many logits there are at a time, at most (and at least those of one query).
    """
    num_heads = query_BSNK.shape[2]
    std_N, entropy_N = torch.zeros(2, num_heads, dtype=torch.float64)
    for logits_NQL in chunked_logits(query_BSNK, key_BLNK, chunk_elements):
        std_N += logits_NQL.std(-1, correction=0).double().sum(-1).cpu()
        log_share_NQL = logits_NQL.log_softmax(-1)
        entropy_N -= (log_share_NQL.exp() * log_share_NQL).double().sum((-2, -1)).cpu()
    num_queries = query_BSNK.shape[0] * query_BSNK.shape[1]
    return LogitStats(std_N / num_queries, entropy_N / num_queries)


def chunked_logits(query_BSNK: Tensor, key_BLNK: Tensor, chunk_elements: int) -> Iterator[Tensor]:
    """The logits [N, Q, L] of some queries after others, sample by sample, float32."""
    num_heads, width = query_BSNK.shape[2:]
    size = max(1, chunk_elements // (num_heads * key_BLNK.shape[1]))
    for query_SNK, key_LNK in zip(query_BSNK.float(), key_BLNK.float(), strict=True):
        key_NKL = key_LNK.permute(1, 2, 0) / math.sqrt(width)
        for part_QNK in query_SNK.split(size):
            yield part_QNK.transpose(0, 1) @ key_NKL
