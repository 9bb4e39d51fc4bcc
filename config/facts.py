"""Facts that are told once and asked later, far outside the window, by an associative memory.
python prepare.py facts makes the data; about half an hour on two cores. Then read facts of your own
into it: python sample.py learn --help."""
out_dir = "out/facts"
dataset = "facts"
layers = "AAAM"
n_head = 4
n_embd = 128
block_size = 256
mem_chunk = 64
mem_size = 8192
mem_head = 2
mem_dim = 64
mem_top = 8
mem_novelty = 2.0
mem_noise = 0.1
mem_store = 0.95
stream = 96
batch_size = 8
max_iters = 10000
eval_interval = 2000
