"""A spiking language model: tokens in, logits out, from leaf to root.

    tokens -> embed (binary spikes, or float) -> blocks -> readout -> logits by the tied embedding

A token is one time step. `model(tokens, state)` serves training, evaluation, prefill and
generation. A text gives the same logits whole, split or token by token.
Shapes: B sequences, T tokens, D width of the residual stream, E width of the embedding.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import config
import spark  # noqa: F401  registers its block
from blocks import BLOCKS, SETTINGS, Population
from cell_bridge import identity
from kernels import Events
from lif import Linear, Report, Seen, Synapse, deliver
from traits import IGNORED, build, cross_entropy, numbers_of

STRESS_DECAY = 0.99  # per step, of the moving average that is the environment's stress


@dataclass(frozen=True)
class ModelConfig(*reversed(SETTINGS)):  # the last base's settings come first; then:
    # model
    block: str = "sam"  # sam: Real Sam | whale: SpikeWhale | spark: NeuronSpark | snn | gpt
    vocab_size: int = 4096  # tokens the embedding has room for; the tokenizer may use fewer
    n_embd: int = 256  # width of the tied embedding
    n_hidden: int = 512  # residual stream's width (whale: n_embd); sam, whale: neurons per block
    n_layer: int = 6  # blocks
    encoder: str = "spikes"  # spikes: 1[sigmoid(embedding) > 1/2] | float: the embedding as it is
    embed_gain: float = 1.0  # factor on a float embedding as it enters the blocks; for Muon
    traits: str = "none"  # of traits.py, name:numbers ..., such as engram:8192 memory:64 jepa
    checkpointing: bool = False  # backward computes a part's inner values again: less memory
    # firing rate
    rate_target: float = 0.1  # spikes per neuron and token; synops: triggered share of synapses
    rate_weight: float = 10.0  # weight of the penalty (rate - target)^2, summed over layers
    rate_penalty: str = "both"  # both | above: per layer | below: per neuron | synops: model, above
    rate_floor: float = 0.0  # a neuron that fires less than this is pushed up as well; 0: none

    CHOICES = {"block": BLOCKS, "encoder": ("spikes", "float")}
    CHOICES |= {"rate_penalty": ("both", "above", "below", "synops")}
    RANGE = {name: (1, math.inf) for name in ("vocab_size", "n_embd", "n_hidden")}
    RANGE |= {"n_layer": (1, 1000)}

    def __post_init__(self):
        config.check(self)
        numbers_of(self.traits)
        heads = BLOCKS[self.block].heads
        if heads and self.n_hidden % (getattr(self, heads) or 1):
            raise ValueError(
                f"n_hidden {self.n_hidden} must be a multiple of {heads} {getattr(self, heads)}"
            )
        if self.homeostasis and self.block != "sam":
            raise ValueError("homeostasis moves the thresholds of block=sam")
        if self.beta_low > self.beta_high:
            raise ValueError("beta_low must not be larger than beta_high")


def spike_encode(x):
    """Binary spikes 1[sigmoid(x) > 1/2]; the gradient is the sigmoid's (straight-through)."""
    p = torch.sigmoid(x)
    return (x > 0).to(x.dtype) + (p - p.detach())  # p - p is exactly 0: the spikes stay binary


def run(part, x, state, seen, recompute=False):
    """What a part returns, and a Report of its own. With `recompute` it stores none of its inner
    values: backward runs it again."""

    def once(x, state):
        report = Report()
        return *part(x, state, seen, report), report

    return checkpoint(once, x, state, use_reentrant=False) if recompute else once(x, state)


class SpikingLM(nn.Module):
    """Embedding, blocks and tied readout around whichever block the config names, and its traits.

    Everything between embedding and readout is a part: (x, state, seen, report) -> (x, state).
    """

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        block = BLOCKS[c.block]
        D = getattr(c, block.width)  # of the residual stream
        self.embedding = nn.Embedding(c.vocab_size, c.n_embd)
        # bits of a spike code flip too easily near 0; a float embedding starts as GPT-2's does
        nn.init.normal_(self.embedding.weight, std=1 / 16 if c.encoder == "spikes" else 0.02)
        self.head = self.events = None
        if c.head == "spikes":
            if c.n_embd != D:
                raise ValueError("head=spikes needs n_embd equal to the residual stream's width")
            self.head = Population(D, c, True, c.beta_high)
            # tied, but in memory a row per neuron of the head: what generation reads
            weight = self.embedding.weight.data.t().contiguous().t()
            self.embedding.weight = nn.Parameter(weight)
        self.proj_in = self.proj_out = None
        if c.encoder == "spikes":
            self.proj_in = Synapse(c.n_embd, D)
        elif c.n_embd != D:
            self.proj_in = Linear(c.n_embd, D)
        # the parts, in the order in which a token passes them
        self.parts = nn.ModuleDict(build(c.traits, "before", D, vocab_size=c.vocab_size))
        for i in range(c.n_layer):
            self.parts[f"block{i}"] = block(c, i)
        last = self.blocks[-1].sites[-1] if self.blocks[-1].sites and block.shows_spikes else D
        if block.closing:
            self.parts["closing"] = block.closing(c)
        self.parts.update(build(c.traits, "after", D, last=last, P=self.identity))
        self.norm = nn.Identity() if block.has_norm else nn.LayerNorm(D)
        if c.n_embd != D:
            self.proj_out = Linear(D, c.n_embd)
        self.ahead = nn.ModuleDict(build(c.traits, "ahead", D))  # what adds a loss in training
        parts = self.parts.values()  # of each spiking layer the neurons, and a neuron's synapses
        self.sites = [n for part in parts for n in getattr(part, "sites", ())]
        self.fan_out = [n for part in parts for n in getattr(part, "fan_out", ())]
        if self.head is not None and c.spikes:
            self.sites, self.fan_out = [*self.sites, D], [*self.fan_out, c.vocab_size]
        if c.rate_penalty == "synops" and len(self.sites) > len(self.fan_out):
            raise ValueError("rate_penalty=synops takes a block that counts synapses, as snn does")
        # what `observe` keeps; saved with the model, frozen at evaluation
        self.register_buffer("stress", torch.ones(()))
        self.register_buffer("rate", torch.full((sum(self.sites),), c.rate_target))

    @property
    def blocks(self):
        return [part for name, part in self.parts.items() if name.startswith("block")]

    @property
    def identity(self):
        """P (neurons of all layers, programs x draws) of neurons set by gene programs, or None."""
        P = [block.modulation.P for block in self.blocks if getattr(block, "modulation", None)]
        return torch.cat(P) if P else None

    def adopt(self, scores):
        """Take the identities of the neurons from a virtual cell, in place of the synthetic one:
        scores (perturbed genes, programs), the first that checkpoint.load_cell returns."""
        if self.identity is None:
            raise ValueError("a cell sets the neurons of block=whale, unless modulation=none")
        for i, block in enumerate(self.blocks):
            shuffle = self.config.modulation == "shuffled"
            block.modulation.P.copy_(identity(scores, self.config.n_hidden, i, shuffle))
        if "progsem" in self.parts:
            self.parts["progsem"].P.copy_(self.identity)

    @torch.no_grad()
    def prepare(self, dtype=torch.float32, compile=False):
        """For generation. Stores the matrices fed by spikes in `dtype`; on a CPU, block snn without
        traits then computes single tokens by kernels.Events, with `compile` in a compiled function.
        Call it last, and again after a change of weights or device. ValueError if nothing is there
        to compile."""
        for part in self.modules():
            if isinstance(part, Synapse):
                part.weight.data = part.weight.data.to(dtype)
        if self.head is not None and self.config.spikes:
            self.embedding.weight.data = self.embedding.weight.data.to(dtype)
        alike = self.config.block == "snn" and len(self.parts) == len(self.blocks)
        if alike and self.config.spikes and self.stress.device.type == "cpu":
            self.events = Events(self, compile)
        elif compile:
            raise ValueError("--compile is for block snn, without traits, on a CPU: leave it out")

    def forward(self, tokens, state=None):
        """tokens (B, T) int64; state as returned by an earlier call, or None for silence.

        Returns logits (B, T, vocabulary), the state after the last token ({name of a part or
        "readout": its state}) and a Report.
        """
        one_token = state and tokens.shape[1] == 1 and not torch.is_grad_enabled()
        if one_token and self.events and len(tokens) <= self.events.texts:
            return self.events(tokens, state)
        x, report = self.embed(tokens)
        seen, updates = Seen(tokens, self.stress), {}
        state, after = state or {}, {}
        recompute = self.config.checkpointing and torch.is_grad_enabled()
        for name, part in self.parts.items():
            y, after[name], own = run(part, x, state.get(name), seen, recompute)
            if not getattr(part, "sites", ()):
                own.rates.clear()  # `rate` has no room for neurons that `sites` does not name
            report.add(own)
            seen = seen._replace(**own.shown)
            if tokens.shape[1] > 1 and not torch.is_grad_enabled() and x.shape == y.shape:
                updates[name] = (y - x).norm(dim=-1).mean()
            x = y
        for name, norm in updates.items():  # a part's share of all that the residual stream gains
            report.log[f"share {name}"] = norm / sum(updates.values())
        report.hidden = x
        logits, after["readout"] = self.readout(x, state.get("readout"), report)
        return logits, {name: x for name, x in after.items() if x is not None}, report

    def embed(self, tokens):
        """tokens (B, T) -> what enters the first part (B, T, D), and a fresh Report."""
        report = Report()
        x = self.embedding(tokens).to(self.stress.dtype)  # (B, T, E)
        x = spike_encode(x) if self.config.encoder == "spikes" else self.config.embed_gain * x
        return (x if self.proj_in is None else self.proj_in(x, report)), report

    def readout(self, x, state, report):
        """What leaves the last part (..., D) -> logits (..., vocabulary) and the state."""
        x, now = self.norm(x), None
        if self.head is not None:
            x, now = self.head(x, state, report)
            if self.config.spikes:
                return deliver(x, self.embedding.weight.t(), report), now
        if self.proj_out is not None:
            x = self.proj_out(x, report)  # (..., E)
        report.macs += self.embedding.weight.numel()
        return F.linear(x, self.embedding.weight), now

    def loss(self, logits, targets, report):
        """Cross-entropy in nats per token, and a dictionary of what training adds to it. The rate
        penalty uses the rates of the step before, which `observe` keeps."""
        losses = dict(report.losses)
        if report.rates and self.config.rate_weight:
            losses["rates"] = self.rate_loss(report.rates)
        for name, part in self.ahead.items():
            losses[name] = part.loss(report, targets, lambda h: self.readout(h, None, Report())[0])
        return cross_entropy(logits, targets), losses

    def rate_loss(self, rates):
        """The penalty of rate_penalty on rates, one (N,) per spiking layer.

        Its gradient is that of rate_weight * (rate - target)^2, but 2 * (rate - target) is that of
        the step before: so it is linear in the rate, and the same for any micro-batches.
        """
        c, before, total = self.config, self.rate.split(self.sites), 0.0
        floor = c.rate_target if c.rate_penalty == "below" else c.rate_floor
        for old, rate in zip(before, rates):  # per neuron (SpikeWhale): none may die
            total = total + 2 * c.rate_weight * ((old - floor).clamp(max=0) * rate).mean()
        if c.rate_penalty == "below":
            return total
        if c.rate_penalty == "synops":  # of the whole model
            before, rates = [self.synop_share(before)], [self.synop_share(rates)]
        for old, rate in zip(before, rates):  # of the layer (Real Sam)
            pressure = old.mean() - c.rate_target
            pressure = pressure if c.rate_penalty == "both" else pressure.clamp(min=0)
            total = total + 2 * c.rate_weight * (pressure * rate).mean()
        return total

    def synop_share(self, rates):
        """The share of the synapses in spike-fed matrices that spikes trigger at such rates, one
        (N,) per spiking layer."""
        triggered = sum(rate.sum() * n for rate, n in zip(rates, self.fan_out))
        return triggered / sum(len(rate) * n for rate, n in zip(rates, self.fan_out))

    @torch.no_grad()
    def observe(self, nats, rates):
        """Keep what training feeds back beside gradients: stress (Real Sam) and firing rates.

        stress = moving average of nats / ln(vocabulary), within 0..1; no formula is published, this
        one is ours. rates: spikes per neuron and token of the step, of all layers, for the penalty
        and for homeostasis.
        """
        c = self.config
        self.rate.copy_(rates)
        normalised = min(max(nats / math.log(c.vocab_size), 0.0), 1.0)
        self.stress.mul_(STRESS_DECAY).add_((1 - STRESS_DECAY) * normalised)
        if c.homeostasis:
            for block, rate in zip(self.blocks, rates.split(self.sites)):
                block.adapt(rate)

    @torch.no_grad()
    def score(self, tokens, length, counted=None):
        """How well the model predicts tokens (n,), a text that begins with an end token.

        Rows of `length` tokens, each from silence, overlap by one token, so that every token
        after the first is scored once; or of these only those whose `counted` (n,) is not 0.
        Returns a dictionary: nats (total), tokens (scored), rate (spikes per neuron and token, per
        layer), synops and synapses (per token: synaptic operations triggered, and their number if
        all neurons fired), macs (float-fed, per token), log (the report's, averaged).
        """
        n = len(tokens) - 1
        tokens = targets = torch.from_numpy(tokens.astype("int64")).to(self.stress.device)
        if counted is not None:
            targets = tokens.masked_fill(torch.from_numpy(counted == 0).to(tokens.device), IGNORED)
        n_counted = (targets[1:] != IGNORED).sum().item()
        if not n_counted:
            raise ValueError("nothing to score: the text is empty, or none of its tokens counts")
        step = max(1, 8192 // length) * length  # whole rows; the rest is a row of its own
        sizes = [*filter(None, [*[step] * (n // step), n % step // length * length, n % length])]
        nats, rate, synops, macs, log = 0.0, 0, 0.0, 0, {}
        for x, y in zip(tokens[:-1].split(sizes), targets[1:].split(sizes)):
            logits, _, report = self(x.view(-1, min(length, len(x))))
            nats += F.cross_entropy(logits.flatten(0, 1).float(), y, reduction="sum").item()
            share = x.numel() / n
            rate = rate + share * torch.tensor([r.mean().item() for r in report.rates])
            synops += share * sum(triggered.item() for triggered, _ in report.synapses)
            macs += share * report.macs
            for name, value in report.log.items():
                log[name] = log.get(name, 0.0) + share * float(value)
        synapses = sum(every for _, every in report.synapses)
        totals = {"nats": nats, "tokens": n_counted, "synops": synops, "synapses": synapses}
        return totals | {"rate": rate.tolist(), "macs": round(macs), "log": log}

    @torch.no_grad()
    def generate(
        self, tokens, state=None, temperature=1.0, top_k=0, top_p=1.0, generator=None, vocab=None
    ):
        """Yield (token (B, 1), state) for ever, in constant time and memory per token.

        tokens (B, T) is the prompt after `state`. The yielded state has seen all but the yielded
        token, so a chat goes on with generate([token, more ...], state). vocab: draw from the first
        `vocab` tokens only, for a tokenizer that uses fewer than the embedding has.
        """
        for chunk in tokens.split(512, dim=1):  # so that a long prompt takes no more memory
            logits, state, _ = self(chunk, state)
        while True:
            token = pick(logits[:, -1, :vocab], temperature, top_k, top_p, generator)
            yield token, state
            logits, state, _ = self(token, state)


def pick(logits, temperature, top_k, top_p, generator):
    """Draw a token (B, 1) from logits (B, V): temperature 0 takes the best; top_k 0 keeps all;
    top_p keeps the fewest tokens that hold that much probability (Holtzman et al. 2019)."""
    logits = logits.float()
    if logits.isnan().any():
        raise ValueError("the model's logits are not numbers: take an older checkpoint")
    if temperature < 1e-4:  # also where division would overflow
        return logits.argmax(-1, keepdim=True)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1:
        p = logits.softmax(-1)
        k = min(1000, p.shape[-1])  # to sort all takes long, and is seldom needed
        p, order = p.topk(k if p.topk(k).values.sum(-1).min() > top_p else p.shape[-1])
        rest = p.cumsum(-1) - p >= max(top_p, 1e-9)  # the likeliest stays, however small top_p is
        value = logits.gather(-1, order).masked_fill(rest, -math.inf)
        logits = torch.full_like(logits, -math.inf).scatter(-1, order, value)
    below = logits.softmax(-1).cumsum(-1)  # faster than torch.multinomial, which draws V numbers
    drawn = 1 - torch.rand(len(below), 1, generator=generator, device=below.device)  # never 0
    return torch.searchsorted(below, drawn * below[:, -1:])
