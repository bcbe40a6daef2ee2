# python train.py configs/spikewhale_6m.py
# SpikeWhale at laptop size: recurrent layers set by gene programs, all membranes read out, traits.
block = "whale"
vocab_size = 4096
n_embd = 256
n_hidden = 480
n_layer = 4
encoder = "float"

# neurons
modulation = "program"
beta_low = 0.9
beta_high = 0.9
surrogate = "fast_sigmoid"
slope = 20.0
rate_target = 0.2
rate_weight = 50.0
rate_penalty = "below"

traits = "engram:8192 hrm:2 spike_attn:4 progsem:18 kuramoto:32 mtp:1 jepa"

# optimiser
optimizer = "muon"
lr = 2e-3
muon_lr = 0.02
tokens_per_step = 2048
micro_tokens = 2048
max_steps = 1000
warmup_steps = 50

phases = "words:8 phrases:16 sentences:32 stories:64 conversations:64"
phase_share = 0.2
rehearse = 0.5
eval_interval = 50
