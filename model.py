"""A spiking language model: tokens in, logits out, from leaf to root.

    tokens -> embed (binary spikes, or float) -> blocks -> readout -> logits by the tied embedding

A token is one time step. `model(tokens, state)` is the only forward: it serves training,
evaluation, prefill and generation, and whole = split = one token at a time.
Shapes: B sequences, T tokens, D width of the residual stream, E width of the embedding.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from blocks import BLOCKS, MembraneReadout, Population
from cell_bridge import identity
from lif import RESETS, SURROGATES, Linear, Report, Synapse, deliver
from spark import SparkOutput
from traits import (
    HRM, IGNORED, JEPA, MTP, Engram, Kuramoto, Memory, MoE, ProgSem, SpikeAttn, cross_entropy,
)  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    # model
    block: str = "sam"  # sam: Real Sam | whale: SpikeWhale | spark: NeuronSpark | snn | gpt
    vocab_size: int = 4096  # tokens the embedding has room for; the tokenizer may use fewer
    n_embd: int = 256  # width of the tied embedding
    n_hidden: int = 512  # width of the residual stream = neurons per block
    n_layer: int = 6  # blocks
    encoder: str = "spikes"  # spikes: 1[sigmoid(embedding) > 1/2] | float: the embedding as it is
    embed_gain: float = 1.0  # factor on a float embedding as it enters the stream, for Muon
    dropout: float = 0.0  # training drops this share of what enters the stream; 0 is off
    residual: str = "gated"  # sam: gated | plain | none (every block replaces its input)
    norm: bool = True  # layer norm before each block and the readout
    # neurons
    rec_heads: int = 1  # recurrent synapses: 1 full matrix | h blocks of n_hidden/h | 0 none
    beta_low: float = 0.01  # membrane decay per token: at the start spread over the neurons ...
    beta_high: float = 0.6  # ... from low to high, then learned per neuron
    theta: float = 1.0  # firing threshold
    surrogate: str = "triangle"  # derivative put in place of the step's: a name in lif.py
    slope: float = 1.0  # its slope
    reset: str = "soft"  # sam, whale: what a spike does to the membrane: a name in lif.py
    reset_grad: bool = True  # let the gradient flow through the reset too
    backend: str = "auto"  # the scan: auto | triton | torch
    checkpointing: bool = False  # backward computes a part's inner values again: less memory
    # neuron diversity and environment (Real Sam)
    diversity: float = 0.4  # sigma of the log-normal factor that each neuron answers stress with
    stress_gain: float = 0.3  # kappa: gain = 1 + kappa * stress * factor; 0 switches stress off
    stress_decay: float = 0.99  # stress is this moving average, per step, of loss / ln(vocabulary)
    # firing rate
    rate_target: float = 0.1  # spikes per neuron and token; work: triggered share of synapses
    rate_weight: float = 10.0  # weight of the penalty (rate - target)^2, summed over layers
    rate_penalty: str = "both"  # both | above: a layer's | below: a neuron's | work: snn's, above
    homeostasis: float = 0.0  # sam V3: thresholds move by this * (rate - target) per step; 0 is off
    # snn
    attention: int = 0  # heads of 32 that look back over the window, fed by spikes; 0 is none
    attention_every: int = 1  # in the last of every so many blocks
    levels: int = 3  # neurons of a population, at thresholds theta, 2 theta, ...; 1 is plain spikes
    head: str = "float"  # what the readout's matrix is fed: float | spikes, of one more population
    spikes: bool = True  # False: the float twin, the same block with graded signals
    noise: float = 0.0  # even noise on membranes in training, so many thetas wide; 0 is off
    # whale
    modulation: str = "program"  # gene programs set neurons | shuffled: control | none: all equal
    spike_input_gain: float = 2.5  # starting scale of the synapses into layers fed by spikes
    clamp: float = 30.0  # bound of the soft clamp on the membrane; 0 is off
    # traits: 0 or False is off
    engram: int = 0  # rows per hash table of the n-gram memory
    engram_heads: int = 2  # tables per order (2- and 3-grams)
    engram_width: int = 64  # width of a row
    hrm: int = 0  # steps of iterative refinement
    spike_attn: int = 0  # heads of spiking linear attention
    progsem: int = 0  # slots mixed by the activity of gene programs; 18 where the bridge has them
    kuramoto: int = 0  # coupled oscillators
    moe: int = 0  # spike-routed experts, two of them per token
    moe_width: int = 256  # width of an expert
    memory: int = 0  # slow neurons that persist from call to call
    mtp: int = 0  # further tokens that training predicts
    jepa: bool = False  # training predicts the next hidden state
    # gpt
    n_head: int = 8  # attention heads
    d_ff: int = 1112  # width of the feed-forward part, here and in spark
    window: int = 512  # tokens that attention sees, here and in snn: the present one and before it
    # spark
    n_state: int = 8  # hidden neurons per channel
    k_max: int = 16  # frames within a token, at most
    adaptive: bool = True  # a token runs as many frames as it expects to need; else always k_max
    ponder_weight: float = 0.01  # weight of E[K], the frames that a token expects to run

    def __post_init__(self):
        for name, allowed in (
            ("block", tuple(BLOCKS)),
            ("encoder", ("spikes", "float")),
            ("head", ("float", "spikes")),
            ("residual", ("gated", "plain", "none")),
            ("rate_penalty", ("both", "above", "below", "work")),
            ("modulation", ("program", "shuffled", "none")),
            ("surrogate", tuple(SURROGATES)),
            ("reset", tuple(RESETS)),
            ("backend", ("auto", "triton", "torch")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        at_least_1 = "vocab_size n_embd n_hidden n_layer n_head d_ff window n_state k_max levels "
        for name in (at_least_1 + "attention_every engram_heads engram_width moe_width").split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in "engram hrm spike_attn progsem kuramoto moe memory mtp".split():
            if not 0 <= getattr(self, name) < 2**31:
                raise ValueError(f"{name} must be at least 0 and below 2**31")
        if self.moe == 1:
            raise ValueError("moe must be 0 or at least 2: a token goes to two experts")
        for name in ("n_layer", "k_max", "hrm", "mtp", "engram_heads"):
            if getattr(self, name) > 1000:
                raise ValueError(f"{name} must be at most 1000, got {getattr(self, name)}")
        heads = {"gpt": "n_head", "snn": "attention"}.get(self.block, "rec_heads")
        if getattr(self, heads) < 0 or self.n_hidden % (getattr(self, heads) or 1):
            raise ValueError(
                f"n_hidden {self.n_hidden} must be a multiple of {heads} {getattr(self, heads)}"
            )
        if self.block == "snn" and self.attention and self.attention_every > self.n_layer:
            raise ValueError(
                f"attention_every {self.attention_every} leaves none of {self.n_layer} blocks"
                " with attention; --attention=0 says so"
            )
        if self.homeostasis and self.block not in ("sam", "gpt"):
            raise ValueError("homeostasis moves the thresholds of block=sam")
        if self.rate_penalty == "work" and self.block not in ("snn", "gpt"):
            raise ValueError("rate_penalty=work counts the synapses of block=snn")
        if not 0 < self.beta_low <= self.beta_high < 1:
            raise ValueError("0 < beta_low <= beta_high < 1 must hold for the membrane's decay")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        if self.slope <= 0 or self.theta <= 0 or self.noise < 0:
            raise ValueError("slope and theta must be positive, noise at least 0")


def spike_encode(x):
    """Binary spikes 1[sigmoid(x) > 1/2]; the gradient is the sigmoid's (straight-through)."""
    p = torch.sigmoid(x)
    return (x > 0).to(x.dtype) + (p - p.detach())  # p - p is exactly 0: the spikes stay binary


def recomputed(part, x, state, report):
    """part(x, state, report) that keeps none of its inner values: backward computes them again."""
    before = report.fresh()  # as it is now, when the part runs again too

    def run(x, state):
        own = before.fresh()  # so that a second run counts into nothing
        return *part(x, state, own), own

    y, state, own = checkpoint(run, x, state, use_reentrant=False)
    report.add(own)
    return y, state


class SpikingLM(nn.Module):
    """Embedding, blocks and tied readout around whichever block the config names, and its traits.

    Everything between embedding and readout is a part: (x, state, report) -> (x, state).
    """

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        D = c.n_embd if c.block == "whale" else c.n_hidden  # width of the stream
        self.embedding = nn.Embedding(c.vocab_size, c.n_embd)
        # bits of a spike code flip too easily near 0; a float embedding starts as GPT-2's does
        nn.init.normal_(self.embedding.weight, std=1 / 16 if c.encoder == "spikes" else 0.02)
        self.head = None
        if c.head == "spikes":
            if c.n_embd != D:
                raise ValueError("head=spikes needs n_embd equal to the width of the stream")
            self.head = Population(D, c, True, c.beta_high)
            # tied, but in memory a row per neuron of the head: what generation reads
            weight = self.embedding.weight.data.t().contiguous().t()
            self.embedding.weight = nn.Parameter(weight)
        self.proj_in = self.proj_out = None
        if c.encoder == "spikes":
            self.proj_in = Synapse(c.n_embd, D)
        elif c.n_embd != D:
            self.proj_in = Linear(c.n_embd, D)
        self.parts = nn.ModuleDict()  # in the order in which a token passes them
        if c.engram:
            sizes = c.engram, c.engram_heads, c.engram_width
            self.parts["engram"] = Engram(D, *sizes, vocab_size=c.vocab_size)
        for i in range(c.n_layer):
            self.parts[f"block{i}"] = BLOCKS[c.block](c, i)
        # neurons per spiking layer; none where a block does not name them
        self.sites = [n for block in self.blocks for n in getattr(block, "sites", [])]
        if c.block == "whale":
            self.parts["membranes"] = MembraneReadout(c)
        if c.hrm:
            self.parts["hrm"] = HRM(D, c.hrm)
        if c.spike_attn:
            self.parts["spike_attn"] = SpikeAttn(D, c.spike_attn, backend=c.backend)
        if c.progsem:
            self.parts["progsem"] = ProgSem(D, c.progsem, P=self.identity)
        if c.kuramoto:
            self.parts["kuramoto"] = Kuramoto(D, c.kuramoto)
        if c.moe:
            neurons = self.sites[-1] if self.sites and c.block != "spark" else D
            self.parts["moe"] = MoE(D, c.moe, c.moe_width, last=neurons, backend=c.backend)
        if c.memory:
            self.parts["memory"] = Memory(D, c.memory, backend=c.backend)
        if c.block == "spark":
            self.parts["output"] = SparkOutput(c)
            self.sites += self.parts["output"].sites
        self.norm = nn.LayerNorm(D) if c.norm else nn.Identity()
        if c.n_embd != D:
            self.proj_out = Linear(D, c.n_embd)
        self.mtp = MTP(D, c.mtp) if c.mtp else None
        self.jepa = JEPA(D) if c.jepa else None
        # what `observe` keeps; saved with the model, frozen at evaluation
        self.register_buffer("stress", torch.ones(()))
        self.sites += [D] if self.head is not None else []
        self.register_buffer("rate", torch.full((sum(self.sites),), c.rate_target))

    @property
    def blocks(self):
        return [part for name, part in self.parts.items() if name.startswith("block")]

    @property
    def identity(self):
        """P (neurons of all layers, programs x draws) of neurons set by gene programs, or None."""
        bridged = [
            block.modulation.P for block in self.blocks if getattr(block, "modulation", None)
        ]
        return torch.cat(bridged) if bridged else None

    def adopt(self, scores):
        """Take the identities of the neurons from a virtual cell: scores (perturbations, programs)
        as checkpoint.load_cell returns them, in place of the synthetic screen's."""
        if self.identity is None:
            raise ValueError(
                "a cell needs neurons set by gene programs: block=whale, modulation=program"
            )
        for i, block in enumerate(self.blocks):
            shuffle = self.config.modulation == "shuffled"
            block.modulation.P.copy_(identity(scores, self.config.n_hidden, i, shuffle))
        if self.config.progsem:
            self.parts["progsem"].P.copy_(self.identity)

    def halve_synapses(self):
        """Keep the rows that spikes read in bfloat16: half the memory, half the bytes per spike."""
        rows = [part.weight for part in self.modules() if isinstance(part, Synapse)]
        if self.head is not None and self.config.spikes:
            rows.append(self.embedding.weight)
        for weight in rows:
            weight.data = weight.data.bfloat16()

    def forward(self, tokens, state=None):
        """tokens (B, T) int64; state as returned by an earlier call, or None for silence.

        Returns logits (B, T, vocabulary), the state after the last token (a list, an entry per
        part and one for the readout) and a Report.
        """
        x, report = self.embed(tokens)
        state, after, updates = state or [None] * (len(self.parts) + 1), [], {}
        for (name, part), before in zip(self.parts.items(), state):
            if self.config.checkpointing and torch.is_grad_enabled():
                y, now = recomputed(part, x, before, report)
            else:
                y, now = part(x, before, report)
            if name.startswith("block") and not hasattr(part, "sites"):
                report.rate.clear()  # of neurons that `sites` does not name: nobody asks for them
            if tokens.shape[1] > 1 and not torch.is_grad_enabled() and x.shape == y.shape:
                updates[name] = (y - x).norm(dim=-1).mean()
            x = y
            after.append(now)
        for name, norm in updates.items():  # a part's share of all that is added to the stream
            report.log[f"share {name}"] = norm / sum(updates.values())
        report.stream = x
        logits, now = self.readout(x, state[-1], report)
        return logits, after + [now], report

    def embed(self, tokens):
        """tokens (B, T) -> what enters the first part (B, T, D), and a fresh Report."""
        report = Report(tokens, self.stress)
        x = self.embedding(tokens).to(self.stress.dtype)  # (B, T, E)
        if self.config.encoder == "spikes":
            x = spike_encode(x)
        else:
            x = self.config.embed_gain * x
        x = x if self.proj_in is None else self.proj_in(x, report)
        return F.dropout(x, self.config.dropout, self.training), report

    def readout(self, x, state, report):
        """What leaves the last part (..., D) -> logits (..., vocabulary) and the state."""
        x, now = self.norm(x), ()
        if self.head is not None:
            x, now = self.head(x, state, report)
            if self.config.spikes:
                return deliver(x, self.embedding.weight.t(), report), now
        if self.proj_out is not None:
            x = self.proj_out(x, report)  # (..., E)
        report.macs += self.embedding.weight.numel()
        return F.linear(x, self.embedding.weight), now

    def loss(self, logits, targets, report):
        """Cross-entropy in nats per token (alone the basis of bits per byte), and a dictionary of
        what training adds to it.

        rates: the penalty of rate_penalty. Its gradient is that of rate_weight * (rate - target)^2,
        with the rate of the step before in the outer derivative: that makes it linear in the
        rate, hence the same however a step is cut into micro-batches and processes.
        """
        nats = cross_entropy(logits, targets)
        c, losses = self.config, dict(report.losses)
        if report.rate and c.rate_weight and c.rate_penalty == "work":
            pressure = (self.work(self.rate.split(self.sites)) - c.rate_target).clamp(min=0)
            losses["rates"] = 2 * c.rate_weight * pressure * self.work(report.rate)
        elif report.rate and c.rate_weight:
            losses["rates"] = 0.0
            for rate, before in zip(report.rate, self.rate.split(self.sites)):
                if c.rate_penalty == "below":  # per neuron (SpikeWhale): none may die
                    pressure = (before - c.rate_target).clamp(max=0)
                else:  # of the layer (Real Sam)
                    pressure = before.mean() - c.rate_target
                    pressure = pressure.clamp(min=0) if c.rate_penalty == "above" else pressure
                losses["rates"] += 2 * c.rate_weight * (pressure * rate).mean()
        if self.mtp:
            losses["mtp"] = self.mtp.loss(
                report, targets, lambda h: self.readout(h, None, Report())[0]
            )
        if self.jepa:
            losses["jepa"] = self.jepa.loss(report)
        return nats, losses

    def work(self, rates):
        """The share of all synapses that spike-fed matrices have which is triggered at such rates,
        one (N,) per spiking layer: what is spared is the optimiser's to choose."""
        fan_out = [n for block in self.blocks for n in getattr(block, "fan_out", [])]
        fan_out += [self.config.vocab_size] if self.head is not None else []
        triggered = sum(rate.sum() * n for rate, n in zip(rates, fan_out))
        return triggered / sum(len(rate) * n for rate, n in zip(rates, fan_out))

    @torch.no_grad()
    def observe(self, nats, rates):
        """What training tells the neurons beside gradients: the environment's stress (Real Sam).

        stress = moving average of nats / ln(vocabulary), within 0..1; the published system gives
        no formula, so this one is ours. rates: spikes per neuron and token of the step, the
        layers one after the other; the penalty looks at them, and with homeostasis on the
        thresholds do.
        """
        c = self.config
        self.rate.copy_(rates)
        strain = min(max(nats / math.log(c.vocab_size), 0.0), 1.0)
        self.stress.mul_(c.stress_decay).add_((1 - c.stress_decay) * strain)
        if c.homeostasis:
            for block, rate in zip(self.blocks, rates.split(self.sites)):
                block.adapt(rate)

    @torch.no_grad()
    def score(self, tokens, length, counted=None):
        """How well the model predicts tokens (n,), a stream that begins with an end token.

        Rows of `length` tokens, each from silence, overlap by one token, so that every token
        after the first is scored once; or of these only those whose `counted` (n,) is not 0.
        Returns a dictionary: nats (total), tokens (scored), rate (spikes per neuron and token, per
        layer), synops and synapses (per token: synaptic operations triggered, and their number if
        all neurons fired), macs (float-fed, per token), log (the report's, averaged).
        """
        device, n = self.stress.device, len(tokens) - 1
        if n < 1:
            raise ValueError("nothing to score: the text is empty")
        tokens = torch.from_numpy(tokens.astype("int64")).to(device)
        targets = tokens
        if counted is not None:
            targets = tokens.masked_fill(torch.from_numpy(counted == 0).to(device), IGNORED)
        n_counted = (targets[1:] != IGNORED).sum().item()
        if not n_counted:
            raise ValueError("nothing to score: no token counts")
        whole = n // length * length
        batches = []  # of rows of the full length, then the rest as a row of its own
        if whole:
            x, y = tokens[:whole].view(-1, length), targets[1 : whole + 1].view(-1, length)
            batches += zip(x.split(max(1, 8192 // length)), y.split(max(1, 8192 // length)))
        if whole < n:
            batches.append((tokens[None, whole:-1], targets[None, whole + 1 :]))
        nats, rate, synops, macs, log = 0.0, 0, 0.0, 0, {}
        for x, y in batches:
            logits, _, report = self(x)
            nats += F.cross_entropy(
                logits.flatten(0, 1).float(), y.flatten(), reduction="sum"
            ).item()
            rate = rate + x.numel() * torch.tensor([r.mean().item() for r in report.rate])
            synops += x.numel() * sum(s.item() for s in report.synops)
            macs += x.numel() * report.macs
            for name, value in report.log.items():
                log[name] = log.get(name, 0.0) + float(value) * x.numel() / n
        return {
            "nats": nats,
            "tokens": n_counted,
            "rate": (rate / n).tolist(),
            "synops": synops / n,
            "synapses": sum(report.synapses),
            "macs": round(macs / n),
            "log": log,
        }

    @torch.no_grad()
    def generate(
        self, tokens, state=None, temperature=1.0, top_k=0, top_p=1.0, generator=None, vocab=None
    ):
        """Yield (token (B, 1), state) for ever, in constant time and memory per token.

        tokens (B, T) is the prompt after `state`. The yielded state has seen all but the yielded
        token, so a chat goes on with generate([token, more ...], state). vocab: draw only from
        so many tokens, for a tokenizer that uses fewer than the embedding has.
        """
        for chunk in tokens.split(512, dim=1):  # a long prompt in pieces: memory stays flat
            logits, state, _ = self(chunk, state)
        while True:
            token = pick(logits[:, -1, :vocab], temperature, top_k, top_p, generator)
            yield token, state
            logits, state, _ = self(token, state)


def find_device(name):
    """The torch.device called auto, cpu, cuda or mps; ValueError where there is none."""
    mps = torch.backends.mps.is_available()
    there = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    if name == "auto":
        name = next(kind for kind in there if there[kind])
    if not there.get(name):
        raise ValueError(f"there is no device {name!r} here; auto takes the best there is, or cpu")
    return torch.device(name)


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
        value, order = logits.sort(descending=True)
        p = value.softmax(-1)
        rest = p.cumsum(-1) - p >= top_p
        rest[:, 0] = False  # the likeliest stays, however small top_p is
        value = value.masked_fill(rest, -math.inf)
        logits = torch.empty_like(logits).scatter(-1, order, value)
    below = logits.softmax(-1).cumsum(-1)  # faster than torch.multinomial, which draws V numbers
    drawn = 1 - torch.rand(len(below), 1, generator=generator, device=below.device)  # never 0
    return torch.searchsorted(below, drawn * below[:, -1:])
