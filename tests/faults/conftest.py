"""A site for all tests of a file. Whoever breaks its network heals it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.site import Site, running
from tests.world.skipping import world_or_skip

TEST_SECONDS = 400
"""More than the sum of a test's deadlines, and of what starts before the first of a file."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Outages last, so tests of this folder may take longer than others."""
    for item in items:
        if Path(__file__).parent in item.path.parents and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(TEST_SECONDS))


@pytest.fixture(scope="module")
def lasting_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """NATS, a registry, two nodes and a witness, each on a host of its own."""
    with (
        world_or_skip("nats", "registry", "a", "b", "witness", seed=4) as world,
        running(world, tmp_path_factory.mktemp("site")) as site,
    ):
        yield site


@pytest.fixture
def site(lasting_site: Site) -> Iterator[Site]:
    """The site, with nothing held, and everything passing before and after."""
    for node in lasting_site.nodes:
        node.forget()
    yield lasting_site
    lasting_site.world.heal()
