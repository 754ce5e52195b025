"""Pages as a browser shows them: what their tables say is what their JSON says, they sort, and they fit screens."""

import html
import json
import re
import shutil
import subprocess

import pytest
from test_training import RECIPE, TEST, TRAIN, SoftmaxStep

from mest_compile.measuring.table import Row, SpeedTable
from mest_compile.sweeping.results import SweepResults
from mest_compile.training.loop import Trainer
from mest_compile.training.reporting import write_report
from mest_compile.training.run import Silent

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PAGES, WIDTHS = ("table", "report", "sweep"), (1200, 400)
LOOK = """<!doctype html><meta charset="utf-8"><body>{frames}<pre id="found"></pre><script>
onload = () => {{
  const cells = t => [...t.rows].map(r => [...r.cells].map(c => c.textContent));
  const found = [...document.querySelectorAll("iframe")].map(f => {{
    const d = f.contentDocument, tables = [...d.querySelectorAll("table")], said = tables.map(cells);
    const head = [...d.querySelectorAll("th[data-sorts]")].find(t => t.textContent === "speed-up");
    const sorted = [];
    if (head) for (const _ of [1, 2]) {{ head.click(); sorted.push(cells(tables[0]).slice(1)); }}
    const plot = d.querySelector("svg.plot text");
    return {{page: f.dataset.page, width: f.clientWidth, wide: d.documentElement.scrollWidth, said, sorted,
             ink: f.contentWindow.getComputedStyle(plot).fill, letters: plot.getBoundingClientRect().height}};
  }});
  document.getElementById("found").textContent = JSON.stringify(found);
}};
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt-get install chromium")
def test_pages_say_what_their_json_says_sort_and_fit_a_phone(tmp_path):
    facts = {
        "model": "mlp", "width": None, "input_shape": [4, 20], "threads": 1, "baseline": "torch", "repeats": 7,
        "machine": {"cpu": "one"}, "versions": {}, "measured_at": "today",
    }  # fmt: skip
    speeds = {"block": 10.5, "pattern": 9.25, "filter": 2.0}
    rows = tuple(Row(name, 0.9, 0.02, 0.02 * x, x, x - 0.5, x + 0.5, 0.95, 2**20) for name, x in speeds.items())
    table = SpeedTable(rows, facts)
    table.to_html(tmp_path / "table.html")
    Trainer(SoftmaxStep(), RECIPE, tmp_path / "run", Silent()).fit(TRAIN, TEST)
    report = write_report(tmp_path / "run", tmp_path)
    cell = {"state": "finished", "epochs": 3, "of_epochs": 3, "planned_bytes": 2**20, "problem": None, "curve": []}
    cells = [
        {**cell, "settings": {"scheme": name}, "val": x / 20, "test": x / 25, "images_per_second": 1000 / x}
        for name, x in speeds.items()
    ]
    sweep = SweepResults(tuple(cells), "accuracy", "digits")
    sweep.to_html(tmp_path / "sweep.html")

    frames = "".join(
        f'<iframe data-page="{page}" src="{page}.html" width="{width}" height="800"></iframe>'
        for page in PAGES
        for width in WIDTHS
    )
    (tmp_path / "look.html").write_text(LOOK.format(frames=frames))
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom")
    own = f"--user-data-dir={tmp_path / 'browser'}"
    asked = [BROWSER, *options, own, (tmp_path / "look.html").as_uri()]
    dom = subprocess.run(asked, capture_output=True, text=True, timeout=300).stdout
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', dom, re.S)[1]))
    assert [(one["page"], one["width"]) for one in found] == [(page, width) for page in PAGES for width in WIDTHS]
    for one in found:
        assert one["wide"] <= one["width"] and one["letters"] >= 8, one  # nothing to scroll sideways, letters to read
        assert one["ink"] == "rgb(0, 0, 0)"
    for one in found[:2]:
        assert one["said"][0][1:] == table.cells()
        up = [[line[0] for line in order] for order in one["sorted"]]
        assert up == [["filter", "pattern", "block"], ["block", "pattern", "filter"]]  # by number: 2, 9.25, 10.5
    for one in found[4:]:
        assert one["said"][0] == [sweep.columns(), *sweep.cells()]
    for one in found[2:4]:
        said = {line[0]: line[1] for part in one["said"] for line in part if len(line) == 2}
        assert said["training loss"] == f"{report['loss']:.4f}"
        assert said["test accuracy"] == f"{report['test_accuracy']:.2%}"
        assert said["epochs"] == f"{report['epochs']} of {report['of_epochs']}"
        assert said["values"] == f"{report['memory_bytes']['values'] / 2**20:.2f} MiB"
