"""LoRA, quantization, activation checkpointing, compile and shard on recipes of small towers."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
import yaml
from lightning import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.utils.data import DataLoader

from descant.modules.adaptation.base import Adapt
from descant.modules.adaptation.lora import Lora
from descant.modules.adaptation.quantize import Quantize
from descant.modules.core.batch import Batch
from descant.modules.towers import BagTower, ConvTower, Frozen, PatchTower, TextTower, Towers
from descant.modules.towers.heads import AttentionPool, Pool
from descant.modules.training_setup.activation_checkpointing import Checkpointing
from descant.modules.training_setup.compile_and_shard import Compile, Shard
from descant.recipes.contrastive import Contrastive
from descant.run.sharded import Sharded
from tests.modules.towers import _asserts
from tests.ranks import run_ranks
from tests.rotation import by_turns, turn
from tests.tolerance import F32, ulps

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TEXT = torch.tensor([[1, 5, 6, 2, 0, 0], [1, 7, 2, 0, 0, 0], [1, 9, 8, 7, 2, 3], [1, 2, 0, 0, 0, 0]])


def recipe_of(**towers):
    torch.manual_seed(0)
    made = {"image": PatchTower(16, 4, 64, 2, 2), "text": TextTower(12, 64, 2, 2, 6)}
    return _asserts.recipe_of(**{**made, **towers})


def step(recipe):
    optimizer = torch.optim.AdamW([p for p in recipe.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    recipe.train()
    for _ in range(2):  # B is zero at first, so A moves in the second step
        optimizer.zero_grad()
        (_asserts.loss_of(recipe.towers["image"](IMAGES)) + _asserts.loss_of(recipe.towers["text"](TEXT))).backward()
        optimizer.step()


def named(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


# adapters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_lora_starts_at_the_base_and_moves_adapters_only(dora):
    recipe = recipe_of(image=ConvTower(widths=[8, 16])).eval()
    _asserts.stir(recipe)  # the net's branches start at zero, and so would their gradients
    expected = recipe.towers["text"](TEXT).h_BTD, recipe.towers["image"](IMAGES).h_BTD
    Lora(r=2, targets=["qkv", "mlp.0"], dora=dora, towers=["text"]).apply(recipe)
    Lora(r=2, targets=["conv_1"], dora=dora, towers=["image"]).apply(recipe)
    torch.testing.assert_close(recipe.towers["text"](TEXT).h_BTD, expected[0], rtol=0, atol=ulps(64, F32))
    # DoRA divides by a norm and multiplies by it
    torch.testing.assert_close(recipe.towers["image"](IMAGES).h_BTD, expected[1], rtol=0, atol=ulps(64, F32))
    before = named(recipe)
    step(recipe)
    after = named(recipe)
    adapters = {name for name in after if "lora_" in name}
    assert len(adapters) == (2 * 2 + 2) * (3 if dora else 2)
    assert all(not torch.equal(after[name], before[name]) for name in adapters)
    # batch norms' running statistics among them
    assert all(torch.equal(after[name], before[name]) for name in after.keys() - adapters)


def test_adapters_are_initialized_by_the_seed_only():
    """Several ranks begin the global generator anew before a model is adapted, and one rank does not."""
    adapters = []
    for seed in (1, 2):
        torch.manual_seed(0)
        recipe = Contrastive(
            Towers(image=PatchTower(8, 4, 8, 1, 2), text=BagTower(9, 8)), 8, adapt=[Lora(r=2, towers=["image"])]
        )
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        recipe.configure_model()
        assert torch.equal(torch.get_rng_state(), before)
        adapters.append({name: p for name, p in recipe.named_parameters() if "lora_A" in name})
    one, other = adapters
    assert one and all(torch.equal(one[name], other[name]) and one[name].any() for name in one)
    first, *rest = (p for p in one.values())
    assert any(p.shape == first.shape and not torch.equal(p, first) for p in rest)  # and each has its own draws


def test_lora_all_linear_and_regular_expressions():
    recipe = recipe_of()
    Lora(r=2, targets="all-linear", towers=["image"]).apply(recipe)
    Lora(r=2, targets=r"layers\.1\..*", towers=["text"]).apply(recipe)
    adapted = {name.split(".lora_A")[0] for name in recipe.state_dict() if ".lora_A" in name}
    assert {n for n in adapted if "text" in n} == {
        f"towers.text.layers.1.{n}" for n in ("qkv", "out", "mlp.0", "mlp.2")
    }
    assert len({n for n in adapted if "image" in n}) == 8


# quantised layers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "cosine"),
    [(Quantize(4), 0.95), (Quantize(4, "fp4"), 0.95), (Quantize(8), 0.999)],
    ids=["nf4", "fp4", "int8"],
)
def test_quantized_towers_are_close_to_the_original_and_frozen(part, cosine):
    recipe = recipe_of().eval()
    full = recipe.towers["image"](IMAGES).h_BTD
    part.apply(recipe)
    few = recipe.towers["image"](IMAGES).h_BTD
    assert not torch.equal(few, full)
    assert nn.functional.cosine_similarity(few.flatten(), full.flatten(), dim=0) > cosine
    assert not any(p.requires_grad for p in recipe.parameters())


@pytest.mark.parametrize("bits", [4, 8])
def test_qlora_trains_and_passes_gradients_through(bits):
    recipe = recipe_of()
    Quantize(bits).apply(recipe)
    Lora(r=2, targets=["qkv"]).apply(recipe)
    before = named(recipe)
    step(recipe)
    after = named(recipe)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {name for name in after if "lora_" in name}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
def test_quantized_state_is_saved_loaded_and_copied(bits, used):
    recipe = recipe_of().eval()
    Quantize(bits).apply(recipe)
    expected = recipe.towers["text"](TEXT).h_BTD
    other = recipe_of().eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    Quantize(bits).apply(other)
    if used:
        other.towers["text"](TEXT)
    other.load_state_dict(recipe.state_dict())
    assert torch.equal(other.towers["text"](TEXT).h_BTD, expected)
    assert torch.equal(copy.deepcopy(other).towers["text"](TEXT).h_BTD, expected)
    assert other.state_dict().keys() == recipe.state_dict().keys()
    other.cpu()  # as Lightning does after a fit
    assert torch.equal(other.towers["text"](TEXT).h_BTD, expected)


@pytest.mark.parametrize(
    ("part", "least", "most"),
    [(Quantize(4), 0.05, 0.13), (Quantize(4, "fp4"), 0.06, 0.17), (Quantize(8), 0.002, 0.02)],
    ids=["nf4", "fp4", "int8"],
)
def test_error_of_quantized_layers(part, least, most):
    """Relative, of one layer with normal weights: 0.09, 0.12 and 0.01 (int8 rounds the input too)."""
    torch.manual_seed(0)
    recipe = recipe_of(image=PatchTower(16, 4, 256, 1, 2))
    layer, x = recipe.towers["image"].layers[0].mlp[0], torch.randn(64, 256)
    nn.init.normal_(layer.weight)
    full = layer(x)
    part.apply(recipe)
    few = recipe.towers["image"].layers[0].mlp[0](x)
    assert type(few) is torch.Tensor and least < ((few - full).norm() / full.norm()).item() < most


DOWNLOADS = """
import sys, types, logging, importlib.machinery, importlib.abc
class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name == "kernels" else None
    def exec_module(self, module):
        print("kernels was imported")
sys.meta_path.insert(0, Finder())
from descant.modules.adaptation import quantize
quantize.bitsandbytes()
assert "kernels" not in sys.modules
import kernels
"""


@pytest.mark.slow
def test_bitsandbytes_downloads_no_code_and_is_quiet():
    """Even where the package ``kernels``, by which it would, is there; others may import that."""
    done = subprocess.run([sys.executable, "-c", DOWNLOADS], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["kernels was imported"] and "gemm_4bit" not in done.stderr


def test_quantize_skips():
    recipe = recipe_of()
    Quantize(4, towers=["text"], skip=["qkv"]).apply(recipe)
    kinds = {n: type(m).__name__ for n, m in recipe.named_modules() if isinstance(m, nn.Linear)}
    assert all((kind == "Linear4bit") == ("text" in n and "qkv" not in n) for n, kind in kinds.items())


# checkpointing, compile, shard ------------------------------------------------------------------------------


def test_checkpointing_leaves_frozen_towers_and_inference_alone():
    recipe = recipe_of(image=Frozen(PatchTower(16, 4, 64, 2, 2)))
    Checkpointing().apply(recipe)
    Checkpointing().apply(recipe)  # once is enough, twice is the same
    _asserts.loss_of(recipe.towers["text"](TEXT)).backward()
    assert not recipe.towers["image"](IMAGES).h_BTD.requires_grad


def test_checkpointing_over_adapters():
    recipe = recipe_of()
    Lora(r=2, targets=["qkv"]).apply(recipe)
    Checkpointing().apply(recipe)
    step(recipe)
    assert all(p.grad is not None for p in recipe.parameters() if p.requires_grad)


@pytest.mark.slow
@pytest.mark.parametrize("saving", turn([False, True], 2), ids=lambda saving: "checkpointed" if saving else "plain")
def test_compile_gives_the_same_gradients(saving):
    plain, fast = recipe_of(), recipe_of()
    if saving:
        Checkpointing().apply(fast)
    Compile().apply(fast)
    assert plain.state_dict().keys() == fast.state_dict().keys()
    for recipe in (plain, fast):
        loss = _asserts.loss_of(recipe.towers["image"](IMAGES)) + _asserts.loss_of(recipe.towers["text"](TEXT))
        loss.backward()
    for p, q in zip(plain.parameters(), fast.parameters(), strict=True):
        # fused kernels: 84 ulps of gradients of about 1, sums over rows, tokens and two layers
        torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-4)


def test_shard_loads_scalars_of_an_unsharded_run():
    from descant.modules.training_setup.compile_and_shard import _load_scalars

    whole, split = nn.Module(), nn.Module()
    whole.scale, split.scale = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.zeros(1))
    split.register_load_state_dict_pre_hook(_load_scalars)
    split.load_state_dict(whole.state_dict())
    assert split.scale.tolist() == [2.0]
    split.scale.data.fill_(3.0)
    whole.load_state_dict(split.state_dict())
    assert whole.scale.item() == 3.0


def contrastive_after_two_steps(rank, shard=None, strategy="auto", devices=1, saving=True, compile=None):
    torch.manual_seed(0)
    recipe = Contrastive(
        Towers(image=PatchTower(16, 4, 16, 2, 2), text=TextTower(12, 16, 2, 2, 6)),
        width=8,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.9),
        checkpointing=Checkpointing() if shard and saving else None,
        compile=compile,
        shard=shard,
    )
    present = {"image": torch.ones(4, dtype=torch.bool), "text": torch.ones(4, dtype=torch.bool)}
    whole = Batch({"image": IMAGES, "text": TEXT}, present)
    mine = whole.select(slice(2 * rank, 2 * rank + 2)) if devices > 1 else whole
    trainer = Trainer(
        max_steps=2,
        devices=devices,
        strategy=strategy,
        accelerator="cpu",
        gradient_clip_val=0.5,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    data: Any = DataLoader([mine] * 2, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(recipe, data, data)
    trainer.test(recipe, data, verbose=False)
    named_parameters: list[tuple[str, Any]] = list(recipe.named_parameters())
    values = {n: p.full_tensor() if shard else p for n, p in named_parameters}
    split = [n for n, p in named_parameters if shard and p.to_local().numel() < p.numel()]
    return {n: v.detach().reshape(-1) for n, v in values.items()}, len(split)


def sharded_contrastive(rank):
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    return contrastive_after_two_steps(rank, Shard(), strategy, devices=2)


@pytest.mark.ddp
@pytest.mark.slow
def test_a_sharded_recipe_trains_as_a_whole_one():
    """Heads, scales and embeddings lie outside the blocks; clipping sees all of them as one vector."""
    expected, _ = contrastive_after_two_steps(0)
    for found, split in run_ranks(2, sharded_contrastive):
        assert found.keys() == expected.keys() and split >= len(found) - 1
        gaps = {n: (found[n] - expected[n]).abs().max().item() for n in expected}
        assert {n: gap for n, gap in gaps.items() if gap > 1e-5} == {}


def compiled_and_sharded(rank):
    found = []
    for shard, saving in ((Shard(replicate=2), False), (Shard(), True)):
        torch._dynamo.reset()
        counters = torch._dynamo.utils.counters
        counters.clear()
        values, _ = contrastive_after_two_steps(rank, shard, Sharded("gloo"), 2, saving, Compile(fullgraph=not saving))
        found.append((values, counters["stats"]["unique_graphs"]))
    return found


@pytest.mark.ddp
@pytest.mark.slow
@by_turns(1, 4)
def test_blocks_are_compiled_between_gathers_and_train_as_whole_ones():
    """Without a break in the graph of a block; those of one kind share it: one for each tower, forward with gradients
    and without."""
    expected, _ = contrastive_after_two_steps(0)
    for found in run_ranks(2, compiled_and_sharded):
        for values, graphs in found:
            assert graphs >= 2, "both towers' blocks are compiled"
            gaps = {n: (values[n] - expected[n]).abs().max().item() for n in expected}
            assert {n: gap for n, gap in gaps.items() if gap > 1e-5} == {}


def test_checkpointed_batch_norms_go_backward_more_than_once():
    recipe = recipe_of(image=ConvTower(widths=[8, 8], blocks=1))
    Checkpointing(towers=["image"]).apply(recipe)
    tower = recipe.towers["image"].train()
    value = tower(IMAGES).h_BTD.square().mean()
    weights = [p for p in tower.parameters() if p.requires_grad]
    counted = {name: x.clone() for name, x in tower.named_buffers()}
    first, second = (torch.autograd.grad(value, weights, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(x, counted[name]) for name, x in tower.named_buffers())


# YAML -------------------------------------------------------------------------------------------------------


def test_towers_and_parts_come_from_yaml():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_argument("--towers", type=Towers)
    parser.add_argument("--pool", type=Pool)
    parser.add_argument("--adapt", type=list[Adapt])
    parser.add_argument("--checkpointing", type=Checkpointing)
    parser.add_argument("--compile", type=Compile)
    parser.add_argument("--shard", type=Shard)
    parts = parser.instantiate_classes(parser.parse_object(yaml.safe_load(YAML)))
    kinds = {name: type(tower).__name__ for name, tower in parts.towers.items()}
    assert kinds == {
        "image": "ConvTower",
        "text": "TransformersTower",
        "depth": "Frozen",
        "bands": "PatchTower",
        "audio": "TextTower",
    }
    assert parts.towers["depth"].width == 16 and [type(part) for part in parts.adapt] == [Quantize, Lora]
    assert isinstance(parts.pool, AttentionPool) and parts.shard.dtype == "bfloat16"


YAML = """
towers:
  class_path: descant.modules.towers.Towers
  init_args:
    image: {class_path: descant.modules.towers.ConvTower, init_args: {widths: [8, 16], blocks: [1, 2]}}
    text:
      class_path: descant.modules.towers.TransformersTower
      init_args:
        config: {model_type: bert, vocab_size: 9, hidden_size: 8, num_attention_heads: 2}
    depth:
      class_path: descant.modules.towers.Frozen
      init_args:
        tower:
          class_path: descant.modules.towers.TimmTower
          init_args:
            name: vit_tiny_patch16_224
            size: 32
            options: {depth: 1, embed_dim: 16, num_heads: 2, in_chans: 1, drop_path_rate: 0.1}
    bands:
      class_path: descant.modules.towers.PatchTower
      init_args: {size: 8, patch: 4, width: 8, depth: 1, heads: 2, positions: sincos, channels: 6}
    audio:
      class_path: descant.modules.towers.TextTower
      init_args: {vocab: 9, width: 8, depth: 1, heads: 2, length: 4, causal: true}
pool: {class_path: descant.modules.towers.heads.AttentionPool, init_args: {width: 8, heads: 2}}
adapt:
  - {class_path: descant.modules.adaptation.quantize.Quantize, init_args: {bits: 4, skip: [out]}}
  - {class_path: descant.modules.adaptation.lora.Lora, init_args: {r: 4, targets: [qkv], towers: [text]}}
checkpointing:
  class_path: descant.modules.training_setup.activation_checkpointing.Checkpointing
  init_args: {preserve_rng: false}
compile: {class_path: descant.modules.training_setup.compile_and_shard.Compile, init_args: {mode: max-autotune}}
shard: {class_path: descant.modules.training_setup.compile_and_shard.Shard, init_args: {dtype: bfloat16}}
"""


# refusals ---------------------------------------------------------------------------------------------------


def adapted():
    recipe = recipe_of()
    Lora(targets=["qkv"]).apply(recipe)
    return recipe


REFUSALS = [
    (lambda: Lora(towers=["imgae"]).apply(recipe_of()), "towers 'imgae': .* did you mean image"),
    (lambda: Lora(targets=["qvk"]).apply(recipe_of()), "targets 'qvk': .* did you mean qkv"),
    (lambda: Lora(targets="q.*").apply(recipe_of()), "targets 'q.*' matches no layer of PatchTower"),
    (lambda: Lora().apply(recipe_of(image=ConvTower(widths=[8]))), "'all-linear': ConvTower has no linear layer"),
    (lambda: Lora().apply(recipe_of(image=Frozen(PatchTower(16, 4, 64, 1, 2)))), "towers image: it is Frozen"),
    (lambda: Lora(r=0), "r 0"),
    (lambda: Quantize(bits=5), "bits 5: .*4"),  # type: ignore[arg-type]
    (lambda: Quantize(skip=["qvk"]).apply(recipe_of()), "skip 'qvk': .* did you mean qkv"),
    (lambda: Quantize().apply(adapted()), "put Quantize before Lora"),
    (lambda: Checkpointing(towers=["text"]).apply(recipe_of(text=BagTower(9, 8))), "tower text has no blocks"),
    (lambda: Shard(dtype="bfloat"), "dtype 'bfloat': .* mean bfloat16"),  # type: ignore[arg-type]
    (lambda: Shard().apply(recipe_of()), "shard: no device mesh; set trainer.strategy to Sharded"),
]


@pytest.mark.parametrize(("make", "line"), REFUSALS, ids=[line for _, line in REFUSALS])
def test_refusals_are_one_line(make, line):
    with pytest.raises(ValueError, match=line) as caught:
        make()
    assert "\n" not in str(caught.value)
