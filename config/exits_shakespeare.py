"""Six blocks with an exit after each of them: tokens leave early where an exit is sure (sample.py --exit), and the first blocks
can draft for the rest (sample.py --speculate). Five minutes on two CPU cores."""
out_dir = "out/exits_shakespeare"
layers = "A.A.A.A.A.A"
n_head = 6
n_embd = 384
block_size = 256
exit_distill = 0.5
exit_classifier = True
batch_size = 16
max_iters = 500
eval_interval = 500
