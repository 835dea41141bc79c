"""The bank in numbers: its forms against their formulas, rows of several sets against one at a time, and refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.missing_modalities.available_sets import NOTHING, UNKNOWN, WHOLE, AvailableSets, Sets
from descant.modules.missing_modalities.modulation import ModulationBank, touch_parameters
from descant.modules.missing_modalities.modulation_forms import LowRank, Modulation, ScaleShift
from tests.tolerance import F32, rounding

NAMES = ["image", "text", "audio"]
#: Every set of three modalities, the whole and padding among them; some twice.
HAS = torch.tensor(
    [[1, 0, 0], [1, 1, 1], [0, 1, 0], [1, 1, 0], [0, 0, 1], [1, 0, 1], [0, 1, 1], [1, 0, 0], [0, 0, 0], [0, 1, 0]]
).bool()


def present(has_BM: Tensor = HAS) -> dict[str, Tensor]:
    return {m: has_BM[:, i] for i, m in enumerate(NAMES)}


def network() -> nn.ModuleDict:
    """One layer of every kind, for vectors, tokens, waves, maps and volumes."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    norm.running_mean, norm.running_var = torch.randn(4), torch.rand(4) + 0.5
    layers = {
        "linear": nn.Linear(6, 5),
        "wave": nn.Conv1d(3, 4, 3, stride=2, padding=1),
        "conv": nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False),
        "volume": nn.Conv3d(3, 4, 2, dilation=2, padding="same"),
        "batch": norm,
        "layer": nn.LayerNorm(6),
        "group": nn.GroupNorm(2, 4),
        "words": nn.Embedding(9, 6),
    }
    return nn.ModuleDict(layers).eval().requires_grad_(False)


def inputs(rows: int = len(HAS)) -> dict[str, list[Tensor]]:
    g = torch.Generator().manual_seed(1)
    return {
        "linear": [torch.randn(rows, 6, generator=g), torch.randn(rows, 7, 6, generator=g)],
        "wave": [torch.randn(rows, 3, 8, generator=g)],
        "conv": [torch.randn(rows, 3, 6, 6, generator=g)],
        "volume": [torch.randn(rows, 3, 4, 4, 4, generator=g)],
        "batch": [torch.randn(rows, 4, 4, 4, generator=g)],
        "layer": [torch.randn(rows, 6, generator=g), torch.randn(rows, 4, 6, generator=g)],
        "group": [torch.randn(rows, 4, 6, 6, generator=g)],
        "words": [torch.randint(0, 9, (rows, 3), generator=g)],
    }


LAYERS = list(inputs())


def attached(form: Modulation, net: nn.Module, trained: bool = True, **options: Any) -> ModulationBank:
    bank = ModulationBank(form, **options).attach(net, NAMES)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in bank.parameters() if trained else ():
            p.add_(torch.randn(p.shape, generator=g))
    return bank


def close(a: Tensor, b: Tensor) -> None:
    # sums over some 72 numbers (8 channels of 3 x 3), standardised
    torch.testing.assert_close(a, b, **rounding(80, F32))


# forms --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_scale_and_shift_is_its_formula_in_the_channels(name: str) -> None:
    net = network()
    plain = [net[name](x) for x in inputs()[name]]
    bank = attached(ScaleShift(), net, layers=LAYERS)
    part: Any = bank.of("image+audio", name)
    here = torch.ones(len(HAS), dtype=torch.bool)
    for x, h in zip(inputs()[name], plain, strict=True):
        with bank.route({"image": here, "text": ~here, "audio": here}):
            found = net[name](x)
        letters = "nc..." if name in ("wave", "conv", "volume", "batch", "group") else "n...c"
        scaled = torch.einsum(f"{letters},c->{letters}", h, part.gamma_C)
        shift = torch.einsum(f"{letters},c->{letters}", torch.ones_like(h), part.beta_C)
        close(found, scaled + shift)
        assert (found - h).abs().max() > 0.1


@pytest.mark.parametrize("name", ["linear", "wave", "conv", "volume"])
def test_low_rank_is_a_weight_of_that_rank_more(name: str) -> None:
    net = network()
    bank = attached(LowRank(r=2), net)
    part: Any = bank.of("text", name)
    more = torch.einsum("cr,r...->c...", part.b_Cr, part.a_rI)
    assert torch.linalg.matrix_rank(more.flatten(1)) == 2
    other: Any = copy.deepcopy(network()[name])
    other.weight = nn.Parameter(other.weight + more)
    here = torch.ones(len(HAS), dtype=torch.bool)
    for x in inputs()[name]:
        with bank.route({"image": ~here, "text": here, "audio": ~here}):
            close(net[name](x), other(x))


def test_low_rank_leaves_norms_and_grouped_convolutions_alone() -> None:
    form = LowRank(1)
    for layer in (nn.LayerNorm(3), nn.BatchNorm2d(3), nn.Embedding(2, 3), nn.Conv2d(4, 4, 3, groups=4)):
        assert form.of(layer) is None
    assert form.of(nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular")) is None
    with pytest.raises(ValueError, match="r 0: a rank is at least 1"):
        LowRank(0)


@pytest.mark.parametrize("form", [ScaleShift(), LowRank(2)], ids=["scale", "low"])
def test_all_sets_begin_as_the_network_to_the_bit(form: Modulation) -> None:
    net = network()
    plain = {name: [net[name](x) for x in xs] for name, xs in inputs().items()}
    bank = attached(form, net, trained=False)
    singles = [HAS[i].expand(len(HAS), -1) for i in range(len(HAS))]
    for has_BM in [HAS, *singles]:
        with bank.route(present(has_BM)):
            for name, xs in inputs().items():
                assert all(torch.equal(net[name](x), h) for x, h in zip(xs, plain[name], strict=True)), name


def test_what_has_everything_is_untouched_after_training_too() -> None:
    net = network()
    plain = {name: [net[name](x) for x in xs] for name, xs in inputs().items()}
    bank = attached(ScaleShift(), net, layers=LAYERS)
    for has_BM in (torch.ones_like(HAS), torch.zeros_like(HAS)):
        with bank.route(present(has_BM)):
            for name, xs in inputs().items():
                assert all(torch.equal(net[name](x), h) for x, h in zip(xs, plain[name], strict=True)), name
    assert all(torch.equal(net[name](x), plain[name][k]) for name, xs in inputs().items() for k, x in enumerate(xs))


# rows of several sets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [ScaleShift(), LowRank(2)], ids=["scale", "low"])
@pytest.mark.parametrize("name", LAYERS)
def test_rows_of_several_sets_are_those_of_one_set_at_a_time(form: Modulation, name: str) -> None:
    net = network()
    bank = attached(form, net, layers=[*LAYERS[:4], *(LAYERS[4:] if isinstance(form, ScaleShift) else [])])
    order_R = torch.tensor([7, 0, 3, 9, 5])
    for x in inputs()[name]:
        with bank.route(present()):
            mixed = net[name](x)
            with bank._tracker.select(order_R):
                some = net[name](x[order_R])
        alone = []
        for i in range(len(x)):
            with bank.route(present(HAS[i : i + 1])):
                alone.append(net[name](x[i : i + 1]))
        wanted = torch.cat(alone)
        real = HAS.any(dim=1)  # padding goes with anybody
        close(mixed[real], wanted[real])
        close(some, wanted[order_R])


def test_gradients_of_rows_go_to_their_set_alone() -> None:
    net = network()
    bank = attached(ScaleShift(), net, layers=["linear"])
    x = inputs()["linear"][1]
    with bank.route(present(HAS[:4])):
        net["linear"](x[:4]).square().sum().backward()
    grads = {name: next(bank.of(name, "linear").parameters()).grad for name in bank.sets.names}
    touched = [name for name, grad in grads.items() if grad is not None and bool(grad.any())]
    assert touched == ["image", "text", "image+text"]
    for row, name in ((0, "image"), (2, "text"), (3, "image+text")):
        with bank.route(present(HAS[row : row + 1])):
            part: Any = bank.of(name, "linear")
            h = net["linear"](x[row : row + 1])
            (wanted,) = torch.autograd.grad(h.square().sum(), part.gamma_C)
        close(part.gamma_C.grad, wanted)


def test_towers_and_pools_have_nothing_for_sets_without_them() -> None:
    net = nn.ModuleDict(
        {
            "towers": nn.ModuleDict({m: nn.Linear(3, 3) for m in NAMES}),
            "pools": nn.ModuleDict({m: nn.LayerNorm(3) for m in NAMES}),
            "heads": nn.ModuleDict({m: nn.Linear(3, 2) for m in NAMES}),
        }
    )
    bank = attached(ScaleShift(), net)
    assert bank.count() == {name: (6 + 6) * (name.count("+") + 1) + 3 * 4 for name in bank.sets.names}
    assert bank.share(net) == sum(bank.count().values()) / sum(p.numel() for p in net.parameters())


def test_layers_are_chosen_by_name_place_or_kind() -> None:
    def names(*layers: str) -> list[str]:
        net = nn.ModuleDict({"a": network(), "b": nn.Sequential(nn.Linear(2, 2), nn.MultiheadAttention(2, 1))})
        bank = ModulationBank(layers=list(layers) or None).attach(net, NAMES)
        parts: Any = bank.parts["image"]
        return [name.replace("/", ".") for name in parts]

    # not the embedding, and not the layer that torch's attention reads without running it
    assert names() == [f"a.{name}" for name in LAYERS if name != "words"] + ["b.0"]
    assert names("b", "words") == ["a.words", "b.0"]
    assert names("linear", "LayerNorm", "Conv3d") == ["a.linear", "a.volume", "a.layer"]
    with pytest.raises(ValueError, match=r"layers: 'liner': no such name; did you mean linear"):
        names("liner")


# samples and their sets ---------------------------------------------------------------------------------------------


def test_sets_are_numbered_in_one_order() -> None:
    sets = Sets(NAMES)
    assert sets.names == ["image", "text", "audio", "image+text", "image+audio", "text+audio"]
    assert sets.of(present()).tolist() == [0, WHOLE, 1, 3, 2, 4, 5, 0, NOTHING, 1]
    # a modality that the data has not is absent, and others do not count
    assert Sets(NAMES).of({"image": HAS[:2, 0], "depth": HAS[:2, 1]}).tolist() == [0, 0]
    assert Sets(NAMES, [["audio", "image"], NAMES]).names == ["image+audio"]


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        ([["imgae"]], "sets: 'imgae': no such name; did you mean image"),
        ([[]], r"\[\] is no set of modalities"),
        ([["text", "text"]], "is no set of modalities"),
        ([["image", "text"], ["text", "image"]], r"image\+text is given twice"),
    ],
)
def test_bad_sets_are_one_line(sets: list[list[str]], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ModulationBank(sets=sets).attach(network(), NAMES)


def test_a_set_without_parameters_is_refused_or_left_to_the_network() -> None:
    net = network()
    bank = attached(ScaleShift(), net, sets=[["image", "text"], ["text"]])
    assert Sets(NAMES, [["text"]]).of(present(HAS[:1])).tolist() == [UNKNOWN]
    says = r"no parameters for samples with image\+audio only; the nearest set is image\+text; unknown: frozen takes"
    with pytest.raises(ValueError, match=says), bank.route(present(HAS[5:6])):
        pass
    net = network()
    plain = net["linear"](inputs()["linear"][0])
    bank = attached(ScaleShift(), net, sets=[["text"]], unknown="frozen")
    with pytest.warns(UserWarning, match="they see the network as it is"), bank.route(present()):
        found = net["linear"](inputs()["linear"][0])
    changed = (found != plain).any(dim=1)
    assert changed[:8].tolist() == (HAS[:8].int() == torch.tensor([0, 1, 0])).all(dim=1).tolist()


def test_rows_that_are_no_samples_are_refused() -> None:
    net = network()
    bank = attached(ScaleShift(), net)
    with bank.route(present()), pytest.raises(ValueError, match=r"linear has 20 rows for 10 samples; name `layers`"):
        net["linear"](torch.zeros(20, 6))
    with bank.route(present(HAS[:1].expand(10, -1))):  # of one set they may be anything
        net["linear"](torch.zeros(20, 6))


def test_the_sham_hands_out_what_was_learned_for_others() -> None:
    nets = network(), network()
    own, sham = attached(ScaleShift(), nets[0]), attached(ScaleShift(), nets[1], sham="permute")
    x = inputs()["linear"][0]

    def out(k: int, has_BM: Tensor) -> Tensor:
        with (own, sham)[k].route(present(has_BM)):
            return nets[k]["linear"](x)

    assert torch.equal(out(0, HAS), out(1, HAS))  # training is the same
    own.eval()
    sham.eval()
    names = own.sets.names
    for k, name in enumerate(names):
        given = torch.tensor([[m in name.split("+") for m in NAMES]]).expand(len(x), -1)
        others = torch.tensor([[m in names[(k + 1) % 6].split("+") for m in NAMES]]).expand(len(x), -1)
        assert torch.equal(out(1, given), out(0, others))
        assert not torch.allclose(out(1, given), out(0, given))
    assert torch.equal(out(1, torch.ones_like(HAS)), F.linear(x, nets[0]["linear"].weight, nets[0]["linear"].bias))  # type: ignore[arg-type]


def test_a_copy_goes_by_its_own_parameters() -> None:
    net = network()
    net["bank"] = attached(ScaleShift(), net, trained=False)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        net["bank"].of("text", "linear").beta_C.fill_(3.0)  # type: ignore[operator]
    x, has = inputs()["linear"][0], present(HAS[2:3].expand(10, -1))
    with net["bank"].route(has), twin["bank"].route(has):  # type: ignore[operator]
        close(net["linear"](x), twin["linear"](x) + 3)


def test_reached_adds_no_value_and_zero_gradients() -> None:
    used, idle = (nn.Parameter(torch.full((2,), torch.inf if k else 1.0)) for k in range(2))
    value = touch_parameters((2 * used).sum(), [used, idle])
    assert float(value.detach()) == 4.0
    value.backward()
    assert used.grad is not None and used.grad.tolist() == [2.0, 2.0]
    assert idle.grad is not None and idle.grad.tolist() == [0.0, 0.0]


# what is left of samples --------------------------------------------------------------------------------------------


def test_the_draw_is_of_the_sample_alone_and_as_often_as_it_says() -> None:
    keep = AvailableSets([["image"], ["text", "audio"]], weights=[1.0, 3.0])
    everything = dict.fromkeys(NAMES, torch.ones(4000, dtype=torch.bool))
    draw_B = torch.arange(4000) * 7919
    left = keep.remaining_modalities({**everything, "text_neg": torch.ones(4000, dtype=torch.bool)}, draw_B, NAMES)
    assert bool(left["text_neg"].all())
    assert torch.equal(left["text"], left["audio"]) and torch.equal(left["text"], ~left["image"])
    assert abs(float(left["text"].float().mean()) - 0.75) < 0.03
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(0))
    again = keep.remaining_modalities({m: x[order] for m, x in everything.items()}, draw_B[order], NAMES)
    assert all(torch.equal(again[m], left[m][order]) for m in NAMES)


def test_samples_draw_among_the_sets_that_they_have() -> None:
    draw_B = torch.arange(len(HAS) * 100)
    has_BM = HAS.repeat(100, 1)
    keep = AvailableSets([["image"], ["image", "text"]])
    left = torch.stack(list(keep.remaining_modalities(present(has_BM), draw_B, NAMES).values()), dim=1)
    assert not (left & ~has_BM).any()
    assert torch.equal(left.any(dim=1), has_BM.any(dim=1))  # nobody is left with nothing
    rows = [left[i :: len(HAS)] for i in range(len(HAS))]
    assert all((row == HAS[i]).all() for i, row in enumerate(rows) if i in (0, 2, 4, 6, 7, 8, 9))
    whole = {tuple(row.tolist()) for row in rows[1]}
    assert whole == {(True, False, False), (True, True, False)}
    assert {tuple(row.tolist()) for row in rows[5]} == {(True, False, False)}


def test_a_batch_may_draw_one_set_for_all() -> None:
    keep, seen = AvailableSets(per="batch"), set()
    everything = dict.fromkeys(NAMES, torch.ones(8, dtype=torch.bool))
    for first in range(0, 400, 8):
        left = torch.stack(
            list(keep.remaining_modalities(everything, torch.arange(first, first + 8) * 31, NAMES).values()), dim=1
        )
        assert (left == left[0]).all()
        seen.add(tuple(left[0].tolist()))
    assert len(seen) == 6


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sets": []}, "sets: none given"),
        ({"weights": [1.0]}, "one positive number for each of the sets"),
        ({"sets": [["a"]], "weights": [0.0]}, "one positive number for each of the sets"),
    ],
)
def test_bad_draws_are_one_line(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        AvailableSets(**options)
