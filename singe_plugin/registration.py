"""``tp.importance.SInGEImportance`` and ``tp.pruner.SInGEPruner``: there as soon as torch-pruning is, and not before.

Importing torch-pruning takes seconds, and who does not use it need not wait for it. So it is not imported here: if
somebody has, the names are registered at once, else a finder waits for whoever does, and does nothing else.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["register_with_torch_pruning"]

_HOST, _INTEGRATION = "torch_pruning", "singe_plugin.integrations.torch_pruning"


def register_with_torch_pruning() -> None:
    """Register the names now, if torch-pruning is imported already, else right after it is."""
    if sys.modules.get(_HOST) is not None:
        importlib.import_module(_INTEGRATION).register()
    elif not any(isinstance(finder, _Registrar) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Registrar())


class _Registrar(MetaPathFinder):
    """Finds torch-pruning and our integration as the other finders do, and acts once they are executed.

    The integration imports torch-pruning, so it registers itself when it is whole, whoever asked for it first.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What those after it in ``sys.meta_path`` find, with something to do after the execution."""
        after = {_HOST: self._host_is_there, _INTEGRATION: self._integration_is_there}.get(fullname)
        if after is None or self not in sys.meta_path:
            return None
        finders = [f for f in sys.meta_path[sys.meta_path.index(self) + 1 :] if hasattr(f, "find_spec")]
        spec = next((s for f in finders if (s := f.find_spec(fullname, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, after)
        return spec

    def _host_is_there(self, _: ModuleType) -> None:
        if _INTEGRATION not in sys.modules:
            importlib.import_module(_INTEGRATION)

    def _integration_is_there(self, module: ModuleType) -> None:
        module.register()
        if self in sys.meta_path:
            sys.meta_path.remove(self)


class _Then(Loader):
    """A loader that does something after a module's execution, and is otherwise the one that it stands for."""

    def __init__(self, loader: Loader, after: Callable[[ModuleType], None]) -> None:
        self.loader, self.after = loader, after

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the loader does."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the loader does, which the module then keeps; and what is to be done afterwards."""
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.after(module)
