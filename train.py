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

import json
import math
import os
import signal
import sys
import textwrap
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C while torch is imported ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import config
import data
import kernels
from checkpoint import (
    check_weights, environment, load_cell, load_checkpoint, locked, newest, restore, rewind_log,
    save, set_aside, shape_of, write_log, write_result,
)  # fmt: skip
from machine import Run, fastest_threads
from model import ModelConfig, SpikingLM
from optim import OPTIMIZERS, make_optimizers, schedule, set_lr
from sources import STREAM, VERDICT, judge, told_by
from tokenizer import TOKENIZERS, tokenizer_from_state


# ---- settings ------------------------------------------------------------------------------------

CLIP = 1.0  # norm to which gradients are clipped
PHASE_GAIN, PHASE_PATIENCE = 0.01, 2  # converged: less relative gain, in two evaluations running
EVAL_TOKENS, FINAL_TOKENS = 8192, 65536  # held-out tokens scored at most; at the last evaluation


@dataclass(frozen=True)
class TrainConfig(ModelConfig):
    # data
    dataset: str = "auto"  # auto | real_sam | nursery | PATH | stream:owner/name/config@weight,...
    data_dir: str = "data"  # where downloads and token caches live
    tokenizer: str = "bpe"  # bpe | lengthmax | byte | char | gpt2
    phases: str = "words:8 phrases:16 sentences:32 stories:64 conversations:64"  # name:length ...
    lr_restart: bool = False  # the learning rate begins anew with each phase
    phase_share: float = 0.1  # a phase but the last takes at most this share of max_steps
    rehearse: float = 0.0  # share of a batch drawn from the phase before
    answers_only: bool = False  # conversations only, and the loss on what Sam says alone
    # optimiser
    max_steps: int = 1000  # optimiser steps in all
    tokens_per_step: int = 2048  # tokens in one optimiser step, whatever the phase and world size
    micro_tokens: int = 2048  # tokens in one forward and backward per process: less saves memory
    optimizer: str = "adamw"  # adamw | muon (for the matrices inside blocks and traits)
    lr: float = 2e-3  # peak learning rate of AdamW
    neuron_lr: float = 1.0  # times lr, for vectors: decays, biases, norms; spark: its neurons' own
    muon_lr: float = 0.02  # peak learning rate of Muon
    min_lr: float = 0.05  # the cosine ends at this share of the peak
    warmup_steps: int = 50  # linear warm-up
    beta2: float = 0.95  # decay of AdamW's average of squared gradients
    weight_decay: float = 0.1  # of AdamW's matrices; vectors have none
    muon_decay: float = 0.01  # weight decay of Muon's matrices
    shard: bool = False  # each process keeps the optimisers' states of its share of the parameters
    # evaluation and output
    eval_interval: int = 50  # steps between evaluations
    eval_length: int = 256  # tokens of a held-out row; a row starts from silence
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

    FIRST = "dataset max_steps out_dir init_from tokenizer n_layer n_hidden lr micro_tokens device"
    CHOICES = {"optimizer": OPTIMIZERS, "tokenizer": TOKENIZERS}
    CHOICES |= {"dtype": ("auto", "float32", "bfloat16")}
    RANGE = {name: (1, math.inf) for name in ("eval_interval", "eval_length", "micro_tokens")}
    RANGE |= {name: (0, math.inf) for name in ("seed", "max_steps", "sample_tokens", "lr")}
    RANGE |= {"threads": (0, 1024), "tokens_per_step": (1, 2**30), "rehearse": (0, 0.99)}

    def __post_init__(self):
        super().__post_init__()
        is_stream = self.dataset.startswith(STREAM)
        if self.answers_only and (is_stream or "conversations" not in dict(self.curriculum())):
            raise ValueError("answers_only needs conversations in phases, and no stream")
        if self.tokens_per_step < self.longest() * int(os.environ.get("WORLD_SIZE", 1)):
            raise ValueError(f"tokens_per_step must hold {self.longest()} tokens for every process")

    def curriculum(self):
        """[(phase, length)] from the phases setting."""
        steps = config.pairs(self.phases)
        if not steps or any(n not in data.PHASES or len(x) != 1 or x[0] < 1 for n, x in steps):
            raise ValueError(
                f"phases must be name:length pairs of {', '.join(data.PHASES)}; got {self.phases!r}"
            )
        return [(name, length) for name, (length,) in steps]

    def longest(self):
        """Tokens of the longest sequence of the curriculum."""
        return max(length for _, length in self.curriculum())


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

    def is_due(self, c):
        """Whether it is time for an evaluation."""
        is_time = self.step % c.eval_interval == 0 or self.step == c.max_steps
        return self.step != self.evaluated and (is_time or self.had_its_share(c))

    def on_schedule(self, c):
        """(steps taken, steps in all) that the learning rate follows: those of the run, or of the
        phase. Real Sam's author restarts the rate where the conversations grow longer."""
        if not c.lr_restart:
            return self.step, c.max_steps
        if self.is_last():
            return self.phase_step, c.max_steps - self.step + self.phase_step
        return self.phase_step, math.ceil(c.phase_share * c.max_steps)

    def had_its_share(self, c):
        """Whether a phase, not the last one, has taken its share of the steps."""
        return self.phase_step >= c.phase_share * c.max_steps and not self.is_last()

    def is_last(self):
        return self.phase + 1 == len(self.curriculum)


def train_step(model, optimizers, x, y, c, run):
    """One optimiser step on this process's tokens x and targets y (rows, length).

    They go through in micro-batches of micro_tokens; gradients add up, and processes average them
    at the last one. Targets that are IGNORED do not count.
    Returns, of all processes, the nats per token, the norm of the gradient and the rates of all
    neurons.
    """
    raw = getattr(model, "module", model)  # without DistributedDataParallel around it
    rows = max(1, c.micro_tokens // x.shape[1])
    counted = run.mean((y != data.IGNORED).sum().float()).item() or 1  # mean of the processes
    nats_mean, rates = torch.zeros((), device=run.device), torch.zeros_like(raw.rate)
    for start in range(0, len(x), rows):
        x_now, y_now = (z[start : start + rows].to(run.device) for z in (x, y))
        share = len(x_now) / len(x)
        share_of_nats = (y_now != data.IGNORED).sum().item() / counted
        last = start + rows >= len(x)
        with nullcontext() if last or run.world == 1 else model.no_sync():
            with run.autocast:
                logits, _, report = model(x_now)
                nats, others = raw.loss(logits, y_now, report)
            (nats * share_of_nats + sum(others.values()) * share).backward()
        nats_mean += nats.detach() * share_of_nats
        rates += torch.cat(report.rates or [rates]).detach() * share  # `or`: no neurons
    norm = torch.nn.utils.clip_grad_norm_(raw.parameters(), CLIP)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return run.mean(nats_mean).item(), norm.item(), run.mean(rates)


@dataclass
class Training:
    """What a run consists of."""

    c: TrainConfig
    run: Run
    out: Path  # its folder
    corpus: data.Data
    model: SpikingLM  # neither compiled nor distributed
    optimizers: list
    position: Position
    feed: data.Feed = None
    record: dict = None  # where, when and with what it is trained
    has_header: bool = False  # whether the table of evaluations has begun


# ---- evaluation -------------------------------------------------------------------------------


def evaluate(t):
    """The log's line: the phase's validation loss, and the held-out score."""
    c, corpus, position, model = t.c, t.corpus, t.position, t.model
    phase, length = position.curriculum[position.phase]
    n, is_last = EVAL_TOKENS + 1, position.step == c.max_steps
    tokens, heldout = corpus.valid[phase][:n], corpus.heldout[: FINAL_TOKENS + 1 if is_last else n]
    counted = corpus.answers["valid"][:n] if c.answers_only else None
    model.eval()
    with t.run.autocast:
        valid = model.score(tokens, length, counted)
        score = model.score(heldout, c.eval_length)
    model.train()
    scored = tokens[1:] if counted is None else tokens[1:][counted[1:] > 0]

    def bits_per_byte(score, ids):
        return score["nats"] / math.log(2) / len(corpus.tokenizer.decode_bytes(ids))

    line = {
        "step": position.step,
        "phase": phase,
        "tokens": position.tokens,
        "minutes": position.minutes,
        "train": sum(position.losses) / len(position.losses) if position.losses else None,
        # the mean, lest processes disagree about the end of a phase
        "valid": t.run.mean(torch.tensor(valid["nats"] / valid["tokens"])).item(),
        "valid_bpb": bits_per_byte(valid, scored),
        "heldout": score["nats"] / score["tokens"],
        "bits_per_token": score["nats"] / math.log(2) / score["tokens"],
        "bpb": bits_per_byte(score, heldout),
        "stress": model.stress.item(),
        **{key: score[key] for key in ("rate", "synops", "synapses", "log")},
    }
    if corpus.entropy_bits is not None and len(heldout) == len(corpus.heldout):
        line["entropy_bpb"] = corpus.entropy_bits / corpus.heldout_bytes
    return line


def converged(history):
    """Whether the validation loss gained less than PHASE_GAIN in each of the last evaluations."""
    recent = history[-PHASE_PATIENCE - 1 :]
    gains = [1 - b / a for a, b in zip(recent, recent[1:])]
    return len(gains) == PHASE_PATIENCE and max(gains) < PHASE_GAIN


def advance(t, valid):
    """Go on to the next phase if this one, by its valid losses, has converged or had its share."""
    position = t.position
    position.history.append(valid)
    is_converged = converged(position.history) and not position.is_last()
    if is_converged or position.had_its_share(t.c):
        why = "converged" if is_converged else "its share of the steps is over"
        old, new = (position.curriculum[position.phase + i][0] for i in (0, 1))
        t.run.say(f"        {old} -> {new}: {why}")
        position.phase, position.phase_step, position.history = position.phase + 1, 0, []
        position.best = math.inf  # losses of two phases are not one scale


def check_finite(t, name, value):
    """Stop on NaN or infinity; the checkpoint on disk predates it."""
    if not math.isfinite(value):
        position, good = t.position, max(t.out.glob("step_*.pt"), default="none")
        phase = position.curriculum[position.phase][0]
        config.stop(
            f"the {name} became {value} at step {position.step}, on batch "
            f"{position.phase_step} of the {phase} of {t.corpus.name}; the last good checkpoint "
            f"is {good}: resume it with a lower --lr"
        )


def ill_layers(rates):
    """A line for each layer whose rate (spikes per neuron and token) leaves nothing to learn by."""
    for i, rate in enumerate(rates):
        if not 0.001 <= rate <= 0.9:
            what, fix = ("is dead", "lower") if rate < 0.5 else ("is saturated", "raise")
            yield (
                f"       layer {i} {what}, it fires at {100 * rate:.2f}%: {fix} --theta, or raise "
                "--rate_weight with --rate_penalty=both"
            )


def sample(t):
    """What the model writes by itself: documents, one after the other."""
    c, tokenizer, ids = t.c, t.corpus.tokenizer, []
    start = torch.tensor([[tokenizer.end]], device=t.run.device)
    generator = torch.Generator(device=t.run.device).manual_seed(c.seed)
    stream = t.model.eval().generate(start, None, 0.7, 0, 0.95, generator, tokenizer.vocab_size)
    for token, _ in islice(stream, c.sample_tokens):
        ids.append(token.item())
        if ids[-1] == tokenizer.end and len(ids) > c.sample_tokens / 3:
            break  # rather than begin another document
    t.model.train()
    parts = groupby(ids, lambda token: token == tokenizer.end)
    return [text for _, part in parts if (text := tokenizer.decode(part).strip())]


LEGEND = """
train, valid  loss in nats per token; valid is held-out text, cut as the phase cuts it
valid b/B     the same in bits per byte; text b/B: of whole held-out texts, which the early phases
              have not seen yet
SynOps        share of the synaptic operations that spikes trigger; E[K]: frames per token
firing        spikes per neuron and token, mean of all layers (log.jsonl has each layer's)
"""


def table(line, c):
    """[(head, text)] of an evaluation; a column is as wide as its head."""
    rate, synapses = line["rate"], line["synapses"]
    frames = [x for name, x in line["log"].items() if name.startswith("E[K]")]  # per layer
    is_first = line["train"] is None
    left = line["minutes"] / max(1, line["step"]) * (c.max_steps - line["step"])
    return [
        ("  step", f"{line['step']}"),
        ("phase        ", f"{line['phase']:13}"),
        (" train", "-" if is_first else f"{line['train']:.3f}"),
        (" valid", f"{line['valid']:.3f}"),
        ("valid b/B", f"{line['valid_bpb']:.3f}"),
        ("text b/B", f"{line['bpb']:.3f}"),
        *([("firing", f"{100 * sum(rate) / len(rate):.1f}%")] if rate else []),
        *([("SynOps", f"{100 * line['synops'] / synapses:.0f}%")] if synapses else []),
        *([("  E[K]", f"{sum(frames) / len(frames):.1f}")] if frames else []),
        ("tokens/s", "-" if is_first else f"{line['tokens_per_s']:.0f}"),
        ("  left", "-" if is_first else f"{left:.0f} min"),
    ]


def show(t, line):
    """Print an evaluation: a row of the table, what the model writes by itself, dead layers."""
    cells, line["samples"] = table(line, t.c), sample(t)
    if not t.has_header:
        t.run.say(LEGEND + "\n" + "  ".join(head for head, _ in cells))
        t.has_header = True
    t.run.say("  ".join(text.rjust(len(head)) for head, text in cells))
    for text in "  ".join(f'"{document}"' for document in line["samples"]).splitlines():
        t.run.say(textwrap.fill(text, 98, initial_indent=" " * 8, subsequent_indent=" " * 8))
    for warning in ill_layers(line["rate"]):
        t.run.say(warning)


# ---- the run ----------------------------------------------------------------------------------


def open_corpus(c, run, checkpoint, resuming):
    """The data: with a checkpoint's tokenizer, of a resumed run's own dataset."""
    dataset, tokenizer = c.dataset, c.tokenizer
    if resuming and dataset in ("auto", checkpoint["config"].get("dataset")):
        dataset = checkpoint.get("dataset", dataset)  # `auto` may mean another one by now
    if checkpoint:
        tokenizer = tokenizer_from_state(checkpoint["tokenizer"])
    wanted = dataset, tokenizer, c.vocab_size, c.data_dir
    corpus = run.one_first(lambda: data.prepare(*wanted, log=run.say, ignore=[c.out_dir]))
    if (needed := corpus.tokenizer.vocab_size) > c.vocab_size:
        raise ValueError(
            f"the {corpus.tokenizer.kind} tokenizer has {needed} tokens, the model room for "
            f"{c.vocab_size}; set --vocab_size={needed}"
        )
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


def set_threads(t):
    """Take the threads that the user or the resumed run chose, else those that prove fastest: with
    another number sums are rounded differently."""
    c, most, (_, length) = t.c, torch.get_num_threads(), t.position.curriculum[-1]

    def step():
        x = torch.randint(c.vocab_size, (max(1, c.micro_tokens // length), length + 1))
        with t.run.autocast:
            logits, _, report = t.model(x[:, :-1])
            nats, others = t.model.loss(logits, x[:, 1:], report)
        (nats + sum(others.values())).backward()
        t.model.zero_grad(set_to_none=True)

    if t.run.device.type != "cpu" or c.threads:
        t.position.threads = most
    elif not t.position.threads:
        with torch.random.fork_rng(devices=[]):  # the trial leaves nothing behind
            t.position.threads = fastest_threads(step)
    torch.set_num_threads(min(t.position.threads, most))


def begin(c, run):
    """A new run, one that begins with the weights of a checkpoint, or one that goes on."""
    out = Path(c.out_dir)
    checkpoint = newest(out, c, run)
    resuming = checkpoint is not None
    if c.init_from not in ("scratch", "resume") and not resuming:
        checkpoint = load_checkpoint(c.init_from)
    corpus = open_corpus(c, run, checkpoint, resuming)
    torch.manual_seed(c.seed)
    model = SpikingLM(c).to(run.device)
    if checkpoint and not resuming:
        for name in ("theta", "diversity", "beta_low", "beta_high"):
            if getattr(c, name) != checkpoint["config"][name]:
                raise ValueError(f"{name} only says how weights begin: leave it to {c.init_from}")
        check_weights(checkpoint["model"], model)
        model.load_state_dict(checkpoint["model"])
    if c.cell:
        model.adopt(load_cell(c.cell)[0])
    optimizers = make_optimizers(c, model, run.device)
    torch.manual_seed(c.seed + 1 + run.rank)  # each process has dropout and noise of its own
    t = Training(c, run, out, corpus, model, optimizers, Position(open_curriculum(corpus, c, run)))
    if resuming:
        restore(t, checkpoint)
    if run.main and resuming:
        rewind_log(out, t.position.evaluated)
    elif run.main and (aside := set_aside(out)):
        run.say(f"the run that was in {out} is kept in {aside}")
    set_threads(t)
    t.feed = data.Feed(c, corpus, t.position.curriculum, run.rank, run.world, t.position.stream)
    t.record = environment(run.device, c.seed)  # now: the commit may be another one at the end
    return t


def introduce(t):
    """Print what is about to be trained, on what."""
    c, run, model, corpus, position = t.c, t.run, t.model, t.corpus, t.position
    with torch.no_grad():
        model.eval()(torch.zeros(1, 1, dtype=torch.long, device=run.device))  # for `backends`
        model.train()
    machine = f"{run.device}" + f" x {run.world}" * (run.world > 1)
    if run.device.type == "cpu":
        machine += f", threads: {position.threads}"
    size = f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters on {machine}"
    run.say(" | ".join(filter(None, (size, kernels.backends(), f"files: {c.out_dir}"))))
    sizes = [f"{len(corpus.train[phase]) / 1e6:.2f}M {phase}" for phase, _ in position.curriculum]
    text = f"{corpus.name}: tokens of {', '.join(sizes)}; held out {len(corpus.heldout) - 1}"
    run.say(textwrap.fill(text + f", {EVAL_TOKENS} of them are scored at most", 98))
    if position.step:
        run.say(f"already at {position.step} of {c.max_steps} steps")


def finish(t):
    """Say how the run ended and what to type next; write the result."""
    c, run, corpus, position, record = t.c, t.run, t.corpus, t.position, t.record
    log = [json.loads(text) for text in (t.out / "log.jsonl").read_text().splitlines()]
    if not log:
        return run.say(f"{t.out / 'log.jsonl'} was removed: there is nothing to report")
    line, speak = log[-1], f"python sample.py --ckpt={t.out / 'best.pt'}"
    entropy = line.get("entropy_bpb")
    run.say(
        f"\n{line['bpb']:.3f} bits per byte of held-out text"
        + (f" (its true entropy is {entropy:.3f})" if entropy else "")
        + f", {position.step} steps, {position.tokens:,} tokens, {position.minutes:.1f} minutes"
    )
    if corpus.name == "nursery":
        record["exam"] = judge(told_by(t.model, corpus.tokenizer, seed=c.seed))
        run.say(VERDICT.format(**record["exam"]))
    run.say(f'next: {speak} --prompt="Once upon a time"\n      {speak} --chat')
    if c.result:
        record["data"] = {"name": corpus.name, "sha256": corpus.sha256}
        record["parameters"] = sum(p.numel() for p in t.model.parameters())
        write_result(c.result, record | {"log": log}, replace(c, dataset=corpus.name))


def train(c, run):
    """Train as the settings say. Everything that a run leaves behind is in c.out_dir."""
    t = begin(c, run)
    model = torch.compile(t.model) if c.compile else t.model
    if run.world > 1:
        model = DistributedDataParallel(model)
    introduce(t)
    position = t.position
    bar = tqdm(
        total=c.max_steps, initial=position.step, leave=False,
        bar_format="{desc}{bar:40} {n_fmt}/{total_fmt} steps, loss {postfix}",
        disable=None if run.main else True,  # None: in a terminal only, so that logs stay clean
    )  # fmt: skip
    start = time.time() - 60 * position.minutes
    mark, tokens = time.time(), position.tokens  # of the last evaluation
    run.listen()
    while True:
        position.minutes = (time.time() - start) / 60
        if run.any_stopping():
            save(t, is_best=False)
            bar.close()
            run.say(f"stopped at step {position.step}, saved; go on with --init_from=resume")
            raise SystemExit(130)
        if position.is_due(c):
            rate = (position.tokens - tokens) / max(1e-9, time.time() - mark)
            line = evaluate(t) | {"tokens_per_s": rate}
            check_finite(t, "held-out loss", line["heldout"])
            if run.main:
                show(t, line)
                write_log(t.out, line)
            is_best = line["valid"] < position.best
            position.best = min(position.best, line["valid"])
            position.evaluated, position.losses = position.step, []
            if position.step < c.max_steps:
                advance(t, line["valid"])
            save(t, is_best)
            mark, tokens = time.time(), position.tokens
        if position.step >= c.max_steps:
            break

        set_lr(t.optimizers, schedule(c, *position.on_schedule(c)))
        x, y = t.feed.next(position.phase, position.phase_step)
        nats, norm, rates = train_step(model, t.optimizers, x, y, c, run)
        check_finite(t, "loss", nats)
        check_finite(t, "gradient", norm)
        t.model.observe(nats, rates)
        position.losses.append(nats)
        position.tokens += x.numel() * run.world
        position.step += 1
        position.phase_step += 1
        bar.set_postfix_str(f"{nats:.3f}", refresh=False)
        bar.update()

    bar.close()
    if run.main:
        finish(t)
    if run.world > 1:
        dist.barrier()  # a process that left while another still listens would make it abort


def main(argv):
    with config.one_line():
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
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
