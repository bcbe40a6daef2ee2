"""The peers that bench.py measures beside ours: their neurons, and Real Sam run by snnTorch.

Every library is optional: who builds a contestant without it gets an ImportError. How the peers'
equations and ours correspond is in tests/test_peers.py.
"""

from functools import partial
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

from lif import lif_torch
from model import SpikingLM

BETA, THETA, SLOPE = 0.875, 1.0, 2.0  # decay and threshold; slope of the atan surrogate
SNNTORCH_SLOPE = 25.0  # its own default


class Contestant(NamedTuple):
    build: Callable  # (N, device) -> forward(x) -> spikes, and the leaf that is the decay
    time_major: bool = True
    scale: float = 1.0  # what its neuron multiplies the current with; it is fed current / scale
    delayed_reset: bool = False  # the reset comes one step after the spike

    def lay_out(self, x):
        """(B, T, N) to its own layout, or back."""
        return (x.transpose(0, 1) if self.time_major else x).contiguous()


def check_spikes(name, contestant, forward, current, steps=64):
    """Compare the spikes of the first steps with lif_torch's; current (B, T, N).

    Not all are equal: who adds in another order rounds otherwise, and now and then a membrane lies
    that close to its threshold. tests/test_peers.py asks for equality, away from the threshold.
    """
    current = current[:, :steps]
    beta, theta = (current.new_full(current.shape[2:], value) for value in (BETA, THETA))
    own = {}
    if contestant.delayed_reset:  # is a synapse of -theta from each neuron to itself
        own = {"w_rec": -theta.view(-1, 1, 1), "reset": "none"}
    with torch.no_grad():
        expected = lif_torch(current, beta, theta, **own)[0]
        spikes = contestant.lay_out(forward(contestant.lay_out(current / contestant.scale)))
    wrong, rate = (spikes != expected).double().mean().item(), expected.mean().item()
    assert wrong < 1e-3, f"{name}: {wrong:.2%} of the spikes are not ours"
    assert 0.05 < rate < 0.95, f"{name}: a firing rate of {rate:.1%} is no test"
    return {"wrong_spikes": wrong, "firing_rate": rate}


# ---- one layer of neurons ---------------------------------------------------------------------
#
# All of them learn the decay: one value per neuron, in SpikingJelly one per layer, which is all it
# has. Surrogate: atan; Norse has none and runs with its SuperSpike.


def snntorch_layer(unbind, N, device):
    import snntorch
    from snntorch import surrogate

    beta = torch.full((N,), BETA, device=device)
    node = snntorch.Leaky(beta, learn_beta=True, spike_grad=surrogate.atan(SLOPE)).to(device)

    def forward(x):
        mem, spikes = torch.zeros_like(x[0]), []
        steps = x.unbind(0) if unbind else (x[t] for t in range(len(x)))
        for I_t in steps:
            s, mem = node(I_t, mem)
            spikes.append(s)
        return torch.stack(spikes)

    return forward, node.beta


def spikingjelly_layer(N, device):
    from spikingjelly.activation_based import neuron, surrogate

    node = neuron.ParametricLIFNode(
        init_tau=1 / (1 - BETA), decay_input=False, v_threshold=THETA, v_reset=None,
        surrogate_function=surrogate.ATan(SLOPE), step_mode="m",
    ).to(device)  # fmt: skip

    def forward(x):
        node.reset()
        return node(x)

    return forward, node.w


def norse_layer(N, device):
    import norse.torch as norse
    from norse.torch.functional.reset import reset_subtract

    tau_mem_inv = torch.full((N,), 1 - BETA, device=device, requires_grad=True)
    zero, theta = (torch.tensor(value, device=device) for value in (0.0, THETA))
    cell = norse.LIFBoxCell(
        norse.LIFBoxParameters(tau_mem_inv, zero, theta, zero, "super", 1.0, reset_subtract), dt=1.0
    )

    def forward(x):
        state, spikes = norse.LIFBoxFeedForwardState(v=torch.zeros_like(x[0])), []
        for I_t in x.unbind(0):
            s, state = cell(I_t, state)
            spikes.append(s)
        return torch.stack(spikes)

    return forward, tau_mem_inv


PEERS = {
    "snnTorch, x[t]": Contestant(partial(snntorch_layer, False), delayed_reset=True),
    "snnTorch, unbind": Contestant(partial(snntorch_layer, True), delayed_reset=True),
    "SpikingJelly, multi-step": Contestant(spikingjelly_layer),
    "Norse, unbind": Contestant(norse_layer, scale=1 - BETA),
}


# ---- a whole model ----------------------------------------------------------------------------


class SnnTorchSam(SpikingLM):
    """The Real Sam model as its author runs it: one token at a time through snnTorch's Leaky.

    Same parameters and equations except for snnTorch's reset, which comes a step late. Every
    matrix is applied at every step, as in a loop over time written by hand.
    """

    def __init__(self, c):
        import snntorch
        from snntorch import surrogate

        super().__init__(c)
        for block in self.blocks:
            beta = torch.sigmoid(block.beta_logit.detach())
            del block.beta_logit
            grad = surrogate.fast_sigmoid(SNNTORCH_SLOPE)  # it has no triangle of the right form
            block.leaky = snntorch.Leaky(beta, spike_grad=grad, learn_beta=True)

    def forward(self, tokens, state=None):
        c, logits, spikes = self.config, [], []
        state = [(tokens.new_zeros(len(tokens), c.n_hidden, dtype=torch.float),) * 2] * c.n_layer
        embedded, report = self.embed(tokens)
        for x in embedded.unbind(1):
            for i, block in enumerate(self.blocks):
                mem, s = state[i]
                h = block.norm(x)
                gain = 1 + c.stress_gain * self.stress * block.temper
                feed = F.linear(h, block.fc_in.weight, block.fc_in.bias)
                current = feed * gain + block.b_rec + s @ block.w_rec
                s, mem = block.leaky(current, mem)
                state[i] = mem, s
                spikes.append(s)
                gate = F.linear(h, block.gate.weight, block.gate.bias)
                x = x + torch.sigmoid(gate) * s
            logits.append(self.readout(x, None, report)[0])
        report.rates = [torch.stack(spikes[i :: c.n_layer]).mean((0, 1)) for i in range(c.n_layer)]
        return torch.stack(logits, 1), state, report
