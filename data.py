"""Text in, windows of tokens out: sources, the phases of the curriculum, batches.

    source -> documents -> train | held-out -> pieces -> streams  END piece END piece END ...

Read from leaf to root: downloads, files, phases, streamed mixtures, the cache behind `prepare`, and
`batch`, which every step calls. tokenizer.py and nursery.py stand beside this file.
A document is a string: one that begins with "You: " is a conversation, any other a story.
"""

import codecs
import functools
import gzip
import hashlib
import itertools
import json
import math
import os
import random
import re
import shlex
import tempfile
import threading
import time
import zlib
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np
import requests
import torch
from tqdm import tqdm

import config
from nursery import GRAMMAR, nursery
from tokenizer import DataError, Tokenizer, sha256, tokenizer_from_state, train_tokenizer

END_TEXT = "<|endoftext|>"  # separates the documents of a .txt file; never encoded as text
PHASES = ("words", "phrases", "sentences", "stories", "conversations")  # the curriculum
YOU, SAM = "You: ", "Sam: "  # a conversation is lines of these
FORMAT = 3  # raise it when the same source would give other token files: old caches are left


def turn(text: str) -> str:
    """The prompt after which Sam answers `text`, written as in the corpora: "You: text\nSam:"."""
    return f"{YOU}{text}\n{SAM.rstrip()}"


# ---- Downloads -------------------------------------------------------------------------------

BASES = {  # servers
    "hub": "https://huggingface.co/datasets",
    "raw": "https://raw.githubusercontent.com",
    "rows": "https://datasets-server.huggingface.co/rows",
}
TINY_STORIES = "{hub}/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-"
DOLLY = "{hub}/databricks/databricks-dolly-15k/resolve/main/databricks-dolly-15k.jsonl"
OPEN_ASSISTANT = "{hub}/OpenAssistant/oasst1/resolve/main/2023-04-12_oasst_ready.trees.jsonl.gz"
REAL_SAM = {  # file: (address, how many of its first bytes)
    "train.txt": (TINY_STORIES + "train.txt", 200_000_000),
    "valid.txt": (TINY_STORIES + "valid.txt", 1_000_000),
    "alpaca.jsonl": ("{raw}/tatsu-lab/stanford_alpaca/main/alpaca_data.json", None),
    "dolly.jsonl": (DOLLY, None),
    "oasst.jsonl.gz": (OPEN_ASSISTANT, None),
}


def download(url, path, sha256=None, max_bytes=None, attempts=6, timeout=30.0, pause=1.0):
    """Fetch `url` into the file `path`; on failure DataError, and nothing under that name.

    Bytes gather in path.part, where a later call resumes. Size and checksum must be those that
    the server declares (or `sha256`). max_bytes: take only the first bytes and cut them back to
    the last END_TEXT. timeout: seconds without a byte. pause: seconds before the second attempt,
    doubled from then on, unless the server says how long to wait (60 s at most).
    """
    part = Path(f"{path}.part")

    def attempt():
        part.parent.mkdir(parents=True, exist_ok=True)
        _fetch(url, part, sha256, max_bytes, timeout)
        os.replace(part, path)

    retry(attempt, url, attempts, pause)


def retry(attempt, url, attempts, pause):
    """attempt(), again after each OSError, `attempts` times in all; then DataError."""
    for number in range(attempts):
        try:
            return attempt()
        except OSError as error:  # of the disk or, as requests' own errors are, of the network
            known = not isinstance(error, requests.RequestException)  # those fill several lines
            reason = str(error) if known else type(error).__name__
            wait = getattr(error, "wait", pause * 2**number)
        if number + 1 < attempts:
            time.sleep(min(wait, 60.0))
    raise DataError(f"cannot download {url} ({reason}): run again to resume, or use a local file")


def _fetch(url, part: Path, sha256, max_bytes, timeout) -> None:
    """One attempt to complete `part`; OSError when another one may go better."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"}  # or sizes would be those of compressed bytes
    if have or max_bytes:
        headers["Range"] = f"bytes={have}-{max_bytes - 1 if max_bytes else ''}"
    with requests.get(url, headers=headers, stream=True, timeout=timeout) as answer:
        have, total = _check_answer(answer, url, part, have)
        wanted = min(total or max_bytes, max_bytes) if max_bytes else total
        with open(part, "ab" if have else "wb") as file:
            bar = tqdm(total=wanted, initial=have, unit="B", unit_scale=True, desc=part.stem)
            for chunk in answer.iter_content(1 << 16):
                file.write(chunk)
                bar.update(len(chunk))
                if max_bytes and file.tell() >= max_bytes:  # a server without Range sends it all
                    file.truncate(max_bytes)
                    break
            bar.close()
            file.flush()
            os.fsync(file.fileno())
    size = part.stat().st_size
    whole = total in (None, size)
    declared = sha256 or _declared_sha256(answer)
    if wanted and size < wanted:
        raise OSError(f"received {size} of {wanted} bytes")
    if (wanted and size > wanted) or (whole and declared not in (None, _sha256_of({"": part}))):
        part.unlink()
        raise OSError(f"the {size} bytes received are not those announced")
    if max_bytes and not whole:
        _cut_back(part)


def _check_answer(answer, url, part: Path, have: int):
    """(bytes of `part` to keep, bytes of the whole file or None) after a look at the headers."""
    _check_status(answer, url, (200, 206, 416))
    code, headers = answer.status_code, answer.headers
    if code == 200:  # the whole file, even if a range was asked for
        length = headers.get("Content-Length", "")
        return 0, int(length) if length.isdigit() else None
    span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", headers.get("Content-Range", ""))
    if code == 206 and span and int(span[1]) == have:
        return have, int(span[2])
    part.unlink(missing_ok=True)  # it may be no beginning of this file: start again
    raise OSError(f"no bytes from {have} on")


def _check_status(answer, url, good=(200,)) -> None:
    """OSError when asking again may help, with the seconds to wait if the server names them."""
    code, wait = answer.status_code, answer.headers.get("Retry-After", "")
    if code == 429 or code >= 500:
        error = OSError(f"status {code}")
        if wait.isdigit():
            error.wait = float(wait)
        raise error
    if code not in good:
        raise DataError(f"cannot download {url} (status {code}): check the address")


def _declared_sha256(answer) -> str | None:
    """Hugging Face names the sha256 of a large file in the answer that redirects to it."""
    tags = [step.headers.get("X-Linked-ETag", "").strip('"') for step in (*answer.history, answer)]
    return next((tag for tag in tags if re.fullmatch(r"[0-9a-f]{64}", tag)), None)


def _cut_back(part: Path) -> None:
    """End a file of which only the beginning was taken after its last whole document."""
    at = part.read_bytes().rfind(END_TEXT.encode())
    if at > 0:
        os.truncate(part, at)


def real_sam(folder, bases=BASES, fetch=download) -> Path:
    """The folder of TinyStories, Alpaca, Dolly and OpenAssistant; downloads what is missing."""
    for name, (url, max_bytes) in REAL_SAM.items():
        if not (path := Path(folder) / name).exists():
            fetch(url.format(**bases), path, max_bytes=max_bytes)
    return Path(folder)


def online(bases=BASES, seconds=4.0) -> bool:
    """Whether the server of the downloads answers within `seconds`."""
    answers = []

    def ask():
        with suppress(requests.RequestException):
            answers.append(requests.head(bases["hub"], timeout=seconds))

    thread = threading.Thread(target=ask, daemon=True)  # for looking up a name has no timeout
    thread.start()
    thread.join(seconds)
    return any(answer.ok for answer in answers)


# ---- Files -----------------------------------------------------------------------------------

TEXT, RECORDS = (".txt", ".text", ".md"), (".jsonl", ".json")  # in any case; also with .gz
HELD_OUT = ("valid", "val", "validation", "test", "dev", "eval", "held", "heldout", "holdout")


def list_files(root: Path, own=(), log=print) -> dict[str, Path]:
    """The files with text at `root`, a file or a folder: path relative to the folder -> file.
    Left out: dot files and, inside the folder, caches and the program's `own` folders."""
    if not root.exists():
        raise DataError(f"no file or folder {root}: give nursery, real_sam, auto or a path")
    base, files, others = root.resolve(), {}, set()
    own = [Path(os.path.expanduser(folder)).resolve() for folder in own]
    own = [root / folder.relative_to(base) for folder in own if base in folder.parents]
    for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
        name = path.relative_to(root).as_posix() if path != root else path.name
        is_hidden = re.search(r"(^|/)(\.|__MACOSX/)", name) and path != root
        is_cache = path.name == "meta.json" and path.with_name("heldout.bin").exists()
        is_log = path.name == "log.jsonl" and any(path.parent.glob("*.pt"))  # of some run
        if is_hidden or is_cache or is_log or any(f in path.parents for f in own) or not path.is_file():
            continue
        if name.lower().removesuffix(".gz").endswith(TEXT + RECORDS):
            files[name] = path
        else:
            others.add(path.suffix or path.name)
    kinds = " ".join(sorted(others)[:9])
    if not files:
        raise DataError(
            f"{root} has no text{f', only {kinds}' if kinds else ''}: give text "
            f"({' '.join(TEXT)}) or records ({' '.join(RECORDS)}), each also as .gz"
        )
    if others:
        log(f"not read, by its suffix: {kinds}")
    return files


def read_documents(path, log=print) -> list[str]:
    """All documents of a file or a folder."""
    found = read_files(list_files(Path(os.path.expanduser(path)), log=log), log)
    return [document for documents in found.values() for document in documents]


def read_files(files: dict[str, Path], log=print) -> dict[str, list[str]]:
    """The documents of each file. DataError when one is unreadable or has none, unless it is a
    .json beside others: that may be metadata."""
    found = {}
    for name, path in files.items():
        documents, refused = read_file(path, name)
        if documents:
            found[name] = documents
        elif len(files) == 1 or not name.lower().endswith(".json"):
            raise DataError(
                f"{name} holds no text ({refused or 'it is empty'}): give words, or records with "
                "the keys text, messages, conversations, or prompt and response"
            )
        if refused:
            log(f"{name}: {refused}")
    return found


def read_file(path: Path, name: str) -> tuple[list[str], str]:
    """(documents of one file, what was refused of it). DataError when it is unreadable."""
    is_gz, start = name.lower().endswith(".gz"), 0
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if is_gz else raw
        has_mark = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = raw.decode("utf-16" if has_mark else "utf-8-sig")
    except UnicodeDecodeError as error:
        text, start = "\0", error.start
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {name} ({error}): check the file") from None
    if "\0" in text:
        first = max(0, start // 2 * 2 - 100_000)
        encoding = _encoding(raw[first : first + 200_000])
        if not encoding and b"\0" in raw:
            raise DataError(f"{name} is binary or damaged: give UTF-8 text")
        source = shlex.quote(str(path))
        raise DataError(
            f"{name} is not UTF-8 (byte {start}){f' but seems to be {encoding}' * bool(encoding)}: "
            + f"convert it, as in {f'gunzip -c {source} | ' * is_gz}iconv -c -f "
            + f"{encoding or 'ITS_ENCODING'} -t utf-8 {'' if is_gz else source} > new.txt"
        )
    text = re.sub(r"\r\n?", "\n", text)
    is_text = name.lower().removesuffix(".gz").endswith(TEXT)
    return (read_text(text), "") if is_text else read_records(text)


def _encoding(sample: bytes) -> str | None:
    """What bytes that are not UTF-8 seem to be: UTF-8 with a few damaged ones, or an encoding by
    which they are text of mostly ASCII characters."""
    text = sample.decode(errors="replace")
    if b"\0" not in sample and len(re.findall("[^\0-\x7f\ufffd]", text)) > text.count("\ufffd"):
        return "utf-8"
    for encoding in ("utf-16le", "utf-16be", "cp1252"):
        text = sample.decode(encoding, errors="replace")
        is_mostly_ascii = len(re.findall("[\t-\x7f]", text)) > 0.75 * len(text)
        if is_mostly_ascii and not re.search("[\0-\x08\ufffd]", text):
            return encoding
    return None


def blocks(text: str, size: int):
    """Parts of `text` of `size` to 2 `size` characters. They end with a paragraph, else with a
    line, a sentence, a word; those of a conversation, however long, before a turn of the user."""
    marks, reach = (r"\n\s*\n", r"\n", r"(?<=[.!?])\s|(?<=[。！？])", r"\s", ""), 2 * size
    if is_talk(text):
        marks, reach = (rf"\n(?={YOU})",), len(text)
    at = 0
    while len(text) - at > 2 * size:
        cuts = (re.compile(mark).search(text, at + size, at + reach) for mark in marks)
        if not (cut := next(filter(None, cuts), None)):
            break
        yield text[at : cut.end()]
        at = cut.end()
    yield text[at:]


def read_text(text: str) -> list[str]:
    """Documents between END_TEXT marks, huge ones in parts; without marks, blocks."""
    size = 100_000 if END_TEXT in text else 2000
    parts = (block for part in text.split(END_TEXT) for block in blocks(part.strip(), size))
    return [document for part in parts if (document := part.strip())]


def read_records(text: str) -> tuple[list[str], str]:
    """(documents of JSON lines, or of one JSON list or object; what was refused and why)."""
    try:
        whole, unit = json.loads(text), "record"
        records = whole if isinstance(whole, list) and not _is_chat(whole) else [whole]
    except (ValueError, RecursionError):
        records, unit = text.split("\n"), "line"
    documents, refused = [], []
    for number, record in enumerate(records, 1):
        try:
            if unit == "line" and not record.strip():
                continue
            document = _document(json.loads(record) if unit == "line" else record)
            document = document.encode(errors="replace").decode()  # JSON may halve emoji
            documents.append(re.sub(r"\r\n?", "\n", document).strip())
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            known = str(error) if isinstance(error, ValueError) else "unknown structure"
            refused.append(f"{unit} {number}: {getattr(error, 'msg', known)}")
    n = len(refused) + len(documents)
    note = refused and f"skipped {len(refused)} malformed of {n} records; the first, {refused[0]}"
    return [document for document in documents if document], note or ""


CHAT = ("messages", "conversations", "conversation")  # keys of records, the first one counts
QUESTION = ("instruction", "prompt", "question", "query", "user")
ANSWER = ("output", "response", "completion", "answer", "assistant")
ROLES = dict.fromkeys(("user", "human", "prompter"), YOU)
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "ai"), SAM)
ROLES |= dict.fromkeys(("system", "developer", "tool", "function", "function_call",
                        "tool_call", "tool_response", "observation", "ipython"), "")  # fmt: skip


def _document(record) -> str:
    """A record as a document. An error says why it is none."""
    record = {"messages": record} if isinstance(record, list) else record
    if not isinstance(record, dict):
        raise ValueError(f"{json.dumps(record)[:30]} is no object")
    chat, question, answer = (
        next((key for key in keys if key in record), None) for keys in (CHAT, QUESTION, ANSWER)
    )
    if chat:
        turns = map(_turn, record[chat])
    elif isinstance(message := record.get("prompt"), dict):  # a tree
        turns = []
        while message:
            turns.append((SAM if len(turns) % 2 else YOU, message["text"]))
            message = min(message.get("replies") or [None], key=_rank)
    elif question and answer and isinstance(record[question], list):
        turns = map(_turn, record[question] + record[answer])
    elif question and answer:
        context = record.get("input") or record.get("context")
        turns = [(YOU, f"{_said(record[question])}\n{_said(context)}")]
        turns.append((SAM, _said(record[answer])))
    elif "text" in record:
        return _said(record["text"])
    else:
        raise ValueError(f"no known keys, only {json.dumps([*record])[1:60]}")
    talk = []
    for who, text in turns:
        text = re.sub(rf"\n({YOU[:-1]}|{SAM[:-1]})", r"\n \1", text.strip())  # it is no turn
        if not text or not (talk or who == YOU):  # Sam does not begin
            continue
        if talk and talk[-1][0] == who:
            talk[-1][1] += "\n" + text
        else:
            talk.append([who, text])
    if len(talk) < 2:
        raise ValueError("no user's turn with an answer")
    return "\n".join(who + text for who, text in talk)


def _is_chat(records: list) -> bool:
    return all(isinstance(r, dict) and r.keys() & {"role", "from"} for r in records)


def _turn(message: dict) -> tuple[str, str]:
    """(who, text) of a message; nobody says those of the system and of tools."""
    role = str(message.get("role", message.get("from")))
    if role.lower() not in ROLES:
        raise ValueError(f"unknown role {json.dumps(role)[:30]}")
    who = ROLES[role.lower()]
    return who, _said(message.get("content", message.get("value"))) if who else ""


def _said(content) -> str:
    """The text of a string, of null, or of a list of parts, of which some are no text."""
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else {"text": part} for part in content]
        parts = [p.get("text") for p in parts if str(p.get("type", "text")).endswith("text")]
        return "\n".join(map(_said, parts))
    if not isinstance(content, str | None):
        raise ValueError(f"{json.dumps(content)[:30]} is no text")
    return content or ""


def _rank(reply: dict | None) -> float:
    """People liked rank 0 best; a reply that nobody ranked comes last."""
    return math.inf if not reply or reply.get("rank") is None else reply["rank"]


def is_talk(document: str) -> bool:
    return document.startswith(YOU)


def held_out_files(names) -> list[str]:
    """Those of the files that are called valid or the like, themselves or by their folder, in
    whatever spelling; none if that would be all of them."""
    held = []
    for name in names:
        words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
        known = [word in HELD_OUT for word in map(str.lower, words) if word in (*HELD_OUT, "train")]
        held += [name] * (known[-1:] == [True])
    return held if len(held) < len(names) else []


def read_source(files: dict[str, Path], log=print) -> tuple[list[str], list[str]]:
    """(train, held-out) documents. Files called valid or the like are held out; of stories or
    conversations that these lack, a part is."""
    named = held_out_files(files)
    train, held = [], []
    for name, documents in read_files(files, log).items():
        (held if name in named else train).extend(documents)
    for talk in (False, True):
        if talk not in map(is_talk, held):
            others = [document for document in train if is_talk(document) != talk]
            rest, out = hold_out([document for document in train if is_talk(document) == talk])
            train, held = others + rest, held + out
    train = _without(train, held)
    if not held or not train:
        raise DataError(f"{min(files)}: too little to learn some and hold out some: add text")
    return train, held


def hold_out(documents: list[str], share=0.02, most=1_000_000) -> tuple[list[str], list[str]]:
    """(the rest, what is held out): about 2% of the text, 1 MB at most, but one part at least.

    A part is a document or, of a long one, a block; the rest of that one stays together. Hashes
    decide, so that a part and its copies stay on one side, and do so whatever is added, unless
    few are there: then those of the lowest hashes are taken until they are enough.
    """
    total = sum(map(len, documents))
    share = min(share, most / max(total, 1))
    long = min(max(2 * share * total, 2000), total / 10)
    size = int(max(100, min(2000, share * total / 2)))
    split = [[*blocks(d, size)] if len(d) > long else [d] for d in documents]
    hashes = {part: sha256(part) for parts in split for p in parts if (part := p.strip())}
    order, wanted = sorted(hashes, key=hashes.get), share * sum(map(len, hashes))
    if len(order) < 2:
        return documents, []
    held = {part for part in order if int(hashes[part], 16) < share * 2**256}
    if not 0.5 < sum(map(len, held)) / wanted < 1.5:
        held, size = set(), 0
        for part in order:
            if held and size + len(part) / 2 > wanted:
                break
            held.add(part)
            size += len(part)
    rest, out = [], []
    for parts in split:
        for is_held, run in itertools.groupby(parts, lambda part: part.strip() in held):
            (out if is_held else rest).append("".join(run).strip())
    return [d for d in rest if d], list(dict.fromkeys(out))


def _without(documents: list[str], others: list[str]) -> list[str]:
    others = set(others)
    return [document for document in documents if document not in others]


def _sha256_of(files: dict[str, Path]) -> str:
    """Checksum of the bytes; of several files also of their names, which decide on their use."""
    digest = hashlib.sha256()
    for name, path in files.items():
        digest.update(name.encode() if len(files) > 1 else b"")
        with open(path, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


# ---- Phases ----------------------------------------------------------------------------------
# The same documents at five grains. A piece keeps the blank before it, as in the running text,
# so that a word is made of the same tokens in every phase.

PHASE_TOKENS = 1_000_000  # at most, of words, phrases, sentences: more would cost minutes


def words(text: str) -> list[str]:
    return re.findall(r" ?\w+(?:['’-]\w+)*", text)


def phrases(text: str) -> list[str]:
    """Clauses between signs; one of more than six words is cut into equal parts of 3 to 6."""
    pieces = []
    for clause in re.split(r"(?<=[,;.!?])(?=\s)|(?<=[，；。！？])", text):
        parts = re.findall(r"\s*\S+", clause)
        n = math.ceil(len(parts) / 6)
        edges = [len(parts) * i // n for i in range(n + 1)] if n else []
        pieces += ["".join(parts[a:b]) for a, b in zip(edges, edges[1:])]
    return pieces


def sentences(text: str) -> list[str]:
    """Cut after . ! ? (and closing quotes) before a blank, after 。！？ and at empty lines."""
    ends = r"(?<=[.!?])(?=\s)|(?<=[.!?][\"'”’)])(?=\s)|(?<=[。！？])|(?=\n\n)"
    return [piece for piece in re.split(ends, text) if piece.strip()]


CUTS = {"words": words, "phrases": phrases, "sentences": sentences}


def cut(documents: list[str], phase: str, tokenizer: Tokenizer, seed=0) -> list[str]:
    """The pieces of one phase. Small ones are shuffled: in order they would be running text."""
    if phase not in CUTS:
        return [doc for doc in documents if is_talk(doc) == (phase == "conversations")]
    sample = documents[:: len(documents) // 100 + 1]
    pieces = [piece for document in sample for piece in CUTS[phase](document)]
    tokens = len(pieces) + sum(map(len, tokenizer.encode_batch(pieces)))
    step = math.ceil(tokens / len(sample) * len(documents) / PHASE_TOKENS) or 1
    pieces = [piece for document in documents[::step] for piece in CUTS[phase](document)]
    random.Random(f"{phase} {seed}").shuffle(pieces)
    return pieces


# ---- Streamed mixtures -----------------------------------------------------------------------
# "stream:owner/name/config/split@weight,...": rows of public data sets, a page at a time, as the
# Hugging Face dataset viewer gives them. The pages of a source are read in an order that strides
# through all of it; the first ones are held out, the next ones teach the tokenizer.

STREAM = "stream:"
PAGE = 100  # rows: the most that the server gives at once
AHEAD = 2  # pages fetched in advance of each source
HELD_BYTES, SAMPLE_BYTES = 1_000_000, 4_000_000  # characters of the whole mixture, at least


@dataclass(frozen=True)
class Source:
    name: str  # owner/name/config/split
    weight: float  # share of the tokens
    pages: int = 0
    held: int = 0  # so many pages, the first in order, are held out

    def page(self, i: int) -> int:
        """Page number i in the order of reading, which comes by each page once."""
        stride = int(self.pages * 0.618) or 1  # golden: any run of them is spread evenly
        while math.gcd(stride, self.pages) > 1:
            stride += 1
        return i * stride % self.pages


def parse_mixture(text: str) -> list[Source]:
    """The sources of owner/name/config[/split][@weight],...; weights are made to sum to 1."""
    sources = []
    for part in text.split(","):
        found = re.fullmatch(r"([^/@\s]+(?:/[^/@\s]+){2,3})(?:@(\d*\.?\d+))?", part.strip())
        if not found or not (weight := float(found[2] or 1)):
            raise DataError(
                f"cannot read {part!r} in the stream: write owner/name/config@weight, as in "
                f"{STREAM}HuggingFaceFW/fineweb-edu/sample-10BT@0.75,owner/name/default/train@0.25"
            )
        name = found[1] if found[1].count("/") == 3 else f"{found[1]}/train"
        sources.append(Source(name, weight))
    total = sum(source.weight for source in sources)
    return [replace(source, weight=source.weight / total) for source in sources]


def fetch_page(name: str, page: int, bases=BASES, attempts=12, timeout=30.0, pause=1.0):
    """(documents of a page, pages of the source). Waits and asks again as `download` does."""
    owner, dataset, config, split = name.split("/")
    query = {"dataset": f"{owner}/{dataset}", "config": config, "split": split}
    query |= {"offset": page * PAGE, "length": PAGE}

    def attempt():
        answer = requests.get(bases["rows"], params=query, timeout=timeout)
        _check_status(answer, f"rows of {name}")
        try:
            content = answer.json()
            records = json.dumps([row["row"] for row in content["rows"]])
            pages = math.ceil(content["num_rows_total"] / PAGE)
        except (KeyError, TypeError, ValueError):
            raise OSError("damaged answer") from None
        return read_records(records)[0], pages

    return retry(attempt, f"rows of {name}", attempts, pause)


def sample_mixture(mixture: list[Source], bases=BASES):
    """(training sample, held-out documents, {"mixture": the sources with their pages})."""
    train, held, sources = [], [], []
    for source in mixture:
        _, pages = fetch_page(source.name, 0, bases)
        source, read = replace(source, pages=pages), 0
        for documents, least in ((held, HELD_BYTES), (train, SAMPLE_BYTES)):
            size = 0
            while size < least * source.weight:
                if read + 1 >= pages:  # the last page is for training
                    raise DataError(f"{source.name} is too small to stream: download it")
                found, _ = fetch_page(source.name, source.page(read), bases)
                read, size = read + 1, size + sum(map(len, found))
                if not found:
                    raise DataError(f"{source.name} has no text that is known: use another source")
                documents += found
            if documents is held:
                source = replace(source, held=read)
        sources.append(astuple(source))
    train = _without(train, held)
    if not train:
        raise DataError("what is left to learn of the stream is held out: use a larger source")
    return train, held, {"mixture": sources}


class Stream:
    """Batches without end from a mixture, tokenized and packed: END text END text ...

    The next document is of the source that is furthest behind its share of the tokens, so its
    choice needs no chance; `seed` chooses where in its order a source begins. Rank r of w reads
    pages r, r + w, ... of that order. `position` is all that a checkpoint needs: from it a new
    Stream goes on with the batches that this one would give. Raises DataError.
    """

    def __init__(self, mixture, tokenizer, seed, rank=0, world=1, position=None, fetch=fetch_page):
        self.mixture, self.tokenizer, self.seed = mixture, tokenizer, seed
        self.rank, self.world, self.fetch = rank, world, fetch
        self.run = [list(map(astuple, mixture)), seed, rank, world]  # what a position belongs to
        self.run = json.loads(json.dumps(self.run))  # as JSON gives it back
        position = position or {"run": self.run, "read": [[0, 0, 0] for _ in mixture], "skip": 0}
        if position["run"] != self.run:
            raise DataError(
                "the stream's position is of another mixture, seed or number of processes: "
                "resume with the same ones"
            )
        self.read = [list(source) for source in position["read"]]  # [page, row, tokens] of each
        self.ahead = [{} for _ in mixture]  # page -> Future of its documents' tokens
        self.rest = self._draw()[position["skip"] :]  # what is not used yet of the last document

    @property
    def position(self) -> dict:
        """Where the next batch begins, for JSON: before which document, and how far into it."""
        return {"run": self.run, "read": self.before, "skip": self.drawn - len(self.rest)}

    def batch(self, rows: int, length: int):
        """(x, y) of this rank, int64 (rows, length); y is one token on."""
        parts, size, wanted = [self.rest], len(self.rest), rows * length
        while size <= wanted:  # one more than wanted: the last y
            parts.append(self._draw())
            size += len(parts[-1])
        tokens = np.concatenate(parts)
        self.rest = tokens[wanted:]  # within the document drawn last
        tokens = torch.from_numpy(tokens[: wanted + 1])
        return tokens[:-1].view(rows, length), tokens[1:].view(rows, length)

    def _draw(self) -> np.ndarray:
        """END and the next document."""
        self.before = [list(source) for source in self.read]
        shares = [read[2] / source.weight for read, source in zip(self.read, self.mixture)]
        which = shares.index(min(shares))
        read = self.read[which]
        while read[1] >= len(documents := self._page(which, read[0])):
            read[:2] = read[0] + 1, 0
        tokens = np.array([self.tokenizer.end] + documents[read[1]], np.int64)
        read[1:] = read[1] + 1, read[2] + len(tokens)
        self.drawn = len(tokens)
        return tokens

    def _page(self, which: int, number: int) -> list[list[int]]:
        """Tokens of the documents of a page; the pages after it are fetched meanwhile."""
        futures = self.ahead[which]
        for n in range(number, number + AHEAD + 1):
            if n not in futures:
                futures[n] = _in_thread(self._fetch, self.mixture[which], n)
        futures.pop(number - 1, None)
        return futures[number].result()

    def _fetch(self, source: Source, number: int) -> list[list[int]]:
        first = random.Random(f"{source.name} {self.seed}").randrange(source.pages)
        i = first + number * self.world + self.rank
        page = source.page(source.held + i % (source.pages - source.held))
        return self.tokenizer.encode_batch(self.fetch(source.name, page)[0])


def _in_thread(work, *arguments) -> Future:
    """What work(*arguments) will give or raise. The thread does not keep the program alive."""
    future = Future()

    def run():
        try:
            future.set_result(work(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


# ---- Prepared data ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """A prepared corpus. A stream is a 1-D uint16 or uint32 memmap END text END text ... END."""

    name: str  # nursery, real_sam, or the name of the file or folder
    sha256: str  # of the source files (nursery: grammar, sizes and seed; stream: its mixture)
    tokenizer: Tokenizer
    train: dict[str, np.memmap]  # phase -> stream; a phase that the source lacks is missing
    valid: dict[str, np.memmap]  # the same of held-out documents
    heldout: np.memmap  # the held-out documents whole, in a fixed random order
    heldout_bytes: int  # UTF-8 bytes of their text: END counts none
    entropy_bits: float | None  # nursery: -log2 probability of the held-out documents
    mixture: list[Source]  # what a Stream reads; `train` is a sample of it. Else empty
    answers: dict[str, np.memmap]  # split -> uint8 beside its conversations: 1 for Sam's tokens
    dataset: str  # what `prepare` takes to find the same again: a word or an absolute path


NURSERY_BYTES = (5_600_000, 200_000)  # for training, held out
BPE_BYTES = 30_000_000  # of training text, at most, teach merges


def prepare(
    dataset, tokenizer, vocab_size, data_dir, seed=0, log=print, bases=BASES, ignore=()
) -> Data:
    """The corpus `dataset`: 'nursery', 'real_sam', 'auto', a path or 'stream:' and a mixture (see
    parse_mixture), of which only a sample and the held-out documents are fetched and kept; from
    the cache if it can.

    tokenizer: 'byte', 'char', 'bpe' or 'lengthmax' (of vocab_size), 'gpt2'; or the Tokenizer of a
    checkpoint.
    data_dir: where downloads and caches are kept. seed: of the nursery and of the order of
    pieces. log: takes lines for people. bases: servers of the downloads. ignore: folders in which
    no text is looked for; data_dir is one. Raises DataError.
    """
    data_dir = Path(os.path.expanduser(data_dir))
    dataset, name, checksum, read = find_source(str(dataset), data_dir, seed, log, bases, ignore)
    known = None if isinstance(tokenizer, str) else tokenizer.hash
    for recipe in [tokenizer] if known is None else [tokenizer.kind, known]:
        key = sha256(repr((checksum, recipe, vocab_size, seed, FORMAT)))[:12]
        folder = data_dir / f"{name}-{key}"
        if folder.exists():
            try:
                found = _load(folder, key, dataset)
                if known in (None, found.tokenizer.hash):
                    return found
            except DataError as error:
                log(f"{error}: building it again")
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=data_dir) as temporary:
            building = Path(temporary) / "new"
            building.mkdir()
            train, held, facts = read()
            meta = {"name": name, "key": key, "sha256": checksum} | facts
            _build(building, meta, train, held, tokenizer, vocab_size, seed)
            return _publish(building, folder, key, dataset)
    except OSError as error:
        raise DataError(f"cannot write to {data_dir} ({error}): free or choose a disk") from None


def find_source(dataset: str, data_dir: Path, seed: int, log, bases, ignore):
    """(dataset without auto, name, checksum, read); read() -> train, held-out documents, facts of
    Data."""
    if dataset.startswith(STREAM):
        mixture = parse_mixture(dataset.removeprefix(STREAM))
        if not online(bases):
            raise DataError("no network to stream from: connect, or use --dataset=PATH of a text")
        name = "+".join(source.name.split("/")[1] for source in mixture)
        read = functools.partial(sample_mixture, mixture, bases)
        return dataset, name, sha256(repr(mixture)), read
    folder = data_dir / "real_sam"
    if dataset == "auto":
        there = all((folder / name).exists() for name in REAL_SAM)
        dataset = "real_sam" if there or online(bases) else "nursery"
        if dataset == "nursery":
            log("no network: training on the built-in corpus, the nursery")
    if dataset == "nursery":
        recipe = json.dumps([GRAMMAR.read_text(), NURSERY_BYTES, seed])
        return dataset, dataset, sha256(recipe), functools.partial(_grow, seed)
    if dataset == "real_sam":
        root = real_sam(folder, bases)
    else:
        root = Path(dataset := os.path.abspath(os.path.expanduser(dataset)))
    files = list_files(root, (*ignore, data_dir, folder), log)
    if held := held_out_files(files):
        log(f"held out, by name: {', '.join(held[:5])}{' ...' * (len(held) > 5)}")
    try:
        return dataset, root.name, _sha256_of(files), lambda: (*read_source(files, log), {})
    except OSError as error:
        raise DataError(f"cannot read {error.filename} ({error.strerror}): check it") from None


def _grow(seed: int) -> tuple[list[str], list[str], dict]:
    """The nursery. Held-out documents have a seed of their own and leave the training ones."""
    held, bits = nursery(NURSERY_BYTES[1], f"held-out {seed}")
    train = _without(nursery(NURSERY_BYTES[0], f"train {seed}")[0], held)
    return train, held, {"entropy_bits": bits}


def _build(folder: Path, meta: dict, train, held, tokenizer, vocab_size: int, seed: int) -> None:
    """Write the streams and, last, meta.json."""
    if isinstance(tokenizer, str):
        thin = train[:: sum(map(len, train)) // BPE_BYTES + 1]
        texts = train + held if tokenizer == "char" else thin  # no character may be unknown
        tokenizer = train_tokenizer(tokenizer, texts, vocab_size)
    random.Random(f"held-out {seed}").shuffle(held)
    streams = {"heldout": held}
    for split, documents in (("train", train), ("valid", held)):
        for phase in PHASES:
            streams[f"{split}_{phase}"] = cut(documents, phase, tokenizer, seed)
    meta |= {
        "tokenizer": tokenizer.state(),
        "dtype": "uint16" if tokenizer.vocab_size < 65536 else "uint32",
        "heldout_bytes": sum(len(document.encode()) for document in held),
    }
    meta["streams"] = {
        name: _write(folder / f"{name}.bin", texts, tokenizer, meta["dtype"])
        for name, texts in streams.items()
        if texts
    }
    for split in ("train", "valid"):
        if talks := streams[f"{split}_conversations"]:
            tokens = np.memmap(folder / f"{split}_conversations.bin", meta["dtype"], mode="r")
            answers = _answers(tokens, talks, tokenizer)
            answers.tofile(folder / f"{split}_answers.bin")
            meta["streams"][f"{split}_answers"] = zlib.crc32(answers)
    content = json.dumps(meta)
    (folder / "meta.json").write_text(json.dumps({"hash": sha256(content), "content": content}))


def _write(path: Path, texts: list[str], tokenizer: Tokenizer, dtype: str) -> int:
    """Write the stream of `texts`; returns its checksum."""
    checksum, step, size = 0, 4096, sum(map(len, texts))
    bar = tqdm(total=size, desc=path.stem, unit="B", unit_scale=True, disable=size < 2e7)
    with open(path, "wb") as file, bar:
        for start in range(0, len(texts), step):
            ids = [] if start else [tokenizer.end]
            for text_ids in tokenizer.encode_batch(texts[start : start + step]):
                ids += text_ids
                ids.append(tokenizer.end)
            block = np.array(ids, dtype).tobytes()
            file.write(block)
            checksum = zlib.crc32(block, checksum)
            bar.update(sum(map(len, texts[start : start + step])))
    return checksum


def _answers(tokens: np.ndarray, talks: list[str], tokenizer: Tokenizer) -> np.ndarray:
    """For each token of a stream of conversations, as uint8: 1 if Sam says it or if it ends what
    Sam says (END, or the next turn's mark). A token counts by its first byte."""
    lengths = np.array([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.end)] + [0])
    ends, parts = np.flatnonzero(tokens == tokenizer.end), [np.zeros(1, np.uint8)]
    answer = re.compile(rf"\n{SAM[:-1]}(.*?)(\n{YOU[:-1]}|\Z)".encode(), re.DOTALL)
    for talk, a, b in zip(talks, ends, ends[1:]):
        raw = talk.encode()
        said = np.zeros(len(raw) + 1, np.uint8)  # the byte that is not there stands for END
        for match in answer.finditer(raw):
            said[match.start(1) : match.end() + (not match[2])] = 1
        parts.append(said[np.cumsum(lengths[tokens[a:b]])])  # END before the talk adds nothing
    return np.concatenate(parts)


def _load(folder: Path, key: str, dataset: str) -> Data:
    """The data of a cache folder. DataError unless every byte is as it was written, for `key`."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if sha256(meta["content"]) != meta["hash"]:
            raise ValueError("meta.json was changed")
        meta = json.loads(meta["content"])
        if meta["key"] != key:
            raise ValueError("it is of another source or tokenizer")
        tokenizer, streams = tokenizer_from_state(meta["tokenizer"]), {}
        for name, checksum in meta["streams"].items():
            dtype = "uint8" if name.endswith("_answers") else meta["dtype"]
            streams[name] = np.memmap(folder / f"{name}.bin", dtype, mode="r")
            if zlib.crc32(streams[name]) != checksum:
                raise ValueError(f"{name}.bin was changed")
            if streams[name].max() > tokenizer.end:
                raise ValueError(f"{name}.bin has token ids outside the vocabulary")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"the cache {folder.name} is damaged ({error})") from None
    train, valid = (
        {phase: streams[name] for phase in PHASES if (name := f"{split}_{phase}") in streams}
        for split in ("train", "valid")
    )
    splits = [split for split in ("train", "valid") if f"{split}_answers" in streams]
    return Data(
        meta["name"], meta["sha256"], tokenizer, train, valid, streams["heldout"],
        meta["heldout_bytes"], meta.get("entropy_bits"),
        [Source(*source) for source in meta.get("mixture", ())],
        {split: streams[f"{split}_answers"] for split in splits}, dataset,
    )  # fmt: skip


def _publish(building: Path, folder: Path, key: str, dataset: str) -> Data:
    """Rename the finished folder into place, unless another process was first with a good one."""
    for attempt in range(3):
        with suppress(OSError):  # raised when `folder` exists
            os.rename(building, folder)
        try:
            return _load(folder, key, dataset)
        except DataError:
            with suppress(OSError):  # out of the way; goes with the temporary folder
                os.rename(folder, building.with_name(f"damaged{attempt}"))
    raise OSError(f"{folder.name} could not be renamed into place")


# ---- Batches ---------------------------------------------------------------------------------


def batch(tokens, step, batch_size, length, seed, rank=0, world=1):
    """(x, y) of training step `step`, int64 (batch_size // world, length); y is one token on.

    Windows do not overlap and come without replacement; each epoch has an order and an offset of
    its own. Nothing is remembered: a resumed run needs only its step, and rank r of w has rows
    r * B/w to (r + 1) * B/w of the same batch. A stream shorter than length + 1 is a DataError:
    were it repeated, a window would show what it asks for.
    """
    if len(tokens) <= length:
        raise DataError(
            f"{len(tokens)} tokens are too few for windows of {length} + 1: "
            "set a smaller length or add text"
        )
    if batch_size % world:
        raise DataError(f"batch_size {batch_size} must be a multiple of the {world} processes")
    n_windows = max(1, (len(tokens) - length) // length)  # one fewer than fit: the offset's room
    slack = min(length, len(tokens) - n_windows * length)
    first = step * batch_size + rank * (batch_size // world)
    rows = []
    for window in range(first, first + batch_size // world):
        order, offset = _epoch(seed, window // n_windows, n_windows, slack)
        start = offset + int(order[window % n_windows]) * length
        rows.append(tokens[start : start + length + 1])
    rows = torch.from_numpy(np.stack(rows).astype(np.int64))  # (B/w, length + 1)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


@functools.lru_cache(maxsize=8)  # a pure function, asked again at every step
def _epoch(seed: int, epoch: int, n_windows: int, slack: int):
    rng = np.random.default_rng((seed, epoch))
    return rng.permutation(n_windows), int(rng.integers(slack))


def main():
    """Show a piece of each phase of the nursery, and its entropy."""
    with config.one_line(DataError):
        documents, bits = nursery(NURSERY_BYTES[1], "sample")
        for phase in PHASES:
            print(f"{phase}: {cut(documents, phase, Tokenizer('byte'))[0].strip()}\n")
        size = sum(len(document.encode()) for document in documents)
        print(f"entropy: {bits / size:.4f} bits per byte of {len(documents)} documents")


if __name__ == "__main__":
    main()
