"""ner.py and pii.py: words, tags, files, the tagger, its scores, and what it prints."""

import itertools
import json
import math
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ner
import pii

ROOT = Path(__file__).parent.parent
SIZES = {"vocab_size": 256, "n_embd": 16, "n_hidden": 16, "n_layer": 2, "d_ff": 16}
SIZES |= {"n_head": 2, "keys": 4}
TINY = [f"--{name}={n}" for name, n in SIZES.items()] + ["--words=64", "--threads=1"]
LABELS = ["AGE", "NAME"]


def tiny(**settings):
    torch.manual_seed(0)
    tagger = ner.Tagger(ner.NerConfig(**SIZES | settings), LABELS).eval()
    torch.nn.init.normal_(tagger.table)  # as after training; it starts from zero
    return tagger


def fixed(answers, limit=math.inf):
    """A tagger that finds `answers`, spans by text. limit: letters it takes in one call."""

    def find(texts, work):
        assert sum(len(text) for text in texts) <= limit
        work.update(words=len(texts), macs=0, synapses=0, synops=0)
        return [answers.get(text, []) for text in texts]

    return SimpleNamespace(find=find)


def record(text, *spans):
    mask = [{"start": a, "end": b, "label": label, "value": text[a:b]} for a, b, label in spans]
    return {"source_text": text, "privacy_mask": mask}


def stopped(argv, capsys):
    """The one line with which ner.py stops, exit code 2."""
    with pytest.raises(SystemExit) as stop:
        ner.main(argv)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1
    return line


def test_words_hold_numbers_and_addresses_together():
    text = "Ann-Lee's mail:\n  a.b@c.de, 2:30, +44 555-01 35-year."
    places, words = pii.words_of(text)
    expected = "Ann-Lee ' s mail : a.b@c.de , 2:30 , +44 555-01 35 - year ."
    assert [text[a:b] for a, b in places] == [word for word, _ in words] == expected.split()
    assert [gap for _, gap in words[:7]] == ["", "", "", " ", "", "\n", ""]
    assert pii.features("Ann", " ") != pii.features("ann", " ") != pii.features("ann", "\n")
    assert pii.features("41", " ")[1:] == pii.features("73", " ")[1:]  # all but the word itself


def test_tags_and_spans_are_one_thing():
    text = "Ann Lee, 30, met Bo Bo"
    spans = [(0, 7, "NAME"), (9, 11, "AGE"), (17, 19, "NAME"), (20, 22, "NAME")]
    places, _ = pii.words_of(text)
    tags = pii.tags_of(spans, places)
    assert tags == "B-NAME I-NAME O B-AGE O O B-NAME B-NAME".split()
    assert pii.spans_of(tags, places) == spans
    assert pii.spans_of(["I-NAME", "I-AGE", "E-AGE"], places) == [(0, 3, "NAME"), (4, 8, "AGE")]
    assert pii.spans_of(["S-AGE", "S-AGE", "O"], places) == [(0, 3, "AGE"), (4, 7, "AGE")]


def test_built_in_sentences_are_seeded_and_true():
    train, held = (list(itertools.islice(pii.built_in(1, held), 2000)) for held in (False, True))
    assert train[:50] == list(itertools.islice(pii.built_in(1, False), 50))
    assert train[:50] != list(itertools.islice(pii.built_in(2, False), 50))
    frames, labels = (set(), set()), (set(), set())
    for i, (text, spans) in [(0, x) for x in train] + [(1, x) for x in held]:
        assert spans == sorted(spans) and not set("<>#\\") & set(text)
        places, _ = pii.words_of(text)
        assert pii.spans_of(pii.tags_of(spans, places), places) == spans, text
        for a, b, label in reversed(spans):
            assert text[a:b].strip() == text[a:b] != ""
            text = f"{text[:a]}{label}{text[b:]}"
            labels[i].add(label)
        frames[i].add(text)
    assert len(frames[0]) > 30 and not frames[0] & frames[1]
    assert len(labels[0]) == 14 and labels[0] >= labels[1]


def test_training_sentences_vary_but_numbers_and_entities_keep_their_kind():
    _, words = pii.words_of("Call Ann Lee, aged 35, today!")
    tags = "O B-NAME I-NAME O O B-AGE O O O".split()
    known, made, before = {tag: [("Zo", " ")] for tag in tags}, Counter(), list(words)
    for seed in range(300):
        new = pii.varied(words, tags, known, random.Random(seed))
        assert len(new) == len(words) and new[5] == ("35", " ")
        assert all(new[i][0].isalpha() and new[i][1] == " " for i in (1, 2))
        made.update(i for i in range(9) if new[i] != words[i])
    assert words == before and 20 < made[1] < made[0] < 250 and made[8] > 100


def test_bad_offsets_are_counted_and_left_out(tmp_path):
    good = record("Zoë is 30", (0, 4, "NAME"), (7, 9, "AGE"))  # a blank at an end is cut
    bad = record("Ann is 30", (0, 3, "NAME"), (2, 5, "NAME"), (3, 4, "AGE"), (8, 8, "AGE"))
    whole = {"start": 7, "end": 9, "label": "AGE"}
    wrong = {"end": 99}, {"start": -2}, {"value": "31"}, {"start": "7"}, {"label": None}
    bad["privacy_mask"] += [whole | change for change in wrong]
    path, counted = tmp_path / "a.jsonl", Counter()
    path.write_text("\ufeff" + "\n\n".join(json.dumps(x) for x in (good, bad)))
    first, second = pii.read_records(path, counted)
    assert first == ("Zoë is 30", [(0, 3, "NAME"), (7, 9, "AGE")])
    assert second == ("Ann is 30", [(0, 3, "NAME")]) and counted["spans"] == 8


def test_conll(tmp_path):
    path = tmp_path / "a.conll"
    path.write_text("-DOCSTART- O\n\nAnn X B-NAME\nLee X I-NAME\nis O O\n30 C S-AGE\n\n\nBo B-NAME")
    first, second = pii.read_records(path, Counter())
    assert first == ("Ann Lee is 30", [(0, 7, "NAME"), (11, 13, "AGE")])
    assert second == ("Bo", [(0, 2, "NAME")])


def test_a_line_that_is_no_record_is_named(tmp_path):
    good = json.dumps(record("a"))
    nothing = json.dumps({"source_text": None, "privacy_mask": []})
    for text in (f'{good}\n{{"a": 1}}', "Ann B-NAME\nhello", f"{good}\n[1]", f"{good}\n{nothing}"):
        (tmp_path / "a.jsonl").write_text(text)
        with pytest.raises(ValueError, match=r"a.jsonl, line 2: expected"):
            list(pii.read_records(tmp_path / "a.jsonl", Counter()))


FLOAT = [{"block": "snn", "spikes": False}, {"block": "gpt"}]


@pytest.mark.parametrize("settings", [{}, {"block": "snn"}, *FLOAT], ids=str)
def test_a_word_is_read_with_both_its_neighbours(settings):
    _, words = pii.words_of("We met Ann Lee on Monday in Oslo")
    tagger = tiny(vocab_size=9999, **settings)
    logits, report = tagger([words])
    assert logits.shape == (1, 8, 5)
    seen = torch.autograd.grad(logits[0, 4].sum(), tagger.table)[0].abs().sum(1)
    rows = [pii.features(*word)[0] % 9999 for word in words]  # of the word itself
    assert sum(row % 9999 in rows for word in words for row in pii.features(*word)) == 8
    assert (seen[rows] > 0).all()
    assert not report.rates if settings in FLOAT else 0 < torch.cat(report.rates).mean() < 1


def test_sentences_do_not_see_each_other():
    tagger, work = tiny(), Counter()
    texts = ["Ann Lee is 30", "Bo is not 31", "", "one " * 600, "Ann met Bo"]
    found = tagger.find(texts, work)
    assert found == [tagger.find([text], Counter())[0] for text in texts]
    assert work["words"] == 4 + 4 + 600 + 3 and 0 < work["synops"] < work["synapses"]


def test_training_learns_and_a_checkpoint_scores_the_same(tmp_path, capsys):
    lines, path, out = [], tmp_path / "a.jsonl", f"--out_dir={tmp_path}"
    for name, age in itertools.product(("Ann Li", "Bo Ray", "Ann Ray", "Bo Li", "Cy Li"), "1357"):
        spans = (0, len(name), "NAME"), (len(name) + 4, len(name) + 5, "AGE")
        lines.append(json.dumps(record(f"{name} is {age} now", *spans)))
    path.write_text("\n".join(lines * 3))
    ner.main([f"--dataset={path}", out, *TINY, "--max_steps=80", "--lr=0.03"])
    printed = capsys.readouterr().out
    ner.main([f"--eval={path}", out, f"--result={tmp_path}/scores.json"])
    scored, written = capsys.readouterr().out, json.loads((tmp_path / "scores.json").read_text())
    all_of = next(line for line in scored.splitlines() if line.startswith("all")).split()
    assert float(all_of[1]) > 0.9 and all_of[3] == "120"
    assert f"{written['f1']['all'][0]:.3f}" == all_of[1] and written["parameters"] > 0
    for text in (printed, scored):
        assert "firing rate" in text and "SynOps" in text and "NAME" in text
    ner.main(["--tag=Ann Ray is 5 now", out])
    assert "0\t7\tNAME\tAnn Ray\n" in capsys.readouterr().out
    text, saved = tmp_path / "text", tmp_path / "ner.pt"
    text.write_bytes(b"Bo Li is 7 now\r\n")
    command = [sys.executable, "ner.py", f"--redact={text}", f"--ckpt={saved}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"[NAME] is [AGE] now\r\n"), done.stderr
    ner.main([f"--dataset={path}", out, *TINY, "--max_steps=10"])
    assert "is kept in" in capsys.readouterr().out and (tmp_path / "1" / "ner.pt").exists()


def test_what_cannot_be_done_is_one_line(tmp_path, capsys):
    assert "set --block=snn" in stopped(["--spikes=False"], capsys)
    assert "traits must be one of none" in stopped(["--traits=engram:99"], capsys)
    assert "threads must be 0 to" in stopped(["--threads=-1"], capsys)
    use = ["--tag=Ann", f"--ckpt={tmp_path}"]
    assert "there is no tagger" in stopped(use, capsys)
    saved = {"config": SIZES, "labels": LABELS, "model": tiny().state_dict()}
    for damage in {"labels": ["A"]}, {"config": {"x": 1}}, {"model": {}}, {"model": 5}:
        torch.save(saved | damage, tmp_path / "ner.pt")
        assert "do not fit" in (line := stopped(use, capsys)) or "is no tagger" in line
    (tmp_path / "a.jsonl").write_text(json.dumps(record("nothing")))
    argv = [f"--dataset={tmp_path}/a.jsonl", f"--out_dir={tmp_path}"]
    assert "too few entities" in stopped(argv, capsys)


def test_redacting_keeps_every_other_byte_and_streams(tmp_path, capfdbinary):
    path, odd = tmp_path / "text", b"\xef\xbb\xbfAnn\r\ncaf\xe9 \xff\x00 Ann\r\n\nZo\xc3\xab\n"
    path.write_bytes(odd + b"x" * 5_000_000 + b"\n" + b"a line of it\n" * 300_000 + b"Ann")
    ner.redact(fixed({"Ann": [(0, 3, "NAME")]}, 64 << 16), path)
    assert capfdbinary.readouterr().out == path.read_bytes()[:-3] + b"[NAME]"


def scores_of(pairs):
    """evaluate's scores of (true spans, found spans) of as many texts."""
    records = [(i * " ", true) for i, (true, _) in enumerate(pairs)]
    tagger = fixed({i * " ": found for i, (_, found) in enumerate(pairs)})
    return ner.evaluate(tagger, records, Counter(spans=2))


def test_scores_by_hand(capsys):
    true = [(0, 7, "NAME"), (9, 11, "AGE"), (20, 25, "NAME")]
    found = [(0, 3, "NAME"), (4, 7, "NAME"), (9, 11, "AGE"), (20, 25, "AGE")]
    scores = scores_of([(true, found), ([], [])])
    assert scores["AGE"] == pytest.approx((2 / 3, 2 * 0.5 * 1 / 1.5))
    assert scores["NAME"] == pytest.approx((0, 2 * 1 * 0.5 / 1.5))
    assert scores["all"] == pytest.approx((2 / 7, 2 * 0.75 * (2 / 3) / (0.75 + 2 / 3)))
    assert "left out: 2 entities" in capsys.readouterr().out


def test_scores_are_those_of_seqeval():
    metrics = pytest.importorskip("seqeval.metrics")
    rng, choices = random.Random(0), ["O", "O", "B-NAME", "I-NAME", "B-AGE", "I-AGE"]
    places = [(2 * i, 2 * i + 1) for i in range(12)]
    true, found = ([rng.choices(choices, k=12) for _ in range(200)] for _ in range(2))
    found = [[a if rng.random() < 0.8 else b for a, b in zip(*x)] for x in zip(true, found)]
    pairs = [tuple(pii.spans_of(tags, places) for tags in pair) for pair in zip(true, found)]
    scores, report = scores_of(pairs), metrics.classification_report(true, found, output_dict=True)
    assert scores["all"][0] == pytest.approx(metrics.f1_score(true, found))
    for label in LABELS:
        assert scores[label][0] == pytest.approx(report[label]["f1-score"])
