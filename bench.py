"""Measure this repository beside its peers: one sub-command per question.

    python bench.py train configs/sam_6m.py       training: ours, snnTorch, a transformer
    python bench.py generate configs/sam_6m.py    generation: ours and a transformer
    python bench.py generate configs/snn_1b.py --rates=results/tinystories_snn_6m_sparse.json
    python bench.py report                        writes RESULTS.md and assets/ from results/

The other questions are in experiments/, one file each:

    python bench.py scan                          one layer of neurons: ours and the peers'
    python bench.py params configs/sam_6m.py      parameters and operations per token
    python bench.py ablate configs/spikewhale_6m.py --dataset=my.txt   what each ingredient is worth
    python bench.py recall                        a name, hundreds of tokens later: who was it?
    python bench.py frames configs/neuronspark_6m.py --k_max=16   what skipped frames save
    python bench.py all --text=my.txt             everything, in the order of its worth on a GPU

All contestants of a comparison run in one process, taking turns round by round, so that a slow
moment of the machine hits all of them; the tables show medians and their ratio to ours. Peers that
are not installed are left out by name. A CUDA device is used where there is one. --save writes the
result, with machine, versions and git commit, to results/<sub-command>_<config>_<device>.json.
"""

import inspect
import json
import math
import os
import signal
import statistics
import sys
import time
from dataclasses import asdict, dataclass, make_dataclass, replace
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # Ctrl-C while torch is imported ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch

import config
import lif as lif_module
from checkpoint import build, environment, load_checkpoint, write_result
from model import SpikingLM
from machine import Run
from optim import make_optimizers
from train import TrainConfig, train_step


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


# ---- train: whole optimiser steps -------------------------------------------------------------


def random_tokens(c, length):
    """Tokens (rows, length), as many as a micro-batch holds."""
    if not 0 < length <= c.micro_tokens:
        raise ValueError(f"length must be 1 to micro_tokens, {c.micro_tokens}; got {length}")
    return torch.randint(c.vocab_size, (c.micro_tokens // length, length))


def train(
    c,
    run,
    *,
    length: int = 64,  # tokens of a sequence
    against: str = "configs/gpt_6m.py",  # the transformer to compare with; empty: one of our size
):
    """Tokens per second of whole training steps of one micro-batch, random tokens.

    A GPU also tells the most memory that a model takes, and the share of the card's operations
    that the model's own are (MFU: 6 per multiplication and token, spike-fed ones counted dense).
    There each model runs eager, compiled, and with checkpointing.
    """
    gpt = config.load(TrainConfig, [against]) if against else transformer_like(c)
    shape = {"micro_tokens": c.micro_tokens, "dtype": c.dtype, "vocab_size": c.vocab_size}
    models = {OURS: (SpikingLM, c), "transformer": (SpikingLM, replace(gpt, **shape))}
    if c.block == "sam" and c.residual == "gated" and c.rec_heads == 1:
        from experiments.peers import SnnTorchSam  # what is asked for by name alone

        models["snnTorch, step by step"] = (SnnTorchSam, c)
    runs, facts, skipped = {}, {}, {}
    x, y = random_tokens(c, length), random_tokens(c, length)
    on_gpu = run.device.type == "cuda"
    for name, (cls, settings) in models.items():
        torch.manual_seed(c.seed)
        before = torch.cuda.memory_allocated() if on_gpu else 0
        try:
            model = cls(settings).to(run.device)
        except ImportError as error:
            skipped[name] = str(error)
            continue
        optimizers = make_optimizers(settings, model, run.device)
        ways = {"": (model, False)}
        if on_gpu:
            ways |= {", checkpointing": (model, True)}
            ways |= {", compiled": (torch.compile(model), False)} if c.compile else {}
        for way, (called, checkpointing) in ways.items():
            step = partial(one_step, called, optimizers, x, y, settings, run, checkpointing)
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            try:
                step()
                step()
            except (torch.OutOfMemoryError, RuntimeError) as error:
                skipped[name + way] = " ".join(str(error).split())[:200]
                model.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
                continue
            runs[name + way], row = step, facts.setdefault(name + way, {})
            row["parameters"] = size_of(model)
            if on_gpu:
                row["peak_gb"] = (torch.cuda.max_memory_allocated() - before) / 1e9
                row["flops"] = 6 * multiplications(settings, length) * x.numel()
    if not runs:
        raise ValueError("; ".join(f"{name}: {why}" for name, why in skipped.items()))
    first = next(iter(runs))  # ours, if it fits the memory
    rows = summary(take_turns(runs, c.rounds, c.warmup, run.device), first)
    for name, row in rows.items():
        row |= facts[name] | {"tokens_per_s": x.numel() / row["median_ms"] * 1e3}
        if "flops" in row and (card := card_of(torch.cuda.get_device_name())):
            row["mfu"] = row["flops"] / row["median_ms"] * 1e3 / CARDS[card].flops
    columns = {"tokens_per_s": ",.0f", "ratio": ".2f", "parameters": ",d"}
    columns |= {"peak_gb": ".1f", "mfu": ".1%"} if on_gpu else {}
    show(f"{len(x)} sequences of {length} tokens", rows, columns, skipped)
    what = "forward, backward and optimiser step of one micro-batch; ratio of times to ours"
    return {"what": what, "contestants": rows, "skipped": skipped, "batch": list(x.shape)}


def one_step(model, optimizers, x, y, settings, run, checkpointing):
    """A training step, with or without checkpointing, whatever the model's settings say."""
    raw = getattr(model, "_orig_mod", model)  # without torch.compile around it
    raw.config = replace(settings, checkpointing=checkpointing)
    return train_step(model, optimizers, x, y, settings, run)


def multiplications(settings, length):
    """Per token of a sequence of this length, those fed by spikes counted dense."""
    with torch.device("meta"):
        report = SpikingLM(settings)(torch.zeros(1, length, dtype=torch.long))[2]
    return report.macs + sum(every for _, every in report.synapses)


class Card(NamedTuple):
    """What the vendors state."""

    flops: float  # dense bfloat16 operations per second
    memory: float  # bytes
    inside: float  # bytes per second to the next card of the same machine (NVLink; 4090: PCIe)
    between: float  # and of another machine (InfiniBand, one adapter per card)


CARDS = {
    "h200": Card(989e12, 141e9, 450e9, 50e9),
    "h100": Card(989e12, 80e9, 450e9, 50e9),
    "a100": Card(312e12, 80e9, 300e9, 25e9),
    "4090": Card(165e12, 24e9, 25e9, 6e9),
}


def card_of(name):
    """The key of CARDS that the name of a device holds, or None."""
    return next((card for card in CARDS if card in name.lower()), None)


def transformer_like(c):
    """A transformer of the width and at least the parameters of the model c describes."""
    heads = next(n for n in range(max(1, c.n_hidden // 64), 0, -1) if c.n_hidden % n == 0)
    gpt = replace(
        c, block="gpt", head="float", encoder="float", n_embd=c.n_hidden, n_head=heads,
        window=10**9, d_ff=4 * c.n_hidden, n_layer=1, traits="none", rate_penalty="both",
    )  # fmt: skip
    while parameters_of(gpt) < parameters_of(c):
        gpt = replace(gpt, n_layer=gpt.n_layer + 1)
    return gpt


# ---- generate: one token after the other ------------------------------------------------------


def generate(
    c,
    run,
    *,
    tokens: int = 2000,  # tokens from the first to the last measurement
    ckpt: str = "",  # take the weights and settings of this checkpoint; empty: random weights
    rates: str = "",  # random snn: fire as often as in this result of train.py
    against: str = "configs/gpt_6m.py",  # snn: one of its size; empty: ours alone
):
    """Milliseconds per token, early and late in one long text, batch 1; memory of the process.

    Block snn runs four times: events in float32 and with bfloat16 rows, dense, and beside a
    transformer of its own size.
    """
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    if ckpt:
        c = replace(c, **asdict(build(load_checkpoint(ckpt)).config))
    models, texts, streams, piece = {}, {}, {}, min(20, tokens)
    for name, (settings, half, events) in generators_of(c, against).items():
        is_trained = ckpt and settings is c  # not the transformer beside it
        torch.manual_seed(c.seed)
        model = build(load_checkpoint(ckpt)) if is_trained else SpikingLM(settings)
        models[name] = model.to(run.device).eval()
        if settings.block == "snn" and not is_trained:
            set_rates(model, trained_rates(rates))
        if half:
            model.halve_synapses()
        texts[name] = model.generate(torch.zeros(1, 1, dtype=torch.long, device=run.device))
        streams[name] = partial(draw, texts[name], piece, events)
    early = summary(take_turns(streams, c.rounds, c.warmup, run.device), OURS)
    drawn = 2 * piece * (c.rounds + c.warmup)  # a turn runs twice
    end, early_mb = max(drawn, tokens), memory_mb()
    for once in streams.values():
        for _ in range(max(0, tokens - drawn) // piece):
            once()
    late = summary(take_turns(streams, c.rounds, 0, run.device), OURS)
    late_mb, rows = memory_mb(), {}
    for name, model in models.items():
        row = rows[name] = {"parameters": size_of(model), "ratio": late[name]["ratio"]}
        row["early_ms_per_token"] = early[name]["median_ms"] / piece
        row["late_ms_per_token"] = late[name]["median_ms"] / piece
        if model.config.block == "snn" and model.config.spikes:
            row["triggered"] = triggered_share(model, list(islice(texts[name], 64)))
    columns = {"early_ms_per_token": ".2f", "late_ms_per_token": ".2f", "ratio": ".2f"}
    columns |= {"triggered": ".1%", "parameters": ",d"}
    show(f"early: the first {drawn} tokens; late: after {end}", rows, columns)
    print(f"memory of the process: {early_mb} MB early, {late_mb} MB late")
    what = f"ms per token, batch 1, {'trained' if ckpt else 'random'} weights"
    memory = {"early_mb": early_mb, "late_mb": late_mb}
    return {"what": what, "late": end, "contestants": rows} | memory


def generators_of(c, against):
    """name -> settings, whether matrices are bfloat16, whether synapses are driven by events."""
    ours = {OURS: (c, c.block == "snn", True)}
    if not against:
        return ours
    if c.block != "snn":
        gpt = config.load(TrainConfig, [against])
        unlimited = replace(gpt, window=10**9)
        others = {"transformer": gpt, "transformer, unlimited": unlimited}
        return ours | {name: (settings, False, True) for name, settings in others.items()}
    gpt = transformer_like(c)
    return ours | {
        "ours, float32": (c, False, True),
        "ours, float32, dense": (c, False, False),
        "transformer, float32": (gpt, False, True),
    }


@torch.no_grad()
def triggered_share(model, drawn):
    """The share of synaptic operations triggered by these tokens, as `generate` yielded them."""
    tokens, state = torch.cat([token for token, _ in drawn], 1), drawn[0][1]
    report = model(tokens, state)[2]
    triggered, every = map(sum, zip(*report.synapses))
    return float(triggered) / every


def memory_mb():
    """Megabytes of memory that this process takes now; None where there is no /proc."""
    path = Path("/proc/self/statm")
    pages = path.exists() and int(path.read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6) if pages else None


def draw(stream, n, events):
    """The next n tokens of a stream, its synapses driven by events or dense."""
    rate, lif_module.EVENT_RATE = lif_module.EVENT_RATE, lif_module.EVENT_RATE * events
    list(islice(stream, n))
    lif_module.EVENT_RATE = rate


def trained_rates(path):
    """Mean firing rates of a trained model of block snn: {population: spikes per token}."""
    if not path:
        raise ValueError("name the result of a trained block snn: --rates=results/FILE.json")
    try:
        result = json.loads(Path(path).read_text())
        was, rates = result["config"], result["log"][-1]["rate"]
    except (ValueError, KeyError, IndexError, TypeError):
        raise ValueError(f"{path} is not the result of a run of train.py") from None
    sites = [*"aqkoh" * was["n_layer"], *["head"] * (was.get("head") == "spikes")]
    if was["block"] != "snn" or len(rates) != len(sites):
        raise ValueError(f"{path} is not the result of a spiking model of block snn")
    return {
        site: statistics.mean(rate for rate, name in zip(rates, sites) if name == site)
        for site in sites
    }


@torch.no_grad()
def set_rates(model, rates):
    """Give random neurons the gain at which they fire so often.

    Small steps, because at low rates the rate is very sensitive to the gain. Each step continues
    the same text, because membranes need about 100 tokens to fill.
    """
    sites = [site for block in model.blocks for site in block.populations.items()]
    sites += [("head", model.head)] if model.head is not None else []
    if lacking := {name for name, _ in sites} - set(rates):
        raise ValueError(f"the model of --rates has no neurons called {', '.join(sorted(lacking))}")
    state = None
    for _ in range(20):
        tokens = torch.randint(model.config.vocab_size, (4, 64), device=model.rate.device)
        _, state, report = model(tokens, state)
        for (name, population), rate in zip(sites, report.rates):
            population.gain *= (rates[name] / rate.mean()).clamp(0.1, 10) ** 0.25


# ---- command line -----------------------------------------------------------------------------

COMMANDS = {"train": train, "generate": generate}
EXPERIMENTS = (
    "scan params ablate recall frames all".split()
)  # experiments/NAME.py, its function NAME


def command_of(name):
    """The function of a sub-command. Experiments import bench.py, hence are imported here."""
    if name in EXPERIMENTS:
        return getattr(import_module(f"experiments.{name}"), name)
    if name not in COMMANDS:
        names = "|".join([*COMMANDS, "report", *EXPERIMENTS])
        raise ValueError(f"write python bench.py {names} [CONFIG.py] [--key=value ...]")
    return COMMANDS[name]


def settings_of(command, argv):
    """All settings of a command, read from argv: its keyword arguments, those of BenchConfig and,
    if its first parameter is `c`, of train.py, from a CONFIG file or the command's own `preset`.
    """
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
