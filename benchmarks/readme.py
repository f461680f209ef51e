"""Makes the README's tables and picture from benchmarks/results and the code's own tables.

python benchmarks/readme.py           # rewrites README.md and docs/img
python benchmarks/readme.py --check   # exit code 1 if README.md is out of date
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import RESULTS

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "img"


def results(name: str) -> dict[str, Any]:
    """The results file NAME.json."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def source_line(found: dict[str, Any]) -> str:
    """Where a table's numbers come from."""
    versions = found["versions"]
    return (
        f"{found['machine']}, torch {versions['torch']}, transformers {versions['transformers']}, "
        f"{found['date']}, commit {found['commit']}: `{found['command']}`"
    )


def place_lines(rows: list[dict[str, Any]], name: str) -> list[str]:
    """Where rows of NAME.json come from, each place once; what was run stands there."""
    places = {source_line(row).split(": `")[0]: None for row in rows}
    return [f"- {place}: what was run stands in `benchmarks/results/{name}.json`" for place in places]


def collapse_table() -> str:
    """What collapse cost and training gave back, for each recipe run."""
    lines = [
        "| model | layers | removed | original | after collapse | after training | tokens | tokens/s | peak |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    names = {"collapse_smollm2": "SmolLM2-135M", "collapse_llama2_7b": "Llama-2-7B shape, random weights"}
    sources = []
    for name, label in names.items():
        found = results(name)
        (row,) = found["rows"]
        losses = row["losses"]
        lines.append(
            f"| {label} | {row['source_depth']} to {row['depth']} | {100 * row['parameters']['ratio']:.1f}% "
            f"| {losses['original']:.3f} | {losses['collapsed']:.3f} | {losses['trained']:.3f} "
            f"| {row['tokens'] / 1e6:.1f}M | {row['tokens_per_second']:,.0f} | {row['peak_gib']:.1f} GiB |"
        )
        sources.append(f"- {label}: {source_line(found)}")
    return "\n".join([*lines, "", *sources])


STUDIED = (0.0, 0.01, 0.05, 0.1, 0.5, 1.0)


def study_table() -> str:
    """The arms of the study, best last loss first after the original."""
    found = results("study_smollm2")
    lines = [
        "| arm | layers | learning rate | before training | 0.1M tokens | 0.5M | 1.0M | 5.2M | 10.5M "
        "| tokens to 3.253 | recovered | inherited |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in sorted(found["arms"], key=lambda arm: (arm["name"] != "original", arm["losses"][-1][1])):
        whole = arm["losses"][-1][0]
        # the step nearest to a share of the budget; that to 1% of it, 3.2 steps, was rounded up at 8f3dd29
        nearest = [min(arm["losses"], key=lambda at: abs(at[0] - share * whole)) for share in STUDIED]
        losses = [f"{loss:.3f}" + ("°" if tokens == 98_304 else "") for tokens, loss in nearest]
        shares = [arm["recovered"], arm["inheritance"]]
        cells = ["" if share is None else f"{100 * share:.0f}%" for share in shares]
        reached = [at["tokens"] for at in arm["tokens_to_original"] if at is not None]
        cells.insert(0, f"{reached[0] / 1e6:.1f}M" if reached else "not reached")
        if arm["name"] == "original":
            cells[:2] = ["", ""]
        lines.append(f"| {arm['name']} | {arm['depth']} | {arm['learning_rate']:g} | {' | '.join([*losses, *cells])} |")
    about = "0.1M tokens: 131,072, °: 98,304."
    return "\n".join([*lines, "", about, "", *place_lines(found["arms"], "study_smollm2")])


def ratios_table() -> str:
    """Arms of the study over pruning ratios, the lowest loss at the largest ratio first."""
    levels = results("study_smollm2")["ratios"]
    by_arm: dict[str, list[dict[str, Any]]] = {}
    for level in levels:
        by_arm.setdefault(level["arm"], []).append(level)
    (original,) = by_arm.pop("original")
    ratios = sorted({level["ratio"] for level in levels} - {0})

    def cell(level: dict[str, Any]) -> str:
        losses, mean = [level["values"][when]["mean"] for when in ("before", "after")], level["accuracies"]["after"]
        return f"{losses[0]:.2f}, {losses[1]:.3f}, {mean['accuracy']:.3f}{'°' if mean['no_better_than_chance'] else ''}"

    lines = [f"| arm | {' | '.join(f'{100 * ratio:g}%' for ratio in ratios)} |", "|---" * (len(ratios) + 1) + "|"]
    for arm, found in sorted(by_arm.items(), key=lambda each: each[1][-1]["values"]["after"]["mean"]):
        at = {level["ratio"]: cell(level) for level in found}
        lines.append(f"| {arm} | {' | '.join(at[ratio] for ratio in ratios)} |")
    errors = [level["accuracies"]["after"]["error"] for level in levels]
    about = f"The original, trained on alike: {cell(original)}. "
    about += f"Standard errors of accuracies: {min(errors):.3f} to {max(errors):.3f}; °: no better than guessing."
    return "\n".join([*lines, "", about, "", *place_lines([original], "study_smollm2")])


def evaluation_table() -> str:
    """Mean accuracy of each group of tasks, share kept of the original's and perplexity, model by model."""
    rows = results("evaluation")["rows"]
    groups = list(rows[0]["groups"])
    lines = [
        f"| model | layers | {' | '.join(groups)} | all tasks | kept | perplexity | bits per byte |",
        "|---" * (len(groups) + 6) + "|",
    ]
    for row in rows:
        means = [f"{row['groups'][group]['accuracy']:.3f}" for group in groups]
        whole, text = row["all"], row["perplexity"]
        kept = f"{100 * whole['kept']:.0f}%" if "kept" in whole else ""
        cells = [row["name"], str(row["layers"]), *means, f"{whole['accuracy']:.3f} ± {whole['error']:.3f}", kept]
        lines.append(f"| {' | '.join(cells)} | {text['perplexity']:,.1f} | {text['bits_per_byte']:.3f} |")
    return "\n".join([*lines, "", *place_lines(rows, "evaluation")])


def quality_table() -> str:
    """Each strategy at each depth and objective that was run, means over seeds; the lowest last loss first."""
    rows = results("quality")["rows"]
    by_study: dict[tuple[str, int], dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        studied = (row["objective"], 22 if row["strategy"] == "original" else row["depth"])
        by_study.setdefault(studied, {}).setdefault(row["strategy"], []).append(row)
    lines = []
    original = next(row["flops_per_token"] for row in rows if row["strategy"] == "original")
    for (objective, depth), arms in sorted(by_study.items(), key=lambda each: (each[0][0] != "plain", -each[0][1])):
        lines += [
            f"{depth} layers, {'next-token loss' if objective == 'plain' else 'distillation'}:",
            "",
            "| strategy | rate | tokens of refinement | seconds of it | of the collapse with it | start | 1M tokens "
            "| 10M | spread | 10^15 operations |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for arm, found in sorted(arms.items(), key=lambda each: mean_loss(each[1], -1)):
            last = [row["losses"][-1][1] for row in found]
            cells = [arm, f"{found[0]['learning_rate']:g}", f"{found[0]['refine_tokens']:,}"]
            for name in ("refine_seconds", "collapse_seconds"):
                timed = [row[name] for row in found if row[name] is not None]
                cells.append(f"{sum(timed) / len(timed):.1f}" if timed else "")
            losses = [f"{mean_loss(found, place):.3f}" for place in (0, 1, -1)]
            spread = f"{max(last) - min(last):.3f}" if len(found) > 1 else "one seed"
            lines.append(f"| {' | '.join([*cells, *losses, spread, f'{operations(found[0], original):.2f}'])} |")
        lines.append("")
    return "\n".join([*lines, *place_lines(rows, "quality")])


def operations(row: dict[str, Any], original: float, point: int = -1) -> float:
    """10^15 of them up to a point of a run's curve; a teacher's forward passes are a third of training the original.

    Refinement counts as training does, which is too much for windows and too little before lora and last_layers; the
    tokens of streamline's fit, another text's, are left out.
    """
    tokens, refined = row["losses"][point][0], row["refine_tokens"] if row["strategy"] != "streamline" else 0
    taught = tokens if row["objective"] == "distilled" else refined
    return float(tokens * row["flops_per_token"] + taught * original / 3) / 1e15


def mean_loss(rows: list[dict[str, Any]], place: int) -> float:
    """Of several seeds, at that place of their curves."""
    return sum(float(row["losses"][place][1]) for row in rows) / len(rows)


def scale_table() -> str:
    """Several GPUs of one machine beside one of them."""
    lines = [
        "| case | GPUs | layers | tokens a step | tokens/s a GPU | one GPU | ratio | loss apart | peak a GPU "
        "| weights, gradients, moments a GPU | the same on one GPU |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    found = [row for row in results("many_gpus")["rows"] if not {"runs", "what"} & row.keys()]
    sources = dict.fromkeys(f"- {source_line(row)}" for row in found)
    for row in found:
        alone = row.get("one_gpu")
        speeds = ["", ""] if alone is None else [f"{alone['tokens_per_second']:,.0f}", f"{row['scaling']:.2f}"]
        apart = "" if row.get("loss_apart") is None else f"{row['loss_apart']:.4f}"
        # bfloat16 weights, gradients and two moments, unless one GPU was there to look at
        whole = f"{8 * row['parameters'] / 2**30 if alone is None else alone['state_gib']:.1f} GiB"
        depths = "{} to {}".format(*row["layers"])
        first = [f"{row['case']}, {row['strategy']}", str(row["gpus"]), depths, f"{row['tokens_per_step']:,}"]
        first.append(f"{row['tokens_per_second_per_gpu']:,.0f}")
        last = [apart, f"{row['peak_gib']:.1f} GiB", f"{row['state_gib']:.1f} GiB", whole]
        lines.append(f"| {' | '.join([*first, *speeds, *last])} |")
    return "\n".join([*lines, "", *sources])


def noise_table() -> str:
    """What rounding does to losses, on one GPU and on two."""
    lines = [
        "| case | last losses on one GPU | under FSDP2 on two | apart: one GPU | FSDP2 | both | same batches |",
        "|---|---|---|---|---|---|---|",
    ]
    found = [row for row in results("many_gpus")["rows"] if "runs" in row]
    for row in found:
        last = [", ".join(f"{curve[-1][1]:.4f}" for curve in row["losses"][kind]) for kind in ("one_gpu", "fsdp2")]
        kinds = ("one_gpu_apart", "fsdp2_apart", "between_apart", "same_batches_apart")
        apart = [f"{row[kind]:.4f}" if row[kind] > 1e-4 else f"{row[kind]:.0e}" for kind in kinds]
        lines.append(f"| {' | '.join([row['case'], *last, *apart])} |")
    return "\n".join([*lines, "", *dict.fromkeys(f"- {source_line(row)}" for row in found)])


def search_table() -> str:
    """The search beside the deep-copy procedure."""
    lines = [
        "| case | tried, accepted | deep copies | ours | ratio | peak, copies | peak, ours | weights | agree |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    found = results("search")
    sources = [f"- {source_line(found)}"]
    for row in found["rows"]:
        if "deepcopy_s" not in row:
            continue
        if "machine" in row:
            sources.append(f"- {row['case']}: {source_line(row)}")
        peaks = " | ".join(f"{peak:.1f} GiB" if peak else "" for peak in (row["deepcopy_peak_gib"], row["peak_gib"]))
        lines.append(
            f"| {row['case']} | {row['candidates']}, {row['accepted']} | {row['deepcopy_s']:.1f} s "
            f"| {row['ours_s']:.2f} s | {row['speedup']:.0f} | {peaks} | {row['weights_gib']:.1f} GiB "
            f"| {'yes' if row['same_decisions'] else 'no'} |"
        )
    return "\n".join([*lines, "", *sources])


def stream_table() -> str:
    """The search with weights in host memory and the GPU limited."""
    found = results("search")
    lines = [
        "| case | tried, accepted | GPU limit | peak | moved | seconds | bound | seconds / bound | agree |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in (row for row in found["rows"] if "bound_s" in row):
        lines.append(
            f"| {row['case'].removeprefix('stream_')} | {row['candidates']}, {row['accepted']} "
            f"| {row['limit_gib']:.0f} GiB | {row['peak_gib']:.1f} GiB | {row['moved_gib']:.1f} GiB "
            f"| {row['ours_s']:.2f} | {row['bound_s']:.2f} | {row['ratio_to_bound']:.2f} "
            f"| {'yes' if row['same_decisions'] else 'no'} |"
        )
    return "\n".join([*lines, "", f"- {source_line(found)}"])


def train_table() -> str:
    """Training by fit and by a plain loop."""
    lines = [
        "| case | tokens a step | plain, tokens/s | fit, tokens/s | ratio | plain, share | fit, share | peak of fit "
        "| loss apart, plain | loss apart, fit |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    found = results("train")
    sources = dict.fromkeys(f"- {source_line(row)}" for row in found["rows"])
    for row in found["rows"]:
        beside = "speedup" in row and row["precision"] != "32-true"  # speed is not what the float32 case is for
        speeds, shares = ["", f"{row['tokens_per_second']:,.0f}", ""], ["", f"{row['matmul_share']:.3f}"]
        if beside:
            speeds[0], speeds[2] = f"{row['plain_tokens_per_second']:,.0f}", f"{row['speedup']:.2f}"
            shares[0] = f"{row['plain_matmul_share']:.3f}"
        elif "speedup" in row:
            speeds, shares = ["", "", ""], ["", ""]
        apart = [row["plain_loss_difference"], row["loss_difference"]]
        cells = ["" if value is None else f"{value:.1e}" if value < 1e-3 else f"{value:.2f}" for value in apart]
        peak = f"{row['peak_gib']:.1f} GiB" + (f" of {row['limit_gib']:.0f}" if row.get("limit_gib") else "")
        first = [row["case"], f"{row['tokens_per_step']:,}"]
        lines.append(f"| {' | '.join([*first, *speeds, *shares, peak, *cells])} |")
    return "\n".join([*lines, "", *sources])


def families_section() -> str:
    """The code's table of families."""
    from laco_train.collapse.families import families_table

    return families_table()


SECTIONS: dict[str, Callable[[], str]] = {
    "results": collapse_table,
    "study": study_table,
    "ratios": ratios_table,
    "evaluation": evaluation_table,
    "quality": quality_table,
    "noise": noise_table,
    "scale": scale_table,
    "search": search_table,
    "stream": stream_table,
    "train": train_table,
    "families": families_section,
}


def draw_curve() -> None:
    """The validation curve of the SmolLM2 run, with the original's loss as a line."""
    from matplotlib.figure import Figure

    (row,) = results("collapse_smollm2")["rows"]
    points = row["validation"]
    figure = Figure(figsize=(8, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    tokens = [point["tokens"] / 1e6 for point in points]
    losses = [point["loss"] for point in points]
    axes.plot(tokens, losses, marker="o", markersize=4, color="#0969da", label=f"collapsed to {row['depth']} layers")
    original = row["losses"]["original"]
    axes.axhline(
        original, color="#b35900", linestyle="--", linewidth=1.2, label="original, 30 layers, untrained on this text"
    )
    axes.annotate(f"after collapse: {losses[0]:.2f}", (0, losses[0]), xytext=(0.4, losses[0] - 0.1), fontsize=9)
    axes.annotate(
        f"{losses[-1]:.2f}", (tokens[-1], losses[-1]), xytext=(-12, -16), textcoords="offset points", fontsize=9
    )
    axes.set_ylim(min(losses[-1], original) - 0.4, losses[0] + 0.3)
    axes.set_title("SmolLM2-135M: what Layer Collapse cost, and what training gave back")
    save_losses(figure, "tokens of post-training, millions", "smollm2_collapse")


def save_losses(figure: Any, over: str, name: str) -> None:
    """Label a figure of losses over something, and write it."""
    (axes,) = figure.axes
    axes.set_xlabel(over)
    axes.set_ylabel("validation loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(IMAGES / f"{name}.png")


def draw_study() -> None:
    """The study's curves, as its report draws them."""
    from laco_train.study.figures import Line, curve_pictures
    from laco_train.study.measures import MeanPoint

    arms = results("study_smollm2")["arms"]
    lines = [
        Line(
            arm["name"],
            [[MeanPoint(tokens, loss, None, None, None) for tokens, loss in arm["losses"]]],
            [arm["depth"]],
            plain=arm["name"] == "original",
        )
        for arm in arms
    ]
    original = next(arm["losses"][0][1] for arm in arms if arm["name"] == "original")
    (picture,) = (one for one in curve_pictures(lines, original) if one.name == "curves_linear")
    (IMAGES / "study_smollm2.png").write_bytes(picture.png(dark=False))


def draw_quality() -> None:
    """Losses over operations, of the first seed."""
    from matplotlib.figure import Figure

    rows = [row for row in results("quality")["rows"] if row["seed"] == 0]
    whole = next(row["flops_per_token"] for row in rows if row["strategy"] == "original")
    shown = [("original", 30, "plain"), *(("best", depth, "plain") for depth in (25, 22, 15))]
    shown += [("shortgpt", 22, "plain"), ("laco", 22, "plain"), ("best", 22, "distilled")]
    figure = Figure(figsize=(8, 4.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    for strategy, depth, objective in shown:
        (row,) = (r for r in rows if (r["strategy"], r["depth"], r["objective"]) == (strategy, depth, objective))
        points = range(len(row["losses"]))
        x, y = [operations(row, whole, at) for at in points], [row["losses"][at][1] for at in points]
        style = "--" if objective == "distilled" else "-"
        label = f"{strategy}, {depth} layers" + (", distillation" if objective == "distilled" else "")
        axes.plot(x, y, style, marker="o", markersize=3.5, label=label)
    axes.set_ylim(2.65, 4.2)
    axes.set_title("SmolLM2-135M: loss over operations, 10 million tokens each")
    save_losses(figure, "operations of refinement and training, 10^15, a teacher's included", "quality_operations")


def draw_rounds() -> None:
    """Pruning again beside pruning at once to the same depth, as `compare` draws them."""
    from laco_train.study.figures import Line, curve_pictures
    from laco_train.study.measures import MeanPoint

    runs = [run for run in results("study_smollm2")["rounds"] if run["depths"][-1] == 15]
    lines = []
    for run in runs:
        segments: list[list[MeanPoint]] = [[]]
        for (tokens, loss), before in zip(run["losses"], [None, *run["losses"]], strict=False):
            if before is not None and before[0] == tokens:  # the loss before and after a collapse
                segments.append([])
            segments[-1].append(MeanPoint(tokens, loss, None, None, None))
        lines.append(Line(run["name"].removeprefix("smollm2_135m_"), segments, run["depths"][1:], plain=False))
    (picture,) = (one for one in curve_pictures(lines, runs[0]["original"]) if one.name == "curves")
    (IMAGES / "rounds_smollm2.png").write_bytes(picture.png(dark=False))


def draw_ratios() -> None:
    """Losses after training over ratios, as the report of that study draws them."""
    from laco_train.study.measures import Spread
    from laco_train.study.ratio_figures import ratio_pictures
    from laco_train.study.ratios import ORIGINAL, Level, Line, OverRatios

    levels: dict[str, list[Level]] = {}
    for level in (rows := results("study_smollm2")["ratios"]):
        values = {
            key: Spread(value["mean"], value["deviation"], value["count"]) for key, value in level["values"].items()
        }
        shape = (level["ratio"], level["removed"], level["depth"], level["parameters"])
        levels.setdefault(level["arm"], []).append(Level(*shape, values))
    (original,) = levels.pop(ORIGINAL)
    ratios = tuple(sorted({level.ratio for found in levels.values() for level in found}))
    lines = tuple(Line(arm, tuple(found)) for arm, found in levels.items())
    pictures = ratio_pictures(OverRatios(ratios, lines, original, rows[0]["tokens"]))
    (picture,) = (one for one in pictures if one.name == "loss_after")
    (IMAGES / "ratios_smollm2.png").write_bytes(picture.png(dark=False))


def rewritten(text: str) -> str:
    """`text` with every section between its markers made anew."""
    for name, make in SECTIONS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        assert pattern.search(text), f"README.md has no section {name}"
        body = make()
        text = pattern.sub(lambda found, body=body: f"{found.group(1)}{body}\n{found.group(2)}", text)
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = rewritten(before)
    if "--check" in sys.argv:
        sys.exit(after != before)
    readme.write_text(after, encoding="utf-8")
    IMAGES.mkdir(parents=True, exist_ok=True)
    draw_curve()
    draw_study()
    draw_rounds()
    draw_ratios()
    draw_quality()
