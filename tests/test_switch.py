"""The switch: a real HAProxy, workers that answer with their colour, and a daemon that may die at any moment."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.fleet import Fleet, wait_for
from tests.haproxy import Proxy


@pytest.fixture
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    found = Proxy(tmp_path_factory.mktemp("haproxy"))  # not below tmp_path, where the fleet's end kills everything
    try:
        yield found.start()
    finally:
        found.close()


@pytest.fixture
def data(proxy: Proxy, fleet: Callable[..., Fleet]) -> Fleet:
    """The data node, which is its own master here."""
    return fleet(hosts=1, config={"haproxy": proxy.rule})


def test_a_switch_moves_the_traffic_and_back(proxy: Proxy, data: Fleet):
    text = proxy.file.read_bytes()
    code, out, err = data.cli("switch", "green")
    assert code == 0, (out, err)
    assert proxy.answers() == "green"
    code, out, err = data.cli("switch", "standby")
    assert code == 0, (out, err)
    assert proxy.answers() == "blue"
    assert proxy.file.read_bytes() == text
    assert wait_for(lambda: proxy.statuses() == {"blue": "UP", "green": "UP"}, lambda: str(proxy.statuses()))
