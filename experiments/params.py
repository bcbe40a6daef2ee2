"""What does a config cost? Parameters, operations per token, and a plan for a run on GPUs.

python bench.py params configs/sam_6m.py
python bench.py params configs/snn_1b.py --gpus=1,8,64,512 --gpu=h100
"""

import torch

from bench import size_of
from .train import CARDS
from lif import entry
from model import SpikingLM
from optim import OPTIMIZERS, make_optimizers


def params(
    c,
    run,
    *,
    gpus: str = "",  # numbers of GPUs to plan a run of train.py on: 8, or 1,8,64
    gpu: str = "h100",  # which: h200 | h100 | a100 | 4090
    reached: float = 0.25,  # share of its operations that training reaches (bench.py train: MFU)
):
    """Parameters and operations per token; on the meta device, so that any size will do.

    Attention is counted as for a token that sees the whole window.
    """
    try:
        counts = [int(n) for n in gpus.split(",") if n]
    except ValueError:
        counts = [0]
    if min(counts, default=1) < 1 or not 0 < reached <= 1:
        raise ValueError(f"--gpus are numbers, as 1,8,64, and --reached is a share; got {gpus!r}")
    card = entry(CARDS, "gpu", gpu)
    groups = {}
    with torch.device("meta"):
        model, token = SpikingLM(c), torch.zeros(1, 1, dtype=torch.long)
    for name, p in model.named_parameters():
        group = (
            name.removeprefix("parts.").removeprefix("ahead.").split(".")[0].rstrip("0123456789")
        )
        groups[group] = groups.get(group, 0) + p.numel()
    total = sum(groups.values())
    for group, count in groups.items():
        print(f"{group:12s} {count:14,d}")
    print(f"{'total':12s} {total:14,d} = {total / 1e6:.2f}M", flush=True)
    with torch.device("meta"):
        _, state, report = model(token)
        if c.block == "gpt":  # a token before costs as much
            per_token = model(token, state)[2].macs - report.macs  # as any other one before
            report.macs += (min(c.window, c.longest()) - 1) * per_token
    spike_fed = sum(every for _, every in report.synapses)
    print(f"per token: {spike_fed:,d} spike-fed synapses, {report.macs:,d} float multiplications")
    result = {"parameters": total, "groups": groups, "synapses": spike_fed, "macs": report.macs}
    if counts:
        result["plan"] = plans(c, model, spike_fed + report.macs, counts, gpu, card, reached)
    return result


def plans(c, model, macs, counts, gpu, card, reached):
    """What a step of train.py takes on each of N cards, computed: to be read before renting them.

    Weights, gradients and optimiser states are float32. Activations are those that a forward pass
    of micro_tokens saves for backward, in bfloat16 where they enter matrices, counted on the meta
    device. Time: 6 operations per multiplication and token (8 with checkpointing), then a ring that
    sends every gradient twice; nothing overlaps and nothing else takes time, so it is a floor.
    """
    total = size_of(model)
    bytes_of = {o.kind: 4 * len({*o.kept} - {"step"}) for o in OPTIMIZERS.values()}
    states = sum(
        bytes_of[type(optimizer)] * p.numel()
        for optimizer in make_optimizers(c, model, torch.device("cpu"))
        for group in optimizer.param_groups
        for p in group["params"]
    )
    activations = activation_bytes(c)
    print(f"\n{gpu} at {reached:.0%} of its operations; {c.micro_tokens} tokens at a time:")
    print("  GPUs  GB per GPU  of these activations  GB sent per step     tokens/s      hours")
    found = {}
    for n in counts:
        memory = 8 * total + states / (n if c.shard else 1) + activations
        compute = (8 if c.checkpointing else 6) * macs * c.tokens_per_step / n
        sent = 2 * (n - 1) / n * 4 * total
        took = compute / card.flops / reached + sent / (card.inside if n <= 8 else card.between)
        row = found[n] = {
            "gigabytes": memory / 1e9, "activations": activations / 1e9, "sent": sent / 1e9,
            "tokens_per_s": c.tokens_per_step / took, "hours": took * c.max_steps / 3600,
        }  # fmt: skip
        print(
            f"{n:6d}  {row['gigabytes']:10.1f}  {row['activations']:20.1f}  {row['sent']:16.2f}"
            f"  {row['tokens_per_s']:11,.0f}  {row['hours']:9,.1f}"
            + "  does not fit" * (memory > card.memory)
        )
    return found


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
