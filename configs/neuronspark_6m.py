# python train.py configs/neuronspark_6m.py
# NeuronSpark (arXiv 2603.16148) at the size of sam_6m.py and gpt_6m.py, 6.03M parameters. A frame
# costs as much as all layers of those, so there are 4 at most, not 16: two CPU cores are slow.
# Expect 1.03 held-out bits per byte after 3M tokens of TinyStories (gpt_6m.py 0.96, sam_6m.py
# 1.06), at 240 to 750 tokens/s on a CPU core of its own.
block = "spark"
vocab_size = 4096
n_embd = 128
n_hidden = 128
n_layer = 6
n_state = 8
k_max = 4
d_ff = 448
encoder = "float"

# firing is left to itself; frames have their price
rate_weight = 0.0
ponder_weight = 0.001  # at the paper's 0.01 fewer frames (2.7, not 3.8), and as many bits
stress_gain = 0.0

# optimiser: decays and thresholds, and the biases that they come from, learn faster
lr = 2e-3
neuron_lr = 5.0
tokens_per_step = 2048
micro_tokens = 512  # tensors that fit a cache: 1.4 times as fast on a CPU
max_steps = 1000
warmup_steps = 50

phases = "words:8 phrases:16 sentences:32 stories:64 conversations:64"
phase_share = 0.2
rehearse = 0.5
eval_interval = 50
