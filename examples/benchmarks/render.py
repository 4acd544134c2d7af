"""Write the measured results into the documentation, so that no figure there is typed by hand.

Reads every JSON file in ``results/`` and replaces the text between two marks: all tables in ``docs/benchmarks.md``, and
a summary of four rows in ``README.md``.

    python examples/benchmarks/render.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import curves
import frozen
import growth
import resume_distributed
import save
import weight_loading
from common import GIB, median, number
from resume import VARIANTS

ROOT = Path(__file__).resolve().parent.parent.parent
README, PAGE = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
RESULTS = Path(__file__).resolve().parent / "results"
# The packages whose versions a table of weight loading names.
SOFTWARE = ("torch", *weight_loading.PACKAGES)
START, END = "<!-- results: examples/benchmarks/render.py -->", "<!-- end of results -->"
# Names for readers. "demo" is a size of ``gpt.py``.
MODELS = {"demo": "a small GPT"}
TITLES = {
    "resume": "Resuming a training",
    "resume-distributed": "Resuming a training by several processes",
    "save": "Saving checkpoints",
    "weight-loading": "Loading weights",
    "frozen": "Saving a finetuning",
    "growth": "Many small modules and tensors",
    "curves": "Growth with size, tensors and threads",
}


def main() -> int:
    """Write the tables into the files, and return the exit status."""
    for file, text in rendered().items():
        file.write_text(text)
    return 0


def rendered() -> dict[Path, str]:
    """Return the new text of each file."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    # Results on a GPU come first.
    results.sort(key=lambda result: (not result["machine"]["gpu"], [*TITLES].index(result["benchmark"])))
    sections = [f"## {title(result)}\n\n{render(result)}" for result in results]
    texts = {README: summary(results), PAGE: "\n\n".join(sections)}
    return {file: between_marks(file.read_text(), text) for file, text in texts.items()}


def between_marks(page: str, text: str) -> str:
    """Return ``page`` with the part between its two marks replaced by ``text``."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    return "\n\n".join([before + START, text, END + after])


def title(result: dict[str, Any]) -> str:
    """Return the heading of a result."""
    return f"{TITLES[result['benchmark']]} on {'a GPU' if result['machine']['gpu'] else 'a CPU'}"


def summary(results: list[dict[str, Any]]) -> str:
    """Return a table that compares stock and this project: resuming and saving, on a GPU and on a CPU."""
    lines = [
        "| | stock Lightning, s | this project, s | stock Lightning, host GiB | this project, host GiB |",
        "|---|---:|---:|---:|---:|",
    ]
    for result in results:
        model = MODELS.get(result["size"], result["size"]) if "size" in result else ""
        if result["benchmark"] == "resume":
            stock, ours = result["variants"]["stock"], result["variants"]["callback"]
            name, size = f"resume {model}", result["checkpoint_bytes"]
        elif result["benchmark"] == "save":
            stock, ours = result["ways"]["stock"], result["ways"]["ours"]
            name, size = f"save {model}", ours["bytes"]
        else:
            continue
        rows = [
            *(number(way["seconds"], 1) for way in (stock, ours)),
            *(number(way["host_above_start_bytes"], GIB) for way in (stock, ours)),
        ]
        device = result["machine"]["gpu"] or "CPU"
        lines.append(f"| {name} with AdamW, {size / 1e9:.2f} GB, {device} | {' | '.join(rows)} |")
    lines += [
        "",
        "Seconds: from the call until training can continue. Host memory: the rise above the level before the call.",
        "Each resume reads a file that is in the page cache.",
    ]
    return "\n".join(lines)


def render(result: dict[str, Any]) -> str:
    """Return one result as a Markdown table with its machine, versions and command."""
    renderers = {
        "curves": render_curves,
        "frozen": render_frozen,
        "growth": render_growth,
        "resume": render_resume,
        "resume-distributed": render_distributed,
        "save": render_save,
        "weight-loading": render_weight_loading,
    }
    table = renderers[result["benchmark"]](result)
    # A remark tells what a reader must know to interpret the figures.
    return f"{table}\n\n{result['remark']}" if "remark" in result else table


def render_curves(result: dict[str, Any]) -> str:
    """Return the pictures that ``draw.py`` draws, and the table below them."""
    versions = result["versions"]
    picture = "Seconds and host memory of five works, along the size, the tensors and the threads"
    rows = [f"| {' | '.join(row)} |" for row in curves.table(result)]
    return "\n".join(
        [
            f"{place(result)}, torch {versions['torch']}. The file is in the page cache. Along one axis the other two "
            f"stay fixed: {curves.NUM_TENSORS} tensors of {result['fixed_gigabytes']:g} GB in all, and the default "
            "number of threads.",
            "",
            *pictures(picture, "curves", result),
            "",
            "| | along | GB | tensors | threads | seconds | host, MiB |",
            "|---|---|---:|---:|---:|---:|---:|",
            *rows,
            "",
            f"`{result['command']}`",
        ]
    )


def render_growth(result: dict[str, Any]) -> str:
    """Return the table of times for growing numbers of modules and tensors."""
    versions = result["versions"]
    rows = [f"| {' | '.join(row)} |" for row in growth.table(result)]
    return "\n".join(
        [
            f"**Many small modules and tensors, on the CPU.** {place(result)}, load average "
            f"{result['load_average']:.1f}, torch {versions['torch']}, Lightning {versions['lightning']}; shortest of "
            f"{result['repeats']}.",
            "",
            "| | number | stock, s | this project, s | times stock |",
            "|---|---:|---:|---:|---:|",
            *rows,
            "",
            f"`{result['command']}`",
        ]
    )


def render_resume(result: dict[str, Any]) -> str:
    """Return the table of the costs of a resume."""
    versions = result["versions"]
    stock = result["variants"]["stock"]
    size = f"{result['checkpoint_bytes'] / 1e9:.2f} GB"
    repetitions = str(stock["repetitions"])
    if any(variant.endswith("-cold") for variant in result["variants"]):
        repetitions += ", one run with a cold page cache"
    software = f"torch {versions['torch']}, Lightning {versions['lightning']}"
    lines = [
        f"**{result['size']} with AdamW, a checkpoint of {size} in a warm page cache.** "
        f"{place(result)}, {software}; median of {repetitions}. All rows gave the same bits: "
        f"{'yes' if result['equal'] else 'no'}.",
        "",
        "| | `fit()` to training, s | times faster | host memory above start, GiB | GPU peak, GiB | streaming, GB/s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for variant in [variant for variant in VARIANTS if variant in result["variants"]]:
        row = result["variants"][variant]
        cells = [
            VARIANTS[variant],
            number(row["seconds"], 1),
            # Stock was measured with a warm cache only.
            "-" if variant.endswith("-cold") else f"{stock['seconds'] / row['seconds']:.1f}",
            number(row["host_above_start_bytes"], GIB),
            number(row["cuda_allocated_peak_bytes"], GIB),
            number(row["streaming_gb_per_second"], 1),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if "series" in result:
        lines += ["", *pictures("Host memory over time, stock and this project", "memory", result)]
    lines.extend(["", f"Limits of this machine, GB/s: {at_best(result['ceilings'])}.", "", f"`{result['command']}`"])
    return "\n".join(lines)


def pictures(words: str, name: str, result: dict[str, Any]) -> list[str]:
    """Return the lines that show a picture of ``draw.py``, in light and in dark."""
    device = "cpu" if result["machine"]["gpu"] is None else "gpu"
    return [f"![{words}](assets/{name}-{device}-{variant}.svg#only-{variant})" for variant in ("light", "dark")]


def at_best(ceilings: dict[str, Any]) -> str:
    """Return the measured limits of the machine as text."""
    threads, rate = max(ceilings["pread_warm_gb_per_second"].items(), key=lambda item: item[1])
    found = [f"reading the page cache with {threads} threads {rate:.1f}"]
    if "pinned_copy_gb_per_second" in ceilings:
        found.append(f"copying from page-locked memory to the GPU {ceilings['pinned_copy_gb_per_second']:.1f}")
    if ceilings.get("pread_cold_gb_per_second"):
        found.append(f"reading a cold file {median(ceilings['pread_cold_gb_per_second']):.2f}")
    return ", ".join(found)


def render_save(result: dict[str, Any]) -> str:
    """Return the table of the costs of a save."""
    versions, step, ways = result["versions"], result["step"], result["ways"]
    software = f"torch {versions['torch']}, Lightning {versions['lightning']}"
    # The smallest size, because Lightning's asynchronous save writes tied weights twice.
    size, repetitions = min(way["bytes"] for way in ways.values()), max(way["repetitions"] for way in ways.values())
    lines = [
        f"**Saving {result['size']} with AdamW, {size / 1e9:.2f} GB, in a training on {on(result)}.** {place(result)}, "
        f"load average {result['load_average']:.1f}, {software}; median of {repetitions}. "
        f"{save.at_best(result)} A step without a save takes {step['next_step_seconds']:.2f} s and "
        f"{number(step['host_above_start_bytes'], GIB)} GiB of host memory. The figures of the asynchronous saves "
        'include this step. "Next step ends" counts from the call of the save.',
        "",
        f"| | fsync | {' | '.join(save.COLUMNS)} | right |",
        f"|---|---|{'---:|' * len(save.COLUMNS)}---|",
        *(f"| {' | '.join(save.cells(result, name))} |" for name in ways),
        "",
        f"`{result['command']}`",
    ]
    return "\n".join(lines)


def render_frozen(result: dict[str, Any]) -> str:
    """Return the table of the costs of saves in a finetuning with a frozen body."""
    versions, ways = result["versions"], result["ways"]
    size = max(way["bytes"] for way in ways.values())
    return "\n".join(
        [
            f"**Finetuning low-rank adapters on a frozen {result['size']}, saved {result['saves']} times, "
            f"{size / 1e9:.2f} GB each, on {on(result)}.** {place(result)}, load average "
            f"{result['load_average']:.1f}, torch {versions['torch']}, Lightning {versions['lightning']}.",
            "",
            f"| | {' | '.join(frozen.COLUMNS)} | right |",
            f"|---|{'---:|' * len(frozen.COLUMNS)}---|",
            *(f"| {' | '.join(frozen.cells(result, name))} |" for name in ways),
            "",
            f"`{result['command']}`",
        ]
    )


def render_distributed(result: dict[str, Any]) -> str:
    """Return the table of the costs of a resume by several processes."""
    versions, columns = result["versions"], resume_distributed.COLUMNS
    repetitions = max(row["repetitions"] for row in result["variants"].values())
    return "\n".join(
        [
            f"**{result['size']} + AdamW, a {result['checkpoint_bytes'] / 1e9:.2f} GB `.ckpt` in the page cache, "
            f"{result['devices']} processes with {result['strategy']}, on {on(result)}.** {place(result)}, load "
            f"average {result['load_average']:.1f}, torch {versions['torch']}, Lightning {versions['lightning']}; "
            f"median of {repetitions}. Memory: the rise above the start.",
            "",
            f"| | {' | '.join(columns)} |",
            f"|---|{'---:|' * len(columns)}",
            *(f"| {' | '.join(resume_distributed.cells(result, name))} |" for name in result["variants"]),
            "",
            f"`{result['command']}`",
        ]
    )


def render_weight_loading(result: dict[str, Any]) -> str:
    """Return the table of the costs of loading weights, with a comparison to the fastest other package."""
    software = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if name in SOFTWARE)
    size = f"{result['weights_bytes'] / 1e9:.2f} GB"
    repetitions = max(row["repetitions"] for row in result["rows"].values())
    columns = weight_loading.COLUMNS
    lines = [
        f"**Weights of {result['size']} with an untied head, {size} in a {result['page_cache']} page cache, onto "
        f"{on(result)}.** {place(result)}, load average "
        f"{result['load_average']:.1f}, {software}; median of {repetitions}. Memory: the rise above the start, until "
        "every weight has been read once.",
        "",
        f"| | reads | {' | '.join(columns)} | right |",
        f"|---|---|{'---:|' * len(columns)}---|",
        *(f"| {' | '.join(weight_loading.cells(result, name))} |" for name in result["rows"]),
        "",
    ]
    if against := result["against_peer"]:
        ours, peer = (result["rows"][against[name]] for name in ("ours", "fastest_peer"))
        host = "host_anonymous_peak_bytes", "host_rss_peak_bytes"
        anonymous, rss = (f"{number(ours[name], GIB)} against {number(peer[name], GIB)} GiB" for name in host)
        times, fastest = against["times_as_fast"], label(against["fastest_peer"])
        compared = f"{times:.2f} times as fast as" if times >= 1 else f"slower: {1 / times:.2f} times the time of"
        lines.append(
            f"From safetensors until every weight has been read once, {label(against['ours'])} is {compared} the "
            f"fastest other package ({fastest}). Anonymous memory: {anonymous}. RSS: {rss}."
        )
    if result["not_run"]:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in result["not_run"].items())
        lines.append(f"Not run: {reasons}.")
    lines.extend(["", f"`{result['command']}`"])
    return "\n".join(lines)


def label(row: str) -> str:
    """Return the label of a row of weight loading."""
    return weight_loading.ROWS[row].label


def on(result: dict[str, Any]) -> str:
    """Return the device of a result as text."""
    return "the CPU" if result["device"] == "cpu" else "the GPU"


def place(result: dict[str, Any]) -> str:
    """Return the machine of a result as text."""
    machine = result["machine"]
    return (
        f"{machine['gpu'] or 'CPU only'}, {machine['cpus']} cores, {number(machine['memory_bytes'], GIB)} GiB of memory"
    )


if __name__ == "__main__":
    sys.exit(main())
