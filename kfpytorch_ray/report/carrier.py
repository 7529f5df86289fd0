"""What the result and the errors of a launch have in common: each carries the report, and shows it when asked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kfpytorch_ray.report.data import RunReport


class Reported:
    """Carries a report.

    Attributes:
        report: What happened in the run, as plain data; None where the launch did not come that far.
    """

    report: RunReport | None = None

    @property
    def deck(self) -> str:
        """The run deck: one HTML page that needs nothing else. Drawn anew by every access.

        Raises:
            ValueError: There is no report.
        """
        if self.report is None:
            msg = (
                "There is no deck of this run.\n"
                "Why: it did not come so far that there was something to report, or its backend reports nothing.\n"
                "Fix: look at the error's message, or at the rounds."
            )
            raise ValueError(msg)
        from kfpytorch_ray.report.page import page

        return page(self.report)

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """Write the run deck to a file, which any browser shows.

        Args:
            path: Of the file; its folder must exist.

        Returns:
            The path.

        Raises:
            ValueError: There is no report.
            OSError: The file cannot be written.
        """
        file = Path(path)
        file.write_text(self.deck, encoding="utf-8")
        return file
