"""What the columns of a sample tell of its source: how pure a choice they allow, whatever a weighter learns.

    python -m benchmarks.columns [--texts DIR] [--corpora builtin books wiki]

For each corpus, of groups of 160 candidates the best fifth by each column alone (by high or low values, whichever is
better), and by a logistic regression on all of them and their squares that is fitted to the very labels, on other
samples: shares of the target. One more is tried that weighters don't have, the target's likelihood by n-grams:
`difference` (Moore and Lewis 2010), counted as counted references are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.learning.corpora import BUILTIN, NEED_TEXTS, data_flags
from benchmarks.machine import describe
from trainer_client.run.config import RunConfig, parse
from trainer_client.run.reference import made_reference
from trainer_client.run.task import Task, build_task
from weighting_contract.columns import COLUMNS, batch_columns
from weighting_contract.counted import PRIOR, CountedModel
from weighting_contract.reference import read_counts
from weighting_contract.statistics import raw_statistics

CANDIDATES, KEPT, GROUPS = 160, 32, 400
TARGETS = ("target", "prose")  # names of a target in the corpora
PRIORS = (5.0, 20.0, PRIOR)
CPU = torch.device("cpu")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, help="folder of books, wiki and web texts")
    parser.add_argument("--corpora", nargs="+", default=[BUILTIN], choices=(BUILTIN, *NEED_TEXTS))
    parser.add_argument("--folder", type=Path, default=Path("runs/learning/corpora"), help="where corpora are written")
    given = parser.parse_args()
    print(describe())
    torch.set_num_threads(1)
    for corpus in given.corpora:
        config = parse([*data_flags(corpus, given.folder, given.texts)])
        task = build_task(config)
        report(corpus, task, token_losses(config, task))
    return 0


def report(corpus: str, task: Task, losses: Tensor) -> None:
    """Prints the shares of a corpus's target; `losses` are of `token_losses`."""
    names = np.array(task.train.sources)
    target = np.isin(names[task.train.source_index], TARGETS)
    tokens = torch.from_numpy(task.train.tokens.astype(np.int64))
    table = task.target_table(task.profile_tokens)
    draw = np.random.default_rng(0)
    fitted, tested = ([draw.choice(len(target), CANDIDATES, replace=False) for _ in range(GROUPS)] for _ in range(2))
    print(f"{corpus}: {target.mean():.3f} of the samples are of the target; of the best fifth")

    def columns(group: np.ndarray) -> Tensor:
        raw = raw_statistics(losses[group], task.unigram_nll[tokens[group, 1:]])
        return batch_columns(raw, COLUMNS, tokens=tokens[group], table=table)

    def share(scores: list[Tensor]) -> float:
        """Of the target, in the fifth of each tested group that has the highest scores."""
        return float(
            np.mean([target[g][s.topk(KEPT).indices.numpy()].mean() for g, s in zip(tested, scores, strict=True)])
        )

    read = [columns(group) for group in tested]
    for place, name in enumerate(COLUMNS):
        alone = [each[:, place] for each in read]
        print(f"    {max(share(alone), share([-values for values in alone])):.3f}  {name}")
    learned = [columns(group) for group in fitted]
    labels = torch.from_numpy(np.concatenate([target[group] for group in fitted]))
    print(f"    {share(regression(learned, labels, read)):.3f}  all of them, a regression on the labels")
    for prior in PRIORS:
        more = target_log_ratio(task, tokens, losses, prior)
        both = [
            [torch.cat([x, more[g, None]], 1) for x, g in zip(*part, strict=True)]
            for part in ((learned, fitted), (read, tested))
        ]
        by_itself = share([more[group] for group in tested])
        with_it = share(regression(both[0], labels, both[1]))
        print(f"    {with_it:.3f}  and the target's likelihood, prior {prior:g} (by itself {by_itself:.3f})")


def token_losses(config: RunConfig, task: Task) -> Tensor:
    """[N, T] of the pool's samples, by the reference that a run counts."""
    reference = made_reference(config, task, CPU, None)
    assert reference.files is not None
    counts = read_counts(reference.files)
    assert counts.bi_and_trigrams is not None
    model = CountedModel(counts.unigrams, counts.bi_and_trigrams)
    return model.token_losses(task.tokens(np.arange(len(task.train)), CPU))


def target_log_ratio(task: Task, tokens: Tensor, losses: Tensor, prior: float) -> Tensor:
    """[N] mean over tokens of log p_target - log p_pool; the target's bigrams have the latter as prior."""
    size, known = len(task.unigram_nll), task.profile_tokens.astype(np.int64)
    pairs = torch.from_numpy(np.bincount((known[:, :-1] * size + known[:, 1:]).ravel(), minlength=size**2)).view(
        size, size
    )
    before, last = tokens[:, :-1], tokens[:, 1:]
    of_pool = losses.neg().exp()
    of_target = (pairs[before, last] + prior * of_pool) / (pairs.sum(1)[before] + prior)
    return (of_target / of_pool).log().mean(1).float()


def regression(learned: list[Tensor], labels: Tensor, read: list[Tensor]) -> list[Tensor]:
    """Scores of the groups `read`, by a logistic regression on columns and their squares that was fitted to others."""

    def inputs(columns: Tensor) -> Tensor:
        return torch.cat([columns, columns.square(), torch.ones(len(columns), 1)], 1).double()

    rows = inputs(torch.cat(learned))
    scale = rows.abs().amax(0).clamp(min=1e-9)
    weights = torch.zeros(rows.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(rows / scale @ weights, labels.double())
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return [inputs(columns) / scale @ weights.detach() for columns in read]


if __name__ == "__main__":
    raise SystemExit(main())
