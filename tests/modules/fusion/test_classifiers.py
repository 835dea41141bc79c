"""Fusion heads: Shapley values, absent modalities, and a task that needs both modalities.

Letters: B samples, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.fusion.classifiers import AttentionFusion, FusionHead, LateFusion, MidFusion, OrthogonalFusion
from descant.modules.fusion.mmcosine import MMCosine
from descant.modules.fusion.mmtm import MMTMFusion
from tests.tolerance import F64, ulps

CLOSE = ulps(512, F64)  # two or three layers of sums over up to 32 numbers, of each of eight subsets; logits of 3
WIDTHS = {"image": 5, "text": 3, "audio": 4}
MAKERS: list[Callable[[], FusionHead]] = [
    LateFusion,
    lambda: MidFusion(hidden=16),
    lambda: MidFusion(hidden=8, layers=3),
    lambda: AttentionFusion(width=8, depth=2, heads=2),
    MMCosine,
    MMTMFusion,
]
IDS = ["late", "mid", "deep-mid", "attention", "mmcosine", "mmtm"]
every = pytest.mark.parametrize("make", MAKERS, ids=IDS)


def built(make: Callable[[], FusionHead], widths: dict[str, int] = WIDTHS, classes: int = 4) -> FusionHead:
    torch.manual_seed(0)
    fusion = make().build(widths, classes).double()
    with torch.no_grad():
        for parameter in fusion.parameters():  # biases and embeddings too: a zero would hide what it multiplies
            parameter.add_(0.3 * torch.randn_like(parameter))
    return fusion


def latents(rows: int = 7, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {m: torch.randn(rows, width, generator=generator, dtype=torch.float64) for m, width in WIDTHS.items()}


def presence() -> dict[str, Tensor]:
    """All seven rows differ, from everything to one modality; the last one has nothing."""
    table = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 0, 0], [0, 0, 1], [0, 0, 0]]).bool()
    return dict(zip(WIDTHS, table.T, strict=True))


def nowhere(rows: int = 7) -> dict[str, Tensor]:
    return {m: torch.zeros(rows, dtype=torch.bool) for m in WIDTHS}


@every
def test_shares_and_the_logits_of_nothing_add_up_to_the_logits(make: Callable[[], FusionHead]) -> None:
    fusion, z, present = built(make), latents(), presence()
    shares = fusion.parts(z, present)
    whole_BC = fusion(z, nowhere()) + torch.stack(list(shares.values())).sum(dim=0)
    torch.testing.assert_close(whole_BC, fusion(z, present), rtol=0, atol=CLOSE)
    for m, share_BC in shares.items():
        assert not share_BC[~present[m]].any()
        assert share_BC[present[m]].abs().min() > 1e-6


def test_late_shares_are_its_maps_and_the_shapley_values() -> None:
    fusion, z, present = built(LateFusion), latents(), presence()
    assert isinstance(fusion, LateFusion)
    cheap, shapley = fusion.parts(z, present), FusionHead.parts(fusion, z, present)
    for m in WIDTHS:
        torch.testing.assert_close(cheap[m], shapley[m], rtol=0, atol=CLOSE)
        weight_CD = fusion.get_parameter(f"maps.{m}.weight")
        wanted_BC = (z[m] @ weight_CD.T) * present[m][:, None]
        torch.testing.assert_close(cheap[m], wanted_BC, rtol=0, atol=CLOSE)
    torch.testing.assert_close(fusion(z, nowhere()), fusion.bias_C.expand(7, -1), rtol=0, atol=CLOSE)


def test_shares_of_two_modalities_by_hand() -> None:
    """The formula of AGM, with the empty set that its sum lacks."""
    widths = {"image": 5, "text": 3}
    fusion, z = built(MAKERS[1], widths), latents()
    here, gone = torch.ones(7, dtype=torch.bool), torch.zeros(7, dtype=torch.bool)
    both, image, text, none = (
        fusion(z, {"image": a, "text": b}) for a, b in ((here, here), (here, gone), (gone, here), (gone, gone))
    )
    shares = fusion.parts(z)
    torch.testing.assert_close(shares["image"], (both - text + image - none) / 2, rtol=0, atol=CLOSE)
    torch.testing.assert_close(shares["text"], (both - image + text - none) / 2, rtol=0, atol=CLOSE)
    assert (shares["image"] - (image - none)).abs().max() > 1e-3  # not additive: a share is not what it is alone


def test_permuting_the_latents_of_a_modality_moves_its_share_alone() -> None:
    fusion, z, order = built(LateFusion), latents(), torch.tensor([3, 0, 6, 1, 5, 2, 4])
    before, after = fusion.parts(z), fusion.parts(z | {"text": z["text"][order]})
    assert torch.equal(after["text"], before["text"][order])
    assert torch.equal(after["image"], before["image"]) and torch.equal(after["audio"], before["audio"])
    moved_BC = before["text"][order] - before["text"]
    torch.testing.assert_close(fusion(z | {"text": z["text"][order]}) - fusion(z), moved_BC, rtol=0, atol=CLOSE)


@every
def test_absent_rows_change_no_bit(make: Callable[[], FusionHead]) -> None:
    fusion, z, present = built(make), latents(), presence()
    wanted, shares = fusion(z, present), fusion.parts(z, present)
    for junk in (1e9, torch.inf, -torch.inf, torch.nan):
        dirty = {m: z_BD.masked_fill(~present[m][:, None], junk) for m, z_BD in z.items()}
        assert torch.equal(fusion(dirty, present), wanted)
        assert all(torch.equal(share, shares[m]) for m, share in fusion.parts(dirty, present).items())


@every
def test_every_present_modality_changes_its_rows_and_no_other(make: Callable[[], FusionHead]) -> None:
    fusion, z, present = built(make), latents(), presence()
    for m in WIDTHS:
        moved_B = (fusion(z | {m: z[m] + 1.0}, present) - fusion(z, present)).abs().amax(dim=1) > 1e-6
        assert torch.equal(moved_B, present[m])


def test_attention_gives_an_absent_modality_no_weight() -> None:
    """The same logits as with a fusion that never had the modality."""
    fusion, z, here = built(MAKERS[3]), latents(), torch.ones(7, dtype=torch.bool)
    small = AttentionFusion(width=8, depth=2, heads=2).build({"image": 5, "text": 3}, 4).double()
    kept = {name: x for name, x in fusion.state_dict().items() if "audio" not in name}
    small.load_state_dict(kept)
    # some rows have it, so that its tokens are there and masked
    some = here.clone()
    some[0] = False
    logits_BC = fusion(z, {"image": here, "text": here, "audio": ~some})
    wanted_BC = small(z, {"image": here, "text": here})
    torch.testing.assert_close(logits_BC[1:], wanted_BC[1:], rtol=0, atol=CLOSE)
    assert (logits_BC[0] - wanted_BC[0]).abs().max() > 1e-3


@every
def test_absent_modalities_take_no_gradient_and_every_parameter_is_reached(make: Callable[[], FusionHead]) -> None:
    fusion, present = built(make), presence()
    present["audio"] = torch.zeros(7, dtype=torch.bool)
    z = {m: z_BD.masked_fill(~present[m][:, None], torch.nan).requires_grad_() for m, z_BD in latents().items()}
    fusion(z, present).square().sum().backward()
    for m in WIDTHS:
        grad = z[m].grad
        reached_B = torch.zeros(7, dtype=torch.bool) if grad is None else grad.ne(0).any(dim=1)
        assert torch.equal(reached_B, present[m])  # nan is not 0
    for name, parameter in fusion.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        if "audio" in name:
            assert not parameter.grad.any(), name
        else:
            assert parameter.grad.any(), name


def test_a_modality_absent_in_the_batch_has_no_token() -> None:
    fusion, z, present = built(MAKERS[3]), latents(), presence()
    assert isinstance(fusion, AttentionFusion)
    tokens: list[int] = []
    fusion.layers[0].register_forward_pre_hook(lambda module, args: tokens.append(args[0].shape[1]))
    for size in range(4):
        for subset in combinations(WIDTHS, size):
            with torch.no_grad():
                fusion(z, {m: present[m] if m in subset else nowhere()[m] for m in WIDTHS})
            assert tokens.pop() == 1 + size


# a task that no modality solves alone ------------------------------------------------------------------------------


def accuracy_on_xor(fusion: FusionHead) -> float:
    """The label is whether the signs of two modalities agree; accuracy on samples that were not trained on."""
    torch.manual_seed(0)
    x = {"image": torch.randn(1024, 2), "text": torch.randn(1024, 2)}
    label = ((x["image"][:, 0] > 0) == (x["text"][:, 0] > 0)).long()
    fusion = fusion.build({"image": 2, "text": 2}, classes=2)
    optimizer = torch.optim.Adam(fusion.parameters(), lr=1e-2)
    for _ in range(250):
        optimizer.zero_grad()
        F.cross_entropy(fusion({m: x_BD[:512] for m, x_BD in x.items()}), label[:512]).backward()
        optimizer.step()
    with torch.no_grad():
        return float((fusion({m: x_BD[512:] for m, x_BD in x.items()}).argmax(1) == label[512:]).float().mean())


@pytest.mark.slow
def test_xor_needs_a_fusion_that_is_not_additive() -> None:
    assert accuracy_on_xor(MidFusion(hidden=32)) > 0.9
    assert accuracy_on_xor(AttentionFusion(width=32, depth=2, heads=4)) > 0.9
    assert accuracy_on_xor(LateFusion()) < 0.6


# bad input ---------------------------------------------------------------------------------------------------------


def test_bad_input_is_one_line() -> None:
    fusion, z, present = built(LateFusion), latents(), presence()
    with pytest.raises(ValueError, match=r"^z: no modality 'audio', only image, text$"):
        fusion({m: z[m] for m in ("image", "text")})
    with pytest.raises(ValueError, match=r"^present: no modality 'text', only image$"):
        fusion(z, {"image": present["image"]})
    with pytest.raises(ValueError, match="classes 0: at least 1"):
        LateFusion().build(WIDTHS, classes=0)
    with pytest.raises(ValueError, match="widths: a fusion needs at least one modality"):
        LateFusion().build({}, classes=2)
    with pytest.raises(ValueError, match=r"layers 1: at least 2; .* LateFusion"):
        MidFusion(layers=1)
    with pytest.raises(ValueError, match="depth 0: at least 1"):
        AttentionFusion(depth=0)
    with pytest.raises(ValueError, match="heads 3 does not divide width 8; the nearest that does is 2"):
        AttentionFusion(width=8, heads=3)


@pytest.mark.parametrize("fusion", [LateFusion, OrthogonalFusion])
def test_gradients_reach_a_tower(fusion: type[FusionHead]) -> None:
    """Maps that a step turns far (Householder's do) leave the loss at chance, 3.6."""
    torch.manual_seed(0)
    x, head = torch.randn(512, 32), fusion().build({"a": 64}, 40)
    label = (x @ torch.randn(32, 40)).argmax(dim=1)
    tower = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 64))
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], lr=2e-3)
    for _ in range(150):
        loss = F.cross_entropy(head({"a": tower(x)}), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


@pytest.mark.parametrize("make", [*MAKERS, OrthogonalFusion], ids=[*IDS, "orthogonal"])
def test_a_detached_modality_and_its_projection_take_no_gradient(make: Callable[[], FusionHead]) -> None:
    fusion, z = built(make, dict.fromkeys(WIDTHS, 5)), {m: torch.randn(7, 5, dtype=torch.float64) for m in WIDTHS}
    z = {m: z_BD.requires_grad_() for m, z_BD in z.items()}
    whole_BC = fusion(z)
    whole = torch.autograd.grad(whole_BC.square().sum(), [*z.values(), *fusion.parameters()])
    with fusion.detaching("text"):
        held_BC = fusion(z)
    assert torch.equal(held_BC, whole_BC) and not fusion._detached
    held = torch.autograd.grad(
        held_BC.square().sum(), [*z.values(), *fusion.parameters()], allow_unused=True, materialize_grads=True
    )
    names = [*z, *(name for name, _ in fusion.named_parameters())]
    for name, a, b in zip(names, held, whole, strict=True):
        if name == "mlp.0.weight":  # its columns 5 to 9 are those of text
            assert not a[:, 5:10].any() and b[:, 5:10].any()
            a, b = a[:, [0, 1, 2, 3, 4, *range(10, 15)]], b[:, [0, 1, 2, 3, 4, *range(10, 15)]]
        if "text" in name:
            assert not a.any() and b.any(), name
        else:
            torch.testing.assert_close(a, b, rtol=CLOSE, atol=CLOSE)
