"""What several rounds left, from the summary.json of each: pure functions on plain JSON values, rounds in order."""

from collections.abc import Sequence
from typing import Any

from laco_train.collapse import CollapsePlan
from laco_train.study.read import joined_samples

Json = dict[str, Any]


def round_records(summaries: Sequence[Json]) -> list[Json]:
    """For each round depth, tokens and losses before and after; tokens count from the first round.

    `losses` has `before` (of the model that the round began with; missing if it was not measured), `collapsed` and
    `trained`, in nats per token on the same validation text.
    """
    records, before = [], 0
    for number, one in enumerate(summaries, 1):
        losses = one["losses"]
        records.append(
            {
                "round": number,
                "folder": folder_name(number - 1),
                "source_depth": one["source_depth"],
                "depth": one["depth"],
                "parameters": one["parameters"]["after"],
                "tokens_before": before,
                "tokens_after": before + one["tokens"],
                "tokens": one["tokens"],
                "steps": one["steps"],
                "losses": {"before": losses["original"]} | losses if "original" in losses else losses,
            }
        )
        before += one["tokens"]
    for record in records:
        record["losses"].pop("original", None)
    return records


def folder_name(index: int) -> str:
    """Folder of round `index`, from 0, in the run's."""
    return f"round_{index + 1}"


def joined_summary(summaries: Sequence[Json], plan: CollapsePlan) -> Json:
    """summary.json of the whole run: that of a run from the first model to the last, and `rounds`.

    `validation` goes on from round to round, so that where one begins it has two points at the same tokens: trained,
    then collapsed again. What only one round can tell (precision, kernels) is the last's.

    Args:
        plan: composed of all rounds.
    """
    last, records = summaries[-1], round_records(summaries)
    points: list[Json] = []
    accuracies: list[Json] = []
    seconds, steps = 0.0, 0
    for one, record in zip(summaries, records, strict=True):
        moved = {"step": steps, "tokens": record["tokens_before"], "seconds": seconds}
        for point in one["validation"]:
            later = {name: point[name] + by for name, by in moved.items() if point.get(name) is not None}
            points.append({"round": record["round"], **point, **later})
        for accuracy in one["evaluation"]:
            places = {name: accuracy[name] + moved[name] for name in ("step", "tokens")}
            accuracies.append({**accuracy, **places})
        steps, seconds = steps + one["steps"], seconds + one["training_seconds"]
    losses = {**summaries[0]["losses"], "trained": last["losses"]["trained"]}
    before, after = summaries[0]["parameters"]["before"], last["parameters"]["after"]
    return {
        **last,
        "source": plan.source,
        "source_depth": plan.source_depth,
        "parameters": {"before": before, "after": after, "ratio": 1 - after / before},
        "losses": losses,
        "validation": points,
        "evaluation": accuracies,
        "samples": joined_samples([one["samples"] for one in summaries]),
        "steps": steps,
        "tokens": records[-1]["tokens_after"],
        "search_seconds": sum(one["search_seconds"] for one in summaries),
        "training_seconds": seconds,
        "flops_per_token": _mean(summaries, "flops_per_token"),
        "tokens_per_second": None,  # another for each depth
        "mfu": None,
        "rounds": records,
    }


def _mean(summaries: Sequence[Json], key: str) -> float | None:
    """Mean over all tokens."""
    values = [(one[key], one["tokens"]) for one in summaries]
    tokens = sum(count for _, count in values)
    if not tokens or any(value is None for value, _ in values):
        return None
    return float(sum(value * count for value, count in values) / tokens)


def losses_so_far(records: Sequence[Json]) -> dict[str, float]:
    """Losses of a model card, in order, by name."""
    losses: dict[str, float] = {}
    for record in records:
        of = record["losses"]
        if record["round"] == 1 and "before" in of:
            losses["original"] = of["before"]
        for name in ("collapsed", "trained"):
            losses[f"round {record['round']}, {name}"] = of[name]
    return losses


def sentence(record: Json) -> str:
    """A round in a line."""
    of = record["losses"]
    began = f"{of['before']:.4f}, " if "before" in of else ""
    return (
        f"Round {record['round']}: {record['source_depth']} -> {record['depth']} layers, loss {began}"
        f"{of['collapsed']:.4f} collapsed, {of['trained']:.4f} after {record['tokens']:,} tokens"
    )
