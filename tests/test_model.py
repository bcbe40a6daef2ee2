"""The model: every config, shrunk; whole = split = token by token; causal; counted."""

import math
import re
import shutil
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import check_model, leaves
from torch._subclasses.fake_tensor import FakeTensorMode

import blocks
import config
from blocks import (
    Block, Population, by_head, fast_weights, fast_weights_reference, rotate,
)  # fmt: skip
from kernels import Membranes, lif, read_rows
from lif import Linear, Report, Synapse, take_rows
from model import ModelConfig, SpikingLM, pick, spike_encode
from optim import make_optimizers
from train import Run, TrainConfig, train_step

CONFIGS = sorted(p.name for p in Path(__file__).parent.parent.glob("configs/*.py"))
ONE_PER_BLOCK = ["sam_6m.py", "spikewhale_6m.py", "neuronspark_6m.py", "snn_6m.py", "gpt_6m.py"]
SMALL = dict(vocab_size=50, n_embd=16, n_layer=2, n_head=2, d_ff=24, n_state=2, k_max=3, noise=0)
SMALL |= dict(window=8, keys=5)


def shrunk(name, **more):
    c = config.load(TrainConfig, [f"configs/{name}"])
    small = SMALL | {"n_hidden": 32 if c.n_hidden > c.n_embd else 16}
    small["traits"] = re.sub(r"engram:\d+", "engram:61", c.traits)
    return replace(c, **small | more)


def model_of(c):
    torch.manual_seed(0)
    return SpikingLM(c).eval()


def backward(model, tokens):
    """A step of training up to the gradients, on tokens that predict themselves."""
    logits, _, report = model(tokens)
    nats, others = model.loss(logits, tokens, report)
    (nats + sum(others.values())).backward()
    return logits


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_split_causal_and_learns(name):
    model = model_of(shrunk(name))
    check_model(model)
    model.train().zero_grad()
    tokens = torch.randint(50, (4, 12))
    for _ in range(2):  # the first step wakes what stands behind a matrix of zeros
        backward(model, tokens)
        with torch.no_grad():
            for p in model.parameters():
                p -= 1e-3 * p.grad
    for key, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, key


NOT_THE_DEFAULT = dict(embed_gain=2.0, slope=0.8, reset_grad=False, theta=0.9)
GOLDEN = {
    "sam_v1_char.py": [3.89285, 1.18348, 3.87233, 1.09598, 3.84891, 1.92358],
    "sam_v2.py": [3.9181, 1.18471, 3.89893, 1.15238, 3.88188, 1.13286],
    "sam_6m.py": [3.90515, 1.17743, 3.88878, 1.41285, 3.86995, 1.33781],
    "spikewhale_6m.py": [3.92154, 1.21472, 3.85469, -0.73245, 7.91676, -2.5551],
    "neuronspark_6m.py": [3.91655, 1.19293, 3.84796, 1.18194, 3.79362, 1.17395],
    "snn_6m.py": [3.9114, 1.18575, 3.88918, 3.51101, 3.89797, 3.36245],
    "gpt_6m.py": [3.92819, 1.18816, 3.83101, 1.1784, 3.76677, 1.16688],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_losses(name, monkeypatch):
    """These change only if the numbers that a model computes change: then say why, and renew."""
    monkeypatch.setattr(blocks, "CLAMP", 2.0)
    traits = re.sub("none|mtp:1", "", config.load(TrainConfig, [f"configs/{name}"]).traits)
    traits += " moe:4,8 memory:12 mtp:2"
    model = model_of(shrunk(name, **NOT_THE_DEFAULT, traits=traits))
    model.double().train()  # in double precision no spike is a toss-up
    tokens, losses = torch.randint(50, (4, 13)), []
    for _ in range(3):
        logits, _, report = model(tokens[:, :-1])
        nats, others = model.loss(logits, tokens[:, 1:], report)
        losses += [nats.item(), sum(x.item() for x in others.values())]
        rates = torch.cat(report.rates or [model.rate]).detach()
        model.observe(nats.item(), rates)
        parameters = list(model.parameters())
        gradient = torch.autograd.grad(nats + sum(others.values()), parameters)
        norm = torch.cat([d.flatten() for d in gradient]).norm()
        share = 1 / norm if "snn" in name else 1  # where all is silent, the slope of rms is steep
        for p, d in zip(parameters, gradient):
            p.data -= 0.1 * share * d
    assert losses == pytest.approx(GOLDEN[name], abs=1e-4)


@pytest.mark.parametrize("spikes", [True, False])
def test_snn_keeps_its_word(spikes):
    model = model_of(shrunk("snn_6m.py", spikes=spikes))
    check_model(model)
    with torch.no_grad():
        _, state, report = model(torch.randint(50, (1, 40)))
    assert state["block0"]["mix"]["S"][0].shape == (1, 2, 5, 16 // 2 + 1)
    if spikes:  # floats cross no matrix but the embedding's, in and out of the residual stream
        blocks = sum(p.numel() for b in model.blocks for n, p in b.named_parameters() if "w_" in n)
        rows = 2 * (2 * 2 * 5) * (16 // 2 + 1)  # 2 layers, of q and of k 2 heads of 5 neurons
        assert report.macs == model.embedding.weight.numel()
        assert sum(every for _, every in report.synapses) == blocks + rows


def fast_weights_inputs(B=2, heads=3, T=37, keys=5, values=4):
    """Spikes of levels 0 to 3 that are often 0, values and decays, in float64; silence."""
    torch.manual_seed(0)
    q, k = torch.randint(0, 4, (2, B, heads, T, keys)) * (torch.rand(2, B, heads, T, keys) < 0.4)
    v, gamma = torch.randn(B, heads, T, values).double(), torch.tensor([0.5, 0.9, 0.99]).double()
    S = torch.zeros(B, heads, keys, values).double()
    return [x.double().requires_grad_() for x in (q, k, v, gamma)], S


def test_fast_weights_in_chunks_are_those_of_the_equations():
    inputs, state = fast_weights_inputs()
    results = []
    for form in (fast_weights_reference, partial(fast_weights, chunk=8)):
        o, S = form(*inputs, state)
        weight = torch.arange(o.numel()).view_as(o).double().sin()
        results.append([o, S, *torch.autograd.grad((o * weight).sum() + S.sum(), inputs)])
    for want, got in zip(*results):
        torch.testing.assert_close(got, want)
    few, state = fast_weights_inputs(1, 3, 5, 2, 2)
    assert torch.autograd.gradcheck(lambda *x: fast_weights(*x, state, chunk=2)[0], few)


@torch.no_grad()
def test_fast_weights_token_by_token_touch_the_rows_of_spikes_alone():
    (q, k, v, gamma), S = fast_weights_inputs(B=2)
    want = fast_weights_reference(q, k, v, gamma, S)[0]
    states = [(S, torch.ones(2, 3, 5).double())]

    def token(t, state):
        return read_rows(q[:, :, t].flatten(1), k[:, :, t].flatten(1), v[:, :, t], gamma, *state)

    for t in range(37):
        o, *state = token(t, states[-1])
        states.append(state)
        torch.testing.assert_close(o, want[:, :, t])
    for t in (3, 20, 36):  # from any state on: none was written over
        torch.testing.assert_close(token(t, states[t])[0], want[:, :, t])
    silent = (q[:, :, 20] == 0) & (k[:, :, 20] == 0)
    S = states[20][0].masked_fill(silent[..., None], math.nan)
    assert silent.any() and token(20, (S, states[20][1]))[0].isfinite().all()


@torch.no_grad()
def test_what_the_fast_weights_keep_stays_as_large():
    """State of 100,000 tokens, and what is written is still read: a spike of value 1 at the end."""
    q = k = torch.ones(1, 1, 100_000, 1)
    v = torch.zeros(1, 1, 100_000, 2)
    v[:, :, -1] = 1
    o, S = fast_weights(q, k, v, torch.tensor([0.999]), torch.zeros(1, 1, 1, 2))
    assert S.shape == (1, 1, 1, 2)
    assert o[0, 0, -1].tolist() == [1, 1] and S.flatten().tolist() == [1, 1]


@torch.no_grad()
def reached(model, at, T):
    """By how much the logits of T tokens change with the token `at`: (T,)."""
    tokens = torch.arange(T).view(1, T)
    other = tokens.masked_fill(tokens == at, 49)
    return (model(tokens)[0] - model(other)[0]).abs().amax(-1)[0]


def test_snn_remembers_beyond_its_membranes():
    """By the fast weights alone: when they fade at once, token 1 is forgotten by token 20."""
    model = model_of(shrunk("snn_6m.py", n_layer=1, beta_low=0.01, beta_high=0.011))
    assert reached(model, 1, 21)[20] > 1e-3
    model.blocks[0].mix.log_fade.data.zero_()  # gamma 0.01
    assert reached(model, 1, 21)[20] < 1e-6


@pytest.mark.parametrize(
    "name, millions, tolerance",
    [("sam_6m.py", 6.04, 0.01), ("gpt_6m.py", 6.04, 0.01), ("sam_v1_char.py", 1, 0.2)]
    + [("sam_v2.py", 3, 0.1), ("sam_v3.py", 6, 0.05), ("snn_6m.py", 6.04, 0.01)]
    + [("spikewhale_216m.py", 216.1, 0.001), ("neuronspark_0p9b.py", 874.1, 0.001)]
    + [("snn_1b.py", 1074.6, 0.001)],
)
def test_parameters(name, millions, tolerance):
    with torch.device("meta"):
        model = SpikingLM(config.load(TrainConfig, [f"configs/{name}"]))
    count = sum(p.numel() for p in model.parameters())
    assert count == pytest.approx(millions * 1e6, rel=tolerance)


@torch.no_grad()
def test_gpt_attends_to_its_window_and_no_further():
    model = model_of(shrunk("gpt_6m.py", n_layer=1, window=4))
    assert (reached(model, 5, 12) > 1e-6).tolist() == [5 <= t <= 8 for t in range(12)]
    state, macs = None, []  # and counts what it attends to
    for t in range(6):
        _, state, report = model(torch.tensor([[t]]), state)
        macs.append(report.macs - macs[0] if macs else report.macs)
    assert macs[1:] == [pairs * 2 * 16 for pairs in (1, 2, 3, 3, 3)]


@pytest.mark.parametrize("name", ["sam_6m.py", "snn_6m.py", "gpt_6m.py"])
def test_generation_keeps_its_state_small_and_equals_the_forward(name):
    model = model_of(shrunk(name))
    prompt = torch.randint(50, (1, 5))
    stream = list(islice(model.generate(prompt, temperature=0), 25))
    tokens = torch.cat([prompt] + [token for token, _ in stream], 1)
    with torch.no_grad():
        logits, _, _ = model(tokens)
    assert torch.equal(logits[0, 4:-1].argmax(-1), tokens[0, 5:])

    def size(state):
        return sum(x.numel() for x in leaves(state))

    assert size(stream[12][1]) == size(stream[24][1])
    if name == "gpt_6m.py":
        assert stream[24][1]["block0"][0].shape[2] == model.config.window - 1
    # the yielded state has seen all but the yielded token: going on from it changes nothing
    token, state = stream[9]
    again = [t.item() for t, _ in islice(model.generate(token, state, temperature=0), 15)]
    assert again == [t.item() for t, _ in stream[10:]]


def test_encoder_is_binary_forward_and_a_sigmoid_backward():
    x = torch.tensor([-2.0, -1e-8, 0.0, 1e-6, 9.0], requires_grad=True)
    s = spike_encode(x)
    assert s.tolist() == [0, 0, 0, 1, 1]
    assert set(spike_encode(torch.randn(10000)).tolist()) == {0.0, 1.0}  # exactly
    s.sum().backward()
    p = torch.sigmoid(x.detach())
    torch.testing.assert_close(x.grad, p * (1 - p))


def test_synapse_counts_what_its_spikes_trigger():
    synapse, report = Synapse(4, 3), Report()
    s = torch.tensor([[[1.0, 0, 0, 1], [0, 0, 0, 1]]])  # 3 spikes in 2 tokens
    y = synapse(s, report)
    ((triggered, every),) = report.synapses
    assert triggered.item() == pytest.approx(1.5 * 3) and every == 12
    torch.testing.assert_close(y[0, 1], synapse.weight[3] + synapse.bias)  # a row per presynaptic


@torch.no_grad()
def test_synops_of_the_model_are_counted_from_real_spikes():
    model = model_of(shrunk("sam_6m.py"))
    tokens = torch.randint(50, (2, 20))
    _, _, report = model(tokens)
    encoded = (model.embedding(tokens) > 0).float().sum(-1).mean() * 32
    expected = [encoded] + [rate.sum() * 32 for rate in report.rates]
    triggered, every = zip(*report.synapses)
    torch.testing.assert_close(torch.stack(triggered), torch.stack(expected))
    assert every == (16 * 32, 32 * 32, 32 * 32)
    assert report.macs == 2 * 2 * 32 * 32 + 32 * 16 + 50 * 16  # per block in and gate; out; head


# ---- traits: any with any block ------------------------------------------------------------------

NUMBERS = dict(engram="61,2,64", hrm=2, spike_attn=2, progsem=18, kuramoto=8, moe="4,8", memory=12)
NUMBERS |= dict(mtp=2, jepa=256)
TRAITS = {name: f"{name}:{numbers}" for name, numbers in NUMBERS.items()}
TRAITS["all"] = " ".join(TRAITS.values())
PAIRS = [(name, trait) for name in ("sam_6m.py", "gpt_6m.py") for trait in TRAITS]
PAIRS += [(name, "all") for name in ONE_PER_BLOCK if (name, "all") not in PAIRS]


@pytest.mark.parametrize("name, trait", PAIRS)
def test_a_trait_begins_as_almost_nothing_awake_and_keeps_its_state(name, trait):
    plain = model_of(shrunk(name, traits="none"))
    model = model_of(shrunk(name, traits=TRAITS[trait]))
    missing = model.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing  # the trait's own
    tokens = torch.randint(50, (3, 20))
    logits = backward(model.train(), tokens)
    torch.testing.assert_close(logits, plain(tokens)[0], rtol=0, atol=1e-3)
    for own in NUMBERS if trait == "all" else [trait]:
        grads = [p.grad for key, p in model.named_parameters() if own in key.split(".")]
        assert any(g is not None and g.abs().sum() > 0 for g in grads), own
    with torch.no_grad():  # awake: what starts at zero would hide its mistakes
        for key, p in model.named_parameters():
            if trait in key or trait == "all":
                p += 0.1 * torch.randn_like(p)
    check_model(model.eval())


@torch.no_grad()
def test_snn_sends_at_most_one_spike_per_population_at_its_learned_level():
    model = model_of(shrunk("snn_6m.py"))
    for name, p in model.named_parameters():
        if "levels" in name:
            p += torch.randn_like(p)
    sent = []
    for block in model.blocks:
        ways = [(block.a, block.mix.w_qk), (block.mix.o, block.mix.w_o)]
        for source, w in ways + [(block.a, block.w_in), (block.h, block.w_out)]:
            w.register_forward_pre_hook(lambda m, i, source=source: sent.append((source, m, i[0])))
    _, _, report = model(torch.randint(50, (4, 30)))
    rows = [5 * 2 * (16 // 2 + 1)] * 2  # those that spikes of q and of k read and write
    synapses = [pair for pair in report.synapses if pair[1] not in rows]
    assert len(sent) == len(synapses) == 4 * len(model.blocks)
    for (source, w, q), (synops, synapses) in zip(sent, synapses):
        levels = source.levels.view(-1, 1, 1, q.shape[-1])  # (neurons of a population, 1, 1, N)
        assert ((q == levels).any(0) | (q == 0)).all()
        spikes = (q != 0).float().mean((0, 1)).sum().item()
        assert synops.item() == pytest.approx(spikes * w.weight.shape[1])
        assert synapses == w.weight.numel()


def test_twin_of_snn_is_the_same_block_with_floats():
    sizes = dict(n_embd=16, n_hidden=16, head="spikes")
    spiking, twin = (model_of(shrunk("snn_6m.py", spikes=on, **sizes)) for on in (True, False))
    of_spiking, of_twin = (
        {k: p.numel() for k, p in m.named_parameters() if "levels" not in k}
        for m in (spiking, twin)
    )
    assert of_spiking == of_twin
    check_model(twin)
    _, _, report = twin(torch.randint(50, (1, 5)))
    assert report.rates == report.synapses == [] and report.macs > 0
    with torch.no_grad():  # and its populations send what the spikes stand for: v, or relu(v)
        for of_spikes, of_twin in zip(*((m.blocks[0].a, m.blocks[0].h) for m in (spiking, twin))):
            of_spikes.load_state_dict(of_twin.state_dict(), strict=False)
            z = torch.randn(2, 9, of_twin.gain.numel())
            error = of_spikes(z, None, Report())[0] - of_twin(z, None, Report())[0]
            assert error[error.abs() < 0.81].numel() > 0.97 * error.numel()  # theta is 0.8


NEEDS_CXX = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")


@pytest.mark.parametrize(
    "head, B, compile",
    [("float", 1, False), ("spikes", 1, False), ("spikes", 3, False)]
    + [pytest.param("spikes", B, True, marks=NEEDS_CXX) for B in (1, 3)],
)
@torch.no_grad()
def test_a_prepared_model_writes_as_it_reads(head, B, compile):
    """One token by events = the forward, whichever state it goes on from; and so is its report."""
    model = model_of(shrunk("snn_6m.py", head=head, n_embd=16, n_hidden=16)).double()
    for p in model.parameters():
        if p.dim() < 2:  # of neurons: no two are alike
            p += 0.1 * torch.randn_like(p)
    prompt, tokens = torch.randint(50, (B, 45)).split([5, 40], 1)
    _, before, _ = model(prompt)
    want, _, told = model(tokens, before)
    model.prepare(torch.float64, compile)
    torch.testing.assert_close(model(tokens, before)[0], want)  # the weights are the same
    got, states, reports = [], [model(prompt)[1]], []
    for t in tokens.split(1, 1):
        logits, state, report = model(t, states[-1])
        got, states, reports = [*got, logits], [*states, state], [*reports, report]
    torch.testing.assert_close(torch.cat(got, 1), want)
    for t in (7, 23):
        torch.testing.assert_close(model(tokens[:, t : t + 1], states[t])[0], want[:, t : t + 1])
        torch.testing.assert_close(model(tokens[:, t:], states[t])[0], want[:, t:])
    rates = torch.stack([torch.cat(report.rates).double() for report in reports]).mean(0)
    torch.testing.assert_close(rates, torch.cat(told.rates).double())
    triggered, every = map(sum, zip(*(pair for report in reports for pair in report.synapses)))
    of_forward = [float(sum(x)) for x in zip(*told.synapses)]
    assert [triggered.item() / 40, every / 40] == pytest.approx(of_forward)
    model.events.texts = B - 1  # more texts than that: dense
    logits, state, _ = model(tokens[:, :1], states[0])
    torch.testing.assert_close(logits, want[:, :1])
    assert (state["block0"]["mix"]["S"][1] == 1).all()  # no row owes


@torch.no_grad()
def test_a_membrane_at_its_threshold_fires_by_events_too():
    p = Population(4, shrunk("snn_6m.py"), True, 0.5)
    low, high = p.theta[:2]
    p.beta_logit.fill_(-math.inf)  # so that v is the bias
    p.bias.copy_(torch.stack([low, -low, high, torch.nextafter(low, 0 * low)]))
    sent = p(torch.zeros(1, 1, 4), torch.zeros(1, 4), Report())[0][0, 0]
    by_events = Membranes([p])(torch.zeros(1, 4), torch.zeros(1, 4))[1][0]
    assert by_events.tolist() == sent.tolist() and (sent != 0).tolist() == [True, True, True, False]


@pytest.mark.parametrize("head", ["float", "spikes"])
@torch.no_grad()
def test_halved_synapses_say_nearly_the_same(head):
    model = model_of(shrunk("snn_6m.py", head=head, n_embd=16, n_hidden=16, n_layer=1))
    tokens = torch.arange(20).view(1, 20)
    whole = model(tokens)[0]
    model.prepare(torch.bfloat16)
    halved = model(tokens)[0]
    assert model.blocks[0].w_in.weight.dtype == torch.bfloat16 and halved.dtype == torch.float32
    first = (halved - whole)[:, 0].abs()  # later a flipped spike may tell them apart
    assert 0 < first.max() < 0.05 * whole.std()
    kinds = {p.dtype for name, p in model.named_parameters() if not name.endswith("weight")}
    assert kinds == {torch.float32}


# ---- the bridge: gene programs set theta, beta and gain ------------------------------------------


def test_without_modulation_all_neurons_are_alike():
    for block in model_of(shrunk("spikewhale_6m.py", modulation="none")).blocks:
        assert block.modulation is None
        assert len(block.theta.unique()) == len(block.beta.unique()) == 1
    for block in model_of(shrunk("spikewhale_6m.py")).blocks:
        assert all(len(x.unique()) > 10 for x in block.modulation())


def test_the_strengths_learn_and_travel_in_the_checkpoint():
    model = model_of(shrunk("spikewhale_6m.py"))
    tokens = torch.randint(50, (4, 20))
    backward(model, tokens)
    for block in model.blocks:
        for strength in (block.modulation.g_theta, block.modulation.g_beta, block.modulation.g_in):
            assert strength.grad.abs().sum() > 0
            strength.data += 0.01
    model.adopt(torch.randn(20, 6))  # another virtual cell
    torch.manual_seed(9)
    again = SpikingLM(model.config).eval()
    assert not torch.equal(again.identity, model.identity)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.identity, model.identity)
    assert torch.equal(again.parts["progsem"].P, model.identity)
    assert torch.equal(again(tokens)[0], model(tokens)[0])


def test_shuffling_keeps_each_program_and_moves_it():
    plain, shuffled = (
        model_of(shrunk("spikewhale_6m.py", modulation=how)) for how in ("program", "shuffled")
    )
    scores = torch.randn(20, 6)
    for change in (lambda model: None, lambda model: model.adopt(scores)):  # the screen, a cell
        change(plain), change(shuffled)
        P, other = plain.identity, shuffled.identity
        n = P.shape[0] // 2  # two layers
        assert not torch.equal(P, other) and not torch.equal(P[:n], P[n:])
        torch.testing.assert_close(P[:n].sort(0).values, other[:n].sort(0).values)


@torch.no_grad()
def test_shares_of_the_updates():
    model = model_of(shrunk("gpt_6m.py", traits="memory:8"))
    model.parts["memory"].read.weight.normal_()
    for part in model.blocks:
        part.out.weight.zero_(), part.down.weight.zero_()
    _, _, report = model(torch.randint(50, (2, 200)))
    assert report.log["share memory"] == 1 and report.log["share block1"] == 0
    _, _, report = model_of(shrunk("sam_6m.py", traits="memory:8"))(torch.randint(50, (2, 20)))
    shares = [value for name, value in report.log.items() if name.startswith("share")]
    assert len(shares) == 3 and sum(shares) == pytest.approx(1, abs=1e-6)


# ---- events: one token reads only the rows of the neurons that fired ----------------------------


@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("fired", [0, 1, 37, 80, 150, 199])
@torch.no_grad()
def test_events_equal_the_dense_product(dtype, near, fired):
    torch.manual_seed(fired)
    synapse, s = Synapse(200, 31).to(dtype), torch.zeros(1, 1, 200)
    s[0, 0, torch.randperm(200)[:fired]] = torch.rand(fired) + 0.5  # levels of populations
    report, reports = Report(), Report()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # two bags of rows, where there are enough
    events, dense = synapse(s, report), synapse(s.expand(2, 1, 200), reports)[:1]
    torch.set_num_threads(threads)
    torch.testing.assert_close(events, dense, rtol=near, atol=near)
    assert report.synapses == reports.synapses == [(pytest.approx(fired * 31), 200 * 31)]
    torch.testing.assert_close(
        events[0, 0], s[0, 0] @ synapse.weight.float() + synapse.bias.float(), rtol=near, atol=near
    )


@pytest.mark.parametrize("fired, starts", [(63, [0]), (64, [0, 21, 42]), (99, [0, 33, 66])])
def test_threads_share_the_rows(fired, starts, monkeypatch):
    seen, s = [], torch.arange(200).view(1, 1, 200) < fired
    bag = torch.embedding_bag
    monkeypatch.setattr(torch, "embedding_bag", lambda *a: seen.append(a) or bag(*a))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    with torch.no_grad():
        Synapse(200, 8)(s.float(), Report())
    ((_, rows, bags, *_),) = seen
    assert rows.tolist() == list(range(fired)) and bags.tolist() == starts


def test_events_touch_no_other_row():
    synapse, s = Synapse(64, 8), torch.zeros(1, 1, 64)
    s[0, 0, 5] = 1
    with torch.no_grad():
        synapse.weight[torch.arange(64) != 5] = math.nan
        assert synapse(s, Report()).isfinite().all()


def test_a_float_head_beside_blocks_that_fire():
    """Its population sends floats, which have no rate."""
    c = shrunk("sam_6m.py", head="spikes", spikes=False, n_embd=16, n_hidden=16)
    model = model_of(c)
    _, _, report = model(torch.randint(50, (2, 20)))
    assert len(torch.cat(report.rates)) == len(model.rate) == sum(model.sites)


def test_a_spiking_head_is_fed_by_spikes_and_tied():
    model = model_of(shrunk("snn_6m.py", head="spikes", n_embd=16, n_hidden=16))
    tokens = torch.randint(50, (2, 20))
    logits, _, report = model(tokens)
    assert report.macs == 0  # no matrix is fed by floats
    assert len(report.rates) == len(model.sites) == 2 * 5 + 1  # a, q, k, o, h of two blocks
    assert not any(p.shape == (16, 50) for p in model.parameters())
    assert model.embedding.weight.t().is_contiguous()  # what generation reads, row by row
    logits.square().sum().backward()
    assert model.embedding.weight.grad.abs().sum() > 0
    again = SpikingLM(model.config)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(tokens)[0], logits) and again.embedding.weight.t().is_contiguous()
    check_model(model)


# ---- environment, diversity, homeostasis ---------------------------------------------------------


def test_stress_follows_the_loss_and_is_saved(monkeypatch):
    monkeypatch.setattr("model.STRESS_DECAY", 0.9)
    model = model_of(shrunk("sam_6m.py"))
    for _ in range(200):
        model.observe(0.5 * math.log(50), torch.full((64,), 0.1))
    assert model.stress.item() == pytest.approx(0.5, abs=1e-4)
    model.observe(1e9, torch.full((64,), 0.1))
    assert model.stress.item() == pytest.approx(0.55, abs=1e-3)  # within 0..1
    assert model.state_dict()["stress"].item() == model.stress.item()


@torch.no_grad()
def test_stress_scales_the_gain_by_each_neurons_temper():
    model = model_of(shrunk("sam_6m.py", diversity=0.5, n_hidden=512))
    temper = model.blocks[0].temper
    assert temper.mean().item() == pytest.approx(1, abs=0.1) and temper.std() > 0.3
    tokens = torch.randint(50, (2, 20))
    before = model(tokens)[0]
    model.stress.fill_(0.0)
    assert not torch.equal(model(tokens)[0], before)
    model.stress.fill_(1.0)
    assert torch.equal(model(tokens)[0], before)
    model.blocks[0].temper.fill_(1.0)
    assert not torch.equal(model(tokens)[0], before)
    flat = model_of(shrunk("sam_6m.py", stress_gain=0.0))
    before = flat(tokens)[0]
    flat.stress.fill_(0.0)
    assert torch.equal(flat(tokens)[0], before)


@torch.no_grad()
def test_homeostasis_moves_thresholds_towards_the_target_rate():
    c = shrunk("sam_v3.py", homeostasis=0.3, theta=0.3, n_layer=1)
    model = model_of(c)
    tokens, off = torch.randint(50, (8, 40)), []
    for _ in range(60):
        _, _, report = model(tokens)
        off.append((report.rates[0] - c.rate_target).abs().mean().item())
        model.observe(1.0, torch.cat(report.rates))
    assert off[0] > 0.15 and off[-1] < 0.5 * off[0]
    theta = model.blocks[0].theta
    assert theta.std() > 0 and theta.min() > 0.029 and theta.max() < 3.1
    for rate, bound in ((1e9, 3.0), (-1e9, 0.03)):  # from a tenth of theta to ten times
        model.blocks[0].adapt(torch.full_like(theta, rate))
        torch.testing.assert_close(theta, torch.full_like(theta, bound))


def test_penalty_pulls_the_rate_down():
    c = shrunk("sam_6m.py", rate_target=0.1, rate_weight=100.0)
    model = model_of(c).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    tokens, rates = torch.randint(50, (8, 20)), []
    for _ in range(60):
        logits, _, report = model(tokens)
        _, others = model.loss(logits, tokens, report)
        others["rates"].backward()
        optimizer.step()
        optimizer.zero_grad()
        model.observe(1.0, torch.cat(report.rates).detach())
        rates.append(report.rates[0].mean().item())
    assert abs(rates[-1] - 0.1) < 0.03 < abs(rates[0] - 0.1)


@pytest.mark.parametrize(
    "kind, of_0, of_1",  # pressure on layers of rates (0, 0.6) and (0, 0), target 0.2, of weight 1
    [
        ("both", (0.1, 0.1), (-0.2, -0.2)),
        ("above", (0.1, 0.1), (0, 0)),
        ("below", (-0.2, 0), (-0.2, -0.2)),
    ],
)
def test_penalty_presses_from_its_side(kind, of_0, of_1):
    model = model_of(shrunk("sam_6m.py", rate_penalty=kind, rate_target=0.2, rate_weight=3.0))
    last = [torch.zeros(32), torch.zeros(32)]
    last[0][16:] = 0.6
    model.observe(1.0, torch.cat(last))
    report = Report(rates=[torch.full((32,), 0.5, requires_grad=True) for _ in range(2)])
    loss = model.loss(torch.zeros(1, 1, 50), torch.zeros(1, 1, dtype=torch.long), report)[1]
    grads = torch.autograd.grad(loss["rates"], report.rates)
    for grad, halves in zip(grads, (of_0, of_1)):
        expected = 2 * 3.0 * torch.tensor(halves).repeat_interleave(16) / 32
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("more", [{}, {"head": "spikes", "n_embd": 48}])
def test_a_budget_is_of_all_synaptic_operations(more):
    """The share that the matrices count; above the budget all is pressed, below it nothing."""
    settings = dict(rate_target=0.2, rate_weight=30.0, n_hidden=48) | more
    model = model_of(shrunk("snn_6m.py", **settings)).train()
    tokens = torch.randint(50, (2, 20))
    logits, _, report = model(tokens)
    now = model.synop_share(report.rates)
    triggered, every = map(sum, zip(*report.synapses))
    torch.testing.assert_close(now.detach(), triggered / every)
    rates = [torch.full((n,), 0.5) for n in model.sites]
    model.observe(1.0, torch.cat(rates))
    torch.testing.assert_close(
        model.loss(logits, tokens, report)[1]["rates"], 2 * 30.0 * (0.5 - 0.2) * now
    )
    model.observe(1.0, torch.cat([0.3 * rate for rate in rates]))
    assert model.loss(logits, tokens, report)[1]["rates"] == 0
    silent = replace(model.config, rate_floor=0.1)
    model.config, dead = silent, torch.zeros(model.sites[0])
    dead[3:] = 0.1
    model.observe(1.0, torch.cat([dead, *(0.3 * rate for rate in rates[1:])]))
    pressed = model.loss(logits, tokens, report)[1]["rates"]
    torch.testing.assert_close(pressed, 2 * 30.0 * -0.1 * report.rates[0][:3].sum() / len(dead))
    with pytest.raises(ValueError, match="counts synapses"):
        SpikingLM(shrunk("sam_6m.py", rate_penalty="synops"))


@torch.no_grad()
def test_score_counts_every_token_once():
    model = model_of(shrunk("sam_6m.py"))
    tokens = torch.randint(50, (71,)).numpy()
    score = model.score(tokens, 10)
    nats = 0
    for i in range(0, 70, 10):  # rows of 10 from silence
        logits, _, _ = model(torch.from_numpy(tokens[None, i : i + 10]))
        at = torch.from_numpy(tokens[i + 1 : i + 11])
        nats += F.cross_entropy(logits[0], at, reduction="sum").item()
    assert score["tokens"] == 70 and score["nats"] == pytest.approx(nats, rel=1e-5)
    # the last row may be shorter; what is not there counts nowhere
    short, both = model.score(tokens[:66], 10), model.score(tokens[:61], 10)
    tail = model.score(tokens[60:66], 10)
    assert short["tokens"] == 65 and tail["tokens"] == 5
    mean = (60 / 65, 5 / 65)
    for key, weight in (("nats", (1, 1)), ("synops", mean), ("rate", mean)):
        total = weight[0] * np.array(both[key]) + weight[1] * np.array(tail[key])
        assert short[key] == pytest.approx(total, rel=1e-4)
    rate = [rate.mean().item() for rate in model(torch.from_numpy(tokens[None, :10]))[2].rates]
    assert model.score(tokens[:11], 10)["rate"] == pytest.approx(rate)
    assert short["macs"] == model(torch.zeros(1, 1, dtype=torch.long))[2].macs  # of any token


# ---- drawing a token -----------------------------------------------------------------------------


def test_pick():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))

    def drawn(**how):
        g = torch.Generator().manual_seed(0)
        how = dict(temperature=1.0, top_k=0, top_p=1.0, generator=g) | how
        tokens = pick(logits.expand(2000, 4), **how)
        return (tokens.flatten().bincount(minlength=4) / 2000).tolist()

    assert drawn() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.04)
    assert drawn(temperature=0.0) == drawn(temperature=1e-9) == [1, 0, 0, 0]
    assert drawn(temperature=2.0) == pytest.approx([0.379, 0.294, 0.208, 0.120], abs=0.04)
    assert drawn(top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=0.04)
    assert drawn(top_k=100) == drawn()
    assert drawn(top_p=0.6) == pytest.approx([0.625, 0.375, 0, 0], abs=0.04)
    assert drawn(top_p=1e-9) == [1, 0, 0, 0]


def test_generation_draws_from_the_tokens_there_are():
    model = model_of(shrunk("gpt_6m.py"))
    g = torch.Generator().manual_seed(0)
    stream = model.generate(torch.zeros(1, 1, dtype=torch.long), generator=g, vocab=3)
    assert {token.item() for token, _ in islice(stream, 50)} == {0, 1, 2}


def test_recurrent_synapses_are_multiplied_in_the_dtype_of_autocast():
    w = torch.randn(8, 4)
    assert by_head(w).dtype == torch.float32 and by_head(None) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert by_head(w).dtype == torch.bfloat16
    assert torch.equal(by_head(w)[1], w[4:])


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"block": "snn", "homeostasis": 0.1}, "thresholds of block=sam"),
        ({"block": "gpt", "homeostasis": 0.1}, "thresholds of block=sam"),
        ({"beta_low": 0.0}, "beta_low must be 1e-06 to"),
        ({"beta_high": 1.0}, "beta_high must be 1e-06 to"),
        ({"beta_low": 0.7}, "beta_low must not be larger"),
        ({"theta": 0.0}, "theta must be at least 1e-06"),
        ({"slope": 0.0}, "slope must be at least 1e-06"),
        ({"noise": -0.1}, "noise must be at least 0"),
        ({"levels": 0}, "levels must be at least 1"),
        ({"k_max": 1001}, "k_max must be 1 to 1000"),
        ({"rec_heads": -1}, "rec_heads must be at least 0"),
        ({"traits": "moe:0"}, "experts of moe must be 1 to"),
        ({"traits": "memory:0"}, "neurons of memory must be 1 to"),
        ({"traits": "memory:2.5"}, "'memory:2.5' must be name:number"),
        ({"traits": "jepa memory"}, "write the trait memory as memory:neurons$"),
        ({"traits": "hrm:1,2,3"}, r"write the trait hrm as hrm:steps,width \(128\)"),
        ({"traits": "jepa lstm"}, "there is no trait 'lstm'; there are engram, hrm"),
    ],
)
def test_settings_that_make_no_model_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        ModelConfig(**settings)


def test_attention_knows_its_places_in_the_longest_text():
    q, k = torch.randn(2, 1, 1, 1, 32)
    products = []
    for start in (0, 10**7):
        at = torch.tensor([[start], [start + 5]])
        products.append((rotate(q, at[:1]) * rotate(k, at[1:])).sum().item())
    assert products[0] == pytest.approx(products[1], abs=1e-4)


def test_noise_of_training_lets_neurons_near_their_threshold_fire_at_times():
    config = ModelConfig(block="snn", n_hidden=8, theta=0.8, noise=0.4, levels=1)
    neurons = Population(8, config, False, 0.9)
    beta = torch.sigmoid(neurons.beta_logit)
    z = (0.9 * 0.8 / (1 - beta**2).sqrt()).expand(4000, 1, 8)  # membranes at 0.9 theta
    for training, share in ((False, 0.0), (True, 0.25)):  # of 0.7 to 1.1 theta
        report = Report()
        sent, _ = neurons.train(training)(z, None, report)
        assert report.rates[0].mean().item() == pytest.approx(share, abs=0.01)
        assert (sent != 0).float().mean().item() == pytest.approx(share, abs=0.01)


class Plain(Block):
    """A block that has all that the README asks for, and nothing else."""

    def __init__(self, config, index):
        super().__init__()
        self.w = Linear(config.n_hidden, config.n_hidden)

    def forward(self, x, state, seen, report):
        return x + torch.tanh(self.w(x, report)), state


class Firing(Plain):
    def forward(self, x, state, seen, report):
        one = torch.ones(x.shape[-1])
        spikes, _, state = lif(self.w(x, report), 0.5 * one, 0.1 * one, state=state)
        report.fired(spikes)
        return x + spikes, state


@pytest.mark.parametrize("more", [{}, {"head": "spikes", "n_embd": 16}, {"checkpointing": True}])
@pytest.mark.parametrize("cls", [Plain, Firing])
def test_a_new_block_needs_an_entry_and_nothing_else(cls, more, monkeypatch):
    monkeypatch.setitem(blocks.BLOCKS, "mine", cls)
    settings = dict(block="mine", vocab_size=20, n_embd=8, n_hidden=16, n_layer=2, device="cpu")
    c = TrainConfig(**settings | {"dtype": "float32", "threads": 1} | more)
    run, model = Run(c), SpikingLM(c)
    optimizers = make_optimizers(c, model, run.device)
    for group in optimizers[0].param_groups:
        group["lr"] = 0.01
    x = torch.arange(8).expand(2, 8)
    nats = [train_step(model, optimizers, x, x + 1, c, run) for _ in range(9)]
    assert nats[-1][0] < nats[0][0] - 0.1 and nats[0][2].shape == model.rate.shape
    model.observe(nats[-1][0], nats[-1][2])
    if model.head is not None:
        assert model.synop_share([torch.ones(16)]) == 1  # of the head, all that are counted
    assert len(list(islice(model.generate(x[:1]), 3))) == 3


@pytest.mark.parametrize("texts", [1, 3])
def test_rows_are_taken_on_any_device(texts, monkeypatch):
    fired = partial(torch.zeros, (90, 1), dtype=torch.long, device="cuda")  # a real GPU counts
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda s: fired())
    with FakeTensorMode():  # tensors of a GPU that need none
        s, weight = torch.zeros(texts, 100, device="cuda"), torch.zeros(100, 8, device="cuda")
        sums = take_rows(s, weight, 2)
    assert sums.shape == (texts, 8) and sums.device.type == "cuda"
