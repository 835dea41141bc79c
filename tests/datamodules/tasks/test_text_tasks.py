"""Text-only tasks: reproducible problems, splits by question, and scores of answers."""

from __future__ import annotations

import builtins
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from descant.datamodules.sampling.resumable_sampler import Order
from descant.datamodules.tasks.dialogues import SPLITS
from descant.datamodules.tasks.text_tasks import (
    EVALUATING,
    SIGNS,
    UNSTEADY,
    Arithmetic,
    Problem,
    ReasoningGym,
    Task,
    TaskProblems,
    TaskRollouts,
    TaskSet,
    TextTasks,
)
from descant.modules.policy.rewards import Answer, ExactAnswer, NumericAnswer, TaskAnswer, Verifier
from descant.modules.tokenizers.text import BOS, EOS, PAD, WordTokenizer
from tests.datamodules.batches import whole

N, G = 6, 4
GYM = {"min_digits": 1, "max_digits": 2, "max_terms": 3}


class Few(Task):
    """Seven questions, each of which many numbers ask."""

    reaches = True

    def make(self, number: int, far: bool = False) -> Problem:
        return Problem(f"{'far' if far else 'near'} {number % 7}", str(number % 7))


def tasks(**options: Any) -> TextTasks:
    made = {"plus": Arithmetic(["plus"]), "times": Arithmetic(["times"], digits=1)}
    return TextTasks(**(dict[str, Any](tasks=made, numbers=400, held=30, length=24, batch_size=16) | options))


def rollouts(**options: Any) -> TaskRollouts:
    made = {"any": Arithmetic(), "few": Few()}
    fixed = dict[str, Any](items=N, group=G, tasks=made, numbers=60, held=30, length=32, batch_size=N * G)
    return TaskRollouts(**(fixed | options))


def questions(data: TextTasks, rows: TaskSet) -> list[str]:
    return [data.problem(rows.problems, n).question for n in range(len(rows))]


def every_set(data: TextTasks) -> dict[str, TaskSet]:
    sets: dict[str, Any] = {"train": data.training_set()}
    return sets | data.evaluation_sets("validate") | data.evaluation_sets("test")


def gym(dataset: str = "chain_sum", **options: Any) -> ReasoningGym:
    pytest.importorskip("reasoning_gym")
    return ReasoningGym(dataset, **options)


# problems ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("far", [False, True])
def test_arithmetic_is_exact_and_reproducible(far: bool) -> None:
    task = Arithmetic(digits=2, far_digits=4)
    made = [task.make(n, far) for n in range(600)]
    assert made == [Arithmetic(digits=2, far_digits=4).make(n, far) for n in range(600)]
    assert {sign for sign in SIGNS.values() for problem in made if sign in problem.question} == set(SIGNS.values())
    for question, answer, entry in made:
        assert question.endswith("=") and str(eval(question[:-1])) == answer and entry is None
    operands = np.array([_operands(problem.question) for problem in made])
    assert (operands.min() >= 100 and operands.max() > 9000) if far else (operands.min() == 0 and operands.max() == 99)


def _operands(question: str) -> list[int]:
    sign = next(sign for sign in SIGNS.values() if sign in question)
    return [int(x) for x in question[:-1].split(sign)]


def test_far_problems_are_larger_than_training_problems() -> None:
    data = tasks(tasks={"any": Arithmetic(digits=2, far_digits=3)}, numbers=2000)
    sets = every_set(data)
    largest = {name: max(max(_operands(q)) for q in questions(data, rows)) for name, rows in sets.items()}
    least_far = min(min(_operands(q)) for q in questions(data, sets["far"]))
    assert max(largest["train"], largest["val"], largest["problems"]) <= 99 < 100 <= least_far, (largest, least_far)


def test_splits_are_disjoint_by_question() -> None:
    """Of two numbers that ask the same, one alone is kept, and no split has what another has."""
    data = tasks(tasks={"few": Few(), "one": Arithmetic(["plus"], digits=1), "again": Arithmetic(["plus"], digits=1)})
    asked = {name: questions(data, rows) for name, rows in every_set(data).items()}
    sums = [problem.question for problem in (Arithmetic(["plus"], digits=1).make(n) for n in range(400))]
    assert len(set(sums)) < len(sums), "numbers ask again"
    whole = [question for these in asked.values() for question in these]
    assert len(set(whole)) == len(whole) and asked.keys() == {"train", "val", "problems", "far"}
    for name, rows in every_set(data).items():
        assert set(questions(data, rows)) == set(asked[name]), "nothing of it is drawn"
    many = tasks(numbers=3000, held=300)
    sizes = {name: len(rows) for name, rows in every_set(many).items()}
    plus = len({Arithmetic(["plus"]).make(n).question for n in range(3000)})
    times = len({Arithmetic(["times"], digits=1).make(n).question for n in range(3000)})
    # 3000 numbers fall into the splits by their hashes: 2% is one standard error
    assert sizes["train"] == pytest.approx((plus + times) * (SPLITS["train"] - SPLITS["val"]), rel=0.05)
    assert sizes["val"] == pytest.approx(sizes["problems"], rel=0.2)  # 300 each: 6% is one standard error


def test_held_out_problems_are_independent_of_the_number_of_training_problems() -> None:
    few, many = every_set(tasks(numbers=100)), every_set(tasks(numbers=4000))
    for name in ("val", "problems", "far"):
        assert np.array_equal(few[name].problems.key_N, many[name].problems.key_N)
    assert len(many["train"]) > len(few["train"])


# rows ----------------------------------------------------------------------------------------------------------------


def test_rows_are_the_question_the_mark_the_answer_and_the_end() -> None:
    data = tasks()
    rows = data.training_set()
    batch, tokenizer = whole(rows), data.tokenizer
    assert set(batch.inputs) == {"text", "loss_mask"} and set(batch.present) == {"text"}
    assert data.image_token is None and data.answer_token == tokenizer.vocabulary + 1
    for n in range(len(rows)):
        question, answer, _ = data.problem(rows.problems, n)
        ids = [BOS, *tokenizer.ids(question), data.answer_token, *tokenizer.ids(answer), EOS]
        assert batch.inputs["text"][n].tolist() == ids + [PAD] * (data.length - len(ids))
        assert batch.inputs["text"][n][batch.inputs["loss_mask"][n]].tolist() == [*tokenizer.ids(answer), EOS]
        assert data.spell([i for i in batch.targets["answer"][n].tolist() if i]) == answer
    names = [data.classes["task"][k] for k in batch.targets["task"].tolist()]
    signs = {"plus": "+", "times": "*"}
    assert all(signs[name] in question for name, question in zip(names, questions(data, rows), strict=True))
    assert torch.equal(batch.content_id, torch.from_numpy(rows.problems.key_N)) and torch.equal(
        batch.index, batch.content_id
    )


def test_problems_are_the_same_in_all_processes() -> None:
    """Two ranks, or two micro-batches, read the rows that one reads."""
    data = tasks()
    rows = data.training_set()
    one = [rows[w] for w in Order(len(rows), 16, seed=3, shuffle=True)]
    for cut in ({"rank": 0, "world": 2}, {"rank": 1, "world": 2}, {"accumulate": 2}):
        part = [rows[w] for w in Order(len(rows), 16, seed=3, shuffle=True, **cut)]
        seen = {int(i): text for b in part for i, text in zip(b.index, b.inputs["text"], strict=True)}
        whole = {int(i): text for b in one for i, text in zip(b.index, b.inputs["text"], strict=True)}
        assert all(torch.equal(text, whole[i]) for i, text in seen.items())
        if "accumulate" in cut:
            assert seen.keys() == whole.keys()


# answers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "verifier"),
    [
        (Arithmetic, ExactAnswer),
        (Arithmetic, NumericAnswer),
        (Arithmetic, TaskAnswer),
        (lambda: gym(config=GYM), TaskAnswer),
        (lambda: gym("gcd"), TaskAnswer),
        (lambda: gym("word_sorting"), TaskAnswer),
        (lambda: gym("decimal_chain_sum"), TaskAnswer),
        (lambda: gym("rotate_matrix"), TaskAnswer),
    ],
)
def test_a_correct_answer_scores_one_and_a_wrong_one_zero(task: Any, verifier: type[Verifier]) -> None:
    if verifier is NumericAnswer:
        pytest.importorskip("math_verify")
    made, judge = task(), verifier()
    for number in range(20):
        problem = made.make(number)
        right, wrong = (Answer(said, problem.answer, entry=problem.entry) for said in (problem.answer, "no idea"))
        assert (judge(right), judge(wrong)) == (1, 0), problem
        assert judge(right._replace(text="")) == 0


def test_a_task_may_accept_several_answers() -> None:
    problem = gym(config=GYM).make(3)
    said = f"{problem.answer}.0"
    assert TaskAnswer()(Answer(said, problem.answer, entry=problem.entry)) == 1
    assert TaskAnswer()(Answer(said, problem.answer)) == ExactAnswer()(Answer(said, problem.answer)) == 0
    broken = gym("prime_factorization").make(0)
    with pytest.raises(ValueError, match="int"):
        broken.entry.dataset.score_answer("no idea", broken.entry.row)
    assert TaskAnswer()(Answer("no idea", broken.answer, entry=broken.entry)) == 0, "an unreadable answer ends no run"


def test_far_problems_of_reasoning_gym() -> None:
    made = gym(config=GYM, far={"min_digits": 3, "max_digits": 3})
    data = tasks(tasks={"sums": made}, length=128)
    digits = {
        name: [max(len(x) for x in q.split(":")[1].split() if x.isdigit()) for q in questions(data, rows)]
        for name, rows in every_set(data).items()
    }
    assert max(digits["train"]) == 2 and set(digits["far"]) == {3}
    assert not gym(config=GYM).reaches and "far" not in tasks(tasks={"a": gym()}, length=128).evaluation_sets("test")


@pytest.mark.slow
def test_accepted_tasks_of_reasoning_gym_are_the_same_in_all_processes() -> None:
    pytest.importorskip("reasoning_gym")
    found = [
        subprocess.run([sys.executable, "-c", _ASKED], capture_output=True, text=True, env={"PYTHONHASHSEED": seed})
        for seed in ("1", "2")
    ]
    one, two = (done.stdout.splitlines() for done in found)
    assert len(one) > 80, found[0].stderr
    assert one == two


_ASKED = """
from reasoning_gym.factory import DATASETS
from descant.datamodules.tasks.text_tasks import ReasoningGym
from descant.modules.core.rng import mix
for name in sorted(DATASETS):
    try:
        task = ReasoningGym(name)
        print(name, [mix(0, task.make(n).question, task.make(n).answer) for n in (0, 1, 2, 3, 11, 27)])
    except ValueError as error:
        pass
"""


# rollouts ------------------------------------------------------------------------------------------------------------


def answered(data: TaskRollouts, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    R, M = N * G, data.answer_length
    length = torch.randint(1, 5, (R,), generator=g)
    ended = torch.rand(R, generator=g) < 0.5
    said = torch.randint(8, 264, (R, M), generator=g) * (torch.arange(M) < length[:, None])
    said[torch.arange(R)[ended], length[ended] - 1] = EOS
    x_RM = torch.randn(R, M, generator=g)
    return {"said": said, "length": length, "ended": ended, "live": ended, "advantage": x_RM[:, 0], "old": x_RM}


def test_rows_of_rollouts_are_questions_and_sampled_answers() -> None:
    data = rollouts()
    with pytest.raises(ValueError, match=r"^TaskRollouts: no answers yet; the callback Rollouts samples them"):
        whole(data.training_set())
    rolled = answered(data)
    data.renew(data.fresh(2), rolled, 2)
    batch = whole(data.training_set())
    for r in range(N * G):
        question = data.problem(data.pool, r // G).question
        said = rolled["said"][r, : int(rolled["length"][r])].tolist()
        asked = [BOS, *data.tokenizer.ids(question), data.answer_token]
        end = [] if said[-1] == EOS else [EOS]
        ids = [i for i in batch.inputs["text"][r].tolist() if i != PAD]
        assert ids == [*asked, *said, *end]
        assert batch.inputs["text"][r][batch.inputs["loss_mask"][r]].tolist() == said, "no end that it did not say"
    assert torch.equal(batch.targets["advantage"], rolled["advantage"].double())
    assert batch.targets["step"][0].tolist() == [
        int(rolled["live"].sum()),
        int((rolled["live"] * rolled["length"]).sum()),
    ]


def test_a_checkpoint_restores_questions_and_answers() -> None:
    data, again = rollouts(), rollouts()
    data.renew(data.fresh(3), answered(data), 3)
    again.load_state_dict(data.state_dict())
    one, two = whole(data.training_set()), whole(again.training_set())
    assert again.version == 3 and one.inputs.keys() == two.inputs.keys()
    for name in one.inputs:
        assert torch.equal(one.inputs[name], two.inputs[name])
    for name in one.targets:
        assert torch.equal(one.targets[name], two.targets[name])
    for other, says in (
        (rollouts(items=N + 1, batch_size=(N + 1) * G), "items 7: the checkpoint's pool has 6"),
        (rollouts(group=G + 1, batch_size=N * (G + 1)), "group 5: the checkpoint's has 4"),
        (rollouts(tasks={"any": Arithmetic(digits=3, far_digits=3)}), "tasks"),
    ):
        with pytest.raises(ValueError, match=f"^{says}"):
            other.load_state_dict(data.state_dict())


def test_rollouts_have_training_problems_only_in_random_order() -> None:
    data = rollouts()
    train = set(data.training_problems.problems.key_N.tolist())
    first, next_one, later = data.fresh(0), data.fresh(0, 1), data.fresh(1)
    for some in (first, next_one, later):
        assert len(set(some.key_N.tolist())) == N and set(some.key_N.tolist()) <= train
    assert not set(first.key_N.tolist()) & set(next_one.key_N.tolist())
    assert not np.array_equal(first.key_N, later.key_N)
    seen = [int(i) for batch in data.asking(first) for i in batch.index[batch.present["text"]]]
    assert seen == list(range(N))
    held = TaskRollouts(items=N, group=G, tasks={"sums": gym(config=GYM)}, numbers=60, length=128, batch_size=N * G)
    entry = held.entry(held.pool, 2)
    assert entry.score(held.problem(held.pool, 2).answer) == 1
    assert data.entry(data.pool, 0) is None, "arithmetic has one right answer"


# what cannot be ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Arithmetic(["pluss"]), "operations: 'pluss' is not one of plus, minus, times"),
        (lambda: Arithmetic([]), "operations: none; such as plus"),
        (lambda: Arithmetic(digits=3, far_digits=2), "digits 3, far_digits 2: ascending, from 1 to 15"),
        (lambda: Arithmetic(far_digits=16), "digits 2, far_digits 16: ascending, from 1 to 15"),
        (lambda: TextTasks({}), "tasks: none; such as"),
        (lambda: tasks(held=0), "numbers 400, held 0: at least 1"),
        (lambda: tasks(drop={"image": 0.5}), "drop: no modality 'image'; this data has text"),
        (
            lambda: tasks(tasks={"few": Few()}).evaluation_sets("validate"),
            "no question of few is in the split val: increase",
        ),
        (lambda: whole(tasks(length=6).training_set()), r"length 6: '\d+.\d+=' and its answer are \d+ tokens"),
        (lambda: whole(tasks(answer_length=2).training_set()), r"answer_length 2: '\d+' has 3 tokens"),
        (lambda: tasks(text=WordTokenizer(["a"])).training_set()[_first()], r"'\d+' is not in the tokenizer's 1 words"),
        (lambda: rollouts(group=1), "group 1: at least 2 answers to a question"),
        (lambda: rollouts(batch_size=7), "batch_size 7: 6 questions x 4 answers make no whole steps"),
        (lambda: rollouts(items=600, batch_size=24).pool, r"items 600: there are \d+ training problems"),
        (lambda: rollouts(num_workers=1), "num_workers 1: workers would not see a new pool"),
        (lambda: gym("chain_sm"), r"dataset: 'chain_sm' is not one of \d+; nearest: chain_sum"),
        (lambda: gym(config={"max_trms": 2}), "config: 'max_trms' is not one of min_terms, max_terms"),
        (lambda: gym(far={"max_trms": 2}), "far: 'max_trms' is not one of"),
        (lambda: gym(config={"min_terms": 9}), "config of 'chain_sum': max_terms must be >= min_terms"),
        (lambda: gym(config={"size": 5}).make(5), "config.size 5 of 'chain_sum': problem 5 is needed; increase it"),
        (lambda: gym("rush_hour"), "dataset 'rush_hour': it has no correct answer"),
        *((lambda name=name: gym(name), f"dataset '{name}': its questions differ") for name in UNSTEADY),
        *((lambda name=name: gym(name), f"dataset '{name}': its scores execute answers") for name in EVALUATING),
    ],
)
def test_mistakes_raise_one_line(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=f"^{says}") as told:
        make()
    assert "\n" not in str(told.value)


def _first() -> Any:
    return next(iter(Order(16, 16, seed=0, shuffle=False)))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("reasoning_gym"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"^ReasoningGym needs the package reasoning-gym: pip install reasoning-gym$"):
        ReasoningGym("chain_sum")


def test_columns_from_their_arrays() -> None:
    some = TaskProblems(*(np.arange(4) + 10 * k for k in range(4)))
    assert list(some.arrays()) == ["task", "number", "far", "key"]
    both = some.where(np.array([2])).and_then(TaskProblems.of(some.arrays()))
    assert both.key_N.tolist() == [32, 30, 31, 32, 33] and len(both) == 5
