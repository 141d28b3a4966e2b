"""Options of other programs (nanoGPT, llm.c, the Trainer of transformers), and their equivalents here."""

from __future__ import annotations

LEARNING_RATE = "use --learning-rate X"
LR_SCHEDULE = "use --lr-schedule cosine, linear or wsd"
BATCH_SIZE = "use --batch-size SEQUENCES"
TOTAL_BATCH_SIZE = (
    "use --total-batch-size TOKENS: micro-steps x --batch-size x --block-size x ranks (a multiple of one micro-step)"
)
EPOCHS = "use --max-iters STEPS: epochs x training tokens / tokens per step, which train.py prints at the start"
OUT_DIR = "use --out-dir FOLDER"
EVALUATE = "use python -m gpt2.evaluate MODEL --data NAME, which prints the loss of a model without training"
COMPILE = "omit it: the kernels are always compiled (TINYGRAD2_KERNELS=reference turns them off)"
TRACKING = "read the report.html and log.jsonl that every run writes; wandb is not supported"
INIT = "use --init MODEL to fine-tune; a new model needs no option, and a run in the out-dir is resumed automatically"
RANKS = "start one process per GPU or socket instead: mpirun -n 4 python train.py"
SAMPLES = "use -n N (--samples)"
PROMPT = "use -p TEXT (--prompt), or --prompt-file FILE"
MAX_TOKENS = "use -m N (--max-tokens)"
MODEL = "use --checkpoint MODEL: a folder, a file, the out-dir of a run, or a name such as gpt2"

TRAIN = {
    "--accumulate-grad-batches": TOTAL_BATCH_SIZE,
    "--adam-beta1": "use --beta1 X",
    "--adam-beta2": "use --beta2 X",
    "--always-save-checkpoint": "use --save-interval STEPS; the best checkpoint is always kept",
    "--amp": "use --dtype bfloat16, on a GPU",
    "--backend": RANKS,
    "--bf16": "use --dtype bfloat16, on a GPU",
    "--bias": "omit it: GPT-2 has biases",
    "--checkpoint": "use --init MODEL to fine-tune, or --out-dir FOLDER to resume a run",
    "--compile": COMPILE,
    "--context-length": "use --block-size TOKENS",
    "--dataset": "use --data NAME",
    "--ddp": RANKS,
    "--decay-lr": "for a constant rate, set --min-lr to the value of --learning-rate",
    "--do-eval": EVALUATE,
    "--early-stopping": "use --early-stop N",
    "--early-stopping-patience": "use --early-stop N",
    "--epochs": EPOCHS,
    "--eval-only": EVALUATE,
    "--eval-steps": "use --eval-interval STEPS",
    "--fp16": "use --dtype bfloat16, on a GPU; float16 is not supported",
    "--from-scratch": INIT,
    "--gpus": RANKS,
    "--grad-accum": TOTAL_BATCH_SIZE,
    "--grad-accumulation-steps": TOTAL_BATCH_SIZE,
    "--gradient-accumulation-steps": TOTAL_BATCH_SIZE,
    "--gradient-checkpointing": "use --recompute block",
    "--hidden-size": "use --n-embd N",
    "--init-from": INIT,
    "--logging-steps": "use --log-interval STEPS",
    "--lr": LEARNING_RATE,
    "--lr-decay-style": LR_SCHEDULE,
    "--lr-scheduler": LR_SCHEDULE,
    "--lr-scheduler-type": LR_SCHEDULE,
    "--max-grad-norm": "use --grad-clip NORM",
    "--max-length": "use --block-size TOKENS",
    "--max-steps": "use --max-iters STEPS",
    "--max-seq-length": "use --block-size TOKENS",
    "--model": INIT,
    "--model-name-or-path": INIT,
    "--n-ctx": "use --block-size TOKENS",
    "--n-positions": "use --block-size TOKENS",
    "--num-epochs": EPOCHS,
    "--num-heads": "use --n-head N",
    "--num-layers": "use --n-layer N",
    "--num-train-epochs": EPOCHS,
    "--out": OUT_DIR,
    "--output": OUT_DIR,
    "--output-dir": OUT_DIR,
    "--overwrite-output-dir": "use --fresh, which renames the existing folder",
    "--patience": "use --early-stop N",
    "--per-device-train-batch-size": BATCH_SIZE,
    "--resume": "omit it: the run in the out-dir is resumed automatically",
    "--resume-from-checkpoint": "omit it: the run in the out-dir is resumed automatically",
    "--save-steps": "use --save-interval STEPS",
    "--save-total-limit": "use --keep N",
    "--seq-len": "use --block-size TOKENS",
    "--sequence-length": "use --block-size TOKENS",
    "--steps": "use --max-iters STEPS",
    "--tokenizer": "omit it: the data set determines the tokenizer (python data/prepare.py ... --tokenizer NAME)",
    "--vocab-size": "omit it: the data's tokenizer determines the vocabulary",
    "--wandb": TRACKING,
    "--wandb-log": TRACKING,
    "--wandb-project": TRACKING,
    "--wandb-run-name": TRACKING,
    "--warmup": "use --warmup-iters STEPS",
    "--warmup-steps": "use --warmup-iters STEPS",
    "--wd": "use --weight-decay X",
}

SAMPLE = {
    "--compile": COMPILE,
    "--do-sample": "use -t X (--temperature); -t 0 is greedy decoding",
    "--file": "use --prompt-file FILE",
    "--greedy": "use -t 0 (--temperature)",
    "--init-from": MODEL,
    "--input": PROMPT,
    "--interactive-mode": "use -i (--interactive)",
    "--length": MAX_TOKENS,
    "--max-length": MAX_TOKENS,
    "--max-new-tokens": MAX_TOKENS,
    "--model": MODEL,
    "--model-name": MODEL,
    "--model-name-or-path": MODEL,
    "--nsamples": SAMPLES,
    "--num-return-sequences": SAMPLES,
    "--num-samples": SAMPLES,
    "--out-dir": MODEL,
    "--p": "use --top-p P",
    "--start": PROMPT,
    "--stop-sequence": "use --stop TEXT",
    "--temp": "use -t X (--temperature)",
    "--text": PROMPT,
    "--k": "use -k K (--top-k)",
}

PREPARE = {
    "--column": "use --text-column NAME",
    "--input": "pass the files as arguments, without an option: SOURCE...",
    "--key": "use --text-key NAME",
    "--num-proc": "use --threads N",
    "--output": "use --out FOLDER",
    "--out-dir": "use --out FOLDER",
    "--output-dir": "use --out FOLDER",
    "--sep": "use --delimiter CHARACTER",
    "--test-size": "use --val-fraction X",
    "--val-split": "use --val-fraction X",
    "--validation-split": "use --val-fraction X",
    "--workers": "use --threads N",
}
