"""Fast forms: the scan of lif.py in Triton; `lif`, which picks Triton or PyTorch; one token of
block snn by events, on a CPU.

    pre = beta * v + I + s W            # charge
    s   = 1 if pre >= theta else 0      # fire
    v   = pre - theta * s               # reset

lif.py's glossary holds here too. One program owns a tile of ROWS sequences x COLS neurons and walks
over time with the tile's v (and s) in registers, in float32 whatever the input: a bfloat16 membrane
fires wrongly. Without recurrent synapses tiles know nothing of each other, so they are small, one
sequence each, and many. With them a tile is one head, and at least 16 sequences share each of its
products s W, as the tensor cores want.

A pointer is called p_x, and x is the tile it holds at this step. TRITON_INTERPRET=1, set before
Python starts, runs the kernels on the CPU, slowly; the tests do that.
"""

import os
from types import SimpleNamespace

import torch
from torch import library
from torch.autograd.function import once_differentiable

from lif import Options, check, gradient_of_w, lif_torch, rms, take_rows

try:
    import triton
    import triton.language as tl
except ImportError:  # as with PyTorch for CPU and Mac; to be read, the kernels need only this:
    triton = SimpleNamespace(jit=lambda kernel: kernel)
    tl = SimpleNamespace(constexpr=None)
    HAS_TRITON = INTERPRETED = False
else:
    HAS_TRITON, INTERPRETED = True, triton.knobs.runtime.interpret

BACKEND = os.environ.get("LIF_BACKEND", "auto")  # auto | triton | torch: what all scans run on
NEURONS = 128  # neurons of a tile without recurrent synapses: one per thread of four warps
STEPS = 16  # and steps whose loads it starts together
SEQUENCES = 16  # sequences of a tile with them: the fewest that tl.dot takes
MAX_HEAD = 128  # neurons of a head: W stays on the chip for the whole scan, and must fit there

# ---- tiles ------------------------------------------------------------------------------------


@triton.jit
def _tile(B, N, width, ROWS: tl.constexpr, COLS: tl.constexpr):
    """This program's sequences (ROWS, 1), its neurons (1, COLS), and which of them exist.

    The neurons fall in blocks of `width` <= COLS. Sequences are int64, and with them all offsets
    made of them: B * T * N passes 2^31 in ordinary training.
    """
    blocks = tl.cdiv(N, width)
    block = tl.program_id(0) % blocks
    rows = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    return rows, block * width + cols, (rows < B) & (cols < width) & (block * width + cols < N)


@triton.jit
def load(p, at, live):
    """A tile in float32, 0 where no neuron lives."""
    return tl.load(p + at, mask=live, other=0.0).to(tl.float32)


@triton.jit
def _head(p_w, N, width, COLS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """W of this program's head, or W^T, (COLS, COLS), padded with zeros; in its own dtype."""
    head = tl.program_id(0) % tl.cdiv(N, width)
    row, col = tl.arange(0, COLS)[:, None], tl.arange(0, COLS)[None, :]
    at = col * width + row if TRANSPOSED else row * width + col
    live = (row < width) & (col < width)
    return tl.load(p_w + head * width * width + at, mask=live, other=0.0)


# ---- surrogates, resets and the soft clamp ----------------------------------------------------

# those that have a branch below; with any other `lif` takes plain PyTorch
KERNEL_SURROGATES = ("fast_sigmoid", "atan", "sigmoid", "gaussian", "triangle", "ste")
KERNEL_RESETS = ("soft", "none")


@triton.jit
def surrogate_grad(u, k, NAME: tl.constexpr):
    """g(u) = ds/du with slope k; the formulas of lif.SURROGATES, where their sources are."""
    if NAME == "fast_sigmoid":
        x = 1 + k * tl.abs(u)
        return 1 / (x * x)
    elif NAME == "atan":
        x = u * (1.5707963267948966 * k)  # pi/2
        return k / 2 / (1 + x * x)
    elif NAME == "sigmoid":
        return k * tl.sigmoid(k * u) * tl.sigmoid(-k * u)
    elif NAME == "gaussian":
        x = u * k
        return tl.exp(-x * x) * (k * 0.5641895835477563)  # 1/sqrt(pi)
    elif NAME == "triangle":
        return tl.maximum(k - k * k * tl.abs(u), 0.0)
    else:
        tl.static_assert(NAME == "ste", "this surrogate has no kernel")
        return tl.zeros_like(u) + k


@triton.jit
def _reset(pre, theta, s, RESET: tl.constexpr):
    """The membrane after the reset; the formulas of lif.RESETS."""
    if RESET == "soft":
        return pre - theta * s
    else:
        tl.static_assert(RESET == "none", "this reset has no kernel")
        return pre


@triton.jit
def _reset_slopes(pre, theta, s, RESET: tl.constexpr):
    """Its derivatives by pre, by s and by theta."""
    zero = tl.zeros_like(s)
    if RESET == "soft":
        return zero + 1, -theta, -s
    else:
        return zero + 1, zero, zero


@triton.jit
def _softclamp(x, BOUND: tl.constexpr):
    return tl.erf(x * (0.886226925452758 / BOUND)) * BOUND  # sqrt(pi)/2


@triton.jit
def _softclamp_slope(x, BOUND: tl.constexpr):
    x = x * (0.886226925452758 / BOUND)
    return tl.exp(-x * x)


# ---- the scan ---------------------------------------------------------------------------------
#
# Forward is the three lines above. Backward goes from the last step to the first; lif.py derives
# it, a dash marks what belongs to another step (v', s' to the one before, d_pre' to the one after):
#   d_s   = d_spikes + d_pre' W^T
#   d_r   = d_v * softclamp'                      r, the membrane after the reset
#   d_f   = g * (d_s + by_s * d_r)                what passes through the fire line; by_s = 0 if
#                                                 reset_grad is off
#   d_pre = d_membrane + by_pre * d_r + d_f
#   d_v   = beta * d_pre                          of the step before
#   d_I = d_pre,  d_beta = d_pre * v',  d_theta = by_theta * d_r - d_f,  d_W = s'^T d_pre
# Kept for this is u = pre - theta, in bfloat16 where the current is 16 bits wide, and nothing else:
# its sign is s, and pre = u + theta. If the membrane is asked for, it serves instead. (dW, made
# afterwards, takes the spikes.)
#
# A step needs the one before it, but its inputs do not: a thread that loaded and stepped in turn
# would wait for memory T times. So time goes in blocks of STEPS: all loads of a block, then its
# steps; and what is left of T goes one step at a time.


@triton.jit
def _loads(p, now, step, neurons, live, C: tl.constexpr, PER_STEP: tl.constexpr):
    """The tiles of C steps as a tuple, `step` apart in (B, T, N); or a tile of (N,), C times."""
    tiles = ()
    if not PER_STEP:
        tile = load(p, neurons, live)
    for i in tl.static_range(C):
        if PER_STEP:
            tile = load(p, now, live)
            now += step  # one after the other: C addresses at once would cost as many registers
        tiles += (tile,)
    return tiles


@triton.jit
def _forward_kernel(
    p_current, p_beta, p_theta, p_w, p_v0, p_s0,  # p_w None: no recurrent synapses
    p_spikes, p_membrane, p_u, p_v, p_s,  # p_membrane or p_u is None
    B, T, N, width,
    BETA_STEPS: tl.constexpr, THETA_STEPS: tl.constexpr,  # per step (B, T, N), or per neuron (N,)
    RESET: tl.constexpr, CLAMP: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    rows, neurons, live = _tile(B, N, width, ROWS, COLS)
    state = rows * N + neurons  # where this tile lies in a (B, N) tensor
    v, s = load(p_v0, state, live), load(p_s0, state, live)
    if p_w is not None:
        w = _head(p_w, N, width, COLS, TRANSPOSED=False)

    now = rows * T * N + neurons  # and where in step t of a (B, T, N) one
    left = T
    for C in tl.static_range(STEPS, 0, 1 - STEPS if STEPS > 1 else -1):  # STEPS, then 1
        for _ in range(left // C):
            current = _loads(p_current, now, N, neurons, live, C, True)
            beta = _loads(p_beta, now, N, neurons, live, C, BETA_STEPS)
            theta = _loads(p_theta, now, N, neurons, live, C, THETA_STEPS)
            for i in tl.static_range(C):
                pre = tl.fma(beta[i], v, current[i])  # charge; rounds once, as torch.addcmul does
                if p_w is not None:
                    pre += tl.dot(s.to(w.dtype), w, input_precision="ieee")
                s = tl.where(pre >= theta[i], 1.0, 0.0)  # fire
                v = _reset(pre, theta[i], s, RESET)  # reset
                if CLAMP > 0:
                    v = _softclamp(v, CLAMP)

                tl.store(p_spikes + now, s, mask=live)
                if p_u is None:
                    tl.store(p_membrane + now, pre, mask=live)
                else:  # a u < 0 that bfloat16 rounded to 0 would turn into a spike
                    u = pre - theta[i]
                    tl.store(p_u + now, tl.where(s > 0, u, tl.minimum(u, -1e-37)), mask=live)
                now += N
        left %= C
    tl.store(p_v + state, v, mask=live)
    tl.store(p_s + state, s, mask=live)


@triton.jit
def _backward_kernel(
    p_beta, p_theta, p_w, p_v0, p_membrane, p_u,  # p_membrane or p_u is None
    p_d_spikes, p_d_membrane, p_d_v, p_d_s,  # each None if the loss does not depend on it
    p_d_current, p_d_beta, p_d_theta,  # the last two None if nobody asks
    p_d_v0, p_d_s0,
    B, T, N, width, slope,
    BETA_STEPS: tl.constexpr, THETA_STEPS: tl.constexpr,
    RESET: tl.constexpr, RESET_GRAD: tl.constexpr, CLAMP: tl.constexpr, SURROGATE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    rows, neurons, live = _tile(B, N, width, ROWS, COLS)
    state = rows * N + neurons
    zero = tl.zeros((ROWS, COLS), tl.float32)
    d_pre, d_beta, d_theta = zero, zero, zero
    d_v = zero if p_d_v is None else load(p_d_v, state, live)
    d_s = zero if p_d_s is None else load(p_d_s, state, live)  # then d_pre' W^T
    if p_w is not None:
        w_back = _head(p_w, N, width, COLS, TRANSPOSED=True)

    last = (rows * T + T - 1) * N + neurons
    now, left = last, T
    for C in tl.static_range(STEPS, 0, 1 - STEPS if STEPS > 1 else -1):
        for _ in range(left // C):
            beta = _loads(p_beta, now, -N, neurons, live, C, BETA_STEPS)
            theta = _loads(p_theta, now, -N, neurons, live, C, THETA_STEPS)
            kept = _loads(p_membrane if p_u is None else p_u, now, -N, neurons, live, C, True)
            if p_d_spikes is not None:
                d_spikes = _loads(p_d_spikes, now, -N, neurons, live, C, True)
            if p_d_membrane is not None:
                d_membrane = _loads(p_d_membrane, now, -N, neurons, live, C, True)
            for i in tl.static_range(C):
                if p_d_spikes is not None:
                    d_s += d_spikes[i]
                u = kept[i] - theta[i] if p_u is None else kept[i]
                pre = kept[i] if p_u is None else kept[i] + theta[i]
                s = tl.where(u >= 0, 1.0, 0.0)
                r = _reset(pre, theta[i], s, RESET)
                by_pre, by_s, by_theta = _reset_slopes(pre, theta[i], s, RESET)
                if p_d_beta is not None:  # of the step after: this v is its v', its d_pre at hand
                    d_beta_after = d_pre * (_softclamp(r, CLAMP) if CLAMP > 0 else r)
                    if BETA_STEPS:
                        tl.store(p_d_beta + (now + N), d_beta_after, mask=live & (now < last))
                    else:
                        d_beta += d_beta_after

                d_r = d_v * _softclamp_slope(r, CLAMP) if CLAMP > 0 else d_v
                if RESET_GRAD:
                    d_s += by_s * d_r
                d_f = surrogate_grad(u, slope, SURROGATE) * d_s
                d_pre = by_pre * d_r + d_f
                if p_d_membrane is not None:
                    d_pre += d_membrane[i]
                d_v = beta[i] * d_pre
                d_s = zero
                if p_w is not None:
                    d_s = tl.dot(d_pre.to(w_back.dtype), w_back, input_precision="ieee")

                tl.store(p_d_current + now, d_pre, mask=live)
                if p_d_theta is not None:
                    d_theta_now = by_theta * d_r - d_f
                    if THETA_STEPS:
                        tl.store(p_d_theta + now, d_theta_now, mask=live)
                    else:
                        d_theta += d_theta_now
                now -= N
        left %= C

    tl.store(p_d_v0 + state, d_v, mask=live)
    tl.store(p_d_s0 + state, d_s, mask=live)
    if p_d_beta is not None:
        d_beta += d_pre * load(p_v0, state, live)
        tl.store(p_d_beta + (now + N if BETA_STEPS else state), d_beta, mask=live)
    if p_d_theta is not None and not THETA_STEPS:
        tl.store(p_d_theta + state, d_theta, mask=live)


def _tiling(w_rec):
    """(width, ROWS, COLS, STEPS, warps): neurons per tile; padded, its shape; steps per block;
    threads by the 32."""
    if w_rec is None:
        return NEURONS, 1, NEURONS, STEPS, 4
    d = w_rec.shape[-1]
    cols = max(16, triton.next_power_of_2(d))  # tl.dot takes no less
    # 4 neurons per thread, and no blocks of steps: with 8 or with blocks registers run out
    return d, SEQUENCES, cols, 1, max(4, cols // 8)


def _launch(kernel, tensors, numbers, w_rec, **constants):
    """Run a kernel over all tiles of (B, T, N) = numbers[:3]."""
    B, _, N = numbers[:3]
    width, rows, cols, steps, warps = _tiling(w_rec)
    grid = (triton.cdiv(B, rows) * triton.cdiv(N, width),)
    with torch.cuda.device_of(tensors[0]):  # Triton launches on the current device
        kernel[grid](
            *tensors, *numbers[:3], width, *numbers[3:],
            **constants, ROWS=rows, COLS=cols, STEPS=steps,
            num_warps=warps, enable_fp_fusion=False,  # round where lif_torch rounds: same spikes
        )  # fmt: skip


# To PyTorch the scan is two operators, each with a function that makes the empty results: what
# torch.compile needs to know, so as not to look inside and give up. `membrane`: whether that is
# kept for backward, and not u. What is `Tensor?` may be None.

_OPTIONS = "bool membrane, str surrogate, float slope, str reset, bool reset_grad, float clamp"


@library.custom_op(
    "lif::forward",
    mutates_args=(),
    schema="(Tensor current, Tensor beta, Tensor theta, Tensor? w_rec, Tensor v0, Tensor s0,"
    f" {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward(current, beta, theta, w_rec, v0, s0, *options):
    """-> spikes, kept: the membrane or u (B,T,N); v, s (B,N)."""
    o = Options(*options)
    inputs = (x if x is None else x.contiguous() for x in (current, beta, theta, w_rec, v0, s0))
    spikes, kept, v, s = outputs = _outputs(current, beta, theta, w_rec, v0, s0, *options)
    _launch(
        _forward_kernel, (*inputs, spikes, *((kept, None) if o.membrane else (None, kept)), v, s),
        current.shape, w_rec, RESET=o.reset, CLAMP=o.clamp,
        BETA_STEPS=beta.dim() == 3, THETA_STEPS=theta.dim() == 3,
    )  # fmt: skip
    return outputs


@_forward.register_fake
def _outputs(current, beta, theta, w_rec, v0, s0, membrane, *_):
    """What _forward returns, not yet filled."""
    exact = membrane or current.dtype == torch.float32
    spikes = current.new_empty(current.shape)
    kept = spikes.new_empty(spikes.shape, dtype=torch.float32 if exact else torch.bfloat16)
    v, s = (v0.new_empty(v0.shape, dtype=torch.float32) for _ in range(2))
    return spikes, kept, v, s


@library.custom_op(
    "lif::backward",
    mutates_args=(),
    schema="(Tensor kept, Tensor beta, Tensor theta, Tensor? w_rec, Tensor v0,"
    " Tensor? d_spikes, Tensor? d_membrane, Tensor? d_v, Tensor? d_s,"
    " ScalarType dtype, bool need_beta, bool need_theta,"
    f" {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(kept, beta, theta, w_rec, v0, *arguments):
    """-> d_current (B,T,N) in `dtype`; d_beta, d_theta, (B,T,N) or (B,N); d_v0, d_s0 (B,N)."""
    cotangents = (x if x is None else x.contiguous() for x in arguments[:4])
    o = Options(*arguments[-len(Options._fields) :])
    gradients = _gradients(kept, beta, theta, w_rec, v0, *arguments)
    inputs = (x if x is None else x.contiguous() for x in (beta, theta, w_rec, v0))
    _launch(
        _backward_kernel,
        (*inputs, *((kept, None) if o.membrane else (None, kept)), *cotangents,
         *(x if x.numel() else None for x in gradients)),
        (*kept.shape, o.slope), w_rec,
        SURROGATE=o.surrogate, RESET=o.reset, RESET_GRAD=o.reset_grad, CLAMP=o.clamp,
        BETA_STEPS=beta.dim() == 3, THETA_STEPS=theta.dim() == 3,
    )  # fmt: skip
    return gradients


@_backward.register_fake
def _gradients(kept, beta, theta, w_rec, v0, d1, d2, d3, d4, dtype, need_beta, need_theta, *_):
    """What _backward returns, not yet filled; an empty tensor for a gradient nobody asks for."""

    def empty(x, needed=True):  # a per-neuron gradient leaves the kernel as (B, N): no atomics, so
        shape = kept.shape if x.dim() == 3 else v0.shape  # that the sum is reproducible
        return kept.new_empty(shape if needed else 0, dtype=torch.float32)

    d_current = kept.new_empty(kept.shape, dtype=dtype)
    return d_current, empty(beta, need_beta), empty(theta, need_theta), empty(v0), empty(v0)


def _save(ctx, inputs, output):
    current, beta, theta, w_rec, v0, s0, *options = inputs
    spikes, kept, _, _ = output
    ctx.save_for_backward(beta, theta, w_rec, v0, s0, kept, None if w_rec is None else spikes)
    ctx.dtype, ctx.options = current.dtype, options
    ctx.set_materialize_grads(False)


@once_differentiable
def _differentiate(ctx, *cotangents):  # on spikes, kept, v, s; None where there is none
    beta, theta, w_rec, v0, s0, kept, spikes = ctx.saved_tensors
    needs = ctx.needs_input_grad
    d_current, d_beta, d_theta, d_v0, d_s0 = _backward(
        kept, beta, theta, w_rec, v0, *cotangents, ctx.dtype, needs[1], needs[2], *ctx.options
    )
    d_beta = d_beta.sum_to_size(beta.shape) if needs[1] else None  # (N,) from (B, N), or as it is
    d_theta = d_theta.sum_to_size(theta.shape) if needs[2] else None
    d_w = gradient_of_w(s0, spikes, d_current, w_rec, ctx.dtype) if needs[3] else None
    return d_current, d_beta, d_theta, d_w, d_v0, d_s0, *[None] * len(ctx.options)


_forward.register_autograd(_differentiate, setup_context=_save)


def lif_triton(current, beta, theta, w_rec=None, state=None, **options):
    """lif_torch on the GPU: the same arguments, shapes, results and errors.

    current is float32, bfloat16 or float16, the rest may be any of these. The products s W and
    d_pre W^T are taken in the dtype of w_rec, dW in that of current; all else is float32, but with
    return_membrane=False and a current of 16 bits backward keeps u in bfloat16: 6 bytes per neuron
    and step are moved each way instead of 8.
    ValueError if Triton is not installed, for tensors on the CPU without TRITON_INTERPRET=1, for
    float64, for heads of more than MAX_HEAD neurons, and for a surrogate or reset without a branch.
    """
    (_, _, _, *rest), o = check(current, beta, theta, w_rec, state, **options)
    if obstacle := obstacle_to(current, w_rec, surrogate=o.surrogate, reset=o.reset):
        raise obstacle
    keep = o._replace(membrane=o.membrane or theta is None)  # a distance to 1e15 tells nothing
    theta = torch.full_like(beta, 1e15) if theta is None else theta  # no membrane reaches it
    spikes, kept, *state = _forward(current, beta, theta, *rest, *keep)
    return spikes, kept if o.membrane else None, tuple(state)


# ---- the choice -------------------------------------------------------------------------------

_taken = {}  # in this process, in order: a dictionary stands in for an ordered set


def backends():
    """What the scans have run on so far: "lif: torch (cpu)", with the reason if a GPU has
    no Triton. For the first line of a program, after a forward of one token; nothing is printed."""
    return "; ".join(_taken)


def lif(current, beta, theta, w_rec=None, state=None, **options):
    """The scan of lif.py on the backend that suits: see lif.lif_reference for all else.

    BACKEND, which the variable LIF_BACKEND of the environment sets, is 'triton' (lif_triton) or
    'torch' (lif_torch), or 'auto': Triton for tensors on a GPU wherever it can, else PyTorch.
    `backends` tells what it took, and for a GPU without Triton why. A backend asked for by name
    that cannot run raises (see lif_triton); it is never replaced.
    """
    return run_either(lif_triton, lif_torch, (current, beta, theta, w_rec, state), w_rec, **options)


def run_either(in_triton, in_torch, inputs, w_rec=None, **options):
    """What one of the two scans returns for these inputs; `backends` then tells which it was."""
    if BACKEND not in ("auto", "triton", "torch"):
        raise ValueError(f"unknown LIF_BACKEND {BACKEND!r}; choose auto, triton or torch")
    device = inputs[0].device.type
    auto_gpu = BACKEND == "auto" and device == "cuda"
    obstacle = obstacle_to(inputs[0], w_rec, **options) if auto_gpu else None
    scan, line = in_torch, f"lif: torch ({device})" + (f", as {obstacle}" if obstacle else "")
    if BACKEND == "triton" or auto_gpu and not obstacle:
        scan, line = in_triton, "lif: triton"
    result = scan(*inputs, **options)
    _taken[line] = None
    return result


def obstacle_to(current, w_rec=None, **options):
    """The exception that says why Triton cannot run this and how to fix it; None if it can."""
    if not HAS_TRITON:
        return ValueError("Triton is not installed: pip install triton, or set LIF_BACKEND=torch")
    if not (current.is_cuda or INTERPRETED):
        return ValueError(
            f"Triton cannot run on {current.device.type}: move the tensors to a GPU, set"
            " LIF_BACKEND=torch, or set TRITON_INTERPRET=1 before Python starts (slow, for tests)"
        )
    if current.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return ValueError(f"no kernel takes {current.dtype}: take float32, or LIF_BACKEND=torch")
    for kind, known in (("surrogate", KERNEL_SURROGATES), ("reset", KERNEL_RESETS)):
        if options.get(kind, known[0]) not in known:
            return ValueError(f"the {kind} {options[kind]!r} has no kernel: set LIF_BACKEND=torch")
    if w_rec is not None and w_rec.shape[-1] > MAX_HEAD:
        return ValueError(
            f"a head of {w_rec.shape[-1]} neurons is over the kernel's {MAX_HEAD}: split the"
            " recurrent synapses into more heads, or set LIF_BACKEND=torch"
        )


# ---- one token by events ----------------------------------------------------------------------
#
# SpikingLM.forward of block snn for a single token, on a CPU, without gradient. A silent neuron
# costs nothing: of a matrix, and of the fast weights, only the rows of neurons that fired are read.
# What depends on weights alone is computed once. B texts, D width of the residual stream.

EVENT_TEXTS = 8  # texts at once * share of synapses triggered: above this, dense is as fast


class Events:
    """tokens (B, 1), state -> logits (B, 1, vocabulary), state and a Report, which counts the
    synapses of a block as one matrix.

    One token is dozens of small operations a block, which cost more to call than to compute. With
    `compile` torch makes one function of a block, for each B: that takes a C++ compiler.
    """

    def __init__(self, model, compile=False):
        self.model, self.blocks = model, [EventBlock(part) for part in model.parts.values()]
        share = model.synop_share(model.rate.split(model.sites)).item()
        self.texts = EVENT_TEXTS / max(share, 1e-9)  # at most
        self.run = compiled(EventBlock.run) if compile else EventBlock.run

    def __call__(self, tokens, state):
        (x, report), after = self.model.embed(tokens), {}
        x = x[:, 0]
        for name, block in zip(self.model.parts, self.blocks):
            x, after[name], rates, triggered = self.run(block, x, state[name])
            report.rates += rates.split(block.sites)
            report.synapses.append((triggered, block.synapses))
        logits, now = self.model.readout(x[:, None], state.get("readout"), report)
        return logits, after | ({} if now is None else {"readout": now}), report


def compiled(run):
    """`run`, a function of tensors of fixed shapes. How many neurons fire is known only when it
    runs. Of the conditions under which the compiled function holds, torch checks with every call
    only the tensors: all would take as long as the call."""
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    checked = torch.compiler.keep_tensor_guards_unsafe
    options = {"guard_filter_fn": checked, "cpp_wrapper": True, "size_asserts": False}
    return torch.compile(run, fullgraph=True, dynamic=False, options=options)


class EventBlock:
    """SNNBlock.forward. Matrices with one input, or with one output, lie side by side, so that one
    bag of rows serves both; those of the block become views of them."""

    def __init__(self, block):
        mix, self.sites = block.mix, block.sites
        fed, into = (mix.w_qk.weight, block.w_in.weight), (mix.w_o.weight, block.w_out.weight)
        self.w_a, self.w_oh = torch.cat(fed, 1), torch.cat(into)
        fed[0].data, fed[1].data = self.w_a.split([w.shape[1] for w in fed], 1)
        into[0].data, into[1].data = self.w_oh.split([len(w) for w in into])
        self.a, self.qk = Membranes([block.a]), Membranes([mix.q, mix.k])
        self.oh, self.gamma = Membranes([mix.o, block.h]), mix.gamma()
        self.fan_out = torch.tensor(block.fan_out).repeat_interleave(torch.tensor(block.sites))
        self.synapses, self.threads = self.fan_out.sum().item(), torch.get_num_threads()

    def run(self, x, state):
        """x (B, D) -> x, state, spikes per neuron (neurons,), synaptic operations triggered ()."""
        (B, D), mix, keys = x.shape, state["mix"], len(self.qk.beta)
        z = rms(x)
        a, sent_a = self.a(z, state["a"])
        y = take_rows(sent_a, self.w_a, self.threads)
        z_qk = rms(y[:, :keys].view(B, 2, len(self.gamma), -1)).view(B, keys)
        qk, sent_qk = self.qk(z_qk, torch.cat([mix["q"], mix["k"]], 1))
        values = z.view(B, len(self.gamma), -1)
        values = torch.cat([values, torch.ones_like(values[..., :1])], 2)
        o, *S = read_rows(*sent_qk.chunk(2, 1), values, self.gamma, *mix["S"])
        o = rms((o[..., :-1] / (1 + o[..., -1:].relu())).view(B, D))
        oh = torch.cat([mix["o"], state["h"]], 1)
        oh, sent = self.oh(torch.cat([o, y[:, keys:]], 1), oh)
        (q, k), o, h = qk.chunk(2, 1), oh[:, :D], oh[:, D:]
        state = {"a": a, "mix": {"q": q, "k": k, "S": S, "o": o}, "h": h}
        x = x + take_rows(sent, self.w_oh, self.threads)
        rates = (torch.cat([sent_a, sent_qk, sent], 1) != 0).float().mean(0)
        return x, state, rates, (rates * self.fan_out).sum()


class Membranes:
    """Several Populations, side by side, for one token: z, v (B, n) -> v, what they send (B, n)."""

    def __init__(self, populations):
        constants, levels, theta = [], [], populations[0].theta
        for p in populations:
            zeros, beta = torch.zeros_like(p.gain), p.beta_logit.sigmoid()
            scale = (1 - beta**2).sqrt()  # as in blocks.charge
            constants.append(torch.stack([beta, scale * p.gain, scale * p.bias]))
            own = p.levels.view(1 + p.signed, len(theta), -1)
            levels += [torch.cat([own[1].flip(0) if p.signed else 0 * own[0], zeros[None], own[0]])]
        self.beta, self.gain, self.bias = torch.cat(constants, 1)
        self.levels = torch.cat(levels, 1)  # of each interval of v between these steps:
        below = torch.nextafter(theta, 0 * theta)  # not v <= -theta is v >= -below
        self.steps = torch.cat([-below.flip(0), theta]).view(-1, 1, 1)
        self.number = torch.arange(len(self.beta))

    def __call__(self, z, v):
        v = torch.addcmul(torch.addcmul(self.bias, self.gain, z), self.beta, v)
        step = (v >= self.steps).sum(0)
        return v, self.levels.take(torch.add(self.number, step, alpha=len(self.number)))


def read_rows(q, k, values, gamma, S, owed):
    """blocks.fast_weights for one token. Decay is lazy: `owed` holds the product of gammas that a
    row has not been multiplied by yet.

    q, k (B, heads * keys), values (B, heads, width), gamma (heads,). State: S as there, and owed
    (B, heads, keys); S_t of the equations is owed * S. Returns o (B, heads, width), S, owed.
    """
    q, k, keys = q.reshape(-1), k.reshape(-1), S.shape[2]
    rows, left = S.flatten(0, 2), (owed * gamma[:, None]).view(-1)
    read, written = q.nonzero()[:, 0], k.nonzero()[:, 0]
    added, kept = values.flatten(0, 1)[written // keys], rows[written] * left[written, None]
    kept = torch.addcmul(kept, added, k[written, None])
    rows, left = rows.index_copy(0, written, kept), left.index_fill(0, written, 1.0)
    start = torch.searchsorted(read, torch.arange(0, len(rows), keys))
    o = torch.embedding_bag(rows, read, start, False, 0, False, q[read] * left[read])[0]
    return o.view(values.shape), rows.view(S.shape), left.view(owed.shape)
