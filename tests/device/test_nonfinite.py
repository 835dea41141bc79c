"""What is not finite on an accelerator: found without waiting for the device, before anything of it is saved."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from descant.callbacks import NonFinite, Resume
from descant.modules.core.batch import Batch
from descant.modules.core.faults import Faults
from descant.modules.core.loss_reduction import Step
from descant.modules.core.objective import Term
from descant.modules.io import plain
from tests.callbacks.checkpoints.test_resume import fit
from tests.callbacks.health.test_nonfinite import BAD, Spoiled, Watching, ledger


def net(where: str = "loss", fused: bool = True) -> Spoiled:
    """Without dropout, whose draws are others on a device."""
    made = Spoiled(where, dropout=0.0)
    made.optimization.optimizer = partial(torch.optim.AdamW, lr=1e-2, fused=fused)
    return made


def on(device: Any, **options: Any) -> dict[str, Any]:
    flags = dict(zip(device.options[::2], device.options[1::2], strict=True))
    at = {name.removeprefix("--trainer."): value for name, value in flags.items()}
    return {**at, "devices": 1, "max_epochs": 1, "log_every_n_steps": 1000, **options}


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().cpu() for name, p in module.named_parameters()}


def close(mine: torch.nn.Module, reference: torch.nn.Module, device: Any) -> None:
    """The same weights: a GPU adds in another order, and Adam's steps turn errors of gradients into some of weights."""
    expected, found = weights(reference), weights(mine)
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=0, atol=1e-6 if device.emulated else 1e-2)  # 10 lr on a GPU


def spoilt_step(folder: Path) -> int:
    """The step that the sample is in, by a run on the CPU that leaves it out."""
    watch = Watching()
    fit(folder, NonFinite("skip"), watch, net=net(), max_epochs=1)
    (step,) = (i for i, ids in enumerate(watch.index) if BAD in ids)
    return step


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_fused_optimizer_leaves_the_step_out_and_the_run_ends_at_the_next_look(
    tmp_path: Path, where: str, device: Any
) -> None:
    step, mine = spoilt_step(tmp_path / "where"), net(where)
    says = f"step {step}: loss term 'fit' is nan: not finite, first in sample {BAD} "
    says = says if where == "loss" else f"step {step}: its losses are finite, but a gradient is not "
    with pytest.raises(FloatingPointError, match=says + r"\(read at step 6\)"):
        fit(tmp_path, NonFinite(), net=mine, **on(device))
    assert ledger(tmp_path)[0]["step"] == step and ledger(tmp_path)[0]["action"] == "raise"
    reference = net(where)
    fit(tmp_path / "cpu", NonFinite("skip"), net=reference, max_epochs=1)
    close(mine, reference, device)


def test_it_looks_where_a_step_is_logged(tmp_path: Path, device: Any) -> None:
    step = spoilt_step(tmp_path / "where")
    with pytest.raises(FloatingPointError, match=rf"\(read at step {step + 1}\)"):
        fit(tmp_path, NonFinite(), net=net(), **on(device, log_every_n_steps=1))


@pytest.mark.parametrize("fused", [True, False])
def test_nothing_is_saved_of_a_step_that_was_not_finite(tmp_path: Path, fused: bool, device: Any) -> None:
    step, mine = spoilt_step(tmp_path / "where"), net(fused=fused)
    with pytest.raises(FloatingPointError, match=f"step {step}: "):
        fit(tmp_path, NonFinite(), Resume(every=1, keep=99), net=mine, **on(device))
    points = sorted((tmp_path / "resume").glob("step-*.ckpt"))
    assert [int(p.stem[5:]) for p in points] == list(range(1, step + 1))
    for point in points:
        saved = plain.load_plain(point, map_location="cpu")["state_dict"]
        assert all(x.isfinite().all() for x in saved.values())
    if not fused:  # the sham: there was something that must not be saved
        assert any(x.isnan().any() for x in weights(mine).values())


def test_skip_reads_once_a_step_and_leaves_out_what_it_does_on_the_cpu(tmp_path: Path, device: Any) -> None:
    mine, reference = net(), net()
    fit(tmp_path, NonFinite("skip"), net=mine, **on(device, max_epochs=2))
    fit(tmp_path / "cpu", NonFinite("skip"), net=reference, max_epochs=2)
    assert ledger(tmp_path) == ledger(tmp_path / "cpu")
    close(mine, reference, device)


def test_without_the_callback_a_recipe_tells_at_the_next_step_that_is_logged(tmp_path: Path, device: Any) -> None:
    # the emulated device cannot take parameters back while the error holds the graph, and says that instead
    with pytest.raises((FloatingPointError, RuntimeError)) as caught:
        fit(tmp_path, net=net(), **on(device, log_every_n_steps=2))
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, FloatingPointError):
        error = error.__cause__ or error.__context__
    assert str(error) == "loss term 'fit' is nan: not finite"


def test_a_step_tells_which_micro_batch_was_not_finite(device: Any) -> None:
    step = Step(faults=Faults(raises=False))
    for values in ([1.0, 2.0], [1.0, float("inf")], [3.0, 4.0]):
        batch = Batch({}, {"image": torch.ones(2, dtype=torch.bool)}, index=torch.tensor([5, 6])).to(device.device)
        x_B = torch.tensor(values).to(device.device).requires_grad_()
        step({"a": Term(x_B, given=("image",)), "b": Term(2 * x_B.detach(), given=("image",))}, batch).total.backward()
        assert x_B.grad is not None
        assert bool(x_B.grad.isnan().all()) == (values[1] == float("inf"))
    assert not step.faults.terms and len(step.faults.unread) == 3
    step.faults.read()
    assert step.faults.terms == {"a": (float("inf"), [6]), "b": (float("inf"), [6])} and not step.faults.unread
    step.faults.raises = True
    with pytest.raises(FloatingPointError, match="loss term 'a' is inf: not finite"):
        step.faults.require_finite()
    step.faults.require_finite()
