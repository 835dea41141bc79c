"""Generation beside transformers': the same Llama, weights and prompts give the same tokens; the runs alternate.

Letters: P prompts, T tokens of each, N tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import Row
from benchmarks.contrastive import peak_bytes
from benchmarks.timing import ratio
from descant.datamodules.tasks.questions import Questions
from descant.modules.core.objective import means
from descant.modules.language import CausalLM, Packed, Sampling, generate, log_probabilities, pack

#: Bars: transformers' time / ours, without and with shared prompts; and the largest difference of logits.
DECODE, GROUPS, SAME = 1.8, 2.5, 1e-5
#: Padding of packed rows; largest difference of a dialogue's loss in a packed row from its loss alone.
PADDING, PACKED = 0.03, 1e-4
#: Peak memory with a few tokens at a time, over that with all tokens at once.
MEMORY = 0.35
V, D, DEPTH, HEADS, KEY_HEADS, HIDDEN, LENGTH = 512, 128, 4, 4, 2, 344, 512


def llama(**more: Any) -> LlamaConfig:
    usual: dict[str, Any] = {
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "max_position_embeddings": LENGTH,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    return LlamaConfig(**{**usual, **more})


def ours_of(theirs: Any) -> CausalLM:
    """Build the same model in our code."""
    of = theirs.config
    heads = (of.num_attention_heads, of.num_key_value_heads)
    sizes = (of.hidden_size, of.num_hidden_layers, *heads, of.intermediate_size, of.max_position_embeddings)
    made = CausalLM(of.vocab_size, *sizes).eval()
    made.load_llama(theirs.state_dict())
    return made


def models(device: str = "cpu", **more: Any) -> tuple[Any, CausalLM]:
    """Build the same small Llama twice; ``more``: other settings of its configuration."""
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(llama(**more)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.ndim > 1:
                p.mul_(3)  # makes the most probable token unambiguous
    ours = ours_of(theirs)
    theirs.generation_config.eos_token_id = None
    return theirs.to(device), ours.to(device)


def decode(pairs: int = 30, new: int = 64) -> Iterator[Row]:
    """Measure tokens a second of greedy decoding of 16 rows with prompts of 64 tokens: one row or 8 rows per prompt."""
    theirs, ours = models()
    ids_PT = torch.randint(3, V, (16, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        apart = (ours.logits(ours(ours.embed(ids_PT))) - theirs(ids_PT).logits).abs().max()
    yield Row.at_most("generate/logits", float(apart), SAME)
    for name, group, bar in (("decode", 1, DECODE), ("groups", 8, GROUPS)):
        mine, owner = decoders(ours, theirs, ids_PT, group, new)
        if not torch.equal(mine(), owner()):
            raise AssertionError(f"{name}: other tokens than transformers says")
        result = ratio(mine, owner, pairs)
        yield Row.at_least(f"generate/{name}", result.value, bar, result.interval)


def decoders(
    ours: CausalLM, theirs: Any, ids_PT: Tensor, group: int, new: int
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Return greedy decoding by ours and by transformers, of ``len(ids_PT)`` rows, ``group`` for each prompt."""
    prompts = ids_PT[: len(ids_PT) // group]
    return _ours(ours, prompts, group, new), _theirs(theirs, prompts.repeat_interleave(group, 0), new)


def _ours(lm: CausalLM, prompts: Tensor, group: int, new: int) -> Callable[[], Tensor]:
    return lambda: generate(lm, prompts, new=new, group=group, sampling=Sampling(temperature=0)).token_RN


def _theirs(model: Any, rows: Tensor, new: int) -> Callable[[], Tensor]:
    mask, T = torch.ones_like(rows), rows.shape[1]
    return lambda: model.generate(rows, attention_mask=mask, max_new_tokens=new, do_sample=False)[:, T:]


def memory(tokens: int = 2048, width: int = 576, vocab: int = 49152) -> Iterator[Row]:
    """Measure the peak memory of log-probabilities of tokens and their gradients, with SmolLM2's vocabulary size."""
    h_ND, w_VD = torch.randn(tokens, width), torch.randn(vocab, width) / width**0.5
    token_N = torch.randint(vocab, (tokens,), generator=torch.Generator().manual_seed(2))

    def kept(h: Tensor, w: Tensor) -> Tensor:
        return (h @ w.T).log_softmax(dim=1).gather(1, token_N[:, None])

    def peak(of: Callable[[Tensor, Tensor], Tensor]) -> int:
        h, w = h_ND.clone().requires_grad_(), w_VD.clone().requires_grad_()
        return peak_bytes(lambda: of(h, w).sum().backward())

    share = peak(lambda h, w: log_probabilities(h, w, token_N)) / peak(kept)
    yield Row.at_most("generate/memory", share, MEMORY)


def packing(batches: int = 20, row: int = 128) -> Iterator[Row]:
    """Measure the padding of training dialogues, packed or in rows of the longest one.

    It also measures each dialogue's loss, packed over alone, with the mask of documents and without it.
    """
    data = Questions(batch_size=128, size=48, length=64)
    torch.manual_seed(0)
    lm = CausalLM(data.tokenizer.vocabulary + 2, D, 2, HEADS, length=row).eval()
    cells = used = plain = 0
    apart = blind = 0.0
    for k, batch in enumerate(data.train_dataloader()):
        if k == batches:
            break
        documents = [ids[ids > 0] for ids in batch.inputs["text"]]
        learned = [torch.ones(len(x), dtype=torch.bool) for x in documents]
        packed = pack(documents, learned, row)
        used += sum(len(x) for x in documents)
        cells += packed.ids_BT.numel()
        plain += len(documents) * max(len(x) for x in documents)
        if k == 0:
            with torch.no_grad():
                alone = torch.stack([_loss(lm, x[None], None) for x in documents])
                for hidden in (True, False):
                    segment = packed.segment_BT if hidden else (packed.segment_BT > 0).long()
                    off = (_losses(lm, packed, segment, len(documents)) - alone).abs().max()
                    apart, blind = (float(off), blind) if hidden else (apart, float(off))
    yield Row.at_most("generate/padding", 1 - used / cells, PADDING)
    yield Row.informs("generate/padding-to-longest", 1 - used / plain)
    yield Row.at_most("generate/packed", apart, PACKED)
    yield Row.at_least("generate/packed-without-mask", blind, 100 * PACKED)


def _loss(lm: CausalLM, ids_1T: Tensor, segment: Tensor | None) -> Tensor:
    log = lm.logits(lm(lm.embed(ids_1T), segment)).log_softmax(dim=2)
    return -log[0, :-1].gather(1, ids_1T[0, 1:, None]).mean()


def _losses(lm: CausalLM, packed: Packed, segment_BT: Tensor, documents: int) -> Tensor:
    """Return the mean over each document's tokens of ``- log p``, ``[documents]``."""
    log_BTV = lm.logits(lm(lm.embed(packed.ids_BT), segment_BT)).log_softmax(dim=2)
    value_BT = -log_BTV[:, :-1].gather(2, packed.ids_BT[:, 1:, None])[..., 0]
    loss_mask_BT = packed.loss_mask_BT[:, 1:]
    return means(value_BT[loss_mask_BT], packed.document_BT[:, 1:][loss_mask_BT], documents)[0]
