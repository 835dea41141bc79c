"""Cached: exact, computed once, bounded, kept on disk, and part of nothing that is saved or copied."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from descant.modules.adaptation.freeze import Freeze
from descant.modules.adaptation.lora import Lora
from descant.modules.towers import Frozen, TextTower, Tokens, Tower, TransformersTower
from descant.modules.towers.cached import DIGEST, Cached, digests, identity
from descant.modules.towers.heads import AttentionPool, FirstPool, LastPool, MeanPool, Pool
from descant.modules.training_setup.compile_and_shard import Compile
from tests.modules.towers import _asserts

BERT = {"model_type": "bert", "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
PLACES = {"max_position_embeddings": 16, "intermediate_size": 64}


class Counted(Tower):
    """Counts the rows that reach the tower behind it."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower, self.width, self.seen = tower, tower.width, 0

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        self.seen += len(x)
        return self.tower(x, mask)


def recipe_of(**towers):
    return _asserts.recipe_of(**towers)


def bert(seed: int = 0) -> TransformersTower:
    torch.manual_seed(seed)
    return TransformersTower(config={**BERT, **PLACES})  # type: ignore[dict-item]


def texts(n: int, seed: int = 1, T: int = 10) -> Tensor:
    """``[n, T]``: texts of 2 to T tokens, and padding."""
    generator = torch.Generator().manual_seed(seed)
    x_NT = torch.randint(1, 50, (n, T), generator=generator)
    return x_NT.masked_fill(torch.arange(T) >= torch.randint(2, T + 1, (n, 1), generator=generator), 0)


def epochs(tower: Tower, x_NT: Tensor, seed: int, size: int = 24) -> Tensor:
    """``[N, D]``: every row once, in batches of a random order."""
    order_N = torch.randperm(len(x_NT), generator=torch.Generator().manual_seed(seed))
    h_ND = torch.empty(len(x_NT), tower.width)
    for rows in order_N.split(size):
        h_ND[rows] = tower(x_NT[rows]).h_BTD[:, 0]
    return h_ND


def test_cached_features_are_bit_identical() -> None:
    x_NT = texts(100)
    plain = Frozen(bert())
    expected = torch.cat([MeanPool()(plain(x)) for x in x_NT.split(16)])
    cached, never = Cached(bert(), rows=16), Cached(bert(), capacity=0, rows=16)
    for seed in range(3):
        # in whatever company a row is first met
        assert torch.equal(epochs(cached, x_NT, seed), expected)
        assert torch.equal(epochs(never, x_NT, seed), expected)
    assert (cached.lookups, cached.misses) == (300, 100) and never.misses == 300
    _asserts.check_tokens(cached, x_NT, 1)


def test_only_misses_are_computed_and_equal_rows_once() -> None:
    counted = Counted(bert())
    cached = Cached(counted, rows=4)
    x_NT = texts(8)
    cached(x_NT)
    assert counted.seen == 8
    cached(x_NT.flip(0))
    assert counted.seen == 8
    cached(torch.cat([x_NT[:3], texts(2, seed=9).repeat(5, 1)]))
    assert counted.seen == 12 and cached.misses == 10  # two new rows, filled up to a group of four


POOLS = [MeanPool(), FirstPool(), LastPool(), AttentionPool(32, 2)]


@pytest.mark.parametrize("pool", POOLS, ids=lambda pool: type(pool).__name__)
def test_any_pool_and_a_row_without_a_token(pool: Pool) -> None:
    x_NT = torch.cat([texts(3), torch.zeros(1, 10, dtype=torch.long)])
    cached = Cached(bert(), copy.deepcopy(pool), rows=4)
    for _ in range(2):
        h_B1D, mask_B1 = cached(x_NT)
        assert torch.equal(h_B1D[:, 0], pool(Frozen(bert())(x_NT)))
        assert mask_B1.tolist() == [[True], [True], [True], [False]]
    assert not any(p.requires_grad for p in cached.parameters())


def test_a_mask_is_part_of_the_content() -> None:
    cached, x_NT = Cached(bert()), texts(4)
    mask_NT = x_NT != 0
    first = cached(x_NT, mask_NT)
    mask_NT[:, 0] = False
    assert cached.misses == 4 and not torch.equal(cached(x_NT, mask_NT).h_BTD, first.h_BTD) and cached.misses == 8


def test_cache_drops_the_least_recently_used() -> None:
    cached, x_NT = Cached(bert(), capacity=6), texts(8)
    cached(x_NT[:6])
    cached(x_NT[:2])
    cached(x_NT[6:])  # rows 2 and 3 go
    cached(x_NT[[0, 1, 4, 5, 6, 7]])
    assert cached.misses == 8
    expected = cached(x_NT[2:4]).h_BTD
    assert cached.misses == 10 and cached._cache is not None and len(cached._cache.slots) == 6
    assert len(cached._cache.h_ND) == 6
    assert torch.equal(Cached(bert())(x_NT).h_BTD[2:4], expected)  # more new rows in a batch than there is room for
    assert torch.equal(Cached(bert(), capacity=3)(x_NT).h_BTD[2:4], expected)


def test_augmented_rows_only_miss() -> None:
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    keys = digests(x)
    assert len(set(keys)) == 4 and all(len(key) == DIGEST for key in keys)
    assert not set(digests(torch.nextafter(x, x + 1))) & set(keys)
    assert not set(digests(x.double())) & set(keys) and not set(digests(x.reshape(4, 3, 64))) & set(keys)
    assert digests(x[[2, 1]]) == [keys[2], keys[1]]
    assert digests(x.bfloat16().repeat(2, 1, 1, 1))[:4] == digests(x.bfloat16())


def test_autocast_and_inference_mode_do_not_change_values() -> None:
    x_NT = texts(20)
    expected = Cached(bert())(x_NT).h_BTD
    cached = Cached(bert())
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert torch.equal(cached(x_NT).h_BTD, expected)
    head = torch.nn.Linear(32, 2)
    head(cached(texts(40)).h_BTD).sum().backward()  # rows of both kinds, outside
    assert cached.misses > 20 and head.weight.grad is not None


# on disk ----------------------------------------------------------------------------------------------------


def test_cache_on_disk_outlives_the_run(tmp_path: Path) -> None:
    x_NT = texts(30)
    first = Cached(bert(), folder=tmp_path)
    expected = first(x_NT).h_BTD
    del first
    gc.collect()  # as at the end of a run
    (file,) = tmp_path.glob("*/*.safetensors")
    assert not list(tmp_path.glob("*/.*"))
    second = Cached(bert(), folder=tmp_path)
    assert torch.equal(second(x_NT).h_BTD, expected) and second.misses == 0
    del second
    gc.collect()
    assert list(tmp_path.glob("*/*.safetensors")) == [file]  # nothing new, nothing written
    small = Cached(bert(), capacity=8, folder=tmp_path)
    assert torch.equal(small(x_NT).h_BTD, expected) and small.misses == 22


def test_other_towers_have_other_cache_files(tmp_path: Path) -> None:
    x_NT = texts(5)
    first = Cached(bert(), folder=tmp_path)
    first(x_NT)
    first._clear()
    others = {
        "weights": Cached(bert(seed=1), folder=tmp_path),
        "pool": Cached(bert(), FirstPool(), folder=tmp_path),
        "settings": Cached(TransformersTower(config={**BERT, **PLACES, "layer_norm_eps": 1e-5}), folder=tmp_path),  # type: ignore[dict-item]
    }
    others["settings"].load_state_dict(first.state_dict())
    for name, other in others.items():
        other(x_NT)
        assert other.misses == 5, name
    again = Cached(bert(), folder=tmp_path)
    again(x_NT)
    assert again.misses == 0
    parts = [Cached(bert()).tower, MeanPool()]
    assert identity(parts, torch.device("cpu")) != identity(parts, torch.device("cuda"))


def test_a_long_run_writes_its_cache_in_between(tmp_path: Path) -> None:
    cached = Cached(TextTower(60, 8, 1, 2, 10), folder=tmp_path)
    sizes = []
    for seed in range(12):
        cached(texts(100, seed=seed))
        files = list(tmp_path.glob("*/*.safetensors"))
        sizes.append(files[0].stat().st_size if files else 0)
    assert sizes[1] == 0 and sizes == sorted(sizes)
    assert len(set(sizes)) == 3  # at about 300 rows and at twice as many; the next would be at four times


def test_several_writers_share_a_folder(tmp_path: Path) -> None:
    """As ranks do: each writes its own file, and later runs read all of them."""
    x_NT = texts(400)
    alone = Cached(bert())(x_NT).h_BTD

    def rank(cached: Cached, mine_NT: Tensor) -> None:
        for rows in mine_NT.split(20):
            cached(rows)
        cached._clear()

    ranks = [threading.Thread(target=rank, args=(Cached(bert(), folder=tmp_path), x_NT[k::4])) for k in range(4)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 4
    later = Cached(bert(), folder=tmp_path)
    assert torch.equal(later(x_NT).h_BTD, alone) and later.misses == 0


def test_a_broken_file_is_one_line(tmp_path: Path) -> None:
    cached = Cached(bert(), folder=tmp_path)
    cached(texts(2))
    cached._clear()
    (file,) = tmp_path.glob("*/*.safetensors")
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"safetensors: not a file of cached rows .*; delete it") as caught:
        cached(texts(2))
    assert "\n" not in str(caught.value)


# what it is not part of -------------------------------------------------------------------------------------


def test_state_copies_and_pickles_have_no_cache() -> None:
    cached, x_NT = Cached(bert()), texts(6)
    before = set(cached.state_dict())
    expected = cached(x_NT).h_BTD
    assert set(cached.state_dict()) == before == {f"tower.{key}" for key in bert().state_dict()}
    for other in (copy.deepcopy(cached), pickle.loads(pickle.dumps(cached))):
        assert other._cache is None and other.misses == 6
        assert torch.equal(other(x_NT).h_BTD, expected) and other.misses == 12
        other.load_state_dict(Cached(bert(seed=1)).state_dict())
        assert not torch.equal(other(x_NT).h_BTD, expected)
    assert torch.equal(cached(x_NT).h_BTD, expected) and cached.misses == 6


def test_other_weights_clear_the_cache() -> None:
    cached, x_NT = Cached(bert()), texts(6)
    cached(x_NT)
    cached.cpu()
    cached(x_NT)
    assert cached.misses == 6  # a move to where it is
    cached.load_state_dict(Cached(bert(seed=1)).state_dict())
    assert torch.equal(cached(x_NT).h_BTD, Cached(bert(seed=1))(x_NT).h_BTD)
    cached.double()
    assert cached(x_NT).h_BTD.dtype == torch.float64 and cached.misses == 18


def test_it_stays_frozen_and_in_eval_mode() -> None:
    _asserts.check_frozen(bert(), texts(4))
    cached = Cached(bert(), AttentionPool(32, 2))
    assert not any(module.training for part in (cached.train().tower, cached.pool) for module in part.modules())
    assert cached.blocks() == []
    assert Cached(Frozen(bert())).state_dict().keys() == Cached(bert()).state_dict().keys()


def test_it_passes_under_compile() -> None:
    recipe = recipe_of(text=Cached(bert()), image=bert())
    Compile(fullgraph=True).apply(recipe)
    tower = recipe.towers["text"]
    assert torch.equal(tower(texts(6)).h_BTD, Cached(bert())(texts(6)).h_BTD)
    assert tower._compiled_call_impl is None and recipe.towers["image"]._compiled_call_impl is not None


# Freeze -----------------------------------------------------------------------------------------------------


def test_freeze_wraps_the_towers_that_it_names() -> None:
    recipe = recipe_of(text=bert(), image=bert())
    recipe.pools = torch.nn.ModuleDict({"text": LastPool(), "image": AttentionPool(32, 2)})
    x_NT = texts(5)
    expected = LastPool()(Frozen(bert())(x_NT))
    Freeze(["text"], capacity=10).apply(recipe)
    kinds = {name: type(tower).__name__ for name, tower in recipe.towers.items()}
    assert kinds == {"text": "Cached", "image": "TransformersTower"}
    assert torch.equal(recipe.pools["text"](recipe.towers["text"](x_NT)), expected)
    with pytest.raises(ValueError, match="AttentionPool of image has weights and would see one cached token"):
        Freeze(["image"], capacity=10).apply(recipe)
    Freeze(["image"]).apply(recipe)
    assert type(recipe.towers["image"]).__name__ == "Frozen"
    with pytest.raises(ValueError, match="towers text: it is Frozen"):
        Lora(towers=["text"]).apply(recipe)
    with pytest.raises(ValueError, match="towers 'txt': no such name; did you mean text"):
        Freeze(["txt"]).apply(recipe)
    with pytest.raises(ValueError, match="rows 0 at least 1"):
        Cached(bert(), rows=0)
    with pytest.raises(ValueError, match="capacity -1 is at least 0"):
        Cached(bert(), capacity=-1)
    with pytest.raises(ValueError, match="capacity -1"):
        Freeze(["text"], capacity=-1)
