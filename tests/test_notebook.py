"""Notebook manners: short, escaped tables; a frame of all scores; bars; and the example notebook,
which runs."""

from __future__ import annotations

import json
import math
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest
import torch

from erase.delta import ErasedDelta
from erase.eval.report import EvalReport, mean_score
from erase.eval.report.notebook import SHOWN
from erase.eval.report.report import differences
from erase.parallel import progress
from erase.prompts.errors import ErasureError
from tests.report_fixtures import CONCEPT, report, scores
from tests.test_paired import rate

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebooks" / "quickstart.ipynb"


class Cells(HTMLParser):
    """The text of every cell, and the names of all elements."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.elements: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.elements.add(tag)
        if tag in ("td", "th", "caption", "small"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        self.cells[-1] += data


def test_a_report_shows_its_scores_and_what_changed():
    found = Cells(report()._repr_html_())
    assert found.cells[:4] == ["heart → star", "", "base", "erased"]
    ua = found.cells.index("UA % ↑")
    assert found.cells[ua + 2] == "100.0 [98.4, 100.0] better"
    assert found.cells[found.cells.index("CRA % ↑") + 2].endswith("worse")


def test_a_long_report_is_cut_and_says_so():
    many = [mean_score(f"score {i}", [1.0, 2.0]) for i in range(40)]
    html = report(base=[*scores(1, 2, 3), *many], erased=[*scores(2, 2, 3), *many])._repr_html_()
    assert html.count("<tr>") == SHOWN + 1 and "31 more scores: .to_pandas()" in html


def test_what_stands_in_a_table_is_text():
    bad = "<img src=x onerror=alert(1)>"
    one = report(base=[*scores(1, 2, 3), mean_score(bad, [1.0, 2.0])])
    one.concept = CONCEPT | {"target": bad}
    about = {"base_id": bad, "method": bad, "concepts": json.dumps([{"target": bad}])}
    delta = ErasedDelta({}, {}, about)
    for html in (one._repr_html_(), delta._repr_html_()):
        found = Cells(html)
        assert "img" not in found.elements and any(bad in cell for cell in found.cells)


def test_a_delta_tells_what_it_is():
    before, after = {"w": torch.zeros(2, 3)}, {"w": torch.tensor([[0.0, 1, 2], [0, 0, 0]])}
    about = {"base_id": "canvas", "method": "salun", "concepts": json.dumps([CONCEPT])}
    delta = ErasedDelta.between(before, after, about)
    found = Cells(delta._repr_html_())
    assert found.cells == [
        "heart erased", "base", "canvas", "method", "salun", "weights changed", "2 in 1 tensors",
        "sha256", delta.sha256[:12],
    ]  # fmt: skip


def test_the_frame_has_every_score_and_its_paired_difference():
    pytest.importorskip("pandas", reason="pandas, an extra, is not installed")
    rows = {"base": [rate("ASR", [1, 1, 1, 1])], "erased": [rate("ASR", [0, 0, 0, 1])]}
    one = EvalReport(CONCEPT, rows, {}, {}, differences(rows))
    frame = one.to_pandas()
    assert list(frame["row"]) == ["base", "erased"] and list(frame["value"]) == [100, 25]
    pair, (base, erased) = one.difference("erased", "ASR"), frame.to_dict("records")
    assert (erased["difference"], erased["p"]) == (pair.difference, pair.p) == (-75, 0.25)
    assert math.isnan(base["difference"]) and erased["n"] == 4 and erased["unit"] == "%"


def test_without_pandas_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ErasureError, match=r"pip install 'concept-erasure-toolkit\[pandas\]'"):
        report().to_pandas()


def test_a_notebooks_bar_is_taken_where_tqdm_chooses_it(monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    assert isinstance(progress.bar("x", "step", 3, shown=False), progress._Lines)
    notebook = ModuleType("tqdm.notebook")
    notebook.tqdm_notebook = type("Widget", (), {"__init__": lambda self, **options: None})
    monkeypatch.setitem(sys.modules, "tqdm.notebook", notebook)
    monkeypatch.setattr(progress.auto, "tqdm", notebook.tqdm_notebook)
    assert isinstance(progress.bar("x", "step", 3), notebook.tqdm_notebook)


def test_the_notebook_in_the_repository_holds_no_outputs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and all(not cell["outputs"] and cell["execution_count"] is None for cell in code)


@pytest.mark.slow
def test_the_example_notebook_runs(tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    shown = json.dumps([cell.get("outputs", []) for cell in notebook.cells])
    assert "heart erased" in shown and "UA % \\u2191" in shown and "image/png" in shown
