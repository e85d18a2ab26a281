"""Models that are not one of timm's own names: a folder that an earlier run wrote, and what timm reads elsewhere.

``hf-hub:`` and ``local-dir:`` names stand for a configuration that lies elsewhere. What it says is taken over into the
builder, so that a pruned model is loaded again without it, by timm's own code alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from singe_plugin.errors import ArtifactError, ConfigError
from singe_plugin.run.architecture import Builder
from singe_plugin.run.artifact import RECORD, load, read
from singe_plugin.run.record import OVERLAY, PREPROCESSING

__all__ = ["architecture_of", "builder_of", "from_folder", "is_source"]

_HUB, _FOLDER = "hf-hub", "local-dir"


def is_source(name: str) -> bool:
    """Whether a name says where timm finds the configuration.

    Example:
        >>> is_source("hf-hub:timm/resnet18.a1_in1k"), is_source("resnet18.a1_in1k")
        (True, False)
    """
    return name.partition(":")[0].lower().replace("_", "-") in (_HUB, _FOLDER) and ":" in name


def builder_of(name: str, options: Mapping[str, Any], model: nn.Module) -> Builder:
    """How to build a model again that timm made of a name and options.

    Raises:
        ConfigError: if that would not be the same model.
    """
    if not is_source(name):
        return Builder.timm(name, **options)
    config, architecture, arguments = _config(name)
    preprocessing = {key: value for key, value in config.items() if key in PREPROCESSING and value is not None}
    merged = {**arguments, **options, OVERLAY: preprocessing}
    builder = Builder.timm(architecture, **{k: list(v) if isinstance(v, tuple) else v for k, v in merged.items()})
    try:
        builder.check(model)
    except ArtifactError as error:
        raise ConfigError(f"{name} cannot be built again from what it says: {error}") from error
    return builder


def architecture_of(name: str | None, checkpoint: str | Path | None) -> str:
    """The name of timm's that is meant by a name, or a folder, or both; nothing is built.

    Raises:
        ArtifactError: if the folder holds no result.
        ConfigError: if a name was left out.
    """
    if name is not None:
        return _config(name)[1] if is_source(name) else name
    if checkpoint is None or not Path(checkpoint).is_dir():
        raise ConfigError("--model NAME is missing: timm's name of the architecture")
    return str(read(checkpoint).builder.name)


def _config(name: str) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """What timm reads of a source: preprocessing and classes, the architecture, and the arguments it was made with."""
    source, _, place = name.partition(":")
    try:
        hub: Any = importlib.import_module("timm.models._hub")
        from_hub = source.lower().replace("_", "-") == _HUB
        found = (hub.load_model_config_from_hf if from_hub else hub.load_model_config_from_path)(place)
    except Exception as error:
        raise ConfigError(
            f"{name} cannot be read: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}; give "
            "local-dir:FOLDER with config.json and model.safetensors in it, or hf-hub:OWNER/NAME"
        ) from error
    config, architecture, arguments = found
    return dict(config), str(architecture), dict(arguments or {})


def from_folder(
    directory: str | Path,
    name: str | None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, Builder, str]:
    """The pruned model that an earlier run saved to a folder, how its architecture is built, and what it is in words.

    Args:
        directory: where it was saved.
        name: of the architecture, which must be the one it was made of; None asks for none.
        num_classes, in_chans, kwargs: must be what it was made with; None asks for nothing.

    Raises:
        ArtifactError: if the folder holds no result of a timm model, or a damaged one.
        ConfigError: if something else was asked for.
    """
    directory = Path(directory)
    if not (directory / RECORD).is_file():
        raise ArtifactError(
            f"{directory} is a folder without {RECORD}; --checkpoint takes one that singe prune has written to its "
            "end (--resume ends a run that was interrupted), or a file of weights"
        )
    result = load(directory)
    builder: Builder = result.builder
    options = dict(builder.options)
    if num_classes is not None:
        options.setdefault("num_classes", getattr(result.model, "num_classes", None))
    asked = {"num_classes": num_classes, "in_chans": in_chans, **(kwargs or {})}
    asked = {key: list(v) if isinstance(v, tuple) else v for key, v in asked.items() if v is not None}
    if name is not None and architecture_of(name, None) != builder.name:
        raise ConfigError(f"{directory} holds a pruned {builder.name}, and --model {name} was given; leave --model out")
    if in_chans is not None and "in_chans" not in options:
        options["in_chans"] = next((m.in_channels for m in result.model.modules() if isinstance(m, nn.Conv2d)), None)
    for key, value in asked.items():
        if options.get(key) != value:
            flag = {"num_classes": "--num-classes", "in_chans": "--in-chans"}.get(key, "--model-kwargs")
            raise ConfigError(
                f"{directory} holds a {builder.name} with {key}={options.get(key)!r}, and {value!r} was asked for; "
                f"leave {flag} out"
            )
    kind = "masked" if result.weight_masks else "pruned"
    return result.model, builder, f"{kind} model in {directory}"
