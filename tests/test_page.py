"""The pages: what they say is what the result says, nothing is loaded or run, and a browser shows them."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import nn

from singe_plugin import Builder, Evaluate, FineTune, Pace, Result, Sensitivity, load, prune, save
from singe_plugin.app.cli import main
from singe_plugin.app.curves import run_curves
from singe_plugin.app.page import missing_for_pages, report_page, sensitivity_page
from singe_plugin.app.plots import Point
from singe_plugin.app.report import Table, report_data, write_report
from singe_plugin.errors import ArtifactError, MissingPackageError
from singe_plugin.files import seal
from singe_plugin.loop.costs import count_macs, count_params
from singe_plugin.loop.events import History
from singe_plugin.run.result import GroupRow, Metrics
from singe_plugin.run.sensitivity import LayerSensitivity, SensitivityPoint

from small_nets import Chain, images, seeded

pytest.importorskip("matplotlib", reason="pages need matplotlib: pip install jinja2 matplotlib")
pytest.importorskip("jinja2", reason="pages need jinja2: pip install jinja2 matplotlib")

NASTY = "<b>layer</b>&\"'$x$"
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Parsed(HTMLParser):
    """The tags, the texts, the tables and the hover texts of a page; unbalanced tags are an error."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: dict[str, list[list[str]]] = {}
        self.titles: list[str] = []
        self.text = ""
        self.section = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = dict(attrs).get("id") or ""
        if tag == "tr":
            self.rows.setdefault(self.section, []).append([])
        if tag in ("td", "th"):
            self.rows[self.section][-1].append("")
        if tag == "title":
            self.titles.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        if self.open and self.open[-1] == "title":
            self.titles[-1] += data
            return
        if "td" in self.open or "th" in self.open:
            self.rows[self.section][-1][-1] += data
        self.text += data

    def said(self) -> str:
        return " ".join(self.text.split())


@pytest.fixture(scope="module")
def result() -> Result:
    """A run with everything that a page can show."""
    worth = iter([0.9, 0.8, 0.7, 0.6])

    def quality(model: nn.Module) -> float:
        return next(worth)

    judge = Evaluate(quality, every="round")
    pace, tuning = Pace(rounds=2, verify=False, min_width=1), FineTune(steps=6, every="layer")
    made = prune(seeded(Chain), images(), target="params=0.6", pace=pace, finetune=tuning, val_data=judge)
    made.builder = Builder.factory("small_nets:Chain")
    made.before, made.after = replace(made.before, accuracy=0.875), replace(made.after, accuracy=0.75)
    return made


def record(result: Result, **more: Any) -> dict[str, Any]:
    """What ``report.json`` has."""
    plain = {
        "title": "T",
        "intro": ["Said."],
        "tables": [],
        "points": [],
        "curves": [],
        "command": "singe prune x",
        **more,
    }
    return json.loads(json.dumps(report_data(result) | plain))


@pytest.fixture(scope="module")
def page(result: Result) -> Parsed:
    return Parsed(report_page(record(result)))


def test_numbers_of_the_report(result: Result, page: Parsed) -> None:
    before, after = result.before, result.after
    cells = {row[0]: row[1:] for row in page.rows["changes"][1:]}
    assert cells["parameters"][:2] == [f"{before.params:,}", f"{after.params:,}"]
    assert cells["MACs"][:2] == [f"{before.macs:,}", f"{after.macs:,}"]
    assert cells["top-1 accuracy"] == ["87.50%", "75.00%", "\N{MINUS SIGN}12.50 points"]
    assert cells["file size"][0] == f"{before.size_bytes / 1000:.1f} kB"
    assert cells["latency (ms)"][0] == f"{before.latency_ms:.2f} ±{before.latency_iqr_ms / 2:.2f}"
    layers = page.rows["layers"][1:]
    assert [row[0] for row in layers] == [row.name for row in result.layers]
    for row, shown in zip(result.layers, layers, strict=True):
        assert shown[2:4] == [f"{row.units_before:,}", f"{row.units_after:,}"]
        params, macs = (tuple(m.by_layer[row.name][i] for m in (before, after)) for i in (0, 1))
        assert shown[5:] == ["{:,} → {:,}".format(*params), "{:,} → {:,}".format(*macs)]
        tips = [tip for tip in page.titles if tip.startswith(f"{row.name}\nunits")]
        assert len(tips) == 2  # wide and narrow
        assert f"units {row.units_before} → {row.units_after} (" in tips[0]
    costs = page.rows["costs"][1:]
    assert [row[0] for row in costs] == list(before.by_layer)
    assert [row[1].replace(",", "") for row in costs] == [str(v[0]) for v in before.by_layer.values()]
    assert [row[5].replace(",", "") for row in costs] == [str(v[1]) for v in after.by_layer.values()]
    assert {row[0] for row in page.rows["settings"]} >= {"scoring.criterion", "pace.rounds", "torch"}


def test_words_of_the_report(result: Result, page: Parsed) -> None:
    said = page.said()
    gone = sorted([(result.removed_params, "parameters"), (result.removed_macs, "multiply-adds")], reverse=True)
    headline = " and ".join(f"{100 * share:.1f} % fewer {name}" for share, name in gone)  # said() splits at any space
    assert headline in said
    assert "top-1 accuracy 87.50% → 75.00% (\N{MINUS SIGN}12.50 points)" in said
    assert said.index(headline) < said.index("Before and after") < said.index("Units of every layer")
    for name, reason in result.left_whole.items():
        assert f"{name}: {reason}" in said
    for text in result.warnings:
        assert text in said
    assert "singe prune x" in said
    assert len(result.warnings) > 0


def test_the_run_is_drawn(result: Result, page: Parsed) -> None:
    run = run_curves(result.history)
    marks = [f"{m['units']:,} units of {m['layers']} layers removed" for m in run["removals"]]
    assert sum(m["units"] for m in run["removals"]) == sum(r.units_before - r.units_after for r in result.layers)
    losses = [f"step {row['step']}: loss {row['loss']:.4g}" for row in result.history.select("finetune_step")]
    judged = ["before: 0.9", "round 1: 0.8", "round 2: 0.7"]
    for text in (*marks, *losses, *judged):
        assert page.titles.count(text) >= 2  # wide and narrow
    assert page.titles.count("before: 0.9\nround 1: 0.8\nround 2: 0.7") == 2


def test_what_happened_on_the_way() -> None:
    rows: list[dict[str, Any]] = []
    for step in range(1, 1001):
        if step in (1, 501):
            rows += [{"event": "removed", "layer": k, "units": [step], "left": 3} for k in "ab"]
            rows.append({"event": "round_done", "round": 1, "rounds": 2, "removed": 2, "left": 6})
        rows.append({"event": "finetune_step", "step": step, "loss": float(step), "lr": 0.1})
    found = run_curves(History(rows), most=100)
    assert [w["loss"] for w in found["losses"]] == [10 * n + 5.5 for n in range(100)]
    assert found["losses"][-1]["last"] == 1000
    assert found["removals"] == [{"step": s, "units": 2, "layers": 2} for s in (0, 500)]
    assert [(r["step"], r["units"]) for r in found["rounds"]] == [(0, 2), (500, 2)]


def test_everything_is_escaped(result: Result) -> None:
    strange = replace(
        result, layers=[GroupRow(NASTY, NASTY, 40, 2)], left_whole={NASTY: NASTY}, options={NASTY: NASTY},
        versions={NASTY: NASTY},
        before=replace(result.before, by_layer={NASTY: [8, 8]}, measured={NASTY: 1.0}),
        after=replace(result.after, by_layer={NASTY: [2, 2]}, measured={NASTY: 0.5}),
    )  # fmt: skip
    strange.history = History([{"event": "evaluated", "values": {NASTY: 0.5}}, {"event": "stopped", "reason": NASTY}])
    table = {"title": NASTY, "header": [NASTY], "rows": [[NASTY]]}
    points = [{"method": m, "removed": r, "accuracy": 0.5} for m, r in ((NASTY, 0.0), (NASTY, 0.5))]
    text = report_page(
        record(strange, title=NASTY, intro=[NASTY], tables=[table], points=points, command=NASTY),
        curves(NASTY).as_dict(),
    )
    page = Parsed(text)
    assert "b" not in {tag for tag, _ in page.tags}
    assert "<b>" not in text
    assert page.text.count(NASTY) > 12
    assert sum(NASTY in tip for tip in page.titles) > 6


def test_nothing_is_loaded_and_nothing_runs(result: Result) -> None:
    for text in (report_page(record(result), curves().as_dict()), sensitivity_page(curves().as_dict(), "singe")):
        page = Parsed(text)
        assert "script" not in {tag for tag, _ in page.tags}
        assert not [a for _, attrs in page.tags for a in attrs if a.startswith("on")]
        loaded = [v for _, attrs in page.tags for k, v in attrs.items() if k.endswith(("src", "href"))]
        assert {v for v in loaded if v and v[0] != "#"} == {"data:,"}
        assert "@import" not in text
        assert set(re.findall(r"url\(([^)]).", text)) <= {"#"}
        ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
        assert len(ids) == len(set(ids))
        assert not re.search(r"#0[1-9a]0[1-9a]0[1-9]", text)  # every colour is the page's


def curves(name: str = "conv1") -> Sensitivity:
    points = [SensitivityPoint(r, round(8 * r), {"loss": 1 + r, "accuracy": 0.75 - r}) for r in (0.25, 0.5)]
    odd = [({"loss": 1.0, "accuracy": 0.75}, 0.25), ({"loss": None, "accuracy": 0.7}, 0.5)]
    flat = [SensitivityPoint(ratio, round(8 * ratio), values) for values, ratio in odd]
    rows = LayerSensitivity(name, name, 8, tuple(points)), LayerSensitivity("conv2", "conv2", 8, tuple(flat))
    return Sensitivity({"loss": 1.0, "accuracy": 0.75}, rows, {"fc": "it reaches the output"}, {"seed": 0})


def test_numbers_of_the_sensitivity() -> None:
    page = Parsed(sensitivity_page(curves().as_dict(), "singe sensitivity --model x"))
    said, rows = page.said(), page.rows["sensitivity"]
    assert rows[0] == ["layer", "units", "\N{MINUS SIGN}25 %", "\N{MINUS SIGN}50 %"]
    assert rows[1:3] == [["conv1", "8", "50.0", "25.0"], ["conv2", "8", "75.0", "70.0"]]
    assert rows[4:] == [["conv1", "8", "1.25", "1.5"], ["conv2", "8", "1", "not finite"]]
    assert "Accuracy depends most on conv1" in said
    assert "With nothing removed, loss is 1. It depends most on conv2, and least on conv1." in said
    assert "fc: it reaches the output" in said
    assert "singe sensitivity --model x" in said
    assert page.titles.count("conv1\n0 %: 75.0 %\n25 %: 50.0 %\n50 %: 25.0 %") == 2
    heat = [attrs["style"] for tag, attrs in page.tags if attrs.get("class") == "cell"]
    assert heat[:4] == ["--p: 50", "--p: 100", "--p: 0", "--p: 10"]


def test_an_unfinished_sensitivity_says_so() -> None:
    empty = Sensitivity({"loss": 1.0}, (LayerSensitivity("a", "a", 2),), finished=False)
    said = Parsed(sensitivity_page(empty.as_dict())).said()
    assert "No point has been measured yet" in said
    assert "The run is not finished" in said


# -- files --------------------------------------------------------------------------------------------------------


def test_a_report_takes_the_curves_that_lie_beside_it(result: Result, tmp_path: Path) -> None:
    write_report(result, tmp_path)
    assert "sensitivity" not in Parsed((tmp_path / "report.html").read_text()).rows
    curves().save(tmp_path / "sensitivity.json")
    write_report(result, tmp_path)
    page = Parsed((tmp_path / "report.html").read_text())
    assert page.rows["sensitivity"][1] == ["conv1", "8", "50.0", "25.0"]
    (tmp_path / "sensitivity.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"sensitivity\.json is damaged"):
        write_report(result, tmp_path)


def test_tables_and_points_are_there(result: Result, tmp_path: Path) -> None:
    points = [Point("unpruned", 0.0, 0.9), Point("a", 0.5, 0.8)]
    write_report(result, tmp_path, points, tables=[Table("Mine", ("", "x"), (("a", "1"),))])
    page = Parsed((tmp_path / "report.html").read_text())
    assert page.rows[""] == [["", "x"], ["a", "1"]]
    assert "a\n\N{MINUS SIGN}0% parameters: 90.0%\n\N{MINUS SIGN}50% parameters: 80.0%" in page.titles
    assert "## Mine" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_without_what_draws_it(
    result: Result, missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2" if missing == "jinja2" else "matplotlib.figure", None)
    files = write_report(result, tmp_path)
    assert "report.html" not in {f.name for f in files}
    assert (tmp_path / "report.md").is_file()
    assert missing_for_pages() == [missing]
    assert caplog.messages == [f"there is no {tmp_path / 'report.html'}: pip install {missing}"]
    with pytest.raises(MissingPackageError, match=f"pip install {missing}"):
        report_page(record(result))


def test_sizes_are_those_of_the_files(result: Result, tmp_path: Path) -> None:
    for metrics, model in ((result.before, seeded(Chain)), (result.after, result.model)):
        assert sum(params for params, _ in metrics.by_layer.values()) == metrics.params == count_params(model)
        macs = count_macs(model, torch.zeros(1, 2, 6, 6))
        assert sum(macs for _, macs in metrics.by_layer.values()) == metrics.macs == macs
        whole = replace(result, model=model, before=metrics, after=metrics)
        if model is not result.model:
            whole.structure = {**result.structure, "attributes": {}}
        save(whole, tmp_path)
        file = (tmp_path / "model.safetensors").read_bytes()
        assert metrics.size_bytes == len(file) - 8 - struct.unpack("<Q", file[:8])[0]


def test_results_of_earlier_versions_are_read(result: Result, tmp_path: Path) -> None:
    save(result, tmp_path)
    path = tmp_path / "singe.json"
    old = json.loads(path.read_text())
    del old["checksum"]
    for when in ("before", "after"):
        del old[when]["size_bytes"], old[when]["by_layer"]
    path.write_text(json.dumps(seal(old)))
    found = load(tmp_path, trust=True)
    assert found.before == replace(result.before, size_bytes=None, by_layer={})
    assert CliRunner().invoke(main, ["report", str(tmp_path)]).exit_code == 0
    page = Parsed((tmp_path / "report.html").read_text())
    assert "costs" not in page.rows
    assert "file size" not in [row[0] for row in page.rows["changes"]]
    for damage in ({"by_layer": {"a": [1]}}, {"by_layer": {"a": [1, -1]}}, {"size_bytes": -1}, {"params": None}):
        path.write_text(json.dumps(seal({**old, "before": {**old["before"], **damage}})))
        with pytest.raises(ArtifactError, match="'before'"):
            load(tmp_path, trust=True)


# -- in a browser -------------------------------------------------------------------------------------------------


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
in_a_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: apt install chromium")


def shot(page: Path, size: tuple[int, int], folder: Path, *flags: str) -> tuple[Image.Image, str]:
    """A picture of a page in headless Chromium, and what its console says."""
    picture = folder / f"{page.stem} {size[0]} {len(flags)}.png"
    found = subprocess.run(
        [
            str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            "--hide-scrollbars", "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", *flags,
            f"--screenshot={picture}", f"--window-size={size[0]},{size[1]}", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert picture.is_file(), found.stderr
    with Image.open(picture) as image:
        return image.convert("RGB"), "\n".join(line for line in found.stderr.splitlines() if "CONSOLE" in line)


@in_a_browser
def test_a_browser_shows_it(result: Result, tmp_path: Path) -> None:
    curves().save(tmp_path / "sensitivity.json")
    write_report(result, tmp_path, extra={"command": "singe prune"})
    page = tmp_path / "report.html"
    light, said = shot(page, (1100, 900), tmp_path)
    assert said == ""
    dark, said = shot(page, (1100, 900), tmp_path, "--blink-settings=preferredColorScheme=0")
    assert said == ""
    narrow, said = shot(page, (500, 900), tmp_path)
    assert said == ""
    for image in (light, dark, narrow):
        colors = image.getcolors(maxcolors=2**24)
        assert colors is not None
        assert len(colors) > 50
        assert max(count for count, _ in colors) < 0.98 * image.width * image.height
    assert sum(light.getpixel((3, 3))) > 600 > 150 > sum(dark.getpixel((3, 3)))
    after = {(0x1F, 0x6F, 0xEB), (0x58, 0xA6, 0xFF)}  # bars and lines
    whole, _ = shot(page, (1100, 2600), tmp_path)
    assert sum(count for count, color in whole.getcolors(maxcolors=2**24) or [] if color in after) > 2000


@in_a_browser
def test_a_console_that_complains_is_heard(tmp_path: Path) -> None:
    page = tmp_path / "wrong.html"
    page.write_text("<!DOCTYPE html><body>x<script>undefinedFunction()</script>")
    assert "undefinedFunction is not defined" in shot(page, (500, 300), tmp_path)[1]


def test_a_large_network_stays_a_file_that_can_be_sent() -> None:
    names = [f"blocks.{n // 6}.layer{n % 6}" for n in range(300)]
    costs = {name: [1000 + n, 5000 + n] for n, name in enumerate(names)}
    metrics = Metrics(10**7, 10**9, 0.9, size_bytes=4 * 10**7, by_layer=costs)
    rows = [GroupRow(name, name, 64 + n, 32 + n) for n, name in enumerate(names)]
    text = report_page(record(Result(nn.Identity(), metrics, replace(metrics, params=10**6), rows)))
    page = Parsed(text)
    assert [row[0] for row in page.rows["layers"][1:]] == names
    assert sum(tip.startswith("blocks.49.layer5\nunits") for tip in page.titles) == 2
    assert len(text) < 2**21
