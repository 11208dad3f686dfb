"""Tables, pictures and pages."""

import contextlib
import importlib
import os
import sys
from importlib.util import find_spec
from pathlib import Path

_backend = os.environ.pop("MPLBACKEND", None)  # a notebook's, which need not be installed here
with contextlib.suppress(ModuleNotFoundError):  # nor need matplotlib, for tables
    try:
        importlib.import_module("matplotlib")
    except UnicodeDecodeError:  # of a matplotlibrc, as matplotlib has said by now; our figures heed none
        for _name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
            del sys.modules[_name]
        _spec = find_spec("matplotlib")
        assert _spec is not None and _spec.origin is not None
        with contextlib.chdir(Path(_spec.origin).parent / "mpl-data"):  # where its own one lies
            importlib.import_module("matplotlib")
if _backend:
    os.environ["MPLBACKEND"] = _backend
