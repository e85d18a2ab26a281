"""Weights from a file, in the forms that training scripts leave behind."""

from __future__ import annotations

import argparse
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

from singe_plugin.errors import ArtifactError

__all__ = ["Weights", "load_weights", "read_weights"]

_AVERAGED = ("state_dict_ema", "model_ema")
_WRAPPERS = (*_AVERAGED, "state_dict", "model")


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
    return read_weights(path).fill(model)


@dataclass(frozen=True)
class Weights:
    """What a file holds: named tensors, perhaps under a prefix.

    Attributes:
        path: the file.
        tensors: by name; things that are no tensors are still there.
        key: what they were found under; nothing if they are all that the file has.
    """

    path: Path
    tensors: dict[str, Any]
    key: str = ""

    def fill(self, model: nn.Module) -> str:
        """Fill a model, as :func:`load_weights` says."""
        path, own = self.path, model.state_dict()
        state, prefix = self.of(own)
        missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or unexpected:
            first = f"it lacks {missing[0]!r}" if missing else f"it has {unexpected[0]!r}"
            raise ArtifactError(
                f"{path} is not of this architecture: {len(missing)} tensors are missing and {len(unexpected)} are not "
                f"the model's ({first}); check --model, --model-kwargs and --num-classes"
            )
        shapes = {name: tuple(value.shape) if isinstance(value, Tensor) else value for name, value in state.items()}
        for name in sorted(own):
            if shapes[name] != tuple(own[name].shape):
                raise ArtifactError(
                    f"{path}: {name!r} has shape {shapes[name]}, the model's is {tuple(own[name].shape)}; check "
                    "--num-classes, --in-chans and --model-kwargs"
                )
        model.load_state_dict(state)
        notes = [f"its averaged weights, {self.key}"] if self.key in _AVERAGED else []
        notes += [f"what {prefix!r} has"] if prefix.removeprefix("module.") else []
        return f"checkpoint {path.name}" + (f" ({', '.join(notes)})" if notes else "")

    def of(self, own: Collection[str]) -> tuple[dict[str, Any], str]:
        """The tensors under the prefix that stands before most of the model's names, and that prefix."""
        prefix = _prefix(self.path, list(self.tensors), own)
        return {n.removeprefix(prefix): value for n, value in self.tensors.items() if n.startswith(prefix)}, prefix

    def sizes(self, model: nn.Module, in_chans: int | None = None) -> dict[str, tuple[int, str]]:
        """What the file says of the model's ends, ``num_classes`` and ``in_chans``: the size, and the tensor with it.

        The classifier and the first convolution are those that timm names for the architecture
        (``pretrained_cfg["classifier"]`` and ``["first_conv"]``, one or several). Nothing is said of an end where the
        model's own tensor has another size than the model says (a stem that folds pixels into channels, say).

        Args:
            model: of the architecture.
            in_chans: what it was made with, if not with the architecture's own number.

        Raises:
            ArtifactError: if several classifiers have different numbers of classes.

        Example:
            >>> import timm
            >>> state = timm.create_model("test_resnet", num_classes=7).state_dict()
            >>> Weights(Path("w.pth"), state).sizes(timm.create_model("test_resnet"))
            {'num_classes': (7, 'fc.weight'), 'in_chans': (3, 'conv1.0.weight')}
        """
        about, own = getattr(model, "pretrained_cfg", None) or {}, model.state_dict()
        state, _ = self.of(own)
        found: dict[str, tuple[int, str]] = {}
        for end, key, dimension, size in (
            ("num_classes", "classifier", 0, getattr(model, "num_classes", None)),
            ("in_chans", "first_conv", 1, in_chans or (about.get("input_size") or (None,))[0]),
        ):
            named = about.get(key) or ()
            for name in (f"{part}.weight" for part in ((named,) if isinstance(named, str) else named)):
                mine, theirs = own.get(name), state.get(name)
                headless = end == "num_classes" and mine is None and size == 0
                if not isinstance(theirs, Tensor) or theirs.ndim < 2:
                    continue
                if headless or (mine is not None and mine.ndim == theirs.ndim and mine.shape[dimension] == size):
                    this = int(theirs.shape[dimension])
                    if end in found and found[end][0] != this:
                        raise ArtifactError(
                            f"{self.path} contradicts itself: {found[end][1]!r} is for {found[end][0]} and {name!r} "
                            f"for {this}; check how it was trained"
                        )
                    found.setdefault(end, (this, name))
        return found


def read_weights(path: str | Path) -> Weights:
    """Read the weights that a file holds.

    Raises:
        ArtifactError: if it cannot be read, or holds no weights.
    """
    path = Path(path)
    found = _read(path)
    key = next((key for key in _WRAPPERS if isinstance(found, Mapping) and isinstance(found.get(key), Mapping)), "")
    found = found[key] if key else found
    if not isinstance(found, Mapping) or not any(isinstance(v, Tensor) for v in found.values()):
        raise ArtifactError(f"{path} holds {type(found).__name__}, not a dictionary of named tensors")
    return Weights(path, {str(name).replace("_orig_mod.", ""): value for name, value in found.items()}, key)


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


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
