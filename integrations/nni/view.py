"""NNI's wrapped model as a plain one: the masked weights are the parameters, and no wrapper is in the way.

A wrapper takes a layer's parameters away and computes ``target * mask`` in every forward pass. The scoring engine
wants parameters that it can put on the path, batch-norm that it can fold, and modules whose names are the user's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from nni.compression.base.apply_method import pruning_apply_methods
from nni.compression.base.target_space import PruningTargetSpace, TargetType
from nni.compression.base.wrapper import ModuleWrapper
from torch import Tensor, nn

from singe_plugin.undo import Contents

__all__ = ["masked_target", "plain_view", "solved_view", "undone_on_error", "wrappers_in"]

_TABLES = ("_parameters", "_buffers", "_modules")
_MISSING = object()


class _Held:
    """A record of what a module consists of, which puts the same objects back in the same places."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.forward = module, module.__dict__.get("forward", _MISSING)
        self.tables = {name: dict(getattr(module, name)) for name in _TABLES}

    def restore(self) -> None:
        self.module.__dict__.pop("forward", None)
        if self.forward is not _MISSING:
            self.module.__dict__["forward"] = self.forward
        for name, table in self.tables.items():
            live = getattr(self.module, name)
            live.clear()
            live.update(table)


def masked_target(space: PruningTargetSpace) -> Tensor:
    """Return a parameter as the wrapped model uses it."""
    target: Tensor | None = space.target
    assert target is not None
    with torch.no_grad():
        if space.mask is None:
            return target.detach().clone()
        applied: Tensor = pruning_apply_methods[space.apply_method](target, space)
    return applied.detach()


@contextmanager
def plain_view(model: nn.Module) -> Iterator[None]:
    """Take all wrappers out of a model, whoever put them in; on leaving everything is where it was, the same objects.

    Values written into the parameters inside are lost.
    """
    saved: list[_Held] = []
    try:
        for module in list(model.modules()):
            wrapper = module._modules.get("_nni_wrapper")
            if isinstance(wrapper, ModuleWrapper):
                saved.append(_Held(module))
                del module._modules["_nni_wrapper"]
                module.__dict__["forward"] = wrapper.module_forward
                for name, value in _parameters_of(wrapper).items():
                    module._buffers.pop(name, None)
                    module._parameters[name] = value
        yield
    finally:
        for held in reversed(saved):
            held.restore()


def wrappers_in(model: nn.Module) -> dict[str, ModuleWrapper]:
    """NNI's wrappers by the name of the module that each is of, whoever put them in."""
    found = {name: module._modules.get("_nni_wrapper") for name, module in model.named_modules()}
    return {name: wrapper for name, wrapper in found.items() if isinstance(wrapper, ModuleWrapper)}


@contextmanager
def solved_view(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The plain view of a model whose masked weights are solved in here: what its parameters become is kept.

    The same wrappers, parameters and masks are back afterwards. A weight that is masked is what it was behind its mask;
    and if the block fails, all of those that NNI wraps are. Masks of inputs and outputs are applied in here; each is a
    parameter of its layer (``"fc._input_0"``) meanwhile, so that what comes after it is known to get other inputs.

    Yields:
        the masks: parameter -> ``bool`` of its shape.
    """
    wrappers = wrappers_in(model)
    masks: dict[str, Tensor] = {}
    wrapped: list[tuple[str, PruningTargetSpace]] = []
    for name, wrapper in wrappers.items():
        for target, space in wrapper.pruning_target_spaces.items():
            mask, key = space.mask, f"{name}.{target}".lstrip(".")
            if mask is None:
                continue
            masks[key] = mask.detach() != 0
            if isinstance(space.target, nn.Parameter):
                masks[key] = masks[key].expand_as(space.target).clone()
                wrapped.append((key, space))
    with plain_view(model), ExitStack() as stack:
        for wrapper in wrappers.values():
            stack.enter_context(_masked_calls(wrapper))
        yield masks
        for key, space in wrapped:
            solved, behind, mask = model.get_parameter(key).detach(), space.target, space.mask
            assert behind is not None
            assert mask is not None
            behind.data.copy_(torch.where(masks[key], solved / mask, behind.detach()))


@contextmanager
def _masked_calls(wrapper: ModuleWrapper) -> Iterator[None]:
    """Let the plain layer of a wrapper mask its inputs and outputs."""
    module: Any = wrapper.module
    spaces = {
        target: space
        for target, space in wrapper.pruning_target_spaces.items()
        if space.type is not TargetType.PARAMETER and space.mask is not None
    }
    if not spaces:
        yield
        return
    factors = {target: nn.Parameter(space.mask.detach().clone()) for target, space in spaces.items()}
    module._parameters.update(factors)

    def patch(target: str, value: Any) -> Any:
        return value * factors[target] if target in factors else value

    def forward(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = wrapper.patch_inputs(*args, **kwargs)
        return wrapper.patch_outputs(wrapper.module_forward(*args, **kwargs))

    wrapper.__dict__["patch_helper"] = patch
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del wrapper.__dict__["patch_helper"]


def _parameters_of(wrapper: ModuleWrapper) -> dict[str, nn.Parameter]:
    """Return the parameters that a wrapper has taken from its module, masked."""
    found: dict[str, nn.Parameter] = {}
    if getattr(wrapper, "is_register_bias", False) and isinstance(wrapper.bias, nn.Parameter):
        found["bias"] = nn.Parameter(wrapper.bias.detach(), requires_grad=wrapper.bias.requires_grad)
    for name, space in {**wrapper.quantization_target_spaces, **wrapper.pruning_target_spaces}.items():
        if space.type is TargetType.PARAMETER and isinstance(space.target, nn.Parameter):
            plain = masked_target(space) if isinstance(space, PruningTargetSpace) else space.target.detach()
            found[name] = nn.Parameter(plain, requires_grad=space.target.requires_grad)
    return found


@contextmanager
def undone_on_error(model: nn.Module, wrappers: Iterable[ModuleWrapper]) -> Iterator[None]:
    """If the block fails, the model and the wrappers that there were before are put back: the same objects.

    Args:
        model: the model that is wrapped in the block.
        wrappers: the wrappers of other compressors; the block may give them further targets.
    """
    before = Contents([model, *wrappers], copied=0)
    try:
        yield
    except BaseException:
        before.restore()
        raise
