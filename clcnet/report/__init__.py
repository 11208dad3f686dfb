"""Tables and pictures."""

import contextlib
import importlib
import os

if _backend := os.environ.pop("MPLBACKEND", None):  # a notebook's, which need not be installed here
    with contextlib.suppress(ModuleNotFoundError):  # nor need matplotlib, for tables
        importlib.import_module("matplotlib")
    os.environ["MPLBACKEND"] = _backend
