"""Everything that a GPU is to be asked, the most valuable first, within half an hour.

python bench.py all --device=cuda --text=my.txt
python bench.py all --device=cpu --tiny=True      a rehearsal: the same steps, in a minute or two

Each step is a process of its own with a limit, and writes its file into results/ as it ends. One
that fails is reported, and the next begins. The kernels' tests come first: see the end of their
output in results/kernels_<device>.json.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from checkpoint import environment, write_result

TESTS = "-m pytest -q --maxfail=20 tests/test_kernels.py tests/test_spark.py -k".split()
MODEL = "out/all_snn_100m"
TINY = (  # the same models on a laptop
    "--n_layer=1 --n_head=2 --keys=4 --vocab_size=512 --n_embd=64 --n_hidden=64 --d_ff=128"
    " --micro_tokens=128 --tokens_per_step=128 --phases=stories:32 --eval_length=32 --n_state=2"
    " --k_max=2"
)


def steps(text, tiny, device):
    """(name, seconds at most, arguments of python)."""
    few = "--rounds=1 --warmup=0" if tiny else "--rounds=3 --warmup=0"
    shapes = "2x8x32" if tiny else "16x1024x2048,32x64x512,16x256x512,4x1024x1024"
    yield "scan", 100, f"bench.py scan --shapes={shapes} {few}"
    size, length = (TINY, 32) if tiny else ("", 1024)
    for name in ("snn_100m", "snn_1b", "neuronspark_0p9b", "spikewhale_216m"):
        n = length if name.startswith("snn") else min(512, length)
        smaller = TINY + " --traits=none" if tiny and "whale" in name else size
        command = f"bench.py train configs/{name}.py --against= --length={n} {few} {smaller}"
        yield f"train {name}", 150, command
    if not text:
        return
    run = f"train.py configs/snn_100m.py --dataset={text} --out_dir={MODEL} --data_dir=out/all_data"
    run += f" {TINY} --tokenizer=byte" if tiny else ""
    last = 6 if tiny else 300
    run += f" --warmup_steps=2 --eval_interval={last // 3}"
    run += f" --max_steps={last}"
    yield "model", 360, f"{run} --result=results/model_{device}.json"
    yield "resume", 90, f"{run} --init_from=resume"
    yield "sample", 60, f"sample.py --ckpt={MODEL}/best.pt --max_new_tokens={20 if tiny else 200}"
    few += f" --tokens={20 if tiny else 200}"
    yield "generate", 120, f"bench.py generate --ckpt={MODEL}/best.pt {few}"


def all(
    b,
    run,
    *,
    text: str = "",  # a text file to train snn_100m on; empty: that is left out
    tiny: bool = False,  # rehearse: small models, one round
):
    """Run every step; {name: what became of it}."""
    device, outcome = run.device.type, {}
    interpret = {"TRITON_INTERPRET": "0" if device == "cuda" else "1"}
    only = ["not compiles_for" if device == "cuda" else "test_exactly_at_the_threshold"]
    began = time.time()
    ended = call([*TESTS, *only], 120, interpret)
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|error)", ended)}
    record = environment(run.device, b.seed) | {"what": "tests/test_kernels.py, test_spark.py"}
    record |= counts | {"end": "\n".join(ended.splitlines()[-20:])}
    write_result(f"results/kernels_{device}.json", record)
    outcome["kernels"] = {"seconds": time.time() - began, "end": ended.splitlines()[-1:]}
    for name, limit, command in steps(text, tiny, device):
        if name == "resume" and not any(Path(MODEL).glob("step_*.pt")):
            continue  # training failed: there is nothing to resume
        print(f"\n==== {name}: python {command}", flush=True)
        words, began = command.split(), time.time()
        if name == "resume":
            before = forget_the_end()
        save = [] if tiny or words[0] != "bench.py" else ["--save=True"]
        ended = call([*words, f"--device={device}", *save], limit)
        outcome[name] = {"seconds": time.time() - began, "end": ended.splitlines()[-1:]}
        if name == "resume":
            outcome[name] |= {"before": before, "after": last_loss()}
            print(f"held-out nats per token at the end: {before}, once more {last_loss()}")
    for name, what in outcome.items():
        print(f"{name:24s} {what['seconds']:6.0f} s  {' '.join(what['end'])[:60]}")
    return {"steps": outcome}


def last_loss():
    """Held-out nats per token in the last line of the model's log."""
    return json.loads(Path(MODEL, "log.jsonl").read_text().splitlines()[-1])["heldout"]


def forget_the_end():
    """Remove the newest checkpoint, so that a resumed run takes the last steps again."""
    max(Path(MODEL).glob("step_*.pt")).unlink()
    return last_loss()


def call(words, limit, more={}):
    """Run python with these words, printing what it prints; returns that. A failure is its end."""
    process = subprocess.Popen(
        [sys.executable, *words], env=os.environ | more, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        ended, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        ended = process.communicate()[0] + f"\nstopped after {limit} s"
    print(ended, flush=True)
    return ended if process.returncode == 0 else f"{ended}\nFAILED, exit {process.returncode}"
