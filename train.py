"""Train a spiking language model.

    python train.py configs/sam_6m.py                      download or build data, train, sample
    python train.py configs/sam_6m.py --dataset=my.txt     on your own text
    python train.py configs/sam_6m.py --init_from=resume   go on where the last run stopped
    torchrun --nproc_per_node=8 train.py configs/sam_6m.py
"""

import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import config
import data
from model import ModelConfig, SpikingLM, load_checkpoint


@dataclass(frozen=True)
class TrainConfig(ModelConfig):
    # data
    dataset: str = "auto"  # auto | real_sam (download) | nursery (built in) | a .txt, .jsonl, folder
    data_dir: str = "data"  # where downloads and token caches live
    tokenizer: str = "bpe"  # bpe | byte | char | gpt2
    phases: str = "words:8 phrases:16 sentences:32 stories:64 conversations:64"  # name:length ...
    rehearse: float = 0.0  # share of a batch drawn from the phase before
    # optimiser
    max_steps: int = 1000  # optimiser steps in all
    tokens_per_step: int = 8192  # tokens in one optimiser step, whatever the phase and world size
    micro_tokens: int = 8192  # tokens in one forward and backward per process: less saves memory
    lr: float = 2e-3  # peak learning rate of AdamW
    min_lr: float = 0.05  # the cosine ends at this share of lr
    warmup_steps: int = 50  # linear warm-up
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    weight_decay: float = 0.1  # of matrices; vectors have none
    grad_clip: float = 1.0  # norm to which gradients are clipped; 0 is off
    # curriculum: a phase ends when its validation loss has converged
    phase_share: float = 0.1  # a phase but the last takes at most this share of max_steps
    phase_gain: float = 0.01  # converged: less than this relative gain ...
    phase_patience: int = 2  # ... in so many evaluations one after the other
    # evaluation and output
    eval_interval: int = 50  # steps between evaluations
    eval_length: int = 256  # tokens of a held-out row; a row starts from silence
    eval_tokens: int = 65536  # held-out tokens scored at most, always the same ones
    sample_tokens: int = 60  # length of the sample printed at an evaluation; 0 prints none
    out_dir: str = "out"  # checkpoint and log
    result: str = ""  # also write a summary of the finished run to this .json file
    init_from: str = "scratch"  # scratch | resume
    # machine
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: str = "auto"  # auto: bfloat16 on CUDA, else float32 | float32 | bfloat16 (autocast)
    compile: bool = False  # torch.compile the model
    threads: int = 0  # CPU threads; 0 leaves it to torch
    seed: int = 1337  # of weights, batches and samples

    def __post_init__(self):
        super().__post_init__()
        for name, allowed in (
            ("init_from", ("scratch", "resume")),
            ("tokenizer", ("bpe", "byte", "char", "gpt2")),
            ("device", ("auto", "cpu", "cuda", "mps")),
            ("dtype", ("auto", "float32", "bfloat16")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        self.curriculum()

    def curriculum(self):
        """[(phase, length)] from the phases setting."""
        try:
            steps = [(p.split(":")[0], int(p.split(":")[1])) for p in self.phases.split()]
        except (IndexError, ValueError):
            steps = []
        if not steps or any(n not in data.PHASES or length < 1 for n, length in steps):
            raise ValueError(
                f"phases must be name:length pairs of {', '.join(data.PHASES)}; got {self.phases!r}"
            )
        return steps


class Run:
    """The processes and the device of this run; alone or under torchrun."""

    def __init__(self, c):
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        local = int(os.environ.get("LOCAL_RANK", 0))
        device = c.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
            device = "mps" if torch.backends.mps.is_available() else device
        if device == "cuda" and not torch.cuda.is_available():
            config.stop("no CUDA device here; use --device=cpu, or auto to take what there is")
        if self.world > 1:
            dist.init_process_group("nccl" if device == "cuda" else "gloo")
        self.device = torch.device(device, local) if device == "cuda" else torch.device(device)
        half = c.dtype == "bfloat16" or c.dtype == "auto" and device == "cuda"
        self.autocast = torch.autocast(device, torch.bfloat16) if half else nullcontext()
        self.main = self.rank == 0
        if device == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        if c.threads:
            torch.set_num_threads(c.threads)
        self.stopping = False
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, self.stop)

    def stop(self, *_):
        """Ctrl-C: finish the step, save, leave; a second one leaves at once."""
        if self.stopping:
            raise SystemExit(130)
        self.stopping = True

    def any_stopping(self):
        return bool(self.mean(torch.tensor(float(self.stopping))) > 0)

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


def learning_rate(c, step):
    """Linear warm-up, then a cosine down to min_lr * lr at max_steps."""
    if step < c.warmup_steps:
        return c.lr * (step + 1) / c.warmup_steps
    done = (step - c.warmup_steps) / max(1, c.max_steps - c.warmup_steps)
    return c.lr * (c.min_lr + (1 - c.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1, done))))


def make_optimizer(c, model, device):
    """AdamW; matrices decay, vectors (biases, norms, neuron parameters) do not."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": c.weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = device.type in ("cuda", "cpu")
    return torch.optim.AdamW(groups, lr=c.lr, betas=(c.beta1, c.beta2), fused=fused)


def save(path, model, optimizer, c, tokenizer, position):
    """Write the checkpoint beside its final name, flush it to disk, then rename: never half a file."""
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "config": asdict(c),
        "tokenizer": tokenizer.state(),
        "position": position,
    }
    with open(path + ".tmp", "wb") as f:
        torch.save(checkpoint, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)


def sample(model, tokenizer, c, run):
    """A short continuation of nothing at all: what the model says by itself."""
    generator = torch.Generator(device=run.device).manual_seed(c.seed)
    start = torch.tensor([[tokenizer.end]], device=run.device)
    stream = model.generate(start, temperature=0.7, top_p=0.95, generator=generator)
    ids = [next(stream)[0].item() for _ in range(c.sample_tokens)]
    return tokenizer.decode(ids).strip()


def main(argv):
    c = config.load(TrainConfig, argv)
    run = Run(c)
    try:
        train(c, run)
    except (data.DataError, ValueError) as error:
        config.stop(error)
    finally:
        if run.world > 1:
            dist.destroy_process_group()


def train(c, run):
    # data: every process prepares it, the first one to finish writes the cache
    corpus = data.prepare(
        c.dataset, c.tokenizer, c.vocab_size, c.data_dir, c.seed, log=run.say
    )
    tokenizer = corpus.tokenizer
    if tokenizer.vocab_size > c.vocab_size:
        config.stop(
            f"the {tokenizer.kind} tokenizer has {tokenizer.vocab_size} tokens, the model room for "
            f"{c.vocab_size}; set --vocab_size={tokenizer.vocab_size}"
        )
    curriculum = [(p, length) for p, length in c.curriculum() if p in corpus.train]
    if not curriculum:
        config.stop(f"{corpus.name} has text for {', '.join(corpus.train)}, none of --phases")

    # model
    torch.manual_seed(c.seed)
    raw = SpikingLM(c).to(run.device)
    optimizer = make_optimizer(c, raw, run.device)
    position = {"step": 0, "phase": 0, "phase_step": 0, "best": [], "best_bpb": math.inf}
    last = os.path.join(c.out_dir, "last.pt")
    if c.init_from == "resume":
        checkpoint = load_checkpoint(last)
        raw.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        position = checkpoint["position"]
    model = torch.compile(raw) if c.compile else raw
    if run.world > 1:
        model = DistributedDataParallel(model, broadcast_buffers=False)
    n_params = sum(p.numel() for p in raw.parameters())
    run.say(
        f"{n_params / 1e6:.2f}M parameters | {run.device} x {run.world} | {corpus.name}: "
        + ", ".join(f"{p} {len(corpus.train[p]) / 1e6:.2f}M" for p, _ in curriculum)
        + f" tokens, {corpus.heldout_bytes / 1e3:.0f} kB held out"
    )
    os.makedirs(c.out_dir, exist_ok=True)
    log_file = open(os.path.join(c.out_dir, "log.jsonl"), "a") if run.main else None

    bar = tqdm(total=c.max_steps, initial=position["step"], disable=not run.main, unit="step")
    started, seen, tick, ticked = time.time(), 0, time.time(), 0
    losses, rates = [], []
    while True:
        phase, length = curriculum[position["phase"]]
        step = position["step"]

        # evaluate, log, sample, save, and see whether the phase has converged
        done = step >= c.max_steps or run.any_stopping()
        if step % c.eval_interval == 0 or done:
            raw.eval()
            seconds, tokens = time.time() - tick, seen - ticked
            heldout = corpus.heldout[: c.eval_tokens + 1]
            heldout_bytes = len(tokenizer.decode_bytes(heldout.tolist()))
            with run.autocast:
                valid = raw.score(corpus.valid[phase][:8193], length)
                score = raw.score(heldout, c.eval_length)
            line = {
                "step": step,
                "phase": phase,
                "train": sum(losses) / len(losses) if losses else None,
                "valid": valid["nats"] / valid["tokens"],
                "heldout": score["nats"] / score["tokens"],
                "bpb": score["nats"] / math.log(2) / heldout_bytes,
                "rate": score["rate"],
                "synops": score["synops"],
                "synapses": score["synapses"],
                "stress": raw.stress.item(),
                "lr": learning_rate(c, step),
                "tokens": step * c.tokens_per_step,
                "tokens_per_s": tokens / seconds if tokens else 0.0,
                "seconds": time.time() - started,
            }
            if corpus.entropy_bits is not None and len(heldout) == len(corpus.heldout):
                line["entropy_bpb"] = corpus.entropy_bits / corpus.heldout_bytes
            eta = (c.max_steps - step) * c.tokens_per_step / max(1e-9, line["tokens_per_s"])
            run.say(describe(line, eta))
            if run.main:
                if c.sample_tokens:
                    run.say("    " + repr(sample(raw, tokenizer, c, run)))
                log_file.write(json.dumps(line) + "\n")
                log_file.flush()
            raw.train()
            losses = []
            history = position["best"]
            history.append(line["valid"])
            recent = history[-c.phase_patience - 1 :]
            converged = len(recent) > c.phase_patience and all(
                b > a * (1 - c.phase_gain) for a, b in zip(recent, recent[1:])
            )
            overdue = position["phase_step"] >= c.phase_share * c.max_steps
            if (converged or overdue) and position["phase"] + 1 < len(curriculum) and not done:
                position |= {"phase": position["phase"] + 1, "phase_step": 0, "best": []}
                why = "converged" if converged else "its share of the steps is used"
                run.say(f"    {phase} -> {curriculum[position['phase']][0]} ({why})")
                phase, length = curriculum[position["phase"]]
            if run.main:
                save(last, raw, optimizer, c, tokenizer, position)
                if line["bpb"] < position["best_bpb"]:
                    position["best_bpb"] = line["bpb"]
                    save(os.path.join(c.out_dir, "best.pt"), raw, optimizer, c, tokenizer, position)
            tick, ticked = time.time(), seen
        if done:
            break

        # one optimiser step of tokens_per_step tokens, in pieces of micro_tokens per process
        rows = c.tokens_per_step // length
        old = corpus.train[curriculum[position["phase"] - 1][0]] if position["phase"] else None
        n_old = int(rows * c.rehearse) // run.world * run.world if old is not None else 0
        x, y = data.batch(
            corpus.train[phase], position["phase_step"], rows - n_old, length, c.seed,
            run.rank, run.world,
        )  # fmt: skip
        if n_old:
            x_old, y_old = data.batch(
                old, position["phase_step"], n_old, length, c.seed + 1, run.rank, run.world
            )
            x, y = torch.cat([x, x_old]), torch.cat([y, y_old])
        pieces = max(1, -(-x.numel() // c.micro_tokens))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(c, step)
        loss_step, rate_step = 0.0, None
        xs, ys = x.chunk(pieces), y.chunk(pieces)
        for i, (x_now, y_now) in enumerate(zip(xs, ys)):
            x_now, y_now = x_now.to(run.device), y_now.to(run.device)
            last_piece = i + 1 == len(xs)
            wait = nullcontext() if run.world == 1 or last_piece else model.no_sync()
            with wait:
                with run.autocast:
                    logits, _, report = model(x_now)
                    nats, penalty = raw.loss(logits, y_now, report)
                share = x_now.shape[0] / x.shape[0]
                ((nats + penalty) * share).backward()
            loss_step = loss_step + nats.detach() * share
            if report.rate:
                now = torch.stack([r.detach() for r in report.rate]) * share
                rate_step = now if rate_step is None else rate_step + now
        if c.grad_clip:
            torch.nn.utils.clip_grad_norm_(raw.parameters(), c.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        nats = run.mean(loss_step).item()
        if not math.isfinite(nats):
            config.stop(f"the loss became {nats} at step {step}; try a lower --lr; {last} is good")
        raw.observe(nats, run.mean(rate_step) if rate_step is not None else [])
        losses.append(nats)
        position["step"] += 1
        position["phase_step"] += 1
        seen += rows * length
        bar.update()
        bar.set_postfix(phase=phase, loss=f"{nats:.3f}", refresh=False)
    bar.close()
    if run.main and run.stopping:
        run.say(f"stopped at step {position['step']}; go on with --init_from=resume")


def describe(line, eta):
    """One line of words for one evaluation."""
    entropy = line.get("entropy_bpb")
    parts = [
        f"{line['step']:6d} {line['phase']}",
        f"train {line['train']:.3f}" if line["train"] is not None else "train -",
        f"valid {line['valid']:.3f}",
        f"held-out {line['heldout']:.3f} nats/token {line['bpb']:.3f} bits/byte"
        + (f" (true entropy {entropy:.3f}, +{line['bpb'] - entropy:.3f})" if entropy else ""),
        "rate " + " ".join(f"{100 * r:.0f}" for r in line["rate"]) + "%" if line["rate"] else "",
        f"stress {line['stress']:.2f}",
        f"{line['tokens_per_s']:.0f} tokens/s, {eta / 60:.0f} min left" if line["train"] else "",
    ]
    return " | ".join(p for p in parts if p)


if __name__ == "__main__":
    main(sys.argv[1:])
