"""MIO (arXiv 2409.17692): disjoint ranges, layers in equal blocks, answers that always parse, prompts unlearned.

Letters: B rows, T codes of a sample, R rows that are generated, N tokens of one, V ids.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from descant.modules.language import BlockSampling, CausalLM, Sampling, generate
from descant.modules.tokenizers.text import EOS, SPECIAL
from descant.modules.tokenizers.unified import CodeFormat, UnifiedVocabulary
from tests.tolerance import F32, ulps

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
        found_RV = VOCABULARY.allowed(token_RN[:, :n], left, only)
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
        (lambda: VOCABULARY.wrap("audio", torch.tensor([[0, 0, 4, 4, 4, 4]])), r"audio \[0, 2\]: code 4, where 0 to 3"),
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
