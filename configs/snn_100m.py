# torchrun --nproc_per_node=8 train.py configs/snn_1b.py
# 1.04B parameters, fully spike-driven: every matrix is fed by spikes, the output head too.
# Plan the run first: python bench.py params configs/snn_1b.py --gpus=8
block = "snn"
vocab_size = 50304
n_embd = 768
n_hidden = 768
n_layer = 13
d_ff = 3072
encoder = "float"
head = "spikes"
beta_low = 0.02
beta_high = 0.95
surrogate = "triangle"
slope = 1.0
theta = 1.0
