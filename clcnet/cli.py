"""What the five scripts share on the command line: default paths, flag groups, one-line errors, exit codes."""

import argparse
import atexit
import contextlib
import difflib
import io
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO, cast

from clcnet.memory import keep_freed_memory
from clcnet.strangers import ShownStream, shown

_HOUSE = Path(__file__).resolve().parent.parent
# where this is installed as a package there is no repository to write to
ROOT = _HOUSE if (_HOUSE / "pyproject.toml").is_file() else Path.cwd()
DATA_DIR = ROOT / "data"
WEIGHTS_DIR = ROOT / "weights"
IMAGENET_SPLITS = DATA_DIR / "imagenet_splits_5"
PAIR = {"shallow": "tf_efficientnet_b4.aa_in1k", "deep": "tf_efficientnet_b7.ra_in1k"}  # the paper's second cascade
PLACES = tuple(PAIR)

EXIT_BAD_INPUT = 2
EXIT_UNREADABLE_IMAGES = 3
EXIT_INTERRUPTED = 130

_MOST_THRESHOLDS = 1_000_000
_INTERRUPTED = "no file is half-written; give the same command to start again"
# RuntimeErrors that are not ours: torch has no types of its own for them, and raises the last one anywhere, by a signal
_OF_THE_MACHINE = ("can't allocate memory", "not enough memory", "out of memory", "DataLoader worker", "new thread")
_found: dict[int, Any] = {}  # how signals were handled before, by their numbers


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help that keeps the description's line breaks and ends every option with its default."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.default == argparse.SUPPRESS or "default" in text or not action.option_strings:
            return text
        if action.required:
            return f"{text} (required)"
        return f"{text} (default: {_in_words(action.default)})".replace("%", "%%") if "%(" not in text else text


def _in_words(default: object) -> object:
    if default in (None, [], False):
        return "off" if default is False else "none"
    return default.relative_to(ROOT) if isinstance(default, Path) and default.is_relative_to(ROOT) else default


class ArgumentParser(argparse.ArgumentParser):
    """argparse with one-line errors, the nearest flag for a misspelled one, and forgiving spelling.

    `--num_classes`, `--num-classes` and `--NUM-CLASSES` name the same flag, as do the specification's
    `---deep-model-FLOPs` and `--deep-model-FLOPs`. Abbreviations are not accepted: a flag that is added later must not
    change what a command means.
    """

    def __init__(self, **kwargs: Any) -> None:
        # argparse would open the help with a dozen lines of flags that stand below it anyway, each with its meaning
        kwargs.setdefault("usage", "%(prog)s [FLAG ...]")
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)
        self.register("type", Path, path)
        # argparse takes "-1e3" and "-inf" for flags; here they are values of --threshold
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$|^-inf$", re.IGNORECASE)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:  # type: ignore[override]
        words = [self._registered_spelling(word) for word in (sys.argv[1:] if args is None else args)]
        return super().parse_known_args(words, namespace)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self._describe_unknown(unknown[0]))
        return parsed

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with 2."""
        print(f"error: {one_line(message)}; see {self.prog} --help", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)

    def _registered_spelling(self, word: str) -> str:
        if not word.startswith("--") or word == "--":
            return word
        name, equals, value = word.partition("=")
        spellings = {_plain(option): option for option in self._option_string_actions if option.startswith("--")}
        return spellings.get(_plain(name), name) + equals + value

    def _describe_unknown(self, word: str) -> str:
        name = word.partition("=")[0]
        if not name.startswith("-"):
            return f"unexpected argument {word!r}"
        flags = {_plain(option): option for option in self._option_string_actions}
        nearest = difflib.get_close_matches(_plain(name), flags, n=1, cutoff=0.5)
        return f"unknown flag {name}" + (f"; did you mean {flags[nearest[0]]}?" if nearest else "")


def _plain(flag: str) -> str:
    return flag.lstrip("-").replace("_", "-").lower()


def true_or_false(text: str) -> bool:
    """Read `True`, `false`, `1`, `no`... for flags that may stand alone or be followed by a word."""
    for value, words in ((True, ("true", "t", "yes", "y", "1", "on")), (False, ("false", "f", "no", "n", "0", "off"))):
        if text.lower() in words:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")


def _number(kind: Callable[[str], Any], accepts: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if accepts(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")

    return parse


def path(text: str) -> Path:
    """Read a path, for all flags of type Path: an empty one, of a variable not set, is not the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty; is a variable not set?")
    return Path(text)


rows_a_batch = _number(int, lambda value: 2 <= value <= 2**16, "a number of rows, at least 2 and at most 65536")
positive_int = _number(int, lambda value: value >= 1, "a whole number of at least 1")
number_of_classes = _number(int, lambda value: value >= 2, "a number of classes, at least 2")
positive_float = _number(float, lambda value: 0 < value < math.inf, "a number above 0")
finite_float = _number(float, math.isfinite, "a finite number")
probability = _number(float, lambda value: 0 < value < 1, "a number above 0 and below 1")
# upper bounds where a slip of the finger would bring the machine down before any error could be raised
batch_size = _number(int, lambda value: 1 <= value <= 2**20, "a whole number of at least 1 and at most 1048576")
num_workers = _number(int, lambda value: 0 <= value <= 256, "a whole number of at least 0 and at most 256")
image_size = _number(int, lambda value: 1 <= value <= 16384, "a whole number of at least 1 and at most 16384")
crop_share = _number(float, lambda value: 0.05 <= value <= 1, "a share of at least 0.05 and at most 1")
stages = _number(int, lambda value: 1 <= value <= 4, "a number of models, 1 to 4")
seed = _number(int, lambda value: 0 <= value < 2**32, "a whole number of at least 0 and below 2**32")
threshold = _number(float, lambda value: not math.isnan(value), "a threshold (a number, inf or -inf)")


def add_pair_arguments(parser: argparse.ArgumentParser) -> Any:
    """Add the flags of the specification's two models, see `pair_options`; returns their group, for more flags."""
    group = parser.add_argument_group("models")
    for place, default in PAIR.items():
        model = f"timm model, local-dir:FOLDER, hf-hub:NAME (default: {default})"
        group.add_argument(f"--{place}-model", metavar="NAME", help=model)
        file = ".pth, .pth.tar or .safetensors (default: timm's)"
        group.add_argument(f"--{place}-model-weight", type=Path, metavar="FILE", help=file)
        flops = "multiply-adds an image (default: counted)"
        group.add_argument(f"--{place}-model-FLOPs", type=positive_float, metavar="BILLIONS", help=flops)
    classes = "classes of the models (default: their own)"
    group.add_argument("--num_classes", type=number_of_classes, metavar="N", help=classes)
    return group


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of every script that runs a classifier: where and how it runs, never what it computes."""
    group = parser.add_argument_group("device and speed")
    add = group.add_argument
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: cuda, then mps, then cpu)")
    precision = "run the models in mixed precision: bfloat16 when no type follows (default: float32)"
    add("--amp", nargs="?", const="bfloat16", choices=("bfloat16", "float16"), help=precision)
    add("--channels-last", action="store_true", help="use the channels-last memory layout (default: off)")
    add("--compile", action="store_true", help="compile the models with torch.compile (default: off)")
    add("--tf32", action="store_true", help="TF32 and the quickest algorithms on a GPU, as timm (default: off)")
    fast = "take what is quickest here of the above, tried on some images, if top-1 agrees on 99.9%% (default: off)"
    add("--fast", action="store_true", help=fast)
    add("-b", "--batch-size", type=batch_size, metavar="N", help="images a batch (default: 256 on a GPU, 64 on a CPU)")
    decoders = "processes that decode images (default: by the number of CPU cores)"
    add("-j", "--workers", type=num_workers, metavar="N", help=decoders)
    add_seed_argument(group)


def add_seed_argument(parser: Any) -> None:
    """Add `--seed` to a parser or group."""
    parser.add_argument("--seed", type=seed, default=42, metavar="N", help="seed of all random numbers")


def add_store_arguments(parser: Any) -> None:
    """Add to a parser or group where answers are kept, for the scripts that run classifiers."""
    kept: dict[str, Any] = {"type": Path, "default": DATA_DIR / "store", "metavar": "FOLDER"}
    where = "where models' answers are kept, so that no model sees an image twice"
    parser.add_argument("--store", "--cache", dest="store", help=where, **kept)
    nothing = "no effect: what the store holds is always taken from there"
    parser.add_argument("--resume", action="store_true", help=nothing)


def add_preprocessing_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that override a model's own preprocessing, named as in timm."""
    add = parser.add_argument_group("preprocessing").add_argument
    larger = "larger images are left out (default: PIL's limit, 178956970)"
    add("--max-image-pixels", type=positive_int, metavar="N", help=larger)
    add("--img-size", type=image_size, metavar="PIXELS", help="side of the square that it sees (default: the model's)")
    share = "share of the resized image that is kept, 0.05 to 1 (default: the model's)"
    add("--crop-pct", type=crop_share, metavar="SHARE", help=share)
    square = (
        "how to make it square; squash resizes both sides without regard to their ratio, as the paper's code did "
        "(default: the model's)"
    )
    add("--crop-mode", choices=("center", "border", "squash"), help=square)
    filters = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
    add("--interpolation", choices=filters, help="resampling filter (default: the model's)")
    for name in ("mean", "std"):
        shares = f"{name} of each channel, or of all, in shares of 255 (default: the model's)"
        add(f"--{name}", type=finite_float, nargs="+", metavar="SHARE", help=shares)


_PREPROCESSING = ("img_size", "crop_pct", "crop_mode", "interpolation", "mean", "std")
SPEED = ("amp", "channels_last", "compile", "tf32")  # of the flags, how models run


def classifier_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `load_classifier` takes from the flags that all scripts with classifiers share."""
    names = ("num_classes", *_PREPROCESSING, *SPEED)
    return {name: getattr(args, name) for name in names}


def pair_options(args: argparse.Namespace, place: str) -> dict[str, Any]:
    """What `load_classifier` takes, of the "shallow" or the "deep" model of the flags."""
    name, weight = (getattr(args, f"{place}_{flag}") for flag in ("model", "model_weight"))
    return {"name": name or PAIR[place], "weight": weight, **classifier_options(args)}


def refuse_beside_policy(args: argparse.Namespace) -> None:
    """Raise ValueError where a flag says which models are used or how, beside a policy, which says it itself."""
    models = [f"{place}_model{end}" for place in PAIR for end in ("", "_weight", "_FLOPs")]
    for name in (*models, "num_classes", *_PREPROCESSING, "weight", "any_n", "threshold"):
        if getattr(args, name) not in (None, False):
            raise ValueError(f"--policy says what --{name.replace('_', '-')} would; leave one of the two out")


def print_lines(*lines: str) -> None:
    """Print those that are not empty, each on one line whatever it quotes."""
    for line in filter(None, lines):
        print(one_line(line), flush=True)


def one_line(message: object) -> str:
    """The message on one line, whatever line breaks it held, and without effect on a screen."""
    return shown(" ".join(str(message).split()))


def _describe(error: BaseException) -> str:
    if isinstance(error, BrokenPipeError):
        return "what is printed could not be passed on: the program that read it has ended"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if "DataLoader worker" in str(error):
        return f"a process that decodes images died ({error}); try again with fewer --workers"
    return str(error) or type(error).__name__


def _interrupt(number: int, frame: object) -> NoReturn:
    if hasattr(signal, "SIGCHLD"):
        # the signal may have gone to decoding processes too, whose end torch would report with tracebacks of its own
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    raise KeyboardInterrupt


def start(decodes: bool = False) -> None:
    """What a script does before the imports that take seconds.

    Args:
        decodes: whether processes decode images, to which torch's threads leave the cores. Not for scripts that time
            single images, which wait for threads to wake up.
    """
    if sys.getfilesystemencoding() != "utf-8" and not hasattr(sys, "ps1"):
        # again in Python's UTF-8 mode, whatever the locale: tables name files in UTF-8, byte by byte
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    expect_interrupts()
    if decodes:
        leave_cores_to_decoders()
    keep_freed_memory()


def expect_interrupts() -> None:
    """From now until `run` takes over, end on Ctrl-C or SIGTERM with one line: importing torch takes seconds.

    Not in a session that goes on, as after %run in IPython.
    """
    if hasattr(sys, "ps1"):
        return

    def end(*_: object) -> None:
        print(f"\ninterrupted: {_INTERRUPTED}", file=sys.stderr, flush=True)
        os._exit(EXIT_INTERRUPTED)  # nothing is open yet, and an exception would get lost in an import

    _on_interrupt(end)


def leave_cores_to_decoders() -> None:
    """Have torch's threads sleep while they wait for work on a CPU, unless the user's environment says otherwise.

    By default they spin, and take the cores from the processes that decode images: benchmarks/bench_generate.py
    measures by how much. It is too late once torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _on_interrupt(handler: Callable[..., Any] | signal.Handlers) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as a shell sets it for jobs in the background
            _found.setdefault(number, signal.signal(number, handler) or signal.SIG_DFL)


def run(main: Callable[[Any], dict[str, Any]], parser: argparse.ArgumentParser) -> NoReturn:
    """Parse the command line, run `main(args)`, and turn its outcome into an exit code.

    A `ValueError` or `OSError`, or a lack of memory, is the user's to mend and becomes one line; any other error is
    ours and keeps its traceback. Exit codes: 0 done, 2 bad input, 3 done but some images could not be read (`main`
    returned `num_unreadable` above 0), 130 interrupted by Ctrl-C or SIGTERM. Under torchrun a run that is done ends
    with 0 in any case: torchrun takes every other code for a crash, stops or restarts all processes and returns 1.
    """
    streams = sys.stdout, sys.stderr
    try:
        code = _run(main, parser)
    finally:
        sys.stdout, sys.stderr = streams
        while _found:  # a session may go on, such as IPython's
            signal.signal(*_found.popitem())
        # else Python unloads torch for a second, in which its own handlers are gone already
        atexit.register(_on_interrupt, signal.SIG_IGN)
    sys.exit(code)


def _run(main: Callable[[Any], dict[str, Any]], parser: argparse.ArgumentParser) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file name may hold what the terminal cannot show
    # names of files, classes and models may hold commands to a terminal; a progress bar goes back to its line's start
    errors = ShownStream(sys.stderr, keep="\r")
    sys.stdout, sys.stderr = cast(TextIO, ShownStream(sys.stdout)), cast(TextIO, errors)
    args = parser.parse_args()
    if getattr(args, "max_image_pixels", None):
        from PIL import Image

        Image.MAX_IMAGE_PIXELS = args.max_image_pixels / 2  # PIL refuses more than twice as much
    _on_interrupt(_interrupt)
    try:
        outcome = main(args)
        sys.stdout.flush()
        under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        return EXIT_UNREADABLE_IMAGES if outcome.get("num_unreadable") and not under_torchrun else 0
    except Exception as error:
        of_the_machine = isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _OF_THE_MACHINE)
        if not of_the_machine and not isinstance(error, ValueError | OSError | MemoryError):
            raise
        if isinstance(error, BrokenPipeError):  # Python would complain again when it flushes at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        message = f"error: {one_line(_describe(error))}"
        # torch's signal may have come before a progress bar ended its line
        print("\n" * errors.in_line + message, file=sys.stderr)
        if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun's summary would name exit codes alone
            Path(file).write_text(json.dumps({"message": message, "timestamp": int(time.time())}), encoding="utf-8")
        return EXIT_BAD_INPUT
    except KeyboardInterrupt as interrupt:
        print(f"\ninterrupted: {str(interrupt) or _INTERRUPTED}", file=sys.stderr)
        return EXIT_INTERRUPTED
    finally:
        _on_interrupt(signal.SIG_IGN)  # too late: what there was to say and to write is done


def threshold_grid(words: Sequence[str]) -> list[float] | None:
    """Thresholds given as numbers and START:STOP:STEP, rising; None for `all`, every one that makes a difference."""
    if list(words) == ["all"]:
        return None
    grid: list[float] = []
    for word in words:
        try:
            numbers = [float(number) for number in word.split(":")]
        except ValueError:
            numbers = []
        match numbers:
            case [start, stop, step] if step > 0 and all(map(math.isfinite, numbers)):
                if (stop - start) / step > _MOST_THRESHOLDS:
                    raise ValueError(
                        f"--thresholds: {word} names more than {_MOST_THRESHOLDS:,} of them; take a larger step"
                    )
                grid += [round(start + step * index, 10) for index in range(int((stop - start) / step + 1e-9) + 1)]
            case [number] if not math.isnan(number):
                grid.append(number)
            case _:
                raise ValueError(f"--thresholds: {word!r} is neither a number, nor START:STOP:STEP, nor all")
    if not grid:
        raise ValueError(f"--thresholds {' '.join(words)}: no threshold lies in this range")
    return sorted(set(grid))
