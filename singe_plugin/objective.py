"""The objective F: what a batch looks like, how the model is called, and the scalar that is differentiated."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from singe_plugin.errors import ConfigError, DataError, SingeError

__all__ = [
    "Objective",
    "ObjectiveLike",
    "call_model",
    "check_batch",
    "check_classes",
    "check_head",
    "check_logits",
    "cross_entropy",
    "get_objective",
    "inputs_for",
    "map_tensors",
    "own_loss",
    "split_batch",
    "to_device",
    "true_class_logit",
]

Objective: TypeAlias = Callable[[Any, Any], Tensor]
ObjectiveLike: TypeAlias = str | Objective

MOST_BATCHES, MOST_BYTES = 1024, 4 * 2**30  # of a one-shot iterator, which has to be kept
TARGET_KEYS = ("labels", "label", "targets", "target", "y")


def cross_entropy(outputs: Any, targets: Any) -> Tensor:
    r"""``"loss"``: the mean cross-entropy :math:`F = -\frac1B\sum_b\log p_{y_b}(x_b)`.

    A model that computes its loss itself (see :func:`own_loss`) has that as its F.

    Args:
        outputs: logits ``[B, C, ...]``.
        targets: class indices ``[B, ...]`` or probabilities ``[B, C, ...]``.

    Raises:
        DataError: if F would be constant, or mean something else: see :func:`check_logits`.

    Example:
        >>> import torch
        >>> cross_entropy(torch.zeros(1, 2), torch.tensor([0]))
        tensor(0.6931)
    """
    own = own_loss(outputs)
    if own is not None:
        return own
    logits = _logits(outputs, "loss")
    check_logits(logits, targets)
    return functional.cross_entropy(logits, targets.to(logits.dtype) if targets.is_floating_point() else targets)


def true_class_logit(outputs: Any, targets: Any) -> Tensor:
    r"""``"logit"``: the mean logit of the true class, :math:`F=\frac1B\sum_b z_{b,y_b}`.

    Args:
        outputs: logits ``[B, C]``.
        targets: class indices ``[B]``, or probabilities ``[B, C]`` (then the expected logit).

    Example:
        >>> import torch
        >>> true_class_logit(torch.tensor([[1.0, 5.0]]), torch.tensor([1]))
        tensor(5.)
    """
    logits = _logits(outputs, "logit")
    if targets.is_floating_point():
        expected: Tensor = (logits * targets).sum(1).mean()
        return expected
    check_classes(targets, logits, ignored=None)
    return logits.gather(1, targets.unsqueeze(1)).mean()


def check_classes(targets: Any, logits: Tensor, ignored: int | None = -100) -> None:
    """Raise ``IndexError``, as PyTorch does on the CPU, for a class that the logits ``[B, C, ...]`` do not have.

    CUDA would only say so later, and refuse everything from then on. Who calls it adds the layer and the batch.
    Targets that are no class indices are left to the loss.

    Example:
        >>> import torch
        >>> check_classes(torch.tensor([0, 3]), torch.zeros(2, 3))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        IndexError: Target 3 is out of bounds: the model has 3 classes, 0 to 2; ...
    """
    if not isinstance(targets, Tensor) or targets.is_floating_point():
        return
    classes = logits.shape[1] if logits.ndim > 1 else logits.numel()
    outside = (targets < 0) | (targets >= classes)
    if ignored is not None:
        outside &= targets != ignored
    if bool(outside.any()):
        raise IndexError(
            f"Target {int(targets[outside][0])} is out of bounds: the model has {classes} classes, 0 to {classes - 1}; "
            "check the labels, or make the model with more classes"
        )


def check_logits(logits: Tensor, targets: Any) -> None:
    """Raise unless a cross-entropy of these logits ``[B, C, ...]`` can move, and means what it says.

    Targets that are no tensor are left to the loss.

    Raises:
        DataError: for a single class (the cross-entropy is 0 whatever the model does), for outputs without a dimension
            of classes, for targets all of which are ignored (-100), and for targets in floating point that are no
            probabilities.
        IndexError: see :func:`check_classes`.

    Example:
        >>> import torch
        >>> check_logits(torch.zeros(2, 1), torch.tensor([0, 0]))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        singe_plugin.errors.DataError: the model has one output, and a cross-entropy over one class is 0 whatever ...
    """
    if not isinstance(targets, Tensor):
        return
    shape, given = tuple(logits.shape), tuple(targets.shape)
    if logits.ndim == 0 or (logits.ndim == 1 and targets.ndim > 0):
        raise DataError(
            f"cross-entropy needs logits (examples, classes, ...), but the model returns shape {shape} for targets of "
            f"shape {given}; {_INSTEAD}"
        )
    classes = logits.shape[1] if logits.ndim > 1 else len(logits)
    if classes < 2:
        raise DataError(
            f"the model has {'one output' if classes else 'no outputs'}, and a cross-entropy over "
            f"{'one class' if classes else 'no classes'} is 0 whatever the model does: nothing can be ranked or "
            f"trained by it; give the model a logit for each class, or {_INSTEAD}"
        )
    if not targets.is_floating_point():
        if targets.numel() and bool((targets == _IGNORED).all()):
            raise DataError(
                f"every target of the batch is {_IGNORED}, which cross-entropy ignores, so that there is no loss; give "
                "batches with at least one target"
            )
        check_classes(targets, logits)
        return
    if shape != given:
        raise DataError(
            f"the targets are {str(targets.dtype).removeprefix('torch.')} of shape {given}, for outputs of shape "
            f"{shape}: cross-entropy takes whole numbers (classes), or a probability for each output; convert them "
            f"with .long() if they are classes, or {_INSTEAD}"
        )
    sums = targets.detach().float().sum(1 if logits.ndim > 1 else 0)
    if bool((targets < 0).any()) or bool(((sums - 1).abs() > 0.02).any()):
        raise DataError(
            "the targets are in floating point, and cross-entropy takes them for probabilities, but they are negative "
            f"or do not add up to 1 over the {classes} outputs; {_INSTEAD}"
        )


_IGNORED = -100  # PyTorch's default
_INSTEAD = (
    "say what F is, which is also what fine-tuning minimises: objective=torch.nn.functional.mse_loss, "
    "objective=torch.nn.functional.binary_cross_entropy_with_logits (both want targets of the outputs' shape), or a "
    "function (outputs, targets) -> scalar"
)


def check_head(model: nn.Module, objective: ObjectiveLike | None) -> None:
    """Raise ``DataError`` for a model that says it has no classifier, if its outputs would be taken for logits.

    Example:
        >>> model = nn.Linear(2, 3)
        >>> model.num_classes = 0  # as timm's models without a head
        >>> check_head(model, "loss")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        singe_plugin.errors.DataError: Linear has num_classes=0: it returns features, and objective='loss' would ...
    """
    classes = getattr(model, "num_classes", None)
    if isinstance(objective, str) and type(classes) is int and classes == 0:
        raise DataError(
            f"{type(model).__name__} has num_classes=0: it returns features, and objective={objective!r} would take "
            f"them for logits; make it with its classes, or {_INSTEAD}"
        )


def own_loss(outputs: Any) -> Tensor | None:
    """The loss in a model's outputs, ``outputs.loss`` or ``outputs["loss"]``, as Transformers' models return it.

    Example:
        >>> import torch
        >>> own_loss({"loss": torch.tensor(1.5), "logits": torch.zeros(1, 2)}), own_loss(torch.zeros(1, 2))
        (tensor(1.5000), None)
    """
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    return loss if isinstance(loss, Tensor) else None


def _logits(outputs: Any, name: str) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs.to(torch.promote_types(outputs.dtype, torch.float32))  # half precision would round F
    own, hint = "outputs[0]", ""
    for form, held in (("outputs.logits", hasattr(outputs, "logits")), ("outputs['logits']", _has(outputs, "logits"))):
        if held:
            own = form
    if name == "loss" and (hasattr(outputs, "loss") or _has(outputs, "loss")):
        hint = "give batches that are mappings with 'labels', from which it computes its own loss, or "
    raise DataError(
        f"objective={name!r} needs a tensor of logits, but the model returns {type(outputs).__name__}; {hint}"
        f"pass a callable instead, e.g. objective=lambda outputs, targets: cross_entropy({own}, targets)"
    )


def _has(outputs: Any, key: str) -> bool:
    return isinstance(outputs, Mapping) and key in outputs


OBJECTIVES: dict[str, Objective] = {"loss": cross_entropy, "logit": true_class_logit}


def get_objective(objective: ObjectiveLike) -> Objective:
    """Turn a name or a callable into the callable ``(outputs, targets) -> scalar``.

    Raises:
        ConfigError: if it is neither a known name nor callable.

    Example:
        >>> get_objective("loss") is cross_entropy
        True
    """
    if isinstance(objective, str) and objective in OBJECTIVES:
        return OBJECTIVES[objective]
    if callable(objective):
        return objective
    raise ConfigError(
        f"unknown objective {objective!r}; choose one of {', '.join(OBJECTIVES)} or pass a callable "
        "(outputs, targets) -> scalar"
    )


def split_batch(batch: Any) -> tuple[Any, Any]:
    """Split a batch into inputs and targets.

    A pair ``(inputs, targets)`` is taken as it is; a mapping gives its targets up under one of ``labels``,
    ``label``, ``targets``, ``target``, ``y``, and the rest are the model's keyword arguments.

    Raises:
        DataError: if the batch has neither form.

    Example:
        >>> split_batch(({"pixels": 1}, 2))
        ({'pixels': 1}, 2)
        >>> split_batch({"pixels": 1, "labels": 2})
        ({'pixels': 1}, 2)
    """
    if isinstance(batch, Mapping):
        for key in TARGET_KEYS:
            if key in batch:
                return {k: v for k, v in batch.items() if k != key}, batch[key]
        raise DataError(
            f"the batch is a mapping with keys {sorted(map(str, batch))}, none of which is a target "
            f"({', '.join(TARGET_KEYS)}); rename one, or yield (inputs, targets)"
        )
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    form = f"a {type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
    raise DataError(f"a batch must be a pair (inputs, targets) or a mapping with targets, got {form}")


def inputs_for(model: nn.Module, batch: Any) -> tuple[Any, Any]:
    """Split a batch for a model whose loss is wanted: like :func:`split_batch`, but what forward takes stays.

    Where the batch is a mapping and the model's ``forward`` has a parameter of the name that its targets have, they are
    its targets and stay among the keywords, too: such a model computes its own loss from them (see :func:`own_loss`).

    Example:
        >>> class Net(nn.Module):
        ...     def forward(self, pixels, labels=None): ...
        >>> inputs_for(Net(), {"pixels": 1, "labels": 2}), inputs_for(Net(), {"pixels": 1, "target": 2})
        (({'pixels': 1, 'labels': 2}, 2), ({'pixels': 1}, 2))
    """
    inputs, targets = split_batch(batch)
    if isinstance(batch, Mapping):
        key = next(key for key in TARGET_KEYS if key in batch)
        try:
            parameters = inspect.signature(model.forward).parameters
        except (TypeError, ValueError):  # a forward that is not written in Python names nothing
            return inputs, targets
        named = parameters.get(key)
        if named is not None and named.kind in (named.POSITIONAL_OR_KEYWORD, named.KEYWORD_ONLY):
            return {**inputs, key: targets}, targets
    return inputs, targets


def check_batch(batch: Any) -> None:
    """Raise :class:`DataError` for a batch that cannot be scored on: values that are not there, or no tensors."""
    inputs, targets = split_batch(batch)
    if inputs is None:
        raise DataError("the inputs of a batch are None; give (inputs, targets)")
    for what, value in (("inputs", inputs), ("targets", targets)):
        for tensor in tensors_in(value):
            if tensor.is_meta:
                raise DataError(f"the {what} of a batch are on meta and have no values; load them first")
            if tensor.is_inference():
                raise DataError(
                    f"the {what} of a batch were made under torch.inference_mode(), and nothing can be differentiated "
                    "with them; make them outside of it, or give tensor.clone()"
                )
            if tensor.ndim and not len(tensor):
                raise DataError(f"the {what} of a batch have the shape {tuple(tensor.shape)}: there is no example")
        parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else [value]
        for part in parts:
            if isinstance(part, (np.ndarray, bytes)):
                raise DataError(
                    f"the {what} of a batch hold a {type(part).__name__}, and models take tensors; convert it "
                    "(torch.from_numpy), or give a Dataset, whose examples are put together and converted"
                )


def call_model(model: Callable[..., Any], inputs: Any) -> Any:
    """Call the model: a tensor is its one argument, a tuple or list its arguments, a mapping its keywords.

    Example:
        >>> import torch
        >>> call_model(torch.nn.Identity(), torch.ones(1))
        tensor([1.])
    """
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested arguments or outputs, in order.

    Example:
        >>> import torch
        >>> [t.item() for t in tensors_in(({"x": torch.tensor(1)}, [torch.tensor(2), "no"]))]
        [1, 2]
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Nested arguments with every tensor replaced; tuples, lists, mappings and dataclasses keep their classes.

    Example:
        >>> import torch
        >>> from collections import OrderedDict
        >>> list(map_tensors(lambda t: t.item() + 1, OrderedDict(a=[torch.tensor(1)], b=2)).items())
        [('a', [2]), ('b', 2)]
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        items = {k: map_tensors(function, v) for k, v in value.items()}
        return _mapping_like(value, items)
    if isinstance(value, (tuple, list)):
        moved = [map_tensors(function, v) for v in value]
        if hasattr(value, "_fields"):  # a named tuple
            return type(value)(*moved)
        return tuple(moved) if isinstance(value, tuple) else moved
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        made = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(made, field.name, map_tensors(function, getattr(value, field.name)))
        return made
    return value


def _mapping_like(value: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """The items in a dictionary of the same class, with its attributes; other mappings become plain dictionaries."""
    if type(value) is dict or not isinstance(value, dict):
        return items
    made = type(value).__new__(type(value))
    base: Any = OrderedDict if isinstance(value, OrderedDict) else dict
    for key, item in items.items():
        base.__setitem__(made, key, item)  # its own method may refuse, or do more
    vars(made).update({key: items.get(key, held) for key, held in vars(value).items()})
    return made


def to_device(value: Any, device: torch.device, channels_last: bool = False) -> Any:
    """Move every tensor in a nested batch to ``device``; 4-D float images to ``channels_last`` on request.

    Of other objects, those with a method ``to`` are moved by it.

    Example:
        >>> import torch
        >>> to_device((torch.zeros(1), {"y": 2}), torch.device("cpu"))
        (tensor([0.]), {'y': 2})
    """
    if isinstance(value, Tensor):
        later = device.type != "cpu"  # what goes to the CPU is read as soon as this returns
        if channels_last and value.ndim == 4 and value.is_floating_point():
            return value.to(device, non_blocking=later, memory_format=torch.channels_last)
        return value.to(device, non_blocking=later)
    if isinstance(value, Mapping):
        return _mapping_like(value, {k: to_device(v, device, channels_last) for k, v in value.items()})
    if callable(move := getattr(value, "to", None)):  # a batch of graphs, a packed sequence
        return move(device)
    if isinstance(value, (tuple, list)):
        moved = [to_device(v, device, channels_last) for v in value]
        if hasattr(value, "_fields"):  # a named tuple
            return type(value)(*moved)
        return tuple(moved) if isinstance(value, tuple) else moved
    return value


def in_memory(batches: Iterable[Any]) -> list[Any]:
    """All batches as a list, as long as they are few enough: a generator may never end.

    Raises:
        DataError: at ``MOST_BATCHES`` batches, or ``MOST_BYTES`` of tensors.
    """
    found, size = [], 0
    for batch in read(batches, "reading the batches"):
        found.append(batch)
        size += sum(t.numel() * t.element_size() for t in tensors_in(batch))
        if len(found) > MOST_BATCHES or size > MOST_BYTES:
            raise DataError(
                f"a {type(batches).__name__} gave {len(found)} batches of {size / 2**30:.1f} GiB in all and goes on, "
                "and it has to be kept to be read more than once; give a DataLoader, or a list of as many batches as "
                "are needed, e.g. list(itertools.islice(batches, 100))"
            )
    return found


def read(batches: Iterable[Any], what: str) -> Iterator[Any]:
    """The batches one by one; what the code behind them raises becomes one error that says where.

    Raises:
        DataError: with the original error as its cause.

    Example:
        >>> list(read([1, 2], "data"))
        [1, 2]
    """
    number, iterator = 0, None
    while True:
        try:
            iterator = iter(batches) if iterator is None else iterator
            batch = next(iterator)
        except StopIteration:
            return
        except (SingeError, MemoryError, torch.cuda.OutOfMemoryError):
            raise
        except Exception as error:
            raise DataError(
                f"{what} failed at batch {number} with {type(error).__name__}: {error}; see the error above for where"
            ) from error
        yield batch
        number += 1


def materialise(batches: Iterable[Any] | None) -> Iterable[Any]:
    """Make sure that the batches can be iterated more than once (a one-shot iterator becomes a list).

    Raises:
        DataError: if ``batches`` is not an iterable of batches, or is a lone tensor or array, or does not end.
    """
    if isinstance(batches, (Tensor, np.ndarray, str, bytes)) or not isinstance(batches, Iterable):
        raise DataError(
            f"batches must be an iterable of (inputs, targets), e.g. a DataLoader or a list, got "
            f"{type(batches).__name__}"
        )
    if isinstance(batches, Mapping):
        raise DataError("batches is one mapping; wrap a single batch in a list: [batch]")
    if isinstance(batches, Iterator):  # not by calling iter(): a DataLoader would draw a seed and start its workers
        return in_memory(batches)
    return batches
