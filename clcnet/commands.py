"""The five scripts as commands of an installed package: clcnet-generate and so on, as pyproject.toml names them."""

import importlib
import sys
from collections.abc import Callable
from typing import NoReturn

from clcnet import cli

_EXTRAS = {"matplotlib": "plots", "jinja2": "report"}


def _command(script: str, decodes: bool = False) -> Callable[[], NoReturn]:
    def run() -> NoReturn:
        cli.start(decodes)
        try:
            module = importlib.import_module(script)
        except ModuleNotFoundError as error:
            if error.name not in _EXTRAS:
                raise
            sys.exit(f"error: {error.name} is not installed; pip install 'clcnet[{_EXTRAS[error.name]}]' brings it")
        cli.run(module.main, module.get_args_parser())

    return run


generate = _command("generate_data_for_CLCNet", decodes=True)
train_imagenet = _command("train_imagenet_5fold_cv")
eval_imagenet = _command("eval_imagenet_5fold_cv")
train_custom = _command("train_custom_data")
eval_custom = _command("eval_custom_data", decodes=True)
