"""Optimisers: AdamW for all, or Muon for the matrices inside blocks and traits, AdamW for the rest.

A group's "peak" is the highest learning rate that it reaches; set_lr turns it up and down.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.optim import AdamW

from lif import Synapse
from machine import has_bfloat16


class Muon(torch.optim.Optimizer):
    """Momentum whose singular values are all made about 1 (Jordan et al. 2024, "Muon").

    A matrix then moves equally far in every direction of its gradient, not almost only in the
    strongest one. torch.optim.Muon does the same, but always in bfloat16: on a processor without
    it, that takes as long as the rest of a step.
    rows_are_inputs: for the matrices of a group that are stored as (inputs, outputs).
    """

    MOMENTUM = 0.95
    A, B, C = 3.4445, -4.775, 2.0315  # x -> A x + B x^3 + C x^5, five times, ends near 1

    def __init__(self, params, lr=0.02, weight_decay=0.0, rows_are_inputs=False):
        defaults = {"lr": lr, "weight_decay": weight_decay, "rows_are_inputs": rows_are_inputs}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                momentum = state["momentum_buffer"].lerp_(p.grad, 1 - self.MOMENTUM)
                change = self.orthogonal(p.grad.lerp(momentum, self.MOMENTUM))
                outputs, inputs = p.shape[::-1] if group["rows_are_inputs"] else p.shape
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(change, alpha=-group["lr"] * max(1.0, outputs / inputs) ** 0.5)

    def orthogonal(self, x):
        """The nearest matrix to x with singular values of about 1: a Newton-Schulz iteration."""
        shorter = x.mT if len(x) > x.shape[1] else x
        y = shorter.bfloat16() if has_bfloat16(x.device.type) else shorter
        y = y / y.norm().clamp(min=1e-7)
        for _ in range(5):
            square = y @ y.mT
            polynomial = torch.addmm(square, square, square, beta=self.B, alpha=self.C)
            y = torch.addmm(y, polynomial, y, beta=self.A)
        return (y.mT if len(x) > x.shape[1] else y).to(x.dtype)


class Optimizer(NamedTuple):
    kind: type  # for the matrices inside blocks and traits; everything else has AdamW
    lr: str  # the setting that is its peak learning rate
    decay: str  # and its weight decay
    kept: tuple  # names of the tensors that it keeps for a parameter


OPTIMIZERS = {
    "adamw": Optimizer(AdamW, "lr", "weight_decay", ("step", "exp_avg", "exp_avg_sq")),
    "muon": Optimizer(Muon, "muon_lr", "muon_decay", ("momentum_buffer",)),
}


def schedule(c, step, steps):
    """Share of the peak learning rate: linear warm-up, then a cosine to min_lr at `steps`."""
    if step < c.warmup_steps:
        return (step + 1) / c.warmup_steps
    done = (step - c.warmup_steps) / max(1, steps - c.warmup_steps)
    return c.min_lr + (1 - c.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1, done)))


def make_optimizers(c, model, device):
    """AdamW for all, or another one of OPTIMIZERS for the matrices of blocks and traits and AdamW
    for the rest: embedding and readout, tables, vectors."""
    around = [m for m in (model.embedding, model.proj_in, model.proj_out) if m]
    ends = {p for m in around for p in m.parameters()}
    tables = {m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)} - ends
    synapses = {m.weight for m in model.modules() if isinstance(m, Synapse)}
    kinds = {"vector": [], "table": [], "matrix": [], "end": []}
    for name, p in model.named_parameters():
        kind = "table" if p in tables else "end" if p in ends else "matrix"
        # vectors of neurons have a rate of their own; others take the tables' plain lr
        vector = "vector" if name.endswith(model.blocks[0].neurons) else "table"
        kinds[vector if p.dim() < 2 else kind].append(p)

    def group(params, lr, decay):
        return {"params": params, "lr": lr, "peak": lr, "weight_decay": decay}

    def build(kind, groups, **options):  # sharded: ZeRO's first stage (1910.02054)
        if c.shard and dist.is_initialized():
            from torch.distributed.optim import ZeroRedundancyOptimizer  # slow to import

            return ZeroRedundancyOptimizer(groups, kind, **options)
        return kind(groups, **options)

    adamw = [
        group(kinds["end"], c.lr, c.weight_decay),
        group(kinds["table"], c.lr, 0.0),
        group(kinds["vector"], c.lr * c.neuron_lr, 0.0),
    ]
    chosen, matrices = OPTIMIZERS[c.optimizer], kinds["matrix"]
    lr, decay = getattr(c, chosen.lr), getattr(c, chosen.decay)
    inside = [group(matrices, lr, decay)]
    if chosen.kind is Muon:
        inside = [
            group([p for p in matrices if (p in synapses) == x], lr, decay) | {"rows_are_inputs": x}
            for x in (False, True)
        ]
    if chosen.kind is AdamW:
        adamw, inside = adamw + inside, []
    fused = device.type in ("cuda", "cpu")
    optimizers = [build(AdamW, adamw, betas=(0.9, c.beta2), fused=fused)]
    return optimizers + ([build(chosen.kind, inside)] if inside else [])


def set_lr(optimizers, share):
    """Set every learning rate to a share of its peak."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group["peak"] * share
