"""What the facts about this machine mean for launches. Pure: facts in, findings out."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator

from kfpytorch_ray.doctor.finding import Finding, Level
from kfpytorch_ray.doctor.machine import SHARED_MEMORY, Machine, Package, Space

LOWEST_FREE_BYTES = 2**30
"""Results are taken home by the temporary folder, and Ray keeps its sockets and logs there."""

LOWEST_SHARED_BYTES = 2**30
"""Far above the 64 MiB of a container without --shm-size, far below what any machine gives itself."""

LOWEST_OPEN_FILES = 4096
"""Ray itself warns below: every worker and every object in use costs some."""

_NEEDED_FOR_JOB_API = ("aiohttp", "pydantic")


def judge(machine: Machine, *, is_node: bool) -> list[Finding]:
    """All that can be said of a machine.

    Args:
        machine: Its facts.
        is_node: Whether it runs agents, now or in this call, instead of only sending launches away.
    """
    return [
        judge_system(machine.system, pidfd=machine.pidfd),
        judge_python(machine),
        judge_packages(machine.packages),
        judge_job_api(machine.job_api_missing),
        *judge_torch(machine),
        judge_shared_memory(machine.shared_memory),
        judge_temporary(machine.temporary, machine.temporary_error),
        judge_open_files(machine.open_files),
        judge_hostname(machine.hostname, machine.addresses, is_node=is_node),
        *judge_flytekit_config(machine.flytekit_config, machine.flytekit_config_error),
    ]


def judge_system(system: str, *, pidfd: bool) -> Finding:
    """The operating system."""
    if system != "Linux":
        return Finding(
            "system",
            Level.WARN,
            f"{system} runs no agents: only Linux has handles of processes. Launches can be sent to a cluster.",
            "Name a cluster: RayBackend(address='http://HOST:8265', storage=...).",
        )
    if not pidfd:
        return Finding(
            "system",
            Level.FAIL,
            "Linux without pidfd_open, by which agents watch their workers.",
            "Use a kernel of 5.3 or newer, and a sandbox or seccomp profile that allows pidfd_open.",
        )
    return Finding("system", Level.OK, "Linux, with handles of processes (pidfd).")


def judge_python(machine: Machine) -> Finding:
    """The interpreter."""
    if not machine.python_fits:
        return Finding("python", Level.FAIL, f"Python {machine.python} is not supported.", "Use Python 3.10 or newer.")
    return Finding("python", Level.OK, f"Python {machine.python}")


def judge_packages(packages: tuple[Package, ...]) -> Finding:
    """What is installed against what is supported."""
    own, *needed = packages
    if own.version is None:
        return Finding(
            "packages",
            Level.WARN,
            f"{own.name} is found on the search path but not installed, so nobody knows which versions it needs.",
            f"Install it: pip install {own.name}",
        )
    wrong = [package for package in needed if not package.fits]
    if wrong:
        said = ", ".join(
            f"{one.name} is {one.version or 'not installed'} and has to be {one.supported}" for one in wrong
        )
        wanted = " ".join(f"'{one.name}{one.supported}'" for one in wrong)
        return Finding("packages", Level.FAIL, f"{said}.", f"pip install {wanted}")
    return Finding("packages", Level.OK, ", ".join(f"{one.name} {one.version}" for one in packages))


def judge_job_api(missing: tuple[str, ...]) -> Finding:
    """Whether Ray's job API can be used from here."""
    if not missing:
        return Finding("job API", Level.OK, "ray[default] is installed, so that remote clusters can be reached.")
    needed = any(name in _NEEDED_FOR_JOB_API for name in missing)
    return Finding(
        "job API",
        Level.FAIL if needed else Level.WARN,
        f"ray[default] is not complete: {', '.join(missing)} missing. "
        + ("No remote cluster can be reached." if needed else "A head that is started here has no job API."),
        "pip install 'ray[default]'",
    )


def judge_torch(machine: Machine) -> Iterator[Finding]:
    """Torch, and what its ranks talk by."""
    torch = machine.torch
    if torch is None:
        yield Finding(
            "torch",
            Level.FAIL,
            f"torch cannot be imported: {machine.torch_error}",
            "Install a build that fits this machine, see pytorch.org/get-started: pip install torch",
        )
        return
    build = f"CUDA {torch.cuda}" if torch.cuda else "CPU only"
    if not torch.gloo:
        yield Finding(
            "torch",
            Level.FAIL,
            f"torch {torch.version} ({build}) is built without gloo, by which ranks on CPUs talk.",
            "Install a build that has it: pip install torch",
        )
    elif torch.devices and not torch.nccl:
        yield Finding(
            "torch",
            Level.FAIL,
            f"torch {torch.version} ({build}) sees {torch.devices} GPU(s), and is built without NCCL.",
            "Install a build that has it: pip install torch",
        )
    else:
        talks = "gloo and NCCL" if torch.nccl else "gloo"
        devices = f", {torch.devices} GPU(s)" if torch.cuda else ""
        yield Finding("torch", Level.OK, f"torch {torch.version} ({build}{devices}), with {talks}")


def judge_shared_memory(shared: Space | None) -> Finding:
    """Shared memory as such; what a Ray node needs of it is the cluster's matter."""
    fix = "Give a container more: docker run --shm-size=8g, or on Kubernetes an emptyDir with medium: Memory there."
    if shared is None:
        return Finding(SHARED_MEMORY, Level.WARN, "It is not there: data loaders with workers will fail.", fix)
    size = f"{gib(shared.total_bytes)}, {gib(shared.free_bytes)} free"
    if shared.total_bytes < LOWEST_SHARED_BYTES:
        return Finding(
            SHARED_MEMORY,
            Level.WARN,
            f"{size}: too small for data loaders with workers and for Ray's object store.",
            fix,
        )
    return Finding(SHARED_MEMORY, Level.OK, size)


def judge_temporary(temporary: Space | None, error: str) -> Finding:
    """The folder for temporary files."""
    fix = "Make room there, or name another folder: TMPDIR."
    if temporary is None:
        return Finding("temporary folder", Level.FAIL, f"It cannot be written: {error}", fix)
    said = f"{temporary.path}, {gib(temporary.free_bytes)} free"
    if temporary.free_bytes < LOWEST_FREE_BYTES:
        return Finding(
            "temporary folder",
            Level.WARN,
            f"{said}: results pass through it, and Ray's logs and sockets lie there.",
            fix,
        )
    return Finding("temporary folder", Level.OK, said)


def judge_open_files(limit: int) -> Finding:
    """``ulimit -n``."""
    said = "no limit" if limit < 0 else f"{limit} open files for a process"
    if 0 <= limit < LOWEST_OPEN_FILES:
        return Finding(
            "ulimit -n",
            Level.WARN,
            f"{said}: Ray and data loaders run out of them under load.",
            "ulimit -n 65535, or in a container the runtime's limit (docker run --ulimit nofile=65535).",
        )
    return Finding("ulimit -n", Level.OK, said)


def judge_hostname(hostname: str, addresses: tuple[str, ...], *, is_node: bool) -> Finding:
    """Whether other nodes can reach what this machine's name resolves to: gloo offers them that address."""
    fix = "Name the interface, RayBackend(env={'GLOO_SOCKET_IFNAME': 'eth0'}), or mend /etc/hosts."
    level = Level.WARN if is_node else Level.OK
    matters = "" if is_node else " It would matter if this machine were a node."
    if not addresses:
        return Finding(
            "host name",
            level,
            f"{hostname} does not resolve, and gloo guesses the address that it offers to other nodes.{matters}",
            fix if is_node else "",
        )
    if loopback(addresses):
        return Finding(
            "host name",
            level,
            f"{hostname} resolves to {', '.join(addresses)}: gloo offers other nodes an address that is their own."
            f"{matters}",
            fix if is_node else "",
        )
    return Finding("host name", Level.OK, f"{hostname} is {', '.join(addresses)}")


def judge_flytekit_config(path: str | None, error: str) -> Iterator[Finding]:
    """flytekit's config file, where there is one."""
    if path is None:
        return
    if error:
        yield Finding(
            "flytekit config",
            Level.WARN,
            f"{path} is not used: {error}.",
            "Mend it, or name another: FLYTECTL_CONFIG.",
        )
    else:
        yield Finding("flytekit config", Level.OK, path)


def loopback(addresses: Iterable[str]) -> bool:
    """Whether all of these addresses mean the machine itself."""
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses)


def gib(size_bytes: float) -> str:
    """A size for people."""
    if size_bytes < 2**30:
        return f"{size_bytes / 2**20:.0f} MiB"
    return f"{size_bytes / 2**30:.1f} GiB"
