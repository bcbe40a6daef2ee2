"""Checkpoints: one file that holds weights, settings, tokenizer and where training stood.

A checkpoint is read with weights_only=True, always, and checked against what it is put into before
anything is touched. Files are written under another name first: there is never half a checkpoint.
"""

import itertools
import json
import os
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

from model import ModelConfig, SpikingLM

VERSION = 2  # of checkpoints; raise it when the code can no longer use older ones


def load_checkpoint(path):
    """The dictionary that train.py saved; ValueError with one line where it can not be read.

    weights_only: a checkpoint is tensors and plain values, and can not run code.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load reads changed bytes without a word
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} was changed")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"there is no checkpoint {path}; train.py writes one") from None
    except Exception as error:  # damaged in any of many ways
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot read the checkpoint {path}: {reason}") from None
    kinds = {"version": int, "model": dict, "config": dict, "tokenizer": str}
    for name, kind in kinds.items():
        if type(checkpoint) is not dict or not isinstance(checkpoint.get(name), kind):
            raise ValueError(f"{path} is no checkpoint of train.py: it has no {name}")
    if checkpoint["version"] != VERSION:
        version = checkpoint["version"]
        raise ValueError(f"{path} is of version {version}, this code reads only {VERSION}")
    # a setting younger than the checkpoint was off when it was written, as it is by default
    checkpoint["config"] = asdict(ModelConfig()) | checkpoint["config"]
    return checkpoint


def shape_of(checkpoint):
    """The settings of a checkpoint's model, for a run that begins with its weights."""
    free = ("backend", "checkpointing")  # these change no result
    names = [f.name for f in fields(ModelConfig) if f.name not in free]
    return {name: checkpoint["config"][name] for name in names}


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
    saved, settings = checkpoint["model"], {}
    for f in fields(ModelConfig):
        settings[f.name] = checkpoint["config"].get(f.name)
        if type(settings[f.name]) is not f.type:
            raise ValueError(f"the checkpoint's setting {f.name} is missing or of a wrong type")
    c = ModelConfig(**settings | {"backend": "auto"})
    try:
        with torch.device("meta"):
            outline = SpikingLM(c)
    except RuntimeError as error:  # such sizes no tensor can have
        raise ValueError(f"the checkpoint's settings make no model: {error}") from None
    check_weights(saved, outline)
    model = SpikingLM(c)
    model.load_state_dict(saved)
    return model.eval()


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


def save(out, is_best, raw, optimizers, c, corpus, position, record, run):
    """Write step_*.pt and, if it is the best, best.pt; remove all step_*.pt but the one before.

    All ranks must call this. best.pt is written first, so that a kill between the two writes only
    repeats the step.
    """
    for optimizer in optimizers:
        if c.shard and run.world > 1:
            optimizer.consolidate_state_dict(to=0)  # the shares of all
    checkpoint = {
        "version": VERSION,
        "model": raw.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers if run.main],
        "random": run.of_all([g.get_rng_state() for g in run.generators]),
        "config": asdict(c),
        "tokenizer": corpus.tokenizer.state(),
        "dataset": corpus.dataset,  # what `auto` meant
        "data": corpus.sha256,
        "position": asdict(position),
        "environment": record,  # commit and versions among others
    }
    if run.main:
        path = out / f"step_{position.step:08d}.pt"
        for name in ["best.pt"] * is_best + [path.name]:
            with whole_file(out / name) as file:
                torch.save(checkpoint, file)
        before = sorted(old for old in out.glob("step_*.pt") if old < path)[-1:]
        for old in {*out.glob("step_*"), *out.glob("*.tmp")} - {path, *before}:
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


def restore(checkpoint, raw, optimizers, position, c, corpus, run):
    """Put a checkpoint back; return its position, of the kind of `position`, a fresh run's.

    ValueError, before anything is touched, if it is another run's or not as `save` writes it.
    """
    try:
        check_run(checkpoint, c)
        check_position(checkpoint["position"], asdict(position))
        check_weights(checkpoint["model"], raw)
        check_optimizers(checkpoint["optimizers"], optimizers)
        if checkpoint["data"] != corpus.sha256:
            run.say(f"{corpus.name} has changed since the checkpoint: going on with what it is now")
        if len(checkpoint["random"]) == run.world:
            for generator, state in zip(run.generators, checkpoint["random"][run.rank]):
                generator.set_rng_state(state)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"the checkpoint is damaged ({error!r}): start from scratch") from None
    raw.load_state_dict(checkpoint["model"])
    for optimizer, saved in zip(optimizers, checkpoint["optimizers"]):
        number, groups = itertools.count(), []  # with this run's rates, which may be new
        for group in optimizer.param_groups:
            groups.append(group | {"params": [next(number) for _ in group["params"]]})
        optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    return replace(position, **checkpoint["position"])


def check_run(checkpoint, c):
    """ValueError unless the checkpoint is of a run with these settings."""
    old, new = checkpoint["config"], asdict(c)
    for name in [*shape_of(checkpoint), "optimizer", "tokenizer", "phases"]:
        if old[name] != new[name]:
            raise ValueError(
                f"the checkpoint was trained with {name}={old[name]!r}, not {new[name]!r}: "
                "resume with the same config, or start from scratch"
            )


def check_position(saved, fresh):
    """ValueError unless `saved` has the keys and kinds of values of `fresh`, a new run's."""
    if {key: type(value) for key, value in saved.items()} != {
        key: type(value) for key, value in fresh.items()
    } or not (
        saved["phase"] < len(saved["curriculum"])
        and min(saved[key] for key in ("step", "phase", "phase_step", "tokens", "threads")) >= 0
        and {type(value) for value in saved["history"] + saved["losses"]} <= {float}
        and all(type(phase) is str and length > 0 for phase, length in saved["curriculum"])
    ):
        raise ValueError("the checkpoint's position is damaged: start from scratch")


def check_optimizers(saved, optimizers):
    """ValueError unless the saved states are these optimisers': names and shapes of tensors."""
    names = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "Muon": {"momentum_buffer"}}
    is_good = len(saved) == len(optimizers)
    for state, optimizer in zip(saved, optimizers):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        numbers = [i for group in state["param_groups"] for i in group["params"]]
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        is_good &= numbers == list(range(len(params)))
        is_good &= [len(group["params"]) for group in state["param_groups"]] == sizes
        kind = type(getattr(optimizer, "optim", optimizer))  # of each share, if it is sharded
        for i, tensors in state["state"].items():
            is_good &= set(tensors) == names[kind.__name__] and all(
                t.shape in ((), params[i].shape) and t.dtype == params[i].dtype
                for t in tensors.values()
            )
    if not is_good:
        raise ValueError("the checkpoint's optimisers do not fit its model: start from scratch")


def rewind_log(out, step):
    """Cut from log.jsonl what came after the checkpoint, for it comes again, and half a line."""
    kept, log = [], out / "log.jsonl"
    for line in log.read_bytes().splitlines() if log.exists() else []:
        with suppress(ValueError, KeyError, TypeError):
            kept += [line] * (json.loads(line)["step"] <= step)
    with whole_file(log) as file:
        file.write(b"".join(line + b"\n" for line in kept))


def set_aside(out):
    """Move the run that `out` may hold to a folder of its own, out/1, out/2, ...: nothing is lost.

    Returns that folder, or None if there is no run.
    """
    old = [*out.glob("*.pt"), *out.glob("log.jsonl")]
    if not old:
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
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise ValueError(
            f"another process is training in {out}: wait for it, or set another --out_dir"
        ) from None
    except OSError:
        pass  # a network drive without locks
    try:
        yield
    finally:
        os.close(folder)
