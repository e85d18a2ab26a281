"""Leave no trace: everything of a model that scoring and verification might touch, saved and put back."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from singe_plugin.errors import is_of_the_machine
from singe_plugin.undo import Contents

__all__ = [
    "RngState", "casts_forgotten", "computed_tables", "containers_training", "forget_caches", "forget_tables",
    "model_device", "native_rnns", "plain_layers", "preserved", "tables_of", "train_mode_of", "unfused_attention",
    "want_gradients",
]  # fmt: skip


@dataclass
class RngState:
    """The state of every random generator that a forward pass or a data loader can draw from.

    Example:
        >>> import torch
        >>> state = RngState.capture()
        >>> first = torch.rand(1)
        >>> state.restore()
        >>> bool(torch.rand(1) == first)
        True
    """

    torch_cpu: Tensor
    torch_cuda: list[Tensor]
    python: Any
    numpy: Any

    @classmethod
    def capture(cls) -> RngState:
        """Read the generators' states."""
        numpy = sys.modules.get("numpy")
        return cls(
            torch_cpu=torch.get_rng_state(),
            torch_cuda=torch.cuda.get_rng_state_all() if _cuda_in_use() else [],
            python=random.getstate(),
            numpy=numpy.random.get_state() if numpy is not None else None,
        )

    def restore(self) -> None:
        """Put the generators back to the captured states."""
        torch.set_rng_state(self.torch_cpu)
        for number, state in enumerate(self.torch_cuda[: torch.cuda.device_count()]):  # a run may go on with fewer
            torch.cuda.set_rng_state(state, number)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


def _cuda_in_use() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def model_device(model: nn.Module) -> torch.device:
    """Return the device of the first parameter or buffer; the CPU for a model that has neither.

    Example:
        >>> import torch
        >>> model_device(torch.nn.Linear(1, 1))
        device(type='cpu')
    """
    for tensor in chain(model.parameters(), model.buffers()):
        return tensor.device
    return torch.device("cpu")


def train_mode_of(model: nn.Module) -> dict[nn.Module, bool]:
    """Return the train or eval mode of every module: a frozen batch-norm inside a training model is common."""
    return {module: module.training for module in model.modules()}


def tables_of(model: nn.Module) -> Iterator[tuple[tuple[nn.Module, str], dict[Any, Tensor]]]:
    """Yield plain attributes that are dictionaries of tensors, or empty: constants, or what was computed and kept."""
    for module in model.modules():
        for attr, value in module.__dict__.items():
            if not attr.startswith("_") and type(value) is dict and all(isinstance(v, Tensor) for v in value.values()):
                yield (module, attr), value


def computed_tables(model: nn.Module, run: Callable[[], Any]) -> list[tuple[nn.Module, str]]:
    """Find those of the dictionaries of tensors that ``run``, a forward pass, can do without: it fills them again.

    Example:
        >>> net = torch.nn.Identity()
        >>> net.scales, net.kept = {"all": torch.ones(1)}, {"cpu": torch.ones(1)}
        >>> [attr for _, attr in computed_tables(net, lambda: net(net.scales["all"]))]
        ['kept']
    """
    filled = [key for key, table in tables_of(model) if table]
    empty = [key for key, table in tables_of(model) if not table]
    if filled and not _runs_without(model, filled, run):
        filled = [key for key in filled if _runs_without(model, [key], run)]
    return [*filled, *empty]


def _runs_without(model: nn.Module, tables: list[tuple[nn.Module, str]], run: Callable[[], Any]) -> bool:
    with preserved(model), torch.no_grad():
        for module, attr in tables:
            module.__dict__[attr].clear()
        try:
            run()
        except Exception as error:
            if is_of_the_machine(error):
                raise
            return False
    return True


def forget_caches(model: nn.Module, run: Callable[[], Any]) -> None:
    """Make every layer compute anew, from now on, what it keeps in a dictionary (attention biases, by device).

    What is kept would belong to other weights, or to a graph that is gone. The hooks that do it are taken away by
    :func:`preserved`, inside which this is called.

    Args:
        model: the model.
        run: a forward pass, to find out what is kept and what is constant.
    """
    forget_tables(computed_tables(model, run))


def forget_tables(tables: Iterable[tuple[nn.Module, str]]) -> None:
    """Let layers empty these dictionaries whenever they run; see :func:`forget_caches`.

    Args:
        tables: from :func:`computed_tables`.
    """
    by_module: dict[nn.Module, list[str]] = {}
    for module, attr in tables:
        by_module.setdefault(module, []).append(attr)

    def forget(module: nn.Module, _: Any) -> None:
        for attr in by_module[module]:
            module.__dict__[attr].clear()

    for module in by_module:
        module.register_forward_pre_hook(forget)


@contextmanager
def casts_forgotten() -> Iterator[None]:
    """Keep no casts of parameters in here, and none that were made before or in here afterwards.

    Autocast keeps the casts of parameters until its outermost context is left. Where their values change in place, in
    a context that somebody else has entered, every later forward pass would see the first values.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(1, 1, bias=False)
        >>> with torch.autocast("cpu", torch.bfloat16), casts_forgotten():
        ...     for value in (1.0, 2.0):
        ...         _ = torch.nn.init.constant_(layer.weight, value)
        ...         print(layer(torch.ones(1)).item())
        1.0
        2.0
    """
    kept = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(kept)
        torch.clear_autocast_cache()


@contextmanager
def containers_training(model: nn.Module) -> Iterator[None]:
    """Put modules that have parts into training mode; single layers (norms, dropout) stay as they are."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            if next(module.children(), None) is not None:
                module.training = True
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def native_rnns(model: nn.Module) -> Iterator[None]:
    """Run recurrent layers operator by operator in here, without cuDNN and oneDNN.

    Their operators hide what PyTorch's own show: which gates belong to which unit, and which matrix is multiplied with
    what. cuDNN also differentiates them in train mode only.

    Example:
        >>> layer = torch.nn.LSTM(2, 3)
        >>> handle = layer.register_forward_hook(
        ...     lambda *_: print(torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled)
        ... )
        >>> with native_rnns(layer):
        ...     _ = layer(torch.zeros(1, 1, 2))
        False False
    """
    libraries: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.mkldnn)
    enabled = [library.enabled for library in libraries]

    def leave() -> None:
        for library, before in zip(libraries, enabled, strict=True):
            library.enabled = before

    def enter(module: nn.Module, _: Any) -> None:
        for library in libraries:
            library.enabled = False

    handles = []
    try:
        for module in model.modules():
            if isinstance(module, nn.RNNBase):
                handles.append(module.register_forward_pre_hook(enter))
                handles.append(module.register_forward_hook(lambda *_: leave(), always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        leave()  # hooks are not called on an interrupt


@contextmanager
def unfused_attention() -> Iterator[None]:
    """Run the layers of ``nn.Transformer`` operator by operator in here, as they do in training.

    In eval mode and without gradients they are one fused operator, which shows neither what it reads and writes nor
    what it costs.

    Example:
        >>> with unfused_attention():
        ...     torch.backends.mha.get_fastpath_enabled()
        False
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def plain_layers(model: nn.Module) -> Iterator[None]:
    """Let the model run so that it can be followed and differentiated in any way, and computes the same.

    See :func:`native_rnns` and :func:`unfused_attention`; what is checkpointed is, in the way that PyTorch recommends
    (``use_reentrant=False``): the other is no function of parameters if its inputs want no gradient, and refuses
    ``torch.autograd.grad``.

    Example:
        >>> from torch.utils.checkpoint import checkpoint
        >>> layer = torch.nn.Linear(1, 1, bias=False)
        >>> with plain_layers(layer):
        ...     checkpoint(layer, torch.ones(1), use_reentrant=True).requires_grad
        True
    """

    def apply(function: Any, keep_rng: bool, *args: Any) -> Any:
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=keep_rng)

    own = vars(CheckpointFunction).get("apply")
    with native_rnns(model), unfused_attention():
        CheckpointFunction.apply = apply
        try:
            yield
        finally:
            if own is None:
                del CheckpointFunction.apply
            else:
                CheckpointFunction.apply = own


def want_gradients(model: nn.Module) -> None:
    """Let all parameters want gradients, inside of :func:`preserved`; also under ``torch.no_grad``.

    Which operators a layer runs depends on it (``matmul`` multiplies frozen matrices one by one, others at once), and a
    frozen copy has to run those of the model.

    Example:
        >>> layer = torch.nn.Linear(1, 1).requires_grad_(False)
        >>> with preserved(layer):
        ...     want_gradients(layer)
        ...     print(layer.weight.requires_grad)
        True
        >>> layer.weight.requires_grad
        False
    """
    for parameter in model.parameters():
        if (parameter.is_floating_point() or parameter.is_complex()) and not parameter.is_inference():
            parameter.requires_grad_(True)


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Put ``model`` back bit for bit on leaving, however the block is left.

    Everything that can be reached from it is the same object with the same content afterwards
    (:class:`~singe_plugin.undo.Contents`), and all random generators are where they were. Parameter *values* are not
    copied: the block must substitute parameters, never write into them (the scoring engine does so).

    Raises:
        ScoringError: if the model wrote in place into a tensor that is too large to be copied.

    Example:
        >>> import torch
        >>> model = torch.nn.BatchNorm1d(2)
        >>> model.shapes = []
        >>> with preserved(model):
        ...     model.shapes.append(model.eval().requires_grad_(False)(torch.zeros(1, 2)).shape)
        >>> model.training, model.weight.requires_grad, model.shapes
        (True, True, [])
    """
    rng = RngState.capture()
    contents = Contents([model])
    try:
        with casts_forgotten():
            yield
    except BaseException:
        contents.restore()
        rng.restore()
        raise
    contents.restore()
    rng.restore()
    contents.check()
