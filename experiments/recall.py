"""A name, hundreds of tokens later: who was it? Tiny models, taught and asked on the same task.

    python bench.py recall
    python bench.py recall --variants=memory

A document is  I_AM name filler ... filler WHO name,  name and filler drawn evenly, and no name in
the filler. A sequence is one document after the other, so that each name replaces the one before.
Only the answers are learned and scored, because the rest is random.
"""

import itertools
import statistics
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from bench import parameters_of
from .ablate import chosen, narrowed
from model import SpikingLM
from optim import make_optimizers, schedule, set_lr
from train import train_step

NAMES, I_AM, WHO, WORDS = 16, 16, 17, 64  # tokens: 0 to 15 are names, 18 to 63 filler
TAUGHT = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # tokens of filler in training ...
ASKED = (32, 128, 512, 600, 2000)  # ... and in the test
PLAIN, MEMORY = {"traits": "none"}, {"traits": "memory:64"}
MODELS = {
    "snn": {"block": "snn", "rate_penalty": "synops", **PLAIN},
    "snn+memory": {"block": "snn", "rate_penalty": "synops", **MEMORY},
    "sam": {"block": "sam", **PLAIN},
    "sam+memory": {"block": "sam", **MEMORY},
    "transformer": {"block": "gpt", **PLAIN},
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
    """A model trained on the documents, for the same number of steps in each phase."""
    torch.manual_seed(c.seed)
    model, rng = SpikingLM(c).to(run.device), np.random.default_rng(c.seed)
    optimizers, phases = make_optimizers(c, model, run.device), c.curriculum()
    for step in range(c.max_steps):
        set_lr(optimizers, schedule(c, step, c.max_steps))
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
    memory's share of the updates of the residual stream, in the last 32 rows.
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
        "nats": F.cross_entropy(logits, name).item(),
        "share": float(report.log.get("share memory", 0.0)),
    }


def recall(
    c,
    run,
    *,
    variants: str = "",  # only variants whose name contains one of these words
    seeds: int = 2,  # runs per variant
):
    """What tiny models of equal size, taught by the same documents, still know of a name.

    None has more parameters than block snn without memory.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    most, rows = parameters_of(replace(c, **MODELS["snn"])), {}
    for i, (name, overrides) in itertools.product(range(seeds), chosen(MODELS, variants).items()):
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
        recalled = "".join(f"{100 * x:6.0f}%" for x in row["mean_accuracy"].values())
        share = row["mean_share"][str(ASKED[0])]
        print(f"{name:12s}{recalled} {100 * share:15.0f}%{row['parameters']:13d}")
    what = "names recalled by tiny models, by tokens of filler; a list has a value per seed"
    return {"what": what, "chance": 1 / NAMES, "taught": TAUGHT, "variants": rows}


# In place of a CONFIG; the command line may change each. Short documents first: what they teach
# makes the long ones learnable.
recall.preset = (
    "--vocab_size=64 --n_embd=64 --n_hidden=96 --n_layer=2 --d_ff=256 --n_head=4 --window=10000"
    " --encoder=float --beta_low=0.02 --beta_high=0.95 --theta=0.8 --rate_target=0.19"
    " --rate_weight=30 --rate_penalty=above --tokens_per_step=5120 --micro_tokens=5120"
    " --max_steps=600 --optimizer=muon --lr=4e-3 --dtype=float32"
).split() + ["--phases=phrases:80 stories:640"]
