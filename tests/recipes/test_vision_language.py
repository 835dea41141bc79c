"""Pictures among words: each sample as if alone, what is absent costs nothing, and that it learns to look.

Letters: B samples, T words, W width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from descant.modules.core.batch import Batch
from descant.modules.core.capabilities import has
from descant.modules.core.protocols import Generates, HasObjective, HasTerms, HasTowers, Scores
from descant.modules.language import CausalLM
from descant.modules.language.projectors import EachToken, ImageProjector, PooledGrid, Resampler
from descant.modules.towers import ConvTower, Tokens, Tower, Towers
from descant.recipes import VisionLanguage
from tests.tolerance import F32, F64, rounding

#: Queries and keys are turned in float32, where roundings of float64 tip a last bit now and then.
TURNED = rounding(1, F32)
BOS, EOS, IMAGE, ANSWER, T = 1, 2, 4, 5, 9
PROJECTORS: dict[str, Any] = {
    "each": EachToken,
    "grid": lambda: PooledGrid(1),
    "resampler": lambda: Resampler(3, heads=2),
}


class Patches(Tower):
    """Four tokens a picture of four numbers, and how many pictures were seen."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.seen = 8, 0
        self.linear = nn.Linear(1, 8)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        self.seen += len(x)
        return Tokens(self.linear(x[..., None]), torch.ones(len(x), 4, dtype=torch.bool))


def sees(lm: CausalLM, towers: Towers | None = None) -> dict[str, Any]:
    return {
        "towers": towers or Towers(image=Patches()),
        "lm": lm,
        "image_token": IMAGE,
        "answer_token": ANSWER,
    }


def recipe(kind: str = "each", row: int | None = None) -> VisionLanguage:
    torch.manual_seed(0)
    lm = CausalLM(20, 12, 2, 2, length=64)
    made = VisionLanguage(**sees(lm), projector=PROJECTORS[kind](), row=row)
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(3 if p.ndim > 1 else 1)
    return made.double()


def batch(rows: int = 7) -> Batch:
    """Dialogues of several lengths; row 1 has no picture, row 2 no words, row 3 neither, row 4 names no picture."""
    g = torch.Generator().manual_seed(1)
    text, said = torch.zeros(rows, T, dtype=torch.long), torch.zeros(rows, T, dtype=torch.bool)
    for b in range(rows):
        front = [BOS, *([] if b == 4 else [IMAGE]), *torch.randint(6, 20, (1 + b % 3,), generator=g).tolist(), ANSWER]
        back = [*torch.randint(6, 20, (1 + b % 2,), generator=g).tolist(), EOS]
        text[b, : len(front) + len(back)] = torch.tensor(front + back)
        said[b, len(front) : len(front) + len(back)] = True
    present = {"image": torch.ones(rows, dtype=torch.bool), "text": torch.ones(rows, dtype=torch.bool)}
    present["image"][[1, 3]], present["text"][[2, 3]] = False, False
    image = torch.randn(rows, 4, generator=g).double()
    image[[1, 3]] = torch.nan
    return Batch({"image": image, "text": text, "loss_mask": said}, present)


def dialogue(made: VisionLanguage, b: Batch, n: int) -> tuple[Tensor, list[int]]:
    """What the language model reads of one sample ``[T, W]``, and the ids to learn, -1 for none."""
    ids = [i for i in b.inputs["text"][n].tolist() if i]
    parts, learned = [], []
    for t, i in enumerate(ids):
        if i == IMAGE:
            if b.present["image"][n]:
                seen = made.projector(made.towers["image"](b.inputs["image"][n : n + 1]))[0]
                parts.append(seen)
                learned += [-1] * len(seen)
            continue
        parts.append(made.lm.embed(torch.tensor([i])))
        learned.append(i if b.inputs["loss_mask"][n, t] else -1)
    return torch.cat(parts), learned


def alone(made: VisionLanguage, b: Batch, n: int) -> tuple[Tensor, list[bool]]:
    """Mean of -log p over the answer of one sample, by one pass over one row, and what is likeliest."""
    x_TW, learned = dialogue(made, b, n)
    log = made.lm.logits(made.lm(x_TW[None]))[0].log_softmax(dim=1)
    at = [t for t, i in enumerate(learned) if i >= 0]
    values = torch.stack([-log[t - 1, learned[t]] for t in at])
    return values.mean(), [int(log[t - 1].argmax()) == learned[t] for t in at]


@pytest.mark.parametrize("row", [None, 24])
@pytest.mark.parametrize("kind", PROJECTORS)
def test_each_sample_is_what_it_is_alone(kind: str, row: int | None) -> None:
    made, b = recipe(kind, row), batch()
    (term,) = made.terms(b).values()
    assert term.valid is not None and term.valid.tolist() == [True, True, False, False, True, True, True]
    for n in term.valid.nonzero().flatten().tolist():
        torch.testing.assert_close(term.value[n], alone(made, b, n)[0], **TURNED)
    total = made.step({"answer": term}, b).total
    torch.testing.assert_close(total, term.value[term.valid].sum() / 5, **rounding(16, F64))
    scores = made.scores(b)
    assert scores["accuracy"].value[term.valid].tolist() == [
        float(all(alone(made, b, n)[1])) for n in term.valid.nonzero().flatten().tolist()
    ]


@torch.no_grad()
def test_features_are_means_over_tokens_and_see_how_well_an_answer_fits() -> None:
    made, b = recipe("grid"), batch()
    predicted = made.predict_step(b, 0)
    assert predicted["present"]["answer"].tolist() == [True, True, False, False, True, True, True]
    for n in (0, 1, 4, 5, 6):
        x_TW, learned = dialogue(made, b, n)
        h_TW = made.lm(x_TW[None])[0]
        z = {name: z_BW[n] for name, z_BW in predicted["z"].items()}
        torch.testing.assert_close(z["text"], h_TW.mean(dim=0), **TURNED)
        seen = x_TW[1] if n not in (1, 4) else torch.zeros_like(z["image"])  # one token an image, after <bos>
        torch.testing.assert_close(z["image"], seen, **rounding(4, F64))
        at = [t for t, i in enumerate(learned) if i >= 0]
        logit = torch.stack([made.lm.logits(h_TW)[t - 1, learned[t]] for t in at]).mean()
        torch.testing.assert_close(z["answer"][:-1].sum(), logit, **TURNED)
        torch.testing.assert_close(z["answer"][-1], -alone(made, b, n)[0], **TURNED)


def test_several_pictures_stand_where_they_are_named_each_in_its_turn() -> None:
    torch.manual_seed(0)
    towers = Towers(image=ConvTower([8, 8], norm="group"))
    made = VisionLanguage(**sees(CausalLM(20, 12, 2, 2, length=64), towers), projector=PooledGrid(2)).double().eval()
    text = torch.zeros(4, 12, dtype=torch.long)
    for n, ids in enumerate(([1, IMAGE, 7, IMAGE, 8, ANSWER, 9, 2], [1, 8, IMAGE, ANSWER, 9, 2], [1, 7, ANSWER, 9, 2])):
        text[n, : len(ids)] = torch.tensor(ids)
    text[3] = text[0]
    said = (text.roll(1, 1) == ANSWER) | (text == EOS)
    said[:, 0] = False
    image = torch.randn(4, 2, 3, 8, 8, dtype=torch.float64)
    present = {"image": torch.tensor([True, True, True, False]), "text": torch.ones(4, dtype=torch.bool)}
    b = Batch({"image": image, "text": text, "loss_mask": said}, present)
    (term,) = made.terms(b).values()
    for n in range(4):
        ids, parts, learned, shown = [i for i in text[n].tolist() if i], list[Tensor](), list[int](), 0
        for t, i in enumerate(ids):
            if i != IMAGE:
                parts.append(made.lm.embed(torch.tensor([i])))
                learned.append(i if said[n, t] else -1)
            elif present["image"][n]:
                parts.append(made.projector(made.towers["image"](image[n, shown][None]))[0])
                learned += [-1] * 4
                shown += 1
        log = made.lm.logits(made.lm(torch.cat(parts)[None]))[0].log_softmax(dim=1)
        wanted = torch.stack([-log[t - 1, i] for t, i in enumerate(learned) if i >= 0]).mean()
        torch.testing.assert_close(term.value[n], wanted, **TURNED)


def test_gradients_are_those_of_samples_alone() -> None:
    made, b = recipe("resampler"), batch()
    named = dict(made.named_parameters())
    found = torch.autograd.grad(made.step(made.terms(b), b).total, list(named.values()))
    wanted = torch.autograd.grad(
        torch.stack([alone(made, b, n)[0] for n in (0, 1, 4, 5, 6)]).sum() / 5, list(named.values())
    )
    for name, x, y in zip(named, found, wanted, strict=True):
        torch.testing.assert_close(x, y, msg=name, **TURNED)


def test_absent_pictures_are_not_looked_at_and_all_parameters_are_reached() -> None:
    made, b = recipe(), batch()
    tower = made.towers["image"]
    assert isinstance(tower, Patches)
    made.terms(b)
    assert tower.seen == 4, "one is shown to nobody"
    nobody = replace(b, present={"image": torch.zeros(7, dtype=torch.bool), "text": b.present["text"]})
    grads = torch.autograd.grad(made.step(made.terms(nobody), nobody).total, list(made.parameters()))
    assert all(g.isfinite().all() for g in grads)
    silent = replace(b, present={m: torch.zeros(7, dtype=torch.bool) for m in b.present})
    grads = torch.autograd.grad(made.step(made.terms(silent), silent).total, list(made.parameters()))
    assert not any(g.any() for g in grads)


def test_answers_are_generated_from_the_question_alone() -> None:
    made, b = recipe("resampler"), batch()
    made.eval()
    found = made.generate(b, new=5)
    for n in (0, 1, 4, 5, 6):
        ids = [i for i in b.inputs["text"][n].tolist() if i]
        said: list[int] = []
        for _ in range(5):
            front = ids[: ids.index(ANSWER) + 1] + said
            row = torch.zeros(1, 16, dtype=torch.long)
            row[0, : len(front) + 1] = torch.tensor([*front, 7])
            mark = torch.zeros(1, 16, dtype=torch.bool)
            one = Batch(
                {"image": b.inputs["image"][n : n + 1], "text": row, "loss_mask": mark},
                {m: x[n : n + 1] for m, x in b.present.items()},
            )
            h, row_of = made.sequence(one)
            length = int(row_of.real_BS.sum()) - 1
            assert int(row_of.ids_BS[0, length]) == 7
            said.append(int(made.lm.logits(made.lm(h[:, :length]))[0, -1].argmax()))
            if said[-1] == EOS:
                break
        assert found[n].tolist() == said + [0] * (5 - len(said))
    assert not found[[2, 3]].any()


def test_without_a_tower_it_is_one_whose_pictures_are_all_absent() -> None:
    seeing, b = recipe(), batch()
    reading = VisionLanguage(lm=CausalLM(20, 12, 2, 2, length=64), answer_token=ANSWER).double()
    reading.lm.load_state_dict(seeing.lm.state_dict())
    assert not reading.towers and not hasattr(reading, "projector") and reading.modalities == ("text",)
    assert {name.split(".")[0] for name, _ in reading.named_parameters()} == {"lm"}
    text, said = torch.zeros_like(b.inputs["text"]), torch.zeros_like(b.inputs["loss_mask"])
    for n, ids in enumerate(b.inputs["text"]):
        words = ids != IMAGE
        text[n, : int(words.sum())], said[n, : int(words.sum())] = ids[words], b.inputs["loss_mask"][n][words]
    plain = Batch({"text": text, "loss_mask": said}, {"text": b.present["text"]})
    nobody = b.only("text")
    found, wanted = (net.terms(its)["answer"] for net, its in ((reading, plain), (seeing, nobody)))
    assert found.valid is not None and wanted.valid is not None and torch.equal(found.valid, wanted.valid)
    torch.testing.assert_close(found.value[found.valid], wanted.value[found.valid], **TURNED)
    one, two = (
        torch.autograd.grad(net.step(net.terms(its), its).total, list(net.lm.parameters()))
        for net, its in ((reading, plain), (seeing, nobody))
    )
    for x, y in zip(one, two, strict=True):
        torch.testing.assert_close(x, y, **TURNED)
    answer_ids_BM = reading.eval().generate(plain, new=5)
    assert torch.equal(answer_ids_BM, seeing.eval().generate(nobody, new=5)) and answer_ids_BM.any()
    torch.testing.assert_close(
        reading.likelihood(plain, answer_ids_BM), seeing.likelihood(nobody, answer_ids_BM), **TURNED
    )


def looking(rows: int, seed: int, permuted: bool = False) -> Batch:
    """Which of four colours a picture has; the question is the same for all."""
    g = torch.Generator().manual_seed(seed)
    colour = torch.randint(4, (rows,), generator=g)
    image = torch.zeros(rows, 3, 8, 8)
    image[:, :, 2:6, 2:6] = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])[colour][:, :, None, None]
    image = image + 0.1 * torch.randn(image.shape, generator=g)
    text = torch.tensor([BOS, IMAGE, 6, 7, ANSWER, 0, EOS]).repeat(rows, 1)
    text[:, 5] = 10 + colour
    said = torch.zeros_like(text, dtype=torch.bool)
    said[:, 5:] = True
    if permuted:
        image = image.roll(1, dims=0)
    present = {m: torch.ones(rows, dtype=torch.bool) for m in ("image", "text")}
    return Batch({"image": image, "text": text, "loss_mask": said}, present)


def accuracy(made: VisionLanguage, b: Batch) -> float:
    made.eval()
    with torch.no_grad():
        return float(made.scores(b)["accuracy"].value.mean())


def test_it_learns_to_look() -> None:
    torch.manual_seed(0)
    towers = Towers(image=ConvTower([8, 16]))
    made = VisionLanguage(**sees(CausalLM(20, 32, 2, 2, length=32), towers), projector=PooledGrid(2))
    optimizer = torch.optim.AdamW(made.parameters(), lr=3e-3)
    for step in range(60):
        b = looking(64, step)
        optimizer.zero_grad()
        made.train().step(made.terms(b), b).total.backward()
        optimizer.step()
    held = looking(256, 999)
    assert accuracy(made, held) > 0.95
    assert accuracy(made, looking(256, 999, permuted=True)) < 0.45, "it is the picture that says so"
    assert accuracy(made, held.only("text")) < 0.45


def test_protocols_and_what_cannot_be() -> None:
    made = recipe()
    for protocol in (HasObjective, HasTerms, HasTowers, Scores, Generates):
        assert has(made, protocol), protocol
    with pytest.raises(ValueError, match=r"^towers: audio; only one is used, image$"):
        VisionLanguage(**sees(CausalLM(20, 12, 1, 2), Towers(audio=Patches())))
    with pytest.raises(
        ValueError, match=r"^lm.vocab 20: image_token 20 and answer_token 5 are ids too; 21 is the least$"
    ):
        VisionLanguage(**{**sees(CausalLM(20, 12, 1, 2)), "image_token": 20})
    lm = CausalLM(20, 12, 1, 2)
    for options in ({"image_token": IMAGE}, {"towers": Towers(image=Patches())}, {"projector": EachToken()}):
        with pytest.raises(
            ValueError, match=r"^towers, image_token, projector: a model that sees has the first two, one"
        ):
            VisionLanguage(lm=lm, answer_token=ANSWER, **options)
    with pytest.raises(ValueError, match=r"^lm.vocab 20: answer_token 20 are ids too; 21 is the least$"):
        VisionLanguage(lm=lm, answer_token=20)
    b = batch()
    b.inputs["text"][0, 2] = IMAGE
    with pytest.raises(ValueError, match=r"^sample 0: its text names 2 images, and it has 1$"):
        made.terms(b)
    with pytest.raises(ValueError, match=r"^document \d: \d+ tokens, where a row takes 1 to 5$"):
        recipe(row=5).terms(batch())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PooledGrid(0), "side 0: at least 1"),
        (lambda: Resampler(0), "queries 0: at least 1"),
        (lambda: Resampler(2, heads=3).build(8, 4), "heads 3 does not divide width 8"),
        (lambda: _on_three(PooledGrid(1).build(8, 4)), "PooledGrid: 3 tokens are no square"),
    ],
)
def test_projectors_that_cannot_be(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=f"^{says}"):
        make()


def _on_three(projector: ImageProjector) -> Tensor:
    return projector(Tokens(torch.randn(1, 3, 8), torch.ones(1, 3, dtype=torch.bool)))
