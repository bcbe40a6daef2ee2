"""cell_bridge.py: programs, P, modulation, screens and readers, the cell beside its baselines."""

import json
import re
import sys
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import cell_bridge
from blocks import MembraneReadout
from cell_bridge import (
    DRAWS, MARKERS, PROGRAMS, CellConfig, Modulation, Screen, VirtualCell, identity,
    main, measure, membership, pearson, synthetic_scores, synthetic_screen, validate,
)  # fmt: skip
from checkpoint import load_cell
from experiments import esm2
from experiments.cells import perturbed, pseudobulk
from lif import Report

anndata, h5py, pd, sparse = map(pytest.importorskip, ("anndata", "h5py", "pandas", "scipy.sparse"))
CONTROL = CellConfig.control
NEURON = [draw * 6 + 1 for draw in range(3)]  # columns of neuron_identity


@pytest.fixture
def quick(monkeypatch):
    """Smaller and shorter than what people run: 377 genes, 2 folds of 70 steps."""
    for name, value in {"VARIABLE": 200, "FOLDS": 2, "MOST_STEPS": 70}.items():
        monkeypatch.setattr(cell_bridge, name, value)


@pytest.fixture
def few(monkeypatch):
    """Of all genes but those of programs, 4 are read out."""
    monkeypatch.setattr(cell_bridge, "VARIABLE", 4)


def test_programs():
    assert list(PROGRAMS) == [
        "cell_division", "neuron_identity", "pluripotency", "endocrine", "metabolism",
        "signaling_identity",
    ]  # fmt: skip
    assert len(MARKERS) == len(set(MARKERS)) == 177
    assert all(gene.isalnum() and gene.isupper() for gene in MARKERS)


# ---- identity and modulation -----------------------------------------------------------------


def test_each_draw_gives_a_neuron_all_scores_of_one_gene():
    scores = torch.rand(20, 6, generator=torch.Generator().manual_seed(0))
    P = identity(scores, 5000, 3)
    assert P.shape == (5000, 18) and P.dtype == torch.float32
    assert P.mean(0).abs().max() < 1e-5 and (P.std(0, correction=0) - 1).abs().max() < 1e-5
    rows = [P[:, 6 * d : 6 * d + 6] for d in range(DRAWS)]
    assert all(len(row.unique(dim=0)) == 20 for row in rows)  # 20 genes, jointly
    assert len(P.unique(dim=0)) > 2000  # of 8000 triples: the draws are independent


def test_identity_is_its_seed_and_leaves_the_global_generator_alone():
    scores, state = synthetic_scores(), torch.get_rng_state()
    P = identity(scores, 50, 7)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(1)
    assert torch.equal(P, identity(scores, 50, 7)) and not torch.equal(P, identity(scores, 50, 8))


def test_identity_clips_and_a_constant_column_is_zero():
    scores = torch.zeros(100, 6)
    scores[0, 0], scores[:, 1] = 50.0, 0.1
    P = identity(scores, 2000, 0)
    assert P[:, 0].max() == 3 and P[:, 0].min() > -1 and P[:, 1].abs().max() < 1e-6
    assert identity(-scores, 2000, 0)[:, 0].min() == -3


def test_shuffle_keeps_every_column_and_destroys_the_genes():
    scores = synthetic_scores()
    P, shuffled = identity(scores, 300, 0), identity(scores, 300, 0, shuffle=True)
    assert torch.allclose(P.sort(0)[0], shuffled.sort(0)[0])
    genes = {tuple(row) for row in P[:, :6].tolist()}
    assert sum(tuple(row) in genes for row in shuffled[:, :6].tolist()) < 10
    assert torch.equal(shuffled, identity(scores, 300, 0, shuffle=True))


def test_modulation_by_hand():
    P = torch.zeros(4, 18)
    P[0, NEURON], P[1, NEURON], P[2, 0] = 1.0, -3.0, 2.0
    m = Modulation(P, 1.0, 0.9)
    with torch.no_grad():
        m.g_theta[0], m.g_beta[0], m.g_in[0] = 0.25, -0.5, -0.3
    theta, beta, gain = m()
    odds = lambda x: 1 / (1 + np.exp(-x) / 9)  # sigmoid(logit(0.9) + x)  # noqa: E731
    assert theta.tolist() == pytest.approx([np.exp(-0.1), np.exp(0.3), np.exp(0.5), 1])
    assert beta.tolist() == pytest.approx([odds(0.2), odds(-0.6), odds(-1.0), 0.9])
    assert gain.tolist() == pytest.approx([np.exp(0.1), np.exp(-0.3), np.exp(-0.6), 1])


def test_modulation_starts_from_the_neuron_program_only_and_learns_all():
    m = Modulation(identity(synthetic_scores(), 200, 0), 1.0, 0.9)
    for g in m.parameters():
        assert g.nonzero().flatten().tolist() == NEURON and len(g.unique()) == 2
    sum(x.square().sum() for x in m()).backward()
    assert all(g.grad.abs().min() > 0 for g in m.parameters())
    assert set(m.state_dict()) == {"P", "theta0", "beta0", "gain0", "g_theta", "g_beta", "g_in"}


@pytest.mark.parametrize("beta0", [0.9, torch.linspace(0.5, 0.97, 9)])
def test_without_P_all_neurons_are_what_they_were(beta0):
    theta, beta, gain = Modulation(torch.zeros(9, 18), 0.7, beta0, 1.3)()
    assert torch.equal(theta, torch.full((9,), 0.7)) and torch.equal(gain, torch.full((9,), 1.3))
    assert torch.allclose(beta, torch.as_tensor(beta0).expand(9), atol=1e-6)
    assert len(beta.unique()) == (1 if isinstance(beta0, float) else 9)


def test_modulation_clamps_and_says_when_a_base_lies_outside():
    P = torch.zeros(2, 18)
    P[0], P[1] = 3.0, -3.0
    m = Modulation(P, 1.0, 0.9)
    with torch.no_grad():
        for g in m.parameters():
            g += 1
    ends = [[round(v, 4) for v in x.tolist()] for x in m()]
    assert ends == [[3, 0.25], [0.97, 0.5], [3, 0.3]]
    for bad in ((0.2, 0.9, 1.0), (1.0, 0.98, 1.0), (1.0, 0.9, 3.1)):
        with pytest.raises(ValueError, match="must be in"):
            Modulation(P, *bad)


# ---- screens and readers ---------------------------------------------------------------------


def small_screen(n=12, seed=0):
    """The arrays of a valid screen with few genes, as a dictionary for np.savez."""
    rng = np.random.default_rng(seed)
    genes = [symbols[0] for symbols in PROGRAMS.values()] + ["A1", "A2"]
    return {
        "genes": np.array(genes), "perturbations": np.array(MARKERS[:n]),
        "control": rng.random(8), "profiles": rng.random((n, 8)),
        "embedding": rng.random((n, 1280)),
    }  # fmt: skip


BROKEN = {
    "cannot read .*control is not a file": lambda s: s.pop("control"),
    "cannot read .*embedding is not a file": lambda s: s.pop("embedding"),
    "profiles holds NaN": lambda s: s["profiles"].__setitem__((3, 2), np.nan),
    "control holds NaN or inf": lambda s: s["control"].__setitem__(0, np.inf),
    "embedding holds NaN": lambda s: s["embedding"].__setitem__((0, 5), np.nan),
    r"embedding must have shape \[12, 1280\]": lambda s: s.update(embedding=np.ones((12, 640))),
    r"control must have shape \[8\]": lambda s: s.update(control=np.zeros(0)),
    r"profiles must have shape \[12, 8\]": lambda s: s.update(profiles=np.ones((8, 12))),
    "could not convert": lambda s: s.update(control=np.array(["x"] * 8)),
    "unknown genes: none is of metabolism": lambda s: s["genes"].__setitem__(4, "ENSG1"),
    "no gene listed twice": lambda s: s["perturbations"].__setitem__(0, MARKERS[1]),
    "at least 10": lambda s: s.update({k: v[:9] for k, v in s.items() if len(v) == 12}),
    "cannot read": lambda s: s.update(profiles=np.array([object()])),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_table_is_one_clear_line(tmp_path, message, capsys):
    screen = small_screen()
    BROKEN[message](screen)
    np.savez(tmp_path / "a.npz", **screen)
    with pytest.raises(SystemExit, match="2"):
        main([f"--data={tmp_path}/a.npz", f"--out={tmp_path}/out.pt"])
    error = capsys.readouterr().err
    assert re.match(f"error: .*{message}", error) and error.count("\n") == 1, error
    assert not (tmp_path / "out.pt").exists()


def test_missing_and_damaged_files(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"no zip")
    for name in ("a.npz", "b.npz"):
        with pytest.raises(ValueError, match=f"cannot read .*{name}"):
            cell_bridge.read_npz(tmp_path / name, "genes")


def cells(n=120):
    """(raw counts (n, G), labels (n), genes) of a small screen."""
    rng = np.random.default_rng(0)
    genes = [symbols[0] for symbols in PROGRAMS.values()] + [f"A{i}" for i in range(20)]
    codes = np.concatenate([np.arange(11), rng.integers(0, 11, n - 11)])
    counts = rng.poisson(rng.gamma(0.5, 2, (n, len(genes)))).astype(np.float32)
    counts[:, 8] = 30 * (codes != 0) * rng.integers(0, 2, n)  # A2 varies, but not in controls
    counts[5:7] = 0  # cells without any count
    return counts, np.array([CONTROL, *MARKERS[:10]], object)[codes], genes


def embeddings():
    known = MARKERS[::-1]
    return np.array(known), np.arange(len(known))[:, None] + np.zeros(1280)


def save(folder, X, labels, genes, column="target_gene", raw=None, **parts):
    """CellConfig of an .h5ad that anndata writes, and of embeddings."""
    obs = pd.DataFrame({column: labels}, index=[f"c{i}" for i in range(len(labels))])
    var = genes if isinstance(genes, pd.DataFrame) else pd.DataFrame(index=genes)
    file = anndata.AnnData(X, obs, var, **parts)
    if raw is not None:
        file.raw = anndata.AnnData(raw, obs, pd.DataFrame(index=["OTHER", *genes]))
    file.strings_to_categoricals = lambda *_: None  # leave the labels as they are
    with anndata.settings.override(allow_write_nullable_strings=True):
        file.write_h5ad(folder / "a.h5ad")
    known, table = embeddings()
    np.savez(folder / "e.npz", genes=known, embedding=table)
    return CellConfig(data=f"{folder}/a.h5ad", embedding=f"{folder}/e.npz", column=column)


def expected(counts, labels, label):
    rows = counts[labels == label]
    return np.log1p(1e4 * rows / np.maximum(rows.sum(1, keepdims=True), 1))


def check_screen(screen, counts, labels, genes):
    control = expected(counts, labels, CONTROL)
    ranked = sorted(range(6, 26), key=lambda g: -control[:, g].var())[:4]
    assert set(screen.genes) == set(genes[:6]) | {genes[g] for g in ranked}
    assert "A2" not in screen.genes  # varies most over all cells: chosen by controls alone
    at = [genes.index(g) for g in screen.genes]
    assert np.allclose(screen.control, control.mean(0)[at], atol=1e-5)
    assert screen.perturbations == sorted(MARKERS[:10])
    for i, name in enumerate(screen.perturbations):
        mean = expected(counts, labels, name).mean(0)[at]
        assert np.allclose(screen.profiles[i], mean, atol=1e-5)
        assert screen.embedding[i, 0] == MARKERS[::-1].index(name)


@pytest.mark.parametrize(
    "how, dtype", [("array", "object"), ("csr_matrix", "string"), ("csc_matrix", "category")]
)
def test_h5ad_is_pseudobulk_of_normalised_cells(tmp_path, few, how, dtype):
    counts, labels, genes = cells()
    X = getattr(np if how == "array" else sparse, how)(counts)
    column = pd.array(labels, dtype=dtype)
    c = save(tmp_path, X, column, pd.DataFrame(index=pd.Index(genes, dtype=dtype)))
    check_screen(cell_bridge.read_h5ad(c), counts, labels, genes)


def edit(c, change):
    """Change a file in a way that anndata would not: an old layout, or damage."""
    with h5py.File(c.data, "r+") as file:
        change(file)


@pytest.mark.filterwarnings("ignore:Element")
def test_h5ad_of_anndata_0_7(tmp_path, few):
    counts, labels, genes = cells()
    c = save(tmp_path, counts, pd.Categorical([None, *labels[1:]]), genes)

    ascii_text = h5py.string_dtype("ascii")  # which is read as bytes

    def age(file):
        known = [CONTROL, *MARKERS[:10]]
        del file["obs/target_gene"], file.attrs["encoding-type"]
        file["obs/__categories/target_gene"] = known
        file["obs/target_gene"] = np.array([-1] + [known.index(label) for label in labels[1:]])
        reference = file["obs/__categories/target_gene"].ref
        file["obs/target_gene"].attrs["categories"] = reference
        for name, index in (("obs", [f"c{i}" for i in range(120)]), ("var", genes)):
            file[name].attrs["encoding-version"] = "0.1.0"
            del file[f"{name}/_index"]
            file.create_dataset(f"{name}/_index", data=index, dtype=ascii_text)

    edit(c, age)
    check_screen(cell_bridge.read_h5ad(c), counts[1:], labels[1:], genes)

    def age_more(file):
        del file["obs"]
        file["obs"] = np.zeros(120, [("index", "S4"), ("target_gene", "i1")])

    edit(c, age_more)
    with pytest.raises(ValueError, match="older than anndata 0.7"):
        cell_bridge.read_h5ad(c)


class Disk:
    """A matrix that remembers the most values that were asked for at once."""

    def __init__(self, X):
        self.X, self.shape, self.most = X, X.shape, 0
        self.format = getattr(X, "format", None)

    def __getitem__(self, key):
        self.most = max(self.most, np.prod(self.X[key].shape))
        return self.X[key]


@pytest.mark.parametrize("how", ["array", "csr_matrix", "csc_matrix"])
def test_h5ad_is_streamed(how):
    counts, labels, _ = cells(3000)
    names, code = np.unique(labels, return_inverse=True)
    code = (code + 1) % 11  # controls, the last of the names, are 0
    code[:50] = -1
    X = Disk(getattr(np if how == "array" else sparse, how)(counts))
    mean, variance = pseudobulk(X, code, rows=700)
    assert 0 < X.most <= 700 * 26
    counts, labels = counts[50:], labels[50:]
    assert names[10] == CONTROL
    assert np.allclose(mean[4], expected(counts, labels, names[3]).mean(0))
    assert np.allclose(variance, expected(counts, labels, CONTROL).var(0))


@pytest.mark.parametrize("values", [np.uint8([200, 100, 100, 0, 0]), [1.5, 1.5, 1.0, 0.0, 0.0]])
def test_doubled_entries_are_summed(values):
    """Without wrapping around, and before they are asked to be whole; a stored zero is nothing."""
    X = sparse.csr_matrix((values, [0, 0, 1, 1, 0], [0, 4, 5]), (2, 2))
    mean, _ = pseudobulk(X, np.array([0, 1]))
    assert np.allclose(mean, [np.log1p([7500, 2500]), [0, 0]])


def test_labels():
    assert [perturbed(x, "ctrl") for x in ("ctrl", "ctrl+ctrl")] == ["ctrl"] * 2
    assert [perturbed(x, "ctrl") for x in ("A", "A+ctrl", "ctrl+A", "A+A")] == ["A"] * 4
    assert [perturbed(x, "ctrl") for x in ("", "A+B", "A+B+ctrl")] == ["", "+", "+"]
    assert perturbed("no+drug", "no+drug") == "no+drug"


def test_labels_of_gears(tmp_path, few, capsys):
    """GEARS: A+ctrl or ctrl+A is one gene, A+B two; symbols stand in a column of var."""
    counts, labels, genes = cells()
    written = [f"{x}+ctrl" if i % 2 else f"ctrl+{x}" for i, x in enumerate(labels)]
    written = np.where(labels == CONTROL, "ctrl", np.array(written, object))
    written[[20, 21, 22]], written[[30, 31]] = f"{MARKERS[0]}+{MARKERS[1]}", (None, "")
    var = pd.DataFrame({"gene_name": genes}, index=[f"ENSG{i}" for i in range(26)])
    c = save(tmp_path, counts, pd.Categorical(written), var, "condition")
    c = replace(c, control="ctrl", symbols="gene_name")
    screen, kept = cell_bridge.read_h5ad(c), np.delete(np.arange(120), [20, 21, 22, 30, 31])
    check_screen(screen, counts[kept], labels[kept], genes)
    assert capsys.readouterr().out == (
        "120 cells; left out: 2 without a label, 3 with several genes\n"
    )


def test_counts_are_demanded_and_found_elsewhere(tmp_path, few):
    counts, labels, genes = cells()
    logs = np.log1p(counts)
    c = save(tmp_path, logs, labels, genes)
    with pytest.raises(ValueError, match="in X is no count; counts .* another file"):
        cell_bridge.read_h5ad(c)
    raw = np.hstack([np.zeros((120, 1)), counts])  # raw has genes of its own
    c = save(tmp_path, logs, labels, genes, raw=raw, layers={"logs": logs, "counts": counts})
    with pytest.raises(ValueError, match="--layer=raw/X or --layer=layers/counts or --layer=lay"):
        cell_bridge.read_h5ad(c)
    for layer in ("raw/X", "layers/counts"):
        check_screen(cell_bridge.read_h5ad(replace(c, layer=layer)), counts, labels, genes)


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_a_symbol_listed_twice_is_read_out_once(tmp_path, monkeypatch):
    counts, labels, genes = cells()
    c = save(tmp_path, counts, labels, pd.DataFrame({"symbol": [*genes[:-1], "A3"]}, index=genes))
    screen, control = cell_bridge.read_h5ad(replace(c, symbols="symbol")), labels == CONTROL
    more = max((genes.index("A3"), 25), key=lambda g: expected(counts, labels, CONTROL)[:, g].var())
    assert sorted(screen.genes) == sorted(genes[:-1]) and control.sum() > 5
    at = screen.genes.index("A3")
    assert screen.control[at] == pytest.approx(expected(counts, labels, CONTROL)[:, more].mean())
    monkeypatch.setattr(cell_bridge, "VARIABLE", 4)
    c = save(tmp_path, counts, labels, [*genes[:-1], genes[0]])
    assert len(cell_bridge.read_h5ad(c).genes) == 6 + 4


def put(name, at, value):
    return lambda file: file[name].__setitem__(at, value)


def drop(name):
    return lambda file: file.__delitem__(name)


DAMAGE = {
    "codes": put("obs/target_gene/codes", 3, 99),
    "a.h5ad: -1 in X is no count": put("X/data", 5, -1),
    "nan in X is no count": put("X/data", 5, np.nan),
    "inf in X is no count": put("X/data", 5, np.inf),
    "1.5 in X is no count": put("X/data", -1, 1.5),
    "indices|index": put("X/indices", 5, 26),
    "indptr": put("X/indptr", 7, 2**30),
    "'indices'": drop("X/indices"),
    r"X is \(120, 25\), not 120 cells x 26": lambda f: f["X"].attrs.update(shape=[120, 25]),
    "'obs'": drop("obs"),
    "'_index'": drop("var/_index"),
    "there is no X in .* --layer to one of: ": drop("X"),
    "strange": lambda f: f["X"].attrs.update({"encoding-type": "strange"}),
}
WRONG = {
    "no drug in obs; set --column to one of: target_gene$": {"column": "drug"},
    f"no DMSO in obs column target_gene;.*: {CONTROL}, (\\w+, ){{9}}[.]{{3}}$": {"control": "DMSO"},
    "no name in var; set --symbols to one of: ": {"symbols": "name"},
    "no layers/a in .* --layer to one of: X$": {"layer": "layers/a"},
}


@pytest.mark.parametrize("message", [*DAMAGE, *WRONG])
def test_broken_cells_are_one_clear_line(tmp_path, message, capsys):
    counts, labels, genes = cells()
    labels[0], labels[20:70] = MARKERS[0], CONTROL  # the most frequent comes first
    c = save(tmp_path, sparse.csr_matrix(counts), pd.Categorical(labels), genes)
    if message in DAMAGE:
        edit(c, DAMAGE[message])
    flags = [f"--{k}={v}" for k, v in WRONG.get(message, {}).items()]
    with pytest.raises(SystemExit, match="2"):
        main([f"--data={c.data}", f"--embedding={c.embedding}", f"--out={tmp_path}/o", *flags])
    error = capsys.readouterr().err
    assert error.startswith(f"error: cannot read {c.data}: ") and error.count("\n") == 1, error
    assert re.search(message, error.strip()), error


def test_embeddings_must_know_every_perturbed_gene_at_the_right_width(tmp_path):
    c, (known, table) = save(tmp_path, *cells()), embeddings()
    for message, genes, rows in [
        (f"unknown genes: the embedding has no {MARKERS[0]}", known[:-1], table[:-1]),
        ("must have shape", known, table[:, :640]),
        ("one each", known, table[:-1]),
    ]:
        np.savez(c.embedding, genes=genes, embedding=rows)
        with pytest.raises(ValueError, match=message):
            cell_bridge.read_h5ad(c)


def test_h5ad_that_is_none_or_without_anndata(tmp_path, monkeypatch):
    c = save(tmp_path, *cells())
    (tmp_path / "b.h5ad").write_bytes(b"nothing")
    for name in ("b.h5ad", "c.h5ad"):
        with pytest.raises(ValueError, match=f"cannot read .*{name}: "):
            cell_bridge.read_h5ad(replace(c, data=f"{tmp_path}/{name}"))
    monkeypatch.setitem(sys.modules, "anndata.io", None)
    with pytest.raises(ValueError, match="pip install anndata"):
        cell_bridge.read_h5ad(c)


# ---- the cell and its baselines --------------------------------------------------------------


def test_the_cell_has_223617_parameters_and_starts_at_no_change():
    screen = synthetic_screen()
    cell = VirtualCell(screen.embedding, screen.delta)
    assert screen.delta.shape == (150, 2177)
    assert sum(p.numel() for p in cell.parameters()) == 223_617
    assert cell(screen.embedding).abs().max() == 0


def test_the_loss_by_hand():
    genes = ["PCNA", "SYN1", "SOX2", "INS", "HK1", "EGFR", "FOS", "OTHER"]
    error = torch.tensor([[1.0, 0, 0, 0, 0, 2, -1, 3]])
    own = (5 * (1 + 4 + 1) + 9) / (7 * 5 + 1)  # 7 genes of programs, weight 5
    scores = (1**2 + ((2 - 1) / 2) ** 2) / 6  # cell_division 1; signaling_identity the mean of two
    assert cell_bridge.loss(error, membership(genes)).item() == pytest.approx(own + scores)


@pytest.mark.parametrize("n_features", [4, 40])
def test_ridge_is_the_best_of_all_rows_left_out_one_by_one(n_features):
    rng = np.random.default_rng(n_features)
    genes = [symbols[0] for symbols in PROGRAMS.values()]
    x, x_new = rng.normal(size=(20, n_features)) + 1, rng.normal(size=(5, n_features))
    y = x[:, :2] @ rng.normal(size=(2, 6)) + 1.5 * rng.normal(size=(20, 6)) + 3
    member = membership(genes)

    def fit(x, y, k, new):
        a = x - x.mean(0)
        w = np.linalg.solve(a.T @ a + k * np.eye(n_features), a.T @ (y - y.mean(0)))
        return y.mean(0) + (new - x.mean(0)) @ w

    def left_out(k):
        rest = [np.arange(20) != i for i in range(20)]
        error = np.concatenate([fit(x[r], y[r], k, x[~r]) - y[~r] for r in rest])
        return cell_bridge.loss(torch.tensor(error), member.double()).item()

    unit = np.linalg.eigvalsh((x - x.mean(0)) @ (x - x.mean(0)).T).mean()
    k = min(unit * np.logspace(-4, 4, 33), key=left_out)
    assert unit * 1e-4 < k < unit * 1e4
    ours = cell_bridge.ridge(*map(torch.tensor, (x, y, x_new)), member)
    assert np.allclose(ours, fit(x, y, k, x_new), atol=1e-4)


def test_the_metrics():
    rng = np.random.default_rng(0)
    genes = [symbols[0] for symbols in PROGRAMS.values()] + ["A", "B"]
    p, t = rng.normal(size=(2, 9, 8))
    row = measure(torch.tensor(p), torch.tensor(t), membership(genes))
    r = lambda a, b: np.corrcoef(a, b)[0, 1]  # noqa: E731
    assert row["score_r"] == pytest.approx(r(p[:, :6].ravel(), t[:, :6].ravel()))
    assert row["score_r_genes"] == pytest.approx(
        np.mean([r(p[:, i], t[:, i]) for i in range(6)]), abs=1e-6
    )
    assert row["delta_r"] == pytest.approx(np.mean([r(a, b) for a, b in zip(p, t)]))
    assert row["mse"] == pytest.approx(((p - t) ** 2).mean())
    constant = torch.tensor(p[:1]).float().expand(9, -1)
    assert measure(constant, torch.tensor(t), membership(genes))["score_r_genes"] == 0
    assert measure(constant * 0, torch.tensor(t), membership(genes))["delta_r"] == 0


def test_training_is_its_seed_and_leaves_the_global_generator_alone(quick):
    screen, state = synthetic_screen(), torch.get_rng_state()
    x, y = screen.embedding[:20], screen.delta[:20]
    cells = [islice(cell_bridge.train(x, y, screen.member, seed), 2, None) for seed in (0, 0, 1)]
    first, same, other = (next(cell).net[0].weight for cell in cells)
    assert torch.equal(first, same) and not torch.allclose(first, other, atol=0.01)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("seed", [0, 1])
def test_on_the_synthetic_screen_the_cell_beats_the_mean(seed, quick):
    _, steps, table = validate(synthetic_screen(seed), seed)
    assert list(table) == ["cell", "no change", "mean delta", "ridge"] and steps > 10
    cell, nothing, mean, ridge = table.values()
    assert cell["score_r"] > mean["score_r"] + 0.08
    assert cell["score_r_genes"] > 0.6 and ridge["score_r_genes"] > 0.6
    assert mean["score_r_genes"] == 0 and set(list(nothing.values())[:3]) == {0}
    assert cell["mse"] < 0.98 * mean["mse"] and mean["mse"] < nothing["mse"]


def test_nothing_of_the_held_out_genes_is_seen_in_training(quick, monkeypatch):
    """Other values for them change what is measured, but neither cell nor steps."""
    monkeypatch.setattr(cell_bridge, "MOST_STEPS", 20)
    screen = synthetic_screen()
    cell, steps, table = validate(screen, 3)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(3))
    screen.delta[order[:30]] = 0
    screen.embedding[order[:30]] *= 10
    other, other_steps, other_table = validate(screen, 3)
    assert steps == other_steps
    assert all(torch.equal(a, b) for a, b in zip(cell.parameters(), other.parameters()))
    assert other_table["no change"]["mse"] == 0 < table["no change"]["mse"]


def test_embeddings_of_other_genes_predict_nothing(quick):
    """With the embedding shuffled over the genes the cell stops early, at about the mean."""
    screen = synthetic_screen()
    screen.embedding = screen.embedding[torch.randperm(150, generator=torch.Generator())]
    _, steps, table = validate(screen, 1337)
    assert 0 < steps < 50
    assert abs(table["cell"]["score_r_genes"]) < 0.3 and abs(table["ridge"]["score_r_genes"]) < 0.3


def test_ten_genes_are_enough(monkeypatch):
    monkeypatch.setattr(cell_bridge, "MOST_STEPS", 2)
    table = validate(Screen(*small_screen(10).values()), 0)[2]
    assert np.isfinite([list(row.values()) for row in table.values()]).all()


def test_synthetic_scores_are_predictions_from_the_embedding():
    screen, scores = synthetic_screen(4), synthetic_scores(4)
    assert scores.shape == (150, 6) and set(screen.perturbations) < set(MARKERS)
    true = screen.delta @ screen.member
    assert pearson(scores.T, true.T).min() > 0.97 and (scores - true).abs().max() > 1e-3
    assert scores is synthetic_scores(4) and not torch.equal(scores, synthetic_scores(5))
    down = [scores[i, p] - scores[:, p].mean() for i, gene in enumerate(screen.perturbations)
            for p, symbols in enumerate(PROGRAMS.values()) if gene in symbols]  # fmt: skip
    assert np.mean(down) < -0.05  # a knock-down lowers its own program


def test_readout_decay_is_a_moving_average_of_the_membranes():
    c = SimpleNamespace(n_layer=2, n_hidden=3, n_embd=4, readout_decay=0.75)
    readout = MembraneReadout(c)
    membranes = torch.randn(2, 5, 6)
    h, average = membranes.tanh(), torch.zeros(2, 6)
    seen = SimpleNamespace(membranes=membranes.split(3, -1))
    out, state = readout(None, None, seen, Report())
    for t in range(5):
        average = 0.75 * average + 0.25 * h[:, t]
        torch.testing.assert_close(out[:, t], readout.mix(average, Report()))
    last, _ = readout(
        None, state, SimpleNamespace(membranes=membranes[:, :1].split(3, -1)), Report()
    )
    torch.testing.assert_close(last[:, 0], readout.mix(0.75 * average + 0.25 * h[:, 0], Report()))


# ---- embeddings of proteins ------------------------------------------------------------------

FASTA = """>sp|P1|A_HUMAN C->U-editing protein OS=Homo sapiens GN=ABC1 PE=1
MKV
L*
>sp|P2|A2_HUMAN a fragment GN=ABC1
MK
>XYZ no name of a gene
acde
"""


class FakeESM2:
    """Stands for transformers' tokenizer and model: a residue's hidden state is its letter."""

    from_pretrained = classmethod(lambda cls, name, **_: cls())
    eval = lambda self: self  # noqa: E731

    def __call__(self, text="", return_tensors=None, hidden=None):
        if hidden is None:
            codes = torch.tensor([1000.0, *map(ord, text), 1000.0])
            return {"hidden": codes[None, :, None].expand(-1, -1, 1280)}
        return SimpleNamespace(last_hidden_state=hidden)


def test_proteins_become_embeddings(tmp_path, monkeypatch, capsys):
    argv = [str(tmp_path / "p.fasta"), str(tmp_path / "esm2.npz")]
    (tmp_path / "p.fasta").write_text(FASTA)
    monkeypatch.setitem(sys.modules, "transformers", None)

    def mistake(argv):
        with pytest.raises(SystemExit, match="2"):
            esm2.main(argv)
        return capsys.readouterr().err

    assert "pip install transformers" in mistake(argv)
    fake = SimpleNamespace(AutoTokenizer=FakeESM2, EsmModel=FakeESM2)
    monkeypatch.setitem(sys.modules, "transformers", fake)
    esm2.main(argv)
    genes, embedding = cell_bridge.read_npz(argv[1], "genes", "embedding")
    assert genes.tolist() == ["ABC1", "XYZ"] and embedding.shape == (2, 1280)
    assert embedding[0, 0] == np.float32(np.mean([*map(ord, "MKVL")]))
    for text, reason in (("MKVL", "begins with >"), (">A\nM4", "damaged at >A"), ("", "no FASTA")):
        (tmp_path / "p.fasta").write_text(text)
        assert reason in mistake(argv)
    assert "OUT.npz" in mistake(argv[:1])


# ---- the command and its file ----------------------------------------------------------------


def test_command_writes_one_file_that_load_cell_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cell_bridge, "MOST_STEPS", 9)
    np.savez(tmp_path / "a.npz", **small_screen(40))
    argv = [f"--data={tmp_path}/a.npz", f"--out={tmp_path}/new/cell.pt"]
    main([*argv, f"--result={tmp_path}/r.json", "--seed=5"])
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "r.json").read_text())
    assert list(result) == ["what", "data", "seed", "table"] and result["seed"] == 5
    assert result["data"] == "a.npz"
    assert all(row in printed for row in ("cell", "no change", "mean delta", "ridge"))
    scores, genes = load_cell(tmp_path / "new" / "cell.pt")
    assert genes == MARKERS[:40] and scores.shape == (40, 6)
    file = torch.load(tmp_path / "new" / "cell.pt", weights_only=True)
    assert file["table"] == result["table"] and file["data"] == result["data"]
    arrays = small_screen(40)
    screen = Screen(*arrays.values())
    assert screen.genes == arrays["genes"].tolist() and screen.perturbations == MARKERS[:40]
    assert np.allclose(screen.delta, arrays["profiles"] - arrays["control"], atol=1e-6)
    assert np.allclose(screen.embedding, arrays["embedding"])
    cell = VirtualCell(screen.embedding, screen.delta)
    cell.load_state_dict(file["cell"])
    assert torch.allclose(cell(screen.embedding) @ screen.member, scores, atol=1e-6)


@pytest.mark.parametrize("flag", ["--data=a.csv", "--data=a.h5ad", "--embedding=e.npz"])
def test_wrong_settings_end_in_one_line(flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([flag])
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("flag", ["out", "result"])
def test_what_cannot_be_written_is_found_before_training(tmp_path, flag, monkeypatch, capsys):
    monkeypatch.setattr(cell_bridge, "validate", None)
    (tmp_path / "file").write_text("kept")
    with pytest.raises(SystemExit, match="2"):
        main([f"--out={tmp_path}/file", f"--{flag}={tmp_path}"])
    assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "kept"
