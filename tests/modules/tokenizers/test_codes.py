"""Trained tokenizers of a run: its own codes and back. Runs are written by hand: a configuration and a checkpoint.

Letters: B samples, T ids.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from descant.modules.core.batch import Batch
from descant.modules.io import saved
from descant.modules.io.names import full
from descant.modules.masking.code_adapter import CodeAdapter
from descant.modules.tokenizers.codes import CodeTokenizer
from descant.recipes import Recipe

INPUTS = {"image": torch.randn(6, 3, 16, 16), "numbers": torch.randn(6, 5)}


def node(kind: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": full(kind), "init_args": arguments}


def write_run(folder: Path, *only: str) -> Any:
    """A run of pictures as 4 codes and vectors as 3 layers of codes, after a few steps."""
    towers = {
        "image": node("PatchTower", size=16, patch=8, width=8, depth=1, heads=2),
        "others": {"numbers": node("VectorTower", inputs=5, width=8, relu=False)},
    }
    adapters = {"image": node("PatchAdapter", size=[16, 16], patch=8)}
    adapters["numbers"] = node("PatchAdapter", size=[5], patch=5, channels=1, mean=1.0, spread=2.0)
    quantizers = {"image": node("VQ", codes=8, width=4), "numbers": node("RVQ", codes=6, layers=3, width=4)}
    tasks = {f"{m}s": node("QuantizedTokens", modality=m, adapter=adapters[m], quantizer=quantizers[m]) for m in INPUTS}
    tasks = {name: task for name, task in tasks.items() if name in only or not only}
    tasks["match"] = node("Contrast", pairs=[["image", "numbers"]])
    model = node("MultiTask", towers=node("Towers", **towers), objectives=tasks, width=8)
    recipe: Any = saved.build(Recipe, model, folder)
    for k in range(3):
        here = {m: torch.ones(6, dtype=torch.bool) for m in INPUTS}
        recipe(Batch(dict(INPUTS), here, rng_seed=torch.arange(6) + 10 * k))
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": model}))
    torch.save({"state_dict": recipe.state_dict(), "global_step": 3}, folder / "checkpoints/last.ckpt")
    return recipe.eval()


@pytest.mark.parametrize(("m", "length", "codes"), [("image", 4, 8), ("numbers", 3, 6)])
def test_codes_are_those_of_the_run_and_decode_as_it_does(tmp_path: Path, m: str, length: int, codes: int) -> None:
    recipe, x = write_run(tmp_path), INPUTS[m]
    tokenizer = CodeTokenizer.from_run(tmp_path, objective=f"{m}s")
    code_BT, task = tokenizer.encode(x), recipe.objectives[f"{m}s"]
    with torch.no_grad():
        found = task.quantizer(recipe.towers[m](x).h_BTD.flatten(0, 1))
        wanted = task.rebuild(found.id_NL.unflatten(0, (6, -1)))
    assert torch.equal(tokenizer.split(code_BT).flatten(0, 1), found.id_NL)
    assert torch.equal(task.quantizer.vectors(found.id_NL), found.z_NC)  # what the decoder read in training
    assert torch.equal(tokenizer.decode(code_BT), wanted.view_as(x))
    assert code_BT.dtype == torch.int64 and code_BT.shape == (6, length) == (6, tokenizer.length)
    assert (code_BT // codes == torch.arange(length) // (length // tokenizer.layers)).all()
    assert tokenizer.vocabulary == codes * tokenizer.layers and len(code_BT.unique()) > 3
    mark_BT = torch.arange(length).expand(6, length) < length // tokenizer.layers // 2
    assert tokenizer.cover(mark_BT).shape == x.shape and bool(tokenizer.real(x).all())
    adapter = CodeAdapter(tokenizer)
    raw_BTP, _ = adapter.raw(x)
    assert torch.equal(raw_BTP.squeeze(2), code_BT) and torch.equal(adapter.input(raw_BTP), wanted.view_as(x))
    parts = [*adapter.train().tokenizer.modules()]
    assert not any(part.training for part in parts) and not any(p.requires_grad for p in tokenizer.parameters())


def test_a_digest_is_of_what_gives_the_ids(tmp_path: Path) -> None:
    recipe = write_run(tmp_path, "images")
    one, other = (CodeTokenizer.from_run(tmp_path) for _ in range(2))
    assert one.digest() == other.digest()
    next(iter(other.parameters())).data[0] += 1
    assert one.digest() != other.digest()
    torch.save(
        {"state_dict": recipe.state_dict() | {"heads.image.other": torch.ones(1)}}, tmp_path / "checkpoints/b.ckpt"
    )
    assert CodeTokenizer.from_run(tmp_path, "b.ckpt").digest() == one.digest()


def test_one_line_says_which_run_objective_or_id_is_wrong(tmp_path: Path) -> None:
    write_run(tmp_path / "both")
    write_run(tmp_path / "none", "neither")
    with pytest.raises(ValueError, match="both: several tokenizers; give objective: images or numberss"):
        CodeTokenizer.from_run(tmp_path / "both")
    with pytest.raises(ValueError, match=r"objective 'image' of .*: no such name; did you mean images\?"):
        CodeTokenizer.from_run(tmp_path / "both", objective="image")
    with pytest.raises(ValueError, match="none: MultiTask of objectives match, none of them QuantizedTokens"):
        CodeTokenizer.from_run(tmp_path / "none")
    tokenizer = CodeTokenizer.from_run(tmp_path / "both", objective="numberss")
    code_BT: Tensor = tokenizer.encode(INPUTS["numbers"])
    code_BT[2, 1] = 12
    with pytest.raises(ValueError, match=r"codes \[2, 1\]: id 12, and layer 1 has 6 to 11"):
        tokenizer.decode(code_BT)
    with pytest.raises(ValueError, match=r"codes \[6, 2\]: this tokenizer has rows of 3 ids, 1 in 3 layers"):
        tokenizer.decode(code_BT[:, :2])
    with pytest.raises(ValueError, match=r"inputs 5: these vectors have the shape \(4,\)"):
        tokenizer.encode(torch.zeros(2, 4))
