"""NeuronSpark decides how many frames a token gets. Does the time fall with their number?

python bench.py frames configs/neuronspark_6m.py --k_max=16
"""

from functools import partial

import torch

from bench import OURS, summary, take_turns
from .train import random_tokens
from model import SpikingLM

FIXED = "all frames, always"


def frames(
    c,
    run,
    *,
    length: int = 64,  # tokens of a sequence
):
    """Forward time where tokens expect to run half of k_max frames, against all of them always."""
    if c.block != "spark":
        raise ValueError("frames measures block spark: name configs/neuronspark_6m.py")
    models, tokens = {}, random_tokens(c, length).to(run.device)
    for name in (FIXED, OURS):  # the same weights
        torch.manual_seed(c.seed)
        models[name] = SpikingLM(c).to(run.device).eval()
    for half in models[FIXED].modules():
        half.adaptive = False  # read by those that ponder
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
