"""Processes that watch each other: what each asks of the store they share, torch's own, and who learns what."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from torch._C._distributed_c10d import PrefixStore, TCPStore

from greenprune.engine import peers as module
from greenprune.engine.peers import BEAT_S, SILENCE_S, WATCHED, Peer, Peers, beat_s

MakePeers = Callable[[int], list[Peers]]


class Counting:
    """The store, and how often it was asked."""

    asked = 0

    def __init__(self, prefix: str, store: Any) -> None:
        self._store = PrefixStore(prefix, store)

    def __getattr__(self, name: str) -> Any:
        Counting.asked += 1
        return getattr(self._store, name)


@pytest.fixture
def make_peers(monkeypatch: pytest.MonkeyPatch) -> MakePeers:
    """Watches of a run of some processes, each on a host of its own, as if this process were all of them."""
    store = TCPStore("localhost", 0, is_master=True, timeout=timedelta(seconds=5))
    monkeypatch.setattr(module, "_get_default_store", lambda: SimpleNamespace(clone=lambda: store))
    monkeypatch.setattr(module, "PrefixStore", Counting)

    def make(count: int) -> list[Peers]:
        everyone = [Peer(rank, f"host{rank}", 1000 + rank) for rank in range(count)]
        return [Peers(me, everyone, stall_s=600.0, advice=lambda: "Start it again") for me in everyone]

    return make


def requests_of_a_beat(watch: Peers) -> int:
    before = Counting.asked
    watch._beat()
    watch._listen()
    assert watch._cause() is None
    return Counting.asked - before


def test_what_a_process_asks_of_the_store_does_not_grow_with_their_number(make_peers: MakePeers) -> None:
    found = []
    for count in (4, 300):
        watches = make_peers(count)
        for watch in watches:
            watch._beat()
        found.append(requests_of_a_beat(watches[1]))
    assert found[0] == found[1] <= 2 + 2 * WATCHED


def test_many_processes_beat_more_rarely_but_still_several_times_before_they_count_as_silent() -> None:
    assert beat_s(1) == beat_s(64) == BEAT_S
    assert BEAT_S < beat_s(4096) <= beat_s(10**6) < SILENCE_S / 3


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_processes_watch_those_there_are(make_peers: MakePeers, count: int) -> None:
    watches = make_peers(count)
    for watch in watches:
        watch._beat()
        assert watch._me not in watch._watched
        assert len(set(watch._watched)) == len(watch._watched) == min(WATCHED, count - 1)
    assert all(requests_of_a_beat(watch) <= 2 + 2 * WATCHED for watch in watches)


def test_everybody_learns_of_an_error_and_the_first_one_stands(
    make_peers: MakePeers, capsys: pytest.CaptureFixture[str]
) -> None:
    watches = make_peers(6)
    with pytest.raises(ValueError, match="too hot"), watches[2]:
        raise ValueError("too hot")
    with pytest.raises(RuntimeError), watches[3]:
        raise RuntimeError("lost rank 2")  # its consequence
    for rank in (0, 1, 4, 5):
        lost = watches[rank].find_lost()
        assert str(lost) == "rank 2 on host2 (process 1002) has ended: too hot. Start it again"
    assert capsys.readouterr().err.count("too hot") == 1  # one speaks for all


def test_a_process_that_leaves_in_good_order_is_not_missed(
    make_peers: MakePeers, monkeypatch: pytest.MonkeyPatch
) -> None:
    watches = make_peers(3)
    with watches[1]:
        pass
    monkeypatch.setattr(module, "SILENCE_S", -1.0)
    watches[2]._beat()
    watches[0]._watched = [watches[1]._me]
    assert watches[0]._cause() is None


def test_everybody_learns_of_a_host_that_falls_silent_with_all_its_processes(
    make_peers: MakePeers, monkeypatch: pytest.MonkeyPatch
) -> None:
    watches, silent = make_peers(12), range(4, 8)
    monkeypatch.setattr(module, "SILENCE_S", 0.2)
    ends = time.monotonic() + 0.4
    living = [watch for rank, watch in enumerate(watches) if rank not in silent]
    while time.monotonic() < ends:
        for watch in living:
            watch._beat()
            watch._listen()
        time.sleep(0.02)
    causes = {watch._silent() for watch in living} - {None}
    assert causes
    for watch in living:
        assert "rank 4 on host4 (process 1004) has not been heard of" in str(watch.find_lost())
