"""Configurations of earlier versions in today's form: classes that were merged, and arguments that moved.

Names that were only renamed are in ``renamed.py``; here are the classes whose arguments moved.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Node = dict[str, Any]

#: Training arguments of every recipe: they stay with a recipe that wraps another.
TRAINING = ("optimizer", "schedule", "mix", "chunks", "adapt", "checkpointing", "compile", "shard", "distill")


def upgrade(value: Any, notice: Callable[[str], None] = lambda _: None) -> Any:
    """The same configuration, with classes of earlier versions in today's form.

    Args:
        value: of plain dicts, lists and scalars. notice: called with one line for each class that changed.

    >>> old = {"class_path": "Reinforced", "init_args": {"lm": 1, "loss": {"class_path": "PolicyLoss"}}}
    >>> upgrade(old)["init_args"]["objective"]
    {'class_path': 'GRPO', 'init_args': {'loss': {'class_path': 'PolicyLoss'}}}
    """
    if isinstance(value, list):
        return [upgrade(item, notice) for item in value]
    if not isinstance(value, Mapping):
        return value
    node = copy.copy(value) if isinstance(value, dict) else dict(value)  # a subclass keeps what it holds beside
    for key, item in value.items():
        node[key] = upgrade(item, notice)
    name = node.get("class_path")
    change = CHANGES.get(name.rpartition(".")[2]) if isinstance(name, str) else None
    if change is None or not isinstance(node.get("init_args", {}), Mapping | None):
        return node
    changed = change({**node, "init_args": dict(node.get("init_args") or {})})
    if changed is None:
        return node
    before, now = (str(one["class_path"]).rpartition(".")[2] for one in (node, changed))
    added = ", ".join(changed.get("init_args", {}).keys() - (node.get("init_args") or {}).keys())
    notice(f"{before} is now {now}" + (f" with {added}" if before == now else ""))
    node.clear()
    node.update(changed)
    return node


def _objective(node: Node) -> Node | None:
    """``loss`` of a stage's objective: that of DPO is the objective's own arguments now."""
    if node["class_path"].rpartition(".")[2] == "Prefer":
        loss = node["init_args"].get("loss") or {}
        return _made("DPO", loss.get("init_args") if isinstance(loss, Mapping) else {})
    return _made("GRPO" if node["class_path"].rpartition(".")[2] == "Reinforce" else "SFT", node["init_args"])


def _model(node: Node) -> Node:
    last, args = node["class_path"].rpartition(".")[2], node["init_args"]
    loss = args.pop("loss", None)
    if last == "Reinforced":
        args["objective"] = _made("GRPO", {"loss": loss} if loss else {})
    elif last == "Preferred":
        args["objective"] = _made("DPO", (loss.get("init_args") if isinstance(loss, Mapping) else None) or {})
    return {**node, "class_path": "descant.recipes.VisionLanguage", "init_args": args}


def _staged(node: Node) -> Node | None:
    args = node["init_args"]
    if "recipe" in args or not set(args) - {"stages", *TRAINING}:
        return None
    outer = {key: args.pop(key) for key in list(args) if key in ("stages", *TRAINING)}
    loss = args.pop("loss", None)
    for stage in (outer.get("stages") or {}).values():
        options = (stage.get("init_args") or {}) if isinstance(stage, Mapping) else {}
        objective = options.get("objective", options.get("learns"))  # arguments are renamed afterwards
        if loss and isinstance(objective, dict) and objective["class_path"] == "GRPO":
            objective.setdefault("init_args", {}).setdefault("loss", loss)
    inner = {"class_path": "descant.recipes.VisionLanguage", "init_args": args}
    return {**node, "init_args": {**outer, "recipe": inner}}


def _made(name: str, args: Mapping[str, Any] | None) -> Node:
    return {"class_path": name, **({"init_args": dict(args)} if args else {})}


CHANGES: dict[str, Callable[[Node], Node | None]] = {
    "Chat": _model,
    "Reinforced": _model,
    "Preferred": _model,
    "Imitate": _objective,
    "Reinforce": _objective,
    "Prefer": _objective,
    "Staged": _staged,
}


def with_inner(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a staged run by the names that they have now: those of earlier versions had no ``inner.``."""
    average = "distill.teacher.average."

    def now(name: str) -> str:
        if name.startswith(average) and not name.startswith(f"{average}inner."):
            return f"{average}inner.{name.removeprefix(average)}"
        return name if name.startswith(("inner.", "distill.")) else f"inner.{name}"

    return {now(name): value for name, value in state.items()}
