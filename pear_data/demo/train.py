"""Make every bundled asset of the demo from nothing: `python -m pear_data.demo.train`.

1. A byte-level tokenizer, from generated chats.
2. The *initial policy*: trained on a groping, chatty manner of solving Countdown puzzles.
3. The *behavior policy* (the teacher): trained on from the initial policy, on a terse manner that sees further.
4. The corpus: what the teacher answers, at temperature 1, to puzzles kept out of both trainings; right answers with
   label 1 and a few wrong ones with label -1.
5. `training.json`: how good both policies are and how far apart, as measured on what was written.

`--far DIR` makes instead an initial policy far from the teacher, stopped early in step 2: nearly all its log-ratios
fall below the lower clip, so weights decay by position whatever the content.
"""

from __future__ import annotations

import copy
import gzip
import io
import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM, Qwen2Tokenizer

from pear_data.demo import policies
from pear_data.demo.countdown import Puzzle, verify
from pear_data.demo.curriculum import SYSTEM_SHARE, puzzles, training_batches, training_chats
from pear_data.demo.solutions import Manner, messages
from pear_data.errors import PearError
from pear_data.weighting import CLIP_LOG_RATIO, Level, importance_weights

ASSETS = Path(__file__).with_name("assets")

INITIAL_MANNER = Manner(foresight=0.45, wording=(0.3, 0.3, 0.4), dead_ends=4)
TEACHER_MANNER = Manner(foresight=0.7, wording=(0.6, 0.25, 0.15), dead_ends=4)
FAR_STEPS = 25
QUESTIONS = 128  # a round
MAX_ROUNDS = 40  # of questions, to fill the corpus


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of everything; the defaults are what the bundled assets were made with."""

    seed: int = 0
    initial_steps: int = 1000
    teacher_steps: int = 3500
    right_answers: int = 460
    wrong_answers: int = 40
    exam: int = 400  # puzzles the pass rates are measured on


def make_tokenizer(seed: int) -> Qwen2Tokenizer:
    """The tokenizer both policies share, from both manners' chats."""
    rng = random.Random(f"{seed} tokenizer")
    texts = ["system\nuser\nassistant\n"] * 1000
    for manner in (INITIAL_MANNER, TEACHER_MANNER):
        chats = training_chats(manner, rng)
        texts += [message["content"] for _ in range(1000) for message in next(chats)]
    return policies.train_tokenizer(texts)


def make_initial(tokenizer: Qwen2Tokenizer, seed: int, steps: int) -> Qwen2ForCausalLM:
    """An initial policy, trained from random weights."""
    torch.manual_seed(seed)
    policy = policies.new_policy(tokenizer)
    batches = training_batches(tokenizer, INITIAL_MANNER, random.Random(f"{seed} initial"))
    policies.train(policy, batches, policies.Schedule(steps), log)
    return policy


def make_teacher(tokenizer: Qwen2Tokenizer, initial: Qwen2ForCausalLM, plan: Plan) -> Qwen2ForCausalLM:
    """The teacher, trained on from the initial policy."""
    policy = copy.deepcopy(initial)
    batches = training_batches(tokenizer, TEACHER_MANNER, random.Random(f"{plan.seed} teacher"))
    policies.train(policy, batches, policies.Schedule(plan.teacher_steps, 0.01, 0.0015), log)
    return policy


def save(policy: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, folder: Path) -> None:
    """Write a checkpoint in bfloat16, as published checkpoints are."""
    copy.deepcopy(policy).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # save_pretrained leaves it to its owner alone


def load(folder: Path) -> tuple[Qwen2ForCausalLM, Qwen2Tokenizer]:
    """A written checkpoint in float32, and its tokenizer."""
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return policy.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def answer(
    policy: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, questions: list[Puzzle], rng: random.Random
) -> list[dict[str, Any]]:
    """A row for each puzzle that got a reply which ended; label 1 where the verifier accepts it, else -1."""
    asked = [messages(puzzle, None, system=rng.random() < SYSTEM_SHARE) for puzzle in questions]
    replies = policies.sample(policy, tokenizer, asked)
    return [
        {
            "source": f"countdown-{len(puzzle.numbers)}",
            "messages": [*chat, {"role": "assistant", "content": reply}],
            "label": 1 if verify(puzzle, reply) else -1,
        }
        for puzzle, chat, reply in zip(questions, asked, replies, strict=True)
        if reply is not None
    ]


def make_corpus(teacher: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, plan: Plan) -> list[dict[str, Any]]:
    """The teacher's replies to fresh puzzles, each puzzle once, until there are enough right and wrong ones."""
    rng = random.Random(f"{plan.seed} corpus")
    fresh, asked = puzzles(rng, fresh=True), set[Puzzle]()
    wanted = {1: plan.right_answers, -1: plan.wrong_answers}
    rows: list[dict[str, Any]] = []
    for _ in range(MAX_ROUNDS):
        questions: list[Puzzle] = []
        while len(questions) < QUESTIONS:
            if (puzzle := next(fresh)) not in asked:
                asked.add(puzzle)
                questions.append(puzzle)
        for row in answer(teacher, tokenizer, questions, rng):
            if wanted[row["label"]]:
                wanted[row["label"]] -= 1
                rows.append({"id": f"{row['source']}-{len(rows):04d}", **row})
        log(f"{len(rows)} solutions")
        if not any(wanted.values()):
            return rows
    raise PearError(f"corpus: still {wanted} to go after {MAX_ROUNDS} rounds; train the teacher for longer")


def write_corpus(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows as gzipped JSON lines, with no time stamp: the same rows are the same bytes."""
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0, filename="") as lines:
        lines.writelines(f"{json.dumps(row)}\n".encode() for row in rows)
    path.write_bytes(buffer.getvalue())


def pass_rate(policy: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, plan: Plan) -> float:
    """Share of fresh puzzles answered right at temperature 1."""
    rng = random.Random(f"{plan.seed} exam")
    fresh = puzzles(rng, fresh=True)
    rows = answer(policy, tokenizer, [next(fresh) for _ in range(plan.exam)], rng)
    return [row["label"] for row in rows].count(1) / plan.exam


def compare(
    initial: Qwen2ForCausalLM,
    teacher: Qwen2ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    rows: list[dict[str, Any]],
) -> dict[str, float]:
    """How the two policies see the corpus: log-ratios against the clips, ESS / n of each level's weights."""
    encoded = [policies.encode(tokenizer, row["messages"]) for row in rows]
    target, behavior = (np.concatenate(policies.score(policy, encoded)) for policy in (initial, teacher))
    lengths = [len(ids) - prompt_length for ids, prompt_length in encoded]
    log_ratio, (low, high) = target - behavior, CLIP_LOG_RATIO
    levels: tuple[Level, ...] = ("token", "block", "sequence")
    weights = {level: importance_weights(target, behavior, lengths, level=level) for level in levels}
    return {
        "scored_tokens": len(log_ratio),
        "initial_perplexity": float(np.exp(-target.mean())),
        "behavior_perplexity": float(np.exp(-behavior.mean())),
        "log_ratios_below_clip": float(np.mean(log_ratio < low)),
        "log_ratios_inside_clips": float(np.mean((log_ratio >= low) & (log_ratio <= high))),
        "log_ratios_above_clip": float(np.mean(log_ratio > high)),
        **{f"ess_{name}": float(w.sum() ** 2 / (w**2).sum() / len(w)) for name, w in weights.items()},
        **{f"weight_mean_{name}": float(w.mean()) for name, w in weights.items()},
    }


def make_assets(folder: Path, plan: Plan) -> dict[str, Any]:
    """Make everything into `folder`; returns what `training.json` holds."""
    started = time.monotonic()
    tokenizer = make_tokenizer(plan.seed)
    initial = make_initial(tokenizer, plan.seed, plan.initial_steps)
    save(initial, tokenizer, folder / "initial")
    log(f"initial pass rate {pass_rate(initial, tokenizer, plan):.3f}")
    save(make_teacher(tokenizer, initial, plan), tokenizer, folder / "behavior")
    seconds = time.monotonic() - started
    # From here on the policies are those on disk, rounded as users will load them.
    (initial, tokenizer), (teacher, _) = load(folder / "initial"), load(folder / "behavior")
    torch.manual_seed(plan.seed)
    rows = make_corpus(teacher, tokenizer, plan)
    write_corpus(rows, folder / "corpus.jsonl.gz")
    summary = {
        "plan": asdict(plan),
        "training_seconds": round(seconds),
        "parameters": initial.num_parameters(),
        "vocabulary": len(tokenizer),
        "initial_pass_rate": pass_rate(initial, tokenizer, plan),
        "behavior_pass_rate": pass_rate(teacher, tokenizer, plan),
        **{name: round(value, 4) for name, value in compare(initial, teacher, tokenizer, rows).items()},
    }
    (folder / "training.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def make_far(folder: Path, seed: int) -> None:
    """Write an initial policy that has barely begun to learn, with the bundled tokenizer."""
    tokenizer = make_tokenizer(seed)
    save(make_initial(tokenizer, seed, FAR_STEPS), tokenizer, folder)


def log(line: str) -> None:
    """One line of progress on stderr."""
    click.echo(line, err=True)


@click.command(help=__doc__)
@click.option("--output", type=click.Path(path_type=Path), default=ASSETS, help="Where the assets go.")
@click.option("--seed", default=0, help="Everything random follows from it.")
@click.option("--far", type=click.Path(path_type=Path), help="Only make a far initial policy, here.")
def main(output: Path, seed: int, far: Path | None) -> None:
    """Command of the module."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if far is not None:
        make_far(far, seed)
    else:
        click.echo(json.dumps(make_assets(output, Plan(seed=seed)), indent=2))


if __name__ == "__main__":
    main()
