"""The harness of the tables: rows are true, never computed twice, and the page shows what is stored."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from asked import asked
from small_nets import Chain, images

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import results_page
import tables

import singe_plugin

import harness
import headline
import records
from harness import LAYERS, PEERS, Spec
from settings import Setting


def data(seed: int) -> TensorDataset:
    batches = images(4, seed=seed)
    return TensorDataset(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))


@pytest.fixture
def setting() -> Setting:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return Chain(widths=(16, 24, 16)).eval()

    return Setting("net", make, data(0), data(1), data(2), "noise", 3)


def accuracy(model: nn.Module, dataset: Any) -> float:
    x, y = dataset.tensors
    return float((model.eval()(x).argmax(1) == y).float().mean())


@pytest.mark.parametrize("method", [*harness.OURS, *PEERS])
@pytest.mark.parametrize("options", [{}, LAYERS], ids=["rounds", "layers"])
def test_every_method_meets_the_target_in_both_orders(method: str, options: dict[str, Any], setting: Setting) -> None:
    row = harness.compute(Spec("net", method, 0.4, 0, options=options), setting)
    assert row["removed_params"] == pytest.approx(0.4, abs=0.01)
    assert 0 <= row["pruned"] <= 1
    assert row["scorings"] == (3 if options else 12)
    assert (row["passes_per_scoring"] is None) == (method in PEERS)


def test_the_widths_of_another_method_are_its_widths(setting: Setting) -> None:
    """Ranked by score, each method has widths of its own; with ``widths_of`` the other's."""
    clock = harness._Clock()
    own, theirs, crossed = (
        harness._channels(Spec("net", method, 0.4, 0, options=options), setting, clock)[0]
        for method, options in (("l2", {}), ("taylor", {}), ("l2", {"widths_of": "taylor"}))
    )
    assert [row.units_after for row in crossed.layers] == [row.units_after for row in theirs.layers]
    assert [row.units_after for row in crossed.layers] != [row.units_after for row in own.layers]
    chosen, others = (
        {(row["layer"], unit) for row in result.history.rows if row["event"] == "removed" for unit in row["units"]}
        for result in (crossed, theirs)
    )
    assert chosen != others  # l2's choice all the same


def test_the_accuracies_are_those_of_the_split(setting: Setting) -> None:
    for split, images_of in (("test", setting.test), ("held_out", setting.held_out)):
        row = harness.compute(Spec("net", "none", 0.0, 0, split=split), setting)
        assert row["pruned"] == pytest.approx(accuracy(setting.make(), images_of))


def test_the_accuracy_is_that_of_the_model_with_its_norms(setting: Setting) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        model = setting.make()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                    nn.init.uniform_(tensor, 0.2, 2)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        assert harness.accuracy("test", setting, model) == accuracy(model, setting.test)
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("every", ["post", "layer", "removal"])
def test_fine_tuning_takes_the_steps_that_were_asked_for(
    every: str, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    step = harness.Tuner._step
    monkeypatch.setattr(harness.Tuner, "_step", lambda *a: (steps.append(1), step(*a))[1])
    row = harness.compute(Spec("net", "l2", 0.4, 0, 9, every, LAYERS, batch=8), setting)
    assert len(steps) == 9
    assert ("pruned" in row) == (every == "post")
    assert "tuned" in row


def test_the_learning_rate_is_that_of_all_rows_or_the_one_given(setting: Setting) -> None:
    asked = (harness.finetuning(setting, Spec("net", "l1", 0.4, 0, options=o), 1, "end") for o in ({}, {"lr": 0.03}))
    assert [finetune.lr for finetune in asked] == [harness.RATE, 0.03]


def test_single_weights(setting: Setting) -> None:
    row = harness.compute(Spec("net", "ig", 0.8, 0, options={"rounds": 1}, granularity="weight"), setting)
    assert row["masked"] == pytest.approx(0.8, abs=0.005)
    assert row["scorings"] == 4  # one round of three convolutions and a head
    pattern = Spec("net", "l1", 0.5, 0, options={"rounds": 1, "pattern": "2:4"}, granularity="weight")
    assert harness.compute(pattern, setting)["masked"] == pytest.approx(0.5, abs=0.005)


def test_a_row_is_computed_once_and_a_broken_line_is_not_one(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[str] = []
    compute = harness.compute
    monkeypatch.setattr(harness, "compute", lambda spec, s: (computed.append(spec.method), compute(spec, s))[1])
    path = tmp_path / "rows.jsonl"
    specs = [Spec("net", method, 0.4, 0) for method in ("l1", "l2", "l1")]
    harness.run_rows(specs, setting, path)
    assert computed == ["l1", "l2"]
    path.write_text(path.read_text()[:-40])  # killed while writing
    harness.run_rows(specs, setting, path)
    assert computed == ["l1", "l2", "l2"]
    rows = records.read(path)
    assert [row["method"] for row in rows] == ["l1", "l2"]
    about = {"commit", "command", "device", "versions", "seed", "seconds", "peak_mb", "data", "weights"}
    assert about <= rows[0].keys()


def test_right_after_pruning_is_in_the_row_that_goes_on(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    options = {"rounds": 2}
    goes_on = Spec("net", "l2", 0.4, 0, 2, options=options, batch=8)
    harness.run_rows([goes_on], setting, path)
    alone = harness.compute(replace(goes_on, steps=0, batch=0), setting)
    monkeypatch.setattr(harness, "compute", lambda spec, s: {"pruned": 0.0})
    others = [replace(goes_on, steps=0, batch=0, **change) for change in ({"seed": 1}, {"options": {}})]
    harness.run_rows([replace(goes_on, steps=0, batch=0), *others], setting, path)
    rows = records.read(path)
    assert [row["key"] for row in rows] == [spec.key for spec in (goes_on, *others)]
    assert rows[0]["pruned"] == alone["pruned"]
    entwined = Spec("net", "l2", 0.4, 0, 2, "layer", options, batch=8)
    harness.run_rows([entwined, replace(entwined, steps=0, batch=0, every="post")], setting, tmp_path / "other.jsonl")
    assert len(records.read(tmp_path / "other.jsonl")) == 2


def test_an_error_is_a_row(setting: Setting, tmp_path: Path) -> None:
    harness.run_rows([Spec("net", "l1", 0.999, 0)], setting, tmp_path / "rows.jsonl")
    (row,) = records.read(tmp_path / "rows.jsonl")
    assert row["error"].startswith("BudgetError: ")
    assert row["seconds"] > 0
    assert row["peak_mb"] > 0
    assert results_page.cell([row], "pruned") == "BudgetError"


def test_what_was_measured_before_the_fine_tuning_failed_stays(setting: Setting, tmp_path: Path) -> None:
    setting.train.tensors[0].fill_(torch.inf)
    path = tmp_path / "rows.jsonl"
    harness.run_rows([Spec("net", "l1", 0.4, 0, steps=3, batch=4)], setting, path)
    (row,) = records.read(path)
    assert row["pruned"] == harness.compute(Spec("net", "l1", 0.4, 0), setting)["pruned"]
    assert row["error"].startswith("DataError: the fine-tuning loss is")
    assert "tuned" not in row


def test_specs_that_compute_the_same_have_one_key() -> None:
    asked = tables.Wanted("resnet56", [0, 1, 2], 1000, 128)
    for name, specs in tables.TABLES.items():
        keys = [spec.key for spec in specs(asked)]
        assert keys, name
        assert all(json.loads(key)["network"] == "resnet56" for key in keys)
    shot = {spec.key for spec in tables.one_shot(asked)}
    assert {json.loads(k)["method"] for k in shot} == {*harness.OURS, *PEERS}
    assert len([k for k in shot if json.loads(k)["method"] == "l1"]) == 4  # reads no data: one seed
    assert len([k for k in shot if json.loads(k)["method"] == "ig"]) == 12


@pytest.mark.parametrize("name", tables.TABLES)
def test_a_table_asks_for_rows_of_the_seeds_and_the_batch(name: str) -> None:
    specs = list(tables.TABLES[name](tables.Wanted("resnet56", [0, 1], 10, 32)))
    assert {spec.seed for spec in specs} == ({0} if name == "baseline" else {0, 1})
    assert {spec.batch for spec in specs if spec.steps} <= {32}


def test_processes_share_the_rows_without_computing_one_twice(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[list[str]] = []
    monkeypatch.setattr(tables, "load_setting", lambda *a: setting)
    monkeypatch.setattr(tables, "run_rows", lambda specs, s, path: parts.append([spec.key for spec in specs]))
    for shard in ("0/1", "0/2", "1/2"):
        words = ["tables.py", "run", "tuned", "one_shot", "--data", "x.npz", "--targets", "0.9", "--shard", shard]
        monkeypatch.setattr(sys, "argv", words)
        tables.main()
    whole, first, second = parts
    assert len(whole) == len(set(whole)) > 0
    assert not set(first) & set(second)
    assert set(first) | set(second) == set(whole)


def row(method: str, target: float, seed: int, **found: Any) -> dict[str, Any]:
    spec = Spec(
        "resnet56",
        method,
        target,
        seed,
        **{k: found.pop(k) for k in ("steps", "options", "batch", "granularity") if k in found},
    )
    about = {"data": "d", "device": "c", "versions": "v", "commit": "h"}
    return {"key": spec.key, **harness.asdict(spec), "removed_macs": 0.4, **about, **found}


def test_cells_are_means_and_deviations_of_the_stored_rows() -> None:
    rows = results_page.Rows(
        [row("ig", 0.75, seed, pruned=value) for seed, value in enumerate((0.5, 0.6, 0.7))]
        + [row("ig", 0.75, 0, steps=1000, pruned=0.5, tuned=0.8), row("l1", 0.75, 0, pruned=0.25)]
    )
    assert results_page.cell(rows.at_once("resnet56", "ig", 0.75), "pruned") == "60.0 ± 10.0"
    assert results_page.cell(rows.tuned("resnet56", "ig", 0.75, 1000), "tuned") == "80.0 (1 seed)"
    assert results_page.one_shot_cell(rows.at_once("resnet56", "l1", 0.75), "l1") == "25.0"
    again = [row("l1", 0.75, seed, steps=1000, pruned=0.25, tuned=0.5) for seed in range(3)]
    assert results_page.one_shot_cell(again, "l1") == "25.0"
    assert results_page.one_shot_cell(again, "ig") == "25.0 ± 0.0"
    assert results_page.cell(rows.at_once("resnet56", "sg", 0.75), "pruned") == "not run"
    assert results_page.cell(rows.at_once("resnet56", "ig", 0.75, LAYERS), "pruned") == "not run"


def test_a_cell_has_one_batch_size_and_says_which() -> None:
    def tuned(batch: int, *seeds: int) -> list[dict[str, Any]]:
        return [row("ig", 0.75, s, steps=1000, batch=batch, pruned=0.1, tuned=batch / 256) for s in seeds]

    assert results_page.cell(tuned(128, 0) + tuned(32, 0), "tuned") == "50.0 (1 seed)"
    assert results_page.cell(tuned(128, 0) + tuned(32, 0, 1, 2), "tuned") == "12.5 ± 0.0 (b32)"
    assert results_page.cell(tuned(128, 0, 1) + tuned(32, 0), "tuned") == "50.0 ± 0.0 (2 seeds)"
    assert results_page.cell(tuned(32, 0, 1), "tuned") == "12.5 ± 0.0 (2 seeds, b32)"
    assert results_page.cell(tuned(32, 0), "tuned") == "12.5 (1 seed, b32)"
    assert results_page.values(tuned(128, 0) + tuned(32, 0, 1, 2), "tuned", 128) == [50.0]
    assert results_page.values(tuned(128, 0), "tuned", 32) == []
    again = [row("ig", 0.75, 0, pruned=0.2), *tuned(128, 0)]
    assert results_page.values(again, "pruned") == [20.0]  # of a seed the first row


def test_the_lead_does_not_mix_batches() -> None:
    def tuned(method: str, batch: int, value: float) -> list[dict[str, Any]]:
        return [row(method, 0.75, s, steps=1000, batch=batch, pruned=0.1, tuned=value) for s in range(3)]

    stored = tuned("ig", 128, 0.8) + tuned("taylor", 32, 0.9) + tuned("taylor", 128, 0.75)
    lines = results_page.lead(results_page.Rows(stored)).splitlines()
    (line,) = [cells(text) for text in lines if "1,000" in text]
    assert (line[2], line[4], line[6]) == ("after 1,000 steps of 128", "80.0", "75.0")


def test_seconds_are_those_of_a_core_alone() -> None:
    taken = ((9.0, "NVIDIA H200"), (3.0, "CPU, 1 thread(s)"), (5.0, "CPU, 1 thread(s)"))
    rows = [row("ig", 0.75, 0, pruned=0.5, scoring_seconds=t) | {"device": d} for t, d in taken]
    assert results_page.scoring_seconds(rows) == 4.0
    assert results_page.scoring_seconds(rows[:1]) is None


def test_the_same_row_on_two_devices() -> None:
    def on(device: str, seed: int, value: float, method: str = "ig") -> dict[str, Any]:
        return row(method, 0.5, seed, pruned=value) | {"device": device}

    stored = [on("CPU, 1 thread(s)", 0, 0.5), on("NVIDIA H200", 0, 0.6), on("CPU, 1 thread(s)", 1, 0.5)]
    stored += [on("NVIDIA H200", 1, 0.48), on("NVIDIA H200", 2, 0.9), on("CPU, 1 thread(s)", 2, 0.9, "taylor")]
    (line,) = [cells(text) for text in results_page.devices(results_page.Rows(stored)).splitlines() if "-50%" in text]
    assert line == ["resnet56", "-50%", "gradients", "2", "6.0", "10.0"]


def test_the_networks_that_were_trained_here_are_listed() -> None:
    text = results_page.networks(results_page.Rows([]))
    for name in results_page.TRAINED:
        record = json.loads((results_page.HERE / "results" / f"{name}.json").read_text())
        (line,) = [cells(t) for t in text.splitlines() if cells(t)[1] == record["weights"]]
        assert line[4] == f"{100 * record['test']:.2f}"


def test_a_copy_without_history_is_told_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCHMARK_COMMIT", "abc1234")
    assert records.environment()["commit"] == "abc1234"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("amp", [None, "bf16"])
def test_a_graphed_step_is_a_step(amp: str | None) -> None:
    """Before and after units are gone, with the running statistics of the norms."""
    from graphs import GraphedLoss

    def trained(graph: GraphedLoss | None) -> tuple[list[float], dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        model, losses = Chain(widths=(16, 24, 16)).eval().cuda(), []

        class Losses(singe_plugin.Callback):
            def on_finetune_step(self, event: Any) -> None:
                losses.append(event.loss)

        finetune = singe_plugin.FineTune(images(4), 12, "layer", amp=amp, step_fn=graph)
        singe_plugin.prune(
            model, images(4), **asked(target="params=0.4", criterion="l1", finetune=finetune, verify=False,
            callbacks=[Losses()]),
        )  # fmt: skip
        return losses, {k: v.cpu() for k, v in model.state_dict().items()}

    (losses, values), (expected_losses, expected) = trained(GraphedLoss()), trained(None)
    assert losses == pytest.approx(expected_losses, rel=1e-3)
    torch.testing.assert_close(values, expected, rtol=1e-2, atol=1e-3)


def test_the_lead_compares_what_has_three_seeds() -> None:
    stored = [row("ig", 0.75, s, pruned=0.5) for s in range(3)] + [row("ig_abs", 0.75, 0, pruned=0.9)]
    stored += [row("l2", 0.75, 0, pruned=0.8), row("l2", 0.5, 0, pruned=0.8), row("lamp", 0.5, 0, pruned=0.7)]
    stored += [row("taylor", 0.75, s, pruned=0.3, options=LAYERS, removed_macs=s / 10) for s in range(3)]
    stored += [row("taylor", 0.75, s, pruned=0.2) for s in range(3)] + [row("lamp", 0.75, 0, pruned=0.25)]
    (line,) = [text for text in results_page.lead(results_page.Rows(stored)).splitlines() if "resnet56" in text]
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "resnet56", "-75%", "right after pruning", "IG: SInGE (Eq. 5), rounds", "50.0",
        "TP Taylor, layers", "30.0", "+20.0", "40% / 10%",
    ]  # fmt: skip


def test_the_lead_does_not_mix_lengths_of_fine_tuning() -> None:
    stored = [row("ig", 0.9, s, steps=1000, pruned=0.1, tuned=0.5) for s in range(3)]
    stored += [row("ig", 0.9, s, steps=5000, pruned=0.1, tuned=0.9, removed_macs=0.7) for s in range(3)]
    assert results_page.best(results_page.Rows(stored), "resnet56", ["ig"], 0.9, "tuned") == (
        pytest.approx(50), "IG: SInGE (Eq. 5), rounds", pytest.approx(0.4),
    )  # fmt: skip


def test_more_data_counts_where_it_is_the_better_setting() -> None:
    stored = [row("taylor", 0.75, s, pruned=0.2) for s in range(3)] + [row("ig", 0.75, s, pruned=0.5) for s in range(3)]
    stored += [row("taylor", 0.75, s, pruned=0.3, options=harness.MORE_DATA["taylor"]) for s in range(3)]
    rows = results_page.Rows(stored)
    found = results_page.best(rows, "resnet56", PEERS, 0.75, "pruned")
    assert found == (pytest.approx(30), "TP Taylor, more data", pytest.approx(0.4))
    lines = [cells(text) for text in results_page.more_data(rows).splitlines() if "75%" in text and "Taylor" in text]
    (found_there,) = [line for line in lines if line[0] == "resnet56"]
    assert found_there[3:] == ["20.0 ± 0.0", "not run", "30.0 ± 0.0", "not run", "? / ?"]


def test_the_tuned_ablation_is_apart_from_the_one_right_after_pruning() -> None:
    def held_out(steps: int, target: float, **found: Any) -> dict[str, Any]:
        return row("taylor", target, 0, steps=steps, **found) | {"split": "held_out"}

    cap = {"max_pruning_ratio": 1.0}
    rows = results_page.Rows(
        [
            held_out(0, 0.5, pruned=0.5), held_out(1000, 0.9, pruned=0.2, tuned=0.6, options=cap, removed_macs=0.8),
            held_out(20, 0.9, pruned=0.2, tuned=0.1, options=cap),
        ]
    )  # fmt: skip
    (tuned,) = [cells(line) for line in results_page.ablation_tuned(rows).splitlines() if "taylor" in line]
    assert tuned == ["taylor: max_pruning_ratio=1.0", "20.0 (1 seed)", "60.0 (1 seed)", "80%"]
    (before,) = [cells(line) for line in results_page.ablation(rows).splitlines() if "taylor" in line]
    assert before[:2] == ["taylor: base", "50.0"]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_single_weights_at_once_and_in_rounds_are_different_lines() -> None:
    def masked(method: str, rounds: int, value: float, **pattern: str) -> dict[str, Any]:
        options = {"rounds": rounds, **pattern}
        return row(method, 0.5 if pattern else 0.8, 0, pruned=value, options=options, granularity="weight")

    stored = [masked("l1", 1, 0.1), masked("ig", 1, 0.2), masked("ig", 4, 0.3), masked("ig", 1, 0.4, pattern="2:4")]
    lines = {cells(line)[0]: cells(line)[1:] for line in results_page.weights(results_page.Rows(stored)).splitlines()}
    nothing = ["not run"] * 3
    assert lines["magnitude, global"] == ["10.0", *nothing, "not run"]
    assert lines["IG: SInGE"] == ["20.0 (1 seed)", *nothing, "40.0 (1 seed)"]
    assert lines["IG: SInGE, 4 rounds"] == ["30.0 (1 seed)", *nothing, "-"]


def test_the_widths_of_one_criterion_and_the_units_of_another() -> None:
    stored = [row("taylor", 0.9, 0, steps=1000, pruned=0.1, tuned=0.6)]
    stored += [row("random", 0.9, 0, steps=1000, pruned=0.2, tuned=0.5, options={"widths_of": "taylor"})]
    line = next(t for t in results_page.widths(results_page.Rows(stored)).splitlines() if "-90%" in t)
    one = "{:.1f} (1 seed)".format
    assert cells(line) == ["-90%", "TP Taylor", one(10), one(60), "not run", "not run", one(20), one(50)]


def test_the_page_is_made_of_the_rows(tmp_path: Path) -> None:
    rows, page = tmp_path / "rows.jsonl", tmp_path / "results.md"
    parts = "\n".join(f"<!-- {name} -->\nold\n<!-- end of {name} -->" for name in results_page.PARTS)
    page.write_text(f"# Results\nkept\n{parts}\nend\n")
    records.append(rows, row("none", 0.0, 0, pruned=0.9))
    records.append(rows, row("ig", 0.75, 0, pruned=0.625))
    results_page.write(rows, page)
    text = page.read_text()
    assert "kept" in text
    assert "old" not in text
    assert "62.5 (1 seed)" in text
    assert "accuracy before pruning 90.00 %" in text
    assert (tmp_path / "results_one_shot.svg").stat().st_size > 0
    results_page.write(rows, page)
    assert page.read_text() == text
    page.write_text("# Results")
    with pytest.raises(SystemExit, match="has no place for 'main'"):
        results_page.write(rows, page)


def test_the_main_result_comes_first() -> None:
    stored = [json.loads(line) for line in headline.STORED.read_text().splitlines()]
    seen = [r["repaired"] for r in stored if r["method"] == "obs" and r["split"] == "test"
            and r["target"] == "params=0.75" and r["network"] == "resnet56" and r["batches"] == 4]  # fmt: skip
    assert len(seen) == 3
    first = next(line for line in results_page.PAGE.read_text().splitlines()[1:] if line and line[0] != "<")
    assert first == headline.first_sentence(results_page.Rows([]))
    assert f"**{100 * sum(seen) / 3:.1f} %** with 75" in first
    assert "ResNet-56 (90.0 % top-1) keeps " in first
    line = next(t for t in headline.repaired(results_page.Rows([])).splitlines() if "`params=0.9`" in t)
    assert cells(line)[2] == "90.0"
    assert cells(line)[-1].startswith("80.8 ± 0.1 *")


def test_the_page_in_the_repository_is_up_to_date(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    page.write_text(results_page.PAGE.read_text())
    results_page.write(tables.ROWS, page)
    assert page.read_text() == results_page.PAGE.read_text()
