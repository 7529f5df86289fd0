"""What bounds a launch, and what it has spent: plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Budgets:
    """What a launch may spend: restarts for failed ranks, and lost agents and nodes."""

    max_restarts: int
    max_node_failures: int


@dataclass(frozen=True, slots=True)
class Spent:
    """What a launch has spent."""

    restarts: int = 0
    node_failures: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a launch.

    Attributes:
        min_nodes: Fewest nodes to train with.
        max_nodes: Most nodes to train with.
        budgets: Restarts and lost nodes.
        join_timeout_s: Longest wait for the fewest nodes.
        arrival_window_s: Longest wait for more nodes that are on their way once the fewest are there.
        deadline_s: Longest time for all rounds; None without one.
        checkpoint_grace_s: For ranks that ask ``stop_requested()``, when nodes change.
        grow_cooldown_s: Shortest round that is ended because more nodes arrived.
        hang_timeout_s: Longest time without progress of any rank; None without one.
    """

    min_nodes: int
    max_nodes: int
    budgets: Budgets
    join_timeout_s: float
    arrival_window_s: float
    deadline_s: float | None
    checkpoint_grace_s: float
    grow_cooldown_s: float
    hang_timeout_s: float | None
