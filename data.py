"""Text in, windows of tokens out: batches, files, the phases of the curriculum, the cache.

    source -> documents -> train | held-out -> pieces -> streams  END piece END piece END ...

`batch` is what every training step asks for; the code below it makes the streams that it reads.
sources.py says what a document is, and where documents come from beside files.
"""

import functools
import gzip
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import tempfile
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from sources import (
    END_TEXT, GRAMMAR, REAL_SAM, SAM, STREAM, YOU, Source, Stream, nursery, online, parse_mixture,
    read_records, real_sam, sample_mixture, sha256_of,
)  # fmt: skip
from tokenizer import DataError, Tokenizer, sha256, tokenizer_from_state, train_tokenizer
from traits import IGNORED

DOCUMENTS = ("stories", "conversations")
PHASES = ("words", "phrases", "sentences", *DOCUMENTS, "blended")  # blended: all documents


def turn(text: str) -> str:
    """The prompt after which Sam answers `text`, written as in the corpora: "You: text\nSam:"."""
    return f"{YOU}{text}\n{SAM.rstrip()}"


# ---- Batches ---------------------------------------------------------------------------------


def batch(tokens, step, batch_size, length, seed, rank=0, world=1):
    """(x, y) of training step `step`, int64 (batch_size // world, length); y is one token on.

    Windows do not overlap and are drawn without replacement; each epoch has its own order and
    offset. There is no state: a resumed run needs only its step, and rank r of w gets rows
    r * B/w to (r + 1) * B/w of the same batch; B is a multiple of w. A stream shorter than
    length + 1 is a DataError: if it were repeated, a window would contain its own targets.
    """
    if len(tokens) <= length:
        raise DataError(
            f"{len(tokens)} tokens are too few for windows of {length} + 1: "
            "set a smaller length or add text"
        )
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


class Feed:
    """The batches of one process: windows of the stored text, or a stream that is fetched.

    c: tokens_per_step, seed, rehearse and answers_only as train.py declares them. curriculum:
    [(phase, length)]. position: a list of the `position` of each process, as a checkpoint keeps it.
    """

    def __init__(self, c, corpus, curriculum, rank=0, world=1, position=None):
        self.c, self.corpus, self.curriculum = c, corpus, curriculum
        self.rank, self.world, self.stream = rank, world, None
        if corpus.mixture:
            mine = position and position[rank % len(position)]  # a Stream refuses a wrong one
            self.stream = Stream(corpus.mixture, corpus.tokenizer, c.seed, rank, world, mine)

    @property
    def position(self):
        """What a checkpoint keeps of this process; None unless it streams."""
        return self.stream and self.stream.position

    def next(self, phase: int, step: int):
        """This process's (x, y) of step `step` of phase number `phase`, int64 (rows, length)."""
        c, (name, length) = self.c, self.curriculum[phase]
        rows = c.tokens_per_step // length // self.world * self.world
        if self.stream and name not in CUTS:  # words, phrases, sentences come from its sample
            return self.stream.batch(rows // self.world, length)
        before = self.curriculum[phase - 1][0] if phase else name
        old = int(rows * c.rehearse) // self.world * self.world if phase else 0
        x, y = self._draw(name, step, rows - old, length, c.seed)
        if old:
            again = self._draw(before, step, old, length, c.seed + 1)
            x, y = (torch.cat(both) for both in zip((x, y), again))
        return x, y

    def _draw(self, phase, step, rows, length, seed):
        where = step, rows, length, seed, self.rank, self.world
        x, y = batch(self.corpus.train[phase], *where)
        if self.c.answers_only:
            y = y.masked_fill(batch(self.corpus.answers["train"], *where)[1] == 0, IGNORED)
        return x, y


# ---- Files -----------------------------------------------------------------------------------

TEXT, RECORDS = (".txt", ".text", ".md"), (".jsonl", ".json")  # in any case; also with .gz
HELD_OUT = ("valid", "val", "validation", "test", "dev", "eval", "held", "heldout", "holdout")


def list_files(root: Path, own=(), log=print) -> dict[str, Path]:
    """The files with text at `root`, a file or a folder: path relative to the folder -> file.
    Left out: dot files and, in a folder, caches, logs of runs and the program's `own` folders."""
    if not root.exists():
        raise DataError(f"no file or folder {root}: give nursery, real_sam, auto or a path")
    own = [Path(os.path.expanduser(folder)).resolve() for folder in own]
    own, files, others = [folder for folder in own if root.resolve() in folder.parents], {}, set()
    for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
        name = path.relative_to(root).as_posix() if path != root else path.name
        is_hidden = re.search(r"(^|/)(\.|__MACOSX/)", name) and path != root
        is_own = any(folder in path.resolve().parents for folder in own)
        is_own |= path.name == "meta.json" and path.with_name("heldout.bin").exists()  # a cache's
        is_own |= path.name == "log.jsonl" and any(path.parent.glob("*.pt"))  # a run's
        if is_hidden or is_own or not path.is_file():
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
    files = list_files(Path(os.path.expanduser(path)), log=log)
    return [document for _, documents in read_files(files, log) for document in documents]


def read_files(files: dict[str, Path], log=print):
    """(name, documents) of each file. DataError when one is unreadable or has none, unless it is
    a .json among other files: that may be metadata."""
    for name, path in files.items():
        documents, refused = read_file(path, name)
        if not documents and (len(files) == 1 or not name.lower().endswith(".json")):
            raise DataError(
                f"{name} holds no text ({refused or 'it is empty'}): give words, or records with "
                "the keys text, messages, conversations, or prompt and response"
            )
        if refused:
            log(f"{name}: {refused}")
        yield name, documents


def read_file(path: Path, name: str) -> tuple[list[str], str]:
    """(documents of one file, what was refused of it). DataError when it is unreadable."""
    is_gz, start = name.lower().endswith(".gz"), 0
    try:
        raw = gzip.decompress(path.read_bytes()) if is_gz else path.read_bytes()
        has_mark = raw[:2] in (b"\xff\xfe", b"\xfe\xff")
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
        guess = f" but seems to be {encoding}" if encoding else ""
        show = f"{'gunzip -c' if is_gz else 'cat'} {shlex.quote(str(path))}"
        raise DataError(
            f"{name} is not UTF-8 (byte {start}){guess}: convert it, as in "
            f"{show} | iconv -c -f {encoding or 'ITS_ENCODING'} -t utf-8 > new.txt"
        )
    text = re.sub(r"\r\n?", "\n", text)
    is_text = name.lower().removesuffix(".gz").endswith(TEXT)
    return (read_text(text), "") if is_text else read_records(text)


def _encoding(sample: bytes) -> str | None:
    """The likely encoding of bytes that are not UTF-8: utf-8 if only a few of them are damaged,
    else one that reads them as text of mostly ASCII characters."""
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
    line, a sentence or a word. A conversation is only cut before a turn of the user."""
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


def is_talk(document: str) -> bool:
    return document.startswith(YOU)


def held_out_files(names) -> list[str]:
    """The files to hold out: those that are called valid or the like, or lie in a folder that is.
    None if that would be all files."""
    held = []
    for name in names:
        words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
        known = [word in HELD_OUT for word in map(str.lower, words) if word in (*HELD_OUT, "train")]
        held += [name] * (known[-1:] == [True])
    return held if len(held) < len(names) else []


def hold_out(documents: list[str], share=0.02, most=1_000_000) -> tuple[list[str], list[str]]:
    """(the rest, what is held out): about 2% of the text, 1 MB at most, but one part at least.

    A part is a document, or a block of a long one, whose other blocks stay together. The hash of
    a part decides: copies stay on one side, and added text moves nothing. Of few parts the hashes
    may hold out far too much or too little: then the lowest hashes are taken until it is enough.
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


# ---- Phases ----------------------------------------------------------------------------------
# The same documents, cut into words, phrases or sentences, or whole. A piece keeps the blank before
# it, as in running text, so that a word is made of the same tokens in every phase.

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


# ---- Data sets -------------------------------------------------------------------------------
# An entry of DATASETS returns (checksum, read); read() returns the training documents, the held-out
# documents and further fields of Data.

NURSERY_BYTES = (5_600_000, 200_000)  # for training, held out


def nursery_source(data_dir: Path, seed: int, log):
    def read():
        held, bits = nursery(NURSERY_BYTES[1], f"held-out {seed}")
        return nursery(NURSERY_BYTES[0], f"train {seed}")[0], held, {"entropy_bits": bits}

    return sha256(json.dumps([GRAMMAR.read_text(), NURSERY_BYTES, seed])), read


def real_sam_source(data_dir: Path, seed: int, log):
    return files_source(real_sam(data_dir / "real_sam"), (), log)


DATASETS = {"nursery": nursery_source, "real_sam": real_sam_source}


def files_source(root: Path, own, log):
    """The files with text at `root`, a file or a folder; `own` folders are left out. Files called
    valid or the like are held out, and a part of the stories or conversations that they lack."""
    files = list_files(root, own, log)
    if named := held_out_files(files):
        log(f"held out, by name: {', '.join(named[:5])}{' ...' * (len(named) > 5)}")

    def read():
        train, held = [], []
        for name, documents in read_files(files, log):
            (held if name in named else train).extend(documents)
        for talk in (False, True):
            if talk not in map(is_talk, held):
                others = [document for document in train if is_talk(document) != talk]
                rest, out = hold_out([document for document in train if is_talk(document) == talk])
                train, held = others + rest, held + out
        return train, held, {}

    try:
        return sha256_of(files), read
    except OSError as error:
        raise DataError(f"cannot read {error.filename} ({error.strerror}): check it") from None


def find_source(dataset: str, data_dir: Path, seed: int, log, ignore):
    """(dataset without auto, name, checksum, read)."""
    if dataset.startswith(STREAM):
        mixture = parse_mixture(dataset.removeprefix(STREAM))
        if not online():
            raise DataError("no network to stream from: connect, or use --dataset=PATH of a text")
        name = "+".join(source.name.split("/")[1] for source in mixture)
        return dataset, name, sha256(repr(mixture)), lambda: sample_mixture(mixture)
    if dataset == "auto":
        there = all((data_dir / "real_sam" / name).exists() for name in REAL_SAM)
        dataset = "real_sam" if there or online() else "nursery"
        if dataset == "nursery":
            log("no network: training on the built-in corpus, the nursery")
    if dataset in DATASETS:
        return dataset, dataset, *DATASETS[dataset](data_dir, seed, log)
    root = Path(os.path.abspath(os.path.expanduser(dataset)))
    own = (*ignore, data_dir, data_dir / "real_sam")
    return str(root), root.name, *files_source(root, own, log)


# ---- Prepared data ---------------------------------------------------------------------------

FORMAT = 4  # raise it when the same source would give other token files: old caches are left
BPE_BYTES = 30_000_000  # of training text, at most, teach merges


@dataclass(frozen=True)
class Data:
    """A prepared corpus. A stream is a 1-D uint16 or uint32 memmap END text END text ... END."""

    name: str  # nursery, real_sam, or the name of the file or folder
    sha256: str  # of the source files (nursery: grammar, sizes and seed; stream: its mixture)
    tokenizer: Tokenizer
    train: dict[str, np.memmap]  # phase -> stream; a phase that the source lacks is missing
    valid: dict[str, np.memmap]  # the same of held-out documents
    heldout: np.memmap  # the held-out documents, not cut, in a fixed random order
    heldout_bytes: int  # UTF-8 bytes of their text: END counts none
    entropy_bits: float | None  # nursery: -log2 probability of the held-out documents
    mixture: list[Source]  # what a Stream reads; `train` is a sample of it. Else empty
    answers: dict[str, np.memmap]  # split -> uint8 for each token of its conversations: 1 if Sam's
    dataset: str  # what `prepare` takes to find the same again: a word or an absolute path


def prepare(dataset, tokenizer, vocab_size, data_dir, seed=0, log=print, ignore=()) -> Data:
    """The corpus `dataset`, from the cache if it is there: a name in DATASETS, auto (real_sam if
    it is there or online, else nursery), a path, or stream:MIXTURE, of which only a sample and the
    held-out documents are kept.

    tokenizer: a name in TOKENIZERS, to be trained with vocab_size, or a checkpoint's Tokenizer.
    data_dir: the folder of downloads and caches. seed: of the nursery and of the order of pieces.
    log: prints a line. ignore: folders in which no text is looked for; data_dir is one of them.
    """
    data_dir = Path(os.path.expanduser(data_dir))
    dataset, name, checksum, read = find_source(str(dataset), data_dir, seed, log, ignore)
    known, damaged = None if isinstance(tokenizer, str) else tokenizer.hash, []
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
                damaged.append(folder)
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=data_dir) as temporary:
            building = Path(temporary) / "new"
            building.mkdir()
            train, held, facts = read()
            held_texts = set(held)
            train = [document for document in train if document not in held_texts]
            if not train or not held:
                raise DataError(f"{name}: too little to learn some and hold out some: add text")
            meta = {"name": name, "key": key, "sha256": checksum} | facts
            _build(building, meta, train, held, tokenizer, vocab_size, seed)
            for old in damaged:  # not before: what is new may need what there is no more
                shutil.rmtree(old, ignore_errors=True)
            with suppress(OSError):  # another process was first
                os.rename(building, folder)
            return _load(folder, key, dataset)
    except OSError as error:
        raise DataError(f"cannot write to {data_dir} ({error}): free or choose a disk") from None


def _build(folder: Path, meta: dict, train, held, tokenizer, vocab_size: int, seed: int) -> None:
    """Write the streams and, last, meta.json."""
    if isinstance(tokenizer, str):
        thin = train[:: sum(map(len, train)) // BPE_BYTES + 1]
        texts = train + held if tokenizer == "char" else thin  # no character may be unknown
        tokenizer = train_tokenizer(tokenizer, texts, vocab_size)
    random.Random(f"held-out {seed}").shuffle(held)
    streams = {"heldout": held}
    for split, documents in (("train", train), ("valid", held)):
        for phase in (*CUTS, *DOCUMENTS):
            streams[f"{split}_{phase}"] = cut(documents, phase, tokenizer, seed)
    meta |= {
        "tokenizer": tokenizer.state(),
        "dtype": "uint16" if tokenizer.vocab_size < 65536 else "uint32",
        "heldout_bytes": sum(len(document.encode()) for document in held),
    }
    for name in [name for name, texts in streams.items() if texts]:
        path = folder / f"{name}.bin"
        _write(path, streams[name], tokenizer, meta["dtype"])
        if name.endswith("conversations"):
            tokens = np.memmap(path, meta["dtype"], mode="r")
            answers = _answers(tokens, streams[name], tokenizer)
            answers.tofile(folder / f"{name.split('_')[0]}_answers.bin")
    for split in ("train", "valid"):
        parts = [folder / f"{split}_{phase}.bin" for phase in DOCUMENTS]
        if all(part.exists() for part in parts):
            with open(folder / f"{split}_blended.bin", "wb") as blended:
                for part in parts:
                    np.memmap(part, mode="r").tofile(blended)
    paths = sorted(folder.glob("*.bin"))
    meta["streams"] = {path.stem: zlib.crc32(np.memmap(path, mode="r")) for path in paths}
    content = json.dumps(meta)
    (folder / "meta.json").write_text(json.dumps({"hash": sha256(content), "content": content}))


def _write(path: Path, texts: list[str], tokenizer: Tokenizer, dtype: str) -> None:
    step, size = 4096, sum(map(len, texts))
    bar = tqdm(total=size, desc=path.stem, unit="B", unit_scale=True, disable=size < 2e7)
    with open(path, "wb") as file, bar:
        for start in range(0, len(texts), step):
            ids = [] if start else [tokenizer.end]
            for text_ids in tokenizer.encode_batch(texts[start : start + step]):
                ids += [*text_ids, tokenizer.end]
            file.write(np.array(ids, dtype).tobytes())
            bar.update(sum(map(len, texts[start : start + step])))


def _answers(tokens: np.ndarray, talks: list[str], tokenizer: Tokenizer) -> np.ndarray:
    """For each token of a stream of conversations, as uint8: 1 if Sam says it or if it ends what
    Sam says (END, or the next turn's mark). A token counts by its first byte."""
    lengths = np.array([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.end)] + [0])
    ends, parts = np.flatnonzero(tokens == tokenizer.end), [np.zeros(1, np.uint8)]
    answer = re.compile(rf"\n{SAM[:-1]}(.*?)(\n{YOU[:-1]}|\Z)".encode(), re.DOTALL)
    for talk, a, b in zip(talks, ends, ends[1:]):
        raw = talk.encode()
        said = np.zeros(len(raw) + 1, np.uint8)  # one more, for END
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

    def by_phase(split):
        return {p: streams[f"{split}_{p}"] for p in PHASES if f"{split}_{p}" in streams}

    answers = {name.split("_")[0]: streams[name] for name in streams if name.endswith("_answers")}
    return Data(
        meta["name"], meta["sha256"], tokenizer, by_phase("train"), by_phase("valid"),
        streams["heldout"], meta["heldout_bytes"], meta.get("entropy_bits"),
        [Source(*source) for source in meta.get("mixture", ())], answers, dataset,
    )  # fmt: skip
