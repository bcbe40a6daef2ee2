"""The kernels against lif_torch: the same spikes, the same gradients; and the choice of a backend.

Where there is no GPU this runs in Triton's interpreter (conftest.py switches it on), so what is
tested is the arithmetic; that the kernels compile for real GPUs, without spilling and with 64-bit
offsets, is tested too, in a second process. TRITON_INTERPRET=0 tests on the GPU itself.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from itertools import product
from types import SimpleNamespace

os.environ.setdefault("TRITON_INTERPRET", "1")  # for this file run alone; read on import

import pytest
import torch
from torch import library

import kernels
import spark
from lif import RESETS, SURROGATES, lif_torch
from spark import Frames, plif_triton

DEVICE = "cpu" if kernels.INTERPRETED or not kernels.HAS_TRITON else "cuda"
needs_triton = pytest.mark.skipif(not kernels.HAS_TRITON, reason="Triton is not installed")
NAMES = "spikes membrane v s d_current d_beta d_theta d_w d_v0 d_s0".split()


# ---- the same as lif_torch --------------------------------------------------------------------


def neurons(T, heads=None, per_step=False, state=True, seed=0, dtype=torch.float32):
    """Random arguments that fire now and then, and cotangents for all results.

    heads (H, d), or None for 45 neurons without recurrent synapses, which fill no block. The 18
    sequences with recurrent synapses fill no block either.
    """
    torch.manual_seed(seed)
    B, N = (18, heads[0] * heads[1]) if heads else (2, 45)
    shape = (B, T, N) if per_step else (N,)
    arguments = [
        (torch.randn(B, T, N) * 0.7 + 0.2).to(dtype),
        torch.rand(shape) * 0.5 + 0.5,
        torch.rand(shape) * 0.5 + 0.7,
        torch.randn(heads[0], heads[1], heads[1]) * 0.5 / heads[1] ** 0.5 if heads else None,
        torch.randn(B, N) if state else None,
        (torch.rand(B, N) < 0.5).float() if state else None,
    ]
    cotangents = [torch.randn(B, T, N).to(dtype), torch.randn(B, T, N)]
    return arguments, cotangents + [torch.randn(B, N), torch.randn(B, N)]


def run(scan, arguments, cotangents, device="cpu", fixed=(), **options):
    """Results and gradients as a dict of NAMES; a cotangent may be None, `fixed` is not learnt."""
    leaves = [
        None if x is None else x.detach().to(device).requires_grad_(name not in fixed)
        for name, x in zip("current beta theta w v0 s0".split(), arguments)
    ]
    current, beta, theta, w, v0, s0 = leaves
    state = None if v0 is None else (v0, s0)
    spikes, membrane, (v, s) = scan(current, beta, theta, w, state, **options)
    results = spikes, membrane, v, s
    used = [(x, c.to(device)) for x, c in zip(results, cotangents) if c is not None]
    torch.autograd.backward([x for x, _ in used], [c for _, c in used])
    gradients = [None if x is None else x.grad for x in leaves]
    return dict(zip(NAMES, [*results, *gradients]))


def compare(arguments, cotangents, loose=(), **options):
    """Assert that both scans agree; names in `loose` to bfloat16 precision only."""
    want = run(lif_torch, arguments, cotangents, **options)
    got = run(kernels.lif_triton, arguments, cotangents, DEVICE, **options)
    rate = want["spikes"].float().mean()
    assert 0.05 < rate < 0.95, f"spike rate {rate:.3f}: this compares nothing"
    for name in NAMES:
        a, b = want[name], got[name]
        if a is None or b is None:
            assert a is b, name
            continue
        assert a.dtype == b.dtype and a.shape == b.shape, name
        a, b = a.detach().float(), b.detach().float().cpu()
        if name in ("spikes", "s"):
            assert torch.equal(a, b), name
        else:  # sums grow with their length, and rounding errors with the sums
            off = (a - b).abs().max() / a.abs().max().clamp(min=1)
            bound = 1e-5 if DEVICE == "cpu" else 3e-5  # tensor cores add in another order
            assert off < (1e-2 if name in loose else bound), f"{name} is off by {off:.1e}"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "NEURONS", 32)  # 45 neurons: a full block and part of one
    monkeypatch.setattr(kernels, "STEPS", 4)  # and full blocks of steps, and a rest, in short runs


@pytest.fixture
def fresh(monkeypatch):
    """No backend taken so far."""
    monkeypatch.setattr(kernels, "_taken", {})
    return monkeypatch


HEADS = (None, (2, 16), (2, 20), (1, 32))


@needs_triton
@pytest.mark.parametrize(
    "T, heads, per_step",
    [*product((1, 7), HEADS, (False, True)), (63, None, True), (63, (2, 16), False)],
)
def test_spikes_and_gradients(T, heads, per_step):
    compare(*neurons(T, heads, per_step, state=per_step, seed=T))


@needs_triton
def test_exactly_at_the_threshold():
    """pre == theta fires, forward and in what backward recomputes; all numbers here are exact."""
    arguments, cotangents = neurons(12, seed=10)
    arguments[0] = torch.randint(-1, 3, arguments[0].shape) * 0.5
    arguments[1], arguments[2] = torch.ones(45), torch.ones(45)  # no leak
    arguments[4] = arguments[4].round()
    membrane = lif_torch(*arguments[:4], tuple(arguments[4:]))[1]
    assert (membrane == 1).float().mean() > 0.05
    compare(arguments, cotangents)


@needs_triton
@pytest.mark.parametrize("heads", HEADS[::2], ids=str)
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("reset_grad", (True, False))
@pytest.mark.parametrize("clamp", (0.0, 1.3))
def test_options(heads, reset, reset_grad, clamp):
    per_step = reset_grad is False  # both layouts, without twice the cases
    options = dict(reset=reset, reset_grad=reset_grad, clamp=clamp)
    compare(*neurons(7, heads, per_step, seed=3), **options)


@needs_triton
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_without_theta(surrogate):
    """No neuron fires, and the gradient is that of charging."""
    (current, beta, _, _, v, _), (_, g, g_v, _) = neurons(7, state=True, seed=6)
    found = []
    for scan, device in ((lif_torch, "cpu"), (kernels.lif_triton, DEVICE)):
        leaves = [x.detach().to(device).requires_grad_() for x in (current, beta, v)]
        s, membrane, (last, _) = scan(
            *leaves[:2], None, state=(leaves[2], 0 * leaves[2]), reset="none", surrogate=surrogate
        )
        torch.autograd.backward((membrane, last), [x.to(device) for x in (g, g_v)])
        found.append([x.detach().cpu() for x in (s, membrane, last, *(x.grad for x in leaves))])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert (found[1][0] == 0).all()
    grads = []
    for scan, device in ((lif_torch, "cpu"), (kernels.lif_triton, DEVICE)):  # nobody asks for it
        leaves = [x.detach().to(device).requires_grad_() for x in (current, beta, v)]
        how = {"reset": "none", "surrogate": surrogate, "return_membrane": False}
        _, membrane, (last, _) = scan(*leaves[:2], None, state=(leaves[2], 0 * leaves[2]), **how)
        assert membrane is None
        last.backward(g_v.to(device))
        grads.append([x.grad.cpu() for x in leaves])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@needs_triton
@pytest.mark.parametrize("slope", (None, 3.0))
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_surrogates(surrogate, slope):
    compare(*neurons(4, seed=4), surrogate=surrogate, slope=slope)


@needs_triton
@pytest.mark.parametrize("heads", HEADS[::2], ids=str)
def test_bfloat16(heads):
    """bfloat16 in, the membrane still float32: its rounding must reach no spike."""
    arguments, cotangents = neurons(9, heads, per_step=True, seed=5, dtype=torch.bfloat16)
    arguments[1] = arguments[1].bfloat16()
    compare(arguments, cotangents, loose=("d_current", "d_beta", "d_w"))


@needs_triton
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("options", ({}, dict(clamp=1.3), dict(reset="none", surrogate="atan")))
@pytest.mark.parametrize("heads", HEADS[::2], ids=str)
def test_without_the_membrane(heads, options, dtype):
    """Backward then has u, in the precision of the current: no spike may change by its rounding."""
    arguments, cotangents = neurons(
        7 if heads else 15, heads, per_step=bool(heads), seed=12, dtype=dtype
    )
    cotangents[1] = None
    loose = () if dtype == torch.float32 else [name for name in NAMES if name.startswith("d_")]
    compare(arguments, cotangents, loose, return_membrane=False, **options)


@needs_triton
def test_what_is_kept_for_backward():
    """One tensor (B, T, N): the membrane if it is returned, else u with 2 bytes per element."""
    arguments, cotangents = neurons(7, seed=13, dtype=torch.bfloat16)
    for return_membrane, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            options = dict(return_membrane=return_membrane)
            run(kernels.lif_triton, arguments, cotangents[:1], DEVICE, **options)
        assert [x.dtype for x in kept if x.dim() == 3] == [dtype]


@needs_triton
def test_the_sign_of_u_is_the_spike():
    """Distances to the threshold that bfloat16 cannot hold: what is below stays below.

    Triton's interpreter rounds them otherwise than a GPU, so none may come near 0 from below.
    """
    distance = [-1e-44, -1e-41, -1e-39, -1e-3, -0.0, 0.0, 1e-44, 1e-41, 1e-39, 1e-3]
    current, beta, theta = torch.zeros(2, 5, 10), torch.zeros(10), -torch.tensor(distance)
    inputs = [x.to(DEVICE) for x in (current.bfloat16(), beta, theta)]
    v0, s0 = torch.zeros(2, 2, 10, device=DEVICE)
    options = "triangle", 0.25, "soft", True, 0.0
    spikes, u, _, _ = kernels._forward(*inputs, None, v0, s0, False, *options)
    want = (torch.tensor(distance) >= 0).expand(2, 5, 10)
    assert u.dtype == torch.bfloat16
    assert torch.equal(spikes.cpu() == 1, want) and torch.equal(u.cpu() >= 0, want)
    assert (u.cpu()[~want] <= -torch.finfo(torch.bfloat16).tiny).all()


@needs_triton
@pytest.mark.parametrize("heads", HEADS[::2], ids=str)
@pytest.mark.parametrize("used", range(4), ids=NAMES[:4])
def test_a_loss_of_one_result(used, heads):
    arguments, cotangents = neurons(7, heads, seed=6)
    cotangents = [c if i == used else None for i, c in enumerate(cotangents)]
    compare(arguments, cotangents)


@needs_triton
@pytest.mark.parametrize("fixed", ("current", "beta", "theta", "w", "v0 s0"))
def test_gradients_nobody_asks_for(fixed):
    compare(*neurons(7, (2, 16), per_step=fixed == "beta", seed=7), fixed=fixed.split())


@needs_triton
def test_strided_tensors():
    """Transposed inputs and the expanded cotangents of a plain sum."""
    arguments, cotangents = neurons(7, HEADS[2], per_step=True, seed=8)
    cotangents = [torch.ones(()).expand(x.shape) for x in cotangents]
    want = run(kernels.lif_triton, arguments, [x.contiguous() for x in cotangents], DEVICE)
    arguments = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in arguments]
    assert not any(x.is_contiguous() for x in arguments + cotangents)
    got = run(kernels.lif_triton, arguments, cotangents, DEVICE)
    for name in NAMES:
        assert torch.equal(want[name], got[name]), name


@needs_triton
@pytest.mark.parametrize("heads", HEADS[::2], ids=str)
def test_a_sequence_in_two_parts(heads):
    """State and its gradient carry a sequence over a cut: outputs exactly, gradients nearly."""
    arguments, cotangents = neurons(11, heads, per_step=True, seed=9)

    def in_parts(current, beta, theta, w, state, **options):
        parts = []
        for cut in (slice(0, 6), slice(6, 7), slice(7, 11)):
            now = (x[:, cut] for x in (current, beta, theta))
            *outputs, state = kernels.lif_triton(*now, w, state, **options)
            parts.append(outputs)
        return *(torch.cat(x, dim=1) for x in zip(*parts)), state

    whole = run(kernels.lif_triton, arguments, cotangents, DEVICE)
    parts = run(in_parts, arguments, cotangents, DEVICE)
    for name in NAMES:
        if whole[name] is not None:
            exactly = name in NAMES[:4]
            torch.testing.assert_close(
                parts[name], whole[name], rtol=0 if exactly else 1e-5, atol=0 if exactly else 1e-4
            )


@needs_triton
@pytest.mark.parametrize("heads", HEADS[::2], ids=str)
def test_a_program_keeps_to_its_tile(heads, monkeypatch):
    """Padding must not write to a neighbour: on a GPU both run at once, so order hides nothing."""

    class First:  # a kernel of which only the first program runs
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return self.kernel[(1,)]

    for name in ("_forward_kernel", "_backward_kernel"):
        monkeypatch.setattr(kernels, name, First(getattr(kernels, name)))
    torch.use_deterministic_algorithms(True, warn_only=True)  # makes torch.empty fill with NaN
    try:
        got = run(kernels.lif_triton, *neurons(5, heads, per_step=True, seed=11), DEVICE)
    finally:
        torch.use_deterministic_algorithms(False)
    rows, width = (16, heads[1]) if heads else (1, 32)
    for name in set(NAMES) - {"d_w"}:
        expected = torch.zeros_like(got[name], dtype=torch.bool)
        expected[:rows, ..., :width] = True
        assert torch.equal(~got[name].isnan(), expected), name


@needs_triton
def test_no_second_derivative():
    """A kernel's gradient has no graph; to say so beats a second derivative of zero."""
    arguments, _ = neurons(3)
    beta = arguments[1].to(DEVICE).requires_grad_()
    membrane = kernels.lif_triton(arguments[0].to(DEVICE), beta, arguments[2].to(DEVICE))[1]
    (first,) = torch.autograd.grad(membrane.square().sum(), beta, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


# ---- torch.compile ----------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("heads", HEADS[::2], ids=str)
def test_compile_does_not_break_the_graph(heads, fresh, capsys):
    """One graph around the scan, forward and backward; it says its backend there too."""

    def loss(scan, current, beta, theta, w, state, return_membrane):
        *results, state = scan(2 * current, beta, theta, w, state, return_membrane=return_membrane)
        return sum(x.cumsum(1).square().sum() for x in (*results, *state) if x is not None)

    fresh.setattr(kernels, "BACKEND", "triton")
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for return_membrane in (True, False):
        gradients = []
        for f in (compiled, loss):
            leaves = [
                x if x is None else x.to(DEVICE).requires_grad_()
                for x in neurons(3, heads, seed=14)[0]
            ]
            f(kernels.lif, *leaves[:4], tuple(leaves[4:]), return_membrane).backward()
            gradients.append([x.grad for x in leaves if x is not None])
        for got, want in zip(*gradients):
            torch.testing.assert_close(got, want)
    assert kernels.backends() == "lif: triton" and capsys.readouterr() == ("", "")


@needs_triton
@pytest.mark.parametrize("heads", HEADS[::2], ids=str)
@pytest.mark.parametrize("membrane", (True, False))
def test_operators(heads, membrane):
    """What PyTorch asks of an operator: a true schema, shapes without data, gradients."""
    leaves = [x if x is None else x.to(DEVICE).requires_grad_() for x in neurons(2, heads)[0]]
    options = membrane, "atan", 2.0, "soft", True, 0.0
    library.opcheck(kernels._forward, (*leaves, *options))
    _, beta, theta, w, v0, _ = (x if x is None else x.detach() for x in leaves)
    spikes, kept, v, s = (x.detach() for x in kernels._forward(*leaves, *options))
    d_membrane = kept if membrane else None
    needs = torch.bfloat16, True, membrane
    arguments = kept, beta, theta, w, v0, spikes, d_membrane, v, None, *needs, *options
    library.opcheck(kernels._backward, arguments)


# ---- errors and the choice of a backend -------------------------------------------------------


@needs_triton
@pytest.mark.parametrize(
    "change",
    (
        dict(current=torch.zeros(2, 3)),
        dict(current=torch.zeros(2, 0, 4)),
        dict(beta=torch.zeros(5)),
        dict(theta=torch.zeros(2, 3)),
        dict(w_rec=torch.zeros(3, 4, 4)),
        dict(state=(torch.zeros(4), torch.zeros(4))),
        dict(surrogate="step"),
        dict(reset="hard"),
        dict(clamp=-1.0),
    ),
    ids=lambda change: "-".join(change),
)
def test_errors_of_lif_torch(change):
    arguments = dict(current=torch.zeros(2, 3, 4), beta=torch.zeros(4), theta=torch.ones(4))
    with pytest.raises(ValueError) as want:
        lif_torch(**{**arguments, **change})
    with pytest.raises(ValueError, match=re.escape(str(want.value))):
        kernels.lif_triton(**{**arguments, **change})


def small(dtype=torch.float32):
    return torch.ones(1, 2, 4, dtype=dtype), torch.full((4,), 0.5), torch.ones(4)


def test_auto_on_cpu_is_torch_and_noted_once(fresh, capsys):
    assert kernels.backends() == ""
    for _ in range(2):
        spikes, membrane, (v, s) = kernels.lif(*small(), surrogate="atan")
    assert torch.equal(spikes, lif_torch(*small(), surrogate="atan")[0])
    fresh.setattr(kernels, "BACKEND", "torch")
    kernels.lif(*small())  # the same choice, by name
    assert kernels.backends() == "lif: torch (cpu)"
    assert capsys.readouterr() == ("", "")  # nothing is printed into a sample, a bar or a chat


@needs_triton
def test_triton_by_name(fresh):
    fresh.setattr(kernels, "BACKEND", "triton")
    for _ in range(2):
        spikes, *_ = kernels.lif(*(x.to(DEVICE) for x in small()), slope=2)
    assert torch.equal(spikes.cpu(), lif_torch(*small())[0])
    assert kernels.backends() == "lif: triton"


def test_triton_by_name_is_never_replaced(fresh):
    def refuses(error, match, *arguments):
        with pytest.raises(error, match=match):
            kernels.lif(*arguments)

    fresh.setattr(kernels, "BACKEND", "triton")
    fresh.setattr(kernels, "HAS_TRITON", True)
    fresh.setattr(kernels, "INTERPRETED", False)
    refuses(ValueError, "cannot run on cpu.*TRITON_INTERPRET=1", *small())
    fresh.setattr(kernels, "INTERPRETED", True)
    refuses(ValueError, "torch.float64", *small(torch.float64))
    wide = torch.ones(1, 2, 129), torch.ones(129), torch.ones(129), torch.zeros(1, 129, 129)
    refuses(ValueError, "129 neurons.*more heads", *wide)
    fresh.setattr(kernels, "HAS_TRITON", False)
    refuses(ValueError, "pip install triton", *small())
    assert kernels.backends() == ""


def test_unknown_backend(fresh):
    fresh.setattr(kernels, "BACKEND", "cuda")
    with pytest.raises(ValueError, match="'cuda'.*auto, triton or torch"):
        kernels.lif(*small())


def test_auto_on_gpu(fresh):
    """Triton; PyTorch with the reason where Triton cannot. Stand-ins play the GPU's part."""
    fresh.setattr(kernels, "HAS_TRITON", True)
    fresh.setattr(kernels, "lif_triton", lambda *args, **options: "triton")
    fresh.setattr(kernels, "lif_torch", lambda *args, **options: "torch")
    cuda = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=torch.bfloat16)

    def chosen(w_rec=None, **options):
        return [kernels.lif(cuda, None, None, w_rec, **options) for _ in range(2)][0]

    assert chosen() == "triton" and kernels.backends() == "lif: triton"
    assert chosen(torch.zeros(2, 128, 128)) == "triton" and kernels.backends() == "lif: triton"
    assert chosen(torch.zeros(1, 256, 256)) == "torch"
    noted = r"lif: triton; lif: torch \(cuda\), as a head of 256 neurons.*"
    assert re.fullmatch(noted, kernels.backends())
    for kind, known in (("surrogate", SURROGATES), ("reset", RESETS)):
        assert chosen(**{kind: "mine"}) == "torch"
        reason = f"the {kind} 'mine' has no kernel: set LIF_BACKEND=torch"
        assert kernels.backends().endswith(f"; lif: torch (cuda), as {reason}")
        assert all(chosen(**{kind: name}) == "triton" for name in known)
    fresh.setattr(kernels, "BACKEND", "torch")
    assert chosen() == "torch" and kernels.backends().endswith("; lif: torch (cuda)")
    fresh.setattr(kernels, "BACKEND", "auto")
    fresh.setattr(kernels, "HAS_TRITON", False)
    assert chosen() == "torch" and "Triton is not installed" in kernels.backends()


@needs_triton
@pytest.mark.parametrize("kind, known", (("surrogate", SURROGATES), ("reset", RESETS)))
def test_a_surrogate_or_reset_without_a_kernel(kind, known, fresh):
    usual = next(iter(known))
    fresh.setitem(known, "mine", known[usual])
    spikes, *_ = kernels.lif(*small(), **{kind: "mine"})  # on a CPU it needs none
    assert torch.equal(spikes, lif_torch(*small(), **{kind: usual})[0])
    fresh.setattr(kernels, "BACKEND", "triton")
    with pytest.raises(ValueError, match=f"the {kind} 'mine' has no kernel"):
        kernels.lif(*(x.to(DEVICE) for x in small()), **{kind: "mine"})


def test_import_without_triton():
    """A PyTorch for CPU brings no Triton: kernels.py is imported, and lif works."""
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, kernels\n"
        "assert not kernels.HAS_TRITON\n"
        "kernels.lif(torch.ones(1, 2, 4), torch.ones(4), torch.ones(4))\n"
        "print(kernels.backends())\n"
    )
    done = second_process("-c", program)
    assert (done.stdout, done.stderr) == ("lif: torch (cpu)\n", "")


# ---- real GPUs --------------------------------------------------------------------------------

f32, bf16 = torch.float32, torch.bfloat16
# sm; surrogate; dtype of current, of w_rec, neurons of a head; parameters per step; membrane kept
KINDS = [
    (80, "triangle", f32, None, 0, False, True),
    (90, "triangle", bf16, None, 0, True, False),  # the most loads
    (80, "gaussian", bf16, None, 0, False, False),  # the most registers
    (90, "triangle", bf16, bf16, 128, False, False),
    (80, "triangle", f32, f32, 128, False, True),
    (80, "triangle", bf16, f32, 64, True, True),
    *[(80, name, f32, f32, 20, False, True) for name in SURROGATES],  # one forward for all
]


def second_process(*arguments):
    here = os.path.dirname(kernels.__file__)
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    env = dict(os.environ, TRITON_INTERPRET="0", PYTHONPATH=path)
    env.pop("RANK", None)
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=env, cwd=here, capture_output=True, text=True, timeout=600)


@needs_triton
@pytest.mark.parametrize("scan, count", [("lif", 2 * 7 + len(SURROGATES) - 1), ("plif", 8)])
def test_compiles_for_gpus(scan, count):
    """The kernels for sm_90 and sm_80, as they are launched: no register spills, no 32-bit offsets
    into (B, T, N), and no arithmetic less exact than that of PyTorch.

    And what makes a scan without recurrent synapses fast: the loads of a whole block of steps,
    currents or what is kept and the cotangent, stand before the first store in the machine code.
    Those of frames, whose number is not known, are started ahead of their use.
    """
    done = second_process(os.path.abspath(__file__), scan)
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(reports) == count
    for report in reports:
        print(report)  # seen with pytest -s
        assert report["local"] == 0 and report["stack"] == 0, f"spills: {report}"
        assert report["shared"] <= 163 * 1024, f"more shared memory than an A100 has: {report}"
        assert not report["offsets32"], f"32-bit offsets: {report}"
        assert not report["fusion"] and not report["tf32"], f"other spikes: {report}"
        if scan == "plif":
            held = report["HELD"] and report["p_a"] is None  # then a frame loads nothing
            assert held or report["ahead"], f"waits for its loads: {report}"
        elif report["p_w"] is None:
            per_step = 1 if report["kernel"] == "_forward_kernel" else 2 + (report["p_u"] is None)
            per_step += 2 * report["BETA_STEPS"]
            assert report["loads"] >= 16 * per_step, f"loads wait for each other: {report}"


def compile_all(scan):
    """Run the scans forward and backward with kernels that are compiled instead."""
    kernels.INTERPRETED = True  # or the tensors would have to be on a GPU
    module = kernels if scan == "lif" else spark
    for way in ("forward", "backward"):
        name = f"_{'plif_' * (scan == 'plif')}{way}_kernel"
        setattr(module, name, Compiled(getattr(module, name)))
    compile_lif() if scan == "lif" else compile_plif()


def compile_lif():
    for capability, surrogate, dtype, w_dtype, d, per_step, membrane in KINDS:
        Compiled.capability = capability
        B, T, N = 3, 5, 4 * d or 48
        beta, theta = torch.ones(2, *((B, T, N) if per_step else (N,)), requires_grad=True)
        w = None if w_dtype is None else torch.ones(4, d, d, dtype=w_dtype, requires_grad=True)
        spikes, u, state = kernels.lif_triton(
            torch.ones(B, T, N, dtype=dtype), beta, theta, w,
            surrogate=surrogate, clamp=1.5 * per_step, return_membrane=membrane,
        )  # fmt: skip
        sum(x.sum() for x in (spikes, u, *state) if x is not None).backward()


def compile_plif():
    frames = Frames(torch.tensor([[2, 1, 4], [1, 1, 3]]), 4)
    for capability, step, held, dtype in (
        (80, False, True, torch.float32), (90, False, False, torch.bfloat16),
        (90, True, False, torch.float32), (80, True, False, torch.bfloat16),
    ):  # fmt: skip
        Compiled.capability = capability
        x = torch.ones(2, 3 if held else frames.size, 48, dtype=dtype, requires_grad=True)
        per_frame = torch.ones(2, frames.size, 48, dtype=dtype, requires_grad=True)
        neurons = [per_frame] * 3 if step else [torch.ones(48, requires_grad=True)] * 2
        outputs = plif_triton(x, *neurons, frames=frames, reset_grad=step)
        sum(y.float().sum() for y in outputs).backward()


class Compiled:
    """A kernel that is compiled for a GPU that is not here; launches print a JSON report on it,
    a second launch of the same kind none."""

    capability = 80

    def __init__(self, kernel):
        self.kernel, self.done = kernel, set()

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *arguments, **named):
        from triton import compile, knobs
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        given = dict(zip(self.kernel.arg_names, arguments)) | named
        options = {name: given.pop(name) for name in list(given.keys() - self.kernel.arg_names)}
        tensors = {name: x for name, x in given.items() if torch.is_tensor(x)}
        short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int64: "i64"}
        signature = {name: "*" + short[x.dtype] for name, x in tensors.items()}
        numbers = given.keys() - named.keys() - tensors.keys()
        signature |= {name: "i32" for name in numbers if type(given[name]) is int}
        signature |= {name: "fp32" for name in numbers if type(given[name]) is float}
        constants = {name: x for name, x in given.items() if name not in signature}
        signature = {name: signature.get(name, "constexpr") for name in self.kernel.arg_names}
        aligned = {  # what Triton sees on a launch with ordinary sizes
            (i,): [["tt.divisibility", 16]]
            for i, (name, kind) in enumerate(signature.items())
            if kind[0] == "*" or kind == "i32" and given[name] % 16 == 0
        }
        kind = repr((signature, constants, self.capability))
        if kind in self.done:
            return
        self.done.add(kind)
        built = compile(
            ASTSource(self.kernel, signature, constants, aligned),
            target=GPUTarget("cuda", self.capability, 32), options=options,
        )  # fmt: skip
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(built.asm["cubin"])
            file.flush()
            command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
            listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        usage = re.findall(r"(REG|STACK|LOCAL):(\d+)", listing)
        moves = "".join(re.findall(r"\b(LD|ST)G\b", listing)).replace("LD", ".")
        per_neuron = [name for name, x in tensors.items() if x.dim() == 1]
        print(json.dumps(
            signature | constants | {key.lower(): int(x) for key, x in usage} | dict(
                kernel=self.kernel.__name__, sm=self.capability, shared=built.metadata.shared,
                loads=max(map(len, moves.split("ST"))), ahead=built.asm["ptx"].count("cp.async"),
                fusion=built.metadata.enable_fp_fusion, tf32="tf32" in built.asm["ptx"],
                offsets32=offsets32(built.asm["ttir"], ["p_w", "p_ends", "a row", *per_neuron]),
            )
        ))  # fmt: skip


def offsets32(ttir, free):
    """Lines of TTIR that could overflow at 2^31 elements: 32-bit products by T, F or N, or 32-bit
    offsets into a tensor; but for those into `free` ones, or of a row that 64 bits have found.
    """
    origin, found = {}, []  # the argument that a pointer, or a scalar as a whole tile, stems from
    for line in ttir.splitlines():
        if made := re.search(r"%(\w+) = tt\.(?:splat|broadcast|addptr) %(\w+)\b", line):
            origin[made[1]] = origin.get(made[2], made[2])
            if re.search(r"addptr .*, i64 loc", line):
                origin[made[1]] = "a row"
        if offset := re.search(r"tt\.addptr %(\w+),.* (tensor<\w+>|i32) loc", line):
            if "i32" in offset[2] and origin.get(offset[1], offset[1]) not in free:
                found.append(line)
        if product := re.search(r"arith\.muli %(\w+), %(\w+) .*i32", line):
            if {"T", "F", "N"} & {origin.get(x, x) for x in product.groups()}:
                found.append(line)
    return found


@needs_triton
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU with 20 GB")
def test_more_than_2_31_elements():
    B, T, N = 3, 2**18, 2**12
    current = torch.randn(B, T, N, dtype=torch.bfloat16, device=DEVICE)
    beta, theta = torch.full((N,), 0.9, device=DEVICE), torch.ones(N, device=DEVICE)
    spikes, _, (v, _) = kernels.lif_triton(current, beta, theta)
    last, _, (v_last, _) = kernels.lif_triton(current[-1:], beta, theta)
    assert 0.05 < last.float().mean() < 0.95
    assert torch.equal(spikes[-1:], last) and torch.equal(v[-1:], v_last)


if __name__ == "__main__":
    compile_all(sys.argv[1])
