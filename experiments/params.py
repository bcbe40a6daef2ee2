"""What does a config cost? Parameters, operations per token, and a plan for a run on GPUs.

python bench.py params configs/sam_6m.py
python bench.py params configs/snn_1b.py --gpus=8
"""

from dataclasses import replace

import torch

from bench import size_of
from model import SpikingLM
from train import OPTIMIZERS, make_optimizers


def params(
    c,
    run,
    *,
    gpus: int = 0,  # plan a run of train.py on this many GPUs; 0: no plan
    gpu_flops: float = 4e14,  # operations per second that a GPU reaches in bfloat16
    gpu_link: float = 1e11,  # bytes per second at which a GPU exchanges gradients
):
    """Parameters and operations per token; on the meta device, so that any size will do.

    Attention is counted as for a token that sees the whole window.
    """
    if gpus < 0 or min(gpu_flops, gpu_link) <= 0:
        raise ValueError("gpus >= 0, gpu_flops > 0 and gpu_link > 0 must hold")
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
        if c.block == "gpt" or c.block == "snn" and c.attention:  # a token before costs as much
            per_token = model(token, state)[2].macs - report.macs  # as any other one before
            report.macs += (min(c.window, c.longest()) - 1) * per_token
    spike_fed = sum(every for _, every in report.synapses)
    print(f"per token: {spike_fed:,d} spike-fed synapses, {report.macs:,d} float multiplications")
    result = {"parameters": total, "groups": groups, "synapses": spike_fed, "macs": report.macs}
    if gpus:
        result["plan"] = plan(c, model, spike_fed + report.macs, gpus, gpu_flops, gpu_link)
    return result


def plan(c, model, macs, gpus, gpu_flops, gpu_link):
    """What a step of train.py takes on each of N GPUs: a plan to read before renting them.

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
    states /= gpus if c.shard else 1
    print(f"\nper GPU of {gpus}, {c.micro_tokens} tokens at a time:", flush=True)
    gigabytes = {"weights": 4 * total, "gradients": 4 * total, "optimiser": states}
    for name, checkpointing in (("activations", False), ("activations, checkpointing", True)):
        gigabytes[name] = activation_bytes(replace(c, checkpointing=checkpointing))
    gigabytes = {name: size / 1e9 for name, size in gigabytes.items()}
    compute = (8 if c.checkpointing else 6) * macs * c.tokens_per_step / gpus / gpu_flops
    moved = 2 * (gpus - 1) / gpus * 4 * total
    seconds = {"compute": compute, "all-reduce": moved / gpu_link}
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
    return {"gpus": gpus, "gigabytes": gigabytes, "all_reduce_bytes": moved, "seconds": seconds}


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
