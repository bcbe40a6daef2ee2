"""Single cells of a screen, an .h5ad file, made into pseudobulk for cell_bridge.py.

The file is read part by part, so that it may be larger than memory. G genes, L labels.
"""

from collections import Counter

import numpy as np
from tqdm import tqdm


def perturbed(label, control):
    """The gene perturbed in cells of this label, or control; "" if no label, "+" if several genes.
    A label may name the control too, as those of GEARS do: A+ctrl and ctrl+A are gene A."""
    genes = [] if label == control else sorted(set(label.split("+")) - {control})
    return "+" if len(genes) > 1 else [*genes, control][0]


def read_cells(file, c, known):
    """(all genes, perturbed genes, *pseudobulk) of an open .h5ad, read part by part: AnnData itself
    holds all layers in memory, in backed mode too."""
    from anndata.io import read_elem, sparse_dataset

    def demand(setting, there, where):
        if (name := getattr(c, setting)) not in there:
            some = ", ".join(there[:10]) + ", ..." * (len(there) > 10) or "(nothing there)"
            raise ValueError(f"there is no {name} in {where}; set --{setting} to one of: {some}")

    def text(values):
        return [x.decode() if isinstance(x, bytes) else str(x) for x in values]

    places = [place for place in ("X", "raw/X") if place in file]
    places += [f"layers/{name}" for name in file.get("layers", ())]
    demand("layer", places, c.data)
    obs = read_elem(file["obs"])
    var = read_elem(file["raw/var" if c.layer == "raw/X" else "var"])
    if not (hasattr(obs, "columns") and hasattr(var, "columns")):
        raise ValueError("it is older than anndata 0.7: read and write it with anndata")
    demand("column", list(obs), "obs")
    if c.symbols:
        demand("symbols", list(var), "var")
    genes = np.array(text(var[c.symbols] if c.symbols else var.index))
    labels = text(obs[c.column].astype(object).where(obs[c.column].notna(), ""))
    frequent = [label for label, _ in Counter(labels).most_common() if label]
    demand("control", frequent, f"obs column {c.column}")

    cells = [perturbed(label, c.control) for label in labels]
    pool = sorted(set(cells) - {c.control, "", "+"})
    if unknown := [gene for gene in pool if gene not in known]:
        raise ValueError(f"unknown genes: the embedding has no {', '.join(unknown[:5])}")
    left_out = f"{cells.count('')} without a label, {cells.count('+')} with several genes"
    print(f"{len(cells)} cells; left out: {left_out}")
    X = file[c.layer] if hasattr(file[c.layer], "shape") else sparse_dataset(file[c.layer])
    if X.shape != (len(cells), len(genes)):
        raise ValueError(f"{c.layer} is {X.shape}, not {len(cells)} cells x {len(genes)} genes")
    others = " or ".join(f"--layer={place}" for place in places if place != c.layer)
    number = {gene: i for i, gene in enumerate([c.control, *pool])}
    code = np.array([number.get(gene, -1) for gene in cells])
    return genes, pool, *pseudobulk(X, code, c.layer, others or "another file: it has no more")


def pseudobulk(X, code, name="X", others="", rows=512):
    """Mean (L, G) of log1p(counts per 10^4) by label, its variance (G,) in cells of label 0.

    X (cells, G) stays on disk; `rows` cells are read at a time, of CSC all cells of as many genes
    as take the same memory. code: label of each cell, -1: left out. others: where counts may be.
    """
    from scipy.sparse import csr_matrix  # comes with anndata

    (n, G), L, is_csc = X.shape, code.max() + 1, getattr(X, "format", None) == "csc"
    total, square, depth = np.zeros((L + 1) * G), np.zeros(G), np.zeros(n)
    length, step = (G, max(1, rows * G // n)) if is_csc else (n, rows)

    def entries(what):
        """Yield (cells, genes, counts) of the entries above 0, chunk by chunk."""
        for first in tqdm(range(0, length, step), what, disable=None, unit=" chunks"):
            part = slice(first, first + step)
            chunk = X[:, part] if is_csc else X[part]
            if not isinstance(chunk, np.ndarray):
                chunk.check_format()  # scipy crashes on damaged indices elsewhere
            chunk = csr_matrix(chunk, dtype=np.float64)  # before the sum: small integers wrap
            chunk.sum_duplicates()
            chunk.eliminate_zeros()
            entry = chunk.tocoo()
            count, cell, gene = entry.data, entry.row, entry.col
            wrong = count[~((count > 0) & (count < np.inf) & (count == np.rint(count)))]
            if len(wrong):
                raise ValueError(f"{wrong[0]:g} in {name} is no count; counts may be in {others}")
            yield (cell, gene + first, count) if is_csc else (cell + first, gene, count)

    if is_csc:  # a chunk has all cells, but not all counts of one
        for cell, _, count in entries("counts per cell"):
            depth += np.bincount(cell, count, n)
    for cell, gene, count in entries("expression"):
        if not is_csc:
            depth += np.bincount(cell, count, n)
        value, label = np.log1p(1e4 * count / depth[cell]), code[cell]
        np.add.at(total, label * G + gene, value)  # label -1 counts from the end: the last row
        square += np.bincount(gene, value**2 * (label == 0), G)
    cells = np.bincount(code[code >= 0])
    mean = total.reshape(L + 1, G)[:L] / cells[:, None]
    return mean, square / cells[0] - mean[0] ** 2
