"""The layout of softAR's source: means, then tokens, then soft tokens.
By position: 1 is a mean of all that ever came before, 2 and 3 are means of the halves of the
history, 4 to 100 are tokens, and the rest is soft in a quarter of the rows. Made for python
sample.py --soft --collapse=every:32. About five minutes on two cores."""
out_dir = "out/softar_layout"
n_layer = 6
n_head = 4
n_embd = 256
block_size = 128
history = 256
running_mean = 1
n_segment = 2
n_soft = -31
max_iters = 400
batch_size = 32
eval_interval = 400
