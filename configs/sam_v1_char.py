# python train.py configs/sam_v1_char.py --dataset=shakespeare.txt
# Real Sam V1: characters, plain recurrent LIF layers, no residual. About 1M parameters. The norm
# before a layer is ours: without it the loss stays at that of single characters, 3.3 nats.
# Expect, on Tiny Shakespeare, about 2.0 held-out nats per character after 160 steps.
tokenizer = "char"
vocab_size = 256
n_embd = 64
n_hidden = 512
n_layer = 2
residual = "none"
stress_gain = 0.0
diversity = 0.0
phases = "stories:64"
