import pytest
import torch

from minigpt5.metrics.relevance import conversation_f1, mm_relevance, show_vokens, soft_f1, split_elements

RUN = "[IMG0][IMG1][IMG2]"


def unit(*values: float) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.tensor(values), dim=0)


def test_soft_f1_is_the_harmonic_mean():
    # Σ = 1.2; precision 1.2 / 3, recall 1.2 / 4.
    assert soft_f1([0.5, 0.7], missing=2, extra=1) == pytest.approx(2 * 0.4 * 0.3 / 0.7)
    assert soft_f1([], missing=1, extra=0) == 0.0
    assert soft_f1([0.5, -0.5], missing=0, extra=0) == 0.0


def test_equal_responses_are_fully_relevant():
    elements = [unit(1.0, 2.0), unit(0.0, 1.0)]
    assert mm_relevance(elements, elements) == pytest.approx(1.0)


def test_elements_are_paired_in_order_across_modalities():
    text, image = unit(1.0, 0.0), unit(0.6, 0.8)
    assert mm_relevance([text, image], [image]) == pytest.approx(soft_f1([0.6], missing=1, extra=0))
    assert mm_relevance([text], []) == 0.0
    assert mm_relevance([], [text]) == 0.0
    assert mm_relevance([], []) is None


@pytest.mark.parametrize(
    ("text", "images", "elements"),
    [
        (f"look {RUN} ###", ["a.png"], [("text", "look"), ("image", "a.png")]),
        (
            f"{RUN} and [IMG0] [IMG1] ###",
            ["a.png", "b.png"],
            [("image", "a.png"), ("text", "and"), ("image", "b.png")],
        ),
        (f"{RUN}{RUN}", ["a.png", "b.png"], [("image", "a.png"), ("image", "b.png")]),
        ("look [IMG0] here", [], [("text", "look"), ("text", "here")]),
        ("### ", ["a.png"], [("image", "a.png")]),
        ("<s> [IMG0] ###", ["a.png"], [("image", "a.png")]),
        ("<s> look [IMG0] </s>", ["a.png"], [("text", "look"), ("image", "a.png")]),
        ("", [], []),
    ],
)
def test_responses_are_split_into_elements(text, images, elements):
    assert split_elements(text, images) == elements


def test_conversation_counts_missing_and_extra_elements():
    turns = [{"text": 0.8, "image": "missing"}, {"text": "extra"}, {"image": 0.4}, {}]
    assert conversation_f1(turns, ("text", "image")) == pytest.approx(soft_f1([0.8, 0.4], missing=1, extra=1))
    assert conversation_f1([{"image": "missing"}], ("text", "image")) == 0.0


def test_vokens_are_shown_as_pictures():
    assert show_vokens("see [IMG0] [IMG1][IMG2] and [IMG0]###") == "see [picture] and [picture]"
