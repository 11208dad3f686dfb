"""The five scripts as commands of an installed package: clcnet-generate and so on, as pyproject.toml names them."""

import functools
import importlib
import sys
from typing import NoReturn

from clcnet import cli


def _run(script: str, decodes: bool = False) -> NoReturn:
    cli.start(decodes)
    try:
        module = importlib.import_module(script)
    except ModuleNotFoundError as error:
        if error.name not in ("matplotlib", "jinja2"):
            raise
        sys.exit(f"error: {error.name} is not installed; pip install 'clcnet[report]' brings it")
    cli.run(module.main, module.get_args_parser())


generate = functools.partial(_run, "generate_data_for_CLCNet", decodes=True)
train_imagenet = functools.partial(_run, "train_imagenet_5fold_cv")
eval_imagenet = functools.partial(_run, "eval_imagenet_5fold_cv")
train_custom = functools.partial(_run, "train_custom_data")
eval_custom = functools.partial(_run, "eval_custom_data", decodes=True)
