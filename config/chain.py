"""Following 2 to 4 pointers with as many soft steps of thought before the answer.
python prepare.py chain makes the data."""
out_dir = "out/chain"
dataset = "chain"
n_layer = 2
n_head = 2
n_embd = 128
block_size = 55
n_think = 4
score_last = 1
train_on_all = True
batch_size = 64
max_iters = 2500
eval_interval = 1250
