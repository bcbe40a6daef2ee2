"""A model that writes, and two ways to watch its neurons: a page, spikes in the terminal.

sample.py is its command line; experiments/pictures.py draws what is seen here. The page is
page.html; `Page` answers its requests. `neurons_of` and `Layer` know how a block names neurons.
"""

import codecs
import itertools
import json
import math
import re
import shutil
import sys
import threading
import time
import unicodedata
from contextlib import suppress
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

SHOWN, ROWS = 128, 384  # neurons shown of a layer at most; of all about, but of each at least 16


class Layer:
    """N spiking neurons. A theta or beta that depends on the input, or is not known, is None."""

    def __init__(self, name, part, index, weight, neurons):
        self.name, self.part, self.index = name, part, index  # where in the part's state
        self.out = weight.float().norm(dim=1).cpu()  # (N,) of what their spikes go through
        self.levels, self.program, N = [1], None, len(weight)  # thresholds, in theta
        self.resets = isinstance(neurons, Block) and neurons.config.reset == "soft"  # by theta
        logit = getattr(neurons, "w" if isinstance(neurons, PLIF) else "beta_logit", None)
        beta = getattr(neurons, "beta", None) if logit is None else logit.sigmoid()
        theta = getattr(neurons, "theta", None)
        if isinstance(neurons, Population):  # graded
            self.levels = [k for k in range(-len(theta) * neurons.signed, len(theta) + 1) if k]
            theta = theta[0].expand(N)
        elif genes := getattr(neurons, "modulation", None):
            theta, beta, _ = genes()
            self.program = genes.P.view(N, DRAWS, -1).mean(1).argmax(1).cpu()  # (N,) the main one
        self.theta, self.beta = (x if x is None else x.cpu() for x in (theta, beta))  # (N,)
        order = torch.zeros(N) if self.program is None else self.program
        self.order = order.argsort(stable=True)  # neurons of a gene program stand together

    def membrane(self, state):
        """(N,) at the last token, before the reset; NeuronSpark's: after the last frame."""
        held = [x[0].cpu() for x in tensors(state[self.part]) if x.dim() == 2]
        if not self.resets:
            return held[self.index]
        v, s = held[2 * self.index : 2 * self.index + 2]  # as `lif` returns them
        return v if self.theta is None else v + self.theta * s


def tensors(state):
    """The tensors of a state, however nested."""
    if torch.is_tensor(state):
        return [state]
    parts = state.values() if isinstance(state, dict) else state or ()
    return [x for part in parts for x in tensors(part)]


def neurons_of(part):
    """[(name, weights in a row per neuron, what has theta and beta)] of the layers of a part."""
    if not getattr(part, "sites", ()):  # it has no spikes
        return []
    if isinstance(part, SNNBlock):
        rows = torch.ones(len(part.mix.q.gain), 1)  # each spike reads or writes one
        fed = [part.w_in.weight, rows, rows, part.mix.w_o.weight, part.w_out.weight]
        names = "in", "query", "key", "found", "hidden"
        return list(zip(names, fed, part.populations.values()))
    if isinstance(part, SparkBlock):
        (first, f), (second, g) = ((half, half.inner) for half in part.halves)
        rows = [x.weight.t() for x in (f.w_in, f.w_out, g.w_gate, g.w_down)]
        rows[3] = rows[3].repeat(2, 1)  # its neurons meet in pairs
        names = "in", "hidden", "in 2", "hidden 2"
        return list(zip(names, rows, (first.neurons, f, second.neurons, g.neurons)))
    if isinstance(part, SparkOutput):
        return [("output", part.w.weight.t(), part.neurons)]
    w = getattr(part, "w_rec", None)
    return [("", torch.ones(n, 1) if w is None else w, part) for n in part.sites]


@torch.no_grad()
def layers(model):
    """The spiking layers, in the order in which they report their rates."""
    parts = {key: neurons_of(part) for key, part in model.parts.items()}
    if model.head is not None and model.config.spikes:
        parts["readout"] = [("output", model.embedding.weight.t(), model.head)]
    found = []
    for key, told in parts.items():
        number = f"{int(key[5:]) + 1} " if key.startswith("block") else ""
        found += [Layer((number + x[0]).strip(), key, k, *x[1:]) for k, x in enumerate(told)]
    for layer in found:
        n = min(SHOWN, max(16, ROWS // len(found)), N := len(layer.out))
        layer.shown = layer.order[torch.arange(n) * N // n]  # evenly taken from all
    return found


# ---- a model that speaks, and one that is watched -----------------------------------------------


class Speaker:
    """A model, its tokenizer and the state of what has been said so far. c: a SampleConfig."""

    AT_ONCE = 512  # tokens of a prompt, so that a long one takes no more memory
    READ = ("state", "logits", "seen", "wrote", "fired", "synops")  # what reading a token changes

    def __init__(self, model, tokenizer, c):
        self.model, self.tokenizer, self.c = model, tokenizer, c
        self.forget()

    def forget(self):
        """Back to silence, and to the first of the draws."""
        self.generator = torch.Generator(self.model.stress.device).manual_seed(self.c.seed)
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.state, self.logits, self.seen, self.stopping = None, None, 0, False

    def read(self, ids, own):
        """Run tokens. Returns an event: their text, and whether the model wrote them."""
        tokens = torch.tensor([ids], device=self.generator.device)
        logits, self.state, self.report = self.model(tokens, self.state)
        self.logits = logits[:, -1, : self.tokenizer.vocab_size].float()
        self.seen += len(ids)
        self.wrote += own
        if own and self.report.rates:
            self.fired += torch.cat(self.report.rates).mean().item()
            self.synops += sum(triggered.item() for triggered, _ in self.report.synapses)
        return {"own": own, "text": self.decoder.decode(self.tokenizer.decode_bytes(ids))}

    @torch.no_grad()
    def speak(self, text, n, temperature, chat=False):
        """Yield the events of the text, and of at most n tokens more that the model writes. In a
        chat the text is what the user says, and the answer ends before the user's next turn; it
        always ends before the end token. The state has not seen what it ends before."""
        self.stopping, c, encode = False, self.c, self.tokenizer.encode
        self.wrote, self.fired, self.synops = 0, 0.0, 0.0  # of this turn: live rates
        until = "\n" + YOU.rstrip() if chat else None
        text = "\n" * (self.seen > 0) + turn(text) if chat else text
        ids = [self.tokenizer.end] * (self.state is None) + encode(text)
        for at in range(0, len(ids), self.AT_ONCE):
            if not self.stopping:
                yield self.read(ids[at : at + self.AT_ONCE], own=False)
        held = []  # (event, what was before it): what may be the start of `until`
        while n > 0 and not self.stopping:
            n, before = n - 1, {name: getattr(self, name) for name in self.READ}
            logits = self.logits.clone()
            if c.repetition != 1:  # what this turn said becomes less likely (Keskar et al. 2019)
                said = logits[:, ids]
                logits[:, ids] = torch.where(said > 0, said / c.repetition, said * c.repetition)
            token = pick(logits, temperature, c.top_k, c.top_p, self.generator).item()
            if token == self.tokenizer.end:
                break
            ids.append(token)
            held.append((self.read([token], own=True), before))
            said = "".join(event["text"] for event, _ in held)
            if until and until in said:  # undo every token that reaches into `until`
                whole = said[: said.find(until)]
                while len(said) > len(whole):
                    event, before = held.pop()
                    vars(self).update(before)
                    said = said[: len(said) - len(event["text"])]
                self.decoder.reset()  # and say again what the last of them held before it
                held += [(self.read([i], own=True), None) for i in encode(whole[len(said) :])]
                break
            if not until or not any(said.endswith(until[:k]) for k in range(1, len(until))):
                yield from (event for event, _ in held)
                held = []
        yield from (event for event, _ in held)


class Watcher(Speaker):
    """A Speaker that runs every token alone; its events tell what each neuron did."""

    AT_ONCE = 1

    def __init__(self, model, tokenizer, c):
        self.layers = layers(model)
        super().__init__(model, tokenizer, c)

    def forget(self):
        super().forget()
        for layer in self.layers:
            layer.total = torch.zeros_like(layer.out)  # spikes per neuron

    def read(self, ids, own):
        """Run one token: how surprising it was, and what it did."""
        start, event = time.perf_counter(), {"likely": [], "rate": [], "fired": [], "membrane": []}
        if self.logits is not None:
            nats = -self.logits.log_softmax(-1)[0]
            event["bits"] = round(nats[ids[0]].item() / math.log(2), 3)
            for i in nats.topk(min(5, len(nats)), largest=False).indices.tolist():
                text = self.tokenizer.decode([i]) if i != self.tokenizer.end else "(end)"
                event["likely"].append([text, round(math.exp(-nats[i]), 4)])
        event |= super().read(ids, own)
        event |= {"seen": self.seen, "macs": self.report.macs}
        for layer, rate in zip(self.layers, (rate.cpu() for rate in self.report.rates)):
            layer.total += rate
            event["rate"].append(round(rate.mean().item(), 4))
            event["fired"].append((rate[layer.shown] > 0).nonzero()[:, 0].tolist())
            v = layer.membrane(self.state)[layer.shown]
            event["membrane"].append([round(x, 2) for x in v.tolist()])
        event["synops"] = round(sum(float(triggered) for triggered, _ in self.report.synapses))
        event["synapses"] = sum(every for _, every in self.report.synapses)
        event["state_bytes"] = sum(x.nbytes for x in tensors(self.state))
        return event | {"seconds": round(time.perf_counter() - start, 5)}

    def describe(self):
        """What the page has to know of the model."""
        weights, told = list(self.model.parameters()), []
        for layer in self.layers:
            told.append({"name": layer.name, "levels": layer.levels, "resets": layer.resets})
            told[-1]["shown"] = layer.shown.tolist()
            for key in ("theta", "beta", "program"):
                values = getattr(layer, key)
                told[-1][key] = None if values is None else values[layer.shown].tolist()
        about = {"block": self.model.config.block, "parameters": sum(w.numel() for w in weights)}
        about |= {"weight_bytes": sum(w.nbytes for w in weights), "layers": told}
        return about | {"programs": [name.replace("_", " ") for name in PROGRAMS]}


def watched(speaker, name, c):
    """A Watcher, and its events as it reads --prompt and goes on from there."""
    watcher = Watcher(speaker.model, speaker.tokenizer, c)
    if not watcher.layers:
        raise ValueError(f"{name} has no spiking neurons to look at")
    return watcher, watcher.speak(c.prompt, c.max_new_tokens, c.temperature)


# ---- the page ----------------------------------------------------------------------------------

BODY, TEXT, TOKENS = 65536, 4000, 1000  # bytes of a request, characters, tokens to write, at most
TABS = 16  # of browsers, that are remembered
ROUTES = {"/": "GET", "/model": "GET", "/run": "GET"}
ROUTES |= {"/think": "POST", "/stop": "POST", "/forget": "POST"}


class Refused(Exception):
    """A request that is not answered: an HTTP status and one line."""


def refuse(is_wrong, *why):
    if is_wrong:
        raise Refused(*why)


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
        self.run, self.tabs, self.lock, self.writing = c.run, {}, threading.Lock(), threading.Lock()
        self.about = {"name": name, "examples": examples, "run": c.run, "tokens": c.max_new_tokens}
        self.about |= {"temperature": c.temperature} | self.watcher().describe()
        self.hosts = [f"{host}:{self.server_address[1]}" for host in ("127.0.0.1", "localhost")]

    def tab(self, session):
        """The Watcher of a tab; that of the tab that asked longest ago is dropped."""
        is_name = isinstance(session, str) and re.fullmatch("[A-Za-z0-9-]{8,64}", session)
        refuse(not is_name, 400, "session must be 8 to 64 letters, digits or -")
        with self.lock:
            self.tabs[session] = self.tabs.pop(session, None) or self.watcher()
            if len(self.tabs) > TABS:
                del self.tabs[next(iter(self.tabs))]
            return self.tabs[session]

    def handle_error(self, request, client_address):
        print("page:", repr(sys.exc_info()[1]), file=sys.stderr)  # a line, no traceback


class Page(BaseHTTPRequestHandler):
    """Answers one request. What is refused gets a line of JSON."""

    server_version, sys_version, timeout = "page", "", 30

    def do_GET(self):
        try:
            asked = self.asked()
            if self.path == "/":
                self.send(Path(__file__).with_name("page.html").read_bytes(), "text/html")
            elif self.command == "GET":
                self.tell(self.server.about if self.path == "/model" else runs(self.server.run))
            else:
                self.act(self.server.tab(asked.get("session")), asked)
        except Refused as refused:
            self.send_error(*refused.args)

    do_POST = do_GET

    def asked(self):
        """The JSON object that was sent, if one has to be."""
        host, size = (self.headers.get(key, "") for key in ("Host", "Content-Length"))
        refuse(host not in self.server.hosts, 403, "this page is for 127.0.0.1 only")
        refuse(self.path not in ROUTES, 404, "there is no such page")
        refuse(self.command != ROUTES[self.path], 405, f"{self.path} takes {ROUTES[self.path]}")
        if self.command == "GET":
            return None
        is_json = self.headers.get_content_type() == "application/json"  # no foreign form is
        refuse(not is_json, 415, "send application/json")
        refuse(not re.fullmatch("[0-9]{1,9}", size), 411, "send a Content-Length")
        refuse(int(size) > BODY, 413, f"a request has at most {BODY} bytes")
        with suppress(ValueError, RecursionError):
            if isinstance(asked := json.loads(self.rfile.read(int(size))), dict):
                return asked
        raise Refused(400, "the request is no JSON object")

    def act(self, tab, asked):
        """Change the state of a tab; only one at a time."""
        if self.path == "/stop":
            tab.stopping = True
            return self.tell({})
        is_free = self.server.writing.acquire(blocking=False)
        refuse(not is_free, 429, "the model is writing: stop it, or try again in a moment")
        try:
            if self.path == "/think":
                return self.think(tab, asked)
            tab.forget()
        finally:
            self.server.writing.release()
        self.tell({})

    def think(self, tab, asked):
        text, n, heat = (asked.get(key) for key in ("text", "tokens", "temperature"))
        is_fine = isinstance(text, str) and len(text) <= TEXT and type(n) is int
        is_fine = is_fine and 0 <= n <= TOKENS and type(heat) in (int, float) and 0 <= heat <= 5
        wanted = f"text of at most {TEXT} characters, 0 to {TOKENS} tokens, a temperature of 0 to 5"
        refuse(not is_fine, 400, f"send {wanted}")
        try:
            tab.tokenizer.encode(text.encode().decode())  # not half a character
        except (DataError, UnicodeError) as error:
            raise Refused(400, " ".join(str(error).split())) from None
        with suppress(OSError):  # the reader left
            self.stream(tab.speak(text, n, heat, bool(asked.get("chat"))))

    def stream(self, events):
        """Server-sent events, a line of JSON each, until they end or the reader leaves."""
        self.send(b"", "text/event-stream")
        last = {"done": True}
        try:
            for event in events:
                self.wfile.write(b"data: " + json.dumps(event, allow_nan=False).encode() + b"\n\n")
        except (ValueError, RuntimeError) as error:  # of the model
            last["error"] = str(error).splitlines()[0]
        self.wfile.write(b"data: " + json.dumps(last).encode() + b"\n\n")

    def send(self, content, kind, status=200):
        """Headers and content; without any it is a stream, which ends with the connection."""
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        if content:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def tell(self, value, status=200):
        self.send(json.dumps(value).encode() + b"\n", "application/json", status)

    def send_error(self, code, message=None, explain=None):  # http.server calls it too
        self.tell({"error": message or "bad request"}, 405 if code == 501 else code)

    def log_message(self, *args):
        pass


def runs(folders):
    """[{name, log}] of folders of train.py, between blanks."""
    found = []
    for folder in folders.split():
        found.append({"name": Path(folder).name, "log": []})
        with suppress(OSError, ValueError):  # not there yet, or half a line at its end
            for line in (Path(folder).expanduser() / "log.jsonl").read_text().splitlines():
                found[-1]["log"].append(json.loads(line))
    return found


def serve(speaker, name, c, examples=()):
    """Answer the browser until Ctrl-C."""
    with Server(speaker, name, c, examples) as server:
        print(f"http://{server.hosts[0]}  (Ctrl-C ends)", flush=True)
        server.serve_forever()


# ---- the terminal ------------------------------------------------------------------------------


def printable(text):
    return "".join(x if x.isprintable() else " " for x in text)


def spikes(speaker, name, c):
    """Print what the model writes. Below each line every layer has two rows of blocks, hence four
    neurons: half a block is lit where its neuron fires."""
    (watcher, events), blocks = watched(speaker, name, c), " ▀▄█"
    try:
        blocks.encode(sys.stdout.encoding or "ascii")
    except (UnicodeError, LookupError):
        blocks = " '.:"
    heads = [head for layer in watcher.layers for head in (layer.name, "")]
    edge = max(map(len, heads)) + 1
    room = max(20, shutil.get_terminal_size().columns - edge - 1)
    line, rows, is_over = "", [""] * len(heads), False
    for event in itertools.chain(events, [None]):
        text = printable(event["text"].strip("\n")) if event else ""
        width = sum(1 + (unicodedata.east_asian_width(x) in "WF") for x in text)
        if rows[0] and (is_over or not event or len(rows[0]) + width > room):
            print(" " * edge + line)
            for head, row in zip(heads, rows):
                print(f"{head:>{edge - 1}} {row}".rstrip())
            line, rows = "", [""] * len(heads)
        line += text
        is_over = event and "\n" in event["text"]
        for k in range(len(rows) if event else 0):
            fired, n = event["fired"][k // 2], len(watcher.layers[k // 2].shown)
            upper, lower = ((k % 2 * 2 + half) * n // 4 in fired for half in (0, 1))
            rows[k] += blocks[upper + 2 * lower] * width
