"""Embed proteins with ESM2, for `python cell_bridge.py --data=cells.h5ad --embedding=esm2.npz`.

    pip install transformers
    python -m experiments.esm2 proteins.fasta esm2.npz

A gene's name is GN=NAME of a header, as UniProt writes it, else the header's first word. Of several
proteins of a gene the longest counts. ESM2-650M (Lin et al. 2023) gives each residue 1,280 numbers;
their mean over the protein is its embedding.
"""

import re
import sys

import numpy as np
import torch
from tqdm import tqdm

import config

MODEL = "facebook/esm2_t33_650M_UR50D"
MOST = 1022  # residues that ESM2 was trained to see; of a longer protein the first ones count


def read_fasta(path):
    """{gene: sequence}; ValueError, one line, if the file is none."""
    found = {}
    with open(path) as file:
        records = re.split("^>", file.read(), flags=re.M)
    for record in records[1:]:
        header, _, lines = record.partition("\n")
        gene = re.search(r"\bGN=(\S+)", header) or re.match(r"(\S+)", header)
        sequence = re.sub(r"[\s*]", "", lines).upper()
        if not gene or not sequence.isalpha():
            raise ValueError(f"{path} is damaged at >{header[:40]}: name, then amino acids")
        found[gene[1]] = max(found.get(gene[1], ""), sequence, key=len)
    if records[0].strip() or not found:
        raise ValueError(f"{path} is no FASTA file: it begins with > and a name")
    return found


def main(argv):
    with config.one_line():
        if len(argv) != 2 or not argv[1].endswith(".npz"):
            raise ValueError("write python -m experiments.esm2 PROTEINS.fasta OUT.npz")
        config.writable(argv[1])
        proteins = read_fasta(argv[0])
        try:
            from transformers import AutoTokenizer, EsmModel
        except ImportError:
            raise ValueError("ESM2 needs transformers: pip install transformers") from None
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        model = EsmModel.from_pretrained(MODEL, add_pooling_layer=False).eval()
        embedding = []
        for sequence in tqdm(proteins.values(), "proteins", disable=None):
            tokens = tokenizer(sequence[:MOST], return_tensors="pt")
            with torch.no_grad():
                hidden = model(**tokens).last_hidden_state[0]
            embedding.append(hidden[1:-1].mean(0).numpy())  # without the marks of both ends
        np.savez(argv[1], genes=np.array([*proteins]), embedding=np.array(embedding))
        print(f"wrote {argv[1]}: {len(proteins)} genes")


if __name__ == "__main__":
    main(sys.argv[1:])
