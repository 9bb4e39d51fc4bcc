"""The lowest loss on Shakespeare within 15 minutes on two cores."""
out_dir = "out/shakespeare_best"
n_layer = 6
n_head = 4
n_embd = 256
mlp = "swiglu"
channel_drop = 0.1
block_size = 256
batch_size = 8
max_iters = 3000
eval_interval = 1000
