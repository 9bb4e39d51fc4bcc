"""A formal language by GRUs: trained on lengths to 40, scored to 500.
python prepare.py parity makes the data, and --dataset=even_pairs, cycle_navigation or
modular_arithmetic takes another (made likewise)."""
out_dir = "out/formal_g"
dataset = "parity"
layers = "GG"
n_head = 4
n_embd = 64
block_size = 512
score_last = 1
train_on_all = True
batch_size = 8
muon_lr = 0.005
max_iters = 1000
eval_interval = 1000
