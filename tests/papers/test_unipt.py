"""UniPT (arXiv 2309.01420): pseudo captions against loops, no true name in a phrase, and raw cosines at their floor.

Letters: B samples, N images, P phrases, K templates, D width.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from descant import Embedder
from descant.cli.catalogue import experiments
from descant.datamodules.corpora.captions import CaptionMixer
from descant.datamodules.corpora.emoji import Emoji
from descant.datamodules.corpora.emoji_pack import VENDORS
from descant.datamodules.corpora.pseudo_texts import PseudoTexts
from descant.datamodules.fields.fields import Fields, ImageField, TextField
from descant.datamodules.names import TABLE
from descant.datamodules.user.user_data import UserData
from descant.modules.core.batch import Batch
from descant.modules.core.rng import mix_N
from descant.modules.losses import InfoNCE
from descant.modules.objectives.contrast import Contrast
from descant.modules.selection.pseudo_captions import CAPTIONS, PseudoCaptions, best_phrases, label_precision
from descant.modules.tokenizers.text import NgramTokenizer
from descant.modules.towers.heads import MaxPool
from descant.recipes import MultiTask
from tests._suites import GradientExact, MissingModalities, Ranks, Resume
from tests._suites.data import samples, towers
from tests.tolerance import F64, rounding, ulps

ATTRIBUTES = {"colour": ["red", "green", "blue"], "kind": ["a ball", "a hat"]}
TEMPLATES = ["{colour} with {kind}", "{kind} in {colour}", "{colour}"]
#: The run that writes captions of people, and its phrases.
GENERIC = yaml.safe_load(experiments()["contrastive/emoji-generic"].read_text())
PEOPLE = PseudoCaptions(**GENERIC["trainer"]["callbacks+"][0]["init_args"]["captions"]["init_args"])
KEY_N, TOKENIZER = np.arange(3000) * 7919 + 5, NgramTokenizer()


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("centred", [False, True])
def test_phrases_are_those_of_a_loop_in_float64(centred: bool) -> None:
    z_ND, z_PD = random(30, 6), random(5, 6, seed=1) + 1
    s = [[float(F.cosine_similarity(z.double(), p.double(), dim=0)) for p in z_PD] for z in z_ND]
    mean = [sum(row[p] for row in s) / 30 * centred for p in range(5)]
    wanted = [[max(part, key=lambda p: row[p] - mean[p]) for row in s] for part in (range(3), range(3, 5))]
    choice_NA = PseudoCaptions(ATTRIBUTES, TEMPLATES, centred=centred).choose(z_ND, z_PD)
    assert (choice_NA + torch.tensor([0, 3])).T.tolist() == wanted and len(set(wanted[0])) > 1


def test_planted_phrases_are_found_more_than_twice_as_often_as_by_chance() -> None:
    z_PD, phrase_N = F.normalize(random(10, 32), dim=1), torch.arange(400) % 10
    z_ND, true_NP = z_PD[phrase_N] + 0.3 * random(400, 32, seed=1), F.one_hot(phrase_N, 10).bool()
    true_NP[:50] = False  # of these no phrase is true
    precision, chance = label_precision(choice_N := best_phrases(z_ND, z_PD), true_NP)
    assert precision == int((choice_N == phrase_N)[50:].sum()) / 350 > 2 * chance > 0.19
    assert label_precision(choice_N.roll(1), true_NP)[0] < chance


def test_templates_are_drawn_by_key_alone_and_differ_within_an_image() -> None:
    choice_NA = torch.stack([torch.arange(3000) % 3, torch.arange(3000) % 2], dim=1)
    two = PseudoCaptions(ATTRIBUTES, TEMPLATES, captions=2)
    texts, turn_N = two.write(choice_NA, KEY_N), torch.randperm(3000, generator=torch.Generator().manual_seed(3))
    assert [texts[n] for n in turn_N.tolist()] == two.write(choice_NA[turn_N], KEY_N[turn_N.numpy()])
    filled = {"colour": ATTRIBUTES["colour"] * 1000, "kind": ATTRIBUTES["kind"] * 1500}
    every = [[t.format(colour=c, kind=k) for t in TEMPLATES] for c, k in zip(*filled.values(), strict=True)]
    first, second = ([of.index(pair[i]) for of, pair in zip(every, texts, strict=True)] for i in (0, 1))
    assert all(a != b for a, b in zip(first, second, strict=True))
    # five standard errors of a share of a third
    assert all(abs(first.count(k) - 1000) < 5 * math.sqrt(3000 * 2 / 9) for k in range(3))


def test_no_true_name_of_the_domain_is_in_a_phrase_or_template() -> None:
    texts = [phrase for phrases in PEOPLE.attributes.values() for phrase in phrases]
    texts += [re.sub(r"{.*?}", "|", template) for template in PEOPLE.templates]
    names = {row["names"]["en"].casefold() for row in Emoji().pack.rows if row["group"] == "people-body"}
    assert len(names) > 300 and "people-body" not in GENERIC["data"]["init_args"]["groups"]
    leaks = [t for t in [*texts, "an Ear", "a fear"] for n in names if re.search(rf"\b{re.escape(n)}\b", t.casefold())]
    assert leaks == ["an Ear"], "which is a name, and no phrase"


def emoji(table: Path, sham: Any = None) -> Emoji:
    sources: Any = {name: PseudoTexts(str(table), n) for n, name in enumerate(("first", "second"))}
    mixer = CaptionMixer(sources, {"first": 1, "second": 1}, sham=sham)
    return Emoji(16, TOKENIZER, ["people-body"], mixer=mixer, tiny=True, batch_size=64, vendors=["noto"])


def written(folder: Path, data: Emoji) -> Path:
    index = [c * len(VENDORS) + v for c in range(len(data.pack)) for v in range(len(VENDORS))]
    texts = {"caption.0": [f"red {i % 3}" for i in index], "caption.1": ["a hat" if i % 3 else "Red 0" for i in index]}
    (folder / "predict-001").mkdir()
    rows = {"index": index, "name": [data.describe(i) for i in index], **texts}
    pq.write_table(pa.table(rows), folder / "predict-001" / CAPTIONS)
    return folder / "predict-001" / CAPTIONS


def test_a_prediction_writes_the_captions_of_its_embeddings(cli: Any) -> None:
    small = ("--model.width=16", "--data.size=16", "--model.towers.image.widths=[8,16]", "--test=false")
    assert cli("fit", "--config=contrastive/emoji-generic", "--config=on/tiny", "--name=generic", *small).rc == 0
    done = cli("predict", "--run=generic/001", "--sets=train", "--data.groups=[people-body]")
    assert done.rc == 0 and "colour: " in done.out, done.err
    rows, z = (pq.read_table(f"runs/generic/001/predict-001/{name}").to_pydict() for name in (CAPTIONS, TABLE))
    z_PD, order_N = Embedder("runs/generic/001", "last").texts(PEOPLE.prompts), np.argsort(z["index"])
    choice_NA = PEOPLE.choose(torch.tensor(z["z_image"])[order_N], z_PD)
    assert rows["index"] == sorted(z["index"]) and rows["name"] == [z["name"][n] for n in order_N]
    texts = PEOPLE.write(choice_NA, mix_N(np.array(rows["index"]), "pseudo", 0))
    assert [list(pair) for pair in zip(rows["caption.0"], rows["caption.1"], strict=True)] == texts


def test_emoji_reads_the_table_and_equal_texts_are_no_negatives(tmp_path: Path) -> None:
    table, module = pq.read_table(written(tmp_path, Emoji(tiny=True))).to_pydict(), emoji(tmp_path)
    mixed: list[Any] = [m.mixed_captions for m in (module, emoji(tmp_path, "permute"))]
    ours_RS, sham_RS = ([tuple(m.texts[u] for u in u_S) for u_S in m.text_SR.T] for m in mixed)
    assert sorted(sham_RS) == sorted(ours_RS) and sham_RS != ours_RS
    batch = (data := module.training_set())[next(iter(module.order(data)))]
    text_B = []
    for index, row in zip(batch.index.tolist(), batch.inputs["text"], strict=True):
        own = [table[f"caption.{k}"][table["index"].index(index)] for k in (0, 1)]
        text_B += [next(t for t in own if torch.equal(TOKENIZER([t])[0], row)).casefold()]
    same_BB = torch.tensor([[a == b for a in text_B] for b in text_B])
    assert torch.equal(batch.content_id[:, None] == batch.content_id, same_BB) and len(set(text_B)) == 4
    z_a, z_b = (F.normalize(random(len(text_B), 8, seed=s).double(), dim=1).requires_grad_() for s in (1, 2))
    value_B = InfoNCE(temperature=None)(z_a, z_b, batch.content_id, torch.ones(len(text_B), dtype=torch.bool))
    (gradient,) = torch.autograd.grad(value_B[0], z_b)
    s_B, t_B, other_B = z_a[0] @ z_b.T, z_b[0] @ z_a.T, ~same_BB[0]
    wanted = -s_B[0] + sum((x[0].exp() + x[other_B].exp().sum()).log() for x in (s_B, t_B)) / 2
    torch.testing.assert_close(value_B[0], wanted, **rounding(64, F64))
    assert not gradient[1:][same_BB[0, 1:]].any() and gradient[1:][other_B[1:]].any(dim=1).all()


def test_data_of_ones_own_take_the_table_beside_their_images(tmp_path: Path) -> None:
    for n in range(4):
        Image.new("RGB", (8, 8), (60 * n, 0, 0)).save(tmp_path / f"{n}.png")
    rows = {"index": [0, 1, 2], "sample": [f"{n}.png" for n in range(3)]}
    pq.write_table(
        pa.table({**rows, "caption.0": ["red", "red", "blue"], "caption.1": ["red"] * 3}), tmp_path / CAPTIONS
    )
    fields = Fields(image=ImageField(size=8), text=TextField("caption", TOKENIZER))
    table = str(tmp_path / CAPTIONS)
    data = UserData(0, str(tmp_path), fields=fields, table=table, table_key="sample", holdout=0, batch_size=4)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    order = batch.inputs["image"].flatten(1).amax(dim=1).argsort().tolist()
    assert [bool(batch.present["text"][n]) for n in order] == [True, True, True, False]
    assert batch.content_id[order[0]] == batch.content_id[order[1]], "equal captions"


def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path) -> None:
    file = written(tmp_path, Emoji())  # ids count the concepts of the whole pack
    with pytest.raises(ValueError, match=r"for noto's '.*' one of '.*': ids of other data; predict with this data"):
        assert emoji(tmp_path).mixed_captions
    pq.write_table(pq.read_table(file).slice(0, 1), file)
    with pytest.raises(ValueError, match="no caption; predict with"):
        assert emoji(file).mixed_captions
    for name, value, line in (
        ("captions", 4, "captions 4: of 3 templates"),
        ("templates", ["{color}"], "no attribute 'color'; nearest: colour"),
        ("templates", ["a hat"], "'a hat': no attribute in braces"),
        ("attributes", {"colour": ["red"]}, "attributes: colour: red: two or more"),
    ):
        with pytest.raises(ValueError, match=line):
            PseudoCaptions(**{"attributes": ATTRIBUTES, "templates": TEMPLATES, name: value})  # type: ignore[arg-type]


def floor(count: int) -> float:
    """The least mean of InfoNCE of raw cosines, log(1 + (B - 1) e^{m - p}) by Jensen.

    p is the mean cosine of pairs, m that of all others: p - m = tr(P^T (B - 11^T) Q) / (B (B - 1)) <= B / (B - 1).
    """
    return math.log(1 + (count - 1) * math.exp(-count / (count - 1)))


@pytest.mark.parametrize("count", [2, 5, 64])
def test_raw_cosines_reach_their_floor_at_a_simplex_and_are_nowhere_below(count: int) -> None:
    loss, every = InfoNCE(temperature=None).double(), (torch.arange(count), torch.ones(count, dtype=torch.bool))
    assert loss.scale() == 1.0 and not any(p.requires_grad for p in loss.parameters())
    z_BB = F.normalize(torch.eye(count, dtype=F64) - 1 / count, dim=1)
    value_B = loss(z_BB, z_BB, *every)
    torch.testing.assert_close(value_B, torch.full_like(value_B, floor(count)), **rounding(count, F64))
    # where all others were opposite, which they can be of two samples alone
    assert (floor(count) > math.log(1 + (count - 1) * math.exp(-2)) + 0.1) == (count > 2)
    for seed in range(50):
        a, b = (F.normalize(random(count, 3, seed=seed * k).double(), dim=1) for k in (1, 2))
        assert all(loss(a, z, *every).mean() >= floor(count) - ulps(count, F64) for z in (a, b, -b))


class TestRawContrast(GradientExact, MissingModalities, Ranks, Resume):
    def recipe(self) -> MultiTask:
        contrast = Contrast([["image", "text"]], InfoNCE(temperature=None))
        return MultiTask(towers("image", "text"), {"contrast": contrast}, 4, pool=MaxPool(8))

    def batch(self) -> Batch:
        batch, at = samples(16, "image", "text"), torch.arange(16)
        batch.content_id = torch.where(at % 3 == 0, 99, at)  # every third has an equal text
        return batch

    def explicit(self, recipe: Any, batch: Batch) -> dict[str, Tensor]:
        both, z = batch.both("image", "text").nonzero().flatten().tolist(), {}
        for m in ("image", "text"):
            h = recipe.pools[m].linear(recipe.towers[m].layers(batch.inputs[m][both]))  # the maximum of one token
            z[m] = F.normalize(recipe.heads[m](h), dim=1)
        s, value = z["image"] @ z["text"].T, torch.zeros((), dtype=F64)
        for i, b in enumerate(both):
            far = [j for j, c in enumerate(both) if j == i or batch.content_id[c] != batch.content_id[b]]
            value = value + (s[i, far].exp().sum().log() + s[far, i].exp().sum().log()) / 2 - s[i, i]
        return {"contrast": value / len(both)}
