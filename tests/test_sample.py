"""sample.py: what it says, when it stops, what it remembers; `generate` and `pick` beneath it."""

import codecs
import contextlib
import io
import math
import os
import pty
import re
import signal
import subprocess
import sys
from dataclasses import asdict
from itertools import islice, product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import sources
import sample
from checkpoint import VERSION
from lif import Report
from model import ModelConfig, SpikingLM, pick
from sample import SampleConfig, written
from tokenizer import BPE, Bytes, Chars, train_tokenizer
from watch import Speaker, Watcher

ROOT = Path(__file__).parent.parent
TINY = dict(vocab_size=300, n_embd=16, n_hidden=32, n_layer=2, n_head=2, d_ff=32)


# ---- a fake model --------------------------------------------------------------------------------


class Fake:
    """A model that says `answer` token by token, then end tokens for ever. Its state is the tokens
    that it has seen."""

    sites, parts, head, stress, config = [], {}, None, torch.ones(()), SimpleNamespace(block="gpt")

    def __call__(self, tokens, state=None):
        logits = torch.zeros(1, 1, self.end + 1)
        logits[0, 0, self.answer[self.at] if self.at < len(self.answer) else self.end] = 99.0
        return logits, {"seen": torch.cat([*(state or {}).values(), tokens[0]])}, Report()


BYTE = Bytes()
END = "<end>"


def speaker(*answers, tokenizer=BYTE, kind=Speaker, c=None, **settings):
    """One that gives these answers, one after the other."""
    answers = iter([a if isinstance(a, list) else tokenizer.encode(a) for a in answers])

    class Scripted(kind):
        def speak(self, text, *how):
            self.tokenizer.encode(text)  # it may refuse
            self.model.answer = next(answers)
            return super().speak(text, *how)

        def read(self, ids, own):
            self.model.at = self.model.at + 1 if own else 0
            return super().read(ids, own)

    model = Fake()
    model.end = tokenizer.end
    return Scripted(model, tokenizer, c or SampleConfig(device="cpu", **settings))


def seen(s):
    """What the state says, as text."""
    tokens = s.state["seen"].tolist()
    assert s.tokenizer.end not in tokens[1:] and s.seen == len(tokens)
    return (END if tokens[0] == s.tokenizer.end else "") + s.tokenizer.decode(tokens)


def test_all_settings_reach_the_model(monkeypatch):
    asked = []
    monkeypatch.setattr("watch.pick", lambda *how: asked.append(how) or torch.tensor(97))
    s = speaker("aa", temperature=0.3, top_k=7, top_p=0.6, repetition=2.0, seed=5, max_new_tokens=2)
    list(written(s, "x"))
    for logits, temperature, top_k, top_p, generator in asked:
        assert (temperature, top_k, top_p, logits.shape) == (0.3, 7, 0.6, (1, BYTE.vocab_size))
        assert generator is s.generator and generator.initial_seed() == 5
    assert [logits.max() for logits, *_ in asked] == [99.0, 99.0 / 2]  # "a" was said by then


def test_a_continuation():
    s = speaker("upon a\nYou: time ")
    pieces = list(written(s, "Once "))
    assert "".join(pieces) == "upon a\nYou: time "  # of a prompt, blanks and all
    assert len(pieces) > 10  # shown as it comes
    assert seen(s) == f"{END}Once upon a\nYou: time "


def test_where_it_stops():
    for n in (0, 1, 3):
        s = speaker("abcdef", max_new_tokens=n)
        assert "".join(written(s, "x")) == "abcdef"[:n]
        assert seen(s) == END + "x" + "abcdef"[:n]
    goes_on = [*b"ab", BYTE.end, *b"cd"]
    assert "".join(written(speaker(goes_on), "")) == "ab"


def test_a_character_of_several_tokens():
    s = speaker("a文b")
    assert list(written(s, "")) == ["a", "文", "b", ""]
    s = speaker("a文b", max_new_tokens=3)  # cut off within
    assert list(written(s, "")) == ["a", "\N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize(
    "said, shown",
    [
        (" Hello.", "Hello."),
        (" Hello.\nYou: What", "Hello."),
        ("\n Hello.\n\n- a\n- b\nYou: What", "Hello.\n\n- a\n- b"),  # several lines
        (" I like\nYou, you.\nY", "I like\nYou, you.\nY"),  # only a beginning of a turn
        (" A\n\nYou: b", "A\n"),
        (" a\nSam: b\nYou: c\nYou: d", "a\nSam: b"),
        ("\nYou: c", ""),
        ("  ", ""),
        (" é文\nYou: c", "é文"),
    ],
)
def test_a_turn(said, shown):
    """It ends before the next "You:" or at the end token, and the state is that of what it said."""
    text = "You: hi\nSam: next é文 Hello. I like you, A b\n"
    kinds = [Chars(sorted(set(text + said)))]
    kinds += [train_tokenizer(kind, [text * 9 + said], 320) for kind in ("bpe", "lengthmax")]
    for tokenizer, kind in [*product([BYTE, *kinds], [Speaker, Watcher])]:
        s = speaker(said, " next", tokenizer=tokenizer, kind=kind)
        pieces = list(written(s, "hi", chat=True))
        assert "".join(pieces) == shown
        cut = said.split("\nYou:")[0]
        assert s.wrote == len(s.tokenizer.encode(cut))  # what was cut off counts in no rate
        assert seen(s) == f"{END}You: hi\nSam:{cut}"
        assert "".join(written(s, "A", chat=True)) == "next"
        assert seen(s) == f"{END}You: hi\nSam:{cut}\nYou: A\nSam: next"


def test_a_turn_is_shown_as_it_comes():
    pieces = list(written(speaker(" Hello you\nYou: x"), "", chat=True))
    assert pieces[:5] == list("Hello") and "".join(pieces) == "Hello you"


def test_tokens_across_the_end_of_a_turn():
    START = f"{END}You: \nSam:"
    broken = [*b" a\nYou:", *"文".encode()[:1]]
    assert "".join(written(speaker(broken), "", chat=True)) == "a"
    lengthmax = train_tokenizer("lengthmax", ["You: é\n" * 50], 300)
    s = speaker(" a\nYou: é\n", tokenizer=lengthmax)  # "You: é" is one token
    assert "".join(written(s, "", chat=True)) == "a" and seen(s) == f"{START} a"
    s = speaker([*b" a", 256, *b"You:"], tokenizer=BPE([b".\n"]))
    assert "".join(written(s, "", chat=True)) == "a." and seen(s) == f"{START} a."
    s = speaker([*b" a\nYo", 256], tokenizer=BPE([b"u:\xe6"]))  # and half a character
    assert "".join(written(s, "", chat=True)) == "a"


def test_a_turn_that_was_cut_off_is_remembered():
    s = speaker(" abcdefgh", " x", max_new_tokens=4)
    assert "".join(written(s, "a", chat=True)) == "abc"
    list(written(s, "b", chat=True))
    assert seen(s) == f"{END}You: a\nSam: abc\nYou: b\nSam: x"


# ---- a tiny real model ---------------------------------------------------------------------------


def checkpoint(path, tokenizer=BYTE, **more):
    """A checkpoint of an untrained model."""
    torch.manual_seed(0)
    c = ModelConfig(**TINY)
    content = {"version": VERSION, "model": SpikingLM(c).state_dict(), "config": asdict(c)}
    content |= {"tokenizer": tokenizer.state(), "position": {"step": 7}}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content | more, path)
    return path


@pytest.fixture
def ckpt(tmp_path):
    return checkpoint(tmp_path / "best.pt")


def run(capsys, *argv, code=0):
    """(stdout, stderr) of sample.py."""
    try:
        sample.main([*argv, "--device=cpu"])
        assert code == 0
    except SystemExit as stopped:
        assert stopped.code == code, capsys.readouterr().err
    return capsys.readouterr()


def test_which_checkpoint_speaks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("kernels._taken", {})  # nothing has run yet
    out, err = run(capsys, code=2)
    assert err.startswith("error: ") and "python train.py" in err and "--ckpt" in err
    files = ["out/best.pt", "out/a/best.pt", "out/b/best.pt", "out/b/1/best.pt", "other/best.pt"]
    for number, name in enumerate(files):
        os.utime(checkpoint(Path(name), position={"step": number}), (number, number))
    for newest in (2, 1, 0):  # neither older runs in numbered folders nor anything outside out/
        out, err = run(capsys, "--max_new_tokens=0", "--prompt=ab")
        assert out == "ab\n"
        assert err == f"{files[newest]}, step {newest} | lif: torch (cpu)\n"
        os.remove(files[newest])
    run(capsys, code=2)
    for name in ("other", "other/best.pt", "~/other", "~/other/best.pt"):
        said = run(capsys, f"--ckpt={name}", "--max_new_tokens=0").err
        assert "other/best.pt, step 4 | " in said
    assert "other/b.pt; train.py" in run(capsys, "--ckpt=other/b.pt", code=2).err
    run(capsys, "--ckpt=~nobody/x.pt", code=2)
    checkpoint(Path("other/best.pt"), position=None)
    assert "step unknown" in run(capsys, "--ckpt=other", "--max_new_tokens=0").err


def test_a_prompt(ckpt, capsys):
    ask = f"--ckpt={ckpt}", "--prompt= The cat", "--max_new_tokens=20"
    out, err = run(capsys, *ask)
    assert out.startswith(" The cat") and len(out) > 15 and err.count("\n") == 1
    assert run(capsys, *ask).out == out != run(capsys, *ask, "--seed=1").out


def test_an_unreadable_prompt_is_one_line(tmp_path, capsys):
    path = checkpoint(tmp_path / "best.pt", Chars("abc "))
    out, err = run(capsys, f"--ckpt={path}", "--prompt=abé", code=2)
    assert out == "" and "error: character 'é'" in err
    path = checkpoint(tmp_path / "best.pt", Chars(map(chr, range(500, 800))))
    assert "another --ckpt" in run(capsys, f"--ckpt={path}", code=2).err


def test_bfloat16_and_the_compiler_are_used(ckpt, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(SpikingLM, "prepare", lambda model, *how: asked.append(how))
    run(capsys, f"--ckpt={ckpt}", "--max_new_tokens=0")
    run(capsys, f"--ckpt={ckpt}", "--max_new_tokens=0", "--dtype=bfloat16", "--compile=True")
    assert asked == [(torch.float32, False), (torch.bfloat16, True)]


def test_what_has_no_use_for_the_compiler_says_so(ckpt, capsys):
    assert (
        "--compile is for block snn" in run(capsys, f"--ckpt={ckpt}", "--compile=True", code=2).err
    )


# ---- chat ----------------------------------------------------------------------------------------


def talk(monkeypatch, capsys, lines, *argv, answers=(), **settings):
    """(stdout, stderr, the speaker) of a chat in which `lines` are typed."""
    typed, made = iter(lines), []

    def read(prompt):
        line = next(typed, EOFError())
        if isinstance(line, Exception):
            raise line
        return line

    def make(model, tokenizer, c):
        made.append(speaker(*answers, tokenizer=tokenizer, c=c))
        return made[0]

    monkeypatch.setattr("builtins.input", read)
    if answers:
        monkeypatch.setattr(sample, "Speaker", make)
    return *run(capsys, "--chat", *argv), made and made[0]


def test_chat(ckpt, monkeypatch, capsys):
    lines = ["Hello ", "", "  ", "Who?", "\udcff", "Bye"]
    answers = [" Hi.\nYou: a", " One.\nTwo.", " So long.\nYou:"]
    out, err, s = talk(monkeypatch, capsys, lines, f"--ckpt={ckpt}", answers=answers)
    assert out == "Hi.\nOne.\nTwo.\nSo long.\n"
    conversation = "You: Hello\nSam: Hi.\nYou: Who?\nSam: One.\nTwo.\nYou: Bye\nSam: So long."
    assert seen(s) == END + conversation
    assert err.count("not UTF-8") == 1 and "Ctrl-D" in err and "example" not in err


def test_a_chat_tells_live_rates(ckpt, monkeypatch, capsys):
    ask = f"--ckpt={ckpt}", "--max_new_tokens=5", "--temperature=1"
    err = talk(monkeypatch, capsys, ["Hello"], *ask)[1]
    line = re.search(r"\((\d+) tok.*fired (\S+)% of .* (\S+)% of the synap", err)
    n, fired, synops = line.groups()
    assert n == "5" and 1 < float(fired) < 100 and 1 < float(synops) < 100


def test_a_prompt_is_the_first_thing_said(ckpt, monkeypatch, capsys):
    answers = " Hi.\nYou:", " Me."
    ask = f"--ckpt={ckpt}", "--prompt= Hello "
    out, err, s = talk(monkeypatch, capsys, ["Who?"], *ask, answers=answers)
    assert out == "Hi.\nMe.\n" and "> Hello\n" in err
    assert seen(s) == f"{END}You: Hello\nSam: Hi.\nYou: Who?\nSam: Me."


def test_a_line_with_an_unknown_character_costs_that_line(tmp_path, monkeypatch, capsys):
    letters = sorted(set("\nYou: Sam: ab"))
    path = checkpoint(tmp_path / "best.pt", Chars(letters))
    for lines in (["é", "ab"], ["ab", "é"]):
        out, err, s = talk(monkeypatch, capsys, lines, f"--ckpt={path}", answers=[" a b"])
        assert err.count("'é'") == 1 and out == "a b\n"
        assert seen(s) == f"{END}You: ab\nSam: a b"


@pytest.mark.parametrize("where", [{"dataset": "nursery"}, {"config": {"dataset": "nursery"}}])
def test_a_model_of_the_nursery_has_examples(where, tmp_path, monkeypatch, capsys):
    if "config" in where:
        where["config"] |= asdict(ModelConfig(**TINY))
    path = checkpoint(tmp_path / "best.pt", **where)
    err = talk(monkeypatch, capsys, [], f"--ckpt={path}")[1]
    assert all(example in err for example in sources.EXAMPLES)


def test_a_chat_in_a_terminal(ckpt):
    """Bytes that are no text, an empty line, line editing, Ctrl-D."""
    child, screen = pty.fork()  # a process of its own: readline wants the real stdin and stdout
    if not child:
        sys.stdin, sys.stdout = open(0, encoding="utf-8"), open(1, "w", encoding="utf-8")
        sys.stderr = sys.stdout
        os.environ["TERM"] = "dumb"
        try:
            sample.main(["--chat", f"--ckpt={ckpt}", "--max_new_tokens=3", "--threads=1"])
        finally:
            sys.stdout.flush()
            os._exit(sys.exc_info()[0] is not None)
    shown, left = "", [b"\xff\xfe\n", b"\n", b"Helo\x02l\n", b"\x04"]  # \x02: one to the left
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    with contextlib.suppress(OSError):  # raised at the end on Linux
        while part := os.read(screen, 4096):
            shown += decoder.decode(part)
            if left and shown.count("\n> ") == 5 - len(left):
                os.write(screen, left.pop(0))
    assert os.waitpid(child, 0)[1] == 0 and not left, shown
    assert shown.count("not UTF-8") == 1 and "Traceback" not in shown
    assert "Helo" in shown and "^B" not in shown  # it was edited, not shown
    assert "best.pt, step 7 | lif: torch (cpu)" in shown.split("> ")[0]


def test_a_chat_through_a_pipe(ckpt, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\n\xff\xfe\n\nb\n"), "utf-8"))
    out, err = run(capsys, "--chat", f"--ckpt={ckpt}", "--max_new_tokens=3")
    assert err.count("not UTF-8") == 1 and ">" not in err
    assert not out.startswith(">") and "lif" not in out and out.count("\n") >= 2


@pytest.mark.parametrize("script", ["train.py", "sample.py", "cell_bridge.py"])
def test_ctrl_c_while_torch_is_imported(script):
    start = [sys.executable, "-X", "importtime", script]
    process = subprocess.Popen(start, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:  # one for each module that has been imported
        if "torch." in line:
            break
    process.send_signal(signal.SIGINT)
    said = process.stderr.read()
    assert process.wait(60) == -signal.SIGINT and "Traceback" not in said


# ---- --eval --------------------------------------------------------------------------------------


def test_eval_reads_what_training_reads(ckpt, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("The cat sat.\n<|endoftext|>\nA dog ran.\n")
    (tmp_path / "texts" / "b.jsonl").write_text('{"text": "So be it."}\n{"no": 1}\n')
    out, err = run(capsys, f"--ckpt={ckpt}", "--eval=~/texts")
    assert out.startswith(f"{12 + 10 + 9 + 3} tokens, {12 + 10 + 9} bytes, 3 documents\n")
    assert "skipped 1 malformed" in err and "grammar" not in out
    nats, bits = (float(re.search(rf"{x} +([\d.]+)", out)[1]) for x in ("token", "byte"))
    assert bits == pytest.approx(nats * 34 / 31 / math.log(2), rel=1e-3)
    assert re.search(r"SynOps +\d+ triggered per token, [\d.]+% of \d+", out)
    assert run(capsys, f"--ckpt={ckpt}", "--eval=~/texts", "--eval_length=2").out != out
    assert "no file or folder" in run(capsys, f"--ckpt={ckpt}", "--eval=~/none", code=2).err


def test_the_nursery_judges_its_model(tmp_path, monkeypatch, capsys, corpus):
    monkeypatch.setattr("data.NURSERY_BYTES", (0, 3_000))
    asked = []

    def told_by(model, tokenizer, n=100, seed=0):
        asked.append((type(model), tokenizer.kind, n, seed))
        return [corpus[0], corpus[1] + ".", corpus[2], "x"]

    monkeypatch.setattr(sources, "told_by", told_by)
    mine = asdict(ModelConfig(**TINY)) | {"seed": 9}
    mine = checkpoint(tmp_path / "mine.pt", dataset="nursery", config=mine)
    held_out, bits = sources.nursery(3_000, "held-out 0")  # what training held out
    size = sum(map(len, held_out))
    other = checkpoint(tmp_path / "other.pt", dataset="other.txt")
    verdict = "of 4 documents that it wrote, the grammar derives 2; 3 keep"
    text = tmp_path / "text.txt"
    text.write_text("The cat sat.")
    for ask in ("--eval", "--eval=nursery", f"--eval={text}"):
        out = run(capsys, f"--ckpt={mine}", ask, "--seed=3").out
        assert verdict in out.splitlines()[-1]
        is_corpus = f", {size} bytes," in out and f"(entropy {bits / size:.4f})" in out
        assert is_corpus == (ask != f"--eval={text}")
    assert asked == [(SpikingLM, "byte", 100, 3)] * 3
    assert verdict in run(capsys, f"--ckpt={other}", "--eval", "--seed=1").out
    assert verdict not in run(capsys, f"--ckpt={other}", f"--eval={text}").out


# ---- generate and pick ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return SpikingLM(ModelConfig(**TINY)).eval()


def same(a, b):
    """Whether two states are equal but for rounding."""
    if torch.is_tensor(a):
        return torch.allclose(a.float(), b.float(), atol=1e-4)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(same, a, b))


def test_a_long_prompt_is_read_whole(model):
    prompt = torch.randint(300, (2, 1027), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, state, _ = model(prompt)
        last = model(prompt[:, 1024:])[1]  # neurons forget: 3 tokens alone leave another state
    token, read = next(model.generate(prompt, temperature=0))
    assert same(read, state) and not same(last, state)
    assert token.tolist() == logits[:, -1].argmax(-1, keepdim=True).tolist()
    more = torch.randint(300, (2, 5), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        onward = model(more, state)[1]
    assert same(next(model.generate(more, read))[1], onward)
    tokens, states = zip(*islice(model.generate(more, temperature=0), 3))
    with torch.no_grad():
        whole = model(torch.cat([more, *tokens[:2]], 1))[1]
    assert same(states[2], whole) and not same(states[1], whole)


def test_generate_passes_everything_on(model, monkeypatch):
    asked = []

    def pick(logits, *how):
        asked.append((logits.shape, logits.requires_grad, how))
        return torch.zeros(2, 1, dtype=torch.long)

    monkeypatch.setattr("model.pick", pick)
    generator = torch.Generator()
    list(islice(model.generate(torch.zeros(2, 3).long(), None, 0.3, 7, 0.6, generator, 200), 2))
    assert asked == [((2, 200), False, (0.3, 7, 0.6, generator))] * 2


def frequencies(logits, temperature=1.0, top_k=0, top_p=1.0, n=4000):
    drawn = pick(logits.expand(n, -1), temperature, top_k, top_p, torch.Generator().manual_seed(0))
    return (drawn.flatten().bincount(minlength=logits.shape[-1]) / n).tolist()


@pytest.mark.parametrize("likely, kept", [(200, 100), (5000, 2500)])
def test_top_p_of_a_large_vocabulary(likely, kept):
    """Equally likely tokens, half of which hold half of the probability; beside a flat row."""
    logits = torch.full((1001, 5000), -40.0)
    logits[:, -likely:] = 0.0
    logits[0] = 0.0
    drawn = pick(logits, 1.0, 0, 0.5, torch.Generator().manual_seed(0))[1:]
    assert len(drawn.unique()) == pytest.approx(kept * (1 - math.exp(-1000 / kept)), rel=0.05)
    assert drawn.min() >= 5000 - likely


def test_pick_by_hand():
    p = torch.tensor([0.1, 0.4, 0.3, 0.2])  # not sorted
    near = lambda *shares: pytest.approx(shares, abs=0.03)  # noqa: E731
    logits = p.log()
    assert frequencies(logits) == near(0.1, 0.4, 0.3, 0.2)
    assert frequencies(logits + 50) == frequencies(logits)
    assert frequencies(logits, top_k=1) == [0, 1, 0, 0]
    assert frequencies(logits, top_k=3) == near(0, 4 / 9, 3 / 9, 2 / 9)
    # the fewest that hold top_p: one is left out once those before it hold that much
    assert frequencies(logits, top_p=0.39) == frequencies(logits, top_p=1e-300) == [0, 1, 0, 0]
    assert frequencies(logits, top_p=0.41) == near(0, 4 / 7, 3 / 7, 0)
    assert frequencies(logits, top_p=0.71) == near(0, 4 / 9, 3 / 9, 2 / 9)
    half = (p**2 / (p**2).sum()).tolist()  # temperature 1/2: squares
    assert frequencies(logits, temperature=0.5) == near(*half)
    # top_p is of what temperature and top_k leave: 0.16 of 0.30, then 0.25
    assert frequencies(logits, temperature=0.5, top_p=0.52) == [0, 1, 0, 0]
    assert frequencies(logits, top_k=2, top_p=0.56) == [0, 1, 0, 0]
    # two that are equal are alike; each row has its own
    assert frequencies(torch.tensor([0.0, 1.0, 1.0]), top_p=0.3) != [1, 0, 0]
    rows = torch.tensor([[0.0, 9.0, 0.0], [5.0, 0.0, 0.0], [0.0, 0.0, 7.0]])
    for how in ((0.0, 0, 1.0), (1.0, 1, 1.0), (1.0, 0, 0.5)):
        assert pick(rows, *how, None).tolist() == [[1], [0], [2]]
    with pytest.raises(ValueError, match="older checkpoint"):
        pick(torch.tensor([[0.0, float("nan")]]), 1.0, 0, 1.0, None)


def test_pick_at_the_edges(monkeypatch):
    """A draw of 0, a sum of probabilities below 1, bfloat16, which is too coarse for either."""
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    logits = torch.randn(400, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    coarse, fine = (pick(x, 1.0, 0, 1.0, g) for x, g in zip((logits, logits.float()), generators))
    assert torch.equal(coarse, fine)
    for drawn in (0.0, 1 - 2**-24):
        monkeypatch.setattr(torch, "rand", lambda *shape, **how: torch.full(shape, drawn))
        assert pick(logits, 1.0, 0, 1.0, None).max() < 300
        assert pick(torch.tensor([[-torch.inf, 0.0, -torch.inf]]), 1.0, 0, 1.0, None) == 1
