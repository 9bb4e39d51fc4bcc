"""Six blocks with exits after the second, third and fourth.
Tokens leave early where an exit is sure (sample.py --exit), and the first blocks can draft for the
rest (sample.py --speculate). Five minutes on two CPU cores with bf16, twenty on others."""
out_dir = "out/exits_shakespeare"
layers = "AA.A.A.AA"
n_head = 8
n_embd = 512
block_size = 256
exit_keys = True
exit_distill = 0.5
exit_classifier = True
batch_size = 8
max_iters = 400
eval_interval = 400
