"""MIO (arXiv 2409.17692): disjoint ranges, layers in equal blocks, answers that always parse, prompts unlearned.

Letters: B rows, T codes of a sample, R rows that are generated, N tokens of one, V ids.
"""

from __future__ import annotations

import itertools
from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from descant.datamodules.corpora.spoken import SpokenNames
from descant.datamodules.selection.code_table import PADDING
from descant.datamodules.tasks.emoji_codes import CodeDocument, CodeDocuments, EmojiCodes
from descant.modules.core.batch import Batch
from descant.modules.language import BlockSampling, CausalLM, Sampling, generate
from descant.modules.masking.kmeans import KMeansPatches
from descant.modules.tokenizers.codes import CodeTokenizer
from descant.modules.tokenizers.text import BOS, EOS, SPECIAL
from descant.modules.tokenizers.unified import CodeFormat, UnifiedVocabulary
from descant.recipes import VisionLanguage
from tests._suites import GradientExact, MissingModalities, Ranks, Resume
from tests.tolerance import F32, statistical, ulps

IMAGE, AUDIO = CodeFormat((2, 2), codes=5), CodeFormat((3,), codes=4, layers=2)
VOCABULARY = UnifiedVocabulary(20, {"image": IMAGE, "audio": AUDIO})


def codes(format: CodeFormat, rows: int, seed: int = 0) -> Tensor:
    """Random codes, each of its layer."""
    id_BT = torch.randint(format.codes, (rows, format.length), generator=torch.Generator().manual_seed(seed))
    return id_BT + format.first_T


def test_ranges_are_disjoint_and_cover_all_ids() -> None:
    owner = [[m for m in ("text", "image", "audio") if i in VOCABULARY.range(m)] for i in range(VOCABULARY.size)]
    assert all(len(names) <= 1 for names in owner) and [n for n in owner if n].count(["audio"]) == 8
    assert [i for i, names in enumerate(owner) if not names] == [20, 21, 22, 28, 29, 38], "marks, begins and ends"
    assert VOCABULARY.kind(28) == "the end of image" and VOCABULARY.kind(39) == "outside every range of the 39 ids"


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_layers_are_blocks_of_equal_length_and_come_back(modality: str) -> None:
    format = VOCABULARY.formats[modality]
    code_BT = codes(format, 6)
    id_BS = VOCABULARY.wrap(modality, code_BT)
    first, size = VOCABULARY.begins[modality], format.length // format.layers
    for row, ids in zip(code_BT.tolist(), id_BS.tolist(), strict=True):
        blocks = [ids[1 + layer * size : 1 + (layer + 1) * size] for layer in range(format.layers)]
        for layer, block in enumerate(blocks):
            assert all(first + 1 + layer * format.codes <= i < first + 1 + (layer + 1) * format.codes for i in block)
        assert ids == [first, *(first + 1 + c for c in row), first + 1 + format.layers * format.codes]
        assert VOCABULARY.parse([9, *ids, 10, 11, EOS, 99]) == [("text", [9]), (modality, row), ("text", [10, 11])]
    assert torch.equal(VOCABULARY.unwrap(modality, id_BS), code_BT)


def explicit(history: list[int], left: int, only: tuple[str, ...]) -> set[int]:
    """Ids that may follow, by reading the row from its beginning."""
    block: tuple[str, int] | None = None  # the open block, and how many codes it has
    for i in history:
        if block is None:
            block = next(((m, 0) for m, first in VOCABULARY.begins.items() if first == i), None)
        elif block[1] == VOCABULARY.formats[block[0]].length:
            block = None
        else:
            block = block[0], block[1] + 1
    if block is not None:
        modality, done = block
        format, first = VOCABULARY.formats[modality], VOCABULARY.begins[modality]
        if format.length + 1 - done > left:
            return set()
        layer = done * format.layers // format.length
        low = first + 1 + layer * format.codes
        return {low + k for k in range(format.codes)} if done < format.length else {VOCABULARY.range(modality).stop}
    ids = set(range(SPECIAL, 20)) if "text" in only and left else set[int]()
    ids |= {VOCABULARY.begins[m] for m in only if m != "text" and VOCABULARY.formats[m].length + 2 <= left}
    return ids | ({EOS} if history and left else set())


@pytest.mark.parametrize("only", [("text", "image", "audio"), ("audio",), ("text",)])
def test_what_is_allowed_is_that_of_a_loop(only: tuple[str, ...]) -> None:
    whole = [VOCABULARY.wrap(m, codes(f, 2, n)).tolist() for n, (m, f) in enumerate(VOCABULARY.formats.items())]
    rows = [[9, *whole[0][0], *whole[1][0], 10, EOS], [*whole[1][1], 9, 9, *whole[0][1], EOS]]
    token_RN = torch.tensor(rows)
    for n, left in itertools.product(range(token_RN.shape[1] + 1), (1, 3, 6, 8, 30)):
        found_RV = VOCABULARY.allowed_ids(token_RN[:, :n], left, only)
        for row, allowed_V in zip(rows, found_RV, strict=True):
            assert set(allowed_V.nonzero()[:, 0].tolist()) == explicit(row[:n], left, only), (n, left)


def lm() -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(VOCABULARY.size, 16, 2, 2, length=64, tie=False).eval()


@pytest.mark.parametrize("how", [{}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.7, "temperature": 2.0}])
@pytest.mark.parametrize("only", [None, ("image",), ("audio", "text")])
def test_constrained_generation_always_parses(only: Any, how: dict[str, Any]) -> None:
    sampling = BlockSampling(vocabulary=VOCABULARY, only=only, **how)
    prompt_PT, seed_R = torch.tensor([[1, 9, 21], [1, 12, 21]]), torch.arange(40)
    answers = generate(lm(), prompt_PT, new=17, group=20, stop=(EOS,), sampling=sampling, seed_R=seed_R)
    blocks = 0
    for ids, length in zip(answers.token_RN.tolist(), answers.length_R.tolist(), strict=True):
        parts = VOCABULARY.parse(ids[:length])
        assert parts and {m for m, _ in parts} <= set(only or ("text", "image", "audio"))
        blocks += sum(m != "text" for m, _ in parts)
    assert blocks > 0 and (only != ("image",) or blocks >= 40)
    few = generate(lm(), prompt_PT[1:], new=17, group=2, stop=(EOS,), sampling=sampling, seed_R=seed_R[20:22])
    assert torch.equal(few.token_RN, answers.token_RN[20:22]), "a row depends on no other"


def test_log_probabilities_are_the_models_and_a_form_without_a_choice_is_exact() -> None:
    sampling = BlockSampling(vocabulary=VOCABULARY, only=("image",))
    model, prompt_PT = lm(), torch.tensor([[1, 9, 21]])
    made = generate(model, prompt_PT, new=7, stop=(EOS,), sampling=sampling)
    ids = made.token_RN[0].tolist()
    assert made.ended_R.all() and ids[0] == 22 and ids[5] == 28 and ids[6] == EOS, "one block fits, and then <eos>"
    row = torch.tensor([[1, 9, 21, *ids]])
    with torch.no_grad():
        log_NV = model.logits(model(model.embed(row)))[0, 2:-1].log_softmax(dim=1)
    wanted = log_NV.gather(1, row[0, 3:, None])[:, 0]
    torch.testing.assert_close(made.log_RN[0], wanted, rtol=0, atol=ulps(64, F32) * float(wanted.abs().max()))
    plain_RV = torch.randn(5, VOCABULARY.size)
    every = Sampling().draw(plain_RV, torch.arange(5), 0)
    assert all(map(torch.equal, every, Sampling().draw(plain_RV, torch.arange(5), 0, torch.ones_like(plain_RV) > 0)))


def test_ids_out_of_place_are_refused_in_one_line() -> None:
    image = VOCABULARY.wrap("image", codes(IMAGE, 2))
    bad, mixed = image.clone(), VOCABULARY.wrap("audio", codes(AUDIO, 1))
    bad[1, 2], mixed[0, 1] = 77, mixed[0, 4]
    short = BlockSampling(vocabulary=VOCABULARY, only=("image",))
    for make, line in (
        (
            lambda: VOCABULARY.unwrap("image", bad),
            r"image \[1, 2\]: id 77 is outside every range of the 39 ids, where 23",
        ),
        (lambda: VOCABULARY.unwrap("audio", mixed), r"audio \[0, 1\]: id \d+ is audio, where 30 to 33 are expected"),
        (lambda: VOCABULARY.unwrap("audio", image), "audio: 6 ids of a sample, and 8 are expected"),
        (lambda: VOCABULARY.parse([22, 23, 9]), "image: 3 ids of a sample, and 6 are expected"),
        (lambda: VOCABULARY.parse([9, 28]), "token 1: id 28 is the end of image, where a part begins"),
        (
            lambda: VOCABULARY.wrap("audio", torch.tensor([[0, 0, 4, 4, 4, 4]])),
            r"audio \[0, 3\]: id 34 is audio, where 30",
        ),
        (lambda: VOCABULARY.range("speech"), "modality 'speech': no such"),
        (lambda: UnifiedVocabulary(9, {}), "formats: none"),
        (lambda: BlockSampling(vocabulary=VOCABULARY, only=()), "only: none"),
        (
            lambda: generate(lm(), torch.tensor([[1, 9]]), new=4, sampling=short),
            "token 0: no id fits into the 4 that are left; tokens of a part: image 6",
        ),
    ):
        with pytest.raises(ValueError, match=line):
            make()


# documents ------------------------------------------------------------------------------------------------------------


def tokenizers(**image: Any) -> dict[str, CodeTokenizer]:
    speech = KMeansPatches([64, 40], [64, 8], channels=1, codes=8, layers=2, samples=40, padded=True)
    return {"image": KMeansPatches([16, 16], 8, **{"codes": 16, "samples": 40, **image}), "audio": speech}


def data(**options: Any) -> EmojiCodes:
    made: dict[str, Any] = {"size": 16, "speech": SpokenNames(seconds=0.8), "batch_size": 16, "letters": 12}
    return EmojiCodes(**{**made, "tiny": True, "tokenizers": tokenizers(), **options})


@cache
def shared() -> EmojiCodes:
    """Whose codes all others of the process have too, as the stages of a run do."""
    module = data()
    assert module.table is not None
    return module


def split(module: EmojiCodes, ids: list[int]) -> list[tuple[str, list[int]]]:
    """The parts of a document and its answer."""
    mark = ids.index(module.answer_token)
    assert ids[0] == BOS and ids.count(module.answer_token) == ids.count(EOS) == 1
    return [*module.vocabulary.parse(ids[1:mark]), *module.vocabulary.parse(ids[mark + 1 :])]


ORDERS = [CodeDocument(["image", "text", "audio"], weight=2), CodeDocument(["text", "image"], whole=False)]


def test_documents_are_parts_in_order_by_weight_and_prompts_are_unlearned() -> None:
    module, drawn = data(documents=ORDERS), Counter[int]()
    assert module.table is shared().table, "encoded once"
    names, table = dict(zip(module.table.index_N.tolist(), module.table.name_N, strict=True)), module.table
    row = {index: n for n, index in enumerate(table.index_N.tolist()) if table.set_N[n] == "train"}
    for batch in module.train_dataloader():
        inputs = (batch.inputs["text"].tolist(), batch.inputs["loss_mask"].tolist())
        for ids, mask, d, index in zip(*inputs, batch.targets["document"].tolist(), batch.index.tolist(), strict=True):
            drawn[d] += 1
            parts, at = split(module, ids), ids.index(module.answer_token)
            assert tuple(m for m, _ in parts) == ORDERS[d].order
            for modality, found in parts:
                if modality == "text":
                    assert found == module.ids(names[index // 64])[:12]
                else:
                    code_T = table.codes[modality][row[index // 64]].tolist()
                    assert all(c in (PADDING, f) for f, c in zip(found, code_T, strict=True))
            learned = [t for t, m in enumerate(mask) if m]
            end = ids.index(EOS)
            assert learned == [*(range(1, at) if d == 0 else ()), *range(at + 1, end + 1)]
    assert abs(drawn[0] / sum(drawn.values()) - 2 / 3) < statistical(0.48, sum(drawn.values()))


def test_evaluation_predicts_content_alone_in_all_directions_and_shuffled_has_another_source() -> None:
    module = shared()
    sets = module.evaluation_sets("test")
    assert len(module.directions) == 6 and {"vendor", "concept", "shuffled", "vendor_audio_from_text"} <= sets.keys()
    loaded = {name: next(iter(module.evaluation_loader(sets[name]))) for name in ("vendor", "shuffled")}
    rows = {
        name: list(zip(*(b.inputs[k].tolist() for k in ("text", "loss_mask")), strict=True))
        for name, b in loaded.items()
    }
    other = 0
    for n, ((ids, mask), (ids_2, mask_2)) in enumerate(zip(rows["vendor"], rows["shuffled"], strict=True)):
        source, target = module.directions[n % 6]
        (m_1, front), (m_2, content) = split(module, ids)
        assert (m_1, m_2) == (source, target) == tuple(m for m, _ in split(module, ids_2))
        learned, again = ([i for i, m in zip(*one, strict=True) if m] for one in ((ids, mask), (ids_2, mask_2)))
        assert learned == again and len(set(learned) & {*range(264, 266), *module.vocabulary.begins.values()}) == 0
        assert learned == [*content, EOS] if target == "text" else set(learned) <= set(module.vocabulary.range(target))
        other += front != split(module, ids_2)[0][1]
    assert other > 0.8 * len(rows["vendor"]), "short codes of some are equal"
    assert not set(loaded["vendor"].index.tolist()) & set(loaded["shuffled"].index.tolist())


class TestDocuments(GradientExact, MissingModalities, Ranks, Resume):
    """Packed rows of documents are each document in a pass of its own."""

    def recipe(self) -> VisionLanguage:
        torch.manual_seed(0)
        return VisionLanguage(lm=CausalLM(shared().embedded_ids, 12, 2, 2, length=64), answer_token=265, row=80)

    def data(self) -> Any:
        return data(batch_size=4, documents=ORDERS)

    def batch(self) -> Batch:
        module = data(batch_size=16, documents=ORDERS, drop={"text": 0.3})
        training = module.training_set()
        assert isinstance(training, CodeDocuments)
        return training[next(iter(module.order(training)))]

    def explicit(self, recipe: Any, batch: Batch) -> dict[str, Tensor]:
        values = []
        for b in batch.present["text"].nonzero().flatten().tolist():
            ids = batch.inputs["text"][b][batch.inputs["text"][b] > 0]
            log_TV = recipe.lm.logits(recipe.lm(recipe.lm.embed(ids[None])))[0].log_softmax(dim=1)
            at = batch.inputs["loss_mask"][b].nonzero().flatten()
            values.append(-log_TV[at - 1].gather(1, ids[at, None]).mean())
        return {"answer": torch.stack(values).sum() / batch.step["text"].sum()}
