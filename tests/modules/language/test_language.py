"""The language model against transformers' Llama, packed against unpacked rows, log-probabilities against kept ones.

Letters: B rows, T tokens, N tokens of all rows, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.contrastive import peak_bytes
from descant.modules.language import CausalLM, log_probabilities
from descant.modules.language import probabilities as module
from descant.modules.language.model import positions, visible
from tests.tolerance import F32, F64, rounding

V, D = 40, 24


def both(key_heads: int = 2, tie: bool = True) -> tuple[Any, CausalLM]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=key_heads,
        max_position_embeddings=64,
        tie_word_embeddings=tie,
        rms_norm_eps=1e-5,
    )
    theirs = LlamaForCausalLM(config).eval().double()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn(p.shape, dtype=torch.float64) / (3 if p.ndim > 1 else 1))
    ours = CausalLM(V, D, 2, 4, key_heads, 32, length=64, tie=tie).double().eval()
    ours.load_llama(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize(("key_heads", "tie"), [(4, True), (2, False), (1, True)])
def test_logits_are_those_of_llama(key_heads: int, tie: bool) -> None:
    theirs, ours = both(key_heads, tie)
    ids = torch.randint(V, (3, 20), generator=torch.Generator().manual_seed(1))
    found = ours.logits(ours(ours.embed(ids)))
    # both turn queries and keys by angles in float32: of up to 20, in two layers
    torch.testing.assert_close(found, theirs(ids).logits, **rounding(80, F32))
    assert (ours.head.weight is ours.embedding.weight) == tie


def test_weights_that_do_not_fit_are_named() -> None:
    theirs, ours = both()
    state = dict(theirs.state_dict())
    with pytest.raises(ValueError, match=r"^model\.norm\.weight: not in the weights$"):
        ours.load_llama({name: x for name, x in state.items() if name != "model.norm.weight"})
    with pytest.raises(ValueError, match=r"^model\.layers\.2\.x: in the weights, and the model has no such part$"):
        ours.load_llama(state | {"model.layers.2.x": torch.ones(1)})
    with pytest.raises(ValueError, match=r"^embedding\.weight: weights of \(9, 24\), where the model has \(40, 24\)$"):
        ours.load_llama(state | {"model.embed_tokens.weight": torch.ones(9, D)})


def packed() -> tuple[Tensor, Tensor, list[Tensor]]:
    """Ids and segments of two rows, and the documents in them."""
    generator = torch.Generator().manual_seed(2)
    docs = [torch.randint(V, (n,), generator=generator) for n in (5, 1, 7, 9, 3)]
    rows, segments = torch.zeros(2, 16, dtype=torch.long), torch.zeros(2, 16, dtype=torch.long)
    for row, members in enumerate(([0, 1, 2], [3, 4])):
        at = 0
        for k, i in enumerate(members):
            rows[row, at : at + len(docs[i])], segments[row, at : at + len(docs[i])] = docs[i], k + 1
            at += len(docs[i])
    return rows, segments, docs


def test_packed_documents_equal_single_ones() -> None:
    _, lm = both()
    rows, segments, docs = packed()
    h_BTD = lm(lm.embed(rows), segments)
    at = [(row, segments[row] == k) for row, count in ((0, 3), (1, 2)) for k in range(1, count + 1)]
    for (row, here_T), doc in zip(at, docs, strict=True):
        # queries and keys are turned in float32, where roundings of float64 tip a last bit now and then
        torch.testing.assert_close(h_BTD[row, here_T], lm(lm.embed(doc[None]))[0], **rounding(1, F32))
    # without the mask of documents it is something else
    mixed = lm(lm.embed(rows))
    assert not torch.allclose(mixed[0, 6:13], h_BTD[0, 6:13], atol=1e-3)


def test_positions_and_the_attention_mask_of_packed_rows() -> None:
    segment = torch.tensor([[1, 1, 2, 0, 0]])
    assert positions(segment).tolist() == [[0, 1, 0, 0, 1]]
    assert visible(segment)[0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ]


def test_later_tokens_change_nothing_and_get_no_gradient() -> None:
    _, lm = both()
    x = torch.randn(1, 6, D, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(lm(x)[0, 3].sum(), x)
    assert g[0, :4].any(dim=1).all() and not g[0, 4:].any()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunked_log_probabilities_equal_full_ones(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CELLS", 3 * V)  # three tokens at a time
    h = torch.randn(10, D, dtype=torch.float64, requires_grad=True)
    w = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    token = torch.randint(V, (10,), generator=torch.Generator().manual_seed(3))
    weight = torch.randn(10, dtype=torch.float64)
    found = log_probabilities(h, w, token, temperature)
    wanted = (h @ w.T / temperature).log_softmax(dim=1).gather(1, token[:, None])[:, 0]
    torch.testing.assert_close(found, wanted, **rounding(30 * D, F64))
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), (h, w)),
        torch.autograd.grad((wanted * weight).sum(), (h, w)),
        strict=True,
    ):
        # exponentials of logits of up to 30, which are sums of D
        torch.testing.assert_close(a, b, **rounding(30 * D, F64))
    (only,) = torch.autograd.grad((log_probabilities(h.detach(), w, token) * weight).sum(), w)
    assert only.shape == w.shape


def test_log_probabilities_hold_one_matrix_of_logits() -> None:
    """Of a block, forward and backward: by torch's own allocator, also within an operator."""
    cells, h, w = 512 * 2048, torch.randn(512, 8), torch.randn(2048, 8, requires_grad=True)
    held = peak_bytes(lambda: log_probabilities(h, w, torch.arange(512)).sum().backward())
    assert 4 * cells < held < 1.5 * 4 * cells


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"heads": 5}, "heads 5: width 24 over heads must be an even number"),
        ({"heads": 8}, "heads 8: width 24 over heads must be an even"),
        ({"heads": 4, "key_heads": 3}, "key_heads 3 does not divide heads 4"),
    ],
)
def test_invalid_arguments_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"^{says}"):
        CausalLM(vocab=V, width=D, depth=1, **options)


def test_a_document_beyond_the_length_is_refused() -> None:
    _, lm = both()
    with pytest.raises(ValueError, match=r"^length 64: a document of 65 tokens does not fit"):
        lm(torch.zeros(1, 65, D, dtype=torch.float64))
    segment = torch.arange(130)[None] // 64 + 1
    assert lm(torch.zeros(1, 130, D, dtype=torch.float64), segment).shape == (1, 130, D), "documents, not rows"
