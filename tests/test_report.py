"""report.py: what was measured is shown as it is, beside the paper's numbers, and no page loses an earlier table."""

import json

import numpy as np
import pytest
import torch

import report
import reproduce

SMALL = reproduce.Table("", ("8 labels",), tuple(reproduce.Row(name, "shapes", "none") for name in ("A", "B")), pairs=(("B", "A"),))


def test_a_table_has_means_deviations_and_differences_in_pairs_with_their_95_percent_intervals():
    scores = {("A", "8 labels"): {0: 40, 1: 50, 2: 60, 3: 70}, ("B", "8 labels"): {0: 41, 1: 52, 2: 63}}
    lines = report.markdown(SMALL, scores).splitlines()
    assert "| A | 55.0 ± 12.9 (4) |" in lines and "| B | 52.0 ± 11.0 (3) |" in lines
    # 1, 2 and 3 points: mean 2, standard deviation 1, t of 2 degrees of freedom 4.303, by sqrt(3): 2.48
    assert "| *B − A, in pairs, ± 95 % interval* | +2.0 ± 2.5 |" in lines


def test_a_table_of_the_paper_shows_its_numbers_and_the_difference():
    table = reproduce.TABLES["table5"]
    scores = {("×2 DDeP", column): {} for column in table.columns}
    scores["×2 DDeP", "1/8"] = {0: 72.0, 1: 74.0}
    lines = report.markdown(table, scores).splitlines()
    assert lines[2] == "| ×2 DDeP | –; 80.91 | –; 76.86 | 73.0 ± 1.4 (2); 73.81; -0.8 | –; 64.75 |"
    assert lines[3] == "| AdvSemSeg (cited in the paper, not run here) | – | 62.30 | 58.80 | – |"


def test_student_quantiles_are_those_of_the_distribution():
    """By the integral of Student's density from -t to t, in steps of a thousandth."""
    for degrees, t in enumerate(report.STUDENT, 1):
        x = np.linspace(-t, t, 2 * int(t * 1000) + 1)
        density = (1 + x * x / degrees) ** (-(degrees + 1) / 2)
        wide = np.tan(np.linspace(-np.pi / 2 + 1e-6, np.pi / 2 - 1e-6, 200_001))
        whole = np.trapezoid((1 + wide * wide / degrees) ** (-(degrees + 1) / 2), wide)
        assert np.trapezoid(density, x) / whole == pytest.approx(0.95, abs=0.001)


def test_names_in_pictures_have_only_characters_of_pillows_own_font():
    names = [report.in_pictures(row.name) for table in reproduce.TABLES.values() for row in table.rows]
    assert all(map(str.isascii, names)) and "x3 DDeP" in names and "predict noise" in names


def test_curves_have_the_share_of_labels_or_the_number_in_the_rows_name_along_x(monkeypatch):
    drawn = {}
    monkeypatch.setattr(report, "curves", lambda series, *labels: drawn.update(series=series, labels=labels))
    table = reproduce.TABLES["figure6"]
    report.curve(table, {(row.name, column): {0: 1.0, 1: 3.0} for row in table.rows for column in table.columns})
    assert [point[0] for point in drawn["series"]["x2 DDeP"]] == pytest.approx([100 / 30, 12.5, 25, 100])
    assert drawn["series"]["x2 DDeP"][0][1:] == (2.0, pytest.approx(2 ** 0.5))
    table = reproduce.TABLES["figure5left"]
    report.curve(table, {(row.name, "1%"): {0: 10.0 if "ADE" in row.name else 20.0} for row in table.rows})
    assert [point[0] for point in drawn["series"]["mean"]] == [0.1, 0.16, 0.22, 0.32, 0.45, 0.59]
    assert {point[1] for point in drawn["series"]["mean"]} == {15.0}


def test_figure_4_shows_the_image_and_both_kinds_of_noise_at_each_level():
    class Grey:
        def read(self, i):
            return {"image": torch.full((3, 64, 64), 128, dtype=torch.uint8)}

    panel = np.asarray(report.noise_panel(Grey())).astype(float)
    deviation = [[panel[top + 5:top + 150, left + 5:left + 150].std() / 127.5 for left in range(6, 997, 166)] for top in (24, 190)]
    assert deviation[0][0] == deviation[1][0] == 0
    assert deviation[0][1:3] == pytest.approx([0.1, 0.23], rel=0.05)
    # Eq. 5: sqrt(1 - gamma) with gamma = 1 / (1 + sigma^2)
    assert deviation[1][1:3] == pytest.approx([0.1 / 1.01 ** 0.5, 0.23 / (1 + 0.23 ** 2) ** 0.5], rel=0.05)


def test_the_page_keeps_all_repeats_and_the_rates_of_earlier_commands(run_here, tmp_path):
    def scores():
        return {name: len(runs) for name, runs in json.loads((tmp_path / "out" / "results.json").read_text()).items()}

    (tmp_path / "out" / "runs" / "of a torchrun before").mkdir(parents=True)  # as README's Slurm lines do
    for flags in (("table5", "--scale", "small", "--no-sweep"), ("table4", "--scale", "small")):
        assert run_here(*flags)[0] == 0
    assert scores()["table5"] == 8 and scores()["table4"] == 12
    kept = [path.parent.name for path in (tmp_path / "out").rglob("last.pt") if path.parent.name.startswith("shapes")]
    assert len(kept) == 4 + 6 and all("seed_0" in name for name in kept)  # of fine-tunings the first seed's weights
    assert not list((tmp_path / "out").rglob("claim-*")) and not list((tmp_path / "out").glob("*.tmp"))
    assert run_here("table5", "--scale", "small", "--no-sweep", "--repeats", 1)[0] == 0
    assert scores()["table5"] == 8 and scores()["table4"] == 12
    listed = run_here("list", "--scale", "small")[1]
    assert "table5        Table 5: beside other methods; Cityscapes: 8 of 8" in listed and "12 of 12" in listed


def test_the_page_keeps_the_tables_of_earlier_commands(run_here, tmp_path):
    for table in ("table5", "figure4", "figure3"):
        assert run_here(table, "--scale", "small", "--no-sweep")[0] == 0
    page = (tmp_path / "out" / "results.md").read_text()
    titles = [line.removeprefix("## ").split(":")[0] for line in page.splitlines() if line.startswith("## ")]
    # Tables 1 and 2 share their 1/4 = 25 % with Figure 3, Figure 6 its x2 DDeP with Table 5
    assert titles == ["Table 1", "Table 2", "Figure 3", "Figure 4", "Figure 6", "Table 5"]
    assert "| ×2 DDeP | 50.0 ± 0.0 (2); 80.91 |" in page and "(figure4_noise.png)" in page and "(figure3_curve.png)" in page
