"""TransformersTower: text and image models, from a configuration and from a folder."""

from __future__ import annotations

import pytest
import torch

from descant.modules.towers import TransformersTower
from tests.modules.towers import _asserts

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
BERT = {"model_type": "bert", "vocab_size": 12, **SMALL, "max_position_embeddings": 8}
VIT = {"model_type": "vit", "image_size": 16, "patch_size": 8, **SMALL}
TEXT = torch.tensor([[1, 5, 6, 2, 0, 0], [1, 7, 2, 0, 0, 0], [1, 9, 8, 7, 2, 3]])
PIXELS = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def tower_of(config):
    torch.manual_seed(0)
    return TransformersTower(config=config)


@pytest.mark.parametrize(("config", "x", "T"), [(BERT, TEXT, 6), (VIT, PIXELS, 5)], ids=["bert", "vit"])
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


def test_what_stands_in_padding_does_not_matter_and_an_empty_row_is_finite():
    tower, mask_BT = tower_of(BERT).eval(), TEXT != 0
    noise = TEXT.masked_fill(~mask_BT, 11)
    torch.testing.assert_close(tower(noise, mask_BT).h_BTD[mask_BT], tower(TEXT).h_BTD[mask_BT], atol=1e-5, rtol=0)
    empty = tower(torch.zeros_like(TEXT))
    assert torch.isfinite(empty.h_BTD).all() and not empty.mask_BT.any()


def test_of_an_encoder_decoder_the_encoder():
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


def test_refusals_are_one_line(tmp_path):
    tower_of(BERT).model.save_pretrained(tmp_path / "bert")
    config = (tmp_path / "bert" / "config.json").read_text()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(config.replace('"bert"', '"albert"'))
    (tmp_path / "other" / "model.safetensors").write_bytes((tmp_path / "bert" / "model.safetensors").read_bytes())
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text(config)
    for arguments, line in [
        ({"folder": tmp_path / "none"}, "no such folder"),
        ({"folder": tmp_path}, "no config.json in it"),
        ({"folder": tmp_path / "empty"}, "cannot be read"),
        ({"folder": tmp_path / "other"}, "not of albert: [0-9]+ missing, [0-9]+ unexpected"),
        ({"config": {"model_type": "brt"}}, "no model_type 'brt'; the nearest are b"),
        (
            {"config": {**BERT, "hidden_sise": 8}},
            "bert has no field 'hidden_sise'; did you mean hidden_size?",
        ),
        ({"config": {**BERT, "num_attention_heads": 3}}, "cannot be built"),
        ({}, "give one of them"),
    ]:
        with pytest.raises(ValueError, match=line) as caught:
            TransformersTower(**arguments)
        assert "\n" not in str(caught.value)


def test_an_image_model_takes_no_mask():
    with pytest.raises(ValueError, match="vit has no tokens to mask"):
        tower_of(VIT)(PIXELS, torch.ones(3, 5, dtype=torch.bool))
