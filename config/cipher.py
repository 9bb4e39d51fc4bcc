"""A window of 16 with a history of 256 on the cipher task: what slots are for.
python prepare.py cipher makes the data."""
out_dir = "out/cipher"
dataset = "cipher"
n_layer = 4
n_head = 4
n_embd = 128
block_size = 16
history = 256
aggregate = 1
n_segment = 2
n_span = 64
span = 4
batch_size = 32
max_iters = 800
eval_interval = 400
