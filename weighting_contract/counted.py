"""A language model that is counted, not trained: token losses from how often n-grams occur in a pool.

A trigram model with the prior of the next shorter one at each level (a hierarchical Dirichlet model, MacKay and Peto
1995; one strength for all). With n the counts of a pool, N the sum of its labels and V the vocabulary,

    p(c)        = (n(c) + 1) / (N + V)
    p(c | b)    = (n'(b c)   + K p(c))     / (n'(b) + K)
    p(c | a b)  = (n'(a b c) + K p(c | b)) / (n'(a b) + K)          n' = max(n - 1, 0), K = PRIOR
    loss        = -log p of each token but a sample's first, given the two before it; one before the second token

What is scored is mostly the pool itself, so one is taken off each count, the occurrence that is being scored: else rare
pairs would predict themselves. Bi- and trigrams share one hashed table; a count is at most that of its context.
Torch and numpy; knows nothing of files or services.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from weighting_contract.ngrams import bigram_buckets, rows_joined, trigram_buckets
from weighting_contract.statistics import unigram_nll_table

PRIOR = 50.0  # occurrences that the next shorter n-gram's probability counts for; by the loss of pools of 1 M tokens
MIN_BUCKETS, MAX_BUCKETS = 1 << 10, 1 << 22  # of a table that is made here: 16 MB at most
MOST_TOKENS = 1 << 23  # that are counted; more would only share the buckets


def count_longer(samples: np.ndarray) -> np.ndarray:
    """How often the bi- and trigrams of samples fall into each bucket, [buckets] int64; of many, evenly spaced ones.

    There are four buckets or more for each n-gram that can occur, a power of two from MIN_BUCKETS to MAX_BUCKETS: those
    that share one look more frequent than they are.

    Args:
        samples: [N, T] token ids; no n-gram spans two rows.

    Raises:
        InvalidArgument: ids that are no integers of 0 or more.
    """
    rows = samples[:: max(1, -(-samples.size // MOST_TOKENS))]
    buckets = min(MAX_BUCKETS, max(MIN_BUCKETS, 1 << (8 * rows.size - 1).bit_length()))
    counts = np.zeros(buckets, np.int64)
    for ids, inside in rows_joined(rows):
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
        longer: [buckets] of `count_longer`.

    Raises:
        InvalidArgument: unigrams that are no counts.
    """

    def __init__(self, unigrams: np.ndarray, longer: np.ndarray, device: torch.device | str = "cpu") -> None:
        self._unigram_nll = unigram_nll_table(torch.from_numpy(unigrams)).to(device)
        self._unigrams = torch.from_numpy(unigrams.astype(np.float32)).to(device)
        self._longer = torch.from_numpy(longer.astype(np.float32)).to(device)

    def token_losses(self, tokens: Tensor, real: np.ndarray | None = None) -> Tensor:
        """[N, T-1] float32, nats, of tokens [N, T] int64 within the vocabulary, on the tables' device.

        Args:
            real: of no use here, where each loss depends on what stands before it alone.
        """
        buckets = len(self._longer)
        before, last = tokens[:, :-1], tokens[:, 1:]
        alone = self._unigram_nll[last].neg().exp()
        context = self._unigrams[before]
        pairs = torch.minimum(self._longer[bigram_buckets(before, last, buckets)], context)
        given_one = _given(pairs, context, alone)
        triples = self._longer[trigram_buckets(tokens[:, :-2], tokens[:, 1:-1], tokens[:, 2:], buckets)]
        given_two = _given(torch.minimum(triples, pairs[:, :-1]), pairs[:, :-1], given_one[:, 1:])
        return torch.cat([given_one[:, :1], given_two], 1).log().neg()


def _given(counts: Tensor, contexts: Tensor, prior: Tensor) -> Tensor:
    """Probabilities, with the occurrence itself taken off."""
    return ((counts - 1).clamp(min=0) + PRIOR * prior) / ((contexts - 1).clamp(min=0) + PRIOR)
