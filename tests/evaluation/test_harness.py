"""Scores of a model in memory, against log-likelihoods computed here one question at a time."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from laco_train.errors import InputError

pytest.importorskip("lm_eval", reason="the extra evaluation")

from laco_train.evaluation.harness import TaskRow, chosen_questions, evaluate, load_tasks
from tests.evaluation import mini_suite as made
from tests.evaluation.test_wording import OWN, harness_own

Builder = Callable[..., LlamaForCausalLM]


@pytest.fixture(scope="module")
def tasks(mini_suite: Path) -> list[TaskRow]:
    """Two kinds of task, and a group."""
    return load_tasks(["piqa", "boolq", "lambada_openai", "mmlu"], mini_suite)


def likelihood(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, context: str, answer: str) -> float:
    """Nats of `answer` after `context`, token by token."""
    ids, prompt = tokenizer(context + answer)["input_ids"], tokenizer(context)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logits[i - 1, ids[i]].item() for i in range(len(prompt), len(ids)))


def greedy_word(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, context: str, word: str) -> str:
    """As many tokens as `word` has, the most likely ones after `context`, each in turn."""
    ids = tokenizer(context)["input_ids"]
    for _ in tokenizer(word)["input_ids"]:
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return str(tokenizer.decode(ids)).removeprefix(context)


def test_scores_are_those_of_a_slow_loop(
    tasks: list[TaskRow], tiny_llama: Builder, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_llama(layers=2)
    scores = {one.task: one for one in evaluate(model, tiny_tokenizer, tasks, batch_size=3)}
    expected = []
    for row in made.PIQA:
        choices = [str(row["sol1"]), str(row["sol2"])]
        found = [
            likelihood(model, tiny_tokenizer, f"Question: {row['goal']}\nAnswer:", f" {choice}") / len(choice)
            for choice in choices
        ]
        expected.append(float(found.index(max(found)) == row["label"]))
    piqa = scores["piqa"]
    assert (piqa.metric, list(piqa.values), piqa.chance, piqa.same_answer) == ("acc_norm", expected, 0.5, None)
    expected = []
    for row in made.BOOLQ:
        context = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
        no, yes = (likelihood(model, tiny_tokenizer, context, f" {word}") for word in ("no", "yes"))
        expected.append(float((yes > no) == row["answer"]))
    assert list(scores["boolq"].values) == expected
    assert (scores["boolq"].metric, scores["boolq"].same_answer) == ("acc", pytest.approx(2 / 3))
    assert scores["lambada_openai"].chance is None
    assert len(scores["mmlu"].values) == 57 * len(made.MMLU)
    assert scores["mmlu"].chance == 0.25


def test_lambada_counts_words_whose_tokens_are_all_greedy(
    tasks: list[TaskRow], tiny_llama: Builder, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    (known, word), other = made.LAMBADA[0], made.LAMBADA[1]
    model = tiny_llama(layers=2)
    ids = torch.tensor([tiny_tokenizer(known + word)["input_ids"]])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):  # it then knows the first text by heart
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    assert greedy_word(model, tiny_tokenizer, known, word) == word
    assert greedy_word(model, tiny_tokenizer, *other) != other[1]
    (score,) = evaluate(model, tiny_tokenizer, [tasks[2]], batch_size=2)
    assert score.values == (1.0, 0.0)


def test_a_limit_takes_questions_evenly_from_all(
    tasks: list[TaskRow], tiny_llama: Builder, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert chosen_questions(tasks[0], 2) == {"piqa": [0, 2]}
    assert chosen_questions(tasks[0], 9) == {"piqa": [0, 1, 2, 3, 4]}
    picked = chosen_questions(tasks[3], 3)  # 114 questions in pairs, of which 0, 38 and 76
    assert list(picked.values()) == [[0], [0], [0]]
    assert [list(tasks[3].leaves).index(name) for name in picked] == [0, 19, 38]
    model = tiny_llama(layers=2)
    whole = {one.task: one for one in evaluate(model, tiny_tokenizer, tasks, batch_size=4)}
    part = {one.task: one for one in evaluate(model, tiny_tokenizer, tasks, batch_size=4, limit=2)}
    assert part["piqa"].values == tuple(whole["piqa"].values[i] for i in (0, 2))
    assert part["mmlu"].values == tuple(whole["mmlu"].values[i] for i in (0, 57))
    assert part["piqa"].questions != whole["piqa"].questions
    again = evaluate(tiny_llama(layers=2, seed=1), tiny_tokenizer, tasks, batch_size=4, limit=2)
    assert [one.questions for one in again] == [one.questions for one in part.values()]


def test_mode_of_training_is_put_back(
    tasks: list[TaskRow], tiny_llama: Builder, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_llama(layers=1, attention_dropout=0.5).train()
    first, second = (evaluate(model, tiny_tokenizer, tasks[:1], batch_size=4)[0] for _ in range(2))
    assert model.training
    assert first == second


def test_a_broken_model_is_refused(
    tasks: list[TaskRow], tiny_llama: Builder, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_llama(layers=1)
    with torch.no_grad():
        model.lm_head.weight[0] = float("nan")
    with pytest.raises(InputError, match=r"^--model: gives a log-likelihood on piqa that is no number"):
        evaluate(model, tiny_tokenizer, tasks[:1], batch_size=4)


def test_tasks_named_wrongly(mini_suite: Path) -> None:
    with pytest.raises(InputError, match=r"^--tasks: the harness has no task 'helaswag'; near it: .*hellaswag"):
        load_tasks(["helaswag"], mini_suite)
    with pytest.raises(InputError, match=r"^--tasks: the questions of piqa can't be had from the hub .*run offline"):
        load_tasks(["piqa"], None)


def test_the_harness_own_tasks_run_alike(
    tasks: list[TaskRow], tiny_llama: Builder, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """As they would with questions of the hub."""
    model = tiny_llama(layers=2)
    (rows,) = tasks[0].leaves["piqa"].dataset.values()
    theirs = TaskRow("piqa", {"piqa": harness_own(OWN / "piqa/piqa.yaml", rows)}, "acc_norm", "the hub")
    found, expected = (evaluate(model, tiny_tokenizer, [row], batch_size=4)[0] for row in (theirs, tasks[0]))
    assert (found.values, found.questions, found.chance) == (expected.values, expected.questions, expected.chance)


def test_free_answers_have_no_chance(tiny_llama: Builder, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """A task that generates, with examples in its prompt and two ways to read an answer, of which the first counts."""
    rows = Dataset.from_list([{"question": f"What is {i} + 1?", "answer": f"Add. #### {i + 1}"} for i in range(8)])
    task = harness_own(OWN / "gsm8k/gsm8k.yaml", rows)
    task.set_config("generation_kwargs", {"until": ["\n"], "max_gen_toks": 4})
    row = TaskRow("gsm8k", {"gsm8k": task}, "exact_match", "the hub")
    (score,) = evaluate(tiny_llama(layers=1), tiny_tokenizer, [row], batch_size=2, limit=3)
    assert (score.values, score.chance, score.same_answer) == ((0.0, 0.0, 0.0), None, None)
