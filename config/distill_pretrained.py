"""A pretrained model with memories in place of all of its feed-forward layers: learned slots in the
first 20 blocks, and in the last 10 entries of what was read. All but the memories is copied from
the teacher. It learns the teacher's predictions and, layer by layer, the outputs of the layers that
were replaced. The teacher is SmolLM2-135M (docs/HOWTO.md imports it), the dataset any text in its
tokens:

    python prepare.py book.txt --tokenizer=out/smol --name=book_smol
    python train.py config/distill_pretrained.py --dataset=book_smol
"""
out_dir = "out/distill_pretrained"
teacher = "out/smol"
layers = "FFFFFFFFFFFFFFFFFFFFMMMMMMMMMM"
n_embd = 576
n_head = 9
n_kv_head = 3
head_dim = 64
norm_eps = 1e-5
rope_base = 100000.0
init = "gpt2"
qk_norm = False
embed_norm = False
block_size = 128
batch_size = 2
mem_head = 2
optimizer = "adamw"
learning_rate = 3e-4
warmup_iters = 10
max_iters = 200
eval_interval = 200
