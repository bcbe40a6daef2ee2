"""bench.py and experiments/ measure what they say; every command reads its own settings."""

import itertools
import json
import shutil
import sys
import time
from dataclasses import asdict, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bench
import lif
import sample
import train
import config
from checkpoint import VERSION
from experiments import all as all_steps
from experiments import generate as writing
from experiments import train as training
from experiments import ablate, frames, llama, params, recall, scan
from experiments.peers import check_spikes
from experiments.recall import I_AM, NAMES, TAUGHT, WHO, WORDS
from model import SpikingLM


def load(words, command=training.train):
    return bench.settings_of(command, words.split())


RUN = bench.Run(load("--device=cpu --dtype=float32 --threads=1"))
SNN = "configs/snn_6m.py --vocab_size=60 --n_hidden=32 --n_embd=32 --d_ff=40 --n_head=2 --keys=4"
SNN += " --rounds=1 --warmup=0"


# ---- recall ------------------------------------------------------------------------------------


def test_documents_ask_for_the_name_they_began_with():
    text, seen = recall.documents(np.random.default_rng(0), rows=20, length=641), set()
    for row in text.tolist():
        told, answers = [], []
        for i, token in enumerate(row[:-1]):
            told += [(i, row[i + 1])] * (token == I_AM)
            answers += [(i, row[i + 1])] * (token == WHO)
        assert [name for _, name in told] == [name for _, name in answers]
        distances = [asked - at - 2 for (at, _), (asked, _) in zip(told, answers)]
        assert set(distances) <= set(TAUGHT)
        # each name stands twice in its document, at both ends: none in the filler
        assert sum(token < NAMES for token in row) == 2 * len(told)
        seen |= set(distances)
    assert seen == set(TAUGHT) and text.max() < WORDS


class Oracle(torch.nn.Module):
    """Answers with the name that stands at this place of the text."""

    def __init__(self, place):
        super().__init__()
        self.place = place

    def forward(self, tokens):
        logits = 9 * torch.nn.functional.one_hot(tokens[:, self.place], WORDS).float()
        return logits[:, None], None, SimpleNamespace(log={"share memory": 0.5})


@pytest.mark.parametrize("distance", [1, 40])
def test_ask_scores_the_last_name_told(distance):
    best = recall.ask(Oracle(21), distance, 0, RUN)
    assert best["accuracy"] == 1 and best["nats"] < 0.01 and best["share"] == 0.5
    assert recall.ask(Oracle(1), distance, 0, RUN)["accuracy"] == 0  # the name before is wrong
    filler = recall.ask(Oracle(22), distance, 0, RUN)
    assert filler["accuracy"] == 0 and filler["nats"] > 3


def test_recall_compares_models_of_equal_size(monkeypatch):
    monkeypatch.setattr(recall, "ASKED", (1, 8))
    monkeypatch.setattr(recall.recall, "preset", [*recall.recall.preset, "--n_hidden=32"])
    words = "--max_steps=2 --tokens_per_step=64"
    argv = [*words.split(), "--phases=words:8 phrases:16"]
    c = bench.settings_of(recall.recall, argv)
    assert c.encoder == "float" and c.max_steps == 2  # the preset, and what is stronger
    rows = recall.recall(c, RUN, variants="snn", seeds=1)["variants"]
    assert set(rows) == {"snn", "snn+memory"}
    assert rows["snn+memory"]["parameters"] <= rows["snn"]["parameters"] < 200_000
    assert rows["snn"]["mean_share"]["8"] == 0 < rows["snn+memory"]["mean_share"]["8"]


# ---- generate ----------------------------------------------------------------------------------


def test_one_long_text_of_ours_alone(monkeypatch):
    """As many tokens as it says between the two looks at time and memory."""
    drawn, seen, draw, take_turns = [], [], writing.draw, writing.take_turns

    def count(stream, n, events):
        drawn.append(n)
        draw(stream, n, events)

    def turns(runs, *rest):
        times = take_turns(runs, *rest)
        seen.append(sum(drawn))
        return times

    monkeypatch.setattr(writing, "draw", count)
    monkeypatch.setattr(writing, "take_turns", turns)
    c = load("configs/sam_6m.py --n_hidden=16 --n_embd=16 --n_layer=1 --vocab_size=50 --rounds=1")
    result = writing.generate(c, RUN, tokens=200, against="")
    assert seen == [120, 240] and sum(drawn[:-2]) == result["late"] == 200
    (row,) = result["contestants"].values()
    assert row["late_ms_per_token"] > 0 and row["ratio"] == 1
    megabytes = result["early_mb"], result["late_mb"]
    assert megabytes == (None, None) or 50 < min(megabytes)


def test_random_weights_fire_at_trained_rates(tmp_path):
    rates = {"a": 0.3, "q": 0.1, "k": 0.25, "o": 0.2, "h": 0.04, "head": 0.15}
    trained = dict(block="snn", n_layer=2, keys=64, head="spikes")
    result = tmp_path / "trained.json"
    layers = [[0.25, 0.05, 0.3, 0.25, 0.02], [0.35, 0.15, 0.2, 0.15, 0.06]]  # a q k o h
    per_layer = [*layers[0], *layers[1], 0.15]
    result.write_text(json.dumps({"config": trained, "log": [{"rate": per_layer}]}))
    c = load(
        "configs/snn_6m.py --vocab_size=400 --n_layer=3 --n_head=2 --keys=32"
        " --n_hidden=64 --n_embd=64 --d_ff=128 --head=spikes"
    )
    found = writing.trained_rates(result)
    assert found == pytest.approx(rates)
    torch.manual_seed(c.seed)
    model = SpikingLM(c).eval()
    writing.set_rates(model, found)
    torch.manual_seed(2)
    with torch.no_grad():  # once membranes have filled
        _, state, _ = model(torch.randint(400, (4, 300)))
        fired = [r.mean().item() for r in model(torch.randint(400, (4, 64)), state)[2].rates]
    wanted = [rates[site] for site in "aqkoh" * 3] + [rates["head"]]
    assert fired == pytest.approx(wanted, abs=0.04)
    drawn = list(islice(model.generate(torch.zeros(1, 1, dtype=torch.long)), 164))[100:]
    # of a block: 64 a to 128 h and 128 q, k; 64 q and 64 k to 33 values; 64 o to 64; 128 h to 64
    of = {"a": 64 * 256, "q": 64 * 33, "k": 64 * 33, "o": 64 * 64, "h": 128 * 64}
    work = 3 * sum(n * rates[site] for site, n in of.items()) + 0.15 * 64 * 400
    assert writing.triggered_share(model, drawn) == pytest.approx(
        work / (3 * sum(of.values()) + 64 * 400), rel=0.25
    )
    del found["o"]
    with pytest.raises(ValueError, match="no neurons called o"):
        writing.set_rates(model, found)
    result.write_text(json.dumps({"config": trained, "log": [{"rate": per_layer[1:]}]}))
    with pytest.raises(ValueError, match="is not the result of a spiking model"):
        writing.trained_rates(result)


def test_generate_times_a_checkpoint(tmp_path, monkeypatch):
    torch.manual_seed(3)
    model = SpikingLM(load(f"{SNN} --n_layer=1 --levels=2 --head=spikes"))
    path, weights = tmp_path / "best.pt", model.state_dict()
    saved = {"version": VERSION, "model": weights, "config": asdict(model.config)}
    del saved["config"]["traits"]  # as in a checkpoint older than this setting, which is off
    torch.save(saved | {"tokenizer": ""}, path)
    prepared, prepare = {}, SpikingLM.prepare  # dtype -> were its weights those of the checkpoint?

    def watched(model, dtype, compile):
        same = [torch.equal(weights[k], x) for k, x in model.state_dict().items()]
        prepared[dtype] = all(same)
        prepare(model, dtype, compile)

    monkeypatch.setattr(SpikingLM, "prepare", watched)
    c = load("configs/snn_6m.py --rounds=1 --warmup=0")
    result = writing.generate(c, RUN, tokens=4, ckpt=str(path))
    assert prepared == {torch.bfloat16: True, torch.float32: True}
    assert result["what"] == "ms per token, batch 1, trained weights"
    rows = result["contestants"]
    ours = {row["parameters"] for name, row in rows.items() if name != "transformer, float32"}
    assert ours == {sum(p.numel() for p in model.parameters())}
    assert 0 < rows["ours"]["triggered"] < 1 and "triggered" not in rows["transformer, float32"]
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="cannot read the checkpoint"):
        writing.generate(c, RUN, ckpt=str(path))


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_llama_of_our_size_writes(kind):
    pytest.importorskip("xllamacpp")
    peer = llama.Llama(kind, 450_000, 128, 300, 1)
    assert peer.parameters == pytest.approx(450_000, rel=0.1)  # whole layers
    assert peer.bytes == pytest.approx(
        peer.parameters * {"Q4_0": 18, "Q8_0": 34}[kind] / 32, rel=0.1
    )
    assert peer(5) == 5


def test_llama_whose_process_dies_is_skipped(monkeypatch):
    pytest.importorskip("xllamacpp")
    monkeypatch.setattr(llama, "write", lambda path, *_: Path(path).write_text("no GGUF"))
    with pytest.raises(ValueError, match="its process ended"):
        llama.Llama("Q4_0", 450_000, 128, 300, 1)


def test_llama_counts_its_weights():
    sizes = [llama.size_of(llama.tensors(128, 1000, n)) for n in (0, 1, 2)]
    assert sizes == [
        (1000 + 1) * 128 + n * (4 * 128**2 + 3 * 128 * 352 + 2 * 128) for n in range(3)
    ]


def test_generate_measures_many_texts_and_the_limit(monkeypatch, capsys):
    monkeypatch.setattr(writing, "set_rates", lambda model, rates: None)
    monkeypatch.setattr(writing, "trained_rates", lambda path: {})
    monkeypatch.setattr(writing, "bandwidth", lambda device: 0.001)
    monkeypatch.setattr(writing, "take_turns", lambda runs, *_: {name: [2.0] for name in runs})
    peers = []

    class Peer:
        def __init__(self, kind, *size):
            peers.append((kind, *size))
            raise ImportError("not here")

    monkeypatch.setattr(writing, "Llama", Peer)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    result = writing.generate(load(f"{SNN} --head=spikes"), RUN, tokens=20)
    ours, size = result["contestants"]["ours"], result["contestants"]["ours"]["parameters"]
    assert peers == [("Q4_0", size, 32, 60, 2), ("Q8_0", size, 32, 60, 2)]
    assert result["skipped"] == {"llama.cpp, Q4_0": "not here", "llama.cpp, Q8_0": "not here"}
    assert ours["gigabytes"] < 0.75 * result["contestants"]["ours, float32"]["gigabytes"]
    read = ours["triggered"] * ours["gigabytes"] / 0.001  # seconds, of the 0.1 that a token takes
    assert ours["to_limit"] == pytest.approx(0.1 / read)
    rows = result["many"]
    assert (
        rows["prompt, ours"]["tokens_per_s"] == 256 / 2 and "prompt, transformer, float32" in rows
    )
    assert rows["16 texts, events"]["tokens_per_s"] == rows["16 texts, dense"]["tokens_per_s"] == 8
    assert "llama.cpp, Q4_0" + " " * 14 + "skipped: not here" in capsys.readouterr().out


def test_generate_times_the_float_twin(monkeypatch):
    monkeypatch.setattr(writing, "set_rates", lambda model, rates: None)
    monkeypatch.setattr(writing, "trained_rates", lambda path: {})
    ours = iter((3.0, 2.0))  # seconds of 20 tokens early in the text, and late

    def turns(runs, *_):
        took = next(ours)
        return {name: [took if name == "ours" else 4.0] for name in runs}

    monkeypatch.setattr(writing, "take_turns", turns)
    c = load(f"{SNN} --spikes=False --head=spikes")
    rows = writing.generate(c, RUN, tokens=40)["contestants"]
    assert rows["ours"]["early_ms_per_token"] == 150 and rows["ours"]["late_ms_per_token"] == 100
    assert rows["ours"]["ratio"] == 1 and "triggered" not in rows["ours"]
    assert rows["transformer, float32"]["ratio"] == 2


def test_the_transformer_beside_a_config_has_nothing_of_its_neurons():
    assert bench.transformer_like(load("configs/sam_v3.py")).homeostasis == 0


def test_the_transformer_beside_snn_has_its_size():
    c = load(f"{SNN} --n_embd=200 --n_hidden=200")  # 200: no multiple of 3 heads
    gpt = writing.generators_of(c, "configs/gpt_6m.py")["transformer, float32"][0]
    less = replace(gpt, n_layer=gpt.n_layer - 1) if gpt.n_layer > 1 else c
    assert bench.parameters_of(less) <= bench.parameters_of(c) <= bench.parameters_of(gpt)


def test_draw_takes_so_many_tokens_by_events_or_dense():
    seen, usual = [], lif.EVENT_RATE
    stream = (seen.append(lif.EVENT_RATE) for _ in itertools.count())
    writing.draw(stream, 2, True)
    writing.draw(stream, 3, False)
    assert seen == [usual] * 2 + [0] * 3 and lif.EVENT_RATE == usual > 0


# ---- settings and mistakes ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, said",
    [
        ("generate configs/snn_6m.py --rates=configs/snn_6m.py", "is not the result of a run"),
        ("generate configs/snn_6m.py", "name the result of a trained block snn: --rates="),
        ("generate configs/sam_6m.py --tokens=0", "tokens must be at least 1"),
        ("train configs/sam_6m.py --length=0", "length must be 1 to micro_tokens"),
        ("frames configs/neuronspark_6m.py --length=9999", "length must be 1 to micro_tokens"),
        ("recall --variants=zzz", "no variant is called 'zzz'"),
        ("ablate configs/snn_6m.py --variants=zzz", "no variant is called 'zzz'"),
        ("ablate configs/snn_6m.py --seeds=0", "seeds must be at least 1"),
        ("recall --seeds=0", "seeds must be at least 1"),
        ("frames configs/snn_6m.py", "frames measures block spark"),
        ("params --gpus=-1", "--gpus are numbers"),
        ("params --gpus=1,x", "--gpus are numbers"),
        ("scan --shapes=4x4", "shapes must be BxTxN"),
        ("scan --shapes=4x4xN", "shapes must be BxTxN"),
        ("scan --shapes=4x0x4", "shapes must be BxTxN"),
        ("scan --rounds=0", "rounds must be at least 1"),
        ("train --rounds=0", "rounds must be at least 1"),
        ("train --n_layer=0", "n_layer must be 1 to 1000"),
        ("scan --traits=jepa", "unknown setting 'traits'"),
        ("train --shapes=4x4x4", "unknown setting 'shapes'"),
        ("params --gpu=8", "unknown gpu '8'; choose one of h200, h100, a100, 4090"),
        ("recall configs/snn_6m.py", "recall takes no CONFIG: leave out configs/snn_6m.py"),
        ("scan configs/snn_6m.py", "scan takes no CONFIG: leave out configs/snn_6m.py"),
        ("peers", "write python bench.py generate|train|"),
        ("", "write python bench.py generate|train|"),
    ],
)
def test_mistakes_end_in_one_line(argv, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(argv.split())
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and said in err and err.count("\n") == 1


@pytest.mark.parametrize("name", bench.EXPERIMENTS)
def test_help_lists_every_setting_of_a_command(name, capsys):
    command = bench.command_of(name)
    with pytest.raises(SystemExit) as stopped:
        bench.main([name, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert stopped.value.code == 0
    own = command.__kwdefaults__
    given = own | {f.name: f.default for f in fields(bench.BenchConfig)}
    for key, default in given.items():
        (line,) = (x for x in lines if x.startswith(f"  --{key}="))
        value, _, comment = line.removeprefix(f"  --{key}=").partition("  # ")
        assert eval(value) == default and len(comment) > 5
    assert any("--n_layer=" in line for line in lines) == (name not in ("scan", "all"))


def test_a_command_gets_its_own_settings(monkeypatch, tmp_path):
    seen = []

    def measure(c, run, *, width: int = 3, path: str = ""):
        seen.append((c, width, path))
        return {}

    monkeypatch.setattr(bench, "command_of", {"measure": measure}.get)
    (tmp_path / "small.py").write_text("width = 4\nn_layer = 7\n")
    more = ["--path=a,b", "--rounds=2", "--device=cpu", "--threads=1"]
    bench.main(["measure", str(tmp_path / "small.py"), *more])
    ((c, *own),) = seen
    assert own == [4, "a,b"] and (c.n_layer, c.rounds, c.warmup, c.threads) == (7, 2, 2, 1)


# ---- params ------------------------------------------------------------------------------------


ROOT = Path(bench.__file__).parent
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_params_of_every_config(path):
    c = load(str(path))
    result = params.params(c, RUN)
    assert result["parameters"] == sum(result["groups"].values()) == bench.parameters_of(c)
    assert (result["macs"] > 0) == (c.head == "float")
    assert (result["synapses"] > 0) == (c.block in ("sam", "whale", "snn"))


def test_params_counts_by_hand():
    sam = params.params(load("configs/sam_6m.py"), RUN)
    assert sam["synapses"] == 256 * 512 + 6 * 512**2
    assert sam["macs"] == 6 * 2 * 512**2 + 512 * 256 + 4096 * 256
    near, far = (
        params.params(load(f"configs/gpt_6m.py --window={n} --phases=stories:9"), RUN)["macs"]
        for n in (3, 512)
    )
    of_a_token = 6 * 2 * 256  # layers, q k and a v
    assert near == 6 * (4 * 256**2 + 2 * 256 * 1112) + 4096 * 256 + 3 * of_a_token
    assert far - near == (9 - 3) * of_a_token


def test_a_plan_by_hand():
    tiny = "configs/snn_6m.py --n_layer=1 --d_ff=64 --n_head=2 --keys=4 --phases=stories:8"
    tiny += " --micro_tokens=16 --tokens_per_step=1024"
    machine = {"gpus": "4,16", "gpu": "4090", "reached": 0.5}
    result = params.params(load(tiny), RUN, **machine)
    plan, n = result["plan"], result["parameters"]
    work = 6 * (result["synapses"] + result["macs"]) * 1024  # of a step
    for gpus, link in ((4, 25e9), (16, 6e9)):
        row, sent = plan[gpus], 4 * n * 2 * (gpus - 1) / gpus  # float32, a ring, there and back
        assert row["sent"] == pytest.approx(sent / 1e9)
        assert 1024 / row["tokens_per_s"] == pytest.approx(work / gpus / 0.5 / 165e12 + sent / link)
    muon = 384 * (2 * 64 + 2 * 2 * 4 + 384)  # its parameters: w_in, w_out, w_qk, w_o
    states = 8 * (n - muon) + 4 * muon
    kept = plan[4]["activations"]
    assert plan[4]["gigabytes"] == pytest.approx(kept + (8 * n + states) / 1e9) and kept > 0
    more = load(f"{tiny} --checkpointing=True --shard=True")
    again = params.params(more, RUN, **machine)["plan"][4]
    assert again["activations"] < kept and again["tokens_per_s"] < plan[4]["tokens_per_s"]
    assert again["gigabytes"] == pytest.approx(again["activations"] + (8 * n + states / 4) / 1e9)


def test_everything_is_rehearsed(tmp_path, monkeypatch, capfd):
    """`bench.py all --tiny=True`: each step runs, and one that fails stops no other."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Tom saw {n} birds. They sang to him. " * 20 for n in range(40)))
    monkeypatch.chdir(tmp_path)
    commands = {"bench.py": bench.main, "train.py": train.main, "sample.py": sample.main}
    failing = "train neuronspark_0p9b"

    def call(words, limit, more={}):  # in this process: ten imports of torch are half a minute
        if words[0] == "-m":
            return "2 passed"
        if "configs/neuronspark_0p9b.py" in words[2]:
            return "FAILED, exit 1"
        words = [str(ROOT / x) if x.startswith("configs/") else x for x in words]
        commands[words[0]]([*words[1:], "--threads=1"] if words[0] != "sample.py" else words[1:])
        return "done"

    monkeypatch.setattr(all_steps, "call", call)
    steps = all_steps.all(load("", all_steps.all), RUN, text=str(text), tiny=True)["steps"]
    assert steps.pop(failing)["end"] == ["FAILED, exit 1"]
    ends = [step["end"] for step in steps.values()]
    assert len(ends) == 9 and all(end in (["done"], ["2 passed"]) for end in ends)
    assert steps["resume"]["before"] == steps["resume"]["after"]
    assert json.loads((tmp_path / "results/kernels_cpu.json").read_text())["passed"] == 2
    shutil.rmtree(all_steps.MODEL)
    monkeypatch.setattr(all_steps, "call", lambda *_: "FAILED, exit 1")
    steps = all_steps.all(load("", all_steps.all), RUN, text=str(text), tiny=True)["steps"]
    assert len(steps) == 9 and "resume" not in steps  # there is nothing to resume


# ---- taking turns ------------------------------------------------------------------------------


def test_a_summary_is_of_medians():
    rows = bench.summary({"ours": [2.0, 1.0, 9.0], "fast": [1.0, 0.5, 4.0]}, "ours")
    assert rows["ours"]["ratio"] == 1 and rows["fast"]["ratio"] == 0.5  # of our time: less is fast
    assert rows["ours"] == {"median_ms": 2e3, "min_ms": 1e3, "max_ms": 9e3, "ratio": 1}


def test_turns_are_timed_after_the_warm_up(monkeypatch):
    ran, clock = [], itertools.count()

    def seconds(run, device):
        run()
        return next(clock)

    monkeypatch.setattr(bench, "seconds", seconds)
    names = {name: partial(ran.append, name) for name in "ab"}
    times = bench.take_turns(names, rounds=2, warmup=1, device=RUN.device)
    assert "".join(ran) == "aabb" + "bbaa" + "aabb"  # each turn twice; every round another is first
    assert times == {"a": [3, 4], "b": [2, 5]}  # 0 and 1 were the warm-up's


def test_seconds_are_of_the_run():
    assert 0.02 <= bench.seconds(lambda: time.sleep(0.02), RUN.device) < 2


# ---- scan, train, frames -----------------------------------------------------------------------


def test_scan_times_who_fires_as_we_do(capsys):
    c = load("--rounds=1 --warmup=0", scan.scan)
    (one,) = scan.scan(c, RUN, shapes="2x20x8")["scans"]
    assert one["shape"] == [2, 20, 8] and "ours, plain torch" not in one["contestants"]
    assert {*one["contestants"], *one["skipped"], *scan.GPU_ONLY} == set(scan.CONTESTANTS)
    for name, row in one["contestants"].items():
        assert row["wrong_spikes"] < 1e-3 and row["median_ms"] > 0
        assert f"\n{name} " in capsys.readouterr().out or name != "ours"


@pytest.mark.parametrize("change", [{"scale": 2.0}, {"delayed_reset": True}])
def test_who_fires_otherwise_is_not_timed(change):
    contestant = scan.CONTESTANTS["plain autograd, unbind"]
    forward, _ = contestant.build(8, RUN.device)
    torch.manual_seed(0)
    current = torch.randn(2, 30, 8) * 0.5 + 0.15
    row = check_spikes("plain", contestant, forward, current)
    assert row["wrong_spikes"] == 0 and 0.1 < row["firing_rate"] < 0.3
    with pytest.raises(AssertionError, match="plain: .* of the spikes are not ours"):
        check_spikes("plain", contestant._replace(**change), forward, current)
    with pytest.raises(AssertionError, match="plain: a firing rate of 0.0% is no test"):
        check_spikes("plain", contestant, forward, current * 0)


def test_train_compares_tokens_per_second(monkeypatch, tmp_path):
    monkeypatch.setattr(
        training, "take_turns", lambda runs, *_: {x: [2.0 if x == "ours" else 0.5] for x in runs}
    )
    gpt = tmp_path / "gpt.py"
    gpt.write_text("block = 'gpt'\nn_hidden = n_embd = 16\nn_layer = 1\n")
    argv = "configs/sam_6m.py --n_hidden=16 --n_embd=16 --n_layer=1 --vocab_size=50"
    c = load(f"{argv} --micro_tokens=32 --tokens_per_step=64")
    result = training.train(c, RUN, length=8, against=str(gpt))
    ours, gpt = (result["contestants"][name] for name in ("ours", "transformer"))
    assert result["batch"] == [4, 8]
    assert ours["tokens_per_s"] == 16 and gpt["tokens_per_s"] == 64 and gpt["ratio"] == 0.25
    assert ours["parameters"] == bench.parameters_of(c) != gpt["parameters"]

    used, step = [], training.one_step
    monkeypatch.setattr(training, "one_step", lambda *a: (used.append(a[4].optimizer), step(*a)))
    monkeypatch.setattr(torch, "compile", lambda model: model)
    result = training.train(
        replace(c, compile=True, optimizer="muon"), RUN, length=8, against=str(tmp_path / "gpt.py")
    )
    both = {f"{name}{way}" for name in ("ours", "transformer") for way in ("", ", compiled")}
    assert both <= result["contestants"].keys() and {*used} == {"muon"}
    against = str(tmp_path / "gpt.py")
    with_traits = training.train(replace(c, traits="hrm:1"), RUN, length=8, against=against)
    assert not any("snnTorch" in x for x in [*with_traits["contestants"], *with_traits["skipped"]])


def test_where_the_time_of_a_step_goes(monkeypatch):
    x = torch.randn(400, 400)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # on which nothing runs

    def step():
        for _ in range(20):
            x @ x
        x.exp()

    shares = training.operations("ours", step, most=1)
    assert [*shares] == ["mm", "all others"] and sum(shares.values()) == pytest.approx(1)
    assert shares["mm"] > 0.5


def test_frames_finds_half_of_them(monkeypatch):
    monkeypatch.setattr(
        frames, "take_turns", lambda runs, *_: {x: [1.0 if x == "ours" else 4.0] for x in runs}
    )
    argv = "configs/neuronspark_6m.py --n_hidden=16 --n_embd=16 --n_layer=1 --d_ff=16 --k_max=8"
    argv += " --n_state=2 --vocab_size=50 --micro_tokens=32 --tokens_per_step=64"
    rows = frames.frames(load(argv), RUN, length=8)["contestants"]
    assert rows["ours"]["E[K]"] == pytest.approx(4, abs=0.2) and rows["ours"]["ratio"] == 0.25
    assert rows["ours"]["E[K]"] <= rows["ours"]["frames"] < 8
    assert rows["ours"]["macs"] < rows[frames.FIXED]["macs"]


# ---- ablate ------------------------------------------------------------------------------------


def test_a_complete_run_is_not_repeated(monkeypatch, tmp_path):
    c = load(f"configs/snn_6m.py --max_steps=7 --out_dir={tmp_path}")
    (tmp_path / "log.jsonl").write_text('{"step": 0}\n{"step": 7}\n')
    seen = []

    def saved(path):
        seen.append(path.name)
        return {"config": asdict(c) | {"out_dir": "elsewhere", "threads": 9}}

    monkeypatch.setattr(ablate, "load_checkpoint", saved)
    assert ablate.log_of(c) == [{"step": 0}, {"step": 7}] and seen == ["step_00000007.pt"]
    assert (
        ablate.log_of(replace(c, seed=c.seed + 1)) == []
    )  # another run than the one that is there
    monkeypatch.undo()
    assert ablate.log_of(c) == []  # no checkpoint: not complete


def test_narrowed_is_the_widest_that_fits():
    c = load("configs/sam_6m.py --vocab_size=50")
    most = bench.parameters_of(replace(c, n_hidden=96))
    assert ablate.narrowed(c, most).n_hidden == 96 and ablate.narrowed(c, most - 1).n_hidden == 88
    with pytest.raises(ValueError, match="no n_hidden"):
        ablate.narrowed(c, 1000)


@pytest.mark.parametrize(
    "argv, width, variants",
    [
        (
            "configs/snn_6m.py --n_embd=320 --n_hidden=320 --n_layer=1 --n_head=4",
            "d_ff",
            ablate.SNN,
        ),
        ("configs/spikewhale_6m.py --n_hidden=128", "n_hidden", ("bare", "memory")),
    ],
)
def test_ablations_change_one_ingredient_at_no_more_parameters(
    argv, width, variants, monkeypatch, tmp_path
):
    trained = {}
    line = dict(bpb=0.75, heldout=2.0, rate=[0.1, 0.3], synops=1.0, synapses=4, tokens_per_s=5.0)

    def log(name):
        if name not in trained:
            return []
        return [line, line | {"bpb": 1.0}] if name.startswith("bare") else [line, line]

    monkeypatch.setattr(
        ablate.trainer, "train", lambda s, run: trained.update({Path(s.out_dir).name: s})
    )
    monkeypatch.setattr(ablate, "log_of", lambda s: log(Path(s.out_dir).name))
    c = load(f"{argv} --vocab_size=256 --out_dir={tmp_path}")
    rows = ablate.ablate(c, RUN, variants=" ".join(variants), seeds=1)["variants"]
    assert list(rows) == list(variants) and len(trained) == len(rows)
    bare = trained[f"bare {c.seed}"]
    for name, settings in trained.items():
        overrides = rows[name.removesuffix(f" {c.seed}")]["overrides"]
        others = {"out_dir": bare.out_dir, width: getattr(bare, width)}
        assert replace(settings, **others) == replace(bare, **overrides)
    assert max(row["parameters"] for row in rows.values()) <= bench.parameters_of(bare)
    assert rows["bare"]["triggered"] == [0.25] and rows["bare"]["rate"] == [0.2]
    gains = {name: row["gain"] for name, row in rows.items()}  # bits per byte that it saves
    assert gains == {name: 0.25 * (name != "bare") for name in rows}


def test_an_ablation_trains(monkeypatch, tmp_path, capsys):
    """The runs themselves; what is complete is not trained again."""
    text = tmp_path / "text.txt"
    text.write_text("\n<|endoftext|>\n".join(f"The cat sat on mat {i}." for i in range(300)))
    argv = f"configs/snn_6m.py --dataset={text} --data_dir={tmp_path} --out_dir={tmp_path}/out"
    argv += " --tokenizer=byte --vocab_size=257 --n_embd=16 --n_hidden=16 --d_ff=24 --n_layer=1"
    argv += " --n_head=2 --keys=4 --phases=stories:16 --max_steps=1 --eval_interval=1 --threads=1"
    argv += " --tokens_per_step=16 --micro_tokens=16 --sample_tokens=0"
    c = load(argv)
    rows = ablate.ablate(c, RUN, variants="bare", seeds=1)["variants"]
    assert 0 < rows["bare"]["mean_bpb"] < 9 and rows["bare"]["gain"] == 0
    assert (tmp_path / "out" / "ablate" / f"bare {c.seed}" / "log.jsonl").exists()
    monkeypatch.setattr(ablate.trainer, "train", lambda *_: pytest.fail("trained again"))
    assert ablate.ablate(c, RUN, variants="bare", seeds=1)["variants"] == rows


# ---- the command line --------------------------------------------------------------------------


def test_results_are_written_when_asked_for(tmp_path, monkeypatch, capsys):
    sam = str(Path("configs/sam_v1_char.py").resolve())
    monkeypatch.chdir(tmp_path)
    bench.main(["params", sam, "--threads", "1", "--device", "cpu"])
    assert list(tmp_path.iterdir()) == []  # nothing, unless asked
    argv = ["params", sam, "--save", "--device", "cpu", "--out_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "bench.py"), *argv])
    bench.main(argv)
    text = Path("results", "params_sam_v1_char_cpu.json").read_text()
    result = json.loads(text)
    assert result["config"]["n_layer"] == 2 and result["parameters"] > 0
    assert result["command"].startswith("python bench.py params sam_v1_char.py --save --device cpu")
    assert str(tmp_path) not in text and str(Path(sam).parent) not in text  # nobody's folders
    capsys.readouterr()

    Path("results", "params_cpu.json").mkdir()
    monkeypatch.setattr(params, "params", lambda *_: pytest.fail("measured before"))
    with pytest.raises(SystemExit):
        bench.main(["params", "--save", "--device=cpu"])
    err = capsys.readouterr().err
    assert "cannot write results/params_cpu.json" in err and err.count("\n") == 1


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt, 130), (BrokenPipeError, 141)])
def test_ctrl_c_and_a_closed_pipe_end_without_a_word(error, code, monkeypatch, capsys):
    def fail(c, run):
        raise error

    monkeypatch.setattr(config.os, "dup2", lambda *_: None)  # the test's own stdout stays
    monkeypatch.setattr(params, "params", fail)
    with pytest.raises(SystemExit) as stopped:
        bench.main(["params", "--device=cpu"])
    assert stopped.value.code == code and capsys.readouterr() == ("", "")


def test_help(capsys):
    bench.main(["--help"])
    assert capsys.readouterr().out.strip() == bench.__doc__.strip()
