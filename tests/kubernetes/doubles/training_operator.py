"""Kubeflow's training operator for an API server that has none: a thread that looks at all PyTorchJobs in turn.

It imitates kubeflow/training-operator 1.9.0. The controller is in pytorch_jobs.py, what it makes in pytorch_pods.py;
both name the files that they follow.
"""

from __future__ import annotations

from typing import final

from kubernetes import client

from doubles.api import Api
from doubles.loop import Loop
from doubles.pytorch_jobs import PyTorchJobs


@final
class TrainingOperator:
    """Works for as long as a ``with`` block runs.

    Args:
        connection: To the API server.
    """

    def __init__(self, connection: client.ApiClient) -> None:
        api = Api(connection)
        self._loop = Loop(api, {"pytorchjobs": PyTorchJobs(api)})

    def __enter__(self) -> TrainingOperator:
        self._loop.__enter__()
        return self

    def __exit__(self, *_error: object) -> None:
        self._loop.__exit__()
