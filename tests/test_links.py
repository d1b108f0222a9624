"""Connections: a peer that vanished without a word is noticed, and nobody comes back in step with the others."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable

from estelle_updater import reconnect_delay
from tests.fleet import Fleet, wait_for
from tests.machines import Network


def test_reconnects_are_spread() -> None:
    chance = random.Random(7).uniform
    for attempt, most in [(0, 1), (1, 2), (2, 4), (5, 32), (6, 60), (40, 60)]:
        delays = [reconnect_delay(attempt, False, chance) for _ in range(400)]
        assert 0 <= min(delays) < most / 20 and most * 0.95 < max(delays) <= most
        assert abs(statistics.mean(delays) - most / 2) < most / 10
    refused = [reconnect_delay(3, True, chance) for _ in range(400)]
    assert min(refused) >= 30 and max(refused) <= 90


def test_a_peer_that_vanishes_without_a_word_is_noticed_by_both(
    fleet: Callable[..., Fleet], netns: Callable[[int], Network]
) -> None:
    network = netns(2)
    one = fleet(hosts=2, network=network)
    agent = one.agents[0]
    network.cut_way(1, 2)
    network.cut_way(2, 1)  # every packet dropped, none refused
    wait_for(lambda: "is offline" in one.master.stderr, lambda: one.master.stderr, 60)
    wait_for(lambda: "the connection to the master ended" in agent.stderr, lambda: agent.stderr, 60)
    network.cut_way(1, 2, undo=True)
    network.cut_way(2, 1, undo=True)
    wait_for(lambda: agent.stderr.count("welcomed") == 2, lambda: agent.stderr, 90)
