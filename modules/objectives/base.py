"""Base of the task objectives of :class:`descant.recipes.MultiTask`, which compute terms from shared streams.

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
    from descant.modules.losses.contrastive import ContrastiveLoss
    from descant.modules.objectives.streams import Streams


class Facts(NamedTuple):
    """Facts that an objective is built from: towers by modality, widths of the shared space and the fusion layers.

    ``fusion``: None without fusion layers.
    """

    towers: Mapping[str, Tower]
    width: int
    fusion: int | None

    def require(self, modalities: Iterable[str]) -> None:
        """Raise ValueError for a modality without a tower."""
        for m in modalities:
            if m not in self.towers:
                raise ValueError(f"{m!r}: {no_such(m, self.towers)}")

    def fused_width(self, a: str, b: str) -> int:
        """Return the width of fused tokens. Raises ValueError for the same modality twice, or without fusion layers."""
        self.require((a, b))
        if a == b:
            raise ValueError(f"{a} with {b}: two modalities are fused")
        if self.fusion is None:
            raise ValueError(f"needs {a} and {b} fused, and no layers do; give model.fusion: FusionLayers")
        return self.fusion

    def maskable(self, modality: str) -> None:
        """Raise ValueError for a tower whose tokens cannot be hidden between its ``embed`` and ``encode``."""
        if hasattr(self.towers[modality], "places"):  # position embeddings per sample
            return
        tower = self.towers[modality]
        if not has(tower, Encodes) or not hasattr(tower, "positions_TD"):
            able = "MaskedColumns hides" if has(tower, HidesCells) else "PatchTower and TextTower"
            able += " its columns" if has(tower, HidesCells) else " can"
            raise ValueError(f"tower {modality}: {type(tower).__name__} cannot hide tokens; {able}")


class TaskObjective(nn.Module):
    """Base of objectives over shared streams: ``objective(streams, batch) -> {part: Term}``.

    The terms are one part named "" or several parts. ``build`` makes the layers and sets the attributes below, which
    the recipe reads.

    Attributes:
        reads: modalities whose towers it needs.
        inputs: inputs that it needs besides, such as ``text_neg``.
        latents: part -> modalities whose embedding ``z`` receives a gradient from that part's term.
        pools: modalities whose pooled features it reads directly, not through the embedding.
        fuses: pairs of modalities whose tokens it needs fused.
        hidden: modalities whose tokens it hides.
        hiding: everything besides the batch that :meth:`hides` depends on; objectives with equal values share streams.
        in_batch_negatives: whether samples of a batch are contrasted.
        momentum: decay of its teacher, a moving average of the recipe's weights; None without a teacher.
    """

    in_batch_negatives = False
    momentum: float | None = None

    def __init__(self) -> None:
        super().__init__()
        self.reads: tuple[str, ...] = ()
        self.inputs: tuple[str, ...] = ()
        self.latents: dict[str, tuple[str, ...]] = {}
        self.pools: tuple[str, ...] = ()
        self.fuses: tuple[tuple[str, str], ...] = ()
        self.hidden: tuple[str, ...] = ()
        self.hiding: Hashable = None

    @property
    def mask_token_modalities(self) -> tuple[str, ...]:
        """Modalities whose hidden tokens are replaced by a learned token; by default all of ``hidden``."""
        return self.hidden

    def build(self, facts: Facts) -> Self:
        """Make the layers. Raises ValueError for an unknown modality, or a stream that the model does not compute."""
        raise NotImplementedError

    def require_data(self, data: Any, training: bool) -> None:
        """Raise ValueError for data that it cannot be trained or evaluated on."""

    def require_samples(self, samples: float) -> None:
        """Raise ValueError if it cannot be trained on this number of samples."""

    def hides(self, batch: Batch) -> Masks | None:
        """Return the tokens to hide in the streams that it requests with ``streams.masks``; none by default."""
        return None

    def forward(self, streams: Streams, batch: Batch) -> dict[str, Term]:
        raise NotImplementedError

    def scores(self, streams: Streams, batch: Batch) -> dict[str, Term]:
        """Compute evaluation scores by name; names of losses begin with ``loss``."""
        return {}

    def answers(self, streams: Streams, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """Predict targets of the data: ``logits``, target -> ``[B, C]``, or ``numbers``, target -> ``[B]`` in its own
        unit; nan in rows that lack an input."""
        return {}

    def decisions(self, streams: Streams) -> Callable[[], Decisions] | None:
        """Return a function that makes the decisions at which soft labels are compared; None without decisions."""
        return None

    def reconstruct(self, streams: Streams, batch: Batch) -> dict[str, ReconstructionOutput]:
        """Return reconstructions by modality."""
        return {}

    def pair_losses(self) -> dict[str, ContrastiveLoss]:
        """Return part -> the contrastive loss of its pair of modalities."""
        return {}

    def scorers(self, streams: Streams) -> dict[str, Scorer]:
        """Return part -> scorer of how well rows of one modality match rows of another."""
        return {}

    def modalities_by_part(self) -> dict[str, tuple[str, str]]:
        """Return part -> the pair of modalities that :meth:`scorers` scores."""
        return {}


def term_name(objective: str, part: str) -> str:
    """Return the name of a term.

    >>> term_name("contrast", ""), term_name("contrast", "image-text")
    ('contrast', 'contrast/image-text')
    """
    return f"{objective}/{part}" if part else objective


@contextmanager
def naming(objective: str) -> Iterator[None]:
    """Prefix ValueErrors from the block with the objective's name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"objectives: {objective}: {error}") from None


def describe_mask_conflicts(objectives: Mapping[str, TaskObjective]) -> list[str]:
    """Return a line for each modality whose tokens several objectives hide differently."""
    lines = []
    for m in dict.fromkeys(m for objective in objectives.values() for m in objective.hidden):
        first = dict[Hashable, str]()
        for name, objective in objectives.items():
            if m in objective.hidden:
                first.setdefault(objective.hiding, name)
        if len(first) > 1:
            lines.append(f"{' and '.join(first.values())} hide {m} differently: a forward of its tower for each")
    return lines


def scatter_rows(value_V: Tensor, row_V: Tensor, rows: int) -> Tensor:
    """Scatter values to their rows in ``[B]``, with zeros elsewhere."""
    return value_V.new_zeros(rows).index_put((row_V,), value_V)
