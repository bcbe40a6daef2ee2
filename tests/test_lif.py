"""The scan: by hand, the fast one against the plain loop, whole against split; its surrogates."""

import re
from itertools import product

import pytest
import torch
from conftest import check_state, fire
from torch.utils._python_dispatch import TorchDispatchMode

from lif import (
    RESETS, SURROGATES, Reset, lif_reference, lif_torch, population, softclamp,
)  # fmt: skip

torch.manual_seed(0)


def neurons(B, T, N, heads=None, per_step=False, dtype=torch.float32, seed=0):
    """Random arguments of a scan that fires in 5-95% of the steps."""
    g = torch.Generator().manual_seed(seed)
    shape = (B, T, N) if per_step else (N,)
    current = torch.randn(B, T, N, generator=g, dtype=dtype) * 0.8 + 0.2
    beta = torch.rand(shape, generator=g, dtype=dtype)
    theta = torch.rand(shape, generator=g, dtype=dtype) + 0.5
    d = N // heads if heads else 0
    w = torch.randn(heads, d, d, generator=g, dtype=dtype) / d**0.5 if heads else None
    return current, beta, theta, w


# ---- charge, fire, reset by hand ---------------------------------------------------------------

BY_HAND = [  # current, spikes, membrane before the reset; beta 1/2, theta 1
    ("below", [0.5, 0.5, 0.5], [0, 0, 0], [0.5, 0.75, 0.875]),
    ("equal fires", [1.0, 0.0, 1.0], [1, 0, 1], [1.0, 0.0, 1.0]),
    ("reset subtracts", [1.5, 0.0, 1.0], [1, 0, 1], [1.5, 0.25, 1.125]),
    ("fires twice", [3.0, 0.25, 0.0], [1, 1, 0], [3.0, 1.25, 0.125]),
]


both = pytest.mark.parametrize("scan", [lif_reference, lif_torch])


@both
@pytest.mark.parametrize("name, current, spikes, membrane", BY_HAND)
def test_by_hand(name, current, spikes, membrane, scan):
    x = torch.tensor(current).view(1, 3, 1)
    s, pre, (v, last) = scan(x, torch.tensor([0.5]), torch.tensor([1.0]))
    assert s.flatten().tolist() == spikes
    assert pre.flatten().tolist() == membrane
    assert v.item() == membrane[-1] - spikes[-1] and last.item() == spikes[-1]


@both
def test_without_reset_the_membrane_is_a_linear_filter(scan):
    x = torch.tensor([2.0, 0.0, 0.0]).view(1, 3, 1)
    s, pre, _ = scan(x, torch.tensor([0.5]), torch.tensor([1.0]), reset="none")
    assert pre.flatten().tolist() == [2.0, 1.0, 0.5] and s.flatten().tolist() == [1, 1, 0]
    s, pre, (v, last) = scan(x, torch.tensor([0.5]), None, reset="none")  # and without theta
    assert pre.flatten().tolist() == [2.0, 1.0, 0.5] and s.flatten().tolist() == [0, 0, 0]
    assert v.item() == 0.5 and last.item() == 0


@both
def test_recurrent_spikes_arrive_one_step_later(scan):
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]).view(1, 3, 2)
    w = torch.tensor([[[0.0, 1.0], [0.0, 0.0]]])  # row 0: what neuron 0 sends, to neuron 1
    s, _, _ = scan(x, torch.zeros(2), torch.ones(2), w)
    assert s[0].tolist() == [[1, 0], [0, 1], [0, 0]]


def test_softclamp_has_slope_one_and_its_bound():
    x = torch.tensor([0.0, 1e6], dtype=torch.double, requires_grad=True)
    y = softclamp(x, 30.0)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert y[1].item() == pytest.approx(30) and slope[0].item() == pytest.approx(1)
    current, beta, theta, _ = neurons(2, 20, 3)
    big = lif_torch(current + 50, beta + 1, theta, reset="none", clamp=30.0)
    assert big[2][0].abs().max() <= 30


# ---- gradients --------------------------------------------------------------------------------


def results(scan, leaves, **options):
    """Spikes, membrane, v and s of a scan, and the gradients by its six tensors."""
    leaves = [None if x is None else x.clone().requires_grad_() for x in leaves]
    current, beta, theta, w, v0, s0 = leaves
    spikes, membrane, (v, s) = scan(current, beta, theta, w, (v0, s0), **options)
    assert 0.05 < spikes.mean() < 0.95
    outputs, g = (spikes, membrane, v, s), torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=g, dtype=x.dtype) for x in outputs]
    wanted = [x for x in leaves if x is not None]
    return [*outputs, *torch.autograd.grad(outputs, wanted, cotangents, materialize_grads=True)]


def agree(B, T, N, heads, per_step, **options):
    """lif_torch equals lif_reference, in double, so that the order of sums decides no spike."""
    v, s = torch.rand(2, B, N, dtype=torch.double).unbind(0)
    leaves = *neurons(B, T, N, heads, per_step, torch.double), v, s.round()
    for a, b in zip(*(results(scan, leaves, **options) for scan in (lif_torch, lif_reference))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reset_grad", [True, False])
@pytest.mark.parametrize("clamp", [0.0, 2.0])
@pytest.mark.parametrize("reset", RESETS)
def test_fast_scan_equals_the_plain_loop(reset, clamp, reset_grad):
    options = dict(reset=reset, clamp=clamp, reset_grad=reset_grad, slope=1.5)
    for heads, per_step, surrogate in product([None, 1, 2], [False, True], ["atan", "gaussian"]):
        agree(2, 7, 4, heads, per_step, surrogate=surrogate, **options)


def test_fast_scan_equals_the_plain_loop_over_several_blocks_of_backward():
    for per_step in (False, True):
        agree(3, 500, 100, 4, per_step, surrogate="atan")


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_without_theta_the_gradient_is_that_of_charging(surrogate):
    current, beta, _, _ = neurons(2, 9, 4, dtype=torch.double)
    v = torch.rand(2, 4, dtype=torch.double)
    leaves = [x.clone().requires_grad_() for x in (current, beta, v)]
    for clamp in (0.0, 2.0):
        got, want = (
            scan(*leaves[:2], None, state=(leaves[2], v), reset="none", clamp=clamp, **options)
            for scan, options in ((lif_torch, dict(surrogate=surrogate)), (lif_reference, {}))
        )
        got, want = ((membrane, last) for _, membrane, (last, _) in (got, want))
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b)
        g = [torch.randn_like(x) for x in got]
        for a, b in zip(*(torch.autograd.grad(x, leaves, g) for x in (got, want))):
            torch.testing.assert_close(a, b)


def test_slopes_of_resets():
    """Each by_* is the derivative of `after`, as autograd finds it."""
    g = torch.Generator().manual_seed(0)
    pre, theta, s = torch.rand(3, 2, 3, 4, generator=g, dtype=torch.double)
    x = [y.requires_grad_() for y in (pre, theta, s)]
    for name, rule in RESETS.items():
        after = rule.after(*x) + 0 * sum(x)  # so that it depends on all three
        slopes = [by(*x).expand_as(pre) for by in (rule.by_pre, rule.by_theta, rule.by_s)]
        for got, want in zip(slopes, torch.autograd.grad(after.sum(), x)):
            torch.testing.assert_close(got, want, msg=name)


def test_a_reset_is_one_entry(monkeypatch):
    to_zero = Reset(
        lambda pre, theta, s: pre * (1 - s),
        lambda pre, theta, s: 1 - s,
        lambda pre, theta, s: -pre,
        lambda pre, theta, s: 0 * s,
    )
    monkeypatch.setitem(RESETS, "zero", to_zero)
    test_slopes_of_resets()
    for per_step, clamp, reset_grad in product([False, True], [0.0, 2.0], [False, True]):
        agree(2, 7, 4, 2, per_step, reset="zero", clamp=clamp, reset_grad=reset_grad)


@pytest.mark.parametrize("name", SURROGATES)
def test_surrogate_is_the_derivative_of_its_smooth_step(name):
    surrogate = SURROGATES[name]
    for k in (surrogate.slope, 0.7):
        u = torch.linspace(-3.003, 3, 401, dtype=torch.double)  # misses the kinks
        h = 1e-6
        slope = (surrogate.soft(u + h, k) - surrogate.soft(u - h, k)) / (2 * h)
        torch.testing.assert_close(surrogate.grad(u, k), slope, rtol=1e-4, atol=1e-6)
    if name != "ste":  # a bump around the threshold
        at = surrogate.grad(torch.tensor([0.0, 0.2, 5.0]), surrogate.slope)
        assert at[0] >= at[1] > at[2] and at[0] > 0


# ---- state ------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [None, 1, 4])
@pytest.mark.parametrize("per_step", [False, True])
def test_whole_equals_split_equals_one_at_a_time(heads, per_step):
    current, beta, theta, w = neurons(3, 23, 32, heads, per_step)

    def forward(at, state):
        now = (x[:, at] if x.dim() == 3 else x for x in (beta, theta))
        spikes, membrane, state = lif_torch(current[:, at], *now, w, state)
        return torch.stack([spikes, membrane], -1), state

    assert 0.05 < forward(slice(0, 23), None)[0][..., 0].mean() < 0.95
    check_state(forward, 23)


def test_causal():
    current, beta, theta, w = neurons(2, 12, 8, 1)
    current.requires_grad_()
    spikes, membrane, _ = lif_torch(current, beta, theta, w)
    (d,) = torch.autograd.grad((spikes + membrane)[:, 5].sum(), current)
    assert d[:, :6].abs().sum() > 0 and d[:, 6:].abs().sum() == 0


@pytest.mark.parametrize("H", [1, 2])
def test_a_half_matrix_is_multiplied_in_half(H):
    """Products of few bits, hence exact in both; where they are not, only W's gradient rounds."""
    torch.manual_seed(0)
    B, T, N = 3, 12, 8
    current, beta, theta = torch.randn(B, T, N) + 0.5, torch.full((N,), 0.7), torch.ones(N)
    w = torch.randint(-4, 5, (H, N // H, N // H)) / 8
    seen, results = [], []
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [x.clone().requires_grad_() for x in (current, w.to(dtype))]
        x, w_rec = leaves
        with Products() as products:
            s, membrane, _ = lif_torch(x, beta, theta, w_rec, surrogate="ste", reset_grad=False)
            s.sum().backward()
        seen.append(products.dtypes)
        assert w_rec.grad.dtype == dtype and membrane.dtype == torch.float32
        results.append([s, membrane, x.grad, w_rec.grad.float()])
    assert seen == [{torch.float32}, {torch.bfloat16}]
    for name, a, b in zip(("s", "membrane", "d_current", "d_w"), *results):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2, msg=name)
    assert results[0][0].any() and torch.equal(results[0][0], results[1][0])


class Products(TorchDispatchMode):
    """Notes the dtypes in which matrices are multiplied."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if re.search(r"\.(add|badd)?b?mm_?\.", str(func)):
            self.dtypes.add(args[-1].dtype)
        return func(*args, **kwargs or {})


@both
def test_half_input_keeps_a_float_membrane(scan):
    current, beta, theta, w = neurons(2, 50, 16, 2)
    half = current.bfloat16()
    s, membrane, (v, _) = scan(half, beta, theta, w)
    full, _, _ = scan(half.float(), beta, theta, w)
    assert s.dtype == torch.bfloat16 and membrane.dtype == v.dtype == torch.float32
    assert torch.equal(s.float(), full)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(surrogate="step"), "unknown surrogate 'step'"),
        (dict(reset="hard"), "unknown reset 'hard'"),
        (dict(clamp=-1.0), "clamp must be"),
        (dict(beta=torch.ones(3)), "beta must be"),
        (dict(theta=torch.ones(2, 5)), "theta must be"),
        (dict(w_rec=torch.ones(4, 4)), "w_rec must be"),
        (dict(w_rec=torch.ones(3, 1, 1)), "w_rec must be"),
        (dict(state=(torch.ones(2, 3), torch.ones(2, 4))), "state must be"),
        (dict(current=torch.ones(2, 0, 4)), "current must be"),
        (dict(theta=None), "without theta"),
        (dict(theta=None, reset="none", w_rec=torch.ones(1, 4, 4)), "without theta"),
    ],
)
def test_arguments_that_do_not_fit(change, message):
    good = dict(current=torch.ones(2, 5, 4), beta=torch.ones(4), theta=torch.ones(4))
    with pytest.raises(ValueError, match=message):
        lif_torch(**(good | change))


def test_python_lif_draws_neurons(capsys):
    import lif

    lif.main()
    out = capsys.readouterr().out
    assert out.count("beta") == 8 and out.count("|") > 20


# ---- populations -------------------------------------------------------------------------------


@torch.no_grad()
def test_population_by_hand():
    theta = torch.tensor([1.0, 2.0, 3.0])
    v = torch.tensor([0.99, 1.0, 1.99, 2.0, 9.0, -0.99, -1.0, -2.5, -3.0])
    levels = torch.tensor([[1.5, 2.5, 3.5], [-1.0, -2.0, -4.0]]).unsqueeze(-1)
    for shape in ((1, 9, 1), (9, 1, 1)):  # a sequence; single tokens, which go another way
        sent, rate = population(v.view(shape), theta, levels, dtype=torch.bfloat16)
        assert sent.dtype == torch.bfloat16 and rate.dtype == torch.float32
        assert sent.flatten().tolist() == [0, 1.5, 1.5, 2.5, 3.5, 0, -1.0, -2.0, -4.0]
        assert rate.item() == pytest.approx(7 / 9)  # at most one spike per population and step
        sent, rate = population(v.view(shape), theta, levels[:1])  # nobody watches -v
        assert sent.flatten().tolist() == [0, 1.5, 1.5, 2.5, 3.5, 0, 0, 0, 0]
        assert rate.item() == pytest.approx(4 / 9)


@pytest.mark.parametrize("sides, slope, T", [(1, 1.0, 7), (2, 0.5, 7), (2, 2.0, 20000)])
def test_population_gradient_is_that_of_its_thresholds(sides, slope, T):
    """Against the definition: single thresholds, each with its surrogate, and their inhibition."""
    torch.manual_seed(0)
    soft = SURROGATES["triangle"].soft
    theta = torch.tensor([0.8, 1.6, 2.4], dtype=torch.float64)
    v = 1.5 * torch.randn(3, T, 5, dtype=torch.float64)
    v[0, 0, :3] = theta  # reached
    v.requires_grad_()
    levels = torch.randn(sides, 3, 5, dtype=torch.float64, requires_grad=True)

    expected, rate = 0, 0
    for side, level in zip((v, -v), levels):
        s = [fire(side - t, soft(side - t, slope)) for t in theta] + [0]
        expected = expected + sum(level[k] * (s[k] - s[k + 1]) for k in range(3))
        rate = rate + s[0].mean((0, 1))
    actual = population(v, theta, levels, "triangle", None if slope == 1 else slope)
    for x, y in zip(actual, (expected, rate)):
        torch.testing.assert_close(x, y)
    cotangents = [torch.randn_like(x) for x in actual]
    for x, y in zip(
        torch.autograd.grad(actual, (v, levels), cotangents),
        torch.autograd.grad((expected, rate), (v, levels), cotangents),
    ):
        torch.testing.assert_close(x, y)


def test_population_takes_any_layout():
    v = torch.randn(5, 3, 4, dtype=torch.float64).permute(2, 1, 0).requires_grad_()
    levels, theta = torch.randn(2, 2, 5, dtype=torch.float64), torch.tensor([0.5, 1.0]).double()
    (sent, _), (same, _) = (population(x, theta, levels) for x in (v, v.contiguous()))
    assert torch.equal(sent, same) and not v.is_contiguous()
    g = torch.randn_like(sent)
    got, want = (torch.autograd.grad(x, v, g)[0] for x in (sent, same))
    assert torch.equal(got, want) and got.abs().sum() > 0


# ---- synapses ----------------------------------------------------------------------------------
