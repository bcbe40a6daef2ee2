# python train.py configs/spikewhale_216m.py
# SpikeWhale, 216M parameters; more than half of them are rows of the n-gram memory.
# Meant for a GPU and a large text; on a CPU it is for counting: python bench.py params.
block = "whale"
vocab_size = 16512
n_embd = 1024
n_hidden = 1488
n_layer = 4
encoder = "float"

# neurons: four layers that gene programs set, read out by all their membranes
modulation = "program"
beta_low = 0.9
beta_high = 0.9
surrogate = "fast_sigmoid"
slope = 20.0
rate_target = 0.2
rate_weight = 50.0
rate_penalty = "below"
rec_heads = 1

traits = "engram:65536,19 hrm:2 spike_attn:16 progsem:18 kuramoto:64 mtp:2 jepa"

# optimiser
optimizer = "muon"
lr = 1e-3
muon_lr = 5e-3
tokens_per_step = 65536
micro_tokens = 16384
max_steps = 32000
warmup_steps = 500

tokenizer = "lengthmax"
# streamed, nothing large is stored: what the model card says
dataset = "stream:HuggingFaceFW/fineweb-edu/sample-10BT@0.75"
dataset += ",HuggingFaceTB/finemath/finemath-4plus@0.25"
phases = "stories:512"
eval_interval = 500
eval_length = 512
