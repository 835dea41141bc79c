"""A step of reinforcement beside TRL's: the same Llama, prompts and rewards, answers of equal lengths; steps alternate.

Each trainer runs completely, with all its work between two steps, in its own thread that is released for one step at a
time. Letters: N prompts, G answers to each, T tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

import re
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks import Row
from benchmarks.generate import LENGTH, V, llama, ours_of
from benchmarks.timing import ratio, wait
from descant.callbacks import Rollouts
from descant.datamodules.base import BatchDataset, Rows
from descant.datamodules.tasks.dialogues import DialogueSet
from descant.datamodules.tasks.rollout_buffer import RolledDialogues
from descant.datamodules.tasks.text_tasks import TaskProblems, TextTasks
from descant.modules.core.batch import Batch
from descant.modules.language import Generated
from descant.modules.objectives.language import GRPO
from descant.modules.policy.rewards import Answer, Rewards, Verifier
from descant.modules.tokenizers.text import BOS, EOS, PAD, Tokenizer
from descant.recipes import VisionLanguage

#: Bars: TRL's time / ours, and generation's share of our step.
STEP, GENERATION = 1.7, 0.45
#: Largest relative difference in mean answer length, which determines the cost.
LENGTHS = 0.15
N, G, T, NEW = 8, 8, 64, 64
ANSWER = V - 1
FIRST = 3  # the first word; lower ids are special tokens


def model(device: str = "cpu", **more: Any) -> Any:
    """Train transformers' Llama so that one word in 32 ends an answer. ``more``: other settings of its config."""
    torch.manual_seed(0)
    made = LlamaForCausalLM(llama(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, **more)).to(device)
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-3)
    for _ in range(120):
        ids = torch.randint(FIRST, ANSWER, (32, 64))
        ids[torch.rand(ids.shape) < 1 / 32] = EOS
        ids = ids.to(device)
        made(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return made.eval()


def prompts() -> Tensor:
    """Return prompts, int64 ``[32, T]``, which end with the mark of an answer."""
    ids = torch.randint(FIRST, ANSWER, (4 * N, T), generator=torch.Generator().manual_seed(1))
    ids[:, 0], ids[:, -1] = BOS, ANSWER
    return ids


def even(words: str) -> float:
    """Return the share of words with an even number."""
    said = [int(number) % 2 == 0 for number in re.findall(r"w(\d+)", words)]
    return sum(said) / max(len(said), 1)


class Even(Verifier):
    def __call__(self, answer: Answer) -> float | None:
        return even(answer.text)


class WordTokenizer(Tokenizer):
    """Tokenizer whose token i is the word ``wi``."""

    vocabulary = V - 2

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(f"w{i}" for i in ids if i >= FIRST)


class Prompts(DialogueSet):
    def __init__(self, data: PromptTask, problems: TaskProblems) -> None:
        super().__init__(data, problems)
        self.data = data

    def present(self, index_N: np.ndarray) -> dict[str, Tensor]:
        return {"text": torch.ones(len(index_N), dtype=torch.bool)}

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        p = self.problems.where(index_B)
        text_BT, said_BT = self.data.dialogue_rows(prompts()[p.number_N].tolist(), [[FIRST]] * len(p))
        answer = torch.full((len(p), self.data.answer_length), PAD)
        return Rows({"text": text_BT, "loss_mask": said_BT}, {"answer": answer}, torch.from_numpy(p.key_N))


class PromptTask(RolledDialogues, TextTasks):
    """The prompts, N at a time."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(items=N, group=G, tasks={"even": None}, length=T + NEW + 1, answer_length=NEW, **kwargs)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return WordTokenizer(self.length)

    def asked_set(self, problems: TaskProblems) -> Prompts:
        return Prompts(self, problems)

    @cached_property
    def training_problems(self) -> Prompts:
        number_N = np.arange(4 * N)
        return self.asked_set(TaskProblems(0 * number_N, number_N, number_N < 0, number_N))

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        return {}


class Gate:
    """Releases a run in a thread for one step at a time; errors of the run are raised by the call for its step."""

    def __init__(self, run: Callable[[Gate], None]) -> None:
        self._go, self._done, self._error = threading.Semaphore(0), threading.Semaphore(0), list[BaseException]()
        self.over = False

        def inside() -> None:
            try:
                run(self)
            except BaseException as error:
                self._error.append(error)
            self._done.release()

        self._thread = threading.Thread(target=inside, daemon=True)
        self._thread.start()
        self._done.acquire()  # until the run waits for its first step
        self._check()

    def wait(self) -> bool:
        """Wait before a step, in the run; return whether there is another step."""
        self._done.release()
        self._go.acquire()
        return not self.over

    def __call__(self) -> None:
        self._go.release()
        self._done.acquire()
        self._check()

    def _check(self) -> None:
        if self._error:
            raise self._error[0]

    def end(self, timeout: float = 60.0) -> None:
        self.over = True
        self._go.release()
        self._thread.join(timeout)


class Timed(VisionLanguage):
    """A VisionLanguage that records how long it generates."""

    told: Ours

    def roll_out(self, batch: Batch, group: int, seed_R: Tensor) -> Generated:
        begin = time.perf_counter()
        found = super().roll_out(batch, group, seed_R)
        wait(self.device)
        self.told.generating += time.perf_counter() - begin
        return found


class Ours(L.Callback):
    """Steps of ours, the share of generation in them, and the lengths of answers."""

    def __init__(self, device: str = "cpu") -> None:
        self.gate: Gate | None = None
        self.device = device
        self.generating = self.whole = self.began = 0.0
        self.lengths: list[float] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.gate is not None
        if self.began:
            self.whole += time.perf_counter() - self.began
            self.lengths.append(float(trainer.callback_metrics["rollouts/length"]))
        trainer.should_stop = not self.gate.wait()
        self.began = time.perf_counter()

    def run(self, gate: Gate, owner: Any) -> None:
        self.gate = gate
        net = Timed(
            lm=ours_of(owner),
            answer_token=ANSWER,
            objective=GRPO(),
            new=NEW,
            optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-6),
            row=LENGTH,
        )
        net.told = self
        trainer = L.Trainer(
            max_epochs=10**6,
            accelerator=self.device,
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            limit_val_batches=0,
            gradient_clip_val=1.0,
            callbacks=[self, Rollouts(Rewards({"even": Even()}))],
        )
        trainer.fit(net, datamodule=PromptTask(batch_size=N * G))


def _tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import WordLevel

    made = Tokenizer(WordLevel({f"w{i}": i for i in range(V)}, unk_token=f"w{PAD}"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.WhitespaceSplit(), decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=f"w{PAD}", eos_token=f"w{EOS}", bos_token=f"w{BOS}", padding_side="left"
    )


class Theirs:
    """Steps of TRL's GRPOTrainer, and the lengths of answers."""

    def __init__(self, device: str = "cpu") -> None:
        self.lengths: list[float] = []
        self.device = device

    def run(self, gate: Gate, owner: Any) -> None:
        from datasets import Dataset
        from transformers import TrainerCallback
        from trl import GRPOConfig, GRPOTrainer

        class Steps(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
                control.should_training_stop = not gate.wait()
                return control

        def earned(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
            self.lengths.append(float(np.mean([len(ids) for ids in completion_ids])))
            return [even(said) for said in completions]

        asked = [" ".join(f"w{i}" for i in row) for row in prompts().tolist()]
        with tempfile.TemporaryDirectory() as folder:
            config = GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=N * G,
                num_generations=G,
                max_completion_length=NEW,
                max_steps=10**6,
                learning_rate=1e-6,
                lr_scheduler_type="constant",
                beta=0.0,
                loss_type="dapo",
                temperature=1.0,
                max_grad_norm=1.0,
                logging_steps=10**6,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=self.device == "cpu",
                bf16=False,
                gradient_checkpointing=False,
            )
            trainer = GRPOTrainer(
                model=owner,
                args=config,
                reward_funcs=[earned],
                train_dataset=Dataset.from_dict({"prompt": asked}),
                processing_class=_tokenizer(),
                callbacks=[Steps()],
            )
            trainer.train()


def step(pairs: int = 30) -> Iterator[Row]:
    """Measure steps a second of on-policy GRPO without a KL: 8 prompts of 64 tokens, 8 answers each, of 64 at most."""
    warnings.simplefilter("ignore")
    made, ours, theirs = model(), Ours(), Theirs()
    mine = Gate(lambda gate: ours.run(gate, made))
    owner = Gate(lambda gate: theirs.run(gate, made))
    result = ratio(mine, owner, pairs, warmup=2)
    mine.end()
    owner.end()
    lengths = [float(np.mean(of.lengths)) for of in (ours, theirs)]
    if abs(lengths[0] / lengths[1] - 1) > LENGTHS:
        raise AssertionError(f"answers of {lengths[0]:.1f} tokens, of TRL's {lengths[1]:.1f}: not the same work")
    yield Row.at_least("reinforce/step", result.value, STEP, result.interval)
    yield Row.at_most("reinforce/generation", ours.generating / ours.whole, GENERATION)
    yield Row.informs("reinforce/length", lengths[0])
