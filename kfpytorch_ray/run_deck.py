"""The decks of a run in the Flyte task that launched it: the run deck, and those of ranks.

flytekit shows a task's decks when it succeeds, and in a container also when it fails; here they are published before
the error is raised, so that they are there whatever becomes of the process. A deck never fails a task.
"""

from __future__ import annotations

import logging

import flytekit
from flytekit import Deck
from flytekit.deck.deck import TimeLineDeck

from kfpytorch_ray.report.data import RunReport
from kfpytorch_ray.report.page import TITLE, fragment
from kfpytorch_ray.results import ElasticWorkerResult

logger = logging.getLogger(__name__)


def add_decks(report: RunReport | None, first: ElasticWorkerResult) -> None:
    """Make decks of a run that succeeded the task's: rank 0's as they are, or every rank's by name, and the run deck.

    Args:
        report: What happened; None where the backend does not say.
        first: Rank 0's result. The task has a timeline of its own.
    """
    decks = flytekit.current_context().decks
    if report is None or not report.decks:
        decks.extend(deck for deck in first.decks if not isinstance(deck, TimeLineDeck))
    _add(report)


def publish_failure(report: RunReport | None) -> None:
    """The same for a run that failed, of which nothing else comes home; published at once."""
    if report is None or not flytekit.current_context().enable_deck:
        return
    _add(report)
    try:
        Deck.publish()
    except Exception:
        logger.warning("The decks of %s could not be published.", report.name, exc_info=True)


def _add(report: RunReport | None) -> None:
    if report is None:
        return
    for deck in report.decks:
        Deck(f"rank {deck.rank}: {deck.name}", deck.html)
    if not flytekit.current_context().enable_deck:
        return
    try:
        html = fragment(report)
    except Exception:
        logger.warning("The run deck of %s could not be drawn.", report.name, exc_info=True)
    else:
        Deck(TITLE, html)
