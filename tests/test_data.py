"""data.py, sources.py: downloads under faults, streams, files, phases, cache, batches."""

import gzip
import hashlib
import http.server
import json
import math
import multiprocessing
import random
import re
import subprocess
import threading
import time
import urllib.parse
from collections import Counter
from functools import partial
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from test_nursery import seeded
from test_tokenizer import SAMPLE, make, random_text

import data
import sources
import train
from sources import tell
from tokenizer import BPE, Bytes, DataError


@pytest.fixture(autouse=True)
def small_nursery(monkeypatch):
    monkeypatch.setattr(data, "NURSERY_BYTES", (60_000, 8_000))


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    serve_from("http://127.0.0.1:9", monkeypatch)


def serve_from(url, monkeypatch):
    """All servers of the downloads are this one; nobody answers on port 9."""
    monkeypatch.setattr(sources, "BASES", dict.fromkeys(sources.BASES, url))


def write(path: Path, text) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def texts_of(stream, tokenizer) -> list[str]:
    """The texts of a stream, which must be END text END ... END."""
    stream = np.asarray(stream)
    assert stream[0] == stream[-1] == tokenizer.end
    parts = np.split(stream, np.flatnonzero(stream == tokenizer.end))[1:-1]
    return [tokenizer.decode(part) for part in parts]


def both_of(made):
    """(stories for training, what is held out), as texts."""
    return [texts_of(stream, made.tokenizer) for stream in (made.train["stories"], made.heldout)]


STORY = "Once there was a dog named Tom. He ran to the park, saw a red kite, and was happy.\n"


def stories(n) -> str:
    return data.END_TEXT.join(f"{STORY}{i}" for i in range(n))


# ---- Downloads -------------------------------------------------------------------------------


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` with Range, and the rows of ROWS as the dataset viewer does; each fault of
    `faults` spoils one answer, in turn."""

    daemon_threads = True

    def __init__(self, content=b"", faults=(), tag=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.faults, self.tag, self.asked = content, list(faults), tag, []
        self.release = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.release.set()
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def reply(self, status, body=b"", fault=None, **headers):
        self.send_response(status)
        for name, value in {"Content_Length": len(body), **headers}.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault in PARTIAL else body)
        if fault == "stall":
            self.wfile.flush()
            self.server.release.wait(5)

    def do_HEAD(self):
        self.reply(200)

    def do_GET(self):
        fault = self.server.faults.pop(0) if self.server.faults else None
        if isinstance(fault, int):
            self.reply(fault, Retry_After=0)
        elif fault == "close":
            self.connection.close()
        else:
            (self.rows if "?" in self.path else self.file)(fault)

    def file(self, fault):
        asked, body, tag = self.headers.get("Range"), self.server.content, self.server.tag
        self.server.asked.append(asked)
        status, headers = 200, {"X_Linked_ETag": tag and f'"{tag}"'}
        if asked and fault != "no range":
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", asked).groups()
            start, stop = int(first), min(len(body), int(last or len(body)) + 1)
            if start >= stop:
                return self.reply(416)
            shown = start + (fault == "wrong range")
            headers["Content_Range"] = f"bytes {shown}-{stop - 1}/{len(body)}"
            status, body = 206, body[start:stop]
        headers["Content_Length"] = len(body) + {"long": 100, "short": -100}.get(fault, 0)
        if fault in ("no length", "silent drop"):
            headers["Content_Length"] = None
        if fault == "other bytes":
            body = bytes(255 - b for b in body)
        self.reply(status, body, fault, **headers)

    def rows(self, fault):
        asked = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))
        name = "/".join(asked[key] for key in ("dataset", "config", "split"))
        offset, length = int(asked["offset"]), int(asked["length"])
        self.server.asked.append((name, offset // length))
        if name not in ROWS:
            return self.reply(404)
        numbers = range(offset, min(offset + length, ROWS[name]))
        rows = [{"row_idx": i, "row": {"text": row(name, i), "id": i}} for i in numbers]
        rows += [{"row_idx": 0, "row": {"text": None}}] * (offset == 0)  # one without text
        body = json.dumps({"rows": rows, "num_rows_total": ROWS[name], "partial": False}).encode()
        bad = {"other": b'{"error": "busy"}', "truncate": body[: len(body) // 2]}
        self.reply(200, bad.get(fault, body), fault)


PARTIAL = ("drop", "silent drop", "stall")  # faults: half the bytes that were announced
CONTENT = random.Random(5).randbytes(300_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def fetch(server, path, **options):
    options = {"timeout": 0.3, "pause": 0.001, "attempts": 4, **options}
    sources.download(server.url + "/file", path, **options)


@pytest.mark.parametrize("faults", [
    [], ["drop"], ["drop", "drop"], [429, 500, 503], ["drop", "no range"], ["drop", "wrong range"],
    ["no length"], ["stall"], ["other bytes"], ["drop", "other bytes"], ["long"], ["drop", 503],
    ["drop", "silent drop"],
])  # fmt: skip
def test_download_ends_right(faults, tmp_path):
    path = tmp_path / "deep" / "file.bin"
    goods = sum(fault in ("no range", "no length") for fault in faults)  # no faults after all
    with Server(CONTENT, faults, tag=DIGEST) as server:
        fetch(server, path, attempts=len(faults) + 1 - goods)
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]


@pytest.mark.parametrize("faults, options", [
    (["other bytes"] * 9, {}), ([500] * 9, {}), ([404], {}), (["stall"] * 9, {"attempts": 2}),
    (["drop"] * 9, {"attempts": 2}), (["wrong range"] * 9, {"max_bytes": 100}),
    (["long"] * 9, {"attempts": 2}), (["short"] * 9, {}),
])  # fmt: skip
def test_download_fails_in_one_line(faults, options, tmp_path):
    path = tmp_path / "file.bin"
    with Server(CONTENT, faults, tag=DIGEST) as server, pytest.raises(DataError) as caught:
        fetch(server, path, **options)
    assert not path.exists() and "\n" not in str(caught.value)


def test_download_resumes_across_calls(tmp_path):
    path = tmp_path / "file.bin"
    with Server(CONTENT, ["drop"]) as server:
        with pytest.raises(DataError, match="run again"):
            fetch(server, path, attempts=1)
        fetch(server, path)
        assert server.asked[0] is None and re.fullmatch(r"bytes=1\d{5}-", server.asked[1])
        assert path.read_bytes() == CONTENT
        write(tmp_path / "file.bin.part", b"x" * 400_000)  # stale, longer than the file: 416
        fetch(server, path)
    assert path.read_bytes() == CONTENT


def test_retry_after_is_honoured_up_to_a_minute(tmp_path, monkeypatch):
    naps = []
    monkeypatch.setattr(sources.time, "sleep", naps.append)
    with Server(CONTENT, [503, "drop"]) as server:
        fetch(server, tmp_path / "file.bin", pause=1.0)
    error = OSError("busy")
    error.wait = 5000.0
    with pytest.raises(DataError, match="busy"):
        sources.retry(Mock(side_effect=error), "x", 3, 1.0)
    assert naps == [0.0, 2.0, 60.0, 60.0]  # and none after the last attempt


@pytest.mark.parametrize("faults", [[], ["no range"], ["drop"]])
def test_only_the_first_bytes(faults, tmp_path):
    content = f"one{data.END_TEXT}two{data.END_TEXT}three and more{data.END_TEXT}".encode()
    path = tmp_path / "file.txt"
    with Server(content, faults) as server:
        fetch(server, path, max_bytes=40, attempts=1 + (faults == ["drop"]))
        assert server.asked[0] == "bytes=0-39"
    assert path.read_text() == f"one{data.END_TEXT}two"


def test_auto_without_network(tmp_path, capsys, monkeypatch):
    assert data.prepare("auto", "byte", 0, tmp_path).name == "nursery"
    assert "no network" in capsys.readouterr().out
    monkeypatch.setattr(sources.time, "sleep", lambda seconds: None)
    with pytest.raises(DataError, match="cannot download"):
        data.prepare("real_sam", "byte", 0, tmp_path)
    monkeypatch.setattr(sources.requests, "head", lambda *a, **k: threading.Event().wait(3))
    assert not sources.online(seconds=0.05)  # a silent server


def test_auto_with_network(tmp_path, monkeypatch):
    record = {"instruction": "Say ho", "input": "", "output": "Ho"}
    tree = {"prompt": {"text": "Hi", "replies": [{"text": "Ho"}]}}
    folder = tmp_path / "real_sam"
    write(folder / "train.txt", stories(50))
    write(folder / "alpaca.jsonl", json.dumps([record]))
    write(folder / "dolly.jsonl", json.dumps({"instruction": "a", "response": "b"}))
    write(folder / "oasst.jsonl.gz", gzip.compress(json.dumps(tree).encode()))
    with Server(STORY.encode()) as server:  # which has to give the missing valid.txt
        serve_from(server.url, monkeypatch)
        prepared = data.prepare("auto", "byte", 0, tmp_path)
    assert prepared.name == "real_sam" and set(prepared.train) == set(data.PHASES)
    assert STORY.strip() in texts_of(prepared.valid["stories"], prepared.tokenizer)
    again = data.prepare("real_sam", "byte", 0, tmp_path)  # all is here: nobody is asked
    assert np.array_equal(again.heldout, prepared.heldout)


# ---- Streamed mixtures -----------------------------------------------------------------------

ROWS = {"a/prose/default/train": 93, "a/math/four/train": 61}  # rows of each source
MIXTURE = "a/prose/default@3,a/math/four/train@1"


def row(name: str, i: int) -> str:
    rng = random.Random(f"{name} {i}")
    return f"{name} {i}: " + " ".join(rng.choices(SAMPLE.split(), k=rng.randint(1, 60)))


@pytest.fixture
def rows_server(monkeypatch):
    for name, size in {"PAGE": 5, "HELD_BYTES": 1_500, "SAMPLE_BYTES": 6_000}.items():
        monkeypatch.setattr(sources, name, size)
    with Server() as server:
        serve_from(server.url, monkeypatch)
        yield server


def known_pages(text=MIXTURE):
    """The mixture as `prepare` knows it: with pages, of which 2 are held out."""
    known = sources.parse_mixture(text)
    return [replace(s, pages=math.ceil(ROWS[s.name] / 5), held=2) for s in known]


def open_stream(rank=0, world=1, position=None, mixture=None, seed=1, **options):
    options = {"timeout": 0.3, "pause": 0.001, **options}
    fetch = partial(sources.fetch_page, **options)
    return sources.Stream(mixture or known_pages(), Bytes(), seed, rank, world, position, fetch)


def test_mixture_grammar():
    first, second = sources.parse_mixture(MIXTURE)
    assert (first.name, first.weight) == ("a/prose/default/train", 0.75)
    assert (second.name, second.weight) == ("a/math/four/train", 0.25)
    assert sources.parse_mixture("a/b/c")[0].weight == 1
    for bad in ("", "a/b", "a/b/c/d/e", "a/b/c@x", "a/b/c@0", "a/b/c@-1", "a/b/c,", "a//b/c"):
        with pytest.raises(DataError, match="owner/name/config@weight") as caught:
            data.prepare(f"stream:{bad}", "byte", 0, "nowhere")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pages", [1, 2, 3, 7, 10, 610, 1000])
def test_each_page_comes_once(pages):
    source = sources.Source("a/b/c/d", 1.0, pages)
    order = [source.page(i) for i in range(pages)]
    assert sorted(order) == list(range(pages)) and source.page(pages) == order[0]
    if pages >= 610:  # wherever one begins, a few pages are from all over the source
        some = sorted([0, *order[100:108], pages])
        assert max(b - a for a, b in zip(some, some[1:])) < pages / 4


def test_stream_is_packed_text_in_proportion(rows_server):
    stream, tokens = open_stream(), [torch.tensor([256])]
    for _ in range(60):
        x, y = stream.batch(4, 100)
        assert x.shape == y.shape == (4, 100) and x.dtype == y.dtype == torch.int64
        assert torch.equal(x.flatten()[1:], y.flatten()[:-1]) and tokens[-1][-1] == x[0, 0]
        tokens.append(y.flatten())
    whole = torch.cat(tokens).numpy()  # up to the last END:
    texts = texts_of(whole[: np.flatnonzero(whole == 256)[-1] + 1], stream.tokenizer)
    named = [re.match(r"(\S+) (\d+): ", text) for text in texts]
    assert all(text == row(found[1], int(found[2])).strip() for text, found in zip(texts, named))
    share = Counter()
    for text, found in zip(texts, named):
        share[found[1]] += len(text) + 1
    assert share["a/math/four/train"] / sum(share.values()) == pytest.approx(0.25, abs=0.02)
    held = {(s.name, s.page(i)) for s in stream.mixture for i in range(s.held)}
    assert not held & set(rows_server.asked)
    assert not held & {(found[1], int(found[2]) // 5) for found in named}


def test_stream_resumes_bit_for_bit(rows_server):
    sizes = [(2, 30), (1, 7), (3, 50), (1, 400), (2, 3), (1, 1), (4, 64)] * 3
    whole, positions, batches = open_stream(), [], []
    for size in sizes:
        positions.append(json.dumps(whole.position))
        batches.append(whole.batch(*size))
    for i in range(len(sizes)):
        # one at a time: a page asked for in the background may else meet more than it has attempts
        rows_server.faults.append([429, "close", 500, "truncate", "drop", "other", 503][i % 7])
        again = open_stream(position=json.loads(positions[i]))
        for size, (x, y) in list(zip(sizes, batches))[i : i + 5]:
            assert all(map(torch.equal, again.batch(*size), (x, y)))
        if i + 5 < len(sizes):
            assert json.dumps(again.position) == positions[i + 5]
    others = [open_stream(seed=seed).batch(2, 30)[0] for seed in range(2, 5)]
    assert not all(torch.equal(x, batches[0][0]) for x in others)


def test_ranks_read_other_pages(rows_server):
    mixture, seen = known_pages("a/prose/default"), []
    for rank in range(2):
        stream = open_stream(rank, 2, mixture=mixture)
        texts = b""
        while stream.position["read"][0][0] < 7:  # to its page 7: 16 of 17 are read by one
            texts += bytes(x if x < 256 else 10 for x in stream.batch(1, 50)[0][0].tolist())
        seen.append({int(n) for n in re.findall(rb"train (\d+): ", texts)})
    assert not seen[0] & seen[1] and len(seen[0] | seen[1]) > 70


def test_a_position_knows_its_run(rows_server):
    position = open_stream().position
    for other in ({"world": 2}, {"rank": 1, "world": 2}, {"seed": 2},
                  {"mixture": known_pages("a/prose/default")}):  # fmt: skip
        with pytest.raises(DataError, match="another mixture, seed or number of processes"):
            open_stream(position=position, **other)


def test_pages_are_fetched_ahead():
    asked = []
    fetch = lambda name, page: (asked.append(page) or ["A text."] * 5, 19)  # noqa: E731
    stream = sources.Stream(known_pages("a/prose/default"), Bytes(), 0, fetch=fetch)
    until = time.monotonic() + 5
    while len(asked) < 1 + sources.AHEAD and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(asked) == 1 + sources.AHEAD
    stream.batch(8, 500)
    assert stream.position["read"][0][0] > 2


@pytest.mark.parametrize("fault", [429, 500, 503, "close", "truncate", "drop", "stall", "other"])
def test_stream_faults(fault, rows_server):
    with pytest.raises(DataError, match="a/typo.*status 404.*check the address"):
        open_stream(mixture=[sources.Source("a/typo/default/train", 1.0, 10, 2)])
    rows_server.faults += [fault] * 3
    clean = open_stream().batch(2, 50)
    assert [open_stream().batch(2, 50)[0].tolist()] == [clean[0].tolist()]
    rows_server.faults += [fault] * 50
    with pytest.raises(DataError, match="cannot download rows of a/prose.*local file") as caught:
        open_stream(attempts=2)
    assert "\n" not in str(caught.value)


def test_prepare_a_stream(rows_server, tmp_path, monkeypatch):
    prepared = data.prepare(f"stream:{MIXTURE}", "lengthmax", 300, tmp_path)
    assert prepared.name == "prose+math" and prepared.tokenizer.vocab_size == 300
    assert {s.name: s.pages for s in prepared.mixture} == {n: -(-r // 5) for n, r in ROWS.items()}
    sample, held = map(set, both_of(prepared))
    assert 1_500 <= sum(map(len, held)) < 6_000 <= sum(map(len, sample)) < 12_000
    pages = {(s.name, s.page(i)) for s in prepared.mixture for i in range(s.held)}
    rows = [(name, i) for name, n in ROWS.items() for i in range(n)]
    assert held == {row(*which).strip() for which in rows if (which[0], which[1] // 5) in pages}
    assert not held & sample and all(source.held > 0 for source in prepared.mixture)
    stream = sources.Stream(prepared.mixture, prepared.tokenizer, 0)
    ids = stream.batch(10, 300)[0].flatten().tolist()
    assert not held & set(prepared.tokenizer.decode(ids).split("a/"))
    monkeypatch.setattr(sources, "fetch_page", None)  # would raise: now it comes from the cache
    again = data.prepare(f"stream:{MIXTURE}", "lengthmax", 300, tmp_path)
    assert again.mixture == prepared.mixture


def test_copies_of_held_out_documents_leave_the_sample(rows_server, tmp_path, monkeypatch):
    copy = lambda name, i: f"Copy {i % 40}. " + "long word " * (i % 40)  # noqa: E731
    monkeypatch.setitem(globals(), "row", copy)
    sample, held = map(set, both_of(data.prepare("stream:a/math/four", "byte", 0, tmp_path)))
    assert held and sample and not held & sample
    monkeypatch.setitem(globals(), "row", lambda name, i: "All rows are the same. " * 100)
    with pytest.raises(DataError, match="too little to learn some and hold out some"):
        data.prepare("stream:a/math/four", "byte", 1, tmp_path)


def test_the_last_page_is_left_for_training(rows_server, monkeypatch):
    (source,) = known_pages("a/math/four/train")
    pages = [sources.fetch_page(source.name, source.page(i))[0] for i in range(source.pages)]
    monkeypatch.setattr(sources, "HELD_BYTES", 1)
    monkeypatch.setattr(sources, "SAMPLE_BYTES", sum(map(len, sum(pages[1:-1], []))))
    train, held, _ = sources.sample_mixture([source])
    assert held == pages[0] and train == sum(pages[1:-1], [])
    monkeypatch.setattr(sources, "SAMPLE_BYTES", sources.SAMPLE_BYTES + 1)
    with pytest.raises(DataError, match="too small to stream"):
        sources.sample_mixture([source])


def test_streams_that_cannot_be(rows_server, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(DataError) as caught:
        serve_from("http://127.0.0.1:9", patch)
        data.prepare(f"stream:{MIXTURE}", "byte", 0, tmp_path)
    assert re.match("no network to stream.*--dataset=PATH", str(caught.value))
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(sources, "HELD_BYTES", 1_000_000)
    with pytest.raises(DataError, match="too small to stream"):
        data.prepare(f"stream:{MIXTURE}", "byte", 0, tmp_path)
    monkeypatch.setitem(globals(), "row", lambda name, i: None)  # no row has a text
    with pytest.raises(DataError, match="no text"):
        data.prepare(f"stream:{MIXTURE}", "byte", 0, tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- Files -----------------------------------------------------------------------------------


def test_text_with_separators(tmp_path):
    raw = b"\xef\xbb\xbfone\r\ntwo\rend\r\n<|endoftext|>\r\nthree\n<|endoftext|>\n"
    assert data.read_documents(write(tmp_path / "a.txt", raw)) == ["one\ntwo\nend", "three"]


@pytest.mark.parametrize("gap", ["\n\n", "\n", " ", ""])
def test_text_without_separators_is_cut_where_something_ends(gap):
    text = gap.join(f"This is line number {i}, of many." for i in range(1000))
    assert "".join(data.blocks(text, 500)) == text
    documents = data.read_text(text)
    assert 8 < len(documents) < 18 and all(2000 <= len(d) + 1 < 4000 for d in documents[:-1])
    assert gap == "" or all(document.endswith("of many.") for document in documents)
    assert data.read_text("x " * 1900) == [("x " * 1900).strip()]
    assert data.read_text(f"{text}{data.END_TEXT}{text * 4}") == [text, text * 4]
    assert len(data.read_text(f"{text}{data.END_TEXT}{text * 8}")) == 3  # parts of 100,000 or more


def test_a_conversation_is_cut_before_the_user_speaks():
    talk = "\n".join(f"You: {i}?\nSam: {i} a\n\n{i} b" for i in range(600))
    documents = data.read_text(talk)
    assert len(documents) > 3 and "\n".join(documents) == talk
    assert all(data.is_talk(document) for document in documents)


def said(*turns):
    return [{"role": role, "content": text} for role, text in turns]


USER, CALL = ("user", "Hi "), {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}
TREE = {"text": "Hi", "replies": [{"text": "worse", "rank": 1}, {"text": "best", "rank": 0,
        "replies": [{"text": "And?", "replies": []}]}, {"text": "unranked"}]}  # fmt: skip
PARTS = [{"type": "text", "text": "One"}, {"type": "image_url", "image_url": {"url": "x"}}, "2",
         {"type": "python", "text": "1 + 1"}, {"type": "output_text", "text": "3"}]  # fmt: skip


@pytest.mark.parametrize("record, document", [
    ({"text": "A story.\r\nIt ends."}, "A story.\nIt ends."),
    ({"text": "half \ud83d emoji"}, "half ? emoji"),
    ({"instruction": "Add", "input": "1 + 1", "output": "2"}, "You: Add\n1 + 1\nSam: 2"),
    ({"instruction": "Add", "context": None, "response": "2", "text": ""}, "You: Add\nSam: 2"),
    ({"prompt": "a", "response": "b"}, "You: a\nSam: b"),
    ({"prompt": "a", "completion": "b"}, "You: a\nSam: b"),
    ({"prompt": said(USER), "completion": said(("assistant", "b"))}, "You: Hi\nSam: b"),
    ({"user": "a", "assistant": "b", "id": 7}, "You: a\nSam: b"),
    ({"question": "a", "answer": "b"}, "You: a\nSam: b"),
    ({"prompt": "x", "text": "A story."}, "A story."),
    ({"prompt": TREE}, "You: Hi\nSam: best\nYou: And?"),
    (said(USER, ("assistant", "Ho")), "You: Hi\nSam: Ho"),
    ({"messages": said(("system", "x"), USER, ("Assistant", "Ho"))}, "You: Hi\nSam: Ho"),
    ({"messages": said(("assistant", "Hello!"), USER, ("ASSISTANT", "Ho"))}, "You: Hi\nSam: Ho"),
    ({"messages": [*said(USER), CALL, *said(("tool", "42"), ("assistant", "It is 42."))]},
     "You: Hi\nSam: It is 42."),
    ({"messages": [*said(("system", {"a": 1}), USER, ("assistant", "I look.")), CALL,
                   *said(("Tool", [4]), ("assistant", "It is 4."))]},
     "You: Hi\nSam: I look.\nIt is 4."),
    ({"messages": said(USER, ("assistant", PARTS))}, "You: Hi\nSam: One\n2\n3"),
    ({"conversations": [{"from": "gpt", "value": "Welcome"}, {"from": "human", "value": "Hi"},
      {"from": "GPT", "value": "1. Go\n2. Stop"}, {"from": "human", "value": "Bye"},
      {"from": "gpt", "value": "Bye"}]}, "You: Hi\nSam: 1. Go\n2. Stop\nYou: Bye\nSam: Bye"),
    (said(USER, ("assistant", "Say\nYou: a\nSam: b")), "You: Hi\nSam: Say\n You: a\n Sam: b"),
])  # fmt: skip
def test_records(record, document, tmp_path):
    one, two = json.dumps(record), json.dumps([record, record], indent=1)
    for name, text in (("a.jsonl", f"{one}\r\n\r\n"), ("b.JSON", one), ("c.json", two)):
        found = data.read_documents(write(tmp_path / name, text), log=pytest.fail)
        assert found == [document] * (2 if name == "c.json" else 1)


@pytest.mark.parametrize("line, why", [
    ("{", "Expecting property name"), ("3", "3 is no object"), ("null", "null is no object"),
    ('"text"', "is no object"), ("[]", "no user's turn with an answer"), ('{"messages": 3}', ""),
    ("{}", "no known keys"), ('{"tex": "a", "b": 1}', 'no known keys, only "tex", "b"'),
    ('{"text": 5}', "5 is no text"), ('{"instruction": "a"}', 'only "instruction"'),
    ('{"instruction": "a", "output": " "}', "no user's turn with an answer"),
    ('{"prompt": {}}', ""), ('{"prompt": {"text": "a"}}', "no user's turn"), ('["a"]', ""),
    (json.dumps(said(("assistant", "a"))), "no user's turn with an answer"),
    (json.dumps(said(USER, ("narrator", "a"))), 'unknown role "narrator"'),
    (json.dumps(said(USER, ("assistant", {"a": 1}))), 'is no text'), ("[" * 10**5, ""),
])  # fmt: skip
def test_refused_records_say_why(line, why, tmp_path):
    lines = [json.dumps({"text": f"Story {i}."}) for i in range(9)]
    log = []
    path = write(tmp_path / "a.jsonl", "\n".join([*lines, "", line, "{", *lines]))
    assert len(data.read_documents(path, log.append)) == 18
    assert log[0].startswith("a.jsonl: skipped 2 malformed of 20 records; the first, line 11: ")
    assert why in log[0] and len(log) == 1 and len(log[0]) < 200
    with pytest.raises(DataError, match="^a.jsonl holds no text .*keys text, messages") as caught:
        data.read_documents(write(tmp_path / "a.jsonl", f"{line}\n{{"))  # now none is left
    assert why in str(caught.value)


@pytest.mark.parametrize("content, says", [
    (b"caf\xe9 " * 9, "not UTF-8.* cp1252.*iconv"), (b"a\0b", "binary"), (b" \n ", "no text"),
    (b"\xff\xfea\0b", "binary or damaged"), (bytes(range(256)), "binary"),
])  # fmt: skip
def test_bad_files_are_one_line(content, says, tmp_path):
    write(tmp_path / "in" / "a.txt", content)
    write(tmp_path / "b.txt", STORY)
    with pytest.raises(DataError, match=f"^in/a.txt .*{says}") as caught:
        data.prepare(tmp_path, "byte", 0, tmp_path / "cache")
    assert "\n" not in str(caught.value)


PROSE = "“It’s a café,” said Zoë – and smiled. It was late, so they went home.\n" * 40


@pytest.mark.parametrize("name", ["a b.txt", "a.txt.gz"])
@pytest.mark.parametrize("raw, encoding", [
    (PROSE.encode("cp1252"), "cp1252"), (PROSE.encode("utf-16le"), "utf-16le"),
    (PROSE.encode("utf-16be"), "utf-16be"), (b"x" * 300_001 + PROSE.encode("cp1252"), "cp1252"),
    (PROSE.encode() + b"\xff", "utf-8"), (PROSE.encode()[1:], "utf-8"),
    ("Все счастливые семьи".encode("cp1251"), None), ("汉字".encode("gb18030") * 9, None),
])  # fmt: skip
def test_the_advice_on_encodings_works(raw, encoding, name, tmp_path):
    path = write(tmp_path / name, gzip.compress(raw) if name.endswith("gz") else raw)
    with pytest.raises(DataError, match="not UTF-8") as caught:
        data.read_documents(path)
    command = str(caught.value).split("as in ")[1]
    if encoding is None:
        assert "seems" not in str(caught.value) and "iconv -c -f ITS_ENCODING" in command
    else:
        assert f"seems to be {encoding}:" in str(caught.value)
        subprocess.run(command, shell=True, check=True, cwd=tmp_path)
        assert PROSE.strip()[1:] in (tmp_path / "new.txt").read_text("utf-8")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-8"])
@pytest.mark.parametrize("name", ["a.md", "a.text", "A.TXT", "a.Txt.GZ"])
def test_what_is_read_as_text(encoding, name, tmp_path):
    raw = PROSE.encode(encoding)
    path = write(tmp_path / name, gzip.compress(raw) if name.endswith("GZ") else raw)
    assert data.read_documents(path) == data.read_documents(tmp_path) == data.read_text(PROSE)


def test_what_is_not_read(tmp_path, monkeypatch):
    """Dot files, what macOS adds to archives, our own folders; what is no text is named."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (".a.txt", ".git/b.txt", "__MACOSX/._c.txt", "x/__MACOSX/d.txt", "runs/1/log.txt"):
        write(tmp_path / "texts" / name, "secret " * 99)
    write(tmp_path / "texts" / "cells" / "p.pdf", b"%PDF")
    write(tmp_path / "texts" / "e.txt", stories(60))
    write(tmp_path / "texts" / "data" / "real_sam" / "train.txt", "secret " * 99)
    options = {"ignore": ["~/texts/runs"], "data_dir": "~/texts/data"}
    for dataset in ("~/texts", str(tmp_path / "texts"), "~/texts"):  # the last time, with a cache
        log = []
        made = data.prepare(dataset, "char", 0, log=log.append, **options)
        assert made.dataset == str(tmp_path / "texts") and made.name == "texts"
        assert log == ["not read, by its suffix: .pdf"]
        assert sorted(sum(both_of(made), [])) == sorted(f"{STORY}{i}" for i in range(60))
    write(tmp_path / "texts" / "data" / "my.txt", "mine " * 99)  # asked for by name, it is read
    downloads = [tmp_path / "texts/data/real_sam"]
    assert list(data.list_files(tmp_path / "texts" / "data", downloads)) == ["my.txt"]
    assert data.read_documents("~/texts/.a.txt")
    with pytest.raises(DataError, match=r"has no text, only \.pdf: give text \(\.txt.*\.jsonl"):
        data.prepare("~/texts/cells/p.pdf", "byte", 0, **options)


def test_json_that_is_no_record(tmp_path):
    """A .json beside texts may be metadata; alone it has to be text."""
    info, log = write(tmp_path / "info.json", '{"version": 1}'), []
    with pytest.raises(DataError, match='info.json holds no text.*only "version"'):
        data.read_documents(info)
    write(tmp_path / "a.txt", STORY)
    assert data.read_documents(tmp_path, log.append) == [STORY.strip()]
    assert len(log) == 1 and log[0].startswith("info.json: skipped 1 malformed of 1 records")


@pytest.mark.parametrize("name, content, says", [
    ("nowhere.txt", None, "no file or folder"), ("", None, "has no text"),
    ("b.txt", "a", "too little"), ("a.txt.gz", "plain", "cannot read a.txt.gz"),
])  # fmt: skip
def test_missing_files(name, content, says, tmp_path):
    if content:
        write(tmp_path / name, content)
    with pytest.raises(DataError, match=says):
        data.prepare(tmp_path / name, "byte", 0, tmp_path / "cache")
    with pytest.raises(DataError, match="cannot write"):
        data.prepare("nursery", "byte", 0, write(tmp_path / "file", "x"))


# ---- Splits and phases -----------------------------------------------------------------------


def test_no_document_leaks(tmp_path):
    documents = [f"{STORY}Number {i % 300}." for i in range(900)]  # every document three times
    documents += [f"You: {i}?\nSam: {i}!" for i in range(100)]
    path = write(tmp_path / "a.txt", f"\n{data.END_TEXT}\n".join(documents))
    made = data.prepare(path, "byte", 0, tmp_path / "cache")
    held = texts_of(made.heldout, made.tokenizer)
    train = sum((texts_of(made.train[p], made.tokenizer) for p in data.DOCUMENTS), [])
    assert not set(train) & set(held) and set(train) | set(held) == set(documents)
    assert {True, False} == set(map(data.is_talk, held))
    assert 1 <= len(held) < 50
    many = [f"{STORY}Another {i}." for i in range(3000)]
    held = set(data.hold_out(many)[1])
    assert held == {d for d in many if int(data.sha256(d), 16) < 0.02 * 2**256}
    assert held == set(data.hold_out(many + [f"One more {i}" for i in range(9)])[1]) & set(many)
    large = data.hold_out([f"{i} " * 20_000 for i in range(1000)], share=0.5)[1]
    assert 0 < sum(map(len, large)) < 2_000_000


def book(seed, n=400, gap="\n\n"):
    rng = random.Random(seed)
    return gap.join(" ".join(rng.choices(SAMPLE.split(), k=30)) + "." for _ in range(n))


@pytest.mark.parametrize("documents", [
    [book(1)], [book(1), book(2)], [book(1, gap=" "), book(2, gap="")], [book(1, 30)],
    [book(0, 900), *(f"{STORY}{i}" for i in range(80))], [book(i, 40) for i in range(12)],
    [f"{STORY}{i}" for i in range(100)], [book(i, 2) for i in range(40)], [book(1)] * 3,
    ["\n".join(f"You: {SAMPLE}{i}?\nSam: {STORY}{i}!" for i in range(300))],
], ids=len)  # fmt: skip
@pytest.mark.parametrize("salt", range(4))
def test_a_fiftieth_of_the_text_is_held_out(documents, salt):
    documents = [re.sub("hat", f"hat{salt}", document) for document in documents]
    rest, held = data.hold_out(documents)
    total = sum(map(len, set(documents)))
    assert 0.008 < sum(map(len, held)) / total < 0.045
    assert set(map(data.is_talk, rest + held)) == {data.is_talk(documents[0])}
    whole = Counter(re.findall(r"\S+", " ".join(documents)))  # no word is lost, none is doubled
    copies = Counter({w: n * len(documents) // len(set(documents)) for w, n in
                      Counter(re.findall(r"\S+", " ".join(held))).items()})  # fmt: skip
    assert Counter(re.findall(r"\S+", " ".join(rest))) + copies == whole
    assert not any(part in document for part in held for document in rest)
    assert len(rest) <= len(documents) + 3 * len(documents) / len(set(documents)) * len(held)


def test_parts_are_whole_paragraphs_and_short_documents_whole(tmp_path):
    path = write(tmp_path / "a.txt", book(3) + f"\n{data.END_TEXT}\n")
    made = data.prepare(path, "byte", 0, tmp_path / "cache", log=pytest.fail)
    assert all(f"\n\n{part}\n\n" in f"\n\n{book(3)}\n\n" for part in both_of(made)[1])
    documents = [f"{STORY}{STORY}{i}" for i in range(20)]
    rest, held = data.hold_out(documents)
    assert len(held) == 1 and set(rest + held) == set(documents)
    assert data.hold_out(["one"]) == (["one"], []) and data.hold_out([]) == ([], [])


@pytest.mark.parametrize("name, held", [
    ("TinyStoriesV2-GPT4-valid.txt", 1), ("my-val.txt", 1), ("val/a.txt", 1), ("valid_v1.txt", 1),
    ("b/Valid.txt", 1), ("TEST.jsonl", 1), ("Test2.txt", 1), ("GPTValid.txt", 1), ("dev.json", 1),
    ("my_validation_set.txt.gz", 1), ("x/heldOut/y/z.md", 1), ("interval.txt", 0), ("a.text", 0),
    ("latest.txt", 0), ("test/train.txt", 0), ("train-valid/valid.txt", 1), ("evaluate.txt", 0),
    ("contest/protest.txt", 0), ("valid-train.txt", 0),
])  # fmt: skip
def test_held_out_files_are_known_by_name(name, held, tmp_path):
    write(tmp_path / "a" / "stories.txt", data.END_TEXT.join(["one", "two", "three"]))
    text = data.END_TEXT.join(["three", "four"])
    raw = "\n".join(json.dumps({"text": d}) for d in ("three", "four")) if "json" in name else text
    write(tmp_path / name, gzip.compress(raw.encode()) if name.endswith("gz") else raw)
    log = []
    made = data.prepare(tmp_path, "byte", 0, tmp_path / "data", log=log.append)
    assert made.dataset == str(tmp_path) and log == [f"held out, by name: {name}"] * held
    train, out = both_of(made)
    if held:
        assert (train, sorted(out)) == (["one", "two"], ["four", "three"])
    else:
        assert len(out) == 1


def test_not_all_files_are_held_out(tmp_path):
    for name in ("test1.txt", "test2.txt"):
        write(tmp_path / name, data.END_TEXT.join(f"{name}{i}" for i in range(30)))
    made = data.prepare(tmp_path, "byte", 0, tmp_path / "cache")
    train, held = both_of(made)
    assert len(train) == 59 and len(held) == 1
    assert data.held_out_files(["valid.txt"]) == []


def test_cuts():
    text = 'Once, in May, there lived a very small brown dog. "Hi!" said Tom.\n\nHe didn\'t go'
    assert data.words(text)[:4] == ["Once", " in", " May", " there"]
    assert " didn't" in data.words(text)
    assert data.sentences(text) == [
        "Once, in May, there lived a very small brown dog.", ' "Hi!"', " said Tom.",
        "\n\nHe didn't go",
    ]  # fmt: skip
    pieces = ["Once,", " in May,", " there lived a", " very small brown dog."]
    assert data.phrases(text)[:4] == pieces
    for document in (text, SAMPLE, random_text(7)):
        assert "".join(data.sentences(document)).strip() == document.strip()
        assert re.sub(r"\s+$", "", "".join(data.phrases(document))) == document.rstrip()
        assert all(len(p.split()) <= 6 for p in data.phrases(document))


def test_words_keep_their_tokens(corpus):
    tokenizer = make("bpe", corpus)
    for text in corpus[:50]:
        running = tokenizer.encode(text)
        for word in data.words(text):
            ids = tokenizer.encode(word)
            assert any(running[i : i + len(ids)] == ids for i in range(len(running)))


def test_streams(tmp_path):
    prepared = data.prepare("nursery", "bpe", 600, tmp_path)
    tokenizer = prepared.tokenizer
    assert tokenizer.vocab_size == 600
    assert set(prepared.train) == set(prepared.valid) == set(data.PHASES)
    whole = texts_of(prepared.heldout, tokenizer)
    held, bits = data.nursery(8_000, "held-out 0")
    assert sorted(whole) == sorted(held)
    assert prepared.heldout_bytes == sum(len(text.encode()) for text in whole)
    assert prepared.entropy_bits == pytest.approx(bits) and 500 < bits < 8 * 8_000
    for stream in [*prepared.train.values(), prepared.heldout]:
        assert isinstance(stream, np.memmap) and stream.dtype == np.uint16 and stream.ndim == 1
    told, talks = (texts_of(prepared.train[p], tokenizer) for p in data.DOCUMENTS)
    assert not any(map(data.is_talk, told)) and all(map(data.is_talk, talks))
    assert not set(told + talks) & set(whole)
    both = texts_of(prepared.train["blended"], tokenizer)
    assert [text for text in both if text] == told + talks
    known = " ".join(whole)
    for phase in data.CUTS:
        assert all(text in known for text in texts_of(prepared.valid[phase], tokenizer))


def test_the_order_of_pieces_is_drawn(corpus, monkeypatch):
    """In the order of the text, small pieces would be running text."""
    byte, in_order = Bytes(), [w for text in corpus for w in data.words(text)]
    first, second = (data.cut(corpus, "words", byte, seed) for seed in (0, 1))
    assert sorted(first) == sorted(in_order) and first not in (in_order, second)
    assert data.cut(corpus, "words", byte, 0) == first
    told = data.cut(corpus, "stories", byte)
    assert told == [text for text in corpus if not data.is_talk(text)]  # whole ones are not
    monkeypatch.setattr(data, "PHASE_TOKENS", 20_000)  # large sources are thinned
    assert 10_000 < sum(len(piece) + 1 for piece in data.cut(corpus, "words", byte)) < 22_000


def test_the_order_of_held_out_documents_is_drawn(tmp_path):
    lines = [f"{i}" for i in range(99)]
    write(tmp_path / "in" / "train.txt", STORY)
    write(tmp_path / "in" / "valid.txt", data.END_TEXT.join(lines))
    first, again, other = (
        both_of(data.prepare(tmp_path / "in", "byte", i, tmp_path / "c", seed=seed))[1]
        for i, seed in enumerate((0, 0, 1))
    )
    assert sorted(first) == sorted(lines) and first == again and first not in (lines, other)


def test_a_tokenizer_learns_of_training_text_only(tmp_path):
    write(tmp_path / "in" / "train.txt", data.END_TEXT.join([STORY * 9, "zebra " * 99]))
    write(tmp_path / "in" / "valid.txt", "quokka " * 999)
    for kind in ("bpe", "lengthmax"):
        learnt = b" ".join(data.prepare(tmp_path / "in", kind, 400, tmp_path / "c").tokenizer.vocab)
        assert b"zebra" in learnt and b"q" not in learnt
    assert "q" in data.prepare(tmp_path / "in", "char", 0, tmp_path / "c").tokenizer.vocab


def test_a_tokenizer_learns_of_a_part_of_much_text(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", stories(100))
    monkeypatch.setattr(data, "BPE_BYTES", 1000)
    learn = lambda kind, texts, size: seen.extend(texts) or Bytes()  # noqa: E731
    monkeypatch.setattr(data, "train_tokenizer", learn)
    seen = []
    data.prepare(path, "byte", 0, tmp_path / "c")
    assert 500 < sum(map(len, seen)) <= 1000 and seen[-1] > f"{STORY}90"  # from all over the text


def test_large_vocabularies_and_letters_of_many_bytes(tmp_path):
    pairs = BPE([bytes([a, b]) for a in range(256) for b in range(256)])
    documents = [f"{PROSE[:200]}\n{i}" for i in range(60)]
    path = write(tmp_path / "a.txt", data.END_TEXT.join(documents))
    made = data.prepare(path, pairs, 0, tmp_path)
    held = texts_of(made.heldout, pairs)
    assert made.heldout.dtype == np.uint32 and made.heldout.max() == pairs.end == 65_792
    assert made.heldout_bytes == len("".join(held).encode()) > len("".join(held))
    assert set(held + texts_of(made.train["stories"], pairs)) == set(documents)


def test_a_data_set_is_registered_in_one_place(monkeypatch, tmp_path):
    def riddles(data_dir, seed, log):
        assert data_dir == tmp_path and seed == 5
        log("asking")
        return "v1", lambda: (["a?", "b?", "c?", "b?"], ["c?", "d?"], {"entropy_bits": 7.0})

    monkeypatch.setitem(data.DATASETS, "riddles", riddles)
    log = []
    made = data.prepare("riddles", "char", 0, tmp_path, seed=5, log=log.append)
    assert (made.name, made.dataset, made.sha256) == ("riddles", "riddles", "v1")
    assert made.entropy_bits == 7.0 and log == ["asking"]
    train, held = both_of(made)
    assert set(train) == {"a?", "b?"} and sorted(held) == ["c?", "d?"]  # nothing leaks


def test_the_nursery_depends_on_the_seed(monkeypatch, tmp_path):
    texts = {"train 3": ["a", "b", "c", "b"], "held-out 3": ["b", "d"]}
    monkeypatch.setattr(data, "nursery", lambda size, seed: (texts[seed], 7.0 + size))
    made = data.prepare("nursery", "byte", 0, tmp_path, seed=3)
    assert made.entropy_bits == 7.0 + data.NURSERY_BYTES[1]
    assert list(map(sorted, both_of(made))) == [["a", "c"], ["b", "d"]]


def test_long_streams_have_one_end_between_texts(tmp_path):
    texts = [f"{i}" for i in range(9000)]  # they are encoded 4096 at a time
    data._write(tmp_path / "a.bin", texts, Bytes(), "uint16")
    assert texts_of(np.fromfile(tmp_path / "a.bin", "uint16"), Bytes()) == texts


# Parts of conversations, and whether Sam says them or they end what Sam says; "" stands for END.
TALKS = [
    [("You: Hé\nSam:", 0), (" Ho, hé!\n\nLine two\nYou:", 1), (" 文?\nSam:", 0), (" Yés.", 1),
     ("", 1)],
    [("You: A\nYou: b\nSam:", 0), (" Sam: you\n You: \nYou:", 1), (" Bye, Sam: bye", 0), ("", 0)],
    [("You: the cat sat on the hat\nSam:", 0), (" the cat sat on the hat", 1), ("", 1)],
]  # fmt: skip


@pytest.mark.parametrize("kind", ["byte", "bpe", "lengthmax", "char"])
def test_answers_are_marked(kind, tmp_path, corpus):
    talks = ["".join(part for part, _ in talk) for talk in TALKS]
    wanted = {talk: [[mark] * len(part.encode()) or [mark] for part, mark in parts]
              for talk, parts in zip(talks, TALKS)}  # fmt: skip
    write(tmp_path / "in" / "train.txt", data.END_TEXT.join([*corpus[:60], *talks]))
    write(tmp_path / "in" / "valid.txt", data.END_TEXT.join([talks[0], STORY]))
    made = data.prepare(tmp_path / "in", kind, 400, tmp_path / "cache")
    tokenizer, long = made.tokenizer, 0
    assert set(made.answers) == {"train", "valid"}
    for split, answers in made.answers.items():
        tokens = getattr(made, split)["conversations"]
        assert isinstance(answers, np.memmap) and answers.dtype == np.uint8 and answers[0] == 0
        assert answers.shape == tokens.shape and set(answers.tolist()) == {0, 1}
        at, texts = 1, texts_of(tokens, tokenizer)
        for text in texts:
            marks = sum(wanted.get(text, []), [])
            byte = 0
            for token in tokenizer.encode(text):
                assert not marks or answers[at] == marks[byte], (text, byte)
                length = len(tokenizer.decode_bytes([token]))
                at, byte, long = at + 1, byte + length, long + (length > 1)
            assert tokens[at] == tokenizer.end and (not marks or answers[at] == marks[-1])
            at += 1
        assert at == len(tokens) and (talks[0] in texts) == (split == "valid")
    assert long > {"byte": -1, "char": 3}.get(kind, 50)


def test_the_dataset_can_be_named_again(tmp_path, rows_server, monkeypatch):
    """What `auto` or a relative path meant, from another place and with the tokenizer it had."""
    path = write(tmp_path / "x" / "a.txt", stories(20))
    monkeypatch.chdir(tmp_path)
    names = {"auto": "nursery", "nursery": "nursery", "x": str(path.parent), "x/a.txt": str(path)}
    for given, meant in names.items():
        monkeypatch.chdir(tmp_path)
        with monkeypatch.context() as patch:
            serve_from("http://127.0.0.1:9", patch)
            first = data.prepare(given, "bpe", 300, tmp_path / "c")
        assert first.dataset == meant
        monkeypatch.chdir("/")
        with monkeypatch.context() as patch:
            patch.setattr(data, "_build", None)  # would raise: the first cache is found
            again = data.prepare(meant, first.tokenizer, 300, tmp_path / "c")
        assert again.dataset == meant and np.array_equal(again.heldout, first.heldout)
    other = BPE([b"th", b"he"])
    assert data.prepare(meant, other, 300, tmp_path / "c").tokenizer.hash == other.hash
    name = f"stream:{MIXTURE}"
    assert data.prepare(name, "byte", 0, tmp_path / "c").dataset == name


# ---- The cache -------------------------------------------------------------------------------


def test_a_good_cache_is_used(tmp_path, monkeypatch):
    first = data.prepare("nursery", "byte", 0, tmp_path)
    (folder,) = tmp_path.iterdir()  # nothing temporary is left
    monkeypatch.setattr(data, "_build", None)  # would raise
    again = data.prepare("nursery", "byte", 0, tmp_path)
    assert np.array_equal(first.heldout, again.heldout) and first.sha256 == again.sha256
    assert first.entropy_bits == again.entropy_bits and again.tokenizer.hash == first.tokenizer.hash
    with pytest.raises(TypeError):  # another seed is another cache
        data.prepare("nursery", "byte", 0, tmp_path, seed=1)


def test_another_source_or_size_is_another_cache(tmp_path):
    write(tmp_path / "in" / "a.txt", data.END_TEXT.join([STORY, SAMPLE * 9]))
    write(tmp_path / "in" / "valid.txt", "zebra")
    made = [data.prepare(tmp_path / "in", "bpe", size, tmp_path / "c") for size in (270, 280)]
    assert [m.tokenizer.vocab_size for m in made] == [270, 280]
    (tmp_path / "in" / "valid.txt").rename(tmp_path / "in" / "b.txt")  # now it is for training
    (tmp_path / "in" / "a.txt").rename(tmp_path / "in" / "a_valid.txt")
    last = data.prepare(tmp_path / "in", "bpe", 280, tmp_path / "c")
    assert last.sha256 != made[1].sha256
    assert texts_of(last.train["stories"], last.tokenizer) == ["zebra"]


def alter(raw):
    """Still well formed, but another number or another order."""
    number = rb"heldout_bytes\": "
    return raw.replace(number, number + b"1") if number in raw else raw[::-1]


@pytest.mark.parametrize("name", ["heldout.bin", "train_answers.bin", "meta.json"])
@pytest.mark.parametrize("damage", [
    lambda raw: raw[:-1], lambda raw: raw[:99] + bytes([raw[99] ^ 1]) + raw[100:], alter, None,
])  # fmt: skip
def test_a_damaged_cache_is_rebuilt(name, damage, tmp_path):
    log = []
    talks = [f"{data.turn(i)} {STORY}" for i in range(20)]
    path = write(tmp_path / "a.txt", data.END_TEXT.join(talks))
    expected = np.array(data.prepare(path, "byte", 0, tmp_path / "cache", log=log.append).heldout)
    (folder,) = (tmp_path / "cache").iterdir()
    assert log == [] and folder.name.startswith("a.txt-")
    raw = (folder / name).read_bytes()
    (folder / name).write_bytes(damage(raw)) if damage else (folder / name).unlink()
    again = data.prepare(path, "byte", 0, tmp_path / "cache", log=log.append)
    assert np.array_equal(again.heldout, expected)
    assert len(log) == 1 and "damaged" in log[0] and "\n" not in log[0]
    data.prepare(path, "byte", 0, tmp_path / "cache", log=log.append)
    assert len(log) == 1 and len(list((tmp_path / "cache").iterdir())) == 1


def test_a_tokenizer_can_be_brought_along(tmp_path, corpus):
    tokenizer = make("bpe", corpus)
    path = write(tmp_path / "a.txt", stories(20))
    made = data.prepare(path, tokenizer, 0, tmp_path / "c")
    assert made.tokenizer.hash == tokenizer.hash and made.answers == {}  # no conversations
    assert data.prepare(path, "char", 0, tmp_path / "c").tokenizer.kind == "char"
    assert data.prepare(path, "char", 0, tmp_path / "c", seed=1).tokenizer.kind == "char"
    assert len(list((tmp_path / "c").iterdir())) == 3


def _prepare_in_process(path, folder, results):
    results.put(int(np.sum(data.prepare(path, "byte", 0, folder).heldout, dtype=np.int64)))


def test_two_processes_at_once(tmp_path):
    path = write(tmp_path / "a.txt", stories(2000))
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    arguments = (path, tmp_path / "cache", results)
    both = [fork.Process(target=_prepare_in_process, args=arguments) for _ in range(3)]
    for process in both:
        process.start()
    sums = {results.get(timeout=30) for _ in both}
    for process in both:
        process.join()
    assert len(sums) == 1 and [p.exitcode for p in both] == [0, 0, 0]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_second_finisher_uses_the_first_cache(tmp_path, monkeypatch):
    """Both build; the slower one finds a good folder in its place and leaves it alone."""
    build = data._build

    def slow_build(*arguments):
        monkeypatch.setattr(data, "_build", build)
        data.prepare("nursery", "byte", 0, tmp_path)
        inodes.append([path.stat().st_ino for path in tmp_path.glob("nursery-*")])
        build(*arguments)

    inodes = []
    monkeypatch.setattr(data, "_build", slow_build)
    data.prepare("nursery", "byte", 0, tmp_path)
    assert inodes == [[path.stat().st_ino for path in tmp_path.iterdir()]]


# ---- Batches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size, length", [(1000, 7), (103, 10), (20, 10), (11, 10), (23, 10)])
def test_windows_come_once_per_epoch(size, length):
    tokens = np.arange(size, dtype=np.uint16)
    n = max(1, (size - length) // length)
    epochs = []
    for epoch in range(5):
        steps = range(epoch * n, epoch * n + n)
        rows = [data.batch(tokens, step, 1, length, seed=3) for step in steps]
        x = torch.cat([x for x, _ in rows]).flatten().tolist()
        assert len(set(x)) == n * length  # nothing twice: the windows do not overlap
        assert all(torch.equal(x + 1, y) for x, y in rows)
        epochs.append(x)
    if n > 3:
        assert len({tuple(x) for x in epochs}) == 5  # every epoch in another order
        assert len({min(x) for x in epochs}) > 1  # and from another offset
        assert n * length > size - 2 * length  # little of the stream is left out


def test_ranks_share_one_batch():
    tokens = np.random.default_rng(0).integers(0, 60_000, 5000).astype(np.uint16)
    for step in (0, 7, 1000):
        x, y = data.batch(tokens, step, 8, 16, seed=1)
        assert x.shape == y.shape == (8, 16) and x.dtype == y.dtype == torch.int64
        assert torch.equal(x[:, 1:], y[:, :-1])
        parts = [data.batch(tokens, step, 8, 16, 1, rank, 4) for rank in range(4)]
        assert torch.equal(torch.cat([part[0] for part in parts]), x)
        assert torch.equal(torch.cat([part[1] for part in parts]), y)
        data._epoch.cache_clear()
        assert torch.equal(data.batch(tokens, step, 8, 16, seed=1)[0], x)
        assert not torch.equal(data.batch(tokens, step, 8, 16, seed=2)[0], x)
    with pytest.raises(DataError, match="too few"):
        data.batch(tokens[:16], 0, 1, 16, 0)


def feed_of(corpus, curriculum, n, rehearse=0.0, answers_only=False, seed=0, **more):
    """A Feed of n tokens per step."""
    c = SimpleNamespace(tokens_per_step=n, rehearse=rehearse, answers_only=answers_only, seed=seed)
    return data.Feed(c, corpus, curriculum, **more)


def corpus_of(**phases):
    """A corpus whose phases count upwards, each in a range of its own."""
    streams = {
        phase: np.arange(1000 * i, 1000 * i + size, dtype=np.uint16)
        for i, (phase, size) in enumerate(phases.items())
    }
    return SimpleNamespace(train=streams, mixture=[])


def test_a_feed_rehearses_the_phase_before():
    corpus, curriculum = corpus_of(words=900, stories=900), [("words", 8), ("stories", 16)]
    feed = feed_of(corpus, curriculum, 128, 0.25, seed=1)
    x, y = feed.next(0, 0)
    assert x.shape == (16, 8) and x.max() < 1000  # nothing is before the first phase
    assert feed.position is None and not torch.equal(x, feed.next(0, 1)[0])
    x, y = feed.next(1, 0)
    assert x.shape == (8, 16) and torch.equal(y, x + 1)
    assert (x[:, 0] < 1000).tolist() == [False] * 6 + [True] * 2
    ranks = [
        feed_of(corpus, curriculum, 128, 0.25, seed=1, rank=r, world=2).next(1, 0)[0]
        for r in (0, 1)
    ]
    assert [len(part) for part in ranks] == [4, 4]
    assert sorted(map(tuple, torch.cat(ranks).tolist())) == sorted(map(tuple, x.tolist()))


def test_a_feed_of_answers_ignores_the_rest():
    corpus = corpus_of(conversations=900)
    corpus.answers = {"train": (np.arange(900) % 3 == 0).astype(np.uint8)}
    talks = [("conversations", 16), ("conversations", 8)]
    feed = feed_of(corpus, talks, 128, 0.25, answers_only=True)
    for phase in (0, 1):
        x, y = feed.next(phase, 5)
        assert torch.equal(y == data.IGNORED, (x + 1) % 3 != 0)
        assert torch.equal(y[y != data.IGNORED], (x + 1)[y != data.IGNORED])


def test_a_feed_streams_and_knows_where_it_is(rows_server, tmp_path, monkeypatch):
    corpus = data.prepare(f"stream:{MIXTURE}", "byte", 0, tmp_path)
    curriculum = [("words", 8), ("stories", 16)]
    for world in (1, 2):
        feeds = [feed_of(corpus, curriculum, 64, rank=r, world=world) for r in range(world)]
        start = [feed.position for feed in feeds]
        x, _ = feeds[0].next(0, 0)  # words come from the sample
        assert x.shape == (8 // world, 8) and feeds[0].position == start[0]
        batches = [feed.next(1, 0)[0] for feed in feeds]
        assert [x.shape for x in batches] == [(4 // world, 16)] * world
        after = [json.loads(json.dumps(feed.position)) for feed in feeds]
        assert after != start
        for r, feed in enumerate(feeds):
            again = feed_of(corpus, curriculum, 64, rank=r, world=world, position=after)
            assert torch.equal(again.next(1, 9)[0], feed.next(1, 1)[0])
    with pytest.raises(DataError, match="number of processes: resume with the same"):
        feed_of(corpus, curriculum, 64, position=after)
    with pytest.raises(DataError, match="number of processes: resume with the same"):
        feed_of(corpus, curriculum, 64, rank=1, world=2, position=after[:1])


def test_turn():
    assert data.turn("Who is Mia?") == "You: Who is Mia?\nSam:"
    text, _ = tell("quizzes", seeded(0))
    assert text.startswith(data.turn(text[len(data.YOU) : text.index("\n")]) + " ")


def test_training_goes_on_in_a_stream_where_it_stopped(rows_server, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "HELD_BYTES", 2_000)
    monkeypatch.setattr(sources, "SAMPLE_BYTES", 8_000)
    common = ["configs/sam_6m.py", f"--dataset=stream:{MIXTURE}", f"--data_dir={tmp_path}/data"]
    common += "--tokenizer=byte --vocab_size=300 --n_embd=16 --n_hidden=32 --n_layer=1".split()
    common += "--tokens_per_step=128 --phases=stories:32 --eval_interval=2".split()
    common += "--eval_length=32 --sample_tokens=0 --device=cpu --threads=1".split()

    def losses(out, *more):
        train.main([*common, f"--out_dir={tmp_path / out}", *more])
        lines = (tmp_path / out / "log.jsonl").read_text().splitlines()
        return [(x["step"], x["train"], x["heldout"]) for x in map(json.loads, lines)]

    whole = losses("whole", "--max_steps=6")
    (tmp_path / "whole" / "step_00000006.pt").unlink()  # as if killed before it was written
    (tmp_path / "whole" / "best.pt").unlink()
    assert losses("whole", "--max_steps=6", "--init_from=resume") == whole
