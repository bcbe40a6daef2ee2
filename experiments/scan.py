"""How fast is one layer of neurons without recurrent synapses, forward and backward?

python bench.py scan
python bench.py scan --shapes=16x1024x2048

Every contestant gets the same currents, the same decay and the same random cotangent on its spikes,
and returns the gradients of current and decay. Each gets the currents in the layout that it likes,
contiguous: (B, T, N) ours, (T, B, N) the peers. Only the spikes enter the loss.
"""

from functools import partial

import torch

from bench import OURS, show, summary, take_turns
from .peers import BETA, PEERS, SLOPE, THETA, Contestant, check_spikes
from kernels import lif
from lif import lif_reference, lif_torch

COPY = "copy of as many bytes"


def _ours(scan, N, device):
    beta = torch.full((N,), BETA, device=device, requires_grad=True)
    theta = torch.full((N,), THETA, device=device)
    options = dict(surrogate="atan", slope=SLOPE, return_membrane=False)
    return lambda x: scan(x, beta, theta, **options)[0], beta


CONTESTANTS = {
    OURS: Contestant(partial(_ours, lif), time_major=False),
    "ours, bfloat16": Contestant(partial(_ours, lif), time_major=False),
    "ours, plain torch": Contestant(partial(_ours, lif_torch), time_major=False),
    **PEERS,
    "plain autograd, unbind": Contestant(partial(_ours, lif_reference), time_major=False),
}
GPU_ONLY = ("ours, bfloat16", "ours, plain torch")  # elsewhere `lif` takes plain torch


def scan(
    b,
    run,
    *,
    shapes: str = "32x64x512,16x256x512,4x1024x1024",  # (B, T, N) as BxTxN
):
    """Milliseconds of every contestant at every shape."""
    try:
        sizes = [tuple(map(int, shape.split("x"))) for shape in shapes.split(",")]
    except ValueError:
        sizes = [()]
    if any(len(size) != 3 or min(size) < 1 for size in sizes):
        raise ValueError(f"shapes must be BxTxN,BxTxN,..., got {shapes!r}")
    scans = [scan_one(b, run.device, size) for size in sizes]
    return {"what": "one layer, forward + backward, float32; ratio to ours", "scans": scans}


def scan_one(b, device, shape):
    """All contestants at one shape (B, T, N): dict for JSON.

    On a GPU each runs as a CUDA graph, ours also as called from Python. Beside them memory is
    copied, as many bytes as ours has to move: currents and spikes, u in and out, and the gradients
    of spikes and currents, 24 per neuron and step (`of_copy`, the share of the copy's speed).
    """
    torch.manual_seed(b.seed)
    current = (torch.randn(shape) * 0.5 + 0.15).to(device)  # fires in about a fifth of the steps
    d_spikes = torch.randn(shape).to(device)
    on_gpu = device.type == "cuda"
    runs, rows, skipped = {}, {}, {}
    for name, contestant in CONTESTANTS.items():
        if name in GPU_ONLY and not on_gpu:
            continue
        try:
            forward, decay = contestant.build(shape[2], device)
            rows[name] = check_spikes(name, contestant, forward, current)
            dtype = torch.bfloat16 if "bfloat16" in name else torch.float32
            x, d = (contestant.lay_out(y.to(dtype)) for y in (current / contestant.scale, d_spikes))
            runs[name] = partial(forward_backward, forward, x.requires_grad_(), decay, d)
            if on_gpu:
                runs[name] = captured(runs[name], device)
        except Exception as error:  # not installed, or another version of it
            if name == OURS:
                raise
            skipped[name] = f"{type(error).__name__}: {error}"
            rows.pop(name, None), runs.pop(name, None)
    if on_gpu:
        runs["ours, from Python"], copies = runs[OURS].run, [current.clone() for _ in range(3)]
        runs[COPY] = captured(lambda: [x.copy_(current) for x in copies], device)
    times = summary(take_turns(runs, b.rounds, b.warmup, device), OURS)
    rows = {name: row | rows.get(name, {}) for name, row in times.items()}
    columns = {"median_ms": ".3f", "min_ms": ".3f", "max_ms": ".3f", "ratio": ".2f"}
    if on_gpu:
        columns["of_copy"] = ".0%"
        for name, share in ((OURS, 1), ("ours, bfloat16", 0.5)):
            rows[name]["of_copy"] = share * rows[COPY]["median_ms"] / rows[name]["median_ms"]
    show(f"(B, T, N) = {shape}, {device}", rows, columns | {"wrong_spikes": ".1e"}, skipped)
    return {"shape": list(shape), "contestants": rows, "skipped": skipped}


def forward_backward(forward, x, decay, cotangent):
    torch.autograd.grad(forward(x), (x, decay), cotangent)


class captured:
    """run() as one CUDA graph: what the GPU needs for it, without Python's launches."""

    def __init__(self, run, device):
        self.run = run  # it holds what the graph reads
        with torch.cuda.stream(torch.cuda.Stream(device)):  # to be captured it has to be warm
            for _ in range(3):
                run()
        torch.cuda.synchronize(device)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            run()

    def __call__(self):
        self.graph.replay()
