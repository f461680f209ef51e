"""What models of a comparison write after the same prompts, as tables: original, collapsed, post-trained."""

from collections.abc import Sequence

from laco_train.study.curves import Arm, Run
from laco_train.study.tables import NONE, Table

_HEADER = ("model", "before training (right after a collapse)", "after training")
_ABOUT = "Greedy, without a chat template; of several seeds the first one's."


def sample_tables(arms: Sequence[Arm]) -> list[Table]:
    """A table for each prompt, the original first; none where no run kept samples."""
    kept = [arm for arm in arms if arm.runs[0].samples.get("prompts")]
    prompts = list(dict.fromkeys(prompt for arm in kept for prompt in arm.runs[0].samples["prompts"]))
    return [_table(prompt, kept, _ABOUT if prompt == prompts[0] else "") for prompt in prompts]


def _table(prompt: str, arms: Sequence[Arm], about: str) -> Table:
    whole = [arm for arm in arms if arm.runs[0].strategy == "none"]
    rows = [(arm.name, *_texts(arm.runs[0], prompt)) for arm in [*whole, *(arm for arm in arms if arm not in whole)]]
    before = [text for arm in arms if (text := _text(arm.runs[0], "original", prompt)) is not None]
    if before and not whole:
        rows.insert(0, ("original", before[0], NONE))
    return Table(f"Sample: {_one_line(prompt)} …", about, _HEADER, tuple(rows), prose=True)


def _texts(run: Run, prompt: str) -> tuple[str, str]:
    return _text(run, "collapsed", prompt) or NONE, _text(run, "trained", prompt) or NONE


def _text(run: Run, moment: str, prompt: str) -> str | None:
    prompts, texts = run.samples["prompts"], run.samples.get(moment)
    return _one_line(texts[prompts.index(prompt)]) if texts and prompt in prompts else None


def _one_line(text: str) -> str:
    return " ".join(text.split())
