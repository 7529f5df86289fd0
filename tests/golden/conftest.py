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
