"""sources.py, the nursery: the grammar, its probabilities, its texts."""

import hashlib
import math
import random
import re
from collections import Counter

import pytest
import torch

from data import SAM, YOU, is_talk
from sources import EXAMPLES, LONGEST, follow, judge, nursery, rules, tell, told_by
from tokenizer import Bytes


def seeded(seed):
    rng = random.Random(seed)
    return lambda weights: rng.choices(range(len(weights)), weights)[0]


def all_derivations(rule):
    """Every (text, bits) of a rule: choices are counted up like the digits of a number."""
    path = []
    while True:
        used, at = [], iter(path)

        def pick(weights):
            options = [i for i, weight in enumerate(weights) if weight]
            used.append((next(at, 0), len(options)))
            return options[used[-1][0]]

        yield tell(rule, pick)
        while used and used[-1][0] + 1 == used[-1][1]:
            used.pop()
        if not used:
            return
        path = [i for i, _ in used[:-1]] + [used[-1][0] + 1]


@pytest.mark.parametrize("rule", ["when", "name", "greet", "react", "sad", "glad", "bye", "ending"])
def test_probabilities_sum_to_one(rule):
    probability = Counter()
    for n, (text, bits) in enumerate(all_derivations(rule), start=1):
        probability[text] += 2.0**-bits
    assert len(probability) == n > 4  # no text twice
    assert sum(probability.values()) == pytest.approx(1)


def test_a_text_has_one_derivation():
    """`follow` is told the text only: it finds the same derivation, and no other."""
    for seed in range(400):
        text, bits = tell("document", seeded(seed))
        found, far, _ = follow(text)
        assert found == [pytest.approx(bits)] and len(text) < LONGEST, text
        assert far == len(text) - len(re.findall(r"\b[Aa]n [aeiou]", text))


def swapped(text, rule):
    """`text` with another word of the lexicon `rule` where a word of it stands again, or None."""
    lexicon = [nodes[0].split("/")[0] for _, nodes in rules()[rule]]
    found = [word for word in re.finditer(r"\w+", text) if word[0] in lexicon]
    again = [word for i, word in enumerate(found) if word[0] in [w[0] for w in found[:i]]]
    if again:
        other = lexicon[(lexicon.index(again[-1][0]) + 1) % len(lexicon)]
        return text[: again[-1].start()] + other + text[again[-1].end() :]


def test_judge_passes_what_the_grammar_tells(corpus):
    assert judge(corpus) == dict.fromkeys(("documents", "derivable", "consistent"), len(corpus))


@pytest.mark.parametrize("rule", ["name", "thing"])
def test_judge_notices_what_was_swapped(rule, corpus):
    texts = [text for told in corpus if (text := swapped(told, rule))]
    texts += [text.replace(" ", "  ", 1) for text in texts]  # the grammar is left before the swap
    assert len(texts) > 50
    assert judge(texts) == {"documents": len(texts), "derivable": 0, "consistent": 0}


STORY = (
    "Long ago, there lived a shy owl named Tom. Tom wanted a friend. One cool day, he sat in an "
    "old box and watched the bees. Soon, a busy fox named Anna came by. She was new and did not "
    "know anyone. Tom took a deep breath. \"Do you like games?\" he asked. \"I love them!\" said "
    "Anna. They played tag two times, and Anna won once. Tom and Anna sang until bedtime."
)


@pytest.mark.parametrize(
    "old, new, derivable, consistent",
    [
        ("", "", 1, 1),
        ("Tom wanted", "tom wanted", 0, 1),  # capitals
        ("an old", "a old", 0, 1),
        (" until bedtime.", " until", 0, 1),  # cut off
        ("bees. ", "bees. The end. ", 0, 0),  # so far it is kept, but then Anna is new
        ("said Anna. They", "said Anna. Well, they", 0, 1),
        ("They played tag", "Then the cat played", 0, 0),  # so is the cat
        ("he sat", "she sat", 0, 0),  # Tom has become somebody else
        ("Tom took", "Anna took", 0, 0),  # known, but not the one
        ("Tom took", "Tim took", 0, 1),  # no name
        ("She was new", "Her was new", 0, 1),  # nor is that "he"
        ("a busy fox", "a busy owl", 0, 0),  # as the first one
        ("Long ago, there lived", "Tom", 0, 0),  # never began
        (STORY, "", 0, 0),
        (STORY, "You: You: You:" * 200, 0, 0),
        (STORY, "Long ago, " * 500, 0, 0),
    ],
)
def test_judge_by_hand(old, new, derivable, consistent):
    assert old in STORY
    text = STORY.replace(old, new, 1)
    found = {"documents": 1, "derivable": derivable, "consistent": consistent}
    assert judge([text]) == found, text


def test_examples_are_of_the_grammar():
    """What is said to be worth a try is what conversations of the nursery begin with."""
    story, hello, name, cow = (f"You: {said}\nSam: " for said in EXAMPLES)
    for rule, text in (("tale", story), ("self", hello), ("quiz", cow + "A ")):
        assert follow(text, rule)[1] == len(text)
    assert any(tell("mine", seeded(seed))[0].startswith(name) for seed in range(40))


class Replay:
    """A model that says what it is told to: a text for each row of a batch, then the end token."""

    def __init__(self, texts, end):
        self.rows, self.training, self.how = [[*t.encode(), end, 65] for t in texts], True, None

    def parameters(self):
        return iter([torch.zeros(1)])

    def train(self, mode=True):
        self.training = mode

    def eval(self):
        self.training = False

    def generate(self, tokens, state=None, *how):
        assert not self.training  # without dropout
        self.start, self.how, self.steps = tokens, how, 0
        while True:
            self.steps += 1
            yield torch.tensor([[row[min(self.steps, len(row)) - 1]] for row in self.rows]), None


def test_told_by_a_model(corpus):
    byte = Bytes()
    texts = [corpus[0], " a\n", "", "b" * 2 * LONGEST]
    model = Replay(texts, byte.end)
    told = told_by(model, byte, n=4, seed=5)
    assert told == [corpus[0], "a", "", "b" * (LONGEST + 1)]
    assert model.start.tolist() == [[byte.end]] * 4 and model.training
    temperature, top_k, top_p, generator, vocab = model.how
    assert (temperature, top_k, top_p, vocab) == (0.7, 0, 0.95, 257)
    assert generator.initial_seed() == 5 and model.steps == LONGEST + 1
    assert len(told_by(Replay([""] * 100, byte.end), byte)) == 100


def test_same_text_same_probability():
    rng = random.Random(0)
    pick = lambda weights: rng.choices(range(len(weights)), weights)[0]  # noqa: E731
    seen = {}
    for _ in range(4000):  # quizzes are short enough to come up again
        text, bits = tell("quizzes", pick)
        assert seen.setdefault(text, bits) == pytest.approx(bits)


def test_choices_are_as_frequent_as_claimed():
    rng = random.Random(1)
    pick = lambda weights: rng.choices(range(len(weights)), weights)[0]  # noqa: E731
    told = [tell("document", pick)[0] for _ in range(4000)]
    talks = sum(map(is_talk, told))
    assert abs(talks / 4000 - 4 / 9) < 4 * math.sqrt(4 / 9 * 5 / 9 / 4000)
    heroes = Counter(re.search(r" named (\w+)\.", text)[1] for text in told if " named " in text
                     and not is_talk(text))  # fmt: skip
    n = sum(heroes.values())
    chi2 = sum((count - n / 24) ** 2 / (n / 24) for count in heroes.values())
    assert len(heroes) == 24 and chi2 < 60  # 23 degrees of freedom: above once in 40,000
    starts = Counter(text.split("\n")[0] for text in told)
    assert starts["You: Hello, Sam."] > 0


def test_nursery_is_what_it_says(corpus):
    vocabulary = {word.lower() for text in corpus for word in re.findall(r"[A-Za-z]+", text)}
    assert len(vocabulary) >= 400
    for text in corpus:
        assert "  " not in text and text == text.strip() and not re.search(r"[<>{}()|*/\\\d]", text)
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text, re.I), text
        assert not re.search(r"[.] [a-z]", text), text
        if is_talk(text):
            lines = text.split("\n")
            assert all(line.startswith((YOU, SAM)[i % 2]) for i, line in enumerate(lines))
        else:
            assert 30 <= len(text.split()) <= 120
    again, bits = nursery(60_000, "test")
    assert again == corpus != nursery(60_000, "other")[0]
    assert bits == pytest.approx(9202.346169675864)


def test_nursery_is_the_same_text_forever(corpus):
    """Results name it: a change of the grammar or of its random choices needs them anew."""
    digest = hashlib.sha256("\n".join(corpus).encode()).hexdigest()
    assert digest == "e5e784858d7410f341a7ac4f8a5f5cf10189d20c004190f746b062c59b3e7e36"


def test_facts_hold_within_a_document():
    for seed in range(300):
        text, _ = tell("facts", seeded(seed))
        told = re.search(r"wants an? (\w+) (\w+)\.", text)
        for color, thing in re.findall(r"Sam: \w+ wants an? (\w+) (\w+)\.", text):
            assert thing == "one" or (color, thing) == told.groups()
        for color in re.findall(r"Sam: The \w+ is (\w+)\.", text):
            assert color == told[1]


def test_grammar_has_no_loose_ends():
    grammar, used = rules(), {"document"}

    def visit(options):
        bodies = [str(nodes) for _, nodes in options]
        assert len(set(bodies)) == len(bodies), bodies  # an alternative given twice
        for _, nodes in options:
            for node in nodes:
                if isinstance(node, list):
                    visit(node)
                elif isinstance(node, tuple):
                    used.add(node[0])

    for options in grammar.values():
        visit(options)
    assert used == set(grammar)
