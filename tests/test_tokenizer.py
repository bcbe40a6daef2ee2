"""tokenizer.py: bytes, characters, byte-pair encoding, length-max; round trips and training."""

import random
import re
from collections import Counter

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from data import END_TEXT
from sources import nursery
from tokenizer import (
    BPE, BYTES, CHUNK, LONGEST, PATTERN, TOKENIZERS, Bytes, DataError, LengthMax, Tokenizer,
    _merge, _parts, _runs, tokenizer, tokenizer_from_state, train_tokenizer,
)  # fmt: skip

SAMPLE = "The cat's hat, the cat sat. That's that: 12345 hats_and cats!\n\n  A caterpillar sat.  "


def make(kind, corpus) -> Tokenizer:
    return train_tokenizer(kind, corpus, 400)


def random_text(seed: int, length=200) -> str:
    rng = random.Random(seed)
    ranges = [(0, 128), (0, 0x300), (0x300, 0x370), (0x2000, 0x2070), (0x4E00, 0x4F00),
              (0x1F600, 0x1F650), (9, 33), (0x660, 0x66A)]  # fmt: skip
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(length))


@pytest.mark.parametrize("kind", ["byte", "bpe", "lengthmax"])
def test_any_text_survives(kind, corpus):
    tokenizer = make(kind, corpus)
    texts = ["", SAMPLE, END_TEXT, "<|endofprompt|>", *map(random_text, range(50))]
    for text, ids in zip(texts, tokenizer.encode_batch(texts)):
        assert ids == tokenizer.encode(text) and tokenizer.end not in ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([tokenizer.end, *ids, tokenizer.end]) == text
    long = ["word " * 300, SAMPLE * 20, "x" * 999, "\n" * 999]  # enough for the threaded path
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in long)
    assert tokenizer.encode_batch(long) == [tokenizer.encode(text) for text in long]


@pytest.mark.parametrize("kind", ["bpe", "lengthmax"])
def test_any_bytes_decode(kind, corpus):
    tokenizer = make(kind, corpus)
    raw = random.Random(0).randbytes(300)
    ids = list(raw)  # the first 256 ids are the bytes
    assert tokenizer.decode_bytes(ids) == raw
    assert tokenizer.decode(ids) == raw.decode(errors="replace")
    for bad in (tokenizer.vocab_size, -1):
        with pytest.raises(DataError, match="token ids"):
            tokenizer.decode([bad])


@pytest.mark.parametrize("kind", ["byte", "bpe", "lengthmax"])
@pytest.mark.parametrize("text, whole", [
    ("a\ud83d\ude00b", "a😀b"), ("\ud83d", "\ufffd"), ("x\ud83d y\ude00", "x\ufffd y\ufffd"),
    ("\ude00\ud83d", "\ufffd\ufffd"), ("\ud83d\ud83d\ude00", "\ufffd😀"), ("\ufeffa", "\ufeffa"),
    ("a" * 249 + "\ud83d\ude00" * 9, "a" * 249 + "😀" * 9),
])  # fmt: skip
def test_surrogates(kind, text, whole):
    """Pairs are joined and lone ones replaced, by every tokenizer, in text and in what teaches."""
    tokenizer = TOKENIZERS[kind]([] if kind == "byte" else ["😀".encode(), b"aa"])
    ids = tokenizer.encode(text)
    assert ids == tokenizer.encode(whole) == tokenizer.encode_batch([text])[0]
    assert tokenizer.decode(ids) == whole
    states = [train_tokenizer(kind, [t] * 9, 300).state() for t in (text, whole)]
    assert states[0] == states[1]


def test_a_million_signs():
    """Older versions of tiktoken overflow their stack and panic; requirements.txt excludes them."""
    signs = "^" * 1_000_000
    assert Bytes().encode(signs) == [ord("^")] * 1_000_000
    assert BPE([b"^^"]).encode(signs) == [256] * 500_000


def test_merges_of_lowest_rank_come_first():
    """As tiktoken encodes: where ranks compete, the statistics have to be those of its choice."""
    word, pairs = [b"a", b"b", b"c"], [b"ab", b"bc"]
    gone, come = _merge(word, pairs, {b"bc": 0, b"ab": 1})
    assert (word, pairs, gone, come) == ([b"a", b"bc"], [b"abc"], [b"ab", b"bc"], [b"abc"])


def test_byte_tokens_are_bytes():
    tokenizer = Bytes()
    assert tokenizer.vocab_size == 257 and tokenizer.end == 256
    assert tokenizer.encode("né") == list("né".encode())


def test_char_vocabulary():
    tokenizer = train_tokenizer("char", ["banana", "né"], 0)
    assert tokenizer.vocab == ["a", "b", "n", "é"] and tokenizer.vocab_size == 5
    assert tokenizer.decode(tokenizer.encode("nab")) == "nab"
    with pytest.raises(DataError, match="'o'.*byte or bpe"):
        tokenizer.encode("box")


def brute_encode(word: str, ranks: dict[bytes, int]) -> list[bytes]:
    parts = [bytes([b]) for b in word.encode()]
    while True:
        options = [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:]))
                   if a + b in ranks]  # fmt: skip
        if not options:
            return parts
        _, i = min(options)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def brute_train(text: str, n_merges: int) -> list[bytes]:
    ranks = {}
    for _ in range(n_merges):
        total = Counter()
        for word in re.findall(PATTERN, text):
            parts = brute_encode(word, ranks)
            total.update(a + b for a, b in zip(parts, parts[1:]))
        best = min(total, key=lambda pair: (-total[pair], pair), default=None)
        if best is None or total[best] < 2:
            break
        ranks[best] = len(ranks)
    return list(ranks)


def test_bpe_agrees_with_brute_force(corpus):
    rng = random.Random(3)
    texts = ["".join(rng.choices("ab", k=200)), " ".join(corpus[:12]), SAMPLE * 3]
    texts.append(" ".join("".join(rng.choices("ab", k=rng.randint(1, 30))) for _ in range(60)))
    texts.append(" ".join("".join(rng.choices("abc", k=rng.randint(1, 9))) for _ in range(300)))
    for text in texts:
        merges = brute_train(text, 120)
        tokenizer = train_tokenizer("bpe", [text], 257 + 120)
        assert tokenizer.vocab == merges
        ranks = {piece: rank for rank, piece in enumerate(merges)}
        for word in re.findall(PATTERN, text + " new tacatcats"):
            pieces = [tokenizer.decode_bytes([i]) for i in tokenizer.encode(word)]
            assert pieces == brute_encode(word, ranks)


def test_bpe_learns_from_all_of_a_long_word():
    """Cut into parts of 256 letters, or a text without blanks would take hours."""
    assert train_tokenizer("bpe", ["a" * 256 + "bc" * 99], 400).vocab[:2] == [b"aa", b"aaaa"]
    assert b"bc" in train_tokenizer("bpe", ["a" * 256 + "bc" * 99], 400).vocab


def test_bpe_is_deterministic_and_may_run_out_of_pairs(corpus, monkeypatch):
    first = train_tokenizer("bpe", corpus, 500)
    assert first.vocab_size == 500
    monkeypatch.setattr("tokenizer.BPE_WORDS", 2000)  # not all words are looked at
    limited = train_tokenizer("bpe", corpus, 500).state()
    assert limited == train_tokenizer("bpe", corpus[::-1], 500).state() != first.state()
    tiny = train_tokenizer("bpe", ["one two"], 4096)
    assert tiny.vocab_size == 257 and tiny.decode(tiny.encode(SAMPLE)) == SAMPLE
    with pytest.raises(DataError, match="vocab_size 256"):
        train_tokenizer("bpe", corpus, 256)


@pytest.mark.parametrize("kind", ["byte", "char", "bpe", "lengthmax"])
def test_state_rebuilds(kind, corpus):
    tokenizer = make(kind, corpus)
    again = tokenizer_from_state(tokenizer.state())
    assert again.hash == tokenizer.hash and again.vocab_size == tokenizer.vocab_size
    assert again.encode(corpus[0]) == tokenizer.encode(corpus[0])


@pytest.mark.parametrize("state", [
    "", "{", "[]", "null", '{"kind": "bpe"}', '{"kind": "bpe", "vocab": ["a"]}',
    '{"kind": "bpe", "vocab": ["ab", "ab"]}', '{"kind": "bpe", "vocab": ["\\u4e00b"]}',
    '{"kind": "char", "vocab": ["ab"]}', '{"kind": "char", "vocab": [1]}',
    '{"kind": "byte", "vocab": 3}',
])  # fmt: skip
def test_damaged_state(state):
    with pytest.raises(DataError, match="damaged tokenizer state"):
        tokenizer_from_state(state)


def greedy(text: str, pieces: list[bytes]) -> list[int]:
    """Length-max, by trying every piece at every place."""
    ids = []
    for chunk in re.findall(CHUNK, text):
        left = chunk.encode()
        while left:
            ids.append(max((i for i, p in enumerate(pieces) if left.startswith(p)),
                           key=lambda i: len(pieces[i])))  # fmt: skip
            left = left[len(pieces[ids[-1]]) :]
    return ids


few = st.text(alphabet="ab \né文", max_size=60)
some_bytes = st.lists(st.sampled_from("ab é文".encode()), min_size=2, max_size=6).map(bytes)


@settings(max_examples=100, deadline=None)
@given(st.sets(some_bytes, max_size=30), st.lists(few, max_size=4))
def test_lengthmax_takes_the_longest_piece(vocab, texts):
    tokenizer = LengthMax(sorted(vocab))
    expected = [greedy(text, BYTES + tokenizer.vocab) for text in texts]
    assert tokenizer.encode_batch(texts) == expected
    assert [tokenizer.encode(text) for text in texts] == expected


@pytest.fixture(scope="module")
def lengthmax(corpus):
    return make("lengthmax", corpus)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=700) | st.text("a \n", max_size=700))
def test_lengthmax_round_trip(lengthmax, text):
    ids = lengthmax.encode(text)
    assert all(0 <= i < lengthmax.end for i in ids)
    assert lengthmax.decode_bytes(ids) == text.encode()
    chunks = re.findall(CHUNK, text)
    assert "".join(chunks) == text and max(map(len, chunks), default=0) <= 250


def test_lengthmax_learns_what_saves_most(corpus):
    once = train_tokenizer("lengthmax", ["the hat is the hat of the hat.\n" * 40], 257 + 60)
    assert len(once.encode("the hat is the hat of the hat.")) <= 2  # tokens span words
    times = Counter(once.encode("the hat is the hat of the hat.\n" * 40))
    assert all(times[256 + i] > 1 for i in range(len(once.vocab))), once.vocab
    assert max(map(len, once.vocab)) <= LONGEST and not any(b"\n" in p for p in once.vocab)
    tokenizer = make("lengthmax", corpus)
    assert tokenizer.vocab_size == 400 and tokenizer.state() == make("lengthmax", corpus).state()
    held, _ = nursery(20_000, "held")
    ours, bpe = (sum(map(len, t.encode_batch(held))) for t in (tokenizer, make("bpe", corpus)))
    assert ours < 0.93 * bpe
    ids = [i for document in corpus for i in tokenizer.encode(document)]
    assert set(range(256, 400 - 1)) <= set(ids)  # every token is of use
    tiny = train_tokenizer("lengthmax", ["one two", ""], 4096)
    assert tiny.vocab == [] and tiny.decode(tiny.encode(SAMPLE)) == SAMPLE
    assert train_tokenizer("lengthmax", ["aaa"], 300).vocab == []  # aa would be used once
    for size, says in ((256, "vocab_size 256"), (50_001, "too large")):
        with pytest.raises(DataError, match=says):
            train_tokenizer("lengthmax", corpus, size)


def test_lengthmax_learns_from_a_part_of_much_text(monkeypatch):
    text = ("ab" * 10 + "\n" + "cd" * 10 + "\n") * 50  # 2100 characters in chunks of 20, 1, 20, 1
    assert b"cd" in b"".join(train_tokenizer("lengthmax", [text], 300).vocab)
    monkeypatch.setattr("tokenizer.LENGTHMAX_BYTES", 600)  # every fourth chunk
    assert b"cd" not in b"".join(train_tokenizer("lengthmax", [text], 300).vocab)


def test_runs_of_tokens():
    pieces = BYTES + [b"ab", b"x" * 23]
    ids = np.array([97, 98, 256, -1, 97, 98, 256, 257, 97, 257, 97, -1], np.int32)
    expected = Counter()
    for chunk in ([97, 98, 256], [97, 98, 256, 257, 97, 257, 97]):
        for n in (2, 3, 4):
            for i in range(len(chunk) - n + 1):
                run = b"".join(pieces[j] for j in chunk[i : i + n])
                if len(run) <= LONGEST:
                    expected[run, n] += n - 1
    found = Counter()
    for (run, n), saved in expected.items():
        if saved > n - 1:  # more than once
            found[run] += saved
    assert _runs(ids, pieces) == found
    assert _parts(b"abab", {b"a", b"b", b"aba", b"abab"}) == 2
    assert _parts(b"abab", {b"a", b"b", b"ab", b"abab"}) == 2
    assert _parts(b"ab", {b"a", b"b", b"ab"}) == 2


def test_gpt2_offline_is_one_line(monkeypatch):
    def fail(name):
        raise OSError("no network\nat all")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(DataError, match="TIKTOKEN_CACHE_DIR") as caught:
        train_tokenizer("gpt2", [], 0)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="TIKTOKEN_CACHE_DIR"):
        tokenizer_from_state('{"kind": "gpt2", "vocab": []}')


def test_a_tokenizer_is_registered_in_one_place(monkeypatch):
    with pytest.raises(DataError, match="unknown tokenizer 'bits': use byte, char, bpe, gpt2"):
        train_tokenizer("bits", [], 0)
    monkeypatch.setattr("tokenizer.TOKENIZERS", dict(TOKENIZERS))

    @tokenizer("bits")
    class Bits(Tokenizer):
        def __init__(self, vocab=()):
            super().__init__((), [b"0", b"1"])

        def encode(self, text):
            return [int(bit) for bit in text]

    bits = tokenizer_from_state(train_tokenizer("bits", ["0"], 0).state())
    assert bits.encode_batch(["01", "1"]) == [[0, 1], [1]] and bits.decode([1, 2, 0]) == "10"
    assert (bits.kind, bits.end, bits.vocab_size) == ("bits", 2, 3)
