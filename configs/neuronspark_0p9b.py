# torchrun --nproc_per_node=8 train.py configs/neuronspark_0p9b.py --dataset=FOLDER
# NeuronSpark-0.9B (arXiv 2603.16148): 874,142,120 parameters, `python bench.py params` counts them.
# Expect losses to fall; no run of this size has been made here.
block = "spark"
vocab_size = 6144
n_embd = 896
n_hidden = 896
n_layer = 20
n_state = 8
k_max = 16
d_ff = 2688
encoder = "float"

# firing is left to itself; frames have their price
rate_weight = 0.0
ponder_weight = 0.01
stress_gain = 0.0

# optimiser: decays and thresholds, and the biases that they come from, learn ten times as fast
lr = 2e-4
neuron_lr = 10.0
beta2 = 0.999
weight_decay = 0.0
tokens_per_step = 131072
micro_tokens = 4096
max_steps = 20000
warmup_steps = 1000

phases = "stories:512"
eval_length = 512
