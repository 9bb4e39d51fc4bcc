"""A formal language by 16 small stacks behind a recurrence.
Trained on lengths to 40, scored to 500. Some seeds find the solution, others stay near chance.
python prepare.py reverse_string makes the data."""
out_dir = "out/formal_s"
dataset = "reverse_string"
layers = "RS"
n_head = 16
n_embd = 64
block_size = 1024
batch_size = 4
learning_rate = 0.01
muon_lr = 0.02
max_iters = 600
eval_interval = 600
