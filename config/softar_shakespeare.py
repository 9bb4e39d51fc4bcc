"""The main job: a GPT whose context is slots and 256 tokens, on Shakespeare, by character.
The slots are an aggregate, segments and spans. A tenth of what it reads in training is soft: most
of that at the front of the window, where tokens stay soft in decoding once it has folded.
Three to eleven minutes on two cores (those with bf16 are the faster ones)."""
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
soft_rate = 0.05
n_soft = 64
max_iters = 400
batch_size = 16
eval_interval = 400
sample_at_end = 300
