"""The model that a command line names: a timm architecture, and where its weights come from."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from singe_plugin.app.sources import architecture_of, builder_of, from_folder, is_source
from singe_plugin.app.weights import Weights, read_weights
from singe_plugin.checks import closest
from singe_plugin.errors import ArtifactError, ConfigError
from singe_plugin.run.architecture import Builder

__all__ = ["NamedModel", "create_model", "parse_pairs"]

_FLAGS = {"num_classes": ("--num-classes", "classes"), "in_chans": ("--in-chans", "input channels")}


@dataclass(frozen=True)
class NamedModel:
    """A timm model.

    Attributes:
        model: in eval mode.
        builder: how to build its architecture again.
        weights: where the weights come from, in words.
        sizes: the classes and input channels that were read off the weights' file, as nothing was said of them.
    """

    model: nn.Module
    builder: Builder
    weights: str
    sizes: dict[str, int] = field(default_factory=dict)


def create_model(
    name: str | None,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> NamedModel:
    """Make a timm model with pretrained weights, weights from a file, or random ones.

    Args:
        name: timm's name, ``hf-hub:OWNER/NAME`` or ``local-dir:FOLDER``; None if ``checkpoint`` is a folder.
        pretrained: download timm's weights (or take them from the cache).
        checkpoint: a file that :func:`~singe_plugin.app.weights.load_weights` reads: ``.safetensors``, or tensors that
            ``torch.save`` wrote; or the folder of a result that was saved: its pruned model.
        num_classes, in_chans: None is what the checkpoint has, else the architecture's own number.
        kwargs: more arguments of ``timm.create_model``.
        seed: of random weights; the caller's random state is left alone.

    Raises:
        ConfigError: if timm has no such model, or cannot make it with these arguments.
        ArtifactError: if the file cannot be read, does not fit the model, or has other classes than were asked for.

    Example:
        >>> made = create_model("resnet18", num_classes=10, kwargs={"channels": [8, 8, 8, 8]})
        >>> made.weights, made.builder.options
        ('random', {'channels': [8, 8, 8, 8], 'num_classes': 10})
    """
    if pretrained and checkpoint is not None:
        raise ConfigError("pretrained weights and a checkpoint were both asked for; choose one")
    if checkpoint is not None and Path(checkpoint).is_dir():
        return NamedModel(*from_folder(checkpoint, name, num_classes, in_chans, kwargs))
    timm = importlib.import_module("timm")
    name = architecture_of(None, None) if name is None else name
    if not is_source(name) and not timm.is_model(name):
        near = closest(name, timm.list_models())
        raise ConfigError(f"timm {timm.__version__} has no model {name!r}{near}; timm.list_models() has the names")
    options: dict[str, Any] = {k: list(v) if isinstance(v, tuple) else v for k, v in (kwargs or {}).items()}
    if num_classes is not None:
        options["num_classes"] = num_classes
    if in_chans is not None:
        options["in_chans"] = in_chans
    file = None if checkpoint is None else read_weights(checkpoint)
    model = _make(timm, name, pretrained, options, seed)
    if file is None:
        return NamedModel(model.eval(), builder_of(name, options, model), "pretrained" if pretrained else "random")
    read = _read_off(file, model, options)
    if read:
        options |= read
        model = _make(timm, name, False, options, seed)
    weights = file.fill(model)
    return NamedModel(model.eval(), builder_of(name, options, model), weights, read)


def _make(timm: Any, name: str, pretrained: bool, options: Mapping[str, Any], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # it is made on the CPU
        torch.manual_seed(seed)
        try:
            model: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
        except Exception as error:
            what = f"timm cannot make {name!r} with {dict(options)}"
            hint = "; without a network, use --checkpoint FILE" if pretrained else ""
            raise ConfigError(f"{what}: {type(error).__name__}: {error}{hint}") from error
    return model


def _read_off(file: Weights, model: nn.Module, options: Mapping[str, Any]) -> dict[str, int]:
    """The sizes that a file has and the model has not; an error where the model's was asked for."""
    found, chans = {}, options.get("in_chans")
    own = Weights(file.path, model.state_dict()).sizes(model, chans)
    for end, (size, tensor) in file.sizes(model, chans).items():
        if own.get(end, (0, ""))[0] == size:
            continue
        flag, what = _FLAGS[end]
        if options.get(end) is not None:
            raise ArtifactError(
                f"{file.path} has {size} {what} ({tensor!r}), and {options[end]} were asked for; leave {flag} out, or "
                "give other weights"
            )
        found[end] = size
    return found


def parse_pairs(pairs: Iterable[str]) -> dict[str, Any]:
    """``key=value`` texts as a dictionary; values are Python literals if they look like one, else text.

    Raises:
        ConfigError: for a text without ``=``.

    Example:
        >>> parse_pairs(["layers=[1, 1]", "stem_type=deep", "drop_rate=0.1"])
        {'layers': [1, 1], 'stem_type': 'deep', 'drop_rate': 0.1}
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise ConfigError(f"{pair!r} is not of the form key=value")
        try:
            found[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[key] = text
    return found
