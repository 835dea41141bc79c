"""Between a modality and tokens, both ways: what a masked model reads of it, and what it has to say of what is masked.

An adapter cuts an input into tokens of raw content, embeds the visible ones, and turns what a decoder says of the
masked ones into a loss, one number a token. Letters: B samples, T tokens of a sample, N tokens of all samples, P raw
numbers of a token, D width of the encoder, E width of the decoder, C classes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.host import derived, finite, with_host_copy
from descant.modules.masking.corruptions import Grid
from descant.modules.towers.image import sincos
from descant.modules.towers.timm import read_weights


class PixelLoss(nn.Module):
    """``mean_p |y_np - target_np|^power`` of each token, ``target = (x - mean_n) / std_n`` of its pixels if ``norm``.

    Args:
        norm: the target is each patch less its mean and over its standard deviation (MAE: better features).

    Shapes: predictions and patches ``[N, P] -> [N]``, float32.

    Source: arXiv 2111.06377, whose ``std`` is that of P - 1 degrees of freedom.
    """

    power: int
    kind: str

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.norm = norm

    @property
    def name(self) -> str:
        return f"{self.kind}{'-norm' if self.norm else ''}"

    def target(self, x_NP: Tensor) -> Tensor:
        if not self.norm:
            return x_NP
        var_N1, mean_N1 = torch.var_mean(x_NP, dim=1, keepdim=True)
        return (x_NP - mean_N1) / (var_N1 + 1e-6).sqrt()

    def forward(self, y_NP: Tensor, x_NP: Tensor) -> Tensor:
        return (y_NP.float() - self.target(x_NP.float())).abs().pow(self.power).mean(dim=1)


class MSE(PixelLoss):
    """``mean_p (y_np - x_np)^2`` of each token; see :class:`PixelLoss`.

    >>> MSE()(torch.zeros(1, 2), torch.tensor([[1.0, 3.0]])).item(), MSE(norm=True).name
    (5.0, 'mse-norm')
    """

    power, kind = 2, "mse"


class L1(PixelLoss):
    """``mean_p |y_np - x_np|`` of each token; see :class:`PixelLoss`.

    >>> L1()(torch.zeros(1, 2), torch.tensor([[1.0, 3.0]])).item()
    2.0
    """

    power, kind = 1, "l1"


class Adapter(nn.Module):
    """One modality as tokens. The recipe calls ``build`` once, when it knows the widths of encoder and decoder.

    A subclass sets ``grid`` and implements ``raw``, ``embed``, ``heads`` and ``losses``.
    """

    grid: Grid
    place_TD: Tensor

    @property
    def relative(self) -> bool:
        """True where what it predicts is no input, such as patches less their own mean and spread alone."""
        return False

    @property
    def tokens(self) -> int:
        """T."""
        return math.prod(self.grid)

    def build(self, width: int, out: int) -> None:
        """Layers into D = ``width`` and out of E = ``out``; ``out`` 0 leaves the way out away."""
        self.modality_D = nn.Parameter(torch.randn(width) * 0.02)
        self.register_buffer("place_TD", sincos(self.grid, width), persistent=False)

    def raw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, ...]`` -> raw content ``[B, T, P]`` and bool ``[B, T]``, which tokens are real (not padding)."""
        raise NotImplementedError

    def embed(self, x_NP: Tensor, place_N: Tensor) -> Tensor:
        """``[N, D]`` of the raw content of some tokens at their places."""
        return self.content(x_NP, place_N) + self.place_TD[place_N] + self.modality_D

    def content(self, x_NP: Tensor, place_N: Tensor) -> Tensor:
        raise NotImplementedError

    def losses(self, h_NE: Tensor, x_NP: Tensor, place_N: Tensor) -> dict[str, Tensor]:
        """Name of each loss ("" for an only one) -> float32 ``[N]``, of what a decoder says of tokens."""
        raise NotImplementedError

    def predict(self, h_NE: Tensor, place_N: Tensor) -> Tensor:
        """Raw content ``[N, P]`` of what a decoder says of tokens: in the units of the input, or class ids."""
        raise NotImplementedError

    def whole(self, x_BTP: Tensor) -> Tensor:
        """Raw content of all tokens in the shape of the input."""
        raise NotImplementedError

    def input(self, x_BTP: Tensor) -> Tensor:
        """Raw content of all tokens in the shape and units of the input: the inverse of ``raw``."""
        return self.whole(x_BTP)


class PatchAdapter(Adapter):
    """Patches of an image, a volume, a spectrogram, a video: ``h = W patch + b + sincos(place) + modality``.

    Any number of axes: ``size: [64, 64], patch: [8, 8]`` of pictures ``[B, C, 64, 64]``; ``[32, 32, 32]`` of volumes
    ``[B, C, 32, 32, 32]``; ``[64, 250], [16, 10]`` of spectrograms ``[B, 64, 250]``, which need no axis of channels.

    Args:
        size: of each axis.
        patch: of each axis, or one number for all.
        channels: C.
        losses: of what is predicted, each with a head of its own; the squared error of raw pixels where not given.
        mean, spread: what is taken off a raw number, and becomes 1.
        padded: numbers that are not finite are padding: a patch with any is not real. Frames of ``-inf`` are no sound.
        weights: a local file of a plain timm ViT with such patches, whose patch embedding is taken.

    Raises:
        ValueError: for a size that patches do not divide, or smaller than a patch; in ``raw``, for another shape.

    >>> adapter = PatchAdapter(size=[4, 4], patch=2, channels=3)
    >>> x_BTP, real_BT = adapter.raw(torch.arange(48.0).view(1, 3, 4, 4))
    >>> x_BTP.shape, x_BTP[0, 0].tolist()
    (torch.Size([1, 4, 12]), [0.0, 1.0, 4.0, 5.0, 16.0, 17.0, 20.0, 21.0, 32.0, 33.0, 36.0, 37.0])
    """

    def __init__(
        self,
        size: list[int],
        patch: list[int] | int,
        channels: int = 3,
        losses: list[PixelLoss] | None = None,
        mean: float = 0.0,
        spread: float = 1.0,
        padded: bool = False,
        weights: Path | None = None,
    ) -> None:
        super().__init__()
        self.size, self.channels = tuple(size), channels
        self.patch = checked_patch(self.size, patch)
        self.grid = tuple(side // p for side, p in zip(self.size, self.patch, strict=True))
        if spread <= 0:
            raise ValueError(f"spread {spread:g}: greater than 0")
        self.mean, self.spread, self.padded, self.weights = mean, spread, padded, weights
        self.terms = nn.ModuleList(copy.deepcopy(loss) for loss in losses or [MSE()])
        names = [term.name for term in self.losses_of()]
        if len(set(names)) < len(names):
            raise ValueError(f"losses: {', '.join(names)}: each once")

    @property
    def numbers(self) -> int:
        """P."""
        return self.channels * math.prod(self.patch)

    def build(self, width: int, out: int) -> None:
        super().build(width, out)
        self.inward = nn.Linear(self.numbers, width)
        nn.init.xavier_uniform_(self.inward.weight)
        nn.init.zeros_(self.inward.bias)
        if self.weights is not None:
            _take_patches(self.inward, self.weights)
        self.outward = nn.ModuleList(nn.Linear(out, self.numbers) for _ in self.terms) if out else nn.ModuleList()

    def raw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x_BTP = self._cut(x)
        if not self.padded:
            shape = x_BTP.shape[:2]
            all_BT = torch.ones(shape, dtype=torch.bool, device=x.device)
            return x_BTP, with_host_copy(all_BT, lambda: torch.ones(shape, dtype=torch.bool))
        real_BT = derived(lambda finite_B: self._patches(finite_B).all(dim=2), finite(x))
        return x_BTP.masked_fill(~real_BT[..., None], 0.0), real_BT

    def _cut(self, x: Tensor) -> Tensor:
        """``[B, T, P]``: patches."""
        n = len(self.size)
        if self.channels == 1 and x.ndim == n + 1:
            x = x.unsqueeze(1)
        if x.shape[1:] != (self.channels, *self.size):
            raise ValueError(f"input {tuple(x.shape[1:])}: this adapter takes {(self.channels, *self.size)}")
        return self._patches((x - self.mean) / self.spread if self.mean or self.spread != 1 else x)

    def _patches(self, x: Tensor) -> Tensor:
        n = len(self.size)
        sides = [side for pair in zip(self.grid, self.patch, strict=True) for side in pair]
        x = x.reshape(len(x), self.channels, *sides)
        grid, inside = range(2, 2 + 2 * n, 2), range(3, 3 + 2 * n, 2)
        return x.permute(0, *grid, 1, *inside).reshape(len(x), self.tokens, self.numbers)

    def whole(self, x_BTP: Tensor) -> Tensor:
        n = len(self.size)
        x = x_BTP.reshape(len(x_BTP), *self.grid, self.channels, *self.patch)
        axes = [axis for k in range(n) for axis in (1 + k, 2 + n + k)]
        return x.permute(0, 1 + n, *axes).reshape(len(x), self.channels, *self.size)

    def input(self, x_BTP: Tensor) -> Tensor:
        return self.whole(x_BTP) * self.spread + self.mean

    def content(self, x_NP: Tensor, place_N: Tensor) -> Tensor:
        return self.inward(x_NP)

    def losses(self, h_NE: Tensor, x_NP: Tensor, place_N: Tensor) -> dict[str, Tensor]:
        said = {t.name: t(head(h_NE), x_NP) for t, head in zip(self.losses_of(), self.outward, strict=True)}
        return said if len(said) > 1 else {"": next(iter(said.values()))}

    def predict(self, h_NE: Tensor, place_N: Tensor) -> Tensor:
        """Of the head of raw pixels, or else of the first."""
        chosen = next((k for k, term in enumerate(self.losses_of()) if not term.norm), 0)
        return self.outward[chosen](h_NE)

    @property
    def relative(self) -> bool:
        return all(term.norm for term in self.losses_of())

    def losses_of(self) -> list[PixelLoss]:
        return [term for term in self.terms if isinstance(term, PixelLoss)]


class CategoryAdapter(Adapter):
    """A map of classes, int64 ``[B, H, W]``: an embedding of each pixel, then patches as of an image; cross-entropy.

        loss_n = mean_p -log softmax(y_np)[x_np], in float32 whatever the run's precision

    Args:
        classes: C; a class below 0 is unknown: it adds nothing to the loss, and embeds to zero.
        size, patch: as of :class:`PatchAdapter`.
        embedding: numbers of a pixel's embedding.

    Source: MultiMAE (arXiv 2204.01678), whose semantic maps have 64 numbers a pixel.

    Raises:
        ValueError: as of :class:`PatchAdapter`, or for fewer than two classes.

    >>> adapter = CategoryAdapter(classes=3, size=[4, 4], patch=2)
    >>> adapter.raw(torch.zeros(1, 4, 4, dtype=torch.long))[0].shape
    torch.Size([1, 4, 4])
    """

    def __init__(self, classes: int, size: list[int], patch: list[int] | int, embedding: int = 16) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"classes {classes}: at least 2")
        self.cut = PatchAdapter(size, patch, channels=1)
        self.grid, self.classes, self.embedding = self.cut.grid, classes, embedding

    def build(self, width: int, out: int) -> None:
        super().build(width, out)
        self.table = nn.Embedding(self.classes + 1, self.embedding, padding_idx=self.classes)
        self.inward = nn.Linear(self.cut.numbers * self.embedding, width)
        self.outward = nn.Linear(out, self.cut.numbers * self.classes) if out else nn.Identity()

    def raw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cut.raw(x.unsqueeze(1) if x.ndim == len(self.cut.size) + 1 else x)

    def whole(self, x_BTP: Tensor) -> Tensor:
        return self.cut.whole(x_BTP).squeeze(1)

    def content(self, x_NP: Tensor, place_N: Tensor) -> Tensor:
        return self.inward(self.table(torch.where(x_NP < 0, self.classes, x_NP)).flatten(1))

    def scores(self, h_NE: Tensor) -> Tensor:
        """``[N, P, C]``."""
        return self.outward(h_NE).unflatten(1, (self.cut.numbers, self.classes)).float()

    def losses(self, h_NE: Tensor, x_NP: Tensor, place_N: Tensor) -> dict[str, Tensor]:
        loss_NP = F.cross_entropy(self.scores(h_NE).transpose(1, 2), x_NP, ignore_index=-1, reduction="none")
        known_NP = x_NP >= 0
        return {"": loss_NP.masked_fill(~known_NP, 0.0).sum(dim=1) / known_NP.sum(dim=1).clamp(min=1)}

    def predict(self, h_NE: Tensor, place_N: Tensor) -> Tensor:
        return self.scores(h_NE).argmax(dim=2)


class TokenAdapter(Adapter):
    """Token ids, int64 ``[B, T]``: one token each; cross-entropy over the vocabulary.

    Args:
        vocab: C. length: T.
        pad: the id that is padding: neither seen nor asked for.

    >>> adapter = TokenAdapter(vocab=9, length=3)
    >>> adapter.raw(torch.tensor([[4, 5, 0]]))[1].tolist()
    [[True, True, False]]
    """

    def __init__(self, vocab: int, length: int, pad: int = 0) -> None:
        super().__init__()
        if vocab < 2 or length < 2:
            raise ValueError(f"vocab {vocab}, length {length}: at least 2 each, or nothing could be masked")
        self.grid, self.vocab, self.pad = (length,), vocab, pad

    def build(self, width: int, out: int) -> None:
        super().build(width, out)
        self.table = nn.Embedding(self.vocab, width)
        nn.init.normal_(self.table.weight, std=0.02)
        self.outward = nn.Linear(out, self.vocab) if out else nn.Identity()

    def raw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[1] != self.tokens:
            raise ValueError(f"input of {x.shape[1]} tokens: this adapter takes {self.tokens}")
        return x[..., None], derived(lambda x_BT: x_BT != self.pad, x)

    def whole(self, x_BTP: Tensor) -> Tensor:
        return x_BTP.squeeze(2)

    def content(self, x_NP: Tensor, place_N: Tensor) -> Tensor:
        return self.table(x_NP.squeeze(1))

    def losses(self, h_NE: Tensor, x_NP: Tensor, place_N: Tensor) -> dict[str, Tensor]:
        return {"": F.cross_entropy(self.outward(h_NE).float(), x_NP.squeeze(1), reduction="none")}

    def predict(self, h_NE: Tensor, place_N: Tensor) -> Tensor:
        return self.outward(h_NE).argmax(dim=1, keepdim=True)


class TableAdapter(Adapter):
    """Columns of a table, float ``[B, T]``, one token each: numbers (squared error) and classes (cross-entropy).

        h_t = x_t w_t + b_t of a number,   w_t[x_t] of a class;   nan: the cell is empty, neither seen nor asked for

    Args:
        columns: one entry a column: 0 for a number (standardise it in the data), else how many classes it has.

    Raises:
        ValueError: for fewer than two columns, or a column of one class.

    >>> TableAdapter([0, 3]).raw(torch.tensor([[0.5, float("nan")]]))[1].tolist()
    [[True, False]]
    """

    def __init__(self, columns: list[int]) -> None:
        super().__init__()
        if len(columns) < 2 or min(columns) < 0 or 1 in columns:
            raise ValueError(f"columns {columns}: at least two, each 0 for a number or its classes (2 or more)")
        self.grid, self.columns = (len(columns),), tuple(columns)
        # a number has one output, a class as many as there are: all columns' outputs lie in one row
        outputs = [max(c, 1) for c in columns]
        first = [sum(outputs[:t]) for t in range(len(outputs))]
        self.outputs = sum(outputs)
        self.register_buffer("first_T", torch.tensor(first), persistent=False)
        self.register_buffer("count_T", torch.tensor(outputs), persistent=False)
        self.register_buffer("number_T", torch.tensor([c == 0 for c in columns]), persistent=False)

    first_T: Tensor
    count_T: Tensor
    number_T: Tensor

    def build(self, width: int, out: int) -> None:
        super().build(width, out)
        self.table = nn.Embedding(self.outputs, width)
        self.bias = nn.Embedding(self.tokens, width)
        for layer in (self.table, self.bias):
            nn.init.normal_(layer.weight, std=0.02 if layer is self.bias else width**-0.5)
        self.outward = nn.Linear(out, self.outputs) if out else nn.Identity()

    def raw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[1] != self.tokens:
            raise ValueError(f"input of {x.shape[1]} columns: this adapter takes {self.tokens}")
        real_BT = derived(lambda x_BT: ~x_BT.isnan(), x)
        return x.masked_fill(~real_BT, 0.0)[..., None], real_BT

    def whole(self, x_BTP: Tensor) -> Tensor:
        return x_BTP.squeeze(2)

    def content(self, x_NP: Tensor, place_N: Tensor) -> Tensor:
        x_N, number_N = x_NP.squeeze(1), self.number_T[place_N]
        row_N = self.first_T[place_N] + torch.where(number_N, 0, x_N.long())
        return self.table(row_N) * torch.where(number_N, x_N, 1.0)[:, None] + self.bias(place_N)

    def _scores(self, h_NE: Tensor, place_N: Tensor) -> tuple[Tensor, Tensor]:
        """``[N, C]`` with ``-inf`` outside each token's own column, and the prediction of a number ``[N]``."""
        y_NC, first_N = self.outward(h_NE).float(), self.first_T[place_N]
        at_C = torch.arange(self.outputs, device=y_NC.device)
        own_NC = (at_C >= first_N[:, None]) & (at_C < (first_N + self.count_T[place_N])[:, None])
        return y_NC.masked_fill(~own_NC, -torch.inf), y_NC.gather(1, first_N[:, None]).squeeze(1)

    def losses(self, h_NE: Tensor, x_NP: Tensor, place_N: Tensor) -> dict[str, Tensor]:
        x_N, number_N = x_NP.squeeze(1), self.number_T[place_N]
        score_NC, y_N = self._scores(h_NE, place_N)
        class_N = self.first_T[place_N] + torch.where(number_N, 0, x_N.long())
        wrong_N = F.cross_entropy(score_NC, class_N, reduction="none")
        return {"": torch.where(number_N, (y_N - x_N.float()).square(), wrong_N)}

    def predict(self, h_NE: Tensor, place_N: Tensor) -> Tensor:
        score_NC, y_N = self._scores(h_NE, place_N)
        said_N = (score_NC.argmax(dim=1) - self.first_T[place_N]).to(y_N.dtype)
        return torch.where(self.number_T[place_N], y_N, said_N)[:, None]


class Adapters(nn.ModuleDict):
    """One optional adapter a modality, as :class:`Towers` has towers; any of them reads any modality of its shape.

    Args:
        image, sketch, palette: a picture, its lines, its map of colours.
        text, table, audio, video, depth: token ids, columns, features of sound, frames, distance.
        t1, grey, white: volumes of one head, by contrast.
        visible, infrared: spectral bands.
        volume, bands: any other volumes or bands.
    """

    def __init__(
        self,
        image: Adapter | None = None,
        sketch: Adapter | None = None,
        palette: Adapter | None = None,
        text: Adapter | None = None,
        table: Adapter | None = None,
        audio: Adapter | None = None,
        video: Adapter | None = None,
        depth: Adapter | None = None,
        t1: Adapter | None = None,
        grey: Adapter | None = None,
        white: Adapter | None = None,
        visible: Adapter | None = None,
        infrared: Adapter | None = None,
        volume: Adapter | None = None,
        bands: Adapter | None = None,
    ) -> None:
        given = {name: adapter for name, adapter in locals().items() if isinstance(adapter, Adapter)}
        if not given:
            raise ValueError("adapters: none given; a masked model needs one modality at least")
        super().__init__(given)

    def each(self) -> dict[str, Adapter]:
        """Modality -> adapter."""
        return {name: adapter for name, adapter in self.items() if isinstance(adapter, Adapter)}


def checked_patch(size: Sequence[int], patch: Sequence[int] | int) -> tuple[int, ...]:
    """One patch size an axis, or one line that names the axis and the nearest size that divides it.

    >>> checked_patch((64, 250), 10)
    Traceback (most recent call last):
    ValueError: patch 10 does not divide size 64; the nearest that does is 8
    """
    sizes = (patch,) * len(size) if isinstance(patch, int) else tuple(patch)
    if len(sizes) != len(size):
        raise ValueError(f"patch {list(sizes)}: one number an axis of size {list(size)}, or one for all")
    for side, p in zip(size, sizes, strict=True):
        if p > side:
            raise ValueError(f"size {side} is smaller than a patch of {p}; at most {side}")
        if p < 1 or side % p:
            nearest = min((q for q in range(1, side + 1) if side % q == 0), key=lambda q: (abs(q - p), q))
            raise ValueError(f"patch {p} does not divide size {side}; the nearest that does is {nearest}")
    return sizes


def _take_patches(layer: nn.Linear, path: Path) -> None:
    """A convolution of patches is the same matrix, in the order of channel, then axes."""
    state = read_weights(path)
    weight = state.get("patch_embed.proj.weight")
    if weight is None or weight.flatten(1).shape != layer.weight.shape:
        found = "none" if weight is None else str(list(weight.shape))
        raise ValueError(f"weights {path}: patches {found}, where {list(layer.weight.shape)} are needed")
    with torch.no_grad():
        layer.weight.copy_(weight.flatten(1))
        layer.bias.copy_(state["patch_embed.proj.bias"])
