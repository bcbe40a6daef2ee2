"""The virtual cell and its bridge: gene programs of a cell set how excitable each neuron is.

    gene embedding -> virtual cell -> program scores -> P -> Modulation -> theta, beta, gain

    python cell_bridge.py                          train on the embedded synthetic screen
    python cell_bridge.py --data=pseudobulk.npz    arrays: the fields of Screen
    python cell_bridge.py --data=cells.h5ad --embedding=esm2.npz     experiments/esm2.py makes one

The virtual cell predicts how expression changes when a gene is knocked down. Two controls (no
modulation, P shuffled) test whether real genes matter to a network; nothing here is a claim about
biology. Made for the Virtual Cell Challenge (H1 cells, CRISPRi), whose organisers report that
models do not consistently beat simple baselines, and for ESM2-650M embeddings of proteins.
Shapes: G genes read out, n perturbed genes (the pool), N neurons.
"""

import functools
import json
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: no traceback, not even of an import

from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

import config

# Human symbols (HGNC). cell_division: half of the S and half of the G2/M list of Tirosh et al. 2016
# (Science 352:189). From public sets (MSigDB, CC BY 4.0): endocrine: Reactome peptide and steroid
# hormones; metabolism: WikiPathways glycolysis, TCA cycle, cholesterol; signaling_identity:
# WikiPathways MAPK, Wnt, TGF-beta, Hallmark IL6-JAK-STAT3; pluripotency: Reactome. Some of these
# two, and all of neuron_identity, are textbook markers.
PROGRAMS = dict(
    cell_division="""MCM5 PCNA TYMS FEN1 MCM2 MCM4 RRM1 UNG GINS2 MCM6 CDCA7 DTL PRIM1 UHRF1
       CENPU HELLS RFC2 RPA2 CDK1 NUSAP1 UBE2C BIRC5 TPX2 TOP2A NDC80 CKS2 NUF2 CKS1B MKI67 TMPO
       CENPF TACC3 PIMREG SMC4 CCNB2 CKAP2L""".split(),
    neuron_identity="""MAP2 RBFOX3 SYN1 TUBB3 NEFL NEFM NEFH STMN2 SNAP25 SYT1 SYP GAP43 DCX
       ELAVL2 ELAVL3 ELAVL4 MAPT ENO2 UCHL1 INA RTN1 NCAM1 L1CAM THY1""".split(),
    pluripotency="""POU5F1 NANOG SOX2 KLF4 LIN28A LIN28B DPPA4 DPPA2 DNMT3B ZFP42 TDGF1 GDF3
       LEFTY1 LEFTY2 SALL4 PRDM14 ZIC3 L1TD1 UTF1 TERT FOXD3 ESRRB""".split(),
    endocrine="""INS GCG SST PPY GHRL POMC GH1 PRL TSHB CGA LHB FSHB GNRH1 CRH TRH OXT AVP PTH
       CALCA TG CHGA CHGB SCG2 PCSK1 CYP11A1 CYP17A1 CYP19A1 CYP21A2 HSD3B2 STAR""".split(),
    metabolism="""HK1 HK2 GPI PFKP PFKM ALDOC PGK1 PGAM1 ENO1 PKM CS ACO2 IDH2 IDH3A OGDH SUCLG1
       SDHA SDHB FH MDH2 HMGCS1 HMGCR MVD FDPS FDFT1 SQLE LSS CYP51A1 DHCR7 DHCR24""".split(),
    signaling_identity="""EGFR FGFR1 PDGFRB GRB2 SOS1 HRAS KRAS NRAS BRAF RAF1 MAP2K1 MAPK1 DUSP4
       DUSP6 FOS WNT3 WNT5A FZD7 LRP6 DVL1 APC GSK3B CTNNB1 TCF7L2 LEF1 TGFB1 TGFBR1 TGFBR2 SMAD2
       SMAD3 SMAD4 SMAD7 STAT1 STAT3 SOCS3""".split(),
)
MARKERS = [gene for symbols in PROGRAMS.values() for gene in symbols]  # 177, none in two programs
VARIABLE = 2000  # further genes that are read out: G = 2177
EMBEDDING = 1280  # width of a gene's embedding
DRAWS = 3  # genes per neuron: each of ~150 genes repeats among N neurons, a triple hardly ever
HOLDOUT = 0.2  # share of the perturbed genes that only validate
FOLDS = 4  # of the cross-validation on the other genes, which chooses the number of steps
MOST_STEPS = 150  # that it may choose; each step is on all training genes
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.1  # of AdamW


@dataclass(frozen=True)
class CellConfig:
    # files
    data: str = ""  # screen to train on, .npz or .h5ad; empty: the embedded synthetic one
    out: str = "out/cell.pt"  # what train.py reads: scores of the pool, the cell, its validation
    result: str = ""  # also write the validation as JSON
    seed: int = 1337  # of split and initialisation
    # cells, .h5ad only
    embedding: str = ""  # .npz with arrays genes (K), embedding (K, 1280)
    column: str = "target_gene"  # of obs: which gene is perturbed in a cell, as A or A+control
    control: str = "non-targeting"  # what stands there for unperturbed cells
    symbols: str = ""  # column of var with the symbols of genes; empty: its index
    layer: str = "X"  # where the raw counts are: X, raw/X or layers/NAME

    def __post_init__(self):
        if self.data and not self.data.endswith((".npz", ".h5ad")):
            raise ValueError(f"data must be a .npz or .h5ad file, got {self.data}")
        if self.data.endswith(".h5ad") != bool(self.embedding):
            raise ValueError("a .h5ad file needs --embedding=FILE.npz, and nothing else does")


# ---- the bridge: what model.py uses ----------------------------------------------------------


def identity(scores, n, seed, shuffle=False):
    """scores (pool, 6) -> P (n, DRAWS * 6) float32, column draw * 6 + program.

    Each draw gives every neuron one gene of the pool at random; columns are z-scored over the
    neurons and clipped to +-3. shuffle permutes each column by itself: a control that keeps each
    program's distribution, but a neuron's programs are then of different genes.
    """
    generator = torch.Generator().manual_seed(seed)
    gene = torch.randint(len(scores), (n, DRAWS), generator=generator)
    P = torch.as_tensor(scores, dtype=torch.float64)[gene].flatten(1)  # (n, DRAWS * 6)
    P = (P - P.mean(0)) / P.std(0, correction=0).clamp(min=1e-9)
    if shuffle:
        P = torch.stack([x[torch.randperm(n, generator=generator)] for x in P.unbind(1)], 1)
    return P.clamp(-3, 3).float()


class Modulation(nn.Module):
    """P (N, DRAWS * 6) -> threshold theta, decay beta, gain of the feed-forward current, each (N,).

    The strengths g are learned. Those of neuron_identity start at: lower threshold, longer memory,
    more drive (sizes unpublished, chosen here), all others at 0. P = 0 leaves neurons alike.
    theta0, beta0, gain0: float or (N,), within LIMITS: a clamped neuron gives no gradient.
    """

    LIMITS = {"theta": (0.25, 3), "beta": (0.5, 0.97), "gain": (0.3, 3)}

    def __init__(self, P, theta0, beta0, gain0=1.0):
        super().__init__()
        self.register_buffer("P", P)
        for (name, (low, high)), base in zip(self.LIMITS.items(), (theta0, beta0, gain0)):
            base = torch.as_tensor(base, dtype=torch.float32)
            if not base.is_meta and not ((base >= low) & (base <= high)).all():
                raise ValueError(f"{name}0 must be in [{low}, {high}], where its modulation stays")
            self.register_buffer(f"{name}0", base)
        start = torch.tensor([name == "neuron_identity" for name in PROGRAMS] * DRAWS) / DRAWS
        self.g_theta = nn.Parameter(-0.1 * start)
        self.g_beta = nn.Parameter(0.2 * start)
        self.g_in = nn.Parameter(0.1 * start)

    def forward(self):
        theta = self.theta0 * torch.exp(self.P @ self.g_theta)
        beta = torch.sigmoid(torch.logit(self.beta0) + self.P @ self.g_beta)
        gain = self.gain0 * torch.exp(self.P @ self.g_in)
        return [x.clamp(*limits) for x, limits in zip((theta, beta, gain), self.LIMITS.values())]


# ---- screens ---------------------------------------------------------------------------------


@dataclass
class Screen:
    """Pseudobulk: mean log expression of the cells in which one gene was perturbed; the arrays of
    an .npz. ValueError, one line, if the data cannot be trained on."""

    genes: list  # G symbols that are read out
    perturbations: list  # n symbols that were perturbed
    control: torch.Tensor  # (G,) mean of unperturbed cells; 0 if profiles are log fold changes
    profiles: torch.Tensor  # (n, G)
    embedding: torch.Tensor  # (n, 1280) of the perturbed genes

    def __post_init__(self):
        self.genes = np.array(self.genes).tolist()
        self.perturbations = np.array(self.perturbations).tolist()
        G, n = len(self.genes), len(self.perturbations)
        for name, *shape in ("control", G), ("profiles", n, G), ("embedding", n, EMBEDDING):
            value = torch.from_numpy(np.array(getattr(self, name), dtype=np.float32))
            if [*value.shape] != shape:
                raise ValueError(f"{name} must have shape {shape}, it has {[*value.shape]}")
            if not value.isfinite().all():
                raise ValueError(f"{name} holds NaN or infinity; leave those genes out")
            setattr(self, name, value)
        if n < 10 or len(set(self.perturbations)) < n or len(set(self.genes)) < G:
            raise ValueError("at least 10 perturbed genes are needed, and no gene listed twice")
        for name, symbols in PROGRAMS.items():
            if set(symbols).isdisjoint(self.genes):
                raise ValueError(f"unknown genes: none is of {name}; give HGNC symbols (--symbols)")
        self.delta = self.profiles - self.control  # (n, G)
        self.member = membership(self.genes)


def membership(genes):
    """(G, 6) whose column p averages over the genes of program p: delta @ it = program scores."""
    member = torch.tensor([[gene in symbols for symbols in PROGRAMS.values()] for gene in genes])
    return member / member.sum(0)


def synthetic_screen(seed=0):
    """SYNTHETIC, nothing in it was measured: 150 knock-downs of program genes, G = 2177.

    Six factors of each knocked-down gene (its program, some cross-talk) drive delta and embedding,
    so ridge regression predicts held-out genes. Beating the mean shows only that the code learns.
    """
    rng = np.random.default_rng(seed)
    genes = MARKERS + [f"SYNTHETIC{i}" for i in range(VARIABLE)]
    member, G = membership(genes).numpy() > 0, len(genes)
    knocked = rng.permutation(len(MARKERS))[:150]
    factor = member[knocked] * rng.uniform(0.5, 1.5, (150, 1)) + 0.3 * rng.normal(size=(150, 6))
    effect = 0.3 * rng.normal(size=(6, G)) - member.T  # a knock-down lowers its program
    common = 0.5 * rng.normal(size=G) + member @ rng.uniform(-1, 1, 6)
    control = rng.uniform(0, 3, G)
    profiles = control + 0.1 * (factor @ effect + common + rng.normal(size=(150, G)))
    embedding = factor @ rng.normal(size=(6, EMBEDDING)) + 4 * rng.normal(size=(150, EMBEDDING))
    return Screen(genes, [genes[k] for k in knocked], control, profiles, embedding)


@functools.cache  # every layer asks for them
def synthetic_scores(seed=0):
    """Program scores (150, 6) of the synthetic screen, a pool that needs no file. As any pool's,
    they are a cell's predictions, not what was measured: the cell is ridge regression, which takes
    half a second where a VirtualCell would take nine, and correlates 0.99 with the truth."""
    screen = synthetic_screen(seed)
    return ridge(screen.embedding, screen.delta, screen.embedding, screen.member) @ screen.member


def read_npz(path, *names):
    try:
        with np.load(path, allow_pickle=False) as file:
            return [file[name] for name in names]
    except Exception as error:  # missing, damaged, pickled, or without one of them
        raise ValueError(f"cannot read {path} ({', '.join(names)}): {error}") from None


def read_h5ad(c):
    """Screen from single cells. Read out are the program genes and the 2000 others that vary most
    among control cells, so the choice sees no perturbed cell."""
    known, embedding = read_npz(c.embedding, "genes", "embedding")
    if len(known) != len(embedding):
        raise ValueError(f"{len(embedding)} embeddings for {len(known)} genes: one each is needed")
    row = {gene: i for i, gene in enumerate(known)}
    try:
        import h5py  # comes with anndata

        from experiments.cells import read_cells

        with h5py.File(c.data) as file:
            genes, pool, mean, variance = read_cells(file, c, row)
    except ImportError:
        raise ValueError(".h5ad needs anndata (pip install anndata); .npz does not") from None
    except Exception as error:  # ours, or what a damaged file raises
        raise ValueError(f"cannot read {c.data}: {error}") from None
    variance[np.isin(genes, MARKERS)] = np.inf  # program genes first
    order = np.argsort(-variance, kind="stable")
    order = order[np.sort(np.unique(genes[order], return_index=True)[1])]  # a symbol only once
    chosen = order[: VARIABLE + np.isinf(variance[order]).sum()]
    mean, rows = mean[:, chosen], [row[gene] for gene in pool]
    return Screen(genes[chosen], pool, mean[0], mean[1:], embedding[rows])


# ---- the virtual cell ------------------------------------------------------------------------


class VirtualCell(nn.Module):
    """embedding (n, 1280) -> delta (n, G), at the start 0: "no change". Statistics of the training
    data z-score the input and scale the output."""

    def __init__(self, embedding, delta):
        super().__init__()
        std = embedding.std(0, correction=0)
        self.register_buffer("mean", embedding.mean(0))
        self.register_buffer("std", std.clamp(min=1e-3 * std.mean().item() + 1e-12))
        self.register_buffer("scale", delta.square().mean().sqrt())
        last = nn.Linear(64, delta.shape[1])
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.net = nn.Sequential(nn.Linear(EMBEDDING, 64), nn.LayerNorm(64), nn.GELU(), last)

    def forward(self, embedding):
        return self.scale * self.net((embedding - self.mean) / self.std)


def loss(error, member):
    """Mean squared error (n, G), program genes counting 5-fold, plus that of program scores."""
    weight = 1 + 4 * (member > 0).any(1)
    return (weight * error**2).mean(0).sum() / weight.sum() + (error @ member).square().mean()


def train(x, y, member, seed):
    """Yield the cell after 0, 1, 2, ... steps on embeddings x and deltas y, all of them in each."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        cell = VirtualCell(x, y)
    adam = torch.optim.AdamW(cell.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    while True:
        yield cell
        adam.zero_grad()
        (loss(cell(x) - y, member) / cell.scale**2).backward()
        adam.step()


def ridge(x, y, x_new, member):
    """Ridge regression with intercept: x (n, F), y (n, G), x_new (m, F) -> (m, G).

    Centred and dual, the fit is H y with H = K (K + k)^-1, K = x x^T. The penalty k is the best for
    rows left out one by one, whose residuals are (y - H y)_i / (1 - 1/n - H_ii).
    """
    x, y, x_new, member = (value.double() for value in (x, y, x_new, member))
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    K, one = x @ x.T, torch.eye(len(x)).double()

    def left_out(k):
        H = torch.linalg.solve(K + k * one, K)
        return loss((y - H @ y) / (1 - 1 / len(x) - H.diagonal())[:, None], member)

    k = min(K.diagonal().mean() * torch.logspace(-4, 4, 33).double(), key=left_out)
    return (y_mean + (x_new - x_mean) @ x.T @ torch.linalg.solve(K + k * one, y)).float()


def pearson(a, b):
    """Correlation along the last dimension; 0 where a or b is constant."""
    tiny = 1e-9 * a.norm(dim=-1) * b.norm(dim=-1)  # a constant minus its mean is rounding
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    norm = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(norm > tiny, (a * b).sum(-1) / norm, 0)


def measure(predicted, true, member):
    """A row of the table: {metric: value} of predicted and true delta (n, G) of held-out genes."""
    predicted, true, member = predicted.double(), true.double(), member.double()
    p, t = predicted @ member, true @ member  # (n, 6)
    return {
        "score_r": pearson(p.flatten(), t.flatten()).item(),  # program scores, all pooled
        "score_r_genes": pearson(p.T, t.T).mean().item(),  # between genes: what P is made of
        "delta_r": pearson(predicted, true).mean().item(),  # over G, mean of the held-out genes
        "mse": (predicted - true).square().mean().item(),
    }


def validate(screen, seed):
    """Train on some genes, predict the others: (cell, steps, table {row: {metric: value}})."""
    x, y, member = screen.embedding, screen.delta, screen.member
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    test, learn = order.tensor_split([round(HOLDOUT * len(y))])
    curves = np.zeros((FOLDS, MOST_STEPS))  # the loss on genes left out, before each step
    for fold in range(FOLDS):
        inside = torch.arange(len(learn)) % FOLDS == fold
        rest, watch = learn[~inside], learn[inside]
        for step, cell in zip(range(MOST_STEPS), train(x[rest], y[rest], member, seed)):
            curves[fold, step] = loss(cell(x[watch]) - y[watch], member).item()
    steps = int(curves.mean(0).argmin())
    cell = next(islice(train(x[learn], y[learn], member, seed), steps, None))
    z = (x - cell.mean) / cell.std
    rows = {
        "cell": cell(x[test]),
        "no change": torch.zeros_like(y[test]),
        "mean delta": y[learn].mean(0).expand(len(test), -1),
        "ridge": ridge(z[learn], y[learn], z[test], member),
    }
    return cell, steps, {name: measure(row, y[test], member) for name, row in rows.items()}


def main(argv):
    with config.one_line():
        c = config.load(CellConfig, argv)
        files = [config.writable(path) for path in (c.out, c.result) if path]
        if c.embedding:
            screen = read_h5ad(c)
        elif c.data:
            screen = Screen(*read_npz(c.data, *(field.name for field in fields(Screen))))
        else:
            screen = synthetic_screen()
        cell, steps, table = validate(screen, c.seed)
        scores = (cell(screen.embedding) @ screen.member).detach()
        name = Path(c.data).name if c.data else "synthetic screen, nothing measured"
        print(f"{name}: {len(scores)} perturbed genes, {len(screen.genes)} read out, {steps} steps")
        print(f"{'held out':10}" + "".join(f"{metric:>15}" for metric in table["cell"]))
        for row, values in table.items():
            print(f"{row:10}" + "".join(f"{value:15.4g}" for value in values.values()))
        result = {
            "what": "the virtual cell on held-out perturbed genes, beside three baselines",
            "data": name,
            "seed": c.seed,
            "table": table,
        }
        pool = {"programs": list(PROGRAMS), "genes": screen.perturbations, "scores": scores}
        with config.whole_file(c.out) as file:
            torch.save(pool | {"cell": cell.state_dict()} | result, file)
        if c.result:
            Path(c.result).write_text(json.dumps(result, indent=1) + "\n")
        print(*(f"wrote {path}" for path in files), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
