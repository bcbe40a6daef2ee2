"""Is anything lost? Training is killed by SIGKILL at random moments, resumed, and compared.

Three runs are killed here. TRIALS=50 python -m pytest tests/test_resume.py kills fifty and writes
results/resume_cpu.json.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

import train
from checkpoint import load_checkpoint

TRIALS = int(os.environ.get("TRIALS", 0))
KILLED = (  # a run of seconds that saves after every step, so that many a kill hits a save
    "--tokenizer=byte --vocab_size=257 --n_embd=32 --n_hidden=64 --n_layer=1 --phases=stories:16"
    " --tokens_per_step=64 --micro_tokens=64 --max_steps=12 --eval_interval=1 --sample_tokens=0"
    " --eval_length=32 --device=cpu --threads=1"
).split()


def train_quietly(argv):
    sys.stdout = sys.stderr = open(os.devnull, "w")
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a killed process leaks
    train.main(argv)


def start_training(folder, out, *more):
    """A process that trains; it begins with train.py imported: that is most of its life."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])
    paths = [f"--dataset={folder}/text.txt", f"--data_dir={folder}", f"--out_dir={out}"]
    process = context.Process(target=train_quietly, args=([*KILLED, *paths, *more],))
    process.start()
    return process


def read_log(out):
    path = out / "log.jsonl"
    log = [json.loads(x) for x in path.read_text().split("\n")[:-1]] if path.exists() else []
    return [[x[key] for key in ("step", "train", "valid", "heldout", "minutes")] for x in log]


def finished(process, out):
    """After its end: (losses of every evaluation, weights); None if it failed."""
    process.join()
    if process.exitcode:
        return None
    return [x[:-1] for x in read_log(out)], load_checkpoint(max(out.glob("step_*.pt")))["model"]


def kill_and_resume(folder, out, step, pause, expected, weights):
    """Kill a run `pause` seconds after it has logged this step; resume it; what came of it."""
    process = start_training(folder, out)
    while process.is_alive() and len(read_log(out)) <= step:
        time.sleep(0.001)
    time.sleep(pause)
    seen = max(out.glob("step_*.pt"), default=None)
    process.kill()
    process.join()
    in_a_save, files = any(out.glob("*.tmp")), sorted(out.glob("step_*.pt"))
    whole = [load_checkpoint(path)["position"]["step"] for path in files]  # or ValueError
    end = finished(start_training(folder, out, *["--init_from=resume"] * bool(files)), out)
    return {
        "step": max(whole, default=None),
        "killed": process.exitcode == -signal.SIGKILL,
        "in_a_save": in_a_save,
        "lost": seen is not None and (not files or files[-1] < seen),
        "same_losses": end is not None and end[0] == expected,
        "same_weights": end is not None
        and all(torch.equal(end[1][name], w) for name, w in weights.items()),
    }


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
def test_killed_at_any_moment_and_resumed(tmp_path, corpus):
    rng, trials = random.Random(1337), []
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(corpus))
    peace = tmp_path / "peace"
    expected, weights = finished(start_training(tmp_path, peace), peace)
    log = read_log(peace)
    seconds = 60 * (log[-1][-1] - log[0][-1]) / len(log)  # of a step, evaluated and saved
    for i in range(TRIALS or 3):
        step, pause = rng.randrange(expected[-1][0] - 1), rng.uniform(0, seconds)
        trial = kill_and_resume(tmp_path, tmp_path / str(i), step, pause, expected, weights)
        trials.append(trial)
        print(f"{i + 1:3d} {trial}", flush=True)
    counts = {key: sum(trial[key] for trial in trials) for key in trials[0] if key != "step"}
    if TRIALS:
        what = "training killed by SIGKILL at random moments and resumed, beside a run in peace"
        result = train.environment(torch.device("cpu"), 1337) | {"what": what}
        result |= {"command": f"TRIALS={TRIALS} python -m pytest tests/test_resume.py"}
        result |= {"command_line": KILLED, "final": expected[-1], "counts": counts}
        path = Path(train.__file__).parent / "results" / "resume_cpu.json"
        train.write_result(path, result | {"trials": trials})
    assert counts["lost"] == 0, counts
    assert counts["same_losses"] == counts["same_weights"] == len(trials), counts
    assert counts["killed"] > 0, "every run was over before it was killed"
