"""The nursery: a built-in corpus of stories and conversations whose true entropy is known.

A grammar, nursery.txt, tells the texts; its head explains its notation. "a" becomes "an" and
sentences get their capitals here. Two derivations never give the same text (a test parses texts
back), so the probability of a text is that of the choices made, and the entropy is known exactly.
"""

import functools
import math
import random
import re
from collections import defaultdict
from pathlib import Path

GRAMMAR = Path(__file__).with_name("nursery.txt")
FORMS = {"": 0, "he": 1, "him": 2, "his": 3, "ed": 1, "s": 1, "at": 1, "is": 1}
MARKS = re.compile(r"<(\w+)>|\{([a-z]+)(\d?)\.?(\w*)\}|(\d+)\*|([(|)])|([^<{(|)\d]+)")


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

    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", write((rule, None, 0)))
    return re.sub(r"(?:^|[.!?] |\.\" |: )[a-z]", lambda match: match[0].upper(), text), bits


def nursery(n_bytes: int, seed) -> tuple[list[str], float]:
    """Documents of the built-in corpus, n_bytes or a little more, and their -log2 probability."""
    rng = random.Random(f"nursery {seed}")
    documents, size, bits = [], 0, 0.0
    while size < n_bytes:
        text, cost = tell("document", lambda w: rng.choices(range(len(w)), w)[0])
        documents.append(text)
        size, bits = size + len(text), bits + cost
    return documents, bits
