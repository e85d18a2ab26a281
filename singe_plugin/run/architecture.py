"""The architecture of a model: how to build it unpruned, and what removals changed of its structure."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from singe_plugin.axes.blocks import AFTER
from singe_plugin.errors import ArtifactError, ConfigError
from singe_plugin.masks import plain_tensors, plain_types
from singe_plugin.run.record import NOT_STRUCTURE, encode
from singe_plugin.state import RngState

__all__ = [
    "Builder",
    "Structure",
    "build_by",
    "describe_structure",
    "is_of_diffusers",
    "is_of_transformers",
    "origin_of",
    "remember_origin",
]

_ORIGIN = "_singe_origin"
_ATTENTION = "attn_implementation"
_NOT_BUILT = frozenset({"_name_or_path", "transformers_version", "architectures", "auto_map"})


@dataclass(frozen=True)
class Builder:
    """How to build the unpruned architecture: by a timm name, a class of transformers, or a function of the user's.

    Attributes:
        kind: ``"timm"``, ``"transformers"`` or ``"factory"``.
        name: timm's model name, the name of a class of transformers, or ``"package.module:function"``.
        options: keyword arguments; plain JSON values.

    Example:
        >>> Builder.factory("torch.nn:Linear", in_features=3, out_features=2).build()
        Linear(in_features=3, out_features=2, bias=True)
    """

    kind: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def timm(cls, name: str, **options: Any) -> Builder:
        """Build with ``timm.create_model(name, pretrained=False, **options)``."""
        return cls("timm", name, options)

    @classmethod
    def diffusers(cls, model: nn.Module) -> Builder:
        """Build the class of a model of diffusers with the configuration that it has now."""
        config: Any = model.config
        options = {key: value for key, value in dict(config).items() if not key.startswith("_")}
        return cls.factory(f"diffusers:{type(model).__name__}", **json.loads(json.dumps(options)))

    @classmethod
    def transformers(cls, model: nn.Module) -> Builder:
        """Build the class of a model of transformers with the configuration that it has now."""
        config: Any = model.config
        options = json.loads(config.to_json_string(use_diff=False))
        options = {key: value for key, value in options.items() if key not in _NOT_BUILT and value is not None}
        return cls("transformers", type(model).__name__, {**options, _ATTENTION: config._attn_implementation})

    @classmethod
    def factory(cls, name: str, **options: Any) -> Builder:
        """Build with ``"package.module:function"``, called with ``options``.

        Raises:
            ConfigError: if the name has another form.
        """
        if name.count(":") != 1 or not all(name.split(":")):
            raise ConfigError(f"factory {name!r} is not of the form 'package.module:function'")
        return cls("factory", name, options)

    def build(self) -> nn.Module:
        """Build the architecture, with whatever weights it initialises itself with.

        Raises:
            ArtifactError: if the module, function or model does not exist, or fails.
        """
        what = f"{self.kind}:{self.name} with {self.options}"
        if self.kind == "timm":
            timm = importlib.import_module("timm")
            return build_by(what, lambda: timm.create_model(self.name, pretrained=False, **self.options))
        if self.kind == "factory":
            module, _, function = self.name.partition(":")
            return build_by(what, lambda: getattr(importlib.import_module(module), function)(**self.options))
        if self.kind == "transformers":
            return build_by(what, self._of_transformers)
        raise ArtifactError(f"unknown kind of builder {self.kind!r}; choose 'timm', 'transformers' or 'factory'")

    def _of_transformers(self) -> Any:
        kind = getattr(importlib.import_module("transformers"), self.name)
        config = kind.config_class.from_dict({k: v for k, v in self.options.items() if k != _ATTENTION})
        config._attn_implementation = self.options.get(_ATTENTION)
        return kind(config)

    def check(self, model: nn.Module) -> None:
        """Raise :class:`ArtifactError` unless building gives exactly the modules and shapes of ``model``."""
        built = self.build()
        ours, theirs = _signature(model), _signature(built)
        what = "tensors"
        if ours == theirs:  # other activations or pooling have the same tensors
            ours, theirs, what = _modules(model), _modules(built), "modules"
        if ours != theirs:
            names = [n for n in {**ours, **theirs} if ours.get(n) != theirs.get(n)]
            raise ArtifactError(
                f"builder {self.kind}:{self.name} {self.options} does not build this model: "
                f"{len(names)} {what} differ, the first is {names[0]!r}; give the options it was made with"
            )

    @classmethod
    def infer(cls, model: nn.Module) -> Builder | None:
        """Find the builder of a model of timm, transformers or diffusers from what it knows of itself.

        None if that does not build the same model. Of a model that was pruned already it is the builder of the unpruned
        one, see :func:`remember_origin`.
        """
        origin = origin_of(model)
        if origin["builder"] is not None:
            return cls(**origin["builder"])
        if is_of_transformers(model):
            with torch.device("meta"):  # only shapes and attributes are compared
                return cls._checked(cls.transformers(model), model)
        config = getattr(model, "pretrained_cfg", None) or {}
        name = config.get("architecture") if isinstance(config, dict) else getattr(config, "architecture", None)
        if is_of_diffusers(model):
            return cls._checked(cls.diffusers(model), model)
        if not name or not hasattr(model, "num_classes"):
            return None
        options: dict[str, Any] = {"num_classes": model.num_classes}
        first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
        if first is not None and first.in_channels * first.groups not in (3,):
            options["in_chans"] = first.in_channels
        return cls._checked(cls.timm(str(name), **options), model)

    @staticmethod
    def _checked(builder: Builder, model: nn.Module) -> Builder | None:
        try:
            builder.check(model)
        except ArtifactError:
            return None
        return builder


def is_of_diffusers(model: nn.Module) -> bool:
    """Whether a model is of a class of diffusers' own.

    Example:
        >>> is_of_diffusers(nn.Linear(1, 1))
        False
    """
    library, kind = sys.modules.get("diffusers"), type(model)
    if library is None or not kind.__module__.startswith("diffusers."):
        return False
    return isinstance(model, library.ModelMixin) and getattr(library, kind.__name__, None) is kind


def is_of_transformers(model: nn.Module) -> bool:
    """Whether a model is of a class of transformers' own.

    Example:
        >>> is_of_transformers(nn.Linear(1, 1))
        False
    """
    library = sys.modules.get("transformers")
    kind = type(model)
    if library is None or not kind.__module__.startswith("transformers."):
        return False
    return isinstance(model, library.PreTrainedModel) and getattr(library, kind.__name__, None) is kind


def build_by(what: str, make: Callable[[], Any]) -> nn.Module:
    """Return the module that a function makes; random states are left alone.

    Args:
        what: the architecture, for the message.
        make: the function.

    Raises:
        ArtifactError: if it fails, or makes something else.
    """
    rng = RngState.capture()
    try:
        model = make()
    except ArtifactError:
        raise
    except Exception as error:
        raise ArtifactError(f"the architecture {what} cannot be built: {type(error).__name__}: {error}") from error
    finally:
        rng.restore()
    if not isinstance(model, nn.Module):
        raise ArtifactError(f"the architecture {what}: {type(model).__name__} was made of it, not a torch.nn.Module")
    return model


def _signature(model: nn.Module) -> dict[str, Any]:
    return {name: tuple(tensor.shape) for name, tensor in plain_tensors(model)}


def _modules(model: nn.Module) -> dict[str, Any]:
    """Return the type and the plain attributes of every module, masks apart."""
    plain = Structure.of(model).modules
    return {name: (kind.__qualname__, plain[name]) for name, kind in plain_types(model)}


_PLAIN = (bool, int, float, str, type(None))


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(v) for v in value)
    if isinstance(value, dict):
        return bool(value) and all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    return isinstance(value, _PLAIN)


@dataclass
class Structure:
    """The plain attributes of every module (widths, groups, heads, split sizes), to see what removals changed.

    Attributes:
        modules: name -> attributes.
        kinds: name -> class.
    """

    modules: dict[str, dict[str, Any]]
    kinds: dict[str, type] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> Structure:
        """Read the attributes off a model."""
        found = {}
        for name, module in model.named_modules():
            found[name] = {
                key: list(value) if isinstance(value, list) else value
                for key, value in module.__dict__.items()
                if key not in NOT_STRUCTURE and not key.startswith("_") and _is_plain(value)
            }
        return cls(found, {name: type(module) for name, module in model.named_modules()})

    def blocks_gone(self, model: nn.Module, folded: Collection[str] = ()) -> dict[str, str]:
        """Return ``block -> what is left of it`` (see :data:`singe_plugin.axes.blocks.AFTER`) for what is gone now.

        Args:
            model: as it is now.
            folded: names of batch-norms, in whose place something else was put, too.
        """
        names = {type(make()): name for name, make in AFTER.items()}
        return {
            name: names[type(module)]
            for name, module in model.named_modules()
            if name not in folded and type(module) in names and type(module) is not self.kinds.get(name, type(module))
        }

    def changes_to(self, model: nn.Module) -> dict[str, dict[str, Any]]:
        """Return ``module -> {attribute: new value}`` for what is different now, ready for JSON."""
        changes: dict[str, dict[str, Any]] = {}
        for name, attributes in Structure.of(model).modules.items():
            old = self.modules.get(name)
            if old is None:
                continue
            new = {k: encode(v) for k, v in attributes.items() if k not in old or old[k] != v}
            if new:
                changes[name] = new
        return changes


def remember_origin(model: nn.Module, builder: Builder | None, structure: dict[str, Any]) -> None:
    """Let a pruned model know what it was made of, so that it can be pruned again and the result saved.

    It is a text in an attribute: copies have it, and what pickles the model needs nothing of ours to read it.
    """
    known = None if builder is None else {"kind": builder.kind, "name": builder.name, "options": builder.options}
    model.__dict__[_ORIGIN] = json.dumps({"builder": known, "structure": structure})


def origin_of(model: nn.Module) -> dict[str, Any]:
    """What a pruned model was made of: ``builder`` (None if it is not known) and ``structure`` (empty for others)."""
    text = model.__dict__.get(_ORIGIN)
    found: dict[str, Any] = {"builder": None, "structure": {}} if text is None else json.loads(text)
    return found


def describe_structure(model: nn.Module, before: Structure, folded: list[tuple[str, str]]) -> dict[str, Any]:
    """Describe what loading needs to turn the unpruned architecture into ``model``.

    Where the model was pruned before, this is what was changed then and since.
    """
    earlier = origin_of(model)["structure"]
    attributes = {name: dict(values) for name, values in earlier.get("attributes", {}).items()}
    for name, values in before.changes_to(model).items():
        attributes.setdefault(name, {}).update(values)
    channels_last = [
        name
        for name, t in plain_tensors(model)
        if t.ndim == 4 and t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()
    ]
    blocks = before.blocks_gone(model, [norm for _, norm in folded])
    return {
        **({"blocks": {**earlier.get("blocks", {}), **blocks}} if blocks or earlier.get("blocks") else {}),
        "attributes": attributes,
        "folded": [*earlier.get("folded", []), *(list(pair) for pair in folded)],
        "channels_last": channels_last,
        "frozen": [n for n, t in plain_tensors(model) if isinstance(t, nn.Parameter) and not t.requires_grad],
    }
