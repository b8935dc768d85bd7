"""Text that strangers wrote is shown and does nothing: in a terminal, in HTML, in a chart, in Markdown; and only regular files are pushed."""

import csv
import io
import json
import random
import re
import shutil
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import onnx
import pytest
import torch
import zipfile
from markdown_it import MarkdownIt
from s2h_cli import artifacts, computed, config, exports, handout, hub, shown
from s2h_cli.errors import UserError
from s2h_cli.report import page, tables
from toy import PRUNE, s2h

HOSTILE = ("</script><script>alert(1)</script><img src=x onerror=alert(1)><!-- \x1b]0;title\x07\x1b[2J\r\n\u202e %{y} ``` | `a` [x](javascript:alert(1)) "
           "@BODY@ @FIGURES@ {x} **b** \x00 \ud800 =1+1")
MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])
RANDOM = random.Random(0)
TEXTS = [HOSTILE, "", *HOSTILE, *("".join(RANDOM.choices(HOSTILE, k=RANDOM.randrange(30))) for _ in range(200)),
         *("".join(map(chr, RANDOM.choices(range(0x3000), k=20))) for _ in range(50))]


def active(text):
    """Characters that a terminal acts on."""
    return [c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in "\n\u200c\u200d"]


def test_no_place_takes_text_for_anything_else():
    for text in TEXTS:
        check_places(text)


def check_places(text):
    assert not active(shown.printable(text)) and "\n" not in shown.printable(text)
    assert not active(shown.in_html(text)) and not set("<>\"'") & set(shown.in_html(text))
    assert not active(shown.in_chart(text)) and not set("<>") & set(shown.in_chart(text)) and "%{" not in shown.in_chart(text)
    assert shown.in_spreadsheet(text)[:1] not in ("=", "+", "-", "@", "\t", "\r")
    for place in (shown.in_markdown, shown.as_code, shown.code_block):
        markdown = place(text)
        assert not active(markdown)
        tags = set(re.findall(r"<(\w+)", MARKDOWN.render(f"Some {markdown} text.\n" if place != shown.code_block else markdown)))
        assert tags <= ({"p", "code"} if place is shown.as_code else {"pre", "code"} if place is shown.code_block else {"p"}), markdown


@pytest.mark.parametrize("text", TEXTS[::20])
def test_a_terminal_does_nothing_that_a_table_holds(text):
    out = io.StringIO()
    console = tables.PlainConsole(file=out, force_terminal=False, width=200, highlight=False, markup=False, emoji=False)
    table = tables._table(text, "*layer")
    table.add_row(text)
    table.caption = text
    console.print(text, table, tables.Text(text))
    assert not active(out.getvalue())


def hostile(value):
    """The same data with every text a hostile one, but for names that something is looked up by."""
    if isinstance(value, dict):
        return {key: item if key in ("network", "kept_indices") else hostile(item) for key, item in value.items()}
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return f"{HOSTILE} {value}" if isinstance(value, str) else value


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, tuple(name for name, _ in attributes)))


@pytest.fixture
def result(here):
    assert s2h(*PRUNE, "--epochs", "1", "-o", "run") == 0
    return here / "run"


def test_a_hostile_plan_is_shown_as_text(result, monkeypatch):
    plan = artifacts.read_plan(result)
    files = {HOSTILE: {"difference": 0.0}} | plan["results"]["files"]

    def skeleton(plan):
        """The page without its texts: tags and the names of their attributes."""
        monkeypatch.setattr(computed, "checked", lambda folder: artifacts.Result(plan, None, {}))
        text = page.write_report(result).read_text(encoding="utf-8")
        tags = Tags()
        tags.feed(text)
        return text, tags.found

    before, tags = skeleton({**plan, "results": {**plan["results"], "files": files}})
    after, still = skeleton({**hostile(plan), "input_size": ["<b>", HOSTILE, 16], "results": {**plan["results"], "files": files}})
    assert still == tags
    charts = re.search(r'id="figures">(.*?)</script>', after, re.S)[1]
    assert "<" not in charts and not active(charts) and set(json.loads(charts)) == set(json.loads(re.search(r'id="figures">(.*?)</script>', before, re.S)[1]))

    out = io.StringIO()
    tables.PlainConsole(file=out, width=300, highlight=False, markup=False, emoji=False).print(tables.inspection(hostile(plan)))
    assert not active(out.getvalue()) and "\\x1b" in out.getvalue()

    evil = {**hostile(plan), "results": {**plan["results"], "files": files}}
    settings_ = config.earlier(result / "args.yaml")
    for name in ("model", "data", "weights"):
        setattr(settings_, name, HOSTILE)
    card = handout.card(result, evil, settings_, ["python infer_onnx.py image.jpg"])
    assert not active(card)
    html = MARKDOWN.render(card)
    assert set(re.findall(r"<(\w+)", html)) <= {"hr", "h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "pre", "code"}, html


def test_names_of_groups_are_no_formulas(tmp_path):
    from s2h_cli.report.curves import write_table

    write_table(tmp_path / "widths.csv", ["@SUM(1)", "=1+1", "layer1"], [[1.0, 1.0, 1.0]])
    with open(tmp_path / "widths.csv") as file:
        assert next(csv.reader(file)) == ["epoch", "'@SUM(1)", "'=1+1", "layer1"]


def test_an_error_is_one_line_without_escapes(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert s2h("inspect", "no\x1b[2J\nsuch\u202e.py:f") == 2
    error = capsys.readouterr().err
    assert not active(error) and error.count("\n") == 1 and "\\x1b" in error


# ---------------------------------------------------------------------------------------------------------------------
# Files of others


@pytest.mark.parametrize("name", ["model.ts", "model.pt2"])
def test_files_that_can_run_code_are_loaded_when_they_are_trusted(result, capsys, name, monkeypatch):
    monkeypatch.setattr(torch.jit, "load", lambda *args, **options: pytest.fail("loaded"))
    monkeypatch.setattr(torch.export, "load", lambda *args, **options: pytest.fail("loaded"))
    for command in (("eval", result / name, "--data", "data"), ("bench", result / name, "--seconds", "0.1")):
        assert s2h(*command) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "--trust" in error


def changed(file, change):
    """An ONNX file after a change of its model."""
    model = onnx.load(str(file))
    change(model)
    onnx.save(model, str(file))
    return file


def external(location):
    def change(model):
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
    return change


def looped(model):
    body = onnx.helper.make_graph([], "body", [], [])
    model.graph.node.add(op_type="Loop", name="loop").attribute.append(onnx.helper.make_attribute("body", body))


@pytest.mark.parametrize("change, words", [
    (external("/etc/hostname"), "no file beside it"), (external("../net.py"), "no file beside it"), (external("link"), "no file beside it"),
    (external(""), "no file beside it"), (looped, "Loop"), (lambda model: model.functions.add(name="f", domain="d"), "functions of its own"),
    (lambda model: setattr(model.graph.node[0], "domain", "evil"), "cannot be loaded")])
def test_an_onnx_file_reads_nothing_elsewhere_and_ends(result, change, words):
    (result / "link").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match=words):
        exports.run_artifact(changed(result / "model.onnx", change))


METADATA = {"classes": [1, 2], "input_size": [3, 10**9, 16], "mean": ["a"], "std": [0.0, 1.0, 1.0], "interpolation": "__class__", "crop_pct": float("nan"),
            "split": {"spec": "x"}, "batch": -1, "other": 1}


@pytest.mark.parametrize("name", METADATA)
@pytest.mark.parametrize("file", ["model.onnx", "model.ts"])
def test_metadata_of_wrong_types_are_one_line(tmp_path, file, name):
    metadata = json.dumps({name: METADATA[name]})
    if file == "model.onnx":
        onnx.save(onnx.ModelProto(metadata_props=[onnx.StringStringEntryProto(key="s2h.json", value=metadata)]), str(tmp_path / file))
    else:
        with zipfile.ZipFile(tmp_path / file, "w") as archive:
            archive.writestr("model/extra/s2h.json", metadata)
    with pytest.raises(UserError, match="cannot be read"):
        exports.read_metadata(tmp_path / file)


@pytest.mark.parametrize("content", [b" " * (exports.JSON_BYTES + 1), b"[" * 10**6, b"[]", b"1", b"\xff"], ids=["bomb", "deep", "list", "number", "bytes"])
def test_an_archive_that_is_larger_than_it_looks_is_not_unpacked(tmp_path, content):
    with zipfile.ZipFile(tmp_path / "model.ts", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/extra/s2h.json", content)
    with pytest.raises(UserError, match="cannot be read"):
        exports.read_metadata(tmp_path / "model.ts")


def test_a_push_follows_no_link(result, tmp_path):
    secret = tmp_path / "secret.csv"
    secret.write_text("secret")
    for name in ("secret.csv", "model-b.onnx"):
        (result / name).symlink_to(secret)
    (result / "bench.json").unlink()
    (result / "bench.json").mkdir()
    files, left_out = hub.pushable(result)
    assert left_out == ["bench.json", "model-b.onnx", "secret.csv"]
    assert {"plan.json", "model.safetensors", "README.md"} <= set(files) and not set(files) & set(left_out)
    weights = result / "model.safetensors"
    shutil.move(weights, tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link"):
        hub.push(result, "me/small")


def test_paths_of_this_machine_are_told_before_they_are_published(result):
    assert hub.own_paths(result) == []
    saved = config.earlier(result / "args.yaml")
    saved.data = str(Path("data").absolute())
    config.write(saved, result)
    assert hub.own_paths(result) == [saved.data]
