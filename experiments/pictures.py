"""Pictures of runs and of what neurons do; report.py draws those of RESULTS.md with them.

python sample.py --ckpt=out/sam_6m --picture=raster.png
python sample.py --picture=loss.png --run="out/sam_6m out/gpt_6m"

matplotlib is optional: only who draws a picture needs it.
"""

import math
from pathlib import Path

import torch

from cell_bridge import PROGRAMS
from watch import printable, runs, watched

COLOURS = ["#0072b2", "#d55e00", "#56b4e9", "#777777", "#000000", "#e69f00"]
LINES, MARKERS = ["-", "--", "-.", ":"], "os^Dv"  # told apart in grey too


def sheet(panels=1, size=(7, 4), columns=3, **options):
    """A figure and its axes, each of this size in inches, in rows of at most `columns`."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from None
    columns, rows = min(columns, panels), -(-panels // columns)
    figure = Figure(figsize=(columns * size[0], rows * size[1]), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options).flatten()
    for empty in axes[panels:]:
        empty.axis("off")
    return figure, axes[:panels]


def raster(title, watcher, events):
    """Tokens by neurons, and the membranes of the three neurons that fire closest to 30%."""
    figure, (above, below) = sheet(2, (9, 3.5), 1, sharex=True, height_ratios=(2, 1))
    start, lively = 0, []
    for i, layer in enumerate(watcher.layers):
        fired = torch.zeros(len(events), len(layer.shown))
        for t, event in enumerate(events):
            fired[t, event["fired"][i]] = 1
        t, row = fired.nonzero(as_tuple=True)
        look = {"color": f"C{i % 10}", "marker": MARKERS[i % 5], "linewidths": 0}
        label = f"layer {layer.name}: {fired.mean():.0%} fire"
        above.scatter(t, start + row, 5, label=label, **look)
        if layer.theta is not None:
            lively += [(abs(r - 0.3), i, n) for n, r in enumerate(fired.mean(0).tolist())]
        start += len(layer.shown)
    for k, (_, i, row) in enumerate(sorted(lively)[:3]):
        layer, v = watcher.layers[i], [event["membrane"][i][row] for event in events]
        n = layer.shown[row]
        below.plot(v, LINES[k], color=COLOURS[k], lw=1, label=f"layer {layer.name}, neuron {n}")
        below.axhline(layer.theta[n].item(), linestyle=":", color=COLOURS[k], lw=1)
    below.plot([], [], "k:", label="threshold")
    above.set(title=f"Spikes of {title}", ylabel="neuron", xlim=(-1, len(events)))
    below.set(title="Membranes before the reset", ylabel="membrane", xlabel="token (a time step)")
    words = [printable(event["text"]).replace("$", r"\$") for event in events]
    below.set_xticks(range(len(words)), words, fontsize=6, rotation=90)
    below.legend(fontsize=7, ncols=4)
    figure.legend(*above.get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    return figure


def neurons(axes, layer, rate):
    """Every neuron a dot: its area is the weight that it sends out, its colour the gene program
    that it follows or, where there are none, its firing rate."""
    n = torch.arange(N := len(rate))  # a sunflower: seed n one golden angle further
    x, y = n.sqrt() * torch.cos(2.39996 * n), n.sqrt() * torch.sin(2.39996 * n)
    area = (2e4 / N * (layer.out / layer.out.max()).square())[layer.order]
    if layer.program is None:
        dots = axes.scatter(x, y, area, rate, cmap="cividis_r")
        axes.figure.colorbar(dots, ax=axes, label="firing rate, spikes per token", shrink=0.7)
    for k, name in enumerate(PROGRAMS if layer.program is not None else ()):
        own = layer.program[layer.order] == k
        label = f"{name.replace('_', ' ')} ({int(own.sum())})"
        marker = "o^sDvP"[k]  # told apart in grey, too
        axes.scatter(x[own], y[own], area[own], f"C{k}", marker=marker, label=label, lw=0)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, fontsize=7)
    axes.set(title=f"layer {layer.name}: {N} neurons", aspect="equal", xticks=[], yticks=[])


def rates(axes, layer, rate):
    """How often neurons fire: dead and saturated ones stand out."""
    axes.hist(rate, [k / 20 for k in range(21)], color=COLOURS[2], ec="white", log=True)
    for x, marker, word in ((0, "ko", "never"), (1, "kv", "always")):
        count = int((rate == x).sum())
        axes.plot([x], [count or math.nan], marker, label=f"{count} {word} fire")
    mean = rate.mean().item()
    axes.axvline(mean, color=COLOURS[1], linestyle="--", label=f"mean {mean:.1%}")
    axes.set(title=f"layer {layer.name}", xlabel="spikes per token", ylabel="neurons")
    axes.legend(fontsize=7)


def curves(axes, title, logs, key="tokens"):
    """Held-out bits per byte of [(label, log.jsonl's lines)] against training tokens or minutes."""
    unit, words = {"tokens": (1e6, "tokens, millions"), "minutes": (1, "minutes")}[key]
    for k, (label, log) in enumerate(logs):
        log = [line for line in log if line["tokens"]]  # untrained it would dwarf the rest
        x, y = [line[key] / unit for line in log], [line["bpb"] for line in log]
        look = LINES[k % 4] + MARKERS[k % 5]
        axes.plot(x, y, look, color=COLOURS[k % 6], label=label, markersize=3)
    axes.set(title=title, xlabel=f"training {words}", ylabel="held-out text, bits/byte")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def loss(folders):
    """The curves of runs."""
    logs = [(run["name"], run["log"]) for run in runs(folders)]
    if not any(log for _, log in logs):
        raise ValueError("loss.png needs --run=FOLDER of a run of train.py, with a log.jsonl")
    figure, panels = sheet(2, (5, 4), sharey=True)
    for axes, key in zip(panels, ("tokens", "minutes")):
        curves(axes, f"Loss against {key}", logs, key)
    return figure


PICTURES = {"raster": raster, "neurons": neurons, "rates": rates}
TITLES = {"neurons": "Neurons of {}. Area of a dot: norm of its outgoing weights"}
TITLES["rates"] = "Firing rates of {}"


def picture(path, speaker, name, c):
    """Draw what the file is named after, while the model goes on from --prompt."""
    (watcher, events), kind = watched(speaker, name, c), Path(path).stem
    events = list(events)
    if kind == "raster":
        return raster(name, watcher, events).savefig(path, dpi=120)
    figure, panels = sheet(len(watcher.layers), (4.4, 4.2 if kind == "neurons" else 2.8))
    for layer, axes in zip(watcher.layers, panels):
        PICTURES[kind](axes, layer, layer.total / watcher.seen)
    figure.suptitle(TITLES[kind].format(name) + f"; {watcher.seen} tokens", fontsize=9)
    figure.savefig(path, dpi=120)
