"""The whole script, from the command line, learns something that cannot be missed."""

from __future__ import annotations

import transformers
from conftest import metrics_of, run_script, save_model, script_path, small_qwen3
from tokenizers import Tokenizer, decoders, models

TASK = """
def problems(split, seed):
    for i in range(40):
        yield {"prompt": f"{split} {i}", "answer": None}


def reward(problem, completion):
    return 1 - len(completion) / 16
"""


def visible_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a character, and EOS, the only one that leaves no trace in the text: a
    completion of nothing but <unk> would look as if it had stopped at once."""
    characters = ["<eos>", *map(chr, range(32, 127))]
    vocabulary = {character: i for i, character in enumerate(characters)}
    backend = Tokenizer(models.BPE(vocabulary, merges=[]))
    backend.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>"
    )


def test_loop_that_does_not_learn(tmp_path):
    """Sampling, scoring, masks and signs may each pass their own tests and the loop
    still learn nothing. The plainest reward there is, "stop at once", takes a random
    model from the full length to the stop token alone in a handful of steps.
    https://github.com/huggingface/trl/issues/5333"""
    (tmp_path / "task.py").write_text(TASK)
    flags = (
        "--task task.py --steps 25 --prompts-per-step 8 --group-size 16 --device cpu"
    )
    flags += " --max-new-tokens 16 --learning-rate 2e-2 --warmup-steps 0 --run-dir run"
    flags += " --eval-prompts 16 --eval-samples 4 --dtype float32 --model"
    tokenizer = visible_tokenizer()
    model = small_qwen3(len(tokenizer), eos_token_id=0)
    model = save_model(tmp_path / "model", model, tokenizer)
    done = run_script(script_path("grpo"), *flags.split(), model, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    steps = metrics_of(tmp_path / "run")
    assert [record["step"] for record in steps] == list(range(26))
    assert steps[0]["eval/pass@1"] < 0.2 and steps[1]["completion_length"] > 12
    assert steps[-1]["eval/pass@1"] > 0.95 and steps[-1]["eval/reward"] > 0.98
    assert steps[-1]["completion_length"] < 1.2
    assert steps[-1]["truncated_share"] < 0.02 < 0.5 < steps[1]["truncated_share"]
