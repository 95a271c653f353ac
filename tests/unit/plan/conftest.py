"""Plans for CPUs do not depend on the processor that runs these tests."""

from __future__ import annotations

import pytest

from megalite.plan import precision


@pytest.fixture(autouse=True)
def _cpu_without_bf16_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bf16_units", lambda: None)
