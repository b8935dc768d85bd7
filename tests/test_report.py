"""The report in a real browser, and what it is made of."""

import csv
import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
from toy import PRUNE, s2h
from s2h_cli import artifacts
from s2h_cli.report import page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--allow-file-access-from-files", "--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom"]
#: Shows a page in frames of both widths, and says of each how wide it is, how many marks each chart has, and what sticks out.
PROBE = """<!DOCTYPE html><title>waiting</title><pre id="out"></pre>
<iframe width="390" height="9000" src="PAGE"></iframe><iframe width="1440" height="9000" src="PAGE"></iframe>
<script>
addEventListener("load", () => setTimeout(() => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, root = page.documentElement;
    const charts = Object.keys(JSON.parse(page.getElementById("figures").textContent));
    return {
      width: root.clientWidth, needs: root.scrollWidth, text: page.body.innerText, background: frame.contentWindow.getComputedStyle(page.body).backgroundColor,
      marks: Object.fromEntries(charts.map(id => [id, page.querySelectorAll(`#${id} .point, #${id} .js-line, #${id} .heatmaplayer image`).length])),
      out: [...page.querySelectorAll(".main-svg, .card, h1, h2, p, pre")].filter(e => e.getBoundingClientRect().right > root.clientWidth + 1).length,
    };
  });
  document.getElementById("out").textContent = JSON.stringify(found);
}, 3000));
</script>"""


def seen(path, dark=False):
    """What the browser makes of a page at both widths."""
    (path.parent / "probe.html").write_text(PROBE.replace("PAGE", path.name))
    theme = [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    done = subprocess.run([BROWSER, *FLAGS, *theme, f"--user-data-dir={path.parent / 'profile'}", f"file://{path.parent / 'probe.html'}"],
                          capture_output=True, text=True, timeout=120)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not said, said
    text = re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.S)[1]
    return json.loads(text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


@pytest.fixture
def trained(here):
    """A folder of a run, with a name that HTML must not take for its own."""
    assert s2h(*PRUNE, "--epochs", "4", "-o", "a<b>&c") == 0
    return here / "a<b>&c"


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_shows_every_chart_at_both_widths_without_an_error(trained, dark):
    found = seen(trained / "report.html", dark)
    assert [one["width"] for one in found] == [390, 1440]
    for one in found:
        assert one["needs"] <= one["width"] and one["out"] == 0
        assert set(one["marks"]) == {"training", "channels", "costs", "widths", "gates"} and min(one["marks"].values()) > 0, one["marks"]
        for text in ("a<b>&c", "top-1", "MACs", "parameters", "latency", "model.onnx", "s2h prune net.py", "frozen" if "frozen" in one["text"] else "Frozen layers"):
            assert text in one["text"], text
        assert (one["background"] == "rgb(255, 255, 255)") != dark


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_several_runs_share_a_page(here, capsys):
    assert s2h(*PRUNE, "--flops", "0.4,0.6", "--epochs", "2", "-o", "both") == 0
    assert s2h("report", "both/f0.4", "both/f0.6", "-o", "out.html") == 0
    for one in seen(here / "out.html"):
        assert one["marks"] == {"accuracies": 2} and one["needs"] <= one["width"]
        assert "both/f0.4" in one["text"] and "both/f0.6" in one["text"]


def test_a_part_of_a_run_with_several_budgets_shows_its_own_columns(here):
    assert s2h(*PRUNE, "--flops", "0.4,0.6", "--epochs", "2", "-o", "both") == 0
    with open(here / "both" / "summary.csv") as file:
        rows = list(csv.DictReader(file))
    for budget in ("0.4", "0.6"):
        run = page.read_run(here / "both" / f"f{budget}")
        assert [row["top1_hard"] for row in run.rows] == [float(row[f"top1_hard_{budget}"]) for row in rows]
        assert len(run.rows) == len(run.widths[1]) == len(run.gates[1]) == 2 and "--flops 0.4,0.6" in run.config.command()


def test_the_charts_say_what_the_files_say(trained):
    run = page.read_run(trained)
    _, charts = page.single(run)
    layers = {layer["name"]: layer for layer in run.plan["layers"]}
    for name, key, position in (("channels", "out", 0), ("costs", "macs", 0)):
        whole, kept = charts[name]["data"]
        for at, (before, after) in enumerate(zip(whole["x"], kept["x"])):
            layer = layers[whole["text"][at].split("<br>")[0]]
            assert [after, before] == layer[key]
    assert sum(charts["costs"]["data"][1]["x"]) <= run.plan["macs"]["pruned"]
    atoms = sum(group["size"] for group in run.plan["groups"])
    assert all(sum(row) == atoms for row in run.gates[1])
    assert run.gates[1][-1][-1] == sum(group["kept"] for group in run.plan["groups"])  # at the end a gate is 0 or 1


@pytest.mark.parametrize("timed, said", [(("eager", "onnx"), "onnx, here, asked for 0.5"), (("eager",), "eager, here<")])
def test_the_latency_asked_for_stands_beside_its_own_format(trained, timed, said):
    run = page.read_run(trained)
    rows = [{"format": format, "batch": 1, "network": name, "timing": {"median": seconds, "low": seconds, "high": seconds}}
            for format in timed for name, seconds in (("whole", 0.002), ("small", 0.001))]
    body, _ = page.single(replace(run, plan={**run.plan, "budget": {"flops": 0.4, "latency": 0.5}}, config=replace(run.config, latency_format="onnx"),
                                  latency={"place": "here", "rows": rows, "pairs": [{"before": "whole", "after": "small", "reasons": []}]}))
    assert said in body


def test_a_run_without_training_has_a_report_too(here):
    assert s2h(*PRUNE, "--epochs", "0", "-o", "cut") == 0
    text = (here / "cut" / "report.html").read_text()
    assert "Channels that each layer keeps" in text and 'id="training"' not in text


def test_a_folder_without_a_run_is_refused(here, capsys):
    assert s2h("report", "data") == 2
    assert "plan.json" in capsys.readouterr().err


def test_what_was_measured_is_in_the_plan(trained):
    results = artifacts.read_plan(trained)["results"]
    assert set(results["files"]) == {"model.safetensors", "model.onnx", "model.ts", "model.pt2"}
    assert results["top1"]["exported"] == pytest.approx(results["top1"]["hard"]) == results["files"]["model.onnx"]["top1"]
