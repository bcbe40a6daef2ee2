"""Measure this repository beside its peers: one sub-command per question.

    python bench.py generate configs/sam_6m.py    generation: ours and a transformer
    python bench.py generate configs/snn_1b.py --rates=results/tinystories_snn_6m_sparse.json
    python bench.py report                        writes RESULTS.md and assets/ from results/

The other questions are in experiments/, one file each:

    python bench.py train configs/sam_6m.py       training: ours, snnTorch, a transformer
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

if __name__ == "__main__":  # Ctrl-C while torch is imported ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch

import config
import lif as lif_module
from checkpoint import build, environment, load_checkpoint, write_result
from model import SpikingLM
from machine import Run
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
    transformer of its own size; on a CPU also beside llama.cpp, if it is installed, and beside the
    time that memory takes to read the rows that fire. It also reads a prompt, and writes several texts.
    """
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    if ckpt:
        c = replace(c, **asdict(build(load_checkpoint(ckpt)).config))
    models, texts, streams, skipped, piece = {}, {}, {}, {}, min(20, tokens)
    for name, (settings, half, events) in generators_of(c, against).items():
        is_trained = ckpt and settings is c  # not the transformer beside it
        torch.manual_seed(c.seed)
        model = build(load_checkpoint(ckpt)) if is_trained else SpikingLM(settings)
        models[name] = model.to(run.device).eval()
        if settings.block == "snn" and not is_trained:
            if name == OURS:
                set_rates(model, trained_rates(rates))
            gains = {k: x for k, x in models[OURS].state_dict().items() if k.endswith("gain")}
            model.load_state_dict(gains, strict=False)
        if settings.block == "snn" and events:
            model.prepare(torch.bfloat16 if half else torch.float32)
        texts[name] = model.generate(torch.zeros(1, 1, dtype=torch.long, device=run.device))
        streams[name] = partial(draw, texts[name], piece, events)
    peers = {}
    if c.block == "snn" and against and run.device.type == "cpu":
        for kind in ("Q4_0", "Q8_0"):
            try:
                from experiments.llama import Llama

                peer = Llama(kind, size_of(models[OURS]), c.n_hidden, c.vocab_size, c.threads)
            except ImportError as error:
                skipped[f"llama.cpp, {kind}"] = str(error)
                continue
            peers[f"llama.cpp, {kind}"], streams[f"llama.cpp, {kind}"] = peer, partial(peer, piece)
    speed = bandwidth() if c.block == "snn" else None
    early = summary(take_turns(streams, c.rounds, c.warmup, run.device), OURS)
    drawn = 2 * piece * (c.rounds + c.warmup)  # a turn runs twice
    end, early_mb = max(drawn, tokens), memory_mb()
    for once in streams.values():
        for _ in range(max(0, tokens - drawn) // piece):
            once()
    late = summary(take_turns(streams, c.rounds, 0, run.device), OURS)
    late_mb, rows = memory_mb(), {}
    for name, model in (models | peers).items():
        of_peer = (
            {}
            if name in models
            else {"parameters": model.parameters, "gigabytes": model.bytes / 1e9}
        )
        row = rows[name] = {"ratio": late[name]["ratio"]} | (of_peer or sizes(model))
        row["early_ms_per_token"] = early[name]["median_ms"] / piece
        row["late_ms_per_token"] = late[name]["median_ms"] / piece
        if name in models and model.config.block == "snn" and model.config.spikes:
            row["triggered"] = triggered_share(model, list(islice(texts[name], 64)))
            of_rows = row["triggered"] * row["gigabytes"]  # nearly all of them are such rows
            row["to_limit"] = row["late_ms_per_token"] / (1e3 * of_rows / speed)
    columns = {"early_ms_per_token": ".2f", "late_ms_per_token": ".2f", "ratio": ".2f"}
    columns |= {"triggered": ".1%", "to_limit": ".2f", "gigabytes": ".2f", "parameters": ",d"}
    show(f"early: the first {drawn} tokens; late: after {end}", rows, columns, skipped)
    print(f"memory of the process: {early_mb} MB early, {late_mb} MB late")
    what = f"ms per token, batch 1, {'trained' if ckpt else 'random'} weights"
    result = {"what": what, "late": end, "contestants": rows, "skipped": skipped}
    if c.block == "snn" and c.spikes and against:
        result |= {"read_gb_per_s": speed, "many": many(models, c, run)}
        print(f"memory is read at {speed:.1f} GB/s; the limit is the time of the rows that fire")
    return result | {"early_mb": early_mb, "late_mb": late_mb}


def sizes(model):
    gigabytes = sum(p.nbytes for p in model.parameters()) / 1e9
    return {"parameters": size_of(model), "gigabytes": gigabytes}


def bandwidth():
    """Gigabytes per second that all threads together read from memory: the best of five."""
    x = torch.ones(2**26)  # more than any cache holds
    return x.nbytes / 1e9 / min(seconds(x.sum, x.device) for _ in range(5))


@torch.no_grad()
def many(models, c, run, length=512):
    """Tokens per second: of a prompt, and of several texts at once by events and dense, in turns."""
    prompt = torch.randint(c.vocab_size, (1, length), device=run.device)
    contestants = {f"prompt, {name}": partial(model, prompt) for name, model in models.items()}
    counts, ours = dict.fromkeys(contestants, length), models[OURS]
    for B in (1, 4, 16) if ours.ready else ():
        token, state = torch.zeros(B, 1, dtype=torch.long), ours(prompt[:, :1].expand(B, -1))[1]
        for name, model in {"events": ours, "dense": models.get("ours, float32, dense")}.items():
            key = f"{B} texts, {name}"
            contestants[key], counts[key] = partial(model, token, state), B
            if name == "events":
                assert B <= ours.texts, "which way is faster is chosen by itself"
    times = summary(
        take_turns(contestants, min(3, c.rounds), 0, run.device), next(iter(contestants))
    )
    rows = {
        name: {"tokens_per_s": counts[name] / row["median_ms"] * 1e3} for name, row in times.items()
    }
    show("tokens per second", rows, {"tokens_per_s": ",.1f"})
    return rows


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

COMMANDS = {"generate": generate}
# experiments/NAME.py, its function NAME
EXPERIMENTS = "train scan params ablate recall frames all".split()


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
