"""lif_torch beside the peers: the same spikes, membranes and gradients as their LIF neurons.

What each peer calls a leaky integrate-and-fire neuron, in the words of lif.py (v', s' and pre' are
those of the step before):

    snnTorch 1.0.0     pre = clamp(beta, 0, 1) * v' + I,  s = 1 if pre > theta
      Leaky, default   the reset comes a step later and undecayed, and no gradient goes through it:
                       pre = beta * pre' + I - theta * s'
      reset_delay      =False: v = pre - theta * s, gradient through s. Ours, while pre < 2 theta: a
                       membrane still above theta after its reset is lowered again by the next step
                       before that fires, so that snnTorch can miss the next spike.
      reset_mechanism  ='none': v = pre. Ours with reset='none'.
    SpikingJelly 2.0.0 pre = v' - v' / tau + I,  s = 1 if pre >= theta,  v = pre - theta * s
      LIFNode          with v_reset=None: ours with beta = 1 - 1 / tau. detach_reset=True is our
                       reset_grad=False; decay_input=True feeds I / tau in the place of I.
      ParametricLIF    learns one w for the whole layer, 1 / tau = sigmoid(w).
    Norse 1.1.0        pre = v' + dt / tau * (I - v'),  s = 1 if pre > theta,  v = pre - theta * s
      LIFBoxCell       with reset_subtract, gradient through s: ours with beta = 1 - dt / tau and
                       the current (1 - beta) * I. Norse's LIFCell, with its synaptic current, knows
                       only the hard reset (v = 0), which no setting of ours expresses.

A peer that adds the same terms in another order rounds otherwise in the last bit. So that no spike
hangs on that bit, every case asserts that no membrane lies within MARGIN of its threshold: that is
also why `>` and `>=` agree here, and why float32 is enough to ask for exactly equal spikes.
SpikingJelly runs in float64 too and agrees to 1e-10 (it then takes its plain autograd path; in
float32 it takes its registered operator with a backward by hand). snnTorch's spikes and a constant
of Norse are float32 whatever the input, so these two are compared in float32 only.

Run from the repository root: python -m pytest tests/test_peers.py
"""

import pytest
import torch

from lif import lif_torch

B, T, N = 3, 40, 17
MARGIN = {torch.float32: 2e-6, torch.float64: 1e-12}  # in units of the membrane
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
DTYPES = [pytest.param(dtype, id=str(dtype)[6:]) for dtype in MARGIN]


def name(value):
    """Test ids: the surrogate and its slope; the peer's constructor of it has no name to show."""
    return "its" if callable(value) else None


def peer(module, install):
    """The peer's module, or a skip that says how to get it."""
    reason = f"{module.split('.')[0]} is not installed: pip install {install}"
    return pytest.importorskip(module, reason=reason, exc_type=ImportError)


def snntorch():
    return peer("snntorch", "snntorch==1.0.0")


def spikingjelly():
    """Its modules neuron and surrogate."""
    install = "--no-deps spikingjelly==2.0.0 loguru==0.7.3"  # its own list pulls torchvision
    package = "spikingjelly.activation_based"
    return peer(f"{package}.neuron", install), peer(f"{package}.surrogate", install)


def norse():
    return peer("norse.torch", "--no-deps norse==1.1.0 nir==1.0.8 nirtorch==2.6 h5py==3.16.0")


def draw(dtype, high, N=N, seed=0):
    """current (B,T,N) uniform in -0.6..high, beta (N,) 0.3..0.97, theta (N,) 0.9..1.1: leaves."""
    torch.manual_seed(seed)
    current = torch.empty(B, T, N, dtype=dtype).uniform_(-0.6, high)
    beta = torch.linspace(0.3, 0.97, N, dtype=dtype)
    theta = torch.empty(N, dtype=dtype).uniform_(0.9, 1.1)
    return [x.requires_grad_() for x in (current, beta, theta)]


def unroll(step, current):
    """step(I_t (B,N)) -> (s, v) over all t; returns spikes and membranes, each (B,T,N)."""
    spikes, membranes = zip(*(step(I_t) for I_t in current.unbind(1)))
    return torch.stack(spikes, 1), torch.stack(membranes, 1)


def ours(current, beta, theta, surrogate, slope, reset_grad=True):
    """Spikes and the membrane after the soft reset, each (B,T,N)."""
    spikes, pre, _ = lif_torch(
        current, beta, theta, surrogate=surrogate, slope=slope, reset_grad=reset_grad
    )
    off_threshold(pre, theta)
    return spikes, pre - theta * (spikes if reset_grad else spikes.detach())


def off_threshold(pre, theta):
    distance = (pre - theta).abs().min().item()
    assert distance > MARGIN[pre.dtype], f"a membrane is {distance:.1e} from theta: change the seed"


def close(name, mine, its):
    """Equal to TOLERANCE of the largest entry: entries near zero are sums of larger terms."""
    tolerance = TOLERANCE[mine.dtype]
    scale = its.abs().max().item()
    assert scale > 0.1, f"{name} is nearly zero and says nothing"
    torch.testing.assert_close(
        mine, its, rtol=tolerance, atol=tolerance * scale, msg=lambda m: f"{name}: {m}"
    )


def agree(mine, its, leaves):
    """(spikes, membrane), each (B,T,N), of both; gradients of both for one random cotangent."""
    rate = mine[0].mean().item()
    assert 0.05 < rate < 0.95, f"firing rate {rate:.3f} says nothing"
    assert torch.equal(mine[0], its[0]), "spikes differ"
    close("membrane", mine[1], its[1])
    cotangents = [torch.randn_like(x) for x in mine]
    gradients = [
        torch.autograd.grad(pair, list(leaves.values()), cotangents, retain_graph=True)
        for pair in (mine, its)
    ]
    for name, *pair in zip(leaves, *gradients):
        close(f"gradient of {name}", *pair)


# ---- snnTorch ---------------------------------------------------------------------------------

SNNTORCH = [  # ours, its slope, snnTorch's
    ("fast_sigmoid", 25.0, lambda s: s.fast_sigmoid(25)),
    ("fast_sigmoid", 3.0, lambda s: s.fast_sigmoid(3)),
    ("atan", 2.0, lambda s: s.atan(2.0)),
    ("atan", 5.0, lambda s: s.atan(5.0)),
    ("sigmoid", 4.0, lambda s: s.sigmoid(4)),
    ("ste", 1.0, lambda s: s.straight_through_estimator()),
]


def snntorch_leaky(current, beta, theta, spike_grad, **settings):
    """snnTorch's Leaky over T steps; beta and theta become its parameters, still our leaves."""
    snn = snntorch()
    node = snn.Leaky(beta, threshold=theta, spike_grad=spike_grad(snn.surrogate), **settings)
    mem = torch.zeros_like(current[:, 0])

    def step(I_t):
        nonlocal mem
        spikes, mem = node(I_t, mem)
        return spikes, mem

    return unroll(step, current)


@pytest.mark.parametrize("N", [17, 1200])  # 1200: backward takes several blocks of steps
@pytest.mark.parametrize("surrogate, slope, spike_grad", SNNTORCH, ids=name)
def test_snntorch_immediate_reset(surrogate, slope, spike_grad, N):
    current, beta, theta = leaves = draw(torch.float32, high=0.85, N=N)
    its = snntorch_leaky(*leaves, spike_grad, reset_delay=False)
    assert (its[1] < theta).all(), "outside the range where snnTorch resets once"
    mine = ours(*leaves, surrogate, slope)
    agree(mine, its, {"current": current, "beta": beta, "theta": theta})


@pytest.mark.parametrize("surrogate, slope, spike_grad", SNNTORCH, ids=name)
def test_snntorch_no_reset(surrogate, slope, spike_grad):
    current, beta, theta = leaves = draw(torch.float32, high=0.85)
    its = snntorch_leaky(*leaves, spike_grad, reset_mechanism="none")
    mine = lif_torch(*leaves, surrogate=surrogate, slope=slope, reset="none")[:2]
    off_threshold(mine[1], theta)
    agree(mine, its, {"current": current, "beta": beta, "theta": theta})


@pytest.mark.parametrize("surrogate, slope, spike_grad", SNNTORCH, ids=name)
def test_snntorch_default_delayed_reset(surrogate, slope, spike_grad):
    """The delayed reset is a synapse of weight -theta from each neuron to itself.

    That gives spikes and membranes. snnTorch lets no gradient through it, so for the gradients the
    spikes of the step before come in as part of the current, as constants.
    """
    current, beta, theta = leaves = draw(torch.float32, high=1.2)
    its = snntorch_leaky(*leaves, spike_grad)
    settings = {"surrogate": surrogate, "slope": slope, "reset": "none"}
    inhibition = -theta.detach().view(N, 1, 1)  # N heads of one neuron
    spikes, pre, _ = lif_torch(*leaves, inhibition, **settings)
    off_threshold(pre, theta)
    close("membrane", pre, its[1])
    before = torch.cat([torch.zeros_like(spikes[:, :1]), spikes[:, :-1]], 1).detach()
    mine = lif_torch(current - theta * before, beta, theta, **settings)[:2]
    assert torch.equal(mine[0], spikes)
    agree(mine, its, {"current": current, "beta": beta, "theta": theta})


# ---- SpikingJelly -----------------------------------------------------------------------------

SPIKINGJELLY = [
    ("atan", 2.0, lambda s: s.ATan(2.0)),
    ("atan", 4.0, lambda s: s.ATan(4.0)),
    ("sigmoid", 4.0, lambda s: s.Sigmoid(4.0)),
    ("fast_sigmoid", 2.0, lambda s: s.SoftSign(2.0)),
    ("gaussian", 2.0, lambda s: s.Erf(2.0)),
    ("triangle", 1.0, lambda s: s.PiecewiseQuadratic(1.0)),
]


def spikingjelly_node(node, current):
    """A LIF node over T steps in its step mode, which must be 'm' or 's'."""
    if node.step_mode == "m":
        spikes = node(current.transpose(0, 1))
        return spikes.transpose(0, 1), node.v_seq.transpose(0, 1)
    return unroll(lambda I_t: (node(I_t), node.v), current)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("decay_input", [False, True])
@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("learned", [False, True], ids=["LIFNode", "ParametricLIFNode"])
@pytest.mark.parametrize("surrogate, slope, surrogate_function", SPIKINGJELLY, ids=name)
def test_spikingjelly(
    surrogate, slope, surrogate_function, learned, step_mode, decay_input, detach_reset, dtype
):
    """SpikingJelly's theta is a number, its tau a number (LIFNode) or one parameter w."""
    neuron, its_surrogates = spikingjelly()
    tau, theta = 5.0, torch.ones(N, dtype=dtype)
    current = draw(dtype, high=1.4)[0]  # membranes above 2 theta among them
    kind = neuron.ParametricLIFNode if learned else neuron.LIFNode
    node = kind(
        tau, decay_input, 1.0, None, surrogate_function(its_surrogates), detach_reset, step_mode,
        store_v_seq=step_mode == "m",
    ).to(dtype)  # fmt: skip
    leaves = {"current": current}
    beta = torch.tensor(1 - 1 / tau, dtype=dtype)
    if learned:
        leaves["w"] = node.w
        beta = 1 - node.w.sigmoid()
    fed = current * 3 if decay_input else current  # else tau leaves too little of it to fire
    its = spikingjelly_node(node, fed)
    mine = ours(
        (1 - beta) * fed if decay_input else fed,
        beta.expand(N), theta, surrogate, slope, not detach_reset,
    )  # fmt: skip
    agree(mine, its, leaves)


# ---- Norse ------------------------------------------------------------------------------------

NORSE = [  # norse 1.1.0 ignores the alpha of 'super': its slope is always 1
    ("fast_sigmoid", 1.0, "super", 1.0),
    ("triangle", 1.0, "triangle", 1.0),
    ("gaussian", 2.0, "heavi_erfc", 2.0),
    ("sigmoid", 4.0, "tanh", 2.0),
]


@pytest.mark.parametrize("surrogate, slope, method, alpha", NORSE, ids=name)
def test_norse_box(surrogate, slope, method, alpha):
    nt = norse()
    from norse.torch.functional.reset import reset_subtract

    current, beta, theta = leaves = draw(torch.float32, high=1.4)
    fed = current * 3  # Norse scales it by 1 - beta
    parameters = nt.LIFBoxParameters(
        tau_mem_inv=1 - beta, v_leak=torch.zeros(()), v_th=theta, method=method,
        alpha=alpha, reset_method=reset_subtract,
    )  # fmt: skip
    cell = nt.LIFBoxCell(parameters, dt=1.0)
    state = nt.LIFBoxFeedForwardState(v=torch.zeros_like(current[:, 0]))

    def step(I_t):
        nonlocal state
        spikes, state = cell(I_t, state)
        return spikes, state.v

    its = unroll(step, fed)
    mine = ours((1 - beta) * fed, beta, theta, surrogate, slope)
    agree(mine, its, {"current": current, "beta": beta, "theta": theta})
