# python train.py configs/snn_6m.py
block = "snn"
vocab_size = 4096
n_embd = 256
n_hidden = 256
n_layer = 3
encoder = "float"
d_ff = 3248
beta_low = 0.02
beta_high = 0.95
surrogate = "triangle"
slope = 1.0
theta = 1.0

# firing
rate_target = 0.19
rate_weight = 30.0
rate_penalty = "mean"
