"""Self-supervised steps beside lightly's own modules: the same timm ViT, heads, batch and views. On the CPU.

Letters: B samples, C channels, H and W pixels, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import Row, contrastive
from benchmarks.masked import adamw, our_loss
from benchmarks.timing import AS_FAST, ratio
from descant.modules.core.batch import Batch
from descant.modules.distill.distill import Distill
from descant.modules.losses.views import BYOL, DINO, SimCLR, SwAV, VICReg, ViewObjective
from descant.modules.towers import Tokens, Tower, Towers
from descant.modules.towers.heads import FirstPool
from descant.recipes.self_supervised import SelfSupervised


@dataclass(frozen=True)
class Size:
    """Sizes of the model and batch that both sides train."""

    image: int = 64
    patch: int = 8
    width: int = 192
    depth: int = 6
    heads: int = 3
    hidden: int = 512
    out: int = 128
    prototypes: int = 512
    batch: int = 32


class TimmViT(Tower):
    """timm's ViT up to its last norm."""

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.vit, self.width = vit, int(vit.num_features)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        h_BTD = self.vit.forward_features(x)
        return Tokens(h_BTD, torch.ones(h_BTD.shape[:2], dtype=torch.bool, device=h_BTD.device))


def vit(size: Size) -> Any:
    """Build timm's ViT with random weights; nothing is downloaded. Its features are the class token's."""
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": size.image, "patch_size": size.patch, "embed_dim": size.width}
    return VisionTransformer(**sizes, depth=size.depth, num_heads=size.heads, num_classes=0)


def objectives(size: Size) -> dict[str, ViewObjective]:
    return {
        "simclr": SimCLR(size.hidden, size.out),
        "byol": BYOL(size.hidden, size.out, mean_cosine=True),
        "dino": DINO(size.hidden, size.out, size.prototypes),
        "vicreg": VICReg(size.hidden, size.hidden),
        "swav": SwAV(size.hidden, size.out, size.prototypes),
    }


class Owner(nn.Module):
    """lightly's modules of one method, combined as in its examples; with a copy of both if there is a teacher."""

    def __init__(self, size: Size, name: str) -> None:
        super().__init__()
        from lightly import loss
        from lightly.models.modules import heads

        def mlp(*widths: int) -> Any:
            *hidden, (a, b) = pairwise(widths)
            blocks = [(x, y, nn.BatchNorm1d(y), nn.ReLU(), False) for x, y in hidden]
            return heads.ProjectionHead([*blocks, (a, b, None, None, False)])

        width, hidden, out, prototypes = size.width, size.hidden, size.out, size.prototypes
        head = {
            "simclr": lambda: mlp(width, hidden, out),
            "byol": lambda: mlp(width, hidden, out),
            "dino": lambda: heads.DINOProjectionHead(width, hidden, out, prototypes),
            "vicreg": lambda: mlp(width, hidden, hidden, hidden),
            "swav": lambda: mlp(width, hidden, out),
        }[name]
        self.name, self.backbone, self.head = name, vit(size), head()
        self.predictor: Any = mlp(out, hidden, out) if name == "byol" else None
        self.prototypes: Any = heads.SwaVPrototypes(out, prototypes) if name == "swav" else None
        if self.prototypes is not None:
            self.prototypes.heads[0].bias = None  # as in the authors' code
        self.criterion: Any = {
            "simclr": lambda: loss.NTXentLoss(temperature=0.1),
            "byol": loss.NegativeCosineSimilarity,
            "dino": lambda: loss.DINOLoss(output_dim=prototypes),
            "vicreg": loss.VICRegLoss,
            "swav": loss.SwaVLoss,
        }[name]()
        self.teacher: Any = None
        if name in ("byol", "dino"):  # built anew: DINO's weight norm cannot be copied
            self.teacher = nn.ModuleList([vit(size), head()]).requires_grad_(False)
            for own, other in zip(self.teacher, (self.backbone, self.head), strict=True):
                own.load_state_dict(other.state_dict())

    def forward(self, views: list[Tensor]) -> Tensor:
        h = [self.head(self.backbone(x)) for x in views]
        return cast(Tensor, getattr(self, f"_{self.name}")(h, views))

    def follow(self) -> None:
        from lightly.models.utils import update_momentum

        if self.teacher is not None:
            update_momentum(self.backbone, self.teacher[0], m=0.996)
            update_momentum(self.head, self.teacher[1], m=0.996)

    def _targets(self, views: list[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return [self.teacher[1](self.teacher[0](x)) for x in views]

    def _simclr(self, z: list[Tensor], views: list[Tensor]) -> Tensor:
        return self.criterion(*z)

    _vicreg = _simclr

    def _byol(self, z: list[Tensor], views: list[Tensor]) -> Tensor:
        (p_1, p_2), (t_1, t_2) = [self.predictor(x) for x in z], self._targets(views)
        return 0.5 * (self.criterion(p_1, t_2) + self.criterion(p_2, t_1))

    def _dino(self, z: list[Tensor], views: list[Tensor]) -> Tensor:
        return self.criterion(self._targets(views), z)

    def _swav(self, z: list[Tensor], views: list[Tensor]) -> Tensor:
        self.prototypes.normalize()
        return self.criterion([self.prototypes(F.normalize(x, dim=1)) for x in z], []).squeeze()


def ours(size: Size, name: str, owner: Owner) -> SelfSupervised:
    """Build our recipe with the owner's weights: heads and prototypes have the same order."""
    towers = Towers(image=TimmViT(copy.deepcopy(owner.backbone)))
    recipe = SelfSupervised(towers, objectives(size)[name], pool=FirstPool()).train()
    theirs = [
        p for part in (owner.head, owner.predictor, owner.prototypes) if part is not None for p in part.parameters()
    ]
    theirs = [p for p in theirs if p.shape[1:] != (1,)]  # without the lengths of DINO's prototypes, which are 1
    objective = cast(Any, recipe.objectives["views/image"].objective)
    parts = [getattr(objective, part, None) for part in ("head", "projector", "predictor")]
    # SwAV's prototypes are a module, DINO's are a number
    last = objective.prototypes if isinstance(getattr(objective, "prototypes", None), nn.Module) else None
    own = [p for part in (*parts, last) if part is not None for p in part.parameters()]
    with torch.no_grad():
        for p, other in zip(own, theirs, strict=True):
            p.copy_(other)
    if recipe.distill is not None:
        recipe.distill.prepare(recipe)
    return recipe


def batches(size: Size, number: int = 4) -> list[Batch]:
    made = []
    for k in range(number):
        views = {name: torch.randn(size.batch, 3, size.image, size.image) for name in ("image", "image@2")}
        key_B = torch.arange(size.batch) + k * size.batch
        present = {"image": torch.ones(size.batch, dtype=torch.bool)}
        made.append(Batch(views, present, content_id=key_B, rng_seed=key_B))
    return made


def _views(batch: Batch) -> list[Tensor]:
    return [batch.inputs["image"], batch.inputs["image@2"]]


def steps(size: Size, name: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return a training step of ours and of lightly's, including the teacher; their losses must first be equal."""
    torch.manual_seed(0)
    owner = Owner(size, name).train()
    recipe, data = ours(size, name, owner), batches(size)
    own, theirs = (float(x.detach()) for x in (our_loss(cast(Any, recipe), data[0]), owner(_views(data[0]))))
    if not abs(own - theirs) <= 1e-4 * abs(theirs):
        raise RuntimeError(f"{name}: not the same step as lightly's: loss {own:.6f} and {theirs:.6f}")
    our_step = contrastive.step_of(partial(our_loss, cast(Any, recipe)), data, adamw(recipe))
    owner_step = contrastive.step_of(lambda batch: owner(_views(batch)), data, adamw(owner))
    teacher = recipe.distill.teacher if isinstance(recipe.distill, Distill) else None

    def our_whole() -> None:
        our_step()
        if teacher is not None:
            teacher.follow(recipe)

    def owner_whole() -> None:
        owner_step()
        owner.follow()

    return our_whole, owner_whole


def step(size: Size | None = None, pairs: int = 40) -> Iterator[Row]:
    """Measure our training step against lightly's modules, a row per method: the owner's time / ours."""
    if find_spec("lightly") is None:
        print("ssl: skipped, lightly is not installed (pip install 'descant[bench]')", flush=True)
        return
    for name in objectives(Size(hidden=1, out=1, prototypes=1)):
        result = ratio(*steps(size or Size(), name), pairs)
        yield Row.at_least(f"ssl/{name}_vs_lightly", result.value, AS_FAST, result.interval)
