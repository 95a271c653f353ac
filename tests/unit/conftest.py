"""Fixtures of tests with one process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megalite.parallel import Grid
from tests.helpers.models import world_of_one


@pytest.fixture(scope="module")
def grid() -> Iterator[Grid]:
    """Yield the grid of one rank."""
    with world_of_one() as single:
        yield single
