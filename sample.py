"""Let a trained model write, chat, or score a text.

python sample.py --prompt="Once upon a time"
python sample.py --chat
python sample.py --eval=some.txt
python sample.py --eval=nursery
python sample.py --serve --run=out/sam_6m
python sample.py --spikes --prompt="Once upon a time"
python sample.py --ckpt=out/sam_6m --picture=neurons.png
python sample.py --picture=loss.png --run="out/sam_6m out/gpt_6m"

What the model writes goes to stdout, everything else to stderr.
"""

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback

import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import config
import data
import kernels
import sources
import watch
from checkpoint import build, load_checkpoint
from machine import find_device
from tokenizer import DataError, tokenizer_from_state
from watch import Speaker


@dataclass(frozen=True)
class SampleConfig:
    # what to do
    ckpt: str = ""  # checkpoint of train.py, or its folder; empty: the newest best.pt under out/
    prompt: str = ""  # text to continue; empty starts a document of its own; in a chat: said first
    chat: bool = False  # talk: the state is carried from turn to turn
    eval: str = ""  # score this file or folder, or nursery: bits per byte, rates, SynOps
    serve: bool = False  # a page for your browser: watch each neuron while the model writes
    port: int = 8000  # of the page
    run: str = ""  # folders of runs, between blanks: the page and loss.png show their curves
    spikes: bool = False  # print a raster of spikes below each line of the text
    picture: str = ""  # draw into raster.png, neurons.png, rates.png or loss.png (or .pdf, .svg)
    # how
    max_new_tokens: int = 200  # tokens to write; per turn in a chat
    temperature: float = 0.7  # 0 takes the likeliest token every time
    top_k: int = 0  # draw from the k likeliest tokens; 0 from all
    top_p: float = 0.95  # draw from the fewest tokens that hold this much probability
    repetition: float = 1.0  # above 1 tokens that were said are drawn less often; 1.2 is usual
    seed: int = 1337  # of the draws
    eval_length: int = 256  # tokens of a row that is scored; each starts from silence
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: str = "float32"  # of the matrices fed by spikes: float32 | bfloat16
    threads: int = 0  # CPU threads; 0 leaves it to torch
    compile: bool = False  # block snn on a CPU: torch.compile a token's step, for a large model

    CHOICES = {"dtype": ("float32", "bfloat16")}
    RANGE = {name: (0, math.inf) for name in ("temperature", "top_k", "max_new_tokens", "seed")}
    RANGE |= {"top_p": (1e-300, 1), "eval_length": (1, math.inf), "threads": (0, 1024)}
    RANGE |= {"port": (0, 65535), "repetition": (0.1, 100)}
    FIRST = "ckpt prompt chat serve eval temperature top_p top_k max_new_tokens device seed"

    __post_init__ = config.check


def note(text):
    print(text, file=sys.stderr, flush=True)


def open_speaker(c):
    """(file and step, checkpoint, Speaker) of --ckpt, a file or a folder; without it, of the first
    --run, else of the newest run. Prints file, step and backend on stderr."""
    path = c.ckpt or c.run.split(" ")[0]
    if not path:
        found = [*Path("out").glob("best.pt"), *Path("out").glob("*/best.pt")]
        if not found:
            advice = "run python train.py configs/sam_6m.py first, or name one with --ckpt=FILE"
            raise ValueError(f"there is no best.pt under out/: {advice}")
        path = max(found, key=lambda path: path.stat().st_mtime)
    path = Path(path, "best.pt") if Path(path).is_dir() else path
    checkpoint = load_checkpoint(path)
    position = checkpoint.get("position")
    step = position.get("step") if isinstance(position, dict) else "unknown"
    tokenizer, device = tokenizer_from_state(checkpoint["tokenizer"]), find_device(c.device)
    model = build(checkpoint).to(device)
    model.prepare(getattr(torch, c.dtype), c.compile)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"{path}: its tokenizer is larger than its model: take another --ckpt")
    with torch.no_grad():  # so that `backends` knows
        model(torch.tensor([[tokenizer.end]], device=device))
    name = f"{path}, step {step}"
    note(" | ".join(filter(None, (name, kernels.backends()))))
    return name, checkpoint, Speaker(model, tokenizer, c)


def written(speaker, text, chat=False):
    """Yield what the speaker writes after `text`, in pieces; in a chat without leading blanks."""
    c, is_blank = speaker.c, chat
    for event in speaker.speak(text, c.max_new_tokens, c.temperature, chat):
        piece = event["text"] * event["own"]
        if piece := piece.lstrip() if is_blank else piece:
            is_blank = False
            yield piece
    yield speaker.decoder.decode(b"", final=True)  # half a character


def show(pieces, prompt=""):
    """Print the prompt once the first piece has come, hence only if it was readable; then all."""
    for piece in pieces:
        print(prompt + piece, end="", flush=True)
        prompt = ""
    print()


def chat(speaker, prompt, examples):
    """Answer the prompt, then each line that is typed, until Ctrl-D. A line is refused, and the
    chat goes on, if it is not text or has a character that the tokenizer does not know."""
    note("Say something and press Enter; Ctrl-D ends.")
    if examples:
        note("For example:" + "".join(f"\n  {example}" for example in examples))
    for line in typed(prompt):
        try:
            line.encode()
            show(written(speaker, line, chat=True))
            if speaker.fired:
                n, every = speaker.wrote, sum(n for _, n in speaker.report.synapses) or 1
                fired, synops = speaker.fired / n, speaker.synops / n / every
                note(f"({n} tokens; a token fired {fired:.1%} of the neurons"
                     f" and {synops:.1%} of the synapses)")  # fmt: skip
        except UnicodeEncodeError:
            note("that line is not UTF-8 text: type it again, or set your terminal to UTF-8")
        except DataError as error:
            note(error)


def typed(first):
    """The lines of a chat that are not empty: `first`, then what is typed."""
    with suppress(AttributeError):  # bytes that are not UTF-8 arrive as lone surrogates
        sys.stdin.reconfigure(errors="surrogateescape")
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  input() then has line editing and a history
    if first.strip():
        note(f"> {first.strip()}")
        yield first.strip()
    while True:
        try:
            line = input("> " if is_terminal else "").strip()
        except EOFError:
            return print() if is_terminal else None
        if line:
            yield line


def evaluate(speaker, text, is_judged):
    """Score a text and print what train.py prints of its held-out set. If asked to, the nursery
    judges documents that the model writes."""
    if text == "nursery":  # what is held out in training
        documents, entropy = sources.nursery(data.NURSERY_BYTES[1], "held-out 0")
    else:
        documents, entropy = data.read_documents(text, note), None
    ids = [end := speaker.tokenizer.end]
    for text_ids in speaker.tokenizer.encode_batch(documents):
        ids += [*text_ids, end]
    n_bytes = sum(len(document.encode()) for document in documents)
    score = speaker.model.score(np.array(ids), speaker.c.eval_length)
    known = f" (entropy {entropy / n_bytes:.4f})" if entropy else ""
    print(f"{score['tokens']} tokens, {n_bytes} bytes, {len(documents)} documents")
    print(f"nats per token  {score['nats'] / score['tokens']:.4f}")
    print(f"bits per byte   {score['nats'] / math.log(2) / n_bytes:.4f}{known}")
    if score["rate"]:
        print("firing rate     " + " ".join(f"{rate:.1%}" for rate in score["rate"]))
    if score["synapses"]:
        share = f"{score['synops'] / score['synapses']:.1%} of {score['synapses']} if all fired"
        print(f"SynOps          {score['synops']:.0f} triggered per token, {share}")
    print(f"float-fed       {score['macs']} multiplications per token")
    if is_judged:
        note("writing 100 documents for the nursery to judge")
        told = sources.told_by(speaker.model, speaker.tokenizer, seed=speaker.c.seed)
        print(sources.VERDICT.format(**sources.judge(told)))


def main(argv):
    with config.one_line():
        # --eval without a text is short for --eval=nursery
        bare = [a == "--eval" and b.startswith("--") for a, b in zip(argv, [*argv[1:], "--"])]
        c = config.load(SampleConfig, [a + "=nursery" * is_bare for a, is_bare in zip(argv, bare)])
        if c.threads:
            torch.set_num_threads(c.threads)
        if c.picture:
            from experiments.pictures import PICTURES, loss, picture  # by name alone

            if (kind := Path(c.picture).stem) not in ("loss", *PICTURES):
                raise ValueError("--picture draws raster, neurons, rates or loss: name the file so")
            if kind == "loss":
                return loss(c.run).savefig(c.picture, dpi=120)
        name, checkpoint, speaker = open_speaker(c)
        is_nursery = "nursery" in (checkpoint.get("dataset"), checkpoint["config"].get("dataset"))
        examples = sources.EXAMPLES if is_nursery else ()
        if c.picture:
            picture(c.picture, speaker, name, c)
        elif c.serve:
            watch.serve(speaker, name, c, examples)
        elif c.spikes:
            watch.spikes(speaker, name, c)
        elif c.eval:
            evaluate(speaker, c.eval, is_nursery or c.eval == "nursery")
        elif c.chat:
            chat(speaker, c.prompt, examples)
        else:
            show(written(speaker, c.prompt), c.prompt)


if __name__ == "__main__":
    main(sys.argv[1:])
