"""Captions: measurements, noise, sampling of sources at each visit, content keys of equal captions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from descant.datamodules.combined.mixture import Mixture
from descant.datamodules.corpora.captions import (
    AltText,
    CaptionMixer,
    CaptionSource,
    Drawings,
    Drift,
    Fused,
    MixedCaptions,
    SyntheticCaption,
)
from descant.datamodules.corpora.emoji import Emoji
from descant.datamodules.corpora.emoji_pack import VENDORS
from descant.datamodules.corpora.measure import COLOURS, measure, oklab
from descant.datamodules.sampling.resumable_sampler import Order
from descant.modules.core.batch import Batch
from descant.modules.core.rng import mix_N
from descant.modules.losses import InfoNCE
from descant.modules.tokenizers.text import NgramTokenizer, WordTokenizer
from tests.datamodules.batches import shuffled
from tests.tolerance import F32, F64, ulps

TOKENIZER = NgramTokenizer(n=3, buckets=16384, length=80)


def mixer(alt: float, synthetic: float, noise: float = 0.5, **more: Any) -> CaptionMixer:
    sources: dict[str, CaptionSource] = {"alt": AltText(noise), "synthetic": SyntheticCaption()}
    return CaptionMixer(sources, {"alt": alt, "synthetic": synthetic}, **more)


def canvas(*boxes: tuple[str, int, int, int, int], size: int = 64) -> Tensor:
    """A transparent picture with coloured boxes (hex, top, left, bottom, right)."""
    x_4HW = torch.zeros(4, size, size, dtype=torch.uint8)
    for code, top, left, bottom, right in boxes:
        for c in range(3):
            x_4HW[c, top:bottom, left:right] = int(code[2 * c : 2 * c + 2], 16)
        x_4HW[3, top:bottom, left:right] = 255
    return x_4HW


def drawings(images: list[Tensor], kinds: list[str] | None = None) -> Drawings:
    n = len(images)
    whole = torch.stack(images)
    names, codes = [f"thing {i}" for i in range(n)], [f"{i:x}" for i in range(n)]
    return Drawings(
        names, kinds or ["food-fruit"] * n, codes, np.arange(n), np.zeros(n, dtype=int), ["me"], lambda hand: whole
    )


def many(concepts: int = 500, hands: int = 2) -> Drawings:
    concept_R = np.tile(np.arange(concepts), hands)
    names, codes = [f"thing {i}" for i in range(concepts)], [f"{i:x}" for i in range(concepts)]
    kinds = [f"kind-{i % 7}" for i in range(concepts)]
    pictures = torch.stack([canvas((f"{40 * (i % 6):02x}00ff", 4, 4, 60, 60), size=64) for i in range(concepts)])
    hand_R = np.repeat(np.arange(hands), concepts)
    return Drawings(names, kinds, codes, concept_R, hand_R, [f"hand{h}" for h in range(hands)], lambda hand: pictures)


@pytest.fixture(scope="module")
def data() -> Emoji:
    return Emoji(batch_size=64, text=TOKENIZER, mixer=mixer(0.5, 0.5), tiny=True)


def trained(data: Emoji) -> MixedCaptions:
    assert data.mixed_captions is not None
    return data.mixed_captions


# what is measured ------------------------------------------------------------------------------------------------


def test_oklab_is_as_published() -> None:
    # white, and red as CSS Color 4 has it
    lab = oklab(torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]))
    # the matrices are published with ten digits, sRGB's with four
    assert lab[0].tolist() == pytest.approx([1.0, 0.0, 0.0], abs=1e-3)
    assert lab[1].tolist() == pytest.approx([0.6280, 0.2249, 0.1258], abs=1e-3)  # as above


@pytest.mark.parametrize(
    ("code", "term"),
    [
        ("fa1010", "red"),
        ("0a0a0a", "black"),
        ("fdfdfd", "white"),
        ("888888", "grey"),
        ("10a020", "green"),
        ("1030e0", "blue"),
        ("ffe010", "yellow"),
        ("ff9a10", "orange"),
        ("7b3f10", "brown"),
        ("ff80c0", "pink"),
        ("801090", "purple"),
    ],
)
def test_a_square_has_its_colour_term(code: str, term: str) -> None:
    assert SyntheticCaption().texts(drawings([canvas((code, 8, 8, 56, 56))])) == [f"{term} food fruit"]


def test_colours_are_named_by_area_and_small_ones_are_not() -> None:
    two = canvas(("ff0000", 0, 0, 64, 20), ("0000ff", 0, 20, 64, 64))
    spot = canvas(("0000ff", 0, 0, 64, 64), ("ff0000", 0, 0, 8, 8))
    assert SyntheticCaption().texts(drawings([two, spot])) == ["blue and red food fruit", "blue food fruit"]


def test_transparent_pixels_have_no_colour() -> None:
    picture = canvas(("ff0000", 20, 20, 40, 40))
    picture[1, :10] = 255  # green, and nothing of it is seen
    assert SyntheticCaption().texts(drawings([picture, canvas()])) == ["red food fruit", "food fruit"]


def test_measures_in_numbers() -> None:
    half = canvas(("ff0000", 0, 0, 16, 32), ("0000ff", 16, 0, 32, 32))  # a square: red above, blue below
    bar = canvas(("000000", 10, 0, 20, 64))
    found = measure(torch.stack([half, bar, canvas()]))
    red, blue, black = (list(COLOURS).index(term) for term in ("red", "blue", "black"))
    assert found.share_RK[0, [red, blue]].tolist() == [0.5, 0.5]
    assert found.y_RK[0, [red, blue]].tolist() == pytest.approx([-0.25, 0.25], abs=ulps(8, F32))
    assert found.x_RK[0, [red, blue]].tolist() == pytest.approx([0.0, 0.0], abs=ulps(8, F32))
    assert found.side_R.tolist() == [0.5, 1.0, 0.0] and found.wide_R.tolist() == pytest.approx(
        [1.0, 6.4, 0.0], rel=ulps(8, F32)
    )
    assert found.filled_R.tolist() == [1.0, 1.0, 0.0] and found.mirror_R.tolist() == [1.0, 1.0, 0.0]
    assert found.dark_R[:2].tolist() == [0.0, 1.0] and found.share_RK[1, black] == 1.0
    assert not found.share_RK[2].any()
    lopsided = canvas(("ff0000", 0, 0, 64, 8), ("ff0000", 56, 0, 64, 64))
    assert measure(lopsided[None]).mirror_R[0] < 0.8


def test_descriptive_and_dense_captions() -> None:
    flag = canvas(("ff0000", 20, 0, 32, 64), ("0000ff", 32, 0, 44, 64))
    ring = canvas(("000000", 0, 0, 40, 40), ("ffff00", 3, 3, 37, 37))
    descriptive, dense = (SyntheticCaption(form).texts(drawings([flag, ring])) for form in ("descriptive", "dense"))
    assert descriptive == [
        "red and blue food fruit, large, wide, full",
        "yellow and black food fruit, medium, square, full",
    ]
    assert dense == [
        f"{descriptive[0]}, red top, blue bottom, no outline, dim, symmetric, two colours",
        f"{descriptive[1]}, yellow middle, black edge, dark outline, plain, symmetric, two colours",
    ]


def test_drawings_of_several_artists_are_each_measured() -> None:
    red, green = canvas(("ff0000", 8, 8, 56, 56)), canvas(("008000", 8, 8, 56, 56))
    pictures = {0: torch.stack([red, green]), 1: torch.stack([green, red])}
    mixed = Drawings(
        ["a", "b"], ["x", "y"], ["0", "1"], np.array([0, 0, 1, 1]), np.array([1, 0, 1, 0]), "pq", pictures.__getitem__
    )
    assert SyntheticCaption().texts(mixed) == ["green x", "red x", "red y", "green y"]


# alt-text --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.25, 0.5, 1.0])
def test_the_share_of_wrong_names_is_exact_and_fixed(noise: float) -> None:
    some = many()
    texts, own = AltText(noise).texts(some), [some.name_C[c] for c in some.concept_R]
    wrong = np.array([a != b for a, b in zip(texts, own, strict=True)])
    assert wrong.sum() == noise * len(some)
    assert np.array_equal(wrong, AltText(noise).wrong(some))
    assert AltText(noise).texts(some) == texts
    assert set(texts) <= set(some.name_C)
    if noise == 0.5:  # drawings are chosen, not concepts; and more noise keeps the wrong ones wrong
        both = wrong.reshape(2, -1).sum(axis=0)
        assert 0.4 < (both == 1).mean() < 0.6
        assert AltText(0.75).wrong(some)[wrong].all()
        assert AltText(noise, seed=1).texts(some) != texts
        assert len({t for t, w in zip(texts, wrong, strict=True) if w}) > 250  # not one name for all


def test_noise_is_independent_of_the_order_of_drawings() -> None:
    some = many(50)
    order = np.random.default_rng(0).permutation(len(some))
    moved = Drawings(
        some.name_C, some.kind_C, some.code_C, some.concept_R[order], some.hand_R[order], some.hands, some.images
    )
    texts = AltText().texts(some)
    assert AltText().texts(moved) == [texts[r] for r in order]


def test_fused_joins_both_captions() -> None:
    some = drawings([canvas(("ff0000", 8, 8, 56, 56))])
    assert Fused(AltText(0.0), SyntheticCaption()).texts(some) == ["red food fruit, thing 0"]


# the draw --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alt", [0.0, 0.1, 0.5, 1.0])
def test_shares_of_sources_are_pi_and_independent_between_epochs(alt: float) -> None:
    mixed = mixer(alt, 1 - alt).write(many(500), TOKENIZER)
    n = len(mixed.text_SR[0])
    chosen = []
    for epoch in range(3):
        draw_B = mix_N(np.array([7]), "sample", np.full(n, epoch, dtype=np.uint64), np.arange(n, dtype=np.uint64))
        chosen.append(mixed.mixer.choose(draw_B, np.zeros(n)) == 0)
        error = 4 * np.sqrt(alt * (1 - alt) / n)
        assert abs(chosen[-1].mean() - alt) <= error
    # independent between epochs: both alike with probability pi^2 + (1 - pi)^2
    same = (chosen[0] == chosen[1]).mean()
    assert abs(same - (alt**2 + (1 - alt) ** 2)) <= 4 * np.sqrt(same * (1 - same) / n) + 1e-9  # where all are alike


def sources(data: Emoji, epoch: int, world: int = 1, workers: int = 0) -> dict[int, tuple[Any, ...]]:
    """Of each sample of an epoch: its token ids and key, as the loaders of all ranks give them."""
    found: dict[int, tuple[Any, ...]] = {}
    for rank in range(world):
        one: Any = Emoji(batch_size=64, num_workers=workers, text=TOKENIZER, mixer=data.mixer, tiny=True)
        one.trainer = SimpleNamespace(
            global_rank=rank, world_size=world, accumulate_grad_batches=1, default_root_dir=".", training=True
        )
        loader = one.train_dataloader()
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            real = batch.present["text"].tolist()
            ids_B, key_B = batch.inputs["text"].tolist(), batch.content_id.tolist()
            rows = zip(batch.index.tolist(), ids_B, key_B, real, strict=True)
            found |= {index: (tuple(ids), key) for index, ids, key, there in rows if there}
    return found


def test_captions_depend_on_epochs_not_on_ranks_or_workers(data: Emoji) -> None:
    whole = sources(data, 0)
    assert len(whole) == len(data.training_set())
    assert sources(data, 0, world=2) == whole
    assert sources(data, 0, workers=2) == whole
    later = sources(data, 1)
    other = np.mean([later[i] != caption for i, caption in whole.items()])
    # a half meets the other kind, where the two kinds say the same of no drawing
    assert other == pytest.approx(0.5, abs=4 * np.sqrt(0.25 / len(whole)))


def test_loaders_return_the_written_captions(data: Emoji) -> None:
    mixed, rows = trained(data), data.training_set()
    concepts = {int(i): r for r, i in enumerate(rows.identity(np.arange(len(rows))))}
    told = {0: 0, 1: 0}
    for index, (ids, _) in sources(data, 0).items():
        texts = [mixed.texts[mixed.text_SR[s, concepts[index]]] for s in (0, 1)]
        kind = [tuple(TOKENIZER.row([TOKENIZER.ids(text)])) for text in texts].index(ids)
        told[kind] += 1
    assert min(told.values()) > 0.35 * len(rows)


def test_a_mixer_changes_training_captions_only() -> None:
    plain, mixed = (Emoji(batch_size=64, tiny=True, mixer=m) for m in (None, mixer(0.0, 1.0)))
    window = next(iter(Order(len(plain.training_set()), 64, 0)))
    a, b = plain.training_set()[window], mixed.training_set()[window]
    draw, concept = a.rng_seed.numpy(), (a.index // len(VENDORS)).numpy()
    assert a.inputs["text"].tolist() == plain.captions.random(concept, draw)
    assert torch.equal(a.content_id, torch.from_numpy(plain.pack.key_N[concept]))
    assert not torch.equal(a.inputs["text"], b.inputs["text"])
    assert torch.equal(a.inputs["image"], b.inputs["image"]) and torch.equal(a.index, b.index)
    for name, rows in plain.evaluation_sets("test").items():
        window = next(iter(Order(len(rows), 64, 0)))
        one, two = rows[window], mixed.evaluation_sets("test")[name][window]
        assert torch.equal(one.inputs["text"], two.inputs["text"]) and torch.equal(one.content_id, two.content_id)


def test_a_schedule_is_linear_and_ends() -> None:
    moving = mixer(0.0, 1.0, schedule=Drift({"alt": 1.0}, epochs=4))
    assert moving.pi(np.array([0, 1, 2, 4, 9]))[:, 0].tolist() == [0.0, 0.25, 0.5, 1.0, 1.0]
    data = Emoji(batch_size=64, text=TOKENIZER, tiny=True, mixer=moving)
    shares = [data.caption_statistics(epoch) for epoch in (0, 2, 4)]
    n = len(data.training_set())
    expected = pytest.approx([0.0, 0.5, 1.0], abs=4 * np.sqrt(0.25 / n))
    assert [share["alt_share"] for share in shares if share] == expected
    # and the batches follow: their epoch is the slots'
    mixed, rows = trained(data), data.training_set()
    for epoch, kind in ((0, 1), (4, 0)):
        window = next(iter(Order(n, 64, 0, epoch=epoch)))
        taken = [mixed.text_SR[kind, slot.sample] for slot in window.slots]
        assert torch.equal(rows[window].inputs["text"], mixed.tokens_UT[torch.tensor(taken)])


def test_a_schedule_in_a_mixture_counts_passes_of_its_part() -> None:
    moving = mixer(0.0, 1.0, schedule=Drift({"alt": 1.0}, epochs=1))
    whole = Mixture(
        {"one": Emoji(text=TOKENIZER, mixer=moving), "two": Emoji(text=TOKENIZER)}, batch_size=64, tiny=True
    )
    for epoch, kind in ((0, 1), (1, 0)):
        loader: Any = whole.train_dataloader()
        loader.sampler.set_epoch(epoch)
        batch = next(iter(loader))
        mine = batch.source == 0
        part = whole.parts["one"]
        assert isinstance(part, Emoji)
        known = {tuple(trained(part).tokens_UT[t].tolist()) for t in trained(part).text_SR[kind]}
        assert mine.any() and {tuple(ids) for ids in batch.inputs["text"][mine].tolist()} <= known


# content keys ----------------------------------------------------------------------------------------------------


def twins(data: Emoji) -> Batch:
    """A batch of the training set in which some drawings have one caption."""
    return shuffled(data.training_set(), 64)


def test_equal_captions_share_a_key_and_no_others_do() -> None:
    batch = twins(Emoji(batch_size=64, text=TOKENIZER, mixer=mixer(0.5, 0.5)))
    texts = [tuple(ids) for ids in batch.inputs["text"].tolist()]
    same_text = torch.tensor([[a == b for a in texts] for b in texts])
    assert torch.equal(same_text, batch.content_id[:, None] == batch.content_id)


def test_two_drawings_of_one_concept_share_the_key_of_its_name() -> None:
    some = many(20)
    mixed = mixer(1.0, 0.0, noise=0.0).write(some, TOKENIZER)
    _, key_B = mixed.draw(np.arange(40), np.arange(40), np.zeros(40))
    assert torch.equal(key_B[:20], key_B[20:]) and len(key_B.unique()) == 20


def test_equal_captions_are_no_negatives() -> None:
    """Drawings of one caption: a third one's loss pulls, these two have no gradient from each other's text."""
    red = [canvas(("ff0000", 8, 8, 56, 56)), canvas(("e01010", 4, 4, 60, 60)), canvas(("0000ff", 8, 8, 56, 56))]
    mixed = mixer(0.0, 1.0).write(drawings(red), TOKENIZER)
    _, key_B = mixed.draw(np.arange(3), np.arange(3), np.zeros(3))
    assert key_B[0] == key_B[1] != key_B[2]
    generator = torch.Generator().manual_seed(0)
    z_a, z_b = (F.normalize(torch.randn(3, 8, generator=generator), dim=1) for _ in range(2))

    def pushed(key: Tensor) -> Tensor:
        """Gradient of the first drawing's value, on the texts."""
        texts = z_b.clone().requires_grad_()
        value_B = InfoNCE(0.1)(z_a, texts, key, torch.ones(3, dtype=torch.bool))
        return torch.autograd.grad(value_B[0], texts)[0].abs().sum(1)

    alone, together = pushed(torch.arange(3)), pushed(key_B)
    assert alone[1] > 1e-4 and together[1] == 0 and together[2] > 0


# the control -----------------------------------------------------------------------------------------------------


def test_the_sham_permutes_alt_texts_and_changes_nothing_else() -> None:
    some = many()
    method, control = (mixer(0.5, 0.5, sham=sham) for sham in (None, "permute"))
    ours, theirs = (m.write(some, TOKENIZER) for m in (method, control))
    told = some.permute_captions().alt_R
    assert told is not None and not (told == np.arange(len(some))).any()
    assert (some.concept_R[told] != some.concept_R).all()
    at, seen = 0, set()
    while at not in seen:  # one cycle through all
        seen.add(at)
        at = int(told[at])
    assert len(seen) == len(some)
    alt, handed = ([x.texts[t] for t in x.text_SR[0]] for x in (ours, theirs))
    assert sorted(alt) == sorted(handed) and handed == [alt[r] for r in told]
    names = [some.name_C[c] for c in some.concept_R]
    assert np.mean([a == b for a, b in zip(alt, names, strict=True)]) == 0.5
    assert np.mean([a == b for a, b in zip(handed, names, strict=True)]) < 0.01
    synthetic = [[x.texts[t] for t in x.text_SR[1]] for x in (ours, theirs)]
    assert synthetic[0] == synthetic[1]
    other = some.permute_captions(within_kind=True).alt_R
    assert other is not None and sorted(other) == list(range(len(some)))
    kind_R = np.array(some.kind_C)[some.concept_R]
    assert (kind_R[other] == kind_R).all() and (some.hand_R[other] == some.hand_R).all()
    assert (other != np.arange(len(some))).mean() > 0.5  # a class of one drawing keeps its own
    row_B, draw_B = np.arange(64), np.arange(64) * 77
    for x in (ours, theirs):
        for _ in range(3):
            x.draw(row_B, draw_B, np.zeros(64))
    assert method.calls == control.calls == 3
    assert np.array_equal(method.choose(draw_B, np.zeros(64)), control.choose(draw_B, np.zeros(64)))


# what is watched -------------------------------------------------------------------------------------------------


def test_statistics_by_hand() -> None:
    class Fixed(CaptionSource):
        def __init__(self, texts: list[str]) -> None:
            self.said = texts

        def texts(self, drawings: Drawings) -> list[str]:
            return self.said

    tokenizer = WordTokenizer(["a", "b", "c", "d", "e"], length=5)  # three words fit between the ends
    mixed = CaptionMixer({"x": Fixed(["a b c", "a b c d e", "a b"])}, {"x": 1.0}).write(
        drawings([canvas()] * 3), tokenizer
    )
    found = mixed.statistics(np.array([0, 1, 1, 2]), np.arange(4), np.zeros(4))
    assert found == {
        "tokens": (3 + 5 + 5 + 2) / 4,
        "truncated": 0.5,
        "coverage": 4 / tokenizer.vocabulary,  # e is cut, and d where <eos> would be
        "distinct": 0.75,
        "x_share": 1.0,
    }
    assert mixed.mixer.calls == 0


def test_truncation_of_long_captions_is_reported(data: Emoji) -> None:
    cut = {}
    for form in ("short", "dense"):
        one = CaptionMixer({"synthetic": SyntheticCaption(form)}, {"synthetic": 1.0})
        found = Emoji(text=TOKENIZER, tiny=True, mixer=one).caption_statistics(0)
        assert found is not None
        cut[form] = found["truncated"]
    assert cut["short"] == 0 and cut["dense"] > 0.5


def test_statistics_equal_those_of_training_batches(data: Emoji) -> None:
    read, found = sources(data, 2), data.caption_statistics(2)
    assert found is not None
    rows = torch.tensor([ids for ids, _ in read.values()])
    content = rows > 2
    assert found["tokens"] == pytest.approx(float(content.sum(1).double().mean()), rel=ulps(4, F64))
    assert found["coverage"] == len(rows[content].unique()) / TOKENIZER.vocabulary
    assert found["distinct"] == len({ids for ids, _ in read.values()}) / len(read)
    assert found["alt_share"] + found["synthetic_share"] == 1


# bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"probs": {"alts": 1.0}}, "probs: 'alts' is not one of alt, synthetic"),
        ({"probs": {"alt": -0.5}}, "probs: alt -0.5 is no probability; nearest: 0"),
        ({"probs": {"alt": float("nan")}}, "probs: alt nan is no probability"),
        ({"probs": {"alt": 0.0}}, r"probs: no source has a probability above 0; nearest: \{alt: 1.0\}"),
        ({"probs": {}}, "probs: no source has a probability above 0"),
        ({"schedule": Drift({"synthetik": 1.0}, 3)}, "schedule.to: 'synthetik' is not one of alt, synthetic"),
        ({"sources": {}}, "sources: a mixer needs at least one"),
        ({"sources": {"a/b": AltText()}}, "sources: 'a/b': letters"),
    ],
)
def test_bad_mixers_raise_one_line(options: dict[str, Any], line: str) -> None:
    good: dict[str, Any] = {"sources": {"alt": AltText(), "synthetic": SyntheticCaption()}, "probs": {"alt": 1.0}}
    with pytest.raises(ValueError, match=line):
        CaptionMixer(**(good | options))


def test_bad_arguments_raise_one_line() -> None:
    with pytest.raises(ValueError, match=r"noise 1.5 is no share of the drawings; nearest: 1.0"):
        AltText(1.5)
    with pytest.raises(ValueError, match="form: 'densely' is not one of short, descriptive, dense"):
        SyntheticCaption("densely")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="schedule: epochs 0"):
        Drift({"alt": 1.0}, 0)
    with pytest.raises(ValueError, match="all drawings have the name 'thing 0'"):
        AltText(1.0).texts(drawings([canvas()]))
    with pytest.raises(ValueError, match="shuffle_captions: a mixer has its own control"):
        Emoji(mixer=mixer(1, 0), shuffle_captions=True)
    with pytest.raises(ValueError, match=r"languages \['es'\]: a mixer writes English"):
        Emoji(mixer=mixer(1, 0), languages=["es"])
