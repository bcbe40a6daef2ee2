# python train.py configs/gpt_6m.py
# The control: a causal transformer of the same size, 6.04M parameters.
# Expect, on TinyStories with --phases=stories:64 --max_steps=2930 (6M tokens): 0.90 held-out bits
# per byte, where sam_6m.py has 1.01.
block = "gpt"
vocab_size = 4096
n_embd = 256
n_hidden = 256
n_layer = 6
encoder = "float"
n_head = 8
d_ff = 1112
window = 64  # tokens that attention sees

# optimiser: the rate was chosen for each of the two; a step is four times as large as in sam_6m.py
lr = 4e-3
tokens_per_step = 2048
micro_tokens = 2048
max_steps = 1000
warmup_steps = 50

phases = "words:8 phrases:16 sentences:32 stories:64 conversations:64"
phase_share = 0.2
rehearse = 0.5
eval_interval = 50
