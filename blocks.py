"""The blocks of the language models, side by side: Real Sam, SpikeWhale, SNN and the GPT control.

Each stands below its own settings. NeuronSpark's block is in spark.py.
B sequences, T tokens, D width of the residual stream, N neurons.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from cell_bridge import Modulation, identity, synthetic_scores
from kernels import lif
from lif import (
    RESETS, SURROGATES, Linear, Synapse, dtype_of_products, fused, population, rms, uniform,
)  # fmt: skip


@dataclass(frozen=True)
class NeuronSettings:
    # neurons of sam, whale and snn
    rec_heads: int = 1  # sam, whale: recurrent synapses: 1 full | h blocks of n_hidden/h | 0 none
    beta_low: float = 0.01  # membrane decay per token: at the start spread over the neurons ...
    beta_high: float = 0.6  # ... from low to high, then learned per neuron
    theta: float = 1.0  # firing threshold
    surrogate: str = "triangle"  # derivative used for the fire line: a name in lif.py
    slope: float = 1.0  # its slope
    reset: str = "soft"  # sam, whale: what a spike does to the membrane: a name in lif.py
    reset_grad: bool = True  # sam, whale, spark: let the gradient flow through the reset too

    CHOICES = {"surrogate": SURROGATES, "reset": RESETS}
    RANGE = {"beta_low": (1e-6, 1 - 1e-6), "beta_high": (1e-6, 1 - 1e-6)}
    RANGE |= {"theta": (1e-6, math.inf), "slope": (1e-6, math.inf), "rec_heads": (0, math.inf)}


BLOCKS = {}  # name -> class
SETTINGS = [NeuronSettings]  # and what the blocks add: the bases of model.ModelConfig


def block(name, settings=None):
    """Register a class as `--block=name`, and a dataclass of the settings that it brings."""

    def register(cls):
        BLOCKS[name] = cls
        SETTINGS.extend([settings] if settings else [])
        return cls

    return register


class Block(nn.Module):
    """What all blocks have: `__init__(config, index)`, `forward(x, state, seen, report)`.

    forward returns the new residual stream (B, T, D) and the state after the last token, which it
    gets back with the next tokens; None is silence. It reads a lif.Seen and writes a lif.Report.
    """

    sites = ()  # neurons of each layer whose rates it reports, in that order
    fan_out = ()  # synapses of a neuron of each site, for rate_penalty=synops
    heads = None  # the setting that says into how many parts n_hidden is cut
    width = "n_hidden"  # the setting that is the width of the residual stream
    closing = None  # class of the part after the last block
    has_norm = False  # whether what leaves the last part is normalised already
    shows_spikes = True  # whether `report.fired` is called
    neurons = ""  # endings of the names of vectors that learn at neuron_lr; "": all vectors


def spread(n, low, high):
    """n values from low to high in equal steps, in random order."""
    return torch.linspace(low, high, n)[torch.randperm(n)]


def recurrent(n, heads):
    """Recurrent synapses of n neurons in `heads` groups, none between groups: (n, n/heads), a row
    per presynaptic neuron; None for 0 heads. `by_head` gives them the shape that `lif` takes."""
    return uniform(n // heads, n, n // heads) if heads else None


def by_head(w):
    """w (N, d) as the scan's (N/d, d, d), in the dtype of autocast, as of any other matrix."""
    return w if w is None else w.view(-1, w.shape[1], w.shape[1]).to(dtype_of_products(w))


def run_neurons(c, current, beta, theta, w_rec, state, report, **options):
    """`lif` as the config c has it; counts the spikes and what they trigger through w_rec."""
    s, membrane, state = lif(
        current, beta, theta, by_head(w_rec), state,
        surrogate=c.surrogate, slope=c.slope, reset=c.reset, reset_grad=c.reset_grad, **options,
    )  # fmt: skip
    rate = report.fired(s)
    if w_rec is not None:
        report.fed_by_spikes(rate, w_rec.shape[1])
    return s, membrane, state


@dataclass(frozen=True)
class SamSettings:
    # sam
    residual: str = "gated"  # gated | plain | none (every block replaces its input)
    diversity: float = 0.4  # sigma of the log-normal factor on stress that each neuron has
    stress_gain: float = 0.3  # kappa: gain = 1 + kappa * stress * factor; 0 switches stress off
    homeostasis: float = 0.0  # thresholds move by this * (rate - target) per step; 0 is off

    CHOICES = {"residual": ("gated", "plain", "none")}


@block("sam", SamSettings)
class SamBlock(Block):
    """Real Sam: recurrent neurons that answer stress differently, gated into the residual stream.

    s = lif(gain * (W_in h + b) + b_rec, W_rec);  x + sigmoid(W_g h + b_g) * s;  h = norm(x)
    """

    heads = "rec_heads"

    def __init__(self, config, index):
        super().__init__()
        c, D = config, config.n_hidden
        self.config, self.sites = config, [D]
        self.norm = nn.LayerNorm(D)
        self.fc_in = Linear(D, D)
        self.w_rec = recurrent(D, c.rec_heads)
        if c.rec_heads:
            self.b_rec = uniform(D // c.rec_heads, D)
        if c.residual == "gated":
            self.gate = Linear(D, D)
        self.beta_logit = nn.Parameter(torch.logit(spread(D, c.beta_low, c.beta_high)))
        self.register_buffer("theta", torch.full((D,), c.theta))
        normal = torch.randn(D)  # mean of the factor exp(sigma n - sigma^2/2) is 1
        self.register_buffer("temper", torch.exp(c.diversity * normal - c.diversity**2 / 2))

    def forward(self, x, state, seen, report):  # (B, T, D) -> (B, T, D)
        c = self.config
        h = self.norm(x)
        gain = 1 + c.stress_gain * seen.stress * self.temper
        bias = self.b_rec if c.rec_heads else gain.new_zeros(())
        current = torch.addcmul(bias, self.fc_in(h, report), gain)
        beta = torch.sigmoid(self.beta_logit)
        s, _, state = run_neurons(
            c, current, beta, self.theta, self.w_rec, state, report, return_membrane=False
        )
        if c.residual == "gated":
            return torch.addcmul(x, torch.sigmoid(self.gate(h, report)), s), state
        return (x + s if c.residual == "plain" else s), state

    @torch.no_grad()
    def adapt(self, rate):
        """Homeostasis (Real Sam V3): neurons that fire too much become harder to excite."""
        self.theta += self.config.homeostasis * (rate - self.config.rate_target)
        self.theta.clamp_(0.1 * self.config.theta, 10 * self.config.theta)


class MembraneReadout(nn.Module):
    """After SpikeWhale's blocks: W tanh(membranes before the reset), of all layers side by side.

    SpikeWhale's model card names readout_decay without an equation; here it is the decay of a
    moving average of what W reads.
    """

    def __init__(self, config):
        super().__init__()
        self.decay = config.readout_decay
        self.mix = Linear(config.n_layer * config.n_hidden, config.n_embd)

    def forward(self, x, state, seen, report):  # -> (B, T, n_embd)
        h = torch.tanh(torch.cat(seen.membranes, -1))
        if self.decay:
            beta = torch.full_like(h[0, 0], self.decay, dtype=torch.float32)
            _, h, state = lif((1 - self.decay) * h, beta, None, state=state, reset="none")
        return self.mix(h, report), state


SPIKE_INPUT_GAIN = 2.5  # starting scale of the synapses into layers fed by spikes
CLAMP = 30.0  # bound of the soft clamp on the membrane


@dataclass(frozen=True)
class WhaleSettings:
    # whale
    modulation: str = "program"  # gene programs set neurons | shuffled: control | none: all equal
    readout_decay: float = 0.0  # the readout sees a moving average of the membranes; 0: as they are

    CHOICES = {"modulation": ("program", "shuffled", "none")}
    RANGE = {"readout_decay": (0, 0.999)}


@block("whale", WhaleSettings)
class WhaleBlock(Block):
    """SpikeWhale: recurrent neurons whose excitability gene programs set; only spikes go on.

    pre = beta v + gain * W_in x + W_rec s;  s = 1[pre >= theta];  v = softclamp(pre - theta s)
    The first layer reads floats, the others spikes. A MembraneReadout reads all of them. The card
    speaks of one modulation; here each layer draws genes and learns 54 strengths of its own.
    """

    heads, width, closing = "rec_heads", "n_embd", MembraneReadout

    def __init__(self, config, index):
        super().__init__()
        c, N = config, config.n_hidden
        self.config, self.sites = config, [N]
        self.norm = nn.Identity() if index else nn.LayerNorm(c.n_embd)
        self.w_in = Synapse(N, N, bias=False) if index else Linear(c.n_embd, N, bias=False)
        if index:
            self.w_in.weight.data *= SPIKE_INPUT_GAIN
        self.w_rec = recurrent(N, c.rec_heads)
        beta = spread(N, c.beta_low, c.beta_high)
        self.modulation = None
        if c.modulation == "none":
            self.register_buffer("theta", torch.full((N,), c.theta))
            self.register_buffer("beta", beta)
        else:
            with torch.device("cpu"):  # real numbers, also for a model on the meta device
                P = identity(synthetic_scores(), N, index, shuffle=c.modulation == "shuffled")
            self.modulation = Modulation(P.to(beta.device), c.theta, beta)

    def forward(self, x, state, seen, report):  # (B, T, n_embd or N) -> spikes (B, T, N)
        c = self.config
        theta, beta, gain = self.modulation() if self.modulation else (self.theta, self.beta, 1.0)
        current = gain * self.w_in(self.norm(x), report)
        s, pre, state = run_neurons(c, current, beta, theta, self.w_rec, state, report, clamp=CLAMP)
        report.shown["membranes"] = (*seen.membranes, pre)
        return s, state


def charge(z, gain, bias, beta):
    """The current of populations: sqrt(1 - beta^2) keeps the membrane's variance."""
    scale = (1 - beta**2).sqrt()
    return torch.addcmul(scale * bias, scale * gain, z)


class Population(nn.Module):
    """n leaky membranes without reset, each watched by neurons at thresholds theta, 2 theta, ...

        v = beta * v' + sqrt(1 - beta^2) * (g z + b);  sends the spikes of lif.population(v)
    signed: as many neurons again watch -v. The float control sends v, or relu(v) if unsigned.
    beta starts spread from beta_low of the config to beta_high.
    """

    def __init__(self, n, config, signed, beta_high):
        super().__init__()
        c, self.config, self.signed = config, config, signed
        self.gain, self.bias = nn.Parameter(torch.ones(n)), nn.Parameter(torch.zeros(n))
        self.beta_logit = nn.Parameter(torch.logit(spread(n, c.beta_low, beta_high)))
        if c.spikes:
            self.register_buffer("theta", c.theta * torch.arange(1, c.levels + 1))
            middle = (self.theta + c.theta / 2).repeat_interleave(n)  # of each interval of v
            self.levels = nn.Parameter(torch.cat([middle, -middle]) if signed else middle)

    def forward(self, z, v, report):  # (B, T, n), v (B, n) or None -> (B, T, n), v
        c = self.config
        beta = torch.sigmoid(self.beta_logit)
        current = fused(z, charge)(z, self.gain, self.bias, beta)
        state = None if v is None else (v, v)  # the second are the spikes, which nothing reads
        _, v_all, (v, _) = lif(current, beta, None, state=state, reset="none")
        if not c.spikes:
            return (v_all if self.signed else F.relu(v_all)).to(z.dtype), v
        if self.training and c.noise:
            v_all = v_all.add(torch.empty_like(v_all).uniform_(-0.5, 0.5), alpha=c.noise * c.theta)
        levels = self.levels.view(1 + self.signed, c.levels, -1)
        dtype = dtype_of_products(z)
        sent, rate = population(v_all, self.theta, levels, c.surrogate, c.slope, dtype)
        report.fired(sent, rate)
        return sent, v


@dataclass(frozen=True)
class SNNSettings:
    # snn
    levels: int = 3  # neurons of a population, at thresholds theta, 2 theta, ...; 1 is plain spikes
    head: str = "float"  # what the readout's matrix is fed: float | spikes, of one more population
    spikes: bool = True  # False: the float control, the same block with graded signals
    noise: float = 0.0  # uniform noise on membranes in training, its width in thetas; 0 is off
    keys: int = 64  # in each head of the fast weights, neurons that write, and as many that read

    CHOICES = {"head": ("float", "spikes")}
    RANGE = {"levels": (1, math.inf), "noise": (0, math.inf), "keys": (1, math.inf)}


@block("snn", SNNSettings)
class SNNBlock(Block):
    """Every matrix multiplies spikes; membranes, norms, fast weights and the residual stream are
    floats.

    z = x / rms(x);  a = population(z);  h = population(W_in a);  x + W_out h + FastWeights(a, z)
    """

    heads = "n_head"

    def __init__(self, config, index):
        super().__init__()
        c, D, N = config, config.n_hidden, config.d_ff
        self.index = index
        self.a = Population(D, c, True, c.beta_high)
        self.h = Population(N, c, False, c.beta_high)
        Matrix = Synapse if c.spikes else Linear
        self.w_in, self.w_out = Matrix(D, N, bias=False), Matrix(N, D, bias=False)
        nn.init.normal_(self.w_in.weight, std=D**-0.5)
        nn.init.normal_(self.w_out.weight, std=0.5 / math.sqrt(c.n_layer * N))
        mix = self.mix = FastWeights(c)
        self.populations = {"a": self.a, "q": mix.q, "k": mix.k, "o": mix.o, "h": self.h}
        if c.spikes:  # in this order they fire; a spike of q or k reads or writes a row
            self.sites = [len(p.gain) for p in self.populations.values()]
            self.fan_out = [2 * len(mix.k.gain) + N, mix.width, mix.width, D, D]

    def forward(self, x, state, seen, report):  # (B, T, D) -> (B, T, D)
        state, now = state or {}, {}
        z = rms(x)
        a, now["a"] = self.a(z, state.get("a"), report)
        current = self.w_in(a, report)
        found, now["mix"] = self.mix(a, z, state.get("mix"), report)
        h, now["h"] = self.h(current, state.get("h"), report)
        fed = self.w_out(h, report)
        if x.shape[1] > 1 and not torch.is_grad_enabled():  # of the block's two updates
            norms = [y.norm(dim=-1).mean() for y in (found, fed)]
            report.log[f"fast weights {self.index}"] = norms[0] / sum(norms)
        return x + fed + found, now


class FastWeights(nn.Module):
    """A small matrix per head that spikes write and read: what the text said so far.

        S_t = gamma S_(t-1) + k_t (x) v_t    a key neuron's spike adds the token's value to its row
        o_t = q_t S_t                        a query neuron's spike reads its row
    q, k: spikes of two populations fed by W_qk a; v: the head's slice of z, and a 1. The last
    column of S thus counts what was written: o is divided by 1 + its count, and by its rms, and
    drives a third population, whose spikes W_o carries to the residual stream. The decay gamma is
    learned per head. This is Hebbian plasticity within the text: a weight grows where a key neuron
    and a value were active together (Schlag et al. 2021, arXiv 2102.11174, on fast weights).
    """

    def __init__(self, config):
        super().__init__()
        c, D, K = config, config.n_hidden, config.n_head * config.keys
        self.config, self.width = c, D // c.n_head + 1  # of a row
        Matrix = Synapse if c.spikes else Linear
        self.w_qk, self.w_o = Matrix(D, 2 * K, bias=False), Matrix(D, D, bias=False)
        nn.init.normal_(self.w_qk.weight, std=D**-0.5)
        nn.init.normal_(self.w_o.weight, std=0.5 / math.sqrt(c.n_layer * D))
        self.q, self.k = (Population(K, c, False, c.beta_high) for _ in range(2))
        self.o = Population(D, c, True, c.beta_low)  # decays all low: it hardly averages over time
        # gamma = 1 - exp(log_fade), at the start .5 ... .995
        self.log_fade = nn.Parameter(torch.linspace(math.log(0.5), math.log(0.005), c.n_head))

    def forward(self, a, z, state, report):  # spikes a, floats z (B, T, D) -> (B, T, D)
        c, state, now = self.config, state or {}, {}
        qk = self.w_qk(a, report).unflatten(-1, (2, c.n_head, c.keys))
        q, k = rms(qk).flatten(3).unbind(2)  # (B, T, heads * keys)
        q, now["q"] = self.q(q, state.get("q"), report)
        k, now["k"] = self.k(k, state.get("k"), report)
        if c.spikes:
            for rate in report.rates[-2:]:
                report.fed_by_spikes(rate, self.width)
        else:
            report.macs += 2 * c.n_head * c.keys * self.width
        q, k, v = (in_heads(y, c.n_head, 1)[0] for y in (q, k, z))
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        S = v.new_zeros(len(a), c.n_head, c.keys, self.width)
        if "S" in state:
            S = state["S"][0] * state["S"][1][..., None]
        o, S = fast_weights(q, k, v, self.gamma(), S)
        now["S"] = S, S.new_ones(S.shape[:3])  # all decay is applied
        o = (o[..., :-1] / (1 + F.relu(o[..., -1:]))).transpose(1, 2).flatten(2)
        o, now["o"] = self.o(rms(o), state.get("o"), report)
        return self.w_o(o, report), now

    def gamma(self):
        return 1 - self.log_fade.exp().clamp(max=0.99)


def fast_weights_reference(q, k, v, gamma, S):
    """FastWeights' two equations, token by token. Shapes as for fast_weights."""
    out = []
    for q_t, k_t, v_t in zip(q.unbind(2), k.unbind(2), v.unbind(2)):
        S = gamma[:, None, None] * S + k_t[..., None] * v_t[..., None, :]
        out.append((q_t[..., None, :] @ S)[..., 0, :])
    return torch.stack(out, 2), S


def fast_weights(q, k, v, gamma, S, chunk=64):
    """The same in chunks: token t reads gamma^(t-j) (q_t . k_j) v_j of all tokens j <= t of its own
    chunk at once, and from S what was before the chunk.

    q, k (B, heads, T, keys), v (B, heads, T, values), gamma (heads,) -> (B, heads, T, values).
    State: S (B, heads, keys, values).
    """
    T, gamma = q.shape[2], gamma[:, None, None]
    chunk = min(chunk, T)
    q, k, v = (F.pad(x, (0, 0, 0, -T % chunk)).unflatten(2, (-1, chunk)) for x in (q, k, v))
    t = torch.arange(q.shape[2] * chunk, device=q.device).view(-1, chunk)
    last, lag = t[:, -1:].clamp(max=T - 1), t[0, :, None] - t[0]
    since, until = gamma ** (t[:1] + 1), gamma ** (last - t).clamp(min=0)  # (heads, chunks, chunk)
    inner = q @ k.transpose(3, 4) * (gamma ** lag.clamp(min=0) * (lag >= 0))[:, None]
    added = (k * until[..., None]).transpose(3, 4) @ v  # by each chunk, as at its end
    before = []
    for kept, more in zip((gamma ** (last - t[:, :1] + 1)).unbind(1), added.unbind(2)):
        before.append(S)
        S = kept[..., None] * S + more
    out = inner @ v + (q * since[..., None]) @ torch.stack(before, 2)
    return out.flatten(2, 3)[:, :, :T], S


def in_heads(x, heads, parts):
    """(B, T, parts * n) -> a tensor (B, heads, T, n / heads) for each of the parts."""
    return x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4)


def look_back(q, k, v, state, window, report):
    """Causal attention with rotary positions (Su et al. 2021, arXiv 2104.09864).

    q, k (B, heads, T, d), v (B, heads, T, e) -> (B, T, heads e). A token sees itself and the
    window - 1 tokens before it. State: keys and values of those (B, heads, <= window - 1, d or e)
    and the number of tokens so far (B,).
    """
    B, _, T, _ = q.shape
    past = 0 if state is None else state[0].shape[2]
    n = max(0, min(past + T, window) - past)  # tokens before the window is full see 1 more each
    pairs = n * past + n * (n + 1) // 2 + (T - n) * window  # of floats, whatever fed q and k
    report.macs += round(pairs / T * q.shape[1] * (q.shape[3] + v.shape[3]))
    first = q.new_zeros(B, dtype=torch.long) if state is None else state[2]
    position = first[:, None] + torch.arange(T, device=q.device)  # (B, T)
    q, k = rotate(q, position), rotate(k, position)
    if state is not None:
        k, v = torch.cat([state[0], k], 2), torch.cat([state[1], v], 2)
    is_whole, mask = past == 0 and T <= window, None
    if not is_whole and T > 1:  # of one token the state holds what it sees
        at = torch.arange(past + T, device=q.device)
        age = at[past:, None] - at
        mask = (age >= 0) & (age < window)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_whole)
    keep = max(0, k.shape[2] - window + 1)
    return y.transpose(1, 2).flatten(2), (k[:, :, keep:], v[:, :, keep:], first + T)


def rotate(x, position):
    """Turn pairs of channels of x (B, heads, T, d) by angles that grow with position (B, T)."""
    half = x.shape[-1] // 2
    # float32 would blur positions in a text of a million tokens; MPS has nothing finer
    exact = torch.float32 if x.device.type == "mps" else torch.float64
    speed = 10000.0 ** (-torch.arange(half, device=x.device, dtype=exact) / half)
    angle = position[:, None, :, None] * speed  # (B, 1, T, half)
    a, b = x[..., :half], x[..., half : 2 * half]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos, x[..., 2 * half :]], -1)


@dataclass(frozen=True)
class GPTSettings:
    # gpt
    n_head: int = 8  # heads of attention, and of snn's fast weights
    window: int = 512  # tokens that attention sees: the present one and those before it
    d_ff: int = 1112  # width of the feed-forward part, here, in snn and in spark

    RANGE = {name: (1, math.inf) for name in ("n_head", "window", "d_ff")}


@block("gpt", GPTSettings)
class GPTBlock(Block):
    """The control: causal attention, then GELU. State: as of look_back."""

    heads = "n_head"

    def __init__(self, config, index):
        super().__init__()
        D = config.n_hidden
        self.n_head, self.window = config.n_head, config.window
        self.norm_a, self.norm_f = nn.LayerNorm(D, bias=False), nn.LayerNorm(D, bias=False)
        self.qkv, self.out = Linear(D, 3 * D, bias=False), Linear(D, D, bias=False)
        self.up, self.down = Linear(D, config.d_ff, bias=False), Linear(config.d_ff, D, bias=False)
        for w in (self.qkv, self.up, self.out, self.down):
            nn.init.normal_(w.weight, std=0.02)
        for w in (self.out, self.down):
            w.weight.data /= math.sqrt(2 * config.n_layer)

    def forward(self, x, state, seen, report):  # (B, T, D) -> (B, T, D)
        q, k, v = in_heads(self.qkv(self.norm_a(x), report), self.n_head, 3)
        y, state = look_back(q, k, v, state, self.window, report)
        x = x + self.out(y, report)
        return x + self.down(F.gelu(self.up(self.norm_f(x), report)), report), state
