"""Rollouts: a policy trained on its own answers. Letters: N questions, G answers to each, R = N G, M tokens."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from descant.callbacks import Resume
from descant.callbacks.policy.rollouts import Rollouts
from descant.datamodules.sampling.resumable_sampler import Slot, Window
from descant.datamodules.tasks.question_pool import QuestionPool, QuestionRollouts
from descant.datamodules.tasks.questions import Questions
from descant.modules.distill.distill import Distill
from descant.modules.language import Sampling
from descant.modules.objectives.language import answer_log_probabilities
from descant.modules.policy import KL, Clipped, LocalTokenMean, PolicyBatch, PolicyLoss, SequenceMean, TokenMean
from descant.modules.policy.rewards import Answer, Rewards, Verifier
from descant.modules.tokenizers.text import EOS, PAD
from descant.modules.training_setup.boards import Table
from descant.modules.training_setup.compile_and_shard import Shard
from descant.recipes import GRPO, VisionLanguage
from tests.callbacks.checkpoints.test_resume import Act, equal, fit, point, state
from tests.callbacks.policy.test_rounds import Given
from tests.ranks import run_ranks
from tests.rotation import quick
from tests.small import small_chat
from tests.step_toy import QUIET
from tests.tolerance import F32, F64, rounding, ulps

N, G, NEW = 6, 4, 3
KINDS = ["colour", "count"]


class Short(Verifier):
    """The fewer tokens the better, and ends best of all."""

    def __call__(self, answer: Answer) -> float | None:
        return -float(answer.tokens) + float(answer.ended)


class Never(Verifier):
    def __call__(self, answer: Answer) -> float | None:
        return 0.0


def reinforced(seed: int = 0, lr: float = 1e-2, sgd: bool = False, **options: Any) -> VisionLanguage:
    torch.manual_seed(seed)
    made = VisionLanguage(
        **small_chat(),
        objective=GRPO(options.pop("loss", None)),
        optimizer=lambda groups: torch.optim.SGD(groups, lr=lr) if sgd else torch.optim.AdamW(groups, lr=lr),
        **(dict[str, Any](new=NEW, sampling=Sampling(temperature=1.5)) | options),
    )
    made.load_state_dict(_spoken())
    return made


@functools.cache
def _spoken() -> dict[str, Tensor]:
    """What 80 steps of answering colours and counts leave: answers of one or two tokens, and now and then of more."""
    torch.manual_seed(0)
    net = VisionLanguage(
        **small_chat(),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=2e-2),
    )
    held = Questions(tiny=True, batch_size=32, size=24, length=64, kinds=KINDS)
    L.Trainer(max_steps=80, **QUIET).fit(net, datamodule=held)
    return net.state_dict()


def data(batch_size: int = N * G, **options: Any) -> QuestionRollouts:
    return QuestionRollouts(
        items=N, group=G, tiny=True, batch_size=batch_size, size=24, length=64, kinds=KINDS, **options
    )


def short(**options: Any) -> Rollouts:
    return Rollouts(Rewards({"short": Short()}), **options)


class Seen(L.Callback):
    """What the answers of every epoch were."""

    def __init__(self) -> None:
        self.rolled: list[dict[str, Any]] = []
        self.keys: list[list[int]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        held: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.rolled.append({name: torch.from_numpy(x.copy()) for name, x in held.rolled.items()})
        self.keys.append(held.pool.key_N.tolist())


def run(folder: Path, rollouts: Rollouts, epochs: int = 2, net: Any = None, **options: Any) -> tuple[Seen, L.Trainer]:
    seen = Seen()
    held = options.pop("data", None) or data()
    trainer, _ = fit(folder, rollouts, seen, net=net or reinforced(), data=held, max_epochs=epochs, **options)
    return seen, trainer


# what is learned of --------------------------------------------------------------------------------------------------


def test_training_data_are_the_sampled_answers(tmp_path: Path) -> None:
    """Token for token; with the log-probabilities of generation, which are those of the packed rows."""
    net, held = reinforced(lr=0.0), data()
    seen, trainer = run(tmp_path, short(), 1, net, data=held)
    rolled = seen.rolled[0]
    assert rolled["length"].min() >= 0 and rolled["ended"].any() and not rolled["ended"].all()
    for raw in held.rows():
        batch = held.on_after_batch_transfer(raw, 0)
        log_N, sample_N, place_N = answer_log_probabilities(net, batch, net.sampling.temperature)
        row_N = batch.index[sample_N]
        token_N = batch.inputs["text"][batch.inputs["loss_mask"]]
        assert torch.equal(token_N, rolled["said"][row_N, place_N]), "an end where there was one, and no other"
        assert torch.equal(torch.bincount(row_N, minlength=N * G), rolled["length"])
        # 168 ulps: said one by one and all at once, through layers of some 32 numbers; logarithms of 5
        torch.testing.assert_close(log_N, rolled["old"][row_N, place_N], atol=2e-5, rtol=0)
    # half of the square of what is above
    assert float(trainer.callback_metrics["policy/moved"]) < 1e-8, "on policy in training, batch norms or not"


def test_special_tokens_are_never_part_of_an_answer(tmp_path: Path) -> None:
    net = reinforced()
    with torch.no_grad():
        for token in (PAD, 8192, 8193):
            net.lm.head.weight[token] = net.lm.head.weight[EOS]
    rolled = run(tmp_path, short(), 1, net)[0].rolled[0]
    inside_RM = torch.arange(rolled["said"].shape[1]) < rolled["length"][:, None]
    assert not torch.isin(rolled["said"][inside_RM], torch.tensor([PAD, 8192, 8193])).any()
    assert (rolled["said"][~inside_RM] == PAD).all() and (rolled["old"][~inside_RM] == 0).all()
    ends_R = rolled["said"].gather(1, (rolled["length"] - 1).clamp(min=0)[:, None])[:, 0] == EOS
    assert torch.equal(ends_R & (rolled["length"] > 0), rolled["ended"])
    assert (~rolled["ended"] & (rolled["length"] < NEW)).any(), "some were ended by a mark"


def test_rewards_advantages_and_logs(tmp_path: Path) -> None:
    seen, trainer = run(tmp_path, short(), 1, reinforced(lr=0.0))
    rolled = seen.rolled[0]
    reward_NG = (-rolled["length"].double() + rolled["ended"]).view(N, G)
    wanted_NG = (reward_NG - reward_NG.mean(1, True)) / (reward_NG.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(rolled["advantage"].view(N, G), wanted_NG, **rounding(64, F64))  # over a deviation
    flat_N = reward_NG.amax(1) == reward_NG.amin(1)
    assert torch.equal(rolled["live"].view(N, G), ~flat_N[:, None].expand(N, G))
    logs = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("rollouts/")}
    assert logs["rollouts/reward"] == pytest.approx(float(reward_NG.mean()), rel=ulps(4, F32))
    assert logs["rollouts/flat"] == pytest.approx(float(flat_N.double().mean()), rel=ulps(4, F32))
    assert logs["rollouts/cut"] == pytest.approx(1 - float(rolled["ended"].double().mean()), rel=ulps(4, F32))
    assert logs["rollouts/asked"] == N * G and logs["rollouts/entropy"] > 0


class Odd(Verifier):
    """Some prompts' answers are all as good: those whose right answer has an even number of letters."""

    def __call__(self, answer: Answer) -> float | None:
        return float(answer.tokens) if len(answer.reference) % 2 else 1.0


def test_flat_groups_are_resampled_as_whole_groups(tmp_path: Path) -> None:
    rewards = Rewards({"odd": Odd()})
    plain, logs = run(tmp_path / "a", Rollouts(rewards), 1, reinforced(lr=0.0))
    assert not plain.rolled[0]["live"].all(), "some are flat"
    again, more = run(tmp_path / "b", Rollouts(rewards, resample=12), 1, reinforced(lr=0.0))
    assert again.rolled[0]["live"].all() and len(set(again.keys[0])) == N
    assert float(more.callback_metrics["rollouts/asked"]) > N * G == float(logs.callback_metrics["rollouts/asked"])
    kept = [
        key for key, live in zip(plain.keys[0], plain.rolled[0]["live"].view(N, G)[:, 0].tolist(), strict=True) if live
    ]
    assert again.keys[0][: len(kept)] == kept, "those that taught something stay"


def test_no_learning_signal_warns_and_changes_nothing(tmp_path: Path) -> None:
    net, before = reinforced(sgd=True), reinforced(sgd=True)
    with pytest.warns(UserWarning, match="rollout 0: no learning signal"):
        run(tmp_path, Rollouts(Rewards({"never": Never()}), resample=1), 1, net)
    assert equal(state(net), state(before))


def test_a_repeated_problem_gets_new_answers(tmp_path: Path) -> None:
    class Twice(QuestionRollouts):
        def fresh(self, round: int, again: int = 0) -> Any:
            every = super().fresh(round, again)
            return every.where(np.zeros(N, dtype=int))

    held = Twice(items=N, group=G, tiny=True, batch_size=N * G, size=24, length=64, kinds=["colour"])
    seen, _ = run(tmp_path, short(), 1, data=held)
    assert len({tuple(said) for said in seen.rolled[0]["said"].tolist()}) > G, "N times the same G answers"


def test_an_answer_ends_where_its_row_does(tmp_path: Path) -> None:
    held = data()
    room = max(int((held.training_problems[Window([s], [s])].inputs["text"] != PAD).sum()) for s in slots(40))
    held = QuestionRollouts(items=N, group=G, tiny=True, batch_size=N * G, size=24, length=room, kinds=KINDS)
    net = reinforced(sampling=Sampling(temperature=50.0))  # hardly ever an end
    seen, _ = run(tmp_path, short(), 1, net=net, data=held)
    assert not seen.rolled[0]["ended"].all() and int(seen.rolled[0]["length"].min()) >= 1


def slots(count: int) -> list[Slot]:
    return [Slot(0, n, True) for n in range(count)]


def test_kl_is_of_the_sampled_answers(tmp_path: Path) -> None:
    """With as many tokens of each kind as the old policy would draw, the estimate is KL(old || new) itself."""
    old_V, new_V = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.9, 0.05, 0.05])
    drawn_N = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    net = reinforced()
    logged = {}
    net.record = lambda name, value, rows: logged.update({name: float(value)})  # type: ignore[method-assign]
    sample_N, valid_B = torch.zeros(10, dtype=torch.long), torch.tensor([True])
    cast(GRPO, net.objective)._record(
        net, PolicyBatch(new_V.log()[drawn_N], old_V.log()[drawn_N], sample_N, torch.zeros(1), valid_B, None), {}
    )
    assert logged["policy/moved"] == pytest.approx(float((old_V * (old_V / new_V).log()).sum()), rel=ulps(84, F32))


def test_truncated_answers_may_be_left_out(tmp_path: Path) -> None:
    rolled = run(tmp_path, short(cut="leave"), 1, reinforced(lr=0.0))[0].rolled[0]
    assert not rolled["live"][~rolled["ended"]].any() and rolled["live"].any()


def test_some_answers_are_shown_with_their_rewards(tmp_path: Path) -> None:
    rollouts = short(show=2)
    seen, _ = run(tmp_path, rollouts, 1, reinforced(lr=0.0))
    table = rollouts.resumable_log.text["rollouts/answers"]
    assert isinstance(table, Table)
    head, _, *rows = table.markdown().split("\n")
    assert head == "| question | reference | answer | reward short |" and len(rows) == 2 * G
    for r, row in enumerate(rows):
        asked, right, _, reward = [cell.strip() for cell in row.strip("|").split(" | ")]
        assert asked.startswith(("what colour", "how many")) and right
        length, ended = (float(seen.rolled[0][name][r]) for name in ("length", "ended"))
        assert float(reward) == ended - length
    again = short()
    again.load_state_dict(rollouts.state_dict())
    again_table = again.resumable_log.text["rollouts/answers"]
    assert isinstance(again_table, Table) and again_table.markdown() == table.markdown()


# that it learns ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The mean length of answers in each of 30 rollouts that reward short ones."""
    seen, _ = run(tmp_path_factory.mktemp("plain"), short(), 30, reinforced(lr=3e-3))
    assert not seen.rolled[0]["reference"].any(), "no KL penalty"
    return [float(x["length"].double().mean()) for x in seen.rolled]


@pytest.mark.slow
def test_answers_grow_short_where_that_is_rewarded_and_not_in_the_sham(tmp_path: Path, plain: list[float]) -> None:
    seen, _ = run(tmp_path, short(sham="permute"), 30, reinforced(lr=3e-3))
    lengths = {None: plain, "permute": [float(x["length"].double().mean()) for x in seen.rolled]}
    assert lengths[None][-1] < 1.5 < 2 < lengths[None][0], lengths[None]
    assert lengths["permute"][-1] > lengths[None][-1] + 0.5, lengths["permute"]


@pytest.mark.slow
def test_with_kl_the_policy_stays_near_its_reference(tmp_path: Path, plain: list[float]) -> None:
    net = reinforced(lr=3e-3, loss=PolicyLoss(kl=KL(3.0)), distill=Distill(Given(reinforced())))
    seen, _ = run(tmp_path, short(), 15, net)
    assert (seen.rolled[0]["reference"] != 0).any()
    # as above: 168 ulps of float32
    torch.testing.assert_close(seen.rolled[0]["reference"], seen.rolled[0]["old"], atol=2e-5, rtol=0)
    last = float(seen.rolled[-1]["length"].double().mean())
    assert last > plain[14] + 0.3, (last, plain)


# exactness -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("aggregation", "same"), [(TokenMean(), True), (SequenceMean(), True), (LocalTokenMean(), False)]
)
def test_a_step_in_four_micro_batches_is_the_step(tmp_path: Path, aggregation: Any, same: bool) -> None:
    """Answers have unequal lengths, so the mean of means is another gradient."""
    ends = []
    for parts in (1, 4):
        net = reinforced(lr=0.1, sgd=True, loss=PolicyLoss(aggregation=aggregation))
        run(tmp_path / str(parts), short(), 1, net, accumulate_grad_batches=parts)
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    moved = (ends[0] - torch.cat([p.detach().flatten() for p in reinforced().parameters()])).abs().max()
    assert moved > 1e-3
    # a thousandth of the step and less: float32 beside steps of 1e-3
    assert (float((ends[0] - ends[1]).abs().max() / moved) < 1e-4) == same


def parts() -> tuple[VisionLanguage, QuestionRollouts]:
    return reinforced(1, loss=PolicyLoss(Clipped(0.2, 0.28))), data(N * G // 2)


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Act, VisionLanguage, QuestionRollouts]:
    folder, whole, (net, held) = tmp_path_factory.mktemp("whole"), Act(), parts()
    fit(folder, Resume(every=1, keep=99), short(passes=2), whole, net=net, data=held, max_epochs=4)
    return folder, whole, net, held


@pytest.mark.parametrize("step", quick([1, 2, 3, 5], 2))
def test_resume_in_or_between_rollouts_is_bit_identical(
    tmp_path: Path, never_killed: tuple[Path, Act, VisionLanguage, QuestionRollouts], step: int
) -> None:
    """Two steps a pass, two passes a rollout: the second rollout begins after four steps."""
    folder, whole, one, held = never_killed
    rest, (two, again) = Act(), parts()
    path = point(folder, step)
    fit(tmp_path, Resume(every=1), short(passes=2), rest, net=two, data=again, path=path, max_epochs=4)
    assert equal(state(one), state(two)) and rest.losses == whole.losses[step:]
    (was, held_now) = (held.state_dict(), again.state_dict())
    assert was.pop("version") == held_now.pop("version") == 1 and equal(was, held_now)


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.parametrize("sham", [None, "permute"])
def test_two_ranks_sample_the_same_answers_and_take_the_same_step(sham: Any) -> None:
    said, moved = _stepped(0, 1, sham)
    for other_ids, other_weights in run_ranks(2, _stepped, 2, sham):
        assert torch.equal(said, other_ids)
        # two ranks add in another order, and Adam's first step divides by the gradient
        torch.testing.assert_close(moved, other_weights, rtol=1e-4, atol=1e-6)


def _stepped(rank: int, world: int, sham: Any) -> tuple[Tensor, Tensor]:
    held, net = data(), reinforced(lr=0.1, sgd=True)
    strategy = "ddp" if world > 1 else "auto"
    trainer = L.Trainer(max_epochs=1, devices=world, strategy=strategy, callbacks=[short(sham=sham)], **QUIET)
    trainer.fit(net, datamodule=held)
    return torch.from_numpy(held.answer_ids_RM), torch.cat([p.detach().flatten() for p in net.parameters()])


# what cannot be ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sharded_model_generates_answers() -> None:
    (whole,), (split,) = (run_ranks(1, _answers, sharded) for sharded in (False, True))
    assert torch.equal(whole, split)


def _answers(rank: int, sharded: bool) -> Tensor:
    net, held = reinforced(), Questions(tiny=True, batch_size=8, size=24, length=64, kinds=KINDS)
    batch = held.on_after_batch_transfer(next(iter(held.train_dataloader())), 0)
    if sharded:
        torch.distributed.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("data_parallel",))
        type(net).device_mesh = mesh  # type: ignore[assignment, method-assign]  # in this process alone
        Shard().apply(net)
    said = [net.roll_out(batch, G, torch.arange(8 * G)).token_RN]  # before any step
    net.validation_step(batch, 0)
    return torch.cat([x.flatten() for x in (*said, net.generate(batch, NEW))])


def test_invalid_arguments_are_refused(tmp_path: Path) -> None:
    for make, says in (
        (lambda: short(passes=0), "passes 0"),
        (lambda: reinforced(sampling=Sampling(temperature=0)), "temperature 0"),
        (lambda: reinforced(new=0), "new 0"),
        (lambda: reinforced(loss=PolicyLoss(kl=KL(0.1))), "GRPO: loss.kl needs a reference policy"),
        (lambda: QuestionRollouts(group=1, tiny=True), "group 1"),
        (lambda: data(batch_size=7), "batch_size 7: 6 questions x 4 answers make no whole steps"),
    ):
        with pytest.raises(ValueError, match=says):
            make()
    with pytest.raises(ValueError, match="new 17: the data holds answers of 16 tokens"):
        run(tmp_path, short(), 1, reinforced(new=17))
    with pytest.raises(ValueError, match="Rollouts needs rollout data, such as QuestionRollouts, not QuestionPool"):
        run(tmp_path, short(), 1, data=QuestionPool(tiny=True, batch_size=8, items=16, size=24, length=64))
    with pytest.raises(ValueError, match="no answers yet"):
        fit(tmp_path, net=reinforced(), data=data(), max_epochs=1)
