"""Settings: a frozen dataclass declares each once; a config file, then --key=value, override."""

import ast
import dataclasses
import difflib
import inspect
import math
import os
import re
import runpy
import sys
from contextlib import contextmanager
from pathlib import Path


def stop(message):
    """One line on stderr and exit code 2: how every mistake of the user ends."""
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def one_line(*mistakes):
    """Inside it, what the user or the machine got wrong ends in `stop`: ValueError, OSError, the
    caller's own `mistakes`, lack of memory. Ctrl-C and a closed pipe end without a word."""
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack a character
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would complain once more at exit
        raise SystemExit(141) from None
    except (*mistakes, ValueError, OSError) as error:
        stop(error)
    except (MemoryError, RuntimeError) as error:
        said = str(error)
        is_lack = type(error).__name__ in ("MemoryError", "OutOfMemoryError")  # Python's, torch's
        if not is_lack and not re.search("allocate memory|overflow", said):
            raise
        reason = said.splitlines()[0] if said else "of Python"
        stop(f"out of memory ({reason}): set a smaller model or --micro_tokens")


def load(cls, argv, given={}):
    """cls from argv = [CONFIG.py] [--key=value ...]: defaults < file < given < command line.

    The run of configs/NAME.py goes to out/NAME if nothing else is said.

    Unknown settings, wrong types, a missing or broken file: one line, exit code 2. --help prints.
    """
    if {"-h", "--help"} & set(argv):
        print(f"{sys.argv[0]} [CONFIG.py] [--key=value ...]\n\n{describe(cls)}")
        raise SystemExit(0)
    settings, flags = {}, {}
    for arg in (arg for arg in argv if arg.startswith("--")):
        key, equals, text = arg[2:].partition("=")
        is_switch = getattr(cls, key, None) is False  # --chat is short for --chat=True
        if not equals and not is_switch:
            stop(f"{arg} has no value; write --{key}=VALUE (--help lists the settings)")
        flags[key] = checked(cls, key, text if equals else "True", "the command line")
    for path in (arg for arg in argv if not arg.startswith("--")):
        try:
            found = runpy.run_path(path).items()
        except Exception as error:  # whatever a file can do wrong
            stop(f"cannot read the config file {path}: {type(error).__name__}: {error}")
        settings |= {k: checked(cls, k, v, path) for k, v in found if not k.startswith("_")}
        if hasattr(cls, "out_dir"):
            settings.setdefault("out_dir", f"out/{Path(path).stem}")
    try:
        return cls(**settings | given | flags)
    except ValueError as error:
        stop(error)


def checked(cls, key, value, where):
    """value as the declared type of cls.key; text from the command line is read as a literal."""
    kinds = {f.name: f.type for f in dataclasses.fields(cls)}
    if key not in kinds:
        near = difflib.get_close_matches(key, kinds, 1)
        stop(f"{where}: unknown setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    if isinstance(value, str) and kinds[key] is not str:
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pass  # stays text, and is the wrong type below
    if type(value) is int and kinds[key] is float:
        value = float(value)
    if type(value) is float and not math.isfinite(value):
        stop(f"{where}: {key} must be finite, got {value!r}")
    if type(value) is int and abs(value) >= 2**63:
        stop(f"{where}: {key} must fit into 64 bits, got {value}")
    if type(value) is not kinds[key]:
        stop(f"{where}: {key} must be of type {kinds[key].__name__}, got {value!r}")
    return value


def describe(cls):
    """All settings of cls with default and comment, read from the source that declares them."""
    lines = {}
    for base in reversed(cls.__mro__[:-1]):
        for line in inspect.getsource(base).splitlines():
            if setting := re.match(r"    (\w+): \w+ = (.+?)  # (.*)", line):
                lines[setting[1]] = "  --{}={}  # {}".format(*setting.groups())
            elif line.startswith("    # "):
                lines[line] = f"\n{line.strip()}"
    return "\n".join(lines.values())
