"""What this machine is like: measured here, judged by kfpytorch_ray.doctor.judgement. Changes nothing."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from flytekit.configuration.file import get_config_file
from packaging.requirements import Requirement

from kfpytorch_ray.doctor import torch_report
from kfpytorch_ray.doctor.torch_report import TorchReport
from kfpytorch_ray.errors import StorageError, text_of
from kfpytorch_ray.storage import Storage

SHARED_MEMORY = "/dev/shm"  # noqa: S108 - it is looked at, nothing is written there

_PACKAGE = "kfpytorch_ray"
_TORCH_TIMEOUT_S = 180.0
_CONFIG_VARIABLE = "FLYTECTL_CONFIG"


@dataclass(frozen=True, slots=True)
class Space:
    """A file system.

    Attributes:
        path: A folder on it.
        total_bytes: Its size.
        free_bytes: What is free for this user.
    """

    path: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Package:
    """A package that ours needs.

    Attributes:
        name: Its name for pip.
        version: What is installed; None if it is not.
        supported: Which versions will do, in pip's words; empty for any.
        fits: Whether ``version`` is one of them.
    """

    name: str
    version: str | None
    supported: str
    fits: bool


@dataclass(frozen=True, slots=True)
class Machine:
    """Facts about a machine; an error is text, empty where there was none.

    Attributes:
        python: Version of the interpreter.
        python_fits: Whether it is supported.
        packages: Those that ours needs, itself first. Of ours the version is None where it is not installed but found
            on the search path.
        job_api_missing: Packages of ``ray[default]`` that are not installed.
        torch: What torch says; None where it cannot be imported.
        torch_error: Why not.
        system: The operating system.
        pidfd: Whether processes can be watched by handle.
        shared_memory: /dev/shm; None where it is not there.
        temporary: The folder for temporary files; None where there is none that can be written.
        temporary_error: Why not.
        open_files: How many files a process may have open.
        hostname: Its name.
        addresses: What the name resolves to.
        flytekit_config: flytekit's config file; None without one.
        flytekit_config_error: Why it cannot be read.
    """

    python: str
    python_fits: bool
    packages: tuple[Package, ...]
    job_api_missing: tuple[str, ...]
    torch: TorchReport | None
    torch_error: str
    system: str
    pidfd: bool
    shared_memory: Space | None
    temporary: Space | None
    temporary_error: str
    open_files: int
    hostname: str
    addresses: tuple[str, ...]
    flytekit_config: str | None
    flytekit_config_error: str


def measure() -> Machine:
    """Look at this machine. Takes as long as importing torch does."""
    torch, torch_error = _torch()
    temporary, temporary_error = temporary_folder()
    config, config_error = _flytekit_config()
    requires_python = _metadata(_PACKAGE, "Requires-Python")
    return Machine(
        python=platform.python_version(),
        python_fits=_fits(requires_python, platform.python_version()),
        packages=_packages(),
        job_api_missing=_missing_of("ray", "default"),
        torch=torch,
        torch_error=torch_error,
        system=platform.system(),
        pidfd=has_pidfd(),
        shared_memory=space(SHARED_MEMORY),
        temporary=temporary,
        temporary_error=temporary_error,
        open_files=open_files(),
        hostname=socket.gethostname(),
        addresses=addresses_of(socket.gethostname()),
        flytekit_config=config,
        flytekit_config_error=config_error,
    )


def space(path: str) -> Space | None:
    """How large the file system of a folder is; None where there is none."""
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return None
    return Space(path, usage.total, usage.free)


def temporary_folder() -> tuple[Space | None, str]:
    """The folder for temporary files, which was written to; or why there is none."""
    try:
        with tempfile.TemporaryFile() as file:
            file.write(b"x")
            file.flush()
        return space(tempfile.gettempdir()), ""
    except OSError as error:
        return None, str(error)


def has_pidfd() -> bool:
    """Whether the kernel gives handles of processes."""
    # From Linux 5.3 on; sandboxes refuse it.
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False
    return True


def open_files() -> int:
    """How many files this process may have open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def boot_id() -> str:
    """The kernel's name for its present run; empty where it has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def addresses_of(hostname: str) -> tuple[str, ...]:
    """What a name resolves to, as gloo asks; nothing where it does not resolve."""
    try:
        found = socket.getaddrinfo(hostname, None, type=socket.SOCK_STREAM)
    except OSError:
        return ()
    return tuple(dict.fromkeys(str(entry[4][0]) for entry in found))


def try_storage(uri: str) -> None:
    """Write, read and remove a small file.

    Raises:
        StorageError: That cannot be done.
    """
    folder = Storage(uri)
    name, content = f"doctor-{uuid.uuid4().hex[:12]}", uuid.uuid4().bytes
    with no_new_folders(folder):
        try:
            folder.write(name, content)
            if folder.read(name) != content:
                msg = f"What was written to {uri}/{name} could not be read again."
                raise StorageError(msg)
        finally:
            with contextlib.suppress(StorageError):
                folder.remove(name)


@contextlib.contextmanager
def no_new_folders(storage: Storage) -> Iterator[None]:
    """Have a local storage that was not there before, and the folders above it, gone again if nothing is in them."""
    made, path = [], storage.prefix
    while "://" not in path and not os.path.exists(path):
        made.append(path)
        path = os.path.dirname(path)
    try:
        yield
    finally:
        for folder in made:
            with contextlib.suppress(OSError):
                os.rmdir(folder)


def _torch() -> tuple[TorchReport | None, str]:
    run = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
    command = [sys.executable, "-c", run, torch_report.__file__]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TORCH_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, str(error)
    try:
        return TorchReport(**json.loads(done.stdout)), ""
    except (ValueError, TypeError):
        lines = done.stderr.strip().splitlines()
        return None, lines[-1] if lines else f"the process that imported it ended with code {done.returncode}"


def _packages() -> tuple[Package, ...]:
    own = Package(_PACKAGE, _metadata(_PACKAGE, "Version") or None, "", fits=True)
    needed = [_package(requirement) for requirement in _requirements(_PACKAGE, extra="")]
    return (own, *needed)


def _package(requirement: Requirement) -> Package:
    version = _metadata(requirement.name, "Version") or None
    supported = str(requirement.specifier)
    return Package(requirement.name, version, supported, fits=version is not None and _fits(supported, version))


def _missing_of(package: str, extra: str) -> tuple[str, ...]:
    named = [requirement.name for requirement in _requirements(package, extra)]
    return tuple(dict.fromkeys(name for name in named if not _metadata(name, "Version")))


def _requirements(package: str, extra: str) -> list[Requirement]:
    try:
        listed = metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return []
    parsed = [Requirement(line) for line in listed]
    return [one for one in parsed if one.marker is None or one.marker.evaluate({"extra": extra})]


def _metadata(package: str, field: str) -> str:
    try:
        # The mapping that says None for what is not there.
        found: Mapping[str, str] = metadata.metadata(package)  # type: ignore[assignment]
    except metadata.PackageNotFoundError:
        return ""
    return found[field] or ""


def _fits(supported: str, version: str) -> bool:
    return not supported or Requirement(f"x{supported}").specifier.contains(version, prereleases=True)


def _flytekit_config() -> tuple[str | None, str]:
    named = os.environ.get(_CONFIG_VARIABLE)
    if named and not Path(named).exists():
        return named, f"the variable {_CONFIG_VARIABLE} names it, and it is not there"
    try:
        found = get_config_file(None)
    except Exception as error:  # noqa: BLE001 - parsers of two formats, each with errors of its own
        return "flytekit's config file", text_of(error)
    if found is None:
        return None, ""
    path = Path(found._location)
    if path.suffix in (".yaml", ".yml") and found.yaml_config is None and path.read_text().strip():
        return str(path), "it is not YAML"
    return str(path), ""
