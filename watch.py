"""Everything one looks at: the page of a model, spikes in the terminal, pictures.

python sample.py --serve
python sample.py --serve --run=out/sam_6m
python sample.py --spikes --prompt="Once upon a time"
python sample.py --picture=raster.png
python sample.py --picture=loss.png --run="out/sam_6m out/gpt_6m"

The page is page.html; `Page` answers its requests. `neurons_of` alone knows how a block names its
neurons. matplotlib is optional: only who draws a picture needs it.
"""

import codecs
import io
import json
import math
import re
import shutil
import sys
import threading
import time
import unicodedata
from collections import OrderedDict
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from blocks import Block, Population, SNNBlock
from cell_bridge import DRAWS, PROGRAMS
from data import YOU, turn
from model import pick
from spark import PLIF, SparkBlock, SparkOutput
from tokenizer import DataError

# ---- inside a model ----------------------------------------------------------------------------


@dataclass
class Layer:
    """N spiking neurons, and what is the same at every token. None: it depends on the input."""

    name: str
    part: str  # the key of its state
    index: int  # among the layers of that part
    out: torch.Tensor  # (N,) norm of the weights that a neuron's spikes go through
    theta: torch.Tensor = None  # (N,) threshold
    beta: torch.Tensor = None  # (N,) decay
    levels: tuple = (1,)  # thresholds, in theta: graded neurons have several
    resets: bool = False  # whether the membrane falls by theta after a token with a spike
    program: torch.Tensor = None  # (N,) index of the gene program that a neuron follows most

    @property
    def order(self):
        """(N,) the neurons, those of a gene program together."""
        n = torch.arange(len(self.out))
        return n if self.program is None else self.program.argsort(stable=True)

    def membrane(self, state):
        """(N,) at the last token, before the reset; NeuronSpark's, after the last frame."""
        held = [x[0].cpu() for x in tensors(state[self.part]) if x.dim() == 2]
        if not self.resets:
            return held[self.index]
        v, s = held[2 * self.index], held[2 * self.index + 1]
        return v if self.theta is None else v + self.theta * s


def tensors(state):
    """The tensors of a state, however nested."""
    if torch.is_tensor(state):
        return [state]
    parts = state.values() if isinstance(state, dict) else state or ()
    return [x for part in parts for x in tensors(part)]


def neurons_of(part):
    """[(name, weights of a row per neuron, what has theta and beta)] of the layers of a part."""
    if isinstance(part, SNNBlock):
        known = {"a": ("in", part.w_in.weight), "h": ("hidden", part.w_out.weight)}
        return [(*known.get(key, (key, None)), p) for key, p in part.populations.items()]
    if isinstance(part, SparkBlock):
        first, second = part.halves
        f, g = first.inner, second.inner
        return [
            ("in", f.w_in.weight.t(), first.neurons), ("hidden", f.w_out.weight.t(), f),
            ("in 2", g.w_gate.weight.t(), second.neurons),
            ("hidden 2", g.w_down.weight.t().repeat(2, 1), g.neurons),  # they meet in pairs
        ]  # fmt: skip
    if isinstance(part, SparkOutput):
        return [("output", part.w.weight.t(), part.neurons)]
    return [("", getattr(part, "w_rec", None), part)] * len(part.sites)


@torch.no_grad()
def layers(model):
    """The spiking layers, in the order in which they report their rates."""
    found, sites = [], iter(model.sites)
    parts = [(key, neurons_of(x)) for key, x in model.parts.items() if getattr(x, "sites", ())]
    if model.head is not None and model.config.spikes:
        parts.append(("readout", [("output", model.embedding.weight.t(), model.head)]))
    for part, told in parts:
        number = [str(int(part[5:]) + 1)] if part.startswith("block") else []
        for k, (name, weight, neurons) in enumerate(told):
            n = next(sites)
            theta, beta = getattr(neurons, "theta", None), getattr(neurons, "beta", None)
            logit = getattr(neurons, "w" if isinstance(neurons, PLIF) else "beta_logit", None)
            beta = beta if logit is None else logit.sigmoid()
            out = torch.ones(n) if weight is None else weight.float().norm(dim=1)
            layer = Layer(" ".join([*number, name]).strip(), part, k, out.cpu())
            if isinstance(neurons, Population):
                up = range(1, len(theta) + 1)
                layer.levels = (*(-i for i in reversed(up) if neurons.signed), *up)
                theta = theta[0].expand(n)
            elif genes := getattr(neurons, "modulation", None):
                theta, beta, _ = genes()
                layer.program = genes.P.view(n, DRAWS, -1).mean(1).argmax(1).cpu()
            layer.theta, layer.beta = (x if x is None else x.cpu() for x in (theta, beta))
            layer.resets = isinstance(neurons, Block)  # then its state is that of `lif`
            found.append(layer)
    return found


# ---- a model that is watched -------------------------------------------------------------------

SHOWN, ROWS = 128, 384  # neurons that are shown of a layer, and of all layers together, at most


class Watcher:
    """A model that runs every token alone and tells what each neuron did. c: a SampleConfig."""

    def __init__(self, model, tokenizer, c):
        self.model, self.tokenizer, self.c = model, tokenizer, c
        self.device, self.busy = model.stress.device, threading.Lock()
        self.layers, self.shown = layers(model), []
        most = min(SHOWN, max(16, ROWS // max(1, len(self.layers))))
        for layer in self.layers:
            N, n = len(layer.out), min(most, len(layer.out))
            self.shown.append(layer.order[torch.arange(n) * N // n])  # evenly taken from all
        self.forget()

    def forget(self):
        """Back to silence, and to the first of the draws."""
        self.generator = torch.Generator(device=self.device).manual_seed(self.c.seed)
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.state, self.logits, self.seen, self.stopping = None, None, 0, False
        self.total = [torch.zeros_like(layer.out) for layer in self.layers]  # spikes per neuron

    def read(self, token, own):
        """Run one token: how surprising it was, and what it did. own: the model wrote it."""
        start, event = time.perf_counter(), {"own": own, "likely": []}
        if self.logits is not None:
            nats = -self.logits.log_softmax(-1)[0]
            event["bits"] = round(nats[token].item() / math.log(2), 3)
            for i in nats.topk(min(5, len(nats)), largest=False).indices.tolist():
                text = self.tokenizer.decode([i]) if i != self.tokenizer.end else "(end)"
                event["likely"].append([text, round(math.exp(-nats[i]), 4)])
        tokens = torch.tensor([[token]], device=self.device)
        logits, self.state, report = self.model(tokens, self.state)
        self.logits = logits[:, -1, : self.tokenizer.vocab_size].float()
        self.seen += 1
        event |= {"seen": self.seen, "macs": report.macs, "rate": [], "fired": [], "membrane": []}
        for layer, shown, total, rate in zip(self.layers, self.shown, self.total, report.rates):
            total += rate.cpu()
            event["rate"].append(round(rate.mean().item(), 4))
            event["fired"].append((rate.cpu()[shown] > 0).nonzero()[:, 0].tolist())
            v = layer.membrane(self.state)[shown].tolist()
            event["membrane"].append([round(x, 2) for x in v])
        event["synops"] = round(sum(float(triggered) for triggered, _ in report.synapses))
        event["synapses"] = sum(every for _, every in report.synapses)
        event["state_bytes"] = sum(x.nbytes for x in tensors(self.state))
        event["text"] = self.decoder.decode(self.tokenizer.decode_bytes([token]))
        return event | {"seconds": round(time.perf_counter() - start, 5)}

    @torch.no_grad()
    def speak(self, text, n, temperature, until=None):
        """Yield what happens at each token of the text, and of n more that the model writes. It
        ends at the end token and, in a turn of a chat, before the string `until`."""
        self.stopping, ids = False, self.tokenizer.encode(text)
        for token in [self.tokenizer.end] * (self.state is None) + ids:
            if not self.stopping:
                yield self.read(token, own=False)
        said, held = "", []  # held back: the tokens that could be the start of `until`
        while n > 0 and not self.stopping:
            n, before = n - 1, (self.state, self.logits, self.seen)
            likely = self.logits, temperature, self.c.top_k, self.c.top_p, self.generator
            token = pick(*likely).item()
            if token == self.tokenizer.end:
                break
            event = self.read(token, own=True)
            said += event["text"]
            held.append((event, len(said), before))
            if until and until in said:  # as if it had not begun to say it
                held, cut = [x for x in held if x[1] <= said.index(until)], held
                self.state, self.logits, self.seen = cut[len(held)][2]
                break
            if not until or not any(said.endswith(until[:k]) for k in range(1, len(until))):
                yield from (event for event, *_ in held)
                held = []
        yield from (event for event, *_ in held)

    def describe(self):
        """What the page has to know of the model."""
        weights, about = list(self.model.parameters()), {"block": self.model.config.block}
        about["parameters"] = sum(w.numel() for w in weights)
        about["weight_bytes"] = sum(w.nbytes for w in weights)
        about["programs"], about["layers"] = [name.replace("_", " ") for name in PROGRAMS], []
        for layer, shown in zip(self.layers, self.shown):
            told = {"name": layer.name, "shown": shown.tolist()}
            told |= {"levels": layer.levels, "resets": layer.resets}
            for key in ("theta", "beta", "program"):
                values = getattr(layer, key)
                told[key] = None if values is None else values[shown].tolist()
            about["layers"].append(told)
        return about


# ---- the page ----------------------------------------------------------------------------------

BODY, TEXT, TOKENS = 65536, 4000, 1000  # bytes of a request, characters, tokens to write, at most
STATES, SPEAKING = 16, 2  # tabs that are remembered, generations at the same time, at most
ROUTES = {"/": "GET", "/model": "GET", "/run": "GET"}
ROUTES |= {"/think": "POST", "/stop": "POST", "/forget": "POST"}


class Refused(Exception):
    """A request that is not answered: an HTTP status and one line."""


def refuse(is_wrong, status, why):
    if is_wrong:
        raise Refused(status, why)


@contextmanager
def taken(lock, status, why):
    """Inside it the lock is ours; where it is not to be had at once, the request is refused."""
    refuse(not lock.acquire(blocking=False), status, why)
    try:
        yield
    finally:
        lock.release()


class Server(ThreadingHTTPServer):
    """A model on 127.0.0.1, with a Watcher for each tab of a browser."""

    daemon_threads = True

    def __init__(self, speaker, name, c, examples=()):
        try:
            super().__init__(("127.0.0.1", c.port), Page)
        except OSError as error:
            said = f"cannot listen on port {c.port}: {error}; give another with --port=8001"
            raise ValueError(said) from None
        self.watcher = lambda: Watcher(speaker.model, speaker.tokenizer, c)
        self.c, self.tabs, self.lock = c, OrderedDict(), threading.Lock()
        self.speaking = threading.BoundedSemaphore(SPEAKING)
        self.about = {"name": name, "examples": examples, "run": c.run, "tokens": c.max_new_tokens}
        self.about |= {"temperature": c.temperature} | self.watcher().describe()
        self.hosts = [f"{host}:{self.server_address[1]}" for host in ("127.0.0.1", "localhost")]

    def tab(self, session):
        """The Watcher of a tab; that of the tab that asked longest ago is dropped."""
        with self.lock:
            self.tabs[session] = self.tabs.pop(session, None) or self.watcher()
            if len(self.tabs) > STATES:
                self.tabs.popitem(last=False)
            return self.tabs[session]

    def handle_error(self, request, client_address):
        print("page:", repr(sys.exc_info()[1]), file=sys.stderr)  # a line, no traceback


class Page(BaseHTTPRequestHandler):
    """Answers one request. What is refused gets a line of JSON."""

    server_version, sys_version, timeout = "page", "", 30

    def do_GET(self):
        try:
            self.check()
            if self.command == "POST":
                self.act(self.body())
            elif self.path == "/":
                self.send("text/html", Path(__file__).with_name("page.html").read_bytes())
            else:
                is_model = self.path == "/model"
                self.send_json(self.server.about if is_model else runs(self.server.c.run))
        except Refused as refused:
            self.send_error(*refused.args)

    do_POST = do_GET

    def check(self):
        """Only pages of this server ask: a name that leads here from outside is refused."""
        origin = self.headers.get("Origin", "http://" + self.server.hosts[0])
        asked = {self.headers.get("Host"), origin.removeprefix("http://")}
        refuse(not asked <= {*self.server.hosts}, 403, "this page is for 127.0.0.1 only")
        refuse(self.path not in ROUTES, 404, "there is no such page")
        wrong = self.command != ROUTES[self.path]
        refuse(wrong, 405, f"{self.path} does not answer {self.command}")

    def body(self):
        """The JSON object of a request."""
        size, kind = self.headers.get("Content-Length", ""), self.headers.get_content_type()
        refuse(kind != "application/json", 415, "send application/json")  # no foreign form can
        refuse(not re.fullmatch("[0-9]{1,9}", size), 411, "send a Content-Length")
        refuse(int(size) > BODY, 413, f"a request has at most {BODY} bytes")
        with suppress(ValueError, RecursionError):
            if isinstance(asked := json.loads(self.rfile.read(int(size))), dict):
                return asked
        raise Refused(400, "the request is no JSON object")

    def act(self, asked):
        session = asked.get("session")
        is_name = isinstance(session, str) and re.fullmatch("[A-Za-z0-9-]{8,64}", session)
        refuse(not is_name, 400, "session must be 8 to 64 letters, digits or -")
        tab = self.server.tab(session)
        if self.path == "/stop":
            tab.stopping = True
        else:
            with taken(tab.busy, 409, "this tab is still writing: stop it first"):
                if self.path == "/think":
                    return self.think(tab, asked)
                tab.forget()
        self.send_json({})

    def think(self, tab, asked):
        text, n, heat = (asked.get(key) for key in ("text", "tokens", "temperature"))
        is_text = isinstance(text, str) and len(text) <= TEXT
        refuse(not is_text, 400, f"text must be a string of at most {TEXT} characters")
        is_count = type(n) is int and 0 <= n <= TOKENS
        refuse(not is_count, 400, f"tokens must be a whole number from 0 to {TOKENS}")
        is_heat = type(heat) in (int, float) and 0 <= heat <= 5
        refuse(not is_heat, 400, "temperature must be a number from 0 to 5")
        until = "\n" + YOU.rstrip() if asked.get("chat") else None
        text = "\n" * bool(tab.seen) + turn(text) if until else text
        try:
            tab.tokenizer.encode(text.encode().decode())  # not half a character
        except (DataError, UnicodeError) as error:
            raise Refused(400, " ".join(str(error).split())) from None
        busy = f"{SPEAKING} other tabs are writing: try again in a moment"
        with taken(self.server.speaking, 429, busy), suppress(OSError):  # the reader left
            self.stream(tab.speak(text, n, heat, until))

    def stream(self, events):
        """Server-sent events, a line of JSON each, until they end or the reader leaves."""
        self.send("text/event-stream")
        last = {"done": True}
        try:
            for event in events:
                self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        except (ValueError, RuntimeError) as error:  # of the model
            last["error"] = str(error).splitlines()[0]
        self.wfile.write(b"data: " + json.dumps(last).encode() + b"\n\n")

    def send(self, kind, content=None, status=200):
        """Headers and content; None: a stream, which ends with the connection."""
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        if content is not None:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content or b"")

    def send_json(self, value, status=200):
        self.send("application/json", json.dumps(value).encode() + b"\n", status)

    def send_error(self, code, message=None, explain=None):  # http.server calls it too
        self.send_json({"error": message or "bad request"}, 405 if code == 501 else code)

    def log_message(self, *args):
        pass


def runs(folders):
    """[{name, log}] of folders of train.py, between blanks."""
    found = []
    for folder in folders.split():
        log = []
        with suppress(OSError, ValueError):  # not there yet, or half a line at its end
            for line in (Path(folder).expanduser() / "log.jsonl").read_text().splitlines():
                log.append(json.loads(line))
        found.append({"name": Path(folder).name, "log": log})
    return found


def serve(speaker, name, c, examples=()):
    """Answer the browser until Ctrl-C."""
    with Server(speaker, name, c, examples) as server:
        print(f"http://{server.hosts[0]}  (Ctrl-C ends)", flush=True)
        server.serve_forever()


# ---- the terminal ------------------------------------------------------------------------------


def printable(text):
    return "".join(x if x.isprintable() else " " for x in text)


def spikes(speaker, c):
    """Print what the model writes; below each line, of every layer, two rows of blocks, which are
    four neurons: lit at the tokens at which they fire."""
    watcher, blocks = Watcher(speaker.model, speaker.tokenizer, c), " ▀▄█"
    try:
        blocks.encode(sys.stdout.encoding or "ascii")
    except (UnicodeError, LookupError):
        blocks = " '.:"
    edge = max([len(layer.name) for layer in watcher.layers], default=0) + 1
    room = max(20, shutil.get_terminal_size().columns - edge - 6)
    tokens = []  # of this line: (event, text, columns that it takes)

    def flush():
        print(" " * edge + "".join(text for _, text, _ in tokens))
        for i, (layer, shown) in enumerate(zip(watcher.layers, watcher.shown)):
            rate = sum(event["rate"][i] for event, *_ in tokens) / len(tokens)
            for row, name, percent in ((0, layer.name, f"{rate:.0%}"), (2, "", "")):
                upper, lower = ((row + k) * len(shown) // 4 for k in range(2))
                lit = ""
                for event, _, width in tokens:
                    fired = event["fired"][i]
                    lit += blocks[(upper in fired) + 2 * (lower in fired)] * width
                print(f"{name:>{edge - 1}} {lit:{room}} {percent:>4}".rstrip())
        tokens.clear()

    for event in watcher.speak(c.prompt, c.max_new_tokens, c.temperature):
        text = printable(event["text"].strip("\n"))
        width = sum(1 + (unicodedata.east_asian_width(x) in "WF") for x in text)
        if tokens and sum(taken for *_, taken in tokens) + width > room:
            flush()
        tokens.append((event, text, width))
        if "\n" in event["text"]:
            flush()
    if tokens:
        flush()


# ---- pictures ----------------------------------------------------------------------------------

COLOURS = ["#0072b2", "#d55e00", "#56b4e9", "#777777", "#000000", "#e69f00"]
LINES, MARKERS = ["-", "--", "-.", ":"], "os^Dv"  # told apart in grey too


def sheet(panels=1, size=(7, 4), columns=3, **options):
    """A figure and its axes, each of this size in inches, in rows of at most so many."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from None
    columns, rows = min(columns, panels), -(-panels // columns)
    figure = Figure(figsize=(columns * size[0], rows * size[1]), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options).flatten()
    for empty in axes[panels:]:
        empty.axis("off")
    return figure, axes[:panels]


def save(figure, path):
    """A PNG is small: a palette in place of all the shades of the letters' edges."""
    if not str(path).endswith(".png"):
        return figure.savefig(path)
    from PIL import Image  # matplotlib depends on it

    image = io.BytesIO()
    figure.savefig(image, dpi=120)
    Image.open(image).convert("RGB").quantize(64).save(path, optimize=True)


def raster(path, title, watcher, events):
    """Tokens by neurons, and the membranes of the three neurons that fire closest to 30%."""
    figure, (above, below) = sheet(2, (9, 3.5), 1, sharex=True, height_ratios=(2, 1))
    start, lively = 0, []
    for i, (layer, shown) in enumerate(zip(watcher.layers, watcher.shown)):
        rate = sum(event["rate"][i] for event in events) / len(events)
        dots = [(t, start + row) for t, event in enumerate(events) for row in event["fired"][i]]
        x, y = zip(*dots) if dots else ((), ())
        style = dict(color=f"C{i % 10}", marker=MARKERS[i % 5], linewidths=0)
        above.scatter(x, y, 5, label=f"layer {layer.name}: {rate:.0%} fire", **style)
        for row in range(len(shown) if layer.theta is not None else 0):
            rate = sum(row in event["fired"][i] for event in events) / len(events)
            lively.append((abs(rate - 0.3), i, row))
        start += len(shown)
    for k, (_, i, row) in enumerate(sorted(lively)[:3]):
        layer, n = watcher.layers[i], watcher.shown[i][row]
        v, style = [event["membrane"][i][row] for event in events], dict(color=COLOURS[k], lw=1)
        below.plot(v, LINES[k], label=f"layer {layer.name}, neuron {n}", **style)
        below.axhline(layer.theta[n].item(), linestyle=":", **style)
    below.plot([], [], "k:", label="threshold")
    above.set(title=f"Spikes of {title}", ylabel="neuron", xlim=(-1, len(events)))
    below.set(title="Membranes before the reset", ylabel="membrane", xlabel="token (a time step)")
    words = [printable(event["text"]).replace("$", r"\$") for event in events]
    turned = 90 * (max(map(len, words)) > 2)
    below.set_xticks(range(len(events)), words, fontsize=6, rotation=turned)
    below.legend(fontsize=7, ncols=4)
    figure.legend(*above.get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    save(figure, path)


def neurons(path, title, watcher, events):
    """Every neuron a dot: its area is the weight that it sends out, its colour the gene program
    that it follows or, where there are none, its firing rate."""
    figure, panels = sheet(len(watcher.layers), (4.4, 4.2))
    for layer, total, axes in zip(watcher.layers, watcher.total, panels):
        N, n = len(layer.out), torch.arange(len(layer.out))
        # a sunflower: seed n at sqrt(n), one golden angle further
        x, y = n.sqrt() * torch.cos(2.39996 * n), n.sqrt() * torch.sin(2.39996 * n)
        area = (2e4 / N * (layer.out / layer.out.max()).square())[layer.order]
        if layer.program is None:
            dots = axes.scatter(x, y, area, total / watcher.seen, cmap="cividis_r")
            figure.colorbar(dots, ax=axes, label="firing rate, spikes per token", shrink=0.7)
        for k, name in enumerate(PROGRAMS if layer.program is not None else ()):
            own = layer.program[layer.order] == k
            label = f"{name.replace('_', ' ')} ({int(own.sum())})"
            axes.scatter(x[own], y[own], area[own], f"C{k}", label=label, linewidths=0)
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, fontsize=7)
        axes.set(title=f"layer {layer.name}: {N} neurons", aspect="equal", xticks=[], yticks=[])
    figure.suptitle(f"{title}. Area of a dot: norm of its outgoing weights", fontsize=9)
    save(figure, path)


def rates(path, title, watcher, events):
    """How often the neurons of each layer fire: dead and saturated ones stand out."""
    figure, panels = sheet(len(watcher.layers), (4, 2.8))
    for layer, total, axes in zip(watcher.layers, watcher.total, panels):
        rate = (total / watcher.seen).tolist()
        axes.hist(rate, [k / 20 for k in range(21)], color=COLOURS[2], ec="white", log=True)
        for x, marker, word in ((0, "ko", "never"), (1, "kv", "always")):
            count = rate.count(x)
            axes.plot([x], [count or math.nan], marker, label=f"{count} {word} fire")
        mean = sum(rate) / len(rate)
        axes.axvline(mean, color=COLOURS[1], linestyle="--", label=f"mean {mean:.1%}")
        axes.set(title=f"layer {layer.name}", xlabel="spikes per token", ylabel="neurons")
        axes.legend(fontsize=7)
    figure.suptitle(f"Firing rates of {title}, {watcher.seen} tokens", fontsize=9)
    save(figure, path)


def curves(axes, title, logs, key="tokens"):
    """Held-out bits per byte of [(label, log.jsonl's lines)] against training tokens or minutes."""
    unit, words = {"tokens": (1e6, "tokens, millions"), "minutes": (1, "minutes")}[key]
    for k, (label, log) in enumerate(logs):
        log = [line for line in log if line["tokens"]]  # untrained it would dwarf the rest
        x, y = [line[key] / unit for line in log], [line["bpb"] for line in log]
        style = dict(color=COLOURS[k % 6], label=label, markersize=3)
        axes.plot(x, y, LINES[k % 4] + MARKERS[k % 5], **style)
    axes.set(title=title, xlabel=f"training {words}", ylabel="held-out text, bits/byte")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def loss(path, found):
    """The curves of what `runs` found."""
    if not any(run["log"] for run in found):
        raise ValueError("loss.png needs --run=FOLDER of a run of train.py, with a log.jsonl")
    figure, panels = sheet(2, (5, 4), sharey=True)
    for axes, key in zip(panels, ("tokens", "minutes")):
        curves(axes, f"Loss against {key}", [(run["name"], run["log"]) for run in found], key)
    save(figure, path)


PICTURES = {"raster": raster, "neurons": neurons, "rates": rates}


def picture(path, speaker, name, c):
    """Draw what the file is named after, while the model goes on from --prompt."""
    watcher = Watcher(speaker.model, speaker.tokenizer, c)
    if not watcher.layers:
        raise ValueError(f"{name} has no spiking neurons to draw")
    events = list(watcher.speak(c.prompt, c.max_new_tokens, c.temperature))
    PICTURES[Path(path).stem](path, name, watcher, events)
