"""Measure this repository beside its peers: one sub-command per question, one JSON file each.

    python bench.py scan                          one layer of neurons: ours and the peers'
    python bench.py train configs/sam_6m.py       training: ours, snnTorch, a transformer
    python bench.py generate configs/sam_6m.py    generation: ours and a transformer
    python bench.py generate configs/snn_1b.py --rates=results/tinystories_snn_6m_sparse.json
    python bench.py params configs/sam_6m.py      parameters and operations per token
    python bench.py frames configs/neuronspark_6m.py --k_max=16   what skipped frames save
    python bench.py cell                          the virtual cell beside its baselines
    python bench.py tokens --dataset=my.txt       bytes per token: length-max beside BPE
    python bench.py ablate configs/spikewhale_6m.py --dataset=my.txt   what each ingredient is worth
    python bench.py recall                        a name, hundreds of tokens later: who was it?
    python bench.py resume                        training killed at random moments and resumed
    python bench.py report                        writes RESULTS.md and assets/ from results/

All contestants of a comparison run in one process, taking turns round by round, so that a slow
moment of the machine hits all of them; the tables show medians and their ratio to ours. Peers that
are not installed are left out by name. A CUDA device is used where there is one.
--save writes the result to results/<sub-command>_<config>_<device>.json, with machine, versions
and git commit.

Importing train.py is on purpose: what is timed is the training step itself, not a copy of it.
"""

import bisect
import itertools
import json
import math
import multiprocessing
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn as nn

import cell_bridge
import config
import data
import lif as lif_module
import train as trainer
from checkpoint import build, load_checkpoint
from kernels import lif
from lif import lif_torch
from model import SpikingLM
from report import write as write_report
from tokenizer import DataError
from train import Run, TrainConfig, environment, make_optimizers, train_step, write_result


@dataclass(frozen=True)
class BenchConfig(TrainConfig):
    # measuring
    rounds: int = 9  # timed rounds per contestant
    warmup: int = 2  # untimed rounds before them
    shapes: str = ""  # scan: BxTxN,BxTxN,... to time; empty: the default shapes
    length: int = 64  # train, frames: tokens of a sequence
    against: str = "configs/gpt_6m.py"  # train, generate: the transformer to compare with
    tokens: int = 2000  # generate: tokens from the first to the last measurement
    long: int = 0  # generate: also time one text of this many tokens (Linux); 0: no
    threads: int = 2  # CPU threads of PyTorch
    ckpt: str = ""  # generate: take the weights of this checkpoint; empty: random weights
    rates: str = ""  # generate, random snn: fire as often as in this result of train.py
    gpus: int = 0  # params: plan a run of train.py on this many GPUs; 0: no plan
    gpu_flops: float = 4e14  # params: operations per second that a GPU reaches in bfloat16
    gpu_link: float = 1e11  # params: bytes per second at which a GPU exchanges gradients
    variants: str = ""  # ablate, recall: only variants whose name contains one of these words
    seeds: int = 2  # ablate, recall: runs per variant
    trials: int = 50  # resume: how many runs are killed
    save: bool = False  # write the result to a file in results/

    def scan_shapes(self):
        """[(B, T, N)] from the shapes setting, [] if it is empty."""
        try:
            texts = self.shapes.split(",") if self.shapes else []
            shapes = [tuple(map(int, text.split("x"))) for text in texts]
            assert all(len(shape) == 3 and min(shape) > 0 for shape in shapes)
        except (ValueError, AssertionError):
            raise ValueError(f"shapes must be BxTxN,BxTxN,..., got {self.shapes!r}") from None
        return shapes

    def __post_init__(self):
        super().__post_init__()
        self.scan_shapes()
        if self.rounds < 1 or self.warmup < 0 or not 0 < self.length <= self.micro_tokens:
            raise ValueError("rounds >= 1, warmup >= 0 and 0 < length <= micro_tokens must hold")
        positive = self.gpu_flops, self.gpu_link, self.seeds, self.tokens, self.trials
        if self.gpus < 0 or min(positive) <= 0:
            raise ValueError("gpus >= 0; gpu_flops, gpu_link, seeds, tokens, trials > 0 must hold")
        if self.long and self.long < EARLY:
            raise ValueError(f"long must be 0 or at least {EARLY}, got {self.long}")


# ---- taking turns -----------------------------------------------------------------------------


def seconds(run, device):
    """Wall-clock seconds of one run(), the GPU's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
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


# ---- scan: one layer without recurrent synapses, forward + backward ---------------------------
#
# Every contestant gets the same currents, the same decay and the same random cotangent on its
# spikes, and returns the gradients of current and decay. All of them learn the decay: one value per
# neuron, in SpikingJelly one per layer, that being all it knows. Each gets the currents in the
# layout that it likes, contiguous: (B,T,N) ours, (T,B,N) the peers. Only the spikes enter the loss.
# Surrogate: atan of slope 2; Norse has none and runs with its SuperSpike.
# A builder takes (N, device) and returns forward(x) -> spikes, and the leaf that is the decay.

SHAPES = [(32, 64, 512), (16, 256, 512), (4, 1024, 1024)]  # (B, T, N)
SHAPES_GPU = SHAPES + [(16, 1024, 2048)]
BETA, THETA, SLOPE = 0.875, 1.0, 2.0
OURS = "ours"
FIXED = "all frames, always"


class PlainSpike(torch.autograd.Function):
    """1 if u >= 0 else 0, with the atan surrogate as its derivative."""

    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return (u >= 0).to(u.dtype)

    @staticmethod
    def backward(ctx, d_s):
        (u,) = ctx.saved_tensors
        return d_s * (SLOPE / 2) / (1 + (math.pi / 2 * SLOPE * u) ** 2)


def _ours(scan, N, device):
    beta = torch.full((N,), BETA, device=device, requires_grad=True)
    theta = torch.full((N,), THETA, device=device)
    options = dict(surrogate="atan", slope=SLOPE, return_membrane=False)
    return lambda x: scan(x, beta, theta, **options)[0], beta


def _plain(N, device):
    beta = torch.full((N,), BETA, device=device, requires_grad=True)

    def forward(x):
        v, spikes = torch.zeros_like(x[0]), []
        for I_t in x.unbind(0):
            pre = beta * v + I_t  # charge
            s = PlainSpike.apply(pre - THETA)  # fire
            v = pre - THETA * s  # reset
            spikes.append(s)
        return torch.stack(spikes)

    return forward, beta


def _snntorch(unbind, N, device):
    import snntorch
    from snntorch import surrogate

    beta = torch.full((N,), BETA, device=device)
    node = snntorch.Leaky(beta, learn_beta=True, spike_grad=surrogate.atan(SLOPE)).to(device)

    def forward(x):
        mem, spikes = torch.zeros_like(x[0]), []
        steps = x.unbind(0) if unbind else (x[t] for t in range(len(x)))
        for I_t in steps:
            s, mem = node(I_t, mem)
            spikes.append(s)
        return torch.stack(spikes)

    return forward, node.beta


def _spikingjelly(N, device):
    from spikingjelly.activation_based import neuron, surrogate

    node = neuron.ParametricLIFNode(
        init_tau=1 / (1 - BETA), decay_input=False, v_threshold=THETA, v_reset=None,
        surrogate_function=surrogate.ATan(SLOPE), step_mode="m",
    ).to(device)  # fmt: skip

    def forward(x):
        node.reset()
        return node(x)

    return forward, node.w


def _norse(N, device):
    import norse.torch as norse
    from norse.torch.functional.reset import reset_subtract

    tau_mem_inv = torch.full((N,), 1 - BETA, device=device, requires_grad=True)
    zero, theta = (torch.tensor(value, device=device) for value in (0.0, THETA))
    cell = norse.LIFBoxCell(
        norse.LIFBoxParameters(tau_mem_inv, zero, theta, zero, "super", 1.0, reset_subtract), dt=1.0
    )

    def forward(x):
        state, spikes = norse.LIFBoxFeedForwardState(v=torch.zeros_like(x[0])), []
        for I_t in x.unbind(0):
            s, state = cell(I_t, state)
            spikes.append(s)
        return torch.stack(spikes)

    return forward, tau_mem_inv


class Contestant(NamedTuple):
    build: Callable
    time_major: bool = True
    scale: float = 1.0  # what its neuron multiplies the current with; it is fed current / scale
    delayed_reset: bool = False  # the reset comes one step after the spike

    def lay_out(self, x):
        """(B,T,N) to its own layout, or back."""
        return (x.transpose(0, 1) if self.time_major else x).contiguous()


CONTESTANTS = {
    OURS: Contestant(partial(_ours, lif), time_major=False),
    "ours, plain torch": Contestant(partial(_ours, lif_torch), time_major=False),
    "snnTorch, x[t]": Contestant(partial(_snntorch, False), delayed_reset=True),
    "snnTorch, unbind": Contestant(partial(_snntorch, True), delayed_reset=True),
    "SpikingJelly, multi-step": Contestant(_spikingjelly),
    "Norse, unbind": Contestant(_norse, scale=1 - BETA),
    "plain autograd, unbind": Contestant(_plain),
}


def expected_spikes(current, delayed_reset):
    """lif_torch's spikes (B,T,N). A delayed reset is a synapse of -theta from each to itself."""
    B, T, N = current.shape
    beta, theta = (current.new_full((N,), value) for value in (BETA, THETA))
    if delayed_reset:
        return lif_torch(current, beta, theta, -theta.view(N, 1, 1), reset="none")[0]
    return lif_torch(current, beta, theta)[0]


def wrong_spikes(contestant, forward, current, steps=64):
    """The share of spikes in the first steps that differ from lif_torch's; current (B,T,N).

    Not always 0: who adds in another order rounds otherwise, and now and then a membrane lies
    that close to its threshold. tests/test_peers.py asks for equality, away from the threshold.
    """
    current = current[:, :steps]
    with torch.no_grad():
        spikes = contestant.lay_out(forward(contestant.lay_out(current / contestant.scale)))
        expected = expected_spikes(current, contestant.delayed_reset)
    return (spikes != expected).double().mean().item(), expected.mean().item()


def scan_one(shape, device, seed, rounds, warmup):
    """All contestants at one shape (B,T,N): dict for JSON."""
    torch.manual_seed(seed)
    B, T, N = shape
    current = (torch.randn(shape) * 0.5 + 0.15).to(device)  # fires in about a fifth of the steps
    d_spikes = torch.randn(shape).to(device)
    runs, wrong, rates, skipped = {}, {}, {}, {}
    for name, contestant in CONTESTANTS.items():
        if name == "ours, plain torch" and device.type != "cuda":
            continue  # elsewhere it is what `lif` picks
        try:
            forward, decay = contestant.build(N, device)
        except ImportError as error:
            skipped[name] = str(error)
            continue
        wrong[name], rates[name] = wrong_spikes(contestant, forward, current)
        assert wrong[name] < 1e-3, f"{name}: {wrong[name]:.2%} of the spikes are not ours"
        assert 0.05 < rates[name] < 0.95, f"{name}: a firing rate of {rates[name]:.1%} is no test"
        x = contestant.lay_out(current / contestant.scale).requires_grad_()
        cotangent = contestant.lay_out(d_spikes)
        runs[name] = partial(forward_backward, forward, x, decay, cotangent)
    if device.type == "cuda":
        target = torch.empty_like(current)
        runs["copy"] = lambda: target.copy_(current)
    rows = summary(take_turns(runs, rounds, warmup, device), OURS)
    copy = rows.pop("copy", None)  # reads and writes every element once
    moved = 2 * current.numel() * current.element_size()
    for name, row in rows.items():
        row["wrong_spikes"], row["firing_rate"] = wrong[name], rates[name]
    return {
        "shape": list(shape),
        "contestants": rows,
        "skipped": skipped,
        "copy_bytes_per_s": copy and moved / (copy["median_ms"] / 1e3),
    }


def forward_backward(forward, x, decay, cotangent):
    torch.autograd.grad(forward(x), (x, decay), cotangent)


def scan(c, run):
    """Time every contestant at every shape; print a table."""
    shapes = c.scan_shapes() or (SHAPES_GPU if run.device.type == "cuda" else SHAPES)
    results = []
    for shape in shapes:
        one = scan_one(shape, run.device, c.seed, c.rounds, c.warmup)
        results.append(one)
        print(f"\n(B, T, N) = {shape}, {run.device}   median ms   min   max   ratio   wrong spikes")
        for name, row in one["contestants"].items():
            print(
                f"  {name:26s} {row['median_ms']:18.2f} {row['min_ms']:9.2f} {row['max_ms']:9.2f}"
                f" {row['ratio']:7.2f} {row['wrong_spikes']:10.1e}"
            )
        for name, why in one["skipped"].items():
            print(f"  {name:26s} skipped: {why}")
        if one["copy_bytes_per_s"]:
            print(f"  copy of the same size: {one['copy_bytes_per_s'] / 1e12:.2f} TB/s")
    return {"what": "one layer, forward + backward, float32; ratio to ours", "scans": results}


# ---- train: whole optimiser steps -------------------------------------------------------------


SNNTORCH_SLOPE = 25.0  # its own default


class SnnTorchSam(SpikingLM):
    """The Real Sam model as its author runs it: one token at a time through snnTorch's Leaky.

    Same parameters, same equations but for snnTorch's reset, which comes a step late; every map
    is applied at every step, as in a loop over time written by hand.
    """

    def __init__(self, c):
        import snntorch
        from snntorch import surrogate

        super().__init__(c)
        for block in self.blocks:
            beta = torch.sigmoid(block.beta_logit.detach())
            del block.beta_logit
            grad = surrogate.fast_sigmoid(SNNTORCH_SLOPE)  # it has no triangle that is one
            block.leaky = snntorch.Leaky(beta, spike_grad=grad, learn_beta=True)

    def forward(self, tokens, state=None):
        c, logits, spikes = self.config, [], []
        state = [(tokens.new_zeros(len(tokens), c.n_hidden, dtype=torch.float),) * 2] * c.n_layer
        embedded, report = self.embed(tokens)
        for x in embedded.unbind(1):
            for i, block in enumerate(self.blocks):
                mem, s = state[i]
                h = block.norm(x)
                gain = 1 + c.stress_gain * self.stress * block.temper
                feed = nn.functional.linear(h, block.fc_in.weight, block.fc_in.bias)
                current = feed * gain + block.b_rec + s @ block.w_rec
                s, mem = block.leaky(current, mem)
                state[i] = mem, s
                spikes.append(s)
                gate = nn.functional.linear(h, block.gate.weight, block.gate.bias)
                x = x + torch.sigmoid(gate) * s
            logits.append(self.readout(x, None, report)[0])
        report.rate = [torch.stack(spikes[i :: c.n_layer]).mean((0, 1)) for i in range(c.n_layer)]
        return torch.stack(logits, 1), state, report


def train(c, run):
    """Tokens per second of whole training steps of one micro-batch, random tokens."""
    gpt = config.load(TrainConfig, [c.against])
    shape = {"micro_tokens": c.micro_tokens, "dtype": c.dtype, "vocab_size": c.vocab_size}
    models = {OURS: (SpikingLM, c), "transformer": (SpikingLM, replace(gpt, **shape))}
    if c.block == "sam" and c.residual == "gated" and c.rec_heads == 1:
        models["snnTorch, step by step"] = (SnnTorchSam, c)
    rows, runs, parameters, skipped = c.micro_tokens // c.length, {}, {}, {}
    x, y = torch.randint(c.vocab_size, (2, rows, c.length))
    for name, (cls, settings) in models.items():
        torch.manual_seed(c.seed)
        try:
            model = cls(settings).to(run.device)
        except ImportError as error:
            skipped[name] = str(error)
            continue
        optimizers = make_optimizers(settings, model, run.device)
        runs[name] = partial(train_step, model, optimizers, x, y, settings, run)
        parameters[name] = sum(p.numel() for p in model.parameters())
    table = summary(take_turns(runs, c.rounds, c.warmup, run.device), OURS)
    print(f"\n{rows} sequences of {c.length} tokens    tokens/s     ratio   parameters")
    for name, row in table.items():
        row["tokens_per_s"] = x.numel() / row["median_ms"] * 1e3
        row["parameters"] = parameters[name]
        speed = 1 / row["ratio"]
        print(f"  {name:26s} {row['tokens_per_s']:16.0f} {speed:9.2f} {parameters[name]:12d}")
    for name, why in skipped.items():
        print(f"  {name:26s} skipped: {why}")
    what = "forward, backward and AdamW step of one micro-batch; ratio of times to ours"
    return {"what": what, "contestants": table, "skipped": skipped, "batch": [rows, c.length]}


# ---- generate: one token after the other ------------------------------------------------------


def generate(c, run):
    """Milliseconds per token, early and late in one long text, batch 1.

    Weights are random, or ours those of a checkpoint, with its settings. A block snn runs four
    times: events in float32 and with bfloat16 rows, dense, and beside a transformer of its own
    size; its random neurons fire at the rates of the result that `rates` names.
    """
    if c.ckpt:
        c = replace(c, **asdict(build(load_checkpoint(c.ckpt)).config))
    long = one_long_text(c, run) if c.long else None  # first, with the memory to itself
    models, texts, streams, rows, piece = {}, {}, {}, {}, min(20, c.tokens)
    for name, (settings, half, events) in generators_of(c).items():
        model = generator_of(settings, half, c, run)
        rows[name] = {"parameters": sum(p.numel() for p in model.parameters())}
        models[name] = model
        texts[name] = model.generate(torch.zeros(1, 1, dtype=torch.long, device=run.device))
        streams[name] = partial(draw, texts[name], piece, events)
    early = take_turns(streams, c.rounds, c.warmup, run.device)
    drawn = 2 * piece * (c.rounds + c.warmup)  # a turn runs twice
    for once in streams.values():
        for _ in range(max(0, c.tokens - drawn) // piece):
            once()
    later = take_turns(streams, c.rounds, 0, run.device)
    late = max(drawn, c.tokens)
    print(f"\nms per token, among the first {drawn} and after {late}; ratio to ours, late")
    for name, row in rows.items():
        row["early_ms_per_token"] = statistics.median(early[name]) / piece * 1e3
        row["late_ms_per_token"] = statistics.median(later[name]) / piece * 1e3
        row["ratio"] = row["late_ms_per_token"] / rows[OURS]["late_ms_per_token"]
        if models[name].config.block == "snn" and models[name].config.spikes:
            row["triggered"] = triggered_share(models[name], list(islice(texts[name], 64)))
        times = f"{row['early_ms_per_token']:10.2f} {row['late_ms_per_token']:10.2f}"
        print(f"  {name:28s} {times} {row['ratio']:8.2f} {row['parameters']:14,d} parameters")
    what = f"ms per token, batch 1, {'trained' if c.ckpt else 'random'} weights"
    return {"what": what, "late": late, "contestants": rows} | ({"long": long} if long else {})


@torch.no_grad()
def triggered_share(model, drawn):
    """The share of synaptic operations triggered by these tokens, as `generate` yielded them."""
    tokens, state = torch.cat([token for token, _ in drawn], 1), drawn[0][1]
    report = model(tokens, state)[2]
    return float(sum(report.synops)) / sum(report.synapses)


EARLY = 1000  # tokens after which a text counts as begun


def one_long_text(c, run):
    """Speed and memory after c.long tokens beside those after the first 1,000.

    The speeds are taken at the end, in turns with a second text of the same model that is 1,000
    tokens old: between the beginning and the end of the long one the machine may have changed.
    """
    model = generator_of(c, False, c, run)
    start, piece = torch.zeros(1, 1, dtype=torch.long, device=run.device), 100
    texts = {EARLY: model.generate(start), c.long: model.generate(start)}
    rows = {}
    for tokens, more in ((EARLY, EARLY), (c.long, c.long - EARLY)):
        for _ in range(more // piece):
            draw(texts[c.long], piece, True)
        rows[str(tokens)] = resident()
    for _ in range(EARLY // piece):
        draw(texts[EARLY], piece, True)
    turns = {n: partial(draw, text, piece, True) for n, text in texts.items()}
    times = take_turns(turns, c.rounds, c.warmup, run.device)
    print("\none long text: tokens   tokens/s    MB now   MB at most")
    for n in texts:
        row = rows[str(n)]
        row["tokens_per_s"] = piece / statistics.median(times[n])
        now, most = row["resident_mb"], row["peak_mb"]
        print(f"  {n:21,d} {row['tokens_per_s']:10.1f} {now:9.1f} {most:12.1f}")
    return rows | {"ratio": rows[str(c.long)]["tokens_per_s"] / rows[str(EARLY)]["tokens_per_s"]}


def resident():
    """Megabytes of memory that this process takes now, and has taken at most; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kb = {key: text.split()[0] for key, text in (x.split(":", 1) for x in lines) if text.strip()}
    return {"resident_mb": int(kb["VmRSS"]) / 1e3, "peak_mb": int(kb["VmHWM"]) / 1e3}


def generator_of(settings, half, c, run):
    """The model of a checkpoint, or of random weights; there block snn fires at the rates of the
    result that `rates` names."""
    torch.manual_seed(c.seed)
    trained = c.ckpt and settings is c  # not the transformer beside it
    model = build(load_checkpoint(c.ckpt)) if trained else SpikingLM(settings)
    model = model.to(run.device).eval()
    if settings.block == "snn" and not trained:
        set_rates(model, trained_rates(c))
    if half:
        model.halve_synapses()
    return model


def generators_of(c):
    """name -> settings, whether matrices are bfloat16, whether synapses are driven by events."""
    if c.block != "snn":
        gpt = config.load(TrainConfig, [c.against])
        unlimited = replace(gpt, window=10**9)
        settings = {OURS: c, "transformer": gpt, "transformer, unlimited": unlimited}
        return {name: (one, False, True) for name, one in settings.items()}
    gpt = replace(c, block="gpt", head="float", n_head=max(1, c.n_hidden // 64), window=10**9)
    gpt = replace(gpt, d_ff=4 * c.n_hidden, n_layer=1)
    while parameters_of(gpt) < parameters_of(c):
        gpt = replace(gpt, n_layer=gpt.n_layer + 1)
    return {
        OURS: (c, True, True),
        "ours, float32": (c, False, True),
        "ours, float32, dense": (c, False, False),
        "transformer, float32": (gpt, False, True),
    }


def draw(stream, n, events):
    """The next n tokens of a stream, its synapses driven by events or dense."""
    rate, lif_module.EVENT_RATE = lif_module.EVENT_RATE, lif_module.EVENT_RATE * events
    list(islice(stream, n))
    lif_module.EVENT_RATE = rate


def trained_rates(c):
    """Mean firing rates of a trained model of block snn: {population: spikes per token}."""
    if not c.rates:
        raise ValueError("name the result of a trained block snn: --rates=results/FILE.json")
    try:
        result = json.loads(Path(c.rates).read_text())
        was, rates = result["config"], result["log"][-1]["rate"]
    except (ValueError, KeyError, IndexError, TypeError):
        raise ValueError(f"{c.rates} is not the result of a run of train.py") from None
    every = was.get("attention_every", 1) if was.get("attention") else was["n_layer"] + 1
    blocks = ["ah" if (i + 1) % every else "aoh" for i in range(was["n_layer"])]
    sites = [*"".join(blocks), *["head"] * (was.get("head") == "spikes")]
    if was["block"] != "snn" or len(rates) != len(sites):
        raise ValueError(f"{c.rates} is not the result of a spiking model of block snn")
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
    sites = [(block, site) for block in model.blocks for site in "aoh" if hasattr(block, site)]
    sites += [(model, "head")] if model.head is not None else []
    if lacking := {site for _, site in sites} - set(rates):
        raise ValueError(f"the model of --rates has no neurons called {', '.join(sorted(lacking))}")
    state = None
    for _ in range(20):
        tokens = torch.randint(model.config.vocab_size, (4, 64), device=model.rate.device)
        _, state, report = model(tokens, state)
        for (part, site), rate in zip(sites, report.rate):
            getattr(part, site).gain *= (rates[site] / rate.mean()).clamp(0.1, 10) ** 0.25


# ---- frames: does the cost fall with them? ----------------------------------------------------


def frames(c, run):
    """Forward time where tokens expect to run half of k_max frames, against all of them always."""
    if c.block != "spark":
        raise ValueError("frames measures block spark: name configs/neuronspark_6m.py")
    models, tokens = {}, torch.randint(c.vocab_size, (c.micro_tokens // c.length, c.length))
    tokens = tokens.to(run.device)
    for name, adaptive in ((FIXED, False), (OURS, True)):  # the same weights
        torch.manual_seed(c.seed)
        models[name] = SpikingLM(replace(c, adaptive=adaptive)).to(run.device).eval()
    impatience = [p for name, p in models[OURS].named_parameters() if name.endswith("b_halt")]

    @torch.no_grad()
    def forward(name):
        return models[name](tokens)[2]

    def mean(log, what):
        return float(sum(v for k, v in log.items() if k.startswith(what)) / c.n_layer)

    low, high = -10.0, 10.0
    for _ in range(12):  # bisect
        for p in impatience:
            p.data.fill_((low + high) / 2)
        log = forward(OURS).log
        is_slow = mean(log, "E[K]") > c.k_max / 2
        low, high = ((low + high) / 2, high) if is_slow else (low, (low + high) / 2)
    runs = {name: partial(forward, name) for name in models}
    rows = summary(take_turns(runs, c.rounds, c.warmup, run.device), FIXED)
    rows[OURS]["E[K]"], rows[OURS]["frames"] = mean(log, "E[K]"), mean(log, "frames")
    for name in models:
        rows[name]["macs"] = forward(name).macs
    print(f"\n{tuple(tokens.shape)} tokens, E[K] {mean(log, 'E[K]'):.2f} of {c.k_max} frames")
    print(f"  {'':22s} median ms    ratio   float multiplications per token")
    for name, row in rows.items():
        print(f"  {name:22s} {row['median_ms']:9.1f} {row['ratio']:8.3f} {row['macs']:16,d}")
    what = "one forward pass, random weights; ratio of times to all frames"
    return {"what": what, "contestants": rows, "batch": list(tokens.shape), "k_max": c.k_max}


# ---- params: what a config costs --------------------------------------------------------------


def params(c, run):
    """Parameters and operations per token; on the meta device, so that any size will do.

    Attention is counted as for a token that sees the whole window.
    """
    groups = {}
    with torch.device("meta"):
        model, token = SpikingLM(c), torch.zeros(1, 1, dtype=torch.long)
    for name, p in model.named_parameters():
        group = name.removeprefix("parts.").split(".")[0].rstrip("0123456789")
        groups[group] = groups.get(group, 0) + p.numel()
    total = sum(groups.values())
    for group, count in groups.items():
        print(f"{group:12s} {count:14,d}")
    print(f"{'total':12s} {total:14,d} = {total / 1e6:.2f}M", flush=True)
    with torch.device("meta"):
        _, state, report = model(token)
        if c.block == "gpt" or c.block == "snn" and c.attention:  # a token before costs as much
            per_token = model(token, state)[2].macs - report.macs  # as any other one before
            report.macs += (min(c.window, c.longest()) - 1) * per_token
    spike_fed = sum(report.synapses)
    print(f"per token: {spike_fed:,d} spike-fed synapses, {report.macs:,d} float multiplications")
    result = {"parameters": total, "groups": groups, "synapses": spike_fed, "macs": report.macs}
    return result | ({"plan": plan(c, model, spike_fed + report.macs)} if c.gpus else {})


def plan(c, model, macs):
    """What a step of train.py takes on each of N GPUs: a plan to read before renting them.

    Weights, gradients and optimiser states are float32. Activations are those that a forward pass
    of micro_tokens saves for backward, in bfloat16 where they enter matrices, counted on the meta
    device. Time: 6 operations per multiplication and token (8 with checkpointing), then a ring that
    sends every gradient twice; nothing overlaps and nothing else takes time, so it is a floor.
    """
    total = sum(p.numel() for p in model.parameters())
    per_parameter = {"AdamW": 8, "Muon": 4}  # bytes of state: two averages, or one
    states = sum(
        per_parameter[type(optimizer).__name__] * p.numel()
        for optimizer in make_optimizers(c, model, torch.device("cpu"))
        for group in optimizer.param_groups
        for p in group["params"]
    )
    states /= c.gpus if c.shard else 1
    print(f"\nper GPU of {c.gpus}, {c.micro_tokens} tokens at a time:", flush=True)
    gigabytes = {"weights": 4 * total, "gradients": 4 * total, "optimiser": states}
    for name, checkpointing in (("activations", False), ("activations, checkpointing", True)):
        gigabytes[name] = activation_bytes(replace(c, checkpointing=checkpointing))
    gigabytes = {name: size / 1e9 for name, size in gigabytes.items()}
    compute = (8 if c.checkpointing else 6) * macs * c.tokens_per_step / c.gpus / c.gpu_flops
    moved = 2 * (c.gpus - 1) / c.gpus * 4 * total
    seconds = {"compute": compute, "all-reduce": moved / c.gpu_link}
    for name, size in gigabytes.items():
        print(f"  {name:28s} {size:9.2f} GB")
    print(f"  {'all-reduce per step':28s} {moved / 1e9:9.2f} GB")
    took = sum(seconds.values())
    print(f"  a step of {c.tokens_per_step:,d} tokens takes at least {took:.2f} s", end="")
    print(f" ({', '.join(f'{name} {t:.2f}' for name, t in seconds.items())}), all GPUs together")
    print(
        f"  {c.tokens_per_step / took:,.0f} tokens/s;"
        f" {c.max_steps} steps in {took * c.max_steps / 3600:,.1f} h"
    )
    return {"gpus": c.gpus, "gigabytes": gigabytes, "all_reduce_bytes": moved, "seconds": seconds}


def activation_bytes(settings):
    """Bytes that one forward pass of micro_tokens keeps for its backward."""
    length = min(settings.longest(), settings.micro_tokens)
    with torch.device("meta"):
        model = SpikingLM(settings).bfloat16()
        tokens = torch.zeros(settings.micro_tokens // length, length, dtype=torch.long)
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        kept = {}  # storages, kept alive so that none takes another's place

        def keep(x):
            storage = x.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            logits, _, report = model(tokens)
            model.loss(logits, tokens, report)
    return sum(storage.nbytes() for storage in kept.values())


# ---- tokens: what a tokenizer saves -----------------------------------------------------------


def tokens(c, run):
    """Bytes per token of held-out text, by tokenizers trained on the rest with one vocabulary."""
    rows = {}
    for kind in ("bpe", "lengthmax"):
        start = time.perf_counter()
        corpus = data.prepare(c.dataset, kind, c.vocab_size, c.data_dir)
        made = time.perf_counter() - start
        text = corpus.tokenizer.decode(corpus.heldout.tolist())
        n = len(corpus.heldout) - int((corpus.heldout == corpus.tokenizer.end).sum())
        rows[kind] = {"vocab_size": corpus.tokenizer.vocab_size, "tokens": n, "seconds": made}
        rows[kind]["bytes_per_token"] = len(text.encode()) / n
        print(
            f"{kind:10s} {rows[kind]['bytes_per_token']:.3f} bytes per token, ready in {made:.1f} s"
        )
    return {"data": {"name": corpus.name, "sha256": corpus.sha256}, "tokenizers": rows}


# ---- cell: the virtual cell on genes that it never saw ------------------------------------------


def cell(c, run):
    """cell_bridge.py on its synthetic screen: the cell beside no change, mean delta and ridge."""
    with tempfile.TemporaryDirectory() as folder:
        files = [f"--out={folder}/cell.pt", f"--result={folder}/cell.json"]
        cell_bridge.main([*files, f"--seed={c.seed}"])
        return json.loads(Path(folder, "cell.json").read_text())


# ---- ablate: whole training runs, one ingredient apart -------------------------------------------

BARE = dict(modulation="none", engram=0, hrm=0, spike_attn=0, progsem=0, kuramoto=0, moe=0)
BARE |= dict(memory=0, mtp=0, jepa=False)
ABLATION = {  # block whale, and any other but for what is whale's alone
    "bare": {},
    "bridge": {"modulation": "program"},
    "two-sided penalty": {"rate_penalty": "both"},
    "bridge, P shuffled": {"modulation": "shuffled"},
    "engram": {"engram": 512, "engram_heads": 1},
    "hrm": {"hrm": 2},
    "spike_attn": {"spike_attn": 4},
    "progsem": {"progsem": 18},
    "progsem and bridge": {"progsem": 18, "modulation": "program"},
    "kuramoto": {"kuramoto": 32},
    "moe": {"moe": 4, "moe_width": 64},
    "memory": {"memory": 64},
    "mtp": {"mtp": 1},
    "jepa": {"jepa": True},
}
ABLATION["all"] = {
    key: value
    for name in "bridge engram hrm spike_attn progsem kuramoto mtp jepa".split()
    for key, value in ABLATION[name].items()
}
SNN_ABLATION = {  # the ingredients of block snn, then traits
    "bare": {},
    "float twin": {"spikes": False},
    "one threshold": {"levels": 1},
    "two thresholds": {"levels": 2},
    "five thresholds": {"levels": 5},
    "no leak": {"beta_low": 0.001, "beta_high": 0.002},
    "one leak for all": {"beta_low": 0.5, "beta_high": 0.5},
    "narrow surrogate": {"slope": 3.0},
    "no budget": {"rate_weight": 0.0},
    "budget per layer": {"rate_penalty": "above"},
    "no attention": {"attention": 0},
    "two layers": {"n_layer": 2},
    "two layers, attention in the last": {"n_layer": 2, "attention_every": 2},
    "spiking head": {"head": "spikes"},
    "dropout of a tenth": {"dropout": 0.1},
    "AdamW": {"optimizer": "adamw"},
    **{name: ABLATION[name] for name in "engram hrm spike_attn moe memory mtp jepa".split()},
}


def parameters_of(settings):
    with torch.device("meta"):
        return sum(p.numel() for p in SpikingLM(settings).parameters())


def narrowed(settings, most, name="n_hidden"):
    """The settings with the largest width, in steps of 8, within this number of parameters."""
    width = getattr(settings, name)
    widths = range(width % 8 or 8, width + 513, 8)
    fit = bisect.bisect(widths, most, key=lambda w: parameters_of(replace(settings, **{name: w})))
    if not fit:
        raise ValueError(f"no {name} leaves at most {most:,d} parameters: set a smaller --n_embd")
    return replace(settings, **{name: widths[fit - 1]})


def log_of(settings):
    """The log of a complete run of these settings, a dictionary per evaluation; else []."""
    out = Path(settings.out_dir)
    try:
        old = load_checkpoint(out / f"step_{settings.max_steps:08d}.pt")["config"]
    except ValueError:
        return []
    places = ("out_dir", "data_dir", "result", "threads", "init_from")  # these change no result
    names = [f.name for f in fields(TrainConfig) if f.name not in places]
    if any(old.get(name) != getattr(settings, name) for name in names):
        return []
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def chosen(variants, c):
    """Those of the variants that the setting of this name asks for; ValueError if there is none."""
    words = c.variants.split() or [""]
    some = {k: v for k, v in variants.items() if any(word in k for word in words)}
    if not some:
        raise ValueError(f"no variant is called {c.variants!r}: there are {', '.join(variants)}")
    return some


def ablate(c, run):
    """Train every variant of the config with every seed, at most at the parameters of the bare one.

    What an ingredient adds is taken from the width, in steps of 8. A run that out_dir has complete
    is not repeated: a stopped ablation goes on, and several processes may share one, each with
    --variants of its own once the bare one, which is always among them, is there.
    """
    bare, rows = replace(c, **BARE), {}
    most, variants, width = parameters_of(bare), ABLATION, "n_hidden"
    if c.block == "snn":  # the width of its stream is that of embedding and head
        variants, width = SNN_ABLATION, "d_ff"
    variants = {"bare": variants["bare"]} | chosen(variants, c)
    for i, (name, overrides) in itertools.product(range(c.seeds), variants.items()):
        out = Path(c.out_dir) / "ablate" / f"{name} {c.seed + i}"
        settings = replace(bare, **overrides, seed=c.seed + i, out_dir=str(out))
        settings = narrowed(replace(settings, result=""), most, width)
        print(f"\n{name}, seed {settings.seed}: {width} {getattr(settings, width)}")
        if not (log := log_of(settings)):
            trainer.train(settings, run)
            log = log_of(settings)
        row = rows.setdefault(name, {"overrides": overrides, width: getattr(settings, width)})
        row["parameters"] = parameters_of(settings)
        row.setdefault("bpb", []).append(log[-1]["bpb"])
        row.setdefault("nats", []).append(log[-1]["heldout"])
        row.setdefault("rate", []).append(statistics.mean(log[-1]["rate"] or [0.0]))
        row.setdefault("triggered", []).append(log[-1]["synops"] / (log[-1]["synapses"] or 1))
        row.setdefault("tokens_per_s", []).append(
            statistics.median(line["tokens_per_s"] for line in log[1:])
        )
    print(f"\n{'':20s} bits per byte     change from bare   rate   tokens/s   parameters")
    for name, row in rows.items():
        row["mean_bpb"] = statistics.mean(row["bpb"])
        row["gain"] = rows["bare"]["mean_bpb"] - row["mean_bpb"]
        rate, speed = statistics.mean(row["rate"]), statistics.mean(row["tokens_per_s"])
        print(
            f"{name:20s} {row['mean_bpb']:13.4f} {-row['gain']:+19.4f} {100 * rate:5.1f}%"
            f" {speed:10.0f} {row['parameters']:12d}"
        )
    return {"what": "held-out bits per byte, equal tokens and parameters", "variants": rows}


# ---- recall: a name, hundreds of tokens later ---------------------------------------------------
#
# A document is  I_AM name filler ... filler WHO name,  name and filler drawn evenly, and no name in
# the filler. A row is one document after the other, so that each name has to make way for the next.
# Only the answers are learned and scored: what is random can not be.

NAMES, I_AM, WHO, WORDS = 16, 16, 17, 64  # tokens: 0 to 15 are names, 18 to 63 filler
TAUGHT = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # tokens of filler in training ...
ASKED = (32, 128, 512, 600, 2000)  # ... and in the test
RECALL = (  # short documents first: what they teach makes the long ones learnable
    "--vocab_size=64 --n_embd=64 --n_hidden=96 --n_layer=2 --d_ff=256 --n_head=4 --window=10000"
    " --encoder=float --beta_low=0.02 --beta_high=0.95 --theta=0.8 --rate_target=0.19 --memory=64"
    " --rate_weight=30 --rate_penalty=above --tokens_per_step=5120 --micro_tokens=5120"
    " --max_steps=600 --optimizer=muon --lr=4e-3 --dtype=float32"
).split() + ["--phases=phrases:80 stories:640"]
REMEMBERS = {
    "snn": {"block": "snn", "rate_penalty": "work", "memory": 0},
    "snn+memory": {"block": "snn", "rate_penalty": "work"},
    "sam": {"block": "sam", "memory": 0},
    "sam+memory": {"block": "sam"},
    "transformer": {"block": "gpt", "memory": 0},
}


def documents(rng, rows, length):
    """Tokens (rows, length): documents of distances drawn from those taught that still fit."""
    text = rng.integers(WHO + 1, WORDS, (rows, length))
    for row in text:
        at = 0
        while fits := [d for d in TAUGHT if at + d + 4 <= length]:
            end, name = at + rng.choice(fits) + 4, rng.integers(NAMES)
            row[at : at + 2], row[end - 2 : end] = (I_AM, name), (WHO, name)
            at = end
    return torch.from_numpy(text)


def teach(c, run):
    """A model trained on the documents; of the steps each phase, by its length, has equal parts."""
    torch.manual_seed(c.seed)
    model, rng = SpikingLM(c).to(run.device), np.random.default_rng(c.seed)
    optimizers, phases = make_optimizers(c, model, run.device), c.curriculum()
    for step in range(c.max_steps):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak"] * trainer.schedule(c, step)
        _, length = phases[step * len(phases) // c.max_steps]
        text = documents(rng, c.tokens_per_step // length, length + 1)
        x, y = text[:, :-1], text[:, 1:].masked_fill(text[:, :-1] != WHO, -100)  # -100: no target
        nats, _, rates = train_step(model, optimizers, x, y, c, run)
        model.observe(nats, rates)
        if step % c.eval_interval == 0:
            print(f"step {step}: {nats:.3f} nats per name", flush=True)
    return model.eval()


@torch.no_grad()
def ask(model, distance, seed, run, rows=256):
    """Tell a name, then another one, then filler of a given length, and ask for the last name.

    Returns how often the likeliest token is the second name, the nats that it costs, and the
    memory's share of the updates of the stream, in the last 32 rows.
    """
    rng = np.random.default_rng((seed, distance))
    text = rng.integers(WHO + 1, WORDS, (rows, 20 + 2 + distance + 1))
    first = rng.integers(NAMES, size=rows)
    name = (first + rng.integers(1, NAMES, rows)) % NAMES
    text[:, 0], text[:, 1], text[:, 18], text[:, 19] = I_AM, first, WHO, first
    text[:, 20], text[:, 21], text[:, -1] = I_AM, name, WHO
    text, name = (torch.from_numpy(x).to(run.device) for x in (text, name))
    logits = []
    for part in text.split(32):
        with run.autocast:
            out, _, report = model(part)
        logits.append(out[:, -1].float())
    logits = torch.cat(logits)
    return {
        "accuracy": (logits.argmax(-1) == name).double().mean().item(),
        "nats": nn.functional.cross_entropy(logits, name).item(),
        "share": float(report.log.get("share memory", 0.0)),
    }


def recall(c, run):
    """What tiny models of equal size, taught by the same documents, still know of a name.

    None has more parameters than block snn without memory.
    """
    most, rows = parameters_of(replace(c, **REMEMBERS["snn"])), {}
    for i, (name, overrides) in itertools.product(range(c.seeds), chosen(REMEMBERS, c).items()):
        settings = narrowed(replace(c, **overrides, seed=c.seed + i), most)
        print(f"\n{name}, seed {settings.seed}: n_hidden {settings.n_hidden}")
        model = teach(settings, run)
        row = rows.setdefault(name, {"overrides": overrides, "n_hidden": settings.n_hidden})
        row["parameters"] = parameters_of(settings)
        for distance in ASKED:
            for what, value in ask(model, distance, settings.seed, run).items():
                row.setdefault(what, {}).setdefault(str(distance), []).append(value)
    print(f"\nnames recalled, by tokens of filler; chance gives {100 / NAMES:.0f}%")
    print(f"{'':12s}" + "".join(f"{d:7d}" for d in ASKED) + "   memory's share   parameters")
    for name, row in rows.items():
        for what in ("accuracy", "nats", "share"):
            row[f"mean_{what}"] = {d: statistics.mean(x) for d, x in row[what].items()}
        print(f"{name:12s}" + "".join(f"{100 * x:6.0f}%" for x in row["mean_accuracy"].values()),
              f"{100 * row['mean_share'][str(ASKED[0])]:15.0f}%{row['parameters']:13d}")  # fmt: skip
    what = "names recalled by tiny models, by tokens of filler; a list has a value per seed"
    return {"what": what, "chance": 1 / NAMES, "taught": TAUGHT, "variants": rows}


# ---- resume: is anything lost? ----------------------------------------------------------------

KILLED = (  # a run of seconds that saves after every step, so that many a kill hits a save
    "--tokenizer=byte --vocab_size=257 --n_embd=64 --n_hidden=256 --n_layer=2 --phases=stories:16"
    " --tokens_per_step=256 --micro_tokens=256 --max_steps=40 --eval_interval=1 --sample_tokens=0"
    " --eval_length=32 --eval_tokens=300 --device=cpu --threads=1"
).split()


def train_quietly(argv):
    sys.stdout = sys.stderr = open(os.devnull, "w")
    trainer.main(argv)


def start_training(folder, out, *more):
    """A process that trains; it begins with train.py imported: that is most of its life."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])
    paths = [f"--dataset={folder}/text.txt", f"--data_dir={folder}", f"--out_dir={out}"]
    process = context.Process(target=train_quietly, args=([*KILLED, *paths, *more],))
    process.start()
    return process


def read_log(out):
    path = out / "log.jsonl"
    log = [json.loads(x) for x in path.read_text().split("\n")[:-1]] if path.exists() else []
    return [[x[key] for key in ("step", "train", "valid", "heldout", "minutes")] for x in log]


def finished(process, out):
    """After its end: (losses of every evaluation, weights); None if it failed."""
    process.join()
    if process.exitcode:
        return None
    return [x[:-1] for x in read_log(out)], load_checkpoint(max(out.glob("step_*.pt")))["model"]


def resume(c, run):
    """Kill training at a random moment (SIGKILL), resume it, and compare with a run in peace."""
    rng, trials = random.Random(c.seed), []
    with tempfile.TemporaryDirectory() as folder:
        documents, _ = data.nursery(60_000, c.seed)
        Path(folder, "text.txt").write_text(data.END_TEXT.join(documents))
        peace = Path(folder, "peace")
        expected, weights = finished(start_training(folder, peace), peace)
        log = read_log(peace)
        seconds = 60 * (log[-1][-1] - log[0][-1]) / len(log)  # of a step, evaluated and saved
        for i in range(c.trials):
            out = Path(folder, str(i))
            process, step = start_training(folder, out), rng.randrange(expected[-1][0] - 1)
            while process.is_alive() and len(read_log(out)) <= step:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, seconds))
            seen = max(out.glob("step_*.pt"), default=None)
            process.kill()
            process.join()
            in_a_save, files = any(out.glob("*.tmp")), sorted(out.glob("step_*.pt"))
            whole = [load_checkpoint(path)["position"]["step"] for path in files]  # or ValueError
            more = ["--init_from=resume"] if files else []
            end = finished(start_training(folder, out, *more), out)
            trials.append({
                "step": max(whole, default=None),
                "killed": process.exitcode == -signal.SIGKILL,
                "in_a_save": in_a_save,
                "lost": seen is not None and (not files or files[-1] < seen),
                "same_losses": end is not None and end[0] == expected,
                "same_weights": end is not None
                and all(torch.equal(end[1][name], w) for name, w in weights.items()),
            })  # fmt: skip
            print(f"{i + 1:3d} {trials[-1]}", flush=True)
    counts = {key: sum(trial[key] for trial in trials) for key in trials[0] if key != "step"}
    print(f"of {c.trials} runs: {counts}")
    what = "training killed by SIGKILL at random moments and resumed, beside a run in peace"
    return {"what": what, "command_line": KILLED, "final": expected[-1], "counts": counts,
            "trials": trials}  # fmt: skip


# ---- command line -----------------------------------------------------------------------------

COMMANDS = {"scan": scan, "train": train, "generate": generate, "frames": frames}
COMMANDS |= {"params": params, "ablate": ablate, "tokens": tokens, "cell": cell, "resume": resume}
COMMANDS |= {"recall": recall, "report": write_report}
PRESET = {"recall": RECALL}  # settings that a command begins with; what is given is stronger


def main(argv):
    with config.one_line(DataError):
        if argv[:1] in (["-h"], ["--help"]):
            return print(__doc__)
        if not argv or argv[0] not in COMMANDS:
            names = "|".join(COMMANDS)
            raise ValueError(f"write python bench.py {names} [CONFIG.py] [--key=value ...]")
        if argv[0] == "report":  # measures nothing
            if argv[1:]:
                raise ValueError(f"report has no settings: leave out {argv[1]}")
            return write_report()
        c = config.load(BenchConfig, [*PRESET.get(argv[0], ()), *argv[1:]])
        files, _ = config.split(BenchConfig, argv[1:])
        if argv[0] in PRESET and files:
            raise ValueError(f"{argv[0]} has its own settings: leave out {files[0]}")
        run = Run(c)
        asked = [] if c.dtype == "auto" else [c.dtype]
        name = "_".join([argv[0], *(Path(f).stem for f in files), run.device.type, *asked])
        path = c.save and config.writable(f"results/{name}.json")
        result = environment(run.device, c.seed) | COMMANDS[argv[0]](c, run)
        if path:
            private = ("_dir", "dataset", "ckpt")
            settings = {k: v for k, v in asdict(c).items() if not k.endswith(private)}
            write_result(path, result | {"config": settings})


if __name__ == "__main__":
    main(sys.argv[1:])
