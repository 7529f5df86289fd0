"""docs/options.md beside the code that it is made of."""

from __future__ import annotations

import re
import runpy

from blocks import ROOT, code_spans, table


def test_the_page_is_what_the_docstrings_say() -> None:
    """Whoever changes an option runs ``python docs/make_options.py``."""
    made = runpy.run_path(str(ROOT / "docs" / "make_options.py"))["page"]()
    assert (ROOT / "docs" / "options.md").read_text() == made


def test_every_variable_that_a_user_may_set_has_a_row() -> None:
    """Those beside them are set by us, for the processes that we start."""
    own = {"AGENT", "HEARTBEAT", "PRELOAD", "RESOURCES", "TESTING", "ZYGOTE"}
    named = set()
    for folder in ("kfpytorch_ray", "cluster", "adapters"):
        for path in (ROOT / folder).rglob("*.py"):
            named |= set(re.findall(r"\bKFPYTORCH_RAY_([A-Z_]*[A-Z])\b", path.read_text()))
    rows = {name for row in table("docs/options.md", "| variable |") for name in code_spans(row[0])}
    assert {name.removeprefix("KFPYTORCH_RAY_") for name in rows if name.startswith("KFPYTORCH_RAY_")} == named - own
