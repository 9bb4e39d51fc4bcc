"""A formal language by 4 stacks behind a recurrence: trained on lengths to 40, scored to 500.
With --n_head=16 --max_iters=600 it was solved on each of three seeds, at over six times the time a
step (docs/RESULTS.md#stack).
python prepare.py reverse_string makes the data."""
out_dir = "out/formal_s"
dataset = "reverse_string"
layers = "RS"
n_head = 4
n_embd = 64
block_size = 1024
batch_size = 4
learning_rate = 0.01
muon_lr = 0.02
max_iters = 1000
eval_interval = 1000
