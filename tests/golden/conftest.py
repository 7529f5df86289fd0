from __future__ import annotations

from pathlib import Path

import pytest
from crd_schema import CRDS, CRDS_VARIABLE


@pytest.fixture
def crds() -> Path:
    """The folder of the definitions; without it there is nothing to ask."""
    if not CRDS.is_dir():
        pytest.skip(f"no CRDs at {CRDS}; {CRDS_VARIABLE} may name a folder that has them")
    return CRDS


@pytest.fixture(autouse=True)
def no_choice_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine that runs the tests has no say in the backend."""
    for variable in ("KFPYTORCH_RAY_BACKEND", "FLYTE_KFPYTORCH_RAY_BACKEND", "FLYTE_INTERNAL_EXECUTION_ID"):
        monkeypatch.delenv(variable, raising=False)
