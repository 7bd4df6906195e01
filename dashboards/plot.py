#!/usr/bin/env python3
"""Draws the dashboards' panels from what a demo run saved, to judge whether each tells its story.

    cargo xtask demo --prometheus --panels panels.json
    pip install matplotlib
    python3 dashboards/plot.py panels.json docs/pictures

One picture for each dashboard and run of the demo. Grafana draws them better; the data, legends, units, stacking, thresholds, value
mappings and annotations are those of the dashboards' files.
"""

import argparse
import json
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.ticker import FuncFormatter  # noqa: E402
from PIL import Image  # noqa: E402  (comes with matplotlib)

COLUMNS, UNIT_WIDTH, UNIT_HEIGHT = 24, 0.75, 0.42
COLOURS = {"green": "#56a64b", "yellow": "#f2cc0c", "orange": "#ff780a", "red": "#e02f44",
           "blue": "#3274d9", "purple": "#a352cc", "text": "#9a9aa3"}
# The runs of the demo.
RUNS = {"auto": "nvshare decides", "shared": "always shared"}


def scaled(value, base, units):
    step = 0
    while abs(value) >= base and step < len(units) - 1:
        value /= base
        step += 1
    return f"{value:.3g} {units[step]}".rstrip()


def shown(value, unit):
    if unit == "percentunit":
        return f"{value * 100:.0f} %" if value == 0 or abs(value) >= 0.1 else f"{value * 100:.2g} %"
    if unit in ("bytes", "Bps"):
        suffix = "/s" if unit == "Bps" else ""
        return scaled(value, 1024 if unit == "bytes" else 1000,
                      [name + suffix for name in (("B", "KiB", "MiB", "GiB") if unit == "bytes" else ("B", "kB", "MB", "GB"))])
    if unit == "s":
        return f"{value * 1000:.0f} ms" if abs(value) < 1 else f"{value:.3g} s"
    if unit == "ops":
        return scaled(value, 1000, ["/s", "k/s", "M/s"])
    if unit.startswith("suffix:"):
        return f"{value:.1f}{unit[7:]}"
    return f"{value:.3g}"


def legend(template, labels, panel):
    text = re.sub(r"{{\s*(\w+)\s*}}", lambda match: labels.get(match[1], ""), template)
    for change in panel.get("transformations", []):
        if change["id"] == "renameByRegex":
            pattern = re.sub(r"\$(\d)", r"\\\1", change["options"]["renamePattern"])
            text = re.sub(change["options"]["regex"], pattern, text)
    return text


def mapping(panel):
    for one in panel["fieldConfig"]["defaults"]["mappings"]:
        return {float(key): (entry["text"], COLOURS[entry["color"]]) for key, entry in one["options"].items()}
    return {}


class Page:
    def __init__(self, data, dashboard, run):
        self.answers = data["answers"]
        self.dashboard = dashboard
        self.run = run
        self.moments = data[run]
        self.start = self.moments["start"]
        self.length = round(self.moments["settled"] - self.start)
        self.annotations = self.read_annotations()

    def series(self, panel):
        """Legend and samples of each series of this run, by seconds since its start."""
        for target in panel["targets"]:
            for one in self.answers[target["expr"]]:
                if one["labels"].get("instance", self.run) != self.run:
                    continue
                samples = [(at - self.start, value) for at, value in one["samples"]]
                samples = [(at, value) for at, value in samples if -1 <= at <= self.length + 1]
                if samples:
                    yield legend(target["legendFormat"], one["labels"], panel), *zip(*samples)

    def read_annotations(self):
        found = {}
        for annotation in self.dashboard["annotations"]["list"]:
            for one in self.answers.get(annotation.get("expr"), []):
                for _, value in one["samples"]:
                    if one["labels"].get("instance") == self.run:
                        found[value / 1000 - self.start] = one["labels"].get("reason", "")
        return found

    def override(self, panel, name, wanted, default=None):
        for one in panel["fieldConfig"]["overrides"]:
            if re.fullmatch(one["matcher"]["options"], name):
                for each in one["properties"]:
                    if each["id"] == wanted:
                        return each["value"]
        return default

    def mark(self, axes, texts=False):
        for at, reason in self.annotations.items():
            axes.axvline(at, color=COLOURS["orange"], linestyle="--", linewidth=0.8)
            if texts:
                axes.text(at, 1.0, reason, fontsize=5, rotation=30, transform=axes.get_xaxis_transform())
        axes.axvspan(self.moments["third"] - self.start, self.moments["end"] - self.start, color="#888888", alpha=0.08)

    def timeseries(self, axes, panel):
        custom = panel["fieldConfig"]["defaults"]["custom"]
        unit = panel["fieldConfig"]["defaults"]["unit"]
        joined = {}
        for name, times, values in self.series(panel):
            at = joined.setdefault(name, {})
            for time, value in zip(times, values):
                at[round(time)] = at.get(round(time), 0) + value
        grid = range(0, self.length + 1)
        style = {"drawstyle": "steps-post"} if custom["lineInterpolation"] == "stepAfter" else {}
        if custom["stacking"]["mode"] == "normal":
            rows = [[at.get(time, 0) for time in grid] for at in joined.values()]
            step = {"step": "post"} if style else {}
            axes.stackplot(grid, rows, labels=list(joined), alpha=0.7, colors=self.colours(panel, joined), **step)
        else:
            for name, at in joined.items():
                sign = -1 if self.override(panel, name, "custom.transform") == "negative-Y" else 1
                dashed = self.override(panel, name, "custom.lineStyle") is not None
                line = [sign * at[time] if time in at else float("nan") for time in grid]
                axes.plot(grid, line, label=name, linewidth=1.2, linestyle="--" if dashed else "-", **style)
        if custom["thresholdsStyle"]["mode"] == "dashed":
            for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"][1:]:
                axes.axhline(step["value"], color=COLOURS[step["color"]], linestyle=":", linewidth=1)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(abs(value), unit)))
        axes.set_xlim(0, grid[-1])
        if "max" in panel["fieldConfig"]["defaults"]:
            axes.set_ylim(0, panel["fieldConfig"]["defaults"]["max"] * 1.02)
        elif panel["fieldConfig"]["defaults"].get("min") == 0:
            axes.set_ylim(bottom=0)
        if joined:
            axes.legend(fontsize=4.5, ncol=2, loc="upper right", framealpha=0.6)
        self.mark(axes)

    def colours(self, panel, names):
        """Fixed colours where the panel has them for all."""
        wanted = [self.override(panel, name, "color") for name in names]
        return [COLOURS[each["fixedColor"]] for each in wanted] if all(wanted) else None

    def timeline(self, axes, panel):
        names = mapping(panel)
        rows = {}
        for name, times, values in self.series(panel):
            rows.setdefault(name, []).extend(zip(times, values))
        for row, (name, samples) in enumerate(sorted(rows.items())):
            for time, value in samples:
                text, colour = names.get(value, (str(value), "#cccccc"))
                axes.barh(row, 1.02, left=time, color=colour, height=0.8)
        axes.set_yticks(range(len(rows)), sorted(rows), fontsize=5)
        axes.set_xlim(0, self.length)
        handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for _, colour in names.values()]
        axes.legend(handles, [text for text, _ in names.values()], fontsize=4.5, ncol=len(names), loc="upper right", framealpha=0.8)
        self.mark(axes, texts=True)

    def stat(self, axes, panel):
        """What the panel read soon after the third program had joined, late in the run, and when it had settled."""
        axes.axis("off")
        unit, names = panel["fieldConfig"]["defaults"]["unit"], mapping(panel)
        third, end = self.moments["third"] - self.start, self.moments["end"] - self.start
        moments = [("at first", third + 3), ("in the midst", (third + end) / 2), ("after", self.length)]
        for row, (title, at) in enumerate(moments):
            texts = []
            for name, times, values in self.series(panel):
                value = next((value for time, value in zip(times, values) if abs(time - at) <= 1), None)
                if value is None:
                    continue
                if panel["options"]["textMode"] == "name":
                    text = name
                elif value in names:
                    text = names[value][0]
                elif unit == "dateTimeFromNow":
                    text = f"{at + self.start - value / 1000:.0f} s ago"
                else:
                    text = shown(value, unit)
                texts.append(f"{name} {text}" if panel["options"]["textMode"] == "value_and_name" else text)
            axes.text(0, 0.7 - row * 0.32, f"{title}:", fontsize=6, color="#666666")
            axes.text(0.3, 0.7 - row * 0.32, ", ".join(texts) or "—", fontsize=6, weight="bold")

    def draw(self, path):
        panels = self.dashboard["panels"]
        # One line more than the panels take, for the title.
        height = 1 + max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
        figure = pyplot.figure(figsize=(COLUMNS * UNIT_WIDTH, height * UNIT_HEIGHT))
        figure.text(0.5, 1 - 0.8 / height, f"{self.dashboard['title']} — {RUNS[self.run]}", fontsize=11, ha="center")
        for panel in panels:
            place = panel["gridPos"]
            left, top = place["x"] / COLUMNS, 1 - (place["y"] + 1) / height
            if panel["type"] == "row":
                figure.text(left + 0.005, top - 0.7 / height, panel["title"], fontsize=10, weight="bold")
                continue
            box = [left + 0.035, top - (place["h"] - 0.9) / height, place["w"] / COLUMNS - 0.045, (place["h"] - 2.2) / height]
            if panel["type"] == "state-timeline":
                box[0] += 0.04
                box[2] -= 0.04
            if panel["type"] == "stat":
                box[0], box[2] = left + 0.005, place["w"] / COLUMNS - 0.01
            axes = figure.add_axes(box)
            axes.set_title(panel["title"], fontsize=7, loc="left")
            axes.tick_params(labelsize=5)
            {"timeseries": self.timeseries, "state-timeline": self.timeline, "stat": self.stat}[panel["type"]](axes, panel)
        figure.savefig(path, dpi=80)
        pyplot.close(figure)
        # Few colours are used; a palette makes the file a third of the size.
        Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help="what `cargo xtask demo --prometheus --panels FILE` saved")
    parser.add_argument("folder", type=Path, help="where the pictures go")
    arguments = parser.parse_args()
    data = json.loads(arguments.data.read_text())
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(Path(__file__).parent.glob("*.json")):
        for run in RUNS:
            Page(data, json.loads(path.read_text()), run).draw(arguments.folder / f"{path.stem}-{run}.png")


if __name__ == "__main__":
    main()
