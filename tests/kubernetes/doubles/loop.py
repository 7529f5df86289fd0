"""What operators have in common: a thread that looks at all objects of some kinds in turn, again and again."""

from __future__ import annotations

import contextlib
import logging
import threading
import traceback
from collections.abc import Mapping
from typing import Protocol, final

from kubernetes import client

from doubles.api import Api, Document

logger = logging.getLogger(__name__)

_TICK_S = 0.2


class Controller(Protocol):
    """Brings an object nearer to its specification."""

    def reconcile(self, document: Document) -> None:
        """One step."""
        ...


@final
class Loop:
    """Works for as long as a ``with`` block runs.

    Args:
        api: The API server.
        controllers: By the resource that each looks after.
    """

    def __init__(self, api: Api, controllers: Mapping[str, Controller]) -> None:
        self._api = api
        self._controllers = controllers
        self._logged: set[str] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="operator", daemon=True)

    def __enter__(self) -> Loop:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.is_set():
            with contextlib.suppress(client.ApiException, OSError):
                for resource, controller in self._controllers.items():
                    for document in self._api.find(resource):
                        self._try(controller, document)
            self._over.wait(_TICK_S)

    def _try(self, controller: Controller, document: Document) -> None:
        try:
            controller.reconcile(document)
        except client.ApiException as error:
            # Deleted or changed meanwhile; a namespace that is being deleted takes nothing new.
            level = logging.INFO if error.status in {403, 404, 409} else logging.ERROR
            self._log(level, f"The API server refuses: {error.body}")
        except Exception:
            self._log(logging.ERROR, traceback.format_exc())

    def _log(self, level: int, message: str) -> None:
        """Once: it is tried again and again."""
        if message not in self._logged:
            self._logged.add(message)
            logger.log(level, "%s", message)
