"""Images in token sequences: the places where a text names them, and rows with room for their tokens.

Letters: B samples, K images of each, P shown images, T text tokens, I tokens of an image, S tokens of a sample.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from descant.modules.core.batch import Batch
from descant.modules.core.host import derive, host_copy, known_finite, to_device, with_finite
from descant.modules.tokenizers.text import PAD


class ShownImages(NamedTuple):
    """Images that texts name and samples have: ``x_P``, and on the CPU the sample and text position of each.

    If there are none, it holds one image of zeros (of sample 0, without a position), so that every rank reaches the
    same parameters.
    """

    x_P: Tensor
    sample_P: Tensor
    word_P: Tensor
    some: bool


def collect_images(batch: Batch, image_token: int) -> ShownImages:
    """Collect the images of a batch in the order in which its texts name them.

    ``image`` is ``[B, C, H, W]``, or ``[B, K, C, H, W]`` for several.
    """
    image = batch.inputs["image"] if batch.inputs["image"].ndim == 5 else batch.inputs["image"][:, None]
    named_BT = host_copy(batch.inputs["text"]) == image_token
    few_B = named_BT.sum(dim=1) > image.shape[1]
    if few_B.any():
        named, where = int(named_BT[few_B][0].sum()), int(host_copy(batch.index)[few_B][0])
        raise ValueError(f"sample {where}: its text names {named} images, and it has {image.shape[1]}")
    sample_P, word_P = (named_BT & host_copy(batch.present["image"])[:, None]).nonzero(as_tuple=True)
    if not len(sample_P):
        return ShownImages(torch.zeros_like(image[:1, 0]), torch.zeros(1, dtype=torch.long), word_P, some=False)
    number_P = (named_BT.cumsum(dim=1) - 1)[sample_P, word_P]
    at = (to_device(sample_P, image.device), to_device(number_P, image.device))
    x_P, known = image[at], known_finite(batch.inputs["image"])
    if known is not None:  # images of any size: which pixels are padding
        x_P = with_finite(x_P, lambda: known().view(image.shape)[sample_P, number_P])
    return ShownImages(x_P, sample_P, word_P, some=True)


class Interleaved(NamedTuple):
    """Rows in which each image has at most I tokens, and an absent image has none.

    Attributes:
        ids_BS: int64, the image id for all tokens of an image.
        loss_mask_BS, real_BS: bool, tokens to be predicted, and tokens that are not padding.
        at_PI: positions of each image's tokens in their rows; on the CPU.
        kept_PI: bool, on the CPU, which of ``at_PI`` are tokens of an image; None: all.
        position_BS: float32 ``[B, S + 1]``, position ids including that after the last token; None: counted one by one.
    """

    ids_BS: Tensor
    loss_mask_BS: Tensor
    real_BS: Tensor
    at_PI: Tensor
    position_BS: Tensor | None = None
    kept_PI: Tensor | None = None


def insert_images(h_BSW: Tensor, seen_PIW: Tensor, images: ShownImages, row: Interleaved) -> Tensor:
    """Insert the tokens of each image into the embeddings; without images, the projector gets a gradient of zero."""
    h_BSW = h_BSW + 0.0 * seen_PIW.sum().to(h_BSW)
    if not images.some:
        return h_BSW
    at = (images.sample_P[:, None].expand_as(row.at_PI).contiguous(), row.at_PI)
    if row.kept_PI is not None:
        of_N = tuple(to_device(x_N, seen_PIW.device) for x_N in row.kept_PI.nonzero(as_tuple=True))
        seen_PIW, at = seen_PIW[of_N], (at[0][row.kept_PI], at[1][row.kept_PI])
    return h_BSW.index_put(tuple(to_device(x_PI, h_BSW.device) for x_PI in at), seen_PIW.to(h_BSW))


def rows_without_images(batch: Batch) -> Interleaved:
    """Return the rows of samples without images."""
    ids_BT = batch.inputs["text"]
    real_BT = derive(_real, ids_BT, batch.present["text"])
    loss_mask_BT = derive(torch.logical_and, batch.inputs["loss_mask"], real_BT)
    return Interleaved(ids_BT, loss_mask_BT, real_BT, torch.zeros(0, 0, dtype=torch.long))


def _real(ids_BT: Tensor, present_B: Tensor) -> Tensor:
    return (ids_BT != PAD) & present_B[:, None]


def interleave(
    batch: Batch, images: ShownImages, cells: int, image_token: int, kept_PI: Tensor | None = None
) -> Interleaved:
    """Make rows with room for ``cells`` tokens at each shown image; text after it moves to the right.

    With ``kept_PI`` (bool, on the CPU), only the kept tokens get room, the first ones of each image.

    >>> text = torch.tensor([[1, 9, 5, 9, 6], [1, 9, 5, 0, 0]])
    >>> present = {"image": torch.tensor([True, False]), "text": torch.tensor([True, True])}
    >>> batch = Batch({"image": torch.zeros(2, 2, 3, 4, 4), "text": text, "loss_mask": text > 4}, present)
    >>> interleave(batch, collect_images(batch, 9), 2, 9).ids_BS.tolist()
    [[1, 9, 9, 5, 9, 9, 6], [1, 5, 0, 0, 0, 0, 0]]
    >>> kept_PI = torch.tensor([[True, True], [True, False]])
    >>> interleave(batch, collect_images(batch, 9), 2, 9, kept_PI).ids_BS.tolist()
    [[1, 9, 9, 5, 9, 6], [1, 5, 0, 0, 0, 0]]
    """
    ids_BT, loss_mask_BT, device = host_copy(batch.inputs["text"]), host_copy(batch.inputs["loss_mask"]), batch.device
    B, T = ids_BT.shape
    named_BT = ids_BT == image_token
    at_P = images.sample_P[: len(images.word_P)], images.word_P
    more_BT = named_BT * torch.where(host_copy(batch.present["image"]), cells - 1, -1)[:, None]  # beyond the text's
    S = T + max(cells - 1, 0) * max(int(named_BT.sum(dim=1).max()), 1)
    if kept_PI is not None:
        kept_PI = kept_PI[: len(images.word_P)]
        more_BT[at_P] = kept_PI.sum(dim=1) - 1
        S = T + max(int(more_BT.sum(dim=1).max()), 0)
    position_BT = torch.arange(T) + more_BT.cumsum(dim=1) - more_BT
    row_BT, is_text_BT = torch.arange(B)[:, None].expand(B, T), ~named_BT
    to = row_BT[is_text_BT], position_BT[is_text_BT]
    ids_BS, loss_mask_BS = torch.full((B, S), PAD, dtype=torch.long), torch.zeros(B, S, dtype=torch.bool)
    ids_BS[to], loss_mask_BS[to] = ids_BT[is_text_BT], loss_mask_BT[is_text_BT]
    at_PI = position_BT[at_P][:, None] + torch.arange(cells)
    some_PI = torch.ones_like(at_PI, dtype=torch.bool) if kept_PI is None else kept_PI
    ids_BS[at_P[0][:, None].expand_as(at_PI)[some_PI], at_PI[some_PI]] = image_token
    real_BS = _real(ids_BS, host_copy(batch.present["text"]))
    ids_BS, loss_mask_BS, real_BS = (to_device(x_BS, device) for x_BS in (ids_BS, loss_mask_BS & real_BS, real_BS))
    return Interleaved(ids_BS, loss_mask_BS, real_BS, at_PI, kept_PI=kept_PI)
