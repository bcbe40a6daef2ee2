# python train.py configs/sam_v2.py
# Real Sam V2: byte-pair tokens, residual blocks with layer norm, conversations. 3M parameters.
# Expect losses to fall; no figures have been measured yet.
n_layer = 3
residual = "plain"
stress_gain = 0.0
diversity = 0.0
phases = "stories:64 conversations:64"
