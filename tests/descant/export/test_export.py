"""``descant export`` of a run, and loading it back: ``descant.load``, ``Embedder``."""

from __future__ import annotations

import ast
import io
import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import descant
from descant.__main__ import main
from descant.callbacks.logs.report import read_json
from descant.datamodules import prepared
from descant.datamodules.prepared import prepare_image
from descant.export import loading
from descant.modules.adaptation.saved_tower import SavedTower
from descant.modules.core.batch import Batch
from descant.modules.io import names, saved
from descant.modules.io.lean import base_of, lean
from descant.recipes import Contrastive
from descant.run import portable
from tests.conftest import Result
from tests.rotation import quick
from tests.tolerance import F32, ulps

Cli = Callable[..., Result]
BERT = dict(
    model_type="bert",
    vocab_size=40,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=16,
)
CONV = {"class_path": "descant.modules.towers.ConvTower", "init_args": {"widths": [8, 16]}}
TEXT = torch.tensor([[1, 5, 9, 2, 0, 0], [1, 7, 2, 0, 0, 0]])
PICTURES = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
SMALL = (
    *("--config", "contrastive/emoji", "--config", "on/tiny", "--model.width", "16", "--data.size", "16"),
    *("--data.text", "NgramTokenizer", "--data.text.buckets", "512", "--model.towers.text.vocab", "512"),
    *("--model.towers.image.widths", "[8,16]"),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """``runs/emoji/001``, trained for two steps."""
    from jsonargparse import _common

    before = dict(_common.parsing_settings)
    root = tmp_path_factory.mktemp("made") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root.parent)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as err:
            rc = main(["fit", *SMALL, "--name", "emoji", "--test", "true"])
        assert rc == 0, err.getvalue()
        yield root
    _common.parsing_settings.clear()
    _common.parsing_settings.update(before)


@pytest.fixture
def here(cli: Cli, runs: Path, workplace: Path) -> Path:
    """A working folder that holds a copy of the runs."""
    shutil.copytree(runs, workplace / "runs", symlinks=True)
    return workplace


def by_hand(
    folder: Path, text: dict[str, Any], adapt: list[dict[str, Any]] | None = None, **options: Any
) -> Contrastive:
    """A run folder of a conv net and a text tower, as if trained: every trainable weight has moved."""
    towers = {"class_path": "descant.modules.towers.Towers", "init_args": {"image": CONV, "text": text}}
    arguments = {"towers": towers, "width": 8, "adapt": adapt, **options}
    model = {"class_path": "descant.recipes.Contrastive", "init_args": arguments}
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": model}))
    torch.manual_seed(3)
    recipe = saved.build(Contrastive, model, folder)
    recipe.configure_model()
    with torch.no_grad():
        for parameter in recipe.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    torch.save({"state_dict": recipe.state_dict(), "global_step": 5}, folder / "checkpoints/last.ckpt")
    return recipe.eval()


def tower(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": names.full(name) or name, "init_args": arguments}


def adapt(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": names.full(name), "init_args": arguments}


def embedded(recipe: Any) -> torch.Tensor:
    """Both modalities of two samples, one below the other."""
    present = torch.ones(2, dtype=torch.bool)
    batch = Batch({"image": PICTURES, "text": TEXT}, {"image": present, "text": present})
    with torch.no_grad():
        return torch.cat(list(recipe.embed(batch).values()))


# load ---------------------------------------------------------------------------------------------------------------


def test_a_loaded_run_embeds_as_in_its_evaluation(cli: Cli, here: Path) -> None:
    assert cli("predict", "--run", "emoji/001", "--sets", "val").rc == 0
    table = pq.read_table(here / "runs/emoji/001/predict-001/embeddings-val.parquet").to_pylist()
    kept = {(m, row["index"]): row[f"z_{m}"] for row in table for m in ("image", "text") if row[f"z_{m}"] is not None}
    with loading.trusting(()):
        data: Any = loading.datamodule(saved.find(here / "runs/emoji/001"))
    recipe = descant.load("runs/emoji/001")
    assert not recipe.training and type(recipe.towers["image"]).__name__ == "ConvTower"
    seen = 0
    for batch in data.evaluation_loader(data.evaluation_sets("validate")["val"]):
        with torch.inference_mode():
            z = recipe.embed(data.on_after_batch_transfer(batch, 0))  # type: ignore[operator]
        for modality in z:
            for row in batch.present[modality].nonzero().flatten().tolist():
                assert torch.equal(z[modality][row], torch.tensor(kept[modality, int(batch.index[row])]))
                seen += 1
    assert seen == len(kept) > 100


def test_loading_restores_global_settings(here: Path) -> None:
    from jsonargparse import _common

    torch.manual_seed(0)
    wanted, before = torch.randn(3), dict(_common.parsing_settings)
    torch.manual_seed(0)
    descant.load("runs/emoji/001")
    assert torch.equal(torch.randn(3), wanted) and _common.parsing_settings == before


@pytest.mark.parametrize("root", ["runs/emoji", "emoji"])
@pytest.mark.parametrize("path", ["", "latest", "001", "001/resume/step-0000002.ckpt"])
def test_every_way_to_name_a_run(here: Path, path: str, root: str) -> None:
    average = torch.load(here / "runs/emoji/001/resume/step-0000002.ckpt", weights_only=True)
    state = descant.load(Path(root) / path).state_dict()
    assert all(torch.equal(state[key], value) for key, value in average["state_dict"].items())
    assert any(not torch.equal(state[key], value) for key, value in average["current_model_state"].items())


def test_a_class_outside_the_allow_list_needs_trust(tmp_path: Path) -> None:
    by_hand(tmp_path, tower("BagTower", vocab=40, width=8))
    file = tmp_path / "config.yaml"
    file.write_text(file.read_text().replace(str(names.full("BagTower")), "somewhere.else.Tower"))
    with pytest.raises(ValueError, match=r"somewhere.else.Tower is outside the allow-list"):
        descant.load(tmp_path)
    with pytest.raises(ValueError, match=r"somewhere") as caught:
        descant.load(tmp_path, trust=["somewhere"])
    assert "\n" not in str(caught.value)


# export -------------------------------------------------------------------------------------------------------------


def test_an_export_is_self_contained(cli: Cli, here: Path) -> None:
    before = descant.Embedder("runs/emoji/001")
    z = before.texts(["a red apple", "sun"]), before.images([Image.new("RGB", (40, 20), "red")])
    result = cli("export", "emoji/001", "--out", "out/model")
    assert result.rc == 0, result.err
    assert "loaded back and equal" in result.out and "out/model" in result.out
    names = {path.name for path in (here / "out/model").iterdir()}
    assert names >= {"model.safetensors", "config.yaml", "preprocess.yaml", "metrics.json", "README.md"}
    assert not any(path.name.startswith(".") for path in (here / "out").iterdir())
    text = "".join(p.read_text() for p in (here / "out/model").iterdir() if p.suffix != ".safetensors")
    assert str(here) not in text and "trainer" not in text
    shutil.rmtree(here / "runs")
    (here / "elsewhere").mkdir()
    (here / "out/model").rename(here / "elsewhere/moved")
    after = descant.Embedder("elsewhere/moved")
    assert torch.equal(after.texts(["a red apple", "sun"]), z[0])
    assert torch.equal(after.texts("sun"), after.texts(["sun"])), "one text, not its letters"
    picture = Image.new("RGB", (40, 20), "red")
    assert torch.equal(after.images([picture]), z[1]) and torch.equal(after.images(picture), z[1])
    (here / "plain").touch()
    modes = {path.stat().st_mode & 0o777 for path in (here / "elsewhere/moved").iterdir() if path.is_file()}
    assert modes == {(here / "plain").stat().st_mode & 0o777}


def test_the_model_card_has_the_runs_metrics_and_working_code(cli: Cli, here: Path) -> None:
    assert cli("export", "emoji/001", "--out", "model").rc == 0
    card = (here / "model/README.md").read_text()
    metrics = read_json(here / "runs/emoji/001/metrics.json")
    for key in ("vendor/i2t_r10", "concept/t2i_r1", "both/i2t_r5"):
        assert f"{metrics[key]:.4g}" in card, key
    revision = read_json(here / "runs/emoji/001/versions.json")["revision"]
    for word in ("Contrastive", "ConvTower", "moving average", "step 2", "| seed | 0 |", "Emoji", "AdamW(lr 0.003"):
        assert word in card, word
    assert revision is None or revision in card
    assert "CC-BY-SA" in (here / "model/DATA-NOTICE.md").read_text() and "DATA-NOTICE.md" in card
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert snippet is not None
    scope: dict[str, Any] = {}
    exec(snippet[1], scope)
    assert scope["z_ND"].shape == (2, 16) and torch.allclose(
        scope["z_ND"].norm(dim=1), torch.ones(2), rtol=0, atol=ulps(16, F32)
    )
    (block,) = re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)
    spec = yaml.safe_load(block)["image"]["init_args"]
    assert SavedTower(**spec).width == 16


def test_metrics_of_other_weights_are_left_out(cli: Cli, here: Path) -> None:
    run = here / "runs/emoji/001"
    checkpoint = torch.load(run / "resume/step-0000002.ckpt", weights_only=True)
    torch.save({**checkpoint, "global_step": 1}, run / "resume/early.ckpt")
    assert cli("export", "emoji/001/resume/early.ckpt", "--out", "model").rc == 0
    kept = read_json(here / "model/metrics.json")
    assert kept["step"] == 1 and not any(key.startswith("vendor/") for key in kept)
    assert "Of the run's last weights, which are not these" in (here / "model/README.md").read_text()


def test_an_export_is_exported_again(cli: Cli, here: Path) -> None:
    assert cli("export", "emoji/001", "--out", "one").rc == 0
    assert cli("export", "one", "--out", "two").rc == 0
    one, two = load_file("one/model.safetensors"), load_file("two/model.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    for name in ("config.yaml", "preprocess.yaml", "metrics.json"):
        assert (here / "one" / name).read_text() == (here / "two" / name).read_text()
    assert "AdamW(lr 0.003" in (here / "two/README.md").read_text()


def test_nothing_is_overwritten_and_no_partial_export_stays(cli: Cli, here: Path) -> None:
    (here / "kept").mkdir()
    (here / "kept/mine").write_text("mine")
    assert "never overwrites" in cli("export", "emoji/001", "--out", "kept").refusal
    assert (here / "kept/mine").read_text() == "mine"
    before = {path.name for path in here.iterdir()}
    assert "contrast needs two modalities" in cli("export", "emoji/001", "--out", "new", "--towers", "image").refusal
    assert {path.name for path in here.iterdir()} == before


@pytest.mark.parametrize(
    "args,line",
    [
        (["emoji/009", "--out", "x"], "--run emoji/009: no such run under runs; nearest: emoji/001"),
        (["emoji/001", "--out", "x", "--towers", "imgae"], "--towers imgae: no such tower; nearest: image"),
        (["emoji/001", "--out", "x", "--ckpt", "first"], "first: no such checkpoint of"),
        (["emoji/001", "--otu", "x"], "export --otu: no such option; nearest: --out"),
        (["emoji/001"], "export: --out DIR is missing"),
        (["--out", "x"], "export: RUN is missing"),
        (["emoji/001/metrics.csv", "--out", "x"], "metrics.csv"),
    ],
)
def test_bad_requests_are_one_line(cli: Cli, here: Path, args: list[str], line: str) -> None:
    assert line in cli("export", *args).refusal
    assert not (here / "x").exists()


def test_help_is_short_and_imports_no_torch() -> None:
    code = "import sys; from descant.__main__ import main; main(['export', '--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) <= 30, done.stderr


def test_a_subset_of_towers(cli: Cli, workplace: Path) -> None:
    text = tower("BagTower", vocab=40, width=8)
    whole = by_hand(workplace / "run", text, pairs=None)
    config = yaml.safe_load((workplace / "run/config.yaml").read_text())
    config["model"]["init_args"]["towers"]["init_args"]["depth"] = {**CONV, "init_args": {"widths": [8], "channels": 1}}
    torch.manual_seed(3)
    whole = saved.build(Contrastive, config["model"], workplace)
    (workplace / "run/config.yaml").write_text(yaml.safe_dump(config))
    torch.save({"state_dict": whole.state_dict(), "global_step": 5}, workplace / "run/checkpoints/last.ckpt")
    assert cli("export", "run", "--out", "part", "--towers", "text,image").rc == 0
    part: Any = descant.load("part")
    assert list(part.towers) == ["image", "text"] and list(part.pairs) == ["image-text"]
    assert torch.equal(embedded(part), embedded(whole.eval()))
    assert not [key for key in load_file("part/model.safetensors") if "depth" in key]


# towers of transformers, adapters, quantised layers -------------------------------------------------------------------


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A local pretrained folder with its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ",", *["a", "red", "apple", "the", "sun", "moon"]]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    torch.manual_seed(5)
    config = {key: value for key, value in BERT.items() if key != "model_type"}
    BertModel(BertConfig(**config)).save_pretrained(tmp_path / "bert")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


LORA = adapt("Lora", r=2, towers=["text"])
CASES = {
    "plain": ([], 0.0),
    "lora": ([LORA], 1e-6),
    "dora": ([adapt("Lora", r=2, dora=True, towers=["text"])], 1e-6),
    "4bit": ([adapt("Quantize", bits=4, towers=["text"])], 1e-5),
    "qlora": ([adapt("Quantize", bits=4, towers=["text"]), LORA], 1e-5),
    "freeze": ([adapt("Freeze", towers=["text"], capacity=99)], 0.0),
}  # 8 ulps of float32 where weights are merged, 84 where they are unpacked from 4 bits


@pytest.mark.parametrize(("case", "merge"), quick(itertools.product(CASES, [False, True]), 4))
def test_adapted_pretrained_towers_load_without_their_folder(
    cli: Cli, bert: Path, workplace: Path, case: str, merge: bool
) -> None:
    parts, tolerance = CASES[case]
    recipe = by_hand(workplace / "run", tower("TransformersTower", folder=str(bert)), parts)
    wanted = embedded(recipe)
    result = cli("export", "run", "--out", "model", *(["--merge"] if merge else []))
    assert result.rc == 0, result.err
    shutil.rmtree(bert)
    shutil.rmtree(workplace / "run")
    loaded = descant.load("model")
    difference = (embedded(loaded) - wanted).abs().max()
    assert difference <= (tolerance if merge else 0.0)
    adapted = [key for key in loaded.state_dict() if "lora_" in key or "quant_state" in key]
    assert bool(adapted) == (case in ("lora", "dora", "4bit", "qlora") and not merge)
    assert ("peft or bitsandbytes" in (workplace / "model/README.md").read_text()) == bool(adapted)
    # what transformers makes of the tower's own folder
    from transformers import AutoModel

    theirs = AutoModel.from_pretrained("model/towers/text").eval()
    with torch.no_grad():
        ours = loaded.towers["text"](TEXT)
        mask = (TEXT != 0).long()
        h_BTD = theirs(TEXT, attention_mask=mask).last_hidden_state
    if case == "freeze":  # one pooled token a sample
        h_BTD = (h_BTD * mask[..., None]).sum(1, keepdim=True) / mask.sum(1)[:, None, None]
        # float32, through a layer or two of sums over some 32 numbers: 84 ulps
        assert (ours.h_BTD - h_BTD).abs().max() <= 1e-5
    else:
        assert (ours.h_BTD - h_BTD)[mask.bool()].abs().max() <= 1e-5  # so here


def test_a_lean_checkpoint_exports_whole(cli: Cli, bert: Path, workplace: Path) -> None:
    recipe = by_hand(workplace / "run", tower("TransformersTower", folder=str(bert)), [LORA])
    wanted, base = embedded(recipe), base_of(recipe)
    base = {key: value for key, value in base.items() if key.startswith("towers.text.")}
    file = workplace / "run/checkpoints/last.ckpt"
    whole = file.stat().st_size
    torch.save({"state_dict": lean(recipe.state_dict(), base), "global_step": 5}, file)
    assert file.stat().st_size < whole / 2
    assert torch.equal(embedded(descant.load("run")), wanted)
    inner = SavedTower(Path("run"), "text").eval()
    with torch.no_grad():
        assert (inner(TEXT).h_BTD - recipe.towers["text"](TEXT).h_BTD).abs().max() < 1e-5  # a layer or two, 84 ulps
    assert cli("export", "run", "--out", "model").rc == 0
    shutil.rmtree(bert)
    assert torch.equal(embedded(descant.load("model")), wanted)


def test_the_models_tokenizer_is_exported(cli: Cli, bert: Path, workplace: Path) -> None:
    by_hand(workplace / "run", tower("TransformersTower", folder=str(bert)))
    config = yaml.safe_load((workplace / "run/config.yaml").read_text())
    tokenizer = {
        "class_path": "descant.modules.tokenizers.text.PretrainedTokenizer",
        "init_args": {"folder": str(bert), "length": 6},
    }
    config["data"] = {
        "class_path": "descant.datamodules.corpora.emoji.Emoji",
        "init_args": {"text": tokenizer, "size": 16},
    }
    (workplace / "run/config.yaml").write_text(yaml.safe_dump(config))
    texts = ["a red apple", "the sun , the moon and more than fits"]
    wanted = descant.Embedder("run").texts(texts)
    assert cli("export", "run", "--out", "model").rc == 0
    shutil.rmtree(bert)
    assert torch.equal(descant.Embedder("model").texts(texts), wanted)
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained("model/towers/text")(texts[0]).input_ids
    assert ids == [2, 5, 6, 7, 3]


def test_a_nested_transformers_configuration_is_exported_as_a_folder(cli: Cli, workplace: Path) -> None:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 777.0},
    )
    torch.manual_seed(5)
    LlamaModel(config).save_pretrained(workplace / "llama")
    recipe = by_hand(workplace / "run", tower("TransformersTower", folder=str(workplace / "llama")))
    wanted = embedded(recipe)
    assert cli("export", "run", "--out", "model").rc == 0
    shutil.rmtree(workplace / "llama")
    assert torch.equal(embedded(descant.load("model")), wanted)


def test_a_tower_of_another_run_becomes_a_plain_one(cli: Cli, bert: Path, workplace: Path) -> None:
    by_hand(workplace / "first", tower("TransformersTower", folder=str(bert)), [LORA])
    text = tower("SavedTower", path=str(workplace / "first"), tower="text")
    for name, more in (("second", []), ("third", [adapt("Freeze", towers=["text"])])):
        wanted = embedded(by_hand(workplace / name, tower("Frozen", tower=text) if not more else text, more))
        assert cli("export", name, "--out", f"{name}-out").rc == 0
        assert "SavedTower" not in (workplace / f"{name}-out/config.yaml").read_text()
        shutil.move(workplace / "first", workplace / "hidden")
        assert torch.equal(embedded(descant.load(f"{name}-out")), wanted)
        shutil.move(workplace / "hidden", workplace / "first")


def test_card_code_parses(cli: Cli, bert: Path, workplace: Path) -> None:
    by_hand(workplace / "run", tower("TransformersTower", folder=str(bert)))
    assert cli("export", "run", "--out", "model").rc == 0
    card = (workplace / "model/README.md").read_text()
    for snippet in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        ast.parse(snippet)
    assert "not known to Descant" in card and "The run measured nothing." in card


# preprocessing ------------------------------------------------------------------------------------------------------


def pictures(folder: Path) -> Path:
    """A folder of pictures with captions."""
    folder.mkdir()
    lines = ["file,caption"]
    for n in range(6):
        Image.effect_noise((40 + n, 30), 90).convert("RGB").save(folder / f"{n}.png")
        lines.append(f"{n}.png,number {n}")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("kind", ["emoji", "own", "stamps"])
def test_raw_inputs_become_the_same_tensors(tmp_path: Path, kind: str) -> None:
    from descant.datamodules.corpora.emoji import Emoji
    from descant.datamodules.corpora.stamps import Stamps
    from descant.datamodules.user.user_data import UserData

    data: Any = {
        "emoji": lambda: Emoji(size=16),
        "own": lambda: UserData(batch_size=2, path=str(pictures(tmp_path / "mine"))),
        "stamps": lambda: Stamps(tiny=True),
    }[kind]()
    parts = prepared.parts(data)
    (tmp_path / "export").mkdir()
    nodes, left = portable.preprocess(parts, {}, tmp_path / "export")
    assert sorted(nodes) == ["audio"] * (kind == "stamps") + ["image", "text"] and not left
    (tmp_path / "export/preprocess.yaml").write_text(yaml.safe_dump(nodes))
    again = loading.preprocess(saved.Saved(tmp_path / "export", tmp_path / "export/model.safetensors", {}))
    assert again.keys() == nodes.keys()
    sound = tmp_path / "a.wav"
    soundfile.write(sound, np.sin(np.arange(9000) / 7), 22050)
    picture = Image.effect_noise((90, 50), 90).convert("RGB")
    for modality in nodes:
        ours, theirs = parts[modality], again[modality]
        if modality == "text":
            assert torch.equal(ours[0](["a red apple"]), theirs[0](["a red apple"]))
        elif modality == "image":
            assert torch.equal(prepare_image(ours, picture), prepare_image(theirs, picture))
        else:
            assert torch.equal(loading._features(ours[0], sound), loading._features(theirs[0], sound))


# in another run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", quick(["runs/emoji/001", "exported"], 2))
def test_a_run_trains_with_a_tower_of_another(cli: Cli, here: Path, path: str) -> None:
    if path == "exported":
        assert cli("export", "emoji/001", "--out", "exported").rc == 0
    inside = f"{{class_path: SavedTower, init_args: {{path: {path}, tower: image}}}}"
    (here / "lit.yaml").write_text(
        "model:\n  init_args:\n    towers:\n      init_args:\n        image:\n"
        f"          class_path: Frozen\n          init_args:\n            tower: {inside}\n"
    )
    small = [part for part in SMALL if part not in ("--model.towers.image.widths", "[8,16]")]
    result = cli("fit", *small, "--config", "lit.yaml", "--name", "lit", "--test", "false")
    assert result.rc == 0, result.err
    first, second = descant.load("runs/emoji/001"), descant.load("runs/lit/001")
    ours, theirs = second.towers["image"].state_dict(), first.towers["image"].state_dict()
    assert all(torch.equal(ours[f"tower.tower.{key}"], value) for key, value in theirs.items())
    assert cli("export", "lit/001", "--out", "lit-out").rc == 0
    shutil.rmtree(here / "runs/emoji")
    assert descant.load("lit-out").towers["image"].state_dict().keys() == {f"tower.{key}" for key in theirs}


def test_bad_towers_are_one_line_in_a_run(cli: Cli, here: Path) -> None:
    image = "{class_path: SavedTower, init_args: {path: runs/emoji/001, tower: imgae}}"
    (here / "bad.yaml").write_text(f"model: {{init_args: {{towers: {{init_args: {{image: {image}}}}}}}}}\n")
    small = [part for part in SMALL if part not in ("--model.towers.image.widths", "[8,16]")]
    assert "did you mean image?" in cli("fit", *small, "--config", "bad.yaml").refusal
    file = here / "runs/emoji/001/config.yaml"
    file.write_text(file.read_text().replace("descant.modules.towers.ConvTower", "os.system"))
    (here / "bad.yaml").write_text((here / "bad.yaml").read_text().replace("imgae", "image"))
    assert "class_path os.system is outside the allow-list" in cli("fit", *small, "--config", "bad.yaml").refusal
