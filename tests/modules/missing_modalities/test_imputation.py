"""What stands in for absent modalities, in numbers; and that nothing does where nobody asked."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from descant.modules.missing_modalities.imputation import Imputation, Imputer, MeanImputer, PromptImputer, ZeroImputer
from tests.ranks import run_ranks
from tests.tolerance import BF16, F32, F64, rounding, ulps

WIDTHS = {"image": 3, "text": 2}
HAS = {"image": torch.tensor([True, True, False, True, False]), "text": torch.tensor([True, False, True, True, False])}
#: The last row is padding: no modality is there, and nothing stands in for it.
SOME = HAS["image"] | HAS["text"]


def features(modality: str, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(5, WIDTHS[modality], generator=g).masked_fill(~HAS[modality][:, None], 0.0)


def test_a_tower_runs_for_what_is_present_and_the_rest_is_filled() -> None:
    imputation = Imputation(PromptImputer().build(WIDTHS, [["image"], ["text"]]), HAS)
    assert torch.equal(imputation.rows_to_encode("text", SOME), HAS["text"])
    assert not imputation.rows_to_encode("text", torch.zeros(5, dtype=torch.bool)).any()
    assert torch.equal(imputation.impute(features("text"), "text", SOME), features("text"))  # prompts begin as zeros


def test_zeros() -> None:
    h_BD = torch.ones(5, 2)
    assert Imputation(ZeroImputer(), HAS).impute(h_BD, "text", SOME).sum(dim=1).tolist() == [2.0, 0.0, 2.0, 2.0, 2.0]


def test_means_are_of_all_rows_that_training_has_seen() -> None:
    fill = MeanImputer().build(WIDTHS, [])
    rows = []
    for step in range(3):
        h_BD = features("image", step)
        rows.append(h_BD[HAS["image"]])
        out = Imputation(fill, HAS).impute(h_BD, "image", SOME)
        mean = torch.cat(rows).double().mean(dim=0).float()
        torch.testing.assert_close(out[2], mean, **rounding(2, F32))  # both sums are float64
        assert torch.equal(out[[0, 1, 3, 4]], h_BD[[0, 1, 3, 4]])
    fill.eval()
    torch.testing.assert_close(
        Imputation(fill, HAS).impute(features("image", 9), "image", SOME)[2], mean, **rounding(2, F32)
    )
    again = MeanImputer().build(WIDTHS, [])
    again.load_state_dict(fill.state_dict())
    assert torch.equal(Imputation(again.eval(), HAS).impute(features("image", 9), "image", SOME)[2], out[2])


def test_a_prompt_for_each_set_and_modality_takes_its_own_gradient() -> None:
    fill = PromptImputer().build(WIDTHS, [["image"], ["text"]])
    with torch.no_grad():
        for k, p in enumerate(fill.parameters()):
            p.fill_(k + 1.0)
    text, image = (Imputation(fill, HAS).impute(features(m), m, SOME) for m in ("text", "image"))
    assert text[1].tolist() == [1.0, 1.0] and image[2].tolist() == [2.0, 2.0, 2.0]
    assert torch.equal(text[[0, 2, 3, 4]], features("text")[[0, 2, 3, 4]])
    (text.sum() * 3).backward()
    grads = [None if p.grad is None else p.grad.tolist() for p in fill.parameters()]
    assert grads[0] == [3.0, 3.0] and grads[1] in (None, [0.0, 0.0, 0.0])


def test_a_set_without_a_prompt_is_one_line() -> None:
    fill: Imputer = PromptImputer().build(WIDTHS, [["image"]])
    says = "the imputer has no parameters for samples with text only; the nearest set is image"
    with pytest.raises(ValueError, match=says):
        Imputation(fill, HAS).impute(features("text"), "text", SOME)


def on_a_rank(rank: int, world: int) -> Tensor:
    dist.init_process_group("gloo")
    found = summed(slice(rank, None, world))
    dist.destroy_process_group()
    return found


def summed(rows: slice) -> Tensor:
    g = torch.Generator().manual_seed(0)
    h_BD, here_B = torch.randn(8, 3, generator=g)[rows], (torch.arange(8) % 3 > 0)[rows]
    fill = MeanImputer().build({"image": 3}, [])
    Imputation(fill, {"image": here_B}).impute(h_BD, "image", torch.ones_like(here_B))
    return fill.state_dict()["sum_image"]


@pytest.mark.ddp
def test_means_are_of_all_ranks() -> None:
    wanted = summed(slice(None))
    assert float(wanted[-1]) == 5
    for found in run_ranks(2, on_a_rank, 2):
        torch.testing.assert_close(found, wanted, **rounding(8, F64))


def test_sums_keep_their_precision_whatever_the_models_is() -> None:
    fill = MeanImputer().build({"text": 1}, []).bfloat16()
    here_B = torch.ones(64, dtype=torch.bool)
    for value in [1.0] * 300 + [5.0] * 1700:
        fill(torch.full((64, 1), value, dtype=torch.bfloat16), "text", {"text": here_B}, ~here_B)
    mean_D = fill(torch.zeros(1, 1, dtype=torch.bfloat16), "text", {"text": ~here_B[:1]}, here_B[:1])
    assert float(mean_D) == pytest.approx(4.4, rel=ulps(1, BF16))
