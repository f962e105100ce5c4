"""How often a job has trained on a content, and what that takes off a weight. Knows neither jobs nor loaders.

The same text may lie in a pool a thousand times. No statistic of one sample shows that, and it helps as well as any
other of its kind: the first few times.
"""

from __future__ import annotations

import base64
import hashlib
import io
import zipfile
from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from weighting_contract.errors import InvalidArgument
from weighting_contract.tensors import as_array

TIMES_TO_WEAR = 4.0  # beyond twice the usual; by measurement, docs/method.md
_ROWS = 2  # of the sketch, with a hash each
_CELLS = 1 << 18  # of a row
_RECENT = 8  # steps, whose samples say what is usual
_MIXING = np.uint64(0x9E3779B97F4A7C15)


def content_keys(tokens: np.ndarray, lengths: np.ndarray | None = None) -> np.ndarray:
    """[N] uint64, equal for samples of equal tokens, and else different but for accidents.

    Args:
        tokens: [N, T] integer token ids, padded on the right with any id.
        lengths: [N] real ids of each row; None: T.
    """
    values = tokens.astype(np.uint64) + np.uint64(1)
    if lengths is not None:
        values[np.arange(tokens.shape[1]) >= np.asarray(lengths)[:, None]] = 0
    return _mixed((values * _factors(tokens.shape[1])).sum(1, dtype=np.uint64))


def text_keys(texts: Sequence[str]) -> np.ndarray:
    """The same of texts."""
    digests = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts]
    return np.frombuffer(b"".join(digests), np.uint64)


def keys_of(tokens: Any, lengths: Any) -> np.ndarray | None:
    """The keys of what `Selector.submit` takes; None where it is neither ids nor texts, which the submit will say."""
    if isinstance(tokens, list):
        return text_keys(tokens) if all(isinstance(text, str) for text in tokens) else None
    ids = as_array(tokens, "tokens")
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        return None
    return content_keys(ids, None if lengths is None else as_array(lengths, "lengths"))


def worn(weights: np.ndarray, wear: np.ndarray) -> np.ndarray:
    """[N] float32 of mean 1: weights [N] with so much taken off their logs; as they are where nothing is."""
    if not wear.any() or not weights.any():
        return weights
    least = wear[weights > 0].min()  # of those that can be kept
    less = weights * np.exp(np.minimum(0.0, least - wear))
    result: np.ndarray = (less * (len(less) / less.sum())).astype(np.float32)
    return result


class TimesSeen:
    """Counts what was trained on, by content, and says how much a content has worn by that.

    By a count-min sketch (Cormode and Muthukrishnan 2005) of 2 MB. Candidates are scored some steps ahead, sooner or
    later as it happens, so what a step may know is fixed: all steps but the last `ahead` before it. Thus a run that is
    resumed counts as the one that was not interrupted.

    Args:
        ahead: steps.
        times: that divide a weight by e; 0: nothing wears.
    """

    def __init__(self, ahead: int, times: float = TIMES_TO_WEAR) -> None:
        self._ahead, self._times = ahead, times
        self._counts = np.zeros((_ROWS, _CELLS), np.uint32)
        self._waiting: deque[tuple[int, np.ndarray]] = deque()  # (step, keys), steps in order, not counted yet
        # The steps counted last, the newest last; -1 for a step of before a resume.
        self._counted_last: deque[tuple[int, np.ndarray]] = deque(maxlen=_RECENT + ahead)
        self._last = -1  # step that was told last

    def trained(self, step: int, keys: np.ndarray) -> None:
        """The contents of a step's batch; steps come in order, and one that was told before is passed over."""
        if step > self._last:
            self._waiting.append((step, keys))
            self._last = step

    def wear(self, step: int, keys: np.ndarray) -> np.ndarray:
        """[N] float64, 0 or more, what candidates of `step` with these contents have taken off the log of their weight.

            max(0, n_i - 2 m) / times

        with n the times that each content was trained on, and m their median over the samples of the last eight steps.
        So what is seen as often as its like, or up to twice as often, has the weight that it had: where nothing is
        repeated, nothing changes.
        """
        counts = self.counts(step, keys)
        if not self._times or not self._counted_last:
            return np.zeros(len(keys))
        recent = [trained for _, trained in self._counted_last][-_RECENT:]
        usual = np.median(self._counted(np.concatenate(recent)))
        excess: np.ndarray = np.maximum(0.0, counts - 2.0 * usual) / self._times
        return excess

    def counts(self, step: int, keys: np.ndarray) -> np.ndarray:
        """[N] times that each content was trained on, as far as candidates of `step` may know; too many by accident."""
        while self._waiting and self._waiting[0][0] < step - self._ahead:
            counted = self._waiting.popleft()
            self._change(np.add, self._counts, counted[1])
            self._counted_last.append(counted)
        return self._counted(keys)

    def state_dict(self) -> str:
        """Base64, small where little was seen. What only steps after the next one may know is not counted yet."""
        known, counts = deque(self._counted_last), self._counts.copy()
        waiting = deque(self._waiting)
        while known and known[-1][0] >= max(0, self._last + 1 - self._ahead):
            waiting.appendleft(known.pop())
            self._change(np.subtract, counts, waiting[0][1])
        used = np.flatnonzero(counts)
        batches = [(-1, keys) for _, keys in known][-_RECENT:] + list(waiting)
        content = io.BytesIO()
        np.savez_compressed(
            content,
            cells=used,
            counts=counts.flat[used],
            last=self._last,
            steps=np.array([step for step, _ in batches], np.int64),
            sizes=np.array([len(keys) for _, keys in batches], np.int64),
            keys=np.array([key for _, keys in batches for key in keys], np.uint64),
        )
        return base64.b64encode(content.getvalue()).decode()

    def load_state_dict(self, state: Any) -> None:
        """Raises InvalidArgument for what is no such state."""
        counts = np.zeros_like(self._counts)
        try:
            with np.load(io.BytesIO(base64.b64decode(state, validate=True)), allow_pickle=False) as arrays:
                counts.flat[arrays["cells"]] = arrays["counts"]
                last = int(arrays["last"])
                keys = np.split(arrays["keys"], np.cumsum(arrays["sizes"])[:-1])
                batches = list(zip(arrays["steps"].tolist(), keys, strict=True)) if len(arrays["steps"]) else []
        except (KeyError, TypeError, ValueError, IndexError, OSError, zipfile.BadZipFile) as exc:
            raise InvalidArgument(f"the times seen are not what SelectedBatches.state_dict returned: {exc!r}") from exc
        self._waiting = deque((step, keys) for step, keys in batches if step >= 0)
        self._counted_last = deque(((step, keys) for step, keys in batches if step < 0), maxlen=_RECENT + self._ahead)
        self._counts, self._last = counts, last

    def _change(self, by_one: np.ufunc, counts: np.ndarray, keys: np.ndarray) -> None:
        """Adds or subtracts one for each of the keys."""
        for row, cells in enumerate(self._cells(keys)):
            by_one.at(counts[row], cells, 1)

    def _counted(self, keys: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.min([self._counts[row][cells] for row, cells in enumerate(self._cells(keys))], axis=0)
        return found

    def _cells(self, keys: np.ndarray) -> list[np.ndarray]:
        return [(keys >> np.uint64(20 * row)) & np.uint64(_CELLS - 1) for row in range(_ROWS)]


@lru_cache(maxsize=64)
def _factors(places: int) -> np.ndarray:
    """[places] uint64, odd, one a place, of a universal hash (Dietzfelbinger et al. 1997), whose high bits are good.

    Several times as fast as a digest of each row, and a training loop waits for it.
    """
    return np.random.default_rng(0).integers(0, 1 << 63, places, np.uint64) * np.uint64(2) + np.uint64(1)


def _mixed(keys: np.ndarray) -> np.ndarray:
    """The high bits brought down."""
    high: np.ndarray = (keys ^ (keys >> np.uint64(32))) * _MIXING
    return np.asarray(high ^ (high >> np.uint64(29)))
