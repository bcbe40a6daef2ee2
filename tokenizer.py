"""Text <-> token ids: bytes, characters, byte-pair encoding, length-max, GPT-2's vocabulary.

`train_tokenizer` makes a tokenizer from text, `tokenizer_from_state` from a checkpoint.
A new one is a subclass of Tokenizer, registered as `--tokenizer=name` by `@tokenizer("name")`.
"""

import hashlib
import heapq
import json
import os
import re
from collections import Counter, defaultdict

import numpy as np
import tiktoken


class DataError(ValueError):
    """Bad input. The message is one line: what is wrong and how to fix it."""


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


BYTES = [bytes([value]) for value in range(256)]
TOKENIZERS = {}  # kind -> class


def tokenizer(kind):
    """Register a class as `--tokenizer=kind`."""

    def register(cls):
        TOKENIZERS[kind], cls.kind = cls, kind
        return cls

    return register


class Tokenizer:
    """Token i stands for the bytes `pieces[i]`: 256 single bytes, then `vocab`, what was learnt.

    `end` is the id of the end token, the last one: no text gives it, and vocab_size counts it.
    A subclass defines `encode` or `encode_batch`; `kind` is its name in TOKENIZERS. It is made
    from its `vocab`, also as `state` writes it: as strings, each character one byte.
    """

    def __init__(self, vocab=(), pieces=None):
        self.vocab = [p.encode("latin-1") if isinstance(p, str) else p for p in vocab]
        self.pieces = BYTES + self.vocab if pieces is None else pieces
        self.end = len(self.pieces)
        self.vocab_size = self.end + 1
        if len(set(self.pieces)) < self.end:
            raise ValueError("two tokens of the vocabulary are the same")

    @classmethod
    def train(cls, texts, vocab_size: int):
        """A tokenizer for `texts`."""
        return cls()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, never `end`: a string that looks special is plain text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode_bytes(self, ids) -> bytes:
        """UTF-8 bytes of the ids; `end` adds none. One token may hold a part of a character."""
        ids = [int(i) for i in ids if i != self.end]
        if not all(0 <= i < self.end for i in ids):
            raise DataError(f"token ids go from 0 to {self.end}: use the tokenizer they came from")
        return b"".join(self.pieces[i] for i in ids)

    def decode(self, ids) -> str:
        """Text of the ids; bytes that are not UTF-8 become the replacement character."""
        return self.decode_bytes(ids).decode(errors="replace")

    def state(self) -> str:
        """JSON from which `tokenizer_from_state` rebuilds this tokenizer, for checkpoints."""
        as_text = [p.decode("latin-1") if isinstance(p, bytes) else p for p in self.vocab]
        return json.dumps({"kind": self.kind, "vocab": as_text})

    @property
    def hash(self) -> str:
        return sha256(self.state())[:12]


def train_tokenizer(kind: str, texts, vocab_size: int) -> Tokenizer:
    """A tokenizer for `texts`. vocab_size is for bpe and lengthmax, which stay below it on little
    text."""
    if kind not in TOKENIZERS:
        raise DataError(f"unknown tokenizer {kind!r}: use {', '.join(TOKENIZERS)}")
    return TOKENIZERS[kind].train(texts, vocab_size)


def tokenizer_from_state(state: str) -> Tokenizer:
    """The tokenizer whose `state()` this is. DataError when it is damaged."""
    try:
        fields = json.loads(state)
        return TOKENIZERS[fields["kind"]](fields["vocab"])
    except DataError:  # gpt2 without a network
        raise
    except (AttributeError, KeyError, TypeError, ValueError):
        raise DataError("damaged tokenizer state: use another checkpoint or cache") from None


def _whole(text: str) -> str:
    """`text` with its surrogate pairs joined and lone surrogates replaced, as tiktoken does it."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@tokenizer("byte")
class Bytes(Tokenizer):
    """The bytes of UTF-8, without merges."""

    def encode(self, text):
        return list(_whole(text).encode())


@tokenizer("char")
class Chars(Tokenizer):
    """The characters of a text and nothing else: `vocab` is a list of them."""

    def __init__(self, vocab=()):
        chars = list(vocab)
        super().__init__((), [char.encode(errors="surrogatepass") for char in chars])
        self.vocab, self._ids = chars, {ord(char): i for i, char in enumerate(chars)}

    @classmethod
    def train(cls, texts, vocab_size):
        return cls(sorted(set().union(*texts)))

    def encode(self, text):
        try:
            return [self._ids[ord(char)] for char in text]
        except KeyError as error:
            raise DataError(
                f"character {chr(error.args[0])!r} is not in this char tokenizer's vocabulary: "
                "leave it out, or train with tokenizer byte or bpe, which know every character"
            ) from None


# ---- Byte-pair encoding, run by tiktoken -----------------------------------------------------

# Merges stay inside: a word with the space or apostrophe before it, up to three digits, a run of
# signs, a run of blanks (but its last goes to the next word). Python and tiktoken both read this.
PATTERN = r"[ ']?[^\W\d_]+| ?\d{1,3}| ?(?:[^\w\s]|_)+|\s+(?!\S)|\s"
BPE_WORDS = 1_000_000  # bytes of different words that teach merges: the most frequent ones


def _room(kind: str, vocab_size: int) -> int:
    """How many tokens may be learnt."""
    if vocab_size < 257:
        raise DataError(f"vocab_size {vocab_size} is too small: set 257 or more for {kind}")
    return vocab_size - 257


@tokenizer("bpe")
class BPE(Tokenizer):
    """`vocab` is in the order in which its tokens were merged."""

    def __init__(self, vocab=()):
        super().__init__(vocab)
        ranks = {piece: rank for rank, piece in enumerate(self.pieces)}
        self._bpe = tiktoken.Encoding(
            "bpe", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}
        )

    @classmethod
    def train(cls, texts, vocab_size):
        room, counts = _room(cls.kind, vocab_size), Counter()
        for text in texts:
            counts.update(re.findall(PATTERN, _whole(text)))
        return cls(_learn_merges(counts, room))

    def encode(self, text):
        return self._bpe.encode_ordinary(text)

    def encode_batch(self, texts):
        """Long texts on all cores: threads cost short ones more than they save."""
        if sum(map(len, texts)) < 500 * len(texts):
            return super().encode_batch(texts)
        return self._bpe.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)


@tokenizer("gpt2")
class GPT2(BPE):
    """The tokens of GPT-2, which tiktoken downloads."""

    def __init__(self, vocab=()):
        try:
            self._bpe = tiktoken.get_encoding("gpt2")
        except Exception as error:  # whatever tiktoken's downloader lets through
            raise DataError(
                f"cannot load the gpt2 vocabulary ({type(error).__name__}): connect to the "
                "network, set TIKTOKEN_CACHE_DIR to a folder that holds it, or use tokenizer bpe"
            ) from None
        n = self._bpe.eot_token
        Tokenizer.__init__(self, (), [self._bpe.decode_single_token_bytes(i) for i in range(n)])

    @classmethod
    def train(cls, texts, vocab_size):
        return cls()


def _learn_merges(counts: Counter, n_merges: int) -> list[bytes]:
    """n_merges times, the most frequent pair of neighbours within the words becomes a token.

    A pair is known by its joined bytes and words are merged by the encoder's own rule, so the
    statistics are those of the text as it will be encoded. A step visits only the words that
    hold its token (inverted index). The heap may hold outdated counts; they are put right when
    they surface. Ties go to the smaller byte string.
    """
    words, times, size = [], [], 0
    for word, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        for at in range(0, len(word), 256):  # or a text without blanks would take hours
            words.append([bytes([b]) for b in word[at : at + 256].encode()])
            times.append(n)
            size += len(words[-1])
        if size > BPE_WORDS:
            break
    pairs = [list(map(bytes.__add__, word, word[1:])) for word in words]
    total, where = Counter(), defaultdict(set)  # of each pair: its count, the words with it
    for i, word_pairs in enumerate(pairs):
        for pair in word_pairs:
            total[pair] += times[i]
            where[pair].add(i)
    heap = [(-n, pair) for pair, n in total.items()]
    heapq.heapify(heap)
    ranks: dict[bytes, int] = {}
    while heap and len(ranks) < n_merges:
        n, token = heapq.heappop(heap)
        if -n != total[token]:
            if total[token] > 0:
                heapq.heappush(heap, (-total[token], token))
            continue
        if total[token] < 2:  # only unique pairs are left: this text has no more to teach
            break
        ranks[token] = len(ranks)
        come = set()
        for i in where.pop(token):
            gone, new = _merge(words[i], pairs[i], ranks)
            for pair in gone:
                total[pair] -= times[i]
            for pair in new:
                total[pair] += times[i]
                where[pair].add(i)
            come.update(new)
        for pair in come:
            heapq.heappush(heap, (-total[pair], pair))
    return list(ranks)


def _merge(word: list[bytes], pairs: list[bytes], ranks: dict[bytes, int]):
    """Join the pair of lowest rank, leftmost first, until no pair has a rank, as tiktoken does to
    encode a word. Changes `word` and its `pairs`; returns the pairs that went and that came."""
    gone, come = [], []
    while known := ranks.keys() & pairs:
        token = min(known, key=ranks.get)
        at = pairs.index(token)
        low = max(at - 1, 0)
        word[at : at + 2] = [token]
        new = list(map(bytes.__add__, word[low : at + 1], word[low + 1 : at + 2]))
        gone += pairs[low : at + 2]
        come += new
        pairs[low : at + 2] = new
    return gone, come


# ---- Length-max ------------------------------------------------------------------------------

# Its tokens may span words: they stay inside a line and, for speed, inside a part of it of 250
# characters at most that ends before a blank where there is one.
CHUNK = r"[^\n]{1,250}(?!\S)|[^\n]{1,250}|\n{1,250}"
LONGEST = 24  # bytes of a token
LENGTHMAX_BYTES = 5_000_000  # of chunks, evenly taken from the text, teach tokens: more add nothing
LENGTHMAX_ROUNDS = 16


@tokenizer("lengthmax")
class LengthMax(Tokenizer):
    """Length-MAX (arXiv 2511.20849): tokens that maximise frequency x length.

    Encoding is greedy: at each position it takes the longest token that fits. The tokens form a
    trie, stored as a table of steps, which is walked from many positions of a text at once.
    """

    def __init__(self, vocab=()):
        super().__init__(vocab)
        pieces, steps, found = self.pieces, {}, [0]  # found: node -> longest token on the way to it
        for i in sorted(range(len(pieces)), key=lambda i: len(pieces[i])):
            node = 0
            for byte in pieces[i]:
                key = node * 257 + byte
                if key not in steps:  # node * 257 + byte -> node
                    steps[key] = len(found)
                    found.append(found[node])
                node = steps[key]
            found[node] = i
        self.found = np.array(found, np.int32)
        self.lengths = np.array([len(piece) for piece in pieces])
        self.steps = np.zeros(257 * len(found), np.int32)  # 0: no way on; column 256 is always 0
        self.steps[np.fromiter(steps, np.int64)] = np.fromiter(steps.values(), np.int64) * 257

    @classmethod
    def train(cls, texts, vocab_size):
        """Each round encodes the text, adds the runs of 2 to 4 tokens that promise to save most,
        four times as many as there is room for, encodes again, and keeps the tokens that save
        most. A token that replaces k others saves k - 1 each time it is used."""
        n_tokens = _room(cls.kind, vocab_size)
        if vocab_size > 50_000:
            raise DataError(f"vocab_size {vocab_size} is too large: lengthmax goes up to 50000")
        chunks = [chunk for text in texts for chunk in re.findall(CHUNK, _whole(text))]
        chunks = chunks[:: sum(map(len, chunks)) // LENGTHMAX_BYTES + 1]
        chunks = [chunk.encode() for chunk in chunks]
        vocab: list[bytes] = []
        for done in range(1, LENGTHMAX_ROUNDS + 1):
            room = n_tokens * done // LENGTHMAX_ROUNDS
            now = cls(vocab)
            saved = _runs(now.match(chunks), now.pieces)
            for known in vocab:
                saved.pop(known, None)
            promising = sorted(saved, key=lambda token: (-saved[token], token))
            now = cls(vocab + promising[: 4 * (room - len(vocab))])
            ids, known = now.match(chunks), set(now.pieces)
            times = np.bincount(ids[ids >= 0], minlength=now.end)[256:].tolist()
            saved = {t: n * (_parts(t, known) - 1) for t, n in zip(now.vocab, times) if n > 1}
            vocab = sorted(saved, key=lambda token: (-saved[token], token))[:room]
        return cls(vocab)

    def match(self, chunks: list[bytes]) -> np.ndarray:
        """Ids of the chunks' tokens, one chunk after the other; -1 after each chunk (int32)."""
        text = np.frombuffer(b"".join(chunk + b"\0" for chunk in chunks), np.uint8).astype(np.int16)
        ends = np.cumsum([len(chunk) + 1 for chunk in chunks]) - 1
        text[ends] = 256  # the sign that leads nowhere
        ids = np.full(len(text), -2, np.int32)  # -2: inside a token
        ids[ends] = -1
        at = np.concatenate([[0], ends[:-1] + 1])  # in each chunk, where its next token begins
        at = at[text[at] < 256]
        while len(at):
            last = self.steps[text[at]].astype(np.int64)  # where the walk from each `at` ends
            walk, here, node = np.arange(len(at)), at, last  # those still under way
            while len(walk):
                here = here + 1
                node = self.steps[node + text[here]].astype(np.int64)
                on = np.flatnonzero(node)
                walk, here, node = walk[on], here[on], node[on]
                last[walk] = node
            ids[at] = self.found[last // 257]
            at = at + self.lengths[ids[at]]
            at = at[text[at] < 256]
        return ids[ids > -2]

    def encode_batch(self, texts):
        if not texts:
            return []
        chunks = [[*re.findall(CHUNK, _whole(text)), ""] for text in texts]
        ids = self.match([chunk.encode() for some in chunks for chunk in some])
        ends = np.flatnonzero(ids < 0)[np.cumsum([len(some) for some in chunks]) - 1]
        return [part[part >= 0].tolist() for part in np.split(ids, ends)[:-1]]


def _runs(ids: np.ndarray, pieces: list[bytes]) -> Counter:
    """For each run of 2 to 4 tokens within a chunk: the tokens saved, were it one token."""
    saved, keys = Counter(), ids.astype(np.uint16).astype(np.uint64)  # a key is 16 bits a token
    lengths = np.array([len(piece) for piece in pieces] + [LONGEST])[ids]  # -1, a chunk's end
    size, first = lengths, keys
    for n in (2, 3, 4):
        keys = keys[:-1] << np.uint64(16) | first[n - 1 :]
        size = size[:-1] + lengths[n - 1 :]
        runs, times = np.unique(keys[size <= LONGEST], return_counts=True)
        often = np.argsort(-times, kind="stable")[:65536]
        for run, count in zip(runs[often].tolist(), times[often].tolist()):
            if count > 1:
                parts = (pieces[run >> 16 * i & 0xFFFF] for i in reversed(range(n)))
                saved[b"".join(parts)] += count * (n - 1)
    return saved


def _parts(token: bytes, known: set[bytes]) -> int:
    """How many tokens would encode `token` if it were not a token itself."""
    at = parts = 0
    while at < len(token):
        stops = range(len(token) - (at == 0), at, -1)
        at = next(stop for stop in stops if token[at:stop] in known)
        parts += 1
    return parts
