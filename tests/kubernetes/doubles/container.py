"""A container of a Pod: its attempts one after the other, and its part of the Pod's status."""

from __future__ import annotations

import contextlib
import subprocess
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

from doubles.api import Document, now
from doubles.sandbox import Sandbox, kill, terminate
from doubles.variables import expanded

_FIRST_BACK_OFF_S = 0.5
_LONGEST_BACK_OFF_S = 10.0
_MESSAGE_BYTES = 2048
_PROBE_TIMEOUT_S = 1.0


@final
class Container:
    """Started by ``start()``, and looked after by ``look()``, which starts it again where the policy says so.

    Args:
        spec: Its specification.
        sandbox: Of the Pod.
        policy: The Pod's restartPolicy; Always is OnFailure for one that has to end.

    Attributes:
        process: The latest attempt.
        log: The latest attempt's output.
        previous_log: The output of the attempt before it.
        restarts: How often it has been started again.
        ended: Whether it has ended for good.
    """

    def __init__(self, spec: Document, sandbox: Sandbox, policy: str) -> None:
        self.spec = spec
        self.name: str = spec["name"]
        self.process: subprocess.Popen[bytes] | None = None
        self.log = sandbox.folder / f"{self.name}-0.log"
        self.previous_log: Path | None = None
        self.restarts = 0
        self.ended = False
        self._sandbox = sandbox
        self._policy = policy
        self._state: Document = {"waiting": {"reason": "ContainerCreating"}}
        self._last_state: Document = {}
        self._started_at = ""
        self._env: dict[str, str] = {}
        self._mounts: Sequence[tuple[Path, str]] = ()
        self._again_at = 0.0
        self._probed_at = 0.0
        self._ready = False

    def waits(self, reason: str, message: str = "") -> None:
        """It has not been started, for a reason."""
        self._state = {"waiting": {"reason": reason, **({"message": message} if message else {})}}

    def start(self, env: dict[str, str], mounts: Sequence[tuple[Path, str]]) -> None:
        """Start it with its variables, and with what it mounts."""
        self._env = env
        self._mounts = mounts
        command = [*self.spec.get("command", []), *self.spec.get("args", [])] or ["/bin/bash"]
        self.process = self._sandbox.start(
            f"{self.name}-{self.restarts}",
            [expanded(word, env) for word in command],
            env,
            self.log,
            self.spec.get("workingDir", ""),
            mounts,
        )
        self._started_at = now()
        self._state = {"running": {"startedAt": self._started_at}}
        self._ready = "readinessProbe" not in self.spec

    @property
    def running(self) -> bool:
        """Whether it runs at this moment."""
        return self.process is not None and self.process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """Of the latest attempt, if that has ended."""
        code = None if self.process is None else self.process.poll()
        return code if code is None or code >= 0 else 128 - code

    def look(self) -> str:
        """See whether it has ended, and start it again when it is time.

        Returns:
            What there is to tell in an Event; empty for nothing.
        """
        if self.ended or self.process is None:
            return ""
        if (code := self.exit_code) is None:
            self._probe()
            return ""
        if "running" in self._state:
            return self._has_ended(code)
        if time.monotonic() >= self._again_at:
            self.restarts += 1
            self.previous_log, self.log = self.log, self._sandbox.folder / f"{self.name}-{self.restarts}.log"
            self.start(self._env, self._mounts)
        return ""

    def _probe(self) -> None:
        """Ask whether it is ready, over HTTP, until it is; once it was it stays so here."""
        probe = self.spec.get("readinessProbe", {})
        if self._ready or time.monotonic() - self._probed_at < probe.get("periodSeconds", 10):
            return
        self._probed_at = time.monotonic()
        asked = probe["httpGet"]
        with contextlib.suppress(OSError):
            url = f"http://{self._sandbox.address}:{asked['port']}/{asked['path']}"
            urllib.request.urlopen(url, timeout=_PROBE_TIMEOUT_S).close()
            self._ready = True

    def _has_ended(self, code: int) -> str:
        self._state = {"terminated": self._terminated(code)}
        if self._policy == "Never" or (self._policy == "OnFailure" and code == 0):
            self.ended = True
            return ""
        self._last_state = self._state
        # As the kubelet: at once the first time, then after a time that doubles.
        delay_s = min(_FIRST_BACK_OFF_S * 2**self.restarts, _LONGEST_BACK_OFF_S) if self.restarts else 0.0
        self._again_at = time.monotonic() + delay_s
        if not delay_s:
            return ""
        message = f"back-off {delay_s:g}s restarting failed container={self.name}"
        self.waits("CrashLoopBackOff", message)
        return "Back-off restarting failed container"

    def _terminated(self, code: int) -> Document:
        found = {
            "exitCode": code,
            "reason": "Error" if code else "Completed",
            "startedAt": self._started_at,
            "finishedAt": now(),
        }
        if code and self.spec.get("terminationMessagePolicy") == "FallbackToLogsOnError":
            found["message"] = self.log.read_bytes()[-_MESSAGE_BYTES:].decode(errors="replace")
        return found

    def ask_to_end(self, grace_s: float) -> None:
        """Its preStop hook, for at most so long, and SIGTERM."""
        if self.process is None:
            return
        if hook := self.spec.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command"):
            self._sandbox.execute(self.process, hook, self._env, grace_s)
        terminate(self.process)

    def wait(self, timeout_s: float) -> None:
        """Wait for its end, for at most so long."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self.process is not None:
                self.process.wait(max(timeout_s, 0))

    def stop(self) -> None:
        """It ends for good, with what its processes have come to."""
        self.ended = True
        if self.process is None:
            return
        kill(self.process)
        self.process.wait()
        if "running" in self._state:
            self._state = {"terminated": self._terminated(self.exit_code or 0)}

    def status(self) -> Document:
        """Its entry in containerStatuses."""
        running = "running" in self._state
        found: dict[str, Any] = {
            "name": self.name,
            "image": self.spec.get("image", ""),
            "imageID": "",
            "ready": (running and self._ready) or (self._policy == "OnFailure" and self.ended and self.exit_code == 0),
            "started": running,
            "restartCount": self.restarts,
            "state": self._state,
            "lastState": self._last_state,
        }
        if self.process is not None:
            found["containerID"] = f"process://{self.process.pid}"
        return found
