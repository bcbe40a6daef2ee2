"""How fast does a model write? Ours, dense, a transformer, llama.cpp; and what memory allows.

python bench.py generate configs/sam_6m.py
python bench.py generate configs/snn_1b.py --rates=results/fw_snn_1m_head.json
"""

import json
import os
import statistics
from collections import deque
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch

import config
import lif as lif_module
from bench import OURS, seconds, show, size_of, summary, take_turns, transformer_like
from checkpoint import build, load_checkpoint
from model import SpikingLM
from train import TrainConfig

from .llama import Llama
from .train import operations


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

    Block snn writes by events, in float32 and with rows in bfloat16, and dense. Beside it write a
    transformer of its size and, on a CPU, llama.cpp if it is installed (a new text at each turn).
    `to_limit` compares with the time that memory takes to read the rows that fire. Then all read a
    prompt, and block snn writes 1, 4 and 16 texts at once.
    """
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    if ckpt:
        c = replace(c, **asdict(build(load_checkpoint(ckpt)).config))
    models, texts, streams, piece = {}, {}, {}, min(20, tokens)
    ways = generators_of(c, against)
    for name, (settings, half, events) in ways.items():
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
            model.prepare(torch.bfloat16 if half else torch.float32, c.compile)
        texts[name] = model.generate(torch.zeros(1, 1, dtype=torch.long, device=run.device))
        streams[name] = partial(draw, texts[name], piece, events)
    peers, skipped = {}, {}
    if c.block == "snn" and against and run.device.type == "cpu":
        peers, skipped = llamas(c, size_of(models[OURS]))
    streams |= {name: partial(peer, piece) for name, peer in peers.items()}
    speed = bandwidth(run.device) if c.block == "snn" else None
    early = summary(take_turns(streams, c.rounds, c.warmup, run.device), OURS)
    drawn = 2 * piece * (c.rounds + c.warmup)  # a turn runs twice
    end, early_mb = max(drawn, tokens), memory_mb()
    for name in models:
        for _ in range(max(0, tokens - drawn) // piece):
            streams[name]()
    late = summary(take_turns(streams, c.rounds, 0, run.device), OURS)
    late_mb, rows = memory_mb(), {}
    for name, model in (models | peers).items():
        row = rows[name] = {"ratio": late[name]["ratio"]} | sizes(model)
        row["early_ms_per_token"] = early[name]["median_ms"] / piece
        row["late_ms_per_token"] = late[name]["median_ms"] / piece
        if name in models and model.config.block == "snn" and model.config.spikes:
            row["triggered"] = triggered_share(model, list(islice(texts[name], 64)))
            share = row["triggered"] if ways[name][2] else 1  # of the weights, nearly all are rows
            row["to_limit"] = row["late_ms_per_token"] / (1e3 * share * row["gigabytes"] / speed)
    columns = {"early_ms_per_token": ".2f", "late_ms_per_token": ".2f", "ratio": ".2f"}
    columns |= {"triggered": ".1%", "to_limit": ".2f", "gigabytes": ".2f", "parameters": ",d"}
    show(f"early: the first {drawn} tokens; late: after {end}", rows, columns, skipped)
    print(f"memory of the process: {early_mb} MB early, {late_mb} MB late")
    what = f"ms per token, batch 1, {'trained' if ckpt else 'random'} weights"
    result = {"what": what, "late": end, "contestants": rows, "skipped": skipped}
    if c.block == "snn" and c.spikes:
        print(f"memory is read at {speed:.1f} GB/s; to_limit: times what reading the rows takes")
        result |= {"read_gb_per_s": speed, "many": many(models, c, run) if against else {}}
        result["operations"] = operations(OURS, streams[OURS])
    return result | {"early_mb": early_mb, "late_mb": late_mb}


def llamas(c, size):
    """({name: Llama of about `size` parameters}, {name: why it is skipped})."""
    peers, skipped = {}, {}
    for kind in ("Q4_0", "Q8_0"):
        try:
            peer = Llama(kind, size, c.n_hidden, c.vocab_size, torch.get_num_threads())
            peers[f"llama.cpp, {kind}"] = peer
        except (ImportError, ValueError) as error:
            skipped[f"llama.cpp, {kind}"] = str(error)
    return peers, skipped


def sizes(model):
    if isinstance(model, Llama):
        return {"parameters": model.parameters, "gigabytes": model.bytes / 1e9}
    gigabytes = sum(p.nbytes for p in model.parameters()) / 1e9
    return {"parameters": size_of(model), "gigabytes": gigabytes}


def bandwidth(device):
    """Gigabytes per second that a device reads from its memory, with all threads: best of five."""
    x = torch.ones(2**26, device=device)  # more than any cache holds
    return x.nbytes / 1e9 / min(seconds(x.sum, x.device) for _ in range(5))


@torch.no_grad()
def many(models, c, run, length=256):
    """Tokens per second of a prompt, and of several texts at once, by events and dense."""
    prompt = torch.randint(c.vocab_size, (1, length), device=run.device)
    contestants = {f"prompt, {name}": partial(model, prompt) for name, model in models.items()}
    counts, ours = dict.fromkeys(contestants, length), models["ours, float32"]
    dense = models["ours, float32, dense"]  # the same weights
    for B in (1, 4, 16):
        if ours.events is None or B > ours.events.texts:  # it would take the dense way itself
            break
        told = torch.randint(c.vocab_size, (B, 129))
        token, state = told[:, 128:], dense(told[:, :128])[1]  # membranes have filled
        for way, model in {"events": ours, "dense": dense}.items():
            tokens = iter(partial(model, token, state), None)
            contestants[f"{B} texts, {way}"] = partial(draw, tokens, 1, way == "events")
            counts[f"{B} texts, {way}"] = B
    turns = take_turns(contestants, min(3, c.rounds), 0, run.device)
    times = summary(turns, next(iter(contestants)))
    rows = {
        name: {"tokens_per_s": 1e3 * n / times[name]["median_ms"]} for name, n in counts.items()
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
    """The next n tokens of a stream, its synapses driven by events or dense. No state is kept, as
    none is when a text is written: the next token finds memory that was used before."""
    rate, lif_module.EVENT_RATE = lif_module.EVENT_RATE, lif_module.EVENT_RATE * events
    deque(islice(stream, n), maxlen=0)
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
