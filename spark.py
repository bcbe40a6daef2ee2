"""NeuronSpark (arXiv 2603.16148): neurons that run several steps, called frames, within a token."""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from blocks import Block, block
from kernels import load, obstacle_to, run_either, surrogate_grad, tl, triton
from lif import Linear, lif_torch

CHANNELS = 256  # neurons of a program: loads ahead of time bring 4 bytes per thread, or more

# ---- neurons that run several frames within a token (NeuronSpark, arXiv 2603.16148) ------------
#
#     symbol   row form (N,)   step form (B, F, N)       F frames, all those of a sequence's tokens
#     beta     sigmoid(b)      sigmoid(b)                decay
#     alpha    1 - beta        softplus(a)               gain of the input
#     theta    t               0.1 + |t|                 threshold
#
#     pre = beta * v + alpha * x      # charge
#     s   = 1 if pre >= theta else 0  # fire
#     v   = pre - theta * s           # reset
#
# What such a neuron passes on is its membrane v (step form), or the leak of it, (1 - beta) * v
# (row form): floats. Spikes, and with them the surrogate's gradient, act through the reset alone.
# In NeuronSpark's own code spikes are constants there, so that no surrogate reaches the loss:
# reset_grad=False does the same, and the model learns far worse.


class Frames:
    """Which frames run: token t of sequence b has count[b, t] of them, then the neurons stand still
    until the next token. Frames follow each other without gaps, padded to F at the end.

    count (B, T) int64, at least 1; most, the largest that a count can be.
    """

    def __init__(self, count, most):
        ends = count.cumsum(1)  # (B, T)
        B, T = count.shape
        self.count, self.length = count, ends[:, -1]  # (B,) frames of a sequence
        # on the meta device there are no numbers: as many frames as there can be
        size, total = T * most, B * T * most
        if not count.is_meta:
            size, total = torch.stack([self.length.max(), self.length.sum()]).tolist()
        self.size, self.per_token = size, total / (B * T)
        step = torch.arange(size, device=count.device).expand(B, size).contiguous()
        self.token = torch.searchsorted(ends, step, right=True).clamp(max=T - 1)  # (B, F)
        self.nth = (step - (ends - count).gather(1, self.token)).clamp(max=most - 1)  # of its token
        self.live = step < self.length[:, None]  # (B, F), False in the padding

    def unroll(self, x):
        """A value per token (B, T, N), held for its frames: (B, F, N)."""
        return x.gather(1, self.token[..., None].expand(-1, -1, x.shape[-1]))

    def pool(self, y, weight):
        """Weighted sums over each token's frames: y (B, F, N), weight (B, T, most) -> (B, T, N).

        In the same order every time, which index_add on a GPU does not promise: a recomputed block
        must ponder as long as it did before.
        """
        w = weight.flatten(1).gather(1, self.token * weight.shape[2] + self.nth) * self.live
        padding = self.size - self.length  # (B,), the frames of a token that is not there
        lengths = torch.cat([self.count, padding[:, None]], 1)
        y = y * w[..., None].to(y.dtype)
        return torch.segment_reduce(y, "sum", lengths=lengths, axis=1, unsafe=True)[:, :-1]


# ---- in plain PyTorch -------------------------------------------------------------------------


def plif_torch(x, b, t, a=None, v=None, *, frames, slope=4.0, reset_grad=True):
    """Run N parametric leaky neurons over the frames of a batch; the equations stand above.

    x: (B, F, N), an input per frame; or (B, T, N), one per token, held for the token's frames.
    b, t: (N,), the row form; or, together with a, (B, F, N), the step form. v: (B, N) or None.
    frames: a Frames of count (B, T). slope: of the surrogate, a sigmoid. reset_grad: whether the
    gradient also flows through the s of the reset.

    Returns what is passed on (B, F, N), meaningless in the padding; the rate (N,), spikes per frame
    that runs; and the membrane (B, N) after each sequence's last frame; in float32.
    """
    check_plif(x, b, t, a, v, frames)
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, b, t, a, v = (y if y is None else y.to(dtype) for y in (x, b, t, a, v))
    x = x if x.shape[1] == frames.size else frames.unroll(x)
    beta = torch.sigmoid(b)
    alpha, theta = (1 - beta, t) if a is None else (F.softplus(a), 0.1 + t.abs())
    state = None if v is None else (v, torch.zeros_like(v))
    spikes, pre, _ = lif_torch(
        alpha * x, beta, theta, state=state, surrogate="sigmoid", slope=slope, reset_grad=reset_grad
    )
    v = pre - theta * (spikes if reset_grad else spikes.detach())  # after the reset, of all frames
    rate = torch.einsum("bf,bfn->n", frames.live.to(dtype), spikes) / frames.live.sum()
    last = (frames.length - 1)[:, None, None].expand(-1, 1, v.shape[2])
    return v if a is not None else (1 - beta) * v, rate, v.gather(1, last).squeeze(1)


def check_plif(x, b, t, a, v, frames):
    """ValueError if the arguments do not fit each other."""
    B, T = frames.count.shape
    if x.dim() != 3 or x.shape[0] != B or x.shape[1] not in (T, frames.size):
        raise ValueError(f"x must be ({B}, {T} or {frames.size}, N), got {tuple(x.shape)}")
    N = x.shape[2]
    shape = (N,) if a is None else (B, frames.size, N)
    for name, y in (("a", a), ("b", b), ("t", t)):
        if y is not None and y.shape != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(y.shape)}")
    if v is not None and v.shape != (B, N):
        raise ValueError(f"v must be {(B, N)}, got {tuple(v.shape)}")


# ---- in Triton --------------------------------------------------------------------------------
#
# The equations stand above; here they are fused with sigmoid, softplus, |.|, alpha * x and the
# leak. A program owns COLS neurons of a sequence and walks over the frames that really run, v in a
# register. A held input is read once per token, and its gradient is summed in a register. Kept for
# backward is u = pre - theta and nothing else: s is in its sign.
#
# Backward, from the last frame to the first; a dash marks what belongs to the frame before:
#   d_v   = d_out * (1 - beta, or 1) + beta_after * d_pre_after      (and d_v of the last frame)
#   d_pre = d_v + g * (d_s - theta * d_v),   d_s = d_rate / number of frames; without reset_grad
#                                            - theta * d_v is not there
#   d_theta = -s * d_v - (d_pre - d_v) = (1 - s) * d_v - d_pre
#   d_beta = d_pre * v',  d_alpha = d_pre * x,  d_x = alpha * d_pre
# In the row form alpha = 1 - beta, and so is the leak: d_beta -= d_pre * x + d_out * v.


@triton.jit
def _row(N, COLS: tl.constexpr):
    """This program's sequence, in int64; its neurons (COLS,), and which of them exist."""
    blocks = tl.cdiv(N, COLS)
    neurons = tl.program_id(0) % blocks * COLS + tl.arange(0, COLS)
    return (tl.program_id(0) // blocks).to(tl.int64), neurons, neurons < N


@triton.jit
def _parameters_kernel(p_b, p_t, p_a, at, live):
    """beta, alpha, theta of a frame, or, in the row form, which has no p_a, of all frames."""
    beta, theta = tl.sigmoid(load(p_b, at, live)), load(p_t, at, live)
    if p_a is None:
        return beta, 1 - beta, theta
    else:
        a = load(p_a, at, live)
        softplus = tl.where(a > 20, a, tl.log(1 + tl.exp(tl.minimum(a, 20.0))))  # torch's threshold
        return beta, softplus, 0.1 + tl.abs(theta)


@triton.jit
def _plif_forward_kernel(
    p_x, p_b, p_t, p_a, p_v0, p_ends,  # p_a None: row form, b and t are (N,)
    p_out, p_u, p_spikes, p_v,
    T, F, N,
    HELD: tl.constexpr,  # x is (B, T, N), one per token; else (B, F, N), one per frame, and T is 1
    COLS: tl.constexpr,
):  # fmt: skip
    row, neurons, live = _row(N, COLS)
    v = load(p_v0, row * N + neurons, live)
    spikes, zero = tl.zeros_like(v), tl.zeros_like(v)
    if p_a is None:
        beta, alpha, theta = _parameters_kernel(p_b, p_t, p_a, neurons, live)

    start = tl.load(p_ends) * 0  # 0 in int64, as all frames are
    for t in range(T):
        end = tl.load(p_ends + row * T + t)
        if HELD:
            x = load(p_x, (row * T + t) * N + neurons, live)
        for f in tl.range(start, end, num_stages=4):  # loads run ahead of the frames that use them
            now = (row * F + f) * N + neurons
            if not HELD:
                x = load(p_x, now, live)
            if p_a is not None:
                beta, alpha, theta = _parameters_kernel(p_b, p_t, p_a, now, live)

            pre = tl.fma(beta, v, alpha * x)  # charge
            s = tl.where(pre >= theta, 1.0, 0.0)  # fire
            v = pre - theta * s  # reset

            spikes += s
            tl.store(p_out + now, (1 - beta) * v if p_a is None else v, mask=live)
            tl.store(p_u + now, pre - theta, mask=live)
        start = end
    for f in range(start, F):  # what is fed to matrices must be finite
        tl.store(p_out + (row * F + f) * N + neurons, zero, mask=live)
    tl.store(p_spikes + row * N + neurons, spikes, mask=live)
    tl.store(p_v + row * N + neurons, v, mask=live)


@triton.jit
def _plif_backward_kernel(
    p_x, p_b, p_t, p_a, p_v0, p_ends, p_u,
    p_d_out, p_d_s, p_d_v,  # each None if the loss does not depend on it; d_s (N,) of any spike
    p_d_x, p_d_b, p_d_t, p_d_a, p_d_v0,
    T, F, N, slope,
    HELD: tl.constexpr, RESET_GRAD: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row, neurons, live = _row(N, COLS)
    state = row * N + neurons
    v0 = load(p_v0, state, live)
    zero = tl.zeros_like(v0)
    carry = zero if p_d_v is None else load(p_d_v, state, live)  # then beta * d_pre of frame f + 1
    d_s = zero if p_d_s is None else load(p_d_s, neurons, live)
    d_pre, d_beta, d_theta, beta = zero, zero, zero, zero
    if p_a is None:
        beta, alpha, theta = _parameters_kernel(p_b, p_t, p_a, neurons, live)

    length = tl.load(p_ends + row * T + T - 1)
    end, last = length, (row * F + length - 1) * N + neurons
    for i in range(T):
        t = T - 1 - i
        start = tl.load(p_ends + row * T + t - 1, mask=t > 0, other=0)
        if HELD:
            x = load(p_x, (row * T + t) * N + neurons, live)
            d_x = zero
        for j in tl.range(0, end - start, num_stages=4):
            f = end - 1 - j
            now = (row * F + f) * N + neurons
            slope_after = beta * (1 - beta)
            if not HELD:
                x = load(p_x, now, live)
            if p_a is not None:
                beta, alpha, theta = _parameters_kernel(p_b, p_t, p_a, now, live)
            u = load(p_u, now, live)
            s = tl.where(u >= 0, 1.0, 0.0)
            v = u + theta * (1 - s)
            if p_a is None:
                d_beta += d_pre * v
            else:  # d_b of frame f + 1: this v is its v', and its d_pre is at hand
                tl.store(p_d_b + (now + N), d_pre * v * slope_after, mask=live & (now < last))

            d_v = carry
            if p_d_out is not None:
                d_out = load(p_d_out, now, live)
                d_v += (1 - beta) * d_out if p_a is None else d_out
                if p_a is None:
                    d_beta -= d_out * v
            by_s = d_s - theta * d_v if RESET_GRAD else d_s
            d_pre = d_v + surrogate_grad(u, slope, "sigmoid") * by_s
            carry = beta * d_pre

            d_theta_now = (1 - s) * d_v - d_pre
            if p_a is None:
                d_beta -= d_pre * x
                d_theta += d_theta_now
            else:
                sign = tl.where(load(p_t, now, live) < 0, -1.0, 1.0)
                tl.store(p_d_t + now, d_theta_now * sign, mask=live)
                tl.store(p_d_a + now, d_pre * x * (1 - tl.exp(-alpha)), mask=live)
            if HELD:
                d_x += alpha * d_pre
            else:
                tl.store(p_d_x + now, alpha * d_pre, mask=live)
        if HELD:
            tl.store(p_d_x + (row * T + t) * N + neurons, d_x, mask=live)
        end = start

    tl.store(p_d_v0 + state, carry, mask=live)
    d_beta += d_pre * v0
    first = state if p_a is None else row * F * N + neurons
    tl.store(p_d_b + first, d_beta * beta * (1 - beta), mask=live)
    if p_a is None:
        tl.store(p_d_t + state, d_theta, mask=live)
    for f in range(length, F):
        now = (row * F + f) * N + neurons
        if not HELD:
            tl.store(p_d_x + now, zero, mask=live)
        if p_a is not None:
            tl.store(p_d_b + now, zero, mask=live)
            tl.store(p_d_t + now, zero, mask=live)
            tl.store(p_d_a + now, zero, mask=live)


def _launch_plif(kernel, tensors, numbers, **options):
    """Run a kernel over all sequences and neurons; numbers begin with T, F, N."""
    grid = (tensors[4].shape[0] * triton.cdiv(numbers[2], CHANNELS),)  # tensors[4] is v0
    with torch.cuda.device_of(tensors[0]):
        kernel[grid](
            *tensors, *numbers, **options, COLS=CHANNELS, num_warps=4, enable_fp_fusion=False
        )


class _PlifTriton(torch.autograd.Function):
    """The two kernels; x may be held, out and u are in the dtype of x."""

    @staticmethod
    def forward(ctx, x, b, t, a, v0, frames, slope, reset_grad):
        B, F, N = v0.shape[0], frames.size, v0.shape[1]
        held = x.shape[1] != F
        ends = frames.count.cumsum(1) if held else frames.length[:, None]
        inputs = [y if y is None else y.contiguous() for y in (x, b, t, a, v0, ends)]
        out, u = x.new_empty(B, F, N), x.new_empty(B, F, N)
        spikes, v = (x.new_empty(B, N, dtype=torch.float32) for _ in range(2))
        ctx.shape, ctx.slope = (ends.shape[1], F, N), slope
        ctx.options = {"HELD": held, "RESET_GRAD": reset_grad}
        _launch_plif(_plif_forward_kernel, (*inputs, out, u, spikes, v), ctx.shape, HELD=held)
        ctx.save_for_backward(*inputs, u)
        ctx.set_materialize_grads(False)
        return out, spikes.sum(0) / frames.length.sum(), v

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_rate, d_v):
        x, b, t, a, v0, ends, u = ctx.saved_tensors
        d_s = None if d_rate is None else d_rate / ends[:, -1].sum()
        cotangents = (y if y is None else y.contiguous() for y in (d_out, d_s, d_v))
        # of the row form's b and t one row per sequence: no atomics, a reproducible sum
        like = (x, v0, v0, None, v0) if a is None else (x, b, t, a, v0)
        d_x, d_b, d_t, d_a, d_v0 = (y if y is None else torch.empty_like(y) for y in like)
        _launch_plif(
            _plif_backward_kernel,
            (x, b, t, a, v0, ends, u, *cotangents, d_x, d_b, d_t, d_a, d_v0),
            (*ctx.shape, ctx.slope), **ctx.options,
        )  # fmt: skip
        if a is None:
            d_b, d_t = d_b.sum(0), d_t.sum(0)
        return d_x, d_b, d_t, d_a, d_v0, None, None, None


def plif_triton(x, b, t, a=None, v=None, *, frames, slope=4.0, reset_grad=True):
    """plif_torch on the GPU: the same arguments, shapes, results and errors.

    x is float32, bfloat16 or float16 and so is what is passed on; the rate and v are float32.
    """
    check_plif(x, b, t, a, v, frames)
    if obstacle := obstacle_to(x):
        raise obstacle
    v = x.new_zeros(x.shape[0], x.shape[2], dtype=torch.float32) if v is None else v
    return _PlifTriton.apply(x, b, t, a, v, frames, float(slope), bool(reset_grad))


def plif(x, b, t, a=None, v=None, **options):
    """The neurons of plif_torch on the backend that suits, chosen as for `lif`."""
    return run_either(plif_triton, plif_torch, (x, b, t, a, v), **options)


# ---- the block --------------------------------------------------------------------------------


class PLIF(nn.Module):
    """LIF neurons with a learned decay and threshold each; they pass on their leak."""

    def __init__(self, config, n, theta):
        super().__init__()
        self.reset_grad = config.reset_grad
        self.w = nn.Parameter(0.5 * torch.randn(n))  # decay sigmoid(w)
        self.theta = nn.Parameter(theta * (0.5 + torch.rand(n)))

    def forward(self, x, v, frames, report):  # (B, T or F, n) -> (B, F, n)
        leak, rate, v = plif(x, self.w, self.theta, v=v, frames=frames, reset_grad=self.reset_grad)
        report.rates.append(rate)
        return leak, v


class SelectiveNeurons(nn.Module):
    """N hidden neurons per channel, whose decay, gain and threshold depend on the input.

    y = (W_out v) * sigmoid(W_g z) + W_s z, summed over frames; v the membranes after the reset.
    """

    def __init__(self, config):
        super().__init__()
        D, N = config.n_hidden, config.n_state
        self.config, self.sites = config, D * N
        self.w_in, self.w_out = Linear(D, D * N, bias=False), Linear(D * N, D, bias=False)
        self.w_beta, self.w_alpha, self.w_theta = (Linear(D, D * N) for _ in range(3))
        self.w_gate, self.w_skip = Linear(D, D, bias=False), Linear(D, D, bias=False)
        beta = torch.linspace(0.8, 0.99, N)
        # resets take what the input brings, theta * rate ~ sqrt(1 - beta^2); with this factor,
        # found by measuring random weights, rates fall from 25% to 8% over a channel
        theta = 0.06 * (1 - beta**2).sqrt() / torch.linspace(0.25, 0.08, N)
        with torch.no_grad():
            self.w_in.weight.mul_((1 - beta**2).sqrt().repeat(D)[:, None])
            for w in (self.w_beta, self.w_alpha, self.w_theta):
                w.weight.mul_(0.1)
            self.w_beta.bias.copy_(torch.logit(beta).repeat(D) + 0.1 * torch.randn(D * N))
            self.w_alpha.bias.fill_(0.5413)  # softplus of it is 1
            self.w_theta.bias.copy_(theta.repeat(D) - 0.1)

    def forward(self, z, v, frames, weight, report):  # (B, F, D) -> (B, T, D)
        k = frames.per_token
        v_all, rate, v = plif(
            self.w_in(z, report, k), self.w_beta(z, report, k), self.w_theta(z, report, k),
            self.w_alpha(z, report, k), v, frames=frames, reset_grad=self.config.reset_grad,
        )  # fmt: skip
        report.rates.append(rate)
        y = self.w_out(v_all, report, k) * torch.sigmoid(self.w_gate(z, report, k))
        return frames.pool(y, weight) + self.w_skip(frames.pool(z, weight), report), v


class SpikingFFN(nn.Module):
    """y = W_down (leak(W_gate z) * leak(W_up z)) + W_skip z, frames are summed before both W."""

    def __init__(self, config):
        super().__init__()
        D, H = config.n_hidden, config.d_ff
        self.sites = 2 * H
        self.w_gate, self.w_up = Linear(D, H, bias=False), Linear(D, H, bias=False)
        self.w_down, self.w_skip = Linear(H, D, bias=False), Linear(D, D, bias=False)
        self.neurons = PLIF(config, 2 * H, 0.15)

    def forward(self, z, v, frames, weight, report):  # (B, F, D) -> (B, T, D)
        k = frames.per_token
        x = torch.cat([self.w_gate(z, report, k), self.w_up(z, report, k)], -1)
        leak, v = self.neurons(x, v, frames, report)
        gate, up = leak.chunk(2, -1)
        y = self.w_down(frames.pool(gate * up, weight), report)
        return y + self.w_skip(frames.pool(z, weight), report), v


class Pondered(nn.Module):
    """x + r - mean(r), r = W_o sum_k lambda_k f_k(leak(PLIF(RMSNorm(x)))), over frames k.

    How long a token ponders is known before its first frame, unlike in the paper, where p_k comes
    from frame k and all K frames are always run: here p = sigmoid(w . RMSNorm(x) / sqrt(D) + b) is
    the probability to halt after any of them (the root keeps Adam's steps small: the cost, which is
    there from the first step, must not win before frames prove useful). E[K] = sum_k (1-p)^(k-1) up
    to K is the expected number of frames. A token runs that number, rounded up; its last frame is
    weighted by the fraction. So the output is continuous in p, and shows whether more frames would
    help. lambda_k ~ p (1-p)^(k-1) over the frames that run, in sum 1. In the others the neurons
    stand still. With `adaptive` off all K run, and E[K] is sum_k k lambda_k, as in the paper: where
    on average the output comes from, 7.9 of 16 at the start against our 12.9.
    W_o and w (Xavier x 0.01) start as published; all such values at once do worse: EXPERIMENTS.md.
    """

    adaptive = True

    def __init__(self, config, inner):
        super().__init__()
        D = config.n_hidden
        self.config = config
        self.norm = nn.RMSNorm(D, eps=1e-6)
        self.neurons = PLIF(config, D, 0.5)
        self.inner = inner(config)
        self.sites = [D, self.inner.sites]
        self.w_halt = nn.Parameter(0.01 * math.sqrt(6) * torch.empty(D).uniform_(-1, 1))
        self.b_halt = nn.Parameter(torch.full((1,), -3.5))
        self.w_o = Linear(D, D, bias=False)
        nn.init.normal_(self.w_o.weight, std=0.02 / math.sqrt(2 * config.n_layer))

    def forward(self, x, state, report):  # (B, T, D) -> (B, T, D)
        v, v_inner = state or (None, None)
        h = self.norm(x)
        frames, weight, expected = self.ponder(h)
        z, v = self.neurons(h, v, frames, report)
        y, v_inner = self.inner(z, v_inner, frames, weight, report)
        r = self.w_o(y, report)
        return x + (r - r.mean(-1, keepdim=True)), (v, v_inner), expected, frames.per_token

    def ponder(self, h):
        """h (B, T, D) -> the Frames to run, lambda (B, T, K), E[K] (B, T)."""
        K = self.config.k_max
        k = torch.arange(K, device=h.device)
        logit = (h * self.w_halt).sum(-1, keepdim=True) / math.sqrt(h.shape[-1]) + self.b_halt
        reached = torch.exp(k * F.logsigmoid(-logit))  # (1-p)^(k-1): frame k is reached
        expected = reached.sum(-1)
        if self.adaptive:
            count = expected.detach().ceil().long()
            reached = reached * (expected.unsqueeze(-1) - k).clamp(0, 1)
        weight = reached / reached.sum(-1, keepdim=True)
        if not self.adaptive:
            count = torch.full_like(expected, K, dtype=torch.long)
            expected = (weight * (k + 1)).sum(-1)
        return Frames(count, K), weight, expected


class SparkOutput(nn.Module):
    """NeuronSpark's last neurons, all K frames of them, averaged; and "lateral inhibition"."""

    def __init__(self, config):
        super().__init__()
        D = config.n_hidden
        self.k_max, self.sites = config.k_max, [D]
        self.norm, self.inhibit = nn.RMSNorm(D, eps=1e-6), nn.RMSNorm(D, eps=1e-6)
        self.neurons = PLIF(config, D, 0.3)
        self.w = Linear(D, D)

    def forward(self, x, v, seen, report):  # (B, T, D), v (B, D) or None -> (B, T, D), v
        B, T, D = x.shape
        frames = Frames(torch.full((B, T), self.k_max, device=x.device), self.k_max)
        leak, v = self.neurons(self.norm(x), v, frames, report)
        y = self.w(leak.view(B, T, -1, D).mean(2), report)
        return self.inhibit(y.to(x.dtype)), v  # in the dtype of the residual stream


@dataclass(frozen=True)
class SparkSettings:
    # spark
    n_state: int = 8  # hidden neurons per channel
    k_max: int = 16  # frames within a token, at most
    ponder_weight: float = 0.01  # weight of E[K], the frames that a token expects to run

    RANGE = {"n_state": (1, math.inf), "k_max": (1, 1000)}


@block("spark", SparkSettings)
class SparkBlock(Block):
    """NeuronSpark (arXiv 2603.16148): selective neurons, then a spiking feed-forward part.

    Neurons run several frames within each token; the residual stream, the same in all of them, is
    kept per token. State: of both parts the membranes (input, hidden), (B, n) each.
    """

    closing, has_norm, shows_spikes = SparkOutput, True, False
    neurons = (".w", ".theta", "w_beta.bias", "w_alpha.bias", "w_theta.bias")  # not halting, norms

    def __init__(self, config, index):
        super().__init__()
        self.index, self.weight = index, config.ponder_weight / config.n_layer
        self.halves = nn.ModuleList(Pondered(config, f) for f in (SelectiveNeurons, SpikingFFN))
        self.sites = [n for half in self.halves for n in half.sites]

    def forward(self, x, state, seen, report):  # (B, T, D) -> (B, T, D)
        after, expected, run = [], 0.0, 0.0
        for half, before in zip(self.halves, state or (None, None)):
            x, now, e, k = half(x, before, report)
            after.append(now)
            expected, run = expected + e.mean() / 2, run + k / 2
        report.add_loss("ponder", self.weight * expected)  # E[K], mean over layers
        report.log[f"E[K] {self.index}"] = expected.detach()
        report.log[f"frames {self.index}"] = run  # E[K], rounded up token by token
        return x, after
