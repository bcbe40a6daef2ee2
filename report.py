"""RESULTS.md and the pictures: `python bench.py report` makes both from the files in results/.

No number is typed. results/template.md is Markdown with five rules:

- `|= parameters | bpb | log/-1/minutes:.0f = minutes` names the columns of a table.
- `|: transformer | tinystories_gpt_6m_muon` is a row: its label, then its source FILE/KEY/KEY/...,
  or several sources joined by " & ".
- A column is a name in COLUMNS or PATH:FORMAT, then optionally " = head". "2." in front takes the
  row's second source; the cell is empty if there is none.
- `{SOURCE | COLUMN}` in a sentence is a value.
- A line that begins with % is left out.

In a path a number counts through a list, from the end if negative; a word picks the last log line
of that phase; "key?" may be missing. FORMAT is Python's, or M for millions and billions.
"""

import io
import json
import re
import statistics
import sys
from pathlib import Path

import torch

from cell_bridge import DRAWS, PROGRAMS
from checkpoint import build
from model import ModelConfig, SpikingLM

# ---- tables ------------------------------------------------------------------------------------


def source(path):
    """The value at FILE/KEY/KEY/...; ValueError names the file and the keys that it lacks."""
    file, *keys = path.strip().split("/")
    try:
        value = json.loads(Path(f"results/{file}.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"results/{file}.json is missing: measure it, or drop the row") from None
    except ValueError as error:
        raise ValueError(f"results/{file}.json is no JSON: {error}") from None
    for i, key in enumerate(keys):
        try:
            if isinstance(value, list) and key.lstrip("-").isdigit():
                value = value[int(key)]
            elif isinstance(value, list):
                value = [line for line in value if line["phase"] == key][-1]
            else:
                value = value.get(key[:-1]) if key.endswith("?") else value[key]
        except (LookupError, TypeError, AttributeError):
            keys = "/".join(keys[: i + 1])
            raise ValueError(f"results/{file}.json has no key {keys}") from None
    return value


def share(path):
    """Triggered synaptic operations of those that there would be if all neurons fired."""
    synapses = source(f"{path}/log/-1/synapses")
    return source(f"{path}/log/-1/synops") / synapses if synapses else None


def speed_of(path):
    """Tokens per second: the median over a run; its first log line has none."""
    return statistics.median(filter(None, (x["tokens_per_s"] for x in source(f"{path}/log"))))


def above(path, other):  # the only column with two sources
    return source(f"{path}/log/-1/bpb") / source(f"{other}/log/-1/bpb") - 1


COLUMNS = {  # name -> head, path or function of a source, format
    "parameters": ("parameters", "parameters", "M"),
    "tokens": ("tokens", "log/-1/tokens", "M"),
    "train": ("training, nats/token", "log/-1/train", ".3f"),
    "heldout": ("held out, nats/token", "log/-1/heldout", ".3f"),
    "bpb": ("held out, bits/byte", "log/-1/bpb", ".3f"),
    "share": ("share of SynOps", share, ".0%"),
    "speed": ("tokens/s", speed_of, ",.0f"),
    "firing": ("firing rate", lambda p: statistics.mean(source(f"{p}/log/-1/rate")), ".1%"),
    "change": ("difference to the first row", lambda p: -source(f"{p}/gain"), "+.3f"),
    "triggered": ("share of SynOps", lambda p: source(f"{p}/triggered/0") or None, ".0%"),
    "time": ("ms", lambda p: "{median_ms:.1f} ({ratio:.1f})".format(**source(p)), ""),
    "above": ("", above, ".1%"),
}


def parse(column):
    """(which source, head, path or function, format) of a column as the template writes it."""
    column, _, head = (part.strip() for part in column.partition(" = "))
    number, name = re.fullmatch(r"(?:(\d)\.)?(.*)", column).groups()
    if name not in COLUMNS and ":" not in name:
        names = ", ".join(COLUMNS)
        raise ValueError(f"column {name!r} is neither PATH:FORMAT nor one of {names}")
    usual, value, form = COLUMNS.get(name) or (name, *name.rsplit(":", 1))
    return int(number or 1), head or usual, value, form


def cell(paths, column):
    """The text of a value; empty where the row has no such source or the value is None."""
    number, _, value, form = parse(column)
    if number > len(paths):
        return ""
    given = paths if value is above else [paths[number - 1]]
    found = source(f"{given[0]}/{value}") if isinstance(value, str) else value(*given)
    if found is None or isinstance(found, str):
        return found or ""
    if form == "M":
        return f"{found / 1e9:.2f}B" if found >= 1e9 else f"{found / 1e6:.2f}M"
    text = format(found, form)
    return text[1:] if re.fullmatch(r"[-+]0\.0*%?", text) else text


def rendered(line, columns):
    """A line of the template that names no columns, as RESULTS.md has it."""
    if not line.startswith("|:"):
        value = r"\{([^|{}]+) \| ([^{}]+)\}"
        return re.sub(value, lambda m: cell(m[1].split(" & "), m[2]), line)
    label, _, paths = line[2:].strip().rpartition(" | ")
    if not columns or not label:
        raise ValueError("a row is |: LABEL | SOURCE, below a line |= COLUMN | COLUMN")
    return f"| {label} | " + " | ".join(cell(paths.split(" & "), c) for c in columns) + " |"


def results():
    """The text of RESULTS.md; ValueError names the template's line, the file and the key."""
    lines, columns = [], []
    for n, line in enumerate(Path("results/template.md").read_text().split("\n"), 1):
        try:
            if line.startswith("|="):
                columns = line[2:].split(" | ")
                heads = [parse(column)[1] for column in columns]
                lines += ["| | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
            elif not line.startswith("%"):
                columns = columns if line.startswith("|:") else []
                lines.append(rendered(line, columns))
        except (ValueError, TypeError, KeyError) as error:
            row = line.split(" | ")[0][:60]
            raise ValueError(f"results/template.md, line {n}, {row!r}: {error}") from None
    for path in sorted(Path("results").glob("*.json")):
        r = {key: source(f"{path.stem}/{key}") for key in ("date", "commit", "command")}
        lines.append(f"- `{path.stem}`, {r['date'][:10]}, {r['commit'][:7]}: `{r['command']}`")
    return "\n".join(lines) + "\n"


# ---- pictures ----------------------------------------------------------------------------------

COLOURS = ["#0072b2", "#56b4e9", "#d55e00", "#777777"]
# label, file, colour, marker with line: told apart in grey too
RUNS = [
    ("Real Sam, AdamW", "tinystories_sam_6m", "#d55e00", "o-"),
    ("NeuronSpark, AdamW", "tinystories_neuronspark_6m", "#56b4e9", "s-"),
    ("transformer, AdamW", "tinystories_gpt_6m", "#777777", "^--"),
    ("snn, Muon", "tinystories_snn_6m", "#0072b2", "D-."),
    ("transformer, Muon", "tinystories_gpt_6m_muon", "#000000", "v:"),
]


def page(panels=1, size=(7, 4), **options):
    """A figure and its axes. matplotlib is optional: only who draws needs it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False, **options)[0]


def save(figure, path):
    """A small PNG: a palette in place of all the shades of the letters' edges."""
    from PIL import Image  # matplotlib depends on it

    image = io.BytesIO()
    figure.savefig(image, dpi=120)
    Image.open(image).convert("RGB").quantize(64).save(path, optimize=True)


def curve(axes, label, file, colour, line):
    log = [(x["tokens"] / 1e6, x["bpb"]) for x in source(f"{file}/log") if x["tokens"]]
    axes.plot(*zip(*log), line, color=colour, label=label, markersize=4)


def loss(path):
    """Held-out bits per byte against tokens: the runs on TinyStories, and the default run."""
    figure, (stories, nursery) = page(2)
    for run in RUNS:
        curve(stories, *run)
    stories.set(title="TinyStories, 6M parameters")
    curve(nursery, "Real Sam, AdamW", "nursery_sam_6m", COLOURS[2], "-")
    entropy = source("nursery_sam_6m/log/-1/entropy_bpb")
    nursery.axhline(entropy, color="black", linestyle="--", label="true entropy")
    nursery.set(title="Nursery: the default run", yscale="log")
    nursery.set_yticks([0.2, 0.5, 1, 2, 5, 10], "0.2 0.5 1 2 5 10".split(), minor=False)
    for axes in (stories, nursery):
        axes.set(xlabel="training tokens, millions", ylabel="held-out text, bits/byte")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save(figure, path)


def synops(path):
    """Bits per byte against the share of synaptic operations, beside two models without spikes."""
    figure, (axes,) = page()
    files = [f"curve_snn_{target}" for target in (0.05, 0.1, 0.2, 0.33)]
    x, y = [100 * share(f) for f in files], [source(f"{f}/log/-1/bpb") for f in files]
    axes.plot(x, y, "o-", color=COLOURS[0], label="snn: spikes")
    bpb = source("curve_gpt/log/-1/bpb"), source("curve_snn_twin/log/-1/bpb")
    axes.axhline(bpb[0], color="black", linestyle=":", label="transformer")
    axes.axhline(bpb[1], color=COLOURS[2], linestyle="--", label="float control of snn")
    size = cell(["curve_snn_0.1"], "parameters")
    axes.set(title=f"TinyStories, {size} parameters: what sparsity costs", xlim=(0, None))
    axes.set(xlabel="synaptic operations triggered, % of all", ylabel="held-out text, bits/byte")
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)


def bars(axes, contestants, key, form, shift=0.0, width=0.8, **options):
    """A bar for each contestant, with its number above and its name below."""
    heights = [contestant[key] for contestant in contestants.values()]
    drawn = axes.bar([i + shift for i in range(len(heights))], heights, width, **options)
    axes.bar_label(drawn, [format(height, form) for height in heights], fontsize=7)
    names = [name.replace(", ", ",\n") for name in contestants]
    axes.set_xticks(range(len(names)), names, fontsize=8)


def speed(path):
    """Training and generation beside the peers that were measured in the same process."""
    figure, (training, generating) = page(2)
    half, full = (source(f"train_sam_6m_cpu{more}/contestants") for more in ("", "_float32"))
    bars(training, half, "tokens_per_s", ",.0f", -0.2, 0.4, label="bfloat16", color=COLOURS[0])
    bars(training, full, "tokens_per_s", ",.0f", 0.2, 0.4, label="float32", color=COLOURS[1])
    training.set(title="Training Real Sam, 6M parameters", ylabel="tokens/s (more is better)")
    training.legend(fontsize=8)
    peers = source("generate_snn_1b_cpu/contestants")
    peers = {"ours, bfloat16" if name == "ours" else name: peers[name] for name in peers}
    bars(generating, peers, "late_ms_per_token", ".1f", color=COLOURS)
    generating.set(title="Generating, snn of 1B parameters", ylabel="ms/token (less is better)")
    save(figure, path)


def raster(path, text="Once upon a time there was a cat that lived in a small red house.", seed=1):
    """The spikes of a shrunk Real Sam with random weights that reads a text byte by byte."""
    torch.manual_seed(seed)
    model = SpikingLM(ModelConfig(vocab_size=256, n_embd=32, n_hidden=40, n_layer=3)).eval()
    fired = []  # per block (T, N): a neuron that fires adds to the stream
    for block in model.blocks:
        block.register_forward_hook(lambda _, given, y: fired.append((y[0] != given[0])[0]))
    with torch.no_grad():
        model(torch.tensor([list(text.encode())]))
    figure, (axes,) = page()
    for i, (spikes, marker) in enumerate(zip(fired, "osd")):
        t, neuron = spikes.nonzero(as_tuple=True)
        label = f"layer {i + 1}: {spikes.float().mean():.0%} fire"
        axes.scatter(t, neuron + 40 * i, 9, COLOURS[i], marker=marker, label=label)
    axes.set(title="Spikes of a shrunk Real Sam with random weights", xlim=(-1, len(text)))
    axes.set(xlabel="time: one byte of the text per step", ylabel="neuron")
    axes.set_xticks(range(len(text)), text, fontsize=7)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    save(figure, path)


def neurons(path, name, checkpoint):
    """Every neuron of every layer as a dot: its colour is the gene program that it follows most,
    its area the norm of the recurrent weights that it sends out."""
    blocks = build(checkpoint).blocks
    figure, panels = page(len(blocks), (5 * len(blocks), 5.6))
    if not all(getattr(block, "modulation", None) for block in blocks):
        raise ValueError(f"the neurons of {name} have no gene programs: train with block='whale'")
    for i, (block, axes) in enumerate(zip(blocks, panels)):
        P = block.modulation.P
        program = P.view(len(P), DRAWS, len(PROGRAMS)).mean(1).argmax(1)  # (N,)
        order = program.argsort(stable=True)
        weight = block.w_rec.detach().norm(dim=1) if block.w_rec is not None else torch.ones(len(P))
        n = torch.arange(len(P))  # a sunflower: seed n at sqrt(n), one golden angle further
        x, y = n.sqrt() * torch.cos(2.39996 * n), n.sqrt() * torch.sin(2.39996 * n)
        area = 3e4 / len(P) * (weight / weight.max()).square()[order]
        for k, name in enumerate(PROGRAMS):
            own = program[order] == k
            label = f"{name.replace('_', ' ')} ({int(own.sum())})"
            axes.scatter(x[own], y[own], area[own], f"C{k}", label=label, linewidths=0)
        axes.set(title=f"layer {i + 1}: {len(P)} neurons", aspect="equal")
        axes.axis("off")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, fontsize=8)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    print(f"wrote {path}")


# ---- the command -------------------------------------------------------------------------------

PICTURES = {"loss": loss, "synops": synops, "speed": speed, "raster": raster}


def write():
    """Write RESULTS.md and, with matplotlib, the pictures in assets/."""
    Path("RESULTS.md").write_text(results())
    Path("assets").mkdir(exist_ok=True)
    try:
        for name, draw in PICTURES.items():
            draw(f"assets/{name}.png")
    except ImportError:
        print("assets/ stays as it is: pictures need pip install matplotlib", file=sys.stderr)
