"""Let a trained model speak, chat, or score a text.

python sample.py --ckpt=out/best.pt --prompt="Once upon a time"
python sample.py --ckpt=out/best.pt --chat
python sample.py --ckpt=out/best.pt --eval=some.txt
python sample.py --ckpt=out/best.pt --picture=neurons.png
"""

import codecs
import math
import sys
from dataclasses import dataclass

import numpy as np
import torch

import config
import data
from cell_bridge import DRAWS, PROGRAMS
from checkpoint import build, load_checkpoint
from model import find_device
from tokenizer import DataError, tokenizer_from_state


@dataclass(frozen=True)
class SampleConfig:
    # what to do
    ckpt: str = "out/best.pt"  # checkpoint written by train.py
    prompt: str = ""  # text to continue; empty starts a document of its own
    chat: bool = False  # talk: the state is carried from turn to turn
    eval: str = ""  # score this text file instead: nats per token, bits per byte, rates, SynOps
    picture: str = ""  # draw the neurons into this .png, .pdf or .svg instead (block whale)
    # how
    max_new_tokens: int = 200  # tokens to write; per turn in a chat
    temperature: float = 0.7  # 0 takes the likeliest token every time
    top_k: int = 0  # draw from the k likeliest tokens; 0 from all
    top_p: float = 0.95  # draw from the fewest tokens that hold this much probability
    stop_at_end: bool = True  # stop when the model ends its document
    seed: int = 1337  # of the draws
    eval_length: int = 256  # tokens of a row that is scored; each starts from silence
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: str = "float32"  # of the matrices fed by spikes: float32 | bfloat16
    threads: int = 0  # CPU threads; 0 leaves it to torch

    def __post_init__(self):
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError("temperature and top_k must not be negative, top_p must be in (0, 1]")
        if self.max_new_tokens < 0 or self.threads < 0 or self.eval_length < 1:
            raise ValueError("max_new_tokens and threads must not be negative, eval_length >= 1")
        if self.threads > 1024:
            raise ValueError("threads must be at most 1024")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, got {self.dtype!r}")


class Speaker:
    """A model, its tokenizer and the state of what has been said so far."""

    def __init__(self, c):
        checkpoint = load_checkpoint(c.ckpt)
        self.tokenizer = tokenizer_from_state(checkpoint["tokenizer"])
        self.device = find_device(c.device)
        self.model = build(checkpoint).to(self.device)
        if c.dtype == "bfloat16":
            self.model.halve_synapses()
        if self.tokenizer.vocab_size > self.model.config.vocab_size:
            raise ValueError(f"{c.ckpt} has a tokenizer larger than its model: take another")
        self.generator = torch.Generator(device=self.device).manual_seed(c.seed)
        self.c, self.state = c, None
        self.pending = [self.tokenizer.end]  # tokens that the state has not seen yet
        self.cut = False  # whether the last answer was cut off by max_new_tokens

    def speak(self, text, until=None):
        """Yield pieces of the continuation of all that was said before and of `text`.

        Ends at the model's end token, after max_new_tokens, or before the string `until`.
        """
        c, self.cut = self.c, False
        self.pending += self.tokenizer.encode(text)
        prompt = torch.tensor([self.pending], device=self.device)
        stream = self.model.generate(
            prompt, self.state, c.temperature, c.top_k, c.top_p, self.generator,
            self.tokenizer.vocab_size,
        )  # fmt: skip
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may need 4 tokens
        said, shown = "", 0
        for _ in range(c.max_new_tokens):
            token, self.state = next(stream)
            self.pending = [token.item()]
            if self.pending[0] == self.tokenizer.end and c.stop_at_end:
                break
            said += decoder.decode(self.tokenizer.decode_bytes(self.pending))
            if until and until in said:
                yield said[shown : said.index(until)]
                return
            safe = len(said) - (len(until) - 1 if until else 0)  # it could be the start of `until`
            if safe > shown:
                yield said[shown:safe]
                shown = safe
        else:
            self.cut = True
        yield said[shown:] + decoder.decode(b"", final=True)


def show(pieces):
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def chat(c):
    """Read a line, answer it, and go on; an empty line or Ctrl-D ends."""
    speaker = Speaker(c)
    print("Say something; an empty line ends.")
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            text = ""
        if not text:
            return
        line = "\n" if speaker.cut else ""  # a turn begins on a line of its own
        try:
            show(speaker.speak(line + data.turn(text), until="\n"))
        except DataError as error:  # a character that its tokenizer never saw
            print(error)


def evaluate(c):
    """Score a text file and print what train.py prints of its held-out set."""
    speaker = Speaker(c)
    try:
        text = open(c.eval, encoding="utf-8-sig").read()
    except (OSError, UnicodeDecodeError) as error:
        config.stop(f"cannot read {c.eval} as UTF-8 text: {error}")
    ids, end = [], speaker.tokenizer.end
    documents = [d.strip("\n") for d in text.split(data.END_TEXT) if d.strip()]
    for document in documents:
        ids += [end] + speaker.tokenizer.encode(document)
    n_bytes = sum(len(d.encode()) for d in documents)
    score = speaker.model.score(np.array(ids + [end]), c.eval_length)
    print(f"{score['tokens']} tokens, {n_bytes} bytes, {len(documents)} documents")
    print(f"nats per token  {score['nats'] / score['tokens']:.4f}")
    print(f"bits per byte   {score['nats'] / math.log(2) / n_bytes:.4f}")
    if score["rate"]:
        print("firing rate     " + " ".join(f"{100 * r:.1f}%" for r in score["rate"]))
    if score["synapses"]:
        print(
            f"SynOps          {score['synops']:.0f} triggered per token, "
            f"{100 * score['synops'] / score['synapses']:.1f}% of {score['synapses']} if all fired"
        )
    print(f"float-fed       {score['macs']} multiplications per token")


def picture(c):
    """Draw every neuron of every layer as a dot: its colour is the gene program that it follows
    most, its area the norm of the recurrent weights that it sends out."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        config.stop("--picture needs matplotlib: pip install matplotlib")
    blocks = build(load_checkpoint(c.ckpt)).blocks
    if not all(getattr(block, "modulation", None) for block in blocks):
        config.stop(f"the neurons of {c.ckpt} have no gene programs: train with block='whale'")
    figure = Figure(figsize=(5 * len(blocks), 5.6), layout="constrained")
    for i, (block, axes) in enumerate(
        zip(blocks, figure.subplots(1, len(blocks), squeeze=False)[0])
    ):
        P = block.modulation.P
        program = P.view(len(P), DRAWS, len(PROGRAMS)).mean(1).argmax(1)  # (N,)
        order = program.argsort(stable=True)
        weight = block.w_rec.detach().norm(dim=1) if block.w_rec is not None else torch.ones(len(P))
        n = torch.arange(len(P))  # a sunflower: seed n at sqrt(n), one golden angle further
        x, y = n.sqrt() * torch.cos(2.39996 * n), n.sqrt() * torch.sin(2.39996 * n)
        area = 3e4 / len(P) * (weight / weight.max()).square()[order]
        for k, name in enumerate(PROGRAMS):
            own = program[order] == k
            label = f"{name.replace('_', ' ')} ({int(own.sum())})"
            axes.scatter(x[own], y[own], area[own], f"C{k}", label=label, linewidths=0)
        axes.set(title=f"layer {i + 1}: {len(P)} neurons", aspect="equal")
        axes.axis("off")
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, fontsize=8, markerscale=0.8
        )
    figure.savefig(c.picture, dpi=120, bbox_inches="tight")
    print(f"wrote {c.picture}")


def main(argv):
    with config.one_line(DataError):
        c = config.load(SampleConfig, argv)
        if c.threads:
            torch.set_num_threads(c.threads)
        if c.eval:
            evaluate(c)
        elif c.picture:
            picture(c)
        elif c.chat:
            chat(c)
        else:
            speaker = Speaker(c)
            print(c.prompt, end="", flush=True)
            show(speaker.speak(c.prompt))


if __name__ == "__main__":
    main(sys.argv[1:])
