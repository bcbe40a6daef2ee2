"""Let a trained model speak, chat, or score a text.

python sample.py --prompt="Once upon a time"
python sample.py --chat
python sample.py --eval=some.txt
python sample.py --eval=nursery
python sample.py --ckpt=out/best.pt --picture=neurons.png

What the model says goes to stdout, everything else to stderr.
"""

import codecs
import itertools
import math
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import config
import data
import kernels
import sources
from checkpoint import build, load_checkpoint
from model import find_device
from tokenizer import DataError, tokenizer_from_state


@dataclass(frozen=True)
class SampleConfig:
    # what to do
    ckpt: str = ""  # checkpoint of train.py, or its folder; empty: the newest best.pt under out/
    prompt: str = ""  # text to continue; empty starts a document of its own; in a chat: said first
    chat: bool = False  # talk: the state is carried from turn to turn
    eval: str = ""  # score this file or folder, or nursery: bits per byte, rates, SynOps
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


def note(text):
    print(text, file=sys.stderr, flush=True)


def open_checkpoint(c):
    """(file and step, checkpoint) of --ckpt, or of the run that wrote its best.pt last."""
    path = Path(c.ckpt)
    if not c.ckpt:
        found = [*Path("out").glob("best.pt"), *Path("out").glob("*/best.pt")]
        if not found:
            raise ValueError(
                "there is no best.pt under out/: train a model first, python train.py "
                "configs/sam_6m.py, or name one with --ckpt=FILE"
            )
        path = max(found, key=lambda path: path.stat().st_mtime)
    elif path.is_dir():
        path = path / "best.pt"
    checkpoint = load_checkpoint(path)
    position = checkpoint.get("position")
    step = position.get("step") if isinstance(position, dict) else "unknown"
    return f"{path}, step {step}", checkpoint


def is_of_nursery(checkpoint):
    return "nursery" in (checkpoint.get("dataset"), checkpoint["config"].get("dataset"))


class Speaker:
    """A model, its tokenizer and the state of what has been said so far."""

    def __init__(self, model, tokenizer, c):
        self.model, self.tokenizer, self.c, self.state = model, tokenizer, c, None
        self.device = find_device(c.device)
        self.generator = torch.Generator(device=self.device).manual_seed(c.seed)
        self.pending = [tokenizer.end]  # tokens that the state has not seen yet

    @classmethod
    def of(cls, name, checkpoint, c):
        """The speaker of a checkpoint; the first line, on stderr, tells which one it is."""
        tokenizer, device = tokenizer_from_state(checkpoint["tokenizer"]), find_device(c.device)
        model = build(checkpoint).to(device)
        if c.dtype == "bfloat16":
            model.halve_synapses()
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(f"{name}: its tokenizer is larger than its model: take another --ckpt")
        with torch.no_grad():  # so that `backends` knows
            model(torch.tensor([[tokenizer.end]], device=device))
        note(" | ".join(filter(None, (name, kernels.backends()))))
        return cls(model, tokenizer, c)

    def speak(self, text, until=None):
        """Yield pieces of the continuation of all that was said before and of `text`.

        Ends at the model's end token or after max_new_tokens. With `until`, a turn of a chat, it
        also ends before that string, and has no blank in front. The state is then that of what
        was yielded: neither `until` nor the end token is part of what was said.
        """
        c = self.c
        self.pending = self.pending + self.tokenizer.encode(text)
        prompt = torch.tensor([self.pending], device=self.device)
        stream = self.model.generate(
            prompt, self.state, c.temperature, c.top_k, c.top_p, self.generator,
            self.tokenizer.vocab_size,
        )  # fmt: skip
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may need 4 tokens
        said, shown, marks = "", 0, []  # marks: (start, end, state before) of the latest tokens
        for _ in range(c.max_new_tokens):
            token, self.state = next(stream)
            self.pending = [token.item()]
            if self.pending[0] == self.tokenizer.end and c.stop_at_end:
                self.pending = []
                break
            start = len(said)
            said += decoder.decode(self.tokenizer.decode_bytes(self.pending))
            safe = len(said)
            if until:
                marks.append((start, len(said), self.state))
                if until in said:
                    said, _ = said.split(until, 1)
                    start, _, self.state = next(mark for mark in marks if mark[1] > len(said))
                    self.pending = self.tokenizer.encode(said[start:])
                    yield said[shown:]
                    return
                # held back: what could be the start of `until`, and the blanks in front
                safe -= max(n for n in range(len(until)) if said.endswith(until[:n]))
                shown = max(shown, len(said) - len(said.lstrip()))
                marks = [mark for mark in marks if mark[1] > safe]
            if safe > shown:
                yield said[shown:safe]
                shown = safe
        yield said[shown:] + decoder.decode(b"", final=True)


def show(pieces):
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def chat(c):
    """Answer --prompt, then each line that is typed, until Ctrl-D. A line that is not text, or has
    a character that the tokenizer does not know, is refused, and the chat goes on."""
    name, checkpoint = open_checkpoint(c)
    speaker, between = Speaker.of(name, checkpoint, c), ""
    note("Say something and press Enter; Ctrl-D ends.")
    if is_of_nursery(checkpoint):
        note("For example:" + "".join(f"\n  {example}" for example in sources.EXAMPLES))
    for line in typed(c.prompt):
        try:
            line.encode()
            show(speaker.speak(between + data.turn(line), until="\n" + data.YOU.rstrip()))
            between = "\n"  # a turn begins on a line of its own
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


def evaluate(c):
    """Score a text and print what train.py prints of its held-out set. A model of the nursery also
    writes documents of its own, and the nursery judges them."""
    name, checkpoint = open_checkpoint(c)
    if c.eval == "nursery":  # the text that is held out in training
        documents, entropy = sources.nursery(data.NURSERY_BYTES[1], "held-out 0")
    else:
        documents, entropy = data.read_documents(c.eval, note), None
    speaker = Speaker.of(name, checkpoint, c)
    ids, end = [], speaker.tokenizer.end
    for text_ids in speaker.tokenizer.encode_batch(documents):
        ids += [end, *text_ids]
    n_bytes = sum(len(document.encode()) for document in documents)
    score = speaker.model.score(np.array(ids + [end]), c.eval_length)
    known = f" (entropy {entropy / n_bytes:.4f})" if entropy else ""
    print(f"{score['tokens']} tokens, {n_bytes} bytes, {len(documents)} documents")
    print(f"nats per token  {score['nats'] / score['tokens']:.4f}")
    print(f"bits per byte   {score['nats'] / math.log(2) / n_bytes:.4f}{known}")
    if score["rate"]:
        print("firing rate     " + " ".join(f"{100 * r:.1f}%" for r in score["rate"]))
    if score["synapses"]:
        print(
            f"SynOps          {score['synops']:.0f} triggered per token, "
            f"{100 * score['synops'] / score['synapses']:.1f}% of {score['synapses']} if all fired"
        )
    print(f"float-fed       {score['macs']} multiplications per token")
    if c.eval == "nursery" or is_of_nursery(checkpoint):
        note("writing 100 documents for the nursery to judge")
        told = sources.told_by(speaker.model, speaker.tokenizer, seed=c.seed)
        print(sources.VERDICT.format(**sources.judge(told)))


def picture(c):
    """Draw the neurons into a file, with matplotlib."""
    from report import neurons  # needed here only

    name, checkpoint = open_checkpoint(c)
    note(name)
    try:
        neurons(c.picture, name, checkpoint)
    except ImportError:
        config.stop("--picture needs matplotlib: pip install matplotlib")


def main(argv):
    with config.one_line(DataError):
        # --eval without a text is short for --eval=nursery
        bare = [a == "--eval" and b.startswith("--") for a, b in zip(argv, [*argv[1:], "--"])]
        argv = [a + "=nursery" * is_bare for a, is_bare in zip(argv, bare)]
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
            pieces = Speaker.of(*open_checkpoint(c), c).speak(c.prompt)
            first = next(pieces)  # the prompt is shown once it is known to be readable
            show(itertools.chain([c.prompt + first], pieces))


if __name__ == "__main__":
    main(sys.argv[1:])
