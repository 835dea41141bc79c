"""Parameter groups with and without weight decay, and several optimizers as one (such as Muon + AdamW)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Two groups of named trainable parameters: matrices, and the rest (norms, biases, scalars) without weight decay.

    >>> groups = parameter_groups(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    >>> [[name for name, _ in group["params"]] for group in groups]
    [['0.weight'], ['0.bias', '1.weight', '1.bias']]
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("no parameter takes a gradient: everything is frozen")
    matrices = [(name, p) for name, p in named if p.ndim >= 2]
    others = [(name, p) for name, p in named if p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class Member:
    """One optimizer of an :class:`OptimizerGroup`.

    Args:
        optimizer: class and arguments.
        match: regular expression to search in a parameter's name; the first member that matches takes it.
    """

    def __init__(self, optimizer: Callable[[Iterable[Any]], Optimizer], match: str = "") -> None:
        self.optimizer, self.match = optimizer, re.compile(match)


class _State(MutableMapping[Any, Any]):
    """The members' states as one mapping, delegated to the member that owns the parameter."""

    def __init__(self, members: list[Optimizer]) -> None:
        self._owner = {p: member.state for member in members for group in member.param_groups for p in group["params"]}

    def __getitem__(self, parameter: Any) -> Any:
        return self._owner[parameter][parameter]

    def __setitem__(self, parameter: Any, value: Any) -> None:
        self._owner[parameter][parameter] = value

    def __delitem__(self, parameter: Any) -> None:
        del self._owner[parameter][parameter]

    def __iter__(self) -> Iterator[Any]:
        return (p for p, state in self._owner.items() if p in state)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class OptimizerGroup(Optimizer):
    """Several optimizers as one, each for some parameters, so that automatic optimization counts one step.

    ``param_groups`` are the members' own dictionaries and ``state`` is a view of theirs: schedules, clipping, scalers
    and checkpoints see one optimizer.

    Args:
        params: groups of named parameters, as by :func:`parameter_groups`.
        members: each takes the parameters whose name it matches first.

    Raises:
        ValueError: if a parameter has no member, or a member no parameter.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    >>> group = OptimizerGroup(parameter_groups(net), [Member(lambda p: torch.optim.SGD(p, lr=1.0), "^0"),
    ...                                                Member(torch.optim.AdamW)])
    >>> [g["lr"] for g in group.param_groups]
    [1.0, 1.0, 0.001, 0.001]
    """

    def __init__(self, params: Iterable[dict[str, Any]], members: list[Member]) -> None:
        groups = list(params)
        shares: list[list[dict[str, Any]]] = [[] for _ in members]
        for group in groups:
            split: list[list[tuple[str, Tensor]]] = [[] for _ in members]
            for name, parameter in group["params"]:
                taker = next((k for k, m in enumerate(members) if m.match.search(name)), None)
                if taker is None:
                    raise ValueError(f"no optimizer's `match` takes the parameter {name!r}; add one with match: ''")
                split[taker].append((name, parameter))
            for share, named in zip(shares, split, strict=True):
                if named:
                    share.append({**group, "params": named})
        for member, share in zip(members, shares, strict=True):
            if not share:
                raise ValueError(f"match {member.match.pattern!r} takes no parameter; nothing would be optimized by it")
        self.members = [member.optimizer(share) for member, share in zip(members, shares, strict=True)]
        # for hooks and profiling; groups and state are then replaced by the members'
        super().__init__([{"params": [p]} for m in self.members for g in m.param_groups for p in g["params"]], {})
        self._share()

    def _share(self) -> None:
        self.param_groups = [group for member in self.members for group in member.param_groups]

    @property  # type: ignore[override]  # a view in place of torch's defaultdict
    def state(self) -> MutableMapping[Any, Any]:
        return _State(getattr(self, "members", []))

    @state.setter
    def state(self, value: Any) -> None:
        pass  # the members own their state; Optimizer.__init__ sets an empty one

    def zero_grad(self, set_to_none: bool = True) -> None:
        for member in self.members:
            member.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for member in self.members:
            member.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"members": [member.state_dict() for member in self.members]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved = state_dict.get("members")
        if saved is None or len(saved) != len(self.members):
            count = "one optimizer" if saved is None else f"{len(saved)} optimizers"
            raise ValueError(f"the checkpoint has {count}, this run a group of {len(self.members)}")
        for member, state in zip(self.members, saved, strict=True):
            member.load_state_dict(state)
        self._share()
