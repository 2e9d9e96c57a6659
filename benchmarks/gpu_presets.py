"""Flags of the language-model scripts for a GPU of so much memory: what gpu.py measures
and README.md shows. Imports nothing."""

LORA = "--lora-rank 32 --gradient-checkpointing"
PRESETS = {  # name: model, flags; grpo.py with 512 new tokens
    "8gb": ("0.6B", f"{LORA} --micro-batch-size 4 --rollout-batch-size 32"),
    "16gb": (
        "0.6B",
        "--gradient-checkpointing --micro-batch-size 8 --rollout-batch-size 64",
    ),
    "24gb": ("0.6B", "--micro-batch-size 4 --rollout-batch-size 128"),
    "80gb": ("1.7B", "--micro-batch-size 16 --rollout-batch-size 256"),
}
