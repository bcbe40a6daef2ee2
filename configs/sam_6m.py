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

# optimiser: a step of 32 sequences of 64 tokens, or as many tokens in another shape
lr = 2e-3
tokens_per_step = 2048
micro_tokens = 2048
max_steps = 2000
warmup_steps = 50

# curriculum
phases = "words:8 phrases:16 sentences:32 stories:64 conversations:64"
phase_share = 0.2
rehearse = 0.5
eval_interval = 50
