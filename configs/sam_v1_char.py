# python train.py configs/sam_v1_char.py --dataset=shakespeare.txt
# Real Sam V1: characters, plain recurrent LIF layers, no residual, no norm. About 1M parameters.
# Expect losses to fall; no figures have been measured yet.
tokenizer = "char"
vocab_size = 256
n_embd = 64
n_hidden = 512
n_layer = 2
residual = "none"
norm = False
theta = 0.25  # without a norm the currents are small
stress_gain = 0.0
diversity = 0.0
phases = "stories:64"
