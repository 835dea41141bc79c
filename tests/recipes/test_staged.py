"""A run in stages. Letters: N questions, G answers to each."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from descant.callbacks import Resume, Rollouts, Stages
from descant.datamodules.combined.stages import StageData, StagedData, StagedOrder
from descant.datamodules.corpora.emoji_pack import DEVELOPMENT_VENDOR
from descant.datamodules.tasks.descriptions import Descriptions
from descant.datamodules.tasks.question_pool import QuestionRollouts
from descant.datamodules.tasks.questions import PairSet, QuestionPairs, Questions
from descant.datamodules.tasks.text_tasks import Arithmetic, TextTasks
from descant.modules.adaptation.inherit import Begin
from descant.modules.distill.distill import Distill
from descant.modules.language.packing import through
from descant.modules.language.positions import VisualSteps
from descant.modules.objectives.language import _score_answers as whole
from descant.modules.policy import KL, PolicyLoss
from descant.modules.policy.rewards import Answer, Rewards, Verifier
from descant.modules.training_setup.compile_and_shard import Shard
from descant.modules.training_setup.schedule import WarmupCosine
from descant.recipes import DPO, GRPO, Stage, Staged, VisionLanguage
from descant.recipes.base.distillation import TeacherStage
from tests.callbacks.checkpoints.test_resume import Act, equal, fit, point, state
from tests.callbacks.policy.test_rollouts import G, N
from tests.callbacks.policy.test_rounds import Given
from tests.ranks import run_ranks
from tests.rotation import by_turns, quick
from tests.small import small_chat
from tests.step_toy import QUIET
from tests.tolerance import F32, F64, ulps

#: Steps of an epoch; epochs of captions, answers and rollouts; steps of one rollout.
STEPS, EPOCHS = 3, (1, 2, 2)
WHOLE = STEPS * 3 + 2
SEEN: dict[str, Any] = {"size": 24, "length": 64, "tiny": True}


QUESTIONS = Questions(**SEEN)


class Letters(Verifier):
    """What no stage before has taught: the more letters the better."""

    def __call__(self, answer: Answer) -> float | None:
        return float(len(answer.text))


def letters() -> Rollouts:
    return Rollouts(Rewards({"letters": Letters()}))


def model(stages: dict[str, Stage] | None = None, visual: VisualSteps | None = None, **options: Any) -> Staged:
    torch.manual_seed(0)
    return Staged(
        VisionLanguage(**small_chat(), visual=visual, new=3),
        stages
        or {
            "captions": Stage(train=r"^projector|^lm\.blocks", schedule=WarmupCosine(warmup=1)),
            "answers": Stage(optimizer=lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9)),
            "reward": Stage(GRPO(), r"^lm"),
        },
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2),
        **options,
    )


def data(batch_size: int = N * G, **options: Any) -> StagedData:
    rolled = QuestionRollouts(items=N, group=G, batch_size=batch_size, kinds=["colour", "count"], **SEEN)
    return StagedData(
        {
            "captions": StageData(Descriptions(batch_size=16, **SEEN), EPOCHS[0], STEPS),
            "answers": StageData(Questions(batch_size=16, kinds=["colour", "count"], **SEEN), EPOCHS[1], STEPS),
            "reward": StageData(rolled, EPOCHS[2]),
        },
        **options,
    )


class ImageCache(L.Callback):
    """The weights, what trains and what the optimizer holds, at the start of every epoch and at the end."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.moments: list[int] = []
        self.lr: list[float] = []
        self.kinds: list[str] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, i: int) -> None:
        if i == 0:
            self.weights.append(state(pl_module))
            self.moments.append(len(trainer.optimizers[0].state))
            self.kinds.append(type(trainer.optimizers[0]).__name__)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.lr.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.weights.append(state(pl_module))


def run(folder: Path, *more: Any, net: Staged | None = None, **options: Any) -> tuple[L.Trainer, Staged]:
    held = options.pop("data", None) or data()
    quiet: dict[str, Any] = {"max_epochs": -1, "limit_val_batches": 0} | options
    trainer, found = fit(folder, letters(), Stages(), *more, net=net or model(), data=held, **quiet)
    assert isinstance(found, Staged)
    return trainer, found


@functools.cache
def _left_alone(folder: Path) -> tuple[ImageCache, Act, dict[str, Tensor]]:
    kept, act = ImageCache(), Act()
    trainer, net = run(folder, kept, act, Resume(every=1, keep=99))
    assert trainer.global_step == WHOLE
    return kept, act, state(net)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("staged")


def changed(a: dict[str, Tensor], b: dict[str, Tensor]) -> set[str]:
    return {name for name in a if not torch.equal(a[name], b[name])}


# what a stage is ----------------------------------------------------------------------------------------------------


def test_what_a_stage_does_not_train_stands_still_to_the_bit(folder: Path) -> None:
    kept, _, _ = _left_alone(folder)
    begin, answers, _, reward, _, end = kept.weights
    moved = changed(begin, answers)
    assert moved and all(name.startswith(("inner.projector", "inner.lm.blocks")) for name in moved)
    moved = changed(answers, reward)
    assert any("running_mean" in name for name in moved) and any(
        name.startswith("inner.lm.embedding") for name in moved
    )
    moved = changed(reward, end)
    assert moved and all(name.startswith("inner.lm") for name in moved), "and no running statistics"


def test_every_stage_has_a_fresh_optimizer_and_a_schedule_of_its_own(folder: Path) -> None:
    kept, _, _ = _left_alone(folder)
    assert [n > 0 for n in kept.moments] == [False, False, True, False, True]
    assert kept.kinds == ["AdamW", "SGD", "SGD", "AdamW", "AdamW"]
    assert kept.lr[:STEPS] == pytest.approx([0.01, 0.005, 0.0], rel=ulps(16, F64), abs=ulps(1, F64)), (
        "its cosine ends with the stage"
    )
    assert kept.lr[STEPS:] == pytest.approx([0.05] * 2 * STEPS + [0.01] * 2, rel=ulps(16, F64))


def test_a_stage_is_what_a_run_of_its_own_is(folder: Path, tmp_path: Path) -> None:
    """Captions and answers as two runs, the second begun with the weights of the first: the same bits."""
    kept, _, _ = _left_alone(folder)
    whole = data()
    net = model({"captions": model().stages["captions"]})
    run_one(tmp_path / "captions", net, StagedData({"captions": whole.stages["captions"]}))
    assert equal(state(net), kept.weights[1])
    torch.save({"state_dict": state(net)}, tmp_path / "captions.ckpt")
    second = model({"answers": model().stages["answers"]})
    second.load_state_dict(state(net))
    run_one(tmp_path / "answers", second, StagedData({"answers": whole.stages["answers"]}))
    assert equal(state(second), kept.weights[3])


def run_one(folder: Path, net: Staged, held: StagedData) -> None:
    fit(folder, Stages(), Resume(), net=net, data=held, max_epochs=-1, limit_val_batches=0)


class RecordingRollouts(Rollouts):
    def _sample(self, trainer: L.Trainer, pl_module: Any, *rest: Any) -> Any:
        stages.append(pl_module.stage)
        return super()._sample(trainer, pl_module, *rest)


stages: list[str] = []


def test_the_model_is_asked_in_its_own_stage_alone(tmp_path: Path) -> None:
    stages.clear()
    # told last what comes first: Stages goes before whoever acts at the start of an epoch
    fit(
        tmp_path,
        RecordingRollouts(letters().rewards),
        Stages(),
        net=model(),
        data=data(),
        max_epochs=-1,
        limit_val_batches=0,
    )
    assert stages == ["reward", "reward"]


def test_a_stage_may_load_other_weights(tmp_path: Path, folder: Path) -> None:
    _left_alone(folder)
    stages = model().stages
    stages["answers"].load = Loaded(
        {name: x + 1.0 if x.is_floating_point() else x for name, x in state(model()).items()}
    )
    kept = ImageCache()
    run(tmp_path, kept, net=model(stages))
    assert equal(kept.weights[1], stages["answers"].load.weights)


class Loaded(Begin):
    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__("nowhere")
        self.weights = weights

    def find(self) -> Any:
        """Nothing is looked for."""

    def apply(self, recipe: Any) -> None:
        recipe.load_state_dict(self.weights)


def test_a_stage_without_epochs_is_left_out(tmp_path: Path) -> None:
    kept, held = ImageCache(), data()
    held.stages["captions"].epochs = held.stages["reward"].epochs = 0
    trainer, net = run(tmp_path, kept, data=held)
    assert trainer.global_step == 2 * STEPS and net.stage == "answers" and kept.kinds == ["SGD", "SGD"]


def test_a_reference_is_what_the_stage_began_with(tmp_path: Path) -> None:
    stages = model().stages
    stages["reward"] = Stage(GRPO(PolicyLoss(kl=KL(0.1))))
    net, kept = model(stages, distill=Distill(TeacherStage())), ImageCache()
    run(tmp_path, kept, net=net)
    reference: Any = net.distill.teacher.average  # type: ignore[union-attr]
    mine = {name: x for name, x in kept.weights[3].items() if not name.startswith("distill.")}
    its = {name: x for name, x in state(reference).items() if name in mine}
    assert equal(its, mine) and changed(mine, {name: state(net)[name] for name in mine})


def left(folder: Path, net: Any) -> Path:
    """What a stage of another run left."""
    (folder / "stages").mkdir(parents=True)
    (folder / "config.yaml").write_text("model: {class_path: descant.recipes.Staged}\n")
    torch.save({"state_dict": state(net)}, folder / "stages" / "answers.ckpt")
    return folder


@pytest.mark.parametrize("first", [False, True])
def test_a_reference_is_what_the_stage_loaded_whoever_taught_that(tmp_path: Path, first: bool) -> None:
    other = model(distill=Distill(TeacherStage()))
    other.configure_model()  # it has a reference of its own, which is nobody's beginning
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    stages = {} if first else {"answers": Stage()}
    begin = Begin(left(tmp_path / "other", other), "answers.ckpt")
    stages |= {"reward": Stage(GRPO(PolicyLoss(kl=KL(0.1))), load=begin)}
    held = data()
    held = StagedData({name: held.stages[name] for name in stages})
    net, kept = model(stages, distill=Distill(TeacherStage())), ImageCache()
    run(tmp_path, kept, net=net, data=held)
    wanted = {name: x for name, x in state(other).items() if not name.startswith("distill.")}
    taught: Any = net.distill
    its = state(taught.teacher.average)
    assert equal({name: its[name] for name in wanted if name in its}, {n: x for n, x in wanted.items() if n in its})
    assert len(its) > 10 and changed(wanted, {name: state(net)[name] for name in wanted})


def test_what_a_stage_left_is_found_by_its_name_and_missed_before_training(tmp_path: Path) -> None:
    run_of = left(tmp_path / "other", model())
    for path, name in (
        (run_of, "answers.ckpt"),
        (run_of, "stages/answers.ckpt"),
        (run_of / "stages/answers.ckpt", "best"),
    ):
        assert Begin(path, name).find().weights == run_of / "stages" / "answers.ckpt"
    stages = model().stages
    stages["reward"].load = Begin(run_of, "reward.ckpt")
    with pytest.raises(ValueError, match=r"reward.ckpt: no such checkpoint of .*other"):
        run(tmp_path, net=model(stages))


def test_tokens_of_every_stage_are_those_of_the_model(tmp_path: Path) -> None:
    sums = TextTasks({"sums": Arithmetic(digits=1)}, batch_size=16, tiny=True)
    held = StagedData(
        {"sums": StageData(sums, 1, 1), "answers": StageData(Questions(**SEEN), 1, 1)}, evaluate="answers"
    )
    net = model({"sums": Stage(), "answers": Stage()})
    with pytest.raises(ValueError, match=r"answer_token 8193: TextTasks has 265"):
        fit(tmp_path, Stages(), net=net, data=held, max_epochs=-1, limit_val_batches=0)


def test_preferences_begin_at_no_preference_though_towers_look_at_the_batch() -> None:
    held = QuestionPairs(batch_size=8, kinds=["name", "count"], **SEEN)
    batch = held.on_after_batch_transfer(next(iter(held.train_dataloader())), 0)
    stages = {"pairs": Stage(DPO(0.3))}
    net = model(stages, visual=VisualSteps(0.25, drawn=[1.0, 0.25]), distill=Distill(TeacherStage()))
    net.distill.prepare(net)  # type: ignore[union-attr]
    net.train()
    assert torch.allclose(net.terms(batch)["preference"].value, torch.tensor(math.log(2)), rtol=0, atol=ulps(8, F32))


def test_a_wrong_answer_of_a_pair_is_behind_a_thought_where_the_right_one_is() -> None:
    held = QuestionPairs(batch_size=8, think=True, **SEEN)
    batch = next(iter(held.train_dataloader()))
    for b in range(8):
        right, wrong = (
            held.spell(batch.inputs[f"text{end}"][b][batch.inputs[f"loss_mask{end}"][b]].tolist())
            for end in ("", "_neg")
        )
        assert right != wrong and right.split(" answer ")[0] == wrong.split(" answer ")[0]


# going on -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", quick([1, STEPS, STEPS + 1, 2 * STEPS, 3 * STEPS, 3 * STEPS + 1, WHOLE], 3))
def test_from_any_step_of_any_stage_it_ends_in_the_same_bits(folder: Path, tmp_path: Path, step: int) -> None:
    _, act, whole = _left_alone(folder)
    again = Act()
    trainer, net = run(tmp_path, again, Resume(), path=point(folder, step))
    assert trainer.global_step == WHOLE
    assert again.seen == act.seen[step:] and again.losses == act.losses[step:]
    assert equal(state(net), whole)


def test_a_run_cut_where_a_stage_ends_goes_on_with_the_next(folder: Path, tmp_path: Path) -> None:
    """It ended by max_steps, so the last thing saved is of the stage that was over."""
    _, _, whole = _left_alone(folder)
    trainer, _ = run(tmp_path, Resume(), max_steps=3 * STEPS)
    assert trainer.global_step == 3 * STEPS
    _, net = run(tmp_path / "on", Resume(), path=point(tmp_path, 3 * STEPS))
    assert equal(state(net), whole)


def test_of_other_stages_or_lengths_it_does_not_go_on(folder: Path, tmp_path: Path) -> None:
    _left_alone(folder)
    longer = data()
    longer.stages["answers"].epochs = 3
    with pytest.raises(ValueError, match=r"data with answers.epochs 2, and here it is 3"):
        run(tmp_path, Resume(), path=point(folder, 4), data=longer)


@pytest.mark.slow
@by_turns(2, 4)
def test_ranks_change_nothing(tmp_path: Path) -> None:
    one = _on_ranks(0, 1, tmp_path / "one")
    two = run_ranks(2, _on_ranks, 2, tmp_path / "two")
    assert equal(*two)
    for name, x in one.items():
        # three stages of steps: where gradients are near 0, AdamW divides their rounding by them (lr 0.01)
        torch.testing.assert_close(two[0][name], x, atol=2e-4, rtol=2e-3, msg=name)
    on = run_ranks(2, _on_ranks, 2, tmp_path / "on", point(tmp_path / "two", 3 * STEPS + 1))
    assert equal(on[0], two[0]), "killed in the third stage, on two ranks"
    on = run_ranks(2, _on_ranks, 2, tmp_path / "on", point(tmp_path / "two", STEPS))
    assert equal(on[0], two[0]), "and at the end of the first"


def _on_ranks(rank: int, world: int, folder: Path, path: Path | None = None) -> dict[str, Tensor]:
    stages = model().stages
    # batch statistics are of a rank's own rows, so the tower's never move here
    stages["answers"] = Stage(train="^lm|^projector", optimizer=lambda groups: torch.optim.SGD(groups, lr=0.05))
    options: dict[str, Any] = {"strategy": "ddp", "devices": world} if world > 1 else {}
    _, net = run(folder, Resume(every=1, keep=99), net=model(stages), path=path, **options)
    return state(net)


# preferences --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_stage_of_preferences_learns_which_answer_is_right(tmp_path: Path) -> None:
    """Beside what it was when the stage began: right answers gain over wrong ones of problems that it never saw."""
    answers, steps = Questions(batch_size=32, kinds=["colour", "count"], **SEEN), 20
    held = StagedData(
        {
            "answers": StageData(answers, 1, steps),
            "pairs": StageData(QuestionPairs(batch_size=32, kinds=["colour", "count"], **SEEN), 2, steps),
        },
        evaluate="answers",
    )
    net = model({"answers": Stage(), "pairs": Stage(DPO(beta=1.0))}, distill=Distill(TeacherStage()))
    trainer, _ = fit(tmp_path, Stages(), net=net, data=held, max_epochs=-1, limit_val_batches=0, log_every_n_steps=1)
    assert float(trainer.callback_metrics["train/preference"]) < math.log(2) - 0.1
    gain, before = right_over_wrong(net), right_over_wrong(net.distill.teacher.average)  # type: ignore[union-attr]
    assert gain > before + 0.5, (gain, before)


@torch.no_grad()
def right_over_wrong(net: Any) -> float:
    """How much likelier right answers are than wrong ones, in the logarithm, on validation problems."""
    held = QuestionPairs(batch_size=32, kinds=["colour", "count"], **SEEN)
    rows = held._set("val", False, [DEVELOPMENT_VENDOR], of=PairSet)
    net.eval()
    found = []
    for raw in held.evaluation_loader(rows):
        batch = held.on_after_batch_transfer(raw, 0)
        worse = replace(batch, inputs={n: batch.inputs.get(f"{n}_neg", x) for n, x in batch.inputs.items()})
        found.append((whole(net, batch)[0] - whole(net, worse)[0])[batch.present["text"]])
    return float(torch.cat(found).mean())


def inner(net: Staged) -> VisionLanguage:
    assert isinstance(net.inner, VisionLanguage)
    return net.inner


def test_preferences_are_the_loop_over_pairs(tmp_path: Path) -> None:
    held = QuestionPairs(batch_size=8, kinds=["name", "count"], **SEEN)
    batch = held.on_after_batch_transfer(next(iter(held.train_dataloader())), 0)
    torch.manual_seed(1)
    reference = model().double().eval()
    net = model({"pairs": Stage(DPO(0.3))}, distill=Distill(Given(reference))).double().eval()
    net.distill.prepare(net)  # type: ignore[union-attr]
    with torch.no_grad():
        for parameter in inner(net).lm.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    batch.inputs["image"] = batch.inputs["image"].double()
    found = net.terms(batch)["preference"].value
    for b in range(8):
        gain = 0.0
        for sign, end in ((1, ""), (-1, "_neg")):
            ids, said = batch.inputs[f"text{end}"][b], batch.inputs[f"loss_mask{end}"][b]
            one = batch.select(slice(b, b + 1))
            one.inputs |= {"text": ids[None], "loss_mask": said[None]}
            for network, of in ((inner(net), 1), (inner(reference), -1)):
                h_SW, row = network.sequence(one)
                logits = network.lm.logits(through(network.lm, h_SW, row.real_BS, network.row))[0].log_softmax(-1)
                for s in row.loss_mask_BS[0].nonzero()[:, 0].tolist():
                    gain += sign * of * float(logits[s - 1, int(row.ids_BS[0, s])].detach())
        # queries and keys are turned in float32
        assert float(found[b].detach()) == pytest.approx(math.log1p(math.exp(-0.3 * gain)), rel=ulps(4, F32))


# what is seen of it -------------------------------------------------------------------------------------------------


def test_stages_are_marked_and_their_weights_kept(tmp_path: Path) -> None:
    logger, kept = TensorBoardLogger(tmp_path, name="", version=""), ImageCache()
    trainer = L.Trainer(
        **{**QUIET, "logger": logger, "limit_val_batches": 1, "check_val_every_n_epoch": 1, "log_every_n_steps": 1},
        max_epochs=-1,
        default_root_dir=tmp_path,
        num_sanity_val_steps=0,
        callbacks=[letters(), Stages(watch=["val/loss", "rollouts/reward"]), kept, Counting()],
    )
    net = model()
    trainer.fit(net, datamodule=data())
    for k, name in ((1, "captions"), (3, "answers"), (5, "reward")):
        saved = torch.load(tmp_path / "stages" / f"{name}.ckpt", weights_only=True)
        assert saved["stage"] == name and equal(saved["state_dict"], kept.weights[k])
    again = model()
    L.Trainer(**QUIET, limit_test_batches=1).test(again, None, tmp_path / "stages/answers.ckpt", False, data(), True)
    assert again.stage == "answers" and equal(state(again), kept.weights[3]), "for descant test"
    seen = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in seen.Scalars("stages/number")] == [(0, 1), (STEPS, 2), (3 * STEPS, 3)]
    words = [e.tensor_proto.string_val[0].decode() for e in seen.Tensors("stages/text_summary")]
    assert [word.split(":")[1].split(",")[-1] for word in words] == [" captions", " answers", " reward"]
    assert seen.Images("pictures/stages")
    stages = next(c for c in trainer.callbacks if isinstance(c, Stages))  # type: ignore[attr-defined]
    assert [step for step, _ in stages.seen["val/loss"]] == [STEPS, 2 * STEPS, 3 * STEPS, 3 * STEPS + 1, WHOLE]
    assert [step for step, _ in stages.seen["rollouts/reward"]] == [3 * STEPS + 1, WHOLE]
    axes = stages.picture().axes[0]
    assert axes.get_xlim() == (0, 3) and axes.get_xticks().tolist() == [0, 1, 2, 3], "stages are equally wide"


class Counting(L.Callback):
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.log("val/loss", 1.0)


# the order of a stage -----------------------------------------------------------------------------------------------


def test_stretches_are_the_walk_itself() -> None:
    """Epochs of two steps of data that has three: what was seen after six steps is what two passes see."""
    held = Questions(batch_size=8, **SEEN)
    inner = held.order(list(range(24)), accumulate=2)  # type: ignore[arg-type]
    whole = []
    for epoch in (0, 1):
        inner.set_epoch(epoch)
        whole += [window.slots for window in inner]
    found = []
    for epoch in (4, 5, 6):
        order = StagedOrder(held.order(list(range(24)), accumulate=2), 2, since=4, epoch=epoch)  # type: ignore[arg-type]
        found += [window.slots for window in order]
    assert found == whole
    late = StagedOrder(held.order(list(range(24)), accumulate=2), 2, since=4, epoch=5, first=3)  # type: ignore[arg-type]
    assert [window.slots for window in late] == whole[7:8]


# mistakes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda _: Stage(train="("), r"train '\(': "),
        (lambda _: Staged(VisionLanguage(**small_chat()), {}), "stages: none; such as"),
        (lambda _: StagedData({}), "stages: none; such as"),
        (
            lambda _: StageData(Questions(**SEEN), epochs=-1),
            "StageData: epochs -1: at least 0 epochs .a skipped stage. and 1 step, sample or FLOP",
        ),
        (lambda _: StagedData({"a": StageData(Questions(**SEEN), 0)}), "stages a: all have 0 epochs; at least one is"),
        (lambda _: data(evaluate="reword"), "evaluate: no stage 'reword'; there is captions, answers, reward"),
        (
            lambda _: model({"reward": Stage(GRPO(PolicyLoss(kl=KL(0.1))))}),
            "stages.reward: GRPO: loss.kl needs a reference policy",
        ),
        (
            lambda p: run(p, net=model(model().stages | {"reward": Stage(GRPO(), "projektor")})),
            r"stages.reward.train 'projektor' matches no parameter; no such name; did you mean projector\?",
        ),
        (
            lambda p: run(p, net=model({"captions": Stage(), "answer": Stage(), "reward": Stage(GRPO())})),
            r"data.stages captions, answers, reward, model.stages captions, answer, reward: 'answers': no such name; "
            r"did you mean answer\?",
        ),
        (lambda p: run(p, max_epochs=7), "trainer.max_epochs 7: the stages have 5 together; set it to -1"),
        (lambda p: run(p, net=model(shard=Shard())), "shard: no device mesh; set trainer.strategy"),
        (
            lambda p: fit(p, Stages(), net=model(), data=Questions(**SEEN), max_epochs=1),
            "Stages needs data in stages, StagedData, not Questions",
        ),
        (
            lambda p: fit(p, Stages(), net=chat(), data=data(), max_epochs=-1),
            "Stages needs the protocol StagedRecipe .*; VisionLanguage lacks it, Staged has it",
        ),
        (
            lambda p: fit(p, letters(), net=model(), data=data()),
            "the callback Stages, which moves to the next stage, is missing",
        ),
        (
            lambda p: fit(p, Stages(), net=model(), data=data(), max_epochs=-1),
            "stage 'reward': its data are rollouts of the model; add the callback Rollouts",
        ),
        (
            lambda p: fit(
                p, letters(), Stages(), net=model({"a": Stage()}), data=StagedData({"a": StageData(QUESTIONS, 3)})
            ),
            "Rollouts needs rollout data, such as QuestionRollouts, not Questions",
        ),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, what: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        what(tmp_path)
    assert "\n" not in str(error.value)


def chat() -> Any:
    return VisionLanguage(
        **small_chat(),
    )
