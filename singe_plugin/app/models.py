"""The model that a command line names: a timm architecture, and where its weights come from."""

from __future__ import annotations

import argparse
import ast
import importlib
import pickle
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from singe_plugin.app.sources import architecture_of, builder_of, from_folder, is_source
from singe_plugin.checks import closest
from singe_plugin.errors import ArtifactError, ConfigError
from singe_plugin.run.architecture import Builder

__all__ = ["NamedModel", "create_model", "load_weights", "parse_pairs"]

_AVERAGED = ("state_dict_ema", "model_ema")
_WRAPPERS = (*_AVERAGED, "state_dict", "model")


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
        checkpoint: a file that :func:`load_weights` reads: ``.safetensors``, or tensors that ``torch.save`` wrote; or
            the folder of a result that was saved: its pruned model.
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
    with torch.random.fork_rng(devices=[]):  # it is made on the CPU
        torch.manual_seed(seed)
        try:
            model = timm.create_model(name, pretrained=pretrained, **options)
        except Exception as error:
            what = f"timm cannot make {name!r} with {options}"
            hint = "; without a network, use --checkpoint FILE" if pretrained else ""
            raise ConfigError(f"{what}: {type(error).__name__}: {error}{hint}") from error
    if checkpoint is not None:
        weights = load_weights(model, checkpoint)
    else:
        weights = "pretrained" if pretrained else "random"
    return NamedModel(model.eval(), builder_of(name, options, model), weights)


def load_weights(model: nn.Module, path: str | Path) -> str:
    """Fill a model from a file; every tensor must be there and have the right shape.

    The file may be what a training script keeps: timm's, DeiT's (averaged weights are preferred, as timm does),
    Lightning's; and the names may have one more prefix: DDP's, ``torch.compile``'s, that of an attribute of Lightning's
    module. What has not the prefix belongs to something else.

    Returns:
        what was taken of the file, in words.

    Raises:
        ArtifactError: naming the first tensor that does not fit.

    Example:
        >>> import tempfile
        >>> net = torch.nn.Linear(2, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "last.ckpt"
        ...     state = {f"model.{name}": tensor for name, tensor in net.state_dict().items()}
        ...     torch.save({"state_dict": state, "epoch": 3}, path)
        ...     load_weights(net, path)
        "checkpoint last.ckpt (what 'model.' has)"
    """
    path = Path(path)
    found = _read(path)
    key = next((key for key in _WRAPPERS if isinstance(found, Mapping) and isinstance(found.get(key), Mapping)), "")
    found = found[key] if key else found
    if not isinstance(found, Mapping) or not any(isinstance(v, Tensor) for v in found.values()):
        raise ArtifactError(f"{path} holds {type(found).__name__}, not a dictionary of named tensors")
    own = model.state_dict()
    state = {str(name).replace("_orig_mod.", ""): value for name, value in found.items()}
    prefix = _prefix(path, list(state), own)
    state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        first = f"it lacks {missing[0]!r}" if missing else f"it has {unexpected[0]!r}"
        raise ArtifactError(
            f"{path} is not of this architecture: {len(missing)} tensors are missing and {len(unexpected)} are not the "
            f"model's ({first}); check --model, --model-kwargs and --num-classes"
        )
    shapes = {name: tuple(value.shape) if isinstance(value, Tensor) else value for name, value in state.items()}
    for name in sorted(own):
        if shapes[name] != tuple(own[name].shape):
            raise ArtifactError(
                f"{path}: {name!r} has shape {shapes[name]}, the model's is {tuple(own[name].shape)}; check "
                "--num-classes, --in-chans and --model-kwargs"
            )
    model.load_state_dict(state)
    notes = [f"its averaged weights, {key}"] if key in _AVERAGED else []
    notes += [f"what {prefix!r} has"] if prefix.removeprefix("module.") else []
    return f"checkpoint {path.name}" + (f" ({', '.join(notes)})" if notes else "")


def _read(path: Path) -> Any:
    """What a file holds, with no code run that it names."""
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist; --checkpoint takes a .safetensors or .pth file of weights")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm and DeiT keep their arguments
            return torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        needs = ", ".join(re.findall(r"GLOBAL (\S+)", str(error))) or _first_line(error)
        raise ArtifactError(
            f"{path} cannot be read as weights: it is a pickle that may run code ({needs}). If you trust it, keep its "
            "weights alone, torch.save(torch.load(path, weights_only=False)['state_dict'], new_path), and give that"
        ) from error
    except Exception as error:
        raise ArtifactError(
            f"{path} cannot be read as weights ({type(error).__name__}: {_first_line(error)}); a .safetensors file, or "
            "a .pth file that holds tensors, is needed"
        ) from error


def _prefix(path: Path, names: Iterable[str], own: Collection[str]) -> str:
    """What stands before most of the model's names."""
    counts = Counter(
        name[:start]
        for name in names
        for start in [0, *(i + 1 for i, letter in enumerate(name) if letter == ".")]
        if name[start:] in own
    )
    most = max(counts.values(), default=0)
    best = [prefix for prefix, count in counts.items() if count == most]
    if len(best) > 1 and most == len(own) and "" not in best:
        raise ArtifactError(
            f"{path} holds the weights of several such models ({', '.join(map(repr, best))}); keep those of one of them"
        )
    return best[0] if len(best) == 1 else ""


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
