# python train.py configs/snn_6m.py
# 6.04M parameters; spikes feed every matrix but the readout's; fast weights, no attention.
# --spikes=False is the float control.
# Expect 0.85 held-out bits per byte after 6M tokens of TinyStories at 20% of the synaptic
# operations; gpt_6m with Muon has 0.80.
block = "snn"
vocab_size = 4096
n_embd = 384
n_hidden = 384
n_layer = 4
encoder = "float"
d_ff = 856
n_head = 6
beta_low = 0.02
beta_high = 0.5
surrogate = "triangle"
slope = 1.0
theta = 0.8
noise = 0.5  # against overfitting
levels = 3

# firing: about this share of all synaptic operations, counted dense, is triggered
rate_target = 0.19
rate_weight = 30.0
rate_penalty = "synops"

# optimiser
optimizer = "muon"
lr = 4e-3
muon_lr = 0.02
muon_decay = 0.1
weight_decay = 0.5
tokens_per_step = 2048
micro_tokens = 2048
max_steps = 3000
warmup_steps = 100

phases = "stories:128"
eval_interval = 250
eval_length = 128
