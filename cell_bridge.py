"""The virtual cell and its bridge: a cell's gene programs set the excitability of neurons.

    gene embedding -> virtual cell -> program scores -> identity P -> Modulation -> theta, beta, gain

This is an experiment that can be ablated (no modulation, P = 0, P shuffled), no claim about
biology: whether real genes matter to a network is for those controls to say.

    python cell_bridge.py                              train on the embedded synthetic screen
    python cell_bridge.py --data=pseudobulk.npz        arrays: see read_npz
    python cell_bridge.py --data=cells.h5ad --embedding=esm2.npz

Asked of the cell: knock gene X down, how does expression change? Its answer is validated on
perturbed genes that it never saw, beside three baselines, and written with its program scores to
one file (--out) that train.py reads. The gene embedding meant is ESM2-650M, averaged over the
protein (Lin et al. 2023); the screen meant is the Virtual Cell Challenge's (Roohani et al. 2025),
whose organisers report that models do not consistently beat such baselines.
Shapes: G genes read out, n perturbed genes (the pool), N neurons, 6 programs.
"""

import hashlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

import config

# Human symbols (HGNC), curated: cell_division is half of the S and half of the G2/M list of Tirosh
# et al. 2016 (Science 352:189), renamed where HGNC did. Members of public sets (MSigDB, CC BY 4.0):
# endocrine of Reactome peptide hormones and steroid hormones; metabolism of WikiPathways
# glycolysis, TCA cycle and cholesterol synthesis; signaling_identity of WikiPathways MAPK, Wnt,
# TGF-beta and Hallmark IL6-JAK-STAT3; pluripotency of Reactome pluripotent stem cells. Some of
# endocrine and pluripotency, and all of neuron_identity, are textbook markers chosen by hand.
PROGRAMS = {
    name: tuple(symbols.split())
    for name, symbols in {
        "cell_division": """MCM5 PCNA TYMS FEN1 MCM2 MCM4 RRM1 UNG GINS2 MCM6 CDCA7 DTL PRIM1 UHRF1
            CENPU HELLS RFC2 RPA2 CDK1 NUSAP1 UBE2C BIRC5 TPX2 TOP2A NDC80 CKS2 NUF2 CKS1B MKI67
            TMPO CENPF TACC3 PIMREG SMC4 CCNB2 CKAP2L""",
        "neuron_identity": """MAP2 RBFOX3 SYN1 TUBB3 NEFL NEFM NEFH STMN2 SNAP25 SYT1 SYP GAP43 DCX
            ELAVL2 ELAVL3 ELAVL4 MAPT ENO2 UCHL1 INA RTN1 NCAM1 L1CAM THY1""",
        "pluripotency": """POU5F1 NANOG SOX2 KLF4 LIN28A LIN28B DPPA4 DPPA2 DNMT3B ZFP42 TDGF1 GDF3
            LEFTY1 LEFTY2 SALL4 PRDM14 ZIC3 L1TD1 UTF1 TERT FOXD3 ESRRB""",
        "endocrine": """INS GCG SST PPY GHRL POMC GH1 PRL TSHB CGA LHB FSHB GNRH1 CRH TRH OXT AVP
            PTH CALCA TG CHGA CHGB SCG2 PCSK1 CYP11A1 CYP17A1 CYP19A1 CYP21A2 HSD3B2 STAR""",
        "metabolism": """HK1 HK2 GPI PFKP PFKM ALDOC PGK1 PGAM1 ENO1 PKM CS ACO2 IDH2 IDH3A OGDH
            SUCLG1 SDHA SDHB FH MDH2 HMGCS1 HMGCR MVD FDPS FDFT1 SQLE LSS CYP51A1 DHCR7 DHCR24""",
        "signaling_identity": """EGFR FGFR1 PDGFRB GRB2 SOS1 HRAS KRAS NRAS BRAF RAF1 MAP2K1 MAPK1
            DUSP4 DUSP6 FOS WNT3 WNT5A FZD7 LRP6 DVL1 APC GSK3B CTNNB1 TCF7L2 LEF1 TGFB1 TGFBR1
            TGFBR2 SMAD2 SMAD3 SMAD4 SMAD7 STAT1 STAT3 SOCS3""",
    }.items()
}
MARKERS = [gene for genes in PROGRAMS.values() for gene in genes]  # 177 genes, none in two programs
VARIABLE = 2000  # further genes that are read out: G = 2177
EMBEDDING = 1280  # width of a gene embedding
DRAWS = 3  # genes behind each neuron: ~150 genes repeat often among N neurons, triples do not


@dataclass(frozen=True)
class CellConfig:
    # files
    data: str = ""  # screen to train on, .npz or .h5ad; empty: the embedded synthetic one
    embedding: str = ""  # .h5ad only: .npz with arrays genes (K), embedding (K, 1280)
    out: str = "out/cell.pt"  # what train.py reads: scores of the pool, the cell, its validation
    result: str = ""  # also write the validation as JSON
    # training
    holdout: float = 0.2  # share of the perturbed genes that is only used to validate
    max_steps: int = 200  # at most; how many is chosen by cross-validation on training genes
    folds: int = 4  # of that cross-validation
    learning_rate: float = 1e-3  # of AdamW, all training genes in each step
    weight_decay: float = 0.1
    seed: int = 1337  # of split and initialisation
    threads: int = 0  # CPU threads; 0 leaves it to torch

    def __post_init__(self):
        if self.data and not self.data.endswith((".npz", ".h5ad")):
            raise ValueError(f"data must be a .npz or .h5ad file, got {self.data}")
        if self.data.endswith(".h5ad") != bool(self.embedding):
            raise ValueError("a .h5ad file needs --embedding=FILE.npz, and nothing else does")
        if not 0 < self.holdout < 1 or self.max_steps < 1 or self.folds < 2 or self.threads < 0:
            raise ValueError("0 < holdout < 1, max_steps >= 1, folds >= 2, threads >= 0 must hold")


# ---- the bridge: what model.py uses ----------------------------------------------------------


def identity(scores, n, seed, shuffle=False):
    """scores (pool, 6) -> P (n, DRAWS * 6) float32, column draw * 6 + program.

    Each draw gives every neuron one gene of the pool at random; columns are z-scored over the
    neurons and clipped to +-3. shuffle permutes each column by itself: the control that keeps the
    distribution of every program and destroys the genes. The same seed gives the same P.
    """
    generator = torch.Generator().manual_seed(seed)
    scores = torch.as_tensor(scores, dtype=torch.float64)
    genes = torch.randint(len(scores), (n, DRAWS), generator=generator)
    P = scores[genes].flatten(1)  # (n, DRAWS, 6) -> (n, DRAWS * 6)
    P = (P - P.mean(0)) / P.std(0, correction=0).clamp(min=1e-9)
    if shuffle:
        P = torch.stack([col[torch.randperm(n, generator=generator)] for col in P.unbind(1)], 1)
    return P.clamp(-3, 3).float()


class Modulation(nn.Module):
    """P (N, K) -> threshold theta, decay beta and gain of the feed-forward current, (N,) each.

    theta = clamp(theta0 exp(P g_theta), 0.25, 3); beta = clamp(sigmoid(logit(beta0) + P g_beta),
    0.5, 0.97); gain = clamp(gain0 exp(P g_in), 0.3, 3), with learned strengths g (K,). A neuron
    at a clamp has no gradient until the others' pull brings it back. P = 0: all are alike.
    theta0, beta0, gain0: a float or (N,), within the clamps, else ValueError. Only the strengths of
    neuron_identity start non-zero; their size is unpublished and chosen here.
    """

    RANGE = {"theta": (0.25, 3.0), "beta": (0.5, 0.97), "gain": (0.3, 3.0)}
    START = {"g_theta": -0.1, "g_beta": 0.2, "g_in": 0.1}  # sooner, longer, stronger; per neuron

    def __init__(self, P, theta0, beta0, gain0=1.0):
        super().__init__()
        self.register_buffer("P", P)
        for (name, (low, high)), base in zip(self.RANGE.items(), (theta0, beta0, gain0)):
            base = torch.as_tensor(base, dtype=P.dtype)
            if not base.is_meta and not ((base >= low) & (base <= high)).all():
                raise ValueError(f"{name}0 must be in [{low}, {high}], the range of its modulation")
            self.register_buffer(f"{name}0", base)
        draws = P.shape[1] // len(PROGRAMS)
        neuron = torch.tensor([name == "neuron_identity" for name in PROGRAMS] * draws) / draws
        for name, start in self.START.items():
            self.register_parameter(name, nn.Parameter(start * neuron.to(P.dtype)))

    def forward(self):
        theta = self.theta0 * torch.exp(self.P @ self.g_theta)
        beta = torch.sigmoid(torch.logit(self.beta0) + self.P @ self.g_beta)
        gain = self.gain0 * torch.exp(self.P @ self.g_in)
        return tuple(x.clamp(*r) for x, r in zip((theta, beta, gain), self.RANGE.values()))


def load_scores(path):
    """(scores (pool, 6), genes of the pool) of a file that `python cell_bridge.py` wrote.

    weights_only: the file is tensors and plain values, and can not run code.
    """
    try:
        file = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}; python cell_bridge.py writes one") from None
    except Exception as error:  # damaged in any of many ways
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot read the cell {path}: {reason}") from None
    if type(file) is not dict or file.get("programs") != list(PROGRAMS):
        raise ValueError(f"{path} is no file of cell_bridge.py with its six programs")
    return file["scores"], file["genes"]


# ---- screens ---------------------------------------------------------------------------------


@dataclass
class Screen:
    """Pseudobulk, log scale: the mean expression of cells in which one gene was perturbed.

    ValueError, in one line, for whatever can not be trained on.
    """

    genes: list  # G symbols that are read out
    perturbations: list  # n symbols that were perturbed
    control: torch.Tensor  # (G,) mean of unperturbed cells; 0 if profiles are fold changes
    profiles: torch.Tensor  # (n, G)
    embedding: torch.Tensor  # (n, 1280) of the perturbed genes

    def __post_init__(self):
        G, n = len(self.genes), len(self.perturbations)
        for name, shape in (
            ("control", (G,)), ("profiles", (n, G)), ("embedding", (n, EMBEDDING))
        ):  # fmt: skip
            value = torch.as_tensor(getattr(self, name), dtype=torch.float32)
            if tuple(value.shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, it has {tuple(value.shape)}")
            if not value.isfinite().all():
                raise ValueError(f"{name} holds NaN or infinity; leave such rows or genes out")
            setattr(self, name, value)
        if n < 10 or len(set(self.perturbations)) < n or len(set(self.genes)) < G:
            raise ValueError("at least 10 perturbations are needed, and no gene may be listed twice")
        for name, symbols in PROGRAMS.items():
            if not set(symbols) & set(self.genes):
                raise ValueError(f"unknown genes: none is of {name}; HGNC symbols are needed")

    @property
    def delta(self):  # (n, G)
        return self.profiles - self.control


def synthetic_screen(seed=0):
    """SYNTHETIC, nothing in it was measured: 150 knock-downs of program genes.

    Each gene has 6 latent factors: its membership of a program, of random strength, and some
    cross-talk. They drive delta (rank 6, a response common to all, noise) and, with noise, the
    embedding: a held-out gene can be predicted, and linearly. Beating the mean here proves only
    that the code learns.
    """
    rng = np.random.default_rng(seed)
    genes = MARKERS + [f"SYNTHETIC{i}" for i in range(VARIABLE)]
    member = membership(genes).numpy() > 0  # (G, 6)
    knocked = rng.permutation(len(MARKERS))[:150]
    factor = member[knocked] * rng.uniform(0.5, 1.5, (150, 1)) + 0.3 * rng.normal(size=(150, 6))
    effect = 0.3 * rng.normal(size=(6, len(genes))) - member.T  # a knock-down lowers its program
    control = rng.uniform(0, 3, len(genes))
    common = 0.5 * rng.normal(size=len(genes)) + member @ rng.uniform(-1, 1, 6)
    delta = 0.1 * (factor @ effect + common + rng.normal(size=(150, len(genes))))
    embedding = factor @ rng.normal(size=(6, EMBEDDING)) + 4 * rng.normal(size=(150, EMBEDDING))
    return Screen(genes, [genes[k] for k in knocked], control, control + delta, embedding)


def synthetic_scores(seed=0):
    """The true program scores (150, 6) of the synthetic screen: a pool without any training."""
    screen = synthetic_screen(seed)
    return screen.delta @ membership(screen.genes)


def arrays(path, *names):
    """The named arrays of an .npz; whatever is wrong with the file is a ValueError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return [file[name] for name in names]
    except KeyError as error:
        raise ValueError(f"{path} has no array {error.args[0]}; needed: {', '.join(names)}")
    except Exception as error:  # missing, damaged, pickled
        raise ValueError(f"cannot read {path}: {error}") from None


def read_npz(path):
    """Screen from arrays genes (G), perturbations (n), control (G), profiles (n, G), embedding."""
    names = "genes", "perturbations", "control", "profiles", "embedding"
    genes, perturbations, *rest = arrays(path, *names)
    return Screen(genes.tolist(), perturbations.tolist(), *rest)


def read_h5ad(path, embedding_path):
    """Screen from single cells: X of raw counts (CSR), obs target_gene; "non-targeting" = control.

    Read out are the program genes and the 2000 that vary most among control cells: the choice
    sees no perturbed cell, held out or not. Embeddings by symbol from embedding_path (.npz).
    """
    try:
        import h5py
    except ImportError:
        raise ValueError("reading .h5ad needs h5py (pip install h5py); .npz does not") from None
    known, embedding = arrays(embedding_path, "genes", "embedding")
    row = {gene: i for i, gene in enumerate(known.tolist())}
    try:
        with h5py.File(path) as file:
            labels, genes, mean, variance = pseudobulk(file)
    except (OSError, KeyError) as error:
        raise ValueError(f"cannot read {path} as .h5ad: {error}") from None
    if "non-targeting" not in labels:
        raise ValueError(f'{path} has no controls: no cell has target_gene "non-targeting"')
    perturbations = [label for label in labels if label != "non-targeting"]
    if unknown := [gene for gene in perturbations if gene not in row]:
        raise ValueError(f"unknown genes: {embedding_path} has no {', '.join(unknown[:5])}")
    variance[np.isin(genes, MARKERS)] = np.inf  # program genes first, then by variance
    chosen = np.argsort(-variance, kind="stable")[: VARIABLE + np.isinf(variance).sum()]
    mean = dict(zip(labels, mean[:, chosen]))
    return Screen(
        [genes[i] for i in chosen], perturbations, mean["non-targeting"],
        np.stack([mean[p] for p in perturbations]), embedding[[row[p] for p in perturbations]],
    )  # fmt: skip


def pseudobulk(file, rows=256):
    """labels, genes, mean (labels, G) of log1p(counts per 10^4), its variance (G,) over controls.

    Streams `rows` cells at a time: memory does not grow with their number. file: an h5py.File.
    """
    X, column, var = file["X"], file["obs"]["target_gene"], file["var"]
    if not hasattr(X, "keys") or X.attrs.get("encoding-type", "csr_matrix") != "csr_matrix":
        raise ValueError("X must be stored row by row (CSR); scipy's tocsr() converts it")

    def text(dataset):
        return np.array([x.decode() if isinstance(x, bytes) else str(x) for x in dataset[:]])

    is_group = hasattr(column, "keys")  # categorical: a code per cell, -1 for none
    cells = np.append(text(column["categories"]), "")[column["codes"][:]] if is_group else text(column)
    labels, code = np.unique(cells, return_inverse=True)
    genes, start = text(var[var.attrs.get("_index", "_index")]), X["indptr"][:].astype(np.int64)
    if "" in labels or len(start) != len(cells) + 1:
        raise ValueError("every cell, a row of X, needs a target_gene")
    L, G = len(labels), len(genes)
    total, square = np.zeros(L * G), np.zeros(G)
    for first in range(0, len(cells), rows):
        size = np.diff(start[first : first + rows + 1])  # entries of each of these cells
        span = slice(start[first], start[first] + size.sum())
        count, gene = X["data"][span].astype(np.float64), X["indices"][span].astype(np.int64)
        if not (count >= 0).all():
            raise ValueError("X holds NaN or negative values; raw counts are needed")
        cell = np.repeat(np.arange(len(size)), size)
        depth = np.bincount(cell, count, len(size)).clip(1e-9)  # no division by 0: an empty cell
        value = np.log1p(1e4 * count / depth[cell])
        label = code[first : first + rows][cell]
        total += np.bincount(label * G + gene, value, L * G)
        control = labels[label] == "non-targeting"
        square += np.bincount(gene[control], value[control] ** 2, G)
    number = np.bincount(code, minlength=L)[:, None]
    mean = total.reshape(L, G) / number
    control = labels == "non-targeting"
    variance = square / max(number[control].sum(), 1) - (mean[control] ** 2).sum(0)
    return labels.tolist(), genes.tolist(), mean, variance


# ---- the virtual cell ------------------------------------------------------------------------


class VirtualCell(nn.Module):
    """embedding (n, 1280) -> delta (n, G); the predicted profile is control + delta.

    Linear, LayerNorm, GELU, Linear; the last starts at zero, so training starts at "no change".
    Inputs are z-scored and outputs scaled by the training data's statistics, which are buffers.
    """

    def __init__(self, embedding, delta, hidden=64):
        super().__init__()
        std = embedding.std(0, correction=0)
        self.register_buffer("mean", embedding.mean(0))
        self.register_buffer("std", std.clamp(min=1e-3 * std.mean().item() + 1e-12))
        self.register_buffer("scale", delta.square().mean().sqrt())
        self.net = nn.Sequential(
            nn.Linear(embedding.shape[1], hidden), nn.LayerNorm(hidden), nn.GELU(),
            nn.Linear(hidden, delta.shape[1]),
        )  # fmt: skip
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, embedding):
        return self.scale * self.net((embedding - self.mean) / self.std)


def membership(genes):
    """(G, 6): column p averages over the genes of program p, so delta @ it = program scores."""
    member = torch.tensor([[gene in symbols for symbols in PROGRAMS.values()] for gene in genes])
    return member / member.sum(0)


def loss(predicted, true, member):
    """Mean squared error, program genes counting 5-fold, plus that of the program scores."""
    error = predicted - true  # (n, G)
    weight = 1 + 4 * (member > 0).any(1)
    return (weight * error**2).mean(0).sum() / weight.sum() + (error @ member).square().mean()


def train(embedding, delta, member, steps, c, watch=None):
    """A cell after so many steps; with watch = (embedding, delta), its loss there before each."""
    with torch.random.fork_rng():
        torch.manual_seed(c.seed)
        cell = VirtualCell(embedding, delta)
    optimizer = torch.optim.AdamW(
        cell.parameters(), c.learning_rate, weight_decay=c.weight_decay
    )  # fmt: skip
    curve = []
    for _ in range(steps):
        if watch:
            with torch.no_grad():
                curve.append(loss(cell(watch[0]), watch[1], member).item())
        optimizer.zero_grad()
        (loss(cell(embedding), delta, member) / cell.scale**2).backward()
        optimizer.step()
    return cell.eval(), curve


def ridge(x, y, x_new, member):
    """Ridge regression with intercept: x (n, F), y (n, G), x_new (m, F) -> (m, G).

    Dual form: centred K = x x^T = U diag(e) U^T, fit H y with H = U diag(e / (e + lambda)) U^T.
    lambda has the least loss over rows left out, whose residual is (y - H y) / (1 - 1/n - H_ii).
    """
    x, y, x_new, member = x.double(), y.double(), x_new.double(), member.double()
    x_mean, y_mean, n = x.mean(0), y.mean(0), len(x)
    x, y = x - x_mean, y - y_mean
    e, U = torch.linalg.eigh(x @ x.T)
    e = e.clamp(min=0)

    def left_out(shrink):
        H = U @ torch.diag(e / (e + shrink)) @ U.T
        return loss((y - H @ y) / (1 - 1 / n - H.diagonal())[:, None], 0, member).item()

    shrink = min(e.mean() * torch.logspace(-4, 4, 33).double(), key=left_out)
    dual = U @ torch.diag(1 / (e + shrink)) @ (U.T @ y)
    return (y_mean + (x_new - x_mean) @ x.T @ dual).float()


def pearson(a, b):
    """Correlation along the last dimension; 0 where one of them is constant."""
    a, b = a.double(), b.double()
    tiny = 1e-9 * a.norm(dim=-1) * b.norm(dim=-1)  # a constant minus its mean is rounding
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    product = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(product > tiny, (a * b).sum(-1) / product.clamp(min=1e-300), 0)


def measure(predicted, true, member):
    """The metrics of a row of the table; predicted and true delta (n, G) of held-out genes."""
    p, t = predicted.double() @ member.double(), true.double() @ member.double()  # (n, 6)
    return {
        "score_r": pearson(p.flatten(), t.flatten()).item(),  # programs and genes pooled
        "score_r_genes": pearson(p.T, t.T).mean().item(),  # between genes: all that P can use
        "delta_r": pearson(predicted, true).mean().item(),  # over G, mean of held-out genes
        "mse": (predicted - true).square().mean().item(),
    }


def validate(screen, c):
    """Train on some perturbed genes, predict the others: (cell, steps, table {row: {metric: x}})."""
    member, delta = membership(screen.genes), screen.delta
    order = torch.randperm(len(delta), generator=torch.Generator().manual_seed(c.seed))
    held = round(c.holdout * len(order))
    test, learn = order[:held], order[held:]
    if not held or len(learn) < c.folds:
        raise ValueError(f"holdout {c.holdout} of {len(order)} genes leaves too few on one side")
    curves = []
    for fold in range(c.folds):
        inside = torch.arange(len(learn)) % c.folds == fold
        rest, watch = learn[~inside], learn[inside]
        seen = screen.embedding[watch], delta[watch]
        curves.append(train(screen.embedding[rest], delta[rest], member, c.max_steps, c, seen)[1])
    steps = int(np.mean(curves, 0).argmin())
    x, y, x_test, true = screen.embedding[learn], delta[learn], screen.embedding[test], delta[test]
    cell, _ = train(x, y, member, steps, c)
    with torch.no_grad():
        rows = {
            "cell": cell(x_test),
            "no change": torch.zeros_like(true),
            "mean delta": y.mean(0).expand_as(true),
            "ridge": ridge((x - cell.mean) / cell.std, y, (x_test - cell.mean) / cell.std, member),
        }
    return cell, steps, {name: measure(row, true, member) for name, row in rows.items()}


# ---- the command -----------------------------------------------------------------------------


def sha256(blocks):
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def file_blocks(*paths):
    """The bytes of the files, one after the other, 1 MB at a time."""
    for path in filter(None, paths):
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                yield block


def main(argv):
    c = config.load(CellConfig, argv)
    began = time.time()
    if c.threads:
        torch.set_num_threads(c.threads)
    try:
        if c.data.endswith(".h5ad"):
            screen = read_h5ad(c.data, c.embedding)
        else:
            screen = read_npz(c.data) if c.data else synthetic_screen()
        cell, steps, table = validate(screen, c)
        blocks = file_blocks(c.data, c.embedding) if c.data else [screen.delta.numpy().tobytes()]
        data = {
            "name": Path(c.data).name if c.data else "synthetic screen, nothing measured",
            "sha256": sha256(blocks),  # of the file; of .h5ad and embedding, one after the other
        }
        with torch.no_grad():
            scores = cell(screen.embedding) @ membership(screen.genes)
        Path(c.out).parent.mkdir(parents=True, exist_ok=True)
        torch.save(
            {
                "programs": list(PROGRAMS), "genes": screen.perturbations, "scores": scores,
                "cell": cell.state_dict(), "table": table, "data": data, "seed": c.seed,
            },
            c.out,
        )  # fmt: skip
        result = {"what": "the virtual cell on held-out perturbed genes, beside three baselines"}
        result |= {"data": data, "seed": c.seed, "table": table, "steps": steps}
        result |= {"seconds": round(time.time() - began, 1)}
        if c.result:
            Path(c.result).parent.mkdir(parents=True, exist_ok=True)
            Path(c.result).write_text(json.dumps(result, indent=1) + "\n")
    except (ValueError, OSError) as error:
        config.stop(error)
    pool, held = len(scores), round(c.holdout * len(scores))
    print(f"{data['name']}: {pool} perturbed genes, {held} held out, {len(screen.genes)} read out")
    print(f"{'':10}" + "".join(f"{metric:>15}" for metric in table["cell"]))
    for name, row in table.items():
        print(f"{name:10}" + "".join(f"{value:15.4g}" for value in row.values()))
    print(f"{steps} steps, {result['seconds']} s; wrote {c.out}")


if __name__ == "__main__":
    main(sys.argv[1:])
