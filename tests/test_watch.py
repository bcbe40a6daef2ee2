"""watch.py and page.html: what is shown is what the neurons did; the page keeps its manners."""

import fcntl
import http.client
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import sample
import watch
from checkpoint import VERSION
from experiments import pictures
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
    assert all(layer.total.sum() > 0 and layer.out.min() > 0 for layer in watcher.layers)
    for i, layer in enumerate(watcher.layers if not name.startswith("neuronspark") else ()):
        assert ((0 < layer.beta) & (layer.beta < 1)).all()  # NeuronSpark has frames in a token
        for event in events:
            fired = set(event["fired"][i])
            assert event["rate"][i] == pytest.approx(len(fired) / len(layer.shown), abs=1e-3)
            for row, v in enumerate(event["membrane"][i]):
                v, theta = abs(v) if layer.levels[0] < 0 else v, layer.theta[layer.shown[row]]
                assert (v >= theta) == (row in fired) or abs(v - theta) < 0.006


def test_a_membrane_without_reset_is_shown_as_it_is():
    watcher = watcher_of(reset="none")
    *_, event = watcher.speak("Once upon a time", 0, 1.0)
    for i, layer in enumerate(watcher.layers):
        v, s = watcher.state[layer.part]
        assert s.sum() > 0 and not layer.resets
        expected = [round(x, 2) for x in v[0][layer.shown].tolist()]
        assert event["membrane"][i] == expected


def test_the_numbers_are_those_of_the_model():
    """Against one pass over the whole text."""
    watcher, text = watcher_of(), "the cat"
    first, *events = watcher.speak(text, 0, 1.0)
    with torch.no_grad():
        logits, _, report = watcher.model(torch.tensor([[BYTE.end, *text.encode()]]))
    assert "bits" not in first and first["text"] == "" and first["likely"] == []
    for t, (event, p) in enumerate(zip(events, logits[0].softmax(-1))):
        assert (event["text"], event["own"], event["seen"]) == (text[t], False, t + 2)
        assert 2 ** -event["bits"] == pytest.approx(p[ord(text[t])].item(), rel=1e-3)
        likely = [q for _, q in event["likely"]]
        assert likely == pytest.approx(p.topk(5).values.tolist(), abs=1e-4)
    for layer, rate in zip(watcher.layers, report.rates):
        torch.testing.assert_close(layer.total / watcher.seen, rate)
    triggered, every = (float(sum(column)) for column in zip(*report.synapses))
    mean = sum(event["synops"] for event in [first, *events]) / watcher.seen
    assert mean == pytest.approx(triggered, rel=0.02)
    assert (first["synapses"], first["macs"]) == (every, report.macs)


def test_it_says_what_sample_says(capsys, tmp_path):
    ask = [f"--ckpt={checkpoint(tmp_path / 'best.pt')}", "--prompt=The", "--device=cpu"]
    said = "".join(event["text"] for event in watcher_of().speak("The", 5, 0.7))
    for how in ([], ["--spikes"]):
        sample.main([*ask, "--max_new_tokens=5", *how])
        assert watch.printable(said) in watch.printable(capsys.readouterr().out)


def test_neurons_of_a_program_stand_together_and_large_layers_are_thinned():
    for layer in watcher_of("spikewhale_6m.py", n_hidden=300).layers:
        program = layer.program[layer.shown].tolist()
        assert program == sorted(program) and len(set(program)) == 6
        assert len(program) == watch.SHOWN == len(set(layer.shown.tolist()))
    many = watcher_of("sam_6m.py", n_layer=12, n_hidden=64)
    assert {len(layer.shown) for layer in many.layers} == {watch.ROWS // 12}
    assert watcher_of("snn_100m.py", spikes=False).layers == []


# ---- the server ----------------------------------------------------------------------------------


@contextmanager
def serving(name="sam_6m.py", **settings):
    """A server of an untrained model; server.ask sends a request: (status, content)."""
    c = SampleConfig(**{"device": "cpu", "port": 0} | settings)
    with Server(watcher_of(name), "best.pt", c, ["Hello."]) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()

        def ask(method, path, body=None, **headers):
            link = http.client.HTTPConnection(*server.server_address, timeout=30)
            if isinstance(body, dict):
                body, headers = json.dumps(body), JSON
            link.request(method, path, body, headers)
            answer = link.getresponse()
            return answer.status, answer.read().decode()

        server.ask = ask
        try:
            yield server
        finally:
            server.shutdown()


JSON = {"Content-Type": "application/json"}
THINK = {"session": "a" * 8, "text": "The", "tokens": 12, "temperature": 0.7}


def events_of(answer):
    """The events of a stream, which must have ended well."""
    status, text = answer
    *events, last = [json.loads(line.removeprefix("data: ")) for line in text.strip().split("\n\n")]
    assert status == 200 and last == {"done": True}
    return events


def test_the_page_stands_alone():
    page = (ROOT / "page.html").read_text()
    assert not re.search(r"https?://|src=|@import|url\(", page), "it fetches something"
    for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "srcdoc"):
        assert word not in page, "text goes through textContent"
    with serving() as server:
        assert server.server_address[0] == "127.0.0.1"
        assert server.ask("GET", "/") == (200, page)
        model = json.loads(server.ask("GET", "/model")[1])
        assert [len(layer["shown"]) for layer in model["layers"]] == [32, 32]
        assert model["name"] == "best.pt" and model["examples"] == ["Hello."]


def test_tabs_have_states_of_their_own():
    with serving() as server:

        def think(**more):
            events = events_of(server.ask("POST", "/think", THINK | more))
            return [event | {"seconds": 0} for event in events]

        first, more = think(), think()
        same = json.loads(json.dumps(list(watcher_of().speak("The", 12, 0.7))))
        assert first == [event | {"seconds": 0} for event in same]
        assert more[0]["seen"] == 17 and more != first  # it goes on from its state
        assert think(session="b" * 8) == first
        assert server.ask("POST", "/forget", {"session": "a" * 8})[0] == 200
        assert think() == first
        chat = think(chat=True, tokens=0)
        assert "".join(event["text"] for event in chat) == "\nYou: The\nSam:"
        for i in range(watch.TABS):
            server.ask("POST", "/stop", {"session": f"session-{i}"})
        assert len(server.tabs) == watch.TABS and "a" * 8 not in server.tabs


BAD = [
    ("GET", "/nothing", None, {}, 404),
    ("GET", "/../model.py", None, {}, 404),
    ("GET", "/think", None, {}, 405),
    ("POST", "/model", "{}", JSON, 405),
    ("PUT", "/think", "{}", JSON, 405),
    ("GET", "/", None, {"Host": "evil.example"}, 403),
    ("GET", "/", None, {"Host": "127.0.0.1"}, 403),
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
        for raw in (b"nonsense", b"GET / HTTP/9.9", b"GET " + b"x" * 70000, b"\0" * 9):
            with socket.create_connection(server.server_address, timeout=30) as link:
                link.sendall(raw + b"\r\n\r\n")
                assert "error" in json.loads(link.makefile("rb").read().split(b"\r\n\r\n")[-1])
        assert events_of(server.ask("POST", "/think", THINK))  # and it is still there
    assert "Traceback" not in capsys.readouterr().err


def test_an_unknown_character_is_a_bad_request():
    with serving() as server:
        settings = SampleConfig(device="cpu")
        server.watcher = lambda: Watcher(model_of(shrunk("sam_6m.py")), Chars("abc "), settings)
        status, text = server.ask("POST", "/think", THINK | {"text": "ab\u00e9"})
        assert status == 400 and "not in this char tokenizer's vocabulary" in text


def test_one_writes_at_a_time():
    with serving() as server:
        with server.writing:
            for path in ("/think", "/forget"):
                assert server.ask("POST", path, THINK)[0] == 429
        server.ask("POST", "/think", THINK | {"tokens": -1})
        assert events_of(server.ask("POST", "/think", THINK))  # a refusal gives the lock back


def wait_for(true, seconds=20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_it_stops_when_the_reader_leaves_or_says_so(monkeypatch):
    read = Watcher.read
    monkeypatch.setattr(Watcher, "read", lambda *a, **k: time.sleep(0.005) or read(*a, **k))
    monkeypatch.setattr(watch, "pick", lambda *a: torch.tensor(97))  # it does not end by itself
    with serving() as server:
        body, tab = json.dumps(THINK | {"tokens": 1000}), server.tab("a" * 8)
        link = http.client.HTTPConnection(*server.server_address, timeout=30)
        link.request("POST", "/think", body, JSON)
        answer = link.getresponse()
        assert answer.readline().startswith(b"data: ")
        answer.close()
        link.close()
        wait_for(lambda: not server.writing.locked())
        assert tab.seen < 500
        tab.forget()
        with ThreadPoolExecutor() as pool:
            said = pool.submit(server.ask, "POST", "/think", body, **JSON)
            wait_for(lambda: tab.seen > 8)
            assert server.ask("POST", "/stop", THINK)[0] == 200
        assert len(events_of(said.result())) == tab.seen < 500  # the page knows what the state saw


def test_a_mistake_of_the_model_is_told(monkeypatch):
    monkeypatch.setattr(watch, "pick", lambda *a: torch.tensor([1, 2]).reshape(3))
    with serving() as server:
        last = server.ask("POST", "/think", THINK)[1].strip().split("\n\n")[-1]
        assert "shape '[3]' is invalid" in json.loads(last[6:])["error"]


def test_a_taken_port_is_one_line(tmp_path, capsys):
    with serving() as server, pytest.raises(SystemExit):
        ckpt = checkpoint(tmp_path / "best.pt")
        sample.main([f"--ckpt={ckpt}", "--serve", f"--port={server.server_address[1]}"])
    assert "error: cannot listen on port" in capsys.readouterr().err


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
        one, none = json.loads(server.ask("GET", "/run")[1])
        assert (one, none) == ({"name": "sam_6m", "log": LOG}, {"name": "nothing", "log": []})


# ---- the page in a browser -----------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)


class Browser:
    """Headless Chromium. It reads commands from file 3 and answers in file 4, JSON and a zero."""

    def __init__(self, folder):
        (here, self.commands), (answers, there) = os.pipe(), os.pipe()
        here, there = (fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (here, there))
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        self.process = subprocess.Popen(
            [CHROMIUM, *flags, f"--user-data-dir={folder}"], stderr=subprocess.DEVNULL,
            preexec_fn=lambda: (os.dup2(here, 3), os.dup2(there, 4)), close_fds=False,
        )  # fmt: skip
        self.answers, self.number, self.session = os.fdopen(answers, "rb", 0), 0, {}
        self.complaints = []  # of the page's console
        target = self("Target.createTarget", url="about:blank")["targetId"]
        session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.session = {"sessionId": session}
        for domain in ("Runtime", "Log", "Page"):
            self(f"{domain}.enable")

    def __call__(self, method, **params):
        self.number += 1
        command = {"id": self.number, "method": method, "params": params} | self.session
        os.write(self.commands, json.dumps(command).encode() + b"\0")
        while True:
            answer = json.loads(b"".join(iter(lambda: self.answers.read(1), b"\0")))
            if answer.get("id") == self.number:
                return answer["result"]
            if answer["method"] in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
                self.complaints.append(answer)
            if answer["params"].get("entry", {}).get("level") == "error":
                self.complaints.append(answer)

    def js(self, code):
        answer = self("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")


@pytest.fixture
def browser(tmp_path):
    if not CHROMIUM:
        pytest.skip("there is no chromium: apt-get install chromium")
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.process.terminate()
    browser.process.wait()


# the colours of the cells of a layer at a token, from the pixels of the canvas
CELLS = """(layer, token) => {
  const canvas = $("picture"), scale = canvas.width / canvas.clientWidth;
  return model.layers[layer].shown.map((_, row) => {
    const [x, y] = where(layer, row, token).map((v) => Math.floor(v * scale));
    return [...canvas.getContext("2d").getImageData(x, y, 1, 1).data].join();
  });
}"""


@pytest.mark.parametrize("name", ["sam_6m.py", "spikewhale_6m.py"])
def test_the_page_in_a_browser(browser, name, run_folder):
    text, js = "<b>Hi</b>", browser.js
    with serving(name, max_new_tokens=20, run=str(run_folder)) as server:
        browser("Page.navigate", url=f"http://{server.hosts[0]}/")
        wait_for(lambda: js("typeof model !== 'undefined' && !!model && !$('go').disabled"))
        js("$('prompt').value = ''; $('prompt').focus()")
        browser("Input.insertText", text=text)
        for kind in ("rawKeyDown", "keyUp"):
            key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}
            browser("Input.dispatchKeyEvent", type=kind, **key)
        wait_for(lambda: js("events.length > 20 && !isWriting"))
        js("new Promise((r) => { choose({ token: -1 }); setTimeout(r, 200); })")
        watcher = watcher_of(name)
        expected = list(watcher.speak(text, 20, 0.7))
        assert js("$('text').textContent") == "".join(e["text"] for e in expected)
        assert js("$('text').querySelectorAll('b').length") == 0  # text stays text
        for layer in range(2):
            lit, dark = set(), set()
            for token in range(js("Math.ceil($('brain').scrollLeft / COLUMN)"), len(expected)):
                cells = js(f"({CELLS})({layer}, {token})")
                assert len(cells) == 32
                for row, cell in enumerate(cells):
                    (lit if row in expected[token]["fired"][layer] else dark).add(cell)
            assert len(dark) == 1 and not lit & dark  # one background
        # a neuron that is clicked shows its membrane
        token = max(t for t, event in enumerate(expected) if event["fired"][1])
        row = expected[token]["fired"][1][0]
        x, y = js(
            f"(() => {{ const [x, y] = where(1, {row}, {token}), box = () => "
            "$('picture').getBoundingClientRect(); scrollBy(0, box().y + y - 200); "
            "return [box().x + x, box().y + y]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            browser("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        assert js("$('neuron').textContent") == f"Layer 2, neuron {watcher.layers[1].shown[row]}"
        assert "it fired" in js("$('about-neuron').textContent")
        assert "bits of surprise" in js("$('guess').textContent")
        # the run, the tour, the reset
        wait_for(lambda: "2.000 bits/byte" in js("$('progress').textContent"))
        assert "<b>b" in js("$('samples').textContent")
        for step in range(5):
            js(f"tour({step})")
            assert len(js("$('tour-text').textContent")) > 99
        js("tour(5)")
        assert js("$('tour').hidden")
        js("forget()")
        wait_for(lambda: js("!events.length && $('memory').textContent.includes('silent')"))
        phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
        browser("Emulation.setDeviceMetricsOverride", **phone)
        assert js("document.documentElement.scrollWidth") <= 390  # nothing sticks out
    assert not browser.complaints, browser.complaints


# ---- the terminal --------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding, blocks", [("utf-8", " ▀▄█"), ("ascii", " '.:")])
def test_spikes_in_the_terminal(encoding, blocks, monkeypatch):
    c = SampleConfig(device="cpu", prompt="a\nbc", max_new_tokens=0)
    watcher, out = watcher_of(c=c), io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    watch.spikes(watcher, "best.pt", c)
    out.seek(0)
    lines = out.read().splitlines()
    assert len(lines) == 2 * (1 + 2 * 2) and lines[0] == "  a" and lines[5] == "  bc"
    assert lines[6][0] + lines[8][0] == "12"
    for column, event in enumerate([*watcher_of().speak("a\nbc", 0, 0.7)][3:]):
        for k in range(4):
            upper, lower = ((k % 2 * 2 + half) * 8 in event["fired"][k // 2] for half in range(2))
            assert lines[6 + k].ljust(40)[2 + column] == blocks[upper + 2 * lower], (k, column)


# ---- pictures ------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, or would be: rendering takes long."""
    figure, figures = pytest.importorskip("matplotlib.figure").Figure, []
    monkeypatch.setattr(figure, "savefig", lambda f, path, **how: figures.append(f))
    return figures


def words_of(figure):
    """What stands at its axes, and in its legends."""
    axes = figure.axes
    words = [w for a in axes for w in (a.get_title(), a.get_xlabel(), a.get_ylabel())]
    legends = [a.get_legend() for a in axes if a.get_legend()] + figure.legends
    return words, [text.get_text() for legend in legends for text in legend.get_texts()]


@pytest.mark.parametrize("name", CONFIGS)
def test_pictures_of_every_config(name, drawn):
    watcher, c = watcher_of(name), SampleConfig(device="cpu", prompt="The $5 cat", max_new_tokens=9)
    if name.startswith("gpt"):
        with pytest.raises(ValueError, match="no spiking neurons"):
            pictures.picture("rates.png", watcher, name, c)
        return
    for kind in pictures.PICTURES:
        pictures.picture(f"{kind}.png", watcher, name, c)
    (raster, neurons, rates), sites = drawn, watcher.model.sites
    watcher = watcher_of(name, c)
    events = list(watcher.speak(c.prompt, 9, c.temperature))
    words, legend = words_of(raster)
    assert len([label for label in legend if "fire" in label]) == len(sites)
    assert "threshold" in legend and {"neuron", "membrane", "token (a time step)"} <= set(words)
    start = 0
    for i, (dots, layer) in enumerate(zip(raster.axes[0].collections, watcher.layers)):
        fired = [[t, start + row] for t, event in enumerate(events) for row in event["fired"][i]]
        assert dots.get_offsets().tolist() == fired
        start += len(layer.shown)
    words, legend = words_of(rates)
    assert words.count("spikes per token") == words.count("neurons") == len(sites)
    for axes, layer in zip(rates.axes, watcher.layers):
        assert sum(bar.get_height() for bar in axes.patches) == len(layer.out)
        assert f"{(layer.total == 0).sum()} never fire" in legend
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


def test_picture_of_the_losses_of_runs(run_folder, tmp_path, drawn):
    sample.main([f"--picture={tmp_path}/loss.svg", f"--run={run_folder} {run_folder}"])
    words, legend = words_of(drawn[0])
    assert legend == ["sam_6m"] * 4 and words.count("held-out text, bits/byte") == 2
    assert "training tokens, millions" in words and "training minutes" in words
    for axes, x in zip(drawn[0].axes, ([4], [2.5])):
        assert [line.get_xdata().tolist() for line in axes.lines] == [x, x]
        assert len({(line.get_linestyle(), line.get_marker()) for line in axes.lines}) == 2


def test_pictures_are_files(tmp_path, run_folder):
    pytest.importorskip("matplotlib")
    ckpt = f"--ckpt={checkpoint(tmp_path / 'best.pt')}"
    for name in ("raster.png", "rates.svg", "loss.png"):
        sample.main([ckpt, f"--picture={tmp_path / name}", f"--run={run_folder}", "--device=cpu"])
        assert (tmp_path / name).stat().st_size > 3000


@pytest.mark.parametrize(
    "name, said",
    [("x.png", "raster, neurons, rates or loss"), ("loss.png", "--run"), ("rates.png", "pip inst")],
)
def test_what_a_picture_lacks(name, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit) as stopped:
        sample.main([f"--ckpt={checkpoint(tmp_path / 'best.pt')}", f"--picture={tmp_path / name}"])
    assert stopped.value.code == 2 and said in capsys.readouterr().err
