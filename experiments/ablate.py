"""What is each ingredient worth? Whole training runs, one ingredient apart, at equal parameters.

python bench.py ablate configs/spikewhale_6m.py --dataset=my.txt
python bench.py ablate configs/snn_6m.py --dataset=my.txt --variants="bare layers head"
"""

import bisect
import itertools
import json
import statistics
from dataclasses import fields, replace
from pathlib import Path

import train as trainer
from bench import parameters_of
from checkpoint import load_checkpoint, locked

BARE = {"modulation": "none", "traits": "none"}
TRAITS = {  # name -> numbers
    name: {"traits": f"{name}:{numbers}".rstrip(":")}
    for name, numbers in dict(
        engram="512,1", hrm=2, spike_attn=4, progsem=18, kuramoto=32, moe="4,64", memory=64, mtp=1,
        jepa="",
    ).items()
}  # fmt: skip
ALL = "engram hrm spike_attn progsem kuramoto mtp jepa"
WHALE = {  # for any block but snn; the bridge is block whale's alone
    "bare": {},
    "bridge": {"modulation": "program"},
    "two-sided penalty": {"rate_penalty": "both"},
    "bridge, P shuffled": {"modulation": "shuffled"},
    **TRAITS,
    "progsem and bridge": {**TRAITS["progsem"], "modulation": "program"},
    "all": {
        "modulation": "program",
        "traits": " ".join(TRAITS[name]["traits"] for name in ALL.split()),
    },
}
SNN = {  # the ingredients of block snn, then traits
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
    "two layers": {"n_layer": 2},
    "spiking head": {"head": "spikes"},
    "AdamW": {"optimizer": "adamw"},
    **{name: TRAITS[name] for name in "engram hrm spike_attn moe memory mtp jepa".split()},
}


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
    names = [f.name for f in fields(trainer.TrainConfig) if f.name not in places]
    if any(old.get(name) != getattr(settings, name) for name in names):
        return []
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def chosen(variants, words):
    """The variants whose name contains one of the words; ValueError if there is none."""
    some = {k: v for k, v in variants.items() if any(w in k for w in words.split() or [""])}
    if not some:
        raise ValueError(f"no variant is called {words!r}: there are {', '.join(variants)}")
    return some


def ablate(
    c,
    run,
    *,
    variants: str = "",  # only variants whose name contains one of these words
    seeds: int = 2,  # runs per variant
):
    """Train every variant of the config with every seed, at most at the parameters of the bare one.

    What an ingredient adds is taken from the width, in steps of 8. A run that out_dir has complete
    is not repeated: a stopped ablation goes on, and several processes may share one, each with
    --variants of its own once the bare one, which is always among them, is there.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    every, width = (SNN, "d_ff") if c.block == "snn" else (WHALE, "n_hidden")
    bare, rows = replace(c, **BARE), {}
    variants, most = {"bare": {}} | chosen(every, variants), parameters_of(bare)
    for i, (name, overrides) in itertools.product(range(seeds), variants.items()):
        out = Path(c.out_dir) / "ablate" / f"{name} {c.seed + i}"
        settings = replace(bare, **overrides, seed=c.seed + i, out_dir=str(out), result="")
        settings = narrowed(settings, most, width)
        print(f"\n{name}, seed {settings.seed}: {width} {getattr(settings, width)}")
        if not (log := log_of(settings)):
            out.mkdir(parents=True, exist_ok=True)
            with locked(out):
                trainer.train(settings, run)
            log = log_of(settings)
        row = rows.setdefault(name, {"overrides": overrides, width: getattr(settings, width)})
        row["parameters"] = parameters_of(settings)
        measured = {
            "bpb": log[-1]["bpb"],
            "nats": log[-1]["heldout"],
            "rate": statistics.mean(log[-1]["rate"] or [0.0]),
            "triggered": log[-1]["synops"] / (log[-1]["synapses"] or 1),
            "tokens_per_s": statistics.median(line["tokens_per_s"] for line in log[1:]),
        }
        for key, value in measured.items():
            row.setdefault(key, []).append(value)
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
