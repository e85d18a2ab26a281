"""The documents are true: their code runs, their flags and options exist, and their links lead somewhere."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import singe_plugin
from singe_plugin import Distill, FineTune, Pace, Repair, Scoring
from singe_plugin.app.cli import main

from written_device import install

ROOT = Path(__file__).parent.parent
RUN = ("README.md", "docs/usage.md", "docs/nni.md")  # the others show no code, or parts of it
GUIDES = ("docs/index.md", "docs/targets.md", "docs/training.md", "docs/own_loop.md", "docs/beyond.md", "docs/faq.md")
TRUE = (
    *RUN,
    *GUIDES,
    "CONTRIBUTING.md",
    "docs/glossary.md",
    "docs/api.md",
    "docs/backbones.md",
    "docs/results.md",
    "docs/extending.md",
    "docs/decisions.md",
    "docs/options.md",
    "docs/deploy.md",
    "CHANGELOG.md",
)


def blocks(page: str, language: str) -> list[str]:
    """The code of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.S | re.M)


def shorter(code: str) -> str:
    """The same calls, with few steps and without the network of timm's, which takes long to prune."""
    code = re.sub(r"model = timm\.create_model\(.*\)\n", "", code)
    code = re.sub(r"(finetune=|(?<=FineTune)\(steps=|(?<![_\w])steps=)\d{2,}", r"\g<1>2", code)
    return re.sub(r"rounds=\d+", "rounds=2", code)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 32),
        nn.ReLU(), nn.Linear(32, 4),
    )  # fmt: skip


def given(tmp_path: Path) -> dict[str, Any]:
    """What the pages leave to the reader: a trained model and data."""
    images, labels = torch.randn(32, 3, 8, 8), torch.arange(32) % 4
    data = TensorDataset(images, labels)
    batches = [(images[:16], labels[:16]), (images[16:], labels[16:])]
    return {
        "model": net(), "train": data, "val": data, "batches": batches, "loader": batches, "out": str(tmp_path / "out"),
        "example_inputs": images[:2], "dummy_input": images[:2], "singe_plugin": singe_plugin, "make_net": net,
    }  # fmt: skip


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    return given(tmp_path)


def test_readme(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    once, full, torch_pruning, _ = blocks("README.md", "python")
    for code in (once, full, torch_pruning):
        names["model"] = net()
        exec(shorter(code), names)
    shown = [line.split("  ")[0] for line in blocks("README.md", "text")[0].splitlines()]
    printed = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert [name for name in shown if name and ":" not in name] == [p for p in printed if p and ":" not in p]
    assert isinstance(names["result"], singe_plugin.Result)
    assert names["outcome"].macs[1] < names["outcome"].macs[0]


def test_usage(names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    objectives, losing, timing, weights, repairing, distilling, *training, judging, saving, exporting, shrinking = (
        blocks("docs/usage.md", "python")
    )
    exec(objectives, {"torch": torch, "Scoring": Scoring, "scheduler": None})  # their models are of other libraries
    install(monkeypatch, 8, "onnxruntime")  # a package of its own, and this network is nothing but overhead
    for code in (losing, timing, weights, repairing, distilling, judging):
        names["model"] = net()
        exec(shorter(code), names)
    lightning, transformers, own = training
    for package, code in (("lightning", lightning), ("transformers", transformers)):
        if importlib.util.find_spec(package) is not None:
            exec(code, names)
            assert names["callback"].pruning.epochs
    names["model"] = net()
    exec(own, names | {"torch": torch})
    assert names["model"][0].out_channels < 64
    assert "singe_plugin.load" in saving  # its factory is somebody's
    exec(exporting, {**names, "torch": torch})
    assert Path("out/model.pt2").is_file()
    names["model"] = net()
    exec(shorter(shrinking), names)
    assert names["small"].model is names["model"]


@pytest.mark.parametrize(
    ("page", "number"), [(page, number) for page in GUIDES for number in range(len(blocks(page, "python")))]
)
def test_guides(page: str, number: int, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block runs with what the page leaves to the reader, behind the imports of the blocks before it."""
    code = blocks(page, "python")[number]
    Path("mymodels.py").write_text("from test_documents import net as make_net\n")
    monkeypatch.syspath_prepend(".")
    if "torch.onnx" in code:
        pytest.importorskip("onnxscript")
    for before in blocks(page, "python")[:number]:
        exec("\n".join(re.findall(r"^(?:import|from) .*", before, re.M)), names)
    widths = [parameter.shape for parameter in names["model"].parameters()]
    exec(shorter(code), names)
    assert [parameter.shape for parameter in names["model"].parameters()] != widths


@pytest.mark.parametrize("page", ["README.md", "docs/nni.md"])
def test_nni(page: str, names: dict[str, Any]) -> None:
    pytest.importorskip("nni")
    code = next(block for block in blocks(page, "python") if "integrations.nni import SInGEPruner" in block)
    # a pruner without an evaluator trains nothing; its config list leaves out the classifier by its name
    code = code.replace("evaluator, training_steps=20", "batches=batches").replace('["fc"]', '["7"]')
    exec(code, names)
    assert names["model"][0].out_channels == 32


@pytest.mark.parametrize("page", ["README.md", "docs/usage.md", *GUIDES])
def test_flags(page: str) -> None:
    """Every flag that a page names is one of the command's."""
    assert isinstance(main, click.Group)
    context = click.Context(main)
    commands = [main.get_command(context, name) for name in main.list_commands(context)]
    known = {
        flag
        for command in commands
        if command
        for option in command.params
        for flag in (*option.opts, *option.secondary_opts)
    }
    text = (ROOT / page).read_text()
    lines = [line for block in blocks(page, "sh") for line in block.splitlines() if line.startswith("singe ")]
    found = {flag for line in lines for flag in re.findall(r"(?<!\S)(--?[a-z][\w-]*)", line)}
    found |= set(re.findall(r"`(?:singe [^`]*)?(--[a-z][\w-]*)[^`]*`", text))
    assert found - known - {"--help", "--version"} == set()


def test_api_has_every_public_name() -> None:
    shown = re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(), re.M)
    assert len(shown) == len(set(shown))
    assert {f"singe_plugin.{name}" for name in singe_plugin.__all__} - set(shown) == set()


@pytest.mark.parametrize("page", TRUE)
def test_options(page: str) -> None:
    """Every keyword that a page writes into one of the options objects is a field of it."""
    text = (ROOT / page).read_text()
    wrong = []
    for cls in (Scoring, Pace, Repair, FineTune, Distill):
        fields = {f.name for f in dataclasses.fields(cls)}
        for inside in re.findall(rf"\b{cls.__name__}\(([^()]*)\)", text):
            wrong += [f"{cls.__name__}({name}=)" for name in re.findall(r"(\w+)=", inside) if name not in fields]
    assert wrong == []


@pytest.mark.parametrize("page", TRUE)
def test_links(page: str) -> None:
    """Every file that a page links to is there, and every heading."""
    for path, anchor in re.findall(r"\]\((?!http)([^)#\s]*)(?:#([^)\s]*))?\)", (ROOT / page).read_text()):
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, anchor


def test_nobody_is_told_to_install_this_from_an_index() -> None:
    """It is on none: what is missing is named itself, or comes with a checkout."""
    files = [
        path for folder in ("singe_plugin", "integrations", "docs", "examples") for path in (ROOT / folder).rglob("*")
    ]
    pages = [path for path in [ROOT / "README.md", *files] if path.suffix in (".py", ".md")]
    assert len(pages) > 100
    assert [str(path) for path in pages if re.search(r"install\b.{0,4}\bsinge_plugin\b", path.read_text())] == []
