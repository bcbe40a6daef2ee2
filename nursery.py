"""The nursery: a built-in corpus of stories and conversations whose true entropy is known.

A grammar, nursery.txt, tells the texts; its head explains its notation. "a" becomes "an" and
sentences get their capitals here. Two derivations never give the same text (a test parses texts
back), so the probability of a text is that of the choices made, and the entropy is known exactly.

`tell` writes a text, `follow` parses one, and `judge` counts what a model got right.
"""

import functools
import math
import random
import re
from collections import defaultdict
from pathlib import Path

import torch

GRAMMAR = Path(__file__).with_name("nursery.txt")
FORMS = {"": 0, "he": 1, "him": 2, "his": 3, "ed": 1, "s": 1, "at": 1, "is": 1}
MARKS = re.compile(r"<(\w+)>|\{([a-z]+)(\d?)\.?(\w*)\}|(\d+)\*|([(|)])|([^<{(|)\d]+)")
LONGEST = 600  # bytes: no document has so many
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
    text = re.sub(r"^#.*\n", "", GRAMMAR.read_text(), flags=re.MULTILINE)
    text = re.sub(r"\n +(?=\(?\|)|(?<=\|)\n +", "", text.strip())  # next to a | no blank
    lines = (line.split(": ", 1) for line in re.sub(r"\n +", " ", text).splitlines() if line)
    return {name: _parse(MARKS.finditer(body.replace("\\n", "\n"))) for name, body in lines}


def _parse(marks) -> list:
    """Alternatives up to the closing bracket. A node is a string, a list of alternatives or
    (rule, fact, form), in which fact None means: afresh."""
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


def tell(rule: str, pick) -> tuple[str, float]:
    """A text of `rule` and its -log2 probability (bits). pick(weights) -> index makes every
    choice; its probability is its weight's share."""
    facts, taken, bits = {}, defaultdict(set), 0.0  # fact -> forms; rule -> choices made; bits

    def choose(options, barred=()) -> int:
        nonlocal bits
        weights = [0 if i in barred else weight for i, (weight, _) in enumerate(options)]
        i = pick(weights)
        bits -= math.log2(weights[i] / sum(weights))
        return i

    def write(node) -> str:
        if isinstance(node, str):
            return node
        if isinstance(node, list):
            return "".join(map(write, node[choose(node)][1]))
        rule, fact, form = node
        if fact is None:
            return write(rules()[rule])
        if fact not in facts:
            i = choose(rules()[rule], taken[rule])
            taken[rule].add(i)
            facts[fact] = "".join(map(write, rules()[rule][i][1])).split("/")
        return facts[fact][form]

    return _finish(write((rule, None, 0))), bits


def _finish(text: str) -> str:
    """"a" becomes "an" before a vowel, and sentences get their capitals."""
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


# ---- The judge -------------------------------------------------------------------------------


@functools.cache
def _forms(rule: str) -> list | None:
    """The forms of each alternative of a lexicon; None for a rule of sentences."""
    nodes = [nodes for _, nodes in rules()[rule]]
    if all(isinstance(node, str) for some in nodes for node in some):
        return [_plain("".join(some)).split("/") for some in nodes]


def follow(text: str, rule="document", keep=True) -> tuple[list[float], int, dict]:
    """Parse `text`: (-log2 probability of each derivation, how far the grammar came, the facts
    it knew there). How far: in characters of the text with each "an" before a vowel as "a".

    All derivations are followed at once. A state is (what it wrote, its facts, its bits); it is
    dropped when the text goes on otherwise, so garbage costs no more than a text.
    keep=False: a fact that is named again may have become another choice of its rule.
    """
    goal, far, known = _plain(text).lower(), 0, {}

    def write(piece, state, is_word=False):
        nonlocal far, known
        written, facts, bits = state
        end = len(written) + len(piece)
        if not goal.startswith(piece.lower(), len(written)):
            return []
        if is_word and goal[end : end + 1].isalpha():  # "drummer" is no drum
            return []
        if end > far:
            far, known = end, facts
        return [(written + piece, facts, bits)]

    def choose(options, state, barred=()):
        """(number, nodes, the state that took it) of each alternative that may be taken."""
        written, facts, bits = state
        total = sum(weight for i, (weight, _) in enumerate(options) if i not in barred)
        for i, (weight, nodes) in enumerate(options):
            if i not in barred:
                yield i, nodes, (written, facts, bits - math.log2(weight / total))

    def recall(rule, fact, form, state):
        """Write a fact that is known."""
        kept = state[1][fact][1]
        said = {forms[form] for forms in ([kept] if keep else _forms(rule))}
        return [end for piece in said for end in write(piece, state, True)]

    def learn(rule, fact, form, state):
        """Write a fact for the first time: it is none of the other facts of its rule."""
        barred = {i for other, (i, _) in state[1].items() if other.rstrip("0123456789") == rule}
        lexicon = _forms(rule)
        for i, nodes, state in choose(rules()[rule], state, barred):
            forms = lexicon and lexicon[i]
            ends = write(forms[form], state, True) if lexicon else sequence(nodes, state)
            for written, facts, bits in ends:
                yield written, facts | {fact: (i, forms)}, bits

    def follow_one(node, state):
        if isinstance(node, str):
            return write(_plain(node), state)
        if isinstance(node, tuple) and node[1]:
            return (recall if node[1] in state[1] else learn)(*node, state)
        options = node if isinstance(node, list) else rules()[node[0]]
        return [end for _, nodes, now in choose(options, state) for end in sequence(nodes, now)]

    def sequence(nodes, state):
        """The states in which `state` can be after these nodes."""
        states = [state]
        for node in nodes:
            states = [end for state in states for end in follow_one(node, state)]
        return states

    ends = follow_one((rule, None, 0), ("", {}, 0.0))
    return [bits for written, _, bits in ends if _finish(written) == text], far, known


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
    for tokens, _ in stream:
        for i in going:
            rows[i].append(tokens[i].item())
        going = [
            i for i in going
            if rows[i][-1] != tokenizer.end and len(tokenizer.decode_bytes(rows[i])) <= LONGEST
        ]  # fmt: skip
        if not going:
            break
    model.train(training)
    return [tokenizer.decode(row).strip() for row in rows]
