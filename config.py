"""Settings: a frozen dataclass declares each once; a config file, then --key=value, override."""

import ast
import dataclasses
import difflib
import inspect
import math
import os
import re
import runpy
import signal
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

COMMAND_LINE = "the command line"
PATHS = "dataset data_dir out_dir cell result init_from ckpt eval redact picture data embedding"
PATHS += " out rates text"  # settings that are paths: a ~ in them is expanded


def stop(message):
    """One line on stderr and exit code 2: how every mistake of the user ends."""
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def one_line():
    """Inside it, an error of the user or of the machine ends in `stop`: ValueError, OSError,
    ImportError, lack of memory, a lost process. Ctrl-C and a closed pipe print nothing."""
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack a character
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # set while torch was imported
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would complain once more at exit
        raise SystemExit(141) from None
    except (ValueError, OSError, ImportError) as error:
        stop(error)
    except (MemoryError, RuntimeError) as error:
        name, said = type(error).__name__, str(error)
        if re.search("MemoryError|allocate memory|overflow", name + said):
            reason = (said or name).splitlines()[0]
            stop(f"out of memory ({reason}): set a smaller model or --micro_tokens")
        if name.startswith("Dist") or "gloo" in said.lower():
            stop("another process of this run is gone: resume, or let torchrun: --max-restarts=3")
        if "C++ compiler" in said:
            stop("--compile=True needs a C++ compiler: install g++, or leave it out")
        raise


def writable(path):
    """path, if a file can be written there, else ValueError. Call it before hours of work, not
    after them. It makes the folder; a file that is there stays as it is."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        is_new = not Path(path).exists()
        open(path, "ab").close()
        if is_new:
            Path(path).unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}; name another file") from None
    return path


@contextmanager
def whole_file(path):
    """A file to write to, flushed to disk and only then given its name: never half a file."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except RuntimeError as error:  # torch.save hides what the disk said
        raise error.__context__ if isinstance(error.__context__, OSError) else error
    finally:
        temporary.unlink(missing_ok=True)


def check(c):
    """ValueError unless every setting is one of its CHOICES and within its RANGE; these stand in
    the classes that declare the settings."""
    for base in type(c).__mro__:
        for name, choices in vars(base).get("CHOICES", {}).items():
            if (got := getattr(c, name)) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {got!r}")
        for name, (low, high) in vars(base).get("RANGE", {}).items():
            if not low <= (got := getattr(c, name)) <= high:
                limits = f"at least {low}" if high == math.inf else f"{low} to {high}"
                raise ValueError(f"{name} must be {limits}, got {got}")


def pairs(text):
    """[(name, [number, ...])] of a setting such as "words:8 engram:8192,2 jepa"."""
    for word in text.split():
        if not re.fullmatch(r"\w+(:\d+(,\d+)*)?", word):
            raise ValueError(f"{word!r} must be name:number or name:number,number,...")
    words = (re.split("[:,]", word) for word in text.split())
    return [(name, [int(number) for number in numbers]) for name, *numbers in words]


def load(cls, argv, given={}):
    """cls from argv = [CONFIG.py] [--key=value ...]: defaults < file < given < command line.

    `--key value` is `--key=value`. Modules, functions and classes in a file, and names that begin
    with _, are not settings. Unknown settings, wrong types, a missing or broken file: one line,
    exit code 2. --help prints all settings.
    """
    if {"-h", "--help"} & set(argv):
        print(f"{sys.argv[0]} [CONFIG.py] [--key=value ...]\n\n{describe(cls)}")
        raise SystemExit(0)
    paths, texts = split(cls, argv)
    flags = {key: checked(cls, key, text, COMMAND_LINE) for key, text in texts.items()}
    settings, names = {}, {f.name for f in dataclasses.fields(cls)}
    for path in paths:
        try:
            if not path.endswith(".py"):  # runpy would run what a zip file holds
                raise ValueError("its name must end in .py; a checkpoint is --ckpt or --init_from")
            found = runpy.run_path(path)
        except Exception as error:  # whatever a file can do wrong
            stop(f"cannot read the config file {path}: {type(error).__name__}: {error}")
        for key, value in found.items():
            is_helper = callable(value) or isinstance(value, ModuleType)
            if key in names or not (is_helper or key.startswith("_")):
                settings[key] = checked(cls, key, value, path)
        if "out_dir" in names:  # every config has a folder of its own
            settings.setdefault("out_dir", f"out/{Path(path).stem}")
    try:
        return cls(**settings | given | flags)
    except ValueError as error:
        stop(error)


def split(cls, argv):
    """The paths of config files in argv, and {key: text} of its settings; None: no text."""
    words, paths, flags = list(argv), [], {}
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            paths.append(word)
            continue
        key, equals, text = word[2:].partition("=")
        if not equals and getattr(cls, key, None) is False:  # --chat is short for --chat=True,
            text = words.pop(0) if words[:1] in (["True"], ["False"]) else "True"  # --chat True too
        elif not equals:
            text = words.pop(0) if words and not words[0].startswith("--") else None
        flags[key] = text
    return paths, flags


def checked(cls, key, value, where):
    """value as the declared type of cls.key; text from the command line is read as a literal. What
    is wrong stops: an unknown setting, with the nearest name; None, a flag without a value."""
    kinds = {f.name: f.type for f in dataclasses.fields(cls)}
    if key not in kinds:
        near = difflib.get_close_matches(key, kinds, 1)
        hint = f"; if it is a helper, name it _{key}" if where != COMMAND_LINE else ""
        hint = f"; did you mean {near[0]!r}?" if near else hint
        stop(f"{where}: unknown setting {key!r}{hint}")
    if value is None and where == COMMAND_LINE:
        stop(f"--{key} has no value; write --{key}=VALUE (--help lists the settings)")
    kind = kinds[key]
    if hasattr(value, "dtype") and getattr(value, "ndim", 1) == 0:
        value = value.item()  # a number that NumPy or PyTorch computed
    if key in PATHS.split() and isinstance(value, str):
        value = os.path.expanduser(value)
    if isinstance(value, str) and kind is not str:
        with suppress(Exception):  # else it stays text, and is the wrong type below
            value = ast.literal_eval(value)
    if type(value) is int and abs(value) >= 2**63:
        stop(f"{where}: {key} must fit into 64 bits, got {value}")
    if type(value) is int and kind is float:
        value = float(value)
    if type(value) is float and not math.isfinite(value):
        stop(f"{where}: {key} must be finite, got {value!r}")
    if type(value) is not kind:
        stop(f"{where}: {key} must be of type {kind.__name__}, got {value!r}")
    return value


def describe(cls):
    """All settings of cls with default and comment, read from the source that declares them: those
    named in cls.FIRST, then each under the comment above it."""
    lines = {}
    for base in reversed(cls.__mro__[:-1]):
        for line in inspect.getsource(base).splitlines():
            if setting := re.match(r"    (\w+): \w+ = (.+?),?  # (.*)", line):
                lines[setting[1]] = "  --{}={}  # {}".format(*setting.groups())
            elif line.startswith("    # "):
                lines[line] = f"\n{line.strip()}"
    first = [lines.pop(name) for name in getattr(cls, "FIRST", "").split()]
    lines = ["# what people set most", *first, *lines.values()] if first else lines.values()
    return "\n".join(lines)
