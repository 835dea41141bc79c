"""CoMD rounds: augmented problems by hand, resume, ranks. Letters: N problems."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from descant.callbacks import Resume, Rounds
from descant.datamodules.tasks.question_pool import QuestionPool
from descant.modules.core.batch import Batch
from descant.modules.distill.distill import Distill, SoftTarget, Teacher
from descant.modules.language.answer_scores import Answers, EditDistanceScorer, ExactMatchScorer, LikelihoodScorer
from descant.recipes import VisionLanguage
from tests.callbacks.checkpoints.test_resume import Act, equal, fit, point, state
from tests.ranks import run_ranks
from tests.recipes.test_missing import PatternData
from tests.rotation import quick
from tests.small import small_chat
from tests.step_toy import QUIET
from tests.tolerance import F32, ulps

N = 48


class Knows(nn.Module):
    """Says what is right to all but every third problem, by its key."""

    def generate(self, batch: Batch, new: int = 8) -> Tensor:
        said = batch.targets["answer"][:, :new].clone()
        said[batch.content_id % 3 == 0] = 9
        return said

    def likelihood(self, batch: Batch, said: Tensor) -> Tensor:
        return torch.full((len(batch),), 0.25)


class Given(Teacher):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._given = [network]

    def network(self, student: nn.Module) -> nn.Module:
        return self._given[0]


def chat(seed: int = 0, teacher: nn.Module | None = None, *targets: Any) -> VisionLanguage:
    torch.manual_seed(seed)
    made = VisionLanguage(
        **small_chat(),
        distill=Distill(Given(teacher or Knows()), list(targets)),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2),
    )
    with torch.no_grad():
        made.lm.embedding.weight[:10].mul_(3)  # so that it says something
    return made


def data() -> QuestionPool:
    return QuestionPool(tiny=True, batch_size=16, items=N, size=24, length=64)


class Watching(L.Callback):
    """The pool of every epoch, and what was thought of it."""

    def __init__(self, rounds: Rounds) -> None:
        self.rounds, self.pools, self.gaps = rounds, list[Any](), list[Tensor]()
        chosen = rounds.choose_problems

        def seen(difficult_N: Tensor, key_N: Tensor, round: int) -> Tensor:
            self.gaps.append(difficult_N)
            return chosen(difficult_N, key_N, round)

        rounds.choose_problems = seen  # type: ignore[method-assign]

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pool = trainer.datamodule  # type: ignore[attr-defined]
        self.pools.append((pool.version, pool.pool, pool.answer_ids_NM.copy()))


def run(
    folder: Path, rounds: Rounds, epochs: int = 4, net: VisionLanguage | None = None
) -> tuple[Watching, VisionLanguage]:
    watch = Watching(rounds)
    _, model = fit(folder, rounds, watch, net=net or chat(), data=data(), max_epochs=epochs)
    return watch, model  # type: ignore[return-value]


def test_half_of_the_next_pool_are_variants_of_difficult_problems(tmp_path: Path) -> None:
    watch, _ = run(tmp_path, Rounds(epochs=2, hard=0.5))
    (first, before, said), _, (second, after, _), _ = watch.pools
    assert (first, second) == (0, 1) and len(watch.gaps) == 1
    difficult_N = watch.gaps[0]
    wrong = torch.from_numpy(before.key_N) % 3 == 0
    assert (said[wrong.numpy()][:, 0] == 9).all(), "what the teacher said, right or wrong"
    assert not (difficult_N & wrong).any(), "where the teacher is wrong too nothing is difficult"
    assert difficult_N.sum() > N // 4
    about = [(int(k), int(c)) for k, c in zip(before.kind_N, before.concept_N, strict=True)]
    hard, easy = ({x for x, d in zip(about, difficult_N.tolist(), strict=True) if d == is_} for is_ in (True, False))
    asked = [(int(k), int(c)) for k, c in zip(after.kind_N, after.concept_N, strict=True)]
    assert all(x in hard for x in asked[: N // 2]) and all(x in easy for x in asked[N // 2 :])
    there = Counter(x for x, d in zip(about, difficult_N.tolist(), strict=True) if d)
    assert all(n <= there[x] for x, n in Counter(asked[: N // 2]).items()), "each in turn before any comes twice"


@pytest.mark.slow
def test_the_sham_augments_as_many_other_problems(tmp_path: Path) -> None:
    (own, _), (other, _) = (run(tmp_path / str(m), Rounds(epochs=1, sham=m), 2) for m in (None, "permute"))
    assert own.gaps[0].sum() == other.gaps[0].sum() and not torch.equal(own.gaps[0], other.gaps[0])
    fresh, _ = run(tmp_path / "random", Rounds(epochs=1, mine="random"), 2)
    assert not fresh.gaps and set(fresh.pools[1][1].key_N) <= set(data().training_problems.problems.key_N)


def test_without_difficult_problems_it_warns_and_augments_easy_ones(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no problem is difficult"):
        watch, _ = run(tmp_path, Rounds(epochs=1, tau=1.0), 2)
    assert not watch.gaps[0].any() and len(set(watch.pools[1][1].key_N.tolist())) > N // 2


def test_numbers_are_logged(tmp_path: Path) -> None:
    rounds = Rounds(epochs=1)
    trainer, _ = fit(tmp_path, rounds, net=chat(), data=data(), max_epochs=2)
    found = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("rounds/")}
    assert found["rounds/version"] == 1 and 0.5 < found["rounds/teacher"] < 0.8
    assert found["rounds/student"] < 0.3 and 0.2 < found["rounds/difficult"] <= found["rounds/teacher"]


@pytest.mark.parametrize("step", quick([2, 6, 7], 3))
def test_resume_in_or_between_rounds_is_bit_identical(tmp_path: Path, step: int) -> None:
    """Three steps an epoch, two epochs a round: after 6 steps the next round begins."""
    whole, rest = Act(), Act()
    teacher, options = chat(5), dict[str, Any](max_epochs=4)

    def net() -> VisionLanguage:
        return chat(1, teacher, SoftTarget())

    one, two, every = data(), data(), Resume(every=1, keep=99)
    judged = Rounds(epochs=2)
    _, model = fit(tmp_path / "a", every, judged, whole, net=net(), data=one, **options)
    last = Resume(every=1), Rounds(epochs=2), rest
    _, again = fit(tmp_path / "b", *last, net=net(), data=two, path=point(tmp_path / "a", step), **options)
    assert equal(state(model), state(again)) and rest.losses == whole.losses[step:]
    assert last[1].history == judged.history and "rounds/difficult/1" in judged.history
    assert one.version == two.version == 1 and (one.answer_ids_NM == two.answer_ids_NM).all()
    assert (one.pool.key_N == two.pool.key_N).all()


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.parametrize("sham", [None, "permute"])
def test_ranks_come_to_the_same_pool_as_one(sham: Any) -> None:
    one = _pool(0, 1, sham)
    for found in run_ranks(2, _pool, 2, sham):
        assert all(torch.equal(a, b) for a, b in zip(found, one, strict=True))


def _pool(rank: int, world: int, sham: Any) -> tuple[Tensor, Tensor]:
    held, net = data(), chat()
    net.optimization.optimizer = lambda groups: torch.optim.SGD(groups, lr=0.0)  # the same student, to the bit
    strategy = "ddp" if world > 1 else "auto"
    rounds = Rounds(epochs=1, sham=sham)
    L.Trainer(max_epochs=2, devices=world, strategy=strategy, callbacks=[rounds], **QUIET).fit(net, datamodule=held)
    return torch.from_numpy(held.pool.key_N), torch.from_numpy(held.answer_ids_NM)


def test_answer_scorers_by_hand() -> None:
    said = torch.tensor([[5, 6, 2, 9], [5, 6, 7, 2], [0, 0, 0, 0], [8, 5, 6, 2]])
    right = torch.tensor([[5, 6], [5, 6], [0, 0], [5, 6]])
    asked = Answers(_batch(4), said, right, Knows())
    assert ExactMatchScorer()(asked).tolist() == [1, 0, 1, 0]
    assert EditDistanceScorer()(asked).tolist() == pytest.approx([1, 2 / 3, 1, 2 / 3], rel=ulps(4, F32))
    assert LikelihoodScorer()(asked).tolist() == [0.25] * 4
    with pytest.raises(ValueError, match="Linear scores no answers; VisionLanguage does"):
        LikelihoodScorer()(Answers(_batch(4), said, right, nn.Linear(1, 1)))


def _batch(rows: int) -> Batch:
    held = data()
    held.renew(held.pool, torch.full((N, 2), 9), 0)
    return next(iter(held.asking(held.pool.where(torch.arange(rows).numpy()))))


def test_likelihood_is_of_the_answer_and_its_end() -> None:
    net, b = chat().double().eval(), _batch(6)
    b.inputs["image"] = b.inputs["image"].double()[:, :3]
    said = torch.tensor([[40, 41, 2, 99], [40, 2, 0, 0], [2, 0, 0, 0], [41, 40, 42, 43], [0, 0, 0, 0], [40, 41, 2, 50]])
    found = net.likelihood(b, said)
    for n, spoken in enumerate([[40, 41], [40], [], [41, 40, 42, 43], [], [40, 41]]):
        ids = b.inputs["text"][n].tolist()
        asked = ids[: ids.index(8193) + 1]
        one = b.select(slice(n, n + 1))
        text = torch.tensor([[*asked, *spoken, 2]])
        one.inputs = {**one.inputs, "text": text, "loss_mask": torch.arange(text.shape[1])[None] >= len(asked)}
        with torch.no_grad():
            before, token, _ = net.hidden_before_answers(one)
            wanted = net.lm.logits(before).log_softmax(1).gather(1, token[:, None]).mean().exp()
        assert float(found[n]) == pytest.approx(float(wanted), rel=ulps(64, F32))


def test_invalid_arguments_are_refused(tmp_path: Path) -> None:
    bare = chat()
    bare.distill = None
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: Rounds(epochs=0), "epochs 0: at least 1"),
        (lambda: Rounds(hard=1.5), "hard 1.5: a share"),
        (lambda: fit(tmp_path, Rounds(), net=chat(), data=PatternData()), "such as QuestionPool, not PatternData"),
        (lambda: fit(tmp_path, Rounds(), net=bare, data=data()), "Rounds needs a teacher: model.distill"),
        (
            lambda: fit(tmp_path, Rounds(), net=chat(0, nn.Linear(1, 1)), data=data()),
            "teacher needs the protocol AnswersQ.* Linear",
        ),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message):
            make()
