"""A browser for the tests of pages."""

from collections.abc import Iterator
from typing import Any

import pytest
from tests.dashboards.browser import chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Closed with its module: while it is open an event loop is, in which Snakemake does not run."""
    with chromium() as found:
        yield found
