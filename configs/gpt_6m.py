# python train.py configs/gpt_6m.py
# The control: a causal transformer of the same 6.04M parameters, data, optimiser and schedule.
block = "gpt"
encoder = "float"
n_hidden = 256
n_layer = 6
n_head = 8
d_ff = 1112
window = 64
