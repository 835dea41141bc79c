"""Properties of a tower, for each tower's tests to pick from. Letters: B samples, T tokens, D width."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from descant.modules.towers import Frozen, Tokens, Tower, Towers
from descant.modules.training_setup.activation_checkpointing import Checkpointing
from descant.modules.training_setup.compile_and_shard import Compile
from tests.tolerance import F32, rounding, ulps


def recipe_of(**towers: Tower) -> nn.Module:
    """The least that the parts of configure.py need of a recipe."""
    recipe = nn.Module()
    recipe.towers = Towers(others=towers)
    return recipe


def loss_of(tokens: Tokens) -> Tensor:
    """A scalar that every real feature moves, each in its own way."""
    h_BTD, mask_BT = tokens
    w_TD = torch.arange(h_BTD[0].numel(), dtype=h_BTD.dtype).view(h_BTD.shape[1:]).sin()
    return (h_BTD * w_TD * mask_BT[..., None]).sum() / len(h_BTD)


def stir(tower: nn.Module) -> None:
    """Move every parameter off its special first values: a zero scale would hide what lies behind it."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def check_tokens(tower: Tower, x: Tensor, T: int) -> None:
    h_BTD, mask_BT = tower(x)
    assert h_BTD.shape == (len(x), T, tower.width)
    assert mask_BT.shape == (len(x), T) and mask_BT.dtype == torch.bool
    assert torch.isfinite(h_BTD).all()


def check_rows_independent(tower: Tower, x: Tensor, atol: float = ulps(84, F32)) -> None:
    tower.eval()
    whole = tower(x)
    for b in range(len(x)):
        h_1TD, mask_1T = tower(x[b : b + 1])
        assert torch.equal(mask_1T[0], whole.mask_BT[b])
        real = mask_1T[0]
        torch.testing.assert_close(h_1TD[0][real], whole.h_BTD[b][real], atol=atol, rtol=0)


def check_deterministic(tower: Tower, x: Tensor) -> None:
    tower.eval()
    assert torch.equal(tower(x).h_BTD, tower(x).h_BTD)


def check_every_gradient(tower: Tower, x: Tensor) -> None:
    tower = copy.deepcopy(tower).train()
    stir(tower)
    loss_of(tower(x)).backward()
    trained = [(name, p.grad) for name, p in tower.named_parameters() if p.requires_grad]
    assert not [name for name, grad in trained if grad is None or not grad.abs().sum() > 0]


def check_frozen(tower: Tower, x: Tensor) -> None:
    """Beside a layer that trains, a frozen tower keeps its bytes and its mode, norms and dropout too."""
    frozen = Frozen(copy.deepcopy(tower))
    both = nn.ModuleList([frozen, nn.Linear(tower.width, 1)]).train()
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    first = frozen(x).h_BTD
    optimizer = torch.optim.AdamW(both.parameters(), lr=0.1, weight_decay=0.1)
    both[1](frozen(x).h_BTD).sum().backward()
    optimizer.step()
    assert not any(module.training for module in frozen.tower.modules())
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())
    assert torch.equal(frozen(x).h_BTD, first)
    assert frozen.blocks() == frozen.tower.blocks() and frozen.width == tower.width


def check_keys_unchanged(tower: Tower) -> None:
    """By checkpointing and compile; compile is lazy, so nothing is compiled here."""
    tower = copy.deepcopy(tower)
    before = list(tower.state_dict())
    recipe = recipe_of(image=tower)
    Checkpointing().apply(recipe)
    Compile().apply(recipe)
    assert list(tower.state_dict()) == before


def kept_bytes(tower: Tower, x: Tensor) -> tuple[int, Tensor]:
    """Bytes that a forward keeps for backward, each storage once and parameters left out; and the loss."""
    parameters = {p.untyped_storage().data_ptr() for p in tower.parameters()}
    storages: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(tower(x))
    return sum(storages.values()), loss


def check_checkpointing(tower: Tower, x: Tensor, most: float = 0.6) -> float:
    """The same loss, gradients and buffers from at most ``most`` of the kept bytes."""
    plain, saving = copy.deepcopy(tower).train(), copy.deepcopy(tower).train()
    stir(plain)
    stir(saving)
    recipe = recipe_of(image=saving)
    Checkpointing().apply(recipe)
    twin = copy.deepcopy(saving)  # a copy (an EMA, a teacher) computes with its own parameters
    torch.manual_seed(0)
    all_bytes, loss = kept_bytes(plain, x)
    loss.backward()
    torch.manual_seed(0)
    some_bytes, loss_again = kept_bytes(saving, x)
    loss_again.backward()
    torch.testing.assert_close(loss_again, loss, **rounding(8, F32))
    for (name, p), q in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name, **rounding(8, F32))
    for a, b in zip(plain.buffers(), saving.buffers(), strict=True):
        assert torch.equal(a, b)
    torch.manual_seed(0)
    loss_of(twin(x)).backward()
    assert all(p.grad is not None for p in twin.parameters() if p.requires_grad)
    assert some_bytes <= most * all_bytes, f"{some_bytes} of {all_bytes} bytes kept"
    return some_bytes / all_bytes
