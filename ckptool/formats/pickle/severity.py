"""How much a name in a pickle should worry its reader. Labels only: nothing named here is ever looked up.

The lists name modules that picklescan, fickling and modelscan warn of; safety does not depend on them, because a name
without a handler is never more than data.
"""

from __future__ import annotations

import _compat_pickle

from ckptool.formats.pickle import limits
from ckptool.model.values import Severity

_RENAMED = (
    ("numpy.core.", "numpy._core."),
    ("torch.distributed._tensor.", "torch.distributed.tensor."),
)

DANGEROUS_MODULES = frozenset(
    """
    _aix_support _bootsubprocess _osx_support _pickle _posixsubprocess _pyrepl _thread aiohttp
    asyncio bdb cProfile cgitb cloudpickle code codeop commands ctypes _ctypes dill distutils
    doctest ensurepip fileinput ftplib http httplib httpx idlelib imaplib imp importlib inspect joblib lib2to3
    linecache logging.config marshal multiprocessing nt ntpath numpy.distutils numpy.f2py numpy.testing os pdb pickle
    pickletools pip pkgutil platform poplib popen2 posix posixpath profile pty pydoc requests runpy
    setuptools shelve shutil signal site smtplib socket socketserver sqlite3 ssl subprocess sys tarfile telnetlib
    tempfile test threading timeit torch.fx torch.hub torch.jit torch.multiprocessing
    torch.package torch.utils._config_module torch.utils.bottleneck torch.utils.cpp_extension
    torch.utils.data.datapipes torch_utils.persistence trace turtle urllib urllib2 urllib3 uu venv
    webbrowser winreg xmlrpc zipapp zipfile zipimport cPickle
    """.split()  # noqa: SIM905 - read as a table
)
_BUILTINS = frozenset(
    """
    __import__ apply breakpoint compile delattr dir eval exec execfile file globals help input locals map
    memoryview open raw_input reload setattr vars
    """.split()  # noqa: SIM905 - read as a table
)
DANGEROUS_NAMES = {
    "builtins": _BUILTINS,
    "codecs": frozenset({"open", "lookup", "decode"}),
    # Not partial: configurations keep functions in it, and what it would call is named, and rated, beside it.
    "functools": frozenset({"partialmethod", "reduce"}),
    "io": frozenset({"FileIO", "open", "open_code"}),
    "_io": frozenset({"FileIO", "open", "open_code"}),
    "numpy": frozenset({"load", "loads", "memmap", "fromfile", "save"}),
    "operator": frozenset({"attrgetter", "call", "itemgetter", "methodcaller"}),
    "pandas": frozenset({"read_pickle"}),
    "torch": frozenset({"compile", "load", "save"}),
    "torch.serialization": frozenset({"load", "save"}),
    "torch.storage": frozenset({"_load_from_bytes"}),
    "torch.utils.collect_env": frozenset({"run"}),
    "types": frozenset({"CodeType", "FunctionType", "MethodType", "ModuleType"}),
}

# Classes that only hold data, as frameworks put them into checkpoints.
FRIENDLY_CLASSES = {
    "builtins": frozenset({"getattr"}),  # no class: finds one in a class; any other call of it is recorded as dangerous
    "argparse": frozenset({"Namespace"}),
    "collections": frozenset({"deque", "UserDict", "UserList"}),
    "datetime": frozenset({"date", "datetime", "time", "timedelta", "timezone"}),
    "decimal": frozenset({"Decimal"}),
    "fractions": frozenset({"Fraction"}),
    "types": frozenset({"SimpleNamespace"}),
    "typing": frozenset({"Any"}),
    "uuid": frozenset({"UUID", "SafeUUID"}),
    "zoneinfo": frozenset({"ZoneInfo"}),
    "numpy.random._pickle": frozenset({"__randomstate_ctor", "__generator_ctor", "__bit_generator_ctor"}),
    "torch": frozenset({"Generator"}),
    "torch._dynamo.decorators": frozenset({"_DimRange"}),  # in every jagged nested tensor
    "torch.distributed.remote_device": frozenset({"_remote_device"}),
    "torch.amp.grad_scaler": frozenset({"GradScaler", "OptState"}),
    "torch.cuda.amp.grad_scaler": frozenset({"GradScaler", "OptState"}),
}
_FRIENDLY_PATHS = frozenset({"Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"})

# In these modules every class (a name with a capital) only holds data.
FRIENDLY_MODULES = frozenset(
    """
    __torch__ lightning.fabric.utilities.data lightning.pytorch.callbacks lightning.pytorch.trainer.states
    lightning.pytorch.utilities.parsing lightning_fabric.utilities.data omegaconf
    pytorch_lightning.callbacks pytorch_lightning.trainer.states pytorch_lightning.utilities.parsing
    torch.distributed._shard.metadata torch.distributed._shard.sharded_tensor torch.distributed._shard.sharding_spec
    torch.distributed.checkpoint.metadata torch.distributed.checkpoint.filesystem
    torch.distributed.device_mesh torch.distributed._mesh_layout
    torch.distributed.tensor._dtensor_spec torch.distributed.tensor.placement_types
    torch.nn.modules torch.nn.parallel.data_parallel torch.nn.parallel.distributed torch.nn.utils.parametrizations
    torch.nn.utils.parametrize torch.optim
    """.split()  # noqa: SIM905 - read as a table
)


def normalise(module: str, name: str) -> tuple[str, str]:
    """Spell a name as Python 3, NumPy 2 and today's torch do."""
    module, name = _compat_pickle.NAME_MAPPING.get(
        (module, name), (_compat_pickle.IMPORT_MAPPING.get(module, module), name)
    )
    if module == "torch.tensor":  # renamed in torch 1.10
        return "torch._tensor", name
    for old, new in _RENAMED:
        if f"{module}.".startswith(old):
            return f"{new}{module[len(old) :]}".rstrip("."), name
    return module, name


def is_name(text: str) -> bool:
    """Tell whether a text could name a module or what is in one."""
    return 0 < len(text) <= limits.NAME_CHARACTERS and text.isprintable() and " " not in text


def rate(module: str, name: str) -> Severity:
    """Rate a name for which there is no handler."""
    spellings = {(module, name), normalise(module, name)}
    if any(_is_dangerous(*spelling) for spelling in spellings):
        return "dangerous"
    return "info" if any(_is_friendly(*spelling) for spelling in spellings) else "unknown"


def _prefixes(dotted: str) -> list[str]:
    parts = dotted.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _is_dangerous(module: str, name: str) -> bool:
    if any(prefix in DANGEROUS_MODULES for prefix in _prefixes(module)):
        return True
    if name.split(".")[0] in DANGEROUS_NAMES.get(module, ()):
        return True
    # A dotted name walks through attributes, and most modules have "os" or "sys" among theirs.
    return "." in name and any(part in DANGEROUS_MODULES or part.startswith("__") for part in name.split("."))


def _is_friendly(module: str, name: str) -> bool:
    if name in FRIENDLY_CLASSES.get(module, ()):
        return True
    if module in ("pathlib", "pathlib._local"):
        return name in _FRIENDLY_PATHS
    return is_class_name(name) and any(prefix in FRIENDLY_MODULES for prefix in _prefixes(module))


def is_class_name(name: str) -> bool:
    """Tell whether a name is one of a class, of a class inside a class, or of a constant in one."""
    return all(part.isidentifier() and part.lstrip("_")[:1].isupper() for part in name.split("."))
