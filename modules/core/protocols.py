"""All that callbacks know of a recipe. A recipe that lacks one is named in one line at setup.

Letters: B samples, T tokens, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from descant.modules.core.batch import Batch
from descant.modules.core.hooks import GradientHooks
from descant.modules.core.objective import Term
from descant.modules.core.output import Output, Scorer
from descant.modules.core.step import Step

if TYPE_CHECKING:
    from descant.modules.masking.corruptions import Corruption


@runtime_checkable
class HasObjective(Protocol):
    """Its terms are mixed by a :class:`Step`, and harmonizers may ask for the parameters that the terms share."""

    step: Step

    def shared_parameters(self) -> Iterable[nn.Parameter]: ...


@runtime_checkable
class HasTerms(Protocol):
    """``forward(batch)``: the loss term by term, which a :class:`Step` mixes; ``output``: of the last forward."""

    step: Step
    output: Output | None

    def forward(self, batch: Batch) -> Output: ...


@runtime_checkable
class HasTowers(Protocol):
    """One module a modality, by name."""

    @property
    def towers(self) -> Mapping[str, nn.Module]: ...


@runtime_checkable
class ForksFeatures(Protocol):
    """Shares features between terms through ``hooks.fork``; ``forks``: modality -> the terms that share its feature."""

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
    """``encoded(h_BTD, mask_BT, modality)``: unit-length ``z_BD`` of what a tower's ``embed`` gives, or of what is put
    in its place: all that comes after the token embeddings."""

    @property
    def towers(self) -> nn.ModuleDict: ...

    def encoded(self, h_BTD: Tensor, mask_BT: Tensor, modality: str) -> Tensor: ...


@runtime_checkable
class Encodes(Protocol):
    """A tower in two parts: ``embed(x) -> h_BTD``, token embeddings with their positions, and ``encode``, the rest."""

    def embed(self, x: Tensor, /) -> Tensor: ...

    def encode(self, h_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor: ...


@runtime_checkable
class Scaled(Protocol):
    """A loss whose similarities are multiplied by ``scale() = exp(log_scale)``, kept within a bound in training."""

    log_scale: nn.Parameter

    def scale(self) -> Tensor: ...


@runtime_checkable
class Matches(Protocol):
    """``scorers(batch)``: by the name of a pair of modalities, such as "image-text". Training has them in
    ``Output.pairs``."""

    def scorers(self, batch: Batch) -> Mapping[str, Scorer]: ...


@runtime_checkable
class Features(Protocol):
    """``present_features(batch, modality)``: pooled features of a tower ``h_BD``; rows of absent samples are zero."""

    def present_features(self, batch: Batch, modality: str, /) -> Tensor: ...


@runtime_checkable
class Fuses(Protocol):
    """``fuse(z, present)``: latents by modality -> ``logits_BC``; ``latents(batch)`` makes them, of any length.

    Rows may come in another order in each modality, as long as their ``present`` (bool ``[B]`` each) does too. Without
    it all are there: rows of zeros say nothing of who is absent.
    """

    def latents(self, batch: Batch) -> dict[str, Tensor]: ...

    def fuse(self, z: dict[str, Tensor], present: Mapping[str, Tensor] | None = None) -> Tensor: ...


@runtime_checkable
class Unimodal(Protocol):
    """``unimodal(z, present)``: latents, as :class:`Fuses` makes them -> each modality's own ``logits_BC``."""

    def unimodal(self, z: dict[str, Tensor], present: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]: ...


@runtime_checkable
class Classifies(Protocol):
    """Classifies samples of several modalities. ``labels(batch)``: int64 ``[B]``, below 0 for none."""

    modalities: tuple[str, ...]

    def labels(self, batch: Batch, /) -> Tensor: ...


@runtime_checkable
class MultimodalClassifier(Classifies, HasObjective, Protocol):
    """Classifier of several modalities, whose fusion inputs are in ``output.fusion`` after every forward.

    ``shares(z, present)``: modality -> its part of the logits ``[B, C]``; they add up to what is decided by.
    ``of_modality(m)``: the parameters that are of this modality alone.
    """

    step: Step
    output: Output | None
    modality_mask: Callable[[Batch], Mapping[str, Tensor]] | None
    regularizers: nn.ModuleList

    def shares(self, z: dict[str, Tensor], present: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]: ...

    def of_modality(self, modality: str, /) -> Iterable[nn.Parameter]: ...


@runtime_checkable
class Scores(Protocol):
    """``scores(batch)``: name -> one quality number a sample, such as accuracy (1 or 0) or a loss.

    Names of losses begin with ``loss``: less is better; of all others more is. ``valid`` of a term marks the samples
    that have a number. Whatever modalities ``batch.present`` leaves out are not looked at.
    """

    def scores(self, batch: Batch) -> dict[str, Term]: ...


class ReconstructionOutput(NamedTuple):
    """What a recipe makes of a modality that it did not see, or saw in part; all in the shape and units of its input.

    Attributes:
        truth: the input, float ``[B, ...]`` (category maps and token ids: int64); zero where the sample lacks it.
        visible: bool ``[B, ...]``: what was seen of it.
        prediction: of what was not seen; the truth where it was or is padding; zero where the sample lacks it.
    """

    truth: Tensor
    visible: Tensor
    prediction: Tensor


@runtime_checkable
class Reconstructs(Protocol):
    """``reconstruct(batch, corruption)``: modality -> :class:`ReconstructionOutput`, from what the corruption leaves
    visible."""

    def reconstruct(self, batch: Batch, corruption: Corruption | None = None) -> dict[str, ReconstructionOutput]: ...


@runtime_checkable
class Generates(Protocol):
    """``generate(batch)``: int64 token ids ``[B, T]``."""

    def generate(self, batch: Batch) -> Tensor: ...


@runtime_checkable
class AnswersQuestions(Protocol):
    """Answers questions, as :class:`Generates`, and ``likelihood(batch, answer_ids_BM)`` is how likely it thinks
    answers are: ``[B]``, the geometric mean of their tokens' probabilities, 0 where nothing is asked."""

    def generate(self, batch: Batch) -> Tensor: ...

    def likelihood(self, batch: Batch, answer_ids_BM: Tensor) -> Tensor: ...


@runtime_checkable
class RolloutPolicy(Protocol):
    """Samples answers to learn from: ``roll_out(batch, group, seed_R)`` -> ``group`` to each question, of at most
    ``new`` tokens.

    ``reference(batch)``: log-probabilities of the answers in the batch under a policy to stay near to, whose each is,
    and at which place; asked where it ``needs_reference``.
    """

    new: int

    @property
    def needs_reference(self) -> bool: ...

    def roll_out(self, batch: Batch, group: int, seed_R: Tensor) -> Any: ...

    def reference(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]: ...


@runtime_checkable
class RolloutData(Protocol):
    """Data whose training set is what a model answered: ``group`` answers to each of ``items`` questions.

    ``version``: which rollout it is, -1 before the first. ``fresh(round, again)``: as many questions as it has;
    ``asking(problems)``: a loader of them, as of :class:`QuestionPoolData`; ``rows()``: one of the answers, by their
    numbers. ``renew(problems, rolled, version)``: these questions, and tensors of the answers by name, or some of them.
    ``spell(ids)`` writes tokens out, an answer begins behind ``answer_token``. ``entry(problems, number)``: what a task
    knows of one of them, for :class:`descant.modules.policy.rewards.TaskAnswer`, or None.
    """

    version: int
    items: int
    group: int
    answer_length: int

    @property
    def answer_token(self) -> int: ...

    def fresh(self, round: int, again: int = 0) -> Any: ...

    def asking(self, problems: Any) -> Iterable[Batch]: ...

    def rows(self) -> Iterable[Batch]: ...

    def renew(self, problems: Any, rolled: Any, version: int) -> None: ...

    def spell(self, ids: list[int]) -> str: ...

    def entry(self, problems: Any, number: int) -> Any: ...


@runtime_checkable
class StagedDataModule(Protocol):
    """Data of a run in stages.

    ``stages``: by name, in order; ``steps``: optimizer steps of each, once it has made a loader. ``stage``: which one
    is on, ``current``: its own data, ``since``: its first epoch. ``position``: (epoch, micro-batch) where the next
    loader begins. ``stage_at(epoch)`` names the stage of an epoch, the last one's beyond the end.
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


@runtime_checkable
class BankData(Protocol):
    """Data with a bank: ``bank_dataloader()`` loads training samples as evaluation sees them."""

    def bank_dataloader(self) -> Iterable[Batch]: ...


@runtime_checkable
class StagedRecipe(Protocol):
    """A recipe in stages: ``stage`` is the name of the one that is on, of ``stages``; ``begin_stage(name)`` goes on to
    another. ``step_flops(name, batches)``: of micro-batches in a stage, all ranks together."""

    stages: dict[str, Any]
    stage: str

    def begin_stage(self, name: str) -> None: ...

    def step_flops(self, stage: str, batches: Iterable[Batch]) -> int: ...


@runtime_checkable
class QuestionPoolData(Protocol):
    """Data whose training set is a pool of problems with answers, which is renewed.

    ``version``: how often it was, -1 before the first answers. ``pool``: the problems that it asks, an object with a
    length. ``fresh(round)``: as many of the training split, drawn anew; ``variants(index_N, round)``: other problems
    about the same as those of the pool at these numbers. ``asking(problems)``: a loader of them as evaluation sees
    them, this rank's part; a batch's ``index`` are numbers of problems. ``renew(problems, answer_ids_NM, version)``:
    the pool, and what is to be answered, int64 of at most ``answer_length`` tokens.
    """

    version: int
    answer_length: int

    @property
    def pool(self) -> Any: ...

    def fresh(self, round: int) -> Any: ...

    def variants(self, index_N: Tensor, round: int) -> Any: ...

    def asking(self, problems: Any) -> Iterable[Batch]: ...

    def renew(self, problems: Any, answer_ids_NM: Tensor, version: int) -> None: ...
