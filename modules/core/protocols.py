"""Protocols that callbacks may require from a recipe or data module; setup reports a missing one by name.

Letters: B samples, T tokens, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from descant.modules.core.batch import Batch
from descant.modules.core.hooks import GradientHooks
from descant.modules.core.loss_reduction import Step
from descant.modules.core.objective import Term
from descant.modules.core.output import Output, Scorer

if TYPE_CHECKING:
    from descant.modules.masking.corruptions import Corruption


@runtime_checkable
class HasObjective(Protocol):
    """A recipe whose terms a :class:`Step` mixes, and whose shared parameters harmonizers may request."""

    step: Step

    def shared_parameters(self) -> Iterable[nn.Parameter]: ...


@runtime_checkable
class HasTerms(Protocol):
    """``forward(batch)`` returns the loss terms, which a :class:`Step` mixes; ``output``: that of the last forward."""

    step: Step
    output: Output | None

    def forward(self, batch: Batch) -> Output: ...


@runtime_checkable
class HasTowers(Protocol):
    """``towers``: one module per modality, by name."""

    @property
    def towers(self) -> Mapping[str, nn.Module]: ...


@runtime_checkable
class ForksFeatures(Protocol):
    """Shares features between terms by ``hooks.fork``; ``forks``: modality -> the terms that share its feature."""

    step: Step
    hooks: GradientHooks

    @property
    def forks(self) -> Mapping[str, tuple[str, ...]]: ...


@runtime_checkable
class Embeds(Protocol):
    """``embed(batch)``: modality -> unit-length ``z_BD``; rows of absent samples are zero."""

    def embed(self, batch: Batch) -> dict[str, Tensor]: ...


@runtime_checkable
class Inverts(Protocol):
    """``encode_embeddings(h_BTD, mask_BT, modality)``: unit-length ``z_BD`` from the output of a tower's ``embed`` or a
    replacement of it. It runs everything that comes after the token embeddings."""

    @property
    def towers(self) -> nn.ModuleDict: ...

    def encode_embeddings(self, h_BTD: Tensor, mask_BT: Tensor, modality: str) -> Tensor: ...


@runtime_checkable
class Encodes(Protocol):
    """A tower in two parts: ``embed(x) -> h_BTD``, token embeddings with their positions, and ``encode``, the rest."""

    def embed(self, x: Tensor, /) -> Tensor: ...

    def encode(self, h_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor: ...


@runtime_checkable
class HidesCells(Protocol):
    """A tower for tables with these ``columns``; ``tower(x, mask_BC)`` treats cells outside the mask as missing."""

    columns: tuple[int, ...]

    def __call__(self, x: Tensor, mask: Tensor | None = None, /) -> Any: ...


@runtime_checkable
class Scaled(Protocol):
    """A loss whose similarities are multiplied by ``scale() = exp(log_scale)``, kept within a bound in training."""

    log_scale: nn.Parameter

    def scale(self) -> Tensor: ...


@runtime_checkable
class Matches(Protocol):
    """``scorers(batch)``: name of a pair of modalities, such as "image-text" -> scorer. In training, ``Output.pairs``
    holds them."""

    def scorers(self, batch: Batch) -> Mapping[str, Scorer]: ...


@runtime_checkable
class ContrastsPairs(Protocol):
    """``pairs``: name -> two modalities; ``losses[name]``: ``(z_a, z_b, key_B, valid_B) -> value_B`` of that pair."""

    @property
    def pairs(self) -> Mapping[str, tuple[str, str]]: ...

    @property
    def losses(self) -> Mapping[str, nn.Module]: ...


@runtime_checkable
class Features(Protocol):
    """``present_features(batch, modality)``: pooled features of a tower ``h_BD``; rows of absent samples are zero."""

    def present_features(self, batch: Batch, modality: str, /) -> Tensor: ...


@runtime_checkable
class Fuses(Protocol):
    """``fuse(z, present)``: latents by modality -> ``logits_BC``; ``latents(batch)`` makes them, not unit-length.

    Each modality may have its rows in a different order, if its ``present`` (bool ``[B]``) is in the same order.
    Without ``present`` all rows are present: rows of zeros do not count as absent.
    """

    def latents(self, batch: Batch) -> dict[str, Tensor]: ...

    def fuse(self, z: dict[str, Tensor], present: Mapping[str, Tensor] | None = None) -> Tensor: ...


@runtime_checkable
class Unimodal(Protocol):
    """``unimodal(z, present)``: latents, as :class:`Fuses` makes them -> ``logits_BC`` of each modality alone."""

    def unimodal(self, z: dict[str, Tensor], present: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]: ...


@runtime_checkable
class Classifies(Protocol):
    """Classifier of several modalities. ``labels(batch)``: int64 ``[B]``, below 0 for a sample without a label."""

    modalities: tuple[str, ...]

    def labels(self, batch: Batch, /) -> Tensor: ...


@runtime_checkable
class MultimodalClassifier(Classifies, HasObjective, Protocol):
    """Classifier of several modalities, whose fusion inputs are in ``output.fusion`` after every forward.

    ``shares(z, present)``: modality -> its part of the logits ``[B, C]``; the parts sum to the logits.
    ``of_modality(m)``: the parameters that belong to this modality only.
    """

    step: Step
    output: Output | None
    modality_mask: Callable[[Batch], Mapping[str, Tensor]] | None
    regularizers: nn.ModuleList

    def shares(self, z: dict[str, Tensor], present: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]: ...

    def of_modality(self, modality: str, /) -> Iterable[nn.Parameter]: ...


@runtime_checkable
class Scores(Protocol):
    """``scores(batch)``: name -> one score per sample, such as accuracy (1 or 0) or a loss.

    For names that begin with ``loss``, lower is better; for all others, higher. ``valid`` of a term marks the samples
    that have a score. Modalities that ``batch.present`` leaves out are not used.
    """

    def scores(self, batch: Batch) -> dict[str, Term]: ...


@runtime_checkable
class PredictsNumbers(Protocol):
    """``numbers(batch)``: name of a target -> its prediction ``[B]`` in the target's unit; nan without a prediction."""

    def numbers(self, batch: Batch) -> dict[str, Tensor]: ...


class ReconstructionOutput(NamedTuple):
    """Reconstruction of a modality that was masked in whole or in part; all fields have the shape of its input.

    Attributes:
        truth: the input, float ``[B, ...]`` (category maps and token ids: int64); zero for samples without it.
        visible: bool ``[B, ...]``: the part that the encoder received.
        prediction: predicted values in the masked part, the truth elsewhere and in padding, in the input's units; zero
            for samples without the modality.
    """

    truth: Tensor
    visible: Tensor
    prediction: Tensor


@runtime_checkable
class Reconstructs(Protocol):
    """``reconstruct(batch, corruption)``: modality -> :class:`ReconstructionOutput`, from the part that the corruption
    leaves visible."""

    def reconstruct(self, batch: Batch, corruption: Corruption | None = None) -> dict[str, ReconstructionOutput]: ...


@runtime_checkable
class Predicts(Protocol):
    """``losses(batch, corruption)``: terms ``mask/{modality}`` of the tokens that a corruption hides, one value per
    sample. ``targets``: the modalities that it predicts."""

    targets: list[str]

    def losses(self, batch: Batch, corruption: Corruption | None = None) -> dict[str, Term]: ...


@runtime_checkable
class DecodesTokens(Protocol):
    """A masked model by parts: ``raw(batch)`` returns tokens and masks of the real ones; ``encode(raw, visible)``
    encodes them; ``decoder`` takes the encoded tokens and the positions of targets; ``adapters`` by modality turn its
    features into logits; ``targets``: the modalities that it predicts."""

    adapters: Any
    decoder: Any
    targets: list[str]

    def raw(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]: ...

    def encode(self, raw: dict[str, Tensor], visible: dict[str, Tensor]) -> Any: ...


@runtime_checkable
class Generates(Protocol):
    """``generate(batch)``: int64 token ids ``[B, T]``."""

    def generate(self, batch: Batch) -> Tensor: ...


@runtime_checkable
class AnswersQuestions(Protocol):
    """Answers questions, as :class:`Generates`. ``likelihood(batch, answer_ids_BM)``: ``[B]``, the geometric mean of
    the probabilities of an answer's tokens; 0 without a question."""

    def generate(self, batch: Batch) -> Tensor: ...

    def likelihood(self, batch: Batch, answer_ids_BM: Tensor) -> Tensor: ...


@runtime_checkable
class PacksDocuments(Protocol):
    """Trains on packed rows; ``packing`` counts rows, documents, tokens and cells, as numbers on the CPU."""

    @property
    def packing(self) -> Any: ...


@runtime_checkable
class RoutesTokens(Protocol):
    """Has sparse experts. ``token_experts(batch)`` returns, for the token before each scored one, the entropy of its
    prediction in nats, the number of real experts (mean over layers), and its sample: ``[N]`` each."""

    def token_experts(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]: ...


@runtime_checkable
class StagedDataModule(Protocol):
    """Data of a run in stages.

    ``stages``: the stages by name, in order; ``steps``: optimizer steps of each, known once a loader was made.
    ``stage``: name of the current stage; ``current``: its data; ``since``: its first epoch. ``position``: (epoch,
    micro-batch) where the next loader begins. ``stage_at(epoch)``: name of the stage of an epoch; beyond the end, the
    last one. ``batches_of(stage, n)``: this rank's first n micro-batches of a pass over a stage's data.
    """

    stages: dict[str, Any]
    steps: dict[str, int]
    position: tuple[int, int]

    @property
    def stage(self) -> str: ...

    @property
    def since(self) -> int: ...

    @property
    def current(self) -> Any: ...

    def stage_at(self, epoch: int) -> str: ...

    def batches_of(self, stage: str, number: int) -> Iterable[Batch]: ...


@runtime_checkable
class PlansSteps(Protocol):
    """A callback that sets the number of optimizer steps of the run, once, before anything reads it. Collective."""

    def plan(self, trainer: Any) -> None: ...


@runtime_checkable
class BudgetData(Protocol):
    """Data whose training steps can be inspected before training.

    ``steps_for(samples)``: optimizer steps that see this many samples. ``first_batches(steps)``: the number of first
    steps of a pass, at most ``steps``, and this rank's micro-batches of these steps, as training gets them.
    """

    def steps_for(self, samples: int) -> int: ...

    def first_batches(self, steps: int) -> tuple[int, Iterable[Batch]]: ...


@runtime_checkable
class BankData(Protocol):
    """Data with a bank: ``bank_dataloader()`` loads training samples as evaluation sees them."""

    def bank_dataloader(self) -> Iterable[Batch]: ...


@runtime_checkable
class SampledData(Protocol):
    """Data that offers a few training samples: ``sample_dataloader(count)`` loads the same ones on every rank."""

    def sample_dataloader(self, count: int) -> Iterable[Batch]: ...


@runtime_checkable
class MixedData(Protocol):
    """Data of several parts. ``shares``: name of a part -> its share of the training samples; None if sizes decide."""

    shares: Any


class SeriesAxes(NamedTuple):
    """Units of a time series ``x_WT``: x at step t is ``mean + std x`` in the data's unit, at the time ``period t``.

    Attributes:
        channels: names of all W.
        period: time between two steps, in the data's unit; None if only step numbers are known.
        mean, std: with which the data module standardised each channel, ``[W]``, or one number for all.
    """

    channels: Sequence[str]
    period: float | None = None
    mean: float | Sequence[float] = 0.0
    std: float | Sequence[float] = 1.0


@runtime_checkable
class SeriesData(Protocol):
    """``series_axes(index, modality)``: units of the time series of a sample, by its id; None for other modalities."""

    def series_axes(self, index: int, modality: str) -> SeriesAxes | None: ...


@runtime_checkable
class NegativesData(Protocol):
    """Data whose training batches can have mined negatives, such as ``inputs["text_neg"]``.

    ``read_mined(modality)`` is called before the loader is made; ``mined`` has the version of the current negatives,
    -1 before the first. ``training_ids()``: ids of the samples that may be mined.
    ``renew_mined(id_N, negative_NK, version)`` sets up to K negatives of each sample, as ids, then -1.
    ``bank_dataloader()``: as in :class:`BankData`.
    """

    mined: Any

    def read_mined(self, modality: str) -> None: ...

    def training_ids(self) -> Tensor: ...

    def renew_mined(self, id_N: Tensor, negative_NK: Tensor, version: int) -> None: ...

    def bank_dataloader(self) -> Iterable[Batch]: ...


@runtime_checkable
class StagedRecipe(Protocol):
    """A recipe in stages: ``stage`` is the name of the current one in ``stages``; ``begin_stage`` changes it.

    ``begin_stage(name, average, batches)`` takes the average of the weights over steps, and ``batches(n)``, this rank's
    first n micro-batches of the stage's data. It returns the growths of the model.
    ``end_stage(batches)`` ends the current stage; ``batches`` as above.
    ``named_as(names)``: if one stage is given for all, it takes the names of the data's stages.
    ``step_flops(name, batches, memory_adjusted)``: FLOPs of micro-batches in a stage, of all ranks together.
    """

    stages: dict[str, Any]
    stage: str

    def named_as(self, names: Iterable[str]) -> None: ...

    def begin_stage(
        self,
        name: str,
        average: Mapping[str, Tensor] | None = None,
        batches: Callable[[int], Iterable[Batch]] | None = None,
    ) -> Any: ...

    def end_stage(self, batches: Callable[[int], Iterable[Batch]]) -> None: ...

    def step_flops(self, stage: str, batches: Iterable[Batch], memory_adjusted: bool = False) -> int: ...
