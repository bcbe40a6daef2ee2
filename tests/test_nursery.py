"""nursery.py: the grammar, its probabilities, its texts."""

import math
import random
import re
from collections import Counter

import pytest

from data import SAM, YOU, is_talk
from nursery import nursery, rules, tell


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


def parse_back(text: str, rule: str):
    """-log2 probability of every derivation of `text`: an independent reading of the grammar.

    Capitals and a/an are undone first, in the text and in the grammar alike.
    """
    plain = lambda s: re.sub(r"\ban (?=[aeiou])", "a ", s.lower())  # noqa: E731
    grammar, goal = rules(), plain(text)

    def sequence(nodes, at, facts, then):
        if not nodes:
            return then(at, facts)
        node, rest = nodes[0], nodes[1:]
        go = lambda end, facts: sequence(rest, end, facts, then)  # noqa: E731
        if isinstance(node, str):
            node = plain(node)
            return go(at + len(node), facts) if goal.startswith(node, at) else []
        if isinstance(node, tuple) and node[1]:
            return fact(*node, at, facts, go)
        options = node if isinstance(node, list) else grammar[node[0]]
        return alternatives(options, at, facts, go)

    def alternatives(options, at, facts, go):
        total, found = sum(weight for weight, _ in options), []
        for weight, nodes in options:
            cost = -math.log2(weight / total)
            found += [cost + more for more in sequence(nodes, at, facts, go)]
        return found

    def fact(rule, name, form, at, facts, go):
        if name in facts:
            spoken = plain(facts[name][1][form])
            return go(at + len(spoken), facts) if goal.startswith(spoken, at) else []
        barred = {i for key, (i, _) in facts.items() if key.rstrip("0123456789") == rule}
        options = [(i, w, nodes) for i, (w, nodes) in enumerate(grammar[rule]) if i not in barred]
        total, found = sum(w for _, w, _ in options), []
        for i, w, nodes in options:
            if all(isinstance(node, str) for node in nodes):  # a lexicon entry, maybe with forms
                forms = "".join(nodes).split("/")
                spoken = plain(forms[form])
                if goal.startswith(spoken, at):
                    known = {**facts, name: (i, forms)}
                    found += [-math.log2(w / total) + more for more in go(at + len(spoken), known)]
            else:  # a template, used once
                tail = lambda end, facts, i=i: go(end, {**facts, name: (i, [])})  # noqa: E731
                found += [-math.log2(w / total) + more for more in sequence(nodes, at, facts, tail)]
        return found

    return alternatives(grammar[rule], 0, {}, lambda end, _: [0.0] if end == len(goal) else [])


def test_a_text_has_one_derivation():
    for seed in range(400):
        text, bits = tell("document", seeded(seed))
        assert parse_back(text, "document") == [pytest.approx(bits)], text


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
    assert again == corpus != nursery(60_000, "other")[0] and bits > 0


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
