"""The quickest way to what nanoGPT's CPU recipe reaches on Shakespeare (val 1.88).
Seconds of steps instead of a minute."""
out_dir = "out/shakespeare_cpu"
n_layer = 4
n_head = 4
n_kv_head = 1
n_embd = 128
block_size = 64
batch_size = 12
max_iters = 300
eval_interval = 300
compile = False  # it would take longer than the whole training
