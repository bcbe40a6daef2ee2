# python train.py configs/sam_6m.py
# Real Sam, 6.05M parameters, on whatever text there is: downloaded with a network, else built in.
# Expect, on the nursery and 2 CPU cores without bfloat16: 7 minutes, 0.29 held-out bits per byte
# (the true entropy is 0.15).
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

# optimiser: a step of 8 sequences of 64 tokens, or as many tokens in another shape
lr = 2e-3
min_lr = 0.0
tokens_per_step = 512
max_steps = 940
warmup_steps = 60

# curriculum: each of the first four phases ends after 2% of the steps at the latest; then a batch
# is half conversations, half stories
phases = "words:8 phrases:16 sentences:32 stories:64 conversations:64"
phase_share = 0.02
rehearse = 0.5
eval_interval = 94
