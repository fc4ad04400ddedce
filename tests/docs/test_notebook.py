"""The notebook of the documentation: committed as it ran, and it runs."""

import json

import pytest
from source_tree import ROOT

NOTEBOOK = ROOT / "docs" / "first_steps.ipynb"


def test_it_is_committed_as_it_ran():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}
    assert not any(output.get("name") == "stderr" for output in outputs)
    assert NOTEBOOK.stat().st_size < 200_000


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # those of the notebook's own tools
def test_it_runs():
    nbclient, nbformat = (pytest.importorskip(name) for name in ("nbclient", "nbformat"))
    for name in ("ipykernel", "flax", "matplotlib"):
        pytest.importorskip(name)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    )
    client.execute()  # an error in a cell is an error here
    printed = "".join(
        output["text"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output["output_type"] == "stream"
    )
    memory = next(line for line in printed.splitlines() if line.split()[:1] == ["8192"])
    _, dense, chunked = map(float, memory.split())
    assert chunked < dense / 10
