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

# And classes, of which one may make objects, and whose methods nobody may call.
DANGEROUS_MODULES = frozenset(
    """
    _aix_support _bootsubprocess _frozen_importlib _frozen_importlib_external _interpreters _osx_support
    _posixsubprocess _pyio _pyrepl _thread _winapi _xxsubinterpreters aiohttp antigravity asynchat asyncio asyncore
    atexit bdb cPickle cProfile cgitb cloudpickle code codeop commands compileall concurrent ctypes dill distutils
    doctest ensurepip fileinput ftplib gc glob http httplib httpx idlelib imaplib imp importlib inspect joblib
    lib2to3 linecache logging.config logging.handlers mailcap marshal mmap multiprocessing nntplib nt ntpath
    numpy.distutils numpy.f2py numpy.testing os pathlib.Path pathlib.PosixPath pathlib.WindowsPath
    pathlib._local.Path pathlib._local.PosixPath pathlib._local.WindowsPath pdb pexpect pickle pickletools pip pipes
    pkgutil platform popen2 poplib posix posixpath profile pty py_compile pydoc requests runpy select selectors
    setuptools shelve shutil signal site smtpd smtplib socket socketserver sqlite3 ssl subprocess sys syslog tarfile
    telnetlib tempfile test threading timeit torch._dynamo.guards torch._inductor torch.fx torch.hub torch.jit
    torch.multiprocessing torch.package torch.utils._config_module torch.utils.bottleneck
    torch.utils.cpp_extension torch.utils.data.datapipes torch_utils.persistence trace turtle unittest urllib
    urllib2 urllib3 uu venv webbrowser winreg wsgiref xmlrpc zipapp zipfile zipimport
    """.split()  # noqa: SIM905 - read as a table
)
_BUILTINS = frozenset(
    """
    __import__ apply breakpoint compile delattr dir eval exec execfile file filter globals help input locals map
    memoryview next open raw_input reload setattr vars
    """.split()  # noqa: SIM905 - read as a table
)
DANGEROUS_NAMES = {
    "builtins": _BUILTINS,
    "bz2": frozenset({"BZ2File", "open"}),
    "codecs": frozenset({"open", "lookup", "decode"}),
    "copy": frozenset({"_reconstruct"}),
    "dataclasses": frozenset({"_create_fn"}),
    # Not partial: configurations keep functions in it, and what it would call is named, and rated, beside it.
    "functools": frozenset({"partialmethod", "reduce"}),
    "gzip": frozenset({"GzipFile", "open"}),
    "hydra.utils": frozenset({"call", "get_class", "get_method", "get_object", "instantiate"}),
    "io": frozenset({"FileIO", "open", "open_code"}),
    # They call what they are given for every item, as map does.
    "itertools": frozenset({"accumulate", "dropwhile", "filterfalse", "groupby", "starmap", "takewhile"}),
    "logging": frozenset({"FileHandler"}),
    "lzma": frozenset({"LZMAFile", "open"}),
    "numpy": frozenset({"load", "loads", "memmap", "fromfile", "save"}),
    "numpy.ctypeslib": frozenset({"load_library"}),
    "operator": frozenset({"attrgetter", "call", "itemgetter", "methodcaller"}),
    "pandas": frozenset({"eval", "read_pickle"}),
    "string": frozenset({"Formatter"}),
    "torch": frozenset({"compile", "load", "save"}),
    "torch.ops": frozenset({"load_library"}),
    "torch.serialization": frozenset({"load", "save"}),
    "torch.storage": frozenset({"_load_from_bytes"}),
    "torch.utils.collect_env": frozenset({"run"}),
    "types": frozenset({"CodeType", "FunctionType", "MethodType", "ModuleType"}),
    "typing": frozenset({"_eval_type", "get_type_hints"}),
    "typing.ForwardRef": frozenset({"_evaluate"}),
    "uuid": frozenset({"_get_command_stdout"}),
    "weakref": frozenset({"finalize"}),
    "yaml": frozenset({"full_load", "load", "load_all", "unsafe_load", "unsafe_load_all"}),
}

# Classes that only hold data, as frameworks put them into checkpoints.
FRIENDLY_CLASSES = {
    "builtins": frozenset({"getattr"}),  # no class: finds one in a class; any other use of it is recorded as dangerous
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
    walked = name.split(".")
    if len(walked) > 1 and any(part.startswith("__") for part in walked):
        return True
    # A dotted name walks through attributes, and most modules have others among theirs: ``io.open``, from wherever.
    inner = (".".join(walked[start:]) for start in range(len(walked) - 1))
    return any(_leads_to_danger(path) for path in (f"{module}.{name}", *inner))


def _leads_to_danger(path: str) -> bool:
    # The part of a module that is written in C has its name behind an underscore: ``_operator``, ``_socket``.
    for spelled in (path, path.removeprefix("_")):
        parts = spelled.split(".")
        for owner, found in zip(_prefixes(spelled), parts[1:], strict=False):
            if owner in DANGEROUS_MODULES or found in DANGEROUS_NAMES.get(owner, ()):
                return True
    return False


def _is_friendly(module: str, name: str) -> bool:
    if name in FRIENDLY_CLASSES.get(module, ()):
        return True
    if module in ("pathlib", "pathlib._local"):
        return name in _FRIENDLY_PATHS
    return is_class_name(name) and any(prefix in FRIENDLY_MODULES for prefix in _prefixes(module))


def is_class_name(name: str) -> bool:
    """Tell whether a name is one of a class, of a class inside a class, or of a constant in one."""
    return all(part.isidentifier() and part.lstrip("_")[:1].isupper() for part in name.split("."))
