"""Rollouts of a text-only model on text tasks. Letters: N questions, G answers to each."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor

from descant.callbacks import Accuracy, Answering, Resume
from descant.callbacks.policy.rollouts import Rollouts
from descant.datamodules.tasks.question_pool import QuestionRollouts
from descant.datamodules.tasks.text_tasks import Arithmetic, Problem, Task, TaskRollouts, TextTasks
from descant.modules.language import CausalLM
from descant.modules.policy.rewards import Answer, Rewards, TaskAnswer, Verifier
from descant.recipes import GRPO, VisionLanguage
from tests.callbacks.checkpoints.test_resume import equal, fit, point, state
from tests.ranks import run_ranks
from tests.step_toy import QUIET

N, G, NEW = 16, 8, 4


class Odd:
    """Any odd digit is right."""

    def score(self, said: str) -> float:
        return float(said in tuple("13579"))


class Digit(Task):
    """Asks for a digit, and shows one of ten; that half of them are right its entry alone knows."""

    def make(self, number: int, far: bool = False) -> Problem:
        return Problem(f"{number:03d}", str(number % 10), Odd())


ASKED: dict[str, Any] = {"tasks": {"digit": Digit()}, "numbers": 400, "held": 30, "length": 12}


def network(seed: int = 0, lr: float = 3e-3, sgd: bool = False, **options: Any) -> Any:
    torch.manual_seed(seed)
    return VisionLanguage(
        lm=CausalLM(266, 32, 2, 2, length=32),
        answer_token=265,
        optimizer=lambda groups: torch.optim.SGD(groups, lr=lr) if sgd else torch.optim.AdamW(groups, lr=lr),
        **options,
    )


@functools.cache
def _spoken() -> dict[str, Tensor]:
    """What 20 steps leave: some are right."""
    net = network(lr=1e-2)
    L.Trainer(max_steps=20, max_epochs=-1, **QUIET).fit(net, datamodule=TextTasks(**ASKED, batch_size=32))
    return net.state_dict()


def reinforced(seed: int = 0, **options: Any) -> VisionLanguage:
    made = network(seed=seed, objective=GRPO(options.pop("loss", None)), **({"new": NEW} | options))
    made.load_state_dict(_spoken())
    return made


def data(batch_size: int = N * G, **options: Any) -> TaskRollouts:
    return TaskRollouts(**(ASKED | {"items": N, "group": G, "batch_size": batch_size} | options))


def odd(**options: Any) -> Rollouts:
    return Rollouts(Rewards({"odd": TaskAnswer()}), **options)


class Earned(L.Callback):
    """What answers earned, rollout after rollout, and the loss of every step."""

    def __init__(self) -> None:
        self.rewards: list[float] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, out: Any, *_: Any) -> None:
        self.losses.append(float(out["loss"]))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.rewards.append(float(trainer.callback_metrics["rollouts/reward"]))


def test_rewarded_answers_become_more_probable_and_not_in_the_sham(tmp_path: Path) -> None:
    found = {}
    for mode in (None, "permute"):
        seen = Earned()
        fit(tmp_path / str(mode), odd(sham=mode), seen, net=reinforced(), data=data(), max_epochs=15)
        found[mode] = np.array(seen.rewards)
    before, after = found[None][:5].mean(), found[None][-5:].mean()
    assert after > before + 0.2, (before, after)
    assert found["permute"][-5:].mean() < before, found["permute"]


def test_the_entry_of_a_task_reaches_its_verifier(tmp_path: Path) -> None:
    """Each answer is beside its own problem, whatever is asked anew, and data of questions knows nothing of any."""

    class Number:
        def __init__(self, value: int) -> None:
            self.value = value

        def score(self, said: str) -> float:
            return 0.0

    class Recorder(Verifier):
        def __init__(self) -> None:
            self.seen: list[Answer] = []

        def __call__(self, answer: Answer) -> float:
            self.seen.append(answer)
            return float(len(self.seen) % 2)

    class Named(Task):
        def make(self, number: int, far: bool = False) -> Problem:
            return Problem(f"{number:03d}", str(number % 10), Number(number))

    own = Recorder()
    held = data(tasks={"named": Named()})
    fit(tmp_path, Rollouts(Rewards({"own": own})), net=reinforced(), data=held, max_epochs=1)
    numbers = [a.entry.value for a in own.seen if isinstance(a.entry, Number)]
    assert [str(n % 10) for n in numbers] == [a.reference for a in own.seen]
    assert numbers == held.pool.number_N.repeat(G).tolist()
    questions = QuestionRollouts(items=4, group=2, tiny=True, batch_size=8)
    assert questions.entry(questions.pool, 0) is None


@pytest.mark.parametrize("step", [1, 3, 5])
def test_resume_in_or_between_rollouts_is_bit_identical(tmp_path: Path, step: int) -> None:
    whole, rest = Earned(), Earned()
    (one, held), (two, again) = ((reinforced(1), data(N * G // 2)) for _ in range(2))
    fit(tmp_path / "a", Resume(every=1, keep=99), odd(passes=2), whole, net=one, data=held, max_epochs=4)
    path = point(tmp_path / "a", step)
    fit(tmp_path / "b", Resume(every=1), odd(passes=2), rest, net=two, data=again, path=path, max_epochs=4)
    assert equal(state(one), state(two)) and rest.losses == whole.losses[step:]
    was, now = held.state_dict(), again.state_dict()
    assert was.pop("version") == now.pop("version") == 1 and equal(was, now)


@pytest.mark.ddp
@pytest.mark.slow
def test_two_ranks_sample_the_same_answers_and_take_the_same_step() -> None:
    said, moved = _stepped(0, 1)
    for other_ids, other_weights in run_ranks(2, _stepped, 2):
        assert torch.equal(said, other_ids)
        # two ranks add in another order, and Adam's first step divides by the gradient
        torch.testing.assert_close(moved, other_weights, rtol=1e-4, atol=1e-6)


def _stepped(rank: int, world: int) -> tuple[Tensor, Tensor]:
    held, net = data(), reinforced(lr=0.1, sgd=True)
    strategy = "ddp" if world > 1 else "auto"
    trainer = L.Trainer(max_epochs=1, devices=world, strategy=strategy, callbacks=[odd()], **QUIET)
    trainer.fit(net, datamodule=held)
    return torch.from_numpy(held.answer_ids_RM), torch.cat([p.detach().flatten() for p in net.parameters()])


def test_answers_are_scored_by_task_without_images(tmp_path: Path) -> None:
    made = {"digit": Digit(), "sums": Arithmetic(["plus"], digits=1)}
    held = TextTasks(made, numbers=200, held=20, length=12, batch_size=16)
    net = network()
    trainer, _ = fit(
        tmp_path, Accuracy(), Answering(new=NEW, by="task", validate=True), net=net, data=held, max_steps=1
    )
    trainer.validate(net, datamodule=held, verbose=False)
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert {"val/accuracy", "val/loss", "val/answered", "val/answered/digit", "val/answered/sums"} <= found.keys()
    assert not any("other" in name or "blind" in name for name in found), "there is no picture to change"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda p: fit(p, net=network(), data=QuestionRollouts(tiny=True)),
            "image_token None: QuestionRollouts has 8192",
        ),
        (lambda p: fit(p, odd(), net=reinforced(new=17), data=data()), "new 17: the data holds answers of 16 tokens"),
    ],
)
def test_invalid_arguments_are_refused(tmp_path: Path, make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=f"^{says}"):
        make(tmp_path)
