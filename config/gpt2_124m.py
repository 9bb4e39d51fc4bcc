"""A GPT of GPT-2's size (124M in blocks and head) on FineWeb's public token files, for GPUs.
Half a million tokens a step; python prepare.py --help says how to make the dataset."""
out_dir = "out/gpt2_124m"
dataset = "fineweb"
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
batch_size = 32
gradient_accumulation_steps = 16
max_iters = 3250
eval_interval = 250
eval_tokens = 10485760
