"""A language model that is counted, not trained: token losses from how often n-grams occur in a pool.

A trigram model with the prior of the next shorter one at each level (a hierarchical Dirichlet model, MacKay and Peto
1995; one strength for all). With n the counts of a pool, N the sum of its labels and V the vocabulary,

    p(c)        = (n(c) + 1) / (N + V)
    p(c | b)    = (n'(b c)   + K p(c))     / (n'(b) + K)
    p(c | a b)  = (n'(a b c) + K p(c | b)) / (n'(a b) + K)          n' = max(n - 1, 0), K = PRIOR
    loss        = -log p of each token but a sample's first, given the two before it; one before the second token

What is scored is mostly the pool itself, so one is taken off each count, the occurrence that is being scored: else rare
pairs would predict themselves; and distinct samples are counted, or those that a pool repeats would do so. Bi- and
trigrams share one hashed table; a count is at most that of its context, and a context's is how often it is a label.
These formulas go with the files that hold the counts, by checksum: others would need another name for the table.
Torch and numpy; knows nothing of files or services.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from weighting_contract.errors import InvalidArgument
from weighting_contract.ngrams import bigram_buckets, rows_joined, trigram_buckets
from weighting_contract.reference import MOST_BUCKETS
from weighting_contract.statistics import unigram_nll_table

PRIOR = 50.0  # occurrences that the next shorter n-gram's probability counts for; by the loss of pools of 1 M tokens
MIN_BUCKETS, LARGE_TABLE = 1 << 10, 1 << 22
MOST_TOKENS = MOST_BUCKETS // 2  # of a pool: of more, too many n-grams would share a bucket


def count_bi_and_trigrams(samples: np.ndarray) -> np.ndarray:
    """How often the bi- and trigrams of samples fall into each bucket, [buckets] int64.

    There are eight times as many buckets as tokens or more, a power of two, and in a large table, lest it take too
    much room, twice as many: of text, four for each n-gram that occurs. Those that share one look more frequent than
    they are.

    Args:
        samples: [N, T] token ids, distinct ones, MOST_TOKENS at most; no n-gram spans two rows.

    Raises:
        InvalidArgument: more tokens, or ids that are no integers of 0 or more.
    """
    if samples.size > MOST_TOKENS:
        raise InvalidArgument(
            f"the pool has {samples.size:,} tokens, of which n-grams can be counted up to {MOST_TOKENS:,}: train a "
            "model in place of it"
        )
    roomy, dense = (1 << (times * samples.size - 1).bit_length() for times in (8, 2))
    buckets = max(MIN_BUCKETS, min(roomy, max(LARGE_TABLE, dense)))
    counts = np.zeros(buckets, np.int64)
    for ids, inside in rows_joined(samples):
        two, three = ids[:-1][inside], ids[1:][inside]
        counts += np.bincount(bigram_buckets(two, three, buckets), minlength=buckets)
        both = inside[:-1] & inside[1:]
        triples = ids[:-2][both], ids[1:-1][both], ids[2:][both]
        counts += np.bincount(trigram_buckets(*triples, buckets), minlength=buckets)
    return counts


class CountedModel:
    """Gives the token losses of samples.

    Args:
        unigrams: [V] how often each token is a label in the pool.
        bi_and_trigrams: [buckets] of `count_bi_and_trigrams`.

    Raises:
        InvalidArgument: unigrams that are no counts.
    """

    def __init__(self, unigrams: np.ndarray, bi_and_trigrams: np.ndarray, device: torch.device | str = "cpu") -> None:
        self._unigram_nll = unigram_nll_table(torch.from_numpy(unigrams)).to(device)
        self._unigrams = torch.from_numpy(unigrams.astype(np.float32)).to(device)
        self._table = torch.from_numpy(bi_and_trigrams.astype(np.float32)).to(device)

    def token_losses(self, tokens: Tensor, real: np.ndarray | None = None) -> Tensor:
        """[N, T-1] float32, nats, of tokens [N, T] int64 within the vocabulary, on the tables' device.

        Args:
            real: of no use here, where each loss depends on what stands before it alone.
        """
        buckets = len(self._table)
        before, last = tokens[:, :-1], tokens[:, 1:]
        alone = self._unigram_nll[last].neg().exp()
        context = self._unigrams[before]
        pairs = torch.minimum(self._table[bigram_buckets(before, last, buckets)], context)
        given_one = _given(pairs, context, alone)
        triples = self._table[trigram_buckets(tokens[:, :-2], tokens[:, 1:-1], tokens[:, 2:], buckets)]
        given_two = _given(torch.minimum(triples, pairs[:, :-1]), pairs[:, :-1], given_one[:, 1:])
        return torch.cat([given_one[:, :1], given_two], 1).log().neg()


def _given(counts: Tensor, contexts: Tensor, prior: Tensor) -> Tensor:
    """Probabilities, with the occurrence itself taken off."""
    return ((counts - 1).clamp(min=0) + PRIOR * prior) / ((contexts - 1).clamp(min=0) + PRIOR)
