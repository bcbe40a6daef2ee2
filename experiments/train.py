"""How fast does a model train? Ours, snnTorch and a transformer, whole optimiser steps.

python bench.py train configs/sam_6m.py
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

import config
from bench import OURS, show, size_of, summary, take_turns, transformer_like
from .peers import SnnTorchSam
from model import SpikingLM
from optim import make_optimizers
from train import TrainConfig, train_step


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
    profile: bool = False,  # and where the time of a step goes, by operation
):
    """Tokens per second of whole training steps of one micro-batch, random tokens.

    A GPU also tells the most memory that a model takes, and the share of the card's operations
    that the model's own are (MFU: 6 per multiplication and token, spike-fed ones counted dense).
    With --compile each model runs compiled, too; on a GPU also with checkpointing. The transformer
    has the optimiser of ours.
    """
    gpt = config.load(TrainConfig, [against]) if against else transformer_like(c)
    shape = {"micro_tokens": c.micro_tokens, "dtype": c.dtype, "vocab_size": c.vocab_size}
    shape |= {"optimizer": c.optimizer}
    models = {OURS: (SpikingLM, c), "transformer": (SpikingLM, replace(gpt, **shape))}
    is_plain = c.traits == "none" and c.head == "float"
    if c.block == "sam" and c.residual == "gated" and c.rec_heads == 1 and is_plain:
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
        ways |= {", checkpointing": (model, True)} if on_gpu else {}
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
    result = {"what": what, "contestants": rows, "skipped": skipped, "batch": list(x.shape)}
    if profile:
        result["operations"] = {name: operations(name, step) for name, step in runs.items()}
    return result


def operations(name, step, most=12):
    """{operation of PyTorch: share of the time of step()}: the `most` longest, then the rest."""
    with torch.profiler.profile() as profiler:
        step()
    events = profiler.key_averages()
    on_gpu = any(e.self_device_time_total for e in events)
    times = {
        e.key.removeprefix("aten::"): e.self_device_time_total if on_gpu else e.self_cpu_time_total
        for e in events
    }
    longest = sorted(times, key=times.get, reverse=True)[:most]
    shares = {key: times[key] / sum(times.values()) for key in longest}
    shares |= {"all others": 1 - sum(shares.values())}
    print(f"\n{name}: share of the time, by operation")
    print("\n".join(f"{share:7.1%}  {key}" for key, share in shares.items()))
    return shares


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
