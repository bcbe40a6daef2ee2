# python train.py configs/sam_6m.py
# Real Sam, 6.05M parameters, on whatever text there is: downloaded with a network, else built in.
# Expect, on the nursery and 2 CPU cores: 12 minutes, 0.26 held-out bits per byte (entropy 0.15).
block = "sam"
vocab_size = 4096
n_embd = 256
n_hidden = 512
n_layer = 6
encoder = "spikes"
residual = "gated"

# environment and firing
stress_gain = 0.3
diversity = 0.4
rate_target = 0.1
rate_weight = 10.0

# optimiser: a step of 16 sequences of 64 tokens, or as many tokens in another shape
lr = 3e-3
min_lr = 0.0
tokens_per_step = 1024
max_steps = 700
warmup_steps = 35

# curriculum: the first four phases end after 5% of the steps at the latest; the last one is half
# conversations and half stories
phases = "words:8 phrases:16 sentences:32 stories:64 conversations:64"
phase_share = 0.05
rehearse = 0.5
eval_interval = 35
eval_tokens = 8192
