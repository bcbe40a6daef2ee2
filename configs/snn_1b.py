# torchrun --nproc_per_node=8 train.py configs/snn_1b.py
# 1.07B parameters, fully spike-driven: every matrix is fed by spikes, the output head too.
# Fast weights are carried from token to token without end, and fade: a head begins with gamma 0.5
# to 0.995. Not included: Project Nord's experts and memory neurons, fed by floats, which cost 31M
# parameters and 8.4M float multiplications a token: --traits="memory:256 moe:8,896"
# Never trained in full yet. Plan the run first: python bench.py params configs/snn_1b.py --gpus=8
block = "snn"
vocab_size = 50304
n_embd = 2048
n_hidden = 2048
n_layer = 28
d_ff = 5376
n_head = 32
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
rate_floor = 0.002  # and neurons that hardly fire are pressed to fire more: none may die

# data: streamed, nothing large is stored
dataset = "stream:HuggingFaceFW/fineweb-edu/sample-100BT"
tokenizer = "gpt2"
phases = "stories:1024"

# optimiser: half a million tokens per step, whatever the number of processes
optimizer = "muon"
lr = 1e-3
muon_lr = 0.02
tokens_per_step = 524288
micro_tokens = 16384
checkpointing = True
max_steps = 40000
warmup_steps = 500

eval_interval = 500
eval_length = 1024
