"""README's "Make it yours", run in a copy of the repository: every command, in reading order.

A ```python block whose first line names a file (# lif.py) is appended to that file. The first
`python ...` after the block uses what it registers. All of it runs in one process of its own.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SECTION = (ROOT / "README.md").read_text().split("## Make it yours\n")[1].split("\n## ")[0]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```\n(.*?)(?=^```|\Z)", re.M | re.S)
COMMAND = re.compile(r"python ((?:train|sample)\.py [^`#\n]+)")
REGISTERED = re.compile(r'^(?:@\w+\(|[A-Z]+\[)"(\w+)"', re.M)  # @block("leaky"), RESETS["zero"]

# what a command says comes after the text that it trains on, and before what makes it small
SMALL = (
    "--tokenizer=byte --vocab_size=300 --n_embd=16 --n_hidden=32 --n_layer=2 --warmup_steps=1"
    " --tokens_per_step=256 --micro_tokens=256 --sample_tokens=3 --dtype=float32"
)
RUN = f"""
import shlex, sys
import torch
import config, sample, train
from conftest import check_model
from model import SpikingLM

COMPUTER = ["--device=cpu", "--threads=1"]
SHORT = ["--max_new_tokens=3", *COMPUTER]
for steps, line in enumerate(sys.argv[1:], 2):
    print("$ python", line)
    script, *argv = shlex.split(line)
    if script == "sample.py":
        sample.main([*argv, *SHORT])
        continue
    argv = ["--dataset=my.txt", *argv, *{SMALL.split()}, f"--max_steps={{steps}}", *COMPUTER]
    train.main(argv)
    sample.main(["--prompt=The cat", *SHORT])  # of the newest run
    model = SpikingLM(config.load(train.TrainConfig, argv)).eval()
    with torch.no_grad():
        for p in model.parameters():  # what starts at 0 would hide its mistakes
            p += 0.05 * torch.randn_like(p)
    check_model(model)
"""


def examples():
    """[(file, code to append)] and the commands of the section."""
    blocks, commands = [], []
    for language, code, after in FENCE.findall(SECTION):
        if language == "sh":
            commands += COMMAND.findall(code)
        elif file := re.match(r"# (\w+\.py)\n", code):
            name, command = REGISTERED.search(code), COMMAND.search(after)
            assert name and command, f"a block registers a name, and a command follows:\n{code}"
            assert f"={name[1]}" in command[1], f"{command[1]} does not use {name[1]}"
            blocks.append((file[1], code))
            commands.append(command[1])
    return blocks, commands


def test_make_it_yours_runs(tmp_path):
    blocks, commands = examples()
    for path in [*ROOT.glob("*.py"), ROOT / "nursery.txt", ROOT / "tests/conftest.py"]:
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for file, code in blocks:
        with (tmp_path / file).open("a") as f:
            f.write("\n\n" + code)
    said = [f"The cat number {i} sat on a mat and saw a bird." for i in range(300)]
    (tmp_path / "my.txt").write_text("\n<|endoftext|>\n".join(said))
    chats = [json.dumps({"question": "What did the cat do?", "answer": text}) for text in said]
    (tmp_path / "chats.jsonl").write_text("\n".join(chats))
    done = subprocess.run(
        [sys.executable, "-c", RUN, *commands], cwd=tmp_path, input="hello\n",
        capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("$ python") == len(commands) >= 4


def test_examples_name_their_files():
    """One each of a surrogate (or neuron), a block and a trait, at least."""
    blocks, _ = examples()
    assert {file for file, _ in blocks} >= {"lif.py", "blocks.py", "traits.py"}
    assert len(blocks) == SECTION.count("```python")
