"""One process alone: every method of ranks is trivial, and a group's job is the job."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainer_client import connect
from trainer_client.group_job import group_job
from trainer_client.ranks import Elsewhere, Ranks, _packed, _unpacked, share
from weighting_contract.errors import InvalidArgument, Unavailable


def test_alone_everything_is_one_s_own():
    ranks, rows = Ranks.current(), torch.arange(6.0).view(3, 2)
    assert (ranks.rank, ranks.world, ranks.is_first, ranks.group) == (0, 1, True, None)
    assert ranks.from_first(lambda: rows) is rows
    assert ranks.together(lambda: rows) is rows
    assert torch.equal(ranks.all_rows(rows), rows)
    assert ranks.everyone(3) == [3]
    assert [ranks.any(flag) for flag in (True, False)] == [True, False]
    assert ranks.my_rows(5) == slice(0, 5)
    ranks.all_equal("step", 3)
    ranks.agree(None)


def test_alone_errors_are_raised_as_they_are():
    error = Unavailable("nobody is there")

    def fail() -> None:
        raise error

    for call in (lambda: Ranks.alone().from_first(fail), lambda: Ranks.alone().together(fail)):
        with pytest.raises(Unavailable) as raised:
            call()
        assert raised.value is error
    with pytest.raises(InvalidArgument, match="can't be read"):
        Ranks.alone().agree(InvalidArgument("it can't be read"))
    with pytest.raises(InvalidArgument, match="no such file"):
        Ranks.alone().together(lambda: (_ for _ in ()).throw(FileNotFoundError("no such file")))


@pytest.mark.parametrize(("count", "parts"), [(8, 2), (7, 3), (4, 4), (2, 3), (0, 2)])
def test_shares_are_contiguous_and_even(count, parts):
    shares = [range(count)[share(count, parts, part)] for part in range(parts)]
    assert [row for part in shares for row in part] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_what_is_sent_comes_out_as_it_went_in():
    value = {
        "plain": [None, True, 3, 0.1, float("inf"), "text", b"\0bytes"],
        ("tuple", 1): (np.arange(6, dtype=np.int64).reshape(2, 3), np.float32(0.5), np.ones((0, 4), np.float32)),
        "tensor": torch.tensor([True, False]),
        "kind": {"kind": "tuple", "items": []},
    }
    found = _unpacked(_packed(value))
    assert found["plain"] == value["plain"]
    array, number, empty = found["tuple", 1]
    np.testing.assert_array_equal(array, value["tuple", 1][0])
    assert (array.dtype, number, empty.shape, empty.dtype) == (np.int64, 0.5, (0, 4), np.float32)
    assert torch.equal(found["tensor"], value["tensor"])
    assert found["kind"] == value["kind"]
    with pytest.raises(TypeError, match="a object can't be sent"):
        _packed([object()])


def test_elsewhere_keeps_the_kind_of_the_mistake():
    assert Elsewhere("rank 0 says why", "UNAVAILABLE").code == "UNAVAILABLE"


def test_a_group_of_one_is_the_job():
    features = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    spec = {"features": {"names": ["a", "b", "c"]}}
    with connect("embedded") as client:
        plain = client.open_job("plain", weighter="default", spec=spec)
        with group_job(client.open_job("grouped", weighter="default"), Ranks.alone()) as job:
            ours, theirs = job.score(features, 0), plain.score(features, 0)
            assert torch.equal(ours.weights, theirs.weights)
            assert (ours.position, ours.fallback) == (0, False)
            job.meta_update(torch.tensor([1.0, -1.0, 0.5, 0.0]), features, 0, probes=torch.ones(4, dtype=torch.bool))
            assert job.flush(10)
            assert job.state_dict()["last_position"] == 1
            assert job.counters.updates_acknowledged == 1
            job.load_state_dict(job.state_dict())
            assert job.score(features, 1).position == 1
        assert job.score(features, 2).fallback  # it is closed, and so is the job


def test_the_first_rank_must_have_the_job():
    with pytest.raises(InvalidArgument, match="there is no job, expected one on the first rank"):
        group_job(None, Ranks.alone())
