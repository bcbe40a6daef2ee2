"""The neuron of this project, one leaky integrate-and-fire scan forward and backward; its synapses.

A token is one time step. In every step a neuron does three things, and these three lines are the
same in this file, in kernels.py and in the README:

    pre = beta * v + I + s W            # charge   (v and s are those of the step before)
    s   = 1 if pre >= theta else 0      # fire
    v   = pre - theta * s               # reset    (or another of RESETS; then softclamp, if set)

Glossary. B sequences, T time steps (tokens), N neurons, H heads of N/H neurons each.

    symbol   name        shape              meaning
    I        current     (B, T, N)          what the synapses deliver in a step
    beta     beta        (N,) or (B, T, N)  decay of the membrane per step, 0..1
    theta    theta       (N,) or (B, T, N)  firing threshold; None: they charge and never fire
    W        w_rec       (H, N/H, N/H)      recurrent synapses, one row per presynaptic neuron;
                                            H = 1 is the full matrix, None is none
    pre      membrane    (B, T, N)          membrane before the reset
    s        spikes      (B, T, N)          0 or 1
    v, s     state       2 x (B, N)         membrane after the reset and spikes of the last step
    u        u           (B, T, N)          pre - theta, the distance to the threshold
    g        g           (B, T, N)          surrogate of ds/du, used backward only

The fire line has no useful derivative; backward uses a surrogate g(u) instead (Neftci, Mostafa,
Zenke 2019, arXiv 1901.09948). As u = pre - theta, the threshold receives -g.

Three functions run these neurons, with the same arguments and results: `lif_reference`, the plain
loop, for reading and tests; `lif_torch`, fast in plain PyTorch; `kernels.lif_triton`, for the GPU.
Models call `kernels.lif`, which picks one of the last two. `python lif.py` draws eight neurons.

There are two kinds of matrices, and the class says what a token costs: a `Synapse` is fed spikes,
a `Linear` floats. Both count their operations in the `Report` of the forward pass.
"""

import functools
import math
from dataclasses import dataclass, field
from typing import Callable, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from machine import has_bfloat16

# ---- the neuron -------------------------------------------------------------------------------


def lif_reference(current, beta, theta, w_rec=None, state=None, **options):
    """Run N leaky integrate-and-fire neurons over T steps: the plain loop, autograd differentiates.

    current (B, T, N); beta, theta (N,) or (B, T, N); w_rec (H, N/H, N/H) or None; state (v, s),
    each (B, N), or None for silence. Units: current, theta and the membrane share one arbitrary
    unit, time is counted in steps. Options:
    surrogate='fast_sigmoid', slope=None: a name of SURROGATES and its k (None: the usual one).
    reset='soft': a name of RESETS; 'soft' subtracts theta after a spike, 'none' changes nothing.
    reset_grad=True: whether the gradient also flows through the s of the reset.
    clamp=0: bound of the soft clamp on the membrane after the reset; 0 switches it off.
    return_membrane=True: False puts None in its place.

    Returns spikes (B, T, N) in the dtype of current, the membrane before the reset (B, T, N) and
    the state after the last step, these in float32 (float64 for float64 input). All of them are
    differentiable. ValueError for an unknown surrogate or reset and for shapes that do not fit.
    """
    tensors, o = check(current, beta, theta, w_rec, state, **options)
    I, beta, theta, w, v, s = at_full_precision(*tensors)
    T, spikes, membrane = I.shape[1], [], []
    soft, reset = SURROGATES[o.surrogate].soft, RESETS[o.reset].after
    for I_t, beta_t, theta_t in zip(I.unbind(1), steps_of(beta, T), steps_of(theta, T)):
        pre = beta_t * v + I_t + (0 if w is None else times(s, w))  # charge
        s = fire(pre - theta_t, soft(pre - theta_t, o.slope)) if theta_t is not None else 0 * v
        v = reset(pre, theta_t, s if o.reset_grad else s.detach())  # reset
        v = softclamp(v, o.clamp) if o.clamp else v
        spikes.append(s)
        membrane.append(pre)
    membrane = torch.stack(membrane, 1) if o.membrane else None
    return torch.stack(spikes, 1).to(current.dtype), membrane, (v, s)


def fire(u, smooth):
    """1 where u >= 0, else 0. Its gradient is that of `smooth`, a function of u: the surrogate."""
    return (u >= 0).to(u.dtype) + (smooth - smooth.detach())


def steps_of(x, T):
    """T slices (B, N) of a per-step tensor, or the one (N,) tensor T times.

    unbind once: x[:, t] in a loop costs an autograd node and a Python call per step.
    """
    return x.unbind(1) if x is not None and x.dim() == 3 else [x] * T


def times(s, w):
    """s (B, N) @ w (H, d, d), head by head, in the dtype of w."""
    s_heads = s.to(w.dtype).unflatten(1, w.shape[:2])  # (B, H, d)
    return torch.einsum("bhi,hij->bhj", s_heads, w).flatten(1).to(s.dtype)


class Options(NamedTuple):
    """How a scan runs, checked and complete; in the order that the kernels' operators take."""

    membrane: bool  # whether it is returned
    surrogate: str
    slope: float
    reset: str
    reset_grad: bool
    clamp: float


def check(
    current, beta, theta, w_rec=None, state=None,
    *, surrogate="fast_sigmoid", slope=None, reset="soft", reset_grad=True, clamp=0.0,
    return_membrane=True,
):  # fmt: skip
    """(current, beta, theta, w_rec, v, s), Options; ValueError if they do not fit each other."""
    if current.dim() != 3 or 0 in current.shape:
        raise ValueError(f"current must be (B, T, N) and not empty, got {tuple(current.shape)}")
    B, T, N = current.shape
    for name, x in (("beta", beta), ("theta", theta)):
        if x is not None and x.shape not in ((N,), (B, T, N)):
            raise ValueError(f"{name} must be ({N},) or {(B, T, N)}, got {tuple(x.shape)}")
    if w_rec is not None:
        H = w_rec.shape[0]
        if N % H or w_rec.shape != (H, N // H, N // H):
            raise ValueError(f"w_rec must be (H, {N}/H, {N}/H), got {tuple(w_rec.shape)}")
    v, s = state if state is not None else (current.new_zeros(B, N), current.new_zeros(B, N))
    for x in (v, s):
        if x.shape != (B, N):
            raise ValueError(f"state must be two tensors {(B, N)}, got {tuple(x.shape)}")
    usual = entry(SURROGATES, "surrogate", surrogate).slope
    entry(RESETS, "reset", reset)
    if theta is None and (reset != "none" or w_rec is not None):
        raise ValueError("without theta there are no spikes: take reset='none' and no w_rec")
    if clamp < 0:
        raise ValueError(f"clamp must be 0 (off) or a positive bound, got {clamp}")
    slope = float(usual if slope is None else slope)
    options = bool(return_membrane), surrogate, slope, reset, bool(reset_grad), float(clamp)
    return (current, beta, theta, w_rec, v, s), Options(*options)


def entry(registry, kind, name):
    """registry[name]; ValueError names the known ones."""
    if name not in registry:
        raise ValueError(f"unknown {kind} {name!r}; choose one of {', '.join(registry)}")
    return registry[name]


def dtype_of_products(x):
    """What matrices multiply in: the dtype of autocast where it is on, else that of x."""
    device = x.device.type
    is_on = device != "meta" and torch.is_autocast_enabled(device)  # meta tensors know no autocast
    return torch.get_autocast_dtype(device) if is_on else x.dtype


def at_full_precision(current, beta, theta, w_rec, v, s):
    """The membrane is never of 16 bits, nor is what is added to it; only products s W may be."""
    dtype = torch.promote_types(current.dtype, torch.float32)
    w = w_rec if w_rec is None or w_rec.dtype.itemsize == 2 else w_rec.to(dtype)
    rest = current, beta, theta, v, s
    current, beta, theta, v, s = (x if x is None else x.to(dtype) for x in rest)
    return current, beta, theta, w, v, s


# ---- resets -----------------------------------------------------------------------------------


class Reset(NamedTuple):
    """The membrane after the fire line and, for backward, the derivatives of that: functions of
    (pre, theta, s), element by element; a single number is broadcast."""

    after: Callable  # v
    by_pre: Callable  # dv/dpre
    by_s: Callable  # dv/ds: how the gradient reaches the spike through the reset (reset_grad)
    by_theta: Callable  # dv/dtheta


RESETS = {
    "soft": Reset(
        lambda pre, theta, s: torch.addcmul(pre, theta, s, value=-1),
        lambda pre, theta, s: pre.new_ones(()),
        lambda pre, theta, s: -theta,
        lambda pre, theta, s: -s,
    ),
    "none": Reset(
        lambda pre, theta, s: pre,
        lambda pre, theta, s: pre.new_ones(()),
        lambda pre, theta, s: pre.new_zeros(()),
        lambda pre, theta, s: pre.new_zeros(()),
    ),
}


def softclamp(x, bound):
    """bound * erf(sqrt(pi)/2 * x/bound): slope 1 at 0, saturates at +-bound (SpikeWhale)."""
    return torch.erf(x * (math.sqrt(math.pi) / 2 / bound)) * bound


def softclamp_slope(x, bound):
    return (x * (math.sqrt(math.pi) / 2 / bound)).square_().neg_().exp_()


# ---- surrogates -------------------------------------------------------------------------------


class Surrogate(NamedTuple):
    grad: Callable  # g(u, k) = ds/du, k the slope
    soft: Callable  # its antiderivative: the smooth step that g really differentiates
    slope: float  # the usual k


def _triangle_soft(u, k):
    w = u.clamp(-1 / k, 1 / k)
    return 0.5 + k * w - 0.5 * k * k * w * w.abs()


SURROGATES = {
    "fast_sigmoid": Surrogate(  # Zenke & Ganguli 2018, arXiv 1705.11146
        lambda u, k: u.abs().mul_(k).add_(1).pow_(-2),
        lambda u, k: 0.5 + u / (1 + k * u.abs()),
        25.0,
    ),
    "atan": Surrogate(  # Fang et al. 2021, arXiv 2007.05785
        lambda u, k: torch.addcmul(
            u.new_full((), 2 / k), u, u, value=k / 2 * math.pi**2
        ).reciprocal_(),
        lambda u, k: 0.5 + torch.atan(u * (math.pi * k / 2)) / math.pi,
        2.0,
    ),
    "sigmoid": Surrogate(
        lambda u, k: k * torch.sigmoid(k * u) * torch.sigmoid(-k * u),
        lambda u, k: torch.sigmoid(k * u),
        4.0,
    ),
    "gaussian": Surrogate(
        lambda u, k: (u * k).square_().neg_().exp_().mul_(k / math.sqrt(math.pi)),
        lambda u, k: 0.5 + 0.5 * torch.erf(u * k),
        2.0,
    ),
    "triangle": Surrogate(  # Esser et al. 2016, arXiv 1603.08270
        lambda u, k: torch.rsub(u.abs(), k, alpha=k * k).clamp_(min=0), _triangle_soft, 1.0
    ),
    "ste": Surrogate(lambda u, k: torch.full_like(u, k), lambda u, k: 0.5 + k * u, 1.0),
}


# ---- the fast scan ----------------------------------------------------------------------------


def lif_torch(current, beta, theta, w_rec=None, state=None, **options):
    """What lif_reference does, faster: a loop without graph, and a backward written by hand.

    A w_rec in 16 bits is multiplied in 16 bits.
    """
    tensors, o = check(current, beta, theta, w_rec, state, **options)
    scan = _Scan.apply if torch.is_grad_enabled() else _scan
    spikes, membrane, v = scan(*at_full_precision(*tensors), o)
    return spikes.to(current.dtype), membrane if o.membrane else None, (v, spikes[:, -1])


def _scan(current, beta, theta, w_rec, v, s, options):
    """Spikes (B,T,N), membrane (B,T,N), v (B,N) of all steps: the forward pass, without graph."""
    B, T, N = current.shape
    membrane, silent = current.new_empty(B, T, N), current.new_zeros(()).expand(B, T, N)
    spikes = silent if theta is None else torch.empty_like(membrane)
    if current.is_meta:  # a meta tensor has a shape and no numbers: there is nothing to loop for
        return spikes, membrane, v.clone()
    after = RESETS[options.reset].after
    parts = current.unbind(1), steps_of(beta, T), steps_of(theta, T), membrane.unbind(1)
    for I_t, beta_t, theta_t, pre, s_t in zip(*parts, spikes.unbind(1)):
        torch.addcmul(I_t, beta_t, v, out=pre)  # charge
        if w_rec is not None:
            _add_recurrent(pre, s, w_rec)
        if theta is not None:
            s = torch.ge(pre, theta_t, out=s_t)  # fire; a float output is faster than a mask
        v = after(pre, theta_t, s)  # reset
        v = softclamp(v, options.clamp) if options.clamp else v
    return spikes, membrane, v.clone()  # without a reset v is a part of `membrane`


def _add_recurrent(out, s, w):
    """out (B, N) += s (B, N) @ w (H, d, d), head by head, in place; the product in w's dtype."""
    H, d, _ = w.shape
    if H == 1:
        w = w[0]
    else:
        out, s = (x.unflatten(1, (H, d)).transpose(0, 1) for x in (out, s))
    if w.dtype != out.dtype:
        out += s.to(w.dtype) @ w
    elif H == 1:
        out.addmm_(s, w)
    else:
        out.baddbmm_(s, w)


def gradient_of_w(s0, spikes, d_pre, w_rec, dtype):
    """s'^T d_pre (H, d, d): of all steps in one product per head, in `dtype`."""
    before = torch.cat([s0.to(spikes.dtype).unsqueeze(1), spikes[:, :-1]], 1)  # s'
    s, d = (x.to(dtype).reshape(-1, *w_rec.shape[:2]) for x in (before, d_pre))
    return torch.einsum("xhi,xhj->hij", s, d)


def at_steps(x, steps):
    """The given steps of a per-step tensor (B, T, N); a per-neuron one (N,) as it is."""
    return x if x is None or x.dim() == 1 else x[:, steps]


def accumulate(total, x, steps):
    """Add the gradient x (B, n, N) of these steps to a per-step or per-neuron total, in place."""
    if total.dim() == 1:
        total += x.sum((0, 1))
    else:
        total[:, steps] = x


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, current, beta, theta, w_rec, v0, s0, options):
        spikes, membrane, v = _scan(current, beta, theta, w_rec, v0, s0, options)
        ctx.save_for_backward(membrane, spikes, beta, theta, w_rec, v0, s0)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return spikes, membrane, v

    # Backward, from the last step to the first, with d_x the gradient of the loss by x:
    #   d_s   = d_spikes + d_pre' W^T                    (d_pre' is that of the step after)
    #   d_r   = d_v * softclamp'                          r = after(pre, theta, s), the reset
    #   d_f   = g * (d_s + by_s * d_r)                    what passes through the fire line;
    #                                                     by_s = 0 if reset_grad is off
    #   d_pre = d_membrane + by_pre * d_r + d_f
    #   d_v   = beta * d_pre                              of the step before
    # and, after the loop, since d_f = d_pre - d_membrane - by_pre * d_r:
    #   d_I = d_pre,  d_beta = d_pre * v',  d_W = s'^T d_pre      (v', s' of the step before)
    #   d_theta = by_theta * d_r - d_f = d_membrane - d_pre + (by_pre + by_theta) * d_r
    # For the soft reset by_pre, by_s, by_theta are 1, -theta, -s; without reset 1, 0, 0.
    @staticmethod
    def backward(ctx, d_spikes, d_membrane, d_v):
        membrane, spikes, beta, theta, w_rec, v0, s0 = ctx.saved_tensors
        _, surrogate, slope, reset, reset_grad, clamp = ctx.options
        surrogate, rule = SURROGATES[surrogate], RESETS[reset]
        need_beta, need_theta, need_w = ctx.needs_input_grad[1:4]
        B, T, N = membrane.shape
        d_pre = torch.empty_like(membrane)
        d_beta = torch.zeros_like(beta) if need_beta else None
        d_theta = torch.zeros_like(theta) if need_theta else None
        w_back = None if w_rec is None else w_rec.transpose(1, 2)
        d_s = torch.zeros_like(s0)  # what reaches a step's spikes through W
        after_each = beta[:, 1:] if beta.dim() == 3 else beta.expand(1, T - 1, N)
        after_each = F.pad(after_each, (0, 0, 0, 1), value=1.0)  # beta of the step after

        # In blocks of about 128k elements: all that does not depend on later steps is computed for
        # a whole block at once, in cache, and the loop is left with one small operation per step:
        # d_pre = direct + through * d_after, d_after the d_pre of the step after. `through` has the
        # beta between the two, except at step T-1, where d_after is the given d_v. Without a
        # threshold one zero stands for the g of all neurons.
        C = min(T, max(1, 131072 // (B * N)))
        d_after = d_v = torch.zeros_like(v0) if d_v is None else d_v
        for start in range((T - 1) // C * C, -1, -C):
            now = slice(start, min(start + C, T))
            after = slice(start + 1, min(start + C + 1, T))  # one shorter in the block of step T-1
            n, m = now.stop - now.start, after.stop - after.start
            pre, th, s = membrane[:, now], at_steps(theta, now), spikes[:, now]
            d_pre_now = d_pre[:, now]
            g = pre.new_zeros(1, n, 1) if th is None else surrogate.grad(pre - th, slope)
            direct = torch.zeros_like(g) if d_spikes is None else g * d_spikes[:, now]
            if d_membrane is not None:
                direct = direct + d_membrane[:, now]
            by_pre, by_s = rule.by_pre(pre, th, s), rule.by_s(pre, th, s)
            through = torch.addcmul(by_pre, g, by_s, value=int(reset_grad))
            if clamp:
                clamp_slope = softclamp_slope(rule.after(pre, th, s), clamp)
                through = through * clamp_slope
            through = through * after_each[:, now]

            parts = (x.unbind(1) for x in (g, direct, through, d_pre_now))
            for g_t, direct_t, through_t, d_pre_t in reversed([*zip(*parts)]):
                torch.addcmul(direct_t, through_t, d_after, out=d_pre_t)
                if w_rec is not None:
                    d_pre_t.addcmul_(g_t, d_s)
                    _add_recurrent(d_s.zero_(), d_pre_t, w_back)
                d_after = d_pre_t

            if need_theta:
                d_th = torch.empty_like(g)  # first d_v, then d_r, then d_theta
                torch.mul(d_pre[:, after], at_steps(beta, after), out=d_th[:, :m])
                d_th[:, m:] = d_v.unsqueeze(1)
                if clamp:
                    d_th *= clamp_slope
                d_th *= by_pre + rule.by_theta(pre, th, s)
                d_th -= d_pre_now
                if d_membrane is not None:
                    d_th += d_membrane[:, now]
                accumulate(d_theta, d_th, now)
            if need_beta:
                v = rule.after(pre, th, s)
                v = (softclamp(v, clamp) if clamp else v)[:, :m]
                accumulate(d_beta, v * d_pre[:, after], after)
        if need_beta:
            accumulate(d_beta, (v0 * d_pre[:, 0]).unsqueeze(1), slice(0, 1))
        d_v0 = d_pre[:, 0] * (beta if beta.dim() == 1 else beta[:, 0])
        d_w = gradient_of_w(s0, spikes, d_pre, w_rec, w_rec.dtype) if need_w else None
        return d_pre, d_beta, d_theta, d_w, d_v0, d_s, None


# ---- populations ------------------------------------------------------------------------------
# Neurons that share one membrane and differ in their threshold: their spikes say how large it is.


class _Population(torch.autograd.Function):
    """(v, theta, levels) -> what N populations send (B, T, N), spikes per population and step (N,).

    Some forty operations on each element: a CPU does them in pieces that stay in its cache, a GPU
    in two kernels that torch.compile makes of them.
    """

    @staticmethod
    def forward(ctx, v, theta, levels, surrogate, slope, dtype):
        rungs = levels.diff(dim=1, prepend=torch.zeros_like(levels[:, :1]))
        ctx.save_for_backward(v, theta, rungs)
        ctx.surrogate, ctx.slope = surrogate, slope
        sent, fired = v.new_empty(v.shape, dtype=dtype), torch.zeros_like(v[0, 0])
        for piece, out in zip(_in_cache(v), _in_cache(sent)):
            fused(v, _send)(piece, theta, levels.to(v.dtype), out, fired)
        return sent, fired / v[..., 0].numel()

    @staticmethod
    def backward(ctx, d_sent, d_rate):
        v, theta, rungs = ctx.saved_tensors
        d_rate, d_v = d_rate / v[..., 0].numel(), v.new_empty(v.shape)
        pieces = zip(_in_cache(v), _in_cache(d_sent), _in_cache(d_v))
        back, how = fused(v, _send_back), (theta, rungs, d_rate, ctx.surrogate.grad, ctx.slope)
        d_rungs = sum(back(*piece, *how) for piece in pieces)
        d_levels = d_rungs - F.pad(d_rungs[:, 1:], (0, 0, 0, 1))
        return d_v, None, d_levels, None, None, None


def _send(v, theta, levels, sent, fired):
    """Write to `sent` what a piece of v (n, N) sends, and count in `fired` (N,) its spikes."""
    q = sent.zero_() if sent.dtype == v.dtype else torch.zeros_like(v)
    reached = torch.empty_like(v)
    for sign, level in zip((1, -1), levels):
        for k in range(len(theta)):
            (torch.ge if sign > 0 else torch.le)(v, sign * theta[k], out=reached)
            if k == 0:
                fired += reached.sum(0)
            torch.lerp(q, level[k], reached, out=q)  # where it is reached, this level instead
    sent.copy_(q)  # of q to itself is free


def _send_back(v, d_sent, d_v, theta, rungs, d_rate, g, slope):
    """Write the gradient by a piece of v to d_v; returns that by the step to each level."""
    d_q, d_rungs = d_sent.to(v.dtype), []
    total, reached = torch.zeros_like(v), torch.empty_like(v)
    for sign, rung in zip((1, -1), rungs):
        for k in range(len(theta)):
            u = torch.add(-theta[k], v, alpha=sign)
            d_rungs.append(torch.ge(u, 0, out=reached).mul_(d_q).sum(0))
            d_s = d_q * rung[k] + d_rate if k == 0 else d_q * rung[k]
            total.addcmul_(d_s, g(u, slope), value=sign)
    d_v.copy_(total)
    return torch.stack(d_rungs).view_as(rungs)


def fused(x, function):
    """`function`; compiled if x is on a GPU, so that each element is read once."""
    return _compiled(function) if x.is_cuda and not torch.compiler.is_compiling() else function


_compiled = functools.cache(torch.compile)


def _in_cache(x):
    """x (B, T, N) as pieces (n, N), on a CPU of about 128k elements each."""
    x = x.flatten(0, 1)
    return x.split(max(1, 131072 // x.shape[1]) if x.device.type == "cpu" else len(x))


def population(v, theta, levels, surrogate="triangle", slope=None, dtype=None):
    """The spikes of N populations of neurons that watch one membrane each, v (B, T, N).

        s_k = 1[theta_k <= v < theta_k+1]        lateral inhibition: only the highest one reached
        sent = sum over k of levels_k * s_k      so at most one spike per population and step
    theta (K,) ascends. levels (sides, K, N): what a spike of each neuron weighs; with two sides the
    second one's neurons watch -v. The gradient passes each threshold by the surrogate; with the
    triangle their sum is nearly constant where slope * (spacing of theta) is nearly 1.

    Returns sent (B, T, N), in `dtype` or v's, and spikes per population and step (N,), with grad.
    """
    chosen = entry(SURROGATES, "surrogate", surrogate)
    slope = chosen.slope if slope is None else slope
    return _Population.apply(v, theta, levels, chosen, slope, dtype or v.dtype)


# ---- synapses ---------------------------------------------------------------------------------


class Seen(NamedTuple):
    """What a part of the model may read beside its input."""

    tokens: torch.Tensor  # (B, T)
    stress: torch.Tensor = None  # () of the environment (Real Sam)
    spikes: torch.Tensor = None  # (B, T, N) of the layer that fired last
    membranes: tuple = ()  # of the blocks so far that show theirs, (B, T, N) each


@dataclass
class Report:
    """What a part of the model records; that of a whole forward pass is the sum over its parts."""

    rates: list = field(default_factory=list)  # per layer: (N,) spikes per neuron and token (frame)
    synapses: list = field(default_factory=list)  # per spike-fed matrix: (operations that a token
    #                                               triggers, the same if all neurons fired)
    macs: int = 0  # multiplications per token that floats feed: matrices, attention
    losses: dict = field(default_factory=dict)  # name -> scalar that training adds to the loss
    log: dict = field(default_factory=dict)  # name -> scalar that is worth a look
    shown: dict = field(default_factory=dict)  # what the following parts find in their Seen
    hidden: torch.Tensor = None  # (B, T, D) what the last part leaves to the readout

    def add(self, part):
        """Count what a part has recorded, too."""
        self.rates += part.rates
        self.synapses += part.synapses
        self.macs += part.macs
        self.log |= part.log
        for name, value in part.losses.items():
            self.add_loss(name, value)

    def add_loss(self, name, value):
        self.losses[name] = self.losses.get(name, 0.0) + value

    def fired(self, spikes, rate=None):
        """Note the latest layer's spikes (B, T, N); returns their rate (N,), gradient included."""
        self.shown["spikes"] = spikes
        self.rates.append(spikes.float().mean((0, 1)) if rate is None else rate)
        return self.rates[-1]

    def fed_by_spikes(self, rate, fan_out):
        """Count a matrix fed by spikes of these rates (N,): a spike triggers fan_out additions."""
        self.synapses.append((rate.detach().sum() * fan_out, rate.numel() * fan_out))


def rms(x):
    """x (..., n) at a root mean square of 1 over its last dimension (no gain: a matrix follows)."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


class Linear(nn.Linear):
    """A matrix fed by floats: every weight costs a multiplication at every token."""

    def forward(self, x, report, times=1):
        """times: how often per token it is applied, on average."""
        report.macs += round(times * self.weight.numel())
        return super().forward(x)


EVENT_RATE = 0.5  # share of rows above which reading all is as fast (float32; bfloat16: never)


def deliver(s, weight, report):
    """The current s W (..., fan_out) of spikes s (..., fan_in) through weight (fan_in, fan_out).
    One token without gradient reads only rows that fired. The latest layer's rate is known."""
    rate = report.rates[-1] if s is report.shown.get("spikes") else fused(s, rate_of)(s.detach())
    report.fed_by_spikes(rate, weight.shape[1])
    if s.numel() == len(weight) and not torch.is_grad_enabled():
        if (fired := rate.sum()) < EVENT_RATE * len(weight) or weight.dtype != s.dtype:
            bags = torch.get_num_threads() if fired >= 64 else 1
            return take_rows(s.view(1, -1), weight, bags).view(*s.shape[:-1], -1)
    is_narrow = weight.itemsize < s.itemsize and s.numel() > 64 * len(weight)
    if is_narrow and not has_bfloat16(s.device.type):
        weight = weight.to(s.dtype)  # multiplied faster than bfloat16 that is imitated
    return F.linear(s.to(weight.dtype), weight.t()).to(s.dtype)


def take_rows(s, weight, bags):
    """s W of spikes s (texts, fan_in), from the rows that fired; of one text in `bags` at once."""
    active = s.flatten().nonzero().flatten()
    level, texts = s.flatten().take(active), len(s)
    if texts == 1:
        start = torch.arange(bags, device=s.device) * (active.shape[0] // bags)
    else:
        start = torch.searchsorted(active, torch.arange(texts, device=s.device) * len(weight))
        active = active % len(weight)
    sums = torch.embedding_bag(weight, active, start, False, 0, False, level.to(weight.dtype))[0]
    return sums.to(s.dtype) if texts > 1 else sums.sum(0, True, dtype=s.dtype)


def rate_of(s):
    """The share of tokens at which each neuron of s (..., N) fired: (N,)."""
    return (s != 0).flatten(0, -2).float().mean(0)


def uniform(fan_in, *shape):
    """A parameter that starts as those of nn.Linear do: uniform within +-1 / sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))


class Synapse(nn.Module):
    """A matrix that may only be fed spikes, 0 or 1 (or, of a `population`, times a level), stored
    one row per presynaptic neuron."""

    def __init__(self, fan_in, fan_out, bias=True):
        super().__init__()
        self.weight = uniform(fan_in, fan_in, fan_out)
        self.bias = uniform(fan_in, fan_out) if bias else None

    def forward(self, s, report):  # spikes (..., fan_in) -> (..., fan_out)
        y = deliver(s, self.weight, report)
        return y if self.bias is None else y + self.bias


# ---- a picture --------------------------------------------------------------------------------


def main():
    """Draw spikes (|) and membranes (shades) of eight neurons of growing decay for 72 steps."""
    torch.manual_seed(1)
    N, T = 8, 72
    beta, theta = torch.linspace(0.0, 0.98, N), torch.ones(N)
    current = (torch.rand(1, T, 1) < 0.4).float() * 0.7  # the same input to all of them
    spikes, membrane, _ = lif_torch(current.expand(1, T, N).contiguous(), beta, theta)
    print("The same random input, eight neurons from forgetful to patient. | is a spike.\n")
    print(" input      " + "".join(".*"[int(x > 0)] for x in current[0, :, 0]))
    for n in range(N):
        shade = (membrane[0, :, n].clamp(0, 0.99) * 5).int()
        row = "".join("|" if s else " .:-="[k] for s, k in zip(spikes[0, :, n], shade))
        print(f" beta {beta[n]:.2f}  {row}  rate {spikes[0, :, n].mean():.2f}")


if __name__ == "__main__":
    import config  # how a closed pipe and Ctrl-C end

    with config.one_line():
        main()
