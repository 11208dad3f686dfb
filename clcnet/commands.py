"""The five scripts as commands of an installed package: clcnet-generate and so on, as pyproject.toml names them."""

import importlib
import sys
from collections.abc import Callable
from typing import NoReturn

from clcnet import cli
from clcnet.memory import keep_freed_memory

_EXTRAS = {"matplotlib": "plots", "jinja2": "report"}


def _command(script: str) -> Callable[[], NoReturn]:
    def run() -> NoReturn:
        cli.take_names_as_utf8()
        cli.expect_interrupts()  # before the imports that take seconds
        cli.leave_cores_to_decoders()
        keep_freed_memory()
        try:
            module = importlib.import_module(script)
        except ModuleNotFoundError as error:
            if error.name not in _EXTRAS:
                raise
            sys.exit(f"error: {error.name} is not installed; pip install 'clcnet[{_EXTRAS[error.name]}]' brings it")
        cli.run(module.main, module.get_args_parser())

    return run


generate = _command("generate_data_for_CLCNet")
train_imagenet = _command("train_imagenet_5fold_cv")
eval_imagenet = _command("eval_imagenet_5fold_cv")
train_custom = _command("train_custom_data")
eval_custom = _command("eval_custom_data")
