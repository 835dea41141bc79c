"""Parameter groups with and without weight decay, and several optimizers as one (such as Muon + AdamW)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from descant.modules.adaptation.quantize import require_trained
from descant.modules.training_setup.parameter_rules import ParameterRule
from descant.modules.training_setup.schedule import Schedule
from descant.modules.training_setup.trainer import end_of_run


class Groups(list[dict[str, Any]]):
    """Parameter groups as an optimizer takes them, and ``owners``: name of a parameter -> the module that owns it."""

    owners: dict[str, nn.Module]


def parameter_groups(module: nn.Module) -> Groups:
    """Group named trainable parameters: matrices, and the rest (norms, biases, scalars) without weight decay.

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
    made = Groups(group for group in groups if group["params"])
    made.owners = {name: module.get_submodule(name.rpartition(".")[0]) for name, _ in named}
    return made


def make_optimizer(make: Callable[[Any], Optimizer], module: nn.Module) -> Optimizer:
    """Make an optimizer of a module's trainable parameters; one that averages weights begins in its training mode."""
    optimizer = make(parameter_groups(module))
    for member in averaging(optimizer):
        member.train()
    return optimizer


@dataclass
class Optimization:
    """Optimizer of a run or of one stage: class and arguments; and the schedule of its learning rate, if it has one."""

    optimizer: Callable[[Any], Optimizer]
    schedule: Schedule | None = None

    def configure(self, recipe: Any, steps: int | None = None) -> Any:
        """Return what Lightning takes from ``configure_optimizers``: the optimizer, with its schedule if it has one.

        Args:
            recipe: in training. steps: steps over which the schedule runs; by default those of the run. Collective.
        """
        optimizer = make_optimizer(self.optimizer, recipe)
        require_trained(recipe)
        require_evaluated(optimizer, recipe.trainer.callbacks if recipe._trainer is not None else [])
        if self.schedule is None:
            return optimizer
        steps = end_of_run(recipe.trainer) if steps is None else steps
        config = {"scheduler": self.schedule(optimizer, steps), "interval": self.schedule.interval}
        if self.schedule.monitor is not None:
            config["monitor"] = self.schedule.monitor
        return {"optimizer": optimizer, "lr_scheduler": config}


def averaging(optimizer: Optimizer) -> list[Any]:
    """List the optimizer or its members that average weights (schedule-free, with ``train()`` and ``eval()``)."""
    return [one for one in getattr(optimizer, "members", [optimizer]) if hasattr(one, "eval")]


def require_evaluated(optimizer: Optimizer, callbacks: Iterable[Any]) -> None:
    """Raise ValueError for an optimizer that averages weights if no callback evaluates the average."""
    if averaging(optimizer) and not any(getattr(callback, "evaluates_average", False) for callback in callbacks):
        name = type(averaging(optimizer)[0]).__name__
        raise ValueError(
            f"model.optimizer {name}: its average of the weights would not be evaluated; add the callback ScheduleFree "
            "(with/train/schedule-free)"
        )


class Member:
    """One optimizer of an :class:`OptimizerGroup`.

    Args:
        optimizer: class and arguments.
        match: regular expression to search in a parameter's name; the first member that matches takes it.
        rule: a further condition, such as HiddenMatrices for Muon.
    """

    def __init__(
        self,
        optimizer: Callable[[Iterable[Any]], Optimizer],
        match: str = "",
        rule: ParameterRule | None = None,
    ) -> None:
        self.optimizer, self.match, self.rule = optimizer, re.compile(match), rule

    def takes(self, name: str, parameter: Tensor, owners: dict[str, nn.Module] | None) -> bool:
        """Whether it takes a parameter that no earlier member takes."""
        if not self.match.search(name):
            return False
        if self.rule is None:
            return True
        if owners is None:
            raise ValueError(
                f"{type(self.rule).__name__} reads the modules of parameters: pass parameter_groups(module)"
            )
        return self.rule.takes(name, parameter, owners[name])


@dataclass(frozen=True)
class Share:
    """Share of one member of an :class:`OptimizerGroup`: its class, and the names and sizes of its tensors."""

    optimizer: str
    sizes: dict[str, int]

    def __str__(self) -> str:
        return f"{self.optimizer}: {len(self.sizes):,} tensors, {sum(self.sizes.values()):,} parameters"


class _State(MutableMapping[Any, Any]):
    """The members' states as one mapping; each access goes to the member that owns the parameter."""

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
    and checkpoints see one optimizer. ``state_dict`` has torch's layout, with parameters numbered through all members,
    so that parameters split over ranks (FSDP2) are saved and resumed, too. ``shares`` lists what each member takes.

    Args:
        params: groups of named parameters, as made by :func:`parameter_groups`.
        members: a parameter goes to the first member whose ``match`` and ``rule`` take it.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    >>> group = OptimizerGroup(parameter_groups(net), [Member(lambda p: torch.optim.SGD(p, lr=1.0), "^0"),
    ...                                                Member(torch.optim.AdamW)])
    >>> [g["lr"] for g in group.param_groups]
    [1.0, 1.0, 0.001, 0.001]
    >>> [str(share) for share in group.shares]
    ['SGD: 2 tensors, 6 parameters', 'AdamW: 2 tensors, 3 parameters']
    """

    def __init__(self, params: Iterable[dict[str, Any]], members: list[Member]) -> None:
        owners = getattr(params, "owners", None)
        groups = list(params)
        shares: list[list[dict[str, Any]]] = [[] for _ in members]
        for group in groups:
            split: list[list[tuple[str, Tensor]]] = [[] for _ in members]
            for name, parameter in group["params"]:
                taker = next((k for k, m in enumerate(members) if m.takes(name, parameter, owners)), None)
                if taker is None:
                    hint = "add a last one with neither match nor rule"
                    raise ValueError(f"no optimizer's `match` takes the parameter {name!r}; {hint}")
                split[taker].append((name, parameter))
            for share, named in zip(shares, split, strict=True):
                if named:
                    share.append({**group, "params": named})
        for member, share in zip(members, shares, strict=True):
            if not share:
                rule = f" with rule {type(member.rule).__name__}" if member.rule is not None else ""
                what = f"match {member.match.pattern!r}{rule}"
                raise ValueError(f"{what} takes no parameter; nothing would be optimized by it")
        sizes = [{name: p.numel() for group in share for name, p in group["params"]} for share in shares]
        self.members = [member.optimizer(share) for member, share in zip(members, shares, strict=True)]
        self.shares = [Share(type(one).__name__, of) for one, of in zip(self.members, sizes, strict=True)]
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
        state: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        for member in self.members:
            first, own = sum(len(group["params"]) for group in groups), member.state_dict()
            state |= {first + k: value for k, value in own["state"].items()}
            groups += [{**group, "params": [first + k for k in group["params"]]} for group in own["param_groups"]]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for member, state in zip(self.members, self._states(state_dict), strict=True):
            member.load_state_dict(state)
        self._share()

    def _states(self, state_dict: dict[str, Any]) -> list[dict[str, Any]]:
        """Split a state dict into those of the members."""
        groups = state_dict["param_groups"]
        sizes, own = ([len(group["params"]) for group in some] for some in (groups, self.param_groups))
        if sizes != own:
            raise ValueError(
                f"the checkpoint's optimizer has groups of {_counts(sizes)} tensors, this run's of {_counts(own)}: "
                "resume with the optimizer that it was saved with"
            )
        parts, state = [], state_dict["state"]
        for member in self.members:
            share, groups = groups[: len(member.param_groups)], groups[len(member.param_groups) :]
            # parameters are numbered, or named if ranks have parts of them
            keys = {key for group in share for key in group["params"]}
            parts.append({"state": {key: state[key] for key in state if key in keys}, "param_groups": share})
        return parts


def _counts(sizes: list[int]) -> str:
    return " + ".join(map(str, sizes))
