"""A model that is named by its code: ``package.module:factory`` or ``path/to/file.py:Class``."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from ckptool.errors import CkptoolError
from ckptool.loading.factories import Factory, parameters_of
from ckptool.loading.foreign import foreign_code
from ckptool.loading.network import is_lightning
from ckptool.loading.torchvision import ensure_torchvision, is_missing_operator

_FORMS = "package.module:factory or path/to/file.py:Class"


def code_factory(text: str, app_dir: Path | None) -> Factory:
    """Find what the text names and say how it is called.

    :raises CkptoolError: it cannot be imported, or is nothing that gives a model.
    """
    place, _, name = text.rpartition(":")
    if not place or not name:
        raise CkptoolError(f"--model {text}: this names no factory; write {_FORMS}")
    if app_dir is not None:
        _put_on_path(app_dir)
    module = _import_file(text, Path(place)) if place.endswith(".py") else _import_named(text, place)
    with foreign_code(f"--model {text}: looking {name} up failed", "install what is missing"):
        target = _attribute(text, module, name)
    return _factory_of(text, target)


def _put_on_path(folder: Path) -> None:
    if not folder.is_dir():
        raise CkptoolError(f"--app-dir {folder}: this is no folder; name the one that the model's package lies in")
    if str(folder.resolve()) not in sys.path:
        sys.path.insert(0, str(folder.resolve()))


def _import_named(text: str, name: str) -> ModuleType:
    remedy = "name a folder to import from with --app-dir, or install what is missing"
    with foreign_code(f"--model {text}: importing {name} failed", remedy):
        return _with_torchvision(lambda: import_module(name))


def _import_file(text: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise CkptoolError(f"--model {text}: there is no file {path}; write {_FORMS}")
    # Not the plain stem: a file called ``types.py`` must not stand in for a module that others import.
    name = f"ckptool_model_file_{path.stem}_{abs(hash(path.resolve())):x}"
    if name in sys.modules:
        return sys.modules[name]
    remedy = "name the folder of what it imports with --app-dir, or install what is missing"
    with foreign_code(f"--model {text}: running {path} failed", remedy):
        return _with_torchvision(lambda: _run_file(name, path))


def _run_file(name: str, path: Path) -> ModuleType:
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = sys.modules[name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _with_torchvision(load: Callable[[], ModuleType]) -> ModuleType:
    """Import, and once more with torchvision mended where that is what failed."""
    try:
        return load()
    except (RuntimeError, ImportError) as error:
        if not _blames_torchvision(error) or not ensure_torchvision():
            raise
    return load()


def _blames_torchvision(error: BaseException | None) -> bool:
    while error is not None and not is_missing_operator(error):
        error = error.__cause__ or error.__context__
    return error is not None


def _attribute(text: str, module: ModuleType, name: str) -> Any:
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise CkptoolError(f'--model {text}: there is no "{name}" in it{_offer(module)}')
        found = getattr(found, part)
    return found


def _offer(module: ModuleType) -> str:
    own = [
        name
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == module.__name__
    ]
    return f"; name {' or '.join(own[:8])}" if own else "; name a class or function that gives a model"


def _factory_of(text: str, target: Any) -> Factory:
    if isinstance(target, nn.Module):
        return Factory(text, lambda: copy.deepcopy(target), {})
    if isinstance(target, type) and not issubclass(target, nn.Module):
        raise CkptoolError(f"--model {text}: the class is no torch.nn.Module; name one, or a function that gives one")
    if not callable(target):
        kind = type(target).__name__
        raise CkptoolError(f"--model {text}: this is a {kind}; name a torch.nn.Module or a function that gives one")
    lightning = isinstance(target, type) and is_lightning(target)
    return Factory(text, target, parameters_of(target), uses_recorded=lightning)
