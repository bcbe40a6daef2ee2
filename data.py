"""Text in, windows of tokens out: sources, the phases of the curriculum, batches.

    source -> documents -> train | held-out -> pieces -> streams  END piece END piece END ...

Read from leaf to root: downloads, files, phases, streamed mixtures, the cache behind `prepare`, and
`batch`, which every step calls. tokenizer.py and nursery.py stand beside this file.
A document is a string: one that begins with "You: " is a conversation, any other a story.
"""

import functools
import gzip
import hashlib
import json
import math
import os
import random
import re
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

from nursery import GRAMMAR, nursery
from tokenizer import DataError, Tokenizer, sha256, tokenizer_from_state, train_tokenizer

END_TEXT = "<|endoftext|>"  # separates the documents of a .txt file; never encoded as text
PHASES = ("words", "phrases", "sentences", "stories", "conversations")  # the curriculum
YOU, SAM = "You: ", "Sam: "  # a conversation is lines of these
FORMAT = 2  # raise it when the same source would give other token files: old caches are left


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
    if (wanted and size > wanted) or (whole and declared not in (None, _sha256_of([part]))):
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

SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")  # a .jsonl may also be one JSON list
HELD_OUT = ("valid", "val", "validation", "test")


def list_files(path: Path) -> list[Path]:
    """The files with text at `path`, a file or a folder, sorted."""
    if not path.exists():
        raise DataError(f"no file or folder {path}: give nursery, real_sam, auto or a path")
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [file for file in files if file.name.endswith(SUFFIXES) and file.is_file()]
    if not files:
        raise DataError(f"{path} has no text: give a .txt or .jsonl file or a folder of them")
    return files


def read_file(path: Path, log=print) -> list[str]:
    """The documents of one file. DataError when it is unreadable, binary or not UTF-8."""
    name = path.name
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if name.endswith(".gz") else raw).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} is not UTF-8 (byte {error.start}): convert it, as in "
            f"iconv -f latin1 -t utf-8 {name} > new.txt"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {name} ({error}): check the file") from None
    if "\0" in text:
        raise DataError(f"{name} is binary: give UTF-8 text")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    documents = read_text(text) if ".txt" in name[-7:] else read_records(text, name, log)
    if not documents:
        raise DataError(
            f"{name} holds no text: remove it, or give a .txt with words or a .jsonl with keys "
            "text, instruction and output, messages, or prompt and replies"
        )
    return documents


def read_text(text: str, size=2000) -> list[str]:
    """Documents between END_TEXT marks; without marks, blocks (or else lines) grouped until they
    have `size` characters, fewer in a small file, of which some must be held out."""
    if END_TEXT in text:
        return [document for part in text.split(END_TEXT) if (document := part.strip())]
    size = min(size, max(200, len(text) // 20))
    gap = "\n\n" if len(units := re.split(r"\n\s*\n", text.strip())) > 1 else "\n"
    documents, group = [], ""
    for unit in units if gap == "\n\n" else text.split("\n"):
        for start in range(0, len(unit), 4 * size):  # a file may be one endless line
            group += unit[start : start + 4 * size] + gap
            if len(group) >= size:
                documents.append(group)
                group = ""
    return [document for part in (*documents, group) if (document := part.strip())]


def read_records(text: str, name: str, log=print) -> list[str]:
    """Documents of JSON lines (or of one JSON list); malformed records are counted in the log."""
    lines = (line for line in text.split("\n") if line.strip())
    if text.lstrip().startswith("["):
        try:
            lines = map(json.dumps, json.loads(text))
        except ValueError as error:
            raise DataError(f"{name} is damaged JSON ({error}): fetch it again") from None
    documents, bad = [], 0
    for line in lines:
        try:
            document = _document(json.loads(line)).strip()
            documents.append(document.encode(errors="replace").decode())  # JSON may halve emoji
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError):
            bad += 1
    if bad:
        log(f"{name}: skipped {bad} malformed of {bad + len(documents)} records")
    return [document for document in documents if document]


def _document(record: dict) -> str:
    """A record as a document; one of a few errors means that it is malformed."""
    if "messages" in record:
        speakers = {"user": YOU, "human": YOU, "prompter": YOU, "assistant": SAM}
        messages = [(speakers.get(m["role"]), m["content"]) for m in record["messages"]]
        turns = [message for message in messages if message[0]]  # a system prompt is no turn
    elif "prompt" in record:
        turns, message = [], record["prompt"]
        while message:
            turns.append((SAM if len(turns) % 2 else YOU, message["text"]))
            message = min(message.get("replies") or [None], key=_rank)
    elif "instruction" in record:
        context = record.get("input") or record.get("context") or ""
        answer = record["output"] if "output" in record else record["response"]
        turns = [(YOU, f"{record['instruction']}\n{context}"), (SAM, answer)]
    else:
        return record["text"]
    if turns[0][0] != YOU or len(turns) < 2 or not all(text.strip() for _, text in turns):
        raise ValueError
    return "\n".join(who + text.strip() for who, text in turns)


def _rank(reply: dict | None) -> float:
    """People liked rank 0 best; a reply that nobody ranked comes last."""
    return math.inf if not reply or reply.get("rank") is None else reply["rank"]


def is_talk(document: str) -> bool:
    return document.startswith(YOU)


def read_source(files: list[Path], log=print) -> tuple[list[str], list[str]]:
    """(train, held-out) documents. The files called valid, val, validation or test are held out;
    stories or conversations that these lack are split by hash."""
    train, held = [], []
    for file in files:
        called = len(files) > 1 and file.name.split(".")[0].lower() in HELD_OUT
        (held if called else train).extend(read_file(file, log))
    for talk in (False, True):
        if talk not in map(is_talk, held):
            held += hold_out([document for document in train if is_talk(document) == talk])
    train = _without(train, held)
    if not held or not train:
        raise DataError(f"{files[0].name}: too little to learn some and hold out some: add text")
    return train, held


def hold_out(documents: list[str], share=0.02, most=1_000_000) -> list[str]:
    """About 2% of the documents, 1 MB at most but one at least. Their hash decides, so that a
    document and its copies stay on one side whatever is added."""
    if len(set(documents)) < 2:
        return []
    limit = min(share, most / sum(map(len, documents))) * 2**256
    hashes = {document: int(sha256(document), 16) for document in documents}
    return [d for d in hashes if hashes[d] < limit] or [min(hashes, key=hashes.get)]


def _without(documents: list[str], others: list[str]) -> list[str]:
    others = set(others)
    return [document for document in documents if document not in others]


def _sha256_of(files: list[Path]) -> str:
    """Checksum of the bytes; of several files also of their names, which decide on their use."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() if len(files) > 1 else b"")
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


# ---- Phases ----------------------------------------------------------------------------------
# The same documents at five grains. A piece keeps the blank before it, as in the running text,
# so that a word is made of the same tokens in every phase.

PHASE_TOKENS = 4_000_000  # at most, of words, phrases, sentences: more would cost minutes


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
        return read_records(records, name, log=lambda line: None), pages

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


NURSERY_BYTES = (5_600_000, 200_000)  # for training, held out
BPE_BYTES = 30_000_000  # of training text, at most, teach merges


def prepare(dataset, tokenizer, vocab_size, data_dir, seed=0, log=print, bases=BASES) -> Data:
    """The corpus `dataset`: 'nursery', 'real_sam', 'auto', a path or 'stream:' and a mixture (see
    parse_mixture), of which only a sample and the held-out documents are fetched and kept; from
    the cache if it can.

    tokenizer: 'byte', 'char', 'bpe' or 'lengthmax' (of vocab_size), 'gpt2'; or the Tokenizer of a
    checkpoint.
    data_dir: where downloads and caches are kept. seed: of the nursery and of the order of
    pieces. log: takes lines for people. bases: servers of the downloads. Raises DataError.
    """
    data_dir = Path(data_dir)
    name, checksum, read = find_source(str(dataset), data_dir, seed, log, bases)
    recipe = tokenizer if isinstance(tokenizer, str) else tokenizer.hash
    key = sha256(repr((checksum, recipe, vocab_size, seed, FORMAT)))[:12]
    folder = data_dir / f"{name}-{key}"
    if folder.exists():
        try:
            return _load(folder, key)
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
            return _publish(building, folder, key)
    except OSError as error:
        raise DataError(f"cannot write to {data_dir} ({error}): free or choose a disk") from None


def find_source(dataset: str, data_dir: Path, seed: int, log, bases):
    """(name, checksum, read) of a dataset; read() -> train, held-out documents, facts of Data."""
    if dataset.startswith(STREAM):
        mixture = parse_mixture(dataset.removeprefix(STREAM))
        if not online(bases):
            raise DataError("no network to stream from: connect, or use --dataset=PATH of a text")
        name = "+".join(source.name.split("/")[1] for source in mixture)
        return name, sha256(repr(mixture)), functools.partial(sample_mixture, mixture, bases)
    folder = data_dir / "real_sam"
    if dataset == "auto":
        there = all((folder / name).exists() for name in REAL_SAM)
        dataset = "real_sam" if there or online(bases) else "nursery"
        if dataset == "nursery":
            log("no network: training on the built-in corpus, the nursery")
    if dataset == "nursery":
        recipe = json.dumps([GRAMMAR.read_text(), NURSERY_BYTES, seed])
        return dataset, sha256(recipe), functools.partial(_grow, seed)
    files = list_files(real_sam(folder, bases) if dataset == "real_sam" else Path(dataset))
    name = dataset if dataset == "real_sam" else Path(dataset).resolve().name
    try:
        return name, _sha256_of(files), lambda: (*read_source(files, log), {})
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


def _load(folder: Path, key: str) -> Data:
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
            streams[name] = np.memmap(folder / f"{name}.bin", meta["dtype"], mode="r")
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
    return Data(
        meta["name"], meta["sha256"], tokenizer, train, valid, streams["heldout"],
        meta["heldout_bytes"], meta.get("entropy_bits"),
        [Source(*source) for source in meta.get("mixture", ())],
    )  # fmt: skip


def _publish(building: Path, folder: Path, key: str) -> Data:
    """Rename the finished folder into place, unless another process was first with a good one."""
    for attempt in range(3):
        with suppress(OSError):  # raised when `folder` exists
            os.rename(building, folder)
        try:
            return _load(folder, key)
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
    documents, bits = nursery(NURSERY_BYTES[1], "sample")
    for phase in PHASES:
        print(f"{phase}: {cut(documents, phase, Tokenizer('byte'))[0].strip()}\n")
    size = sum(len(document.encode()) for document in documents)
    print(f"entropy: {bits / size:.4f} bits per byte of {len(documents)} documents")


if __name__ == "__main__":
    main()
