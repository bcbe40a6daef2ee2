"""Traits: what may be added before or after the blocks of any model here, one class each.

A trait is built from the width d of the residual stream and the numbers in `--traits=name:numbers`;
anything else it needs of the model is a keyword argument. It has a block's forward, with x
(B, T, d) the residual stream, never spikes. MTP and JEPA, used in training only, have instead
`loss(report, targets, readout) -> scalar`. B sequences, T tokens.

Each starts as the identity, because exactly one factor of what it adds is zero. That factor has a
gradient at step 0; with two zero factors neither would have one. Each is causal, and gives the same
for a text whole, split or token by token.
"""

import inspect
import itertools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from blocks import fast_weights, in_heads
from config import pairs
from kernels import lif
from lif import Linear, Synapse, fused, rms

TRAITS = {}  # name -> class, in the order in which a token passes them


def trait(name):
    """Register a class as `--traits=name`."""

    def register(cls):
        TRAITS[name] = cls
        return cls

    return register


class Trait(nn.Module):
    place = "after"  # the blocks; or "before" them, or "ahead": it adds a loss


def numbers_of(text):
    """{name: its numbers} of a traits setting; ValueError if there can be no such traits."""
    asked = {} if text == "none" else dict(pairs(text))
    for name, numbers in asked.items():
        if name not in TRAITS:
            raise ValueError(f"there is no trait {name!r}; there are {', '.join(TRAITS)}")
        _, *sizes = inspect.signature(TRAITS[name]).parameters.values()
        sizes = [p for p in sizes if p.kind is p.POSITIONAL_OR_KEYWORD]
        if not sum(p.default is p.empty for p in sizes) <= len(numbers) <= len(sizes):
            usual = [p.name + f" ({p.default})" * (p.default is not p.empty) for p in sizes]
            raise ValueError(f"write the trait {name} as {name}:{','.join(usual)}")
        for size, number in zip(sizes, numbers):
            if not 1 <= number < 2**31:
                raise ValueError(f"{size.name} of {name} must be 1 to {2**31 - 1}, got {number}")
    return {name: asked[name] for name in TRAITS if name in asked}


def build(text, place, d, **offered):
    """{name: module} of the traits with this place; offered: what they may ask for by name."""
    built = {}
    for name, numbers in numbers_of(text).items():
        cls = TRAITS[name]
        if cls.place == place:
            asked = offered.keys() & inspect.signature(cls).parameters
            built[name] = cls(d, *numbers, **{key: offered[key] for key in asked})
    return built


def matrix(fan_in, fan_out, spread):
    """A Linear without bias: for rms(x) its outputs have this standard deviation, at the start."""
    linear = Linear(fan_in, fan_out, bias=False)
    nn.init.normal_(linear.weight, std=spread * fan_in**-0.5)
    return linear


class Derf(nn.Module):
    """A gate, (1 + erf(alpha z + b)) / 2; 0.079 for z = 0 at the start (after arXiv 2512.10938)."""

    def __init__(self, n):
        super().__init__()
        self.alpha, self.b = nn.Parameter(torch.ones(n)), nn.Parameter(-torch.ones(n))

    def forward(self, z):
        return (1 + torch.erf(self.alpha * z + self.b)) / 2


def primes_from(n, count):
    """The first `count` primes that are at least n."""
    numbers = itertools.count(max(n, 2))
    primes = (p for p in numbers if all(p % k for k in range(2, math.isqrt(p) + 1)))
    return list(itertools.islice(primes, count))


@trait("engram")
class Engram(Trait):
    """N-gram memory (arXiv 2601.07372): the last 2 and 3 tokens are hashed to rows of tables.

        mix_n = XOR over k < n of token[t-k] * m_k           n = 2, 3; m_k odd; int64 wraps
        e     = rows mix_n mod p, for each n and head        p a prime per table, all different
        gate  = Derf(<rms(W_k e), rms(x)> / sqrt(d))
        x     + W_out (gate * W_v e)                         W_out starts at 0
    All 2 x heads tables of about `rows` rows are one embedding. State: the last two tokens (B, 2);
    at the start pad tokens, vocab_size.
    """

    place = "before"

    def __init__(self, d, rows, heads=2, width=64, *, vocab_size):
        super().__init__()
        self.pad, self.heads, n = vocab_size, heads, 2 * heads * width
        odd = [0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9, 0x14D049BB133111EB]  # arbitrary otherwise
        self.register_buffer("multiplier", torch.tensor(odd))
        self.register_buffer("prime", torch.tensor(primes_from(rows, 2 * heads)))
        self.table = nn.Embedding(sum(primes_from(rows, 2 * heads)), width)
        nn.init.normal_(self.table.weight, std=width**-0.5)  # rows of length 1
        self.key, self.value, self.out = matrix(n, d, 1), matrix(n, n, 1), matrix(n, d, 0)
        self.gate = Derf(1)

    def rows_of(self, tokens, state=None):
        """tokens (B, T) int64 -> rows of the embedding (B, T, 2 heads), and the state."""
        past = tokens.new_full((len(tokens), 2), self.pad) if state is None else state
        tokens = torch.cat([past, tokens], 1)
        a, b, c = (tokens[:, 2 - k : tokens.shape[1] - k] * self.multiplier[k] for k in range(3))
        mix = torch.stack([a ^ b, a ^ b ^ c], -1).repeat_interleave(self.heads, -1)
        first = self.prime.cumsum(0) - self.prime  # where each table begins
        return first + mix % self.prime, tokens[:, -2:]  # % is never negative, unlike in C

    def forward(self, x, state, seen, report):  # (B, T, d) -> (B, T, d)
        rows, state = self.rows_of(seen.tokens, state)
        e = self.table(rows).flatten(2)
        z = (rms(self.key(e, report)) * rms(x)).sum(-1, keepdim=True) / math.sqrt(x.shape[-1])
        return x + self.out(self.gate(z) * self.value(e, report), report), state


@trait("hrm")
class HRM(Trait):
    """Iterative refinement (after arXiv 2506.21734) of each position by itself.

    h = x, and `steps` times  h + tanh(gate_t) * W_up SiLU(W_down [rms(h); x]);  gates start at 0
    """

    def __init__(self, d, steps, width=128):
        super().__init__()
        self.down, self.up = Linear(2 * d, width), matrix(width, d, 0.02 * width**0.5)
        self.gate = nn.Parameter(torch.zeros(steps))

    def forward(self, x, state, seen, report):  # (B, T, d) -> (B, T, d)
        h = x
        for gate in self.gate.tanh():
            h = h + gate * self.up(F.silu(self.down(torch.cat([rms(h), x], -1), report)), report)
        return h, None


@trait("spike_attn")
class SpikeAttn(Trait):
    """Linear attention whose queries and keys are spikes, in constant time and memory per token.

        S_t = gamma S_{t-1} + k_t^T v_t          q_t, k_t spikes of W_q h, W_k h; v_t = W_v h
        o_t = rms(q_t S_t)                       gamma = 1 - 2^-(3 + head) (RetNet, 2307.08621)
        x   + W_out o,  h = rms(x)               W_out starts at 0
    The neurons of q and k have decay 0 and threshold 1: S is the only memory. q.k counts common
    spikes and grows without bound, hence rms. State: S (B, heads, width, width), float32.
    """

    def __init__(self, d, heads, width=32, *, chunk=64):
        super().__init__()
        self.heads, self.width, self.chunk = heads, width, chunk
        self.query_key = matrix(d, 2 * heads * width, 1)  # 16% fire: theta is one deviation
        self.value, self.out = matrix(d, heads * width, 1), matrix(heads * width, d, 0)

    def forward(self, x, state, seen, report):  # (B, T, d) -> (B, T, d)
        h, B, T = rms(x), *x.shape[:2]
        current = self.query_key(h, report).view(B * T, 1, -1)  # all tokens in one step of lif
        one = torch.ones_like(current[0, 0])
        s, _, _ = lif(current, 0 * one, one, surrogate="triangle", return_membrane=False)
        report.log["attention_rate"] = s.detach().float().mean()
        q, k = in_heads(s.float().view(B, T, -1), self.heads, 2)
        (v,) = in_heads(self.value(h, report).float(), self.heads, 1)
        S = q.new_zeros(B, self.heads, self.width, self.width) if state is None else state
        gamma = 1 - 2.0 ** -(3 + torch.arange(self.heads, device=x.device))
        o, S = fast_weights(q, k, v, gamma, S, self.chunk)
        return x + self.out(rms(o).transpose(1, 2).flatten(2).to(x.dtype), report), S


@trait("progsem")
class ProgSem(Trait):
    """Program semantics: each active gene program adds a vector that it has learned.

        a = f P / sqrt(F)               f (.., F) features of the neurons, P (F, slots) programs
        x + W_out W_slots Derf(a)       a learned vector per program; W_out starts at 0
    With gene programs P is theirs, and f = tanh of the membranes of all blocks; without them P is
    learned, and f = rms(x). No equations were published; these are ours.
    """

    def __init__(self, d, slots, width=64, *, P=None):
        super().__init__()
        if P is None:
            self.P = nn.Parameter(torch.randn(d, slots))
        elif P.shape[1] != slots:
            raise ValueError(f"with gene programs write progsem:{P.shape[1]}")
        else:
            self.register_buffer("P", P.clone())
        self.gate = Derf(slots)
        self.slots, self.out = matrix(slots, width, 1), matrix(width, d, 0)

    def activity(self, x, seen, report):
        """How active each program is at each token, 0 to 1: (B, T, slots)."""
        is_learned = isinstance(self.P, nn.Parameter)
        f = rms(x) if is_learned else torch.cat(seen.membranes, -1).tanh().to(x.dtype)
        report.macs += self.P.numel()
        return self.gate(f @ self.P / math.sqrt(len(self.P)))

    def forward(self, x, state, seen, report):  # (B, T, d) -> (B, T, d)
        return x + self.out(self.slots(self.activity(x, seen, report), report), report), None


@trait("kuramoto")
class Kuramoto(Trait):
    """Coupled oscillators (after AKOrN, arXiv 2410.13821); positions are not coupled.

        phase = W rms(x), and `steps` times  phase + omega + K r sin(psi - phase)
        r e^(i psi) = mean over the oscillators of e^(i phase)
        x + W_out [cos phase; sin phase]       W_out starts at 0
    |K| is clamped to 1.5, as K r >= 2 would overshoot. The mean r is logged, from 0 (phases all
    over the circle, as W starts) to 1 (all phases equal).
    """

    def __init__(self, d, oscillators, steps=2):
        super().__init__()
        self.steps = steps
        self.phase = matrix(d, oscillators, math.pi / 2)
        self.omega = nn.Parameter(0.1 * torch.randn(oscillators))
        self.K = nn.Parameter(torch.tensor(0.8))
        self.out = matrix(2 * oscillators, d, 0)

    def forward(self, x, state, seen, report):  # (B, T, d) -> (B, T, d)
        phase, K = self.phase(rms(x), report), self.K.clamp(-1.5, 1.5)
        for _ in range(self.steps):
            cos, sin = phase.cos(), phase.sin()
            pull = sin.mean(-1, keepdim=True) * cos - cos.mean(-1, keepdim=True) * sin
            phase = phase + self.omega + K * pull  # pull = r sin(psi - phase)
        cos, sin = phase.cos(), phase.sin()
        report.log["kuramoto_r"] = torch.hypot(cos.mean(-1), sin.mean(-1)).detach().mean()
        return x + self.out(torch.cat([cos, sin], -1), report), None


@trait("moe")
class MoE(Trait):
    """Mixture of experts; spikes choose two of them per token (Shazeer 2017, 1701.06538).

        trace_t = 0.9 trace_{t-1} + 0.1 s_t         s the layer that fired last, else 1[x > 0]
        p       = softmax(W_r rms(trace) + b_r);  the two best are computed, no other
        x       + sum of p_e / (sum of the chosen p) * GELU(rms(x) W_up,e) W_down,e
    W_down starts at 0. Loss "moe", smallest (= balance) when all experts are used alike
    (2101.03961): balance * experts * sum over e of (share of choices of e) * (mean of p_e).
    last: neurons of the layer that fired last, if not d. State: (trace, no spikes), (B, last) each.
    """

    def __init__(self, d, experts, width=256, *, balance=0.01, last=None):
        super().__init__()
        self.experts, self.top, self.balance = experts, min(2, experts), balance
        self.router = Linear(last or d, experts)
        self.up = nn.Parameter(torch.randn(experts * width, d) * d**-0.5)
        # one tensor for all experts, so that one nobody chose still gets a (zero) gradient
        self.down = nn.Parameter(torch.zeros(experts * width, d))

    def forward(self, x, state, seen, report):  # (B, T, d) -> (B, T, d)
        s = (x > 0).to(x.dtype) if seen.spikes is None else seen.spikes
        beta = torch.full_like(s[0, 0], 0.9, dtype=torch.float32)
        _, trace, state = lif(0.1 * s, beta, None, state=state, reset="none")
        p = self.router(rms(trace).to(x.dtype), report).float().softmax(-1).flatten(0, 1)
        share, chosen = p.topk(self.top)  # (B T, top)
        share = share / share.sum(-1, keepdim=True)
        load = F.one_hot(chosen, self.experts).float().mean((0, 1))
        report.add_loss("moe", self.balance * self.experts * (load * p.mean(0)).sum())

        report.macs += self.top * (self.up.numel() + self.down.numel()) // self.experts
        if chosen.is_meta:  # `bench.py params` only counts: without numbers no token has an expert
            return x, state
        h, y = rms(x).flatten(0, 1), torch.zeros_like(x).flatten(0, 1)
        up, down = self.up.chunk(self.experts), self.down.chunk(self.experts)
        for e in chosen.unique().tolist():
            token, rank = (chosen == e).nonzero(as_tuple=True)
            out = F.gelu(h[token] @ up[e].t()) @ down[e] * share[token, rank, None]
            y = y.index_add(0, token, out.to(y.dtype))
        return x + y.view_as(x), state


@trait("memory")
class Memory(Trait):
    """Persistent memory: slow neurons, written through a gate, read as spikes.

        g   = sigmoid(W_g rms(x) + b)            b from -2 to -6: slower neurons are written less
        pre = beta (1 - g) v + g W_w rms(x)      beta 0.99 to 0.999 at the start, then learned
        x   + W_read 1[pre >= 0.05]              W_read starts at 0
    An open gate overwrites v; with a closed one v decays by beta, and without reset a neuron fires
    at every token while v stays above threshold. State: (v, s), each (B, neurons).
    """

    def __init__(self, d, neurons):
        super().__init__()
        self.write, self.gate = matrix(d, neurons, 1), Linear(d, neurons)
        self.gate.bias.data = torch.linspace(-2, -6, neurons)
        self.beta_logit = nn.Parameter(torch.logit(torch.linspace(0.99, 0.999, neurons)))
        self.read = Synapse(neurons, d, bias=False)
        nn.init.zeros_(self.read.weight)

    def forward(self, x, state, seen, report):  # (B, T, d) -> (B, T, d)
        h, beta = rms(x), torch.sigmoid(self.beta_logit.float())  # bfloat16 has no 0.999
        gate = torch.sigmoid(self.gate(h, report).float())
        s, _, state = lif(
            gate * self.write(h, report), beta * (1 - gate), torch.full_like(beta, 0.05),
            state=state, surrogate="triangle", reset="none", return_membrane=False,
        )  # fmt: skip
        report.log["memory_rate"] = s.detach().mean()
        return x + self.read(s.to(x.dtype), report), state


IGNORED = -100  # a target that does not count


def cross_entropy(logits, targets):
    """Nats per token of logits (..., V), mean over the targets (...) that count; 0 if none does."""
    return fused(logits, _cross_entropy)(logits.flatten(0, -2), targets.flatten())


def _cross_entropy(logits, targets):
    total = F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")
    return total / (targets != IGNORED).sum().clamp(min=1)


@trait("mtp")
class MTP(Trait):
    """Multi-token prediction (arXiv 2404.19737): position t also predicts token t+1+k, k = 1..n,
    by the model's own readout of h + h W_k; W_k starts at 0."""

    place = "ahead"

    def __init__(self, d, n, *, weight=0.3):
        super().__init__()
        self.weight, self.matrices = weight, nn.ParameterList(torch.zeros(d, d) for _ in range(n))

    def loss(self, report, targets, readout):
        """weight * mean over k of the cross-entropy of token t+1+k, in nats. targets (B, T): [t] is
        token t+1; readout: (B, *, d) -> logits."""
        h, nats = report.hidden, 0.0
        for k, W in enumerate(self.matrices, 1):
            nats = nats + cross_entropy(readout(h[:, :-k] + h[:, :-k] @ W), targets[:, k:])
        return self.weight * nats / len(self.matrices)


@trait("jepa")
class JEPA(Trait):
    """Prediction of the next position's representation (arXiv 2301.08243), by
    pred = h + g W_2 SiLU(W_1 rms(h)); the scalar g starts at 0."""

    place = "ahead"

    def __init__(self, d, width=256, *, weight=0.1):
        super().__init__()
        self.predict = nn.Sequential(nn.Linear(d, width), nn.SiLU(), nn.Linear(width, d))
        self.weight, self.gate = weight, nn.Parameter(torch.zeros(()))

    def loss(self, report, targets=None, readout=None):
        """weight * mean of 1 - cos(pred_t, h_{t+1}). h (B, T, d) is report.hidden; as a target it
        gets no gradient. Logs its deviation over positions: near 0 if all became alike."""
        h = report.hidden
        if h.shape[1] < 2:
            raise ValueError("to predict the next position takes sequences of 2 tokens or more")
        report.log["jepa_std"] = h.detach().float().std((0, 1)).mean()
        pred = (h + self.gate * self.predict(rms(h)))[:, :-1]
        cos = F.cosine_similarity(pred.float(), h[:, 1:].detach().float(), dim=-1)
        return self.weight * (1 - cos).mean()
