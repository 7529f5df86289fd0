"""Options of the whole suite. pytest reads them from here only, whatever part of it is run."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """How often, and with which chance, the chaos tests break things."""
    group = parser.getgroup("chaos")
    group.addoption("--chaos-runs", type=int, default=2, help="how often each row of the failure table is broken")
    group.addoption("--chaos-seed", type=int, default=None, help="of what is left to chance; the summary shows it")
    parser.addoption(
        "--renew-golden", action="store_true", help="write the rendered manifests instead of comparing them"
    )
