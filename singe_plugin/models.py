"""The model that a command line names: a timm architecture, and where its weights come from."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from singe_plugin.architecture import Builder
from singe_plugin.errors import ArtifactError, ConfigError

__all__ = ["NamedModel", "create_model", "load_weights", "parse_pairs"]

_WRAPPERS = ("state_dict_ema", "state_dict", "model_ema", "model")


@dataclass(frozen=True)
class NamedModel:
    """A timm model.

    Attributes:
        model: in eval mode.
        builder: how to build its architecture again.
        weights: where the weights come from, in words.
    """

    model: nn.Module
    builder: Builder
    weights: str


def create_model(
    name: str,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> NamedModel:
    """Make a timm model with pretrained weights, weights from a file, or random ones.

    Args:
        name: timm's name.
        pretrained: download timm's weights (or take them from the cache).
        checkpoint: a ``.safetensors`` file, or a ``.pth``/``.pt`` file that ``torch.load(weights_only=True)`` reads.
        num_classes, in_chans: None is the architecture's own number.
        kwargs: more arguments of ``timm.create_model``.
        seed: of random weights; the caller's random state is left alone.

    Raises:
        ConfigError: if timm has no such model, or cannot make it with these arguments.
        ArtifactError: if the file cannot be read or does not fit the model.

    Example:
        >>> made = create_model("resnet18", num_classes=10, kwargs={"channels": [8, 8, 8, 8]})
        >>> made.weights, made.builder.options
        ('random', {'channels': [8, 8, 8, 8], 'num_classes': 10})
    """
    if pretrained and checkpoint is not None:
        raise ConfigError("pretrained weights and a checkpoint were both asked for; choose one")
    timm = importlib.import_module("timm")
    if not timm.is_model(name):
        near = timm.list_models(f"*{name}*")[:5] or timm.list_models(f"{name[:4]}*")[:5]
        raise ConfigError(f"timm {timm.__version__} has no model {name!r}; near it are {', '.join(near) or 'none'}")
    options: dict[str, Any] = {k: list(v) if isinstance(v, tuple) else v for k, v in (kwargs or {}).items()}
    if num_classes is not None:
        options["num_classes"] = num_classes
    if in_chans is not None:
        options["in_chans"] = in_chans
    with torch.random.fork_rng(devices=[]):  # it is made on the CPU
        torch.manual_seed(seed)
        try:
            model = timm.create_model(name, pretrained=pretrained, **options)
        except Exception as error:
            what = f"timm cannot make {name!r} with {options}"
            hint = "; without a network, use --checkpoint FILE" if pretrained else ""
            raise ConfigError(f"{what}: {type(error).__name__}: {error}{hint}") from error
    if checkpoint is not None:
        load_weights(model, checkpoint)
    weights = "pretrained" if pretrained else "random" if checkpoint is None else f"checkpoint {Path(checkpoint).name}"
    return NamedModel(model.eval(), Builder.timm(name, **options), weights)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Fill a model from a file; every tensor must be there and have the right shape.

    Raises:
        ArtifactError: naming the first tensor that does not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist; --checkpoint takes a .safetensors or .pth file of weights")
    try:
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:
        raise ArtifactError(
            f"{path} cannot be read as weights ({type(error).__name__}: {_first_line(error)}); a .safetensors file, or "
            "a .pth file that holds tensors only, is needed"
        ) from error
    if isinstance(found, Mapping):
        found = next((found[key] for key in _WRAPPERS if isinstance(found.get(key), Mapping)), found)
    if not isinstance(found, Mapping) or not found or not all(isinstance(v, Tensor) for v in found.values()):
        raise ArtifactError(f"{path} holds {type(found).__name__}, not a dictionary of named tensors")
    state = {str(name).removeprefix("module."): tensor for name, tensor in found.items()}
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    if missing or unexpected:
        first = f"it lacks {missing[0]!r}" if missing else f"it has {unexpected[0]!r}"
        raise ArtifactError(
            f"{path} is not of this architecture: {len(missing)} tensors are missing and {len(unexpected)} are not the "
            f"model's ({first}); check --model, --model-kwargs and --num-classes"
        )
    if shapes:
        key = min(shapes)
        raise ArtifactError(
            f"{path}: {key!r} has shape {tuple(state[key].shape)}, the model's is {tuple(own[key].shape)}; check "
            "--num-classes, --in-chans and --model-kwargs"
        )
    model.load_state_dict(state)


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


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
