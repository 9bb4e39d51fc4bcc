"""Two blocks that run once a word and once in four words, in front of four that run once a
character: a quarter of an hour on one core."""
out_dir = "out/words_shakespeare"
layers = "((A)A)AAAA"
chunk = "space,4"
n_head = 4
n_embd = 256
block_size = 1024
batch_size = 4
max_iters = 1600
eval_interval = 400
