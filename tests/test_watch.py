"""watch.py and page.html: what is shown is what the neurons did; the page keeps its manners."""

import base64
import fcntl
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import sample
import watch
from checkpoint import VERSION
from data import turn
from lif import Report
from sample import SampleConfig
from test_model import CONFIGS, in_the_repository, model_of, shrunk  # noqa: F401
from tokenizer import Bytes, Chars
from watch import Server, Watcher

ROOT, BYTE = Path(__file__).parent.parent, Bytes()


def watcher_of(name="sam_6m.py", c=SampleConfig(device="cpu"), **more):
    return Watcher(model_of(shrunk(name, vocab_size=257, noise=0.0, **more)), BYTE, c)


def checkpoint(path):
    model = watcher_of().model
    saved = {"version": VERSION, "model": model.state_dict(), "config": asdict(model.config)}
    torch.save(saved | {"tokenizer": BYTE.state(), "position": {"step": 7}}, path)
    return path


# ---- what is shown is what the neurons did -------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_a_neuron_fires_where_its_membrane_reaches_its_threshold(name):
    watcher = watcher_of(name)
    events = list(watcher.speak("Once upon a time", 20, 1.0))
    assert len(events) == 37
    assert [len(layer.out) for layer in watcher.layers] == watcher.model.sites
    spikes = 0
    for i, (layer, shown) in enumerate(zip(watcher.layers, watcher.shown)):
        spikes += watcher.total[i].sum()
        assert layer.out.min() > 0
        if watcher.model.config.block == "spark":  # several frames within a token
            continue
        theta, beta = layer.theta.tolist(), layer.beta
        assert ((0 < beta) & (beta < 1)).all()
        for event in events:
            fired = set(event["fired"][i])
            assert event["rate"][i] == pytest.approx(len(fired) / len(shown), abs=1e-3)
            for row, n in enumerate(shown.tolist()):
                v = event["membrane"][i][row]
                v = abs(v) if layer.levels[0] < 0 else v
                assert (v >= theta[n]) == (row in fired) or abs(v - theta[n]) < 0.006
    assert spikes > 0 or watcher.model.config.block == "gpt"


def test_the_numbers_are_those_of_the_model():
    """Against one pass over the whole text."""
    watcher, text = watcher_of(), b"the cat"
    events = list(watcher.speak(text.decode(), 0, 1.0))
    with torch.no_grad():
        logits, _, report = watcher.model(torch.tensor([[BYTE.end, *text]]))
    p = logits[0].softmax(-1)
    assert "bits" not in events[0] and events[0]["text"] == "" and events[0]["likely"] == []
    for t, byte in enumerate(text):
        event = events[t + 1]
        assert 2 ** -event["bits"] == pytest.approx(p[t, byte].item(), rel=1e-3)
        assert event["text"] == chr(byte) and not event["own"] and event["seen"] == t + 2
        assert [q for _, q in event["likely"]] == pytest.approx(
            p[t].topk(5).values.tolist(), abs=1e-4
        )
    for total, rate in zip(watcher.total, report.rates):
        torch.testing.assert_close(total / len(events), rate)
    synops = sum(event["synops"] for event in events) / len(events)
    assert synops == pytest.approx(float(sum(x for x, _ in report.synapses)), rel=0.02)
    assert events[0]["synapses"] == sum(x for _, x in report.synapses) and events[0]["macs"] == report.macs


def test_it_says_what_sample_says(capsys, tmp_path):
    ask = f"--ckpt={checkpoint(tmp_path / 'best.pt')}", "--prompt=The", "--max_new_tokens=15"
    sample.main([*ask, "--device=cpu"])
    events = list(watcher_of(c=SampleConfig(device="cpu")).speak("The", 15, 0.7))
    assert capsys.readouterr().out.strip("\n") == "".join(e["text"] for e in events).strip("\n")


def test_neurons_of_a_program_stand_together_and_large_layers_are_thinned():
    whale = watcher_of("spikewhale_6m.py", n_hidden=300)
    for layer, shown in zip(whale.layers, whale.shown):
        program = layer.program[shown].tolist()
        assert program == sorted(program) and len(set(program)) == 6
        assert len(shown) == watch.SHOWN == len(set(shown.tolist()))
    about = whale.describe()
    assert about["programs"][about["layers"][0]["program"][0]] == "cell division"
    many = watcher_of("sam_6m.py", n_layer=12, n_hidden=64)
    assert {len(shown) for shown in many.shown} == {watch.ROWS // 12}


class Scripted(torch.nn.Module):
    """Writes the given bytes. Its state is the list of the tokens that it has seen."""

    sites, parts, head, config = [], {}, None, SimpleNamespace(block="gpt")

    def __init__(self, text):
        super().__init__()
        self.text, self.stress = text, torch.ones(())

    def forward(self, tokens, state=None):
        before = state["seen"].tolist() if state else []
        seen = bytes(before + [x for x in tokens[0].tolist() if x < 256])
        said = seen.partition(b"Sam:")[2]
        logits = torch.zeros(1, 1, 257)
        logits[0, 0, self.text[len(said)] if said == self.text[: len(said)] else 32] = 99.0
        return logits, {"seen": torch.tensor(list(seen), dtype=torch.uint8)}, Report()


@pytest.mark.parametrize(
    "text", [b" Hi.\nYou: what", b" a\nb\n\nYou: c", b"\nYou:", b" \nYo\nYou:"]
)
def test_a_turn_of_a_chat_ends_before_the_next_one(text):
    watcher = Watcher(Scripted(text + b" " * 99), BYTE, SampleConfig(device="cpu"))
    until, asked = "\nYou:", turn("hello")
    events = list(watcher.speak(asked, 60, 0.0, until))
    said = "".join(event["text"] for event in events if event["own"])
    assert said == text.decode().split(until)[0]
    assert (
        bytes(watcher.state["seen"].tolist()).decode() == turn("hello") + said
    )  # it forgot what it did not say
    assert watcher.seen == len(events) == 1 + len(asked) + len(said)
    cut = Watcher(Scripted(text + b" " * 99), BYTE, SampleConfig(device="cpu"))
    events = list(cut.speak(asked, 2, 0.0, until))  # what was held back is shown at the end
    assert "".join(event["text"] for event in events if event["own"]) == text.decode()[:2]


# ---- the server ----------------------------------------------------------------------------------


@contextmanager
def serving(name="sam_6m.py", **settings):
    """A server of an untrained model; server.ask sends a request: (status, content)."""
    watcher = watcher_of(name)
    settings = dict(device="cpu", port=0) | settings
    with Server(watcher, "best.pt", SampleConfig(**settings), ["Hello."]) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()

        def ask(method, path, body=None, **headers):
            link = http.client.HTTPConnection(*server.server_address, timeout=30)
            if isinstance(body, dict):
                body, headers = json.dumps(body), {"Content-Type": "application/json"} | headers
            link.request(method, path, body, headers)
            answer = link.getresponse()
            return answer.status, answer.read().decode()

        server.ask = ask
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


THINK = {"session": "a" * 8, "text": "The", "tokens": 12, "temperature": 0.7}


def events_of(answer):
    """The events of a stream, which must have ended well."""
    status, text = answer
    *events, last = [json.loads(line.removeprefix("data: ")) for line in text.strip().split("\n\n")]
    assert status == 200 and last == {"done": True}
    return events


def without_time(events):
    return [{k: v for k, v in event.items() if k != "seconds"} for event in events]


def test_the_page_stands_alone():
    page = (ROOT / "page.html").read_text()
    assert not re.search(r"https?://|src=|@import|url\(", page), "it fetches something"
    for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "srcdoc"):
        assert word not in page, "text goes through textContent"
    with serving() as server:
        assert server.server_address[0] == "127.0.0.1"
        assert server.ask("GET", "/") == (200, page)
        status, model = server.ask("GET", "/model")
        model = json.loads(model)
        assert status == 200 and [len(layer["shown"]) for layer in model["layers"]] == [32, 32]
        assert model["name"] == "best.pt" and model["examples"] == ["Hello."]


def test_tabs_have_states_of_their_own():
    with serving() as server:
        first = events_of(server.ask("POST", "/think", THINK))
        same = watcher_of().speak("The", 12, 0.7)
        assert without_time(first) == without_time(json.loads(json.dumps(list(same))))
        more = events_of(server.ask("POST", "/think", THINK))
        assert more[0]["seen"] == 17 and more != first  # it goes on from its state
        other = events_of(server.ask("POST", "/think", THINK | {"session": "b" * 8}))
        assert without_time(other) == without_time(first)
        assert server.ask("POST", "/forget", {"session": "a" * 8})[0] == 200
        again = events_of(server.ask("POST", "/think", THINK))
        assert without_time(again) == without_time(first)
        chat = events_of(server.ask("POST", "/think", THINK | {"chat": True, "tokens": 0}))
        assert "".join(event["text"] for event in chat) == "\nYou: The\nSam:"
        for i in range(watch.STATES):
            server.ask("POST", "/stop", {"session": f"session-{i}"})
        assert len(server.tabs) == watch.STATES and "a" * 8 not in server.tabs


JSON = {"Content-Type": "application/json"}
BAD = [
    ("GET", "/nothing", None, {}, 404),
    ("GET", "/../model.py", None, {}, 404),
    ("GET", "/think", None, {}, 405),
    ("POST", "/model", "{}", JSON, 405),
    ("PUT", "/think", "{}", JSON, 405),
    ("GET", "/", None, {"Host": "evil.example"}, 403),
    ("GET", "/", None, {"Host": "127.0.0.1"}, 403),
    ("POST", "/think", "{}", JSON | {"Origin": "http://evil.example"}, 403),
    ("POST", "/think", "{}", JSON | {"Origin": "null"}, 403),
    ("POST", "/think", "{}", {"Content-Type": "text/plain"}, 415),
    ("POST", "/think", "{}", JSON | {"Content-Length": "x"}, 411),
    ("POST", "/think", "{}", JSON | {"Content-Length": "-1"}, 411),
    ("POST", "/think", " " * 70000, JSON, 413),
    ("POST", "/think", "{", JSON, 400),
    ("POST", "/think", "[]", JSON, 400),
    ("POST", "/think", b"\xff\xfe", JSON, 400),
    ("POST", "/think", "[" * 60000, JSON, 400),
    ("POST", "/think", '{"session": 7}', JSON, 400),
    ("POST", "/think", '{"session": "../../etc"}', JSON, 400),
]
BAD += [
    ("POST", "/think", json.dumps(THINK | wrong), JSON, 400)
    for wrong in (
        {"session": ""}, {"text": 7}, {"text": "x" * 4001}, {"text": "\ud800"}, {"tokens": -1},
        {"tokens": 1.5}, {"tokens": True}, {"tokens": 10**9}, {"temperature": "hot"},
        {"temperature": -1}, {"temperature": float("nan")}, {"temperature": 1e400},
    )
]  # fmt: skip


def test_bad_requests_are_a_line_of_json(capsys):
    with serving() as server:
        for method, path, body, headers, status in BAD:
            got, text = server.ask(method, path, body, **headers)
            assert got == status and text.count("\n") == 1, (method, path, body, headers, got, text)
            assert json.loads(text)["error"] and "Traceback" not in text
        for raw in (
            b"nonsense\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            b"GET " + b"x" * 70000,
            b"\0" * 9,
        ):
            with socket.create_connection(server.server_address, timeout=30) as link:
                link.sendall(raw + b"\r\n\r\n")
                assert "error" in json.loads(link.makefile("rb").read().split(b"\r\n\r\n")[-1])
        assert events_of(server.ask("POST", "/think", THINK))  # and it is still there
    assert "Traceback" not in capsys.readouterr().err


def test_an_unknown_character_is_a_bad_request():
    with serving() as server:
        server.watcher = lambda: Watcher(watcher_of().model, Chars("abc "), server.c)
        status, text = server.ask("POST", "/think", THINK | {"text": "ab\u00e9"})
        assert status == 400 and "not in this char tokenizer's vocabulary" in text


def test_how_many_may_write_at_once():
    with serving() as server:
        tab = server.tab("a" * 8)
        with tab.busy:
            for path in ("/think", "/forget"):
                assert server.ask("POST", path, THINK)[0] == 409
        for _ in range(watch.SPEAKING):
            assert server.speaking.acquire(blocking=False)
        assert server.ask("POST", "/think", THINK)[0] == 429
        server.speaking.release()
        assert events_of(server.ask("POST", "/think", THINK))  # every refusal gave its lock back


def slowly(monkeypatch):
    read = Watcher.read
    monkeypatch.setattr(Watcher, "read", lambda *a, **k: time.sleep(0.005) or read(*a, **k))


def wait_for(true, seconds=20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_it_stops_when_the_reader_leaves_or_says_so(monkeypatch):
    slowly(monkeypatch)
    body = json.dumps(THINK | {"tokens": 1000})
    with serving() as server:
        link = http.client.HTTPConnection(*server.server_address, timeout=30)
        link.request("POST", "/think", body, JSON)
        answer = link.getresponse()
        assert answer.readline().startswith(b"data: ")
        answer.close()
        link.close()
        tab = server.tab("a" * 8)
        wait_for(lambda: not tab.busy.locked())
        assert tab.seen < 500

        said = []
        thread = threading.Thread(
            target=lambda: said.append(server.ask("POST", "/think", body, **JSON))
        )
        tab.forget()
        thread.start()
        wait_for(lambda: tab.seen > 8)
        assert server.ask("POST", "/stop", THINK)[0] == 200
        thread.join(20)
        events = events_of(said[0])
        assert len(events) == tab.seen < 500  # the page knows all that the state has seen


def test_a_mistake_of_the_model_is_told(monkeypatch):
    with serving() as server:

        def broken(*args):
            raise ValueError("the model's logits are not numbers\nsecond line")

        monkeypatch.setattr(watch, "pick", broken)
        last = server.ask("POST", "/think", THINK)[1].strip().split("\n\n")[-1]
        assert json.loads(last[6:]) == {"done": True, "error": "the model's logits are not numbers"}


def test_a_taken_port_is_one_line(tmp_path, capsys):
    ckpt = checkpoint(tmp_path / "best.pt")
    with serving() as server:
        port = server.server_address[1]
        with pytest.raises(SystemExit) as stopped:
            sample.main([f"--ckpt={ckpt}", "--serve", f"--port={port}", "--device=cpu"])
        assert stopped.value.code == 2
    assert f"error: cannot listen on port {port}" in capsys.readouterr().err


LOG = [
    {"step": 0, "tokens": 0, "minutes": 0.0, "bpb": 8.0, "rate": [0.5, 0.5], "samples": ["<b>a"]},
    {"step": 9, "tokens": 4e6, "minutes": 2.5, "bpb": 2.0, "rate": [0.1, 0.2], "samples": ["<b>b"]},
]


@pytest.fixture
def run_folder(tmp_path):
    """A folder of train.py, as it is while a line is being written."""
    lines = "".join(json.dumps(line) + "\n" for line in LOG)
    (tmp_path / "sam_6m").mkdir()
    (tmp_path / "sam_6m" / "log.jsonl").write_text(lines + '{"step": 18, "tok')
    return tmp_path / "sam_6m"


def test_curves_of_a_run(run_folder):
    with serving(run=f"{run_folder} {run_folder}/nothing") as server:
        assert json.loads(server.ask("GET", "/run")[1]) == [
            {"name": "sam_6m", "log": LOG}, {"name": "nothing", "log": []},
        ]  # fmt: skip
    with serving() as server:
        assert json.loads(server.ask("GET", "/run")[1]) == []


# ---- the page in a browser -----------------------------------------------------------------------

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


class Browser:
    """Headless Chromium. It reads commands from file 3 and answers in file 4, JSON and a zero."""

    def __init__(self, folder):
        (here, self.commands), (self.answers, there) = os.pipe(), os.pipe()
        here, there = (fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (here, there))
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        self.process = subprocess.Popen(
            [CHROMIUM, *flags, f"--user-data-dir={folder}", "about:blank"],
            preexec_fn=lambda: (os.dup2(here, 3), os.dup2(there, 4)), close_fds=False,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(here)
        os.close(there)
        self.answers = os.fdopen(self.answers, "rb")
        self.number, self.session, self.complaints = 0, None, []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Page"):
            self(f"{domain}.enable")

    def __call__(self, method, **params):
        self.number += 1
        command = {"id": self.number, "method": method, "params": params}
        command |= {"sessionId": self.session} if self.session else {}
        os.write(self.commands, json.dumps(command).encode() + b"\0")
        while True:
            text = b""
            while not text.endswith(b"\0"):
                byte = self.answers.read(1)
                assert byte, "the browser is gone"
                text += byte
            answer = json.loads(text[:-1])
            if answer.get("id") == self.number:
                return answer["result"]
            entry = answer["params"].get("entry", {}) if "params" in answer else {}
            if answer.get("method", "").startswith("Runtime.") or entry.get("level") == "error":
                self.complaints += [answer] * ("executionContext" not in answer["method"])

    def js(self, code):
        answer = self("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def type(self, text):
        self("Input.insertText", text=text)

    def key(self, key):
        for kind in ("rawKeyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=13)

    def close(self):
        self.process.terminate()
        self.process.wait()
        os.close(self.commands)
        self.answers.close()


@pytest.fixture
def browser(tmp_path):
    if not CHROMIUM:
        pytest.skip("there is no chromium: apt-get install chromium")
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()


# the colours of the cells of a layer at a token, from the pixels of the canvas
CELLS = """(layer, token) => {
  const canvas = $("picture"), scale = canvas.width / canvas.clientWidth;
  return model.layers[layer].shown.map((_, row) => {
    const [x, y] = where(layer, row, token).map((v) => Math.floor(v * scale));
    return [...canvas.getContext("2d").getImageData(x, y, 1, 1).data].join();
  });
}"""


@pytest.mark.parametrize("name", ["sam_6m.py", "spikewhale_6m.py"])
def test_the_page_in_a_browser(browser, name, tmp_path, run_folder):
    text = "<b>Hi</b>"
    with serving(name, max_new_tokens=20, run=str(run_folder)) as server:
        browser("Page.navigate", url=f"http://{server.hosts[0]}/")
        wait_for(lambda: browser.js("typeof model !== 'undefined' && !!model && !$('go').disabled"))
        browser.js("$('prompt').value = ''; $('prompt').focus()")
        browser.type(text)
        browser.key("Enter")
        wait_for(lambda: browser.js("events.length > 20 && !isWriting"))
        browser.js("new Promise((r) => { choose({ token: -1 }); setTimeout(r, 200); })")
        expected = list(watcher_of(name).speak(text, 20, 0.7))
        assert browser.js("$('text').textContent") == "".join(e["text"] for e in expected)
        assert browser.js("$('text').querySelectorAll('b').length") == 0  # text stays text
        first = browser.js("Math.ceil($('brain').scrollLeft / COLUMN)")
        for layer in range(2):
            dark = set()
            for token in range(first, len(expected)):
                cells = browser.js(f"({CELLS})({layer}, {token})")
                lit = set(expected[token]["fired"][layer])
                assert len(cells) == 32
                on = {cell for row, cell in enumerate(cells) if row in lit}
                dark |= {cell for row, cell in enumerate(cells) if row not in lit}
                assert not on & dark, (layer, token)
            assert len(dark) == 1  # one background
        # a neuron that is clicked shows its membrane
        token = len(expected) - 2
        row = expected[token]["fired"][1][0]
        x, y = browser.js(
            f"(() => {{ const [x, y] = where(1, {row}, {token}), box = () => "
            "$('picture').getBoundingClientRect(); scrollBy(0, box().y + y - 200); "
            "return [box().x + x, box().y + y]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            browser("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        neuron = watcher_of(name).shown[1][row]
        assert browser.js("$('neuron').textContent") == f"Layer 2, neuron {neuron}"
        assert "it fired" in browser.js("$('about-neuron').textContent")
        assert "bits of surprise" in browser.js("$('guess').textContent")
        # the run, the tour, the reset
        wait_for(lambda: "2.000 bits/byte" in browser.js("$('progress').textContent"))
        assert "<b>b" in browser.js("$('samples').textContent")
        for step in range(5):
            browser.js(f"tour({step})")
            assert len(browser.js("$('tour-text').textContent")) > 99
        browser.js("tour(5)")
        assert browser.js("$('tour').hidden")
        browser.js("forget()")
        assert browser.js("events.length") == 0 and "silent" in browser.js(
            "new Promise((r) => setTimeout(() => r($('memory').textContent), 200))"
        )
        browser(
            "Emulation.setDeviceMetricsOverride",
            width=390,
            height=844,
            deviceScaleFactor=2,
            mobile=True,
        )
        assert browser.js("document.documentElement.scrollWidth") <= 390  # nothing sticks out
        image = base64.b64decode(browser("Page.captureScreenshot")["data"])
    assert image.startswith(b"\x89PNG") and not browser.complaints, browser.complaints


# ---- the terminal --------------------------------------------------------------------------------


def test_spikes_in_the_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    ask = [f"--ckpt={checkpoint(tmp_path / 'best.pt')}", "--prompt=a\nbc", "--max_new_tokens=0"]
    sample.main([*ask, "--spikes", "--device=cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * (1 + 2 * 2) and lines[0] == "  a" and lines[5] == "  bc"
    events = list(watcher_of().speak("a\nbc", 0, 0.7))
    for i in range(2):
        for row in range(2):
            for column, event in enumerate(events[3:]):
                upper, lower = ((2 * row + k) * 8 in event["fired"][i] for k in range(2))
                line = lines[6 + 2 * i + row].ljust(40)
                assert line[2 + column] == " ▀▄█"[upper + 2 * lower], (i, row, column)
    assert lines[6].startswith("1 ") and lines[6].endswith("%")


def test_spikes_in_a_terminal_without_blocks(tmp_path):
    ask = [f"--ckpt={checkpoint(tmp_path / 'best.pt')}", "--prompt=abc", "--spikes", "--device=cpu"]
    done = subprocess.run(
        [sys.executable, "sample.py", *ask, "--max_new_tokens=40"], cwd=ROOT, capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    out = done.stdout.decode("ascii")
    assert set("'.") & set(out) and "abc" in out


# ---- pictures ------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Call of sample.py -> the figure that it saved."""
    pytest.importorskip("matplotlib")
    figures, save = [], watch.save
    monkeypatch.setattr(watch, "save", lambda f, path: figures.append(f) or save(f, path))

    def draw(name, *flags):
        path = tmp_path / name
        sample.main([f"--picture={path}", "--device=cpu", *flags])
        assert path.stat().st_size > 3000
        return figures[-1]

    return draw


def words_of(figure):
    """What stands at its axes, and in its legends."""
    axes = figure.axes
    words = [w for a in axes for w in (a.get_title(), a.get_xlabel(), a.get_ylabel())]
    legends = [a.get_legend() for a in axes if a.get_legend()] + figure.legends
    return words, [text.get_text() for legend in legends for text in legend.get_texts()]


@pytest.mark.parametrize("name", CONFIGS)
def test_pictures_of_every_config(name, monkeypatch):
    """What is written on them; nothing is rendered, which takes long."""
    pytest.importorskip("matplotlib")
    watcher, figures = watcher_of(name), []
    sites = watcher.model.sites
    if name.startswith("gpt"):
        with pytest.raises(ValueError, match="no spiking neurons"):
            watch.picture("rates.png", watcher, name, watcher.c)
        return
    monkeypatch.setattr(watch, "save", lambda figure, path: figures.append(figure))
    events = list(watcher.speak("The cat", 20, 0.7))
    for draw in watch.PICTURES.values():
        draw("x.png", name, watcher, events)
    raster, neurons, rates = figures
    words, legend = words_of(raster)
    assert len([label for label in legend if "fire" in label]) == len(sites)
    assert "threshold" in legend and {"neuron", "membrane", "token (a time step)"} <= set(words)
    words, legend = words_of(rates)
    assert sum("never fire" in label for label in legend) == len(sites)
    assert words.count("spikes per token") == words.count("neurons") == len(sites)
    words, legend = words_of(neurons)
    assert legend if name.startswith("spikewhale") else "firing rate, spikes per token" in words
    for axes, layer in zip(neurons.axes, watcher.layers):
        areas = [area for dots in axes.collections for area in dots.get_sizes()]
        assert len(areas) == len(layer.out) and min(areas) > 0
        ratio = (layer.out.max() / layer.out.min()).item() ** 2
        assert max(areas) / min(areas) == pytest.approx(ratio, rel=1e-3)
        if layer.program is not None:
            counts = [len(dots.get_offsets()) for dots in axes.collections]
            assert counts == layer.program.bincount(minlength=6).tolist()


def test_pictures_show_what_the_watcher_saw(drawn, tmp_path):
    flags = (
        f"--ckpt={checkpoint(tmp_path / 'best.pt')}",
        "--prompt=The $5 cat",
        "--max_new_tokens=30",
    )
    watcher = watcher_of(c=SampleConfig(device="cpu"))
    events = list(watcher.speak("The $5 cat", 30, 0.7))
    figure = drawn("raster.png", *flags)
    for i, dots in enumerate(figure.axes[0].collections):
        assert dots.get_offsets().tolist() == [
            [t, 32 * i + row] for t, event in enumerate(events) for row in event["fired"][i]
        ]
    assert len({dots.get_paths()[0].vertices.tobytes() for dots in figure.axes[0].collections}) == 2
    figure = drawn("rates.svg", *flags)
    for axes, total in zip(figure.axes, watcher.total):
        assert sum(bar.get_height() for bar in axes.patches) == 32
        dead = (total == 0).sum()
        assert f"{dead} never fire" in [text.get_text() for text in axes.get_legend().get_texts()]


def test_picture_of_the_losses_of_runs(drawn, run_folder):
    figure = drawn("loss.png", f"--run={run_folder} {run_folder}")
    words, legend = words_of(figure)
    assert legend == ["sam_6m"] * 4 and words.count("held-out text, bits/byte") == 2
    assert "training tokens, millions" in words and "training minutes" in words
    for axes, x in zip(figure.axes, ([4], [2.5])):
        assert [line.get_xdata().tolist() for line in axes.lines] == [x, x]
        assert len({(line.get_linestyle(), line.get_marker()) for line in axes.lines}) == 2


@pytest.mark.parametrize(
    "name, said", [("x.png", "raster, neurons, rates or loss"), ("loss.png", "--run")]
)
def test_a_picture_of_what(name, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        sample.main([f"--ckpt={checkpoint(tmp_path / 'best.pt')}", f"--picture={tmp_path / name}"])
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_pictures_need_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit) as stopped:
        sample.main([f"--ckpt={checkpoint(tmp_path / 'best.pt')}", "--picture=raster.png"])
    assert stopped.value.code == 2 and "pip install matplotlib" in capsys.readouterr().err
