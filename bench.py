"""Measure this repository beside its peers: one sub-command per question, each a file in
experiments/.

    python bench.py generate configs/sam_6m.py    generation: ours and a transformer
    python bench.py generate configs/snn_1b.py --rates=results/fw_snn_1m_head.json
    python bench.py train configs/sam_6m.py       training: ours, snnTorch, a transformer
    python bench.py scan                          one layer of neurons: ours and the peers'
    python bench.py params configs/sam_6m.py      parameters and operations per token
    python bench.py ablate configs/spikewhale_6m.py --dataset=my.txt   what each ingredient is worth
    python bench.py recall                        a name, hundreds of tokens later: who was it?
    python bench.py frames configs/neuronspark_6m.py --k_max=16   what skipped frames save
    python bench.py all --text=my.txt             everything, in the order of its worth on a GPU
    python bench.py report                        writes RESULTS.md and assets/ from results/

All contestants of a comparison run in one process, taking turns round by round, so that a slow
moment of the machine hits all of them; the tables show medians and their ratio to ours. Peers that
are not installed are left out by name. A CUDA device is used where there is one. --save writes the
result, with machine, versions and git commit, to results/<sub-command>_<config>_<device>.json.
"""

import inspect
import math
import signal
import statistics
import sys
import time
from dataclasses import dataclass, make_dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C while torch is imported ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch

import config
from checkpoint import environment, write_result
from machine import Run
from model import SpikingLM
from train import TrainConfig


@dataclass(frozen=True)
class BenchConfig:
    # measuring
    rounds: int = 9  # timed rounds per contestant
    warmup: int = 2  # untimed rounds before them
    device: str = "auto"  # auto | cpu | cuda | mps
    threads: int = 2  # CPU threads of PyTorch
    seed: int = 1337  # of weights and inputs
    save: bool = False  # write the result to a file in results/
    dtype = "auto"  # no setting: a command without CONFIG measures in float32

    RANGE = {"rounds": (1, math.inf), "seed": (0, math.inf)}
    RANGE |= {"warmup": (0, math.inf), "threads": (0, 1024)}

    def __post_init__(self):
        config.check(self)
        if isinstance(self, TrainConfig):
            super().__post_init__()


OURS = "ours"  # the contestant that all are compared with

# ---- taking turns -----------------------------------------------------------------------------


def seconds(run, device):
    """Wall-clock seconds of one run(), the GPU's work included."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def take_turns(contestants, rounds, warmup, device):
    """contestants: name -> run(); returns name -> list of `rounds` seconds.

    Every round begins with another contestant than the round before. A turn is a run that is not
    timed and one that is: the first brings back the memory and caches that the others took.
    """
    names = list(contestants)
    times = {name: [] for name in names}
    for i in range(warmup + rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            contestants[name]()
            took = seconds(contestants[name], device)
            if i >= warmup:
                times[name].append(took)
    return times


def summary(times, ours):
    """name -> list of seconds; returns name -> milliseconds and the ratio of medians to ours."""
    reference = statistics.median(times[ours])
    return {
        name: {
            "median_ms": 1e3 * statistics.median(t),
            "min_ms": 1e3 * min(t),
            "max_ms": 1e3 * max(t),
            "ratio": statistics.median(t) / reference,
        }
        for name, t in times.items()
    }


def show(title, rows, formats, skipped={}):
    """Print a table: a line per row, a column per key of formats; who was left out, and why."""
    print(f"\n{title}\n{'':28s}" + "".join(f"{key:>20s}" for key in formats))
    for name, row in rows.items():
        cells = [format(row[key], form) if key in row else "" for key, form in formats.items()]
        print(f"{name:28s}" + "".join(f"{cell:>20s}" for cell in cells))
    for name, why in skipped.items():
        print(f"{name:28s} skipped: {why}")


def size_of(model):
    return sum(p.numel() for p in model.parameters())


def parameters_of(settings):
    with torch.device("meta"):
        return size_of(SpikingLM(settings))


def transformer_like(c):
    """A transformer of the width and at least the parameters of the model c describes."""
    heads = next(n for n in range(max(1, c.n_hidden // 64), 0, -1) if c.n_hidden % n == 0)
    gpt = replace(
        c, block="gpt", head="float", encoder="float", n_embd=c.n_hidden, n_head=heads,
        window=10**9, d_ff=4 * c.n_hidden, n_layer=1, traits="none", rate_penalty="both",
        homeostasis=0.0,
    )  # fmt: skip
    while parameters_of(gpt) < parameters_of(c):
        gpt = replace(gpt, n_layer=gpt.n_layer + 1)
    return gpt


# ---- command line -----------------------------------------------------------------------------

# experiments/NAME.py, its function NAME
EXPERIMENTS = "generate train scan params ablate recall frames all".split()


def command_of(name):
    """The function of a sub-command. Experiments import bench.py, hence are imported here."""
    if name not in EXPERIMENTS:
        names = "|".join([*EXPERIMENTS, "report"])
        raise ValueError(f"write python bench.py {names} [CONFIG.py] [--key=value ...]")
    return getattr(import_module(f"experiments.{name}"), name)


def settings_of(command, argv):
    """All settings of a command, read from argv: its keyword arguments, those of BenchConfig and,
    if its first parameter is `c`, of train.py, from a CONFIG file or the command's own `preset`."""
    first, *more = inspect.signature(command).parameters.values()
    own = [(p.name, p.annotation, p.default) for p in more if p.kind is p.KEYWORD_ONLY]
    bases = (BenchConfig, TrainConfig) if first.name == "c" else (BenchConfig,)
    cls = make_dataclass(command.__name__, own, bases=bases, frozen=True)
    cls.__wrapped__ = command  # --help reads the comments in its source
    preset = getattr(command, "preset", ())
    files, _ = config.split(cls, [word for word in argv if word not in ("-h", "--help")])
    if files and (preset or first.name != "c"):
        raise ValueError(f"{command.__name__} takes no CONFIG: leave out {files[0]}")
    return config.load(cls, [*preset, *argv])


def main(argv):
    with config.one_line():
        name, *argv = argv or [""]
        if name in ("-h", "--help"):
            return print(__doc__)
        if name == "report":  # measures nothing
            if argv:
                raise ValueError(f"report has no settings: leave out {argv[0]}")
            return import_module("experiments.report").write()
        command = command_of(name)
        c = settings_of(command, argv)
        own = {key: getattr(c, key) for key in command.__kwdefaults__ or ()}
        run, (files, _) = Run(c), config.split(type(c), argv)
        asked = [] if c.dtype == "auto" else [c.dtype]
        file = "_".join([name, *(Path(f).stem for f in files), run.device.type, *asked])
        path = c.save and config.writable(f"results/{file}.json")
        result = environment(run.device, c.seed) | command(c, run, **own)
        if path:
            write_result(path, result, c)


if __name__ == "__main__":
    main(sys.argv[1:])  # experiments import this file again, as `bench`, and only functions of it
