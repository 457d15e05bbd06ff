#!/usr/bin/env bash
# What only a card can tell, in at most nine minutes on one H100 or H200; each result goes into a JSON file at once.
#
#   bash experiments/card.sh OUT.json FILE MODEL      pairs, and a model whose tokenizer reads them (real lengths)
set -u
out=$1 file=$2 model=$3
run() { python -m experiments.card record "$out" "$@"; }  # a name, seconds at most, a command

# ---- packed rows of real lengths against a pair to a row: ms, fill, MFU of a step of Gemma-2-2B
step="python -m experiments.bench --shape gemma-2-2b --checkpointing --rank_of 4 --methods fpo --rounds 3"
run packed 75 $step --dataset "$file" --model "$model" --pairs 16
run a_pair_to_a_row 60 $step --dataset "$file" --model "$model" --pairs 16 --unpacked

# ---- attention's kernels; the head in slices of the vocabulary (ours) and of tokens (torch's checkpoint)
run attention 45 python -m experiments.card attention
run head 25 python -m experiments.card head

# ---- runs to their end: the toy, FSDP on one rank, uncompiled, a signal; rewards and D at step 1
train="--method fpo --preset toy --steps 20 --eval_every 0 --no_eval_kl"
run toy 45 python train.py $train --out runs/card/toy
run step_1 10 python -m experiments.card step_1 runs/card/toy
run fsdp 45 torchrun --standalone --nproc_per_node 1 train.py $train --shard fsdp --out runs/card/fsdp
run no_compile 30 python train.py $train --no_compile --out runs/card/no_compile
run sigterm 50 timeout --signal TERM 35 python train.py $train --steps 5000 --out runs/card/sigterm

# ---- the tests, last since they are the longest
run tests 155 python -m pytest -n 0 -x tests/test_cuda.py
