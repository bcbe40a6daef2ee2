"""Train a spiking language model.

    python train.py configs/sam_6m.py                      set up the data, train, sample
    python train.py configs/sam_6m.py --dataset=my.txt     on your own text
    python train.py configs/sam_6m.py --init_from=resume   go on where the last run stopped
    python train.py --init_from=out/sam_6m/best.pt --dataset=chats.jsonl --answers_only=True
    torchrun --nproc_per_node=8 --max-restarts=3 train.py configs/sam_6m.py

A run writes log.jsonl, best.pt and the last two step_*.pt into a folder of its own, out/sam_6m for
configs/sam_6m.py. A run that was killed resumes from its newest whole checkpoint, on a CPU bit for
bit as if nothing had happened.
Read train() last: it is the loop; everything above it is a helper that it calls.
"""

import ctypes
import datetime
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import textwrap
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import config
import data
import kernels
from cell_bridge import load_scores
from checkpoint import (
    check_weights, load_checkpoint, locked, newest, restore, rewind_log, save, set_aside, shape_of,
    whole_file,
)  # fmt: skip
from model import ModelConfig, SpikingLM, Synapse, find_device
from sources import VERDICT, judge, told_by
from tokenizer import DataError, tokenizer_from_state
from traits import IGNORED


# ---- settings, processes, optimiser --------------------------------------------------------------


@dataclass(frozen=True)
class TrainConfig(ModelConfig):
    # data
    dataset: str = "auto"  # auto | real_sam | nursery | PATH | stream:owner/name/config@weight,...
    data_dir: str = "data"  # where downloads and token caches live
    tokenizer: str = "bpe"  # bpe | lengthmax | byte | char | gpt2
    phases: str = "words:8 phrases:16 sentences:32 stories:64 conversations:64"  # name:length ...
    rehearse: float = 0.0  # share of a batch drawn from the phase before
    answers_only: bool = False  # conversations only, and the loss on what Sam says alone
    # optimiser
    max_steps: int = 1000  # optimiser steps in all
    tokens_per_step: int = 2048  # tokens in one optimiser step, whatever the phase and world size
    micro_tokens: int = 2048  # tokens in one forward and backward per process: less saves memory
    optimizer: str = "adamw"  # adamw | muon (for the matrices inside blocks and traits)
    lr: float = 2e-3  # peak learning rate of AdamW
    neuron_lr: float = 1.0  # times lr, for vectors: decays, thresholds, biases, norms
    table_lr: float = 1.0  # times lr, for the hash tables of Engram
    muon_lr: float = 0.02  # peak learning rate of Muon
    min_lr: float = 0.05  # the cosine ends at this share of the peak
    warmup_steps: int = 50  # linear warm-up
    beta1: float = 0.9  # decay of AdamW's average of gradients
    beta2: float = 0.95  # and of their squares
    weight_decay: float = 0.1  # of AdamW's matrices; vectors have none
    muon_decay: float = 0.01  # weight decay of Muon's matrices
    shard: bool = False  # each process keeps the optimisers' states of its share of the parameters
    grad_clip: float = 1.0  # norm to which gradients are clipped; 0 is off
    # curriculum: a phase ends when its validation loss has converged
    phase_share: float = 0.1  # a phase but the last takes at most this share of max_steps
    phase_gain: float = 0.01  # converged: less than this relative gain ...
    phase_patience: int = 2  # ... in so many evaluations one after the other
    # evaluation and output
    eval_interval: int = 50  # steps between evaluations
    eval_length: int = 256  # tokens of a held-out row; a row starts from silence
    eval_tokens: int = 65536  # held-out tokens scored at most, always the same ones; last: more
    sample_tokens: int = 150  # longest sample printed at an evaluation; 0 prints none
    out_dir: str = "out/run"  # checkpoints and log; with a config file, by default out/<its name>
    cell: str = ""  # file of cell_bridge.py that sets block whale's neurons; empty: synthetic
    result: str = ""  # also write a summary of the finished run to this .json file
    init_from: str = "scratch"  # scratch | resume | FILE: weights, tokenizer, model settings
    # machine
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: str = "auto"  # auto: bfloat16 where it is fast | float32 | bfloat16 (autocast)
    compile: bool = False  # torch.compile the model
    threads: int = 0  # CPU threads; 0 times a few steps and takes the fastest number
    seed: int = 1337  # of weights, batches and samples

    def __post_init__(self):
        super().__post_init__()
        for name, allowed in (
            ("optimizer", ("adamw", "muon")),
            ("tokenizer", ("bpe", "lengthmax", "byte", "char", "gpt2")),
            ("device", ("auto", "cpu", "cuda", "mps")),
            ("dtype", ("auto", "float32", "bfloat16")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        at_least_1 = "eval_interval eval_length eval_tokens phase_patience micro_tokens"
        for name in at_least_1.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("threads", "seed", "max_steps", "sample_tokens", "grad_clip", "lr"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.threads > 1024 or self.tokens_per_step > 2**30:
            raise ValueError("threads must be at most 1024 and tokens_per_step 2**30")
        if not 0 <= self.rehearse < 1:
            raise ValueError(f"rehearse must be at least 0 and less than 1, got {self.rehearse}")
        if self.answers_only and "conversations" not in dict(self.curriculum()):
            raise ValueError("answers_only needs conversations in phases")
        if self.tokens_per_step < self.longest():
            raise ValueError(f"tokens_per_step must hold a sequence of {self.longest()} tokens")

    def curriculum(self):
        """[(phase, length)] from the phases setting."""
        try:
            pairs = (pair.split(":") for pair in self.phases.split())
            steps = [(name, int(length)) for name, length in pairs]
        except ValueError:
            steps = []
        if not steps or any(n not in data.PHASES or length < 1 for n, length in steps):
            raise ValueError(
                f"phases must be name:length pairs of {', '.join(data.PHASES)}; got {self.phases!r}"
            )
        return steps

    def longest(self):
        """Tokens of the longest sequence of the curriculum."""
        return max(length for _, length in self.curriculum())


def has_bfloat16(device):
    """Whether this kind of device multiplies matrices in bfloat16, rather than imitating it."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    can = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return device == "cpu" and bool(can.get("avx512_bf16") or can.get("amx_bf16"))


def keep_memory():
    """Have glibc keep what is freed for the next step.

    A large tensor is else given back to the system and faulted in anew, page by page, each time:
    a tenth to a third of a step's time.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    with suppress(OSError, AttributeError):  # where there is no glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@dataclass
class Position:
    """Where a run stands: with weights and optimisers, all that it needs to go on."""

    curriculum: list  # [(phase, length)] of the phases that have enough text
    step: int = 0  # optimiser steps taken
    phase: int = 0  # index into the curriculum
    phase_step: int = 0  # steps taken in this phase
    tokens: int = 0  # trained on
    minutes: float = 0.0
    threads: int = 0  # CPU threads
    evaluated: int = -1  # step of the last evaluation
    best: float = math.inf  # lowest validation loss of this phase
    history: list = field(default_factory=list)  # validation losses of this phase
    losses: list = field(default_factory=list)  # training losses since the last evaluation
    stream: list = field(default_factory=list)  # where a streamed dataset stands, per process


class Run:
    """The processes and the device of this run; alone or under torchrun."""

    def __init__(self, c):
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        self.local = int(os.environ.get("LOCAL_RANK", 0))
        self.restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # by torchrun
        device = find_device(c.device).type
        if self.world > 1:
            device = "cpu" if device == "mps" else device  # gloo can not reduce tensors of MPS
            backend = "nccl" if device == "cuda" else "gloo"
            # the store outlives workers that torchrun restarts: without a prefix of their own they
            # would read the addresses of the dead
            store, _, _ = next(rendezvous("env://"))
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            wait = datetime.timedelta(hours=3)  # for downloads
            dist.init_process_group(backend, None, wait, self.world, self.rank, store)
        self.device = torch.device(device, self.local) if device == "cuda" else torch.device(device)
        if device == "cuda" and self.local >= torch.cuda.device_count():
            raise ValueError(f"no GPU for process {self.local}: lower --nproc_per_node")
        has_half = has_bfloat16(device)
        if c.dtype == "bfloat16" and device == "cuda" and not has_half:
            raise ValueError("this GPU has no bfloat16: set --dtype=float32")
        half = c.dtype == "bfloat16" or c.dtype == "auto" and has_half
        self.autocast = torch.autocast(device, torch.bfloat16) if half else nullcontext()
        self.main = self.rank == 0
        if device == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        if c.threads:
            torch.set_num_threads(c.threads)
        if device == "cpu":
            keep_memory()
        self.stopping = False
        self.has_header = False  # whether the table of evaluations has begun
        # what dropout and noise draw from; batches and samples have their own
        other = [] if device == "cpu" else [torch.get_device_module(self.device)]
        self.generators = [torch, *other]

    def listen(self):
        """From now on Ctrl-C and SIGTERM let the step end and save."""
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, self.stop)

    def stop(self, *_):
        """Ctrl-C: finish the step, save, leave; a second one leaves at once."""
        if self.stopping:
            raise SystemExit(130)
        self.stopping = True
        self.say("stopping after this step; once more to stop at once")

    def any_stopping(self):
        return bool(self.mean(torch.tensor(float(self.stopping))) > 0)

    def of_all(self, x):
        """[x of every process]; all of them have to call it."""
        found = [x] * self.world
        if self.world > 1:
            dist.all_gather_object(found, x)
        return found

    def one_first(self, work):
        """work() in the first process of each machine, then, from its cache, in the others."""
        if self.world == 1:
            return work()
        done = work() if self.local == 0 else None
        dist.barrier()
        return done if self.local == 0 else work()

    def mean(self, x):
        """Mean of a tensor over the processes."""
        if self.world > 1:
            x = x.to(self.device)
            dist.all_reduce(x)
            x = x / self.world
        return x

    def say(self, text):
        if self.main:
            tqdm.write(str(text), file=sys.stdout)
            sys.stdout.flush()


def schedule(c, step):
    """Share of the peak learning rate: linear warm-up, then a cosine to min_lr at max_steps."""
    if step < c.warmup_steps:
        return (step + 1) / c.warmup_steps
    done = (step - c.warmup_steps) / max(1, c.max_steps - c.warmup_steps)
    return c.min_lr + (1 - c.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1, done)))


def make_optimizers(c, model, device):
    """AdamW for all, or Muon (Jordan et al. 2024) for matrices of blocks and traits, AdamW for the
    rest: embedding and readout, tables, vectors. A group's "peak" is its learning rate's.

    Muon's step grows as sqrt(rows / columns), if above 1, of a matrix whose rows are outputs. A
    Synapse's rows are inputs, so the rate of each is corrected for its shape.
    """
    tables = {m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    tables.remove(model.embedding.weight)
    ends = {id(p) for m in (model.proj_in, model.proj_out) if m for p in m.parameters()}
    kinds = {"vector": [], "table": [], "matrix": [], "end": [model.embedding.weight]}
    for p in model.parameters():
        if p in tables:
            kinds["table"].append(p)
        elif p.dim() < 2:
            kinds["vector"].append(p)
        elif p is not model.embedding.weight:
            kinds["end" if id(p) in ends else "matrix"].append(p)

    def group(kind, lr, decay):
        return {"params": kinds[kind], "lr": lr, "peak": lr, "weight_decay": decay}

    muon, synapses = [], {m.weight for m in model.modules() if isinstance(m, Synapse)}
    for p in kinds["matrix"] * (c.optimizer == "muon"):
        scale = math.sqrt(p.shape[1] / p.shape[0]) if p in synapses else 1.0
        lr = c.muon_lr * scale
        muon.append({"params": [p], "lr": lr, "peak": lr, "weight_decay": c.muon_decay / scale})
    adamw = [
        group("end", c.lr, c.weight_decay),
        group("table", c.lr * c.table_lr, 0.0),
        group("vector", c.lr * c.neuron_lr, 0.0),
    ] + [group("matrix", c.lr, c.weight_decay)] * (c.optimizer == "adamw")

    def build(kind, groups, **options):  # sharded: ZeRO's first stage (1910.02054)
        if c.shard and dist.is_initialized():
            from torch.distributed.optim import ZeroRedundancyOptimizer  # slow to import

            return ZeroRedundancyOptimizer(groups, kind, **options)
        return kind(groups, **options)

    fused = device.type in ("cuda", "cpu")
    optimizers = [build(torch.optim.AdamW, adamw, betas=(c.beta1, c.beta2), fused=fused)]
    return optimizers + ([build(torch.optim.Muon, muon)] if muon else [])


def train_step(model, raw, optimizers, x, y, c, run):
    """One optimiser step on this process's tokens x and targets y (rows, length).

    They go through in pieces of micro_tokens; gradients add up, and processes average them at the
    last piece. Targets that are IGNORED do not count.
    Returns, of all processes, the nats per token, the norm of the gradient and the rates of all
    neurons.
    """
    rows, counted = max(1, c.micro_tokens // x.shape[1]), (y != IGNORED).sum().item()
    nats_mean, rates = torch.zeros((), device=run.device), torch.zeros_like(raw.rate)
    for start in range(0, len(x), rows):
        x_now, y_now = (z[start : start + rows].to(run.device) for z in (x, y))
        share = len(x_now) / len(x)
        share_of_nats = (y_now != IGNORED).sum().item() / max(1, counted)
        last = start + rows >= len(x)
        with nullcontext() if last or run.world == 1 else model.no_sync():
            with run.autocast:
                logits, _, report = model(x_now)
                nats, others = raw.loss(logits, y_now, report)
            (nats * share_of_nats + sum(others.values()) * share).backward()
        nats_mean += nats.detach() * share_of_nats
        rates += torch.cat(report.rate or [rates]).detach() * share
    norm = torch.nn.utils.clip_grad_norm_(raw.parameters(), c.grad_clip or math.inf)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return run.mean(nats_mean).item(), norm.item(), run.mean(rates)


FINAL_TOKENS = 65536


def evaluate(raw, corpus, phase, length, c, run, is_last=False):
    """What the log says of the model: the phase's validation loss, and the held-out score.

    The last evaluation of a run scores FINAL_TOKENS of the held-out text, or all of it.
    """
    n = min(8192, c.eval_tokens) + 1
    most = max(c.eval_tokens, FINAL_TOKENS) if is_last else c.eval_tokens
    tokens, heldout = corpus.valid[phase][:n], corpus.heldout[: most + 1]
    counted = corpus.answers["valid"][:n] if c.answers_only else None
    raw.eval()
    with run.autocast:
        valid = raw.score(tokens, length, counted)
        score = raw.score(heldout, c.eval_length)
    raw.train()
    in_bytes = len(corpus.tokenizer.decode_bytes(heldout.tolist()))
    of_phase = tokens[1:] if counted is None else tokens[1:][counted[1:] > 0]
    line = {
        # the mean, lest processes disagree about the end of a phase
        "valid": run.mean(torch.tensor(valid["nats"] / valid["tokens"])).item(),
        "valid_bpb": valid["nats"] / math.log(2) / len(corpus.tokenizer.decode_bytes(of_phase)),
        "heldout": score["nats"] / score["tokens"],
        "bpb": score["nats"] / math.log(2) / in_bytes,
        "rate": score["rate"],
        "synops": score["synops"],
        "synapses": score["synapses"],
        "stress": raw.stress.item(),
        "log": score["log"],
    }
    if corpus.entropy_bits is not None and len(heldout) == len(corpus.heldout):
        line["entropy_bpb"] = corpus.entropy_bits / corpus.heldout_bytes
        line["above_entropy"] = line["bpb"] - line["entropy_bpb"]
    return line


def converged(history, c):
    """Whether the validation loss gained less than phase_gain in each of the last evaluations."""
    recent = history[-c.phase_patience - 1 :]
    gains = [1 - b / a for a, b in zip(recent, recent[1:])]
    return len(gains) == c.phase_patience and max(gains) < c.phase_gain


def open_stream(corpus, position, c, run):
    """The stream of a dataset that is not stored, where `position` left it; else None."""
    if not corpus.mixture:
        return None
    places = position.stream or [None] * run.world
    if len(places) != run.world:
        raise ValueError(f"the checkpoint is of {len(places)} processes: resume with as many")
    seat = run.rank, run.world, places[run.rank]
    return data.Stream(corpus.mixture, corpus.tokenizer, c.seed, *seat)


def next_batch(corpus, stream, position, c, run):
    """This process's rows x, y of the next step: the phase's text, and some of the one before."""
    phase, length = position.curriculum[position.phase]
    rows = c.tokens_per_step // length // run.world * run.world
    if stream and phase not in data.CUTS:  # words, phrases and sentences come from its sample
        return stream.batch(rows // run.world, length)

    def draw(tokens, rows, seed):
        return data.batch(tokens, position.phase_step, rows, length, seed, run.rank, run.world)

    before = position.curriculum[position.phase - 1][0] if position.phase else None
    old = int(rows * c.rehearse) // run.world * run.world if before else 0
    x, y = draw(corpus.train[phase], rows - old, c.seed)
    if c.answers_only:
        y = y.masked_fill(draw(corpus.answers["train"], rows, c.seed)[1] == 0, IGNORED)
    if old:
        x, y = (torch.cat(z) for z in zip((x, y), draw(corpus.train[before], old, c.seed + 1)))
    return x, y


def check_finite(name, value, position, corpus, out):
    """Stop on NaN or infinity; the checkpoint on disk predates it."""
    if not math.isfinite(value):
        good = max(out.glob("step_*.pt"), default="none")
        phase = position.curriculum[position.phase][0]
        config.stop(
            f"the {name} became {value} at step {position.step}, on batch "
            f"{position.phase_step} of the {phase} of {corpus.name}; the last good checkpoint "
            f"is {good}: resume it with a lower --lr"
        )


def ill_layers(rates):
    """A line for each layer whose rate (spikes per neuron and token) leaves nothing to learn by."""
    for i, rate in enumerate(rates):
        if not 0.001 <= rate <= 0.9:
            what, mend = ("is dead", "lower") if rate < 0.5 else ("is saturated", "raise")
            yield (
                f"       layer {i} {what}, it fires at {100 * rate:.2f}%: {mend} --theta, or raise "
                "--rate_weight with --rate_penalty=both"
            )


def sample(raw, tokenizer, c, run):
    """What the model writes by itself: documents, one after the other."""
    generator = torch.Generator(device=run.device).manual_seed(c.seed)
    start = torch.tensor([[tokenizer.end]], device=run.device)
    stream = raw.generate(
        start, temperature=0.7, top_p=0.95, generator=generator, vocab=tokenizer.vocab_size
    )
    documents, size = [[]], 0
    while size < c.sample_tokens:
        token, size = next(stream)[0].item(), size + 1
        if token != tokenizer.end:
            documents[-1].append(token)
        elif size > c.sample_tokens / 3:
            break
        else:
            documents.append([])
    return [text for ids in documents if (text := tokenizer.decode(ids).strip())]


# ---- what a result records --------------------------------------------------------------------


def environment(device, seed):
    """Where, when and with what a number was measured, as a dictionary for JSON.

    Paths in the command are cut to file names: a result says nothing of somebody's folders.
    """
    gpu = torch.cuda.get_device_properties(device).name if device.type == "cuda" else None
    here = Path(__file__).parent
    private = r"(=|^(?=[/~]|\.\.)).*/"  # of --key=PATH, and of a PATH of its own
    command = [Path(sys.argv[0]).name, *(re.sub(private, r"\1", x) for x in sys.argv[1:])]

    def line_of(path, start):
        lines = Path(path).read_text().splitlines() if Path(path).exists() else []
        return next((x.split(":")[1].strip() for x in lines if x.startswith(start)), None)

    def version(package):
        try:
            return str(torch.__version__) if package == "torch" else metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    def git(*arguments):
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True)
        return done.stdout.strip()

    packages = "torch numpy tiktoken triton snntorch spikingjelly norse".split()
    return {
        "command": " ".join(["python", *command]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": line_of("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {p: version(p) for p in packages if version(p)},
        "commit": git("rev-parse", "HEAD") if shutil.which("git") else None,
        "uncommitted": shutil.which("git") and git("status", "--porcelain", "--", "*.py"),
        "seed": seed,
    }


def write_result(path, result):
    """Write a result, a dictionary, as JSON."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write((json.dumps(result, indent=1) + "\n").encode())
    print(f"wrote {path}")


# ---- the run ----------------------------------------------------------------------------------


def open_corpus(c, run, checkpoint, resuming):
    """The data: with a checkpoint's tokenizer, of a resumed run's own dataset."""
    dataset, tokenizer = c.dataset, c.tokenizer
    if resuming and dataset in ("auto", checkpoint["config"]["dataset"]):
        dataset = checkpoint["dataset"]  # `auto` may mean another one by now
    if checkpoint:
        tokenizer = tokenizer_from_state(checkpoint["tokenizer"])
    corpus = run.one_first(
        lambda: data.prepare(
            dataset, tokenizer, c.vocab_size, c.data_dir, log=run.say, ignore=[c.out_dir]
        )
    )
    needed = corpus.tokenizer.vocab_size
    if needed > c.vocab_size:
        raise ValueError(
            f"the {corpus.tokenizer.kind} tokenizer has {needed} tokens, the model room for "
            f"{c.vocab_size}; set --vocab_size={needed}"
        )
    if c.tokens_per_step < c.longest() * run.world:
        raise ValueError(f"--tokens_per_step must hold {c.longest()} tokens for every process")
    return corpus


def open_curriculum(corpus, c, run):
    """[(phase, length)]: the phases of the curriculum that have enough text."""
    wanted = [pair for pair in c.curriculum() if pair[0] == "conversations" or not c.answers_only]
    enough = [p for p in corpus.valid if len(corpus.train.get(p, ())) > c.longest()]
    left_out = [phase for phase, _ in wanted if phase not in enough]
    if len(left_out) == len(wanted):
        raise ValueError(f"{corpus.name} has too little text for each of --phases={c.phases!r}")
    if left_out:
        run.say(f"{corpus.name} has too little text for the phases {', '.join(left_out)}")
    return [(phase, length) for phase, length in wanted if phase in enough]


def had_its_share(position, c):
    """Whether a phase, not the last one, has taken its share of the steps."""
    is_last = position.phase + 1 == len(position.curriculum)
    return position.phase_step >= c.phase_share * c.max_steps and not is_last


def advance(position, valid, c, run):
    """Go on to the next phase if this one, by its valid losses, has converged or had its share."""
    position.history.append(valid)
    is_converged = converged(position.history, c)
    has_next = position.phase + 1 < len(position.curriculum)
    if (is_converged or had_its_share(position, c)) and has_next:
        why = "converged" if is_converged else "its share of the steps is over"
        old, new = (position.curriculum[position.phase + i][0] for i in (0, 1))
        run.say(f"        {old} -> {new}: {why}")
        position.phase, position.phase_step, position.history = position.phase + 1, 0, []
        position.best = math.inf  # losses of two phases are not one scale


def fastest_threads(step):
    """The number of CPU threads with which step() is fastest: all, a half, a quarter, ... or 1.

    On a busy machine threads wait for each other: two can be five times slower than one.
    """
    counts = [torch.get_num_threads()]
    while counts[-1] > 1:
        counts.append(counts[-1] // 2)
    times, start = {n: [] for n in counts}, time.perf_counter()
    for turn in range(4 if len(counts) > 1 else 0):  # the first turn warms up
        for n in counts if turn < 2 or time.perf_counter() - start < 10 else ():
            torch.set_num_threads(n)
            begin = time.perf_counter()
            step()
            times[n].append(time.perf_counter() - begin)
    return min(counts, key=lambda n: statistics.median(times[n][1:] or [0]))


def set_threads(raw, position, c, run):
    """Take the threads that the user or the resumed run chose, else those that prove fastest.

    Sums are rounded differently with another number: a resumed run keeps its own.
    """
    most = torch.get_num_threads()
    if run.device.type != "cpu" or c.threads:
        position.threads = most
    elif not position.threads:
        _, length = position.curriculum[-1]
        x = torch.randint(c.vocab_size, (max(1, c.micro_tokens // length), length + 1))
        random = torch.get_rng_state()

        def step():
            with run.autocast:
                logits, _, report = raw(x[:, :-1])
                nats, others = raw.loss(logits, x[:, 1:], report)
            (nats + sum(others.values())).backward()
            raw.zero_grad(set_to_none=True)

        position.threads = fastest_threads(step)
        torch.set_rng_state(random)  # the trial leaves nothing behind
    torch.set_num_threads(min(position.threads, most))


def columns(line, minutes_left):
    """Column -> text of one evaluation, for the table that a run prints."""
    rate, synapses = line["rate"], line["synapses"]
    frames = [x for name, x in line["log"].items() if name.startswith("E[K]")]  # per layer
    is_first = line["train"] is None
    return {
        "step": f"{line['step']}",
        "phase": f"{line['phase']}",
        "train": "-" if is_first else f"{line['train']:.3f}",
        "valid": f"{line['valid']:.3f}",
        "valid b/B": f"{line['valid_bpb']:.3f}",
        "text b/B": f"{line['bpb']:.3f}",
        **({"firing": f"{100 * sum(rate) / len(rate):.1f}%"} if rate else {}),
        **({"SynOps": f"{100 * line['synops'] / synapses:.0f}%"} if synapses else {}),
        **({"E[K]": f"{sum(frames) / len(frames):.1f}"} if frames else {}),
        "tokens/s": "-" if is_first else f"{line['tokens_per_s']:.0f}",
        "left": "-" if is_first else f"{minutes_left:.0f} min",
    }


LEGEND = """
train, valid  loss in nats per token; valid is held-out text, cut as the phase cuts it
valid b/B     the same in bits per byte; text b/B: of whole held-out texts, which the early phases
              have not seen yet
firing        spikes per neuron and token, mean of all layers (log.jsonl has each layer's)
"""


def in_row(cells, texts):
    """A row of the table: a text for each cell, as wide as the cell's name asks for."""
    step, phase, *rest = texts
    widths = [max(8, len(name) + 2) for name in list(cells)[2:]]
    return f"{step:>6}  {phase:13}" + "".join(f"{t:>{w}}" for t, w in zip(rest, widths))


def show(line, documents, c, run):
    """Print an evaluation: a row of the table, what the model writes by itself, dead layers."""
    cells = columns(line, line["minutes"] / max(1, line["step"]) * (c.max_steps - line["step"]))
    if not run.has_header:
        run.say(LEGEND + "\n" + in_row(cells, cells))
        run.has_header = True
    run.say(in_row(cells, cells.values()))
    for text in "  ".join(f'"{document}"' for document in documents).splitlines():
        run.say(textwrap.fill(text, 98, initial_indent=" " * 8, subsequent_indent=" " * 8))
    for warning in ill_layers(line["rate"]):
        run.say(warning)


def introduce(corpus, raw, position, c, run):
    """Print what is about to be trained, on what."""
    with torch.no_grad():
        raw.eval()(torch.zeros(1, 1, dtype=torch.long, device=run.device))  # for `backends`
        raw.train()
    threads = f", threads: {position.threads}" * (run.device.type == "cpu")
    threads += " (fastest in a trial)" * (bool(threads) and not c.threads and not position.step)
    run.say(
        f"{sum(p.numel() for p in raw.parameters()) / 1e6:.2f}M parameters on {run.device}"
        f"{f' x {run.world}' * (run.world > 1)}{threads} | "
        + " | ".join(filter(None, (kernels.backends(), f"files: {c.out_dir}")))
    )
    sizes = [f"{len(corpus.train[phase]) / 1e6:.2f}M {phase}" for phase, _ in position.curriculum]
    text = f"{corpus.name}: tokens of {', '.join(sizes)}; held out {len(corpus.heldout) - 1}"
    run.say(textwrap.fill(text + f", {c.eval_tokens} of them are scored at most", 98))
    if position.step:
        run.say(f"already at {position.step} of {c.max_steps} steps")


def begin(c, run, out, checkpoint, resuming):
    """Corpus, model, optimisers and position: new, of a checkpoint's weights, or resumed."""
    corpus = open_corpus(c, run, checkpoint, resuming)
    torch.manual_seed(c.seed)
    raw = SpikingLM(c)
    if c.cell:
        raw.adopt(load_scores(c.cell)[0])
    if checkpoint and not resuming:
        check_weights(checkpoint["model"], raw)
        raw.load_state_dict(checkpoint["model"])
    raw = raw.to(run.device)
    optimizers = make_optimizers(c, raw, run.device)
    torch.manual_seed(c.seed + 1 + run.rank)  # each process has dropout and noise of its own
    position = Position(open_curriculum(corpus, c, run))
    if resuming:
        position = restore(checkpoint, raw, optimizers, position, c, corpus, run)
    if run.main and resuming:
        rewind_log(out, position.step)
    elif run.main and (aside := set_aside(out)):
        run.say(f"the run that was in {out} is kept in {aside}")
    return corpus, raw, optimizers, position


def finish(corpus, raw, position, record, c, run, out):
    """Say how the run ended and what to type next; write the result."""
    log = [json.loads(text) for text in (out / "log.jsonl").read_text().splitlines()]
    line, speak = log[-1], f"python sample.py --ckpt={out / 'best.pt'}"
    entropy = line.get("entropy_bpb")
    run.say(
        f"\n{line['bpb']:.3f} bits per byte of held-out text"
        + (f" (its true entropy is {entropy:.3f})" if entropy else "")
        + f", {position.step} steps, {position.tokens:,} tokens, {position.minutes:.1f} minutes"
    )
    if corpus.name == "nursery":
        record["exam"] = judge(told_by(raw, corpus.tokenizer, seed=c.seed))
        run.say(VERDICT.format(**record["exam"]))
    run.say(f'next: {speak} --prompt="Once upon a time"\n      {speak} --chat')
    if c.result:
        record["data"] = {"name": corpus.name, "sha256": corpus.sha256}
        record["config"] = {k: v for k, v in asdict(c).items() if not k.endswith("_dir")}
        record["config"] |= {"dataset": corpus.name, "result": ""}  # nobody's paths
        record["parameters"] = sum(p.numel() for p in raw.parameters())
        write_result(c.result, record | {"log": log})


def train(c, run):
    """Train as the settings say: data, model, steps, evaluations; everything is in c.out_dir."""
    out = Path(c.out_dir)
    checkpoint = newest(out, c, run)
    resuming = checkpoint is not None
    if c.init_from not in ("scratch", "resume") and not resuming:
        checkpoint = load_checkpoint(c.init_from)
    corpus, raw, optimizers, position = begin(c, run, out, checkpoint, resuming)
    set_threads(raw, position, c, run)
    stream = open_stream(corpus, position, c, run)
    model = torch.compile(raw) if c.compile else raw
    if run.world > 1:
        model = DistributedDataParallel(model)
    record = environment(run.device, c.seed)  # now: the commit may be another one at the end
    introduce(corpus, raw, position, c, run)

    hidden = None if run.main else True  # None: in a terminal only, so that logs stay clean
    form = "{desc}{bar:40} {n_fmt}/{total_fmt} steps, loss {postfix}"
    bar = tqdm(
        total=c.max_steps, initial=position.step, disable=hidden, bar_format=form, leave=False
    )  # fmt: skip
    start = time.time() - 60 * position.minutes
    mark, tokens = time.time(), 0  # since the last evaluation
    run.listen()
    while True:
        step, (phase, length) = position.step, position.curriculum[position.phase]
        position.minutes = (time.time() - start) / 60
        stopped = run.any_stopping()
        is_due = step % c.eval_interval == 0 or step == c.max_steps or had_its_share(position, c)
        if stream and (is_due or stopped):
            position.stream = run.of_all(stream.position)
        if is_due and step != position.evaluated and not stopped:
            losses = position.losses
            line = {"step": step, "phase": phase, "tokens": position.tokens}
            line["tokens_per_s"] = tokens / max(1e-9, time.time() - mark)
            line["train"] = sum(losses) / len(losses) if losses else None
            line |= evaluate(raw, corpus, phase, length, c, run, step == c.max_steps)
            check_finite("held-out loss", line["heldout"], position, corpus, out)
            line["minutes"] = position.minutes
            show(line, sample(raw, corpus.tokenizer, c, run) if run.main else [], c, run)
            is_best = line["valid"] < position.best
            position.best = min(position.best, line["valid"])
            position.evaluated, position.losses = step, []
            if step < c.max_steps:
                advance(position, line["valid"], c, run)
            if run.main:
                with open(out / "log.jsonl", "a") as log:
                    log.write(json.dumps(line) + "\n")
            save(out, is_best, raw, optimizers, c, corpus, position, record, run)
            mark, tokens = time.time(), 0
        elif stopped:
            save(out, False, raw, optimizers, c, corpus, position, record, run)
            bar.close()
            run.say(f"stopped at step {step}, saved; go on with --init_from=resume")
            raise SystemExit(130)
        if step >= c.max_steps:
            break

        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak"] * schedule(c, step)
        x, y = next_batch(corpus, stream, position, c, run)
        nats, norm, rates = train_step(model, raw, optimizers, x, y, c, run)
        for name, value in (("loss", nats), ("gradient", norm)):
            check_finite(name, value, position, corpus, out)
        raw.observe(nats, rates)
        position.losses.append(nats)
        tokens += x.numel() * run.world
        position.tokens += x.numel() * run.world
        position.step += 1
        position.phase_step += 1
        bar.set_postfix_str(f"{nats:.3f}", refresh=False)
        bar.update()

    bar.close()
    if run.main:
        finish(corpus, raw, position, record, c, run, out)
    if run.world > 1:
        dist.barrier()  # a process that left while another still listens would make it abort


def main(argv):
    with config.one_line(DataError):
        try:
            c = config.load(TrainConfig, argv)
            if c.result:
                config.writable(c.result)
            if c.init_from not in ("scratch", "resume"):  # a model's shape is its checkpoint's
                c = config.load(TrainConfig, argv, shape_of(load_checkpoint(c.init_from)))
            run = Run(c)
            Path(c.out_dir).mkdir(parents=True, exist_ok=True)
            with locked(c.out_dir) if run.main else nullcontext():
                train(c, run)
        except RuntimeError as error:
            if "gloo" not in str(error).lower() and not isinstance(error, dist.DistError):
                raise
            raise OSError(
                "another process of this run is gone: resume, or let torchrun: --max-restarts=3"
            ) from error
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
