"""Nothing is lost: kills, faults of the machine, hostile files. Every mistake is one clear line.

FUZZ=3000 python -m pytest tests/test_faults.py -k fuzz      more than the usual few hundred
"""

import contextlib
import copy
import gzip
import json
import math
import os
import pickle
import random
import shutil
import signal
import string
import subprocess
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_train import FORKS, ROOT, STORIES, losses, mistake, outcome, read_log, run_two
from test_train import settings as arguments
from test_train import text  # noqa: F401, a fixture

import config
import data
import model
import sample
import train
from cell_bridge import PROGRAMS
from checkpoint import load_cell, load_checkpoint, locked
from config import whole_file
from sample import SampleConfig
from tokenizer import Chars
from train import TrainConfig


def success_or_one_line(main, *argv):
    code, _, err = outcome(main, *argv)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, len(lines)) in ((0, 0), (2, 1)), (code, err)
    assert "Traceback" not in err
    return code


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):  # noqa: F811
    """(settings without out_dir, the folder of a finished run of 8 steps, a save at each)."""
    os.chdir(ROOT)
    out = tmp_path_factory.mktemp("run") / "out"
    argv = [a for a in arguments(text, out, STORIES, "--eval_interval=1") if "--out_dir" not in a]
    out.mkdir()
    (out / "step_notes.txt").write_text("mine")
    assert outcome(train.main, *argv, f"--out_dir={out}")[0] == 0
    assert (out / "step_notes.txt").read_text() == "mine"  # what is not the run's stays
    (out / "step_notes.txt").unlink()
    return argv, out


@pytest.fixture
def again(run, tmp_path):
    """A copy of that run which can be spoilt: (settings with its out_dir, the folder)."""
    argv, out = run
    shutil.copytree(out, tmp_path / "out")
    return [*argv, f"--out_dir={tmp_path / 'out'}"], tmp_path / "out"


# ---- checkpoints -------------------------------------------------------------------------------


def flip(path, at=0.5):
    raw = bytearray(path.read_bytes())
    raw[int(len(raw) * at)] ^= 1
    path.write_bytes(raw)


def test_the_last_two_and_the_best_are_kept(run):
    _, out = run
    steps = {"step_00000007.pt", "step_00000008.pt"}
    assert {path.name for path in out.iterdir()} == steps | {"best.pt", "log.jsonl"}
    best = min(read_log(out), key=lambda line: line["valid"])
    assert load_checkpoint(out / "best.pt")["position"]["step"] == best["step"]
    checkpoint = load_checkpoint(out / "step_00000008.pt")
    assert set(checkpoint) == {
        "version", "model", "optimizers", "random", "config", "tokenizer", "dataset", "data",
        "position", "environment",
    }  # fmt: skip
    assert checkpoint["environment"]["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("how", ["a bit", "half", "empty"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(run, again, how):
    argv, out = again
    last = out / "step_00000008.pt"
    if how == "a bit":
        flip(last)  # in the middle of weights: torch.load itself would not notice
    else:
        last.write_bytes(last.read_bytes()[: len(last.read_bytes()) // 2 if how == "half" else 0])
    code, said, _ = outcome(train.main, *argv, "--init_from=resume")
    assert code == 0 and "step_00000008.pt: " in said and "the one before" in said
    assert losses(read_log(out)) == losses(read_log(run[1]))
    new, old = (load_checkpoint(o / "step_00000008.pt")["model"] for o in (out, run[1]))
    assert all(torch.equal(new[name], old[name]) for name in old)


def test_the_best_is_the_last_resort(again):
    argv, out = again
    for path in out.glob("step_*.pt"):
        path.write_bytes(b"x")
    shutil.copytree(out, out.with_name("all"))
    assert outcome(train.main, *argv, "--init_from=resume")[0] == 0
    (out.with_name("all") / "best.pt").write_bytes(b"x")
    argv = [*argv, f"--out_dir={out.with_name('all')}", "--init_from=resume"]
    assert "no checkpoint to resume" in mistake(train.main, *argv)


def test_new_runs_set_older_ones_aside(run, again):
    argv, out = again
    for n in (1, 2):
        code, said, _ = outcome(train.main, *argv, f"--max_steps={n}")
        assert code == 0 and f"kept in {out / str(n)}" in said
    assert [line["step"] for line in read_log(out)] == [0, 1, 2]
    assert [line["step"] for line in read_log(out / "2")] == [0, 1]
    names = {path.name for path in run[1].iterdir()}
    assert {path.name for path in (out / "1").iterdir()} == names  # nothing is lost
    assert {path.name for path in out.iterdir()} == {
        "1", "2", "best.pt", "log.jsonl", "step_00000001.pt", "step_00000002.pt"
    }  # fmt: skip


def hold(out, is_held):
    with locked(out):
        is_held.set()
        time.sleep(60)


def test_one_process_at_a_time(run, again):
    argv, out = again
    is_held = FORKS.Event()
    other = FORKS.Process(target=hold, args=(out, is_held), daemon=True)
    other.start()
    assert is_held.wait(60)
    assert "another process is training in" in mistake(train.main, *argv)
    other.kill()  # and what it held is free
    other.join()
    assert losses(read_log(out)) == losses(read_log(run[1]))  # nothing was touched
    assert outcome(train.main, *argv, "--init_from=resume")[0] == 0


def test_a_log_that_ran_ahead_is_cut(again):
    argv, out = again
    (out / "step_00000008.pt").unlink()
    log = (out / "log.jsonl").read_text()
    (out / "log.jsonl").write_text(log + '{"step": 9, "tr')
    assert outcome(train.main, *argv, "--init_from=resume")[0] == 0
    assert [line["step"] for line in read_log(out)] == list(range(9))


def test_a_log_that_was_removed_is_one_line(again):
    argv, out = again
    (out / "log.jsonl").unlink()
    code, said, _ = outcome(train.main, *argv, "--init_from=resume")
    assert code == 0 and "log.jsonl was removed" in said


class Killed(BaseException):
    pass


def test_killed_before_any_write_of_a_save(run, again, monkeypatch):
    """Stopped before each flush, rename and removal in turn, it always ends as if in peace."""
    argv, out = again
    (out / "step_00000008.pt").unlink()
    shutil.copy(out / "step_00000007.pt", out / "best.pt")
    before = out.rename(out.with_name("before"))

    def die_at(n):
        left = iter(range(n))

        def counting(real):
            def call(*args, **kwargs):
                if next(left, None) is None:
                    raise Killed
                return real(*args, **kwargs)

            return call

        monkeypatch.setattr(os, "fsync", counting(os.fsync))
        monkeypatch.setattr(os, "replace", counting(os.replace))
        monkeypatch.setattr(Path, "unlink", counting(Path.unlink))

    for n in range(100):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(before, out)
        die_at(n)
        with contextlib.suppress(Killed):
            outcome(train.main, *argv, "--init_from=resume")
            break  # that many writes there are not
        monkeypatch.undo()
        assert outcome(train.main, *argv, "--init_from=resume")[0] == 0
        assert losses(read_log(out)) == losses(read_log(run[1]))
        assert {path.name for path in out.iterdir()} == {path.name for path in run[1].iterdir()}
        assert load_checkpoint(out / "best.pt")["position"]["step"] == 8
    assert 8 <= n < 20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_between_evaluations(run, tmp_path, monkeypatch, number):
    """Stopped in the middle of an interval: the losses so far still count in the next line."""
    argv, _ = run
    real, calls = train.train_step, iter(range(100))

    def step(*args):
        if next(calls) == 5:
            os.kill(os.getpid(), number)
        return real(*args)

    argv = [*argv, "--eval_interval=4"]
    assert outcome(train.main, *argv, f"--out_dir={tmp_path / 'peace'}")[0] == 0
    monkeypatch.setattr(train, "train_step", step)
    argv = [*argv, f"--out_dir={tmp_path / 'hit'}"]
    assert outcome(train.main, *argv)[0] == 130
    assert max((tmp_path / "hit").glob("step_*.pt")).name == "step_00000006.pt"
    assert outcome(train.main, *argv, "--init_from=resume")[0] == 0
    peace, hit = (losses(read_log(tmp_path / name)) for name in ("peace", "hit"))
    assert len(peace) == 3 and hit == peace


class Evil:
    """Unpickled, it makes the file that it names."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("kind", ["torch", "legacy", "plain", "config"])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(again, kind, tmp_path):
    argv, out = again
    evil, path = Evil(tmp_path / "ran"), out / "step_00000009.pt"
    if kind == "plain":
        path.write_bytes(pickle.dumps({"model": evil}))
    elif kind == "config":  # deep inside a whole checkpoint
        checkpoint = torch.load(out / "best.pt", weights_only=True)
        checkpoint["config"]["n_layer"] = evil
        torch.save(checkpoint, path)
    else:
        torch.save({"model": evil}, path, _use_new_zipfile_serialization=kind == "torch")
    assert str(path) in mistake(sample.main, f"--ckpt={path}")
    code, said, _ = outcome(train.main, *argv, "--init_from=resume")
    assert code == 0 and str(path) in said
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(evil))  # the trap works
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "there is no cell"),
        (b"no cell", "cannot read the cell"),
        ({"model": {}}, "is no cell of"),
        ([1], "is no cell of"),
        ({"programs": list(PROGRAMS)[::-1]}, "is no cell of"),
        ({"programs": list(PROGRAMS), "scores": Evil("ran")}, "cannot read the cell"),
    ],
)
def test_what_is_no_cell_is_refused(content, says, tmp_path, monkeypatch):
    path = tmp_path / "cell.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=says) as refused:
        load_cell(path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)
    assert not Path("ran").exists()


def test_another_version_is_refused(again):
    _, out = again
    checkpoint = torch.load(out / "best.pt", weights_only=True)
    torch.save(checkpoint | {"version": 0}, out / "best.pt")
    assert "version 0" in mistake(sample.main, f"--ckpt={out / 'best.pt'}")


# ---- killed ------------------------------------------------------------------------------------


def test_torchrun_recovers_from_a_killed_worker(run, text, tmp_path):  # noqa: F811
    """The same command, nothing added: torchrun starts its workers again, and they resume."""
    more = [STORIES, "--eval_interval=1", "--max_steps=20", "--sample_tokens=50"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command += ["--max-restarts=3", "train.py", *arguments(text, tmp_path / "hit", *more)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    hit = subprocess.Popen(command, cwd=ROOT, **quiet)
    while not (tmp_path / "hit" / "step_00000003.pt").exists():
        assert hit.poll() is None
        time.sleep(0.01)
    workers = subprocess.run(["pgrep", "-P", str(hit.pid)], capture_output=True, text=True)
    os.kill(int(workers.stdout.split()[-1]), signal.SIGKILL)
    errors = hit.communicate(timeout=300)[1]
    assert hit.returncode == 0, errors
    calm, hit = run_two(text, tmp_path / "calm", *more), read_log(tmp_path / "hit")
    assert [x["step"] for x in hit] == list(range(21)) and losses(hit) == losses(calm)


def test_a_restart_before_the_first_checkpoint_takes_no_older_run(again, text):  # noqa: F811
    _, out = again
    old = read_log(out)
    environment = {"TORCHELASTIC_RESTART_COUNT": "1"}
    new = run_two(text, out, STORIES, "--lr=0.01", "--max_steps=2", environment=environment)
    assert losses(read_log(out / "1")) == losses(old) and [x["step"] for x in new] == [0, 2]


# ---- the machine -------------------------------------------------------------------------------


def test_a_full_disk_is_one_line_and_loses_nothing(run, again, monkeypatch):
    argv, out = again
    real = whole_file

    @contextlib.contextmanager
    def full(path):
        with real(path) as file:
            if Path(path).name == "step_00000010.pt":
                with open("/dev/full", "wb", buffering=0) as disk:
                    os.dup2(disk.fileno(), file.fileno())
            yield file

    monkeypatch.setattr("checkpoint.whole_file", full)
    assert "No space left" in mistake(train.main, *argv, "--max_steps=12", "--init_from=resume")
    monkeypatch.undo()
    assert {p.name for p in out.glob("step_*")} == {"step_00000008.pt", "step_00000009.pt"}
    assert not list(out.glob("*.tmp"))
    assert outcome(train.main, *argv, "--max_steps=12", "--init_from=resume")[0] == 0
    assert [line["step"] for line in read_log(out)] == list(range(13))


def test_what_the_disk_said_is_not_hidden(tmp_path):
    """torch.save raises an error of its own on top of the disk's."""
    with pytest.raises(OSError, match="quota"), whole_file(tmp_path / "x"):
        try:
            raise OSError("quota")
        except OSError:
            raise RuntimeError("unexpected pos")  # noqa: B904
    assert not list(tmp_path.iterdir())


def test_a_folder_that_takes_no_files_is_one_line(run):
    argv, _ = run
    assert "/proc/nothing" in mistake(train.main, *argv, "--out_dir=/proc/nothing")
    assert "/proc/nothing" in mistake(train.main, *argv, "--data_dir=/proc/nothing")


@pytest.mark.parametrize("more", ["--n_hidden=4000000", "--vocab_size=9000000000000000000"])
def test_out_of_memory_is_one_line(run, tmp_path, more):
    argv, _ = run
    argv = [*argv, f"--out_dir={tmp_path / 'out'}", "--rec_heads=1"]
    assert "out of memory" in mistake(train.main, *argv, more)


def test_no_compiler_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended, config.one_line():
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found in (None, 'g++')")
    assert ended.value.code == 2 and "install g++" in capsys.readouterr().err


def test_no_half_precision_and_no_gpu(monkeypatch):
    cuda = {"is_available": True, "device_count": 1, "is_bf16_supported": False}
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    monkeypatch.setattr(torch.cuda, "set_device", lambda *_: None)
    with pytest.raises(ValueError, match="no bfloat16: set --dtype=float32"):
        train.Run(TrainConfig(device="cuda", dtype="bfloat16"))
    assert isinstance(train.Run(TrainConfig(device="cuda")).autocast, contextlib.nullcontext)
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="no GPU for process 1"):
        train.Run(TrainConfig(device="cuda"))


@pytest.mark.parametrize(
    "can, half",
    [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx2": True}, False)],
)
def test_auto_takes_half_precision_where_the_cpu_has_it(can, half, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can, raising=False)
    with train.Run(TrainConfig(device="cpu")).autocast:
        assert torch.is_autocast_enabled("cpu") == half
    with train.Run(TrainConfig(device="cpu", dtype="float32")).autocast:
        assert not torch.is_autocast_enabled("cpu")
    with train.Run(TrainConfig(device="cpu", dtype="bfloat16")).autocast:
        assert torch.is_autocast_enabled("cpu")  # who asks for it gets it, slow or not


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_number_that_is_none_stops_and_says_where(again, what, monkeypatch):
    argv, out = again
    real, before = train.train_step, (out / "step_00000008.pt").read_bytes()

    def spoilt(*args):
        nats, norm, *rest = real(*args)
        return (math.nan, norm, *rest) if what == "loss" else (nats, math.inf, *rest)

    monkeypatch.setattr(train, "train_step", spoilt)
    said = mistake(train.main, *argv, "--max_steps=12", "--init_from=resume")
    assert f"the {what} became {'nan' if what == 'loss' else 'inf'} at step 8" in said
    assert "batch 8 of the stories of text.txt" in said and "step_00000008.pt" in said
    assert (out / "step_00000008.pt").read_bytes() == before


def test_gradients_are_watched_too(run, tmp_path, monkeypatch):
    argv, _ = run
    real = torch.Tensor.backward

    def backward(loss):
        real(loss)
        backward.parameter.grad[0] = math.inf

    def build(c, make=model.SpikingLM):
        made = make(c)
        backward.parameter = made.embedding.weight
        return made

    monkeypatch.setattr(train, "SpikingLM", build)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    said = mistake(train.main, *argv, f"--out_dir={tmp_path}")
    assert "the gradient became inf at step 0" in said and "step_00000000.pt" in said


def test_layers_that_cannot_learn_are_warned_about(run, tmp_path):
    argv, _ = run
    argv = [*argv, "--max_steps=1", f"--out_dir={tmp_path}"]
    said = outcome(train.main, *argv, "--theta=40.0")[1]
    assert "layer 1 is dead" in said and "lower --theta" in said and "--rate_weight" in said
    assert "--theta" not in outcome(train.main, *argv)[1]  # no warning at the usual threshold
    (line,) = train.ill_layers([0.1, 0.95, 0.8])
    assert "layer 1 is saturated" in line and "raise --theta" in line


# ---- data --------------------------------------------------------------------------------------


STORY = "The cat sat on the mat number {}. It was big, and red.\n"
GOOD = data.END_TEXT.join(STORY.format(i) for i in range(60))


def prepare(path, folder, tokenizer="byte", log=print):
    return data.prepare(path, tokenizer, 300, folder, log=log)


@pytest.mark.parametrize("blanks", [True, False])
def test_an_endless_line(blanks, tmp_path):
    """200 MB took 94 s and 1.4 GB; here a share of it: time must grow with the size, not faster."""
    rng, seconds = random.Random(0), []
    letters = string.ascii_lowercase + " " * 5 * blanks
    line = "".join(rng.choices(letters, k=400_000))
    for size in (100_000, 400_000):
        (tmp_path / f"{size}.txt").write_text(line[:size])
        start = time.process_time()
        prepare(tmp_path / f"{size}.txt", tmp_path / "cache", tokenizer="bpe")
        seconds.append(time.process_time() - start)
    assert seconds[1] < 12 * seconds[0] + 1 and seconds[1] < 30


def cache_of(tmp_path, tokenizer="byte"):
    path = tmp_path / "a.txt"
    path.write_text(GOOD)
    made = prepare(path, tmp_path / "cache", tokenizer)
    return path, Path(made.heldout.filename).parent, np.array(made.heldout)


def test_an_odd_memmap_is_built_again(tmp_path):
    path, folder, heldout = cache_of(tmp_path)
    with open(folder / "heldout.bin", "ab") as file:
        file.write(b"x")
    said = []
    assert np.array_equal(prepare(path, tmp_path / "cache", log=said.append).heldout, heldout)
    assert "damaged" in said[0] and "building it again" in said[0]


def test_ids_outside_the_vocabulary_are_built_again(tmp_path):
    """A cache that a broken program wrote: its checksums are right, its ids are not."""
    path, folder, heldout = cache_of(tmp_path)
    stream = np.memmap(folder / "heldout.bin", "uint16", "r+")
    stream[3] = 60_000
    meta = json.loads(json.loads((folder / "meta.json").read_text())["content"])
    meta["streams"]["heldout"] = data.zlib.crc32(stream)
    content = json.dumps(meta)
    whole = {"hash": data.sha256(content), "content": content}
    (folder / "meta.json").write_text(json.dumps(whole))
    said = []
    assert np.array_equal(prepare(path, tmp_path / "cache", log=said.append).heldout, heldout)
    assert "outside the vocabulary" in said[0]


def test_a_cache_outlives_a_vocabulary_that_cannot_be_loaded(tmp_path, monkeypatch):
    """As that of gpt2 without a network: what cannot be built again is not thrown away."""
    path, folder, heldout = cache_of(tmp_path)

    def missing(*_):
        raise data.DataError("cannot load the vocabulary")

    with monkeypatch.context() as offline:
        offline.setattr(data, "tokenizer_from_state", missing)
        offline.setattr(data, "train_tokenizer", missing)
        with pytest.raises(data.DataError, match="cannot load the vocabulary"):
            prepare(path, tmp_path / "cache")
    said = []
    assert folder.exists()
    assert np.array_equal(prepare(path, tmp_path / "cache", log=said.append).heldout, heldout)
    assert not said


def test_a_cache_of_another_tokenizer_is_built_again(tmp_path):
    path, folder, heldout = cache_of(tmp_path)
    _, other, _ = cache_of(tmp_path, "char")
    shutil.rmtree(folder)
    shutil.copytree(other, folder)  # whole, but under the name of another
    said = []
    assert np.array_equal(prepare(path, tmp_path / "cache", log=said.append).heldout, heldout)
    assert "another source or tokenizer" in said[0]


# ---- sampling ----------------------------------------------------------------------------------


def test_prompts(run, monkeypatch):
    ckpt = f"--ckpt={run[1] / 'best.pt'}"
    for more in (
        ["--prompt="], ["--prompt=caf\udce9 \udcff"], ["--prompt=x", "--max_new_tokens=0"],
        ["--temperature=0.0"], ["--temperature=1e-300"], ["--temperature=1e300"],
        ["--top_k=9000000000000000000"], ["--top_p=1e-300"],
    ):  # fmt: skip
        code, out, err = outcome(sample.main, ckpt, "--max_new_tokens=5", *more)
        assert (code, "error" in err) == (0, False), (more, err)
    code, out, _ = outcome(sample.main, ckpt, "--prompt=abc", "--max_new_tokens=0")
    assert (code, out) == (0, "abc\n")
    said = mistake(sample.main, ckpt, "--temperature=1e999")
    assert "temperature must be finite" in said


def test_a_prompt_of_30_000_tokens(run):
    ckpt, prompt = f"--ckpt={run[1] / 'best.pt'}", "The cat. " * 3_334
    code, out, _ = outcome(sample.main, ckpt, f"--prompt={prompt}", "--max_new_tokens=3")
    assert code == 0 and out.startswith(prompt)


def test_a_character_that_the_tokenizer_never_saw(run, tmp_path):
    checkpoint = load_checkpoint(run[1] / "best.pt")
    checkpoint["tokenizer"] = Chars("abc").state()
    torch.save(checkpoint, tmp_path / "char.pt")
    assert "'é'" in mistake(sample.main, f"--ckpt={tmp_path / 'char.pt'}", "--prompt=é")


def test_a_closed_pipe_is_silent(run):
    command = [sys.executable, "sample.py", f"--ckpt={run[1] / 'best.pt'}"]
    process = subprocess.Popen(
        [*command, "--max_new_tokens=100000"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(60) == 141 and "rror" not in err and "Traceback" not in err


def test_ctrl_c_in_a_chat_is_silent(run, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    code, _, err = outcome(sample.main, f"--ckpt={run[1] / 'best.pt'}", "--chat")
    assert code == 130 and "Traceback" not in err
    monkeypatch.setattr("builtins.input", lambda _: "Hello")
    monkeypatch.setattr(sample, "show", interrupted)
    assert outcome(sample.main, f"--ckpt={run[1] / 'best.pt'}", "--chat")[0] == 130


# ---- fuzz --------------------------------------------------------------------------------------

FUZZ = int(os.environ.get("FUZZ", 200))


def fuzz(share):
    return settings(
        max_examples=int(FUZZ * share), deadline=None, database=None,
        derandomize="FUZZ" not in os.environ, suppress_health_check=list(HealthCheck),
    )  # fmt: skip


BYTES_CHANGE = st.tuples(
    st.sampled_from(["flip", "cut", "insert", "zero", "swap", "repeat"]),
    st.floats(0, 1), st.integers(1, 255), st.integers(1, 5000),
)  # fmt: skip


def changed(raw, change):
    """raw with one change; the same for files of every kind."""
    how, where, value, size = change
    at = int(where * (len(raw) - 1)) if raw else 0
    if how == "flip":
        return raw[:at] + bytes([raw[at] ^ value]) + raw[at + 1 :] if raw else raw
    return {
        "cut": raw[:at],
        "insert": raw[:at] + bytes([value]) * (size % 50) + raw[at:],
        "zero": raw[:at] + bytes(size) + raw[at + size :],
        "swap": raw[at:] + raw[:at],
        "repeat": raw[:at] + raw[at : at + size] + raw[at:],
    }[how]


STRANGE = st.one_of(
    st.none(), st.booleans(), st.sampled_from([-1, 0, 1, 10**6, 2**63, math.nan, math.inf, -0.5]),
    st.text(max_size=5), st.binary(max_size=5), st.just([]), st.just({}), st.just([[]]),
    st.sampled_from([torch.zeros(0), torch.full((3,), math.nan), torch.zeros(2, 2).char()]),
)  # fmt: skip


def places(value, path=()):
    """Paths to everything inside nested dictionaries and lists."""
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, (list, tuple)) else items
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def replaced(value, path, new):
    """value with what is at `path` replaced by `new`; removed if `new` is ..."""
    if not path:
        return new
    value = list(value) if isinstance(value, tuple) else copy.copy(value)
    if len(path) == 1 and new is ...:
        del value[path[0]]
    else:
        value[path[0]] = replaced(value[path[0]], path[1:], new)
    return value


def used_by_both(path, argv, out):
    """Sample from the checkpoint and resume it: each succeeds or ends in one line; nothing half."""
    success_or_one_line(sample.main, f"--ckpt={path}", "--max_new_tokens=2", "--prompt=a")
    success_or_one_line(train.main, *argv, f"--out_dir={out}", "--init_from=resume")
    assert not list(out.glob("*.tmp"))


@fuzz(0.25)
@given(changes=st.lists(BYTES_CHANGE, min_size=1, max_size=3))
def test_fuzz_bytes_of_checkpoints(run, changes):
    argv, done = run
    with tempfile.TemporaryDirectory() as folder:
        raw = (done / "step_00000008.pt").read_bytes()
        for change in changes:
            raw = changed(raw, change)
        path = Path(folder, "step_00000008.pt")
        path.write_bytes(raw)
        used_by_both(path, argv, Path(folder))


@fuzz(0.25)
@given(pick=st.data())
def test_fuzz_contents_of_checkpoints(run, pick):
    argv, done = run
    checkpoint = torch.load(done / "step_00000008.pt", weights_only=True)
    where = pick.draw(st.sampled_from(sorted(places(checkpoint), key=repr)))
    checkpoint = replaced(checkpoint, where, pick.draw(st.one_of(STRANGE, st.just(...))))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "step_00000008.pt")
        torch.save(checkpoint, path)
        used_by_both(path, [*argv, "--max_steps=9"], Path(folder))


RECORDS = [{"text": STORY.format(i)} for i in range(20)] + [
    {"instruction": f"Say {i}", "input": "", "output": f"It is {i}."} for i in range(20)
]
SOURCES = {
    ".txt": GOOD.encode(),
    ".jsonl": "\n".join(map(json.dumps, RECORDS)).encode(),
    ".txt.gz": gzip.compress(GOOD.encode()),
    ".jsonl.gz": gzip.compress(json.dumps(RECORDS).encode()),
}


@fuzz(0.25)
@given(
    suffix=st.sampled_from(sorted(SOURCES)),
    changes=st.lists(BYTES_CHANGE, max_size=3),
    noise=st.one_of(st.none(), st.binary(max_size=300), st.text(max_size=300).map(
        lambda s: s.encode(errors="replace"))),
    tokenizer=st.sampled_from(["byte", "char", "bpe"]),
)  # fmt: skip
def test_fuzz_data_files(run, suffix, changes, noise, tokenizer):
    argv, _ = run
    raw = SOURCES[suffix] if noise is None else noise
    for change in changes:
        raw = changed(raw, change)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"some{suffix}")
        path.write_bytes(raw)
        more = [f"--dataset={path}", f"--data_dir={folder}/cache", f"--out_dir={folder}/out"]
        more += ["--vocab_size=400", "--max_steps=1", f"--tokenizer={tokenizer}"]
        code = success_or_one_line(train.main, *argv, *more)
        assert not [p for p in Path(folder).rglob("*") if p.suffix in (".tmp", ".part")]
        caches = list(Path(folder, "cache").glob("*"))
        assert all((cache / "meta.json").exists() for cache in caches) and len(caches) <= 1
        assert caches or code == 2


NUMBERS = st.sampled_from(
    "-1 0 1 2 3 7 16 0.5 -0.5 1e-300 1e999 nan 999999999999999999 10000000000000000000000".split()
)
ODD = st.sampled_from(["", "True", "None", "[]", "torch", "resume", "\0", "é"])
WORDS = st.one_of(NUMBERS, ODD, st.text(max_size=8))
LONG = {"max_steps", "sample_tokens", "threads", "compile", "max_new_tokens", "serve"}  # as asked
PATHS = {"out_dir", "data_dir", "dataset", "ckpt", "picture", "result"}  # only those below


def flags(cls):
    names = st.sampled_from([f.name for f in fields(cls) if f.name not in LONG | PATHS])
    known = st.builds("--{}={}".format, names, WORDS)
    paths = st.builds("--{}={}".format, st.sampled_from(sorted(PATHS)), st.sampled_from(
        ["/proc/x", "/dev/null/x", "a\0b", "x" * 300, "README.md/x"]))  # fmt: skip
    wild = st.one_of(st.text(max_size=12), st.builds("--{}".format, st.text(max_size=12)))
    return st.lists(st.one_of(known, known, known, paths, wild), min_size=1, max_size=3)


@fuzz(0.125)
@given(more=flags(TrainConfig))
def test_fuzz_command_lines_of_train(run, more):
    with tempfile.TemporaryDirectory() as folder:
        argv = [*run[0], f"--out_dir={folder}/out", "--max_steps=2"]
        if "--help" not in more and "-h" not in more:
            success_or_one_line(train.main, *argv, *more, "--sample_tokens=2")


@fuzz(0.125)
@given(more=flags(SampleConfig))
def test_fuzz_command_lines_of_sample(run, more):
    argv = [f"--ckpt={run[1] / 'best.pt'}", *more, "--chat=False", "--max_new_tokens=3"]
    success_or_one_line(sample.main, *argv)
