"""Generation against transformers' and against full forward passes; rows are independent.

Letters: P prompts, G of each, R rows, N new tokens, V vocabulary.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from descant.modules.language import CausalLM, Sampling, generate
from tests.modules.language.test_language import V, both
from tests.tolerance import F32, rounding, statistical

#: Two layers, each with sums of 24, 24 (of positions), 24, 24 and 32 numbers, and a head of 24.
CHAIN = rounding(2 * 128 + 24, F32)
GREEDY = Sampling(temperature=0)


@pytest.fixture(autouse=True, params=[1 << 20, 0], ids=["small", "large"])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models copy shared prompts and turn their weights; large ones read both as they are."""
    for name in ("generate", "decode_layers"):
        monkeypatch.setattr(import_module(f"descant.modules.language.{name}"), "SMALL", request.param)


def prompts(rows: int = 3, longest: int = 9) -> tuple[Tensor, Tensor]:
    """Of unequal lengths, padded at the right by anything."""
    ids = torch.randint(V, (rows, longest), generator=torch.Generator().manual_seed(4))
    mask = torch.arange(longest) < torch.tensor([longest, 1, 5, 7, 3][:rows])[:, None]
    return ids, mask


def alone(lm: CausalLM, ids: Tensor, new: int) -> list[int]:
    """Greedy, by whole passes over one row."""
    row = ids[None]
    for _ in range(new):
        row = torch.cat([row, lm.logits(lm(lm.embed(row)))[:, -1].argmax(dim=1)[:, None]], dim=1)
    return row[0, len(ids) :].tolist()


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_greedy_equals_full_forward_passes(group: int, key_heads: int) -> None:
    _, lm = both(key_heads)
    ids, mask = prompts()
    found = generate(lm, ids, mask, new=12, group=group, sampling=GREEDY)
    for p in range(3):
        for g in range(group):
            assert found.token_RN[p * group + g].tolist() == alone(lm, ids[p][mask[p]], 12)
    embedded = generate(lm, lm.embed(ids), mask, new=12, group=group, sampling=GREEDY)
    assert torch.equal(embedded.token_RN, found.token_RN)


def test_greedy_equals_transformers() -> None:
    theirs, lm = both()
    ids = prompts()[0]
    theirs.generation_config.eos_token_id = None
    wanted = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    found = generate(lm, ids, new=20, sampling=GREEDY)
    assert torch.equal(found.token_RN, wanted[:, 9:])
    torch.testing.assert_close(found.log_RN.double(), full_pass(lm, ids, found.token_RN), **CHAIN)


def full_pass(lm: CausalLM, ids: Tensor, token_RN: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of generated tokens, by one full forward pass."""
    rows = torch.cat([ids, token_RN], dim=1)
    log = (lm.logits(lm(lm.embed(rows))) / temperature).log_softmax(dim=2)[:, ids.shape[1] - 1 : -1]
    return log.gather(2, token_RN[..., None])[..., 0]


@pytest.mark.parametrize("sampling", [Sampling(0.8), Sampling(1.3, top_k=5), Sampling(top_p=0.6), Sampling(1, 9, 0.8)])
def test_log_probabilities_are_over_the_whole_vocabulary_at_the_temperature(sampling: Sampling) -> None:
    _, lm = both()
    ids = prompts()[0]
    found = generate(lm, ids, new=10, group=2, sampling=sampling)
    wanted = full_pass(lm, ids.repeat_interleave(2, 0), found.token_RN, sampling.temperature)
    torch.testing.assert_close(found.log_RN.double(), wanted, **CHAIN)
    assert not torch.equal(found.token_RN[0], found.token_RN[1]), "each row draws by its own seed"


def test_a_row_does_not_depend_on_the_others() -> None:
    _, lm = both()
    ids, mask = prompts(5)
    stop = [7, 11, 30]  # of forty tokens: some rows end early
    seeds = torch.arange(100, 115)
    whole = generate(lm, ids, mask, new=30, group=3, stop=stop, seed_R=seeds)
    assert whole.ended_R.any() and len(set(whole.length_R.tolist())) > 3
    for p in range(5):
        part = generate(
            lm, ids[p : p + 1], mask[p : p + 1], new=30, group=3, stop=stop, seed_R=seeds[3 * p : 3 * p + 3]
        )
        for name in ("token_RN", "length_R", "ended_R"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[3 * p : 3 * p + 3]), name
        one = generate(lm, ids[p : p + 1], mask[p : p + 1], new=30, stop=stop, seed_R=seeds[3 * p + 1 : 3 * p + 2])
        assert torch.equal(one.token_RN[0], whole.token_RN[3 * p + 1])


def test_ended_rows_are_not_computed_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    _, lm = both()
    ids, mask = prompts(5)
    rows: list[int] = []
    own = lm.embed

    def embed(ids: Tensor) -> Tensor:
        rows.append(len(ids))
        return own(ids)

    monkeypatch.setattr(lm, "embed", embed)
    found = generate(lm, ids, mask, new=40, group=4, stop=[7, 11, 30])
    for r in range(20):
        n = int(found.length_R[r])
        assert not found.token_RN[r, n:].any() and not found.log_RN[r, n:].any()
        ends = torch.isin(found.token_RN[r, :n], torch.tensor([7, 11, 30]))
        assert ends.sum() == int(found.ended_R[r]) and bool(ends[-1]) == bool(found.ended_R[r])
    assert rows[1] == 20 and min(rows[1:]) <= 12 and rows[1:] == sorted(rows[1:], reverse=True)


def test_sampling_follows_the_probabilities() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(20000, 1)
    p = logits[0].softmax(dim=0)
    token, log = Sampling().draw(logits, torch.arange(20000), 3)
    share = torch.bincount(token, minlength=4) / 20000
    torch.testing.assert_close(share, p, rtol=0, atol=statistical(0.5, 20_000))
    torch.testing.assert_close(log, p.log()[token], **rounding(4, F32))
    again, _ = Sampling().draw(logits, torch.arange(20000), 4)
    assert not torch.equal(token, again), "the next place is another draw"
    kept, _ = Sampling(top_p=0.7).draw(logits, torch.arange(20000), 3)
    assert set(kept.tolist()) == {0, 1}, "the first two together reach it"
    kept, _ = Sampling(top_p=1e-6, top_k=3).draw(logits, torch.arange(20000), 3)
    assert set(kept.tolist()) == {0}


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda lm: generate(lm, torch.ones(1, 60).long(), new=5),
            "a prompt of 60 tokens and 5 new ones do not fit into",
        ),
        (
            lambda lm: generate(lm, *prompts(1), new=60),
            "a prompt of 9 tokens and 60 new ones do not fit into length 64",
        ),
        (lambda lm: generate(lm, torch.ones(1, 3).long(), torch.zeros(1, 3).bool()), "mask: the tokens of a prompt"),
        (lambda lm: generate(lm, torch.ones(1, 2).long(), torch.tensor([[False, True]])), "mask: the tokens"),
        (lambda lm: Sampling(-1), "temperature -1: 0"),
        (lambda lm: Sampling(top_k=0), "top_k 0: at least 1"),
        (lambda lm: Sampling(top_p=0), "top_p 0: above 0, at most 1"),
    ],
    ids=["long", "new", "empty", "gap", "temperature", "top_k", "top_p"],
)
def test_invalid_arguments_are_refused(call: Any, says: str) -> None:
    with pytest.raises(ValueError, match=f"^{says}"):
        call(both()[1])
