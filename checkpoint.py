"""What a run leaves on disk: checkpoints, its log, its result; and the lock on its folder.

A checkpoint is one file that holds weights, settings, tokenizer and where training stood. It is
read with weights_only=True, always, and checked against what it is put into before anything is
touched. Files are written under another name first: there is never half a checkpoint.
"""

import datetime
import json
import os
import platform
import re
import subprocess
import sys
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, replace
from importlib import metadata
from pathlib import Path

import torch

from cell_bridge import PROGRAMS
from config import PATHS, whole_file
from model import ModelConfig, SpikingLM

VERSION = 3  # of checkpoints; raise it when the code can no longer use older ones


# ---- reading ----------------------------------------------------------------------------------


def read_tensors(path, what, writer):
    """What the program `writer` saved at path; ValueError with one line where it can not be read.

    weights_only: such a file is tensors and plain values, and can not run code.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load reads changed bytes without a word
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} was changed")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"there is no {what} {path}; {writer} writes one") from None
    except Exception as error:  # damaged in any of many ways
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot read the {what} {path}: {reason}") from None


def load_cell(path):
    """(scores (pool, 6), genes of the pool) of cell_bridge.py's file; ValueError if it is none."""
    file = read_tensors(path, "cell", "cell_bridge.py")
    if type(file) is not dict or file.get("programs") != list(PROGRAMS):
        raise ValueError(f"{path} is no cell of cell_bridge.py with these six programs")
    return file["scores"], file["genes"]


def load_checkpoint(path):
    """The dictionary that train.py saved; ValueError with one line where it can not be read."""
    checkpoint = read_tensors(path, "checkpoint", "train.py")
    kinds = {"version": int, "model": dict, "config": dict, "tokenizer": str}
    for name, kind in kinds.items():
        if type(checkpoint) is not dict or not isinstance(checkpoint.get(name), kind):
            raise ValueError(f"{path} is no checkpoint of train.py: it has no {name}")
    if (version := checkpoint["version"]) != VERSION:
        raise ValueError(f"{path} is of version {version}, this code reads only {VERSION}")
    # a setting younger than the checkpoint was off when it was written, as it is by default
    checkpoint["config"] = asdict(ModelConfig()) | checkpoint["config"]
    return checkpoint


def shape_of(checkpoint):
    """The settings of a checkpoint's model, for a run that begins with its weights."""
    names = {f.name for f in fields(ModelConfig)} - {"checkpointing"}  # which changes no result
    return {name: checkpoint["config"][name] for name in sorted(names)}


def check_weights(saved, model):
    """ValueError unless `saved` has all of the model's tensors and their values are finite."""
    wanted = model.state_dict()
    for name in [*wanted, *saved]:
        a, b = saved.get(name), wanted.get(name)
        if not torch.is_tensor(a) or b is None or (a.shape, a.dtype) != (b.shape, b.dtype):
            raise ValueError(f"the checkpoint's weights do not fit its settings: {name}")
        if not a.isfinite().all():
            raise ValueError(f"the checkpoint's weights are damaged: {name} is not finite")


def build(checkpoint):
    """The model of a checkpoint, weights loaded, ready to evaluate and generate on any device.

    ValueError, before memory is taken, if the weights are not those of the settings beside them.
    """
    settings = {f.name: checkpoint["config"][f.name] for f in fields(ModelConfig)}
    if wrong := [f.name for f in fields(ModelConfig) if type(settings[f.name]) is not f.type]:
        raise ValueError(f"the checkpoint's setting {wrong[0]} is of a wrong type")
    c = ModelConfig(**settings)
    try:
        with torch.device("meta"):
            outline = SpikingLM(c)
    except RuntimeError as error:  # such sizes no tensor can have
        raise ValueError(f"the checkpoint's settings make no model: {error}") from None
    check_weights(checkpoint["model"], outline)
    model = SpikingLM(c)
    model.load_state_dict(checkpoint["model"])
    return model.eval()


# ---- saving and resuming: t is train.Training, what a run consists of -------------------------


def save(t, is_best):
    """Write step_*.pt and, if it is the best, best.pt; remove all step_*.pt but the one before.

    All ranks must call this. best.pt is written first, so that a kill between the two writes only
    repeats the step.
    """
    run, out = t.run, t.out
    for optimizer in t.optimizers:
        if t.c.shard and run.world > 1:
            optimizer.consolidate_state_dict(to=0)  # the shares of all
    if t.feed.position is not None:
        t.position.stream = run.of_all(t.feed.position)
    checkpoint = {
        "version": VERSION,
        "model": t.model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in t.optimizers if run.main],
        "random": run.of_all([g.get_rng_state() for g in run.generators]),
        "config": asdict(t.c),
        "tokenizer": t.corpus.tokenizer.state(),
        "dataset": t.corpus.dataset,  # what `auto` meant
        "data": t.corpus.sha256,
        "position": asdict(t.position),
        "environment": t.record,  # commit and versions among others
    }
    if run.main:
        path = out / f"step_{t.position.step:08d}.pt"
        for name in ["best.pt"] * is_best + [path.name]:
            with whole_file(out / name) as file:
                torch.save(checkpoint, file)
        if run.world > 1:  # from now on a restart by torchrun goes on with this run
            run.store.set("saved", "1")
        before = sorted(old for old in out.glob("step_*.pt") if old < path)[-1:]
        for old in {*out.glob("step_*.pt"), *out.glob("*.tmp")} - {path, *before}:
            old.unlink()


def newest(out, c, run):
    """The newest whole checkpoint in `out`; a damaged one is named. None: this is a new run."""
    paths = [*sorted(out.glob("step_*.pt"), reverse=True), *out.glob("best.pt")]
    if c.init_from != "resume" and not (run.restarted and paths):
        return None
    for path in paths:
        try:
            return load_checkpoint(path)
        except ValueError as error:
            run.say(f"{error}: going on from the one before it")
    raise ValueError(f"there is no checkpoint to resume in {out}: start from scratch")


def restore(t, checkpoint):
    """Put a checkpoint back into t, a fresh run.

    ValueError, before anything is touched, if it is another run's or not as `save` writes it.
    """
    old, new = checkpoint["config"], asdict(t.c)
    try:
        for name in [*shape_of(checkpoint), "optimizer", "tokenizer", "phases"]:
            if old[name] != new[name]:
                raise ValueError(
                    f"the checkpoint was trained with {name}={old[name]!r}, not {new[name]!r}: "
                    "resume with the same config, or start from scratch"
                )
        check_weights(checkpoint["model"], t.model)
        states = [saved["state"] for saved in checkpoint["optimizers"]]
        fit = len(states) == len(t.optimizers) and all(map(is_state, states, t.optimizers))
        if not (fit and is_position(checkpoint["position"], asdict(t.position))):
            raise ValueError("the checkpoint's position or optimisers are damaged: start anew")
        if checkpoint["data"] != t.corpus.sha256:
            t.run.say(f"{t.corpus.name} has changed since the checkpoint: going on with it")
        if lost := dict(checkpoint["position"]["curriculum"]).keys() - dict(t.position.curriculum):
            raise ValueError(f"no text for the checkpoint's phase {min(lost)}: give its own data")
        if len(checkpoint["random"]) == t.run.world:
            for generator, state in zip(t.run.generators, checkpoint["random"][t.run.rank]):
                generator.set_rng_state(state)
    except (AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(f"the checkpoint is damaged ({error!r}): start from scratch") from None
    t.model.load_state_dict(checkpoint["model"])
    for optimizer, saved in zip(t.optimizers, checkpoint["optimizers"]):
        # with this run's rates, which may be new; not ZeRO's state_dict, which holds the shares
        groups = torch.optim.Optimizer.state_dict(optimizer)["param_groups"]
        optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    t.position = replace(t.position, **checkpoint["position"])


def is_position(saved, fresh):
    """Whether `saved` has the keys and kinds of values of `fresh`, a new run's, and makes sense."""
    kinds, wanted = ({key: type(value) for key, value in p.items()} for p in (saved, fresh))
    return (
        kinds == wanted
        and saved["phase"] < len(saved["curriculum"])
        and min(saved[key] for key in ("step", "phase", "phase_step", "tokens", "threads")) >= 0
        and {type(loss) for loss in saved["history"] + saved["losses"]} <= {float}
        and all(type(name) is str and length > 0 for name, length in saved["curriculum"])
    )


def is_state(saved, optimizer):
    """Whether `saved`, {number of a parameter: its tensors}, can be this optimiser's: the tensors
    have the same names everywhere, and are numbers or of their parameter's shape."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return len({frozenset(tensors) for tensors in saved.values()}) <= 1 and all(
        x.shape in ((), params[i].shape) and x.dtype == params[i].dtype
        for i, tensors in saved.items()
        for x in tensors.values()
    )


def rewind_log(out, step):
    """Cut from log.jsonl what came after the checkpoint, for it comes again, and half a line."""
    kept, log = [], out / "log.jsonl"
    for line in log.read_bytes().splitlines() if log.exists() else []:
        with suppress(ValueError, KeyError, TypeError):
            kept += [line] * (json.loads(line)["step"] <= step)
    with whole_file(log) as file:
        file.write(b"".join(line + b"\n" for line in kept))


def write_log(out, line):
    with open(out / "log.jsonl", "a") as log:
        log.write(json.dumps(line) + "\n")


def set_aside(out):
    """Move the run that `out` may hold to a folder of its own, out/1, out/2, ...: nothing is lost.

    Returns that folder, or None if there is no run.
    """
    if not (old := [*out.glob("*.pt"), *out.glob("log.jsonl")]):
        return None
    numbers = [int(path.name) for path in out.iterdir() if path.name.isdigit()]
    aside = out / str(max(numbers, default=0) + 1)
    aside.mkdir()
    for file in old:
        file.rename(aside / file.name)
    return aside


@contextmanager
def locked(out):
    """Inside it this process is the only one that trains in the folder `out`; else ValueError.

    The lock is on the folder itself and goes with the process, however that ends.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no such lock
        yield
        return
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is training in {out}: wait for it, or set another --out_dir"
            ) from None
        except OSError:
            pass  # a network drive without locks
        yield
    finally:
        os.close(folder)


# ---- what a result records --------------------------------------------------------------------


def environment(device, seed):
    """Where, when and with what a number was measured, as a dictionary for JSON.

    Paths in the command are cut to file names: a result does not show anybody's folders.
    """
    private = r"(=|^(?=[/~]|\.\.)).*/"  # of --key=PATH, and of a PATH of its own
    command = [Path(sys.argv[0]).name, *(re.sub(private, r"\1", x) for x in sys.argv[1:])]
    here, cpuinfo, versions = Path(__file__).parent, Path("/proc/cpuinfo"), {}
    name = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    for package in "torch numpy tiktoken triton snntorch spikingjelly norse".split():
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)

    def git(*arguments):
        with suppress(OSError):  # not installed
            done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True)
            return done.stdout.strip()

    return {
        "command": " ".join(["python", *command]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": name[1] if name else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": versions,
        "commit": git("rev-parse", "HEAD"),
        "uncommitted": git("status", "--porcelain", "--", "*.py"),
        "seed": seed,
    }


def write_result(path, result, c=None):
    """Write a result, a dictionary, as JSON, with the settings c: of their paths the last part."""
    if c:
        names = {key: Path(x).name for key, x in asdict(c).items() if key in PATHS.split()}
        result = result | {"config": asdict(c) | names}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write((json.dumps(result, indent=1) + "\n").encode())
    print(f"wrote {path}")
