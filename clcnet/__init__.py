"""CLCNet: a learned confidence decides, image by image, whether a small classifier's answer will do (arXiv:2205.09612).

    from clcnet import CLCNet     # the confidence network: load, save, predict
    from clcnet import Cascade    # the whole cascade on images
    from clcnet import Outputs    # what a classifier said: from logits, to and from files

The names are loaded on first use, so that `import clcnet.cascade.curve` and the other array modules need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clcnet.cascade.in_memory import Cascade
    from clcnet.data.outputs import Outputs
    from clcnet.network.model import CLCNet

__all__ = ["CLCNet", "Cascade", "Outputs"]

_HOME = {"CLCNet": "clcnet.network.model", "Cascade": "clcnet.cascade.in_memory", "Outputs": "clcnet.data.outputs"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value  # the next access finds it without coming here
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
