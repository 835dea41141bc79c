"""TripleEncoder of Structure-CLIP, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from descant.modules.tokenizers.text import NgramTokenizer, require_fit
from descant.modules.towers.triples import TripleEncoder
from tests.tolerance import F64, rounding

CLOSE = rounding(256, F64)  # one or no block, and a head, of widths up to 32
FOX, LEFT, APPLE, ABOVE = 11, 12, 13, 14


def encoder(**options: int) -> TripleEncoder:
    torch.manual_seed(0)
    return TripleEncoder(**{"vocab": 32, "out": 6, "width": 8, "depth": 2, "heads": 2, **options}).double()


def triples(*of_a_sample: tuple[int, int, int], places: int = 6) -> Tensor:
    """``[1, places, 3, 5]``: elements of one token each."""
    x = torch.zeros(1, places, 3, 5, dtype=torch.long)
    for k, triple in enumerate(of_a_sample):
        x[0, k, :, 0] = torch.tensor(triple)
    return x


def test_swapping_head_and_tail_changes_the_embedding() -> None:
    """A sum of the three would not tell, and a difference of head and tail tells nothing where they are the same."""
    f = encoder().knowledge
    embedded = f(triples((FOX, LEFT, APPLE)))
    assert (embedded - f(triples((APPLE, LEFT, FOX)))).norm() > 0.1
    assert (embedded - f(triples((FOX, ABOVE, APPLE)))).norm() > 0.05
    torch.testing.assert_close(embedded, f(triples((LEFT, FOX, APPLE))), **CLOSE)  # e_h + e_r is a sum
    torch.testing.assert_close(
        f(triples((FOX, LEFT, FOX))), f(triples((APPLE, LEFT, APPLE))), **CLOSE
    )  # e_h - e_t cancels


def test_a_triple_is_head_and_relation_less_tail() -> None:
    """Without blocks the knowledge is the projection of exactly that."""
    model = encoder(depth=0)
    e = model.elements.embedding.weight
    h_D = e[FOX] + e[LEFT] - e[APPLE] + model.places_KD[0]
    torch.testing.assert_close(
        model.knowledge(triples((FOX, LEFT, APPLE)))[0], F.normalize(model.head(h_D), dim=0), **CLOSE
    )


def test_an_element_is_the_mean_of_its_tokens() -> None:
    model = encoder(depth=0)
    x = triples((FOX, LEFT, APPLE))
    x[0, 0, 0, :2] = torch.tensor([20, 21])
    e = model.elements.embedding.weight
    h_D = (e[20] + e[21]) / 2 + e[LEFT] - e[APPLE] + model.places_KD[0]
    torch.testing.assert_close(model.knowledge(x)[0], F.normalize(model.head(h_D), dim=0), **CLOSE)


def test_all_triples_are_read_and_padding_is_not() -> None:
    f = encoder().knowledge
    two = f(triples((FOX, LEFT, APPLE), (APPLE, ABOVE, FOX)))
    assert (two - f(triples((FOX, LEFT, APPLE), (FOX, ABOVE, APPLE)))).norm() > 0.01
    torch.testing.assert_close(two, f(triples((FOX, LEFT, APPLE), (APPLE, ABOVE, FOX), places=2)), **CLOSE)


def test_a_text_moves_by_its_strength_and_keeps_unit_length() -> None:
    model, z = encoder(), F.normalize(torch.randn(1, 6, dtype=torch.float64), dim=1)
    x = triples((FOX, LEFT, APPLE))
    torch.testing.assert_close(model(z, x), F.normalize(z + 0.2 * model.knowledge(x), dim=1), **CLOSE)
    torch.testing.assert_close(model.knowledge(x).norm(dim=1), torch.ones(1, dtype=torch.float64), **CLOSE)
    model.strength = 0.0
    torch.testing.assert_close(model(z, x), z, **CLOSE)


def test_a_sample_without_triples_is_left_as_it_is() -> None:
    model = encoder()
    z = F.normalize(torch.randn(3, 6, dtype=torch.float64), dim=1).requires_grad_()
    x = torch.cat([triples((FOX, LEFT, APPLE)), triples(), triples((APPLE, ABOVE, FOX))])
    out = model(z, x)
    assert torch.equal(out[1], z[1])
    torch.testing.assert_close(out[[0, 2]], model(z[[0, 2]], x[[0, 2]]), **CLOSE)  # nor does it touch the others
    grads = torch.autograd.grad(out[1].sum(), (z, *model.parameters()), allow_unused=True)
    assert not any(grad is not None and grad.any() for grad in grads[1:])
    assert not model.knowledge(triples()).any()


def test_gradients_reach_everything() -> None:
    model, z = encoder(), torch.zeros(2, 6, dtype=torch.float64)
    z[:, 0] = 1.0
    x = torch.cat([triples((FOX, LEFT, APPLE), (APPLE, ABOVE, FOX))] * 2)
    (model(z, x) * torch.arange(6)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="triples 2: the data has 6 a sample; raise it to 6"):
        encoder(triples=2)(torch.zeros(1, 6), triples((FOX, LEFT, APPLE)))
    with pytest.raises(ValueError, match=r"NgramTokenizer has 8192 ids, and tower knowledge embeds 32"):
        require_fit(NgramTokenizer(), encoder(), "knowledge")
