"""Processes of a Pod: namespaces of their own for network, processes, mounts and host name, on this machine's files.

Every container has its own process namespace, so that it ends with its first process, as in a container, and a
`ray stop` in it stops nothing else; and a private /tmp and /dev/shm, where several Rays would meet.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kfpytorch_ray.testing.processes import all_processes, parent, send

HOME = "/tmp/home"
_UNSHARE = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--uts", "--mount-proc"]


@dataclass(frozen=True, slots=True)
class Sandbox:
    """Where the containers of one Pod run.

    Attributes:
        network: Name of its network namespace.
        address: Its address there.
        hostname: The Pod's.
        folder: For its files.
        env: What every process finds in its environment.
        shared: Folders under /tmp that the Pod sees although its /tmp is its own, such as a test's storage.
        copied: Folders of this machine that a container sees and may write to without changing them.
    """

    network: str
    address: str
    hostname: str
    folder: Path
    env: Mapping[str, str]
    shared: Sequence[Path] = ()
    copied: Sequence[str] = ("/root",)

    def know(self, names: Sequence[tuple[str, str]] = ()) -> None:
        """Have the Pod know itself and others: pairs of address and name, as DNS would answer."""
        known = (("127.0.0.1", "localhost"), (self.address, self.hostname), *names)
        text = "".join(f"{address} {name}\n" for address, name in known).encode()
        if self._hosts.exists() and self._hosts.read_bytes() == text:
            return
        # Containers see this very file, and may read it at any moment: it is never empty.
        descriptor = os.open(self._hosts, os.O_WRONLY | os.O_CREAT, 0o644)
        with open(descriptor, "wb") as file:
            file.write(text)
            file.truncate()

    @property
    def _hosts(self) -> Path:
        return self.folder / "hosts"

    def start(
        self,
        name: str,
        command: Sequence[str],
        env: Mapping[str, str],
        output: Path,
        cwd: str = "",
        mounts: Sequence[tuple[Path, str]] = (),
    ) -> subprocess.Popen[bytes]:
        """Start a container.

        Args:
            name: Unique in the Pod, for its files.
            command: What it runs.
            env: Its variables, laid over those of the sandbox.
            output: File that stdout and stderr are appended to.
            cwd: Where it starts; its home if that is empty.
            mounts: Paths here, and where it finds them.

        Returns:
            What ends when the container does, with its exit code; see ``first_process()`` for signals.
        """
        script = self._script(self.folder / name, cwd or HOME, mounts)
        with open(output, "ab") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.network, *_UNSHARE, "/bin/sh", "-ec", script, "sh", *command],
                env=self._environment(env),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def execute(
        self, container: subprocess.Popen[bytes], command: Sequence[str], env: Mapping[str, str], timeout_s: float
    ) -> None:
        """Run a command in a container, for at most so long; whether it succeeds makes no difference."""
        if not (pid := first_process(container)):
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(
                ["nsenter", "--target", str(pid), "--all", "--wd", *command],
                env=self._environment(env),
                check=False,
                timeout=timeout_s,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    def _environment(self, env: Mapping[str, str]) -> dict[str, str]:
        return {**self.env, "HOME": HOME, "HOSTNAME": self.hostname, **env}

    def _script(self, folder: Path, cwd: str, mounts: Sequence[tuple[Path, str]]) -> str:
        tmp = folder / "tmp"
        (tmp / "home").mkdir(parents=True)
        tmp.chmod(0o1777)
        lines = [_copy_on_write(folder, path) for path in sorted({*self.copied, *_without(mounts)})]
        # The outer ones first; what is below /tmp before /tmp itself, which hides where it comes from.
        for source, target in sorted([*((path, str(path)) for path in self.shared), *mounts], key=lambda pair: pair[1]):
            place = shlex.quote(str(tmp / target.removeprefix("/tmp/")) if target.startswith("/tmp/") else target)
            lines.append(f"test -e {place} || mkdir -p {place}")
            lines.append(f"mount --bind {shlex.quote(str(source))} {place}")
        lines.append(f"mount --bind {shlex.quote(str(self._hosts))} /etc/hosts")
        lines.append(f"mount --rbind {shlex.quote(str(tmp))} /tmp")
        lines.append("mount -t tmpfs shm /dev/shm")
        lines.append(f"hostname {shlex.quote(self.hostname)}")
        lines.append(f"cd {shlex.quote(cwd)}")
        return "\n".join([*lines, 'exec "$@"'])


def _without(mounts: Sequence[tuple[Path, str]]) -> set[str]:
    """The folders at the root of this machine in which there has to be made something to mount at."""
    missing = (Path(target) for _, target in mounts if not target.startswith("/tmp/") and not Path(target).exists())
    return {str(Path(*path.parts[:2])) for path in missing}


def _copy_on_write(folder: Path, path: str) -> str:
    upper, work = (folder / f"{part}{path.replace('/', '-')}" for part in ("upper", "work"))
    upper.mkdir()
    work.mkdir()
    return f"mount -t overlay overlay -o lowerdir={path},upperdir={upper},workdir={work} {path}"


def first_process(container: subprocess.Popen[bytes]) -> int:
    """Id, here, of the process that is number 1 in a container; 0 if it is not there yet or any more."""
    return next((pid for pid in all_processes() if parent(pid) == container.pid), 0)


def terminate(container: subprocess.Popen[bytes]) -> None:
    """SIGTERM to a container's first process, which as number 1 does not end by it unless it handles it."""
    if pid := first_process(container):
        send(pid, signal.SIGTERM)


def kill(container: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a container: the kernel ends all processes with its first one."""
    if pid := first_process(container):
        send(pid, signal.SIGKILL)
    elif container.poll() is None:
        container.kill()
