"""A pruned model that is loaded without this library: by timm's own code, or as a ``torch.export`` program.

Where arguments of ``timm.create_model`` give the widths that are left, a folder is written that timm loads by itself,
weights apart, to train on with. Everything else becomes a program, which computes and cannot be trained on as easily.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from singe_plugin.errors import ArtifactError, ConfigError
from singe_plugin.files import write_atomically, write_text
from singe_plugin.run.architecture import Builder
from singe_plugin.run.arguments import timm_arguments
from singe_plugin.run.export import Exportable, copied_plain, differences, export
from singe_plugin.run.inputs import random_inputs
from singe_plugin.run.record import OVERLAY, PREPROCESSING

__all__ = ["STANDALONE", "clear_standalone", "write_standalone"]

_logger = logging.getLogger("singe_plugin")
STANDALONE = "standalone"
_CONFIG, _WEIGHTS, _PROGRAM, _README = "config.json", "model.safetensors", "model.pt2", "README.md"
_TOLERANCE = 1e-5

_BY_TIMM = """# Loaded by timm alone

```python
import timm

model = timm.create_model("local-dir:{folder}", pretrained=True)
```

`config.json` has the architecture and its arguments, `model.safetensors` the weights: what timm keeps on the hub.
"""
_AS_PROGRAM = """# Loaded by PyTorch alone

```python
import torch

model = torch.export.load("model.pt2").module()  # {inputs}
```

A program for any number of examples, in eval mode, written by PyTorch {version}.
There are no timm arguments for this model: {why}.
"""


def write_standalone(result: Exportable, builder: Builder, directory: Path) -> str:
    """Write a model so that it is loaded without this library, and make sure that it is.

    Args:
        result: the model and what it is called with.
        builder: of the unpruned architecture.
        directory: a folder ``standalone`` is made in it.

    Returns:
        what was written and how it is loaded, in a sentence, which is logged, too.

    Raises:
        ConfigError: if it is not known what the model is called with.
        ArtifactError: if it can be written in neither way.
    """
    if result.inputs is None:
        raise ConfigError(
            "standalone=True needs to know what the model is called with; set result.inputs = "
            "singe_plugin.run.inputs.describe_inputs(batch)"
        )
    clear_standalone(directory)
    folder = directory / STANDALONE
    model = copied_plain(result.model)
    inputs = random_inputs(result.inputs, 2)
    arguments, why = timm_arguments(model, builder, inputs)
    if arguments is not None:
        why = _write_for_timm(model, builder.name, arguments, inputs, folder)
    if not why:
        said = f"{folder} is loaded by timm alone: timm.create_model('local-dir:{folder}', pretrained=True)"
    else:
        try:
            export(result, folder / _PROGRAM)
        except ArtifactError as error:
            clear_standalone(directory)
            raise ArtifactError(
                f"{folder}: the model cannot be written to be loaded without singe_plugin, neither for timm ({why}) "
                f"nor as a program ({error}); singe_plugin.load({str(directory)!r}) loads it"
            ) from error
        write_text(
            folder / _README, _AS_PROGRAM.format(inputs=_shapes(result.inputs), why=why, version=torch.__version__)
        )
        said = f"{folder / _PROGRAM} is loaded by PyTorch alone, torch.export.load(...).module(); timm: {why}"
    _logger.info("%s", said)
    return said


def clear_standalone(directory: Path) -> None:
    """Delete what an earlier result left: it is another model."""
    folder = directory / STANDALONE
    for name in (_CONFIG, _WEIGHTS, _PROGRAM, _README):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()  # unless somebody keeps files there


def _write_for_timm(model: nn.Module, name: str, arguments: dict[str, Any], inputs: Any, folder: Path) -> str:
    """Write what ``local-dir:`` reads; returns why timm does not make the same model of it, if it does not."""
    tensors = {key: tensor.detach().contiguous().clone() for key, tensor in model.state_dict().items()}
    write_atomically(folder / _WEIGHTS, lambda path: save_file(tensors, path))
    known: Any = getattr(model, "pretrained_cfg", None) or {}
    kept = (*PREPROCESSING, "first_conv", "classifier")
    preprocessing = {key: known[key] for key in kept if known.get(key) is not None}
    if isinstance(inputs, Tensor) and inputs.ndim == 4:
        preprocessing["input_size"] = list(inputs.shape[1:])
    options = {key: value for key, value in arguments.items() if key != OVERLAY}
    classes = getattr(model, "num_classes", None)
    config = {"architecture": name, "num_classes": classes, "model_args": options, "pretrained_cfg": preprocessing}
    write_text(folder / _CONFIG, json.dumps(config, indent=1))
    write_text(folder / _README, _BY_TIMM.format(folder=folder))
    try:
        made: nn.Module = importlib.import_module("timm").create_model(f"local-dir:{folder}", pretrained=True)
        wrong = differences(made.eval(), model, inputs, _TOLERANCE)
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        clear_standalone(folder.parent)
        return f"timm makes another model of the arguments {options} ({wrong})"
    return ""


def _shapes(described: Mapping[str, Any]) -> str:
    """The inputs in words, with N for the number of examples."""
    if "tensor" in described:
        sizes = ["N", *described["tensor"][1:]] if described["batched"] else described["tensor"]
        return f"{described['dtype']} [{', '.join(map(str, sizes))}]"
    if "dict" in described:
        return ", ".join(f"{key}={_shapes(part)}" for key, part in described["dict"].items())
    if "value" in described:
        return repr(described["value"])
    (parts,) = described.values()
    return f"({', '.join(_shapes(part) for part in parts)})"
