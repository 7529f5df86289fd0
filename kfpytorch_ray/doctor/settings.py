"""Ray's environment variables: what they say, and where they contradict each other or the command. Shows no token.

Read once into plain facts; what follows from them is pure.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from kfpytorch_ray.doctor.finding import Finding, Level
from kfpytorch_ray.doctor.judgement import loopback

ADDRESS = "RAY_ADDRESS"
API_ADDRESS = "RAY_API_SERVER_ADDRESS"
MODE = "RAY_AUTH_MODE"
TOKEN = "RAY_AUTH_TOKEN"  # noqa: S105 - the name of a variable
TOKEN_PATH = "RAY_AUTH_TOKEN_PATH"  # noqa: S105 - the name of a variable
DEFAULT_TOKEN_PATH = "~/.ray/auth_token"  # noqa: S105 - a path

_HTTP = ("http", "https")


@dataclass(frozen=True, slots=True)
class TokenFile:
    """A file with a token.

    Attributes:
        path: As it was named.
        readable: Whether it is there, can be read and is not empty.
        shared: Whether others on this machine can read it.
    """

    path: str
    readable: bool
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Settings:
    """What the environment says.

    Attributes:
        address: RAY_ADDRESS, or empty.
        api_address: RAY_API_SERVER_ADDRESS, or empty.
        mode: RAY_AUTH_MODE, or empty.
        token: Whether RAY_AUTH_TOKEN is set.
        token_file: Which RAY_AUTH_TOKEN_PATH names; None if it does not.
        default_token_file: Where Ray looks last; None where there is none.
    """

    address: str = ""
    api_address: str = ""
    mode: str = ""
    token: bool = False
    token_file: TokenFile | None = None
    default_token_file: TokenFile | None = None


def read_settings(environment: Mapping[str, str]) -> Settings:
    """Look at the environment, and at the files that it names."""
    named = environment.get(TOKEN_PATH)
    default = _token_file(DEFAULT_TOKEN_PATH)
    return Settings(
        address=environment.get(ADDRESS, ""),
        api_address=environment.get(API_ADDRESS, ""),
        mode=environment.get(MODE, ""),
        token=bool(environment.get(TOKEN)),
        token_file=_token_file(named) if named else None,
        default_token_file=default if default.readable else None,
    )


def _token_file(path: str) -> TokenFile:
    file = Path(path).expanduser()
    try:
        # Only its first byte is read: nobody here needs to know the token.
        with file.open("rb") as opened:
            readable = bool(opened.read(1))
        shared = bool(file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH)) and os.name == "posix"
    except OSError:
        return TokenFile(path, readable=False)
    return TokenFile(path, readable, shared)


def judge_settings(settings: Settings, address: str | None) -> list[Finding]:
    """All that is wrong with the settings; one line that says so where nothing is.

    Args:
        settings: What the environment says.
        address: Which the command was given.
    """
    found = [*_addresses(settings, address), *_tokens(settings, address)]
    return found or [Finding("Ray's settings", Level.OK, _described(settings))]


def _described(settings: Settings) -> str:
    said = [f"{name}={value}" for name, value in _named(settings) if value]
    said += [f"{TOKEN} is set"] if settings.token else []
    said += [f"{TOKEN_PATH}={settings.token_file.path}"] if settings.token_file else []
    return ", ".join(said) or "None of Ray's variables is set."


def _named(settings: Settings) -> tuple[tuple[str, str], ...]:
    return (ADDRESS, settings.address), (API_ADDRESS, settings.api_address), (MODE, settings.mode)


def _addresses(settings: Settings, given: str | None) -> Iterator[Finding]:
    ours, jobs = settings.address, settings.api_address
    if ours.startswith("ray://"):
        yield Finding(
            ADDRESS,
            Level.WARN if given else Level.FAIL,
            f"{ADDRESS}={ours} is one of Ray Client, which cannot drive training.",
            f"export {ADDRESS}=http://HOST:8265, the address of the head's dashboard.",
        )
        return
    if given not in (None, "auto") and ours and _place(ours) != _place(given):
        yield Finding(
            ADDRESS,
            Level.WARN,
            f"{ADDRESS}={ours} is another cluster than {given}. A launch without an address goes to the former.",
            f"unset {ADDRESS}, or export {ADDRESS}={given}",
        )
    if jobs and ours.startswith(_HTTP) and _place(ours) != _place(jobs):
        yield Finding(
            API_ADDRESS,
            Level.WARN,
            f"{API_ADDRESS}={jobs} and {ADDRESS}={ours}: `ray job` goes by the first, kfpytorch_ray by the second.",
            f"unset {API_ADDRESS}",
        )
    elif jobs and not ours and not given:
        yield Finding(
            API_ADDRESS,
            Level.WARN,
            f"{API_ADDRESS} is set and {ADDRESS} is not: `ray job` goes to {jobs}, a launch to a Ray that starts here.",
            f"export {ADDRESS}={jobs}",
        )


def _tokens(settings: Settings, given: str | None) -> Iterator[Finding]:
    file = settings.token_file
    if file is not None and not file.readable and not settings.token:
        yield Finding(
            TOKEN_PATH,
            Level.FAIL,
            f"{TOKEN_PATH}={file.path}: there is no file that can be read, or it is empty.",
            "Write the token there, or unset the variable.",
        )
        return
    sources = [settings.token, file is not None and file.readable]
    has_token = any(sources) or settings.default_token_file is not None
    mode = settings.mode.lower()
    if mode == "token" and not has_token:
        yield Finding(
            MODE,
            Level.FAIL,
            f"{MODE}=token, and there is no token: {TOKEN}, {TOKEN_PATH} and {DEFAULT_TOKEN_PATH} give none.",
            f"Set one of them, or {MODE}=disabled.",
        )
        return
    if any(sources) and mode != "token":
        yield Finding(
            MODE,
            Level.WARN,
            f"There is a token, and {MODE} is {mode or 'not set'}: it is not sent to remote clusters.",
            f"export {MODE}=token, or remove the token's variable.",
        )
    if all(sources):
        yield Finding(
            TOKEN, Level.WARN, f"{TOKEN} and {TOKEN_PATH} are both set; the first wins.", "Unset one of them."
        )
    used = file or settings.default_token_file
    if used is not None and used.shared and not settings.token:
        yield Finding(
            "token file", Level.WARN, f"Others on this machine can read {used.path}.", f"chmod 600 {used.path}"
        )
    if mode == "token" and given and _in_clear(given):
        yield Finding(
            "token",
            Level.WARN,
            f"The token travels unencrypted to {given}.",
            "Use https://, or a tunnel or port-forward to localhost.",
        )


def _in_clear(address: str) -> bool:
    parts = urlsplit(address)
    if parts.scheme != "http" or parts.hostname in (None, "localhost"):
        return False
    try:
        return not loopback([str(parts.hostname)])
    except ValueError:
        return True


def _place(address: str) -> str:
    return address.rstrip("/").lower()
