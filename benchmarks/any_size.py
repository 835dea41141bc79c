"""Images of any aspect beside padding to the largest: tokens computed for each useful one, and the time of a step.

Photographs are crops of scikit-image's sample photographs in uncropped camera formats: 1:1, 4:3, 3:2 and 16:9. The last
three occur in portrait and in landscape. All formats are equally frequent, and the longer side has 256 pixels. Letters:
B samples, T tokens, D width.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from importlib.resources import files
from itertools import cycle
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import Row
from benchmarks.data import NAMES
from benchmarks.timing import median, time_interleaved
from descant.datamodules.fields.any_size import AnySizeField
from descant.datamodules.sampling.resumable_sampler import Order
from descant.datamodules.sampling.token_order import TokenOrder
from descant.modules.core.batch import Batch
from descant.modules.towers import AnySizeTower, BagTower, Tokens, Towers
from descant.modules.towers.image import Block, key_mask
from descant.recipes import Contrastive

#: Aspect ratios (width / height); pixels of the longer side and of a patch; tokens of a step.
ASPECTS, LONG, PATCH, STEP = (1, 4 / 3, 3 / 4, 3 / 2, 2 / 3, 16 / 9, 9 / 16), 256, 16, 2048
#: Photographs of the corpus; width, depth and heads of the tower: ViT-Tiny at a third of its depth.
PHOTOGRAPHS, WIDTH, DEPTH, HEADS = 128, 192, 4, 3
#: Bars: tokens computed for each useful one, and time of a step over padding to the largest image of the batch.
COMPUTED, TIME = 1.05, 0.75


def photographs(number: int, long: int = LONG, seed: int = 0) -> list[bytes]:
    """Make JPEGs of random crops of photographs, cycling through all aspects.

    Each crop has 0.7 to 1 times the side of the largest box that fits.
    """
    rng = np.random.default_rng(seed)
    folder = files("skimage").joinpath("data")
    pictures = [Image.open(io.BytesIO(folder.joinpath(name).read_bytes())).convert("RGB") for name in NAMES]
    made = []
    for k in range(number):
        picture, aspect = pictures[k % len(pictures)], ASPECTS[k % len(ASPECTS)]
        height = min(picture.height, picture.width / aspect) * rng.uniform(0.7, 1)
        width = height * aspect
        left, top = rng.uniform(0, picture.width - width), rng.uniform(0, picture.height - height)
        size = round(long * min(aspect, 1)), round(long * min(1 / aspect, 1))
        crop = picture.resize(size, Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))
        buffer = io.BytesIO()
        crop.save(buffer, "JPEG", quality=90)
        made.append(buffer.getvalue())
    return made


class PaddedTower(AnySizeTower):
    """The same tower, but with rows padded to the largest image of the batch and a mask of keys, as in NaFlex."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        layers, self.layers = self.layers, nn.ModuleList()
        norm, self.norm = self.norm, nn.Identity()  # type: ignore[assignment]  # only positions are added
        h_BTD, mask_BT = super().forward(x, mask)
        self.layers, self.norm = layers, norm
        keys_B11T = None if bool(mask_BT.all()) else key_mask(mask_BT)
        for layer in layers:
            h_BTD = Block.forward(layer, h_BTD, keys_B11T)  # type: ignore[arg-type]
        return Tokens(norm(h_BTD), mask_BT)


def count_mlp_tokens(model: Contrastive, batches: Sequence[Batch]) -> list[int]:
    """Return the number of tokens that pass the MLP of the first block, for a step on each batch."""
    seen: list[int] = []
    tower: Any = model.towers["image"]
    hook = tower.layers[0].mlp.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0][..., 0].numel()))
    for batch in batches:
        model.objective_of(batch)
    hook.remove()
    return seen


def tokens() -> Iterator[Row]:
    """Compare two ratios: computed tokens to image patches over an epoch, and tokens to budget in each step."""
    data = photographs(PHOTOGRAPHS)
    for name, enlarge in (("own", False), ("enlarged", True)):
        field = AnySizeField(patch=PATCH, tokens=(LONG // PATCH) ** 2, enlarge=enlarge)
        batches = batches_of(data, field)
        useful = [int(batch.targets["tokens"].sum()) for batch in batches]
        ours, padded = (sum(count_mlp_tokens(model, batches)) / sum(useful) for model in models())
        yield Row.at_most(f"any_size/{name}/tokens_computed", ours, COMPUTED)
        yield Row.informs(f"any_size/{name}/tokens_computed_padded", padded)
        yield Row.informs(f"any_size/{name}/budget_used", sum(useful) / len(useful) / STEP)


def step(rounds: int = 30, warmup: int = 1, batches: int = 2) -> Iterator[Row]:
    """Time forward and backward of our contrastive steps over alternatives on the same batches, in processor time.

    The alternatives are: padding to the largest image of the batch; timm's NaFlexVit (its tower alone beside ours
    alone); and padded batches of neighbours in length, whose samples are no longer drawn at random.
    """
    data = photographs(PHOTOGRAPHS)
    field = AnySizeField(patch=PATCH, tokens=(LONG // PATCH) ** 2)
    drawn, sorted_by_length = batches_of(data, field)[:batches], batches_of(data, field, by_length=True)[1:-1][:batches]
    ours, padded = models()
    same(ours, padded, drawn[0])
    tower: Any = ours.towers["image"]
    owner = naflex(tower)
    queues = [cycle(drawn) for _ in range(5)]
    neighbours = cycle(sorted_by_length)

    def train(model: Contrastive, batch: Batch) -> None:
        model.zero_grad()
        model.objective_of(batch).total.backward()

    def tower_alone(module: nn.Module, inputs: Any) -> None:
        module.zero_grad()
        out = module(inputs)
        (out.h_BTD if isinstance(out, Tokens) else out).square().mean().backward()

    calls = (
        lambda: train(ours, next(queues[0])),
        lambda: train(padded, next(queues[1])),
        lambda: train(padded, next(neighbours)),
        lambda: tower_alone(tower, next(queues[2]).inputs["image"]),
        lambda: tower_alone(owner, naflex_input(next(queues[3]).inputs["image"])),
    )
    time_RK = time_interleaved(calls, rounds, warmup, clock=time.process_time)
    useful = [np.mean([int(b.targets["tokens"].sum()) for b in some]) for some in (drawn, sorted_by_length)]
    value, low, high = median((time_RK[:, 0] / time_RK[:, 1]).tolist())
    yield Row("any_size/step_time", value, TIME, high <= TIME, f"<= {TIME:g} (upper end)", (low, high))
    per_token = time_RK[:, 0] / time_RK[:, 2] * useful[1] / useful[0]
    found = median(per_token.tolist())
    yield Row.informs("any_size/step_time_over_neighbours_padded", found.value, found.interval)
    found = median((time_RK[:, 3] / time_RK[:, 4]).tolist())
    yield Row.informs("any_size/tower_time_over_naflexvit", found.value, found.interval)


def models() -> tuple[Contrastive, Contrastive]:
    """Return the same parameters in a recipe that pads nothing and in one that pads."""
    made = []
    for kind in (AnySizeTower, PaddedTower):
        torch.manual_seed(0)
        towers = Towers(image=kind(LONG, PATCH, WIDTH, DEPTH, HEADS), text=BagTower(vocab=512, width=64))
        made.append(Contrastive(towers, width=64).train())
    return made[0], made[1]


def same(ours: Contrastive, padded: Contrastive, batch: Batch) -> None:
    """Raise AssertionError unless both compute the same loss, up to rounding of float32."""
    losses = [float(model.objective_of(batch).total.detach()) for model in (ours, padded)]
    assert abs(losses[0] - losses[1]) < 1e-4 * losses[1], losses


def batches_of(data: Sequence[bytes], field: AnySizeField, by_length: bool = False) -> list[Batch]:
    """Return batches of an epoch by the budget, with random captions; ``by_length``: of neighbours in token count."""
    shape_N2 = np.array([field.images.header(encoded)[:2] for encoded in data])
    count_N = field.counts(shape_N2)
    kept = count_N.argsort(kind="stable") if by_length else np.arange(len(data))
    order = TokenOrder(Order(len(data), 1, seed=0, shuffle=not by_length), count_N[kept], STEP)
    generator, made = torch.Generator().manual_seed(0), []
    for window in order:
        row_B = kept[[slot.sample for slot in window.slots]]
        x_B4HW, _ = field.decode([data[row] for row in row_B], None)
        x_BCHW = field.pixels(x_B4HW, torch.zeros(len(row_B), dtype=torch.long))
        text_BT = torch.randint(1, 512, (len(row_B), 16), generator=generator)
        present = {name: torch.ones(len(row_B), dtype=torch.bool) for name in ("image", "text")}
        targets = {"tokens": torch.from_numpy(count_N[row_B])}
        made.append(Batch({"image": x_BCHW, "text": text_BT}, present, targets))
    return made


def naflex(tower: AnySizeTower) -> nn.Module:
    """Build timm's NaFlexVit with the sizes of a tower."""
    from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

    sizes = {"embed_dim": tower.width, "depth": len(tower.layers), "num_heads": HEADS, "patch_size": tower.patch}
    positions = {"pos_embed_grid_size": (tower.side, tower.side), "pos_embed_interp_mode": "bilinear"}
    made: nn.Module = NaFlexVit(NaFlexVitCfg(**sizes, **positions, global_pool=""), num_classes=0)
    return made.train()


def naflex_input(x_BCHW: Tensor) -> dict[str, Tensor]:
    """Convert images to the input of timm's NaFlexVit: patches row by row, coordinates, and a mask of real ones."""
    x_BRSPPC = x_BCHW.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH)).permute(0, 2, 4, 3, 5, 1)
    real_BRS = x_BRSPPC[:, :, :, 0, 0, 0].isfinite()
    most = int(real_BRS.sum(dim=(1, 2)).max())
    patches, coordinates = [], []
    for x_RSPPC, real_RS in zip(x_BRSPPC, real_BRS, strict=True):
        at_T2 = real_RS.nonzero()
        patches.append(F.pad(x_RSPPC[real_RS].flatten(1), (0, 0, 0, most - len(at_T2))))
        coordinates.append(F.pad(at_T2, (0, 0, 0, most - len(at_T2))))
    count_B = real_BRS.sum(dim=(1, 2))
    valid_BT = torch.arange(most) < count_B[:, None]
    return {"patches": torch.stack(patches), "patch_coord": torch.stack(coordinates), "patch_valid": valid_BT}
