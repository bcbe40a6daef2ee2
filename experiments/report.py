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

from .pictures import COLOURS, curves, sheet

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

RUNS = [  # label, file
    ("Real Sam, AdamW", "tinystories_sam_6m"),
    ("NeuronSpark, AdamW", "tinystories_neuronspark_6m"),
    ("transformer, AdamW", "tinystories_gpt_6m"),
    ("snn, Muon", "tinystories_snn_6m"),
    ("transformer, Muon", "tinystories_gpt_6m_muon"),
]


def save(figure, path):
    """A small PNG: a palette in place of all the shades of the letters' edges."""
    from PIL import Image  # matplotlib depends on it

    image = io.BytesIO()
    figure.savefig(image, dpi=120)
    Image.open(image).convert("RGB").quantize(64).save(path, optimize=True)


def loss(path):
    """Held-out bits per byte against tokens: the runs on TinyStories, and the default run."""
    figure, (stories, nursery) = sheet(2, (3.5, 4))
    logs = [(label, source(f"{file}/log")) for label, file in RUNS]
    curves(stories, "TinyStories, 6M parameters", logs)
    curves(nursery, "Nursery: the default run", [("Real Sam, AdamW", source("nursery_sam_6m/log"))])
    entropy = source("nursery_sam_6m/log/-1/entropy_bpb")
    nursery.axhline(entropy, color="black", linestyle="--", label="true entropy")
    nursery.legend(fontsize=8)
    nursery.set_yscale("log")
    nursery.set_yticks([0.2, 0.5, 1, 2, 5, 10], "0.2 0.5 1 2 5 10".split(), minor=False)
    save(figure, path)


def synops(path):
    """Bits per byte against the share of synaptic operations, beside two models without spikes."""
    figure, (axes,) = sheet()
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
    figure, (training, generating) = sheet(2, (3.5, 4))
    half, full = (source(f"train_sam_6m_cpu{more}/contestants") for more in ("", "_float32"))
    bars(training, half, "tokens_per_s", ",.0f", -0.2, 0.4, label="bfloat16", color=COLOURS[0])
    bars(training, full, "tokens_per_s", ",.0f", 0.2, 0.4, label="float32", color=COLOURS[1])
    training.set(title="Training Real Sam, 6M parameters", ylabel="tokens/s (more is better)")
    training.legend(fontsize=8)
    peers = source("generate_snn_1b_cpu_compiled/contestants")
    peers = {"ours, bfloat16" if name == "ours" else name: peers[name] for name in peers}
    bars(generating, peers, "late_ms_per_token", ".1f", color=COLOURS)
    generating.set(title="Generating, snn of 1B parameters", ylabel="ms/token (less is better)")
    save(figure, path)


# ---- the command -------------------------------------------------------------------------------

PICTURES = {"loss": loss, "synops": synops, "speed": speed}


def write():
    """Write RESULTS.md and, with matplotlib, the pictures in assets/."""
    Path("RESULTS.md").write_text(results())
    Path("assets").mkdir(exist_ok=True)
    try:
        for name, draw in PICTURES.items():
            draw(f"assets/{name}.png")
    except ImportError as error:
        print(f"assets/ stays as it is: {error}", file=sys.stderr)
