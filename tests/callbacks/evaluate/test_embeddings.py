"""The evaluators on embeddings made by hand: the toy recipe's embedding is its input, less the data's offset."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from descant.callbacks import KNN, Geometry, LinearProbe, Retrieval, ZeroShot
from descant.callbacks.evaluate.embeddings import EmbeddingEvaluator, Rows, Store
from descant.modules.core.batch import Batch
from descant.modules.evaluation.items import Items
from descant.modules.evaluation.metrics import recall_by_chance, retrieval_ranks
from tests.ranks import run_ranks
from tests.tolerance import F32, ulps

OFFSET = 5.0  # what the data module takes off on the device: forgetting the hook moves every embedding


class Recipe(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.eye(4))
        self.embedded = 0  # rows

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        assert not self.training and not torch.is_grad_enabled()
        present = batch.present
        self.embedded += len(batch)
        z = {m: F.normalize(x.to(self.turn) @ self.turn, dim=-1) for m, x in batch.inputs.items()}
        return {m: torch.where(present[m][:, None], z_BD, torch.zeros_like(z_BD)) for m, z_BD in z.items()}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return 0 * self.turn.sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return {"z": self.embed(batch)}

    test_step = validation_step


class Data(L.LightningDataModule):
    """Sets by name, each a whole batch that is cut into small ones with some padding rows between."""

    def __init__(self, sets: dict[str, Batch], bank: Any = None, prompts: Any = None, size: int = 5) -> None:
        super().__init__()
        self.sets, self.bank, self.ids, self.size = sets, bank, prompts, size
        self.asked = 0

    def evaluation_sets(self, stage: str) -> dict[str, Batch]:
        self.asked += 1
        return self.sets

    def loader(self, whole: Batch) -> DataLoader[Any]:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        rows = torch.arange(rank, len(whole), world)
        batches: Any = []
        for part in torch.split(rows, self.size):
            batch = whole.select(torch.cat([part, part[:2]]))
            for present in batch.present.values():
                present[len(part) :] = False  # padding repeats content, and is absent everywhere
            for x in batch.inputs.values():
                x += OFFSET
            batches.append(batch)
        return DataLoader(batches, batch_size=None)

    def train_dataloader(self) -> DataLoader[Any]:
        data: Any = torch.zeros(2, 1)
        return DataLoader(data)

    def val_dataloader(self) -> Any:
        return [self.loader(whole) for whole in self.sets.values()]

    test_dataloader = val_dataloader

    def bank_dataloader(self) -> DataLoader[Any]:
        return self.loader(self.bank)

    def prompts(self, target: str) -> tuple[Tensor, list[str]]:
        if target != "group":
            raise ValueError(f"target: {target!r} is not one of group")
        return self.ids, [str(i) for i in range(len(self.ids))]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if isinstance(batch, Batch):
            for x in batch.inputs.values():
                x -= OFFSET
        return batch


def make(
    n: int = 23, seed: int = 0, keys: int = 8, classes: int = 3, absent: float = 0.3, signal: float = 0.0
) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(n) % classes
    x = {m: torch.randn(n, 4, generator=generator) for m in ("image", "text")}
    x["image"][:, :classes] += signal * F.one_hot(label, classes)
    present = {m: torch.rand(n, generator=generator) >= absent for m in ("image", "text")}
    present["image"] |= ~present["text"]  # no row is absent everywhere, or it would be padding
    key = torch.randint(keys, (n,), generator=generator)
    index = torch.randperm(1000, generator=generator)[:n]
    return Batch(x, present, {"group": label}, index=index, content_id=key)


def trainer(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "accelerator": "cpu", "devices": 1, "max_epochs": 1}
    return L.Trainer(callbacks=list(callbacks), **{**quiet, **options})


def evaluate(
    data: L.LightningDataModule,
    *callbacks: L.Callback,
    stage: str = "validate",
    recipe: L.LightningModule | None = None,
    **options: Any,
) -> dict[str, float]:
    run = trainer(*callbacks, **options)
    getattr(run, stage)(recipe or Recipe(), datamodule=data, verbose=False)
    return {key: float(value) for key, value in run.callback_metrics.items()}


def brute_ranks(whole: Batch, a: str, b: str) -> tuple[Tensor, list[int], list[float]]:
    """How many stand before the best right row, the key of each query, and its share of right rows, by loops."""
    z = {m: F.normalize(x, dim=-1) for m, x in whole.inputs.items()}
    gallery = [j for j in range(len(whole)) if whole.present[b][j]]
    ranks, keys, shares = [], [], []
    for i in range(len(whole)):
        right = [float(z[a][i] @ z[b][j]) for j in gallery if whole.content_id[j] == whole.content_id[i]]
        wrong = [float(z[a][i] @ z[b][j]) for j in gallery if whole.content_id[j] != whole.content_id[i]]
        if whole.present[a][i] and right:
            ranks.append(sum(s >= max(right) for s in wrong))
            keys.append(int(whole.content_id[i]))
            shares.append(len(right) / len(gallery))
    return torch.tensor(ranks), keys, shares


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_retrieval_equals_two_loops_on_two_sets(stage):
    data = Data({"one": make(seed=0), "two": make(n=31, seed=1, keys=30)})
    values = evaluate(data, Retrieval(at=[1, 3]), stage=stage)
    names = [f"{d}_{k}" for d in ("i2t", "t2i") for k in ("r1", "r3")]
    kinds = ("", "distinct/", "chance/")
    assert sorted(values) == sorted(
        [f"{s}/{kind}{name}" for s in ("one", "two") for kind in kinds for name in names]
        + [f"{s}/{d}_medr" for s in ("one", "two") for d in ("i2t", "t2i")]
    )
    for name, whole in data.sets.items():
        for a, b, direction in (("image", "text", "i2t"), ("text", "image", "t2i")):
            ranks, keys, shares = brute_ranks(whole, a, b)
            for k in (1, 3):
                hits = [float(rank < k) for rank in ranks]
                each = [
                    sum(h for h, key in zip(hits, keys, strict=True) if key == one) / keys.count(one) for one in {*keys}
                ]
                for kind, expected in (("", sum(hits) / len(hits)), ("distinct/", sum(each) / len(each))):
                    assert abs(values[f"{name}/{kind}{direction}_r{k}"] - expected) < ulps(8, F32)
            assert abs(values[f"{name}/chance/{direction}_r1"] - sum(shares) / len(shares)) < ulps(8, F32)
            assert values[f"{name}/{direction}_medr"] == float(ranks.double().quantile(0.5)) + 1
    # the numbers can tell the sets and directions apart
    assert len({values[f"{s}/{d}_r3"] for s in ("one", "two") for d in ("i2t", "t2i")}) > 2
    assert data.asked == 1


def test_chance_is_the_mean_of_random_embeddings():
    """Mean of 400 random orders, within four standard errors; equal keys are right for each other."""
    keys, found, k = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3, 4, 5]), [], 3
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        z = torch.randn(2, len(keys), 8, generator=generator)
        found.append(float((retrieval_ranks(z[0], keys, z[1], keys) < k).double().mean()))
    right_Q = (keys[:, None] == keys).sum(1)
    chance = float(recall_by_chance(right_Q, len(keys), k).mean())
    error = float(torch.tensor(found).std()) / 400**0.5
    assert abs(sum(found) / 400 - chance) < 4 * error and abs(chance - k / len(keys)) > 0.1


def test_equally_frequent_captions_have_no_distinct_metric():
    whole = make(absent=0.0, n=24)
    whole.content_id[:] = torch.arange(24) // 2
    assert not [name for name in evaluate(Data({"val": whole}), Retrieval(at=[1])) if "distinct" in name]


def test_retrieval_of_a_collapsed_recipe_is_zero():
    whole = make(absent=0.0, keys=1000)
    for x in whole.inputs.values():
        x[:] = 1.0
    values = evaluate(Data({"val": whole}), Retrieval(at=[1, 100]))
    assert values["val/i2t_r1"] == 0 and values["val/i2t_medr"] == 23
    assert values["val/i2t_r100"] == 1  # a hundred of twenty-three holds it


def test_a_broken_recipe_misses_at_any_k():
    whole = make(absent=0.0)
    whole.inputs["image"][:] = torch.nan
    values = evaluate(Data({"val": whole}), Retrieval(at=[100]), Geometry())
    assert values["val/i2t_r100"] == values["val/t2i_r100"] == 0
    assert values["val/rank_image"] != values["val/rank_image"]


def test_one_embedding_serves_all_evaluators_without_padding():
    data, recipe = Data({"val": make()}, bank=make(seed=7)), Recipe()
    evaluators = (Retrieval(), Geometry(), KNN("group", k=3), KNN("group", k=1, modality="text"), LinearProbe("group"))
    seen: list[Rows] = []

    class Spy(EmbeddingEvaluator):
        def evaluate(
            self, trainer: L.Trainer, pl_module: L.LightningModule, sets: dict[str, Rows]
        ) -> dict[str, Tensor]:
            seen.append(sets["val"])
            return {}

    values = evaluate(data, *evaluators, Spy(), Spy(), recipe=recipe)
    # 23 rows in 5 batches, each with 2 rows of padding: once for the set and once for the bank
    assert recipe.embedded == 2 * (23 + 5 * 2)
    assert seen[0] is seen[1] and len(seen[0]) == 23
    whole, order = data.sets["val"], data.sets["val"].index.argsort()
    assert torch.equal(seen[0].index, whole.index[order]) and torch.equal(seen[0].key, whole.content_id[order])
    for m in ("image", "text"):
        assert torch.equal(seen[0].present[m], whole.present[m][order])
        z_ND = F.normalize(whole.inputs[m], dim=-1) * whole.present[m][:, None]
        torch.testing.assert_close(seen[0].z[m], z_ND[order], rtol=0, atol=ulps(16, F32))
    assert {"val/knn_group_top1", "val/knn_group_text_top1", "val/probe_group_top1"} < set(values)
    assert all(
        not evaluator._stores and evaluator._bank is None for evaluator in evaluators
    )  # training gets the memory back


def test_knn_equals_two_loops_over_the_bank():
    data = Data({"val": make(n=40, signal=1.0)}, bank=make(n=60, seed=3, signal=1.0))
    value = evaluate(data, KNN("group", k=5, temperature=0.2))["val/knn_group_top1"]
    z, bank = (F.normalize(b.inputs["image"], dim=-1) for b in (data.sets["val"], data.bank))
    right = []
    for i in data.sets["val"].present["image"].nonzero().flatten():
        rows = [j for j in range(60) if data.bank.present["image"][j]]
        votes = torch.zeros(3)
        for j in sorted(rows, key=lambda j: -float(z[i] @ bank[j]))[:5]:
            votes[data.bank.targets["group"][j]] += (z[i] @ bank[j] / 0.2).exp()
        right.append(bool(votes.argmax() == data.sets["val"].targets["group"][i]))
    assert abs(value - sum(right) / len(right)) < ulps(8, F32)
    assert 0.5 < value < 1


def test_the_probe_is_perfect_on_separable_classes_and_at_chance_on_shuffled_labels():
    data = Data({"val": make(n=120, signal=30.0, absent=0.0)}, bank=make(n=120, seed=3, signal=30.0, absent=0.0))
    assert evaluate(data, LinearProbe("group"))["val/probe_group_top1"] == 1
    generator, values = torch.Generator().manual_seed(0), []
    for _ in range(20):  # three tight clusters: one permutation gives a third of them or two by luck
        shuffled = torch.randperm(120, generator=generator)
        data.bank.targets["group"] = data.bank.targets["group"][shuffled]
        values.append(evaluate(data, LinearProbe("group"))["val/probe_group_top1"])
    assert abs(sum(values) / 20 - 1 / 3) < 0.15


def test_rows_without_a_label_are_neither_fitted_nor_evaluated():
    data = Data({"val": make(n=30, absent=0.0)}, bank=make(n=30, absent=0.0))
    assert evaluate(data, KNN("group", k=1))["val/knn_group_top1"] == 1  # every row finds itself
    data.bank.targets["group"][::2] = -1
    data.sets["val"].targets["group"][1::2] = -1
    assert evaluate(data, KNN("group", k=1))["val/knn_group_top1"] < 1
    data.sets["val"].targets["group"] = make(n=30).targets["group"]
    data.sets["val"].targets["group"][::2] = -1
    assert evaluate(data, KNN("group", k=1))["val/knn_group_top1"] == 1


def test_zero_shot_takes_the_mean_of_normalised_prompts():
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(-9, 9, (7, 3, 4), generator=generator)  # the toy "embeds" four token ids
    data = Data({"val": make(n=50, classes=4), "more": make(n=20, seed=2, classes=2)}, prompts=prompts)
    values = evaluate(data, ZeroShot("group"))
    w_CD = F.normalize(F.normalize(prompts.float(), dim=-1).mean(1), dim=-1)
    for name, whole in data.sets.items():
        rows = whole.present["image"]
        order = (F.normalize(whole.inputs["image"][rows], dim=-1) @ w_CD.T).argsort(1, descending=True)
        right = order == whole.targets["group"][rows][:, None]
        assert abs(values[f"{name}/zeroshot_group_top1"] - float(right[:, 0].double().mean())) < ulps(8, F32)
        assert abs(values[f"{name}/zeroshot_group_top5"] - float(right[:, :5].any(1).double().mean())) < ulps(8, F32)
        recalls = [float(right[whole.targets["group"][rows] == c, 0].double().mean()) for c in range(4)]
        recalls = [recall for recall in recalls if recall == recall]  # classes that do not occur have none
        assert abs(values[f"{name}/zeroshot_group_balanced"] - sum(recalls) / len(recalls)) < ulps(8, F32)


def test_geometry_pairs_rows_by_key_where_no_row_has_both():
    whole = make(n=20, absent=0.0, keys=1000)
    both = evaluate(Data({"val": whole}), Geometry())
    assert sorted(both) == [
        f"val/{k}"
        for k in (
            *("align_image_text", "gap_image_text", "rank_image", "rank_text"),
            *("std_image", "std_text", "uniform_image", "uniform_text"),
        )
    ]
    z = {m: F.normalize(x, dim=-1) for m, x in whole.inputs.items()}
    assert abs(both["val/gap_image_text"] - float((z["image"].mean(0) - z["text"].mean(0)).norm())) < ulps(16, F32)
    # the same content as forty rows of one modality each
    split = whole.select(torch.arange(20).repeat(2))
    split.present["image"][20:] = False
    split.present["text"][:20] = False
    split.index = torch.arange(40)
    apart = evaluate(Data({"val": split}), Geometry())
    assert both == pytest.approx(apart, rel=ulps(16, F32), abs=ulps(16, F32))


def test_evaluators_use_no_random_numbers_of_the_run():
    def draw(*callbacks: L.Callback) -> list[float]:
        class Draws(L.Callback):
            def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
                drawn.append(float(torch.rand(())))

        L.seed_everything(3, verbose=False)
        drawn: list[float] = []
        data = Data({"val": make()}, bank=make(seed=1), prompts=torch.randint(9, (3, 2, 4)))
        evaluate(data, *callbacks, Draws())
        return drawn

    evaluators = Retrieval(), ZeroShot("group"), KNN("group", k=3), LinearProbe("group"), Geometry()
    assert draw() == draw(*evaluators)


class Counts(KNN):
    fitted = 0

    def score(self, *args: Any) -> dict[tuple[str, str], Items]:
        self.fitted += 1
        return super().score(*args)


def test_every_skips_evaluations_but_not_the_last():
    data = Data({"val": make()}, bank=make(seed=1))
    knn = Counts("group", k=3, every=3)
    run = trainer(knn, max_epochs=5, num_sanity_val_steps=0)
    run.fit(Recipe(), datamodule=data)
    assert knn.evaluations == 5 and knn.fitted == 3  # evaluations 1, 4 and, as the last, 5
    assert "val/knn_group_top1" in run.callback_metrics
    other = Counts("group", k=3, every=3)
    other.load_state_dict(knn.state_dict())
    assert other.evaluations == 5 and other.state_key == knn.state_key != Counts("group", k=4).state_key


def test_the_sanity_check_runs_evaluators_and_a_fit_logs_by_epoch(tmp_path):
    data = Data({"one": make(), "two": make(seed=2)}, bank=make(seed=1), prompts=torch.randint(9, (3, 2, 4)))
    logger = L.pytorch.loggers.CSVLogger(tmp_path)
    evaluators = Retrieval(), ZeroShot("group"), KNN("group", k=3), LinearProbe("group"), Geometry()
    run = trainer(*evaluators, logger=logger, max_epochs=2, num_sanity_val_steps=2)
    run.fit(Recipe(), datamodule=data)
    header, *lines = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    assert len(lines) == 2 and "one/i2t_r1" in header and "two/probe_group_top1" in header
    assert "dataloader_idx" not in header
    with pytest.raises(ValueError, match="no target 'colour' in the data; it has group"):
        trainer(KNN("colour"), max_epochs=1, num_sanity_val_steps=1).fit(Recipe(), datamodule=data)


def test_sets_without_names_are_numbered():
    class Plain(L.LightningDataModule):
        def val_dataloader(self) -> Any:
            data = Data({"a": make(), "b": make(seed=1)})
            return data.val_dataloader()

        test_dataloader = val_dataloader

    values = evaluate(Plain(), Retrieval(at=[1]))
    assert {key.split("/")[0] for key in values} == {"val0", "val1"}
    values = evaluate(Plain(), Retrieval(at=[1]), stage="test")
    assert {key.split("/")[0] for key in values} == {"test0", "test1"}


def test_missing_protocols_and_names_are_one_line():
    class Mute(L.LightningModule):
        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            return None

    class Silent(Recipe):
        def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return torch.zeros(())

    data = Data({"val": make()}, bank=make(), prompts=torch.zeros(2, 1, 4))
    faults: list[tuple[L.LightningModule, EmbeddingEvaluator, str]] = [
        (Mute(), Retrieval(), r"Retrieval needs the protocol Embeds \(embed\); Mute lacks it"),
        (Silent(), Geometry(), "Geometry reads the embeddings that validation_step returns .*; Silent returned Tensor"),
        (Recipe(), Retrieval([["image", "sound"]]), "no embedding of 'sound'; the recipe has image, text"),
        (Recipe(), LinearProbe("group", modality="sound"), "no embedding of 'sound'"),
        (Recipe(), ZeroShot("colour"), "'colour' is not one of group"),
    ]
    for recipe, evaluator, line in faults:
        with pytest.raises(ValueError, match=line) as error:
            evaluate(data, evaluator, recipe=recipe)
        assert "\n" not in str(error.value)

    class Bare(L.LightningDataModule):
        def val_dataloader(self) -> Any:
            return []

    missing: list[tuple[EmbeddingEvaluator, str]] = [(KNN("group"), "bank_dataloader"), (ZeroShot("group"), "prompts")]
    for evaluator, method in missing:
        with pytest.raises(ValueError, match=rf"needs {method}\(\) of the data module; Bare has none"):
            evaluate(Bare(), evaluator)


def test_stores_of_two_ranks_merge_into_the_whole():
    whole = make()
    halves = [torch.arange(0, 23, 2), torch.arange(1, 23, 2)]
    stores = [Store(), Store()]
    for store, rows in zip(stores, halves, strict=True):
        store.update({m: x[rows] for m, x in whole.inputs.items()}, whole.select(rows))
    one = Store()
    one.update(whole.inputs, whole)
    stores[0].merge_state(stores[1])
    merged, alone = stores[0].compute(), one.compute()
    assert torch.equal(merged.index, alone.index)
    assert all(torch.equal(merged.z[m], alone.z[m]) for m in alone.z)
    assert torch.equal(
        retrieval_ranks(merged.z["image"], merged.key, merged.z["text"], merged.key),
        retrieval_ranks(alone.z["image"], alone.key, alone.z["text"], alone.key),
    )


def _ranked(rank: int | None) -> dict[str, float]:
    data = Data({"one": make(), "two": make(n=30, seed=1)}, bank=make(n=50, seed=2), prompts=PROMPTS)
    evaluators = Retrieval(at=[1, 3]), ZeroShot("group"), KNN("group", k=3), LinearProbe("group"), Geometry()
    options: dict[str, Any] = (
        {} if rank is None else {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
    )
    return evaluate(data, *evaluators, **options)


PROMPTS = torch.randint(-9, 9, (3, 2, 4), generator=torch.Generator().manual_seed(0))


@pytest.mark.ddp
def test_two_ranks_log_the_same_as_one():
    alone = _ranked(None)
    for values in run_ranks(2, _ranked):
        assert values == pytest.approx(alone, rel=ulps(16, F32), abs=ulps(16, F32))
