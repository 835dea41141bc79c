"""UL2 (arXiv 2205.05131): spans as T5's release cuts them, texts that can be rebuilt, and a prefix that sees itself.

Letters: B texts, T tokens of one, U slots of a target, S of a row.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from descant.datamodules.prepare.docstrings import library_texts
from descant.datamodules.tasks.denoised_texts import SENTINELS, DenoisedTexts
from descant.modules.core.batch import Batch
from descant.modules.language import CausalLM
from descant.modules.tokenizers.text import EOS
from descant.modules.transforms import denoisers as ul2
from descant.modules.transforms.denoisers import Denoiser, MixtureOfDenoisers, SpanCorruption, Suffix
from descant.recipes import VisionLanguage
from tests._suites import GradientExact, MissingModalities, Ranks, Resume
from tests.tolerance import statistical

FIRST, KEY_B = 900, np.arange(64) * 7919 + 3
SEVEN = MixtureOfDenoisers()
#: Denoisers of short windows, with spans of several tokens and suffixes.
SHORT: list[Denoiser] = [SpanCorruption(3, 0.2, free=True), SpanCorruption(2, 0.5), Suffix()]


def rand(*size: int) -> Tensor:
    return torch.rand(*size, generator=torch.Generator().manual_seed(0))


def corrupted(
    denoisers: list[Denoiser] | None, length: int, ragged: bool = False
) -> tuple[Tensor, Tensor, ul2.Denoised]:
    """64 texts of ids 100, 101, ...; ``ragged``: of 2 tokens to ``length``."""
    length_B = 2 + torch.arange(64) * (length - 2) // 63 if ragged else torch.full((64,), length)
    ids_BT = (100 + torch.arange(length)).where(torch.arange(length) < length_B[:, None], 0)
    return ids_BT, length_B, MixtureOfDenoisers(denoisers)(ids_BT, length_B, KEY_B, FIRST + length)


def runs(hidden: list[bool]) -> list[int]:
    """Lengths of the runs of True."""
    return [len(run) for run in "".join(".x"[h] for h in hidden).split(".") if run]


def test_all_ways_to_cut_are_equally_likely_and_those_of_a_loop() -> None:
    u_BT = rand(6000, 8)
    length_BK = ul2.segments(torch.full((6000,), 5), torch.full((6000,), 3), u_BT)
    for u, lengths in zip(u_BT[:100].tolist(), length_BK[:100].tolist(), strict=True):
        cuts = [0, *sorted(sorted(range(1, 5), key=lambda t: u[t])[:2]), 5]
        assert lengths == [b - a for a, b in pairwise(cuts)] + [0] * 5
    counts = Counter(map(tuple, length_BK.tolist()))
    assert len(counts) == 6 and all(abs(n / 6000 - 1 / 6) < statistical(0.38, 6000) for n in counts.values())
    # T5's random_spans_helper: inputs of 512 tokens (and targets of 114) are of texts of 568
    assert [x.tolist() for x in ul2.span_counts(torch.tensor([568]), 3, 0.15)] == [[568 + 28 + 1 - 512], [114 - 85 - 1]]


@pytest.mark.parametrize("how", [{}, {"free": True}, {"deviation": 0.3}])
@pytest.mark.parametrize(("mean", "rate"), ul2.SPANS)
def test_rate_and_mean_are_those_asked_for_and_spans_are_apart(mean: int, rate: float, how: dict[str, Any]) -> None:
    denoiser, length = SpanCorruption(mean, rate, **how), 3840  # whole numbers of tokens and spans
    hidden_BT = denoiser.hide_tokens(torch.full((8,), length), rand(8, 2, length + 2))
    wide = [runs(row) for row in hidden_BT.tolist()]
    assert all(abs(sum(row) / length / rate - 1) < 0.01 for row in wide)
    assert all(abs(sum(row) / len(row) / mean - 1) < 0.01 and len(row) == denoiser.spans(length) for row in wide)
    assert len({n for row in wide for n in row}) > 1
    assert "free" in how or (not hidden_BT[:, 0].any() and hidden_BT[:, -1].all()), "as in the release"
    spread = float(torch.tensor([n / mean for row in wide for n in row]).std())
    assert mean == 3 or (spread < 0.4) == ("deviation" in how), "normal; in the release nearly geometric"


def test_a_single_span_lies_anywhere_only_if_it_is_free() -> None:
    for free in (False, True):
        hidden_BT = SpanCorruption(64, 0.5, free=free).hide_tokens(torch.full((64,), 96), rand(64, 2, 98))
        assert all(runs(row) == [48] for row in hidden_BT.tolist())
        starts = hidden_BT.int().argmax(dim=1)
        assert len(starts.unique()) > 25 if free else bool((starts == 48).all())


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("denoisers", [None, SHORT], ids=["seven", "short"])
def test_inputs_and_targets_rebuild_the_text_and_sentinels_are_used_once(denoisers: Any, ragged: bool) -> None:
    ids_BT, length_B, out = corrupted(denoisers, 100, ragged)
    assert len(out.denoiser_B.unique()) == len(denoisers or SEVEN.denoisers)
    for b, ids in enumerate(ids_BT.tolist()):
        seen, asked = out.input_BT[b][out.real_BT[b]].tolist(), out.target_BU[b][out.real_BU[b]].tolist()
        marks = [i for i in seen if i >= FIRST]
        assert marks == [i for i in asked if i >= FIRST] == list(range(1000, 1000 + len(marks)))
        spans, at = dict[int, list[int]](), asked if not marks else []  # what follows each sentinel
        for i in asked if marks else []:
            at = spans.setdefault(i, []) if i >= FIRST else at
            at += [i] if i < FIRST else []
        text = [j for i in seen for j in spans.get(i, [i])] + ([] if marks else asked)
        assert text == ids[: int(length_B[b])] and all(spans.values())
        assert int(out.text_BU[b].sum()) == len(asked) - len(marks) > 0


def test_s_is_a_suffix_of_the_lengths_of_paper_and_release() -> None:
    place_T, length_B, u_B2T = torch.arange(128), torch.full((4000,), 128), rand(4000, 2, 130)
    for share, most in ((0.25, 63), (0.5, 127)):
        hidden_BT = Suffix(share).hide_tokens(length_B, u_B2T)
        size_B = hidden_BT.sum(dim=1)
        assert torch.equal(hidden_BT, place_T >= 128 - size_B[:, None])
        assert size_B.min() == 1 and size_B.max() == most
        assert abs(float(size_B.double().mean()) - 128 * share) < statistical(most / 12**0.5, 4000)
    out = corrupted([Suffix(uniform=False)], 128)[2]
    assert bool((out.target_BU[:, :32] == torch.arange(196, 228)).all()) and int(out.real_BU.sum()) == 64 * 32


def test_the_mixture_is_drawn_by_sample_and_its_sham_names_another_draw() -> None:
    key_B, ids_BT = np.arange(6000), torch.arange(100, 116).expand(6000, 16)
    mixtures, length_B = (MixtureOfDenoisers(SHORT), MixtureOfDenoisers(SHORT, "permute")), torch.full((6000,), 16)
    out, sham = (mixture(ids_BT, length_B, key_B, FIRST) for mixture in mixtures)
    assert abs(float((SEVEN.draw(key_B) == 6).double().mean()) - 0.2) < statistical(0.4, 6000)
    assert torch.equal(out.mode_B, torch.tensor([0, 2, 1])[out.denoiser_B]) and torch.equal(out.input_BT, sham.input_BT)
    assert abs(float((out.mode_B == sham.mode_B).double().mean()) - 1 / 3) < statistical(0.48, 6000)
    part = mixtures[0](ids_BT[:9], length_B[:9], key_B[5:14], FIRST)
    assert torch.equal(part.input_BT, out.input_BT[5:14]), "a pure function of the keys"


def data(**options: Any) -> DenoisedTexts:
    made = {"tokens": 24, "denoisers": MixtureOfDenoisers(SHORT), "tasks": {"infill": SHORT[0], "suffix": Suffix()}}
    return DenoisedTexts(**{**made, "tiny": True, "batch_size": 16, **options})


def test_rows_hold_the_widest_text_and_evaluation_has_the_same_targets_for_all() -> None:
    for tokens in (65, 128, 150):
        wide = DenoisedTexts(tokens=tokens, tiny=True)
        most = max(n + 2 * d.spans(n) + 4 for n in range(65, tokens + 1) for d in SEVEN.denoisers)
        assert most == wide.length == tokens + 2 * SEVEN.spans(tokens) + 4
        batch = next(iter(wide.train_dataloader()))
        assert bool((batch.inputs["text"] == EOS).sum(dim=1).eq(1).all()), "no row is cut"
    arms = data(), data(denoisers=MixtureOfDenoisers(SHORT[2:]), mode="R")
    sets = [arm.evaluation_sets("test") for arm in arms]
    assert list(sets[0]) == ["infill", "suffix", "texts", "wrong"]
    for name in sets[0]:
        a, b = (next(iter(arms[0].evaluation_loader(each[name]))).inputs for each in sets)
        asked = [[i[m].tolist() for i, m in zip(x["text"], x["loss_mask"], strict=True)] for x in (a, b)]
        assert asked[0] == asked[1] and not any(i >= 264 for ids in asked[0] for i in ids)
        assert set(b["text"][:, 1].tolist()) == ({267, 268} if name == "wrong" else {266})
    loaded = (next(iter(arms[0].evaluation_loader(sets[0][name]))) for name in ("texts", "wrong"))
    right, wrong = (batch.inputs["text"] for batch in loaded)
    assert torch.equal(right[:, 2:], wrong[:, 2:]) and bool((right[:, 1] != wrong[:, 1]).all())


def test_texts_are_those_of_the_library_and_forms_of_a_module_are_in_one_split(tmp_path: Path) -> None:
    assert "zipfile" in library_texts() and len(library_texts()) > 100
    whole = DenoisedTexts()
    begin = {split: {*whole.windows(split)[:, 1].tolist()} for split in ("train", "val", "test", "sealed")}
    assert sum(map(len, begin.values())) == len(set().union(*begin.values())) and min(map(len, begin.values())) > 5
    assert "texts" in whole.state_dict()["corpora"], "another Python is found when a run is resumed"
    for n in range(40):
        (tmp_path / f"{n}.txt").write_text(f"Chapter {n}. " * 9)
    own = data(tiny=False, folder=str(tmp_path))
    assert "Chapter" in own.spell(own.ids_W[:200].tolist()) and len(own.windows("train")) > 40


class TestPrefix(GradientExact, MissingModalities, Ranks, Resume):
    """Packed rows of a prefix language model are each text in a pass of its own."""

    def recipe(self) -> VisionLanguage:
        torch.manual_seed(0)
        lm = CausalLM(data().embedded_ids, 12, 2, 2, length=64)
        return VisionLanguage(lm=lm, answer_token=265, prefix_sight=True, row=100)

    def data(self) -> Any:
        return data(batch_size=4)

    def batch(self) -> Batch:
        module = data(drop={"text": 0.3})
        return module.training_set()[next(iter(module.order(module.training_set())))]

    def explicit(self, recipe: Any, batch: Batch) -> dict[str, Tensor]:
        values = []
        for b in batch.present["text"].nonzero().flatten().tolist():
            ids = batch.inputs["text"][b][batch.inputs["text"][b] > 0]
            answer = ids.tolist().index(265)
            h_1TW = recipe.lm(recipe.lm.embed(ids[None]), prefix_BT=torch.arange(len(ids))[None] <= answer)
            log_TV = recipe.lm.logits(h_1TW)[0].log_softmax(dim=1)
            values.append(-log_TV[answer:-1].gather(1, ids[answer + 1 :, None]).mean())
        return {"answer": torch.stack(values).sum() / batch.step["text"].sum()}

    @torch.no_grad()
    def test_inputs_see_one_another_and_targets_what_is_before(self) -> None:
        recipe, batch = cast(Any, self.made().eval()), self.batch()
        batch = batch.select(batch.present["text"]).select(slice(0, 1))
        ids_S = batch.inputs["text"][0]
        answer, end = ids_S.tolist().index(265), int((ids_S > 0).sum())
        before_SW = recipe.read(batch)[1][0].clone()
        for place in {*range(1, end)} - {answer}:
            own = int(ids_S[place])
            ids_S[place] = 9 if own != 9 else 8
            moved_S = (recipe.read(batch)[1][0] != before_SW).any(dim=1)[:end]
            assert moved_S.tolist() == [place < answer or s >= place for s in range(end)], (place, answer)
            ids_S[place] = own

    @torch.no_grad()
    def test_what_is_generated_is_greedy_by_whole_passes(self) -> None:
        recipe, batch = cast(Any, self.made().eval()), self.batch()
        batch = batch.select(batch.present["text"])
        for ids_S, found in zip(batch.inputs["text"], recipe.generate(batch, new=4).tolist(), strict=True):
            front, said = ids_S[: ids_S.tolist().index(265) + 1].tolist(), list[int]()
            while len(said) < 4 and EOS not in said:
                ids = torch.tensor([[*front, *said]])
                h_1TW = recipe.lm(recipe.lm.embed(ids), prefix_BT=torch.arange(ids.shape[1])[None] < len(front))
                said.append(int(recipe.lm.logits(h_1TW)[0, -1].argmax()))
            assert found == said + [0] * (4 - len(said))


def test_what_cannot_be_is_refused_in_one_line() -> None:
    options: dict[str, Any] = {"lm": CausalLM(300, 8, 1, 2), "answer_token": 9, "document_mask": False}
    for make, line in (
        (lambda: SpanCorruption(3, 1.0), "rate 1: nothing is left"),
        (lambda: SpanCorruption(3, 0.0), "rate 0: nothing is hidden"),
        (lambda: Suffix(1.0), "share 1: above 0"),
        (lambda: DenoisedTexts(tokens=64, tiny=True), "mean 64: a text of 64 tokens is no longer than a span"),
        (lambda: SpanCorruption(3, 0.15, mode="r"), "mode 'r': not one of R, S, X; nearest: R"),
        (lambda: data(mode="XX"), "mode 'XX': not one of R, S, X"),
        (lambda: DenoisedTexts(tokens=700, tiny=True), f"tokens 700: 117 spans of a text, and {SENTINELS}"),
        (lambda: MixtureOfDenoisers([]), "denoisers: none"),
        (lambda: corrupted(SHORT, 1), "a text of 1 tokens: 2 are the least"),
        (lambda: VisionLanguage(prefix_sight=True, **options), "prefix_sight: a prefix"),
    ):
        with pytest.raises(ValueError, match=line):
            make()
    assert [ul2.MODES[SpanCorruption(mean, 0.15).number] for mean in (8, 12)] == ["R", "X"]
