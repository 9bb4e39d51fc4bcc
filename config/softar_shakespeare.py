"""The main job: a GPT whose context is slots and 256 hard tokens, on Shakespeare, by character.
The slots are an aggregate, segments and spans. Three to five minutes on two cores."""
out_dir = "out/softar_shakespeare"
n_layer = 6
n_head = 4
n_embd = 256
block_size = 256
history = 256
aggregate = 1
n_segment = 2
n_span = 16
span = 4
max_iters = 400
batch_size = 16
eval_interval = 400
