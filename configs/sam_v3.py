# python train.py configs/sam_v3.py
# Real Sam V3: thresholds that follow each neuron's firing rate, in place of the penalty; 6M.
# Expect about 4.2 held-out nats per token on TinyStories after 80 steps; no long run was made yet.
homeostasis = 0.02
rate_weight = 0.0
stress_gain = 0.0
diversity = 0.0
phases = "sentences:32 stories:64 conversations:64"
