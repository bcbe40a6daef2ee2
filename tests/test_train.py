"""Training: golden losses, one process = two, resume, Ctrl-C, curriculum, sampling, mistakes."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import config
import data
import sample
from model import SpikingLM
from train import Run, TrainConfig, forget, make_optimizers, next_batch, train_step

ROOT = Path(__file__).parent.parent
TINY = (
    "--tokenizer=byte --vocab_size=300 --n_embd=16 --n_hidden=32 --n_layer=2 --n_head=2 --d_ff=32"
    " --tokens_per_step=256 --micro_tokens=256 --max_steps=8 --eval_interval=4 --warmup_steps=2"
    " --sample_tokens=5 --eval_length=32 --eval_tokens=200 --threads=1 --device=cpu --seed=1"
    " --dtype=float32"
).split()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder with a small text of stories and conversations."""
    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    words = "the cat dog sat ran on a mat and saw big red bird".split()
    stories = [
        " ".join(rng.choices(words, k=rng.randint(8, 30))).capitalize() + "." for _ in range(60)
    ]
    talks = [f"{data.turn(rng.choice(words))} {rng.choice(words)}." for _ in range(40)]
    (folder / "text.txt").write_text(f"\n{data.END_TEXT}\n".join(stories + talks))
    return folder


def settings(text, out, *more, config="configs/sam_6m.py"):
    return [config, *TINY, f"--dataset={text / 'text.txt'}"] + [
        f"--data_dir={text / 'cache'}", f"--out_dir={out}", *more
    ]  # fmt: skip


def run(text, out, *more, start=("train.py",), code=0, **config):
    """A run in processes of its own; returns its log, a dictionary per evaluation."""
    done = subprocess.run(
        [sys.executable, *start, *settings(text, out, *more, **config)],
        cwd=ROOT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return read_log(out) if code == 0 else done.stderr


def read_log(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def losses(log):
    return [(x["step"], x["train"], x["valid"], x["heldout"]) for x in log]


TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "train.py")
STORIES = "--phases=stories:16"


@pytest.fixture(scope="module")
def one(text, tmp_path_factory):
    """The log of one plain run."""
    os.chdir(ROOT)
    out = tmp_path_factory.mktemp("one")
    return out, run(text, out, STORIES)


def test_log_and_checkpoint(one):
    out, log = one
    assert [x["step"] for x in log] == [0, 4, 8]
    assert log[-1]["train"] < log[1]["train"] and log[-1]["bpb"] < log[0]["bpb"]
    assert log[0]["heldout"] == pytest.approx(5.7, abs=0.3)  # ln(300): knows nothing yet
    for x in log:
        assert len(x["rate"]) == 2 and 0 < x["stress"] <= 1
        # bytes are tokens here, but for the end token, which has nats and no bytes
        assert x["bpb"] >= x["heldout"] / 0.6932
    names = {"best.pt", "log.jsonl", "step_00000004.pt", "step_00000008.pt"}
    assert {path.name for path in out.iterdir()} == names
    checkpoint = torch.load(out / "step_00000008.pt", weights_only=True)
    assert checkpoint["position"]["step"] == 8
    assert {"commit", "versions", "date"} <= set(checkpoint["environment"])


def test_golden_losses(one):
    """These change only if the numbers that training computes change: then say why, and renew."""
    assert [x["heldout"] for x in one[1]] == pytest.approx(GOLDEN, abs=0.01)


GOLDEN = [5.706, 5.538, 5.46]


def test_two_processes_equal_one(text, one, tmp_path):
    two = run(text, tmp_path, STORIES, start=TORCHRUN)
    print(losses(one[1]), losses(two))
    for a, b in zip(losses(one[1]), losses(two)):
        assert a[0] == b[0]
        for x, y in zip(a[1:], b[1:]):
            assert x == y or x == pytest.approx(y, abs=1e-4)


def test_accumulation_changes_nothing(text, one, tmp_path):
    log = run(text, tmp_path, STORIES, "--micro_tokens=64")
    print(losses(one[1]), losses(log))
    for a, b in zip(losses(one[1]), losses(log)):
        assert all(x == y or x == pytest.approx(y, abs=1e-4) for x, y in zip(a, b))


def test_resume_goes_on_bit_for_bit(text, one, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "train.py", *settings(text, tmp_path, STORIES, "--eval_interval=1")],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stdout:  # Ctrl-C in the middle
        if re.match(r" +3 ", line):
            process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    newest = max(tmp_path.glob("step_*.pt"))
    assert 3 <= torch.load(newest, weights_only=True)["position"]["step"] < 8
    log = run(text, tmp_path, STORIES, "--init_from=resume")
    assert losses(log)[-1][3] == losses(one[1])[-1][3]


def test_resume_drops_what_it_would_have_dropped(text, tmp_path):
    drop = (STORIES, "--dropout=0.3")
    whole = run(text, tmp_path / "whole", *drop)
    run(text, tmp_path / "halves", *drop)
    (tmp_path / "halves" / "step_00000008.pt").unlink()
    (tmp_path / "halves" / "best.pt").unlink()
    resumed = run(text, tmp_path / "halves", *drop, "--init_from=resume")
    assert losses(resumed)[-1] == losses(whole)[-1]


@pytest.mark.parametrize(
    "more, message",
    [("--n_layer=1", "n_layer=2"), ("--vocab_size=301", "vocab_size=300")]
    + [
        ("--tokenizer=char", "another tokenizer"),
        ("--phases=words:4 stories:16", "other --phases"),
    ],
)
def test_resume_of_another_run_is_refused(text, one, tmp_path, more, message):
    shutil.copytree(one[0], tmp_path / "copy")
    err = run(text, tmp_path / "copy", STORIES, "--init_from=resume", more, code=2)
    assert message in err and "Traceback" not in err


def test_a_new_run_begins_a_new_log(text, tmp_path):
    run(text, tmp_path, STORIES, "--max_steps=1")
    assert [x["step"] for x in run(text, tmp_path, STORIES, "--max_steps=2")] == [0, 2]


def test_a_finished_run_goes_on_and_evaluates_nothing_twice(text, tmp_path):
    run(text, tmp_path, STORIES, "--max_steps=4")
    log = run(text, tmp_path, STORIES, "--max_steps=8", "--init_from=resume")
    assert [x["step"] for x in log] == [0, 4, 8]


def test_result_says_where_it_comes_from(text, tmp_path):
    run(text, tmp_path, STORIES, "--max_steps=2", f"--result={tmp_path / 'result.json'}")
    content = (tmp_path / "result.json").read_text()
    result = json.loads(content)
    assert [x["step"] for x in result["log"]] == [0, 2] and result["seed"] == 1
    assert result["data"]["name"] == "text.txt" and len(result["data"]["sha256"]) == 64
    assert str(tmp_path) not in content and str(text) not in content


def test_curriculum_goes_through_its_phases(text, tmp_path):
    log = run(
        text, tmp_path, "--phases=words:4 sentences:8 conversations:16", "--eval_interval=1",
        "--max_steps=30", "--phase_share=0.2", "--rehearse=0.25",
    )  # fmt: skip
    phases = [x["phase"] for x in log]
    assert sorted(set(phases), key=phases.index) == ["words", "sentences", "conversations"]
    assert phases.count("words") <= 7 and phases.count("sentences") <= 7
    for phase in set(phases):
        valid = [x["valid"] for x in log if x["phase"] == phase]
        assert valid[-1] < valid[0]
    assert len({x["tokens"] // max(1, x["step"]) for x in log[1:]}) == 1  # constant per step


def test_converged_phase_ends_early(text, tmp_path):
    log = run(
        text, tmp_path, "--phases=words:4 stories:16", "--eval_interval=1", "--phase_share=0.9",
        "--phase_gain=10.0", "--phase_patience=2",
    )  # fmt: skip
    assert [x["phase"] for x in log].count("words") == 3  # every gain is too small: two in a row


def test_a_model_that_explodes_stops(text, tmp_path):
    err = run(text, tmp_path, STORIES, "--lr=1e30", "--grad_clip=0.0", code=2)
    assert "the loss became" in err and "--lr" in err


@pytest.mark.parametrize(
    "more, message",
    [
        (["--dataset=nowhere.txt"], "nowhere.txt"),
        (["--init_from=resume"], "no checkpoint"),
        (["--vocab_size=100"], "--vocab_size=257"),
        (["--device=cuda"], "no device 'cuda'"),
        (["--steps=3"], "unknown setting 'steps'"),
        (["--phases=stories:100000"], "tokens_per_step"),
        (["--phases=stories:90000", "--tokens_per_step=90000"], "too little text"),
        (["--eval_interval=0"], "eval_interval must be at least 1"),
        (["--rehearse=1.0"], "rehearse must be"),
        (["--out_dir=README.md"], "README.md"),
    ],
)
def test_mistakes_are_one_line(text, tmp_path, more, message, capsys):
    if "cuda" in message and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    err = run(text, tmp_path, *more, code=2)
    last = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(last) == 1 and message in last[0] and "Traceback" not in err


# ---- sample.py on that run -----------------------------------------------------------------------


def say(capsys, *argv):
    sample.main(list(argv))
    return capsys.readouterr().out


def test_sample_continues_a_prompt(one, capsys):
    ckpt = f"--ckpt={one[0] / 'best.pt'}"
    out = say(capsys, ckpt, "--prompt=The cat", "--max_new_tokens=30", "--stop_at_end=False")
    assert out.startswith("The cat") and len(out) > 20
    again = say(capsys, ckpt, "--prompt=The cat", "--max_new_tokens=30", "--stop_at_end=False")
    other = say(capsys, ckpt, "--prompt=The cat", "--max_new_tokens=30", "--seed=1")
    assert out == again != other
    assert say(capsys, ckpt, "--prompt=The cat", "--max_new_tokens=0").strip() == "The cat"
    for how in ("--temperature=0.0", "--top_k=100000", "--top_p=0.01", "--temperature=0.00001"):
        assert say(capsys, ckpt, "--prompt=", how, "--max_new_tokens=5")


def test_sample_scores_a_text_as_training_does(one, capsys, tmp_path):
    out, _ = one
    tokenizer = data.tokenizer_from_state(torch.load(out / "step_00000008.pt")["tokenizer"])
    path = tmp_path / "some.txt"
    path.write_text("The cat sat.\n<|endoftext|>\nA big dog ran.\n")
    printed = say(capsys, f"--ckpt={out / 'step_00000008.pt'}", f"--eval={path}")
    n = len(tokenizer.encode("The cat sat.")) + len(tokenizer.encode("A big dog ran.")) + 2
    assert printed.startswith(f"{n} tokens, 26 bytes, 2 documents")
    nats = float(re.search(r"nats per token +([\d.]+)", printed)[1])
    bits = float(re.search(r"bits per byte +([\d.]+)", printed)[1])
    assert bits == pytest.approx(nats * n / 26 / 0.693147, rel=1e-3)
    assert re.search(r"SynOps +\d+ triggered per token, [\d.]+% of \d+", printed)


def test_a_damaged_or_hostile_checkpoint_is_refused(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'ran'}",))

    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "evil.pt").read_bytes()[:100])
    for name in ("evil.pt", "half.pt", "missing.pt"):
        with pytest.raises(SystemExit) as stopped:
            sample.main([f"--ckpt={tmp_path / name}"])
        err = capsys.readouterr().err
        assert stopped.value.code == 2 and name in err and err.count("\n") == 1
    assert not (tmp_path / "ran").exists()


# ---- scale: the 1B config, shrunk ----------------------------------------------------------------

BIG = (
    "--n_embd=32 --n_layer=2 --attention=1 --attention_every=2 --d_ff=64"
    " --phases=stories:16 --dtype=float32 --tokenizer=byte"
)
ONE = ("train.py",)


@pytest.mark.parametrize(
    "near, before, after",
    [
        (1e-5, (ONE, "--checkpointing=False"), (ONE, "--checkpointing=True")),
        (1e-5, (TORCHRUN, "--shard=False"), (TORCHRUN, "--shard=True")),
        # sums over two processes round otherwise, and a spike may flip: the twin has none
        (1e-4, (ONE, "--spikes=False"), (TORCHRUN, "--spikes=False --shard=True")),
    ],
)
def test_neither_processes_nor_sharding_nor_checkpointing_change_the_losses(
    text, tmp_path, near, before, after
):
    def losses_of(out, start, more, *others):
        more = [*BIG.split(), *more.split(), *others]
        return losses(run(text, out, *more, start=start, config="configs/snn_1b.py"))

    one, other = losses_of(tmp_path / "one", *before), losses_of(tmp_path / "other", *after)
    for a, b in zip(one, other, strict=True):
        assert all(x == y or x == pytest.approx(y, abs=near) for x, y in zip(a, b)), (a, b)
    (tmp_path / "other" / "step_00000008.pt").unlink()  # as if killed before the last save
    (tmp_path / "other" / "best.pt").unlink()
    assert losses_of(tmp_path / "other", *after, "--init_from=resume") == other


# ---- optimisers ----------------------------------------------------------------------------------


def test_every_parameter_has_one_optimiser_of_its_kind():
    c = config.load(TrainConfig, ["configs/sam_6m.py", "--optimizer=muon", "--neuron_lr=10"])
    with torch.device("meta"):
        model = SpikingLM(c)
    optimizers = make_optimizers(c, model, torch.device("cpu"))
    names = {id(p): name for name, p in model.named_parameters()}
    lr = {names[id(p)]: (type(o).__name__, g["peak"], g["weight_decay"])
          for o in optimizers for g in o.param_groups for p in g["params"]}  # fmt: skip
    assert (
        len(lr) == len(names) == sum(len(g["params"]) for o in optimizers for g in o.param_groups)
    )
    for name in ("parts.block0.fc_in.weight", "parts.block5.w_rec", "parts.block1.gate.weight"):
        assert lr[name] == ("Muon", c.muon_lr, c.muon_decay), name
    for name in ("embedding.weight", "proj_in.weight", "proj_out.weight"):
        assert lr[name] == ("AdamW", c.lr, c.weight_decay), name
    for name in ("parts.block0.beta_logit", "parts.block2.b_rec", "parts.block0.norm.weight"):
        assert lr[name] == ("AdamW", 10 * c.lr, 0.0), name


def test_muon_moves_a_synapse_as_it_would_the_transposed_linear():
    settings = ["configs/snn_6m.py", "--n_hidden=8", "--n_embd=8", "--d_ff=32", "--attention=1"]
    moved = []
    for spikes in (True, False):
        c = config.load(TrainConfig, settings + [f"--spikes={spikes}"])
        model = SpikingLM(c)
        _, muon = make_optimizers(c, model, torch.device("cpu"))
        torch.manual_seed(0)
        for w in (model.blocks[0].w_in.weight, model.blocks[0].w_out.weight):
            grad = torch.randn(w.shape if spikes else w.shape[::-1])
            with torch.no_grad():
                w.fill_(1.0)
            w.grad = grad if spikes else grad.t().contiguous()
            muon.step()
            moved.append(w.detach().clone() if spikes else w.detach().t())
            w.grad = None
    for of_synapse, of_linear in zip(moved[:2], moved[2:]):
        assert (of_synapse - 1).abs().max() > 1e-3
        torch.testing.assert_close(of_synapse, of_linear, rtol=0, atol=3e-4)  # Muon is bfloat16


def test_each_process_drops_entries_of_its_own(text, tmp_path):
    # no sample: the one process that prints it would draw more than the other
    short = ("--dropout=0.1", "--max_steps=1", "--sample_tokens=0")
    run(text, tmp_path, STORIES, *short, start=TORCHRUN)
    saved = torch.load(tmp_path / "step_00000001.pt", weights_only=True)["random"]
    assert len(saved) == 2 and not torch.equal(saved[0][0], saved[1][0])


def test_muon_learns_and_is_not_resumed_as_adamw(text, tmp_path):
    log = run(text, tmp_path, STORIES, "--optimizer=muon")
    assert log[-1]["heldout"] < log[0]["heldout"]
    stopped = run(text, tmp_path, STORIES, "--init_from=resume", code=2)
    assert "optimizer='muon'" in stopped


# ---- the picture ---------------------------------------------------------------------------------


def test_picture_of_every_neuron(text, tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    whale = ("--norm=True", "--engram=0", "--hrm=0", "--max_steps=1", "--block=whale")
    run(text, tmp_path, STORIES, *whale, "--beta_low=0.9", "--beta_high=0.9", "--encoder=float")
    drawn, save = [], figure.Figure.savefig
    monkeypatch.setattr(
        figure.Figure, "savefig", lambda f, *a, **k: drawn.append(f) or save(f, *a, **k)
    )
    sample.main([f"--ckpt={tmp_path / 'best.pt'}", f"--picture={tmp_path / 'neurons.png'}"])
    assert (tmp_path / "neurons.png").read_bytes().startswith(b"\x89PNG")
    model = sample.build(sample.load_checkpoint(tmp_path / "best.pt"))
    assert len(drawn[0].axes) == len(model.blocks) == 2
    for axes, block in zip(drawn[0].axes, model.blocks):
        areas = [area for dots in axes.collections for area in dots.get_sizes()]
        assert len(areas) == 32 and min(areas) > 0
        weight = block.w_rec.detach().norm(dim=1)
        ratio = (weight.max() / weight.min()).item() ** 2
        assert max(areas) / min(areas) == pytest.approx(ratio, rel=1e-3)
        program = block.modulation.P.view(32, 3, 6).mean(1).argmax(1)
        counts = [len(dots.get_offsets()) for dots in axes.collections]
        assert counts == program.bincount(minlength=6).tolist()


def test_picture_without_programs_or_matplotlib(one, monkeypatch, capsys):
    for hidden, said in ((None, "no gene programs"), ("matplotlib", "pip install matplotlib")):
        if hidden:
            monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(SystemExit) as stopped:
            sample.main([f"--ckpt={one[0] / 'best.pt'}", "--picture=x.png"])
        assert stopped.value.code == 2 and said in capsys.readouterr().err


# ---- memory that goes on from step to step ----

CARRY = (STORIES, "--memory=8", "--lr=0.02", "--eval_interval=2", "--carry=4")


@pytest.fixture(scope="module")
def carried(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("carried")
    return out, run(text, out, *CARRY)


def test_rows_go_on_where_they_were_cut():
    corpus = SimpleNamespace(train={"stories": np.arange(5000, dtype=np.uint16)})
    c = config.load(TrainConfig, ["--carry=3", "--memory=4", "--tokens_per_step=64", STORIES])
    alone, position, starts = SimpleNamespace(rank=0, world=1), {"phase": 0}, []
    for step in range(6):
        x, y = next_batch(corpus, None, c.curriculum(), position | {"phase_step": step}, c, alone)
        assert x.shape == (4, 16) and torch.equal(y, x + 1)
        if step % 3:
            assert torch.equal(x, before + 16)
        else:
            starts += x[:, 0].tolist()
        before = x
    assert len(set(starts)) == 8  # windows do not overlap


def test_carried_memory_is_that_of_the_whole_text():
    c = config.load(TrainConfig, [*TINY, "--memory=8", "--carry=2", "--block=snn", "--lr=0"])
    torch.manual_seed(0)
    model, alone = SpikingLM(c), Run(c)
    model.parts["memory"].read.weight.data.normal_()  # they start as 0 and say nothing
    x = torch.randint(200, (4, 65))
    optimizers = make_optimizers(c, model, alone.device)

    def step(part, memory, c=c):
        return train_step(model, model, optimizers, part[:, :-1], part[:, 1:], c, alone, memory)

    nats, _, _, memory = step(x[:, :33], None)
    after = step(x[:, 32:], memory)
    state = [None] * 4
    state[list(model.parts).index("memory")] = memory
    logits, whole, _ = model(x[:, 32:-1], state)
    assert after[0] == pytest.approx(
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 33:].flatten()).item()
    )
    assert not memory[0].requires_grad and memory[0].abs().min() > 0
    for z, w in zip(after[3], whole[state.index(memory)]):
        torch.testing.assert_close(z, w)
    pieces = step(x[:, 32:], memory, replace(c, micro_tokens=32))  # a row at a time
    torch.testing.assert_close(pieces[3][0], after[3][0])
    assert pieces[0] == pytest.approx(after[0], abs=1e-6)
    assert abs(after[0] - step(x[:, 32:], None)[0]) > 1e-3


def test_memory_ends_with_its_document():
    memory = torch.ones(3, 5), torch.ones(3, 5)
    y = torch.tensor([[1, 2, 3], [1, 9, 3], [1, 2, 9]])
    for z in forget(memory, y, end=9):
        assert z.sum(1).tolist() == [5, 0, 0]


def test_carry_survives_processes_and_resuming(text, carried, tmp_path):
    assert losses(carried[1]) != losses(run(text, tmp_path / "anew", *CARRY[:-1]))
    two = run(text, tmp_path / "two", *CARRY, start=TORCHRUN)
    for a, b in zip(losses(carried[1]), losses(two)):
        assert all(x == y or x == pytest.approx(y, abs=1e-4) for x, y in zip(a, b))
    copy = shutil.copytree(carried[0], tmp_path / "killed")  # amid rows that go on
    (copy / "step_00000008.pt").unlink()
    (copy / "best.pt").unlink()
    checkpoint = torch.load(copy / "step_00000006.pt", weights_only=True)
    assert [z.shape for z in checkpoint["memory"][0]] == [(16, 8), (16, 8)]
    amnesic = shutil.copytree(copy, tmp_path / "amnesic")
    torch.save(checkpoint | {"memory": [None]}, amnesic / "step_00000006.pt")
    assert losses(run(text, copy, *CARRY, "--init_from=resume")) == losses(carried[1])
    assert losses(run(text, amnesic, *CARRY, "--init_from=resume")) != losses(carried[1])


@pytest.mark.parametrize("more", ["--memory=0", "--memory=8 --dataset=stream:a/b/c", "--carry=0"])
def test_carry_needs_something_to_carry(more, capsys):
    with pytest.raises(SystemExit):
        config.load(TrainConfig, ["--carry=2", *more.split()])
    assert "carry" in capsys.readouterr().err
