"""GSM8K (arXiv 2110.14168): school arithmetic in words, the last number is the answer.

    GSM8K_SUFFIX=/no_think python algos/grpo.py --model Qwen/Qwen3-0.6B \\
        --task benchmarks/tasks/gsm8k.py --prompts-per-step 32 --max-new-tokens 512 \\
        --micro-batch-size 8 --rollout-batch-size 128 --gradient-checkpointing

    GSM8K_SUFFIX  put behind each question; Qwen3's chat models think first, for more
                than 512 tokens, unless it is /no_think
    GSM8K_PATH  the data set: a hub name (default: openai/gsm8k, 7,473 problems to train
                on, 1,319 held out) or a local folder in the hub's format, for a machine
                without network: hf download openai/gsm8k --repo-type dataset
                --local-dir gsm8k

The reward is 1 if the last number in the last 1,000 characters of a completion, or in
the last \\boxed{...} there, equals the answer: 1,234 and $1234.00 are equal, 1/2 is a
half. What is thought before </think> does not count, and a thought that is not ended
earns nothing. Evaluation takes the test split in its order; a question of it that is in
the train split too is not trained on. Needs benchmarks/requirements.txt.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from decimal import Decimal

INSTRUCTION = "Reason step by step. End with the answer as a plain number."
# a minus sign directly behind a word, a number or a bracket is a difference
NUMBER = re.compile(
    r"((?<![\w)])[-−–])?\\?\$?([0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?"
    r"|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:/([0-9]+))?"
)
BOX = re.compile(r"\\boxed\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")  # and one level of braces
LATEX = {  # what is read as other numbers, and how it is written without LaTeX
    r"\{,\}": ",",
    r"\\[,!]": "",  # small spaces
    r"\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}": r"\1/\2",
    r"\^\{?[0-9]+\}?": "",  # an exponent, often of a unit
}


def last_number(text: str) -> Decimal | None:
    """The last number in a text; None if there is none."""
    for pattern, plain in LATEX.items():
        text = re.sub(pattern, plain, text)
    found = NUMBER.findall(text)
    if not found or (found[-1][2] and not int(found[-1][2])):  # divided by 0
        return None
    sign, digits, divisor = found[-1]
    number = Decimal(digits.replace(",", "")) / Decimal(divisor or 1)
    return number.copy_sign(-1 if sign else 1)


def to_problem(row: dict) -> dict:
    """A row of the data set, whose answer ends in "#### 1,234", as a problem."""
    worked, _, end = row["answer"].rpartition("####")
    number = last_number(end)
    if not worked or number is None:
        raise ValueError(f"no '#### number' in the answer {row['answer']!r}")
    solution = re.sub("<<[^>]*>>", "", worked) + f"The answer is {number}"
    suffix = os.environ.get("GSM8K_SUFFIX", "")
    content = f"{row['question']}\n\n{INSTRUCTION} {suffix}".strip()
    prompt = [{"role": "user", "content": content}]
    return {"prompt": prompt, "answer": str(number), "solution": solution}


def problems(split: str, seed: int) -> Iterator[dict]:
    """The train or (split "eval") the test split; the seed changes nothing."""
    import datasets

    path = os.environ.get("GSM8K_PATH", "openai/gsm8k")
    try:
        rows = datasets.load_dataset(path, "main")
        test = {row["question"]: to_problem(row) for row in rows["test"]}
        train = [to_problem(x) for x in rows["train"] if x["question"] not in test]
    except Exception as e:
        advice = "without network GSM8K_PATH has to name a local folder"
        raise RuntimeError(f"cannot load the data set {path} ({advice}): {e!r}") from e
    return iter(test.values() if split == "eval" else train)


def reward(problem, completion: str) -> float:
    """1.0 if the completion's last number is the answer, else 0.0."""
    text = completion.rpartition("</think>")[2]
    if "<think>" in text:  # it was cut off
        return 0.0
    end = text[-1000:]
    if len(text) > 1000:
        end = re.sub(r"^\S+", "", end)  # 142 may have been cut to 42
    boxes = BOX.findall(end)
    number = last_number(boxes[-1] if boxes else end)
    return float(number == Decimal(problem.answer))
