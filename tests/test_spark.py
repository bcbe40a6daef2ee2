"""NeuronSpark: the fast path against a slow transcription; kernels; frames that are not run."""

import math
import os
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # for this file run alone; read on import

import pytest
import torch
from conftest import check_state, fire

import config
import kernels
import spark
from lif import Report, Seen, lif_reference
from model import SpikingLM, run
from spark import Frames, Pondered, SelectiveNeurons, plif_torch, plif_triton
from train import TrainConfig

DEVICE = "cpu" if kernels.INTERPRETED or not kernels.HAS_TRITON else "cuda"
needs_triton = pytest.mark.skipif(not kernels.HAS_TRITON, reason="Triton is not installed")


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)


def settings(**more):
    c = config.load(TrainConfig, ["configs/neuronspark_6m.py"])
    small = dict(vocab_size=30, n_embd=12, n_hidden=12, n_layer=2, n_state=3, k_max=5, d_ff=10)
    small["ponder_weight"] = 0.01  # the paper's
    return replace(c, **small | more)


def thoughtful(c, seed=0):
    """A model whose tokens ponder from one frame to k_max, in double precision."""
    torch.manual_seed(seed)
    model = SpikingLM(c).double()
    for name, p in model.named_parameters():
        if "halt" in name:
            p.data += 1.5 if name.endswith("b_halt") else 4 * torch.randn_like(p)
        if "embedding" in name:
            p.data *= 50  # so that the stream varies
    return model


# ---- the equations, frame by frame ---------------------------------------------------------------


def transcription(model, tokens):
    """Logits (T, V) of one sequence, and E[K] of all halves, in loops over tokens and frames.

    All K frames are run, with the residual stream in each of them; a frame after the last that a
    token wants has weight 0 and leaves the neurons' potentials alone.
    """
    p, c = dict(model.named_parameters()), model.config
    K, D, E = c.k_max, c.n_hidden, p["embedding.weight"]
    stream = [[E[token] for _ in range(K)] for token in tokens.tolist()]  # [token][frame] (D,)
    expected = []

    def rms(x, gain):
        return gain * x / ((x * x).mean() + 1e-6).sqrt()

    def step(v, x, decay, alpha, theta, runs):
        before = v
        v = decay * v + alpha * x
        s = fire(v - theta, torch.sigmoid(4 * (v - theta)))
        v = v - theta * (s if c.reset_grad else s.detach())
        return v if runs else before

    def leaky(name, v, x, runs):
        decay = torch.sigmoid(p[name + ".w"])
        v = step(v, x, decay, 1 - decay, p[name + ".theta"], runs)
        return v, (1 - decay) * v

    def half(name, inner):
        v = v_inner = 0.0
        for frames in stream:
            h = [rms(x, p[name + ".norm.weight"]) for x in frames]
            halt = h[0] @ p[name + ".w_halt"] / D**0.5 + p[name + ".b_halt"]
            halt = torch.sigmoid(halt)[0]
            reached = [(1 - halt) ** k for k in range(K)]
            E_K = sum(reached)
            if Pondered.adaptive:
                fade = [min(max(E_K - k, 0 * E_K), 0 * E_K + 1) for k in range(K)]
                weight = [r * f for r, f in zip(reached, fade)]
            else:
                weight, E_K = reached, sum(k * r for k, r in enumerate(reached, 1)) / E_K
            expected.append(E_K)
            r = 0.0
            for k in range(K):
                runs = not Pondered.adaptive or bool(weight[k] > 0)
                v, z = leaky(name + ".neurons", v, h[k], runs)
                v_inner, y = inner(name + ".inner.", v_inner, z, runs)
                r = r + p[name + ".w_o.weight"] @ (weight[k] / sum(weight) * y)
            for k in range(K):
                frames[k] = frames[k] + r - r.mean()

    def selective(name, v, z, runs):
        def of(w, bias):
            return p[f"{name}{w}.weight"] @ z + (p[f"{name}{w}.bias"] if bias else 0)

        decay, alpha = torch.sigmoid(of("w_beta", True)), (1 + of("w_alpha", True).exp()).log()
        v = step(v, of("w_in", False), decay, alpha, 0.1 + of("w_theta", True).abs(), runs)
        gate = torch.sigmoid(of("w_gate", False))
        return v, p[name + "w_out.weight"] @ v * gate + of("w_skip", False)

    def feed_forward(name, v, z, runs):
        x = torch.cat([p[name + "w_gate.weight"] @ z, p[name + "w_up.weight"] @ z])
        v, leak = leaky(name + "neurons", v, x, runs)
        y = p[name + "w_down.weight"] @ (leak[: c.d_ff] * leak[c.d_ff :])
        return v, y + p[name + "w_skip.weight"] @ z

    for i in range(c.n_layer):
        half(f"parts.block{i}.halves.0", selective)
        half(f"parts.block{i}.halves.1", feed_forward)
    v, logits = 0.0, []
    for frames in stream:
        mean = 0.0
        for x in frames:
            v, leak = leaky(
                "parts.closing.neurons", v, rms(x, p["parts.closing.norm.weight"]), True
            )
            mean = mean + leak / K
        x = p["parts.closing.w.weight"] @ mean + p["parts.closing.w.bias"]
        logits.append(E @ rms(x, p["parts.closing.inhibit.weight"]))
    return torch.stack(logits), torch.stack(expected)


@pytest.mark.parametrize("original", (False, True))
def test_equals_the_equations_frame_by_frame(original, monkeypatch):
    monkeypatch.setattr(Pondered, "adaptive", not original)
    model = thoughtful(settings(reset_grad=not original))
    tokens = torch.randint(30, (2, 7))
    cotangent = torch.randn(2, 7, 30, dtype=torch.double)
    logits, _, report = model(tokens)
    ((logits * cotangent).sum() + report.losses["ponder"]).backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    slow, expected = zip(*(transcription(model, row) for row in tokens))
    slow, ponder = torch.stack(slow), 0.01 * torch.stack(expected).mean()
    ((slow * cotangent).sum() + ponder).backward()
    torch.testing.assert_close(logits, slow, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(report.losses["ponder"], ponder)
    for name, p in model.named_parameters():
        scale = p.grad.abs().max()
        assert scale > 1e-7, name
        torch.testing.assert_close(got[name] / scale, p.grad / scale, rtol=0, atol=1e-6, msg=name)
    for rate in report.rates:
        assert 0.02 < rate.mean() < 0.9
    counts = torch.stack(expected).ceil().unique().tolist()
    assert counts == ([2, 3] if original else [2, 3, 4, 5])  # tokens of all kinds


# ---- frames --------------------------------------------------------------------------------------


def test_frames_are_packed():
    frames = Frames(torch.tensor([[2, 1, 3], [1, 1, 1]]), 4)
    assert frames.size == 6 and frames.per_token == 9 / 6
    assert frames.token.tolist()[0] == [0, 0, 1, 2, 2, 2]
    assert frames.token[1, :3].tolist() == [0, 1, 2]
    assert frames.nth.tolist()[0] == [0, 1, 0, 0, 1, 2]
    assert frames.live.sum(1).tolist() == [6, 3]
    x = torch.randn(2, 3, 5)
    assert torch.equal(frames.unroll(x)[0, 3], x[0, 2])
    weight = torch.rand(2, 3, 4)
    pooled = frames.pool(frames.unroll(x), weight)
    for b, t, n in ((0, 0, 2), (0, 1, 1), (0, 2, 3), (1, 2, 1)):
        torch.testing.assert_close(pooled[b, t], x[b, t] * weight[b, t, :n].sum())


def test_frames_that_a_token_does_not_need_are_not_computed():
    model, seen = thoughtful(settings()), []
    block, after = model.parts["block1"].halves
    after.w_halt.data.zero_()  # the half behind it runs what it runs
    block.inner.w_in.register_forward_hook(lambda m, i, out: seen.append(i[0].shape[1]))
    tokens = torch.randint(30, (1, 40))
    _, _, report = model(tokens)
    block.b_halt.data -= 100
    _, _, patient = model(tokens)
    block.b_halt.data += 200
    _, _, hasty = model(tokens)
    assert seen[1:] == [40 * 5, 40] and 40 < seen[0] < 200
    assert hasty.log["frames 1"] < report.log["frames 1"] < patient.log["frames 1"]
    # operations: per frame the four maps into the block, its gate and W_out; per token the rest
    D, N = 12, 3
    assert patient.macs - hasty.macs == 4 * (5 * D * D * N + D * D)
    assert report.log["E[K] 1"] < report.log["frames 1"] < report.log["E[K] 1"] + 1


def test_state_is_that_of_the_last_frame_that_ran():
    """Whole = split = token by token where every token runs another number of frames."""
    model = thoughtful(settings())
    tokens = torch.randint(30, (3, 20))
    with torch.no_grad():
        check_state(lambda at, state: model(tokens[:, at], state)[:2], 20, near=1e-10)


def test_the_result_is_continuous_in_the_probability_to_halt():
    """Where one frame more is run, nothing jumps."""
    half = thoughtful(settings()).parts["block0"].halves[1]
    h = torch.randn(1, 1, 12, dtype=torch.double)
    half.w_halt.data.zero_()
    low, high, seen = -5.0, 5.0, {}  # of b_halt: bisect to where 4 frames become 3
    for _ in range(40):
        half.b_halt.data.fill_((low + high) / 2)
        frames, weight, _ = half.ponder(h)
        z, _ = half.neurons(h, None, frames, report := Report())
        seen[frames.size] = half.inner(z, None, frames, weight, report)[0]
        low, high = ((low + high) / 2, high) if frames.size > 3 else (low, (low + high) / 2)
    torch.testing.assert_close(seen[3], seen[4], rtol=0, atol=1e-9)
    assert seen[4].abs().max() > 1e-3


def test_ponder_cost_pulls_frames_down_and_is_the_same_in_pieces():
    model = SpikingLM(settings(ponder_weight=1.0))
    tokens = torch.randint(30, (8, 10))
    _, _, report = model(tokens)
    pieces = [model(piece)[2].losses["ponder"] for piece in tokens.split(2)]
    torch.testing.assert_close(sum(pieces) / 4, report.losses["ponder"])
    mean = sum(report.log[f"E[K] {i}"] for i in range(2)) / 2
    torch.testing.assert_close(report.losses["ponder"].detach(), mean)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(30):
        _, others = model.loss(*(lambda out: (out[0], tokens, out[2]))(model(tokens)))
        others["ponder"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model(tokens)[2].log["frames 0"] < 0.6 * report.log["frames 0"]


def test_score_averages_what_is_logged_over_tokens():
    model = thoughtful(settings()).eval()
    tokens = torch.randint(30, (31,))
    with torch.no_grad():
        rows = tokens[:24].view(2, 12), tokens[None, 24:30]
        log = [model(x)[2].log["E[K] 1"].item() for x in rows]
    score = model.score(tokens.numpy(), 12)
    assert score["log"]["E[K] 1"] == pytest.approx((24 * log[0] + 6 * log[1]) / 30)
    logged = {name for name in score["log"] if not name.startswith("share")}
    assert {f"{what} {i}" for what in ("E[K]", "frames") for i in range(2)} == logged


# ---- neurons: against lif_torch, and the kernels -------------------------------------------------


def composed(x, b, t, a=None, v=None, *, frames, slope=4.0, reset_grad=True):
    """plif_torch out of the plain loop."""
    if x.shape[1] != frames.size:
        x = frames.unroll(x)
    beta = torch.sigmoid(b)
    alpha, theta = (1 - beta, t) if a is None else (torch.nn.functional.softplus(a), 0.1 + t.abs())
    state = None if v is None else (v, torch.zeros_like(v))
    options = dict(surrogate="sigmoid", slope=slope, reset_grad=reset_grad)
    s, pre, _ = lif_reference(alpha * x, beta, theta, state=state, **options)
    after = pre - theta * (s if reset_grad else s.detach())
    rate = s[frames.live].mean(0)
    last = torch.stack([row[n - 1] for row, n in zip(after, frames.length)])
    return (1 - beta) * after if a is None else after, rate, last


NAMES = "out rate v d_x d_b d_t d_a d_v0".split()


def neurons(step, held, N=45, T=4, seed=0, dtype=torch.float32, state=True):
    torch.manual_seed(seed)
    B = 2
    frames = Frames(torch.cat([torch.randint(1, 5, (B, T - 1)), torch.tensor([[4], [1]])], 1), 4)
    shape = (B, frames.size, N) if step else (N,)
    x = torch.randn(B, T if held else frames.size, N, dtype=dtype)
    b, t = torch.randn(shape, dtype=dtype), torch.rand(shape, dtype=dtype) * 0.5 + 0.1
    if step:
        t *= torch.randn(shape).sign()
    a = torch.randn(shape, dtype=dtype) * 3 if step else None
    if step:
        a[0, 0, :5] = torch.tensor([25.0, 20.0, 19.0, -30.0, 0.0])
    v = torch.randn(B, N, dtype=dtype) if state else None
    cotangents = [torch.randn(B, frames.size, N) * frames.live[..., None], torch.randn(N)]
    return frames, (x, b, t, a, v), cotangents + [torch.randn(B, N)]


def results(scan, frames, arguments, cotangents, device="cpu", **options):
    leaves = [None if x is None else x.clone().to(device).requires_grad_() for x in arguments]
    frames = Frames(frames.count.to(device), 4)
    outputs = scan(*leaves, frames=frames, **options)
    used = [(x, c.to(x)) for x, c in zip(outputs, cotangents) if c is not None]
    torch.autograd.backward([x for x, _ in used], [c for _, c in used])
    outputs = (torch.where(frames.live[..., None], outputs[0], 0), *outputs[1:])
    return dict(zip(NAMES, [*outputs, *(None if x is None else x.grad for x in leaves)]))


def agree(want, got, tolerance):
    assert 0.05 < want["rate"].mean() < 0.95
    assert torch.equal(want["rate"].float(), got["rate"].float().cpu())  # the same spikes
    for name in NAMES:
        if want[name] is None:
            assert got[name] is None, name
            continue
        a, b = want[name].detach(), got[name].detach().cpu()
        assert a.shape == b.shape, name
        off = (a - b).abs().max() / a.abs().max().clamp(min=1)
        assert off < tolerance, f"{name} is off by {off:.1e}"


FORMS = [(step, held) for step in (False, True) for held in (False, True)]


@pytest.mark.parametrize("step, held", FORMS)
@pytest.mark.parametrize("used", (None, 0, 1, 2))
@pytest.mark.parametrize("reset_grad", (True, False))
def test_plif_torch_equals_the_plain_loop(step, held, used, reset_grad):
    frames, arguments, cotangents = neurons(step, held, 3000, T=20, dtype=torch.double)  # blocks
    if used is not None:
        cotangents = [c if i == used else None for i, c in enumerate(cotangents)]
    case = frames, arguments, cotangents
    agree(*(results(f, *case, reset_grad=reset_grad) for f in (composed, plif_torch)), 1e-9)


@needs_triton
@pytest.mark.parametrize("step, held", FORMS)
@pytest.mark.parametrize("used", (None, 0, 1, 2))
@pytest.mark.parametrize("reset_grad", (True, False))
def test_kernels_equal_the_reference(step, held, used, reset_grad, monkeypatch):
    monkeypatch.setattr(spark, "CHANNELS", 32)  # 45 neurons: a full block and part of one
    for state in (True, False):
        frames, arguments, cotangents = neurons(step, held, seed=1, state=state)
        if used is not None:
            cotangents = [c if i == used else None for i, c in enumerate(cotangents)]
        case = frames, arguments, cotangents
        want = results(plif_torch, *case, reset_grad=reset_grad)
        agree(want, results(plif_triton, *case, DEVICE, reset_grad=reset_grad), 1e-5)


@needs_triton
@pytest.mark.parametrize("scan", (plif_torch, plif_triton))
def test_charge_fire_reset_by_hand(scan):
    """beta = alpha = 1/2, theta 1: exact numbers, the threshold itself included."""
    with torch.device(DEVICE if scan is plif_triton else "cpu"):
        frames = Frames(torch.tensor([[3, 1]]), 3)
        x = torch.tensor([[[2.0], [1.0]]])  # held for 3 frames and for 1
        out, rate, v = scan(x, torch.zeros(1), torch.ones(1), v=torch.zeros(1, 1), frames=frames)
    # pre 1 fires -> 0; pre 1 -> 0; pre 1 -> 0; pre 0.5 stays
    assert out.flatten().tolist() == [0, 0, 0, 0.25] and rate.item() == 0.75 and v.item() == 0.5


@needs_triton
def test_padding_is_finite_and_learns_nothing(monkeypatch):
    frames, arguments, cotangents = neurons(True, False)
    assert not frames.live.all()
    torch.use_deterministic_algorithms(True, warn_only=True)  # makes torch.empty fill with NaN
    try:
        for scan in (plif_torch, plif_triton):
            leaves = [x.clone().to(DEVICE).requires_grad_() for x in arguments]
            out, _, _ = scan(*leaves, frames=Frames(frames.count.to(DEVICE), 4))
            assert out.isfinite().all()
            out.backward(cotangents[0].to(DEVICE))
            for x in leaves[:4]:
                assert x.grad.isfinite().all() and (x.grad[~frames.live] == 0).all()
    finally:
        torch.use_deterministic_algorithms(False)


@needs_triton
@pytest.mark.parametrize(
    "change",
    (
        dict(x=torch.zeros(2, 4, 4)),
        dict(b=torch.zeros(5)),
        dict(t=torch.zeros(2, 3, 4)),
        dict(a=torch.zeros(4)),
        dict(v=torch.zeros(4)),
    ),
    ids=lambda change: "-".join(change),
)
def test_errors(change):
    arguments = dict(x=torch.zeros(2, 3, 4), b=torch.zeros(4), t=torch.ones(4))
    arguments["frames"] = Frames(torch.full((2, 3), 2), 2)
    name = next(iter(change))
    for scan in (plif_torch, plif_triton):
        with pytest.raises(ValueError, match=f"{name} must be"):
            scan(**arguments | change)


@pytest.mark.parametrize("reset_grad", (True, False))
def test_a_model_on_kernels_equals_a_model_on_torch(reset_grad, monkeypatch):
    tokens = torch.randint(30, (2, 4))
    c = settings(n_layer=1, k_max=3, reset_grad=reset_grad)
    if not kernels.HAS_TRITON:
        pytest.skip("Triton is not installed")
    grads = []
    for backend in ("torch", "triton"):
        monkeypatch.setattr(kernels, "BACKEND", backend)
        torch.manual_seed(0)
        model = SpikingLM(c).to(DEVICE)
        logits, _, _ = model(tokens.to(DEVICE))
        logits.square().sum().backward()
        grads.append([logits.detach()] + [p.grad for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# ---- the start, checkpointing, the compiler ------------------------------------------------------


def test_parameters_exactly():
    with torch.device("meta"):
        model = SpikingLM(config.load(TrainConfig, ["configs/neuronspark_0p9b.py"]))
    assert sum(p.numel() for p in model.parameters()) == 874_142_120
    neurons = [p for name, p in model.named_parameters() if name.endswith((".w", "theta", "halt"))]
    assert len(neurons) == 20 * 10 + 2 and all(p.dim() == 1 for p in neurons)


def test_structured_start():
    c = config.load(TrainConfig, ["configs/neuronspark_6m.py"])
    torch.manual_seed(0)
    block = SelectiveNeurons(c)
    beta = torch.sigmoid(block.w_beta.bias).view(-1, 8).mean(0)
    torch.testing.assert_close(beta, torch.linspace(0.8, 0.99, 8), rtol=0, atol=0.01)
    alpha = torch.nn.functional.softplus(block.w_alpha.bias)
    torch.testing.assert_close(alpha, torch.ones_like(alpha), rtol=0, atol=1e-3)
    model = SpikingLM(replace(c, k_max=16, n_layer=2))
    with torch.no_grad():
        _, _, report = model(torch.randint(4096, (2, 32)))
    rate = report.rates[5].view(-1, 8).mean(0)  # of the second block's hidden neurons
    assert 0.2 < rate[0] < 0.3 and 0.05 < rate[-1] < 0.12 and (rate.diff() < 0.02).all()


@pytest.mark.parametrize("name", ["neuronspark_6m.py", "spikewhale_6m.py", "sam_6m.py"])
def test_checkpointing_is_bit_identical_and_counts_once(name):
    c = config.load(TrainConfig, [f"configs/{name}"])
    c = replace(c, vocab_size=30, n_embd=16, n_hidden=16, n_layer=2, d_ff=24, traits="moe:2,8")
    tokens, runs = torch.randint(30, (2, 6)), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = SpikingLM(replace(c, checkpointing=checkpointing))
        times = []
        model.parts["block0"].register_forward_pre_hook(lambda *_: times.append(1))
        logits, state, report = model(tokens)
        nats, others = model.loss(logits, tokens, report)
        (nats + sum(others.values())).backward()
        assert len(times) == 1 + checkpointing
        counted = [report.macs, *sum(report.synapses, ()), *report.log.values()]
        runs.append([logits, nats, *report.rates, *others.values()])
        runs[-1] += [*map(torch.as_tensor, counted), *(p.grad for p in model.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_recomputation_reads_and_counts_as_the_first_time():
    def part(x, state, seen, report):
        report.macs += 1
        return (x * seen.spikes).exp(), state

    x = torch.tensor(0.5, requires_grad=True)
    y, _, report = run(part, x, None, Seen(None, spikes=torch.tensor(2.0)), recompute=True)
    y.backward()
    assert report.macs == 1
    assert x.grad.item() == pytest.approx(2 * math.e)
