"""4M-21 (arXiv 2406.09406): tokenizers of columns, vectors and palettes; colours of pictures; steering by a palette.

Letters: B samples, C columns, N training samples, K codes, W numbers of a vector, M colours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from descant.callbacks import Steering
from descant.datamodules import Emoji
from descant.datamodules.corpora.emoji_table import COLUMNS
from descant.modules.core.batch import Batch
from descant.modules.evaluation.inversion import rows_of_other_keys
from descant.modules.masking.adapters import Adapters
from descant.modules.masking.code_adapter import CodeAdapter
from descant.modules.masking.corruptions import UniformMask
from descant.modules.masking.kmeans import KMeansPatches, VectorTokens
from descant.modules.masking.sampler import Sampler
from descant.modules.tokenizers.codes import CodeTokenizer
from descant.modules.tokenizers.values import PaletteTokens, ScalarTokens
from descant.modules.towers.vit import Trunk
from descant.modules.transforms.palette import dominant_colours, hue_error, orientations
from descant.recipes import Masked
from tests.callbacks.evaluate.test_embeddings import evaluate
from tests.callbacks.evaluate.test_reconstruction import ResumableLog
from tests.ranks import run_ranks
from tests.tolerance import F32, F64, ulps

# tokenizers -----------------------------------------------------------------------------------------------------------


def table(rows: int = 400, seed: int = 0) -> Tensor:
    """A skewed number, whole numbers, and a category; a tenth is missing."""
    g = torch.Generator().manual_seed(seed)
    x_N3 = torch.randn(rows, 3, generator=g)
    x_NC = torch.stack(
        [x_N3[:, 0].exp(), x_N3[:, 1].abs().mul(4).floor(), x_N3[:, 2].abs().mul(2).floor().clamp(max=4)], 1
    )
    return x_NC.masked_fill(torch.rand(rows, 3, generator=g) < 0.1, torch.nan)


def test_bins_are_quantiles_and_ids_those_of_a_loop() -> None:
    x_NC, made = table(), ScalarTokens([0, 0, 5], bins=8)
    made.fit(x_NC)
    code_NC, real_NC = made.encode(x_NC), made.real(x_NC)
    decoded_NC = made.decode(code_NC)
    for c in range(2):
        value_N = x_NC[:, c].double().numpy()
        value_N = value_N[np.isfinite(value_N)]
        border_Q = np.quantile(value_N, np.arange(1, 8) / 8)
        for n in range(len(x_NC)):
            if real_NC[n, c]:
                within = [float(v) for v in value_N if sum(v > border_Q) == sum(float(x_NC[n, c]) > border_Q)]
                assert int(code_NC[n, c]) == 8 * c + sum(float(x_NC[n, c]) > border_Q)
                assert float(decoded_NC[n, c]) == pytest.approx(np.mean(within), rel=ulps(4, F32))
    known_N = real_NC[:, 2]
    assert torch.equal(code_NC[known_N, 2] - 16, x_NC[known_N, 2].long())
    assert torch.equal(decoded_NC[known_N, 2], x_NC[known_N, 2]) and torch.equal(real_NC, ~x_NC.isnan())
    other = ScalarTokens([0, 0, 5], bins=8)
    with pytest.raises(ValueError, match="ScalarTokens: not fitted"):
        other.encode(x_NC)
    other.load_state_dict(made.state_dict())
    assert other.fitted and other.digest() == made.digest() and torch.equal(other.encode(x_NC), code_NC)
    assert ScalarTokens([3, 2]).fitted and ScalarTokens([3, 2]).samples == 0  # categories alone need no sample


@pytest.mark.parametrize("cosine", [False, True])
def test_books_are_nearest_centres_of_parts_and_decode_to_them(cosine: bool) -> None:
    x_NW, made = torch.randn(200, 12, generator=torch.Generator().manual_seed(0)), VectorTokens(12, 3, 16, cosine)
    made.fit(x_NW)
    code_NG, y_NW = made.encode(x_NW), x_NW / x_NW.norm(dim=1, keepdim=True) if cosine else x_NW
    for g in range(3):
        part_NP, centre_KP = y_NW[:, 4 * g : 4 * g + 4], made.centre_GKP[g]
        far_NK = (part_NP[:, None] - centre_KP).square().sum(dim=2)
        chosen_N = far_NK.gather(1, code_NG[:, g, None] - 16 * g).squeeze(1)
        assert torch.allclose(chosen_N, far_NK.amin(dim=1), rtol=0, atol=ulps(16, F32) * float(far_NK.max()))
        assert torch.equal(made.decode(code_NG)[:, 4 * g : 4 * g + 4], centre_KP[code_NG[:, g] - 16 * g])
    assert torch.equal(made.encode(7 * x_NW), code_NG) == cosine
    other = VectorTokens(12, 3, 16, cosine)
    with pytest.raises(ValueError, match="VectorTokens: not fitted"):
        other.encode(x_NW)
    other.load_state_dict(made.state_dict())
    assert torch.equal(other.encode(x_NW), code_NG) and made.cover(torch.arange(3)[None]).shape == (1, 12)


def test_a_palette_is_known_to_half_a_level() -> None:
    x_BM3, made = torch.rand(50, 4, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1, PaletteTokens(4, 16)
    code_BT = made.encode(x_BM3)
    assert code_BT.shape == (50, 12) and torch.equal(code_BT // 16, torch.arange(3).repeat_interleave(4).expand(50, -1))
    assert float((made.decode(code_BT) - x_BM3).abs().max()) <= 1 / 16 + ulps(2, F32)
    assert torch.equal(made.encode(made.decode(code_BT)), code_BT)
    assert made.encode(torch.tensor([[[-9.0, 1.0, 9.0]] * 4]))[0].unflatten(0, (3, 4))[:, 0].tolist() == [0, 31, 47]


def perplexity(code_BT: Tensor, tokenizer: CodeTokenizer) -> list[float]:
    """Of each layer, as a share of its codes."""
    shares = []
    for layer, id_BT in enumerate((code_BT % tokenizer.codes).unflatten(1, (tokenizer.layers, -1)).unbind(1)):
        codes = (getattr(tokenizer, "columns", None) or [0] * tokenizer.layers)[layer] or tokenizer.codes
        p_K = id_BT.flatten().bincount(minlength=codes) / id_BT.numel()
        shares.append(math.exp(float(torch.special.entr(p_K).sum())) / codes)
    return shares


def test_codes_of_emoji_are_used() -> None:
    """The perplexity of every tokenizer of masked/extended is at least a quarter of its codes."""
    data = Emoji(size=48, table=True, sketch=True, derived=["dominant", "orientations"], batch_size=200)
    batch = data.on_after_batch_transfer(next(iter(data.sample_dataloader(400))), 0)
    tokenizers: dict[str, CodeTokenizer] = {
        "dominant": PaletteTokens(4, 16),
        "table": ScalarTokens(COLUMNS),
        "orientations": VectorTokens(128, 8, 32),
        "sketch": KMeansPatches([48, 48], 8, channels=1, codes=128),
    }
    for m, tokenizer in tokenizers.items():
        if tokenizer.samples:
            tokenizer.fit(batch.inputs[m])
        shares = perplexity(tokenizer.encode(batch.inputs[m]), tokenizer)
        assert np.mean(shares) >= 0.25, (m, shares)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ScalarTokens([0]), r"columns \[0\], bins 16, samples 400: at least two columns"),
        (lambda: ScalarTokens([0, 3]).fit(torch.full((5, 2), torch.nan)), "column 0: no number among 5 samples"),
        (
            lambda: ScalarTokens([2, 3]).encode(torch.tensor([[1.0, 3.0]])),
            "column 1 of row 0: category 3, and it has 0 to 2",
        ),
        (lambda: ScalarTokens([2, 3]).encode(torch.zeros(1, 4)), r"input \[4\]: this tokenizer takes 2 columns"),
        (lambda: VectorTokens(12, 5), "books 5 does not divide width 12; the nearest that does is 4"),
        (lambda: VectorTokens(4, 2, 9).fit(torch.zeros(3, 4)), "3 vectors for 9 codes: more samples"),
        (lambda: PaletteTokens(0), "colours 0, levels 16: at least 1 and 2"),
        (lambda: PaletteTokens(2).encode(torch.zeros(1, 3, 3)), r"input \[3, 3\]: this tokenizer takes 2 colours"),
    ],
)
def test_bad_input_is_one_line(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


# pictures -------------------------------------------------------------------------------------------------------------


def test_colours_are_those_of_most_pixels_whatever_the_batch() -> None:
    colour_K3 = torch.tensor([[200, 30, 40], [20, 60, 220], [40, 180, 90], [255, 255, 255]]) / 127.5 - 1
    at_144 = torch.tensor([[0] * 4, [3] * 4, [1, 1, 1, 3], [2, 2, 3, 3]])[None]
    flat = colour_K3[at_144].permute(0, 3, 1, 2)
    assert torch.equal(dominant_colours(flat, 3)[0], colour_K3[:3]) and torch.equal(
        dominant_colours(flat, 4)[0], colour_K3[[0, 1, 2, 0]]
    )
    assert torch.equal(
        dominant_colours(torch.ones(1, 3, 4, 4), 2), torch.ones(1, 2, 3)
    )  # background where nothing else is
    x_B3HW = torch.rand(7, 3, 12, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found_BM3 = dominant_colours(x_B3HW)
    assert all(torch.equal(dominant_colours(x[None])[0], found) for x, found in zip(x_B3HW, found_BM3, strict=True))
    turned = x_B3HW.flatten(2)[..., torch.randperm(144)].view_as(x_B3HW)
    assert torch.equal(dominant_colours(turned), found_BM3)


def test_histograms_of_orientations_are_those_of_a_loop() -> None:
    x_B3HW = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=F32)
    found = orientations(x_B3HW, cells=2, bins=4).view(2, 4, 2, 2)
    luma = (x_B3HW * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1).double().numpy()
    for b in range(2):
        padded, wanted = np.pad(luma[b], 1, mode="edge"), np.zeros((4, 2, 2))
        for y in range(8):
            for x in range(8):
                w = padded[y : y + 3, x : x + 3]
                across = ((w[:, 2] - w[:, 0]) * [1, 2, 1]).sum() / 4
                down = ((w[2] - w[0]) * [1, 2, 1]).sum() / 4
                turn = math.atan2(down, across) % math.pi
                wanted[min(int(turn / math.pi * 4), 3), y // 4, x // 4] += math.hypot(across, down)
        assert np.allclose(found[b].numpy(), wanted / np.linalg.norm(wanted), rtol=0, atol=ulps(64, F32))


# steering -------------------------------------------------------------------------------------------------------------

HUE_63 = torch.tensor([[1.0, -1, -1], [1, 1, -1], [-1, 1, -1], [-1, 1, 1], [-1, -1, 1], [1, -1, 1]])  # 60 degrees apart


class Painter(Sampler):
    """Paints the palette's first colour where it is given and the row is even, else the hue of the text."""

    def __call__(self, model: Any, batch: Batch, given: Sequence[str], targets: Sequence[str]) -> dict[str, Tensor]:
        own_B3 = HUE_63[batch.inputs["text"][:, 0]]
        asked_B3 = batch.inputs["dominant"][:, 0]
        heeds_B = (batch.index % 2 == 0) & ("dominant" in given)
        colour_B3 = torch.where(heeds_B[:, None], asked_B3, own_B3)
        return {m: colour_B3[..., None, None].expand(-1, 3, 4, 4) for m in targets}


class Paints(L.LightningModule):
    def __init__(self, palette: bool = True) -> None:
        super().__init__()
        self.adapters = dict.fromkeys(["text", "image", *(["dominant"] if palette else [])])
        self.decoder, self.targets, self.turn = None, ["image"], nn.Parameter(torch.zeros(()))

    def raw(self, batch: Batch) -> Any: ...

    def encode(self, raw: dict[str, Tensor], visible: dict[str, Tensor]) -> Any: ...

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        return None


def asked(n: int = 23) -> Batch:
    """Some palettes are grey, and some rows lack a modality."""
    g = torch.Generator().manual_seed(0)
    hue_N, text_N1 = torch.randint(6, (n,), generator=g), torch.randint(6, (n, 1), generator=g)
    colour_N3 = torch.where(torch.arange(n)[:, None] % 7 == 3, 0.5, HUE_63[hue_N])
    inputs = {"text": text_N1, "dominant": colour_N3[:, None].repeat(1, 2, 1), "image": torch.zeros(n, 3, 4, 4)}
    present = {m: torch.rand(n, generator=g) > 0.2 for m in inputs}
    return Batch(inputs, present, {}, torch.randperm(100, generator=g)[:n], torch.randint(n // 2, (n,), generator=g))


def by_hand(whole: Batch, palette: bool) -> dict[str, float]:
    at = [int(i) for i in whole.index.argsort() if whole.present["text"][i] and whole.present["dominant"][i]]
    other = [at[k] for k in rows_of_other_keys(whole.content_id[at])]
    found = dict[str, list[float]](steered=[], free=[])
    for i, o in zip(at, other, strict=True):
        wanted = whole.inputs["dominant"][o, 0]
        if float(wanted.std()) == 0:
            continue
        hues = [int((x == HUE_63).all(1).nonzero()) for x in (wanted, HUE_63[int(whole.inputs["text"][i])])]
        apart = 60.0 * min((hues[0] - hues[1]) % 6, (hues[1] - hues[0]) % 6)
        found["free"].append(apart)
        found["steered"].append(0.0 if palette and int(whole.index[i]) % 2 == 0 else apart)
    steered, free = (float(np.mean(found[name])) for name in ("steered", "free"))
    return {"one/hue_error": steered, "one/hue_error_free": free, "one/steering": steered / free}


def on_a_rank(rank: int | None, batch: int = 5, palette: bool = True) -> dict[str, float]:
    options: Any = {} if rank is None else {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
    callback = Steering(["text"], sampler=Painter(), batch=batch)
    return evaluate(ResumableLog({"one": asked()}), callback, recipe=Paints(palette), **options)


def test_steering_is_that_of_a_loop_whatever_the_batches() -> None:
    for palette in (True, False):
        wanted = by_hand(asked(), palette)
        assert (wanted["one/steering"] < 1) == palette and wanted["one/hue_error_free"] > 50
        for batch in (5, 100):
            # arc cosine near 1: the root of a rounding of the cosine, in degrees
            close = pytest.approx(wanted, abs=math.degrees(math.sqrt(2 * ulps(8, F32))))
            assert on_a_rank(None, batch, palette) == close


@pytest.mark.ddp
def test_two_ranks_steer_as_one() -> None:
    alone = on_a_rank(None)
    for values in run_ranks(2, on_a_rank):
        assert values == pytest.approx(alone, rel=ulps(23, F32))


def test_hues_are_angles_and_grey_has_none() -> None:
    red, pale, grey = torch.tensor([1.0, -1, -1]), torch.tensor([0.5, 0.0, 0.0]), torch.zeros(3)
    made_BK3 = torch.stack([HUE_63[[2, 1]], torch.stack([grey, grey]), torch.stack([pale, grey])]).to(F64)
    error_B, has_B = hue_error(red.expand(3, 1, 3).to(F64), made_BK3)
    assert error_B.tolist() == pytest.approx([60, 90, 0], abs=1e-5) and bool(has_B.all())  # arc cosine near 1
    assert not hue_error(grey.expand(1, 2, 3), made_BK3[:1].float())[1].any()


def test_pictures_are_generated_to_a_palette_by_a_masked_model() -> None:
    torch.manual_seed(0)
    cut = KMeansPatches([4, 4], 2, codes=4)
    cut.fit(torch.rand(20, 3, 4, 4) * 2 - 1)
    text = CodeAdapter(ScalarTokens([6, 2]))
    model = Masked(
        Adapters(image=CodeAdapter(cut), text=text, others={"dominant": CodeAdapter(PaletteTokens(2, 4))}),
        Trunk(12, 1, 2),
        corruption=UniformMask(0.5),
    )
    b = asked()
    b.inputs["text"] = torch.cat([b.inputs["text"], b.inputs["text"] % 2], dim=1).float()
    values = evaluate(ResumableLog({"one": b}), Steering(["text"], sampler=Sampler(2)), recipe=model.eval())
    assert {"one/hue_error", "one/hue_error_free", "one/steering"} <= values.keys()
    assert all(0 < values[f"one/hue_error{end}"] < 180 for end in ("", "_free"))
    with pytest.raises(ValueError, match="Steering: modality 'colours'"):
        evaluate(ResumableLog({"one": b}), Steering(["text"], palette="colours"), recipe=model)
