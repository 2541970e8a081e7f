import json
import re
from urllib.parse import unquote

import pytest

from minigpt5.metrics.catalogue import explain
from minigpt5.metrics.report import GALLERY_SIZE, render_report, write_report
from minigpt5.metrics.scores import Coverage, Score, Scores
from minigpt5.metrics.suites import score
from minigpt5.predictions import Prediction
from tests.unit.metrics.small_store import StoreBuilder, picture

EVIL = '<script>alert("x")</script>'


def _write(tmp_path, networks):
    store = StoreBuilder(tmp_path, "mmdialog")
    store.add("0_1-mm", [picture(1)], [picture(2)], picture(3), f"{EVIL} [IMG0] ###", "a dog & a cat", EVIL)
    store.add("a/b_2", [], [picture(4)], None, "", "no reply")
    predictions = store.read()
    scores = score("mmdialog", predictions, tmp_path, networks, tmp_path)
    return write_report(tmp_path, predictions, scores).read_text(encoding="utf-8"), scores


def test_text_is_escaped(tmp_path, networks):
    page, _ = _write(tmp_path, networks)
    assert "<script" not in page
    assert "a dog &amp; a cat" in page


def test_pictures_are_relative_links_to_files(tmp_path, networks):
    page, _ = _write(tmp_path, networks)
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 4
    assert all((tmp_path / unquote(source)).is_file() for source in sources)
    assert "http" not in page


def test_results_are_strict_json_with_counts(tmp_path, networks):
    _, scores = _write(tmp_path, networks)

    def refuse(constant):
        raise AssertionError(constant)

    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"), parse_constant=refuse)
    published = json.loads((tmp_path / "results_dict.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert published == scores.published == results["published"]
    assert results["scores"]["clip_similarity"]["count"] == 1
    assert results["scores"]["clip_similarity"]["total"] == 2
    assert results["scores"]["clip_similarity"]["better"] == "higher"
    assert results["scores"]["clip_similarity"]["network"] == scores.networks["clip"]
    assert results["coverage"]["image_missing_rate"] == 0.5
    assert [sample["id"] for sample in results["samples"]] == ["0_1-mm", "a/b_2"]


def test_report_says_what_could_not_be_scored():
    prediction = Prediction("cc3m_0", "cc3m", "generation", "a prompt", "no picture", "a dog")
    coverage = Coverage(1, 1, 0, 1, 0, 0, 0, 0, 0, 0)
    scores = Scores(
        "cc3m", {"fid": Score(None, 0, 1)}, {"overall_fid_score": None}, coverage, {}, [{}], ["No FID."]
    )
    page = render_report("run", [prediction], scores)
    assert "No FID." in page
    assert "0 of 1" in page
    assert '<td class="number">–</td>' in page


@pytest.mark.parametrize("with_baseline", [True, False])
def test_baseline_rows_only_where_there_is_a_baseline(tmp_path, networks, with_baseline):
    store = StoreBuilder(tmp_path, "vist")
    for step in range(2):
        baseline = picture(9) if with_baseline and step == 0 else None
        store.add(f"a_{step}", [picture(step)], [picture(step + 5)], baseline, "[IMG0]", "a dog", "a dog")
    predictions = store.read()
    scores = score("vist", predictions, tmp_path, networks, tmp_path)
    page = write_report(tmp_path, predictions, scores).read_text(encoding="utf-8").lower()
    names = ("baseline_fid", "baseline_clip_similarity", "overall_basline_fid_score", "baseline pictures")
    assert [name in page for name in names] == [with_baseline] * len(names)
    assert "published_inception_score" not in page and "<code>overall_fid_score" in page
    published = json.loads((tmp_path / "results_dict.json").read_text(encoding="utf-8"))
    assert "overall_basline_fid_score" in published


def test_gallery_is_limited_and_says_so():
    predictions = [Prediction(f"cc3m_{i}", "cc3m", "generation", "p", "t", "g") for i in range(GALLERY_SIZE + 5)]
    coverage = Coverage(len(predictions), 0, 0, 0, 0, 0, 0, 0, 0, 0)
    page = render_report("run", predictions, Scores("cc3m", {}, {}, coverage, {}, [{}] * len(predictions)))
    assert page.count("<article>") == GALLERY_SIZE
    assert f"The first {GALLERY_SIZE} of {len(predictions)}" in page


@pytest.mark.parametrize(
    ("name", "better", "published"),
    [("fid", "lower", False), ("baseline_fid", "lower", False), ("published_baseline_story_fid", "lower", True)],
)
def test_scores_are_explained(name, better, published):
    meaning = explain(name)
    assert (meaning.better, meaning.is_published) == (better, published)
    assert ("Stable Diffusion" in meaning.text) is ("baseline" in name)
