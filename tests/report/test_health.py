from dataclasses import replace

import pytest

from icons.consensus.composition import Kind
from icons.consensus.health import WHAT_TO_DO, Health
from icons.consensus.random_sets import Compared
from icons.report.build import Chosen, Pool, build
from icons.report.health import section
from icons.report.page import render
from icons.store import ScoreStore

MEASURED = Health(
    60,
    {"gqa": Compared(0.5, 0.25, 0.2, 0.3)},
    Compared(4.0, 10.0, 9.0, 11.0),
    [Kind("answer", "<yes>", 0.48, 0.2, 0.25, 9.0)],
    ["what pope asks is not known"],
)


def test_the_measures_stand_in_tables_beside_random_sets() -> None:
    found = section(MEASURED.plain())
    assert found is not None
    hurt, kinds = found.tables
    assert [[cell.value for cell in row] for row in hurt.rows] == [["gqa", "50 %", "25 %"]]
    assert hurt.rows[0][2].note == "20 to 30 %"
    assert [cell.value for cell in kinds.rows[0]] == ["answer: <yes>", "48.0 %", "20.0 %", "25.0 %"]
    assert "1,000 of its rows are worth 4 different ones; of random rows 10 (9 to 11)." in found.text[1]
    assert "what pope asks is not known" in found.text and WHAT_TO_DO in found.text


def test_a_selection_without_measures_has_no_such_section() -> None:
    assert section(None) is None
    found = section(Health(3).plain())
    assert found is not None and not found.tables and len(found.text) == 1


@pytest.mark.parametrize("measured", [True, False])
def test_the_page_shows_them_and_warns_at_its_head(
    scores: ScoreStore, chosen: Chosen, pool: Pool, measured: bool
) -> None:
    manifest = {**chosen.manifest} | ({"health": MEASURED.plain()} if measured else {})
    page = build(scores, replace(chosen, manifest=manifest), pool)
    html = render(page)
    assert ("Health of the selection" in html) == measured == ("&lt;yes&gt;" in html)
    assert any("hurts 50 % of the validation rows of gqa" in notice for notice in page.notices) == measured
    assert "deviation" not in html  # the details of the manifest are not shown as provenance
