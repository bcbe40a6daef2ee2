"""Where documents come from: the nursery (a built-in corpus), records, downloads, streams.

A document is a string: one that begins with "You: " is a conversation, any other a story. data.py
reads files and makes training data of documents.
"""

import functools
import hashlib
import itertools
import json
import math
import os
import queue
import random
import re
import threading
import time
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np
import requests
import torch
from tqdm import tqdm

from tokenizer import DataError

END_TEXT = "<|endoftext|>"  # separates the documents of a .txt file; never encoded as text
YOU, SAM = "You: ", "Sam: "  # a conversation is lines of these

# ---- The nursery -----------------------------------------------------------------------------
# Stories and conversations whose true entropy is known. The grammar nursery.txt generates them; its
# head explains the notation. The code turns "a" into "an" and writes the capitals. Two derivations
# never give the same text (a test parses texts back), so the probability of a text is that of the
# choices made. `tell` writes a text, `follow` parses one, `judge` counts what a model got right.

GRAMMAR = Path(__file__).with_name("nursery.txt")
FORMS = {"": 0, "he": 1, "him": 2, "his": 3, "ed": 1, "s": 1, "at": 1, "is": 1}
MARKS = re.compile(r"<(\w+)>|\{([a-z]+)(\d?)\.?(\w*)\}|(\d+)\*|([(|)])|([^<{(|)\d]+)")
LONGEST = 600  # bytes: every document is shorter
EXAMPLES = (  # what one may say to a model of the nursery
    "Tell me a story about a fox.",
    "Hello. My name is Mia. I have a red kite and three plums.",
    "What is my name?",
    "What does a cow say?",
)
VERDICT = (
    "of {documents} documents that it wrote, the grammar derives {derivable}; {consistent} keep "
    "every name and thing that they began with"
)


@functools.cache
def rules() -> dict[str, list]:
    """The grammar: rule -> alternatives (weight, nodes)."""
    text = re.sub(r"^#.*\n", "", _plain(GRAMMAR.read_text()), flags=re.MULTILINE)
    text = re.sub(r"\n +(?=\(?\|)|(?<=\|)\n +", "", text.strip())  # next to a | no blank
    lines = (line.split(": ", 1) for line in re.sub(r"\n +", " ", text).splitlines() if line)
    return {name: _parse(MARKS.finditer(body.replace("\\n", "\n"))) for name, body in lines}


def _parse(marks) -> list:
    """Alternatives up to the closing bracket. A node is a string, a list of alternatives or
    (rule, fact, form); without a fact the rule is expanded anew each time."""
    options, weight, nodes = [], 1, []
    for mark in marks:
        rule, fact, digit, form, times, sign, literal = mark.groups()
        if rule:
            nodes.append((rule, None, 0))
        elif fact:
            nodes.append((fact, fact + digit, FORMS[form]))
        elif times:
            weight = int(times)
        elif literal:
            nodes.append(literal)
        elif sign == "(":
            nodes.append(_parse(marks))
        else:
            options.append((weight, nodes))
            weight, nodes = 1, []
            if sign == ")":
                return options
    return options + [(weight, nodes)]


@functools.cache
def _forms(rule: str) -> list:
    """The forms of each alternative that is a name or a thing; None for one that is a sentence."""
    bodies = [nodes for _, nodes in rules()[rule]]
    return [body[0].split("/") if [*map(type, body)] == [str] else None for body in bodies]


def derive(rule: str, pick=None, goal="", keep=True):
    """(the derivations of `rule`, how many characters of `goal` they reach, the facts known there).

    pick(weights) -> index makes each choice, whose probability is its share of the weights.
    Without `pick` all choices are followed at once, each as long as its text begins `goal`, so
    garbage costs no more than a text. A derivation is (text, facts, bits): the facts are fact ->
    (rule, which alternative, its forms), the bits -log2 of the probability.
    keep=False: a fact that is named again may have become another choice of its rule.
    """
    far, known = 0, {}

    def write(piece, state, is_word=False):
        nonlocal far, known
        text, facts, bits = state
        end = len(text) + len(piece)
        if not pick:
            is_longer = is_word and goal[end : end + 1].isalpha()  # "drummer" is no drum
            if is_longer or not goal.startswith(piece.lower(), len(text)):
                return []
            if end > far:
                far, known = end, facts
        return [(text + piece, facts, bits)]

    def expand(node, state):
        """The states in which `state` can be after this node."""
        if isinstance(node, str):
            return write(node, state)
        rule, fact, form = (None, None, 0) if isinstance(node, list) else node
        text, facts, bits = state
        if fact in facts:
            words = {forms[form] for forms in ([facts[fact][2]] if keep else _forms(rule))}
            return [end for word in words for end in write(word, state, True)]
        options = rules()[rule] if rule else node
        taken = {i for other, i, _ in facts.values() if fact and other == rule}
        weights = [0 if i in taken else weight for i, (weight, _) in enumerate(options)]
        ends = []
        for i in [pick(weights)] if pick else [i for i, weight in enumerate(weights) if weight]:
            now = text, facts, bits - math.log2(weights[i] / sum(weights))
            forms = _forms(rule)[i] if fact else None
            after = write(forms[form], now, True) if forms else sequence(options[i][1], now)
            ends += [(t, f | {fact: (rule, i, forms)}, b) for t, f, b in after] if fact else after
        return ends

    def sequence(nodes, state):
        states = [state]
        for node in nodes:
            states = [end for state in states for end in expand(node, state)]
        return states

    return expand((rule, None, 0), ("", {}, 0.0)), far, known


def tell(rule: str, pick) -> tuple[str, float]:
    """A text of `rule` and its -log2 probability (bits); `pick` as in `derive`."""
    ((text, _, bits),) = derive(rule, pick)[0]
    return _finish(text), bits


def follow(text: str, rule="document", keep=True) -> tuple[list[float], int, dict]:
    """Parse `text`: (-log2 probability of each derivation, how many of its characters the grammar
    derives, the facts known there). An "an" before a vowel counts as "a"."""
    ends, far, known = derive(rule, goal=_plain(text).lower(), keep=keep)
    return [bits for end, _, bits in ends if _finish(end) == text], far, known


def _finish(text: str) -> str:
    """Sentences get their capitals, and "a" becomes "an" before a vowel."""
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return re.sub(r"(?:^|[.!?] |\.\" |: )[a-z]", lambda match: match[0].upper(), text)


def _plain(text: str) -> str:
    """Each "an" before a vowel is "a" again. Capitals are left to lower()."""
    return re.sub(r"\b([Aa])n (?=[aeiou])", r"\1 ", text)


def nursery(n_bytes: int, seed) -> tuple[list[str], float]:
    """Documents of the built-in corpus, n_bytes or a little more, and their -log2 probability."""
    rng = random.Random(f"nursery {seed}")
    documents, size, bits = [], 0, 0.0
    while size < n_bytes:
        text, cost = tell("document", lambda w: rng.choices(range(len(w)), w)[0])
        documents.append(text)
        size, bits = size + len(text), bits + cost
    return documents, bits


def judge(texts: list[str]) -> dict[str, int]:
    """How many of `texts` the grammar derives, and how many keep all that they began with.

    A text keeps it if no fact (a name with its he or she, an animal, a thing, a color, a number
    ...) becomes another one as far as the grammar can follow the text, and if no name, animal or
    thing stands after that point that did not stand before it. A text that does not even begin
    with a fact keeps nothing. Every text of the grammar keeps all.
    """
    nouns = {forms[0].lower() for rule in ("name", "animal", "thing") for forms in _forms(rule)}
    derivable = consistent = 0
    for text in texts:
        bits, far, facts = follow(text)
        is_kept = bool(bits)
        if facts and not bits:
            parts = _plain(text).lower()[:far], _plain(text).lower()[far:]
            before, after = (nouns.intersection(re.findall(r"\w+", part)) for part in parts)
            is_kept = after <= before and follow(text, keep=False)[1] == far
        derivable += bool(bits)
        consistent += is_kept
    return {"documents": len(texts), "derivable": derivable, "consistent": consistent}


def told_by(model, tokenizer, n=100, seed=1337) -> list[str]:
    """n documents as `model` writes them, all at once, each from one end token to the next. One
    that goes on for more than LONGEST bytes is left unfinished."""
    device, training = next(model.parameters()).device, model.training
    start = torch.full((n, 1), tokenizer.end, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    model.eval()
    stream = model.generate(start, None, 0.7, 0, 0.95, generator, tokenizer.vocab_size)
    rows, going = [[] for _ in range(n)], range(n)
    while going:
        tokens, _ = next(stream)
        for i in going:
            rows[i].append(tokens[i].item())
        unfinished = [i for i in going if rows[i][-1] != tokenizer.end]
        going = [i for i in unfinished if len(tokenizer.decode_bytes(rows[i])) <= LONGEST]
    model.train(training)
    return [tokenizer.decode(row).strip() for row in rows]


# ---- Records ---------------------------------------------------------------------------------

CHAT = ("messages", "conversations", "conversation")  # keys of records, the first one counts
QUESTION = ("instruction", "prompt", "question", "query", "user")
ANSWER = ("output", "response", "completion", "answer", "assistant")
ROLES = dict.fromkeys(("user", "human", "prompter"), YOU)
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "ai"), SAM)
ROLES |= dict.fromkeys(("system", "developer", "tool", "function", "function_call",
                        "tool_call", "tool_response", "observation", "ipython"), "")  # fmt: skip


def read_records(text: str) -> tuple[list[str], str]:
    """(documents of JSON lines, or of one JSON list or object; what was refused and why)."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return documents_of(text.split("\n"), "line")
    records = whole if isinstance(whole, list) else [whole]
    is_chat = all(isinstance(r, dict) and r.keys() & {"role", "from"} for r in records)
    return documents_of([whole] if is_chat else records)


def documents_of(records, unit="record") -> tuple[list[str], str]:
    """(documents of the records, what was refused and why). Lines are JSON, or blank."""
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
    elif isinstance(message := record.get("prompt"), dict):  # a tree: take the best replies
        turns = []
        while message:
            turns.append((SAM if len(turns) % 2 else YOU, message["text"]))
            message = min(message.get("replies") or (), key=_rank, default=None)
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


def _rank(reply: dict) -> float:
    """People liked rank 0 best; a reply that nobody ranked comes last."""
    return math.inf if reply.get("rank") is None else reply["rank"]


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


def real_sam(folder: Path) -> Path:
    """The folder of TinyStories, Alpaca, Dolly and OpenAssistant; downloads what is missing."""
    for name, (url, max_bytes) in REAL_SAM.items():
        if not (folder / name).exists():
            download(url.format(**BASES), folder / name, max_bytes)
    return folder


def online(seconds=4.0) -> bool:
    """Whether the server of the downloads answers within `seconds`."""
    answers = []

    def ask():
        with suppress(requests.RequestException):
            answers.append(requests.head(BASES["hub"], timeout=seconds))

    thread = threading.Thread(target=ask, daemon=True)  # for looking up a name has no timeout
    thread.start()
    thread.join(seconds)
    return any(answer.ok for answer in answers)


def download(url, path, max_bytes=None, attempts=6, timeout=30.0, pause=1.0):
    """Fetch `url` into the file `path`; on failure DataError, and nothing under that name.

    Bytes gather in path.part, where a later call resumes. Size and checksum must be those that
    the server declares. max_bytes: take only the first bytes and cut them back to the last
    END_TEXT. timeout: seconds without a byte. pause: see `retry`.
    """
    retry(lambda: _fetch(url, Path(path), max_bytes, timeout), url, attempts, pause)


def retry(attempt, url, attempts, pause):
    """attempt(), again after each OSError, `attempts` times in all; then DataError. pause: seconds
    before the second attempt, doubled from then on, unless the server says how long to wait."""
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


def _fetch(url, path: Path, max_bytes, timeout) -> None:
    """One attempt to complete `path`; OSError when another one may go better."""
    part = Path(f"{path}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"}  # or sizes would be those of compressed bytes
    if have or max_bytes:
        headers["Range"] = f"bytes={have}-{max_bytes - 1 if max_bytes else ''}"
    with requests.get(url, headers=headers, stream=True, timeout=timeout) as answer:
        _check_status(answer, url, (200, 206, 416))
        span = re.match(rf"bytes {have}-\d+/(\d+)", answer.headers.get("Content-Range", ""))
        if answer.status_code == 200:  # the whole file, even if a range was asked for
            have, total = 0, int(answer.headers.get("Content-Length", 0)) or None
        elif span:
            total = int(span[1])
        else:
            part.unlink(missing_ok=True)  # it may be no beginning of this file: start again
            raise OSError(f"no bytes from {have} on")
        wanted = min(filter(None, (total, max_bytes)), default=None)
        with (
            open(part, "ab" if have else "wb") as file,
            tqdm(total=wanted, initial=have, unit="B", unit_scale=True, desc=part.stem) as bar,
        ):
            for chunk in answer.iter_content(1 << 16):
                file.write(chunk)
                bar.update(len(chunk))
                if max_bytes and file.tell() >= max_bytes:  # a server without Range sends it all
                    file.truncate(max_bytes)
                    break
            file.flush()
            os.fsync(file.fileno())
    size = part.stat().st_size
    if wanted and size < wanted:
        raise OSError(f"received {size} of {wanted} bytes")
    is_whole = total in (None, size)
    tags = [step.headers.get("X-Linked-ETag", "").strip('"') for step in (*answer.history, answer)]
    declared = [tag for tag in tags if re.fullmatch("[0-9a-f]{64}", tag)]  # Hugging Face does
    is_other = is_whole and declared and declared[0] != sha256_of({"": part})
    if is_other or (wanted and size > wanted):
        part.unlink()
        raise OSError(f"the {size} bytes received are not those announced")
    last = part.read_bytes().rfind(END_TEXT.encode()) if max_bytes and not is_whole else 0
    if last > 0:
        os.truncate(part, last)
    os.replace(part, path)


def sha256_of(files: dict[str, Path]) -> str:
    """Checksum of the bytes; of several files also of their names, which decide on their use."""
    digest = hashlib.sha256()
    for name, path in files.items():
        digest.update(name.encode() if len(files) > 1 else b"")
        with open(path, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


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
    held: int = 0  # pages that are held out, the first in order

    def page(self, i: int) -> int:
        """The i-th page to read; pages 0 to `pages` - 1 of this order are all pages, once each."""
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


def fetch_page(name: str, page: int, attempts=12, timeout=30.0, pause=1.0):
    """(documents of a page, pages of the source). Waits and asks again as `download` does."""
    owner, dataset, config, split = name.split("/")
    query = {"dataset": f"{owner}/{dataset}", "config": config, "split": split}
    query |= {"offset": page * PAGE, "length": PAGE}

    def attempt():
        answer = requests.get(BASES["rows"], params=query, timeout=timeout)
        _check_status(answer, f"rows of {name}")
        try:
            content = answer.json()
            records = [row["row"] for row in content["rows"]]
            pages = math.ceil(content["num_rows_total"] / PAGE)
        except (KeyError, TypeError, ValueError):
            raise OSError("damaged answer") from None
        return documents_of(records)[0], pages

    return retry(attempt, f"rows of {name}", attempts, pause)


def sample_mixture(mixture: list[Source]):
    """Of a mixture, a sample to learn from and the held-out documents; the sources' pages."""
    train, held, sources = [], [], []
    for source in mixture:
        source, read = replace(source, pages=fetch_page(source.name, 0)[1]), 0
        for documents, least in ((held, HELD_BYTES), (train, SAMPLE_BYTES)):
            size = 0
            while size < least * source.weight:
                if read + 1 >= source.pages:  # the last page is for training
                    raise DataError(f"{source.name} is too small to stream: download it")
                if not (found := fetch_page(source.name, source.page(read))[0]):
                    raise DataError(f"{source.name} has no text that is known: use another source")
                documents += found
                read, size = read + 1, size + sum(map(len, found))
            if documents is held:
                source = replace(source, held=read)
        sources.append(astuple(source))
    return train, held, {"mixture": sources}


class Stream:
    """Batches without end from a mixture, tokenized and packed: END text END text ...

    The next document comes from the source that is furthest behind its share of the tokens.
    `seed` sets the page at which each source begins. Rank r of w reads pages r, r + w, ... from
    there. `position` is all that a checkpoint needs: a new Stream made from it gives the batches
    that this one would have given. Raises DataError.
    """

    def __init__(self, mixture, tokenizer, seed, rank=0, world=1, position=None, fetch=fetch_page):
        self.mixture, self.tokenizer, self.fetch = mixture, tokenizer, fetch
        self.seed, self.rank, self.world = seed, rank, world
        self.run = [[list(astuple(source)) for source in mixture], seed, rank, world]
        position = position or {"run": self.run, "read": [[0, 0, 0] for _ in mixture], "skip": 0}
        if position["run"] != self.run:
            raise DataError(
                "the stream's position is of another mixture, seed or number of processes: "
                "resume with the same ones"
            )
        self.read = [list(source) for source in position["read"]]  # [page, row, tokens] of each
        self.documents = [self._documents(s, *read[:2]) for s, read in zip(mixture, self.read)]
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
        read = self.read[which := shares.index(min(shares))]
        read[0], read[1], document = next(self.documents[which])
        tokens = np.array([self.tokenizer.end, *document], np.int64)
        read[2] += len(tokens)
        self.drawn = len(tokens)
        return tokens

    def _documents(self, source: Source, next_page: int, row: int):
        """(page, rows of it that are read, tokens) of each document from here on."""
        first = random.Random(f"{source.name} {self.seed}").randrange(source.pages)

        def tokens_of(page):
            i = (first + page * self.world + self.rank) % (source.pages - source.held)
            documents, _ = self.fetch(source.name, source.page(source.held + i))
            return page, self.tokenizer.encode_batch(documents)

        for page, documents in in_advance(map(tokens_of, itertools.count(next_page)), AHEAD):
            for i in range(row, len(documents)):
                yield page, i + 1, documents[i]
            row = 0


def in_advance(items, n: int):
    """Yield the items. A daemon thread computes up to n of them ahead; its error is raised here."""
    ready = queue.Queue(n - 1)  # the thread holds one more, until there is room

    def run():
        try:
            for item in items:
                ready.put((item, None))
        except BaseException as error:
            ready.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    while True:
        item, error = ready.get()
        if error:
            raise error
        yield item
