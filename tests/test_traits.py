"""The traits: the identity at the start, yet awake; causal; whole = token by token; and what each
is for. `woken` moves the factor that starts at 0, so that nothing here is compared with nothing.
All of them together, and with each block: test_model.py."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import check_state, leaves

import traits
from blocks import fast_weights
from lif import Report, Seen
from traits import HRM, JEPA, MTP, Engram, Kuramoto, Memory, MoE, ProgSem, SpikeAttn, primes_from

D, VOCAB, NEURONS = 24, 50, (16, 20)  # neurons of two layers
TRAITS = {
    "engram": lambda: Engram(D, rows=97, heads=2, width=8, vocab_size=VOCAB),
    "hrm": lambda: HRM(D, steps=2, width=16),
    "attention": lambda: SpikeAttn(D, heads=3, width=8, chunk=16),
    "programs of a cell": lambda: ProgSem(D, 5, P=torch.randn(sum(NEURONS), 5), width=8),
    "programs learned": lambda: ProgSem(D, 5, width=8),
    "kuramoto": lambda: Kuramoto(D, oscillators=16, steps=2),
    "moe": lambda: MoE(D, experts=4, width=8, last=NEURONS[-1]),
    "memory": lambda: Memory(D, neurons=32),
}


def build(name):
    """A list of one trait, as it starts."""
    torch.manual_seed(0)
    return torch.nn.ModuleList([TRAITS[name]()])


def woken(traits):
    with torch.no_grad():
        for p in traits.parameters():
            p += 0.2 * torch.randn_like(p)
    return traits


def stream(T, B=2, seed=1):
    """What a model would give: x (B, T, D), tokens, spikes of the last layer, two membranes."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, T, D, generator=g)
    tokens = torch.randint(VOCAB, (B, T), generator=g)
    membranes = [torch.randn(B, T, n, generator=g) for n in NEURONS]
    return x, tokens, (membranes[-1] > 1).float(), membranes


def run(traits, data, states=None):
    """All traits one after the other -> x, their states, the report."""
    x, tokens, spikes, membranes = data
    seen, report, after = Seen(tokens, None, spikes, membranes), Report(), []
    for trait, state in zip(traits, states or [None] * len(traits)):
        x, now = trait(x, state, seen, report)
        after.append(now)
    return x, after, report


def piece(data, at):
    x, tokens, spikes, membranes = data
    return x[:, at], tokens[:, at], spikes[:, at], [m[:, at] for m in membranes]


# ---- what holds for each -------------------------------------------------------------------------

# multiplications per token of the float-fed matrices, by hand
MACS = {
    "engram": 32 * D + 32 * 32 + 32 * D,
    "hrm": 2 * (2 * D * 16 + 16 * D),
    "attention": 4 * D * 24,
    "programs of a cell": 36 * 5 + 5 * 8 + 8 * D,
    "programs learned": D * 5 + 5 * 8 + 8 * D,
    "kuramoto": D * 16 + 32 * D,
    "moe": 20 * 4 + 2 * (2 * D * 8),  # of four experts two
    "memory": 2 * D * 32,
}


@pytest.mark.parametrize("name", TRAITS)
def test_identity_at_the_start_awake_and_counted(name):
    traits = build(name)
    for T in (1, 7, 63):
        data = stream(T)
        x, _, report = run(traits, data)
        assert (x - data[0]).abs().max() < 1e-3
        assert report.rates == []  # which belongs to the layers of the blocks
        assert report.macs == MACS[name]
    if name == "memory":
        ((triggered, every),) = report.synapses
        assert every == 32 * D
        assert triggered.item() == pytest.approx(32 * D * report.log["memory_rate"].item())
    else:
        assert report.synapses == []
    (x * torch.randn(x.shape)).sum().backward()  # of 63: slow neurons take a while to fire
    assert any(p.grad is not None and p.grad.norm() > 1e-3 for p in traits.parameters())


@pytest.mark.parametrize("name", TRAITS)
def test_every_parameter_learns_once_woken(name):
    traits = woken(build(name))
    x, _, report = run(traits, stream(63, B=4))
    (x.square().sum() + sum(report.losses.values())).backward()
    for key, p in traits.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", TRAITS)
@torch.no_grad()
def test_whole_equals_split_equals_token_by_token(name):
    traits, data = woken(build(name)), stream(63)
    before = {key: value.clone() for key, value in traits.state_dict().items()}
    x, long, _ = run(traits, data)
    assert (x - data[0]).abs().mean() > 0.02  # awake, or this says nothing
    check_state(lambda at, state: run(traits, piece(data, at), state)[:2], 63)
    _, short, _ = run(traits, stream(3))  # the state is of one size
    assert [y.shape for y in leaves(short)] == [y.shape for y in leaves(long)]
    for key, value in traits.state_dict().items():  # and the module keeps nothing
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("name", TRAITS)
def test_causal_by_gradient_and_sequences_apart(name):
    traits, (x, tokens, spikes, membranes) = woken(build(name)), stream(12)
    inputs = [y.requires_grad_() for y in (x, spikes, *membranes)]
    y, _, _ = run(traits, (x, tokens, spikes, membranes))
    grads = torch.autograd.grad(y[0, 6].square().sum(), inputs, allow_unused=True)
    for grad in filter(lambda grad: grad is not None, grads):
        assert (grad[0, 7:] == 0).all() and (grad[1] == 0).all()
    assert (grads[0][0, 6] != 0).any()
    if name in ("attention", "memory"):
        assert (grads[0][0, :6].abs().sum(-1) > 0).all()
    other = tokens.clone()
    other[0, 7:] += 1
    again, _, _ = run(traits, (x, other, spikes, membranes))
    assert torch.equal(again[0, :7], y[0, :7]) and torch.equal(again[1], y[1])


@pytest.mark.parametrize("name", TRAITS)
def test_bfloat16_autocast_meta_and_seed(name):
    x, tokens, spikes, membranes = stream(9)
    half = (x.bfloat16(), tokens, spikes.bfloat16(), membranes)
    traits, again = woken(build(name)), woken(build(name))  # the seed decides all
    for a, b in zip(traits.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    exact, _, _ = run(traits, (x, tokens, spikes, membranes))
    with torch.autocast("cpu", torch.bfloat16):
        y, _, report = run(traits, (x, tokens, spikes, membranes))
        (y.square().sum() + sum(report.losses.values())).backward()
    assert (y - exact).abs().mean() < 0.1 * (exact - x).abs().mean() + 1e-3
    traits.bfloat16()
    y, state, _ = run(traits, half)
    y, _, _ = run(traits, half, state)
    assert y.dtype == torch.bfloat16
    with torch.device("meta"):
        assert all(p.is_meta for p in build(name).state_dict().values())


# ---- Engram --------------------------------------------------------------------------------------


def test_engram_hashes_as_written():
    engram, heads = Engram(D, rows=97, heads=2, width=8, vocab_size=VOCAB), 2
    p = primes_from(97, 4)
    assert p == [97, 101, 103, 107] and primes_from(1 << 16, 1) == [65537]
    tokens = [7, 0, 49, 7, 0, 49]
    rows, last = engram.rows_of(torch.tensor([tokens]))
    m = engram.multiplier.tolist()
    assert all(k % 2 for k in m) and len(set(m)) == 3

    def int64(n):  # as it wraps
        return (n + 2**63) % 2**64 - 2**63

    for t in range(6):
        a, b, c = ([VOCAB, VOCAB] + tokens)[t : t + 3][::-1]
        pair = int64(a * m[0]) ^ int64(b * m[1])
        mixes = [pair] * heads + [pair ^ int64(c * m[2])] * heads
        expected = [sum(p[:i]) + mix % p[i] for i, mix in enumerate(mixes)]
        assert rows[0, t].tolist() == expected
    assert last.tolist() == [[0, 49]]
    assert torch.equal(rows[0, 2], rows[0, 5]) and not torch.equal(rows[0, 1], rows[0, 4])


def touched(engram, tokens):
    """Share of rows that tokens (B, T) touch: of all, and of the poorest table."""
    hit = torch.zeros(engram.table.num_embeddings, dtype=torch.bool)
    hit[engram.rows_of(tokens)[0].flatten()] = True
    tables = hit.float().split(engram.prime.tolist())
    return hit.float().mean().item(), min(table.mean().item() for table in tables)


@torch.no_grad()
def test_engram_touches_its_rows():
    torch.manual_seed(0)
    zipf = 1 / torch.arange(1.0, 4097)
    tokens = torch.multinomial(zipf, 1_000_000, replacement=True).view(100, -1)
    share, poorest = touched(Engram(8, 1 << 16, width=1, vocab_size=4096), tokens)
    assert share > 0.3 and poorest > 0.3
    # heads of one order collide on different n-grams: two tell most of them apart
    rows = Engram(8, 1 << 10, width=1, vocab_size=4096).rows_of(tokens[:1])[0][0]  # (T, 4)
    pairs = torch.stack([tokens[0, :-1], tokens[0, 1:]], -1).unique(dim=0)
    assert len(pairs) > 5000 and rows[:, 0].unique().numel() < 1100
    assert len(rows[:, :2].unique(dim=0)) > 0.99 * len(pairs)


def test_engram_gate_is_derf_of_the_agreement():
    engram = Engram(4, rows=97, heads=1, width=2, vocab_size=VOCAB)
    assert engram.gate(torch.zeros(1)).item() == pytest.approx((1 + math.erf(-1)) / 2)
    with torch.no_grad():
        engram.key.weight.zero_()[:, 0] = 3  # every key is along (1, 1, 1, 1)
        engram.value.weight.copy_(torch.eye(4))
        engram.out.weight.copy_(torch.eye(4))
        engram.table.weight.fill_(1.0)
        seen = Seen(torch.zeros(1, 2, dtype=torch.long))
        x = torch.tensor([[[3.0, 3, 3, 3], [-1, -1, -1, -1]]])  # agrees, disagrees; z = +-sqrt(4)
        y, _ = engram(x, None, seen, Report())
    for t, z in ((0, 2.0), (1, -2.0)):
        gate = (1 + math.erf(z - 1)) / 2
        torch.testing.assert_close(y[0, t] - x[0, t], torch.full((4,), gate))


# ---- HRM -----------------------------------------------------------------------------------------


def test_hrm_refines_by_its_equation():
    trait, (x, tokens, _, _) = woken(build("hrm"))[0], stream(3)
    h = x
    for gate in trait.gate:
        z = F.linear(torch.cat([F.rms_norm(h, (D,)), x], -1), trait.down.weight, trait.down.bias)
        h = h + torch.tanh(gate) * (z * torch.sigmoid(z)) @ trait.up.weight.t()
    torch.testing.assert_close(trait(x, None, Seen(tokens), Report())[0], h)


# ---- SpikeAttn -----------------------------------------------------------------------------------


def recurrence(q, k, v, S):
    """q, k, v (B, heads, T, w), S (B, heads, w, w): S = gamma S + k^T v, then q S, one by one."""
    out = []
    for t in range(q.shape[2]):
        for h in range(q.shape[1]):
            outer = k[:, h, t, :, None] * v[:, h, t, None, :]
            new = (1 - 2 ** -(3 + h)) * S[:, h] + outer
            S = torch.cat([S[:, :h], new[:, None], S[:, h + 1 :]], 1)
        out.append(torch.einsum("bhi,bhij->bhj", q[:, :, t], S))
    return torch.stack(out, 2), S


@pytest.mark.parametrize("T", [1, 7, 63, 130])
def test_attention_parallel_chunked_and_recurrent_agree(T):
    torch.manual_seed(0)
    q, k = ((torch.rand(2, 3, T, 8) < 0.2).float().requires_grad_() for _ in range(2))
    v, S = torch.randn(2, 3, T, 8, requires_grad=True), torch.randn(2, 3, 8, 8, requires_grad=True)
    o, last = recurrence(q, k, v, S)
    d_o, d_S, gamma = torch.randn_like(o), torch.randn_like(S), 1 - 2.0 ** -torch.arange(3, 6)
    grads = torch.autograd.grad((o * d_o).sum() + (last * d_S).sum(), (q, k, v, S))
    for chunk in (1, 16, T, 1000):
        o_c, last_c = fast_weights(q, k, v, gamma, S, chunk)
        torch.testing.assert_close(o_c, o, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(last_c, last, rtol=1e-5, atol=1e-5)
        mine = torch.autograd.grad((o_c * d_o).sum() + (last_c * d_S).sum(), (q, k, v, S))
        for a, b in zip(mine, grads):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    trait, data = woken(build("attention")), stream(T)
    outs = []
    for trait[0].chunk in (1, 16, 1000):
        outs.append(run(trait, data)[0])
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=0, atol=1e-5)


def test_attention_queries_and_keys_are_spikes(monkeypatch):
    trait, seen = build("attention")[0], []
    monkeypatch.setattr(traits, "fast_weights", lambda *a: seen.append(a) or fast_weights(*a))
    x, tokens, _, _ = stream(63)
    report = Report()
    trait.out.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    trait(x, None, Seen(tokens), report)
    q, k, v = seen[0][:3]
    size = seen[1].view(2, 63, 3, 8).square().mean(-1)  # of what the heads say
    asked = q[:, :, 20:].amax(-1).transpose(1, 2)  # a head without a query says nothing
    torch.testing.assert_close(size[:, 20:], asked, rtol=0, atol=0.02)
    assert set(q.unique().tolist()) == set(k.unique().tolist()) == {0.0, 1.0}
    assert v.unique().numel() > 1000
    rate = torch.cat([q, k]).mean().item()
    assert report.log["attention_rate"].item() == pytest.approx(rate) and 0.05 < rate < 0.3
    h = F.rms_norm(x, (D,))
    fires = (F.linear(h, trait.query_key.weight) >= 1).float()  # (B, T, queries and keys)
    torch.testing.assert_close(q, fires[..., :24].view(2, 63, 3, 8).transpose(1, 2))
    torch.testing.assert_close(k, fires[..., 24:].view(2, 63, 3, 8).transpose(1, 2))


# ---- ProgSem, Kuramoto ---------------------------------------------------------------------------


def test_programs_are_read_from_all_membranes():
    P = torch.zeros(sum(NEURONS), 3)
    P[0, 0] = P[NEURONS[0] + 2, 1] = 6.0  # program 0: a neuron of layer 1; program 1: of layer 2
    trait, (x, tokens, _, membranes) = ProgSem(D, 3, P=P), stream(2)
    for m in membranes:
        m.zero_()
    membranes[0][:, 0, 0] = membranes[1][:, 1, 2] = 0.5
    active = trait.activity(x, Seen(tokens, membranes=membranes), Report())[0]
    at_rest, lifted = ((1 + math.erf(z - 1)) / 2 for z in (0.0, 6 * math.tanh(0.5) / 6))
    expected = [[lifted, at_rest, at_rest], [at_rest, lifted, at_rest]]
    torch.testing.assert_close(active, torch.tensor(expected))
    assert "P" in trait.state_dict() and "P" not in dict(trait.named_parameters())
    assert "P" in dict(ProgSem(D, 3).named_parameters())
    with pytest.raises(ValueError, match="write progsem:3"):
        ProgSem(D, 4, P=P)
    torch.testing.assert_close(trait.P, P)


def phases_after(trait, x):
    """The phases of x (B, T, D), each step written with the sum over all pairs."""
    phase = F.linear(F.rms_norm(x, (D,)), trait.phase.weight)
    for _ in range(trait.steps):
        pairs = torch.sin(phase[..., None, :] - phase[..., :, None]).mean(-1)
        phase = phase + trait.omega + trait.K * pairs
    return phase


@torch.no_grad()
def test_kuramoto_couples_all_pairs_and_falls_into_step_with_k():
    trait, data, rhythm = build("kuramoto")[0], stream(63), []
    for trait.steps in (0, 1, 3):
        for K in (0.0, 0.5, 1.0, 1.5, 9.0, -1.5, -9.0):
            trait.K.fill_(K)
            _, _, report = run([trait], data)
            rhythm.append(report.log["kuramoto_r"].item())
            if K == 1.5:
                phase = phases_after(trait, data[0])
                r = torch.polar(torch.ones_like(phase), phase).mean(-1).abs().mean().item()
                assert rhythm[-1] == pytest.approx(r, abs=1e-5)
    assert all(0 <= r <= 1 for r in rhythm)
    assert len(set(rhythm[:7])) == 1 and rhythm[0] < 0.4  # spread over the circle
    for r in (rhythm[7:14], rhythm[14:]):
        assert r[0] < r[1] < r[2] < r[3] == r[4] and r[5] == r[6] < r[0]  # |K| is at most 1.5
    assert rhythm[17] > 0.8


# ---- MoE -----------------------------------------------------------------------------------------


def moe_routed(bias):
    trait = MoE(D, experts=4, width=8, balance=0.01)
    with torch.no_grad():
        trait.down.normal_()
        trait.router.weight.zero_()
        trait.router.bias.copy_(torch.tensor(bias))
    return trait


def test_moe_computes_the_chosen_experts_and_no_other():
    torch.manual_seed(0)
    trait, (x, tokens, _, _) = moe_routed([0.0, 2.0, 1.0, -1.0]), stream(10)
    y, _ = trait(x, None, Seen(tokens), Report())
    p = torch.tensor([2.0, 1.0]).softmax(0)  # of the two chosen, again a whole
    h, up, down = F.rms_norm(x, (D,)), trait.up.view(4, 8, D), trait.down.view(4, 8, D)
    expected = sum(p[i] * F.gelu(h @ up[e].t()) @ down[e] for i, e in enumerate((1, 2)))
    torch.testing.assert_close(y - x, expected)
    with torch.no_grad():
        up[[0, 3]] = math.nan
    assert torch.equal(trait(x, None, Seen(tokens), Report())[0], y)
    alone, report = MoE(D, experts=1, width=8), Report()  # one expert gets every token
    assert torch.equal(alone(x, None, Seen(tokens), report)[0], x)
    assert report.macs == D + 2 * D * 8 and report.losses["moe"].item() == pytest.approx(0.01)


def test_moe_balance_is_least_when_all_share_the_work():
    torch.manual_seed(0)
    x, tokens, _, _ = stream(64)

    def loss(spread, bias):
        trait, report = moe_routed(bias), Report()
        with torch.no_grad():
            trait.router.weight[:, :4] = spread * torch.eye(4)
        trait(x, None, Seen(tokens), report)
        return report.losses["moe"]

    shared, lopsided = loss(1.0, [0.0] * 4), loss(1.0, [3.0, 3.0, 0.0, 0.0])
    assert shared.item() == pytest.approx(0.01, rel=0.05)
    # all choices fall on two experts of four, which together have p of nearly 1
    assert loss(0.0, [9.0, 9.0, 0.0, 0.0]).item() == pytest.approx(0.01 * 4 * 0.5, rel=1e-2)
    assert lopsided > 1.5 * shared
    trait, report = moe_routed([2.0, 1.0, 0.0, 0.0]), Report()
    trait(x, None, Seen(tokens), report)
    report.losses["moe"].backward()
    g = trait.router.bias.grad
    assert g[0] > 0 and g[1] > 0 and g[2] < 0 and g[3] < 0  # descent takes from the favourites


@torch.no_grad()
def test_moe_routes_by_a_decaying_trace_of_the_spikes():
    trait, (x, tokens, spikes, _) = build("moe")[0], stream(63)
    spikes[:, :, 0] = 1
    seen, report = Seen(tokens, spikes=spikes), Report()
    _, (trace, silent) = trait(x, None, seen, report)
    expected = torch.zeros(2, NEURONS[-1])
    for t in range(63):
        expected = 0.9 * expected + 0.1 * spikes[:, t]
    torch.testing.assert_close(trace, expected)
    assert (silent == 0).all() and report.rates == []
    loss = report.losses["moe"].item()
    trait(x, None, seen, report)
    assert report.losses["moe"].item() == pytest.approx(2 * loss)  # of all such layers together
    # without spikes, as in a transformer, the sign of the stream is read
    binary = MoE(D, experts=4, width=8)
    a = binary(x, None, Seen(tokens), Report())[1][0]
    b = binary(x, None, Seen(tokens, spikes=(x > 0).float()), Report())[1][0]
    assert torch.equal(a, b) and a.mean() > 0.3


# ---- Memory --------------------------------------------------------------------------------------


@torch.no_grad()
def test_memory_holds_a_write_for_500_tokens():
    trait = Memory(3, neurons=1)  # channel 0 writes, 1 opens the gate, 2 is what goes on
    for p in trait.parameters():
        p.zero_()
    beta = 0.998
    trait.beta_logit.fill_(math.log(beta / (1 - beta)))
    trait.write.weight[0, 0] = 0.2
    trait.gate.weight[0, 1], trait.gate.bias[:] = 20.0, -10.0
    trait.read.weight[0, 2] = 1.0
    talk = torch.tensor([-1.0, -0.8, 1.0]).repeat(1, 1200, 1)  # writes, but the gate is shut
    told = talk.clone()
    told[0, 100] = torch.tensor([1.0, 1.0, 0.0])  # a name is told
    replaced = told.clone()
    replaced[0, 300] = torch.tensor([0.1, 1.0, 1.0])  # and then a lesser one

    def spikes(x):
        seen = Seen(torch.zeros(x.shape[:2], dtype=torch.long))
        return (trait(x, None, seen, Report())[0] - x)[0, :, 2]

    assert (spikes(talk) == 0).all()
    s, v = spikes(told), 0.2 * 1.5**0.5  # rms of (1, 1, 0) is sqrt(2/3)
    until = 100 + int(math.log(v / 0.05) / -math.log(beta))
    assert until > 700 and (s[:100] == 0).all() and (s[100 : until - 3] == 1).all()
    assert (s[until + 3 :] == 0).all()
    s = spikes(replaced)
    assert (s[100:300] == 1).all() and (s[300:] == 0).all()
    trait.bfloat16()
    s = spikes(told.bfloat16())
    assert (s[100 : until - 40] == 1).all() and (s[until + 40 :] == 0).all()


def test_memory_neurons_are_slow_and_learn_how_slow():
    trait, data = woken(build("memory")), stream(63)
    beta = torch.sigmoid(build("memory")[0].beta_logit)
    assert beta.min().item() == pytest.approx(0.99) and beta.max().item() == pytest.approx(0.999)
    gate = torch.sigmoid(build("memory")[0].gate.bias)  # some write at once, some hold on
    assert gate.max() > 0.1 and gate.min() < 0.003
    x, _, report = run(trait, data)
    x.square().sum().backward()
    assert (trait[0].beta_logit.grad != 0).any() and 0.01 < report.log["memory_rate"] < 0.9


# ---- MTP, JEPA -----------------------------------------------------------------------------------


def test_mtp_predicts_the_right_tokens():
    torch.manual_seed(0)
    V, T = 7, 12
    text = torch.randint(V, (2, T + 4))
    ahead = [F.one_hot(text[:, k : k + T], V).float() for k in (2, 3)]  # tokens t+2 and t+3
    h = torch.cat([torch.zeros(2, T, V), *ahead], -1)  # (B, T, 3V)
    mtp = MTP(3 * V, 2, weight=0.3)

    def readout(h):
        return 50 * h[..., :V]

    report, targets = Report(hidden=h), text[:, 1 : T + 1]  # token t+1
    assert mtp.loss(report, targets, readout).item() == pytest.approx(0.3 * math.log(V), rel=1e-5)
    with torch.no_grad():
        for k, W in enumerate(mtp.matrices, 1):
            W[k * V : (k + 1) * V, :V] = torch.eye(V)
    assert mtp.loss(report, targets, readout).item() < 1e-6
    for off in (text[:, :T], text[:, 2 : T + 2]):  # an off-by-one is not what h holds
        assert mtp.loss(report, off, readout).item() > 1
    assert mtp.loss(Report(hidden=h[:, :1]), targets[:, :1], readout) == 0  # nothing lies ahead


def test_mtp_starts_as_the_models_own_readout_and_is_awake():
    torch.manual_seed(0)
    mtp, head, h = MTP(D, 2), torch.nn.Linear(D, VOCAB), torch.randn(2, 9, D)
    targets = torch.randint(VOCAB, (2, 9))
    loss = mtp.loss(Report(hidden=h), targets, head)
    nats = [
        F.cross_entropy(head(h[:, :-k]).flatten(0, 1), targets[:, k:].flatten()) for k in (1, 2)
    ]
    torch.testing.assert_close(loss, 0.3 * (nats[0] + nats[1]) / 2)
    loss.backward()
    assert all(W.grad.abs().sum() > 0 for W in mtp.matrices)


def test_jepa_compares_with_the_next_position_and_stops_the_gradient_there():
    torch.manual_seed(0)
    jepa, h = JEPA(D), torch.randn(2, 9, D, requires_grad=True)
    loss = jepa.loss(report := Report(hidden=h))
    cos = F.cosine_similarity(h[:, :-1], h[:, 1:], dim=-1)
    torch.testing.assert_close(loss, 0.1 * (1 - cos).mean())  # its gate is 0 at the start
    (grad,) = torch.autograd.grad(loss, h, retain_graph=True)
    assert (grad[:, -1] == 0).all() and (grad[:, :-1].abs().sum(-1) > 0).all()
    expected = torch.autograd.grad(
        0.1 * (1 - F.cosine_similarity(h[:, :-1], h[:, 1:].detach(), dim=-1)).mean(), h
    )[0]
    torch.testing.assert_close(grad, expected)
    loss.backward()
    assert jepa.gate.grad != 0
    spread = h.detach().flatten(0, 1).std(0).mean()
    torch.testing.assert_close(report.log["jepa_std"], spread)
    jepa.loss(report := Report(hidden=torch.ones(2, 9, D)))
    assert report.log["jepa_std"] == 0
    with pytest.raises(ValueError, match="2 tokens"):
        jepa.loss(Report(hidden=h[:, :1]))


def test_jepa_predicts_by_its_equation():
    torch.manual_seed(0)
    jepa, h = JEPA(D), 3 * torch.randn(2, 9, D)
    jepa.gate.data.fill_(2.0)
    pred = h + 2 * jepa.predict(F.rms_norm(h, (D,)))
    cos = F.cosine_similarity(pred[:, :-1], h[:, 1:], dim=-1)
    torch.testing.assert_close(jepa.loss(Report(hidden=h)), 0.1 * (1 - cos).mean())
