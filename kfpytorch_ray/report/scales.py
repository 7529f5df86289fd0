"""Numbers for people: durations, amounts of memory, and axes that end and divide at round values. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone

_TIME_STEPS_S = (
    *(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800),
    *(3600, 7200, 4 * 3600, 6 * 3600, 12 * 3600, 24 * 3600, 48 * 3600, 7 * 24 * 3600),
)
_MOST_TICKS = 8
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


@dataclass(frozen=True, slots=True)
class Tick:
    """A mark on an axis: how far along it is, in per cent, and what it says."""

    percent: float
    text: str


def duration(seconds: float) -> str:
    """Such as ``0.42 s``, ``12.3 s``, ``3 min 07 s`` or ``2 h 05 min``."""
    if seconds < 9.995:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def memory(size_bytes: float) -> str:
    """Such as ``512 MiB`` or ``1.5 GiB``."""
    index = min(int(math.log(size_bytes, 1024)), len(_UNITS) - 1) if size_bytes >= 1 else 0
    return f"{size_bytes / 1024**index:.3g} {_UNITS[index]}"


def amount(value: float) -> str:
    """A number without more digits than it needs."""
    return f"{value:.4g}"


def moment(at: float) -> str:
    """Date and time of day, in UTC."""
    return datetime.fromtimestamp(at, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def time_ticks(seconds: float) -> tuple[Tick, ...]:
    """Marks on an axis that begins at 0 and is ``seconds`` long."""
    step = next((step for step in _TIME_STEPS_S if seconds / step <= _MOST_TICKS), seconds / _MOST_TICKS)
    if seconds <= 0:
        return (Tick(0.0, "0 s"),)
    return tuple(
        Tick(100 * index * step / seconds, _time_text(index * step)) for index in range(int(seconds / step) + 1)
    )


def top_of(largest: float, *, binary: bool = False) -> float:
    """A round value no smaller than ``largest``, where an axis may end: 1, 2, 3, 4, 5, 6 or 8 times a power.

    Args:
        largest: What the axis has to hold.
        binary: Of 1024, as for bytes, instead of 10.
    """
    if largest <= 0:
        return 1.0
    base = 1024.0 if binary else 10.0
    power = base ** math.floor(math.log(largest, base))
    factors = [2.0**exponent for exponent in range(11)] if binary else [1, 2, 3, 4, 5, 6, 8, 10]
    if binary:
        factors += [3.0, 6.0, 12.0, 24.0, 48.0, 96.0, 192.0, 384.0, 768.0]
    return min(factor * power for factor in factors if factor * power >= largest * 0.9999)


def step_ticks(first: float, last: float) -> tuple[Tick, ...]:
    """Marks at round values on an axis from ``first`` to ``last``: six at most."""
    length = last - first
    if length <= 0:
        return (Tick(0.0, amount(first)),)
    power = 10 ** math.floor(math.log10(length / 5))
    step = next(factor * power for factor in (1, 2, 5, 10) if length / (factor * power) <= 5)
    values = [index * step for index in range(math.ceil(first / step), math.floor(last / step + 1e-9) + 1)]
    return tuple(Tick(100 * (value - first) / length, amount(value)) for value in values)


def value_ticks(bottom: float, top: float, text: Callable[[float], str]) -> tuple[Tick, ...]:
    """Five marks from the bottom to the top of an axis."""
    return tuple(Tick(25.0 * index, text(bottom + (top - bottom) * index / 4)) for index in range(5))


def _time_text(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.4g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d}"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d} h"
