"""What nanoGPT's A100 recipe reaches on Shakespeare (val 1.4697), in minutes on two cores."""
out_dir = "out/shakespeare"
n_layer = 6
n_head = 4
n_kv_head = 1
n_embd = 256
mlp = "swiglu"
n_value_embed = 3
block_size = 256
batch_size = 8
max_iters = 1450
optimizer = "normuon"
weight_decay = 0.3
eval_interval = 1450
