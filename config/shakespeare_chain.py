"""The lowest loss on Shakespeare in 15 to 30 minutes on two cores: three models of one shape, each
the student of the one before it. The average of the last two is better still:

    python train.py config/shakespeare_chain.py
    python train.py --eval_only --init_from=out/shakespeare_chain \
        --average=out/shakespeare_chain/ckpt_gen2.pt
"""
out_dir = "out/shakespeare_chain"
n_layer = 6
n_head = 4
n_kv_head = 1
n_embd = 256
mlp = "swiglu"
n_value_embed = 3
block_size = 256
batch_size = 8
optimizer = "normuon"
weight_decay = 0.3
born_again = (1100, 3000)
max_iters = 5200
distill = 0.5
distill_ce = 0.5
eval_interval = 5200
