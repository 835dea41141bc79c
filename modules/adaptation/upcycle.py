"""Changes from dense layers to sparse experts and back: upcycling, assembly from several models, and distribution."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

from torch import nn

from descant.modules.adaptation.base import LM, Adapt, innermost, select_towers
from descant.modules.adaptation.expert_weights import PARTS, State, plan_conversion
from descant.modules.adaptation.growth import Growth
from descant.modules.adaptation.stage_changes import Boundary, StageChange, left_by
from descant.modules.core.objects import describe_object
from descant.modules.core.rng import global_seed, mix, seeding
from descant.modules.io import saved
from descant.modules.io.lean import complete_state
from descant.modules.moe import ExpertLayers


class _Converting(StageChange, Adapt):
    """Base of changes between dense layers and experts: in towers by name, by default in all that may have experts."""

    structural = True

    def __init__(self, towers: list[str] | None = None) -> None:
        self.towers = towers

    def change(self, place: str, tower: nn.Module, seed: int, weights: Mapping[str, State] | None) -> Growth | None:
        """Plan the change of the tower that is the module ``place``, from these earlier weights; None: any weights."""
        raise NotImplementedError

    def require(self, recipe: nn.Module) -> None:
        """Raise ValueError, before training, for changes that ``apply`` would refuse."""
        self._changes(recipe, 0, None)

    def apply(  # type: ignore[override]  # an Adapt's return value is not read
        self, recipe: nn.Module, boundary: Boundary | None = None
    ) -> Mapping[str, Growth]:
        at = boundary or Boundary("adapt", {}, mix(global_seed(), "adapt"))
        return self._make(recipe, at.seed, at.weights)

    def rebuild(self, recipe: nn.Module, seed: int) -> Mapping[str, Growth]:
        return self._make(recipe, seed, None)

    def _changes(
        self, recipe: nn.Module, seed: int, weights: Mapping[str, State] | None
    ) -> dict[str, tuple[nn.Module, Growth]]:
        owner, changes = type(self).__name__, dict[str, tuple[nn.Module, Growth]]()
        recipe = innermost(recipe)
        if getattr(recipe, "sharded", False):
            raise ValueError(f"{owner}: parameters that are split over ranks (shard) cannot change")
        places = {module: name for name, module in recipe.named_modules()}
        towers = select_towers(recipe, self.towers, LM)
        if self.towers is None:
            towers = [(name, tower) for name, tower in towers if "experts" in getattr(tower, "arguments", {})]
        if not towers:
            raise ValueError(f"{owner}: no tower to change; Trunk and CausalLM may have experts")
        for name, tower in towers:
            try:
                with seeding(seed, "experts", places[tower]):
                    change = self.change(places[tower], tower, seed, weights)
            except ValueError as error:
                raise ValueError(f"{owner}: tower {name}: {error}") from None
            if change is not None:
                changes[places[tower]] = tower, change
        return changes

    def _make(self, recipe: nn.Module, seed: int, weights: Mapping[str, State] | None) -> Mapping[str, Growth]:
        changes = self._changes(recipe, seed, weights)
        for tower, change in changes.values():
            change.apply(tower)
        return {place: change for place, (_, change) in changes.items()}


class Upcycle(_Converting):
    """Sparse experts instead of dense layers; each expert starts with the weights of the dense layer.

        FFN_e = FFN,   so that  sum_k w_k FFN_(e_k)(h) = FFN(h)  if  sum_k w_k = 1

    Outputs stay as they are, except for rounding. Gates are fresh; all other weights stay. Use it in ``begin`` of a
    stage, or in ``adapt`` after Begin, which loads the dense model. A capacity still drops tokens in training.

    Source: sparse upcycling (Komatsuzaki 2023, arXiv 2212.05055), without its noise unless asked; our reading: noise on
    the matrices of each expert, ``W_e = W + noise std(W) N(0, 1)``.

    Args:
        experts: the layers, their number of experts and their router, whose weights have to sum to 1.
        towers: names of the towers to change, ``lm`` for the language model; by default all that may have experts.
        noise: noise relative to the spread of each matrix; by default none.

    >>> from descant.modules.language import CausalLM
    >>> from descant.modules.moe import TopKRouter
    >>> recipe = nn.Module()
    >>> recipe.lm = CausalLM(vocab=9, width=8, depth=2, heads=2)
    >>> change = Upcycle(ExpertLayers(experts=4, router=TopKRouter(k=2), every=2)).apply(recipe)
    >>> [layer.moe is not None for layer in recipe.lm.layers], recipe.lm.layers[1].moe.experts.down.shape
    ([False, True], torch.Size([4, 8, 24]))
    """

    def __init__(self, experts: ExpertLayers, towers: list[str] | None = None, noise: float | None = None) -> None:
        super().__init__(towers)
        owner = type(self).__name__
        if not experts.router.sums_to_one:
            what = f"experts.router {type(experts.router).__name__}: weights of a token's experts do not sum to 1"
            raise ValueError(f"{owner}: {what}, so outputs would change; such as TopKRouter with norm after")
        if experts.shared is not None:
            raise ValueError(f"{owner}: experts.shared {experts.shared}: they add to the output; leave it out")
        if noise is not None and not noise > 0:
            raise ValueError(f"{owner}: noise {noise:g}: above 0, such as 0.01, or none")
        describe_object(experts)  # fail now, and not when a checkpoint is written
        self.experts, self.noise = experts, noise

    def sources(self, place: str, tower: nn.Module, weights: Mapping[str, State]) -> dict[str, Any]:
        """Return the sources of weights that are not the tower's own."""
        return {}

    def change(self, place: str, tower: nn.Module, seed: int, weights: Mapping[str, State] | None) -> Growth | None:
        if getattr(tower, "experts", None) is not None:
            raise ValueError("it has experts already; Distribute makes its layers dense")
        sources = {} if weights is None else self.sources(place, tower, weights)
        return plan_conversion(tower, self.experts, noise=self.noise, seed=mix(seed, place), **sources)


class Assemble(Upcycle):
    """Sparse experts, each with the dense layers of another model of the same sizes (Uni-MoE).

        FFN_e = FFN of paths[e], or of the weights that stages[e] left

    All other weights stay: put Begin before it, which loads those of one of the models, or Rewind.

    Source: Uni-MoE (Li 2024, arXiv 2405.11273): experts that were trained on one modality each, then together.

    Args:
        experts: as in Upcycle; one expert for each path or stage.
        paths: for each expert a run folder, a checkpoint in one, or the folder of all runs of a name (the latest).
        stages: instead of paths: for each expert an earlier stage of the run, whose steps then count as the run's.
        towers: as in Upcycle.
        checkpoint: best (by the run's monitor; else the last), last, or a file.
        sham: ``permute`` deals each hidden unit of a layer to a random expert: the same numbers, but no expert has
            those of one model.
    """

    def __init__(
        self,
        experts: ExpertLayers,
        paths: list[str] | None = None,
        stages: list[str] | None = None,
        towers: list[str] | None = None,
        checkpoint: str = "best",
        sham: Literal["permute"] | None = None,
    ) -> None:
        super().__init__(experts, towers)
        if (paths is None) == (stages is None):
            raise ValueError("Assemble: paths, stages: one of the two")
        count = len(paths or stages or ())
        if count != experts.experts:
            raise ValueError(f"Assemble: {count} paths or stages, and {experts.experts} experts; one for each")
        self.paths, self.stages, self.checkpoint, self.sham = paths or [], stages or [], checkpoint, sham
        self.reads = frozenset(map(left_by, self.stages))

    def sources(self, place: str, tower: nn.Module, weights: Mapping[str, State]) -> dict[str, Any]:
        runs = {f"paths[{n}]": self._of_run(path, place, tower) for n, path in enumerate(self.paths)}
        sources = runs | {stage: saved.part_of(weights.get(left_by(stage), {}), f"{place}.") for stage in self.stages}
        for source, state in sources.items():
            for name, here in tower.state_dict().items():
                there = list(state[name].shape) if name in state else "nothing"
                if name.endswith(tuple(f".{dense}" for dense, _ in PARTS.values())) and there != list(here.shape):
                    raise ValueError(f"{source}: {place}.{name} is {there} there and {list(here.shape)} here")
        return {"sources": list(sources.values()), "deal": self.sham is not None}

    def _of_run(self, path: Path | str, place: str, tower: nn.Module) -> State:
        state = saved.read_weights(saved.find(path, self.checkpoint))
        return complete_state(saved.part_of(state, f"{place}."), tower)


class Distribute(_Converting):
    """Dense layers instead of sparse experts, with the weights of one expert or with their mean.

        FFN = FFN_e   or   FFN = 1 / E sum_e FFN_e (of the weights)

    A model with experts thus becomes a dense one. Outputs change, unless all experts are equal.

    Args:
        expert: its number; by default the mean of all.
        towers: names of the towers to change, ``lm`` for the language model; by default all that have experts.
    """

    def __init__(self, expert: int | None = None, towers: list[str] | None = None) -> None:
        super().__init__(towers)
        if expert is not None and expert < 0:
            raise ValueError(f"Distribute: expert {expert}: 0 is the first")
        self.expert = expert

    def change(self, place: str, tower: nn.Module, seed: int, weights: Mapping[str, State] | None) -> Growth | None:
        experts = cast("ExpertLayers | None", getattr(tower, "experts", None))
        if experts is None:
            if weights is not None:
                raise ValueError("it has no experts")
            return None  # an earlier stage will bring them
        if experts.shared is not None:
            raise ValueError(f"experts.shared {experts.shared}: no dense layer is their sum")
        if self.expert is not None and self.expert >= experts.experts:
            raise ValueError(f"expert {self.expert}: there are 0 to {experts.experts - 1}")
        return plan_conversion(tower, None, expert=self.expert)
