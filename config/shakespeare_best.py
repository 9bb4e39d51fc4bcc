"""The lowest loss on Shakespeare within 15 minutes on two cores. Its window is 512: the first characters of a window, which
know little, are fewer."""
out_dir = "out/shakespeare_best"
n_layer = 6
n_head = 4
n_embd = 256
mlp = "swiglu"
channel_drop = 0.1
block_size = 512
batch_size = 4
max_iters = 3000
eval_interval = 1000
always_save_checkpoint = False
