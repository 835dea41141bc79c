"""Options of ``descant plan``, read before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class PlanRequest:
    """Options of one call of ``descant plan``, and the command that it plans."""

    nodes: int = 1
    gpus_per_node: int = 8
    gpu: str = "h100"
    batch: int | None = None
    save: str | None = None
    picture: str | None = None
    json: str | None = None
    command: list[str] = field(default_factory=list)
