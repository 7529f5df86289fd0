"""Ray's job API over HTTP: Ray's own client, less what does not serve here.

Ray's constructor lets RAY_ADDRESS override the address that it was given, its requests have no time-out, and what it
raises does not say what to do. Where a connection breaks, ClusterUnreachableError says so, and whoever follows a run
tries again. Tokens come from where Ray takes them (RAY_AUTH_MODE=token) or from headers; no message repeats them.
"""

from __future__ import annotations

import http.client
import logging
import math
import os
import ssl
import threading
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import requests
from ray import exceptions as ray_exceptions
from ray.dashboard.modules.dashboard_sdk import SubmissionClient
from ray.job_submission import JobDetails, JobSubmissionClient

from kfpytorch_ray.config import RayBackend
from kfpytorch_ray.errors import (
    AuthenticationError,
    ClusterError,
    ClusterUnreachableError,
    ConfigError,
    KfpytorchRayError,
    explain,
)

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0
"""The job server answers a submission only when an agent has taken it, which it waits for up to 30 s."""

_LOOK_S = 0.25

_FORGET_S = (3.0, 5.0, 8.0)
"""Seconds after which a job is taken off the list: Ray has noticed its end by the first, or soon, on a busy machine."""

_TLS_ALERT = "\x15\x03"
"""How a TLS server begins an answer to what is no TLS."""

_RayRefusedError: type[Exception] = getattr(ray_exceptions, "AuthenticationError", ray_exceptions.RayError)
"""The lowest Ray knows no tokens, and has no error for them."""

_GCS_PORT = 6379
_RAY_CLIENT_PORT = 10001


class JobClient(JobSubmissionClient):
    """Ray's client of a cluster's job API.

    Args:
        address: ``http://HOST:PORT`` or ``https://HOST:PORT``.
        headers: Sent with every request.
        verify: Whether the server's certificate is verified, or the file or folder of certificates to trust.

    Raises:
        ConfigError: The certificates are not there.
        AuthenticationError: There is no token although one is to be sent.
    """

    def __init__(self, address: str, headers: Mapping[str, str] = {}, verify: bool | str = True) -> None:
        try:
            # Past JobSubmissionClient's own constructor, which reads RAY_ADDRESS and asks the cluster three times.
            SubmissionClient.__init__(self, address=address, headers=dict(headers), verify=verify)
        except (FileNotFoundError, ssl.SSLError) as error:
            problem = f"verify={verify!r}: {error}; name a file or folder of certificates in PEM that are to be trusted"
            raise ConfigError("RayBackend", (problem,)) from error
        except (_RayRefusedError, RuntimeError) as error:
            raise _no_token(address, error) from error
        import ray

        self._client_ray_version = ray.__version__

    @property
    def address(self) -> str:
        """Where it is."""
        return str(self._address)

    @property
    def websocket(self) -> dict[str, Any]:
        """How aiohttp's ``ws_connect`` reaches the same server."""
        return {"headers": self._headers, "ssl": _trusted() if self._ssl_context is None else self._ssl_context}

    def version(self) -> dict[str, Any]:
        """What the cluster says of itself: ``ray_version``, ``session_name`` and more.

        Raises:
            ClusterUnreachableError: Nobody answers, or not as a Ray does.
            AuthenticationError: It refuses.
        """
        answer = self._do_request("GET", "/api/version")
        try:
            version: dict[str, Any] = answer.json()
            version["ray_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise _unreachable(self.address, _odd(answer)) from error
        return version

    def job(self, submission_id: str) -> JobDetails | None:
        """What the cluster knows of a job; None if it knows none of this name.

        Raises:
            ClusterUnreachableError: Nobody answers.
            AuthenticationError: It refuses.
        """
        answer = self._do_request("GET", f"/api/jobs/{submission_id}")
        if answer.status_code == requests.codes.not_found:
            return None
        if answer.status_code != requests.codes.ok:
            self._raise_error(answer)
        return JobDetails(**answer.json())

    def submit_job(self, **job: Any) -> str:
        """Have the cluster run a job; see Ray's ``JobSubmissionClient``.

        Raises:
            ConfigError: Ray does not take the runtime environment.
            ClusterError: The cluster cannot be reached, or does not take the job.
        """
        try:
            return str(super().submit_job(**job))
        except (TypeError, ValueError) as error:
            problem = f"runtime_env: Ray does not take it: {error}; write it as Ray's documentation has it"
            raise ConfigError("RayBackend", (problem,)) from error

    def wait_until_over(self, submission_id: str, timeout_s: float | None = None) -> JobDetails:
        """Wait until a job will not run any more.

        Raises:
            TimeoutError: It has not ended within ``timeout_s``.
            ClusterError: The cluster cannot be reached, or does not know it.
        """
        pause = threading.Event()
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while not (job := self.get_job_info(submission_id)).status.is_terminal():
            if time.monotonic() > deadline:
                msg = f"The job {submission_id} is {job.status.value} after {timeout_s:g} s: {job.message}"
                raise TimeoutError(msg)
            pause.wait(_LOOK_S)
        return job

    def forget(self, submission_id: str, *, thoroughly: bool = False) -> None:
        """Take a job that is over off the cluster's list, in a moment and from another thread.

        Ray's own watch over a job looks once a second, until the actor that ran it has ended. A job that is removed
        before the last look is written anew, as one that has failed, and is removed again.

        Args:
            submission_id: Of the job.
            thoroughly: This process ends no sooner than after the last try. Otherwise after the first: who launches
                once is not to wait for what most often is over by then.
        """
        for number, after_s in enumerate(_FORGET_S):
            timer = threading.Timer(after_s, self._forget, (submission_id,))
            timer.daemon = number > 0 and not thoroughly
            timer.start()

    def _forget(self, submission_id: str) -> None:
        try:
            if self.job(submission_id) is not None:
                self.delete_job(submission_id)
        except KfpytorchRayError as error:
            logger.info("The job %s stays on the list of %s: %s", submission_id, self.address, error)

    def _do_request(self, method: str, endpoint: str, **kwargs: Any) -> requests.Response:
        """One request.

        Raises:
            ClusterUnreachableError: The connection failed, or the server did.
            AuthenticationError: The server refuses.
        """
        kwargs.setdefault("timeout", (CONNECT_TIMEOUT_S, READ_TIMEOUT_S))
        # Ray's error does not tell which of both it was.
        statuses: list[int] = []
        kwargs["hooks"] = {"response": lambda answer, *_args, **_kwargs: statuses.append(answer.status_code)}
        try:
            answer = super()._do_request(method, endpoint, **kwargs)
        except _RayRefusedError as error:
            raise _refused(self.address, statuses[-1] if statuses else http.HTTPStatus.UNAUTHORIZED) from error
        except requests.exceptions.RequestException as error:
            raise _unreachable(self.address, _reason(error)) from error
        if answer.status_code in (requests.codes.unauthorized, requests.codes.forbidden):
            raise _refused(self.address, answer.status_code)
        if answer.status_code in (
            requests.codes.bad_gateway,
            requests.codes.unavailable,
            requests.codes.gateway_timeout,
        ):
            raise _unreachable(self.address, f"A proxy answers with status {answer.status_code}.")
        return answer

    def _raise_error(self, answer: requests.Response) -> None:
        raise ClusterError(
            explain(
                f"The cluster at {self.address} did not do what it was asked (status {answer.status_code}).",
                answer.text.strip().splitlines()[-1] if answer.text.strip() else "It says nothing about it.",
                "Look into the dashboard's logs on the head (dashboard.log, runtime_env_agent.log).",
            )
        )


def client_of(options: RayBackend, address: str) -> JobClient:
    """The client that the options ask for."""
    return JobClient(address, options.headers, options.verify)


def _trusted() -> ssl.SSLContext | bool:
    """What requests trusts by default, which asks these variables and aiohttp does not."""
    bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    if not bundle:
        return True
    folder = os.path.isdir(bundle)
    return ssl.create_default_context(cafile=None if folder else bundle, capath=bundle if folder else None)


def _odd(answer: requests.Response) -> str:
    """What an answer that is not the job API's says."""
    if answer.status_code == requests.codes.bad_request and "https" in answer.text.lower():
        return "It serves https:// there, and was asked by http://."
    return f"It answers with status {answer.status_code}, but not as Ray's job API does."


def _reason(error: requests.exceptions.RequestException) -> str:
    """What a connection failed of, without the library's names around it."""
    match error:
        case requests.exceptions.SSLError() if "wrong version number" in str(error).lower():
            return "It does not speak TLS: https:// was asked where http:// is served."
        case requests.exceptions.SSLError():
            return f"Its certificate was not accepted: {_innermost(error)}"
        case requests.exceptions.ConnectTimeout() | requests.exceptions.ReadTimeout():
            return "It did not answer in time."
        case _:
            cause = _innermost(error)
            if isinstance(cause, http.client.BadStatusLine) and str(cause).startswith(_TLS_ALERT):
                return "It serves https:// there, and was asked by http://."
            if isinstance(cause, http.client.BadStatusLine) and not isinstance(cause, ConnectionError):
                return "It does not speak HTTP: this is another port of Ray's, such as that of its GCS (6379)."
            if isinstance(cause, ConnectionResetError):
                return "It closed the connection at once: where https:// is served, http:// is answered like this."
            return str(cause) or type(cause).__name__


def _innermost(error: BaseException) -> BaseException:
    """What was wrapped in the errors of two libraries."""
    reason = getattr(error, "reason", None)
    inner = reason if isinstance(reason, BaseException) else error.args[-1] if error.args else None
    return _innermost(inner) if isinstance(inner, BaseException) else error


def _unreachable(address: str, why: str) -> ClusterUnreachableError:
    port = urlsplit(address).port
    if port == _GCS_PORT:
        fix = (
            f"{_GCS_PORT} is the port of Ray's GCS, which drivers inside the cluster join: the job API is the "
            "dashboard's, most often on port 8265."
        )
    elif port == _RAY_CLIENT_PORT:
        fix = f"{_RAY_CLIENT_PORT} is the port of Ray Client: the job API is the dashboard's, most often on port 8265."
    else:
        fix = (
            "Check the address (the dashboard's, most often port 8265; http:// or https:// as it is served), that the "
            "head runs with ray[default] installed, and that a tunnel or port-forward to it stands. For a certificate "
            "of your own: RayBackend(verify='/path/to/ca.pem')."
        )
    return ClusterUnreachableError(explain(f"The Ray cluster at {address} cannot be reached.", why, fix))


def _refused(address: str, status: int) -> AuthenticationError:
    what = "does not know who asks (401)" if status == requests.codes.unauthorized else "refuses this (403)"
    return AuthenticationError(
        explain(
            f"The Ray cluster at {address} {what}.",
            "No token was sent, or not the cluster's.",
            "Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH for a file with it; behind a proxy of "
            "your own give what it asks for: RayBackend(headers={'Authorization': ...}).",
        )
    )


def _no_token(address: str, error: Exception) -> AuthenticationError:
    return AuthenticationError(
        explain(
            f"The Ray cluster at {address} was not asked.",
            f"A token is to be sent (RAY_AUTH_MODE=token), and none was found: {type(error).__name__}.",
            "Set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH for a file with it.",
        )
    )
