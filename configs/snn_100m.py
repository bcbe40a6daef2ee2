# torchrun --nproc_per_node=1 train.py configs/snn_100m.py
# 100M parameters, fully spike-driven as snn_1b.py is; 2.6B tokens. Never trained yet; the plan:
# python bench.py params configs/snn_100m.py --gpus=1
block = "snn"
vocab_size = 50304
n_embd = 768
n_hidden = 768
n_layer = 13
d_ff = 2048
n_head = 12
encoder = "float"
head = "spikes"
beta_low = 0.02
beta_high = 0.95
surrogate = "triangle"
slope = 1.0
theta = 0.8
levels = 3

# firing: about this share of all synaptic operations, counted dense, is triggered
rate_target = 0.1
rate_weight = 30.0
rate_penalty = "synops"

# data: streamed, nothing large is stored
dataset = "stream:HuggingFaceFW/fineweb-edu/sample-10BT"
tokenizer = "gpt2"
phases = "stories:1024"

# optimiser: as many tokens per step, whatever the number of processes
optimizer = "muon"
lr = 2e-3
muon_lr = 0.02
tokens_per_step = 131072
micro_tokens = 32768
max_steps = 20000
warmup_steps = 500

eval_interval = 500
eval_length = 1024
