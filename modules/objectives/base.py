"""Task objectives of :class:`descant.recipes.MultiTask`: what each reads of the shared streams, and its terms.

Letters: B samples, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from torch import Tensor, nn

from descant.modules.core.batch import Batch
from descant.modules.core.capabilities import has
from descant.modules.core.errors import no_such
from descant.modules.core.objective import Term
from descant.modules.core.output import Decisions, Scorer
from descant.modules.core.protocols import Encodes, HidesCells, ReconstructionOutput
from descant.modules.masking.corruptions import Masks
from descant.modules.towers.base import Tower

if TYPE_CHECKING:
    from descant.modules.objectives.streams import Streams


class Facts(NamedTuple):
    """What an objective is built for: towers by modality, the width of the shared space, that of the fusion layers.

    ``fusion``: None where there are no fusion layers.
    """

    towers: Mapping[str, Tower]
    width: int
    fusion: int | None

    def require(self, modalities: Iterable[str]) -> None:
        """Raises ValueError for a modality without a tower."""
        for m in modalities:
            if m not in self.towers:
                raise ValueError(f"{m!r}: {no_such(m, self.towers)}")

    def fused(self, a: str, b: str) -> int:
        """Width of fused tokens. Raises ValueError for the same modality twice, or without fusion layers."""
        self.require((a, b))
        if a == b:
            raise ValueError(f"{a} with {b}: two modalities are fused")
        if self.fusion is None:
            raise ValueError(f"needs {a} and {b} fused, and no layers do; give model.fusion: FusionLayers")
        return self.fusion

    def maskable(self, modality: str) -> None:
        """Raises ValueError for a tower whose tokens cannot be hidden between its ``embed`` and ``encode``."""
        if hasattr(self.towers[modality], "places"):  # of each sample
            return
        tower = self.towers[modality]
        if not has(tower, Encodes) or not hasattr(tower, "positions_TD"):
            able = "MaskedColumns hides" if has(tower, HidesCells) else "PatchTower and TextTower"
            able += " its columns" if has(tower, HidesCells) else " can"
            raise ValueError(f"tower {modality}: {type(tower).__name__} cannot hide tokens; {able}")


class TaskObjective(nn.Module):
    """Base of objectives over shared streams: ``objective(streams, batch) -> {part: Term}``, one named "" or several.

    ``build`` makes the layers and sets what the recipe has to know:

    Attributes:
        reads: modalities whose towers it needs.
        latents: part -> modalities whose embedding ``z`` has a gradient of that part's term.
        pools: modalities whose pooled features it reads, whatever the embedding is.
        fuses: pairs of modalities whose tokens it needs fused.
        hidden: modalities of which it hides tokens.
        hiding: what :meth:`hides` depends on beside the batch; objectives where it is equal share their streams.
        in_batch_negatives: whether samples of a batch are contrasted.
        momentum: decay of the average of the recipe's weights that teaches it; None where nothing does.
    """

    in_batch_negatives = False
    momentum: float | None = None

    def __init__(self) -> None:
        super().__init__()
        self.reads: tuple[str, ...] = ()
        self.latents: dict[str, tuple[str, ...]] = {}
        self.pools: tuple[str, ...] = ()
        self.fuses: tuple[tuple[str, str], ...] = ()
        self.hidden: tuple[str, ...] = ()
        self.hiding: Hashable = None

    @property
    def replaced(self) -> tuple[str, ...]:
        """The modalities whose hidden tokens are replaced by a learned one: all that it hides."""
        return self.hidden

    def build(self, facts: Facts) -> Self:
        """Raises ValueError for an unknown modality, or a stream that is not made."""
        raise NotImplementedError

    def require_data(self, data: Any, training: bool) -> None:
        """Raises ValueError for data that it cannot be trained, or judged, on."""

    def require_samples(self, samples: float) -> None:
        """Raises ValueError for a number of training samples that it cannot be trained on."""

    def hides(self, batch: Batch) -> Masks | None:
        """The tokens that are hidden in the streams that it asks for with ``streams.masks``; none by default."""
        return None

    def forward(self, streams: Streams, batch: Batch) -> dict[str, Term]:
        raise NotImplementedError

    def scores(self, streams: Streams, batch: Batch) -> dict[str, Term]:
        """Quality numbers in evaluation by name; those of losses begin with ``loss``."""
        return {}

    def answers(self, streams: Streams, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """What it predicts of a target of the data: ``logits``, target -> ``[B, C]``, or ``numbers``, target -> ``[B]``
        in its own unit; nan in rows without what it reads."""
        return {}

    def decisions(self, streams: Streams) -> Callable[[], Decisions] | None:
        """Makes the decisions that soft labels are compared at; None for an objective without any."""
        return None

    def reconstruct(self, streams: Streams, batch: Batch) -> dict[str, ReconstructionOutput]:
        """What it rebuilds, by modality."""
        return {}

    def scorers(self, streams: Streams) -> dict[str, Scorer]:
        """Part -> how well rows of one modality match rows of another."""
        return {}

    def scored(self) -> dict[str, tuple[str, str]]:
        """Part -> the pair of modalities that :meth:`scorers` scores."""
        return {}


def named(objective: str, part: str) -> str:
    """Name of a term.

    >>> named("contrast", ""), named("contrast", "image-text")
    ('contrast', 'contrast/image-text')
    """
    return f"{objective}/{part}" if part else objective


@contextmanager
def naming(objective: str) -> Iterator[None]:
    """Inside, ValueErrors begin with the name of the objective."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"objectives: {objective}: {error}") from None


def differently_hidden(objectives: Mapping[str, TaskObjective]) -> list[str]:
    """A line for each modality that several objectives hide, and not alike."""
    lines = []
    for m in dict.fromkeys(m for objective in objectives.values() for m in objective.hidden):
        first = dict[Hashable, str]()
        for name, objective in objectives.items():
            if m in objective.hidden:
                first.setdefault(objective.hiding, name)
        if len(first) > 1:
            lines.append(f"{' and '.join(first.values())} hide {m} differently: a forward of its tower for each")
    return lines


def scattered(value_V: Tensor, row_V: Tensor, rows: int) -> Tensor:
    """``[B]``: values at their rows, zero elsewhere."""
    return value_V.new_zeros(rows).index_put((row_V,), value_V)
