"""A pruned model is loaded where this library is not: by timm, or as a program of PyTorch's."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import singe_plugin
from singe_plugin import ArtifactError, Builder, ConfigError, Pace, Result
from singe_plugin.run.arguments import timm_arguments
from singe_plugin.run.inputs import describe_inputs

from small_nets import Branching, Chain, assert_same_values, images

FAST: dict[str, Any] = {"scoring": "l2", "finetune": 0, "repair": None, "target": None}
VIT: dict[str, Any] = {"img_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 4}
BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, *rest):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} is not here")

sys.meta_path.insert(0, Blocked())
import torch
torch.set_num_threads(1)
{code}
made = model(torch.load({inputs!r}))
torch.save(made.detach(), {outputs!r})
assert "singe_plugin" not in sys.modules
"""


def elsewhere(code: str, x: Tensor, folder: Path, *blocked: str) -> Tensor:
    """What a model gives in a process that cannot import us."""
    torch.save(x, folder / "x.pt")
    text = BLOCKED.format(
        blocked={"singe_plugin", *blocked}, code=code, inputs=str(folder / "x.pt"), outputs=str(folder / "y.pt")
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    found: Tensor = torch.load(folder / "y.pt")
    return found


def pictures(size: int = 16) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(4, 3, size, size), torch.arange(4))]


def code_of(folder: Path) -> str:
    """The code of the folder's README."""
    return (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]


def test_widths_that_timm_has_arguments_for_are_loaded_by_timm_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Half of every hidden layer of a transformer: one ratio says it."""
    model = timm.create_model("vit_tiny_patch16_224", **VIT)
    ratios = {"blocks.0.mlp.fc1": 0.5, "blocks.1.mlp.fc1": 0.5}
    pace = Pace("layers", ratios=ratios, heads="keep", verify=False)
    result = singe_plugin.prune(model, pictures(), pace=pace, **FAST)
    assert {m.out_features for n, m in result.model.named_modules() if n.endswith("fc1")} == {48}
    result.builder = Builder.timm("vit_tiny_patch16_224", **VIT)
    with caplog.at_level(logging.INFO, "singe_plugin"):
        singe_plugin.save(result, tmp_path / "out", standalone=True)
    folder = tmp_path / "out" / "standalone"
    assert f"timm.create_model('local-dir:{folder}', pretrained=True)" in caplog.text
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    made = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert_same_values(made, result.model)
    assert made.pretrained_cfg["input_size"][-1] == 16
    x = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(
        elsewhere(code_of(folder) + "model.eval()", x, tmp_path), result.model.eval()(x), rtol=1e-5, atol=1e-6
    )
    assert torch.equal(singe_plugin.load(tmp_path / "out").model(x), result.model(x))


def test_other_widths_are_a_program(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kinds: dict[str, Any] = {"layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8], "num_classes": 4}
    model = timm.create_model("resnet18", **kinds)
    pace = Pace(rounds=1, min_width=1, verify=False)
    result = singe_plugin.prune(model, pictures(), pace=pace, **{**FAST, "target": "params=0.3"})
    result.builder = Builder.timm("resnet18", **kinds)
    with caplog.at_level(logging.INFO, "singe_plugin"):
        singe_plugin.save(result, tmp_path / "out", standalone=True)
    folder = tmp_path / "out" / "standalone"
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "model.pt2"]
    assert "no argument of timm.create_model gives" in caplog.text
    assert "float32 [N, 3, 16, 16]" in (folder / "README.md").read_text()
    for count in (1, 5):
        x = torch.randn(count, 3, 16, 16)
        code = code_of(folder).replace("model.pt2", "out/standalone/model.pt2")
        made = elsewhere(code, x, tmp_path, "timm", "torch_pruning") if count == 5 else None
        program = torch.export.load(folder / "model.pt2").module()
        for found in (program(x), *([] if made is None else [made])):
            torch.testing.assert_close(found, result.model.eval()(x), rtol=1e-5, atol=1e-6)


def test_a_model_of_ones_own_is_a_program_and_an_earlier_one_goes(tmp_path: Path) -> None:
    result = singe_plugin.prune(
        Chain(), images(), pace=Pace(rounds=1, verify=False, min_width=1), **{**FAST, "target": "params=0.2"}
    )
    builder = Builder.factory("small_nets:Chain")
    singe_plugin.save(result, tmp_path, builder, standalone=True)
    assert "built by factory:small_nets:Chain, not by timm" in (tmp_path / "standalone" / "README.md").read_text()
    x = images()[0][0]
    program = torch.export.load(tmp_path / "standalone" / "model.pt2").module()
    torch.testing.assert_close(program(x), result.model.eval()(x))
    singe_plugin.save(result, tmp_path, builder)
    assert not (tmp_path / "standalone").exists()
    result.inputs = None
    with pytest.raises(ConfigError, match="needs to know what the model is called with"):
        singe_plugin.save(result, tmp_path, builder, standalone=True)
    assert_same_values(singe_plugin.load(tmp_path, trust=True).model, result.model)


def test_what_can_be_written_in_neither_way_is_said_and_the_result_is_there(tmp_path: Path) -> None:
    numbers = singe_plugin.run.result.Metrics(1, 1)  # type: ignore[attr-defined]
    structure: dict[str, Any] = {"attributes": {}, "folded": [], "channels_last": [], "frozen": []}
    result = Result(Branching(), numbers, numbers, structure=structure, inputs=describe_inputs(torch.ones(2, 4)))
    builder = Builder.factory("test_standalone:Branching")
    with pytest.raises(
        ArtifactError, match=r"neither for timm \(.*\) nor as a program \(.*Branching cannot be exported"
    ):
        singe_plugin.save(result, tmp_path, builder, standalone=True)
    assert not (tmp_path / "standalone").exists()
    assert_same_values(singe_plugin.load(tmp_path, trust=True).model, result.model)


@pytest.mark.parametrize(
    ("name", "given", "changed"),
    [
        ("resnet18", {"layers": [1, 1, 1, 1], "num_classes": 3}, {"channels": [64, 24, 40, 48]}),
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 1, "num_classes": 3}, {"embed_dim": 48}),
        ("convnext_atto", {"depths": [1, 1, 1, 1], "num_classes": 3}, {"dims": [16, 24, 32, 48]}),
    ],
)
def test_arguments_are_found_by_building(name: str, given: dict[str, Any], changed: dict[str, Any]) -> None:
    model = timm.create_model(name, **given, **changed).eval()
    found, why = timm_arguments(model, Builder.timm(name, **given), torch.randn(2, 3, 32, 32))
    assert found is not None, why
    assert {key: found.get(key) for key in changed} == changed
    again = timm.create_model(name, **found).eval()
    again.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(again(x), model(x))


def test_the_same_tensors_are_not_enough() -> None:
    """Two heads of twelve dimensions have the tensors of three of eight."""
    model = timm.create_model("vit_tiny_patch16_224", **{**VIT, "num_heads": 3})
    found, why = timm_arguments(model, Builder.timm("vit_tiny_patch16_224", **VIT), torch.randn(2, 3, 16, 16))
    assert (found, why) == (None, "built with other arguments, it does not compute the same")
