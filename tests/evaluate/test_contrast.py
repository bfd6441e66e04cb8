"""Retrieval, average precision and the rest against small cases worked out by hand."""

import numpy as np
import pytest

from af2_ray.evaluate.contrast import alignment, average_precision, retrieval, uniformity, zero_shot


def test_recall_and_map() -> None:
    similarity = np.array([[3, 1, 2], [9, 2, 1], [0, 1, 5]], dtype=np.float32)
    found = retrieval(similarity, np.eye(3, dtype=bool))
    assert found["r1"] == pytest.approx(2 / 3)
    assert found["r5"] == 1.0
    assert found["map10"] == pytest.approx((1 + 1 / 2 + 1) / 3)


def test_equal_scores_find_nothing() -> None:
    found = retrieval(np.zeros((20, 20), np.float32), np.eye(20, dtype=bool))
    assert (found["r1"], found["r10"], found["map10"]) == (0.0, 0.0, 0.0)


def test_average_precision() -> None:
    scores, relevant = np.array([0.9, 0.8, 0.7, 0.6]), np.array([True, False, True, False])
    assert average_precision(scores, relevant) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(scores, relevant, cut=2) == pytest.approx(1 / 2)
    with pytest.raises(ValueError, match="relevant"):
        retrieval(np.zeros((1, 2), np.float32), np.zeros((1, 2), bool))


def test_zero_shot_of_one_and_of_several_labels() -> None:
    similarity = np.array([[0.9, 0.1, 0.0], [0.5, 0.4, 0.6], [0.0, 0.7, 0.1]], dtype=np.float32)
    relevant = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0]], dtype=bool)
    found = zero_shot(similarity, relevant, ["a", "b", "c"])
    assert found["top1"] == pytest.approx(2 / 3, abs=1e-4)
    assert found["map"] == 1.0
    assert found["by_class"] == {"a": 0.5, "b": 0.5}
    assert found["top1_chance"] == pytest.approx(4 / 9, abs=1e-4)


def test_alignment_and_uniformity() -> None:
    corners = np.eye(2, dtype=np.float32)
    assert alignment(corners, corners) == 0
    assert alignment(corners, corners[::-1]) == pytest.approx(2)
    assert uniformity(corners) == pytest.approx(-4)
    assert uniformity(np.repeat(corners[:1], 3, 0)) == pytest.approx(0)
    assert uniformity(corners[:1]) is None
