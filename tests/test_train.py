"""Training: golden losses, one process = two, resume, Ctrl-C, curriculum, sampling, mistakes.

Runs are calls of train.main in this process, or processes forked from one that has imported torch,
which takes seconds. Only what needs `python train.py` or torchrun itself starts that.
"""

import contextlib
import io
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import config
import data
import optim
import train
from data import IGNORED
from model import SpikingLM
from optim import make_optimizers, schedule
from tokenizer import Bytes
from train import (
    Position,
    Run,
    TrainConfig,
    Training,
    advance,
    converged,
    evaluate,
    fastest_threads,
    show,
    train_step,
)

ROOT = Path(__file__).parent.parent
TINY = (
    "--tokenizer=byte --vocab_size=300 --n_embd=16 --n_hidden=32 --n_layer=2 --n_head=2 --d_ff=32"
    " --tokens_per_step=256 --micro_tokens=256 --max_steps=8 --eval_interval=4 --warmup_steps=2"
    " --sample_tokens=5 --eval_length=32 --threads=1 --device=cpu --seed=1"
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


class Hang(Exception):
    pass


def outcome(main, *argv, seconds=60):
    """(exit code, stdout, stderr) of main(argv) in this process; other errors are raised."""

    def give_up(*_):
        raise Hang(argv)

    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True), io.StringIO()
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(list(argv))
    except SystemExit as stopped:
        code = stopped.code
    finally:
        signal.alarm(0)
        for s, handler in handlers.items():
            signal.signal(s, handler)
        torch.set_num_threads(1)
    return code, out.buffer.getvalue().decode(), err.getvalue()


def mistake(main, *argv):
    """The one line in which main(argv) has to end."""
    code, _, err = outcome(main, *argv)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


def run(text, out, *more, **config):
    """The log of a run, a dictionary per evaluation."""
    code, said, err = outcome(train.main, *settings(text, out, *more, **config))
    assert code == 0, said + err
    return read_log(out)


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train"])


def work(argv, environment):
    os.environ.update(environment)
    sys.stdout = open(os.devnull, "w")
    train.main(argv)


def start(argv, **environment):
    """A process of its own that trains."""
    process = FORKS.Process(target=work, args=(argv, environment), daemon=True)
    process.start()
    return process


def run_two(text, out, *more, environment={}, **config):
    """The log of a run in two processes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    shared |= environment
    argv = settings(text, out, *more, **config)
    two = [start(argv, WORLD_SIZE="2", RANK=r, LOCAL_RANK=r, **shared) for r in "01"]
    for process in two:
        process.join(120)
    assert [process.exitcode for process in two] == [0, 0]
    return read_log(out)


def read_log(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def losses(log):
    return [(x["step"], x["train"], x["valid"], x["heldout"]) for x in log]


def assert_near(one, other, near):
    for a, b in zip(losses(one), losses(other), strict=True):
        assert all(x == y or x == pytest.approx(y, abs=near) for x, y in zip(a, b)), (a, b)


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
    assert [x["heldout"] for x in one[1]] == pytest.approx(GOLDEN, abs=1e-3)


GOLDEN = [5.7039, 5.5265, 5.4425]


def test_two_processes_equal_one(text, one, tmp_path):
    assert_near(one[1], run_two(text, tmp_path, STORIES), 1e-4)
    # the noise of each is its own
    mine, other = torch.load(tmp_path / "step_00000008.pt", weights_only=True)["random"]
    assert not torch.equal(mine[0], other[0])


def test_accumulation_changes_nothing(text, one, tmp_path):
    assert_near(one[1], run(text, tmp_path, STORIES, "--micro_tokens=64"), 1e-4)


def test_resume_draws_the_noise_that_it_would_have_drawn(text, tmp_path):
    noise = (STORIES, "--block=snn", "--encoder=float", "--noise=0.5")
    whole = run(text, tmp_path / "whole", *noise)
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    (tmp_path / "half" / "step_00000008.pt").unlink()
    (tmp_path / "half" / "best.pt").unlink()
    resumed = run(text, tmp_path / "half", *noise, "--init_from=resume")
    assert losses(resumed) == losses(whole)


@pytest.mark.parametrize(
    "more, message",
    [("--n_layer=1", "n_layer=2"), ("--vocab_size=301", "vocab_size=300")]
    + [
        ("--tokenizer=char", "tokenizer='byte'"),
        ("--phases=words:4 stories:16", "phases='stories:16'"),
    ],
)
def test_resume_of_another_run_is_refused(text, one, tmp_path, more, message):
    shutil.copytree(one[0], tmp_path / "copy")
    argv = settings(text, tmp_path / "copy", STORIES, "--init_from=resume", more)
    assert message in mistake(train.main, *argv)


def test_a_finished_run_says_so_and_can_go_on(text, one, tmp_path):
    """It evaluates nothing twice."""
    out = shutil.copytree(one[0], tmp_path / "out")
    code, said, _ = outcome(train.main, *settings(text, out, STORIES, "--init_from=resume"))
    assert code == 0 and "already at 8 of 8 steps" in said and "--chat" in said
    assert losses(read_log(out)) == losses(one[1])
    log = run(text, out, STORIES, "--max_steps=10", "--init_from=resume")
    assert [x["step"] for x in log] == [0, 4, 8, 10]


def test_result_says_where_it_comes_from(text, tmp_path, monkeypatch):
    argv = settings(
        text, tmp_path, STORIES, "--max_steps=2", f"--result={tmp_path / 'result.json'}"
    )
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    assert outcome(train.main, *argv)[0] == 0
    content = (tmp_path / "result.json").read_text()
    result = json.loads(content)
    assert [x["step"] for x in result["log"]] == [0, 2] and result["seed"] == 1
    assert result["data"]["name"] == "text.txt" and len(result["data"]["sha256"]) == 64
    assert str(tmp_path) not in content and str(text) not in content


def test_curriculum_goes_through_its_phases(text, tmp_path):
    log = run(
        text, tmp_path, "--phases=words:4 sentences:8 conversations:16", "--eval_interval=1",
        "--max_steps=20", "--phase_share=0.2", "--rehearse=0.25", "--sample_tokens=0",
    )  # fmt: skip
    phases = [x["phase"] for x in log]
    assert sorted(set(phases), key=phases.index) == ["words", "sentences", "conversations"]
    assert phases.count("words") <= 5 and phases.count("sentences") <= 5
    for phase in set(phases):
        valid = [x["valid"] for x in log if x["phase"] == phase]
        assert valid[-1] < valid[0]
    assert len({x["tokens"] // max(1, x["step"]) for x in log[1:]}) == 1  # constant per step


def test_the_rate_may_begin_anew_with_each_phase():
    c = tiny("--max_steps=100", "--phase_share=0.2", "--lr_restart=True")
    position = Position([("stories", 16), ("conversations", 8), ("conversations", 16)], step=15)
    position.phase_step = 15
    assert position.on_schedule(c) == (15, 20)
    position.phase, position.phase_step, position.step = 2, 4, 30
    assert position.on_schedule(c) == (4, 74)
    assert position.on_schedule(replace(c, lr_restart=False)) == (30, 100)


def test_phases_may_repeat_and_blend(text, tmp_path):
    shutil.copytree(text, tmp_path / "in")
    talks = [{"prompt": f"Say {i}!", "response": "the cat sat on a red mat"} for i in range(400)]
    (tmp_path / "in/talks.jsonl").write_text("\n".join(map(json.dumps, talks)))
    phases = "--phases=conversations:8 conversations:16 blended:16"
    more = phases, "--lr_restart=True", "--eval_interval=1", "--phase_share=0.25"
    log = run(tmp_path / "in", tmp_path, *more)
    assert list(dict.fromkeys(x["phase"] for x in log)) == ["conversations", "blended"]
    (tmp_path / "step_00000008.pt").unlink()
    (tmp_path / "best.pt").unlink()
    assert losses(run(tmp_path / "in", tmp_path, *more, "--init_from=resume")) == losses(log)


def test_converged_phase_ends_early(text, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "PHASE_GAIN", 10.0)
    log = run(
        text, tmp_path, "--phases=words:4 stories:16", "--eval_interval=1", "--phase_share=0.9",
        "--max_steps=4",
    )  # fmt: skip
    assert [x["phase"] for x in log].count("words") == 3  # every gain is too small: two in a row


def test_text_that_lost_a_phase_is_one_line(text, tmp_path):
    more = ["--phases=stories:16 conversations:16", "--max_steps=1", "--eval_interval=1"]
    run(text, tmp_path / "out", *more)
    (tmp_path / "other.txt").write_text("A cat sat on a mat. " * 400)
    more += [f"--dataset={tmp_path / 'other.txt'}", "--init_from=resume", "--max_steps=2"]
    said = mistake(train.main, *settings(text, tmp_path / "out", *more))
    assert "no text for the checkpoint's phase conversations" in said


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    rng = random.Random(1)
    path.write_text("".join(
        json.dumps({"instruction": f"Say {a} {b}!", "output": f"{a} {b}\n{b} {a}"}) + "\n"
        for a, b in (rng.choices("red blue big old new".split(), k=2) for _ in range(400))
    ))  # fmt: skip
    return path


def test_fine_tuning(text, one, tmp_path, chats):
    """Weights, tokenizer and model settings come from the file, everything else from the user."""
    base = torch.load(one[0] / "best.pt", weights_only=True)
    asked = [
        f"--init_from={one[0] / 'best.pt'}", "--answers_only=True", f"--dataset={chats}",
        f"--data_dir={tmp_path / 'cache'}", f"--out_dir={tmp_path / 'chat'}", "--threads=1",
        "--seed=2", "--tokens_per_step=256", "--phases=words:8 conversations:16", "--lr=0.01",
        "--eval_interval=20", "--sample_tokens=0", "--device=cpu",
        "--dtype=float32",
    ]  # fmt: skip

    def tuned(*more):
        code, said, err = outcome(train.main, *asked, *more)
        assert code == 0, said + err
        return torch.load(tmp_path / "chat" / "best.pt", weights_only=True)

    for name in ("theta", "beta_high"):  # the file's, whatever is asked for
        assert f"{name} only says how weights begin" in mistake(train.main, *asked, f"--{name}=0.7")
    start = tuned("--max_steps=0")
    assert all(torch.equal(w, base["model"][name]) for name, w in start["model"].items())
    assert start["tokenizer"] == base["tokenizer"] and start["config"]["n_hidden"] == 32
    assert start["config"]["seed"] == 2
    assert start["position"]["curriculum"] == [("conversations", 16)]
    tuned("--max_steps=40")
    first, _, last = read_log(tmp_path / "chat")
    assert last["valid"] < 0.8 * first["valid"]
    tuned("--max_steps=41", "--init_from=resume", *TINY[1:7])
    assert (tmp_path / "chat" / "step_00000041.pt").exists()


def test_resume_knows_its_dataset_and_tokenizer(text, tmp_path):
    """Also when the text has grown, and when `auto` would mean another corpus by now."""
    mine = shutil.copytree(text, tmp_path / "text", ignore=shutil.ignore_patterns("cache"))
    bpe = (STORIES, "--tokenizer=bpe", "--vocab_size=280", f"--data_dir={tmp_path / 'cache'}")
    run(mine, tmp_path / "out", *bpe)
    path = tmp_path / "out" / "step_00000008.pt"
    before = torch.load(path, weights_only=True)
    assert before["dataset"] == str((mine / "text.txt").resolve())
    with open(mine / "text.txt", "a") as file:
        file.write(f"\n{data.END_TEXT}\n".join(["", *["Zebras zigzag over zany zoos."] * 99]))
    run(mine, tmp_path / "out", *bpe, "--max_steps=12", "--init_from=resume", "--dataset=auto")
    after = torch.load(tmp_path / "out" / "step_00000012.pt", weights_only=True)
    for key in ("tokenizer", "dataset"):
        assert after[key] == before[key]
    assert after["data"] != before["data"]


def test_a_model_that_explodes_stops(text, tmp_path):
    said = mistake(train.main, *settings(text, tmp_path, STORIES, "--lr=1e30"))
    assert "the loss became" in said and "--lr" in said


@pytest.mark.parametrize(
    "more, message",
    [
        (["--dataset=nowhere.txt"], "nowhere.txt"),
        (["--init_from=resume"], "no checkpoint"),
        (["--init_from=nowhere.pt"], "no checkpoint nowhere.pt"),
        (["--vocab_size=100"], "--vocab_size=257"),
        (["--device=cuda"], "no device 'cuda'"),
        (["--steps=3"], "unknown setting 'steps'"),
        (["--phases=stories:100000"], "tokens_per_step"),
        (["--phases=stories:90000", "--tokens_per_step=90000"], "too little text"),
        (["--out_dir=README.md"], "README.md"),
        (["--dataset=stream:a/b/c@1", "--answers_only=True"], "and no stream"),
    ],
)
def test_mistakes_are_one_line(text, tmp_path, more, message):
    if "cuda" in message and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert message in mistake(train.main, *settings(text, tmp_path, *more))


# ---- scale: the 1B config, shrunk ----------------------------------------------------------------

BIG = (
    "--n_embd=32 --n_layer=2 --n_head=2 --keys=16 --d_ff=64"
    " --phases=stories:16 --dtype=float32 --tokenizer=byte"
)
SNN_1B = "configs/snn_1b.py"


def test_checkpointing_does_not_change_the_losses(text, tmp_path):
    logs = [
        run(text, tmp_path / again, *BIG.split(), f"--checkpointing={again}", config=SNN_1B)
        for again in ("False", "True")
    ]
    assert_near(*logs, 1e-5)


def test_neither_processes_nor_sharding_change_the_losses(text, tmp_path):
    # sums over two processes round otherwise, and a spike may flip: the twin has none
    more = [*BIG.split(), "--spikes=False", "--traits=memory:8 moe:4,8", "--rate_floor=0.01"]
    two = tmp_path / "two"
    sharded = run_two(text, two, *more, "--shard=True", config=SNN_1B)
    assert_near(run(text, tmp_path / "one", *more, config=SNN_1B), sharded, 1e-4)
    (two / "step_00000008.pt").unlink()  # as if killed before the last save
    (two / "best.pt").unlink()
    resumed = run_two(text, two, *more, "--shard=True", "--init_from=resume", config=SNN_1B)
    assert losses(resumed) == losses(sharded)


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


def test_of_neuronspark_the_neurons_alone_learn_faster():
    c = config.load(TrainConfig, ["configs/neuronspark_6m.py", "--traits=engram:11"])
    with torch.device("meta"):
        model = SpikingLM(c)
    (adamw,) = make_optimizers(c, model, torch.device("cpu"))
    names = {id(p): name for name, p in model.named_parameters()}
    lr = {names[id(p)]: g["peak"] / c.lr for g in adamw.param_groups for p in g["params"]}
    fast = {re.sub(r".*\.(\w+\.\w+)$", r"\1", name) for name in lr if lr[name] == c.neuron_lr}
    biases = {f"w_{x}.bias" for x in ("beta", "alpha", "theta")}
    assert fast == {"neurons.w", "neurons.theta"} | biases and len(lr) == len(names)
    assert {x for name, x in lr.items() if "halt" in name or "norm" in name} == {1}
    assert lr["parts.closing.w.bias"] == lr["parts.closing.inhibit.weight"] == 1
    plain = [g for g in adamw.param_groups if any(p.dim() < 2 for p in g["params"])]
    assert all(g["weight_decay"] == 0 for g in plain)


def test_muon_moves_a_synapse_as_it_would_the_transposed_linear():
    settings = "configs/snn_6m.py --n_hidden=8 --n_embd=8 --d_ff=32 --keys=4 --n_head=2".split()
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
        torch.testing.assert_close(of_synapse, of_linear, rtol=0, atol=3e-4)  # or bfloat16


@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
def test_muon_is_that_of_torch(shape, monkeypatch):
    monkeypatch.setattr(optim, "has_bfloat16", lambda device: True)
    ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    steps = optim.Muon([ours], 0.1, 0.5), torch.optim.Muon([theirs], 0.1, 0.5)
    for _ in range(4):
        ours.grad = theirs.grad = torch.randn(shape)
        for optimizer in steps:
            optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    # without bfloat16 the same singular values, to its rounding
    monkeypatch.setattr(optim, "has_bfloat16", lambda device: False)
    exact = torch.linalg.svdvals(steps[0].orthogonal(ours.grad))
    assert exact.min() > 0.5 and exact.max() < 1.3


def test_muon_learns_and_is_not_resumed_as_adamw(text, tmp_path):
    log = run(text, tmp_path, STORIES, "--optimizer=muon")
    assert log[-1]["heldout"] < log[0]["heldout"]
    argv = settings(text, tmp_path, STORIES, "--init_from=resume")
    assert "optimizer='muon'" in mistake(train.main, *argv)


def test_a_new_optimiser_needs_an_entry_and_nothing_else(text, tmp_path, monkeypatch):
    new = optim.Optimizer(torch.optim.Adagrad, "lr", "muon_decay", ("step", "sum"))
    monkeypatch.setitem(optim.OPTIMIZERS, "new", new)
    more = (STORIES, "--optimizer=new", "--eval_interval=1")
    log = run(text, tmp_path, *more)
    assert log[-1]["heldout"] < log[0]["heldout"]
    (tmp_path / "step_00000008.pt").unlink()
    (tmp_path / "best.pt").unlink()
    assert losses(run(text, tmp_path, *more, "--init_from=resume")) == losses(log)


# ---- the parts of a step, by hand ----------------------------------------------------------------


def tiny(*more, config_file="configs/sam_6m.py"):
    return config.load(TrainConfig, [config_file, *TINY, *more])


def test_schedule_by_hand():
    c = tiny("--warmup_steps=4", "--max_steps=24", "--min_lr=0.1")
    assert [schedule(c, step, 24) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    cosine = {4: 1.0, 9: 0.1 + 0.45 * (1 + math.sqrt(0.5)), 14: 0.55, 24: 0.1, 30: 0.1}
    for step, share in cosine.items():
        assert schedule(c, step, 24) == pytest.approx(share), step


def test_optimiser_groups():
    c = tiny("--traits=engram:11", "--neuron_lr=3", "--weight_decay=0.2", "--beta2=0.8")
    (adamw,) = make_optimizers(c, SpikingLM(c), torch.device("cpu"))
    assert adamw.defaults["betas"] == (0.9, 0.8)
    end, table, vector, matrix = adamw.param_groups
    assert [g["peak"] / c.lr for g in adamw.param_groups] == pytest.approx([1, 1, 3, 1])
    assert [g["weight_decay"] for g in adamw.param_groups] == [0.2, 0, 0, 0.2]
    assert len(table["params"]) == 1 and all(p.dim() == 1 for p in vector["params"])


class Watch:
    """An optimiser that only looks at the gradients."""

    def __init__(self, model):
        self.model = model

    def step(self):
        self.grads = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]

    def zero_grad(self, set_to_none):
        self.model.zero_grad(set_to_none)


def gradients(model, x, y, c):
    watch = Watch(model)
    nats, norm, _ = train_step(model, [watch], x, y, c, Run(c))
    return nats, norm, torch.cat([grad.flatten() for grad in watch.grads])


def test_gradients_are_clipped(monkeypatch):
    c = tiny("--rate_weight=0")
    torch.manual_seed(0)
    model, (x, y) = SpikingLM(c), torch.randint(256, (2, 8, 16))
    _, _, whole = gradients(model, x, y, c)  # its norm is below 1
    monkeypatch.setattr(train, "CLIP", 0.01)
    _, norm, clipped = gradients(model, x, y, c)
    assert norm == pytest.approx(whole.norm().item(), rel=1e-4) and norm > 0.1
    assert clipped.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_ignored_targets_have_no_weight():
    """The loss is a mean over the targets that count, however they lie in the micro-batches."""
    c = tiny("--rate_weight=0", "--stress_gain=0")
    torch.manual_seed(0)
    model, (x, y) = SpikingLM(c), torch.randint(256, (2, 8, 16))
    y[:4] = IGNORED  # the first two micro-batches have nothing to learn
    y[4, 3:] = IGNORED
    nats, _, grad = gradients(model, x, y, replace(c, micro_tokens=32))
    alone, _, same = gradients(model, x[4:], y[4:], c)
    assert nats == pytest.approx(alone) and torch.allclose(grad, same, atol=1e-6)
    assert gradients(model, x, torch.full_like(y, IGNORED), c)[0] == 0


def test_targets_count_alike_in_all_processes(monkeypatch):
    """Also if one process has more of them than the other: what two average is the whole."""
    c = tiny("--rate_weight=0", "--stress_gain=0")
    torch.manual_seed(0)
    model, (x, y) = SpikingLM(c), torch.randint(256, (2, 8, 16))
    y[:4, 2:] = IGNORED
    nats, _, whole = gradients(model, x, y, c)
    mean = sum(gradients(model, *both, c)[2] for both in zip(x.split(4), y.split(4))) / 2
    assert not torch.allclose(mean, whole, atol=1e-4)
    count = (y != IGNORED).sum().float()
    monkeypatch.setattr(Run, "mean", lambda run, x: x if x.dim() or x % 1 else count / 2)
    halves = [gradients(model, *both, c) for both in zip(x.split(4), y.split(4))]
    assert sum(half[0] for half in halves) / 2 == pytest.approx(nats)
    assert torch.allclose(sum(half[2] for half in halves) / 2, whole, atol=1e-6)


def test_a_phase_has_converged_when_several_gains_in_a_row_are_small():
    assert not converged([5.0, 4.0, 3.99])  # only the last gain is small
    assert not converged([4.0, 3.99])
    assert converged([5.0, 4.0, 3.99, 3.98]) and converged([4.0, 4.1, 4.2])


def test_a_phase_ends_when_it_had_its_share():
    position = Position([("words", 8), ("stories", 16)], phase_step=9, best=1.0)
    t = training(tiny("--phase_share=0.25", "--max_steps=40"), position=position)
    advance(t, 3.0)
    assert (position.phase, position.best, position.history) == (0, 1.0, [3.0])
    position.phase_step = 10
    advance(t, 2.0)
    assert (position.phase, position.phase_step, position.history) == (1, 0, [])
    assert position.best == math.inf  # best.pt is the best of the running phase
    position.phase_step = 40
    advance(t, 1.0)
    assert position.phase == 1  # the last one stays


def training(c, corpus=None, model=None, position=None):
    return Training(c, Run(c), Path("nowhere"), corpus, model, [], position)


def test_evaluation_is_exact(monkeypatch):
    """Without noise, of EVAL_TOKENS tokens alone, in bits per byte of just their text."""
    monkeypatch.setattr(train, "EVAL_TOKENS", 40)
    c = tiny("--block=snn", "--noise=0.5", "--eval_length=8")
    torch.manual_seed(0)
    raw, tokens = SpikingLM(c), np.array([256, *b"The cat sat on the mat, it is said. " * 3, 256])
    corpus = SimpleNamespace(
        valid={"stories": tokens}, heldout=tokens, tokenizer=Bytes(), entropy_bits=None
    )
    t = training(c, corpus, raw, Position([("stories", 8)]))
    lines = [evaluate(t) for _ in range(2)]
    assert lines[0] == lines[1] and raw.training
    assert lines[0]["bpb"] == pytest.approx(lines[0]["heldout"] / math.log(2))  # 40 bytes
    assert lines[0]["valid_bpb"] == pytest.approx(lines[0]["valid"] / math.log(2))
    random = torch.get_rng_state()
    assert train.sample(t) == train.sample(t) and raw.training  # noise is for training alone
    assert torch.equal(random, torch.get_rng_state())
    t.position.step = c.max_steps
    last = evaluate(t)  # all 108 bytes and END
    assert last["bpb"] == pytest.approx(last["heldout"] * 109 / 108 / math.log(2))
    answers = np.zeros(len(tokens), np.uint8)
    answers[5:9] = 1
    corpus.answers = {"valid": answers}
    t.c, t.position.step = replace(c, answers_only=True), 0
    some = evaluate(t)
    assert some["valid_bpb"] == pytest.approx(some["valid"] / math.log(2))
    assert some["valid"] != lines[0]["valid"] and some["bpb"] == lines[0]["bpb"]


def test_what_the_model_writes_is_in_the_log(one):
    samples = [line["samples"] for line in one[1]]
    assert any(samples) and all(type(text) is str for texts in samples for text in texts)


def test_the_training_loss_is_that_since_the_last_evaluation(text, one, tmp_path):
    each = [x["train"] for x in run(text, tmp_path, STORIES, "--eval_interval=1")][1:]
    for line, steps in zip(one[1][1:], (each[:4], each[4:])):
        assert line["train"] == pytest.approx(sum(steps) / 4, abs=1e-6)


# ---- what a run prints ---------------------------------------------------------------------------


@pytest.mark.parametrize("block", ["sam", "snn", "spark", "gpt"])
def test_the_table_fits_and_explains_itself(block, capsys, monkeypatch):
    log = {"E[K] 0": 3.5} if block == "spark" else {}
    line = {"step": 123456, "phase": "conversations", "train": 11.123, "valid": 11.123}
    line |= {"valid_bpb": 12.345, "bpb": 11.234, "rate": [0.25, 0.35], "synops": 20.0, "log": log}
    line |= {"synapses": 100, "tokens_per_s": 123456.7, "minutes": 10.0}
    line |= {"rate": [], "synapses": 0} if block == "gpt" else {}
    t = training(tiny("--max_steps=200000"))
    documents = iter([["One.", "Two words\nand a line " * 9], []])
    monkeypatch.setattr(train, "sample", lambda _: next(documents))
    show(t, line)
    show(t, line | {"train": None})
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    header, first, *texts, second = printed.strip("\n").split("step  phase")[1].splitlines()
    assert printed.count("step  phase") == 1
    for name, value in {"train": "11.123", "valid b/B": "12.345", "text b/B": "11.234"}.items():
        assert first.index(value) + len(value) == 13 + header.index(name) + len(name) - 0, name
    assert ("30.0%" in first) == (block != "gpt") and ("3.5" in first) == (block == "spark")
    assert '"One."' in texts[0] and " - " in second


def test_fastest_threads(monkeypatch):
    """Two threads that hinder each other are noticed, whatever the first turn says."""
    now, used, turns = [0.0], [2], []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: used.append(n))
    monkeypatch.setattr("machine.time.perf_counter", lambda: now[0])

    def step():
        turns.append(used[-1])
        now[0] += {4: 0.5, 2: 0.1, 1: 0.2}[used[-1]] if len(turns) > 3 else 5 - used[-1]

    assert fastest_threads(step) == 2 and turns[:3] == [4, 2, 1]
