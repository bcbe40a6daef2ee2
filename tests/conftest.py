"""Before any test module imports Triton: interpret its kernels, unless told to use the GPU.

Also what several test modules check with.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

from watch import tensors as leaves  # of a state


@pytest.fixture(scope="session")
def corpus():
    """Documents of the nursery, about 60 kB."""
    from sources import nursery

    return nursery(60_000, "test")[0]


def check_state(forward, T, near=1e-5):
    """Whole = split = token by token: forward(slice of T tokens, state) -> (B, t, ...), state."""
    whole, last = forward(slice(0, T), None)
    for cuts in ([1] * T, [T // 6, T // 2, T - T // 6 - T // 2]):
        parts, state, at = [], None, 0
        for n in filter(None, cuts):
            y, state = forward(slice(at, at + n), state)
            parts.append(y)
            at += n
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=near, atol=near)
    for a, b in zip(leaves(state), leaves(last), strict=True):
        torch.testing.assert_close(a, b, rtol=near, atol=near)


def check_model(model, vocab=50):
    """Whole = split = token by token, over more than a window of 8; causal, by its gradient."""
    tokens, inputs = torch.randint(vocab, (2, 24)), []
    with torch.no_grad():
        for rate in model(tokens)[2].rates:
            assert 0.01 < rate.mean() < 0.99
        check_state(lambda at, state: model(tokens[:, at], state)[:2], 24, 3e-5)
    hook = model.embedding.register_forward_hook(lambda module, i, out: inputs.append(out))
    logits = model(tokens[:, :9])[0]
    hook.remove()
    grad = torch.autograd.grad(logits[:, 4].square().sum(), inputs)[0].abs().sum((0, 2))  # (T,)
    assert (grad[:5] > 0).all() and (grad[5:] == 0).all()


def fire(u, smooth):
    """1 where u >= 0; its gradient is that of `smooth`, a function of u."""
    return (u >= 0).to(u.dtype) + (smooth - smooth.detach())
