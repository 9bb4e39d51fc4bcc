"""A student with featural memories in place of its teacher's feed-forward layers.
It starts as the teacher's clone and learns to say what the teacher says (--distill_match=1: and to
give, layer by layer, what those gave). The teacher is the main job's model, or any other on the
same dataset as --teacher=PATH:

    python train.py config/softar_shakespeare.py
    python train.py config/distill_memory.py
"""
out_dir = "out/distill_memory"
teacher = "out/softar_shakespeare/ckpt.pt"
layers = "AFFFFA"
n_head = 4
n_embd = 256
block_size = 256
history = 256
aggregate = 1
n_segment = 2
n_span = 16
span = 4
mem_head = 2
distill_match = 0.0
max_iters = 200
batch_size = 16
eval_interval = 200
