"""Sentences with personal data: a grammar that writes them, files of them; their words and tags.

A sentence is (text, spans); spans are (start, end, label), in order, of the characters of entities.
"""

import functools
import itertools
import json
import random
import re
import string
import zlib
from pathlib import Path

GRAMMAR = Path(__file__).with_name("pii.txt")
# a.b@c.de, 2:30, 555-01 and Smith-Lee are one word each; 35-year is three
WORD = r"\+?\w+(?:(?:[.@/_:]+|(?<=\d)-(?=\d)|(?<=[^\W\d])-(?=[^\W\d]))\w+)*|[^\w\s]"
SWAPPED = 0.25  # share of the words outside entities that `varied` replaces
MADE_UP = 0.6  # largest share of a sentence's words that it makes up


def built_in(seed, held):
    """Endless sentences of the grammar pii.txt: of every fifth template if held, or the others."""
    rng = random.Random(seed)
    _, rules, templates = GRAMMAR.read_text().strip().split("\n\n")
    rules = dict(line.split(": ", 1) for line in rules.replace("|\n  ", "|").splitlines())
    templates = [t for i, t in enumerate(templates.splitlines()) if (i % 5 == 0) == held]

    def expand(match):
        chosen = rng.choice(rules[match[1] or match[2]].split("|"))
        return re.sub(r"<(\w+)>|([#?])", expand, chosen)

    while True:
        text, spans = "", []
        for piece in re.split(r"(<\w+>)", rng.choice(templates)):
            value = re.sub(r"<(\w+)>", expand, piece).replace("\\n", "\n")
            if piece.startswith("<"):
                spans.append((len(text), len(text) + len(value), piece[1:-1]))
            text += value
        yield text, spans


def read_records(path, bad):
    """The sentences of a JSON Lines or CoNLL file, one at a time; bad counts wrong spans."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        is_json = next((line for line in file if line.strip()), "").lstrip().startswith("{")
        file.seek(0)
        words, tags = [], []
        for number, line in enumerate(itertools.chain(file, ["\n"]), 1):
            parts = line.split()
            try:
                if is_json and parts:
                    record = json.loads(line)
                    yield record["source_text"] + "", good_spans(record, bad)
                elif parts and parts[0] != "-DOCSTART-":
                    words.append(parts[0])
                    tags.append(re.fullmatch(r"O|[BIESLU]-\S+", parts[-1])[0])
                elif words:
                    ends = itertools.accumulate(len(word) + 1 for word in words)
                    places = [(e - len(w) - 1, e - 1) for e, w in zip(ends, words)]
                    yield " ".join(words), spans_of(tags, places)
                    words, tags = [], []
            except (ValueError, KeyError, TypeError, AttributeError):
                wanted = "JSON with source_text and privacy_mask" if is_json else "word and BIO tag"
                raise ValueError(f"{path}, line {number}: expected {wanted}") from None


def good_spans(record, bad):
    """The spans of a record, without blanks at their ends. Those outside the text, blank, not of
    the value beside them, or overlapping an earlier one are left out and counted."""
    text, spans = record["source_text"], []
    for entity in record["privacy_mask"]:
        a, b, label = (entity.get(name) for name in ("start", "end", "label"))
        is_good = type(a) is type(b) is int and 0 <= a < b <= len(text) and label
        is_good = is_good and type(label) is str and entity.get("value", text[a:b]) == text[a:b]
        if is_good and text[a:b].strip() and all(b <= c or d <= a for c, d, _ in spans):
            a, b = b - len(text[a:b].lstrip()), a + len(text[a:b].rstrip())
            spans.append((a, b, label))
        else:
            bad["spans"] += 1
    return sorted(spans)


# ---- words and tags -----------------------------------------------------------------------------


def words_of(text):
    """(start, end) of each word and punctuation mark, and of each (its letters, the gap before)."""
    places = [m.span() for m in re.finditer(WORD, text)]
    gaps = (text[b:a] for (a, _), (_, b) in zip(places, [(0, 0), *places]))
    gaps = ("\n" if "\n" in gap else gap[:1] for gap in gaps)
    return places, [(text[a : min(b, a + 64)], gap) for (a, b), gap in zip(places, gaps)]


@functools.lru_cache(1 << 16)
def features(word, gap):
    """Numbers that describe a word after a gap: itself, shape, ends, groups of three letters."""
    lower, n = re.sub(r"\d", "0", word.lower()), len(word)
    shape = re.sub(r"\d", "0", re.sub(r"[^\W\d]", lambda m: "xX"[m[0].isupper()], word))
    outline = re.sub(r"(.)\1+", r"\1", shape)
    found = [f"is {word.lower()}", f"shape {shape}", f"outline {outline}", f"after {gap}"]
    found += [f"starts {lower[:i]}" for i in range(1, min(n, 4))]
    found += [f"ends {lower[-i:]}" for i in range(1, min(n, 4))]
    found += [f"has {lower[i : i + 3]}" for i in range(n - 2)]
    return [zlib.crc32(text.encode("utf-8", "surrogatepass")) for text in found]


def varied(words, tags, known, rng):
    """A sentence for training: others in place of some words outside entities, and some made up,
    else all that is new would be taken for an entity. known[tag]: words that had that tag."""
    words, share = list(words), rng.random() * MADE_UP
    for i, tag in enumerate(tags):
        is_outside = tag == "O"
        if is_outside and rng.random() < SWAPPED:
            words[i] = rng.choice(known[tag])
        if rng.random() < (share if is_outside else share / 2):
            (word, gap), (other, _) = words[i], rng.choice(known[tag])
            if word.isalpha() and other.isalpha():  # the beginning of one, the end of the other
                word = word[: rng.randint(1, len(word))] + other[rng.randrange(len(other)) :]
                case = rng.choice((str, str, str, str, str.capitalize, str.capitalize, str.upper))
                word = case(word) if is_outside else word
            elif is_outside and not word.isalnum():
                word = rng.choice(string.punctuation)
            words[i] = word, gap
    return words


def tags_of(spans, places):
    """The BIO tag of each word."""
    tags = ["O"] * len(places)
    for start, end, label in spans:
        inside = [i for i, (a, b) in enumerate(places) if a < end and b > start]
        for i in inside:
            tags[i] = ("B-" if i == inside[0] else "I-") + label
    return tags


def spans_of(tags, places):
    """The spans of BIO or BIOES tags. An I- that continues nothing begins an entity."""
    spans, before = [], ""
    for tag, (start, end) in zip(tags, places):
        kind, _, label = tag.partition("-")
        if kind in "IEL" and label == before:
            spans[-1] = (spans[-1][0], end, label)
        elif label:
            spans.append((start, end, label))
        before = label
    return spans
